"""Pictures of a run: learning curves, the learned policy, ROC and PR curves.

Every function takes plain data and the path of a PNG, writes the file and returns
its path. Figures are built without ``pyplot``, so no backend or global state is
touched: the functions work without a display and in threads. A picture is drawn in
memory first: a call that raises leaves no file behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics

from .plot_style import (
    BLUE,
    COLOURS,
    DASHES,
    GREY,
    ORANGE,
    PathLike,
    new_figure,
    style_axes,
    write_png,
)

__all__ = ["plot_learning_curves", "plot_policy", "plot_roc_pr"]

Row = Mapping[str, float | None]
History = Sequence[Row] | pd.DataFrame
_CLASSES = (("neg", "o", BLUE, -0.14), ("pos", "D", ORANGE, 0.14))


def plot_learning_curves(history: History, path: PathLike) -> Path:
    """Plot losses, validation AUROC and AUPRC and the hypergradient over epochs.

    Args:
        history: one flat dict an epoch (or a DataFrame, one row an epoch) with
            "epoch" and any of "train_loss", "loss" (validation), "roc_auc",
            "pr_auc" (validation), "hypergradient_norm", "hypergradient_snr". A key
            may be missing, None or not finite in some rows: no point is drawn there.
        path: PNG to write.

    Returns:
        The path of the written file.

    Raises:
        ValueError: if the history is empty, has nothing to draw, or its epochs are
            missing or do not increase, or if ``path`` does not end in ".png".

    Examples:
        >>> import tempfile
        >>> rows = [{"epoch": e, "loss": 1 / (e + 1), "roc_auc": 0.8} for e in range(3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_learning_curves(rows, f"{folder}/curves.png").name
        'curves.png'
    """
    rows, epochs = _rows(history)
    panels = {
        "Loss": {"train_loss": "training", "loss": "validation"},
        "Validation score": {"roc_auc": "AUROC", "pr_auc": "AUPRC"},
        "Hypergradient norm": {"hypergradient_norm": "norm"},
        "Hypergradient signal-to-noise": {"hypergradient_snr": "signal-to-noise"},
    }
    series = {key: _column(rows, key) for keys in panels.values() for key in keys}
    drawn = {key: values for key, values in series.items() if np.isfinite(values).any()}
    if not drawn:
        raise ValueError(f"The history has no finite value under any of {[*series]}.")
    panels = {title: keys for title, keys in panels.items() if drawn.keys() & keys}
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = new_figure(5.6 * columns, 3.6 * lines)
    for place, (title, keys) in enumerate(panels.items(), start=1):
        ax = figure.add_subplot(lines, columns, place)
        style_axes(ax, title, "epoch")
        ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for i, (key, label) in enumerate(keys.items()):
            if key not in drawn:
                continue
            x, y = (v[np.isfinite(drawn[key])] for v in (epochs, drawn[key]))
            ax.plot(x, y, c=COLOURS[i], ls=DASHES[i], marker="os"[i], ms=4, label=label)
            if key == "roc_auc":
                best = int(y.argmax())  # the first of equals, as a trainer keeps it
                text = f"best AUROC: {y[best]:.3f} in epoch {x[best]:g}"
                ax.axvline(x[best], color=GREY, linestyle=":", zorder=1)
                star = x[best], y[best]
                ax.plot(*star, "*", ms=15, c="gold", mec="black", label=text)
            if key.startswith("hyper") and x[0] > epochs[0]:
                text = "warm-up: no outer step"
                ax.axvspan(epochs[0] - 0.5, x[0] - 0.5, color="#EAEAEA", label=text)
            if key == "hypergradient_norm" and 0 < 30 * y.min() < y.max():
                ax.set_yscale("log")
            if key == "hypergradient_snr":
                ax.axhline(1, color=GREY, linestyle="--", label="signal = noise")
        ax.legend(fontsize=10)
    return write_png(figure, path)


def plot_policy(
    history: History,
    op_names: Sequence[str],
    magnitude_ranges: Mapping[str, tuple[float, float, str]],
    path: PathLike,
) -> Path:
    """Plot a learned augmentation policy: probabilities over epochs, last magnitudes.

    One row of panels a stage. The colours of the probabilities are symmetric about
    the uniform probability, with one scale for all stages, stated at the colour bar.

    Args:
        history: one flat dict an epoch (or a DataFrame) with "epoch" and, for each
            stage s from 0 and each operation, "probability/{s}/{op}",
            "magnitude_neg/{s}/{op}" (class 0) and "magnitude_pos/{s}/{op}" (class 1).
        op_names: the operations, from top to bottom.
        magnitude_ranges: (low, high, unit) of each operation, in its own unit; an
            operation whose low equals its high has no magnitude.
        path: PNG to write.

    Returns:
        The path of the written file.

    Raises:
        ValueError: if the history holds no stage or lacks an operation, if an
            operation has no range, or for the reasons of ``plot_learning_curves``.

    Examples:
        >>> import tempfile
        >>> rows = [{"epoch": 0, "probability/0/time_mask": 0.6,
        ...          "probability/0/no_op": 0.4, "magnitude_neg/0/time_mask": 0.1,
        ...          "magnitude_pos/0/time_mask": 0.3}]
        >>> ranges = {"time_mask": (0.0, 0.5, "s"), "no_op": (0.0, 0.0, "")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_policy(rows, list(ranges), ranges, f"{folder}/policy.png").name
        'policy.png'
    """
    rows, epochs = _rows(history)
    found = (re.match(r"probability/(\d+)/", key) for row in rows for key in row)
    stages = sorted({int(match[1]) for match in found if match})
    if not (stages and op_names):
        raise ValueError("No 'probability/{stage}/{operation}' to plot.")
    if unknown := [op for op in op_names if op not in magnitude_ranges]:
        raise ValueError(f"magnitude_ranges lacks {unknown}: give (low, high, unit).")
    keys = [f"probability/{stage}/{op}" for stage in stages for op in op_names]
    p = np.array([_column(rows, key) for key in keys])
    if lacking := [k for k, v in zip(keys, p, strict=True) if not np.isfinite(v).any()]:
        raise ValueError(f"The history has no finite value under {lacking}.")
    p = p.reshape(len(stages), len(op_names), len(rows))
    uniform = 1 / len(op_names)
    # Symmetric about uniform: equal steps have equal colours on both sides. Never
    # narrower than half of uniform: noise must not look learned.
    reach = max(float(np.nanmax(np.abs(p - uniform))), uniform / 2)
    scale = {"cmap": "RdBu_r", "vmin": uniform - reach, "vmax": uniform + reach}
    middles = (epochs[1:] + epochs[:-1]) / 2
    edges = np.array([epochs[0] - 0.5, *middles, epochs[-1] + 0.5])
    heights = np.arange(len(op_names) + 1) - 0.5
    figure = new_figure(13, 0.3 + len(stages) * (1.2 + 0.42 * len(op_names)))
    axes = figure.subplots(len(stages), 2, squeeze=False, sharey=True)
    for (left, right), stage, values in zip(axes, stages, p, strict=True):
        style_axes(left, f"Stage {stage}: probability", "epoch")
        left.set_facecolor("#BBBBBB")  # what a missing value shows
        mesh = left.pcolormesh(edges, heights, values, **scale)
        left.grid(False)
        left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        left.set_yticks(range(len(op_names)), op_names)
        left.set_ylim(len(op_names) - 0.5, -0.5)
        _beside(left, -0.75, f"epoch {epochs[-1]:g}")
        for y, value in enumerate(values[:, -1]):
            _beside(left, y, f"{value:.3f}")
        _magnitude_panel(right, rows[-1], stage, op_names, magnitude_ranges)
    bar = figure.colorbar(mesh, ax=axes[:, 0], location="left", shrink=0.7, aspect=30)
    bar.ax.set_ylim(max(0, uniform - reach), min(1, uniform + reach))
    text = f"probability (white: uniform, {uniform:.3f}; full colour: ± {reach:.3f})"
    bar.set_label(text, fontsize=10)
    return write_png(figure, path)


def plot_roc_pr(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], path: PathLike
) -> Path:
    """Plot ROC and precision-recall curves side by side, with chance lines.

    Args:
        curves: name -> (y_true, y_prob), both of shape (n,): labels 0 or 1 and
            scores, higher for class 1.
        path: PNG to write.

    Returns:
        The path of the written file.

    Raises:
        ValueError: if there is no curve, the two arrays of a curve do not match, a
            label is not 0 or 1, a score is not finite or the labels hold one class.

    Examples:
        >>> import tempfile
        >>> curves = {"MI": ([0, 0, 1], [0.1, 0.6, 0.4])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_roc_pr(curves, f"{folder}/roc.png").name
        'roc.png'
    """
    if not curves:
        raise ValueError("There is no curve to plot: curves is empty.")
    figure = new_figure(11, 5.3 + 0.25 * len(curves))
    roc, pr = figure.subplots(1, 2)
    style_axes(roc, "ROC", "1 - specificity", "sensitivity")
    style_axes(pr, "Precision-recall", "recall (sensitivity)", "precision")
    chances: dict[str, float] = {}
    for i, (name, (y_true, y_prob)) in enumerate(curves.items()):
        y, score = np.asarray(y_true), np.asarray(y_prob)
        if y.ndim != 1 or y.shape != score.shape:
            found = f"{y.shape} and {score.shape}"
            raise ValueError(f"{name}: y_true and y_prob must be (n,); found {found}.")
        if not (np.isin(y, (0, 1)).all() and np.isfinite(score).all()):
            raise ValueError(f"{name}: labels must be 0 or 1, and scores finite.")
        if np.unique(y).size != 2:
            found = f"one class only ({int(y.sum())} positives in {y.size})"
            raise ValueError(f"{name}: y_true holds {found}; both are needed.")
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        line = {"color": colour, "linestyle": dash, "linewidth": 1.8}
        area = f"{metrics.roc_auc_score(y, score):.3f} (n = {y.size})"
        false_rate, true_rate, _ = metrics.roc_curve(y, score)
        roc.plot(false_rate, true_rate, label=f"{name}: AUROC {area}", **line)
        area = f"{metrics.average_precision_score(y, score):.3f} (n = {y.size})"
        precision, recall, _ = metrics.precision_recall_curve(y, score)
        some = recall > 0  # precision at recall 0 is a matter of taste: extend to it
        recall, precision = np.append(recall[some], 0), precision[some]
        precision = np.append(precision, precision[-1])
        pr.step(recall, precision, where="post", label=f"{name}: AUPRC {area}", **line)
        chances[f"{y.mean():.3f}"] = float(y.mean())
    dotted = {"color": GREY, "linestyle": ":", "linewidth": 1}
    roc.plot([0, 1], [0, 1], label="chance: AUROC 0.500", **dotted)
    for text, chance in chances.items():
        pr.axhline(chance, label=f"chance: AUPRC {text} (share of positives)", **dotted)
    for ax in (roc, pr):
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), box_aspect=1)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=10)
    return write_png(figure, path)


def _beside(ax: Axes, y: float, text: str) -> None:
    """Print a text to the right of a panel, at height y of its data."""
    ax.annotate(
        text,
        (1, y),
        (6, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )


def _rows(history: History) -> tuple[list[Row], NDArray[np.float64]]:
    """The history as a list of dicts, and its epochs, which must increase."""
    rows: list[Row]
    if isinstance(history, pd.DataFrame):
        records = history.to_dict("records")
        rows = [{str(key): v for key, v in row.items()} for row in records]
    else:
        rows = list(history)
    if not rows:
        raise ValueError("The history is empty: there is no epoch to plot.")
    epochs = _column(rows, "epoch")
    if not (np.isfinite(epochs).all() and (np.diff(epochs) > 0).all()):
        raise ValueError(f"Rows need an 'epoch' that increases: {epochs.tolist()}.")
    return rows, epochs


def _column(rows: Sequence[Row], key: str) -> NDArray[np.float64]:
    """One key over the epochs, NaN where it is missing or None."""
    values = (row.get(key) for row in rows)
    return np.array([np.nan if v is None else float(v) for v in values])


def _magnitude_panel(
    ax: Axes,
    last: Row,
    stage: int,
    op_names: Sequence[str],
    ranges: Mapping[str, tuple[float, float, str]],
) -> None:
    """Draw each operation's magnitude of either class on a bar of its own range."""
    style_axes(ax, "Magnitude in its range", "")
    ax.grid(False)
    ax.set(xlim=(-0.12, 1.12), xticks=[])
    ax.tick_params(axis="y", left=False, labelleft=False)
    ax.spines[:].set_visible(False)
    markers: dict[str, Line2D] = {}
    for y, op in enumerate(op_names):
        (low, high, unit), texts = ranges[op], []
        if high > low:
            ax.barh(y, 1, height=0.66, color="#EFEFEF", edgecolor="#BBBBBB")
            for x, side, end in ((-0.03, "right", low), (1.03, "left", high)):
                ax.text(x, y, f"{end:g}", ha=side, va="center", fontsize=9, color=GREY)
            for kind, marker, colour, shift in _CLASSES:
                value = _column([last], f"magnitude_{kind}/{stage}/{op}")[0]
                x = (value - low) / (high - low)
                drawn = ax.plot(x, y + shift, marker, c=colour, mec="white", ms=8)
                markers[kind] = drawn[0]
                texts.append(f"{value:.3g}")
        _beside(ax, y, " / ".join(texts) + f" {unit}" if texts else "\N{EN DASH}")
    _beside(ax, -0.75, "class 0 / class 1")
    ax.legend(
        [*markers.values()],
        ["class 0", "class 1"],
        loc="upper right",
        bbox_to_anchor=(1, 0),
        ncols=2,
        fontsize=10,
    )
