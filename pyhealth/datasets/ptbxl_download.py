"""PTB-XL from the network to the disk, every file checked against its hash."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

import pandas as pd
import pooch
import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from ..processors.wfdb_record import is_address

__all__ = ["BASE_URL", "CITATION", "SUMS", "download", "folder_of", "read_sums"]

logger = logging.getLogger(__name__)

#: Where PhysioNet publishes a version.
BASE_URL = "https://physionet.org/files/ptb-xl/{version}/"
SUMS = "SHA256SUMS.txt"
TABLES = ("ptbxl_database.csv", "scp_statements.csv")
LICENCE = "LICENSE.txt"
CITATION = (
    "PTB-XL is licensed under CC BY 4.0. Cite Wagner et al., PTB-XL, a large publicly "
    "available electrocardiography dataset, Scientific Data 7:154, 2020."
)
#: Column of the table with a record's path, by sampling rate in hertz.
PATH_COLUMNS = {100: "filename_lr", 500: "filename_hr"}
#: Seconds to wait for a connection, and for the next bytes.
TIMEOUT = (10, 60)
#: Answers that another try may change.
PASSING = (408, 429, 500, 502, 503, 504)
#: Further tries: of a request, and of a whole file that came damaged.
TRIES = {"request": 5, "file": 2}
#: A server that fails so often in a row is not asked for the rest.
HOPELESS = 20
#: What a table may take on the disk, and the block in which a disk gives room; bytes.
TABLE_BYTES, BLOCK = 10_000_000, 4096


def folder_of(root: str | Path) -> Path:
    """Return a folder's path in full.

    Args:
        root: the folder.

    Raises:
        ValueError: if it is an address.

    Examples:
        >>> folder_of("s3://bucket/ptbxl")
        Traceback (most recent call last):
        ValueError: root must be a folder on the disk, got s3://bucket/ptbxl.
    """
    if is_address(str(root)):
        raise ValueError(f"root must be a folder on the disk, got {root}.")
    return Path(root).expanduser().resolve()


def download(
    root: str | Path,
    version: str = "1.0.3",
    sampling_rates: Sequence[int] = (100,),
    records: Iterable[int] | None = None,
    workers: int = 8,
    base_url: str = BASE_URL,
) -> Path:
    """Fetch what is missing of PTB-XL.

    A file that is there is verified and fetched again if it is not the published one. A
    file gets its name only when it is whole and its hash is right, so a download that
    was stopped or killed goes on with the same call.

    Args:
        root: folder of the corpus; made if missing.
        version: of PTB-XL.
        sampling_rates: 100, 500 or both, hertz: 0.6 and 2.8 GB on the disk.
        records: ecg_id of those to fetch; all by default.
        workers: files that are fetched at the same time.
        base_url: address of the folder that holds SHA256SUMS.txt.

    Returns:
        The folder.

    Raises:
        ValueError: if an argument cannot be used, or SHA256SUMS.txt is none.
        OSError: if the disk is too small, or files could not be had; it names them.
            Without a network a whole corpus is verified by the SHA256SUMS.txt in it.

    Examples:
        >>> download("ptbxl", sampling_rates=[100], records=range(1, 101))
        ... # doctest: +SKIP
    """
    unknown = sorted(set(sampling_rates) - set(PATH_COLUMNS))
    if unknown or not sampling_rates:
        raise ValueError(
            f"sampling_rates must be some of {list(PATH_COLUMNS)}, got "
            f"{list(sampling_rates)}."
        )
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}.")
    root = folder_of(root)
    root.mkdir(parents=True, exist_ok=True)
    is_new = not (root / SUMS).exists()
    fetcher = _Fetcher(root, base_url.format(version=version), workers)
    sums = _fetch_sums(fetcher)
    tables = [name for name in (*TABLES, LICENCE) if name in sums or name in TABLES]
    fetcher.fetch(tables, sums)
    if is_new:
        logger.warning(CITATION)
    table = pd.read_csv(root / TABLES[0], index_col="ecg_id")
    fetcher.fetch(_record_files(table, sampling_rates, records), sums)
    return root


def _fetch_sums(fetcher: _Fetcher) -> dict[str, str]:
    """Fetch the hashes anew, since nothing says whether those that are there are right.

    They may be another version's.
    """
    path = fetcher.root / SUMS
    with tempfile.TemporaryDirectory(dir=fetcher.root) as folder:
        fresh = _Fetcher(Path(folder), fetcher.base_url, 1)
        try:
            fresh.fetch([SUMS], {SUMS: None})
        except OSError as error:
            if not path.exists():
                raise
            logger.warning("%s Going on with the one in %s.", error, fetcher.root)
            return read_sums(path)
        sums = read_sums(fresh.root / SUMS)
        (fresh.root / SUMS).replace(path)
    return sums


def read_sums(path: Path) -> dict[str, str]:
    """Read the published hashes.

    Args:
        path: of SHA256SUMS.txt.

    Returns:
        SHA-256 by path below the corpus.

    Raises:
        ValueError: if a line is no hash and path, or a path leaves the corpus.

    Examples:
        >>> read_sums(Path("ptbxl/SHA256SUMS.txt"))  # doctest: +SKIP
    """
    sums = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *]?(\S.*)", line)
        if match is None or not _is_inside(match[2]):
            raise ValueError(
                f"{path}, line {number}: expected a SHA-256 and a path inside the "
                f"corpus, got {line[:80]!r}. Fetch it again, from PTB-XL's address."
            )
        sums[match[2]] = match[1]
    if not sums:
        raise ValueError(f"{path} is empty. Fetch it again, from PTB-XL's address.")
    return sums


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _record_files(
    table: pd.DataFrame, rates: Sequence[int], records: Iterable[int] | None
) -> list[str]:
    if records is not None:
        records = list(dict.fromkeys(records))
        unknown = [ecg_id for ecg_id in records if ecg_id not in table.index]
        if unknown:
            raise ValueError(
                f"ptbxl_database.csv has no record with ecg_id {_some(unknown)}."
            )
        table = table.loc[records]
    return [
        f"{record}{suffix}"
        for rate in rates
        for record in table[PATH_COLUMNS[rate]]
        for suffix in (".hea", ".dat")
    ]


class _Fetcher:
    """Fetches files into a folder, several at a time.

    Args:
        root: the folder.
        base_url: address of the same folder on the server.
        workers: threads.
    """

    def __init__(self, root: Path, base_url: str, workers: int) -> None:
        self.root = root
        self.base_url = base_url if base_url.endswith("/") else f"{base_url}/"
        self.workers = workers
        pooch.get_logger().setLevel(logging.WARNING)  # it tells every file

    def fetch(self, names: Sequence[str], sums: Mapping[str, str | None]) -> None:
        """Fetch what is missing or damaged of some files.

        Args:
            names: paths below the folder.
            sums: SHA-256 by path; None for a file without one.

        Raises:
            OSError: if the disk is too small, or a file could not be had.
        """
        unlisted = [name for name in names if name not in sums]
        if unlisted:
            raise OSError(
                f"{self.base_url}{SUMS} does not list {_some(unlisted)}, so it cannot "
                "be verified. Is this the address of PTB-XL?"
            )
        self._check_space(names)
        for folder in {(self.root / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        failed: dict[str, BaseException] = {}
        in_a_row = 0
        with (
            ThreadPoolExecutor(self.workers) as pool,
            _Connections(self.workers) as get,
        ):
            keeper = pooch.create(
                self.root,
                self.base_url,
                registry=dict(sums),
                retry_if_failed=TRIES["file"],
            )
            jobs = {pool.submit(keeper.fetch, name, None, get): name for name in names}
            try:
                for job in self._told(as_completed(jobs), len(jobs)):
                    error = job.exception()
                    in_a_row = in_a_row + 1 if error else 0
                    if error is not None:
                        failed[jobs[job]] = error
                    if in_a_row == HOPELESS:
                        break
            finally:
                pool.shutdown(cancel_futures=True)
        if failed:
            name, error = next(iter(failed.items()))
            raise OSError(
                f"{len(failed)} of {len(names)} files could not be had from "
                f"{self.base_url}: {_some(list(failed))} ({name}: {error}). The same "
                "call goes on with what is missing."
            ) from error

    def _told[T](self, jobs: Iterator[T], count: int) -> Iterator[T]:
        """Show a bar with rate and time left, where there is much to fetch."""
        return tqdm(
            jobs,
            total=count,
            desc=f"PTB-XL to {self.root}",
            unit="file",
            disable=count <= len(TABLES) + 1,
        )

    def _check_space(self, names: Sequence[str]) -> None:
        missing = (name for name in names if not (self.root / name).exists())
        needed = sum(_bytes_of(name) for name in missing)
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise OSError(
                f"{self.root} needs {needed / 1e9:.1f} GB more for these records, and "
                f"{free / 1e9:.1f} GB are free. Make room, choose another folder, or "
                "fetch 100 Hz or fewer records."
            )


class _Connections:
    """Opens connections that are kept, and gives pooch a function that uses them."""

    def __init__(self, workers: int) -> None:
        self.session = requests.Session()
        retry = Retry(
            total=TRIES["request"],
            backoff_factor=0.5,
            status_forcelist=PASSING,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(workers, workers, retry))

    def __enter__(self) -> Callable[[str, str, pooch.Pooch], None]:
        return self.get

    def __exit__(self, *error: object) -> None:
        self.session.close()

    def get(self, url: str, target: str, _: pooch.Pooch) -> None:
        """Write what lies at an address to a file."""
        with self.session.get(url, stream=True, timeout=TIMEOUT) as response:
            status = response.status_code
            if 400 <= status < 500 and status not in PASSING:
                # Not a requests exception, after which pooch would ask again.
                raise FileNotFoundError(f"{status} {response.reason}")
            response.raise_for_status()
            with open(target, "wb") as file:
                file.writelines(response.iter_content(1 << 16))


def _bytes_of(name: str) -> int:
    """Return the room that a file takes on the disk."""
    if not name.endswith(".dat"):
        return TABLE_BYTES if name.endswith(".csv") else BLOCK
    rate = 500 if "_hr" in name else 100
    return -(-rate * 10 * 12 * 2 // BLOCK) * BLOCK  # 10 s, 12 leads, 16 bits


def _some(names: Sequence[object], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(str(name) for name in names[:shown]) + more
