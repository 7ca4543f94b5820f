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
    """Return one row a plant: mean AUROC by forced operation, gain and its z."""
    frame = truth_frame(rows)
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
    """Return one row an estimator, epoch and plant: z, rank, agreement, repeatability.

    z is that of the planted operation's derivative of the logit (its sign so that
    positive means "raise it") over batch pairs; rank is its place among the operations;
    agreement is Spearman's correlation with the truth by force; halves is the cosine
    between the means of two halves of the pairs.
    """
    truth = truth_table(truth)
    grouped: dict[tuple, list] = {}
    for row in rows:
        key = (row["estimator"], row["epoch"], row["plant"])
        grouped.setdefault(key, []).extend(row["logits"])
    lines = []
    for (estimator, epoch, plant), logits in grouped.items():
        raised = -np.array(logits)
        mean = raised.mean(axis=0)
        column = list(OPERATIONS).index(plant.split("/")[0])
        halves = raised[::2].mean(axis=0), raised[1::2].mean(axis=0)
        lines.append(
            {
                "estimator": estimator,
                "epoch": epoch,
                "plant": plant,
                "z": mean[column] / stats.sem(raised[:, column]),
                "rank": 1 + int((mean > mean[column]).sum()),
                "agreement": stats.spearmanr(
                    mean, truth.loc[plant, list(OPERATIONS)]
                ).statistic,
                "halves": halves[0]
                @ halves[1]
                / np.linalg.norm(halves[0])
                / np.linalg.norm(halves[1]),
            }
        )
    return pd.DataFrame(lines)


def result_table(rows: Iterable[Mapping], truth: Iterable[Mapping]) -> pd.DataFrame:
    """Return one row a plant: probabilities and paired gains of the learned policy.

    Gains are differences of the planted test AUROC, paired by seed, with half the width
    of a 95 % interval of Student's t.
    """
    frame = truth_frame(truth).set_index(["plant", "forced", "seed"])["auroc"]
    by_plant: dict[str, dict[str, list]] = {}
    for row in rows:
        by_plant.setdefault(row["plant"], {}).setdefault(
            row["configuration"], []
        ).append(row)
    lines = []
    for plant, runs in by_plant.items():
        operation = plant.split("/")[0]
        line = {"plant": plant, "seeds": len(runs["learned"])}
        for configuration, done in runs.items():
            values = [row["probability"][operation] for row in done]
            line[f"probability, {configuration}"] = np.mean(values)
        for other in (NO_OP, UNIFORM):
            gains = [
                row["auroc"]["planted"] - frame[plant, other, row["seed"]]
                for row in runs["learned"]
            ]
            line[f"gain over {other}"] = np.mean(gains)
            line[f"+- ({other})"] = stats.sem(gains) * stats.t.ppf(
                0.975, len(gains) - 1
            )
        lines.append(line)
    return pd.DataFrame(lines)


def print_tables(rows: Mapping[str, Iterable[Mapping]]) -> None:
    """Print what is there."""
    truth = list(rows["truth"])
    with pd.option_context("display.width", 250, "display.max_columns", 30):
        print("Test AUROC with each operation forced in training, by nuisance")
        print(truth_table(truth).round(3).to_string())
        print("\nPlants that the planted operation wins:", valid_plants(truth))
        if list(rows["direction"]):
            table = direction_table(rows["direction"], truth)
            print("\nWhere the estimators point")
            print(table.round(2).to_string(index=False))
            means = table.groupby(["estimator", "epoch"], sort=False)
            shown = means[["z", "rank", "agreement", "halves"]].mean()
            print(shown.round(2).to_string())
        if list(rows["result"]):
            print("\nWhat training ends in")
            print(result_table(rows["result"], truth).round(3).to_string(index=False))
