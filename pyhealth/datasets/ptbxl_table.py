"""What has to be right in PTB-XL's table of records before anything is read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path, PurePosixPath

import pandas as pd

from .ptbxl_splits import FOLDS
from .table_rows import read_table, refuse_rows

__all__ = ["check_table"]


def check_table(path: Path, path_column: str) -> None:
    """Check the table's form, and identity, fold and path of every row.

    Args:
        path: of ptbxl_database.csv.
        path_column: the column with the records' paths.

    Raises:
        ValueError: if the table, or a row, cannot be used; it names the lines.

    Examples:
        >>> check_table(
        ...     Path("ptbxl/ptbxl_database.csv"), "filename_lr"
        ... )  # doctest: +SKIP
    """
    needed = ["ecg_id", "patient_id", "strat_fold", path_column]
    # The rest is long, and read when the events are made.
    table = read_table(path, needed)[needed]
    problems: dict[str, str] = {}
    seen: dict[str, int] = {}
    # Counted as rows: reports of several lines make lines and rows differ.
    for number, row in enumerate(table.to_dict("records"), start=1):
        problem = _problem(row, path_column)
        if not problem and row["ecg_id"] in seen:
            problem = f"ecg_id {row['ecg_id']} is in row {seen[row['ecg_id']]} too"
        if problem:
            problems[f"row {number}"] = problem
        seen.setdefault(row["ecg_id"], number)
    refuse_rows(path, problems, len(table))


def _problem(row: Mapping[Hashable, str], path_column: str) -> str:
    empty = [str(name) for name, value in row.items() if pd.isna(value)]
    of_record = f"ecg_id {row['ecg_id']}: " if "ecg_id" not in empty else ""
    if empty:
        return f"{of_record}{', '.join(empty)} is empty"
    if not row["ecg_id"].isdecimal():
        return f"ecg_id {row['ecg_id']!r} is no whole number"
    if row["strat_fold"].removesuffix(".0") not in map(str, FOLDS):
        return f"{of_record}strat_fold {row['strat_fold']!r} is not 1 to 10"
    name = PurePosixPath(row[path_column])
    if name.is_absolute() or ".." in name.parts or "\\" in row[path_column]:
        return f"{of_record}{path_column} {row[path_column]!r} leaves the folder"
    return ""
