"""Keeping a run on the disk: how it begins or goes on, when it is written and ends."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Self, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..datasets.sample_dataset import SampleDataset
from ..models.base_model import BaseModel
from ..models.taskaug_policy import TaskAugPolicy
from .checkpoint import CheckpointFolder
from .distributed import Processes
from .interruption import StopSignals, TrainingInterrupted
from .run_state import RunState, check_compatible
from .types import Batch, RunSettings, SavedRun

__all__ = ["RunKeeper", "settings_of_run"]

logger = logging.getLogger("pyhealth.trainer.bilevel")

#: Arguments of ``train`` that may differ in the run that goes on.
FREE_ARGUMENTS = (
    "epochs",
    "max_seconds",
    "load_best_model_at_last",
    "resume",
    "checkpoint_every",
)

#: Steps after which processes ask each other whether one has received a signal.
STEPS_BETWEEN_QUESTIONS = 10


class RunKeeper:
    """Reads and writes the checkpoints of one run, and heeds signals meanwhile.

    Args:
        exp_path: folder of the run; None keeps nothing, and signals do what they do.
        resume: whether to go on from the newest checkpoint, or the path of one.
        every: steps between two checkpoints; None for the ends of epochs only.
        processes: that train together; the main one alone touches the disk.

    Raises:
        ValueError: if there is no folder for ``resume`` or ``every``.

    Examples:
        See :class:`~pyhealth.bilevel.trainer.BiLevelTrainer`, which drives it.

        >>> RunKeeper(None, resume=True)
        Traceback (most recent call last):
        ValueError: resume and checkpoint_every need a folder; build the trainer with \
enable_logging=True.
    """

    def __init__(
        self,
        exp_path: str | None,
        resume: bool | str = False,
        every: int | None = None,
        processes: Processes | None = None,
    ) -> None:
        if exp_path is None and (resume or every):
            raise ValueError(
                "resume and checkpoint_every need a folder; build the trainer with "
                "enable_logging=True."
            )
        self.resume = resume
        self.every = every
        self.processes = Processes("cpu") if processes is None else processes
        self.settings: RunSettings = {}
        self.folder = None
        if exp_path is not None:
            self.folder = CheckpointFolder(os.path.join(exp_path, "checkpoints"))
        self._signals = StopSignals(enabled=exp_path is not None)

    def begin(self, settings: RunSettings, model: nn.Module) -> SavedRun | None:
        """See that checkpoints can be written, and read the one to go on from.

        Args:
            settings: of this run, see :func:`settings_of_run`.
            model: of this run.

        Returns:
            The checkpoint, fit for this run; None to start anew.

        Raises:
            OSError: if checkpoints cannot be written.
            CheckpointError: if there is a checkpoint that cannot be used.
        """
        self.settings = settings
        saved = self._read(model) if self.processes.is_main else None
        return self.processes.from_main(saved)

    def _read(self, model: nn.Module) -> SavedRun | None:
        if self.folder is None:
            return None
        # Weights, Adam's two moments, the best epoch.
        self.folder.prepare(4 * sum(value.nbytes for value in _tensors(model)))
        if not self.resume:
            return None
        resume = self.resume
        found = self.folder.newest() if resume is True else self.folder.read(resume)
        if found is None:
            return None
        saved = cast(SavedRun, found)  # as far as its format says, seen to first
        check_compatible(saved, self.settings, model)
        logger.info("Going on from %s", self.folder.last)
        return saved

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._signals.__exit__(*error)

    def due(self, run: RunState) -> bool:
        """Return whether :meth:`after_step` may write."""
        every = self.every is not None and run.steps % self.every == 0
        return every or self._asks_now(run)

    def after_step(self, run: RunState) -> None:
        """Write a checkpoint if one is due; leave if a signal came.

        Args:
            run: the run, between two steps.

        Raises:
            TrainingInterrupted: after a signal.
        """
        signal_number = self._signal() if self._asks_now(run) else 0
        every = self.every is not None and run.steps % self.every == 0
        # Not amid steps that were not finite: the one before them may be better.
        if signal_number or (every and not run.log.in_a_row):
            self.write(run)
        self._leave(signal_number)

    def after_epoch(self, run: RunState) -> None:
        """Write a checkpoint; leave if a signal came.

        Args:
            run: the run, between two epochs.

        Raises:
            TrainingInterrupted: after a signal.
        """
        self.write(run)
        self._leave(self._signal())

    def write(self, run: RunState) -> None:
        """Write a checkpoint."""
        if self.folder is None:
            return
        state = run.state_dict()
        if self.processes.is_main:
            self.folder.write({"settings": self.settings, **state}, run.steps)

    def _asks_now(self, run: RunState) -> bool:
        # Processes must leave after the same step, so they ask each other, not always.
        if self.processes.count > 1:
            return run.steps % STEPS_BETWEEN_QUESTIONS == 0
        return self._signals.received is not None

    def _signal(self) -> int:
        return self.processes.largest(self._signals.received or 0)

    def _leave(self, signal_number: int) -> None:
        if signal_number and self.folder is not None:  # without it none is noted
            raise TrainingInterrupted(
                f"Training was stopped by a signal; {self.folder.last} is written. Go "
                "on with the same command and resume=True.",
                signal_number,
            )


def settings_of_run(
    model: BaseModel,
    policy: TaskAugPolicy,
    arguments: Mapping[str, object],
    seed: int | None,
    loaders: Mapping[str, DataLoader[Batch]],
) -> RunSettings:
    """Return all that decides a run, as plain values, in the order to compare.

    Args:
        model: the classifier.
        policy: the policy.
        arguments: of ``train``, plain values.
        seed: of the trainer, if it was given.
        loaders: of the training and the policy's data, by name.

    Returns:
        Values by name, in groups.

    Examples:
        >>> settings_of_run(model, policy, {"epochs": 3}, 0, {})  # doctest: +SKIP
    """
    names = ["num_stages", "op_names", "shared_magnitudes", "temperature"]
    names += ["selection", "sampling_rate", "dropout_by"]
    compared = {
        name: value for name, value in arguments.items() if name not in FREE_ARGUMENTS
    }
    return {
        "task": {
            "name": model.dataset.task_name,
            "labels": list(model.label_keys),
            "mode": model.mode,
        },
        "policy": {name: getattr(policy, name) for name in names},
        "data": {name: _digest(loader) for name, loader in loaders.items()},
        "argument": {**compared, "seed": seed},
    }


def _digest(loader: DataLoader[Batch]) -> str:
    """Digest which samples there are, how they are made and in what batches."""
    dataset = loader.dataset
    if isinstance(dataset, SampleDataset):
        schemas = (dataset.input_schema, dataset.output_schema)
        content = repr((schemas, sorted(dataset.patient_to_index.items())))
    else:
        content = str(len(loader))
    content = f"{content} in batches of {loader.batch_size}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())
