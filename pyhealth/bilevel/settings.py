"""What a bi-level run is told: the settings of ``BiLevelTrainer.train``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

from ..models.taskaug_policy import TaskAugPolicy
from .checks import check_learning, check_monitor
from .outer_loss import OUTER_LOSSES
from .step import OUTER_METHODS, OuterMethod

__all__ = ["TrainingSettings", "usual_outer_loss"]

# Below PyHealth's trainer, whose log file then gets these lines too.
logger = logging.getLogger("pyhealth.trainer.bilevel")


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a run, in plain values.

    They are the arguments of :meth:`~pyhealth.bilevel.trainer.BiLevelTrainer.train`,
    which says what each means and has their defaults; ``outer_loss`` is a name here.

    Raises:
        ValueError: if a count is below 1, or a choice is none of the possible ones.

    Examples:
        >>> from inspect import signature
        >>> from pyhealth.bilevel import BiLevelTrainer
        >>> arguments = signature(BiLevelTrainer.train).parameters
        >>> usual = {name: argument.default for name, argument in arguments.items()}
        >>> usual["outer_loss"] = "ranking"
        >>> TrainingSettings.among(usual).epochs
        5
        >>> TrainingSettings.among(usual | {"epochs": 0})
        Traceback (most recent call last):
        ValueError: epochs must be 1 or more, got 0.
    """

    outer_loss: str
    epochs: int
    inner_lr: float
    outer_lr: float
    warmup_epochs: int
    hypergradient: OuterMethod | None
    neumann_terms: int
    neumann_lr: float | None
    outer_every: int
    accumulate: int
    val_statistics: Literal["running", "batch"]
    alignment_records: int
    micro_batch: int | None
    weight_decay: float
    monitor: str
    monitor_criterion: Literal["max", "min"]
    load_best_model_at_last: bool
    patience: int | None
    max_seconds: float | None
    resume: bool | str
    checkpoint_every: int | None
    max_bad_steps: int
    reestimate_statistics: bool

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "outer_every",
            "accumulate",
            "alignment_records",
            "checkpoint_every",
            "max_bad_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            # Said so, since nan would never end.
            raise ValueError(f"max_seconds must be positive, got {self.max_seconds}.")
        for name, value, choices in (
            ("hypergradient", self.hypergradient, (*OUTER_METHODS, None)),
            ("outer_loss", self.outer_loss, ("model", *OUTER_LOSSES)),
            ("val_statistics", self.val_statistics, ("running", "batch")),
        ):
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {list(choices)}, got {value!r}."
                )

    @classmethod
    def among(cls, arguments: Mapping[str, object]) -> TrainingSettings:
        """Return the settings among the arguments of a call, by name."""
        own = {field.name: arguments[field.name] for field in fields(cls)}
        made: Callable[..., TrainingSettings] = cls  # train's signature types them
        return made(**own)

    def learns(self, policy: TaskAugPolicy) -> bool:
        """Return whether the policy is learned by hypergradients."""
        return self.hypergradient is not None and policy.num_stages > 0

    def trains_jointly(self, model: nn.Module) -> bool:
        """Return whether the training loss trains the policy, too."""
        return self.hypergradient is None and bool(
            getattr(model, "train_policy_jointly", False)
        )

    @property
    def series_lr(self) -> float:
        """Step of the Neumann series, by default that of the weights."""
        return self.inner_lr if self.neumann_lr is None else self.neumann_lr

    def check(
        self,
        model: nn.Module,
        policy: TaskAugPolicy,
        scores: Collection[str] | None = None,
    ) -> None:
        """See that these settings fit a model and its policy.

        Args:
            model: a PyHealth model.
            policy: the policy.
            scores: names of the validation scores that there will be, if known.

        Raises:
            ValueError: if they do not, or the policy would never move.
        """
        check_monitor(scores, self.monitor, self.monitor_criterion, self.patience)
        mode = getattr(model, "mode", None)
        if self.outer_loss in OUTER_LOSSES and mode not in ("binary", None):
            raise ValueError(
                f"outer_loss={self.outer_loss!r} needs a binary label, but "
                f"{type(model).__name__} is {mode}. Leave it out, or take 'model'."
            )
        if self.hypergradient == "darts" and not policy.shared_magnitudes:
            logger.warning(
                "hypergradient='darts' with class-specific magnitudes rewards a policy "
                "that writes the label into the signal. It is for comparison only."
            )
        if self.hypergradient is not None and self.learns(policy):
            check_learning(
                self.hypergradient,
                self.epochs,
                self.warmup_epochs,
                self.neumann_terms,
                self.neumann_lr,
            )


def usual_outer_loss(model: nn.Module) -> Literal["model", "ranking"]:
    """Return the outer loss for a model's label where none is asked for.

    Args:
        model: a PyHealth model.

    Returns:
        "ranking" for a binary label, whose two classes it pairs; else "model".

    Examples:
        >>> usual_outer_loss(nn.Identity())
        'model'
    """
    return "ranking" if getattr(model, "mode", None) == "binary" else "model"
