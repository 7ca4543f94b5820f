"""Runs of a study: train, test once, and write all of it down."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ...datasets.ecg_samples import ECGSamples
from ...datasets.utils import get_dataloader
from ...models.taskaug_policy import TaskAugPolicy
from ..distributed import Processes
from ..leak import leak_auroc
from ..trainer import BiLevelTrainer
from .data import PreparedData, identities
from .run_folder import begin, draw, provenance, write_json, write_table
from .scores import score
from .search import search
from .settings import RunSettings
from .training import MONITOR, train

__all__ = ["run"]

#: Records that the leak probe augments: enough for an AUROC to 0.03, in a second.
LEAK_RECORDS = 128


def run(
    settings: RunSettings,
    data: PreparedData,
    folder: str | Path,
    resume: bool = False,
    checkpoint_every: int | None = None,
    pictures: bool = True,
) -> pd.DataFrame:
    """Train, evaluate on the test part once, and write everything into a folder.

    Written are config.json and records.csv (before training), history.csv and last.ckpt
    (after every epoch), checkpoints/ to go on from, best.ckpt, policy.json (to read and
    to load), predictions.csv, metrics.json (last of all) and the pictures
    learning_curves.png, policy.png, roc_pr.png and ecg_augmented.png.

    Args:
        settings: of the run.
        data: from :func:`prepare`.
        folder: where to write; made if missing.
        resume: go on with the run that was begun in this folder, if there is one; all
            settings but the number of epochs and the device must be the same.
        checkpoint_every: steps between two checkpoints, beside those after each epoch.
        pictures: draw them.

    Returns:
        The test predictions: ecg_id, patient_id, label, probability.

    Raises:
        ValueError: if the data do not allow training, one class only, say, or the run
            to go on with is another one.

    Examples:
        >>> run(RunSettings(epochs=3), data, "output/mi")  # doctest: +SKIP
    """
    folder = Path(folder)
    processes = Processes(settings.device)
    if processes.is_main:
        begin(settings, data, folder, resume)
    used, searched = settings, 0.0
    if settings.policy in ("randaugment", "searched"):
        found, searched = search(settings, data, folder / "search")
        used = replace(settings, policy=str(found))
    trainer = train(used, data, folder, resume, checkpoint_every)
    predictions = _predict(trainer, data.test, settings.batch_size)
    if processes.is_main:
        metrics = _write_results(trainer, used, data, predictions, folder, searched)
        if pictures:
            draw(trainer, data, predictions, settings, folder)
        write_json(folder / "metrics.json", metrics)  # last: it says that all is there
    processes.from_main(None)  # nobody reads a file before it is written
    return predictions


def _write_results(
    trainer: BiLevelTrainer,
    settings: RunSettings,
    data: PreparedData,
    predictions: pd.DataFrame,
    folder: Path,
    searched: float,
) -> dict[str, object]:
    trainer.save_ckpt(str(folder / "best.ckpt"))
    history, validation = trainer.history, None
    best = _best_epoch(history, data.train.output_schema["label"])
    if settings.train_on_validation:
        best = len(history) - 1
    else:
        validation = score(_predict(trainer, data.val, settings.batch_size))
    origin = provenance(settings, data, best)
    trainer.policy.save(folder / "policy.json", provenance=origin)
    write_table(folder / "predictions.csv", predictions)
    return {
        "best_epoch": best,
        "epochs": len(history),
        "seconds": searched + sum(row["seconds"] for row in history),
        "policy_p_value": _number(trainer.policy_p_value),
        "leak_auroc": _leak(trainer.policy, data.val, settings.seed),
        "val": validation,
        "test": score(predictions),
    }


def _predict(
    trainer: BiLevelTrainer, samples: ECGSamples, batch_size: int
) -> pd.DataFrame:
    loader = get_dataloader(samples, batch_size)
    labels, probabilities, _ = trainer.inference(loader)
    columns: dict[str, list[int] | list[str] | np.ndarray] = {**identities(samples)}
    for index, name in enumerate(samples.label_names):
        suffix = f"/{name}" if name else ""
        columns[f"label{suffix}"] = labels[:, index].astype(int)
        columns[f"probability{suffix}"] = probabilities[:, index]
    return pd.DataFrame(columns)


def _best_epoch(history: list[dict[str, float]], kind: str) -> int:
    """Return the epoch that the trainer has kept; the first of equal ones."""
    told = MONITOR[kind]
    scores = [row[told["monitor"]] for row in history]
    best = max if told["monitor_criterion"] == "max" else min
    return scores.index(best(scores))


def _number(value: float) -> float | None:
    """Return None for nan, which JSON cannot say."""
    return None if math.isnan(value) else value


def _leak(policy: TaskAugPolicy, samples: ECGSamples, seed: int) -> float | None:
    if not policy.num_stages:
        return None
    loader = get_dataloader(samples, LEAK_RECORDS, shuffle=True, seed=seed)
    return leak_auroc(policy, next(iter(loader))["ecg"], seed=seed)
