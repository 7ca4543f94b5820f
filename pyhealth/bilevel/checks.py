"""What a bi-level run cannot do, said before it starts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn
from torch.utils.data import DataLoader

from ..models.taskaug_policy import TaskAugPolicy
from .step import OuterMethod
from .types import Batch

__all__ = [
    "check_label",
    "check_learning",
    "check_loaders",
    "check_monitor",
    "check_same_kind",
    "expected_scores",
]

#: What PyHealth's ``evaluate`` gives where no metrics are named.
DEFAULT_METRICS = {
    "binary": ("pr_auc", "roc_auc", "f1"),
    "multiclass": ("accuracy", "f1_macro", "f1_micro"),
    "multilabel": ("pr_auc_samples",),
    "regression": ("kl_divergence", "mse", "mae"),
    None: (),
}


def check_label(model: nn.Module, policy: TaskAugPolicy) -> None:
    """Check that class-specific magnitudes meet a binary label.

    A label is where between the magnitudes of both classes a record lies, so class 2
    of a multiclass label would be a magnitude outside the operation's interval.

    Args:
        model: a PyHealth model; ``mode`` is the kind of its label, if known.
        policy: the policy.

    Raises:
        ValueError: if the label is known not to be binary.

    Examples:
        >>> check_label(nn.Identity(), TaskAugPolicy(1))
    """
    mode = getattr(model, "mode", None)
    if (
        policy.num_stages
        and not policy.shared_magnitudes
        and mode
        not in (
            "binary",
            None,
        )
    ):
        raise ValueError(
            f"The label of {type(model).__name__} is {mode}, but the policy has "
            "magnitudes for the two classes of a binary one; build it with "
            "shared_magnitudes=True."
        )


def check_learning(
    method: OuterMethod,
    epochs: int,
    warmup_epochs: int,
    neumann_terms: int,
    neumann_lr: float | None,
) -> None:
    """Check the settings of a policy that is to learn.

    Args:
        method: of the hypergradient.
        epochs: of the run.
        warmup_epochs: those of them in which the policy rests.
        neumann_terms: of "neumann".
        neumann_lr: of "neumann".

    Raises:
        ValueError: if the policy would never move, or a setting is ignored.

    Examples:
        >>> check_learning("one_step", 10, 1, 1, None)
    """
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(
            f"warmup_epochs={warmup_epochs} of epochs={epochs}: the policy would never "
            "move. Take from 0 to epochs - 1, or hypergradient=None for a policy that "
            "stays as it is."
        )
    if method != "neumann":
        for name, value, default in (
            ("neumann_terms", neumann_terms, 1),
            ("neumann_lr", neumann_lr, None),
        ):
            if value != default:
                raise ValueError(
                    f"hypergradient={method!r} ignores {name}={value}; leave it out, "
                    "or take hypergradient='neumann'."
                )


def check_monitor(
    scores: Collection[str] | None,
    monitor: str,
    criterion: str,
    patience: int | None,
) -> None:
    """Check what picks the best epoch.

    Args:
        scores: names that there will be, see :func:`expected_scores`; None if unknown.
        monitor: name of the score.
        criterion: "max" or "min".
        patience: epochs without a new best.

    Raises:
        ValueError: if there will be no such score, or a setting is out of range.

    Examples:
        >>> check_monitor(["loss", "roc_auc"], "loss", "min", patience=None)
    """
    if scores is not None and monitor not in scores:
        raise ValueError(
            f"monitor {monitor!r} is none of the scores {sorted(scores)}; add it to "
            "metrics=[...]."
        )
    if criterion not in ("max", "min"):
        raise ValueError(
            f"monitor_criterion must be 'max' or 'min', got {criterion!r}."
        )
    if patience is not None and patience < 1:
        raise ValueError(
            f"patience must be 1 or more epochs, or None for no early end; got "
            f"{patience}."
        )


def expected_scores(model: nn.Module, metrics: Sequence[str] | None) -> list[str]:
    """Return the names of the scores that PyHealth's ``evaluate`` will give.

    Args:
        model: the model; its ``mode`` decides on PyHealth's default.
        metrics: the trainer's metrics; None for the default.

    Returns:
        Names, "loss" among them.

    Examples:
        >>> expected_scores(nn.Identity(), ["roc_auc"])  # without a mode, the loss only
        ['loss']
    """
    mode = getattr(model, "mode", None)
    named = DEFAULT_METRICS[mode] if mode is None or metrics is None else metrics
    return [*named, "loss"]


def check_loaders(**loaders: DataLoader[Batch]) -> None:
    """Check that there are batches.

    Args:
        **loaders: the loaders by what they are for.

    Raises:
        ValueError: if one is empty.

    Examples:
        >>> check_loaders(training=[{"ecg": 0}])
    """
    for name, loader in loaders.items():
        if not len(loader):
            raise ValueError(
                f"The {name} loader has no batch: its dataset is empty, or smaller "
                "than a batch with drop_last=True. Give it more records."
            )


def check_same_kind(saved: TaskAugPolicy, policy: TaskAugPolicy, path: str) -> None:
    """Check that a saved policy's parameters mean the same as another policy's.

    Args:
        saved: the policy that was read.
        policy: the one to take its parameters.
        path: file it was read from.

    Raises:
        ValueError: if operations, stages or the sharing of magnitudes differ.

    Examples:
        >>> check_same_kind(TaskAugPolicy(1), TaskAugPolicy(1), "mi.json")
    """
    for name in ("op_names", "num_stages", "shared_magnitudes"):
        found, wanted = getattr(saved, name), getattr(policy, name)
        if found != wanted:
            raise ValueError(
                f"The policy in {path} has {name} {found}, this trainer's has "
                f"{wanted}. Pass policy=TaskAugPolicy.load({path!r}) to the trainer."
            )
