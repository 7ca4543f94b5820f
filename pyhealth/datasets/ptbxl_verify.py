"""PTB-XL on the disk against its published hashes and its headers' checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..processors.wfdb_record import disagreeing_leads, read_digital
from .ptbxl_download import SUMS, folder_of, read_sums

__all__ = ["VerifyReport", "verify"]

#: Files that a report names before it counts the rest.
SHOWN = 10


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found.

    Attributes:
        verified: number of files whose hash is the published one.
        absent: published files that are not there: other rates, other records.
        changed: files whose bytes are not the published ones.
        unlisted: files in the folder that were never published.
        waveforms: number of waveforms that agree with their headers' checksums.
        damaged: what is wrong with the others, by record.

    Examples:
        >>> report = VerifyReport(2, [], ["scp_statements.csv"], [], 1, {})
        >>> report.ok
        False
    """

    verified: int
    absent: list[str]
    changed: list[str]
    unlisted: list[str]
    waveforms: int
    damaged: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether everything that is there is as published."""
        return not self.changed and not self.damaged

    def __str__(self) -> str:
        """Return the report in lines."""
        lines = [
            (
                f"{self.verified} files as published, {len(self.changed)} changed, "
                f"{len(self.absent)} published ones not there, "
                f"{len(self.unlisted)} others"
            ),
            (
                f"{self.waveforms} waveforms agree with their headers, "
                f"{len(self.damaged)} do not"
            ),
            *(f"changed: {name}" for name in self.changed[:SHOWN]),
            *(f"{name}: {what}" for name, what in list(self.damaged.items())[:SHOWN]),
        ]
        if not self.ok:
            names = [*self.changed, *self.damaged]
            rates = [
                rate for rate in (100, 500) if any(f"s{rate}/" in n for n in names)
            ]
            lines.append(
                f"PTBXLDataset.download(root, sampling_rates={rates or [100]}) fetches "
                "the changed files again."
            )
        return "\n".join(lines)


def verify(root: str | Path, workers: int = 8) -> VerifyReport:
    """Compare every file with its hash and every waveform with its header.

    A header has a checksum a lead: the sum of its samples in 16 bits (WFDB's header
    format, field "checksum").

    Args:
        root: folder of the corpus, with SHA256SUMS.txt.
        workers: threads.

    Returns:
        The report.

    Raises:
        FileNotFoundError: if there is no SHA256SUMS.txt.
        ValueError: if it is none.

    Examples:
        >>> print(verify("ptbxl"))  # doctest: +SKIP
    """
    root = folder_of(root)
    if not (root / SUMS).is_file():
        raise FileNotFoundError(
            f"{root / SUMS} is missing; PTBXLDataset.download(root) fetches it."
        )
    sums = read_sums(root / SUMS)
    # os.walk and not rglob, which does not enter a linked folder of records.
    found = {
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
    }
    there = sorted(found & set(sums))
    with ThreadPoolExecutor(workers) as pool:
        hashes = pool.map(_hash, [root / name for name in there])
        same = [
            own == sums[name]
            for own, name in zip(_told(hashes, there, "hashes"), there, strict=True)
        ]
        records = [str(root / name[:-4]) for name in there if name.endswith(".hea")]
        problems = list(_told(pool.map(_problem, records), records, "checksums"))
    damaged = {
        str(Path(record).relative_to(root)): problem
        for record, problem in zip(records, problems, strict=True)
        if problem
    }
    return VerifyReport(
        verified=sum(same),
        absent=sorted(set(sums) - found),
        changed=[
            name for name, is_same in zip(there, same, strict=True) if not is_same
        ],
        unlisted=sorted(found - set(sums) - {SUMS}),
        waveforms=len(records) - len(damaged),
        damaged=damaged,
    )


def _told(results: Iterable[str], of: Sequence[str], what: str) -> Iterable[str]:
    return tqdm(results, total=len(of), unit="file", desc=what)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(record: str) -> str:
    """Return what is wrong with a record's waveform; nothing if all is right."""
    try:
        wrong = disagreeing_leads(read_digital(record))
    except Exception as error:  # noqa: BLE001
        # wfdb raises many kinds, and each of them goes into the report.
        return f"cannot be read ({error})"
    if wrong:
        return f"lead {', '.join(wrong)} disagrees with the header's checksum"
    return ""
