"""Tables of the recovery benchmark, from stored rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from recovery_data import STRENGTHS
from scipy import stats

from pyhealth.models.ecg_augmentations import AUGMENTATIONS

#: By how many standard errors (over seeds, paired) the planted operation must beat no
#: augmentation for a plant to be one that an estimator can be judged by.
MARGIN = 2.0
NO_OP, UNIFORM = "no_op", "uniform"
OPERATIONS = tuple(AUGMENTATIONS)


def truth_frame(rows: Iterable[Mapping]) -> pd.DataFrame:
    """Return the test AUROC by plant, forced operation and seed."""
    return pd.DataFrame(
        [
            {
                "plant": plant,
                "forced": row["forced"],
                "seed": row["seed"],
                "auroc": value,
            }
            for row in rows
            for plant, value in row["auroc"].items()
        ]
    )


def truth_table(rows: Iterable[Mapping]) -> pd.DataFrame:
    """Return one row a plant: mean AUROC by forced operation, gain and its z.

    Only seeds with which every operation was forced count.
    """
    frame = truth_frame(rows)
    forced = frame.groupby("seed")["forced"].transform("nunique")
    frame = frame[forced == forced.max()]
    table = frame.pivot_table("auroc", "plant", "forced", sort=False)
    table["gain"] = np.nan
    table["z"] = np.nan
    for plant in table.index:
        operation = plant.split("/")[0]
        if operation in table.columns:
            by_seed = frame[frame["plant"] == plant].pivot_table(
                "auroc", "seed", "forced"
            )
            gain = (by_seed[operation] - by_seed[NO_OP]).dropna()
            table.loc[plant, "gain"] = gain.mean()
            table.loc[plant, "z"] = gain.mean() / gain.sem()
    return table


def kept_plants(rows: Iterable[Mapping]) -> dict[str, float]:
    """Return the strength of each operation's plant.

    It is the one where the planted operation gains most over no augmentation; whether
    that is a margin says :func:`valid_plants`.
    """
    table = truth_table(rows)
    kept = {}
    for operation, strengths in STRENGTHS.items():
        gains = {m: table.loc[f"{operation}/{m:g}", "gain"] for m in strengths}
        kept[operation] = max(gains, key=gains.get)
    return kept


def valid_plants(rows: Iterable[Mapping]) -> list[str]:
    """Return the kept plants that the planted operation wins by a margin.

    It must beat no augmentation by :data:`MARGIN` standard errors, and have the highest
    mean of all single operations.
    """
    table, valid = truth_table(rows), []
    forced = [c for c in table.columns if c not in ("gain", "z", UNIFORM)]
    for operation, magnitude in kept_plants(rows).items():
        row = table.loc[f"{operation}/{magnitude:g}"]
        if row["z"] >= MARGIN and row[forced].idxmax() == operation:
            valid.append(f"{operation}/{magnitude:g}")
    return valid


def direction_table(rows: Iterable[Mapping], truth: Iterable[Mapping]) -> pd.DataFrame:
    """Return one row an estimator and plant: z, rank, agreement, repeatability.

    z is that of the planted operation's derivative of the logit (its sign so that
    positive means "raise it") over batch pairs; rank is its place among the operations;
    agreement is Spearman's correlation with the truth by force; halves is the cosine
    between the means of two halves of the pairs. Each is formed at one point of one run
    and averaged over the runs.
    """
    truth = truth_table(truth)
    lines = []
    for row in rows:
        raised = -np.array(row["logits"])
        mean = raised.mean(axis=0)
        column = list(OPERATIONS).index(row["plant"].split("/")[0])
        halves = raised[::2].mean(axis=0), raised[1::2].mean(axis=0)
        lengths = [np.linalg.norm(half) for half in halves]
        lines.append(
            {
                "estimator": row["estimator"],
                "plant": row["plant"],
                "z": mean[column] / stats.sem(raised[:, column]),
                "rank": 1 + int((mean > mean[column]).sum()),
                "agreement": stats.spearmanr(
                    mean, truth.loc[row["plant"], list(OPERATIONS)]
                ).statistic,
                "halves": halves[0] @ halves[1] / lengths[0] / lengths[1],
            }
        )
    keys = ["estimator", "plant"]
    return pd.DataFrame(lines).groupby(keys, sort=False).mean().reset_index()


def result_table(rows: Iterable[Mapping], truth: Iterable[Mapping]) -> pd.DataFrame:
    """Return one row a plant: probabilities and paired gains of the learned policy.

    Gains are differences of the planted test AUROC, paired by seed, with half the width
    of a 95 % interval of Student's t.
    """
    rows, truth = sorted(rows, key=lambda row: row["seed"]), list(truth)
    auroc = truth_frame(truth).set_index(["plant", "forced", "seed"])["auroc"]
    lines = []
    for operation, magnitude in kept_plants(truth).items():
        plant = f"{operation}/{magnitude:g}"
        runs = [row for row in rows if row["plant"] == plant]
        learned = [row for row in runs if row["configuration"] == "learned"]
        if not learned:
            continue
        line = {"plant": plant, "seeds": len(learned)}
        for name in dict.fromkeys(row["configuration"] for row in runs):
            line[name] = [
                row["probability"][operation]
                for row in runs
                if row["configuration"] == name
            ]
        line["p values"] = [row["p_value"] for row in learned]
        for other in (NO_OP, UNIFORM):
            gains = [
                row["auroc"]["planted"] - auroc[plant, other, row["seed"]]
                for row in learned
            ]
            line[f"over {other}"] = np.mean(gains)
            line[f"+- {other}"] = stats.sem(gains) * stats.t.ppf(0.975, len(gains) - 1)
        lines.append(line)
    return pd.DataFrame(lines)
