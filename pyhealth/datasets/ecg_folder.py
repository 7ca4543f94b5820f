"""A folder of anybody's own WFDB records, with a table of patients and labels."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path

import dask.dataframe as dd
import narwhals as nw
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from ..tasks.ecg_folder_classification import ECGFolderClassification
from .corpus_root import CorpusRoot
from .ecg_dataset import ECGDataset
from .ptbxl_splits import FOLDS, StratFoldSplit
from .table_rows import read_table, refuse_rows

__all__ = ["ECGFolderDataset"]

TABLE = "records.csv"


class ECGFolderDataset(ECGDataset):
    r"""A folder with WFDB records and ``records.csv``, one row a record.

    ========= ========================================================================
    column    content
    ========= ========================================================================
    record    path of the record below the folder, without suffix: ``a/0001`` for
              ``a/0001.hea`` with its ``.dat`` or ``.mat``
    patient   any text that is the same for all records of one patient
    label     0 or 1
    fold      1 to 10, optional, one fold a patient; the last one tests and the one
              before it validates. Without the column patients are dealt out to ten
              folds, the label's prevalence kept.
    ========= ========================================================================

    Other columns are ignored. Every row is checked before anything is read. Event
    attributes: ecg_id (the row's number, from 1), record_path, given_label, strat_fold.
    Nothing is written to the folder.

    Args:
        root: the folder, or an address as in
            :class:`~pyhealth.datasets.ptbxl.PTBXLDataset`.
        cache_dir: where PyHealth keeps prepared data; default its user cache.
        num_workers: processes for preparing data.

    Raises:
        FileNotFoundError: if there is no ``records.csv``.
        ValueError: if rows cannot be used; the first ones are told, each with what is
            wrong.

    Examples:
        >>> import tempfile
        >>> from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
        >>> folder = Path(tempfile.mkdtemp())
        >>> root = write_synthetic_ptbxl(folder / "own", n_patients=10)
        >>> headers = sorted(root.rglob("*_lr.hea"))[:10]
        >>> lines = [f"{header.relative_to(root).with_suffix('')},P{i},{i % 2},{i + 1}"
        ...          for i, header in enumerate(headers)]
        >>> table = "\n".join(["record,patient,label,fold", *lines])
        >>> _ = (root / "records.csv").write_text(table)
        >>> ECGFolderDataset(root, cache_dir=folder).usual_split().test
        (10,)
    """

    event_type = "ecg"

    def __init__(
        self,
        root: str | Path,
        cache_dir: str | Path | None = None,
        num_workers: int = 1,
    ) -> None:
        self.corpus = CorpusRoot.of(root)
        folder = self.corpus.tables([TABLE], cache_dir)
        self.skipped_records = []
        self._table = _read_table(self.corpus, folder / TABLE)
        super().__init__(
            root=str(folder),
            tables=[self.event_type],
            dataset_name="ecg_folder",
            config_path=str(Path(__file__).parent / "configs" / "ecg_folder.yaml"),
            cache_dir=cache_dir,
            num_workers=num_workers,
        )

    @property
    def default_task(self) -> ECGFolderClassification:
        """The label of the table."""
        return ECGFolderClassification()

    def usual_split(self) -> StratFoldSplit:
        """Return the last fold to test, the one before to validate, others to train."""
        *train, val, test = sorted(set(self._table["strat_fold"]))
        return StratFoldSplit(train, (val,), (test,))

    def preprocess_ecg(
        self, table: nw.LazyFrame[dd.DataFrame]
    ) -> nw.LazyFrame[dd.DataFrame]:
        """Return the checked table, whose folds depend on all of its rows."""
        return nw.from_native(dd.from_pandas(self._table, npartitions=1))


def _read_table(corpus: CorpusRoot, path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(
            f"{corpus.address}/{TABLE} is missing. It needs the columns record, "
            "patient and label, and may have fold; see ECGFolderDataset."
        )
    table = read_table(path, ["record", "patient", "label"], strip=True)
    has_fold = "fold" in table.columns
    _check_rows(corpus, path, table, has_fold)
    result = pd.DataFrame(
        {
            "patient_id": table["patient"],
            "ecg_id": range(1, len(table) + 1),
            "record_path": f"{corpus.address}/" + table["record"],
            "given_label": table["label"].astype("Int64"),
        }
    )
    result["strat_fold"] = (
        table["fold"].astype("Int64") if has_fold else _dealt_folds(path, result)
    )
    if result["strat_fold"].nunique() < 3:
        raise ValueError(
            f"{path}: fold holds {sorted(set(result['strat_fold']))}; three folds are "
            "needed, to train, to validate and to test. Or leave the column out."
        )
    return result


def _check_rows(
    corpus: CorpusRoot, path: Path, table: pd.DataFrame, has_fold: bool
) -> None:
    """Raise if a row cannot be used, and say of each why."""
    problems: dict[str, str] = {}
    seen: dict[str, int] = {}
    fold_of: dict[str, str] = {}
    for number, row in enumerate(table.to_dict("records"), start=2):  # 1: the header
        problem = _problem_of(row, has_fold) or corpus.problem_with(
            f"{row['record']}.hea"
        )
        record = "" if problem else os.path.normpath(row["record"])
        if record in seen:
            problem = f"record {row['record']!r} is in line {seen[record]} too"
        if not problem and has_fold:
            first = fold_of.setdefault(row["patient"], row["fold"])
            if first != row["fold"]:
                problem = f"patient {row['patient']!r} is in fold {first} too"
        if problem:
            problems[f"line {number}"] = problem
        else:
            seen[record] = number
    refuse_rows(path, problems, len(table))


def _problem_of(row: Mapping[Hashable, str], has_fold: bool) -> str:
    wanted = ("record", "patient", "label", *(["fold"] if has_fold else []))
    empty = [name for name in wanted if pd.isna(row[name])]
    if empty:
        return f"{', '.join(empty)} is empty"
    if row["label"] not in ("0", "1"):
        return f"label {row['label']!r} is neither 0 nor 1"
    if has_fold and row["fold"] not in [str(fold) for fold in FOLDS]:
        return f"fold {row['fold']!r} is not 1 to 10"
    return ""


def _dealt_folds(path: Path, table: pd.DataFrame) -> pd.Series:
    folds = len(FOLDS)
    by_class = table.groupby("given_label")["patient_id"].nunique()
    if len(by_class) < 2 or by_class.min() < folds:
        counts = dict(zip(by_class.index.tolist(), by_class.tolist(), strict=True))
        raise ValueError(
            f"{path}: ten folds need ten patients of each label, found {counts}. Add a "
            "column fold with three folds or more."
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    result = pd.Series(0, index=table.index, dtype="Int64")
    label = table["given_label"].astype(int)
    parts = splitter.split(table, label, table["patient_id"])
    for fold, (_, rows) in zip(FOLDS, parts, strict=True):
        result.iloc[rows] = fold
    return result
