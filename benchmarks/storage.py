"""What smaller numbers would cost a stored record, and save.

    python benchmarks/storage.py --data_root FOLDER
    python benchmarks/storage.py --table    # prints what was measured last

Records are stored as float32 in millivolt. Measured is the largest error of any sample
over all records, after a round trip through two bytes a sample.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

import numpy as np
from markdown_table import markdown
from rows import Rows
from tqdm import tqdm

#: Hertz of the samples by the folder they come from.
RATES = {"records100": 100, "records500": 250}


def float16(signal: np.ndarray) -> np.ndarray:
    return signal.astype(np.float16).astype(np.float32)


def int16(signal: np.ndarray) -> np.ndarray:
    """Whole numbers of the record's largest value / 32767."""
    unit = np.abs(signal).max() / 32767
    return (np.rint(signal / unit).astype(np.int16) * unit).astype(np.float32)


KINDS: dict[str, tuple[int, Callable]] = {
    "float32 (as stored)": (4, lambda signal: signal),
    "float16": (2, float16),
    "int16, a unit a record": (2, int16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", help="folder of PTB-XL")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    rows = Rows(Path(arguments.output) / "storage_real.jsonl")
    if not arguments.table:
        for folder, rate in RATES.items():
            for row in measured(Path(arguments.data_root) / folder, rate):
                if {key: row[key] for key in ("kind", "rate")} not in rows:
                    rows.append(row)
    print(document(rows))


def measured(folder: Path, rate: int) -> list[dict]:
    """Return a row a kind: bytes a record and errors in microvolt."""
    from pyhealth.processors.ecg_record_processor import ECGRecordProcessor

    processor = ECGRecordProcessor(rate)
    errors = {kind: [] for kind in KINDS}
    paths = sorted(folder.rglob("*.hea"))
    for path in tqdm(paths):
        signal = processor.process(path.with_suffix("")).numpy()
        for kind, (_, round_trip) in KINDS.items():
            errors[kind].append(1000 * np.abs(round_trip(signal) - signal).max())
    return [
        {
            "kind": kind,
            "rate": rate,
            "records": len(paths),
            "kilobytes": size * signal.size / 1000,
            "median": float(np.median(errors[kind])),
            "largest": float(max(errors[kind])),
        }
        for kind, (size, _) in KINDS.items()
    ]


def document(rows: Iterable[Mapping]) -> str:
    """Return the table in Markdown, as docs/scale.md has it."""
    lines = [
        [
            row["kind"],
            f"{row['rate']} Hz",
            str(row["records"]),
            f"{row['kilobytes']:.0f}",
            f"{row['median']:.2f}",
            f"{row['largest']:.2f}",
        ]
        for row in rows
    ]
    header = ["numbers", "samples at", "records", "kB a record"]
    header += ["largest error of a record, median, µV", "of all records, µV"]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
