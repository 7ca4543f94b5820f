"""From one ECG record to a scaled tensor of fixed length."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from .ecg_record_processor import STANDARD_LEADS, ECGRecordProcessor

__all__ = ["ECGProcessor", "Moments"]

logger = logging.getLogger(__name__)

NORMALIZATIONS = ("lead", "record", "dataset", "none")
Normalization = Literal["lead", "record", "dataset", "none"]


class Moments(NamedTuple):
    """What a record adds to the mean and deviation of a dataset, in millivolt.

    Examples:
        >>> Moments.of(np.array([[1.0, 2.0], [0.0, 0.0]]))
        Moments(count=4.0, total=3.0, squares=5.0)
    """

    # In the place of tuple's method count, of which nobody has a use here.
    count: float  # type: ignore[assignment]
    total: float
    squares: float

    @classmethod
    def of(cls, signal: np.ndarray) -> Moments:
        """Return the moments of all leads and samples of a signal."""
        total, squares = signal.sum(dtype=float), np.square(signal).sum(dtype=float)
        return cls(float(signal.size), float(total), float(squares))


class ECGProcessor(ECGRecordProcessor):
    """Read one WFDB record as a float32 tensor (leads, length).

    The record is read as
    :class:`~pyhealth.processors.ecg_record_processor.ECGRecordProcessor` does, then
    normalised over the whole recording and cropped from the centre, or padded with
    zeros on both sides, to the length (said once). A lead that is constant, or missing
    throughout, becomes zeros.

    ``process`` changes nothing in the processor. Only ``normalize="dataset"`` has
    something to fit, on the training part.

    Args:
        sampling_rate: of the tensor, hertz.
        length: samples of the tensor.
        normalize: "lead", "record", "dataset" or "none", see
            :class:`~pyhealth.tasks.ecg_task.ECGTask`.
        leads: names of the leads, in the tensor's order.

    Attributes:
        mean: fitted mean, millivolt ("dataset" only).
        std: fitted standard deviation, millivolt ("dataset" only).

    Raises:
        ValueError: if an argument is outside its range.

    Examples:
        >>> processor = ECGProcessor(sampling_rate=100, length=1000)
        >>> processor.process("records100/00000/00001_lr").shape  # doctest: +SKIP
        torch.Size([12, 1000])
        >>> processor.finish(torch.randn(12, 800)).shape
        torch.Size([12, 1000])
    """

    def __init__(
        self,
        sampling_rate: float = 250,
        length: int = 2500,
        normalize: Normalization = "lead",
        leads: Sequence[str] = STANDARD_LEADS,
    ) -> None:
        super().__init__(sampling_rate, leads)
        if length < 1 or length != int(length):
            raise ValueError(f"length must be 1 or more, got {length}.")
        if normalize not in NORMALIZATIONS:
            raise ValueError(
                f"normalize must be one of {list(NORMALIZATIONS)}, got {normalize!r}."
            )
        self.length = int(length)
        self.normalize = normalize
        self.learns_statistics = normalize == "dataset"
        self.mean: float | None = None
        self.std: float | None = None

    def fit(self, samples: Iterable[dict[str, str | Moments]], field: str) -> None:
        """Fit mean and deviation over all leads and samples, for "dataset" only.

        Args:
            samples: the training part.
            field: key of the record's path, or of its moments, in a sample.

        Raises:
            RecordError: if a record cannot be used.
            ValueError: if the signals do not vary.
        """
        if self.normalize != "dataset":
            return
        count = total = squares = 0.0
        for sample in samples:
            value = sample[field]
            if not isinstance(value, Moments):
                value = Moments.of(self.read(value))
            count += value.count
            total += value.total
            squares += value.squares
        variance = squares / count - (total / count) ** 2 if count else 0.0
        if not variance > 0:
            raise ValueError("The training part holds no signal that varies.")
        self.mean, self.std = float(total / count), math.sqrt(variance)

    def process(self, value: str | Path) -> torch.Tensor:
        """Turn a record into a tensor.

        Args:
            value: path of the record, without suffix.

        Returns:
            float32 tensor (leads, length): millivolt for "none", else in deviations.

        Raises:
            RecordError: if the record cannot be used; it names the record, what was
                found and expected, and a remedy.
        """
        return self.finish(super().process(value))

    def finish(self, record: torch.Tensor) -> torch.Tensor:
        """Scale a whole record and give it the length.

        Args:
            record: (leads, samples), millivolt, at this processor's rate.

        Returns:
            As :meth:`process`.
        """
        signal = record.numpy()
        constant = np.ptp(signal, axis=1) == 0
        signal = self._normalized(signal.astype(np.float64))
        signal[constant] = 0.0
        return torch.from_numpy(self._fixed_length(signal).astype(np.float32))

    def _normalized(self, signal: np.ndarray) -> np.ndarray:
        if self.normalize == "none":
            return signal
        if self.normalize == "dataset":
            if self.mean is None or self.std is None:
                raise ValueError(
                    "normalize='dataset' is not fitted yet: call fit on the training "
                    "part, as set_task(task, split=...) does."
                )
            return (signal - self.mean) / self.std
        axis = 1 if self.normalize == "lead" else None
        mean = signal.mean(axis=axis, keepdims=True)
        std = signal.std(axis=axis, keepdims=True)
        return (signal - mean) / np.where(std > 0, std, 1.0)

    def _fixed_length(self, signal: np.ndarray) -> np.ndarray:
        surplus = signal.shape[1] - self.length
        if surplus == 0:
            return signal
        _say_length(signal.shape[1], self.length, self.sampling_rate)
        before = abs(surplus) // 2
        if surplus > 0:
            return signal[:, before : before + self.length]
        return np.pad(signal, ((0, 0), (before, -surplus - before)))

    def __repr__(self) -> str:
        return (
            f"ECGProcessor(sampling_rate={self.sampling_rate}, length={self.length}, "
            f"normalize={self.normalize!r}, leads={list(self.leads)})"
        )


@cache  # once a process and length
def _say_length(found: int, wanted: int, rate: float) -> None:
    done = "cropped from the centre by" if found > wanted else "padded with zeros by"
    logger.info(
        "Records of %.4g s (%d samples at %g Hz) are %s %d samples to %d. (Said once.)",
        found / rate,
        found,
        rate,
        done,
        abs(found - wanted),
        wanted,
    )
