"""One training run of a study: the augmentation that was asked for, and the trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...datasets.ecg_samples import ECGSamples, Sample
from ...datasets.utils import get_dataloader
from ...models.taskaug_policy import TaskAugPolicy
from ...models.taskaug_resnet import TaskAugResNet
from ..checkpoint import write_whole
from ..trainer import BiLevelTrainer
from ..types import Batch
from .data import PreparedData
from .settings import RunSettings

__all__ = ["Mixup", "Monitor", "random_signs", "train"]

#: Noise of the fixed-noise baseline, as a share of the operation's interval: 0.1
#: standard deviations.
NOISE_SHARE = 0.2


class Monitor(TypedDict):
    """The score that picks the best epoch, and whether it should be large or small.

    Examples:
        >>> MONITOR["binary"]
        {'monitor': 'roc_auc', 'monitor_criterion': 'max'}
    """

    monitor: str
    monitor_criterion: Literal["max", "min"]


#: Validation scores of an epoch, by the kind of the label, and what picks the best one.
#: With many labels some have no positive record in a small validation part, so there is
#: no mean over the labels, and the loss picks, as with the paper's authors.
METRICS = {
    "binary": ["roc_auc", "pr_auc"],
    "multilabel": ["roc_auc_micro", "pr_auc_micro"],
}
MONITOR: dict[str, Monitor] = {
    "binary": {"monitor": "roc_auc", "monitor_criterion": "max"},
    "multilabel": {"monitor": "loss", "monitor_criterion": "min"},
}


def train(
    settings: RunSettings,
    data: PreparedData,
    folder: Path,
    resume: bool = False,
    checkpoint_every: int | None = None,
) -> BiLevelTrainer:
    """Train as the settings say; history.csv and checkpoints go into a folder.

    Args:
        settings: of the run; a policy to search for is not among them.
        data: the records.
        folder: where to write.
        resume: go on with the run that was begun there, if there is one.
        checkpoint_every: steps between two checkpoints, beside those after each epoch.

    Returns:
        The trainer, its model and policy those of the best epoch.

    Examples:
        >>> train(RunSettings(epochs=3), data, Path("output"))  # doctest: +SKIP
    """
    kind = data.train.output_schema["label"]
    trainer = BiLevelTrainer(
        _model(settings, data),
        metrics=METRICS[kind],
        device=settings.device,
        enable_logging=False,
        seed=settings.seed,
        precision=settings.precision,
    )
    # Not by enable_logging: PyHealth's log file of one run of a comparison would go on
    # to take the lines of all later ones.
    trainer.exp_path = str(folder)
    samples, epochs = data.train, settings.epochs
    if settings.train_on_validation:
        samples = data.train.joined(data.val)
        epochs = max(1, round(epochs * len(data.train) / len(samples)))
    trainer.train(
        _training_loader(samples, settings),
        get_dataloader(data.val, settings.batch_size, seed=settings.seed),
        epochs=epochs,
        max_seconds=settings.max_seconds,
        **MONITOR[kind],
        inner_lr=settings.lr,
        outer_lr=settings.outer_lr,
        warmup_epochs=settings.warmup_epochs,
        hypergradient=settings.hypergradient if settings.policy == "learned" else None,
        outer_loss=settings.outer_loss,
        alignment_records=settings.alignment_records,
        outer_every=settings.outer_every,
        load_best_model_at_last=not settings.train_on_validation,
        on_epoch=_write_history(folder),
        on_hypergradient=random_signs if settings.random_signs else None,
        resume=resume,
        checkpoint_every=checkpoint_every,
        reestimate_statistics=settings.reestimate_statistics,
    )
    return trainer


def _model(settings: RunSettings, data: PreparedData) -> TaskAugResNet:
    # The policy takes no random number to build, so a seed gives the same initial
    # backbone under every kind of policy.
    torch.manual_seed(settings.seed)
    model = TaskAugResNet(
        data.train,
        num_leads=len(data.task.leads),
        policy_stages=0,  # until the settings' own is made
        base_width=settings.base_width,
        train_policy_jointly=settings.policy == "joint",
    )
    model.policy = _policy(settings, data.task.sampling_rate)
    return model


class Mixup:
    """Collates a batch and mixes its records in pairs: signals and labels alike.

    The weights are drawn anew for each batch, from who is in it: the same batch is
    mixed in the same way, so a resumed run needs no state of this.

    Args:
        collate: makes the batch.
        seed: of the draws.
        alpha: of the weights' Beta distribution; small ones mix little.

    Source:
        Zhang et al., mixup: Beyond empirical risk minimization, ICLR 2018; alpha from
        0.1 to 0.4 there. One weight a record, where they draw one a batch.

    Examples:
        >>> from torch.utils.data import default_collate
        >>> record = lambda label: {"ecg_id": label, "ecg": torch.ones(12, 9) * label,
        ...                         "label": torch.tensor([label * 1.0])}
        >>> mixed = Mixup(default_collate)([record(0), record(1)])
        >>> mixed["ecg"][:, 0, 0].equal(mixed["label"][:, 0])
        True
    """

    def __init__(
        self,
        collate: Callable[[list[Sample]], Batch],
        seed: int = 0,
        alpha: float = 0.2,
    ) -> None:
        self.collate = collate
        self.seed = seed
        self.alpha = alpha

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the mixed batch."""
        batch = self.collate(samples)
        ids = [int(ecg_id) for ecg_id in batch["ecg_id"]]
        rng = np.random.default_rng([self.seed, *ids])
        weight = torch.tensor(rng.beta(self.alpha, self.alpha, len(ids))).float()
        other = torch.from_numpy(rng.permutation(len(ids)))
        mixed = {
            key: torch.lerp(
                batch[key][other],
                batch[key],
                weight.reshape(-1, *[1] * (batch[key].ndim - 1)),
            )
            for key in ("ecg", "label")
        }
        return {**batch, **mixed}


def random_signs(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every number of a hypergradient a random sign, drawn from the numbers.

    So that it needs no state: a run that is resumed draws what it would have drawn.

    Args:
        gradient: by the names of the policy's parameters.

    Returns:
        The same with other signs.

    Examples:
        >>> signs = random_signs({"logits": torch.arange(1.0, 100.0)})["logits"].sign()
        >>> 20 < (signs > 0).sum() < 80
        tensor(True)
    """
    digest = hashlib.sha256()
    for value in gradient.values():
        digest.update(value.detach().cpu().numpy().tobytes())
    generator = torch.Generator().manual_seed(
        int.from_bytes(digest.digest()[:7], "little")
    )
    return {
        name: g * (1 - 2 * torch.randint(2, g.shape, generator=generator)).to(g)
        for name, g in gradient.items()
    }


def _policy(settings: RunSettings, sampling_rate: float) -> TaskAugPolicy:
    if settings.policy_is_a_file:
        policy = TaskAugPolicy.load(settings.policy)
        # Magnitudes are in units, so they hold at this task's rate, too.
        policy.sampling_rate = sampling_rate
        return policy
    if settings.policy == "noise":
        return TaskAugPolicy(
            num_stages=1,
            operations=["gaussian_noise"],
            initial_magnitude=NOISE_SHARE,
            shared_magnitudes=True,
            sampling_rate=sampling_rate,
        )
    policy = TaskAugPolicy(
        0 if settings.policy in ("none", "mixup") else settings.policy_stages,
        shared_magnitudes=settings.shared_magnitudes,
        sampling_rate=sampling_rate,
    )
    if settings.policy == "random":
        policy.randomize_(torch.Generator().manual_seed(settings.seed))
    return policy


def _training_loader(samples: ECGSamples, settings: RunSettings) -> DataLoader[Batch]:
    loader = get_dataloader(
        samples, settings.batch_size, shuffle=True, seed=settings.seed
    )
    if settings.policy == "mixup":
        loader.collate_fn = Mixup(loader.collate_fn, settings.seed)
    return loader


def _write_history(folder: Path) -> Callable[[BiLevelTrainer], None]:
    def write(trainer: BiLevelTrainer) -> None:
        table = pd.DataFrame(trainer.history).to_csv(index=False)
        write_whole(folder / "history.csv", table.encode())

    return write
