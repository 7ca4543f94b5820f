"""The pictures of the documentation, made anew by each build."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from operations_gallery import write_gallery
from straight_through import logit_gradients

from pyhealth.bilevel.plot_style import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    new_figure,
    style_axes,
    write_png,
)
from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl

ROOT = Path(__file__).resolve().parents[1]


def draw_all(folder: Path) -> None:
    """Draw every picture into a folder, and write the gallery's page beside them."""
    folder.mkdir(exist_ok=True)
    draw_overview(folder / "overview.png")
    draw_leak(folder / "leak.png")
    draw_straight_through(folder / "straight_through.png")
    draw_architecture(folder / "architecture.png")
    with tempfile.TemporaryDirectory() as corpus:
        root = write_synthetic_ptbxl(Path(corpus) / "ptbxl", 10, sampling_rates=[100])
        write_gallery(root, folder)


def draw_overview(path: Path) -> None:
    """Draw one step: weights on augmented records, policy on clean ones."""
    figure = new_figure(11, 4.4)
    ax = _canvas(figure.add_subplot(), 11, 4.4)
    _box(ax, 0.1, 2.9, 1.9, 1.0, "training batch\nECGs and labels", "#EFEFEF")
    _box(ax, 2.7, 2.9, 2.0, 1.0, "policy φ\ndraws an operation\na record", "#FFE3CC")
    _box(ax, 5.4, 2.9, 1.9, 1.0, "classifier w\ntraining loss", "#D6E8F5")
    inner = "inner step\n$w' = w - u(\\nabla_w L_{train})$"
    _box(ax, 8.0, 2.9, 2.8, 1.0, inner, "#D6E8F5")
    _box(ax, 0.1, 0.5, 1.9, 1.0, "validation batch\nnever augmented", "#EFEFEF")
    _box(ax, 5.4, 0.5, 1.9, 1.0, "classifier $w'$\nvalidation loss", "#D6E8F5")
    outer = "hypergradient\n$dL_{val}(w'(\\phi))\\,/\\,d\\phi$"
    _box(ax, 8.0, 0.5, 2.8, 1.0, outer, "#FFE3CC")
    for start, end in (
        ((2.0, 3.4), (2.7, 3.4)),
        ((4.7, 3.4), (5.4, 3.4)),
        ((7.3, 3.4), (8.0, 3.4)),
        ((2.0, 1.0), (5.4, 1.0)),
        ((7.3, 1.0), (8.0, 1.0)),
        ((9.4, 2.9), (6.6, 1.5)),
    ):
        _arrow(ax, start, end, GREY)
    _arrow(ax, (8.0, 0.7), (3.7, 2.9), ORANGE)
    ax.text(3.9, 1.75, "outer step: φ moves", color="#9A4300", fontsize=11)
    write_png(figure, path)


def draw_leak(path: Path) -> None:
    """Draw the stored benchmark of what a policy gives away of the label."""
    stored = ROOT / "benchmarks" / "results" / "leak_synthetic.jsonl"
    rows = pd.DataFrame(map(json.loads, stored.read_text().splitlines()))
    means = rows.groupby("configuration", sort=False).mean(numeric_only=True)
    figure = new_figure(9, 4)
    ax = figure.add_subplot()
    style_axes(ax, "How well the label can be read off the change", "")
    places = np.arange(len(means))[::-1]
    ax.barh(places, means["leak_auroc"] - 0.5, left=0.5, color=BLUE, height=0.6)
    for place, value in zip(places, means["leak_auroc"], strict=True):
        ax.text(max(value, 0.5) + 0.005, place, f"{value:.2f}", va="center")
    ax.axvline(0.5, color="black", linewidth=1)
    ax.set_yticks(places, means.index)
    ax.set_xlim(0.42, 0.85)
    ax.set_xlabel("leak AUROC (0.5: nothing is given away)", fontsize=11)
    write_png(figure, path)


def draw_straight_through(path: Path) -> None:
    """Draw our logit gradient beside the enumerated one."""
    names, exact, ours, drawn_only = logit_gradients()
    figure = new_figure(10, 4)
    ax = figure.add_subplot()
    style_axes(ax, "Derivative in the logits", "", "derivative / largest exact one")
    places = np.arange(len(names))
    bars = {
        "exact: every choice enumerated": exact,
        "ours: all operations weighed": ours,
        "drawn operation only": drawn_only,
    }
    for i, (label, values) in enumerate(bars.items()):
        height = (values / exact.abs().max()).numpy()
        ax.bar(places + 0.26 * (i - 1), height, 0.24, label=label, color=COLOURS[i])
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xticks(places, names)
    ax.legend(fontsize=10)
    write_png(figure, path)


def draw_architecture(path: Path) -> None:
    """Draw the layers of the program; tests/test_structure.py holds their order."""
    figure = new_figure(11, 6.2)
    ax = _canvas(figure.add_subplot(), 11, 6.2)
    layers = (
        ("examples: one command line, one notebook", "#EFEFEF", 5.3),
        ("bilevel.study: runs, search, Dask, statistics, report", "#F3E0EC", 4.3),
        (
            "bilevel: trainer > epoch > step > weight step, validation gradient,\n"
            "alignment, hypergradient > second derivatives",
            "#FFE3CC",
            3.1,
        ),
        (
            "datasets: PTB-XL, own folders, invented corpus, splits, record store",
            "#DDEFE6",
            2.1,
        ),
        ("models: operations, policy, ResNet, policy files", "#D6E8F5", 1.3),
        ("tasks: labels      processors: one WFDB record to a tensor", "#EFEFEF", 0.4),
    )
    for text, colour, bottom in layers:
        height = 0.95 if "\n" in text else 0.65
        _box(ax, 0.3, bottom, 8.6, height, text, colour)
    _arrow(ax, (9.5, 5.8), (9.5, 0.5), GREY)
    ax.text(9.7, 3.1, "imports\ngo down", fontsize=11)
    write_png(figure, path)


def _canvas(ax: Axes, width: float, height: float) -> Axes:
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return ax


def _box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str
) -> None:
    style = "round,pad=0.02,rounding_size=0.1"
    ax.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=GREY
        )
    )
    middle = (x + width / 2, y + height / 2)
    ax.text(*middle, text, ha="center", va="center", fontsize=11)


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str
) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6}
    ax.annotate("", end, start, arrowprops=style)


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_all(Path(__file__).parent / "_generated")
