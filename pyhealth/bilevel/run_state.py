"""All that changes during a run of the trainer: what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..models.taskaug_policy import TaskAugPolicy
from ..trainer import is_best
from .checkpoint import CheckpointError
from .distributed import Processes
from .loader_position import (
    LoaderPosition,
    global_random_state,
    set_global_random_state,
)
from .outer import PolicyOptimizer
from .types import BestEpochState, RunSettings, SavedRun, StateDict, StepLogState

__all__ = ["BestEpoch", "RunState", "StepLog", "check_compatible"]

#: Of the checkpoints' layout; a change of it must not be read as the old one.
FORMAT = 1


class RunState:
    """The moving parts of a run, saved and put back as one.

    Args:
        model: the classifier.
        policy: the policy.
        optimizer: of the weights.
        outer: of the policy; None where it is not learned.
        generator: of the policy's draws; each process has its own.
        processes: that train together.
        seed: of the trainer.
        positions: the loaders by their part in the run.
        best: which epoch is best.
        history: one row an epoch; the trainer's own list.

    Attributes:
        epoch: the epoch under way, or the next one, from 0.
        steps: steps of the whole run so far.
        seconds: spent on the epoch under way.
        log: its steps.

    Examples:
        See :class:`~pyhealth.bilevel.trainer.BiLevelTrainer`, which drives it.

        >>> RunState.__name__
        'RunState'
    """

    def __init__(
        self,
        model: nn.Module,
        policy: TaskAugPolicy,
        optimizer: Optimizer,
        outer: PolicyOptimizer | None,
        generator: torch.Generator,
        processes: Processes,
        seed: int,
        positions: Mapping[str, LoaderPosition],
        best: BestEpoch,
        history: list[dict[str, float]],
    ) -> None:
        self.model = model
        self.policy = policy
        self.optimizer = optimizer
        self.outer = outer
        self.generator = generator
        self.processes = processes
        self.seed = seed
        self.positions = dict(positions)
        self.best = best
        self.history = history
        self.epoch = 0
        self.steps = 0
        self.seconds = 0.0
        self.log = StepLog()

    def state_dict(self) -> SavedRun:
        """Return everything that the rest of the run depends on.

        To be called by all processes at once; that of the main one counts.
        """
        state: SavedRun = {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best.state_dict(),
            "log": self.log.state_dict(),
            "positions": {n: p.state_dict() for n, p in self.positions.items()},
            "generators": self.processes.all(self.generator.get_state()),
            "global": global_random_state(),
            "seed": self.seed,
            "history": self.history,
            "epoch": self.epoch,
            "steps": self.steps,
            "seconds": self.seconds,
        }
        if self.outer is not None:
            state["outer"] = self.outer.state_dict()
        return state

    def load_state_dict(self, state: SavedRun) -> None:
        """Go to where :meth:`state_dict` was called.

        Args:
            state: from :meth:`state_dict`, found fit by :func:`check_compatible`.
        """
        self.model.load_state_dict(state["model"])
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.outer is not None:
            self.outer.load_state_dict(state["outer"])
        self.best.load_state_dict(state["best"])
        self.log.load_state_dict(state["log"])
        for name, position in self.positions.items():
            position.load_state_dict(state["positions"][name])
        self.generator.set_state(state["generators"][self.processes.index])
        set_global_random_state(state["global"])  # last: the loaders moved it
        self.history[:] = state["history"]
        self.epoch, self.steps = state["epoch"], state["steps"]
        self.seconds = state["seconds"]

    def ends_early(self, max_seconds: float | None) -> bool:
        """Return whether the run is over before its last epoch.

        Args:
            max_seconds: for all steps; None for any number.
        """
        if max_seconds is None:
            return self.best.exhausted
        spent = sum(row["seconds"] for row in self.history)
        # The main process's clock decides for all.
        return self.best.exhausted or self.processes.from_main(spent) >= max_seconds

    def restore_best(self) -> bool:
        """Put back model and policy of the best epoch; return whether there is one."""
        if self.best.state is None:
            return False
        model, policy = self.best.state
        self.model.load_state_dict(model)
        self.policy.load_state_dict(policy)
        return True


class BestEpoch:
    """Which epoch is best so far, and for how long it has been.

    Args:
        monitor: name of the score.
        criterion: whether its "max" or "min" is best.
        patience: epochs without a new best before the end; None for no end.

    Attributes:
        score: the best score.
        waited: epochs since.
        state: model and policy of that epoch, kept by the caller.

    Examples:
        >>> best = BestEpoch("roc_auc", "max", patience=1)
        >>> best.update({"roc_auc": 0.7}), best.update({"roc_auc": 0.6})
        (True, False)
        >>> best.exhausted
        True
    """

    def __init__(self, monitor: str, criterion: str, patience: int | None) -> None:
        self.monitor = monitor
        self.criterion = criterion
        self.patience = patience
        self.score = -math.inf if criterion == "max" else math.inf
        self.waited = 0
        self.state: tuple[StateDict, StateDict] | None = None

    def update(self, scores: dict[str, float]) -> bool:
        """Take an epoch's scores; return whether it is the best so far."""
        if self.monitor not in scores:
            raise ValueError(
                f"monitor {self.monitor!r} is none of the scores {sorted(scores)}; add "
                "it to metrics=[...]."
            )
        score = scores[self.monitor]
        if math.isnan(score):
            raise ValueError(
                f"The validation score {self.monitor!r} is nan: the validation data "
                "hold one class only. Use more records, or monitor='loss' with "
                "monitor_criterion='min'."
            )
        better = is_best(self.score, score, self.criterion)
        self.score = score if better else self.score
        self.waited = 0 if better else self.waited + 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether the patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> BestEpochState:
        """Return score, waiting time and the epoch's state."""
        return {"score": self.score, "waited": self.waited, "state": self.state}

    def load_state_dict(self, state: BestEpochState) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.score, self.waited = state["score"], state["waited"]
        self.state = state["state"]


class StepLog:
    """The losses of the epoch under way, and which of its steps were taken.

    Attributes:
        in_a_row: steps not taken in a row up to now, as far as :meth:`reached` has
            looked; it goes on over the end of an epoch.

    Examples:
        >>> log = StepLog()
        >>> log.add(torch.tensor(0.5), torch.tensor(True))
        >>> log.add(torch.tensor(math.nan), torch.tensor(False))
        >>> log.reached(2)
        False
        >>> log.close()
        (0.5, 1)
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.taken: list[Tensor] = []
        self.in_a_row = 0
        self._looked_at = 0

    def add(self, loss: Tensor, taken: Tensor) -> None:
        """Note a step; nothing waits for the device."""
        self.losses.append(loss)
        self.taken.append(taken)

    def reached(self, limit: int) -> bool:
        """Return whether so many steps in a row were not taken; waits for the device.

        Args:
            limit: number of steps.
        """
        fresh = [taken.cpu() for taken in self.taken[self._looked_at :]]
        self._looked_at = len(self.taken)
        reached = False
        for taken in torch.stack(fresh).tolist() if fresh else []:
            self.in_a_row = 0 if taken else self.in_a_row + 1
            reached = reached or self.in_a_row >= limit
        return reached

    def close(self) -> tuple[float, int]:
        """End the epoch.

        Returns:
            The mean loss of the steps that were taken, nan if none was, and the number
            of those that were not.
        """
        # Those of a resumed epoch are on the CPU.
        losses = torch.stack([loss.cpu() for loss in self.losses])
        losses = losses[torch.stack([taken.cpu() for taken in self.taken])]
        bad = len(self.taken) - len(losses)
        self.losses, self.taken, self._looked_at = [], [], 0
        return losses.mean().item(), bad

    def state_dict(self) -> StepLogState:
        """Return the epoch's steps so far."""
        return {
            "losses": self.losses,
            "taken": self.taken,
            "in_a_row": self.in_a_row,
            "looked_at": self._looked_at,
        }

    def load_state_dict(self, state: StepLogState) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.losses, self.taken = state["losses"], state["taken"]
        self.in_a_row, self._looked_at = state["in_a_row"], state["looked_at"]


def check_compatible(state: SavedRun, settings: RunSettings, model: nn.Module) -> None:
    """See that a run can go on from a checkpoint, before anything is changed.

    Args:
        state: content of the checkpoint, with its own "settings".
        settings: of this run: group -> name -> plain value.
        model: of this run.

    Raises:
        CheckpointError: which names the first difference.

    Examples:
        >>> state = {"format": 1, "settings": {"policy": {"num_stages": 2}}}
        >>> check_compatible(state, {"policy": {"num_stages": 1}}, nn.Linear(2, 1))
        Traceback (most recent call last):
        pyhealth.bilevel.checkpoint.CheckpointError: The checkpoint's run has policy \
num_stages 2, this one has 1.
    """
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"The checkpoint has format {state.get('format')}, this version reads "
            f"{FORMAT}. Finish the run with the version that began it."
        )
    for group, values in settings.items():
        saved = state["settings"][group]
        for name, value in values.items():
            if saved.get(name) != value and group == "data":
                raise CheckpointError(
                    f"The checkpoint's run has other {name} data: other samples, other "
                    "settings of their preparation, or another batch size."
                )
            if saved.get(name) != value:
                raise CheckpointError(
                    f"The checkpoint's run has {group} {name} {saved.get(name)!r}, "
                    f"this one has {value!r}."
                )
    theirs, own = state["model"], model.state_dict()
    for name in [*own, *theirs]:
        shapes = [tuple(s[name].shape) if name in s else None for s in (theirs, own)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"The checkpoint's model has {name} of shape {shapes[0]}, this one has "
                f"{shapes[1]}."
            )
