"""From one WFDB record on disk to a tensor of fixed length."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import wfdb
from scipy.signal import resample_poly

from .base_processor import FeatureProcessor

__all__ = [
    "STANDARD_LEADS",
    "ECGProcessor",
    "MissingRecordError",
    "RecordError",
]

logger = logging.getLogger(__name__)

#: Raise with every change of what a record is turned into: it is in the cache key.
RECIPE_VERSION = 1
STANDARD_LEADS = (
    "I",
    "II",
    "III",
    "AVR",
    "AVL",
    "AVF",
    "V1",
    "V2",
    "V3",
    "V4",
    "V5",
    "V6",
)
NORMALIZATIONS = ("lead", "record", "dataset", "none")
Normalization = Literal["lead", "record", "dataset", "none"]
MILLIVOLTS = {"mv": 1.0, "uv": 1e-3, "v": 1e3}


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
        path: the record's path, without suffix.

    Examples:
        >>> RecordError("00001_lr", "The header is empty.").path
        '00001_lr'
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str]]:
        """Say how to make it again: Dask's way of pickling needs it told."""
        return type(self), self.args

    def __str__(self) -> str:
        """Return path and problem as one sentence."""
        return f"{self.args[0]}: {self.args[1]}"


class MissingRecordError(RecordError, FileNotFoundError):
    """A record one of whose files is missing.

    Examples:
        >>> issubclass(MissingRecordError, FileNotFoundError)
        True
    """


class ECGProcessor(FeatureProcessor):
    """Read one WFDB record as a float32 tensor (leads, length).

    In this order: read in millivolt; pick and order the leads by name (upper or lower
    case alike); fill missing samples linearly from their neighbours (said once);
    resample from the record's own rate by a polyphase filter (which bars aliases);
    normalise over the whole recording; crop from the centre, or pad with zeros on both
    sides, to the length (said once). A lead that is constant, or missing throughout,
    becomes zeros.

    ``process`` changes nothing in the processor. Only ``normalize="dataset"`` has
    something to fit, on the training part.

    Args:
        sampling_rate: of the tensor, hertz.
        length: samples of the tensor.
        normalize: "lead", "record", "dataset" or "none", see
            :class:`~pyhealth.tasks.ecg_classification.ECGBinaryClassification`.
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
    """

    stores_tensor = True

    def __init__(
        self,
        sampling_rate: float = 250,
        length: int = 2500,
        normalize: Normalization = "lead",
        leads: Sequence[str] = STANDARD_LEADS,
    ) -> None:
        if not 0 < sampling_rate < math.inf:
            raise ValueError(f"sampling_rate must be positive, got {sampling_rate}.")
        if length < 1 or length != int(length):
            raise ValueError(f"length must be 1 or more, got {length}.")
        if normalize not in NORMALIZATIONS:
            raise ValueError(
                f"normalize must be one of {list(NORMALIZATIONS)}, got {normalize!r}."
            )
        if not leads or len({name.upper() for name in leads}) != len(leads):
            raise ValueError(f"leads must be different names, got {list(leads)}.")
        self.sampling_rate = sampling_rate
        self.length = int(length)
        self.normalize = normalize
        self.leads = tuple(leads)
        self.learns_statistics = normalize == "dataset"
        self.mean: float | None = None
        self.std: float | None = None

    def fit(self, samples: Iterable[dict[str, str]], field: str) -> None:
        """Fit mean and deviation over all leads and samples, for "dataset" only.

        Args:
            samples: the training part.
            field: key of the record's path in a sample.

        Raises:
            RecordError: if a record cannot be used.
            ValueError: if the signals do not vary.
        """
        if self.normalize != "dataset":
            return
        count, total, squares = 0, 0.0, 0.0
        for sample in samples:
            signal, _ = self.read(sample[field])
            count += signal.size
            total += signal.sum()
            squares += np.square(signal).sum()
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
        signal, constant = self.read(value)
        signal = self._normalized(signal)
        signal[constant] = 0.0
        return torch.from_numpy(self._fixed_length(signal).astype(np.float32))

    def read(self, value: str | Path) -> tuple[np.ndarray, np.ndarray]:
        """Read a record in millivolt at this processor's rate, whole length.

        Args:
            value: path of the record, without suffix.

        Returns:
            Signals (leads, samples), float64, and which leads are constant (leads,).

        Raises:
            RecordError: as in :meth:`process`.
        """
        path = str(value)
        record = _read_wfdb(path)
        signal = self._pick(path, record)
        signal = _fill_missing(path, signal)
        constant = np.ptp(signal, axis=1) == 0
        ratio = Fraction(self.sampling_rate / record.fs).limit_denominator(1000)
        if ratio != 1:
            # "line" takes the offset and trend away before the filter, whose edges
            # would ring otherwise, and adds them again.
            signal = resample_poly(
                signal, ratio.numerator, ratio.denominator, axis=1, padtype="line"
            )
        return signal, constant

    def _pick(self, path: str, record: wfdb.Record) -> np.ndarray:
        names = [name.upper() for name in record.sig_name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if set(twice) & {name.upper() for name in self.leads}:
            raise RecordError(
                path,
                f"lead {', '.join(twice)} is there twice. Mend the header's names.",
            )
        index = {name: i for i, name in enumerate(names)}
        missing = [name for name in self.leads if name.upper() not in index]
        if missing:
            raise RecordError(
                path,
                f"lead {', '.join(missing)} is missing, found "
                f"{', '.join(record.sig_name)}. Pass leads=... with those you have.",
            )
        columns = [index[name.upper()] for name in self.leads]
        scale = np.array([_millivolts(path, record.units[i]) for i in columns])
        return (record.p_signal[:, columns] * scale).T

    def _normalized(self, signal: np.ndarray) -> np.ndarray:
        if self.normalize == "none":
            return signal.copy()
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

    def is_token(self) -> bool:
        """Return False: a signal is continuous."""
        return False

    def schema(self) -> tuple[str, ...]:
        """Return the names of the output's parts."""
        return ("value",)

    def dim(self) -> tuple[int, ...]:
        """Return the number of dimensions of each part."""
        return (2,)

    def spatial(self) -> tuple[bool, ...]:
        """Return which dimensions are spatial: time is, leads are not."""
        return (False, True)

    def __repr__(self) -> str:
        return (
            f"ECGProcessor(sampling_rate={self.sampling_rate}, length={self.length}, "
            f"normalize={self.normalize!r}, leads={list(self.leads)})"
        )


def _read_wfdb(path: str) -> wfdb.Record:
    remedy = "Fetch .hea and .dat again, or pass on_error='skip' to the task."
    try:
        record = wfdb.rdrecord(path)
    except FileNotFoundError as error:
        name = Path(error.filename or path).name
        raise MissingRecordError(
            path, f"the file {name} is missing. {remedy}"
        ) from error
    except Exception as error:  # wfdb raises many kinds; none is swallowed
        problem = f"cannot be read as a WFDB record ({error}). {remedy}"
        raise RecordError(path, problem) from error
    if record.p_signal is None or not record.p_signal.size:
        raise RecordError(path, "holds no samples. Fetch the record again.")
    if not record.fs > 0 or None in record.sig_name:
        raise RecordError(
            path, f"the header lacks the sampling rate or a lead's name. {remedy}"
        )
    return record


def _millivolts(path: str, unit: str) -> float:
    if unit.lower() not in MILLIVOLTS:
        raise RecordError(
            path, f"unit {unit!r}, expected mV, uV or V. Mend the header's gain field."
        )
    return MILLIVOLTS[unit.lower()]


def _fill_missing(path: str, signal: np.ndarray) -> np.ndarray:
    missing = ~np.isfinite(signal)
    if not missing.any():
        return signal
    if missing.all():
        raise RecordError(path, "holds no valid sample. Fetch the record again.")
    _say_missing()
    logger.debug("%s: %d missing samples filled", path, missing.sum())
    signal = signal.copy()
    time = np.arange(signal.shape[1])
    for lead, gaps in zip(signal, missing, strict=True):
        if gaps.all():
            lead[:] = 0.0
        elif gaps.any():
            lead[gaps] = np.interp(time[gaps], time[~gaps], lead[~gaps])
    return signal


@cache  # once a process
def _say_missing() -> None:
    logger.warning(
        "A record has missing samples; they are filled linearly from their neighbours, "
        "a lead without any sample becomes zeros. (Said once.)"
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
