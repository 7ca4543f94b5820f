"""Which records of PTB-XL a task uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_

import polars as pl

__all__ = ["QUALITY_FLAGS", "RecordFilter"]

#: Columns in which PTB-XL's annotators described a fault or a peculiarity in words.
QUALITY_FLAGS = (
    "baseline_drift",
    "static_noise",
    "burst_noise",
    "electrodes_problems",
    "extra_beats",
    "pacemaker",
)
#: Older patients have the age 300 in PTB-XL.
OLDEST_KNOWN_AGE = 89


@dataclass(frozen=True)
class RecordFilter:
    """Conditions that a record has to meet; without any, all records do.

    Args:
        validated_by_human: only records whose report a human validated.
        without_flags: only records without these quality flags, some of
            :data:`QUALITY_FLAGS`.
        min_age: youngest age, years, at most 90. Records without an age are left out
            by either limit.
        max_age: oldest age, years, at most 89: older ages are not known.

    Raises:
        ValueError: if a flag is unknown or an age out of range.

    Examples:
        >>> RecordFilter(without_flags=["static_noise"], min_age=18).without_flags
        ('static_noise',)
    """

    validated_by_human: bool = False
    without_flags: Sequence[str] = ()
    min_age: float | None = None
    max_age: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "without_flags", tuple(self.without_flags))
        unknown = sorted(set(self.without_flags) - set(QUALITY_FLAGS))
        if unknown:
            raise ValueError(
                f"without_flags must be some of {list(QUALITY_FLAGS)}, got {unknown}."
            )
        limits = {"min_age": OLDEST_KNOWN_AGE + 1, "max_age": OLDEST_KNOWN_AGE}
        for name, limit in limits.items():
            age = getattr(self, name)
            if age is not None and not 0 <= age <= limit:
                raise ValueError(
                    f"{name} must lie between 0 and {limit} years, since PTB-XL does "
                    f"not tell ages over {OLDEST_KNOWN_AGE}; got {age}."
                )

    def expression(self) -> pl.Expr:
        """Return which rows of PTB-XL's event table meet the conditions.

        Examples:
            >>> table = pl.DataFrame({"ptbxl/age": [17.0, 300.0, None]})
            >>> grown_up = RecordFilter(min_age=18).expression()
            >>> table.filter(grown_up)["ptbxl/age"].to_list()
            [300.0]
        """
        age = pl.col("ptbxl/age")
        conditions = [
            pl.col(f"ptbxl/{flag}").fill_null("").str.strip_chars() == ""
            for flag in self.without_flags
        ]
        if self.validated_by_human:
            conditions.append(pl.col("ptbxl/validated_by_human"))
        if self.min_age is not None:
            conditions.append((age >= self.min_age).fill_null(False))
        if self.max_age is not None:
            conditions.append((age <= self.max_age).fill_null(False))
        return reduce(and_, conditions, pl.lit(True))
