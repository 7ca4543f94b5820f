"""PTB-XL, a large public set of twelve-lead ECGs, and its splits."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path

import dask.dataframe as dd
import narwhals as nw
import polars as pl

from ..tasks.base_task import BaseTask
from ..tasks.ecg_classification import ECGBinaryClassification
from ..tasks.ptbxl_task import check_likelihood
from .corpus_root import CorpusRoot
from .ecg_dataset import ECGDataset
from .ptbxl_download import PATH_COLUMNS, download
from .ptbxl_events import events
from .ptbxl_splits import CohortSplit, StratFoldSplit
from .ptbxl_statements import statement_names
from .ptbxl_table import check_table
from .ptbxl_verify import verify

__all__ = ["CohortSplit", "PTBXLDataset", "StratFoldSplit"]

logger = logging.getLogger(__name__)

TABLES = ("ptbxl_database.csv", "scp_statements.csv")


class PTBXLDataset(ECGDataset):
    """PTB-XL: 21,799 twelve-lead, ten-second ECGs of 18,869 patients (version 1.0.3).

    One event a record, of type "ptbxl"; signals stay on disk until a processor reads
    them. ``root`` holds the published ``ptbxl_database.csv`` and ``scp_statements.csv``
    as they are, and ``records100/`` or ``records500/``; nothing is written to it, and
    any subset of rows will do.

    Event attributes: ecg_id, record_path (without suffix), sampling_rate (Hz), age
    (years; missing stays missing, 300 stands for 90 or over and sets
    age_is_censored), sex (0 male, 1 female), strat_fold (1-10), validated_by_human,
    scp_codes (the published text), the superclasses norm, mi, sttc, cd, hyp (0 or 1)
    and for each the largest likelihood of its codes, e.g. mi_likelihood (percent;
    missing where no code is listed); superclasses, subclasses, forms and rhythms, each
    name with its likelihood ("AMI=80.0|IMI=35.0"); and the annotators' remarks
    baseline_drift, static_noise, burst_noise, electrodes_problems, extra_beats and
    pacemaker (text; missing where there is nothing to remark). A superclass is 1 if any
    listed code is a diagnostic statement of that class with at least
    ``min_likelihood``. A likelihood of 0 means "not stated", not "absent".

    Args:
        root: folder of the dataset, or an address of an object store that fsspec knows,
            "s3://bucket/ptbxl", "gs://..." or "az://...": records are then read from
            there, and the tables are copied to ``cache_dir``, which must be given.
        sampling_rate: 500 or 100, hertz: which of the two recordings to use.
        cache_dir: where PyHealth keeps prepared data; default its user cache.
        num_workers: processes for preparing data. For corpora below some thousand
            records one is fastest.
        dev: use only 1000 patients.
        config_path: another table configuration.
        dataset_name: name to show and to keep in the cache's key.
        min_likelihood: smallest likelihood of a code that counts, percent. The
            default, 0, counts every listed code.

    Raises:
        FileNotFoundError: if a file, or the folder of the asked rate, is missing.
        ValueError: if an argument, a statement or a row cannot be used.

    Cite:
        Wagner et al., PTB-XL, a large publicly available electrocardiography dataset,
        Scientific Data 7:154, 2020. Licence CC BY 4.0.

    Examples:
        >>> import tempfile
        >>> from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
        >>> folder = tempfile.mkdtemp()
        >>> root = write_synthetic_ptbxl(f"{folder}/data", n_patients=10)
        >>> dataset = PTBXLDataset(root, sampling_rate=100, cache_dir=folder)
        >>> dataset.default_task.task_label
        'MI'
    """

    event_type = "ptbxl"
    #: Whether codes without a statement were looked for.
    _unknown_told = False

    def __init__(
        self,
        root: str | Path,
        sampling_rate: int = 500,
        cache_dir: str | Path | None = None,
        num_workers: int = 1,
        dev: bool = False,
        config_path: str | Path | None = None,
        dataset_name: str | None = None,
        min_likelihood: float = 0.0,
    ) -> None:
        if sampling_rate not in PATH_COLUMNS:
            raise ValueError(
                f"PTB-XL has sampling rates {list(PATH_COLUMNS)} Hz, got "
                f"{sampling_rate}."
            )
        self.min_likelihood = check_likelihood(min_likelihood)
        self.corpus = CorpusRoot.of(root)
        folder = self.corpus.tables(TABLES, cache_dir)
        _check_files(self.corpus, folder, sampling_rate)
        check_table(folder / "ptbxl_database.csv", PATH_COLUMNS[sampling_rate])
        self.sampling_rate = sampling_rate
        self.skipped_records = []
        statements = folder / "scp_statements.csv"
        self._names_of = statement_names(statements)
        digest = hashlib.sha256(statements.read_bytes()).hexdigest()[:10]
        super().__init__(
            root=str(folder),
            tables=[self.event_type],
            # What shapes the event table and PyHealth's cache key does not see.
            dataset_name=(
                f"{dataset_name or 'ptbxl'}_{sampling_rate}hz"
                f"_likelihood{self.min_likelihood!r}_{digest}"
            ),
            config_path=str(
                config_path or Path(__file__).parent / "configs" / "ptbxl.yaml"
            ),
            cache_dir=cache_dir,
            num_workers=num_workers,
            dev=dev,
        )

    download = staticmethod(download)
    verify = staticmethod(verify)

    @property
    def default_task(self) -> ECGBinaryClassification:
        """Myocardial infarction against all other records."""
        return ECGBinaryClassification("MI")

    def usual_split(self) -> StratFoldSplit:
        """Return the published split: folds 1 to 8 train, 9 validates, 10 tests.

        Raises:
            ValueError: if this corpus has no fold 9 or 10.
        """
        folds = sorted(self.records()["strat_fold"].unique())
        if not {9, 10} <= set(folds):
            raise ValueError(
                f"This corpus has folds {folds}; without folds 9 and 10 there is "
                "nothing to validate and test on. Set n_records to draw a cohort: its "
                f"test part is fold {max(folds)}."
            )
        return StratFoldSplit()

    def records(self, task: BaseTask | None = None) -> pl.DataFrame:
        """Return the table of records, one row each, sorted by ecg_id.

        Codes that are not among the statements mean nothing to any task; they are
        named once.

        Args:
            task: if given and a task with labels, their column "label" is added, and
                records that it does not use are left out.

        Returns:
            Columns patient_id, timestamp and the event attributes.
        """
        table = super().records(task)
        if self._unknown_told:
            return table
        self._unknown_told = True
        everything = table if task is None else super().records()
        listed = everything["unknown_codes"].drop_nulls().str.split("|").explode()
        counts = listed.filter(listed != "").value_counts(sort=True)
        if len(counts):
            shown = [f"{code} ({n} records)" for code, n in counts.iter_rows()]
            logger.warning(
                "scp_statements.csv does not have the codes %s; they are ignored.",
                ", ".join(shown),
            )
        return table

    def preprocess_ptbxl(
        self, table: nw.LazyFrame[dd.DataFrame]
    ) -> nw.LazyFrame[dd.DataFrame]:
        """Add the columns that the published table does not have.

        Args:
            table: the published table, all columns as text, names in lower case.

        Returns:
            The table with the event attributes of this class.
        """
        describe = partial(
            events,
            root=self.corpus.address,
            sampling_rate=self.sampling_rate,
            names_of=self._names_of,
            min_likelihood=self.min_likelihood,
        )
        frame = table.to_native()
        return nw.from_native(
            frame.map_partitions(describe, meta=describe(frame._meta))
        )


def _check_files(corpus: CorpusRoot, tables: Path, sampling_rate: int) -> None:
    for name in TABLES:
        if not (tables / name).is_file():
            raise FileNotFoundError(
                f"{corpus.address}/{name} is missing. root must be the folder of "
                f"PTB-XL that holds {' and '.join(TABLES)}."
            )
    if not corpus.exists(f"records{sampling_rate}"):
        others = [rate for rate in PATH_COLUMNS if corpus.exists(f"records{rate}")]
        remedy = f"pass sampling_rate={others[0]}" if others else "fetch the records"
        raise FileNotFoundError(
            f"{corpus.address} has no records{sampling_rate}/ folder; {remedy}."
        )
