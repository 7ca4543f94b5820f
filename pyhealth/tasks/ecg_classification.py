"""Binary diagnosis from a twelve-lead ECG."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import polars as pl

from ..processors.ecg_processor import Normalization
from ..processors.ecg_record_processor import STANDARD_LEADS
from .ptbxl_task import PTBXLTask
from .record_filter import RecordFilter

__all__ = ["SUPERCLASSES", "ECGBinaryClassification"]

#: PTB-XL's diagnostic superclasses: normal, myocardial infarction, ST/T change,
#: conduction disturbance, hypertrophy.
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")


class ECGBinaryClassification(PTBXLTask):
    """One diagnostic superclass of PTB-XL against all other records.

    One sample a record: patient_id, ecg_id, ecg (the record's path, which
    :class:`~pyhealth.processors.ecg_processor.ECGProcessor` turns into a tensor
    (leads, length)), label (0 or 1).

    Args:
        task_label: "MI", "HYP", "STTC", "CD" or "NORM".
        sampling_rate: like length, normalize, leads and on_error an argument of
            :class:`~pyhealth.tasks.ecg_task.ECGTask`.
        length: samples of the tensor.
        normalize: "lead", "record", "dataset" or "none".
        min_likelihood: smallest likelihood of a statement that counts, percent. The
            dataset's own limit holds too; the stricter one decides.
        leads: names of the leads.
        on_error: "raise" or "skip".
        records: which records are used; all by default.

    Raises:
        ValueError: if an argument is none of the allowed values.

    Examples:
        >>> task = ECGBinaryClassification("STTC", sampling_rate=100)
        >>> task.task_label, task.length
        ('STTC', 1000)
    """

    task_name = "ECGBinaryClassification"

    def __init__(
        self,
        task_label: str = "MI",
        sampling_rate: float = 250,
        length: int | None = None,
        normalize: Normalization = "lead",
        min_likelihood: float = 0.0,
        leads: Sequence[str] = STANDARD_LEADS,
        on_error: Literal["raise", "skip"] = "raise",
        records: RecordFilter | None = None,
    ) -> None:
        if task_label not in SUPERCLASSES:
            raise ValueError(
                f"task_label must be one of {list(SUPERCLASSES)}, got {task_label!r}."
            )
        if task_label == "HYP" and normalize == "lead":
            warnings.warn(
                "HYP is defined by voltage, which normalize='lead' erases (the "
                "Sokolow-Lyon sum finds HYP with AUROC 0.84 in millivolt and 0.45 "
                "after a z-score of each lead, on 250 records). Use "
                "normalize='dataset', which keeps absolute voltage.",
                stacklevel=2,
            )
        self.task_label = task_label
        self.output_schema = {"label": "binary"}
        super().__init__(
            sampling_rate, length, normalize, leads, on_error, min_likelihood, records
        )

    def label_expression(self) -> pl.Expr:
        """Return the label of an event table's rows, as a polars expression."""
        column = f"ptbxl/{self.task_label.lower()}"
        likely = pl.col(f"{column}_likelihood").fill_null(-1.0) >= self.min_likelihood
        return ((pl.col(column) == 1) & likely).cast(pl.Int64)
