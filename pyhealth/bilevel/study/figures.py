"""Pictures of a study: differences with intervals, learning curves, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve

from ..plot_style import COLOURS, DASHES, GREY, new_figure, style_axes

__all__ = ["calibration_figure", "forest_figure", "size_figure"]

#: Bins of the calibration plot, each with as many records.
BINS = 10


def forest_figure(compared: pd.DataFrame) -> Figure:
    """Draw every configuration's AUROC difference with both of its intervals.

    Args:
        compared: rows of one task and cohort size, from
            :func:`~pyhealth.bilevel.study.results.comparison`.

    Returns:
        The figure.

    Examples:
        >>> row = {"configuration": "D", "budget": "steps", "title": "TaskAug K=2",
        ...        "difference": 0.02, "seeds_low": 0.01, "seeds_high": 0.03,
        ...        "patients_low": 0.0, "patients_high": 0.04}
        >>> len(forest_figure(pd.DataFrame([row])).axes)
        1
    """
    rows = compared[compared["difference"].notna()].reset_index()
    figure = new_figure(8, 1.4 + 0.42 * max(1, len(rows)))
    ax = figure.add_subplot()
    style_axes(ax, "", "AUROC minus that of the reference")
    ax.axvline(0, color="black", linewidth=1)
    kinds = (
        ("seeds", "95 % over seeds", -0.12, COLOURS[0], "o", "-"),
        ("patients", "95 % over patients", 0.12, COLOURS[1], "D", "--"),
    )
    for kind, label, shift, colour, marker, dash in kinds:
        for y, row in enumerate(rows.to_dict("records")):
            mean = row["difference"]
            ends = [row.get(f"{kind}_{end}", math.nan) for end in ("low", "high")]
            if any(pd.isna(end) for end in ends):
                ends = [mean, mean]
            ax.plot(ends, [y + shift] * 2, color=colour, linestyle=dash, linewidth=1.8)
            ax.plot(
                mean,
                y + shift,
                label=label if y == 0 else None,
                color=colour,
                marker=marker,
                linestyle=dash,
                markersize=5,
            )
    ax.set_yticks(range(len(rows)), [_name(row) for _, row in rows.iterrows()])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    if len(rows):
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2, fontsize=10)
    return figure


def size_figure(compared: pd.DataFrame) -> Figure:
    """Draw the mean AUROC over the cohort size, with the deviation over seeds.

    Args:
        compared: rows of one task, from
            :func:`~pyhealth.bilevel.study.results.comparison`.

    Returns:
        The figure.

    Examples:
        >>> rows = [{"configuration": "A", "budget": "steps", "title": "none",
        ...          "n_records": n, "roc_auc": 0.8, "roc_auc_sd": 0.01}
        ...         for n in (500, 1000)]
        >>> len(size_figure(pd.DataFrame(rows)).axes)
        1
    """
    figure = new_figure(8, 4.2)
    ax = figure.add_subplot()
    style_axes(ax, "", "records to train and validate on", "test AUROC")
    groups = compared.groupby(["configuration", "budget"], sort=False)
    for i, (_, group) in enumerate(groups):
        group = group.sort_values("n_records")
        ax.errorbar(
            group["n_records"],
            group["roc_auc"],
            group["roc_auc_sd"].fillna(0.0),
            label=_name(group.iloc[0]),
            color=COLOURS[i % len(COLOURS)],
            linestyle=DASHES[i % len(DASHES)],
            marker="osD^v*"[i % 6],
            capsize=3,
        )
    sizes = sorted(set(compared["n_records"]))
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
    ax.minorticks_off()
    ax.legend(fontsize=9, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def calibration_figure(predictions: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the share of positives over the predicted probability.

    Args:
        predictions: name -> columns label and probability, those of all seeds.

    Returns:
        The figure.

    Examples:
        >>> table = pd.DataFrame({"label": [0, 1] * 20, "probability": [0.2, 0.7] * 20})
        >>> len(calibration_figure({"A": table}).axes)
        1
    """
    figure = new_figure(6.6, 5)
    ax = figure.add_subplot()
    style_axes(ax, "", "predicted probability", "share of positives")
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="calibrated")
    for i, (name, table) in enumerate(predictions.items()):
        share, predicted = calibration_curve(
            table["label"], table["probability"], n_bins=BINS, strategy="quantile"
        )
        ax.plot(
            predicted,
            share,
            label=name,
            color=COLOURS[i % len(COLOURS)],
            linestyle=DASHES[i % len(DASHES)],
            marker="osD^v*"[i % 6],
            markersize=5,
        )
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
    ax.legend(fontsize=9, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def _name(row: pd.Series) -> str:
    seconds = ", D's seconds" if row["budget"] == "seconds" else ""
    return f"{row['configuration']}  {row['title'].partition(',')[0]}{seconds}"
