"""Samples of ECG tasks, made from records that are prepared once for all tasks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import torch

from ..processors.base_processor import FeatureProcessor
from ..processors.ecg_processor import ECGProcessor, Moments
from ..processors.label_processor import MultiLabelProcessor
from ..tasks.ecg_task import ECGTask
from .sample_dataset import SampleBuilder, SampleDataset
from .splitter import Split

__all__ = ["CacheError", "ECGSamples", "Sample"]

logger = logging.getLogger(__name__)

#: 0 or 1, or the names of several labels.
type Label = int | list[str]


class Sample(TypedDict):
    """One sample of an ECG task.

    Examples:
        >>> [*Sample.__annotations__]
        ['patient_id', 'ecg_id', 'ecg', 'label']
    """

    patient_id: str
    ecg_id: int
    ecg: torch.Tensor
    label: torch.Tensor


class _Record(TypedDict):
    """A prepared record, as it lies on disk."""

    patient_id: str
    record_id: str
    ecg_id: int
    ecg: torch.Tensor


class _Fact(TypedDict):
    """What fitting needs to know of a record."""

    patient_id: str
    record_id: str
    ecg: Moments | None
    label: Label


class CacheError(OSError):
    """Prepared data that cannot be read.

    Examples:
        >>> "Delete this folder" in str(CacheError("cache/1", "no such chunk"))
        True
    """

    def __init__(self, folder: str, problem: str) -> None:
        super().__init__(folder, problem)

    def __str__(self) -> str:
        """Return folder, problem and remedy."""
        folder, problem = self.args
        first_line = next(iter(problem.splitlines()), "no reason given")
        return (
            f"The prepared data in {folder} cannot be read ({first_line}). Delete this "
            "folder; the next run prepares them again."
        )


class ECGSamples(SampleDataset):
    """Samples of one task; scaled, cut and labelled when they are read.

    On disk lie the whole records in millivolt, as
    :class:`~pyhealth.tasks.ecg_task.ECGRecords` has them prepared. Label, scaling,
    length and cohort are not stored, so all tasks of one sampling rate share the
    records, and a change of task reads no waveform again. A sample holds patient_id,
    ecg_id, ecg (leads, length) and label.

    Made by ``ECGDataset.set_task``.

    Args:
        path: folder of the prepared records.
        task: the task.
        label_of: label by ecg_id: 0 or 1, or a list of names.
        input_processors: an ECGProcessor under "ecg", fitted.
        output_processors: that of the label under "label", fitted.
        dataset_name: name to show.

    Examples:
        >>> train, val, test = dataset.set_task(
        ...     task, split=StratFoldSplit()
        ... )  # doctest: +SKIP
        >>> train.path == val.path  # doctest: +SKIP
        True
    """

    def __init__(
        self,
        path: str,
        task: ECGTask,
        label_of: Mapping[int, Label],
        input_processors: Mapping[str, FeatureProcessor],
        output_processors: Mapping[str, FeatureProcessor],
        dataset_name: str | None = None,
    ) -> None:
        super().__init__(path, dataset_name, task.task_name)
        self.task = task
        self.label_of = dict(label_of)
        self.input_schema = task.input_schema
        self.output_schema = task.output_schema
        self.input_processors = dict(input_processors)
        self.output_processors = dict(output_processors)

    @classmethod
    def of_task(
        cls,
        records: SampleDataset,
        task: ECGTask,
        label_of: Mapping[int, Label],
        split: Split | None = None,
        input_processors: Mapping[str, FeatureProcessor] | None = None,
        output_processors: Mapping[str, FeatureProcessor] | None = None,
    ) -> tuple[ECGSamples, ...]:
        """Fit a task's processors on the training part, and return every part.

        Args:
            records: the prepared records.
            task: the task.
            label_of: label by ecg_id; records without one are left out.
            split: how to part the samples; one part by default.
            input_processors: a fitted ECGProcessor to use, under "ecg".
            output_processors: a fitted processor to use, under "label".

        Returns:
            One dataset a part, the training part first.

        Raises:
            ValueError: if the training part holds one class only or no label, or no
                signal that varies where the scaling is fitted, or if a given processor
                does not fit the records.
        """
        ids = _in_order(records.record_to_index)
        used = [k for k, ecg_id in enumerate(ids) if int(ecg_id) in label_of]
        builder = SampleBuilder(
            task.input_schema, task.output_schema, input_processors, output_processors
        )
        facts = _facts(records, used, task, label_of)
        if "label" not in (output_processors or {}):
            _check_classes(facts, split, task)
        builder.fit(facts, split)
        _check_processor(builder.input_processors["ecg"], task)
        whole = cls(
            records.path,
            task,
            _known(label_of, builder.output_processors["label"]),
            builder.input_processors,
            builder.output_processors,
            records.dataset_name,
        )
        if split is None:
            return (whole if len(used) == len(whole) else whole.subset(used),)
        whole.fit_split = split.to_dict()
        return tuple(
            whole.subset([used[index] for index in indices])
            for indices in builder.split_indices
        )

    @property
    def processor(self) -> ECGProcessor:
        """What makes the signal of a sample from a record."""
        return self.input_processors["ecg"]

    @property
    def ecg_ids(self) -> list[int]:
        """The records' ecg_id in the order of the samples; no waveform is read."""
        return [int(record_id) for record_id in _in_order(self.record_to_index)]

    @property
    def patient_ids(self) -> list[str]:
        """The records' patient_id in the order of the samples."""
        return _in_order(self.patient_to_index)

    @property
    def labels(self) -> list[Label]:
        """The labels in the order of the samples."""
        return [self.label_of[ecg_id] for ecg_id in self.ecg_ids]

    @property
    def label_names(self) -> list[str]:
        """The names of several labels in the order of their vector; [""] for one."""
        processor = self.output_processors["label"]
        if isinstance(processor, MultiLabelProcessor):
            return list(processor.label_vocab)
        return [""]

    def __getitem__(self, index: int) -> Sample:
        """Return one sample."""
        record = self._record(index)
        label = self.label_of[record["ecg_id"]]
        return {
            "patient_id": record["patient_id"],
            "ecg_id": record["ecg_id"],
            "ecg": self.processor.finish(record["ecg"]),
            "label": self.output_processors["label"].process(label),
        }

    def joined(self, other: ECGSamples) -> ECGSamples:
        """Return the samples of both, of which this one's processors were fitted.

        Args:
            other: samples of the same records, none of them in this one.

        Raises:
            ValueError: if they are of other records.
        """
        if other.path != self.path:
            raise ValueError(f"Samples of {self.path} cannot join {other.path}.")
        whole = ECGSamples(
            self.path,
            self.task,
            self.label_of | other.label_of,
            self.input_processors,
            self.output_processors,
            self.dataset_name,
        )
        ecg_ids = self.ecg_ids + other.ecg_ids
        indices = [whole.record_to_index[str(ecg_id)][0] for ecg_id in ecg_ids]
        return whole.subset(sorted(indices))

    def subset(self, indices: Sequence[int] | slice) -> ECGSamples:
        """Return the samples at some indices, in that order."""
        part = super().subset(indices)
        part.label_of = {ecg_id: self.label_of[ecg_id] for ecg_id in part.ecg_ids}
        return part

    def record(self, index: int) -> torch.Tensor:
        """Return a whole record (leads, samples) in millivolt."""
        return self._record(index)["ecg"]

    def _record(self, index: int) -> _Record:
        with _cache_errors(self.path):
            return super().__getitem__(index)

    def close(self) -> None:
        """Do nothing: the records on disk are not this dataset's alone."""


def _check_classes(facts: Sequence[_Fact], split: Split | None, task: ECGTask) -> None:
    """Raise if there is nothing to tell apart."""
    if task.output_schema["label"] != "binary":
        return
    training = range(len(facts))
    if split is not None:
        indices: dict[str, list[int]] = {}
        for index, fact in enumerate(facts):
            indices.setdefault(fact["patient_id"], []).append(index)
        training = split.split_indices(indices)[0]
    found = {facts[index]["label"] for index in training}
    if len(found) < 2:
        raise ValueError(
            f"All {len(training)} records of the training part have the label "
            f"{', '.join(map(str, found)) or 'none'} for {task.task_label}. Take more "
            "records, another label or another split."
        )


def _check_processor(processor: FeatureProcessor, task: ECGTask) -> None:
    wanted = (task.sampling_rate, tuple(task.leads))
    if not isinstance(processor, ECGProcessor) or wanted != (
        processor.sampling_rate,
        processor.leads,
    ):
        raise ValueError(
            f"input_processors['ecg'] must be an ECGProcessor at {task.sampling_rate} "
            f"Hz with the leads {list(task.leads)}, got {processor!r}."
        )


def _known(
    label_of: Mapping[int, Label], processor: FeatureProcessor
) -> Mapping[int, Label]:
    """Leave out labels that no training record has, and say so."""
    if not isinstance(processor, MultiLabelProcessor):
        return label_of
    known = processor.label_vocab
    if not known:
        raise ValueError("No record of the training part has a label.")
    # Such a processor's labels are lists, every one.
    names_of = cast("Mapping[int, list[str]]", label_of)
    unknown = sorted({name for names in names_of.values() for name in names} - {*known})
    if unknown:
        logger.warning(
            "No training record has the label %s; left out.", ", ".join(unknown)
        )
    return {
        ecg_id: [name for name in names if name in known]
        for ecg_id, names in names_of.items()
    }


def _facts(
    records: SampleDataset,
    used: Sequence[int],
    task: ECGTask,
    label_of: Mapping[int, Label],
) -> list[_Fact]:
    """Return the facts of some records; no waveform is read, if it can be."""
    ids, patients = (
        _in_order(index)
        for index in (records.record_to_index, records.patient_to_index)
    )
    moments = _moments(records) if task.normalize == "dataset" else [None] * len(ids)
    return [
        {
            "patient_id": patients[k],
            "record_id": ids[k],
            "ecg": moments[k],
            "label": label_of[int(ids[k])],
        }
        for k in used
    ]


def _moments(records: SampleDataset) -> list[Moments]:
    """Return every record's moments; computed once, kept beside the records."""
    path = Path(records.path) / "moments.npy"
    if not path.exists():
        with _cache_errors(records.path):
            found = [Moments.of(record["ecg"].numpy()) for record in records]
        half_made = path.with_name(f"{os.getpid()}.{path.name}")
        np.save(half_made, np.array(found))
        half_made.replace(path)  # whole or not at all, whoever else makes it now
    with _cache_errors(records.path):
        return [Moments(*row) for row in np.load(path).tolist()]


@contextmanager
def _cache_errors(folder: str) -> Iterator[None]:
    """Name the folder where what lies in it cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise CacheError(str(folder), str(error)) from error
    except (IndexError, OSError, MemoryError):  # the caller's, or the machine's
        raise
    except Exception as error:  # whatever a damaged chunk makes of its reader
        raise CacheError(str(folder), str(error)) from error


def _in_order(index_of: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the keys of a mapping to sample indices, in the samples' order."""
    pairs = ((index, key) for key, indices in index_of.items() for index in indices)
    return [key for _, key in sorted(pairs)]
