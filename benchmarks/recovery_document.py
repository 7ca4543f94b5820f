"""The recovery benchmark's tables in Markdown, as docs and README have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from markdown_table import markdown
from recovery_tables import (
    NO_OP,
    OPERATIONS,
    UNIFORM,
    direction_table,
    kept_plants,
    result_table,
    truth_table,
    valid_plants,
)

UNITS = {"time_mask": " s", "temporal_displacement": " s"}


def documents(rows: Mapping[str, Iterable[Mapping]]) -> Iterator[str]:
    """Yield the tables of the steps that were run."""
    truth = list(rows["truth"])
    if truth:
        yield truth_markdown(truth)
    if direction := list(rows["direction"]):
        yield direction_markdown(direction, truth)
    if result := list(rows["result"]):
        yield result_markdown(result, truth)
        yield summary_markdown(result, truth)


def truth_markdown(truth: list[Mapping]) -> str:
    """Return what each nuisance costs, and which operation helps against it."""
    table, valid, lines = truth_table(truth), valid_plants(truth), []
    for operation, magnitude in kept_plants(truth).items():
        plant = f"{operation}/{magnitude:g}"
        row = table.loc[plant]
        best = row[list(OPERATIONS)].astype(float).idxmax()
        lines.append(
            [
                _label(plant),
                f"{row[NO_OP]:.3f}",
                f"{row[UNIFORM]:.3f}",
                f"{row[operation]:.3f}",
                f"{row['z']:.1f}",
                best if best == operation else f"{best} {row[best]:.3f}",
                "yes" if plant in valid else "no",
            ]
        )
    header = ["nuisance, magnitude", "no augmentation", "uniform policy"]
    header += ["planted operation", "z of its gain", "best operation", "kept"]
    return markdown(header, lines)


def direction_markdown(rows: list[Mapping], truth: list[Mapping]) -> str:
    """Return where each estimator points, by plant and in the mean."""
    table = direction_table(rows, truth)
    z = table.pivot_table("z", "estimator", "plant", sort=False)
    means = table.groupby("estimator", sort=False)[["rank", "agreement", "halves"]]
    means = means.mean()
    lines = [
        [
            estimator,
            *(f"{value:+.1f}" for value in z.loc[estimator]),
            f"{z.loc[estimator].mean():+.1f}",
            f"{means.loc[estimator, 'rank']:.1f}",
            f"{means.loc[estimator, 'agreement']:+.2f}",
            f"{means.loc[estimator, 'halves']:+.2f}",
        ]
        for estimator in z.index
    ]
    plants = [f"z, {plant.split('/')[0]}" for plant in z.columns]
    header = ["estimator", *plants, "mean z", "rank", "agreement", "halves"]
    return markdown(header, lines)


def result_markdown(rows: list[Mapping], truth: list[Mapping]) -> str:
    """Return what training ends in."""
    lines = [
        [
            _label(row["plant"]),
            str(row["seeds"]),
            f"{_mean(row['learned'])} ({_each(row['learned'])})",
            _mean(row.get("sign-shuffled")),
            _mean(row.get("one_step")),
            f"{sum(p < 0.05 for p in row['p values'])}",
            f"{row[f'over {NO_OP}']:+.3f} ± {row[f'+- {NO_OP}']:.3f}",
            f"{row[f'over {UNIFORM}']:+.3f} ± {row[f'+- {UNIFORM}']:.3f}",
        ]
        for _, row in result_table(rows, truth).iterrows()
    ]
    header = ["nuisance", "seeds", "learned: mean (each seed)", "random signs"]
    header += ["one_step", "runs with p < 0.05"]
    header += ["AUROC over no augmentation", "over the uniform policy"]
    return markdown(header, lines)


def summary_markdown(rows: list[Mapping], truth: list[Mapping]) -> str:
    """Return the same in short, for the README."""
    lines = [
        [
            _label(row["plant"]),
            _mean(row["learned"], 2),
            _mean(row.get("sign-shuffled"), 2),
            f"{row[f'over {NO_OP}']:+.2f} ± {row[f'+- {NO_OP}']:.2f}",
            f"{row[f'over {UNIFORM}']:+.2f} ± {row[f'+- {UNIFORM}']:.2f}",
        ]
        for _, row in result_table(rows, truth).iterrows()
    ]
    header = ["nuisance", "learned", "random signs", "over none", "over uniform"]
    return markdown(header, lines)


def _label(plant: str) -> str:
    operation, magnitude = plant.split("/")
    return f"{operation}, {magnitude}{UNITS.get(operation, '')}"


def _mean(values: object, digits: int = 3) -> str:
    # A configuration that was not run for this plant is a gap in the table.
    return f"{np.mean(values):.{digits}f}" if isinstance(values, list) else "-"


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
