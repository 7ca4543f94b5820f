"""Several findings at once from a twelve-lead ECG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import polars as pl

from ..processors.ecg_processor import Normalization
from ..processors.ecg_record_processor import STANDARD_LEADS
from .ptbxl_task import PTBXLTask
from .record_filter import RecordFilter

__all__ = ["LABEL_GROUPS", "ECGMultilabelClassification"]

#: Groups of labels, and the column of PTB-XL's events that lists them.
LABEL_GROUPS = {
    "superclass": "superclasses",
    "subclass": "subclasses",
    "form": "forms",
    "rhythm": "rhythms",
}
#: Those whose statements have a likelihood.
DIAGNOSTIC = ("superclass", "subclass")


class ECGMultilabelClassification(PTBXLTask):
    """All diagnostic superclasses or subclasses, forms or rhythms of PTB-XL at once.

    One sample a record: patient_id, ecg_id, ecg and label, which becomes a vector of 0
    and 1 in the alphabetical order of the names: CD, HYP, MI, NORM, STTC for the
    superclasses, as in the published benchmark. Labels that no training record has are
    left out, and said.

    Args:
        labels: "superclass" (5), "subclass" (23), "form" (19) or "rhythm" (12).
        sampling_rate: like length, normalize, leads and on_error an argument of
            :class:`~pyhealth.tasks.ecg_task.ECGTask`.
        length: samples of the tensor.
        normalize: "lead", "record", "dataset" or "none".
        min_likelihood: smallest likelihood of a diagnostic statement that counts,
            percent. Forms and rhythms have none.
        labelled_only: leave out records without any label, as the benchmark does.
        leads: names of the leads.
        on_error: "raise" or "skip".
        records: which records are used; all by default.

    Raises:
        ValueError: if an argument is none of the allowed values.

    Source:
        Strodthoff et al., Deep learning for ECG analysis: benchmarks and insights from
        PTB-XL, IEEE JBHI 2021.

    Examples:
        >>> task = ECGMultilabelClassification("rhythm", sampling_rate=100)
        >>> task.output_schema
        {'label': 'multilabel'}
    """

    task_name = "ECGMultilabelClassification"

    def __init__(
        self,
        labels: Literal["superclass", "subclass", "form", "rhythm"] = "superclass",
        sampling_rate: float = 250,
        length: int | None = None,
        normalize: Normalization = "dataset",
        min_likelihood: float = 0.0,
        labelled_only: bool = True,
        leads: Sequence[str] = STANDARD_LEADS,
        on_error: Literal["raise", "skip"] = "raise",
        records: RecordFilter | None = None,
    ) -> None:
        if labels not in LABEL_GROUPS:
            raise ValueError(
                f"labels must be one of {list(LABEL_GROUPS)}, got {labels!r}."
            )
        if min_likelihood and labels not in DIAGNOSTIC:
            raise ValueError(
                f"PTB-XL states no likelihood of a {labels}; leave min_likelihood out."
            )
        self.task_label = labels
        self.labelled_only = labelled_only
        self.output_schema = {"label": "multilabel"}
        super().__init__(
            sampling_rate, length, normalize, leads, on_error, min_likelihood, records
        )

    def label_expression(self) -> pl.Expr:
        """Return the labels of an event table's rows, a list of names each."""
        entry = pl.element().str.split("=").list
        likelihood = entry.last().cast(pl.Float64, strict=False)
        listed = pl.col(f"ptbxl/{LABEL_GROUPS[self.task_label]}").fill_null("")
        return listed.str.split("|").list.eval(
            entry.first().filter(likelihood >= self.min_likelihood)
        )

    def record_expression(self) -> pl.Expr:
        """Return which rows of an event table are used, as a polars expression."""
        used = super().record_expression()
        if not self.labelled_only:
            return used
        return used & (self.label_expression().list.len() > 0)
