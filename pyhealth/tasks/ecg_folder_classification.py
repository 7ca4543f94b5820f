"""The label of a table of one's own records."""

from __future__ import annotations

import polars as pl

from .ecg_task import ECGTask

__all__ = ["ECGFolderClassification"]


class ECGFolderClassification(ECGTask):
    """The column "label" of an ECGFolderDataset: 1 against 0.

    Arguments, samples and errors are those of
    :class:`~pyhealth.tasks.ecg_task.ECGTask`.

    Examples:
        >>> ECGFolderClassification(sampling_rate=100, leads=["I", "II"]).length
        1000
    """

    task_name = "ECGFolderClassification"
    task_label = "label"
    event_type = "ecg"
    output_schema = {"label": "binary"}  # noqa: RUF012, as PyHealth's tasks have it

    def label_expression(self) -> pl.Expr:
        """Return the label of an event table's rows, as a polars expression."""
        return pl.col("ecg/given_label").cast(pl.Int64)
