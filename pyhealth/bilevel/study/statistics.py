"""What the differences between configurations can be called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

__all__ = [
    "Interval",
    "agreement",
    "bootstrap_auroc",
    "bootstrap_by_patient",
    "holm",
    "over_seeds",
    "verdict",
]

#: Resamples of the bootstrap; with 500 an end of the interval is good to some percent
#: of its length.
RESAMPLES = 500
CONFIDENCE = 0.95
#: Of an AUROC, as the PTB-XL benchmark gives them.
AUROC_PERCENTILES = (5, 95)


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % interval.

    Attributes:
        mean: the difference.
        low: lower end; nan where one number has no spread.
        high: upper end.

    Examples:
        >>> print(Interval(0.021, 0.004, 0.038))
        +0.021 (+0.004 to +0.038)
    """

    mean: float
    low: float = math.nan
    high: float = math.nan

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.high < 0

    def __str__(self) -> str:
        ends = f" ({self.low:+.3f} to {self.high:+.3f})"
        return f"{self.mean:+.3f}" + ("" if math.isnan(self.low) else ends)


def over_seeds(differences: ArrayLike) -> tuple[Interval, float]:
    """Return the mean of paired differences over seeds, and the p-value of zero.

    Student's t: the seeds' differences are taken as a sample of a normal distribution.

    Args:
        differences: one a seed.

    Returns:
        The interval and the two-sided p-value; both nan for fewer than two seeds.

    Examples:
        >>> interval, p_value = over_seeds([0.02, 0.04, 0.03])
        >>> print(interval, round(p_value, 3))
        +0.030 (+0.005 to +0.055) 0.035
    """
    differences = np.asarray(differences, dtype=float)
    mean = float(differences.mean())
    if len(differences) < 2:
        return Interval(mean), math.nan
    if np.ptp(differences) == 0:  # a t-test has no scale to measure by
        return Interval(mean, mean, mean), 1.0 if mean == 0 else 0.0
    test = stats.ttest_1samp(differences, 0.0)
    ends = test.confidence_interval(CONFIDENCE)
    return Interval(mean, float(ends.low), float(ends.high)), float(test.pvalue)


def bootstrap_by_patient(
    predictions: Sequence[tuple[pd.DataFrame, pd.DataFrame]], seed: int = 0
) -> Interval:
    """Return how the mean AUROC difference varies with who is in the test part.

    Patients are drawn, with all their records, not records: those of one patient are
    alike. The trained networks stay what they are.

    Args:
        predictions: for each seed those of a configuration and of the one it is
            compared with, columns ecg_id, patient_id, label and probability.
        seed: of the draws.

    Returns:
        The difference and its percentile interval.

    Source:
        Efron and Tibshirani, An introduction to the bootstrap, 1993, chapter 13.

    Examples:
        >>> table = pd.DataFrame({"ecg_id": range(6), "patient_id": list("aabbcd"),
        ...                       "label": [0, 1] * 3, "probability": [0.2, 0.9] * 3})
        >>> print(bootstrap_by_patient([(table, table)]))
        +0.000 (+0.000 to +0.000)
    """
    pairs = [_aligned(one, other) for one, other in predictions]
    patients, rows_of = np.unique(pairs[0][0]["patient_id"], return_inverse=True)
    areas = [(_WeightedAUROC(one), _WeightedAUROC(other)) for one, other in pairs]

    def difference(drawn: np.ndarray) -> float:
        weight = np.bincount(drawn, minlength=len(patients))[rows_of]
        return float(np.mean([one(weight) - other(weight) for one, other in areas]))

    count = len(patients)
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    # A draw of one class has no AUROC: in a small test part some are left out.
    tail = 50 * (1 - CONFIDENCE)
    ends = np.nanpercentile([difference(d) for d in draws], [tail, 100 - tail])
    return Interval(difference(np.arange(count)), *map(float, ends))


def bootstrap_auroc(tables: Sequence[pd.DataFrame], seed: int = 0) -> Interval:
    """Return how the mean AUROC of labels varies with who is in the test part.

    Args:
        tables: predictions of each label for the same records: columns patient_id,
            label and probability. A label of one class has no AUROC and does not count.
        seed: of the draws.

    Returns:
        The mean over labels, and the 5th and 95th percentile over draws of patients.

    Source:
        Strodthoff et al., IEEE JBHI 2021, with 100 draws of records.

    Examples:
        >>> table = pd.DataFrame({"patient_id": list("abcd"), "label": [0, 1, 0, 1],
        ...                       "probability": [0.1, 0.9, 0.2, 0.8]})
        >>> print(bootstrap_auroc([table]))
        +1.000 (+1.000 to +1.000)
    """
    patients, rows_of = np.unique(tables[0]["patient_id"], return_inverse=True)
    areas = [_WeightedAUROC(table) for table in tables]
    count = len(patients)

    def mean(drawn: np.ndarray) -> float:
        weight = np.bincount(drawn, minlength=count)[rows_of]
        known = [
            area for area in (area(weight) for area in areas) if not math.isnan(area)
        ]
        return float(np.mean(known)) if known else math.nan

    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    ends = np.nanpercentile([mean(drawn) for drawn in draws], AUROC_PERCENTILES)
    return Interval(mean(np.arange(count)), *map(float, ends))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number.

    Args:
        p_values: by name; nan ones do not count.

    Returns:
        Adjusted p-values by name, in [0, 1]; nan where they were.

    Source:
        Holm, A simple sequentially rejective multiple test procedure, 1979.

    Examples:
        >>> holm({"D": 0.01, "E": 0.04, "F": 0.03})
        {'D': 0.03, 'E': 0.06, 'F': 0.06}
    """
    known = {name: p for name, p in p_values.items() if not math.isnan(p)}
    adjusted, largest = dict.fromkeys(p_values, math.nan), 0.0
    for rank, name in enumerate(sorted(known, key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[name]))
        adjusted[name] = largest
    return adjusted


def verdict(
    seeds: Interval, patients: Interval, p_value: float, number_of_seeds: int
) -> str:
    """Say in words what was shown.

    "helps" and "hurts" need all three: the interval over seeds and the one over
    patients on one side of zero, and the corrected p-value below 0.05.

    Args:
        seeds: of the differences over seeds.
        patients: of the mean difference over patients.
        p_value: over seeds, corrected.
        number_of_seeds: how many there were.

    Examples:
        >>> verdict(Interval(0.1), Interval(0.1, 0.05, 0.2), math.nan, 1)
        'one seed shows nothing'
    """
    if number_of_seeds < 2:
        return "one seed shows nothing"
    if p_value < 1 - CONFIDENCE:
        if seeds.above_zero and patients.above_zero:
            return "helps"
        if seeds.below_zero and patients.below_zero:
            return "hurts"
    return f"no difference shown at {number_of_seeds} seeds"


def agreement(probabilities: Sequence[ArrayLike]) -> float:
    """Return how alike the policies of several seeds order the operations.

    Args:
        probabilities: of the operations, one row a seed.

    Returns:
        Mean of Kendall's tau over all pairs, in [-1, 1]; nan where no pair has one.

    Examples:
        >>> round(agreement([[0.1, 0.2, 0.7], [0.2, 0.3, 0.5]]), 6)
        1.0
    """
    taus = [stats.kendalltau(a, b).statistic for a, b in combinations(probabilities, 2)]
    known = [float(tau) for tau in taus if not math.isnan(tau)]
    return float(np.mean(known)) if known else math.nan


def _aligned(
    one: pd.DataFrame, other: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    one, other = (table.sort_values("ecg_id") for table in (one, other))
    if one["ecg_id"].tolist() != other["ecg_id"].tolist():
        raise ValueError("The two predictions to compare are of different records.")
    return one, other


class _WeightedAUROC:
    """AUROC of fixed predictions for one set of weights after the other.

    The same as scikit-learn's with ``sample_weight``, but sorted once: a bootstrap of a
    study asks for some ten thousand of them.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.positive = table["label"].to_numpy() == 1
        values, self.rank = np.unique(table["probability"], return_inverse=True)
        self.ranks = len(values)

    def __call__(self, weight: np.ndarray) -> float:
        positive, negative = (
            np.bincount(self.rank[rows], weight[rows], self.ranks)
            for rows in (self.positive, ~self.positive)
        )
        below = np.cumsum(negative) - negative / 2  # ties count half
        pairs = positive.sum() * negative.sum()
        return positive @ below / pairs if pairs else math.nan
