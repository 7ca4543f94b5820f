"""How much of the label an augmentation policy writes into the signals."""

from __future__ import annotations

import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from threadpoolctl import threadpool_limits
from torch import Tensor

from ..models.taskaug_policy import TaskAugPolicy

__all__ = ["leak_auroc"]

#: Edges of the frequency bands whose power the probe sees, hertz.
BAND_EDGES = (0.0, 0.5, 2.0, 8.0, 20.0, 40.0)
#: Change, in standard deviations of a lead, from which on a sample counts as changed.
CHANGED = 1e-3
FOLDS = 5
#: Records augmented at once, so that memory does not grow with their number.
CHUNK = 64


def leak_auroc(
    policy: TaskAugPolicy,
    x: Tensor,
    draws: int = 2,
    seed: int = 0,
) -> float:
    """Return how well a classifier tells the class from the augmentation alone.

    A policy with magnitudes of its own for each class can mark a record with its label.
    Here every record is augmented as class 0 and, with other draws, as class 1. A
    gradient-boosted classifier then sees the differences, augmented minus clean, and
    says which class the policy was told. Its AUROC on records that it was not fitted
    on is the leak: 0.5 if the policy gives nothing away, 1 if it writes the label down.

    The class is told to the policy whatever the record's own label is. So what the
    clean signal says of its label, which shines through a difference (a silenced lead
    is the negative of the lead), cannot be taken for a leak.

    Args:
        policy: the policy.
        x: clean signals (B, C, T), at least :data:`FOLDS` records; with 128 a leak of
            zero is measured as 0.50, standard deviation 0.03.
        draws: augmentations of a record for each class.
        seed: of the draws.

    Returns:
        The leak AUROC; about 0.5 by construction if the magnitudes are shared.

    Raises:
        ValueError: if there are too few records, or no stage.

    Examples:
        >>> x = torch.randn(40, 2, 200, generator=torch.Generator().manual_seed(0))
        >>> policy = TaskAugPolicy(1, operations=["gaussian_noise"], sampling_rate=100)
        >>> with torch.no_grad():
        ...     _ = policy.mag_pos.fill_(-3.0)
        >>> leak_auroc(policy, x)
        1.0
    """
    if len(x) < FOLDS:
        raise ValueError(f"The leak probe needs {FOLDS} or more records, got {len(x)}.")
    if not policy.num_stages:
        raise ValueError("A policy without stages changes nothing, so it has no leak.")
    generator = torch.Generator().manual_seed(seed)
    features, told, records = [], [], []
    for start in range(0, len(x), CHUNK):
        signals = x[start : start + CHUNK].to(policy.logits.device)
        for label in (0.0, 1.0) * draws:
            features.append(_features(policy, signals, label, generator))
            told.append(torch.full((len(signals),), label))
            records.append(torch.arange(start, start + len(signals)))
    target = torch.cat(told).numpy()
    # One thread: the trees are small, and where other programs use the cores the
    # threads' waiting for each other took 20 s instead of 1 s.
    with threadpool_limits(limits=1, user_api="openmp"):
        scores = cross_val_predict(
            HistGradientBoostingClassifier(max_iter=50, max_leaf_nodes=15),
            torch.cat(features).numpy(),
            target,
            groups=torch.cat(records).numpy(),
            cv=GroupKFold(FOLDS),
            method="predict_proba",
        )
    return float(roc_auc_score(target, scores[:, 1]))


def _features(
    policy: TaskAugPolicy, x: Tensor, label: float, generator: torch.Generator
) -> Tensor:
    """Augment as one class and describe the differences, (B, features) on the CPU."""
    labels = x.new_full((len(x),), label)
    with torch.no_grad():
        draw = policy.sample(x.shape, labels, generator, complete=False)
        # In the lead's own unit: the operations are relative to it, too.
        spread = x.std(dim=-1, keepdim=True).clamp_min(1e-6)
        difference = (policy.apply(x, labels, draw) - x) / spread
    return _describe(difference, policy.sampling_rate).cpu()


def _describe(difference: Tensor, rate: float) -> Tensor:
    """Return size, extent, place and bands of a difference, summed up over leads."""
    size = difference.square().mean(dim=-1).sqrt()
    largest = difference.abs().amax(dim=-1)
    changed = (difference.abs() > CHANGED).to(difference.dtype).mean(dim=-1)
    power = torch.fft.rfft(difference).abs().square()
    frequency = torch.fft.rfftfreq(difference.shape[-1], d=1 / rate)
    band = torch.bucketize(frequency, torch.tensor(BAND_EDGES[1:]), right=True)
    bands = [power[..., band == i].sum(dim=-1) for i in range(len(BAND_EDGES))]
    per_lead = torch.stack(
        [
            _log(size),
            _log(largest),
            changed,
            *(_log(total / difference.shape[-1] ** 2) for total in bands),
        ],
        dim=1,
    )
    # Order statistics over leads: a dropped lead shows in the largest, whichever it is.
    ordered = per_lead.sort(dim=-1).values
    middle = ordered.shape[-1] // 2
    return torch.cat(
        [ordered[..., 0], ordered[..., middle], ordered[..., -1], per_lead.mean(-1)],
        dim=1,
    )


def _log(value: Tensor) -> Tensor:
    return (value + 1e-9).log10()
