"""What a study found, read from what its runs have stored."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ...models.taskaug_policy import TaskAugPolicy
from .configurations import CONFIGURATIONS
from .statistics import (
    Interval,
    agreement,
    bootstrap_by_patient,
    holm,
    over_seeds,
    verdict,
)

__all__ = ["comparison", "document", "read_runs", "summary", "write_tables"]

#: A run's folder in that of a study, see ``Job.name``.
RUN_FOLDER = re.compile(
    r"(?P<task>[^/]+)/(?:n(?P<n_records>\d+)|all)"
    r"/(?P<configuration>[^/]+?)(?P<seconds>_seconds)?/seed_(?P<seed>\d+)"
)
SCORES = ("roc_auc", "pr_auc", "brier", "calibration_error")
TEST_COLUMNS = ("n", "positives", "roc_auc", "pr_auc", "accuracy", *SCORES[2:])


def read_runs(folder: str | Path) -> pd.DataFrame:
    """Read the scores of all finished runs of a study.

    Args:
        folder: of the study.

    Returns:
        One row a run: task, n_records (0: all), configuration, budget, seed, n,
        positives, roc_auc, pr_auc, accuracy, brier, calibration_error, val_roc_auc,
        leak_auroc, policy_p_value, best_epoch, epochs, seconds, folder.

    Raises:
        ValueError: if there is none.

    Examples:
        >>> read_runs("output/study")  # doctest: +SKIP
    """
    rows = []
    for path in sorted(Path(folder).glob("*/*/*/seed_*/metrics.json")):
        match = RUN_FOLDER.fullmatch(path.parent.relative_to(folder).as_posix())
        if match is None:
            continue
        metrics = json.loads(path.read_text())
        rows.append(
            {
                "task": match["task"],
                "n_records": int(match["n_records"] or 0),
                "configuration": match["configuration"],
                "budget": "seconds" if match["seconds"] else "steps",
                "seed": int(match["seed"]),
                **{name: metrics["test"][name] for name in TEST_COLUMNS},
                "val_roc_auc": (metrics["val"] or {}).get("roc_auc", math.nan),
                **{
                    name: metrics[name]
                    for name in ("leak_auroc", "policy_p_value", "best_epoch", "epochs")
                },
                "seconds": metrics["seconds"],
                "folder": str(path.parent),
            }
        )
    if not rows:
        raise ValueError(f"{folder} holds no finished run of a study.")
    order = {key: rank for rank, key in enumerate(CONFIGURATIONS)}
    table = pd.DataFrame(rows)
    table["rank"] = table["configuration"].map(order).fillna(len(order))
    keys = ["task", "n_records", "rank", "configuration", "budget", "seed"]
    ascending = [True, True, True, True, False, True]  # steps before seconds
    table = table.sort_values(keys, ascending=ascending, ignore_index=True)
    return table.drop(columns="rank")


def comparison(runs: pd.DataFrame) -> pd.DataFrame:
    """Compare every configuration with "A", paired by seed.

    Where there is no "A", the first configuration takes its place.

    Args:
        runs: from :func:`read_runs`.

    Returns:
        One row a task, cohort size, configuration and budget: seeds (paired), the mean
        and deviation of every score over seeds, the AUROC difference with its interval
        over seeds (seeds_low, seeds_high) and over patients (patients_low,
        patients_high), p_value and p_holm (corrected for the configurations of one task
        and size), verdict, leak_auroc, agreement (Kendall's tau between the seeds'
        policies) and seconds.

    Examples:
        >>> comparison(read_runs("output/study"))  # doctest: +SKIP
    """
    rows = []
    for (task, size), group in runs.groupby(["task", "n_records"], sort=False):
        part = [
            _row(own, group)
            for _, own in group.groupby(["configuration", "budget"], sort=False)
        ]
        names = [f"{row['configuration']} {row['budget']}" for row, _ in part]
        p_values = [math.nan if found is None else found.p_value for _, found in part]
        corrected = holm(dict(zip(names, p_values, strict=True)))
        for name, (row, found) in zip(names, part, strict=True):
            row["p_holm"] = corrected[name]
            if found is not None:
                row["verdict"] = verdict(
                    found.over_seeds, found.over_patients, corrected[name], found.seeds
                )
            rows.append({"task": task, "n_records": size, **row})
    return pd.DataFrame(rows)


def summary(compared: pd.DataFrame) -> str:
    """Return a comparison as text.

    Args:
        compared: from :func:`comparison`.

    Returns:
        A table a task and cohort size, and what its columns are.

    Examples:
        >>> print(summary(comparison(read_runs("output/study"))))  # doctest: +SKIP
    """
    blocks = []
    for (task, size), group in compared.groupby(["task", "n_records"], sort=False):
        shown = pd.DataFrame([_shown(row) for _, row in group.iterrows()])
        cohort = f"{size} records" if size else "all records"
        title = (
            f"{task}, {cohort} to train and validate on, {group['n'].iloc[0]} test "
            f"records ({group['positives'].iloc[0]} positive)"
        )
        blocks.append(f"{title}\n{shown.to_string(index=False)}")
    note = (
        "Mean ± standard deviation over seeds. Difference: AUROC minus that of the "
        "first row, paired\nby seed, 95 % interval over seeds; p by Holm. A verdict "
        "needs the interval over patients too."
    )
    return "\n\n".join([*blocks, note])


def document(compared: pd.DataFrame) -> str:
    """Return a comparison in Markdown, with the intervals over patients too.

    Args:
        compared: from :func:`comparison`, or read from a comparison.csv.

    Examples:
        >>> print(document(comparison(read_runs("output/study"))))  # doctest: +SKIP
    """
    blocks = []
    for (task, size), group in compared.groupby(["task", "n_records"], sort=False):
        cohort = f"{size} records" if size else "all records"
        lines = [_document_row(row) for _, row in group.iterrows()]
        table = [list(lines[0]), ["---"] * len(lines[0]), *(r.values() for r in lines)]
        rows = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
        blocks.append(f"### {task}, {cohort}\n\n{rows}")
    return "\n\n".join(blocks)


def write_tables(folder: str | Path) -> pd.DataFrame:
    """Write runs.csv, comparison.csv and results.md of a study from its stored runs.

    Args:
        folder: of the study.

    Returns:
        The comparison.

    Examples:
        >>> write_tables("output/study")  # doctest: +SKIP
    """
    folder = Path(folder)
    runs = read_runs(folder)
    compared = comparison(runs)
    own = [str(Path(path).relative_to(folder)) for path in runs["folder"]]
    runs.assign(folder=own).to_csv(folder / "runs.csv", index=False)
    compared.to_csv(folder / "comparison.csv", index=False)
    (folder / "results.md").write_text(f"{document(compared)}\n", encoding="utf-8")
    return compared


class _Difference(NamedTuple):
    """A configuration's difference from the reference, and the seeds that both have."""

    over_seeds: Interval
    over_patients: Interval
    p_value: float
    seeds: int


def _row(
    own: pd.DataFrame, group: pd.DataFrame
) -> tuple[dict[str, object], _Difference | None]:
    first = group.iloc[0]
    reference = group[
        (group["configuration"] == first["configuration"])
        & (group["budget"] == first["budget"])
    ].set_index("seed")
    own = own.set_index("seed")
    paired = own.index.intersection(reference.index)
    row: dict[str, object] = {
        "configuration": own["configuration"].iloc[0],
        "budget": own["budget"].iloc[0],
        "title": _title(own["configuration"].iloc[0]),
        "seeds": len(paired),
        "n": int(own["n"].iloc[0]),
        "positives": int(own["positives"].iloc[0]),
    }
    for score in SCORES:
        row[score], row[f"{score}_sd"] = own[score].mean(), own[score].std()
    row |= {"leak_auroc": own["leak_auroc"].mean(), "agreement": _agreement(own)}
    row["seconds"] = own["seconds"].mean()
    nothing = {"p_value": math.nan, "verdict": "not compared", "difference": math.nan}
    if own.index.equals(reference.index) and own.equals(reference):
        return row | nothing | {"verdict": "the reference"}, None
    if not len(paired) or own["roc_auc"].isna().any():
        return row | nothing, None
    differences = own.loc[paired, "roc_auc"] - reference.loc[paired, "roc_auc"]
    seeds, p_value = over_seeds(differences)
    patients = bootstrap_by_patient(
        [(_predictions(own, seed), _predictions(reference, seed)) for seed in paired]
    )
    row |= {
        "difference": seeds.mean,
        "seeds_low": seeds.low,
        "seeds_high": seeds.high,
        "patients_low": patients.low,
        "patients_high": patients.high,
        "p_value": p_value,
    }
    return row, _Difference(seeds, patients, p_value, len(paired))


def _title(key: str) -> str:
    return CONFIGURATIONS[key].title if key in CONFIGURATIONS else key


def _predictions(runs: pd.DataFrame, seed: int) -> pd.DataFrame:
    path = Path(runs["folder"].loc[seed]) / "predictions.csv"
    return pd.read_csv(path, dtype={"patient_id": str})


def _agreement(runs: pd.DataFrame) -> float:
    """Agreement of the final policies; nan without policies that the run made."""
    if runs["policy_p_value"].isna().all():
        return math.nan
    return agreement(
        [
            np.ravel(TaskAugPolicy.load(Path(path) / "policy.json").probabilities())
            for path in runs["folder"]
        ]
    )


def _shown(row: pd.Series) -> dict[str, str]:
    def spread(name: str) -> str:
        deviation = row[f"{name}_sd"]
        tail = "" if math.isnan(deviation) else f" ± {deviation:.3f}"
        return f"{row[name]:.3f}{tail}"

    def number(name: str, form: str) -> str:
        return "-" if math.isnan(row[name]) else format(row[name], form)

    difference = number("difference", "+.3f")
    if not math.isnan(row.get("seeds_low", math.nan)):
        difference += f" ({row['seeds_low']:+.3f} to {row['seeds_high']:+.3f})"
    budget = ", D's seconds" if row["budget"] == "seconds" else ""
    return {
        "": row["configuration"],
        "configuration": row["title"] + budget,
        "seeds": str(row["seeds"]),
        "AUROC": spread("roc_auc"),
        "AUPRC": spread("pr_auc"),
        "Brier": number("brier", ".3f"),
        "calibration": number("calibration_error", ".3f"),
        "difference": difference,
        "p": number("p_holm", ".3f"),
        "verdict": row["verdict"],
        "leak": number("leak_auroc", ".3f"),
        "tau": number("agreement", ".2f"),
        "seconds": number("seconds", ".0f"),
    }


def _document_row(row: pd.Series) -> dict[str, str]:
    shown = _shown(row)
    low, high = (row.get(f"patients_{end}", math.nan) for end in ("low", "high"))
    patients = "-" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"
    names = ("", "configuration", "seeds", "AUROC", "difference")
    rest = ("p", "verdict", "AUPRC", "Brier", "calibration", "leak", "tau", "seconds")
    return {
        **{name: shown[name] for name in names},
        "over patients": patients,
        **{name: shown[name] for name in rest},
    }
