"""PTB-XL, a large public set of twelve-lead ECGs, and its splits."""

from __future__ import annotations

import ast
import csv
import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import narwhals as nw
import pandas as pd
import polars as pl

from pyhealth.tasks.ecg_classification import SUPERCLASSES, ECGBinaryClassification
from pyhealth.tasks.ptbxl_task import check_likelihood
from pyhealth.tasks.record_filter import QUALITY_FLAGS

from ..tasks import BaseTask
from .corpus_root import CorpusRoot
from .ecg_dataset import ECGDataset
from .ptbxl_download import PATH_COLUMNS, download
from .ptbxl_splits import CohortSplit, StratFoldSplit
from .ptbxl_table import check_table
from .ptbxl_verify import verify

__all__ = [
    "CohortSplit",
    "PTBXLDataset",
    "StratFoldSplit",
    "parse_scp_codes",
    "statement_names",
]

logger = logging.getLogger(__name__)

TABLES = ("ptbxl_database.csv", "scp_statements.csv")
#: In PTB-XL an age of 300 stands for 90 years or more.
CENSORED_AGE = 300
#: Longer than any published entry by far; longer ones are not parsed.
MAX_SCP_CHARACTERS = 10_000


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

    def preprocess_ptbxl(self, table: nw.LazyFrame) -> nw.LazyFrame:
        """Add the columns that the published table does not have.

        Args:
            table: the published table, all columns as text, names in lower case.

        Returns:
            The table with the event attributes of this class.
        """
        describe = partial(
            _describe,
            root=self.corpus.address,
            sampling_rate=self.sampling_rate,
            names_of=self._names_of,
            min_likelihood=self.min_likelihood,
        )
        frame = table.to_native()
        return nw.from_native(
            frame.map_partitions(describe, meta=describe(frame._meta))
        )


def parse_scp_codes(text: str) -> dict[str, float]:
    """Parse PTB-XL's ``scp_codes`` column: statement codes and their likelihoods.

    Args:
        text: the text of a flat Python dict, e.g. ``"{'NORM': 100.0, 'SR': 0.0}"``. It
            is read as a literal; nothing in it is ever run.

    Returns:
        Likelihood in percent by code; 0 means "not stated".

    Raises:
        ValueError: if the text is anything else.

    Examples:
        >>> parse_scp_codes("{'IMI': 35.0, 'SR': 0.0}")
        {'IMI': 35.0, 'SR': 0.0}
    """
    shown = text if len(text) <= 60 else f"{text[:60]}..."
    problem = f"scp_codes must be a dict of code to likelihood 0-100, got {shown!r}."
    if len(text) > MAX_SCP_CHARACTERS:
        raise ValueError(problem)
    try:
        codes = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(problem) from error
    usable = isinstance(codes, dict) and all(
        isinstance(code, str)
        and isinstance(likelihood, int | float)
        and 0 <= likelihood <= 100
        for code, likelihood in codes.items()
    )
    if not usable:
        raise ValueError(problem)
    return {code: float(likelihood) for code, likelihood in codes.items()}


def statement_names(path: str | Path) -> dict[str, dict[str, str]]:
    r"""Read what each statement says: which diagnosis, form or rhythm.

    Args:
        path: PTB-XL's ``scp_statements.csv``.

    Returns:
        For "superclasses" and "subclasses" the name by code of a diagnostic statement,
        for "forms" and "rhythms" the code itself.

    Raises:
        ValueError: if a column is missing.

    Examples:
        >>> import tempfile
        >>> header = ",diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass"
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write(f"{header}\nASMI,1.0,,,MI,AMI\nSR,,,1.0,,\n")
        ...     file.flush()
        ...     names = statement_names(file.name)
        >>> names["subclasses"], names["rhythms"]
        ({'ASMI': 'AMI'}, {'SR': 'SR'})
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read as a table in UTF-8 ({error}). Fetch it again."
        ) from error
    needed = ["", "diagnostic", "form", "rhythm"]
    needed += ["diagnostic_class", "diagnostic_subclass"]
    if not rows or not set(needed) <= set(rows[0]):
        raise ValueError(
            f"{path}: expected the columns {needed} of PTB-XL's scp_statements.csv. "
            "Fetch the file again."
        )

    def named(kind: str, column: str) -> dict[str, str]:
        is_kind = (row for row in rows if row[kind].strip() in ("1", "1.0"))
        return {row[""]: row[column] for row in is_kind}

    superclasses = named("diagnostic", "diagnostic_class")
    return {
        "superclasses": {
            code: name for code, name in superclasses.items() if name in SUPERCLASSES
        },
        "subclasses": named("diagnostic", "diagnostic_subclass"),
        "forms": named("form", ""),
        "rhythms": named("rhythm", ""),
    }


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


def _describe(
    frame: pd.DataFrame,
    *,
    root: str,
    sampling_rate: int,
    names_of: Mapping[str, Mapping[str, str]],
    min_likelihood: float,
) -> pd.DataFrame:
    """Turn published rows into event attributes with proper types."""
    needed = ["patient_id", "ecg_id", "age", "sex", "strat_fold", "scp_codes"]
    needed += ["recording_date", "validated_by_human", PATH_COLUMNS[sampling_rate]]
    needed += QUALITY_FLAGS
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise ValueError(
            f"ptbxl_database.csv has no column {', '.join(missing)}. Fetch it again."
        )
    age = _numbers(frame, "age")
    result = pd.DataFrame(
        {
            # PTB-XL writes whole numbers as 15709.0.
            "patient_id": frame["patient_id"].astype("string").str.removesuffix(".0"),
            "recording_date": frame["recording_date"].astype("string"),
            "ecg_id": _integers(frame, "ecg_id"),
            "record_path": root
            + "/"
            + frame[PATH_COLUMNS[sampling_rate]].astype("string"),
            "sampling_rate": pd.array([sampling_rate] * len(frame), dtype="Int64"),
            "age": age,
            "age_is_censored": (age >= CENSORED_AGE).astype("boolean"),
            "sex": _integers(frame, "sex"),
            "strat_fold": _integers(frame, "strat_fold"),
            "validated_by_human": frame["validated_by_human"].astype("string")
            == "True",
            "scp_codes": frame["scp_codes"].astype("string"),
        },
        index=frame.index,
    )
    for flag in QUALITY_FLAGS:
        result[flag] = frame[flag].astype("string")
    codes = [
        _codes(ecg_id, text)
        for ecg_id, text in zip(result["ecg_id"], result["scp_codes"], strict=True)
    ]
    known = set().union(*names_of.values())
    unknown = [
        "|".join(code for code in of_row if code not in known) for of_row in codes
    ]
    result["unknown_codes"] = pd.array(unknown, dtype="string")
    for group, name_of in names_of.items():
        # Forms and rhythms have no likelihood: theirs is 0 throughout.
        limit = min_likelihood if group in ("superclasses", "subclasses") else 0
        listed = [_listed(_likelihoods(of_row, name_of), limit) for of_row in codes]
        result[group] = pd.array(listed, dtype="string")
    likelihoods = pd.DataFrame(
        [_likelihoods(of_row, names_of["superclasses"]) for of_row in codes],
        columns=list(SUPERCLASSES),
        index=frame.index,
        dtype="Float64",
    )
    for name in SUPERCLASSES:
        present = (likelihoods[name] >= min_likelihood).fillna(False)
        result[name.lower()] = present.astype("Int64")
        result[f"{name.lower()}_likelihood"] = likelihoods[name]
    return result


def _numbers(frame: pd.DataFrame, name: str) -> pd.Series:
    try:
        return pd.to_numeric(frame[name]).astype("Float64")
    except ValueError as error:
        raise ValueError(f"ptbxl_database.csv, column {name}: {error}.") from error


def _integers(frame: pd.DataFrame, name: str) -> pd.Series:
    numbers = _numbers(frame, name)
    broken = numbers[(numbers % 1 != 0).fillna(False)]
    if len(broken):
        raise ValueError(
            f"ptbxl_database.csv, column {name}: expected whole numbers, found "
            f"{broken.iloc[0]}."
        )
    return numbers.astype("Int64")


def _codes(ecg_id: int, scp_codes: str) -> dict[str, float]:
    try:
        return parse_scp_codes("" if pd.isna(scp_codes) else scp_codes)
    except ValueError as error:
        raise ValueError(f"ptbxl_database.csv, ecg_id {ecg_id}: {error}") from error


def _likelihoods(
    codes: Mapping[str, float], name_of: Mapping[str, str]
) -> dict[str, float]:
    """Return the largest likelihood of each name's codes."""
    result: dict[str, float] = {}
    for code, likelihood in codes.items():
        if code in name_of:
            name = name_of[code]
            result[name] = max(result.get(name, 0.0), likelihood)
    return result


def _listed(likelihoods: Mapping[str, float], limit: float) -> str:
    return "|".join(f"{name}={p}" for name, p in likelihoods.items() if p >= limit)
