"""What a study compares: each configuration by its letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .settings import RunSettings

__all__ = [
    "CONFIGURATIONS",
    "EQUAL_SECONDS",
    "SWEPT_OUTER_LR",
    "Configuration",
    "chosen",
    "lr_sweep",
]

type Value = str | int | float | bool

#: Learning rates of the policy that the sweep tries.
SWEPT_OUTER_LR = (1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Configuration:
    """One way to train, as changes to the settings of a study.

    Attributes:
        title: in a few words.
        changes: fields of :class:`~pyhealth.bilevel.study.settings.RunSettings`.

    Examples:
        >>> CONFIGURATIONS["C"].settings(RunSettings(epochs=3)).policy_stages
        1
    """

    title: str
    changes: Mapping[str, Value] = field(default_factory=dict)

    def settings(self, base: RunSettings) -> RunSettings:
        """Return the settings of a run.

        Args:
            base: those that all configurations share.
        """
        # A mapping does not tell its names; RunSettings refuses those of no field.
        return replace(base, **self.changes)  # type: ignore[arg-type]

    @property
    def learns(self) -> bool:
        """Whether a policy is learned by a hypergradient."""
        return self.changes.get("policy") == "learned"


def _learned(title: str, **changes: Value) -> Configuration:
    return Configuration(title, {"policy": "learned", "policy_stages": 2, **changes})


#: All configurations by letter. "A" is what the others are compared with.
CONFIGURATIONS: Mapping[str, Configuration] = {
    "A": Configuration("no augmentation", {"policy": "none"}),
    "A+": Configuration(
        "no augmentation, trained on the validation records too",
        {"policy": "none", "train_on_validation": True},
    ),
    "B": Configuration("Gaussian noise 0.1 SD", {"policy": "noise"}),
    "C": _learned("TaskAug K=1", policy_stages=1),
    "D": _learned("TaskAug K=2"),
    "E": Configuration("random frozen K=2", {"policy": "random", "policy_stages": 2}),
    "F": _learned("TaskAug K=2 shared", shared_magnitudes=True),
    "G": _learned("TaskAug K=2, darts", hypergradient="darts"),
    "H": Configuration("RandAugment", {"policy": "randaugment"}),
    "I": Configuration("mixup", {"policy": "mixup"}),
    "J": Configuration(
        "policy searched by Optuna, D's seconds",
        {"policy": "searched", "policy_stages": 2},
    ),
    "S": _learned("TaskAug K=2, random signs", random_signs=True),
}
#: Configurations that are also trained for as many seconds as D takes.
EQUAL_SECONDS = ("A", "A+")


def chosen(letters: Sequence[str]) -> dict[str, Configuration]:
    """Return configurations by letter, "A" first.

    Args:
        letters: some of :data:`CONFIGURATIONS`; "A" is added, and "D" for "J".

    Raises:
        ValueError: if a letter is unknown.

    Examples:
        >>> list(chosen(["J"]))
        ['A', 'D', 'J']
    """
    unknown = sorted(set(letters) - set(CONFIGURATIONS))
    if unknown:
        raise ValueError(
            f"There is no configuration {', '.join(unknown)}; there are "
            f"{', '.join(CONFIGURATIONS)}."
        )
    wanted = {"A", *letters} | ({"D"} if "J" in letters else set())
    return {key: value for key, value in CONFIGURATIONS.items() if key in wanted}


def lr_sweep() -> dict[str, Configuration]:
    """Return one configuration a learning rate of the policy.

    Examples:
        >>> list(lr_sweep())
        ['outer_lr_0.01', 'outer_lr_0.001', 'outer_lr_0.0001']
    """
    return {
        f"outer_lr_{rate:g}": Configuration(
            f"TaskAug, outer lr {rate:g}", {"policy": "learned", "outer_lr": rate}
        )
        for rate in SWEPT_OUTER_LR
    }
