"""Scores of predictions, of one label or of several."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    roc_auc_score,
)

from ...metrics.calibration import ece_confidence_binary
from .statistics import bootstrap_auroc

__all__ = ["by_label", "score"]

NO_INTERVAL = {"roc_auc_low": None, "roc_auc_high": None}


def score(predictions: pd.DataFrame) -> Mapping[str, object]:
    """Score predictions.

    Args:
        predictions: columns patient_id, label (0 or 1) and probability; with several
            labels label/<name> and probability/<name>.

    Returns:
        n, positives, roc_auc and its 90 % interval (roc_auc_low, roc_auc_high: 5th and
        95th percentile of a bootstrap by patient), pr_auc, accuracy (at 0.5), brier and
        calibration_error (expected, in 20 bins of the probability). The areas are None
        where only one class is present. With several labels these are the means over
        the labels that have both classes (macro), and "labels" has those of each.

    Examples:
        >>> table = pd.DataFrame({"patient_id": ["a", "b"], "label": [0, 1],
        ...                       "probability": [0.2, 0.9]})
        >>> score(table)["roc_auc"]
        1.0
    """
    tables = by_label(predictions)
    scores = {name: _score_one(table) for name, table in tables.items()}
    if list(scores) == [""]:
        return scores[""]
    scored = [of for of in scores.values() if of["roc_auc"] is not None]
    means = {
        key: float(np.mean([of[key] for of in scored])) if scored else None
        for key in ("roc_auc", "pr_auc", "accuracy", "brier", "calibration_error")
    }
    positives = {name: of["positives"] for name, of in scores.items()}
    counts = {"n": len(predictions), "positives": positives}
    interval = _interval([*tables.values()]) if scored else NO_INTERVAL
    return counts | means | interval | {"labels": scores}


def by_label(predictions: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return a table of predictions for each label.

    Args:
        predictions: as :func:`score` takes them.

    Returns:
        Columns ecg_id, if there, patient_id, label and probability, by name; a single
        label's name is "".

    Examples:
        >>> table = pd.DataFrame({"patient_id": ["a"], "label/MI": [1],
        ...                       "probability/MI": [0.5]})
        >>> list(by_label(table)["MI"].columns)
        ['patient_id', 'label', 'probability']
    """
    ids = predictions[[c for c in ("ecg_id", "patient_id") if c in predictions]]
    prefixed = [c for c in map(str, predictions) if c.split("/")[0] == "label"]
    return {
        column.removeprefix("label").removeprefix("/"): ids.assign(
            label=predictions[column],
            probability=predictions[column.replace("label", "probability", 1)],
        )
        for column in prefixed
    }


def _score_one(predictions: pd.DataFrame) -> dict[str, float | int | None]:
    label, probability = predictions["label"], predictions["probability"]
    both = label.nunique() == 2
    return {
        "n": len(label),
        "positives": int(label.sum()),
        "roc_auc": float(roc_auc_score(label, probability)) if both else None,
        "pr_auc": float(average_precision_score(label, probability)) if both else None,
        "accuracy": float(accuracy_score(label, probability >= 0.5)),
        "brier": float(brier_score_loss(label, probability)),
        "calibration_error": float(
            ece_confidence_binary(probability.to_numpy()[:, None], label.to_numpy())
        ),
        **(_interval([predictions]) if both else NO_INTERVAL),
    }


def _interval(tables: list[pd.DataFrame]) -> dict[str, float]:
    ends = bootstrap_auroc(tables)
    return {"roc_auc_low": ends.low, "roc_auc_high": ends.high}
