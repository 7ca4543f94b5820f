"""What the tasks on twelve-lead ECG records have in common."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, TypedDict

import polars as pl

from ..data import Patient
from ..processors.ecg_processor import ECGProcessor, Normalization
from ..processors.ecg_record_processor import (
    RECIPE_VERSION,
    STANDARD_LEADS,
    ECGRecordProcessor,
    RecordError,
)
from .base_task import BaseTask

__all__ = ["ECGRecords", "ECGTask"]

logger = logging.getLogger(__name__)

#: Seconds of a standard recording.
RECORDING_SECONDS = 10


class _RecordSettings(TypedDict):
    sampling_rate: float
    leads: list[str]


class _Settings(_RecordSettings):
    length: int
    normalize: Normalization


class ECGRecords(BaseTask):
    """Every usable record of a dataset, without a label: what all ECG tasks share.

    One sample a record: patient_id, record_id (ecg_id as text), ecg_id and ecg (the
    record's path, which
    :class:`~pyhealth.processors.ecg_record_processor.ECGRecordProcessor` reads).

    Args:
        event_type: of the dataset's events.
        sampling_rate: of the signals, hertz.
        leads: names of the leads, in order.
        on_error: "raise" for a record that cannot be used, or "skip" it.

    Examples:
        >>> ECGRecords("ptbxl", sampling_rate=100).task_name
        'ECGRecords'
    """

    task_name = "ECGRecords"

    def __init__(
        self,
        event_type: str,
        sampling_rate: float = 250,
        leads: Sequence[str] = STANDARD_LEADS,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
        settings: _RecordSettings = {
            "sampling_rate": sampling_rate,
            "leads": list(leads),
        }
        self.event_type = event_type
        self.on_error = on_error
        # PyHealth's cache key does not see code: a changed recipe must change this.
        self.recipe_version = RECIPE_VERSION
        self.input_schema = {"ecg": (ECGRecordProcessor, settings)}
        self.output_schema: dict[str, str] = {}
        super().__init__()

    def __call__(self, patient: Patient) -> list[dict[str, str | int]]:
        """Make the samples of one patient; no waveform is read unless skipping."""
        rows = patient.get_events(self.event_type, return_df=True)
        # By ecg_id, not by date, which can be missing: the order must be reproducible.
        rows = rows.sort(f"{self.event_type}/ecg_id")
        return [
            {
                "patient_id": patient.patient_id,
                "record_id": str(int(row[f"{self.event_type}/ecg_id"])),
                "ecg_id": int(row[f"{self.event_type}/ecg_id"]),
                "ecg": row[f"{self.event_type}/record_path"],
            }
            for row in rows.iter_rows(named=True)
            if self._usable(row[f"{self.event_type}/record_path"])
        ]

    def _usable(self, record_path: str) -> bool:
        if self.on_error == "raise":
            return True  # the processor reads it, and raises
        _, settings = self.input_schema["ecg"]
        try:
            ECGRecordProcessor(**settings).read(record_path)
        except RecordError as error:
            logger.warning("Skipped: %s", error)
            return False
        return True


class ECGTask(BaseTask):
    """A task whose samples are ECG records with a label that the table decides.

    :class:`~pyhealth.datasets.ecg_dataset.ECGDataset` prepares the records once for
    all such tasks. Derived classes set ``event_type`` and ``output_schema`` and say
    the label.

    Args:
        sampling_rate: of the tensor, hertz; the record is resampled to it.
        length: samples of the tensor; default ten seconds.
        normalize: "lead" (z-score of each lead), "record" (one mean and deviation a
            record: keeps the voltage ratios between leads), "dataset" (one mean and
            deviation fitted on the training part: keeps absolute voltage) or "none"
            (millivolt).
        leads: names of the leads, in the tensor's order.
        on_error: "raise" for a record that cannot be used, or "skip" it; the dataset
            reports and keeps the skipped ids.

    Raises:
        ValueError: if an argument is none of the allowed values.

    Examples:
        >>> from pyhealth.tasks.ecg_classification import ECGBinaryClassification
        >>> issubclass(ECGBinaryClassification, ECGTask)
        True
    """

    event_type: str

    def __init__(
        self,
        sampling_rate: float = 250,
        length: int | None = None,
        normalize: Normalization = "lead",
        leads: Sequence[str] = STANDARD_LEADS,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.sampling_rate = sampling_rate
        self.length = (
            round(RECORDING_SECONDS * sampling_rate) if length is None else length
        )
        self.normalize = normalize
        self.leads = tuple(leads)
        self.on_error = on_error
        settings: _Settings = {
            "sampling_rate": self.sampling_rate,
            "length": self.length,
            "normalize": self.normalize,
            "leads": list(self.leads),
        }
        ECGProcessor(**settings)  # raises on a wrong setting now, not in set_task
        self.input_schema = {"ecg": (ECGProcessor, settings)}
        # For the cache key of a dataset that is no ECGDataset.
        self.recipe_version = self.records_task().recipe_version
        super().__init__()

    @abstractmethod
    def label_expression(self) -> pl.Expr:
        """Return the label of an event table's rows, as a polars expression."""

    def record_expression(self) -> pl.Expr:
        """Return which rows of an event table are used; all, if not overridden."""
        return pl.lit(True)

    def records_task(self) -> ECGRecords:
        """Return the task that prepares the records, whatever the label."""
        return ECGRecords(
            self.event_type, self.sampling_rate, self.leads, self.on_error
        )

    def __call__(self, patient: Patient) -> list[dict[str, str | int | list[str]]]:
        """Make the samples of one patient; no waveform is read unless skipping.

        Args:
            patient: a patient of the dataset.

        Returns:
            One sample a usable record: patient_id, ecg_id, ecg (its path) and label.
        """
        events = patient.get_events(self.event_type, return_df=True)
        ecg_id = f"{self.event_type}/ecg_id"
        used = events.filter(self.record_expression())
        labelled = used.select(ecg_id, self.label_expression().alias("label"))
        label_of = dict(labelled.iter_rows())
        return [
            {
                "patient_id": sample["patient_id"],
                "ecg_id": sample["ecg_id"],
                "ecg": sample["ecg"],
                "label": label_of[sample["ecg_id"]],
            }
            for sample in self.records_task()(patient)
            if sample["ecg_id"] in label_of
        ]
