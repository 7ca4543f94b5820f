"""One page on a study, made from what its runs have stored."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from ..checkpoint import write_whole
from ..plot_style import png_of
from .figures import calibration_figure, forest_figure, size_figure
from .results import comparison, read_runs

__all__ = ["write_report"]

TEMPLATE = "report.html.jinja"
#: Dots per inch of the pictures: sharp on a phone and in print, and some 50 KB each.
DPI = 110
#: Configurations in the calibration plot, if they were run.
CALIBRATED = ("A", "A+", "D", "E", "F")
#: Pictures that a run of the first seed draws, and what they show.
OF_A_RUN = {
    "policy.png": "Probabilities of the operations over the epochs, and the magnitudes "
    "of both classes in the operations' units, within the ranges they may take",
    "learning_curves.png": "Losses, validation scores and the hypergradient's "
    "signal-to-noise over the epochs",
    "ecg_augmented.png": "A training ECG on paper (25 mm/s, 10 mm/mV) before and after "
    "the policy",
}

#: What is shown and what a table is sorted by.
type Cell = dict[str, str | float]


@dataclass(frozen=True)
class Picture:
    """A picture in the page itself.

    Attributes:
        source: a data URL.
        alt: what it shows, for those who do not see it.

    Examples:
        >>> Picture.of(b"...", "nothing").source
        'data:image/png;base64,Li4u'
    """

    source: str
    alt: str

    @classmethod
    def of(cls, content: bytes | Figure, alt: str) -> Picture:
        """Return a picture of a figure, or of the bytes of a PNG file."""
        if isinstance(content, Figure):
            content = png_of(content, DPI)
        encoded = base64.b64encode(content).decode()
        return cls(f"data:image/png;base64,{encoded}", alt)


def write_report(folder: str | Path) -> Path:
    """Write report.html of a study: one file, which needs no network to be read.

    It is made from the stored runs alone: nothing is trained, no ECG is read.

    Args:
        folder: of the study.

    Returns:
        The path of the page.

    Raises:
        ValueError: if the folder holds no finished run.

    Examples:
        >>> write_report("output/study")  # doctest: +SKIP
    """
    folder = Path(folder)
    runs = read_runs(folder)
    compared = comparison(runs)
    config = json.loads((Path(runs["folder"].iloc[0]) / "config.json").read_text())
    asked = folder / "study.json"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("pyhealth.bilevel.study").joinpath(TEMPLATE).read_text("utf-8")
    page = environment.from_string(source).render(
        parts=[
            _part(group, runs)
            for _, group in compared.groupby(["task", "n_records"], sort=False)
        ],
        sizes=[
            (task, _size_picture(str(task), group))
            for task, group in compared.groupby("task", sort=False)
            if group["n_records"].nunique() > 1
        ],
        config=config,
        shared=_shared(runs),
        command=json.loads(asked.read_text())["command"] if asked.exists() else None,
        runs=len(runs),
        hours=runs["seconds"].sum() / 3600,
        seeds=sorted(set(runs["seed"])),
    )
    write_whole(folder / "report.html", page.encode())
    return folder / "report.html"


def _part(compared: pd.DataFrame, runs: pd.DataFrame) -> dict[str, object]:
    """Return what the page says of one task and cohort size."""
    task, size = compared["task"].iloc[0], compared["n_records"].iloc[0]
    own = runs[(runs["task"] == task) & (runs["n_records"] == size)]
    cohort = f"{size} records" if size else "all records"
    name = f"{task}, {cohort}"
    config = json.loads((Path(own["folder"].iloc[0]) / "config.json").read_text())
    return {
        "id": f"{task}-{size}",
        "name": name,
        "config": config,
        "n": int(own["n"].iloc[0]),
        "positives": int(own["positives"].iloc[0]),
        "rows": [_cells(row) for _, row in compared.iterrows()],
        "forest": Picture.of(
            forest_figure(compared),
            f"{name}: AUROC difference of each configuration with its 95 % intervals "
            "over seeds and over patients; the numbers are in the table",
        ),
        "calibration": _calibration(name, own),
        "runs": _run_pictures(own),
    }


def _cells(row: pd.Series) -> dict[str, object]:
    """Return what a row of the table shows, and what it is sorted by."""

    def cell(value: float, form: str, tail: str = "") -> Cell:
        if value is None or math.isnan(value):
            return {"text": "\N{EN DASH}", "value": ""}
        return {"text": format(value, form) + tail, "value": value}

    def spread(name: str) -> Cell:
        deviation = row[f"{name}_sd"]
        tail = "" if math.isnan(deviation) else f" ± {deviation:.3f}"
        return cell(row[name], ".3f", tail)

    def interval(kind: str) -> Cell:
        low, high = row.get(f"{kind}_low"), row.get(f"{kind}_high")
        if low is None or math.isnan(low):
            return cell(row["difference"] if kind == "seeds" else math.nan, "+.3f")
        ends = f"{low:+.3f} to {high:+.3f}"
        if kind == "patients":
            return {"text": ends, "value": low}
        return cell(row["difference"], "+.3f", f" ({ends})")

    budget = "as long as D" if row["budget"] == "seconds" else ""
    return {
        "letter": row["configuration"],
        "budget": budget,
        "title": row["title"] + (f", {budget}" if budget else ""),
        "verdict": row["verdict"],
        "cells": [
            cell(row["seeds"], ".0f"),
            spread("roc_auc"),
            interval("seeds"),
            interval("patients"),
            cell(row["p_holm"], ".3f"),
            spread("pr_auc"),
            cell(row["brier"], ".3f"),
            cell(row["calibration_error"], ".3f"),
            cell(row["leak_auroc"], ".3f"),
            cell(row["agreement"], ".2f"),
            cell(row["seconds"], ".0f"),
        ],
    }


def _calibration(name: str, runs: pd.DataFrame) -> Picture:
    shown = runs[runs["configuration"].isin(CALIBRATED) & (runs["budget"] == "steps")]
    predictions = {
        str(key): pd.concat(
            pd.read_csv(Path(path) / "predictions.csv") for path in group["folder"]
        )
        for key, group in shown.groupby("configuration", sort=False)
    }
    alt = f"{name}: share of positives over predicted probability, all seeds together"
    return Picture.of(calibration_figure(predictions), alt)


def _size_picture(task: str, compared: pd.DataFrame) -> Picture:
    alt = f"{task}: mean test AUROC over the number of records, by configuration"
    return Picture.of(size_figure(compared), alt)


def _run_pictures(runs: pd.DataFrame) -> list[dict[str, object]]:
    """Return the pictures of every run that has drawn its policy."""
    found: list[dict[str, object]] = []
    columns = (runs[name] for name in ("folder", "configuration", "seed"))
    for path, configuration, seed in zip(*columns, strict=True):
        folder = Path(path)
        if not (folder / "policy.png").exists():
            continue
        pictures = [
            Picture.of((folder / name).read_bytes(), alt)
            for name, alt in OF_A_RUN.items()
            if (folder / name).exists()
        ]
        name = f"{configuration}, seed {seed}"
        found.append({"name": name, "pictures": pictures})
    return found


def _shared(runs: pd.DataFrame) -> dict[str, str]:
    """Return the settings that all runs have in common."""
    settings = [
        json.loads((Path(path) / "config.json").read_text())["settings"]
        for path in runs["folder"]
    ]
    return {
        name: str(value)
        for name, value in settings[0].items()
        if all(other.get(name) == value for other in settings)
    }
