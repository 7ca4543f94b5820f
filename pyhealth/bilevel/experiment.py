"""Training runs on PTB-XL: their settings, their data and all that they write."""

from __future__ import annotations

import hashlib
import json
import logging
import math
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
from .checkpoint import write_whole
from .distributed import Processes
from .leak import leak_auroc
from .plots import plot_ecg, plot_learning_curves, plot_policy, plot_roc_pr
from .step import OuterMethod
from .trainer import BiLevelTrainer

__all__ = ["PreparedData", "RunSettings", "prepare", "run"]

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "numpy", "pyhealth", "pyhealth-taskaug", "wfdb", "scikit-learn")
POLICIES = ("learned", "joint", "random", "noise", "none")
#: Records that the leak probe augments: enough for an AUROC to 0.03, in a second.
LEAK_RECORDS = 128
#: Noise of the fixed-noise baseline, as a share of the operation's interval: 0.1
#: standard deviations.
NOISE_SHARE = 0.2


@dataclass(frozen=True)
class RunSettings:
    """All that decides a training run on given data.

    Attributes:
        policy: "learned" (by the hypergradient), "joint" (on the training loss),
            "random" (drawn once and frozen), "noise" (Gaussian noise of 0.1 standard
            deviations), "none", or the policy.json of another run, frozen.
        policy_stages: stages of the policy; a file and "noise" bring their own.
        shared_magnitudes: one magnitude for both classes; likewise.
        base_width: width of the ResNet.
        epochs: passes over the training data.
        batch_size: records a step.
        lr: learning rate of the weights.
        outer_lr: learning rate of the policy.
        hypergradient: how the policy's derivative is formed.
        outer_loss: what the policy lowers: "model", "ranking" or "calibrated".
        alignment_records: training records that "alignment" enumerates in a step.
        warmup_epochs: first epochs without a step of the policy.
        seed: of initial weights, order of the records and the policy's draws.
        device: "cpu", "cuda" or None for the best there is.
        reestimate_statistics: evaluate with BatchNorm statistics of the clean training
            records.
        precision: "fp32", or "bf16" for the training's forward passes.

    Raises:
        ValueError: if the policy is neither of these words nor a .json file.

    Examples:
        >>> RunSettings(policy="none").describe()
        'none'
    """

    policy: Literal["learned", "joint", "random", "noise", "none"] | str = "learned"
    policy_stages: int = 2
    shared_magnitudes: bool = False
    base_width: int = 64
    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    outer_lr: float = 3e-2
    hypergradient: OuterMethod = "alignment"
    outer_loss: Literal["model", "ranking", "calibrated"] = "ranking"
    alignment_records: int = 64
    warmup_epochs: int = 1
    seed: int = 0
    device: str | None = None
    reestimate_statistics: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES and not self.policy_is_a_file:
            raise ValueError(
                f"policy must be one of {list(POLICIES)} or the path of a policy.json, "
                f"got {self.policy!r}."
            )

    @property
    def policy_is_a_file(self) -> bool:
        """Whether the policy is read from a file, and frozen."""
        return self.policy.endswith(".json")

    def describe(self) -> str:
        """Return the kind of augmentation in a few words."""
        if self.policy in ("none", "noise"):
            return self.policy
        if self.policy_is_a_file:
            return f"frozen {Path(self.policy).name}"
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


def run(
    settings: RunSettings,
    data: PreparedData,
    folder: str | Path,
    resume: bool = False,
    checkpoint_every: int | None = None,
) -> pd.DataFrame:
    """Train, evaluate on the test part once, and write everything into a folder.

    Written are config.json and records.csv (before training), history.csv and last.ckpt
    (after every epoch), checkpoints/ to go on from, best.ckpt, policy.json (to read and
    to load), predictions.csv, metrics.json and the pictures learning_curves.png,
    policy.png, roc_pr.png and ecg_augmented.png.

    Args:
        settings: of the run.
        data: from :func:`prepare`.
        folder: where to write; made if missing.
        resume: go on with the run that was begun in this folder, if there is one; all
            settings but the number of epochs and the device must be the same.
        checkpoint_every: steps between two checkpoints, beside those after each epoch.

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
        _begin(settings, data, folder, resume)
    trainer = _train(settings, data, folder, resume, checkpoint_every)
    predictions = _predict(trainer, data.test, settings.batch_size)
    if processes.is_main:
        _write_results(trainer, settings, data, predictions, folder)
    processes.from_main(None)  # nobody reads a file before it is written
    return predictions


def _begin(
    settings: RunSettings, data: PreparedData, folder: Path, resume: bool
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    configuration = _configuration(settings, data)
    if resume:
        _check_same_run(folder / "config.json", configuration)
    _write_json(folder / "config.json", configuration)
    _write_table(folder / "records.csv", _records_table(data))


def _write_results(
    trainer: BiLevelTrainer,
    settings: RunSettings,
    data: PreparedData,
    predictions: pd.DataFrame,
    folder: Path,
) -> None:
    trainer.save_ckpt(str(folder / "best.ckpt"))
    best = _best_epoch(trainer.history)
    trainer.policy.save(
        folder / "policy.json", provenance=_provenance(settings, data, best)
    )
    _write_table(folder / "predictions.csv", predictions)
    metrics = {
        "best_epoch": best,
        "seconds": sum(row["seconds"] for row in trainer.history),
        "policy_p_value": _number(trainer.policy_p_value),
        "leak_auroc": _leak(trainer.policy, data.val, settings.seed),
        "val": score(_predict(trainer, data.val, settings.batch_size)),
        "test": score(predictions),
    }
    _write_json(folder / "metrics.json", metrics)
    _draw(trainer, data, predictions, settings, folder)


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


def _train(
    settings: RunSettings,
    data: PreparedData,
    folder: Path,
    resume: bool = False,
    checkpoint_every: int | None = None,
) -> BiLevelTrainer:
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
    if settings.policy_is_a_file:
        model.policy = TaskAugPolicy.load(settings.policy)
        # Magnitudes are in units, so they hold at this task's rate, too.
        model.policy.sampling_rate = data.task.sampling_rate
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
    # Not by enable_logging: PyHealth's log file of one run of a comparison would go on
    # to take the lines of all later ones.
    trainer.exp_path = str(folder)
    trainer.train(
        _loader(data.train, settings, shuffle=True),
        _loader(data.val, settings, shuffle=False),
        epochs=settings.epochs,
        inner_lr=settings.lr,
        outer_lr=settings.outer_lr,
        warmup_epochs=settings.warmup_epochs,
        hypergradient=settings.hypergradient if settings.policy == "learned" else None,
        outer_loss=settings.outer_loss,
        alignment_records=settings.alignment_records,
        on_epoch=lambda trainer: _write_table(
            folder / "history.csv", pd.DataFrame(trainer.history)
        ),
        resume=resume,
        checkpoint_every=checkpoint_every,
        reestimate_statistics=settings.reestimate_statistics,
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


def _number(value: float) -> float | None:
    """Return None for nan, which JSON cannot say."""
    return None if math.isnan(value) else value


def _leak(policy: TaskAugPolicy, samples: SampleDataset, seed: int) -> float | None:
    if not policy.num_stages:
        return None
    loader = get_dataloader(samples, LEAK_RECORDS, shuffle=True, seed=seed)
    return leak_auroc(policy, next(iter(loader))["ecg"], seed=seed)


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


def _provenance(settings: RunSettings, data: PreparedData, epoch: int) -> dict:
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


def _digest(dataset: PTBXLDataset, parts: Iterable[SampleDataset]) -> str:
    """Digest the two tables and the records of each part."""
    digest = hashlib.sha256()
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        digest.update((Path(dataset.root) / name).read_bytes())
    for part in parts:
        digest.update(repr(sorted(part.patient_to_index.items())).encode())
    return digest.hexdigest()


def _check_same_run(path: Path, configuration: dict) -> None:
    """See that the run begun in a folder is this one."""
    if not path.exists():
        return
    begun = json.loads(path.read_text())
    now = json.loads(json.dumps(configuration))  # tuples read back as lists
    for group, of_group in now.items():
        for name, value in of_group.items() if group in ("settings", "task") else ():
            before = begun[group].get(name)
            if before != value and name not in ("epochs", "device"):
                raise ValueError(
                    f"The run begun in {path.parent} has {group} {name} {before!r}, "
                    f"now it is {value!r}. Use the same arguments or another folder."
                )
    if begun["data"]["digest"] != now["data"]["digest"]:
        raise ValueError(
            f"The run begun in {path.parent} has other data. Use another folder."
        )


def _write_table(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, table.to_csv(index=False).encode())


def _write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
