"""Training runs on PTB-XL: their settings, their data and all that they write."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    roc_auc_score,
)
from torch.utils.data import DataLoader

from ..datasets import SampleDataset, get_dataloader
from ..datasets.ptbxl import CohortSplit, PTBXLDataset, StratFoldSplit
from ..models.taskaug_policy import TaskAugPolicy
from ..models.taskaug_resnet import TaskAugResNet
from ..processors.ecg_processor import ECGProcessor
from ..tasks.ecg_classification import ECGBinaryClassification
from .hypergradient import Method
from .plots import plot_ecg, plot_learning_curves, plot_policy, plot_roc_pr
from .trainer import BiLevelTrainer

__all__ = ["PreparedData", "RunSettings", "prepare", "run"]

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "numpy", "pyhealth", "pyhealth-taskaug", "wfdb", "scikit-learn")
#: Noise of the fixed-noise baseline, as a share of the operation's interval: 0.1
#: standard deviations.
NOISE_SHARE = 0.2


@dataclass(frozen=True)
class RunSettings:
    """All that decides a training run on given data.

    Attributes:
        policy: "learned" (by the hypergradient), "joint" (on the training loss),
            "random" (drawn once and frozen), "noise" (Gaussian noise of 0.1 standard
            deviations) or "none".
        policy_stages: stages of the policy.
        shared_magnitudes: one magnitude for both classes.
        base_width: width of the ResNet.
        epochs: passes over the training data.
        batch_size: records a step.
        lr: learning rate of the weights.
        outer_lr: learning rate of the policy.
        hypergradient: how the policy's derivative is formed.
        warmup_epochs: first epochs without a step of the policy.
        seed: of initial weights, order of the records and the policy's draws.
        device: "cpu", "cuda" or None for the best there is.
        precision: "fp32", or "bf16" for the training's forward passes.

    Examples:
        >>> RunSettings(policy="none").describe()
        'none'
    """

    policy: Literal["learned", "joint", "random", "noise", "none"] = "learned"
    policy_stages: int = 2
    shared_magnitudes: bool = False
    base_width: int = 64
    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    outer_lr: float = 1e-2
    hypergradient: Method = "one_step"
    warmup_epochs: int = 1
    seed: int = 0
    device: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    def describe(self) -> str:
        """Return the kind of augmentation in a few words."""
        if self.policy in ("none", "noise"):
            return self.policy
        magnitudes = ", shared magnitudes" if self.shared_magnitudes else ""
        return f"{self.policy}, K={self.policy_stages}{magnitudes}"


@dataclass(frozen=True)
class PreparedData:
    """The samples of the three parts and where they come from.

    Attributes:
        dataset: the corpus.
        task: the task.
        train: training samples.
        val: validation samples.
        test: test samples.
        description: facts for the record, among them a digest of tables and records.

    Examples:
        >>> PreparedData.__match_args__[:3]
        ('dataset', 'task', 'train')
    """

    dataset: PTBXLDataset
    task: ECGBinaryClassification
    train: SampleDataset
    val: SampleDataset
    test: SampleDataset
    description: dict[str, str | int | list[int]]


def prepare(
    dataset: PTBXLDataset,
    task: ECGBinaryClassification,
    n_records: int | None = None,
    seed: int = 0,
) -> PreparedData:
    """Split the corpus and prepare its samples.

    Args:
        dataset: the corpus.
        task: the task.
        n_records: records to train and validate on; default folds 1-8 to train, 9 to
            validate, 10 to test. With a number, they are drawn by patient from all but
            the test fold, which is 10, or 9 where the corpus has no fold 10.
        seed: of that draw.

    Returns:
        The prepared data.

    Raises:
        ValueError: if a part would be empty.

    Examples:
        >>> prepare(dataset, task, n_records=1000)  # doctest: +SKIP
    """
    folds = sorted(dataset.records()["strat_fold"].unique())
    test_fold = 10 if 10 in folds else 9
    if n_records is None:
        if not {9, 10} <= set(folds):
            raise ValueError(
                f"This corpus has folds {folds}; without folds 9 and 10 there is "
                "nothing to validate and test on. Set n_records to draw a cohort: its "
                f"test part is fold {test_fold}."
            )
        split = StratFoldSplit()
    else:
        split = CohortSplit(n_records, seed=seed, test=(test_fold,))
    train, val, test = dataset.set_task(task, split=split)
    description = {
        "root": str(dataset.root),
        "digest": _digest(dataset, (train, val, test)),
        "test_fold": test_fold,
        "records_train": len(train),
        "records_val": len(val),
        "records_test": len(test),
        "skipped_records": dataset.skipped_records,
    }
    return PreparedData(dataset, task, train, val, test, description)


def run(settings: RunSettings, data: PreparedData, folder: str | Path) -> pd.DataFrame:
    """Train, evaluate on the test part once, and write everything into a folder.

    Written are config.json and records.csv (before training), history.csv (after every
    epoch), best.ckpt, policy.pt, policy.json, predictions.csv, metrics.json and the
    pictures learning_curves.png, policy.png, roc_pr.png and ecg_augmented.png.

    Args:
        settings: of the run.
        data: from :func:`prepare`.
        folder: where to write; made if missing.

    Returns:
        The test predictions: ecg_id, patient_id, label, probability.

    Raises:
        ValueError: if the data do not allow training, one class only, say.

    Examples:
        >>> run(RunSettings(epochs=3), data, "output/mi")  # doctest: +SKIP
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _configuration(settings, data))
    _records_table(data).to_csv(folder / "records.csv", index=False)
    trainer = _train(settings, data, folder)
    trainer.save_ckpt(str(folder / "best.ckpt"))
    trainer.policy.save(folder / "policy.pt")
    best = _best_epoch(trainer.history)
    _write_json(
        folder / "policy.json",
        {
            "epoch": best,
            "stages": trainer.policy.to_frame().to_dict(orient="records"),
        },
    )
    predictions = _predict(trainer, data.test, settings.batch_size)
    predictions.to_csv(folder / "predictions.csv", index=False)
    metrics = {
        "best_epoch": best,
        "seconds": sum(row["seconds"] for row in trainer.history),
        "val": score(_predict(trainer, data.val, settings.batch_size)),
        "test": score(predictions),
    }
    _write_json(folder / "metrics.json", metrics)
    _draw(trainer, data, predictions, settings, folder)
    return predictions


def score(predictions: pd.DataFrame) -> dict[str, float | int | None]:
    """Score predictions.

    Args:
        predictions: columns label (0 or 1) and probability.

    Returns:
        n, positives, roc_auc, pr_auc, accuracy (at 0.5) and brier; the two areas are
        None where only one class is present.

    Examples:
        >>> table = pd.DataFrame({"label": [0, 1], "probability": [0.2, 0.9]})
        >>> score(table)["roc_auc"]
        1.0
    """
    label, probability = predictions["label"], predictions["probability"]
    both = label.nunique() == 2
    return {
        "n": len(label),
        "positives": int(label.sum()),
        "roc_auc": float(roc_auc_score(label, probability)) if both else None,
        "pr_auc": float(average_precision_score(label, probability)) if both else None,
        "accuracy": float(accuracy_score(label, probability >= 0.5)),
        "brier": float(brier_score_loss(label, probability)),
    }


def _train(settings: RunSettings, data: PreparedData, folder: Path) -> BiLevelTrainer:
    # The policy takes no random number to build, so a seed gives the same initial
    # backbone under every kind of policy.
    torch.manual_seed(settings.seed)
    model = TaskAugResNet(
        data.train,
        num_leads=len(data.task.leads),
        policy_stages=0 if settings.policy == "none" else settings.policy_stages,
        shared_magnitudes=settings.shared_magnitudes,
        base_width=settings.base_width,
        train_policy_jointly=settings.policy == "joint",
        sampling_rate=data.task.sampling_rate,
    )
    if settings.policy == "noise":
        model.policy = TaskAugPolicy(
            num_stages=1,
            operations=["gaussian_noise"],
            initial_magnitude=NOISE_SHARE,
            shared_magnitudes=True,
            sampling_rate=data.task.sampling_rate,
        )
    if settings.policy == "random":
        model.policy.randomize_(torch.Generator().manual_seed(settings.seed))
    trainer = BiLevelTrainer(
        model,
        metrics=["roc_auc", "pr_auc"],
        device=settings.device,
        enable_logging=False,
        seed=settings.seed,
        precision=settings.precision,
    )
    trainer.train(
        _loader(data.train, settings, shuffle=True),
        _loader(data.val, settings, shuffle=False),
        epochs=settings.epochs,
        inner_lr=settings.lr,
        outer_lr=settings.outer_lr,
        warmup_epochs=settings.warmup_epochs,
        hypergradient=settings.hypergradient if settings.policy == "learned" else None,
        on_epoch=lambda trainer: _write_history(trainer, folder / "history.csv"),
    )
    return trainer


def _loader(samples: SampleDataset, settings: RunSettings, shuffle: bool) -> DataLoader:
    return get_dataloader(samples, settings.batch_size, shuffle, seed=settings.seed)


def _predict(
    trainer: BiLevelTrainer, samples: SampleDataset, batch_size: int
) -> pd.DataFrame:
    loader = get_dataloader(samples, batch_size)
    labels, probabilities, _ = trainer.inference(loader)
    return pd.DataFrame(
        {
            **_identities(samples),
            "label": np.ravel(labels).astype(int),
            "probability": np.ravel(probabilities),
        }
    )


def _identities(samples: SampleDataset) -> dict[str, list]:
    """Return ecg_id and patient_id in the order of an unshuffled loader."""
    ecg_ids, patient_ids = [], []
    for batch in get_dataloader(samples, batch_size=256):
        ecg_ids += [int(ecg_id) for ecg_id in batch["ecg_id"]]
        patient_ids += batch["patient_id"]
    return {"ecg_id": ecg_ids, "patient_id": patient_ids}


def _records_table(data: PreparedData) -> pd.DataFrame:
    parts = {"train": data.train, "val": data.val, "test": data.test}
    return pd.concat(
        pd.DataFrame({**_identities(samples), "part": name})
        for name, samples in parts.items()
    )


def _draw(trainer, data, predictions, settings, folder: Path) -> None:
    history, policy = trainer.history, trainer.policy
    plot_learning_curves(history, folder / "learning_curves.png")
    if predictions["label"].nunique() == 2:
        curve = (predictions["label"], predictions["probability"])
        plot_roc_pr({settings.describe(): curve}, folder / "roc_pr.png")
    if policy.num_stages:
        ranges = {op.name: (op.low, op.high, op.unit) for op in policy.operations}
        plot_policy(history, policy.op_names, ranges, folder / "policy.png")
        _draw_ecg(policy, data, settings.seed, folder / "ecg_augmented.png")


def _draw_ecg(policy: TaskAugPolicy, data: PreparedData, seed: int, path: Path) -> None:
    """Draw a training record of the positive class before and after the policy."""
    task = data.task
    train_ids = set(_identities(data.train)["ecg_id"])
    records = data.dataset.records(task)
    row = next(
        row
        for row in records.iter_rows(named=True)
        if row["label"] == 1 and row["ecg_id"] in train_ids
    )
    # In millivolt whatever the training's scale: the paper's grid is in millivolt, and
    # the operations are relative to the signal.
    processor = ECGProcessor(task.sampling_rate, task.length, "none", task.leads)
    before = processor.process(row["record_path"])[None]
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
        suptitle=f"ECG {row['ecg_id']}, {task.task_label} = 1",
    )


def _best_epoch(history: list[dict[str, float]]) -> int:
    return max(range(len(history)), key=lambda epoch: history[epoch]["roc_auc"])


def _configuration(settings: RunSettings, data: PreparedData) -> dict:
    task = vars(data.task)
    shown = ("task_label", "sampling_rate", "length", "normalize", "min_likelihood")
    return {
        "settings": asdict(settings),
        "task": {name: task[name] for name in shown} | {"leads": list(data.task.leads)},
        "data": data.description,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "threads": torch.get_num_threads(),
    }


def _digest(dataset: PTBXLDataset, parts: Iterable[SampleDataset]) -> str:
    """Digest the two tables and the records of each part."""
    digest = hashlib.sha256()
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        digest.update((Path(dataset.root) / name).read_bytes())
    for part in parts:
        digest.update(repr(sorted(part.patient_to_index.items())).encode())
    return digest.hexdigest()


def _write_history(trainer: BiLevelTrainer, path: Path) -> None:
    pd.DataFrame(trainer.history).to_csv(path, index=False)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
