"""The samples of a run's three parts, and where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ...datasets.ecg_dataset import ECGDataset
from ...datasets.ecg_samples import ECGSamples
from ...datasets.ptbxl_splits import CohortSplit
from ...tasks.ecg_task import ECGTask

__all__ = ["PreparedData", "identities", "prepare"]


@dataclass(frozen=True)
class PreparedData:
    """The samples of the three parts and where they come from.

    Light to send to another process: the waveforms stay on disk.

    Attributes:
        task: the task.
        train: training samples.
        val: validation samples.
        test: test samples.
        description: facts for the record, among them a digest of records and labels.

    Examples:
        >>> PreparedData.__match_args__[:3]
        ('task', 'train', 'val')
    """

    task: ECGTask
    train: ECGSamples
    val: ECGSamples
    test: ECGSamples
    description: dict[str, str | int | list[int]]


def prepare(
    dataset: ECGDataset,
    task: ECGTask,
    n_records: int | None = None,
    seed: int = 0,
    protocol: Literal["patient", "paper"] = "patient",
) -> PreparedData:
    """Split the corpus and prepare its samples.

    Args:
        dataset: the corpus.
        task: the task.
        n_records: records to train and validate on; default the dataset's usual split
            by fold. With a number, they are drawn by patient from all but the last
            fold, which tests.
        seed: of that draw.
        protocol: of that draw, see
            :class:`~pyhealth.datasets.ptbxl.CohortSplit`.

    Returns:
        The prepared data.

    Raises:
        ValueError: if a part would be empty, or a protocol is given without a number.

    Examples:
        >>> prepare(dataset, task, n_records=1000)  # doctest: +SKIP
    """
    if n_records is None and protocol != "patient":
        raise ValueError(f"protocol={protocol!r} draws a cohort; give n_records.")
    test_fold = int(max(dataset.records()["strat_fold"]))
    split = (
        dataset.usual_split()
        if n_records is None
        else CohortSplit(n_records, seed, test=(test_fold,), protocol=protocol)
    )
    train, val, test = dataset.set_task(task, split=split)
    description: dict[str, str | int | list[int]] = {
        "root": dataset.corpus.address,
        "digest": _digest((train, val, test)),
        "split": repr(split),
        "test_fold": test_fold,
        "records_train": len(train),
        "records_val": len(val),
        "records_test": len(test),
        "skipped_records": dataset.skipped_records,
    }
    return PreparedData(task, train, val, test, description)


def identities(samples: ECGSamples) -> dict[str, list[int] | list[str]]:
    """Return ecg_id and patient_id in the order of an unshuffled loader.

    Args:
        samples: the samples.

    Examples:
        >>> list(identities(samples))  # doctest: +SKIP
        ['ecg_id', 'patient_id']
    """
    return {"ecg_id": samples.ecg_ids, "patient_id": samples.patient_ids}


def _digest(parts: Iterable[ECGSamples]) -> str:
    """Digest who is in each part, with which label."""
    digest = hashlib.sha256()
    for part in parts:
        rows = zip(part.ecg_ids, part.patient_ids, part.labels, strict=True)
        digest.update(repr(sorted(rows)).encode())
    return digest.hexdigest()
