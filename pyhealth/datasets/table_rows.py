"""Tables of records that somebody wrote: read as text, refused row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

__all__ = ["read_table", "refuse_rows"]

#: Rows at fault that are told before the rest is counted.
SHOWN = 10


def read_table(path: Path, needed: Sequence[str], strip: bool = False) -> pd.DataFrame:
    """Read a CSV file in UTF-8 as text.

    Args:
        path: of the file.
        needed: columns that it must have.
        strip: take blanks away around names and cells, as people write them.

    Returns:
        The table; an empty cell is missing.

    Raises:
        ValueError: if it is not such a file, lacks a column or has no row.

    Examples:
        >>> read_table(Path("records.csv"), ["record"])  # doctest: +SKIP
    """
    again = "Fetch it again, or save it in UTF-8."
    try:
        table = pd.read_csv(path, dtype="string", keep_default_na=False)
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty. {again}") from error
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path} is not in UTF-8 ({where}). {again}") from error
    except pd.errors.ParserError as error:
        problem = str(error).strip()
        raise ValueError(
            f"{path} cannot be read as a table ({problem}). {again}"
        ) from error
    if strip:
        table = table.rename(columns=str.strip).apply(lambda column: column.str.strip())
    missing = [name for name in needed if name not in table.columns]
    if missing:
        found = ", ".join(table.columns)
        raise ValueError(
            f"{path} has no column {', '.join(missing)}, found {found[:80]}. Columns "
            f"are separated by commas. {again}"
        )
    if table.empty:
        raise ValueError(f"{path} has no row. {again}")
    return table.replace("", pd.NA)


def refuse_rows(path: Path, problems: Mapping[str, str], total: int) -> None:
    """Raise if there are rows that cannot be used.

    Args:
        path: of the file.
        problems: what is wrong, by the row's name.
        total: number of rows.

    Raises:
        ValueError: if there is a problem; it tells the first ten.

    Examples:
        >>> refuse_rows(Path("records.csv"), {"line 2": "label is empty"}, 9)
        Traceback (most recent call last):
        ValueError: records.csv: 1 of 9 rows cannot be used: line 2: label is empty. \
Fetch the table again, or mend these rows.
    """
    if not problems:
        return
    shown = [f"{row}: {text}" for row, text in list(problems.items())[:SHOWN]]
    more = len(problems) - len(shown)
    tail = f"; and {more} more" if more else ""
    raise ValueError(
        f"{path}: {len(problems)} of {total} rows cannot be used: {'; '.join(shown)}"
        f"{tail}. Fetch the table again, or mend these rows."
    )
