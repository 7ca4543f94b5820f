"""What the datasets of ECG records have in common."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from dask.distributed import Client
from filelock import FileLock

from ..processors.base_processor import FeatureProcessor
from ..tasks.base_task import BaseTask
from ..tasks.ecg_task import ECGRecords, ECGTask
from .base_dataset import BaseDataset
from .corpus_root import CorpusRoot
from .ecg_cluster import process_on_cluster, transform_on_cluster
from .ecg_samples import CacheError, ECGSamples
from .ptbxl_splits import RecordSplit
from .sample_dataset import SampleDataset
from .splitter import Split

__all__ = ["ECGDataset"]

logger = logging.getLogger(__name__)

#: PyHealth's name of the table of events in a cache, and ours until it is whole.
EVENTS, UNFINISHED = "global_event_df.parquet", "global_event_df.unfinished"
#: Seconds to wait for another process to make it, as PyHealth waits for samples.
LONGEST_WAIT = 7200


class ECGDataset(BaseDataset):
    """A dataset with one event a record, which is a WFDB file on disk.

    Derived classes set ``event_type`` (their table's name), give each event at least
    ecg_id, record_path and strat_fold, and say their :meth:`usual_split`.

    Attributes:
        skipped_records: ecg_id of the records that the last ``set_task`` skipped as
            unreadable.
        corpus: where records and tables lie.
        client: of a running Dask cluster, once it is set: ``set_task`` then prepares
            samples there. Its workers must see root and cache_dir under the same names.

    Examples:
        >>> from pyhealth.datasets.ptbxl import PTBXLDataset
        >>> issubclass(PTBXLDataset, ECGDataset)
        True
    """

    event_type: str
    corpus: CorpusRoot
    skipped_records: list[int]
    client: Client | None = None

    def set_task(
        self,
        task: BaseTask | None = None,
        num_workers: int | None = None,
        input_processors: dict[str, FeatureProcessor] | None = None,
        output_processors: dict[str, FeatureProcessor] | None = None,
        split: Split | None = None,
    ) -> SampleDataset | tuple[SampleDataset, ...]:
        """Prepare the samples of a task, as PyHealth does.

        The records of an :class:`~pyhealth.tasks.ecg_task.ECGTask` are read once for
        each sampling rate and set of leads; other labels, scalings, lengths and splits
        use what is there. Other tasks are prepared one by one.

        A split by fold or cohort is first told the folds and labels of this dataset's
        records, which a PyHealth split cannot see. Records that the task skips are
        listed in ``skipped_records``; the cache does not see that a waveform was mended
        since, so delete it then.

        Args:
            task: the task; default :attr:`default_task`.
            num_workers: processes; default those of the dataset.
            input_processors: fitted processors to use, by key.
            output_processors: fitted processors to use, by key.
            split: how to part the samples; processors are fitted on the first part.

        Returns:
            The samples, or a tuple of one dataset a part.

        Raises:
            ValueError: if a record cannot be used, or a part has no record.
            CacheError: if what was prepared before cannot be read.
        """
        task = self.default_task if task is None else task
        self.skipped_records = []
        table, filled = self.records(task), set()
        if isinstance(split, RecordSplit):
            split = split.bind(table)
            filled = split.filled()
        if not isinstance(task, ECGTask):
            return super().set_task(
                task, num_workers, input_processors, output_processors, split
            )
        records = self._prepared(task, num_workers)
        self.skipped_records = [
            ecg_id
            for ecg_id in table["ecg_id"]
            if str(ecg_id) not in records.record_to_index
        ]
        if self.skipped_records and isinstance(split, RecordSplit):
            split = split.bind(table, self.skipped_records)
        parts = ECGSamples.of_task(
            records,
            task,
            dict(table.select("ecg_id", "label").iter_rows()),
            split,
            input_processors,
            output_processors,
        )
        self._check_parts(parts, filled)
        if self.skipped_records:
            logger.warning(
                "%d records were skipped as unreadable; ecg_id %s",
                len(self.skipped_records),
                self.skipped_records,
            )
        return parts[0] if split is None else parts

    @abstractmethod
    def usual_split(self) -> RecordSplit:
        """Return the split into training, validation and test part by fold.

        Raises:
            ValueError: if the folds do not allow one.
        """

    @property
    def global_event_df(self) -> pl.LazyFrame:
        """The table of events, made where it is not there.

        Where several processes begin on one cache, one makes it and the others wait.
        """
        if any((self.cache_dir / EVENTS).glob("*.parquet")):
            # It is whole, and may lie where a lock cannot be written.
            return super().global_event_df
        with FileLock(self.cache_dir / "events.lock", timeout=LONGEST_WAIT):
            return super().global_event_df

    def records(self, task: BaseTask | None = None) -> pl.DataFrame:
        """Return the table of records, one row each, sorted by ecg_id.

        Args:
            task: if given and a task with labels, their column "label" is added, and
                records that it does not use are left out.

        Returns:
            Columns patient_id, timestamp and the event attributes.
        """
        table = self.global_event_df
        if isinstance(task, ECGTask):
            table = table.filter(task.record_expression()).with_columns(
                task.label_expression().alias("label")
            )
        table = (
            table.drop("event_type")
            .rename(lambda name: name.removeprefix(f"{self.event_type}/"))
            .sort("ecg_id")
        )
        try:
            return table.collect()
        except (pl.exceptions.PolarsError, FileNotFoundError) as error:
            raise CacheError(str(self.cache_dir), str(error)) from error

    def _prepared(self, task: ECGTask, num_workers: int | None) -> SampleDataset:
        """Return every record, read now or before."""
        try:
            return super().set_task(task.records_task(), num_workers)
        except (json.JSONDecodeError, pickle.UnpicklingError, EOFError) as error:
            raise CacheError(str(self.cache_dir), str(error)) from error

    def _init_cache_dir(self, cache_dir: str | Path | None) -> Path:
        # Absolute: a cluster's workers have working directories of their own.
        return super()._init_cache_dir(cache_dir).resolve()

    def _event_transform(self, output_dir: Path) -> None:
        for left in output_dir.parent.glob(f"{UNFINISHED}-*"):  # by a killed process
            shutil.rmtree(left)
        # A name of its own, in which no worker of another process still writes.
        unfinished = output_dir.with_name(f"{UNFINISHED}-{uuid.uuid4()}")
        super()._event_transform(unfinished)
        unfinished.rename(output_dir)

    def _task_transform(
        self, task: BaseTask, output_dir: Path, num_workers: int
    ) -> None:
        if self.client is None:
            if isinstance(task, ECGRecords) and task.on_error == "raise":
                num_workers = 1  # no waveform is read yet: starting more takes longer
            super()._task_transform(task, output_dir, num_workers)
            return
        events = task.pre_filter(self.global_event_df)
        transform_on_cluster(self.client, task, events, output_dir)

    def _proc_transform(
        self, task_df: Path, output_dir: Path, num_workers: int
    ) -> None:
        if self.client is None:
            super()._proc_transform(task_df, output_dir, num_workers)
            return
        process_on_cluster(self.client, task_df, output_dir)

    def _check_parts(self, parts: Sequence[SampleDataset], filled: set[int]) -> None:
        """Raise if skipping has emptied a part that the split fills."""
        for part in filled:
            if not len(parts[part]):
                raise ValueError(
                    f"No readable record is left in part {part} of the split (0 train, "
                    "1 validation, 2 test). Fetch the skipped records again: ecg_id "
                    f"{self.skipped_records}."
                )
