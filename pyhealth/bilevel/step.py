"""One step of bi-level training: the weights, then the policy's hypergradient."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..models.taskaug_policy import TaskAugPolicy
from .alignment import alignment_gradient
from .classifier import Classifier
from .distributed import Average, Gather
from .hypergradient import METHODS, Method, hypergradient
from .inner_step import inner_step_of
from .micro_batch import Piece
from .record_losses import RecordLossesOfModel
from .types import Batch, Tensors
from .validation_gradient import OuterPart, ValidationGradient
from .weight_step import WeightStep

__all__ = ["OUTER_METHODS", "BiLevelStep", "OuterMethod"]

#: How the policy's derivative is formed: by "alignment", see
#: :func:`~pyhealth.bilevel.alignment.alignment_gradient`, or by a :data:`Method`.
type OuterMethod = Method | Literal["alignment"]
OUTER_METHODS: tuple[str, ...] = ("alignment", *METHODS)

# Below PyHealth's trainer, whose log file then gets these lines too.
logger = logging.getLogger("pyhealth.trainer.bilevel")


class BiLevelStep:
    """Inner steps and hypergradients of one training run.

    The inner step trains the weights on an augmented batch. The outer one gives the
    derivative of the clean validation loss after that very step in the policy. Both
    use one draw, one dropout mask and the same weights; the outer one leaves weights,
    buffers, ``.grad`` and the global random state as they are.

    The augmented batch itself is the hyper-parameter of the network part: its
    derivative is formed first, then one backward pass takes it through the policy.

    A step whose loss, gradient or hypergradient is not finite is not taken: weights,
    optimiser and buffers stay as they were, and the hypergradient is zero.

    Args:
        model: a PyHealth model whose output has a "loss"; for "alignment", and for an
            ``outer_loss`` other than "model", a "logit" and "y_true" as well, and for
            "alignment" the loss is that of PyHealth's ``get_loss_function``.
        policy: the augmentation policy.
        params: the weights to train, see
            :func:`~pyhealth.bilevel.classifier.classifier_parameters`.
        optimizer: steps the weights (and the policy, if it is trained jointly).
        input_key: the signals' key in a batch.
        label_key: the labels' key in a batch.
        generator: CPU generator of all draws.
        method: "alignment", see
            :func:`~pyhealth.bilevel.alignment.alignment_gradient`, or a method of
            :func:`~pyhealth.bilevel.hypergradient.hypergradient`.
        neumann_terms: Hessian products, "neumann" only.
        neumann_lr: step of the series, "neumann" only.
        val_statistics: BatchNorm in the validation forward: "running" statistics, as at
            test time, or those of the "batch".
        outer_loss: what the policy lowers: the "model"'s own loss, or a name of
            :data:`~pyhealth.bilevel.outer_loss.OUTER_LOSSES`.
        alignment_records: training records that "alignment" enumerates in a step,
            shared out among the policy's stages.
        average: over the processes that each take a part of a batch, see
            :class:`~pyhealth.bilevel.distributed.Processes`; default one process.
        gather: the rows of all these processes; an ``outer_loss`` that is no mean over
            records needs it.
        keep_graph: keep the graph of the inner step's gradient and differentiate it
            again, which saves a third of an outer step; False forms the second
            derivative anew, in less memory. A model that torch cannot differentiate
            twice in reverse mode falls back to that.
        micro_batch: largest number of records in one pass, to save memory; None for
            whole batches. The validation part is split where its BatchNorm uses
            running statistics, and costs a forward pass more unless ``outer_loss`` is
            "model", which must then be a mean over records. The training part is split
            only where records do not share anything: with BatchNorm or an active
            dropout (one mask must serve both steps) it stays whole, and so do the
            records that "alignment" enumerates and a joint inner step. Where it is
            split no graph is kept. The numbers are those of the unsplit step.
        precision: "fp32", or "bf16" for the model's forward passes under
            ``torch.autocast``; weights, gradients and the policy stay as they are.

    Attributes:
        classifier: the model's passes.
        finite: 0-dim tensor, whether the last step was taken.

    Examples:
        See :class:`~pyhealth.bilevel.trainer.BiLevelTrainer`, which drives it.

        >>> BiLevelStep.__name__
        'BiLevelStep'
    """

    def __init__(
        self,
        model: nn.Module,
        policy: TaskAugPolicy,
        params: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        input_key: str,
        label_key: str,
        generator: torch.Generator,
        method: OuterMethod = "one_step",
        neumann_terms: int = 1,
        neumann_lr: float | None = None,
        val_statistics: Literal["running", "batch"] = "running",
        outer_loss: str = "model",
        alignment_records: int = 64,
        average: Average | None = None,
        gather: Gather | None = None,
        keep_graph: bool = True,
        precision: Literal["fp32", "bf16"] = "fp32",
        micro_batch: int | None = None,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be 1 or more, got {micro_batch}.")
        self.classifier = Classifier(
            model,
            input_key,
            label_key,
            val_statistics,
            precision,
            policy.logits.device.type,
        )
        self.policy = policy
        self.params = dict(params)
        self.optimizer = optimizer
        self.generator = generator
        self.method = method
        self.neumann_terms = neumann_terms
        self.neumann_lr = neumann_lr
        self.keep_graph = keep_graph
        self.alignment_records = alignment_records
        self.finite = torch.tensor(True)
        self._weights = WeightStep(
            self.classifier, self.params, optimizer, micro_batch, average
        )
        self._validation = ValidationGradient(
            self.classifier, outer_loss, micro_batch, gather
        )
        self._record_losses = RecordLossesOfModel(self.classifier)
        # A fused optimiser (the trainer's on CUDA) leaves a step out on the device, and
        # nothing waits for it. Elsewhere the answer is asked for: on the CPU that costs
        # nothing. The series of "neumann" asks for its norms in any case.
        self._asks = not optimizer.defaults.get("fused") or method == "neumann"
        # Where a kept graph failed, reverse over reverse would fail again.
        self._first_try: Literal["forward", "reverse"] = "reverse"

    def inner(self, batch: Batch, joint: bool = False) -> Tensor:
        """Take one inner step.

        Args:
            batch: training batch.
            joint: let the training loss's gradient reach the policy.

        Returns:
            The training loss, detached.
        """
        x, labels = self._signals(batch)
        with torch.set_grad_enabled(joint):
            augmented = self.policy(x, labels, self.generator)
        self.optimizer.zero_grad()
        buffers = self._weights.buffers()
        seed = self._draw_seed()
        pieces = self._weights.pieces(batch, augmented, seed, whole=joint)
        loss, _ = self._weights.backward(pieces, seed)
        self.finite = self._weights.finite(loss)
        self._weights.take_if(self.finite, buffers)
        return loss

    def inner_and_outer(
        self, batch: Batch, val_batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one inner step and return the hypergradient that belongs to it.

        Args:
            batch: training batch.
            val_batch: clean validation batch.

        Returns:
            The training loss, detached, and the policy's hypergradient by name.
        """
        x, labels = self._signals(batch)
        exact = self.method in ("one_step", "neumann")  # through this augmented batch
        draw = self.policy.sample(x.shape, labels, self.generator, complete=exact)
        # Without the policy's graph, which is made when the network's is gone.
        with torch.no_grad():
            leaf = self.policy.apply(x, labels, draw.chosen_only())
        seed = self._draw_seed()
        self.optimizer.zero_grad()
        buffers = self._weights.buffers()
        pieces = self._weights.pieces(batch, leaf, seed)
        keeps = exact and self.keep_graph and not self._weights.splits
        leaf.requires_grad_(keeps)
        loss, grads = self._weights.backward(pieces, seed, create_graph=keeps)
        self.finite = self._weights.finite(loss)
        if self._asks and not self.finite:
            self._weights.take_if(self.finite, buffers)
            return loss, self._zeros()
        if self.method == "alignment":
            gradient = self._alignment(batch, val_batch, seed)
        elif self.method == "darts":
            through = self._augmented_validation(val_batch)
            gradient = self._to_policy(through, self._darts(val_batch, through))
        else:
            cotangent = self._through_weights(pieces, leaf, grads, val_batch, seed)
            gradient = self._to_policy(self.policy.apply(x, labels, draw), cotangent)
        of = val_batch if self.method == "darts" else batch
        mean = self._weights.mean(gradient, self.classifier.records(of))
        return loss, self._taken(mean, buffers)

    def _taken(self, gradient: Tensors, buffers: Tensors) -> dict[str, Tensor]:
        """Step the weights, and return the hypergradient, zero where it is not."""
        for value in gradient.values():
            self.finite = self.finite & value.isfinite().all()
        self._weights.take_if(self.finite, buffers)
        zeros = self._zeros()
        return {n: torch.where(self.finite, g, zeros[n]) for n, g in gradient.items()}

    def _written(self) -> dict[str, Tensor]:
        """Return ``.grad``, which every weight has after the inner step."""
        return {n: p.grad for n, p in self.params.items() if p.grad is not None}

    def _zeros(self) -> dict[str, Tensor]:
        return {n: torch.zeros_like(p) for n, p in self.policy.named_parameters()}

    def _through_weights(
        self,
        pieces: list[Piece],
        augmented: Tensor,
        grads: Tensors,
        val_batch: Batch,
        seed: int,
    ) -> Tensor:
        """Return the hypergradient of the augmented batch.

        The inner step's own graph is differentiated a second time. Where torch cannot
        do that, now and later hypergradient() forms the derivative anew.
        """
        try:
            return self._of_augmented(pieces, augmented, grads, val_batch, seed)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not augmented.requires_grad:
                raise
            self.keep_graph, self._first_try = False, "forward"
            logger.warning("No second backward pass through this model: %s", error)
        grads = self._written()
        return self._of_augmented(pieces, augmented.detach(), grads, val_batch, seed)

    def _of_augmented(
        self,
        pieces: list[Piece],
        augmented: Tensor,
        grads: Tensors,
        val_batch: Batch,
        seed: int,
    ) -> Tensor:
        key = self.classifier.input_key

        def train_loss(params: Tensors, hparams: Tensors, piece: Piece) -> Tensor:
            moved = {**piece.batch, key: hparams["x"][piece.rows]}
            output = self.classifier.pure(params, moved, seed, training=True)
            return piece.share * output["loss"]

        records = {"train": len(augmented), "val": self.classifier.records(val_batch)}
        if self.method == "one_step":
            derivative = partial(
                hypergradient,
                method="one_step",
                inner_step=inner_step_of(self.optimizer, self.params),
                train_grads=grads,
            )
        else:
            derivative = partial(
                hypergradient,
                method="neumann",
                lr=self.neumann_lr,
                neumann_terms=self.neumann_terms,
                train_grads=grads if augmented.requires_grad else None,
            )
        return derivative(
            [partial(train_loss, piece=piece) for piece in pieces],
            None,
            self.params,
            {"x": augmented},
            average=lambda tensors, of: self._weights.mean(tensors, records[of]),
            val_gradient=lambda at: self._validation(at, val_batch, seed),
            first_try=self._first_try,
        )["x"]

    def _alignment(
        self, batch: Batch, val_batch: Batch, seed: int
    ) -> dict[str, Tensor]:
        """Return the policy's derivative by comparing all operations."""
        inner_step = inner_step_of(self.optimizer, self.params)
        weights = {name: p.detach() for name, p in self.params.items()}
        after, slope = inner_step(weights, self._written())
        gradients = self._weights.mean(
            self._validation(after, val_batch, seed), self.classifier.records(val_batch)
        )
        direction = {name: slope[name] * gradients[name] for name in after}

        def record_losses(params: Tensors, x: Tensor, rows: list[int]) -> Tensor:
            return self._record_losses(params, x, batch, rows, seed)

        x, labels = self._signals(batch)
        first = slice(self.alignment_records)
        return alignment_gradient(
            self.policy,
            x[first],
            labels[first],
            record_losses,
            weights,
            direction,
            self.generator,
        )

    def _darts(self, val_batch: Batch, augmented: Tensor) -> Tensor:
        seed = self._draw_seed()
        key = self.classifier.input_key
        moved = {**val_batch, key: augmented.detach()}

        def cotangent(piece: Piece, outer: OuterPart) -> Tensor:
            def val_loss(params: Tensors, hparams: Tensors) -> Tensor:
                batch = {**piece.batch, key: hparams["x"]}
                return outer(self.classifier.pure(params, batch, seed, training=False))

            x = {"x": piece.batch[key]}
            return hypergradient(None, val_loss, self.params, x, method="darts")["x"]

        parts = self._validation.parts(self.params, moved, seed)
        return torch.cat([cotangent(piece, outer) for piece, outer in parts])

    def _augmented_validation(self, val_batch: Batch) -> Tensor:
        x, labels = self._signals(val_batch)
        return self.policy(x, labels, self.generator)

    def _to_policy(self, augmented: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        leaves = dict(self.policy.named_parameters())
        cotangent = _without_undefined(cotangent)
        # Where every record drew no_op no magnitude took part, and its derivative is
        # zero; that is the only way in which a parameter can be unused here.
        gradients = torch.autograd.grad(
            augmented, list(leaves.values()), grad_outputs=cotangent, allow_unused=True
        )
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }

    def _signals(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device, classifier = self.policy.logits.device, self.classifier
        x, labels = batch[classifier.input_key], batch[classifier.label_key]
        return x.to(device), labels.to(device)

    def _draw_seed(self) -> int:
        device = self.generator.device
        seed = torch.randint(2**31, (), generator=self.generator, device=device)
        return int(seed.item())


def _without_undefined(cotangent: Tensor) -> Tensor:
    """Set single undefined derivatives in the signals to zero.

    The modulus of a spectrum (PyHealth's ContraWR) has no derivative where a mask or a
    flat lead leaves silence: torch gives nan there, and zero is a subgradient. Where
    most are nan, a loss or the weights' derivative was; that stays, and is not taken.
    """
    undefined = cotangent.isnan()
    single = undefined.float().mean() < 0.5
    return torch.where(undefined & single, 0, cotangent)
