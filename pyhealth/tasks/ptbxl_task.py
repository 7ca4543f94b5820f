"""What the tasks on PTB-XL have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import polars as pl

from ..processors.ecg_processor import Normalization
from ..processors.ecg_record_processor import STANDARD_LEADS
from .ecg_task import ECGTask
from .record_filter import RecordFilter

__all__ = ["PTBXLTask", "check_likelihood"]


def check_likelihood(min_likelihood: float) -> float:
    """Return a smallest likelihood as a number.

    Args:
        min_likelihood: percent.

    Raises:
        ValueError: if it is no percentage.

    Examples:
        >>> check_likelihood(50)
        50.0
    """
    if not 0 <= min_likelihood <= 100:
        raise ValueError(
            f"min_likelihood is a percentage, 0 to 100, got {min_likelihood}."
        )
    return float(min_likelihood)


class PTBXLTask(ECGTask):
    """A task whose labels are statements of PTB-XL.

    Args:
        sampling_rate: like length, normalize, leads and on_error an argument of
            :class:`~pyhealth.tasks.ecg_task.ECGTask`.
        length: samples of the tensor.
        normalize: "lead", "record", "dataset" or "none".
        leads: names of the leads.
        on_error: "raise" or "skip".
        min_likelihood: smallest likelihood of a statement that counts, percent.
        records: which records are used; all by default.

    Raises:
        ValueError: if an argument is none of the allowed values.

    Examples:
        >>> from pyhealth.tasks.ecg_classification import ECGBinaryClassification
        >>> issubclass(ECGBinaryClassification, PTBXLTask)
        True
    """

    event_type = "ptbxl"

    def __init__(
        self,
        sampling_rate: float = 250,
        length: int | None = None,
        normalize: Normalization = "lead",
        leads: Sequence[str] = STANDARD_LEADS,
        on_error: Literal["raise", "skip"] = "raise",
        min_likelihood: float = 0.0,
        records: RecordFilter | None = None,
    ) -> None:
        self.min_likelihood = check_likelihood(min_likelihood)
        self.records = records or RecordFilter()
        super().__init__(sampling_rate, length, normalize, leads, on_error)

    def record_expression(self) -> pl.Expr:
        """Return which rows of an event table are used, as a polars expression."""
        return self.records.expression()
