"""How long a record's files take to read, with wfdb's parser and without.

    python benchmarks/reading.py --data_root FOLDER
    python benchmarks/reading.py --table    # prints what was measured last

Both read the same record one after the other, so that other load on the machine falls
on both; the figures are medians over records.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

from markdown_table import markdown
from rows import Rows

RATES = {"records100": 100, "records500": 500}
#: Times that every record is read; the first fills the system's cache.
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", help="folder of PTB-XL")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    rows = Rows(Path(arguments.output) / "reading_real.jsonl")
    if not arguments.table:
        for folder, rate in RATES.items():
            if {"rate": rate} not in rows:
                rows.append({"rate": rate, **measured(arguments.data_root, folder)})
    print(document(rows))


def measured(root: str, folder: str) -> dict[str, float]:
    """Return the milliseconds of a record by either reader, and their ratio."""
    import wfdb

    from pyhealth.processors.wfdb_record import read_digital

    readers = {
        "header": wfdb.rdheader,
        "wfdb": lambda path: wfdb.rdrecord(path, physical=False, m2s=False),
        "plain": read_digital,
    }
    paths = [
        str(p.with_suffix("")) for p in sorted((Path(root) / folder).rglob("*.hea"))
    ]
    times = {name: [] for name in readers}
    for turn in range(ROUNDS):
        for path in paths:
            for name, read in readers.items():
                taken = milliseconds(read, path)
                if turn:
                    times[name].append(taken)
    ratios = [a / b for a, b in zip(times["wfdb"], times["plain"], strict=True)]
    return {
        "records": len(paths),
        **{name: statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(ratios),
    }


def milliseconds(read: Callable, path: str) -> float:
    started = time.perf_counter()
    read(path)
    return (time.perf_counter() - started) * 1000


def document(rows: Iterable[Mapping]) -> str:
    """Return the table in Markdown, as docs/scale.md has it."""
    lines = [
        [f"{row['rate']} Hz", str(row["records"])]
        + [f"{row[name]:.2f}" for name in ("wfdb", "header", "plain")]
        + [f"{row['ratio']:.1f}"]
        for row in rows
    ]
    header = ["recording", "records", "wfdb, ms", "of it the header, ms"]
    return markdown([*header, "here, ms", "wfdb / here"], lines)


if __name__ == "__main__":
    main()
