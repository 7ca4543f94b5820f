"""All that decides a training run on given data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..step import OuterMethod

__all__ = ["POLICIES", "RunSettings"]

#: Kinds of augmentation that need no file.
POLICIES = (
    "learned",
    "joint",
    "random",
    "noise",
    "none",
    "mixup",
    "randaugment",
    "searched",
)


@dataclass(frozen=True)
class RunSettings:
    """All that decides a training run on given data.

    Attributes:
        policy: "learned" (by the hypergradient), "joint" (on the training loss),
            "random" (drawn once and frozen), "noise" (Gaussian noise of 0.1 standard
            deviations), "none", "mixup" (see
            :class:`~pyhealth.bilevel.study.training.Mixup`), "randaugment" or
            "searched" (the best of several on the validation records, see
            :func:`~pyhealth.bilevel.study.search.search`), or the policy.json of
            another run, frozen.
        policy_stages: stages of the policy; a file and "noise" bring their own.
        shared_magnitudes: one magnitude for both classes; likewise.
        base_width: width of the ResNet.
        epochs: passes over the training data.
        max_seconds: end after the epoch in which the training steps have taken so long,
            however many epochs are left.
        batch_size: records a step.
        lr: learning rate of the weights.
        outer_lr: learning rate of the policy.
        hypergradient: how the policy's derivative is formed.
        outer_loss: what the policy lowers: "model", "ranking" or "calibrated".
        alignment_records: training records that "alignment" enumerates in a step.
        outer_every: inner steps a step of the policy.
        warmup_epochs: first epochs without a step of the policy.
        seed: of initial weights, order of the records and the policy's draws.
        device: "cpu", "cuda" or None for the best there is.
        reestimate_statistics: evaluate with BatchNorm statistics of the clean training
            records.
        precision: "fp32", or "bf16" for the training's forward passes.
        random_signs: give every number of every hypergradient a random sign: what a
            policy does that learns from nothing.
        train_on_validation: train on the validation records too, for as many steps,
            and keep the last weights, since nothing is left to pick the best by.
        search_seconds: "searched" begins no trial after so many seconds of training.

    Raises:
        ValueError: if the policy is neither of these words nor a .json file, or a
            search has no end.

    Examples:
        >>> RunSettings(policy="none").describe()
        'none'
    """

    policy: str = "learned"
    policy_stages: int = 2
    shared_magnitudes: bool = False
    base_width: int = 64
    epochs: int = 10
    max_seconds: float | None = None
    batch_size: int = 64
    lr: float = 1e-3
    outer_lr: float = 3e-2
    hypergradient: OuterMethod = "alignment"
    outer_loss: Literal["model", "ranking", "calibrated"] = "ranking"
    alignment_records: int = 64
    outer_every: int = 1
    warmup_epochs: int = 1
    seed: int = 0
    device: str | None = None
    reestimate_statistics: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    random_signs: bool = False
    train_on_validation: bool = False
    search_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES and not self.policy_is_a_file:
            raise ValueError(
                f"policy must be one of {list(POLICIES)} or the path of a policy.json, "
                f"got {self.policy!r}."
            )
        if self.policy == "searched" and self.search_seconds is None:
            raise ValueError("policy='searched' needs search_seconds.")

    @property
    def policy_is_a_file(self) -> bool:
        """Whether the policy is read from a file, and frozen."""
        return self.policy.endswith(".json")

    def describe(self) -> str:
        """Return the kind of augmentation in a few words."""
        if self.policy in ("none", "noise", "mixup", "randaugment"):
            return self.policy
        if self.policy_is_a_file:
            return f"frozen {Path(self.policy).name}"
        magnitudes = ", shared magnitudes" if self.shared_magnitudes else ""
        return f"{self.policy}, K={self.policy_stages}{magnitudes}"
