"""WFDB records: from the files on disk to millivolt at one sampling rate."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import torch
import wfdb
from scipy.signal import resample_poly

from .base_processor import FeatureProcessor
from .wfdb_record import disagreeing_leads, is_simple, read_digital

__all__ = [
    "STANDARD_LEADS",
    "ECGRecordProcessor",
    "MissingRecordError",
    "RecordError",
]

logger = logging.getLogger(__name__)

#: Raise with every change of what a record is turned into: it is in the cache key.
RECIPE_VERSION = 3
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
MILLIVOLTS = {"mv": 1.0, "uv": 1e-3, "v": 1e3}
#: No lead on the skin varies by so many millivolt; with a gain that is wrong by 1000
#: it would.
LARGEST_DEVIATION = 100.0
#: And no ECG stays within so many millivolt in every lead, unless it is constant.
SMALLEST_RANGE = 5e-3


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


class ECGRecordProcessor(FeatureProcessor):
    """Read one WFDB record, whole, in millivolt: float32 (leads, samples).

    In this order: pick and order the leads by name (upper or lower case alike); fill
    missing samples linearly from their neighbours (said once; a lead without any
    becomes zeros); resample from the record's own rate by a polyphase filter (which
    bars aliases).

    Args:
        sampling_rate: of the tensor, hertz.
        leads: names of the leads, in the tensor's order.

    Raises:
        ValueError: if an argument is outside its range.

    Examples:
        >>> processor = ECGRecordProcessor(sampling_rate=100, leads=["II", "V5"])
        >>> processor.process("records100/00000/00001_lr").shape  # doctest: +SKIP
        torch.Size([2, 1000])
    """

    stores_tensor = True

    def __init__(
        self, sampling_rate: float = 250, leads: Sequence[str] = STANDARD_LEADS
    ) -> None:
        if not 0 < sampling_rate < math.inf:
            raise ValueError(f"sampling_rate must be positive, got {sampling_rate}.")
        if not leads or len({name.upper() for name in leads}) != len(leads):
            raise ValueError(f"leads must be different names, got {list(leads)}.")
        self.sampling_rate = sampling_rate
        self.leads = tuple(leads)

    def process(self, value: str | Path) -> torch.Tensor:
        """Turn a record into a tensor.

        Args:
            value: path of the record, without suffix.

        Returns:
            float32 tensor (leads, samples), millivolt.

        Raises:
            RecordError: if the record cannot be used; it names the record, what was
                found and expected, and a remedy.
        """
        return torch.from_numpy(np.ascontiguousarray(self.read(value), np.float32))

    def read(self, value: str | Path) -> np.ndarray:
        """Read a record in double precision.

        Args:
            value: path of the record, without suffix.

        Returns:
            Signals (leads, samples), float64, millivolt.

        Raises:
            RecordError: as in :meth:`process`.
        """
        path = str(value)
        record = _read_wfdb(path)
        signal = self._pick(path, record)
        signal = _fill_missing(path, signal)
        _check_range(path, signal)
        ratio = Fraction(self.sampling_rate / record.fs).limit_denominator(1000)
        if ratio != 1:
            # "line" takes the offset and trend away before the filter, whose edges
            # would ring otherwise, and adds them again.
            signal = resample_poly(
                signal, ratio.numerator, ratio.denominator, axis=1, padtype="line"
            )
        return signal

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
            f"ECGRecordProcessor(sampling_rate={self.sampling_rate}, "
            f"leads={list(self.leads)})"
        )


def _read_wfdb(path: str) -> wfdb.Record:
    remedy = "Fetch .hea and .dat again, or pass on_error='skip' to the task."
    try:
        record, wrong = _read_checked(path)
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
    if wrong:
        raise RecordError(
            path,
            f"the samples of lead {', '.join(wrong)} disagree with the header's "
            f"checksum. {remedy}",
        )
    return record


def _read_checked(path: str) -> tuple[wfdb.Record, list[str]]:
    """Return a record in physical units and the leads that disagree with the header.

    Several segments, each with its own gains, or several samples a frame are for WFDB
    to join; their checksums are not those of what comes out.
    """
    record = read_digital(path)
    if not is_simple(record):
        return wfdb.rdrecord(path), []
    wrong = disagreeing_leads(record)
    record.dac(inplace=True)
    return record, wrong


def _millivolts(path: str, unit: str) -> float:
    if unit.lower() not in MILLIVOLTS:
        raise RecordError(
            path, f"unit {unit!r}, expected mV, uV or V. Mend the header's gain field."
        )
    return MILLIVOLTS[unit.lower()]


def _check_range(path: str, signal: np.ndarray) -> None:
    deviation = signal.std(axis=1).max()
    spread = np.ptp(signal, axis=1).max()  # of a constant lead 0 to the last digit
    if deviation > LARGEST_DEVIATION or 0 < spread < SMALLEST_RANGE:
        raise RecordError(
            path,
            f"the largest lead spans {spread:.3g} mV, which no ECG has. Mend gain or "
            "unit in the header.",
        )


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
