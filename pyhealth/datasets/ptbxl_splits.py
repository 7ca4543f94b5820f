"""Splits of PTB-XL by its published folds, and small cohorts drawn from them."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Literal, Self

import numpy as np
import polars as pl

from .splitter import Split

__all__ = ["CohortSplit", "RecordSplit", "StratFoldSplit"]

FOLDS = range(1, 11)
PROTOCOLS = ("patient", "paper")
#: Its multiples, without their whole parts, are spread evenly.
GOLDEN = (5**0.5 - 1) / 2

#: Part (0, 1, ...) of all samples of a patient, or of each of its records in the order
#: of the table, None for those of no part.
type Parts = int | tuple[int | None, ...]


@dataclass(frozen=True)
class RecordSplit(Split):
    """A split that depends on what is known of the records: their folds, their labels.

    A PyHealth split sees only which samples belong to which patient, so
    ``PTBXLDataset.set_task`` first calls :meth:`bind` with its table of records.

    Examples:
        >>> import polars as pl
        >>> records = pl.DataFrame({"patient_id": ["a", "b"], "strat_fold": [1, 9]})
        >>> split = StratFoldSplit(train=[1], val=[9], test=[]).bind(records)
        >>> [part.tolist() for part in split.split_indices({"a": [0, 1], "b": [2]})]
        [[0, 1], [2], []]
    """

    _part_of: Mapping[str, Parts] | None = field(
        default=None, repr=False, compare=False, kw_only=True
    )

    def bind(self, records: pl.DataFrame, skipped: Iterable[int] = ()) -> Self:
        """Return the same split with every patient's part decided.

        Args:
            records: columns patient_id and strat_fold, one row a record; a cohort also
                needs label (0 or 1, or a list of names).
            skipped: ecg_id, a column then, of records of which there is no sample. The
                others keep the part that they would have beside them.

        Raises:
            ValueError: if a patient's records lie in two folds, or a part is empty.
        """
        several = (
            records.group_by("patient_id")
            .agg(pl.col("strat_fold").n_unique().alias("folds"))
            .filter(pl.col("folds") > 1)["patient_id"]
            .sort()
        )
        if len(several):
            raise ValueError(
                f"Records of patient {several[0]} lie in two folds, so a split by fold "
                "would put one person on both sides. Mend strat_fold in the table."
            )
        parts = self._assign(records)
        skipped = set(skipped)
        if skipped:
            is_there = ~records["ecg_id"].is_in(list(skipped))
            for patient, there in _by_patient(records, is_there).items():
                of_patient = parts.get(patient)
                if isinstance(of_patient, tuple):
                    parts[patient] = tuple(compress(of_patient, there))
        return replace(self, _part_of=parts)

    @abstractmethod
    def _assign(self, records: pl.DataFrame) -> dict[str, Parts]: ...

    def split_indices(
        self, patient_to_index: Mapping[str, Sequence[int]]
    ) -> list[np.ndarray]:
        """Return the sample indices of the train, validation and test part.

        Args:
            patient_to_index: the samples of each patient.

        Returns:
            Three sorted arrays; samples that belong to no part are left out.
        """
        parts: list[list[int]] = [[], [], []]
        for patient, indices in patient_to_index.items():
            of_patient = self.parts().get(patient, ())
            if isinstance(of_patient, int):
                parts[of_patient].extend(indices)
                continue
            for index, part in zip(sorted(indices), of_patient, strict=False):
                if part is not None:
                    parts[part].append(index)
        return [np.array(sorted(part), dtype=np.int64) for part in parts]

    def parts(self) -> Mapping[str, Parts]:
        """Return each patient's part, or those of its records in the table's order.

        Raises:
            ValueError: before :meth:`bind`.
        """
        if self._part_of is None:
            raise ValueError(
                f"{type(self).__name__} does not know the folds yet: use it with "
                "PTBXLDataset.set_task(task, split=...), or call bind(records) first."
            )
        return self._part_of

    def filled(self) -> set[int]:
        """Return the parts that have a record.

        Raises:
            ValueError: before :meth:`bind`.
        """
        tuples = (p if isinstance(p, tuple) else (p,) for p in self.parts().values())
        return {part for parts in tuples for part in parts if part is not None}

    def _digest(self) -> str:
        text = repr(sorted(self.parts().items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StratFoldSplit(RecordSplit):
    """Split by PTB-XL's ``strat_fold``, which keeps each patient in one fold.

    The published recommendation: folds 1 to 8 to train, 9 to validate, 10 to test;
    9 and 10 were validated by a human.

    Args:
        train: folds of the training part.
        val: folds of the validation part.
        test: folds of the test part.

    Raises:
        ValueError: if a fold is not 1 to 10 or is named twice.

    Source:
        Wagner et al., Scientific Data 7:154, 2020.

    Examples:
        >>> StratFoldSplit(train=range(1, 9)).train
        (1, 2, 3, 4, 5, 6, 7, 8)
    """

    train: Iterable[int] = range(1, 9)
    val: Iterable[int] = (9,)
    test: Iterable[int] = (10,)

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            folds = tuple(int(fold) for fold in getattr(self, name))
            object.__setattr__(self, name, folds)
        named = (*self.train, *self.val, *self.test)
        if len(set(named)) != len(named) or not set(named) <= set(FOLDS):
            raise ValueError(
                "StratFoldSplit needs different folds from 1 to 10, got "
                f"train={self.train}, val={self.val}, test={self.test}."
            )

    def _assign(self, records: pl.DataFrame) -> dict[str, Parts]:
        part_of_fold = {
            fold: part
            for part, folds in enumerate((self.train, self.val, self.test))
            for fold in folds
        }
        present = set(records["strat_fold"].unique())
        if not self.train:
            raise ValueError("The training part needs a fold, got train=().")
        for name in ("train", "val", "test"):
            folds = getattr(self, name)
            if folds and not present & set(folds):
                raise ValueError(
                    f"No record lies in the {name} folds {list(folds)}; this corpus "
                    f"has folds {sorted(present)}. Choose others, or draw a cohort "
                    "with CohortSplit."
                )
        return {
            patient: part_of_fold[fold]
            for patient, fold in records.select("patient_id", "strat_fold").iter_rows()
            if fold in part_of_fold
        }

    def to_dict(self) -> dict[str, object]:
        """Describe the split for PyHealth's cache key."""
        return {
            "kind": "strat_fold",
            "train": list(self.train),
            "val": list(self.val),
            "test": list(self.test),
            "digest": self._digest(),
        }


@dataclass(frozen=True)
class CohortSplit(RecordSplit):
    """A small cohort: N records to train and validate on, the test folds untouched.

    Patients are drawn, not records, so nobody is on two sides; of the last patient as
    many records are used as make N. The prevalence of the label is kept, to one
    patient; of several labels, that of the rarest one that a patient has. Cohorts of
    one seed are nested: the 1000 lie within the 2500, train within train and validation
    within validation. A record that the task then skips as unreadable counts in N.

    Args:
        n_records: number of records N to train and validate on.
        seed: seed of the draw.
        test: folds of the test part; the cohort is drawn from all others.
        val_fraction: share of the patients that validate.
        protocol: "patient", or "paper" for the authors' own way, for parity with them:
            records are drawn at random, whoever they are of, so the prevalence varies
            and a patient's records may lie in the training and the validation part.
            Validation scores are then too good; the test folds are apart either way.

    Raises:
        ValueError: if an argument is outside its range, or there are fewer records.

    Source:
        Raghu et al., CHIL 2022, draw N = 1000, 2500, 5000 records at random from folds
        1 to 9 and use 20 % of them to validate. Departure by default: by patient, label
        kept.

    Examples:
        >>> CohortSplit(n_records=1000, seed=3).test
        (10,)
    """

    n_records: int
    seed: int = 0
    test: Iterable[int] = (10,)
    val_fraction: float = 0.2
    protocol: Literal["patient", "paper"] = "patient"

    def __post_init__(self) -> None:
        object.__setattr__(self, "test", tuple(int(fold) for fold in self.test))
        if self.n_records < 2:
            raise ValueError(f"n_records must be 2 or more, got {self.n_records}.")
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"val_fraction must lie between 0 and 1, got {self.val_fraction}."
            )
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"protocol must be one of {list(PROTOCOLS)}, got {self.protocol!r}."
            )
        if not set(self.test) <= set(FOLDS):
            raise ValueError(f"test must name folds from 1 to 10, got {self.test}.")

    def _assign(self, records: pl.DataFrame) -> dict[str, Parts]:
        if "label" not in records.columns:
            raise ValueError(
                "A cohort keeps the prevalence of the task's label, and this task has "
                "no label_expression(); use StratFoldSplit."
            )
        tests = pl.col("strat_fold").is_in(list(self.test))
        pool, held_out = records.filter(~tests), records.filter(tests)
        if len(pool) < self.n_records:
            raise ValueError(
                f"A cohort of {self.n_records} records was asked for, but the folds "
                f"outside {list(self.test)} hold {len(pool)}."
            )
        if self.test and not len(held_out):
            raise ValueError(
                f"No record lies in the test folds {list(self.test)}; this corpus has "
                f"folds {sorted(pool['strat_fold'].unique())}."
            )
        draw = self._patients if self.protocol == "patient" else self._records
        drawn = draw(pool)
        if not {0, 1} <= {part for parts in drawn.values() for part in parts}:
            raise ValueError(
                f"A cohort of {self.n_records} records leaves nobody to train or to "
                "validate on. Take a larger n_records or another val_fraction."
            )
        return {**drawn, **dict.fromkeys(held_out["patient_id"], 2)}

    def _patients(self, pool: pl.DataFrame) -> dict[str, tuple[int, ...]]:
        drawn, left = {}, self.n_records
        for patient, count, part in self._ranked(pool):
            if not left:
                break
            drawn[patient] = (part,) * min(count, left)
            left -= min(count, left)
        return drawn

    def _records(self, pool: pl.DataFrame) -> dict[str, tuple[int | None, ...]]:
        parts = np.full(len(pool), None)
        order = np.random.default_rng(self.seed).permutation(len(pool))
        for rank, row in enumerate(order[: self.n_records]):
            parts[row] = self._validates(rank, 0.0)
        return _by_patient(pool, parts)

    def _validates(self, rank: int, offset: float) -> int:
        """Return 1 where a rank validates: of every start the right share, to one."""
        before, after = ((rank + k) * self.val_fraction + offset for k in (0, 1))
        return int(after + 1e-9) - int(before + 1e-9)

    def _ranked(self, pool: pl.DataFrame) -> list[tuple[str, int, int]]:
        """Return (patient, records, part) in an order whose every start is balanced."""
        patients = (
            pool.with_columns(_strata(pool["label"]).alias("stratum"))
            .group_by("patient_id")
            .agg(pl.len().alias("count"), pl.col("stratum").max())
            .sort("patient_id")
        )
        rng = np.random.default_rng(self.seed)
        ranked = []
        for place, number in enumerate(sorted(patients["stratum"].unique())):
            # Else many small strata, each rounded down, would leave few to validate.
            offset = place // 2 * GOLDEN % 1
            stratum = patients.filter(pl.col("stratum") == number)
            for rank, row in enumerate(rng.permutation(len(stratum))):
                ranked.append(
                    (
                        (rank + 0.5) / len(stratum),
                        stratum["patient_id"][int(row)],
                        stratum["count"][int(row)],
                        self._validates(rank, offset),
                    )
                )
        return [row[1:] for row in sorted(ranked)]

    def to_dict(self) -> dict[str, object]:
        """Describe the split for PyHealth's cache key."""
        return {
            "kind": "cohort",
            "n_records": self.n_records,
            "seed": self.seed,
            "test": list(self.test),
            "val_fraction": self.val_fraction,
            "protocol": self.protocol,
            "digest": self._digest(),
        }


def _by_patient[T](
    records: pl.DataFrame, values: Iterable[T]
) -> dict[str, tuple[T, ...]]:
    """Return each patient's values of one for each record, in the table's order."""
    found: dict[str, list[T]] = {}
    for patient, value in zip(records["patient_id"], values, strict=True):
        found.setdefault(patient, []).append(value)
    return {patient: tuple(of_patient) for patient, of_patient in found.items()}


def _strata(labels: pl.Series) -> pl.Series:
    """Return a number for each record, the higher the rarer the label."""
    if not isinstance(labels.dtype, pl.List):
        return labels
    count = Counter(name for of_record in labels for name in of_record)
    common_first = sorted(count, key=lambda name: (-count[name], name))
    rarity = {name: rank for rank, name in enumerate(common_first, 1)}
    return pl.Series([max((rarity[n] for n in of), default=0) for of in labels])
