"""The types that the modules of this package hand to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from torch import Tensor

__all__ = [
    "Batch",
    "BestEpochState",
    "LoaderState",
    "PolicyOptimizerState",
    "PositionState",
    "RandomState",
    "RunSettings",
    "SavedRun",
    "StateDict",
    "StepLogState",
    "Tensors",
]

#: Weights, hyper-parameters or gradients by name.
type Tensors = Mapping[str, Tensor]

#: A batch as PyHealth's loaders make it; only its tensors are read.
type Batch = Mapping[str, Tensor]

#: All that decides a run: group -> name -> plain value.
type RunSettings = dict[str, dict[str, object]]

#: Of a network.
type StateDict = dict[str, Tensor]


class RandomState(TypedDict):
    """States of the global generators.

    Examples:
        >>> sorted(RandomState.__annotations__)
        ['cuda', 'numpy', 'python', 'torch']
    """

    torch: Tensor
    cuda: list[Tensor]
    numpy: tuple[str, list[int], int, int, float]
    python: tuple[object, ...]


# Apart, since a class cannot have a key that is a keyword.
_GlobalState = TypedDict("_GlobalState", {"global": RandomState})


class LoaderState(_GlobalState):
    """What the order of a loader's batches depends on.

    Examples:
        >>> sorted(LoaderState.__annotations__)
        ['generators', 'global', 'numbers']
    """

    numbers: dict[str, int]
    generators: list[Tensor]


class PositionState(TypedDict):
    """Where a loader stands: at the start of the pass under way, and now.

    Examples:
        >>> sorted(PositionState.__annotations__)
        ['now', 'start', 'taken']
    """

    start: LoaderState | None
    taken: int
    now: LoaderState


class PolicyOptimizerState(TypedDict):
    """The policy's optimiser, and the hypergradients that it was given.

    Examples:
        >>> PolicyOptimizerState(optimizer={}, waiting=[], seen=[], earlier=[])["seen"]
        []
    """

    optimizer: dict[str, object]
    waiting: list[tuple[dict[str, Tensor], Tensor]]
    seen: list[tuple[Tensor, Tensor]]
    earlier: list[Tensor]


class BestEpochState(TypedDict):
    """The best score, the epochs since, and model and policy of that epoch.

    Examples:
        >>> BestEpochState(score=0.7, waited=1, state=None)["score"]
        0.7
    """

    score: float
    waited: int
    state: tuple[StateDict, StateDict] | None


class StepLogState(TypedDict):
    """The steps of the epoch under way.

    Examples:
        >>> StepLogState(losses=[], taken=[], in_a_row=2, looked_at=0)["in_a_row"]
        2
    """

    losses: list[Tensor]
    taken: list[Tensor]
    in_a_row: int
    looked_at: int


class SavedRun(_GlobalState):
    """A run as a checkpoint holds it; only the file has its settings.

    Examples:
        >>> {"seed", "settings"} <= SavedRun.__annotations__.keys()
        True
    """

    settings: NotRequired[RunSettings]
    format: int
    model: StateDict
    policy: StateDict
    optimizer: dict[str, object]
    outer: NotRequired[PolicyOptimizerState]  # where the policy learns
    best: BestEpochState
    log: StepLogState
    positions: dict[str, PositionState]
    generators: list[Tensor]
    seed: int
    history: list[dict[str, float]]
    epoch: int
    steps: int
    seconds: float
