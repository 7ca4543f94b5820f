"""The weights' side of a step: gradients of the training loss, a guarded update."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .classifier import Classifier, fixed_seed
from .distributed import Average
from .micro_batch import Piece, pieces_of, records_are_independent
from .types import Batch, Tensors

__all__ = ["WeightStep"]

# Below PyHealth's trainer, whose log file then gets these lines too.
logger = logging.getLogger("pyhealth.trainer.bilevel")


class WeightStep:
    """Gradients of the training loss, and the optimiser's step if all is finite.

    Args:
        classifier: the model's passes.
        params: the weights to train, by name.
        optimizer: steps them.
        micro_batch: largest number of records in one pass; None for whole batches. Only
            a batch whose records share nothing is split.
        average: over the processes that each take a part of a batch; None for one.

    Examples:
        See :class:`~pyhealth.bilevel.step.BiLevelStep`, which drives it.

        >>> WeightStep.__name__
        'WeightStep'
    """

    def __init__(
        self,
        classifier: Classifier,
        params: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        micro_batch: int | None = None,
        average: Average | None = None,
    ) -> None:
        self.classifier = classifier
        self.params = params
        self.optimizer = optimizer
        self.micro_batch = micro_batch
        self.average = average
        self.splits: bool | None = None  # whether batches are split; found by trying

    def pieces(
        self, batch: Batch, x: Tensor, seed: int, whole: bool = False
    ) -> list[Piece]:
        """Return a batch with other signals, in pieces where that changes nothing.

        Args:
            batch: training batch.
            x: its augmented signals (B, C, T).
            seed: of what is random in the model.
            whole: leave it in one piece.
        """
        records = self.classifier.records(batch)
        moved = {**batch, self.classifier.input_key: x}
        if self.micro_batch is None or whole:
            return pieces_of(moved, records, None)
        if self.splits is None:
            self.splits = self._can_split(moved, seed)
        return pieces_of(moved, records, self.micro_batch if self.splits else None)

    def _can_split(self, batch: Batch, seed: int) -> bool:
        records = self.classifier.records(batch)
        first = pieces_of(batch, records, self.micro_batch)[0].batch
        model = self.classifier.model
        model.train()
        with fixed_seed(seed), self.classifier.autocast():
            splits = records_are_independent(model, lambda: model(**first))
        if not splits:
            logger.info(
                "micro_batch=%d splits the validation part only: with batch statistics "
                "or dropout the records of a training batch stay together.",
                self.micro_batch,
            )
        return splits

    def backward(
        self, pieces: list[Piece], seed: int, create_graph: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Write ``.grad``; return the loss and the gradients.

        Args:
            pieces: from :meth:`pieces`.
            seed: of what is random in the model.
            create_graph: give the gradients their graph; one piece only.

        Returns:
            The training loss, detached, and the gradients by name.

        Raises:
            ValueError: if a weight has no gradient; it is named.
        """
        losses = []
        for piece in pieces:
            loss = piece.share * self.classifier.trained(piece.batch, seed)["loss"]
            losses.append(loss.detach())
            if not create_graph:
                loss.backward()
        grads: list[Tensor | None] = [weight.grad for weight in self.params.values()]
        if create_graph:  # not backward(), which would tie .grad to the graph for good
            weights = list(self.params.values())
            grads = list(
                torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            )
            self._write(grads)
        used = {n: g for n, g in zip(self.params, grads, strict=True) if g is not None}
        unused = [name for name in self.params if name not in used]
        if unused:
            raise ValueError(
                f"No gradient reaches {', '.join(unused)}: the model's loss does not "
                "use it. Call requires_grad_(False) on it to leave it out."
            )
        total = sum(losses, start=torch.zeros_like(losses[0]))
        if self.average is not None:
            total = self._average_in_place(total, pieces[-1].rows.stop)
        return total, used

    def _write(self, grads: list[Tensor | None]) -> None:
        for weight, gradient in zip(self.params.values(), grads, strict=True):
            if gradient is not None:
                gradient = gradient.detach()
                # A copy where several processes average it in place.
                gradient = gradient if self.average is None else gradient.clone()
            weight.grad = gradient

    def _average_in_place(self, loss: Tensor, records: int) -> Tensor:
        """Average loss, gradients and running statistics over the processes."""
        tensors = {f"grad {i}": g for i, g in enumerate(self._gradients())}
        for name, module in self.classifier.model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                running = {"mean": module.running_mean, "var": module.running_var}
                tensors |= {
                    f"{kind} {name}": value
                    for kind, value in running.items()
                    if value is not None
                }
        means = self.mean({"loss": loss, **tensors}, records)
        for name, tensor in tensors.items():
            # .data: a kept graph holds the running statistics, though it reads none of
            # them in training, and would refuse to go backward after a visible change.
            tensor.data.copy_(means[name])
        return means["loss"]

    def mean(self, tensors: Tensors, records: int) -> Tensors:
        """Return the mean over the processes.

        Args:
            tensors: of this process, by name.
            records: that they come from, the weight in the mean.
        """
        return tensors if self.average is None else self.average(tensors, records)

    def finite(self, loss: Tensor) -> Tensor:
        """Return whether loss and gradients are finite, a 0-dim tensor."""
        # One number tells it: where the norm overflows, so would Adam's squares.
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return (loss + norm).isfinite()

    def take_if(self, finite: Tensor, buffers: Tensors) -> None:
        """Step the weights if all was finite; else put the buffers back.

        Args:
            finite: 0-dim.
            buffers: from :meth:`buffers`, before the forward pass.
        """
        if self.optimizer.defaults.get("fused"):
            # Fused ones read it, as a GradScaler sets it; torch does not declare it.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        for name, buffer in self.classifier.model.named_buffers():
            buffer.copy_(torch.where(finite, buffer, buffers[name]))

    def buffers(self) -> dict[str, Tensor]:
        """Return copies of the model's buffers by name."""
        model = self.classifier.model
        return {name: buffer.clone() for name, buffer in model.named_buffers()}

    def _gradients(self) -> list[Tensor]:
        return [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
