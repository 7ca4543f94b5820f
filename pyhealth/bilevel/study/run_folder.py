"""What a run writes into its folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from ...models.policy_file import Provenance
from ...models.taskaug_policy import TaskAugPolicy
from ...processors.ecg_processor import ECGProcessor
from ..checkpoint import write_whole
from ..ecg_paper import plot_ecg
from ..plots import plot_learning_curves, plot_policy, plot_roc_pr
from ..trainer import BiLevelTrainer
from .data import PreparedData, identities
from .scores import by_label
from .settings import RunSettings

__all__ = [
    "begin",
    "check_same_run",
    "configuration_of",
    "draw",
    "provenance",
    "write_json",
    "write_table",
]

#: Curves that can be told apart in one picture.
MOST_CURVES = 8
PACKAGES = ("torch", "numpy", "pyhealth", "pyhealth-taskaug", "wfdb", "scikit-learn")


def begin(
    settings: RunSettings, data: PreparedData, folder: Path, resume: bool
) -> None:
    """Write config.json and records.csv.

    Args:
        settings: of the run.
        data: the records.
        folder: of the run; made if missing.
        resume: see that a run begun there is this one.

    Raises:
        ValueError: if it is another one.

    Examples:
        >>> begin(RunSettings(), data, Path("output"), False)  # doctest: +SKIP
    """
    folder.mkdir(parents=True, exist_ok=True)
    configuration = configuration_of(settings, data)
    if resume:
        check_same_run(folder / "config.json", configuration)
    write_json(folder / "config.json", configuration)
    write_table(folder / "records.csv", _records_table(data))


def _records_table(data: PreparedData) -> pd.DataFrame:
    parts = {"train": data.train, "val": data.val, "test": data.test}
    return pd.concat(
        pd.DataFrame({**identities(samples), "part": name})
        for name, samples in parts.items()
    )


def draw(
    trainer: BiLevelTrainer,
    data: PreparedData,
    predictions: pd.DataFrame,
    settings: RunSettings,
    folder: Path,
) -> None:
    """Draw a run's pictures.

    Args:
        trainer: after training.
        data: the records.
        predictions: columns label and probability.
        settings: of the run.
        folder: where to write.

    Examples:
        >>> draw(trainer, data, predictions, settings, folder)  # doctest: +SKIP
    """
    history, policy = trainer.history, trainer.policy
    plot_learning_curves(history, folder / "learning_curves.png")
    if curves := _curves(predictions, settings.describe()):
        plot_roc_pr(curves, folder / "roc_pr.png")
    if policy.num_stages:
        ranges = {op.name: (op.low, op.high, op.unit) for op in policy.operations}
        plot_policy(history, policy.op_names, ranges, folder / "policy.png")
        _draw_ecg(policy, data, settings.seed, folder / "ecg_augmented.png")


def _draw_ecg(policy: TaskAugPolicy, data: PreparedData, seed: int, path: Path) -> None:
    """Draw a training record of the positive class before and after the policy."""
    task = data.task
    found = data.train.labels
    index = found.index(1) if 1 in found else 0
    # In millivolt whatever the training's scale: the paper's grid is in millivolt, and
    # the operations are relative to the signal.
    processor = ECGProcessor(task.sampling_rate, task.length, "none", task.leads)
    before = processor.finish(data.train.record(index))[None]
    policy = policy.cpu()
    labels = torch.ones(1)
    draw = policy.sample(before.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        after = policy.apply(before, labels, draw)
    drawn = [
        name
        for stage in draw.stages
        for name, rows in zip(policy.op_names, stage.rows, strict=True)
        if len(rows)
    ]
    plot_ecg(
        [before[0].numpy(), after[0].numpy()],
        path,
        sampling_rate=task.sampling_rate,
        lead_names=task.leads,
        titles=["recorded", "augmented: " + ", then ".join(drawn)],
        suptitle=f"ECG {data.train.ecg_ids[index]}, {task.task_label}: {found[index]}",
    )


def _curves(
    predictions: pd.DataFrame, title: str
) -> dict[str, tuple[pd.Series, pd.Series]]:
    """Return what has both classes; of many labels the most frequent ones."""
    tables = {
        name or title: table
        for name, table in by_label(predictions).items()
        if table["label"].nunique() == 2
    }
    common = sorted(tables, key=lambda name: -tables[name]["label"].sum())[:MOST_CURVES]
    return {
        name: (table["label"], table["probability"])
        for name, table in tables.items()
        if name in common
    }


def configuration_of(settings: RunSettings, data: PreparedData) -> dict[str, object]:
    """Return what config.json says of a run.

    Args:
        settings: of the run.
        data: the records.

    Examples:
        >>> configuration_of(RunSettings(), data)["settings"]  # doctest: +SKIP
    """
    task = vars(data.task)
    shown = (
        "task_label",
        "sampling_rate",
        "length",
        "normalize",
        "min_likelihood",
        "labelled_only",
    )
    return {
        "settings": asdict(settings),
        "task": {name: task[name] for name in shown if name in task}
        | {"leads": list(data.task.leads), "records": repr(task.get("records"))},
        "data": data.description,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "threads": torch.get_num_threads(),
    }


def provenance(settings: RunSettings, data: PreparedData, epoch: int) -> Provenance:
    """Return where a policy comes from; nothing for one that came from a file.

    Args:
        settings: of the run.
        data: the records.
        epoch: that the policy is of.

    Examples:
        >>> provenance(RunSettings(policy="mi.json"), None, 0)
        {}
    """
    if settings.policy_is_a_file:
        return {}  # it keeps its own: this run taught it nothing
    return {
        "policy": settings.policy,
        "task": data.task.task_label,
        "normalize": data.task.normalize,
        "data_digest": data.description["digest"],
        "seed": settings.seed,
        "epoch": epoch,
    }


def check_same_run(
    path: Path,
    configuration: Mapping[str, object],
    may_differ: Sequence[str] = ("epochs", "device"),
) -> None:
    """See that the run begun in a folder is this one.

    Args:
        path: of its config.json; where there is none, any run may begin.
        configuration: what it would say now.
        may_differ: settings that may have changed.

    Raises:
        ValueError: if another setting, or the data, are others.

    Examples:
        >>> check_same_run(Path("nothing_begun.json"), {})
    """
    if not path.exists():
        return
    begun = json.loads(path.read_text())
    now = json.loads(json.dumps(configuration))  # tuples read back as lists
    for group, of_group in now.items():
        for name, value in of_group.items() if group in ("settings", "task") else ():
            before = begun[group].get(name)
            if before != value and name not in may_differ:
                raise ValueError(
                    f"The run begun in {path.parent} has {group} {name} {before!r}, "
                    f"now it is {value!r}. Use the same arguments or another folder."
                )
    if begun["data"]["digest"] != now["data"]["digest"]:
        raise ValueError(
            f"The run begun in {path.parent} has other data. Use another folder."
        )


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV file, whole or not at all.

    Examples:
        >>> write_table(Path("a.csv"), pd.DataFrame({"n": [1]}))
    """
    write_whole(path, table.to_csv(index=False).encode())


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all.

    Examples:
        >>> write_json(Path("a.json"), {"n": 1})
    """
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
