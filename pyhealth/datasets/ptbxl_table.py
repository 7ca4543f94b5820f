"""What has to be right in PTB-XL's table of records before anything is read."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pandas as pd

__all__ = ["check_table"]

#: Rows with a fault that are shown before the rest is counted.
SHOWN = 10
FOLDS = range(1, 11)


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
    table = _read(path, needed)
    problems: dict[int, str] = {}
    seen: dict[str, int] = {}
    for number, row in enumerate(table.to_dict("records"), start=1):
        problem = _problem(row, path_column)
        if not problem and row["ecg_id"] in seen:
            problem = f"ecg_id {row['ecg_id']} is in row {seen[row['ecg_id']]} too"
        if problem:
            problems[number] = problem
        seen.setdefault(row["ecg_id"], number)
    if problems:
        shown = [f"row {n}: {text}" for n, text in list(problems.items())[:SHOWN]]
        more = len(problems) - len(shown)
        tail = f"; and {more} more" if more else ""
        raise ValueError(
            f"{path}: {len(problems)} of {len(table)} rows cannot be used: "
            f"{'; '.join(shown)}{tail}. Fetch the table again, or mend these rows."
        )


def _read(path: Path, needed: list[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(
            path, dtype="string", encoding="utf-8", on_bad_lines="error"
        )
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty. Fetch it again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not in UTF-8 ({error.reason} at byte {error.start}). Fetch it "
            "again, or save it in UTF-8."
        ) from error
    except pd.errors.ParserError as error:
        raise ValueError(
            f"{path} cannot be read as a table ({str(error).strip()}). Fetch it again."
        ) from error
    missing = [name for name in needed if name not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns))
        raise ValueError(
            f"{path} has no column {', '.join(missing)}, found {found[:80]}. It must "
            "be the published table, separated by commas. Fetch it again."
        )
    if table.empty:
        raise ValueError(f"{path} has no row. Fetch it again.")
    return table


def _problem(row: dict[str, str], path_column: str) -> str:
    empty = [name for name, value in row.items() if pd.isna(value)]
    of_record = f"ecg_id {row['ecg_id']}: " if "ecg_id" not in empty else ""
    for name in ("ecg_id", "patient_id", "strat_fold", path_column):
        if name in empty:
            return f"{of_record}{name} is empty"
    if not row["ecg_id"].isdecimal():
        return f"ecg_id {row['ecg_id']!r} is no whole number"
    if row["strat_fold"].removesuffix(".0") not in map(str, FOLDS):
        return f"{of_record}strat_fold {row['strat_fold']!r} is not 1 to 10"
    name = PurePosixPath(row[path_column])
    if name.is_absolute() or ".." in name.parts or "\\" in row[path_column]:
        return f"{of_record}{path_column} {row[path_column]!r} leaves the folder"
    return ""
