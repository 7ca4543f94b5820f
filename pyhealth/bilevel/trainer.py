"""Bi-level training of an ECG classifier and its augmentation policy."""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..models.taskaug_policy import TaskAugPolicy
from ..trainer import Trainer, _cpu_state_dict
from .batchnorm import clean_statistics, reestimate_batchnorm
from .checkpoint import write_whole
from .checks import check_label, check_loaders, check_same_kind, expected_scores
from .classifier import augmented_by_trainer, classifier_parameters
from .distributed import Processes, read_whole
from .epoch import EpochRunner
from .keeper import RunKeeper, settings_of_run
from .loader_position import LoaderPosition, view_of
from .outer import PolicyOptimizer, tell_policy
from .run_state import BestEpoch, RunState
from .settings import TrainingSettings, usual_outer_loss
from .step import BiLevelStep, OuterMethod
from .types import Batch

__all__ = ["BiLevelTrainer"]

# Below PyHealth's trainer, whose log file then gets these lines too.
logger = logging.getLogger("pyhealth.trainer.bilevel")


class BiLevelTrainer(Trainer):
    """Trains the weights on augmented data and the policy on clean validation data.

    A PyHealth ``Trainer``: ``evaluate``, ``inference``, ``save_ckpt``, ``load_ckpt``
    and logging are inherited. After ``train``, ``history`` holds one dict an epoch:
    epoch (from 0), train_loss, the validation scores, hypergradient_norm and
    hypergradient_snr (norm of the logits' mean hypergradient over its standard error;
    near 1 it is noise), bad_steps (not taken because loss, gradient or hypergradient
    was not finite), seconds, and the policy: ``probability/<stage>/<operation>``,
    ``magnitude_neg/...`` and ``magnitude_pos/...`` in the operations' units.
    ``policy_p_value`` tells whether the hypergradients of the whole run had a direction
    at all (nan where the policy did not learn); above 0.05 a warning says so.

    With logging, a run is kept on the disk and can go on after a crash or a signal from
    where it was: see ``resume``. SIGTERM and Ctrl-C end it after the step or evaluation
    under way and a checkpoint, with
    :class:`~pyhealth.bilevel.interruption.TrainingInterrupted`; a second one at once.

    Args:
        model: a :class:`~pyhealth.models.taskaug_resnet.TaskAugResNet` or, if a policy
            is given, any PyHealth model of one signal, ``input_key``.
        checkpoint_path: checkpoint to load.
        metrics: names of the validation scores, see PyHealth's metrics.
        device: default CUDA if there is one; in a launch of several processes "cpu", or
            each process's own GPU.
        enable_logging: write a log, last.ckpt, best.ckpt and checkpoints/ to go on from
            below ``output_path``.
        output_path: default ``./output``.
        exp_name: name of the run's folder; default the time.
        policy: the augmentation policy; default the model's own.
        input_key: the signals' key in a batch.
        seed: of the policy's draws; one seed repeats a run to the bit on one machine,
            if the loaders are seeded too. Default: drawn from torch's generator.
        precision: of the training's forward passes, "fp32" or "bf16" (autocast). bf16
            is fast on GPUs and on CPUs with AMX or AVX512-BF16, and slow on others.
            Evaluation is in float32.

    Raises:
        ValueError: if there is no policy, or the policy's magnitudes are of two classes
            and the model's label is not binary.

    Source:
        Raghu et al., CHIL 2022, algorithm 1. Departures: the derivative of one inner
        step, by enumeration or exactly through the signals; a ranking loss on the
        validation data; the validation forward uses the running statistics, as at test
        time.

    Examples:
        >>> trainer = BiLevelTrainer(model, metrics=["roc_auc"])  # doctest: +SKIP
        >>> trainer.train(train_loader, val_loader, epochs=20)  # doctest: +SKIP
        >>> trainer.policy.to_frame()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint_path: str | None = None,
        metrics: list[str] | None = None,
        device: str | None = None,
        enable_logging: bool = True,
        output_path: str | None = None,
        exp_name: str | None = None,
        policy: TaskAugPolicy | None = None,
        input_key: str = "ecg",
        seed: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        if policy is None:
            policy = getattr(model, "policy", None)
            if not isinstance(policy, TaskAugPolicy):
                raise ValueError(
                    f"{type(model).__name__} has no policy of its own; pass policy=..."
                )
        self.policy = policy
        check_label(model, policy)
        self.input_key = input_key
        self.precision = precision
        self.history: list[dict[str, float]] = []
        self.policy_p_value = math.nan
        self._seed_is_given = seed is not None
        if seed is None:
            seed = int(torch.randint(2**31 - 1, ()).item())
        self.processes = processes = Processes(device)
        self.seed = processes.from_main(seed)
        self._generator = torch.Generator().manual_seed(self.seed + processes.index)
        super().__init__(
            model,
            checkpoint_path,
            metrics,
            self.processes.device,
            enable_logging and self.processes.is_main,
            output_path,
            exp_name,
        )
        self.exp_path: str | None = self.processes.from_main(self.exp_path)
        self.policy.to(self.device)

    def train(
        self,
        train_dataloader: DataLoader[Batch],
        val_dataloader: DataLoader[Batch],
        test_dataloader: DataLoader[Batch] | None = None,
        epochs: int = 5,
        inner_lr: float = 1e-3,
        outer_lr: float = 3e-2,
        warmup_epochs: int = 1,
        hypergradient: OuterMethod | None = "alignment",
        neumann_terms: int = 1,
        neumann_lr: float | None = None,
        outer_every: int = 1,
        accumulate: int = 1,
        policy_dataloader: DataLoader[Batch] | None = None,
        val_statistics: Literal["running", "batch"] = "running",
        outer_loss: Literal["model", "ranking", "calibrated"] | None = None,
        alignment_records: int = 64,
        micro_batch: int | None = None,
        weight_decay: float = 0.0,
        monitor: str = "roc_auc",
        monitor_criterion: Literal["max", "min"] = "max",
        load_best_model_at_last: bool = True,
        patience: int | None = None,
        max_seconds: float | None = None,
        on_epoch: Callable[[Self], None] | None = None,
        on_hypergradient: Callable[[dict[str, Tensor]], dict[str, Tensor]]
        | None = None,
        resume: bool | str = False,
        checkpoint_every: int | None = None,
        max_bad_steps: int = 10,
        reestimate_statistics: bool = False,
    ) -> None:
        """Train weights and policy.

        Args:
            train_dataloader: training data; every batch is augmented by the policy.
            val_dataloader: validation data, never augmented; it picks the best epoch.
            test_dataloader: evaluated once, at the end.
            epochs: passes over the training data.
            inner_lr: learning rate of the weights (Adam).
            outer_lr: learning rate of the policy (Adam).
            warmup_epochs: first epochs without outer steps.
            hypergradient: "alignment", see
                :func:`~pyhealth.bilevel.alignment.alignment_gradient`; "one_step",
                "neumann" or "darts", see
                :func:`~pyhealth.bilevel.hypergradient.hypergradient`; None keeps the
                policy as it is (or, if ``model.train_policy_jointly``, trains it on the
                training loss, for comparison).
            neumann_terms: Hessian products of "neumann".
            neumann_lr: step of its series; default ``inner_lr``.
            outer_every: inner steps an outer step.
            accumulate: hypergradients that are averaged for one step of the policy;
                those of single batches are mostly noise.
            policy_dataloader: validation data for the policy; default those of
                ``val_dataloader``, in an order of its own.
            val_statistics: "running" or "batch" BatchNorm statistics in the outer loss.
            outer_loss: what the policy lowers on the validation data: the "model"'s
                own loss, or "ranking" or "calibrated", see
                :mod:`pyhealth.bilevel.outer_loss`; default "ranking" where the label is
                binary, else "model".
            alignment_records: training records that "alignment" enumerates in a step,
                of all processes together, shared out among the stages; each costs about
                as much as ten records of a training step.
            micro_batch: largest number of records in one pass, to save memory, with
                the same numbers; see :class:`~pyhealth.bilevel.step.BiLevelStep` for
                what can be split.
            weight_decay: L2 penalty of the weights, not of the policy.
            monitor: validation score that picks the best epoch.
            monitor_criterion: whether the "max" or "min" of it is best.
            load_best_model_at_last: end with the best epoch's weights and policy.
            patience: epochs without a new best before the training stops.
            max_seconds: training ends, even before ``epochs``, after the epoch in which
                its steps have taken so long (evaluations are not counted): to compare
                methods at equal time. A run that goes on may have another number.
            on_epoch: called with the trainer after each epoch, to save its history.
            on_hypergradient: called with every hypergradient by the names of the
                policy's parameters; what it returns is used in its place. For controls.
                Each process calls it with the same numbers and has to get the same; a
                state of its own is not in the checkpoints.
            resume: go on from the newest checkpoint of this run's folder, or start anew
                where there is none, so that one command begins and continues a run; or
                the path of a checkpoint. All other arguments must be the same, but
                ``epochs`` may be more. With the same seeds, data and machine the end is
                the same to the bit as without the interruption.
            checkpoint_every: steps between two checkpoints; one is written at the end
                of each epoch in any case.
            max_bad_steps: steps in a row that are not finite, and so not taken, before
                the run ends with an error.
            reestimate_statistics: evaluate with BatchNorm statistics of the clean
                training data (one more forward pass over them an epoch) in place of
                those that the augmented batches left. They are part of what is saved;
                the training goes on with its own.

        Raises:
            ValueError: if an argument cannot be used, the monitored score is nan, or
                the checkpoint is of another run.
            OSError: if checkpoints cannot be written; the last good one is kept.
            ArithmeticError: if too many steps in a row are not finite (model and policy
                are then those of the best epoch), or a Neumann series diverges.
            TrainingInterrupted: after a signal.
        """
        outer_loss = outer_loss or usual_outer_loss(self.model)
        if policy_dataloader is None:
            policy_dataloader = val_dataloader
        settings = TrainingSettings.among(locals())
        own_scores = type(self).evaluate is not Trainer.evaluate  # of a subclass
        scores = None if own_scores else expected_scores(self.model, self.metrics)
        settings.check(self.model, self.policy, scores)
        loaders = {
            "training": train_dataloader,
            "validation": val_dataloader,
            "policy": policy_dataloader,
        }
        check_loaders(**loaders)
        for loader in loaders.values():
            read_whole(loader.dataset, self.processes)
        keeper = RunKeeper(self.exp_path, resume, checkpoint_every, self.processes)
        identity = settings_of_run(
            self.model,
            self.policy,
            {
                **asdict(settings),
                "processes": self.processes.count,
                "precision": self.precision,
            },
            self.seed if self._seed_is_given else None,
            {"training": train_dataloader, "validation": policy_dataloader},
        )
        saved = keeper.begin(identity, self.model)
        if saved is not None:
            self.seed = saved["seed"]
        self.history = []
        step = self._step(settings)
        run = self._run(settings, step, loaders)
        if saved is None and self.processes.count > 1:  # all begin as the main one
            saved = self.processes.from_main(run.state_dict())
        if saved is not None:
            run.load_state_dict(saved)
        runner = EpochRunner(step, run, keeper, settings, on_hypergradient)
        clean = view_of(train_dataloader, shuffle=False)
        with augmented_by_trainer(self.model), keeper:
            keeper.write(run)
            while run.epoch < epochs and not run.ends_early(max_seconds):
                runner.epoch()
                with clean_statistics(self.model, clean, reestimate_statistics):
                    self._evaluate_epoch(val_dataloader, run.best)
                if on_epoch is not None and self.processes.is_main:
                    on_epoch(self)
                run.epoch += 1
                keeper.after_epoch(run)  # last: what is not in it is done again
        self.policy_p_value = run.outer.p_value() if run.outer else math.nan
        if self.processes.is_main:
            tell_policy(self.policy_p_value)
        if run.best.exhausted:
            logger.info("Early stopping after epoch %d", run.epoch - 1)
        restored = load_best_model_at_last and run.restore_best()
        if reestimate_statistics and not restored:
            reestimate_batchnorm(self.model, clean)
        if test_dataloader is not None:
            logger.info("Test: %s", self.evaluate(test_dataloader))

    def save_ckpt(self, ckpt_path: str) -> None:
        """Save the model, and beside it a policy that is not part of it."""
        content = io.BytesIO()
        super().save_ckpt(content)
        write_whole(ckpt_path, content.getvalue())
        if not self._owns_policy():
            write_whole(f"{ckpt_path}.policy.json", self.policy.to_json().encode())

    def load_ckpt(self, ckpt_path: str) -> None:
        """Load what :meth:`save_ckpt` wrote.

        Raises:
            ValueError: if the policy beside the model has other operations or stages
                than this trainer's.
        """
        if self._owns_policy():
            super().load_ckpt(ckpt_path)
            return
        path = f"{ckpt_path}.policy.json"
        saved = TaskAugPolicy.load(path)
        check_same_kind(saved, self.policy, path)
        super().load_ckpt(ckpt_path)
        self.policy.load_state_dict(saved.state_dict())

    def _evaluate_epoch(self, loader: DataLoader[Batch], best: BestEpoch) -> None:
        row = self.history[-1]
        scores = {name: float(v) for name, v in self.evaluate(loader).items()}
        scores = self.processes.from_main(scores)  # all decide alike
        row.update(scores)
        shown = {"train_loss": row["train_loss"], **scores}
        logger.log(
            logging.INFO if self.processes.is_main else logging.DEBUG,
            "epoch %d: %s",
            row["epoch"],
            ", ".join(f"{name} {value:.4f}" for name, value in shown.items()),
        )
        if best.update(scores):
            best.state = (_cpu_state_dict(self.model), _cpu_state_dict(self.policy))
        if self.exp_path is not None and self.processes.is_main:
            self.save_ckpt(os.path.join(self.exp_path, "last.ckpt"))
            if best.waited == 0:
                self.save_ckpt(os.path.join(self.exp_path, "best.ckpt"))

    def _step(self, settings: TrainingSettings) -> BiLevelStep:
        params = classifier_parameters(self.model, self.policy)
        groups = [{"params": [*params.values()], "weight_decay": settings.weight_decay}]
        if settings.trains_jointly(self.model):
            groups.append({"params": [*self.policy.parameters()]})
        fused = self.policy.logits.is_cuda or None
        several = self.processes.count > 1
        return BiLevelStep(
            self.model,
            self.policy,
            params,
            torch.optim.Adam(groups, lr=settings.inner_lr, fused=fused),
            self.input_key,
            self.model.label_keys[0],
            self._generator,
            method=settings.hypergradient or "one_step",
            neumann_terms=settings.neumann_terms,
            neumann_lr=settings.series_lr,
            val_statistics=settings.val_statistics,
            outer_loss=settings.outer_loss,
            alignment_records=-(-settings.alignment_records // self.processes.count),
            micro_batch=settings.micro_batch,
            average=self.processes.average if several else None,
            gather=self.processes.gather if several else None,
            precision=self.precision,
        )

    def _run(
        self,
        settings: TrainingSettings,
        step: BiLevelStep,
        loaders: Mapping[str, DataLoader[Batch]],
    ) -> RunState:
        # The policy's validation data come in an order of their own.
        policy_loader = view_of(loaders["policy"], shuffle=True, seed=self.seed)
        return RunState(
            self.model,
            self.policy,
            step.optimizer,
            PolicyOptimizer(self.policy, settings.outer_lr, settings.accumulate)
            if settings.learns(self.policy)
            else None,
            self._generator,
            self.processes,
            self.seed,
            {
                "train": LoaderPosition(loaders["training"], self._share),
                "policy": LoaderPosition(policy_loader, self._share),
                "val": LoaderPosition(loaders["validation"]),
            },
            BestEpoch(settings.monitor, settings.monitor_criterion, settings.patience),
            self.history,
        )

    def _share(self, batch: Batch) -> Batch | None:
        return self.processes.share(batch, len(batch[self.input_key]))

    def _owns_policy(self) -> bool:
        return any(module is self.policy for module in self.model.modules())
