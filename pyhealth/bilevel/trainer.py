"""Bi-level training of an ECG classifier and its augmentation policy."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..datasets import SampleDataset, get_dataloader
from ..models.taskaug_policy import TaskAugPolicy
from ..trainer import Trainer, _cpu_state_dict, is_best
from .hypergradient import METHODS, Method
from .step import Batch, BiLevelStep, classifier_parameters

__all__ = ["BiLevelTrainer"]

# Below PyHealth's trainer, whose log file then gets these lines too.
logger = logging.getLogger("pyhealth.trainer.bilevel")

#: Steps between two updates of the progress bar; each waits for the device.
POSTFIX_EVERY = 10


class BiLevelTrainer(Trainer):
    """Trains the weights on augmented data and the policy on clean validation data.

    A PyHealth ``Trainer``: ``evaluate``, ``inference``, ``save_ckpt``, ``load_ckpt``
    and logging are inherited. After ``train``, ``history`` holds one dict an epoch:
    epoch (from 0), train_loss, the validation scores, hypergradient_norm and
    hypergradient_snr (norm of the logits' mean hypergradient over its standard error;
    near 1 it is noise), seconds, and the policy: ``probability/<stage>/<operation>``,
    ``magnitude_neg/...`` and ``magnitude_pos/...`` in the operations' units.

    Args:
        model: a :class:`~pyhealth.models.taskaug_resnet.TaskAugResNet` or, if a policy
            is given, any PyHealth model of one signal, ``input_key``.
        checkpoint_path: checkpoint to load.
        metrics: names of the validation scores, see PyHealth's metrics.
        device: default CUDA if there is one.
        enable_logging: write a log, last.ckpt and best.ckpt below ``output_path``.
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
        ValueError: if there is no policy.

    Source:
        Raghu et al., CHIL 2022, algorithm 1. Departures: the exact one-step derivative
        by default; the validation forward uses the running statistics, as at test time.

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
        own = getattr(model, "policy", None)
        if policy is None and not isinstance(own, TaskAugPolicy):
            raise ValueError(
                f"{type(model).__name__} has no policy of its own; pass policy=..."
            )
        self.policy = own if policy is None else policy
        self.input_key = input_key
        self.precision = precision
        self.history: list[dict[str, float]] = []
        if seed is None:
            seed = int(torch.randint(2**31 - 1, ()).item())
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        super().__init__(
            model,
            checkpoint_path,
            metrics,
            device,
            enable_logging,
            output_path,
            exp_name,
        )
        self.policy.to(self.device)

    def train(
        self,
        train_dataloader: DataLoader,
        val_dataloader: DataLoader,
        test_dataloader: DataLoader | None = None,
        epochs: int = 5,
        inner_lr: float = 1e-3,
        outer_lr: float = 1e-2,
        warmup_epochs: int = 1,
        hypergradient: Method | None = "one_step",
        neumann_terms: int = 1,
        neumann_lr: float | None = None,
        outer_every: int = 1,
        accumulate: int = 1,
        policy_dataloader: DataLoader | None = None,
        val_statistics: Literal["running", "batch"] = "running",
        weight_decay: float = 0.0,
        monitor: str = "roc_auc",
        monitor_criterion: Literal["max", "min"] = "max",
        load_best_model_at_last: bool = True,
        patience: int | None = None,
        on_epoch: Callable[[Self], None] | None = None,
    ) -> None:
        """Train weights and policy.

        Args:
            train_dataloader: training data; every batch is augmented by the policy.
            val_dataloader: validation data, never augmented; it picks the best epoch.
            test_dataloader: evaluated once, at the end.
            epochs: passes over the training data.
            inner_lr: learning rate of the weights (Adam).
            outer_lr: learning rate of the policy (RMSprop).
            warmup_epochs: first epochs without outer steps.
            hypergradient: "one_step", "neumann" or "darts", see
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
            weight_decay: L2 penalty of the weights.
            monitor: validation score that picks the best epoch.
            monitor_criterion: whether the "max" or "min" of it is best.
            load_best_model_at_last: end with the best epoch's weights and policy.
            patience: epochs without a new best before the training stops.
            on_epoch: called with the trainer after each epoch, to save its history.

        Raises:
            ValueError: if an argument cannot be used, or the monitored score is nan.
            ArithmeticError: if the loss is not finite, or a Neumann series diverges.
        """
        self._check(hypergradient, epochs, outer_every, accumulate, val_statistics)
        params = classifier_parameters(self.model, self.policy)
        joint = hypergradient is None and getattr(
            self.model, "train_policy_jointly", False
        )
        trained = [*params.values(), *(self.policy.parameters() if joint else ())]
        step = BiLevelStep(
            self.model,
            self.policy,
            params,
            torch.optim.Adam(trained, lr=inner_lr, weight_decay=weight_decay),
            self.input_key,
            self.model.label_keys[0],
            self._generator,
            method=hypergradient or "one_step",
            neumann_terms=neumann_terms,
            neumann_lr=inner_lr if neumann_lr is None else neumann_lr,
            val_statistics=val_statistics,
            precision=self.precision,
        )
        learns = hypergradient is not None and self.policy.num_stages > 0
        outer = _Outer(self.policy, outer_lr, accumulate) if learns else None
        batches = self._policy_batches(
            val_dataloader if policy_dataloader is None else policy_dataloader
        )
        self.history = []
        best = _Best(monitor, monitor_criterion, patience)
        with _augmented_by_trainer(self.model):
            for epoch in range(epochs):
                active = outer if epoch >= warmup_epochs else None
                self._run_epoch(
                    epoch,
                    epochs,
                    train_dataloader,
                    batches,
                    step,
                    active,
                    outer_every,
                    joint,
                )
                self._evaluate_epoch(val_dataloader, best)
                if on_epoch is not None:
                    on_epoch(self)
                if best.exhausted:
                    logger.info("Early stopping after epoch %d", epoch)
                    break
        if load_best_model_at_last and best.state is not None:
            self._restore(best.state)
        if test_dataloader is not None:
            logger.info("Test: %s", self.evaluate(test_dataloader))

    def save_ckpt(self, ckpt_path: str) -> None:
        """Save the model, and beside it a policy that is not part of it."""
        super().save_ckpt(ckpt_path)
        if not self._owns_policy():
            self.policy.save(f"{ckpt_path}.policy")

    def load_ckpt(self, ckpt_path: str) -> None:
        """Load what :meth:`save_ckpt` wrote."""
        super().load_ckpt(ckpt_path)
        if not self._owns_policy():
            saved = TaskAugPolicy.load(f"{ckpt_path}.policy")
            self.policy.load_state_dict(saved.state_dict())

    def _check(self, method, epochs, outer_every, accumulate, val_statistics) -> None:
        if method is not None and method not in METHODS:
            raise ValueError(
                f"hypergradient must be one of {list(METHODS)} or None, got {method!r}."
            )
        for name, value in (
            ("epochs", epochs),
            ("outer_every", outer_every),
            ("accumulate", accumulate),
        ):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        if val_statistics not in ("running", "batch"):
            raise ValueError(
                f"val_statistics must be 'running' or 'batch', got {val_statistics!r}."
            )
        if method == "darts" and not self.policy.shared_magnitudes:
            logger.warning(
                "hypergradient='darts' with class-specific magnitudes rewards a policy "
                "that writes the label into the signal. It is for comparison only."
            )

    def _run_epoch(
        self,
        epoch: int,
        epochs: int,
        loader: DataLoader,
        val_batches: Iterator[Batch],
        step: BiLevelStep,
        outer: _Outer | None,
        outer_every: int,
        joint: bool,
    ) -> None:
        started = time.perf_counter()
        losses: list[Tensor] = []
        with tqdm(loader, desc=f"Epoch {epoch} / {epochs}", leave=False) as bar:
            for index, batch in enumerate(bar):
                if outer is not None and index % outer_every == 0:
                    loss, gradient = step.inner_and_outer(batch, next(val_batches))
                    outer.add(gradient)
                else:
                    loss = step.inner(batch, joint)
                losses.append(loss)
                if index % POSTFIX_EVERY == 0:
                    bar.set_postfix(self._postfix(loss))
        train_loss = torch.stack(losses).mean().item()
        if not math.isfinite(train_loss):
            raise ArithmeticError(
                f"The training loss is {train_loss} in epoch {epoch}. Take a "
                "smaller inner_lr, and look for records with extreme values."
            )
        norm, ratio = (math.nan, math.nan) if outer is None else outer.statistics()
        self.history.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "hypergradient_norm": norm,
                "hypergradient_snr": ratio,
                "seconds": time.perf_counter() - started,
                **_policy_row(self.policy),
            }
        )

    def _evaluate_epoch(self, loader: DataLoader, best: _Best) -> None:
        row = self.history[-1]
        scores = {name: float(v) for name, v in self.evaluate(loader).items()}
        row.update(scores)
        shown = {"train_loss": row["train_loss"], **scores}
        logger.info(
            "epoch %d: %s",
            row["epoch"],
            ", ".join(f"{name} {value:.4f}" for name, value in shown.items()),
        )
        if best.update(scores):
            best.state = (_cpu_state_dict(self.model), _cpu_state_dict(self.policy))
        if self.exp_path is not None:
            self.save_ckpt(os.path.join(self.exp_path, "last.ckpt"))
            if best.waited == 0:
                self.save_ckpt(os.path.join(self.exp_path, "best.ckpt"))

    def _postfix(self, loss: Tensor) -> dict[str, str]:
        shown = {"loss": f"{loss.item():.3f}"}
        if self.history and "roc_auc" in self.history[-1]:
            shown["AUROC"] = f"{self.history[-1]['roc_auc']:.3f}"
        top = self.policy.probabilities().max(dim=-1)
        for stage, (share, column) in enumerate(zip(*top, strict=True)):
            name = self.policy.op_names[int(column)]
            shown[f"stage {stage}"] = f"{name} {share:.2f}"
        return shown

    def _policy_batches(self, loader: DataLoader) -> Iterator[Batch]:
        """Yield validation batches without end, in an order of their own.

        A streaming dataset is its own iterator, so evaluation in between would upset
        this one: it gets a view of the same data for itself.
        """
        if isinstance(loader.dataset, SampleDataset):
            view = loader.dataset.subset(range(len(loader.dataset)))
            loader = get_dataloader(
                view, loader.batch_size, shuffle=True, seed=self.seed
            )
        while True:
            yield from loader

    def _owns_policy(self) -> bool:
        return any(module is self.policy for module in self.model.modules())

    def _restore(self, state: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
        self.model.load_state_dict(state[0])
        self.policy.load_state_dict(state[1])


class _Outer:
    """The policy's optimiser, with an average over several hypergradients."""

    def __init__(self, policy: TaskAugPolicy, lr: float, accumulate: int) -> None:
        self.params = dict(policy.named_parameters())
        self.optimizer = torch.optim.RMSprop(self.params.values(), lr=lr)
        self.accumulate = accumulate
        self.waiting: list[dict[str, Tensor]] = []
        self.seen: list[Tensor] = []

    def add(self, gradient: dict[str, Tensor]) -> None:
        """Take one hypergradient; step the policy when there are enough."""
        bad = [name for name, value in gradient.items() if not value.isfinite().all()]
        if bad:
            raise ArithmeticError(
                f"The hypergradient of {', '.join(bad)} is not finite; the policy was "
                "left as it was. Look for extreme values in the validation data."
            )
        self.seen.append(gradient["logits"].flatten())
        self.waiting.append(gradient)
        if len(self.waiting) < self.accumulate:
            return
        for name, parameter in self.params.items():
            parameter.grad = torch.stack([g[name] for g in self.waiting]).mean(dim=0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.waiting = []

    def statistics(self) -> tuple[float, float]:
        """Return norm and signal-to-noise ratio since the last call, and forget."""
        seen, self.seen = torch.stack(self.seen), []
        norm = seen.norm(dim=1).mean().item()
        if len(seen) < 2:
            return norm, math.nan
        error = (seen.var(dim=0).sum() / len(seen)).sqrt()
        return norm, (seen.mean(dim=0).norm() / error).item()


class _Best:
    """Which epoch is best so far, and for how long it has been."""

    def __init__(self, monitor: str, criterion: str, patience: int | None) -> None:
        self.monitor = monitor
        self.criterion = criterion
        self.patience = patience
        self.score = -math.inf if criterion == "max" else math.inf
        self.waited = 0
        self.state: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

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


@contextmanager
def _augmented_by_trainer(model: nn.Module) -> Iterator[None]:
    """Keep a model's own forward from augmenting a second time."""
    before = getattr(model, "augment", None)
    if before is None:
        yield
        return
    model.augment = False
    try:
        yield
    finally:
        model.augment = before


def _policy_row(policy: TaskAugPolicy) -> dict[str, float]:
    row = {}
    for _, entry in policy.to_frame().iterrows():
        for column in ("probability", "magnitude_neg", "magnitude_pos"):
            row[f"{column}/{entry['stage']}/{entry['operation']}"] = entry[column]
    return row
