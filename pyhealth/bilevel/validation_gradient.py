"""The gradient of the outer loss, on clean validation data, in the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .classifier import Classifier
from .distributed import Gather
from .micro_batch import Piece, pieces_of
from .outer_loss import OUTER_LOSSES, OuterLoss
from .second_derivatives import gradient_of
from .types import Batch, Tensors

__all__ = ["OuterPart", "ValidationGradient"]

#: What a piece of a batch adds to the outer loss, of the model's output.
type OuterPart = Callable[[Mapping[str, Tensor]], Tensor]


class ValidationGradient:
    """Differentiates the outer loss, in pieces of the batch where memory is short.

    Args:
        classifier: the model's passes.
        outer_loss: the "model"'s own loss, or a name of
            :data:`~pyhealth.bilevel.outer_loss.OUTER_LOSSES`.
        micro_batch: largest number of records in one pass; None for whole batches, as
            where BatchNorm uses the statistics of the batch.
        gather: the rows of all processes, which a loss that is no mean over records
            needs; None where there is one process.

    Examples:
        >>> class Mean(torch.nn.Linear):
        ...     def forward(self, ecg):
        ...         return {"loss": super().forward(ecg).mean()}
        >>> model = Mean(1, 1, bias=False)
        >>> gradient = ValidationGradient(Classifier(model, "ecg", "label"), "model")
        >>> weights = {"weight": torch.ones(1, 1)}
        >>> gradient(weights, {"ecg": torch.full((4, 1), 2.0)}, seed=0)
        {'weight': tensor([[2.]])}
    """

    def __init__(
        self,
        classifier: Classifier,
        outer_loss: str,
        micro_batch: int | None = None,
        gather: Gather | None = None,
    ) -> None:
        self.classifier = classifier
        self.outer_loss = outer_loss
        self.micro_batch = micro_batch
        self.gather = gather

    def __call__(self, params: Tensors, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Return the gradient at given weights.

        Args:
            params: weights by name.
            batch: clean validation batch.
            seed: of what is random in the model.

        Returns:
            The gradient by the weights' names.
        """

        def val_loss(at: Tensors, piece: Piece, outer: OuterPart) -> Tensor:
            output = self.classifier.pure(at, piece.batch, seed, training=False)
            return outer(output)

        parts = self.parts(params, batch, seed)
        return gradient_of(
            [partial(val_loss, piece=piece, outer=outer) for piece, outer in parts],
            params,
        )

    def parts(
        self, params: Tensors, batch: Batch, seed: int
    ) -> list[tuple[Piece, OuterPart]]:
        """Return scalars of pieces of a batch whose sum has the outer loss's gradient.

        A loss that is no mean over records is differentiated in the logits of all of
        them first; a piece's scalar is then its logits times that derivative.

        Args:
            params: weights by name.
            batch: clean validation batch.
            seed: of what is random in the model.

        Returns:
            Each piece with the function of its output.
        """
        pieces = self._pieces(batch)
        if self.outer_loss == "model":
            return [(piece, partial(_loss, share=piece.share)) for piece in pieces]
        outer_loss = OUTER_LOSSES[self.outer_loss]
        if len(pieces) == 1 and self.gather is None:
            return [(pieces[0], lambda out: outer_loss(out["logit"], out["y_true"]))]
        logits, labels = [], []
        for piece in pieces:
            with torch.no_grad():
                output = self.classifier.pure(params, piece.batch, seed, training=False)
            logits.append(output["logit"])
            labels.append(output["y_true"])
        slope = self._slope_in_logits(outer_loss, torch.cat(logits), torch.cat(labels))
        return [(piece, partial(_along, slope=slope[piece.rows])) for piece in pieces]

    def _pieces(self, batch: Batch) -> list[Piece]:
        shares = self.classifier.val_statistics == "batch" and any(
            isinstance(module, _BatchNorm) for module in self.classifier.model.modules()
        )
        size = None if shares else self.micro_batch
        return pieces_of(batch, self.classifier.records(batch), size)

    def _slope_in_logits(
        self, outer_loss: OuterLoss, logit: Tensor, label: Tensor
    ) -> Tensor:
        """Return the derivative of the loss of all processes' records in one's own.

        It is scaled so that the mean over the processes is the derivative of the whole.
        """
        own = slice(None)
        if self.gather is not None:
            logit, own = self.gather(logit)
            label, _ = self.gather(label)
        logit.requires_grad_()
        slope = torch.autograd.grad(outer_loss(logit, label), logit)[0]
        return slope[own] * (len(logit) / len(slope[own]))


def _loss(output: Mapping[str, Tensor], share: float) -> Tensor:
    return share * output["loss"]


def _along(output: Mapping[str, Tensor], slope: Tensor) -> Tensor:
    return (slope * output["logit"]).sum()
