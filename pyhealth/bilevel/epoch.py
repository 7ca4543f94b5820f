"""The steps of an epoch, and what is noted of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

from ..models.taskaug_policy import TaskAugPolicy
from .keeper import RunKeeper
from .outer import PolicyOptimizer
from .run_state import RunState
from .settings import TrainingSettings
from .step import BiLevelStep
from .types import Batch

__all__ = ["EpochRunner", "policy_row"]

logger = logging.getLogger("pyhealth.trainer.bilevel")

#: Steps between two updates of the progress bar; each waits for the device.
POSTFIX_EVERY = 10


class EpochRunner:
    """Runs one epoch of a run after the other, up to its evaluation.

    Args:
        step: takes the steps.
        run: the run; it moves.
        keeper: writes checkpoints between the steps.
        settings: of the run.
        on_hypergradient: called with every hypergradient; returns the one to use.

    Examples:
        See :class:`~pyhealth.bilevel.trainer.BiLevelTrainer`, which drives it.

        >>> EpochRunner.__name__
        'EpochRunner'
    """

    def __init__(
        self,
        step: BiLevelStep,
        run: RunState,
        keeper: RunKeeper,
        settings: TrainingSettings,
        on_hypergradient: Callable[[dict[str, Tensor]], dict[str, Tensor]]
        | None = None,
    ) -> None:
        self.step = step
        self.run = run
        self.keeper = keeper
        self.settings = settings
        self.on_hypergradient = on_hypergradient
        self._joint = settings.trains_jointly(run.model)
        self._policy_batches = run.positions["policy"].endless()

    def epoch(self) -> None:
        """Take the steps of the epoch under way, or the rest of them.

        A row is added to the run's history.

        Raises:
            ArithmeticError: if too many steps in a row are not finite.
            TrainingInterrupted: after a signal.
        """
        run, position = self.run, self.run.positions["train"]
        outer = run.outer if run.epoch >= self.settings.warmup_epochs else None
        started = time.perf_counter() - run.seconds
        bar = tqdm(
            position.batches(),
            desc=f"Epoch {run.epoch} / {self.settings.epochs}",
            total=len(position.loader),
            disable=not run.processes.is_main,
            initial=position.taken,
            leave=False,
        )
        with bar:
            for batch in bar:
                index = position.taken - 1
                loss = self._take(batch, index, outer)
                run.seconds = time.perf_counter() - started
                shows = index % POSTFIX_EVERY == 0
                # On a GPU this waits for the device, so not after every step.
                if loss.device.type == "cpu" or shows or self.keeper.due(run):
                    self._stop_if_hopeless()
                if shows:
                    bar.set_postfix(self._postfix(loss))
                self.keeper.after_step(run)
        self._close(outer)

    def _take(self, batch: Batch, index: int, outer: PolicyOptimizer | None) -> Tensor:
        """Take one step; return its training loss."""
        step = self.step
        if outer is not None and index % self.settings.outer_every == 0:
            loss, gradient = step.inner_and_outer(batch, next(self._policy_batches))
            if self.on_hypergradient is not None:
                gradient = self.on_hypergradient(gradient)
            outer.add(gradient, step.finite)
        else:
            loss = step.inner(batch, self._joint)
        self.run.log.add(loss, step.finite)
        self.run.steps += 1
        return loss

    def _stop_if_hopeless(self) -> None:
        run, limit = self.run, self.settings.max_bad_steps
        if not run.log.reached(limit):
            return
        restored = run.restore_best()
        state = "those of the best epoch" if restored else "as before these steps"
        raise ArithmeticError(
            f"{limit} steps in a row were not finite (the last training "
            f"loss is {run.log.losses[-1].item():.3g}) in epoch {run.epoch}; weights "
            f"and policy are {state}. Take a smaller inner_lr, and look for records "
            "with extreme values."
        )

    def _close(self, outer: PolicyOptimizer | None) -> None:
        """Note the epoch in the history."""
        run = self.run
        train_loss, bad_steps = run.log.close()
        if bad_steps:
            logger.warning(
                "epoch %d: %d steps were not finite and not taken", run.epoch, bad_steps
            )
        norm, ratio = (math.nan, math.nan) if outer is None else outer.statistics()
        run.history.append(
            {
                "epoch": run.epoch,
                "train_loss": train_loss,
                "hypergradient_norm": norm,
                "hypergradient_snr": ratio,
                "bad_steps": bad_steps,
                "seconds": run.seconds,
                **policy_row(run.policy),
            }
        )
        run.seconds = 0.0

    def _postfix(self, loss: Tensor) -> dict[str, str]:
        shown = {"loss": f"{loss.item():.3f}"}
        last = self.run.history[-1] if self.run.history else {}
        if "roc_auc" in last:
            shown["AUROC"] = f"{last['roc_auc']:.3f}"
        if not math.isnan(last.get("hypergradient_snr", math.nan)):
            shown["SNR"] = f"{last['hypergradient_snr']:.1f}"
        policy = self.run.policy
        top = policy.probabilities().max(dim=-1)
        for stage, (share, column) in enumerate(zip(*top, strict=True)):
            name = policy.op_names[int(column)]
            shown[f"stage {stage}"] = f"{name} {share:.2f}"
        return shown


def policy_row(policy: TaskAugPolicy) -> dict[str, float]:
    """Return a policy as the entries of a row of the history.

    Args:
        policy: the policy.

    Returns:
        Its probabilities, and its magnitudes in the operations' units.

    Examples:
        >>> row = policy_row(TaskAugPolicy(1, operations=["no_op", "time_mask"]))
        >>> row["probability/0/time_mask"]
        0.5
    """
    row = {}
    for _, entry in policy.to_frame().iterrows():
        for column in ("probability", "magnitude_neg", "magnitude_pos"):
            row[f"{column}/{entry['stage']}/{entry['operation']}"] = entry[column]
    return row
