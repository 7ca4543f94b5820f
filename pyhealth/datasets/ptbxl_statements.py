"""SCP-ECG statements as PTB-XL writes them: codes, likelihoods and what they mean."""

from __future__ import annotations

import ast
import csv
from collections.abc import Mapping
from pathlib import Path

from ..tasks.ecg_classification import SUPERCLASSES

__all__ = ["likelihoods_by_name", "parse_scp_codes", "statement_names"]

#: Longer than any published entry by far; longer ones are not parsed.
MAX_SCP_CHARACTERS = 10_000


def parse_scp_codes(text: str) -> dict[str, float]:
    """Parse PTB-XL's ``scp_codes`` column: statement codes and their likelihoods.

    Args:
        text: the text of a flat Python dict, e.g. ``"{'NORM': 100.0, 'SR': 0.0}"``. It
            is read as a literal; nothing in it is ever run.

    Returns:
        Likelihood in percent by code; 0 means "not stated".

    Raises:
        ValueError: if the text is anything else.

    Examples:
        >>> parse_scp_codes("{'IMI': 35.0, 'SR': 0.0}")
        {'IMI': 35.0, 'SR': 0.0}
    """
    shown = text if len(text) <= 60 else f"{text[:60]}..."
    problem = f"scp_codes must be a dict of code to likelihood 0-100, got {shown!r}."
    if len(text) > MAX_SCP_CHARACTERS:
        raise ValueError(problem)
    try:
        codes = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(problem) from error
    usable = isinstance(codes, dict) and all(
        isinstance(code, str)
        and isinstance(likelihood, int | float)
        and 0 <= likelihood <= 100
        for code, likelihood in codes.items()
    )
    if not usable:
        raise ValueError(problem)
    return {code: float(likelihood) for code, likelihood in codes.items()}


def statement_names(path: str | Path) -> dict[str, dict[str, str]]:
    r"""Read what each statement says: which diagnosis, form or rhythm.

    Args:
        path: PTB-XL's ``scp_statements.csv``.

    Returns:
        For "superclasses" and "subclasses" the name by code of a diagnostic statement,
        for "forms" and "rhythms" the code itself.

    Raises:
        ValueError: if a column is missing.

    Examples:
        >>> import tempfile
        >>> header = ",diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass"
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write(f"{header}\nASMI,1.0,,,MI,AMI\nSR,,,1.0,,\n")
        ...     file.flush()
        ...     names = statement_names(file.name)
        >>> names["subclasses"], names["rhythms"]
        ({'ASMI': 'AMI'}, {'SR': 'SR'})
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read as a table in UTF-8 ({error}). Fetch it again."
        ) from error
    needed = ["", "diagnostic", "form", "rhythm"]
    needed += ["diagnostic_class", "diagnostic_subclass"]
    if not rows or not set(needed) <= set(rows[0]):
        raise ValueError(
            f"{path}: expected the columns {needed} of PTB-XL's scp_statements.csv. "
            "Fetch the file again."
        )

    def named(kind: str, column: str) -> dict[str, str]:
        is_kind = (row for row in rows if row[kind].strip() in ("1", "1.0"))
        return {row[""]: row[column] for row in is_kind}

    superclasses = named("diagnostic", "diagnostic_class")
    return {
        "superclasses": {
            code: name for code, name in superclasses.items() if name in SUPERCLASSES
        },
        "subclasses": named("diagnostic", "diagnostic_subclass"),
        "forms": named("form", ""),
        "rhythms": named("rhythm", ""),
    }


def likelihoods_by_name(
    codes: Mapping[str, float], name_of: Mapping[str, str]
) -> dict[str, float]:
    """Return the largest likelihood of each name's codes.

    Args:
        codes: likelihood in percent by code, of one record.
        name_of: name (a superclass, say) by code; other codes are left out.

    Returns:
        Likelihood in percent by name.

    Examples:
        >>> likelihoods_by_name({"IMI": 35.0, "AMI": 80.0}, {"IMI": "MI", "AMI": "MI"})
        {'MI': 80.0}
    """
    result: dict[str, float] = {}
    for code, likelihood in codes.items():
        if code in name_of:
            name = name_of[code]
            result[name] = max(result.get(name, 0.0), likelihood)
    return result
