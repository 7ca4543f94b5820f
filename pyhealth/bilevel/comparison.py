"""Several runs on the same data, and the table that compares them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from .distributed import Processes
from .experiment import PreparedData, RunSettings, run
from .plots import plot_roc_pr

__all__ = ["SWEPT_OUTER_LR", "ablation", "compare", "lr_sweep", "summary"]

#: Learning rates of the policy that the sweep tries.
SWEPT_OUTER_LR = (1e-2, 1e-3, 1e-4)


def ablation(base: RunSettings) -> dict[str, RunSettings]:
    """Return the six configurations of the ablation, all else as in ``base``.

    Args:
        base: settings to vary.

    Returns:
        Settings by name, in order.

    Examples:
        >>> for name in ablation(RunSettings()):
        ...     print(name)
        A no augmentation
        B Gaussian noise 0.1 SD
        C TaskAug K=1
        D TaskAug K=2
        E random frozen K=2
        F TaskAug K=2 shared
    """
    return {
        "A no augmentation": replace(base, policy="none"),
        "B Gaussian noise 0.1 SD": replace(base, policy="noise"),
        "C TaskAug K=1": replace(base, policy="learned", policy_stages=1),
        "D TaskAug K=2": replace(base, policy="learned", policy_stages=2),
        "E random frozen K=2": replace(base, policy="random", policy_stages=2),
        "F TaskAug K=2 shared": replace(
            base, policy="learned", policy_stages=2, shared_magnitudes=True
        ),
    }


def lr_sweep(base: RunSettings) -> dict[str, RunSettings]:
    """Return one configuration a learning rate of the policy.

    Args:
        base: settings to vary.

    Returns:
        Settings by name, in order.

    Examples:
        >>> list(lr_sweep(RunSettings()))
        ['outer lr 0.01', 'outer lr 0.001', 'outer lr 0.0001']
    """
    return {
        f"outer lr {rate:g}": replace(base, policy="learned", outer_lr=rate)
        for rate in SWEPT_OUTER_LR
    }


def compare(
    configurations: Mapping[str, RunSettings],
    seeds: Sequence[int],
    data: PreparedData,
    folder: str | Path,
    resume: bool = False,
    checkpoint_every: int | None = None,
) -> pd.DataFrame:
    """Run every configuration with every seed and tabulate the test scores.

    All use the same records, the same initial backbone and order a seed, and the same
    number of epochs. ``comparison.csv`` is written anew after each run, so a run that
    fails loses nothing; ``comparison.png`` shows the curves of the first seed. A single
    run writes into ``folder`` itself.

    Args:
        configurations: settings by name.
        seeds: of the runs; they replace the settings' own.
        data: from :func:`~pyhealth.bilevel.experiment.prepare`.
        folder: where to write, one sub-folder a run.
        resume: go on with runs that were begun there; a finished one is only evaluated.
        checkpoint_every: steps between two checkpoints.

    Returns:
        One row a run: configuration, seed, n, positives, roc_auc, pr_auc, accuracy,
        brier, val_roc_auc, leak_auroc, best_epoch, seconds.

    Examples:
        >>> compare(ablation(settings), [0, 1, 2], data, "out")  # doctest: +SKIP
    """
    folder = Path(folder)
    main = Processes(next(iter(configurations.values())).device).is_main
    alone = len(configurations) * len(seeds) == 1
    rows: list[dict[str, float]] = []
    curves = {}
    for name, settings in configurations.items():
        for seed in seeds:
            target = folder / name.replace(" ", "_") / f"seed_{seed}"
            target = folder if alone else target
            predictions = run(
                replace(settings, seed=seed), data, target, resume, checkpoint_every
            )
            rows.append({"configuration": name, "seed": seed, **_scores(target)})
            if main:
                pd.DataFrame(rows).to_csv(folder / "comparison.csv", index=False)
            if seed == seeds[0] and predictions["label"].nunique() == 2:
                curves[name] = (predictions["label"], predictions["probability"])
    if curves and not alone and main:
        plot_roc_pr(curves, folder / "comparison.png")
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> str:
    """Return the comparison as text: mean and deviation over seeds, and the difference.

    Args:
        table: from :func:`compare`.

    Returns:
        A table of text, one line a configuration, and a note on what it can show.

    Examples:
        >>> row = {"configuration": "A", "seed": 0, "n": 9, "roc_auc": 0.7,
        ...        "pr_auc": 0.5, "accuracy": 0.8, "seconds": 1.0,
        ...        "val_roc_auc": 0.7, "leak_auroc": 0.5, "best_epoch": 0}
        >>> print(summary(pd.DataFrame([row])))  # doctest: +ELLIPSIS
        configuration...
    """
    first = table["configuration"].iloc[0]
    reference = table[table["configuration"] == first].set_index("seed")["roc_auc"]
    lines = []
    for name, group in table.groupby("configuration", sort=False):
        difference = group.set_index("seed")["roc_auc"] - reference
        lines.append(
            {
                "configuration": name,
                "validation AUROC": _spread(group["val_roc_auc"]),
                "AUROC": _spread(group["roc_auc"]),
                "AUPRC": _spread(group["pr_auc"]),
                "accuracy": _spread(group["accuracy"]),
                f"AUROC - {first.split()[0]}": f"{difference.mean():+.3f}",
                "leak AUROC": _spread(group["leak_auroc"]),
                "best epoch": ", ".join(map(str, group["best_epoch"])),
                "seconds": f"{group['seconds'].mean():.0f}",
            }
        )
    seeds = table["seed"].nunique()
    note = (
        "One seed: a difference between rows may be chance."
        if seeds == 1
        else f"Mean and standard deviation over {seeds} seeds, paired by seed."
    )
    shown = pd.DataFrame(lines)
    if len(shown) == 1:  # nothing to differ from
        shown = shown.loc[:, ~shown.columns.str.startswith("AUROC -")]
    count = int(table["n"].iloc[0])
    return f"{shown.to_string(index=False)}\nTest records: {count}. {note}"


def _scores(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        **metrics["test"],
        "val_roc_auc": metrics["val"]["roc_auc"],
        "leak_auroc": metrics["leak_auroc"],
        "best_epoch": metrics["best_epoch"],
        "seconds": metrics["seconds"],
    }


def _spread(values: Iterable[float]) -> str:
    values = pd.Series(values, dtype=float)
    if values.isna().all():  # no augmentation has no leak
        return "-"
    deviation = values.std()
    spread = "" if math.isnan(deviation) else f" ± {deviation:.3f}"
    return f"{values.mean():.3f}{spread}"
