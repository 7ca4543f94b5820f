"""Each record's own training loss, which a PyHealth model gives the mean of only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.base_model import BaseModel
from .classifier import Classifier
from .types import Batch, Tensors

__all__ = ["RecordLossesOfModel", "rows_of"]

#: How far the mean of the records' losses may be from the model's loss: more than
#: rounding to bf16, less than a term or a weight.
LOSS_TOLERANCE = 0.02
NOT_BY_ALIGNMENT = "Use hypergradient='one_step' for this model."


class RecordLossesOfModel:
    """Training losses of records, one by one, from the model's logits.

    The loss is that of PyHealth's ``get_loss_function`` without its mean. The first
    call sees that the mean is the loss that the model is trained on.

    Args:
        classifier: the model's passes.

    Examples:
        See :func:`~pyhealth.bilevel.alignment.alignment_gradient`, which reads them.

        >>> RecordLossesOfModel.__name__
        'RecordLossesOfModel'
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self._checked = False

    def __call__(
        self, params: Tensors, signals: Tensor, batch: Batch, rows: list[int], seed: int
    ) -> Tensor:
        """Return the losses of signals that were made of a batch's records.

        Args:
            params: weights by name.
            signals: (N, C, T).
            batch: the batch.
            rows: which of its records each signal was made of.
            seed: of what is random in the model.

        Returns:
            Losses (N,).

        Raises:
            ValueError: if the output lacks logits or labels, or the model's loss is not
                the mean of these.
        """
        chosen = {**rows_of(batch, rows), self.classifier.input_key: signals}
        output = self.classifier.pure(params, chosen, seed, training=True)
        losses = self._of(output).reshape(len(signals), -1).mean(dim=1)
        if not self._checked:
            self._checked = True
            self._check(losses, output["loss"])
        return losses

    def _of(self, output: Mapping[str, Tensor]) -> Tensor:
        model: BaseModel = self.classifier.model
        missing = {"logit", "y_true"} - output.keys()
        if missing:
            raise ValueError(
                f"hypergradient='alignment' needs {sorted(missing)} in the output of "
                f"{type(model).__name__}. {NOT_BY_ALIGNMENT}"
            )
        loss = model.get_loss_function()
        return loss(output["logit"], output["y_true"], reduction="none")

    def _check(self, losses: Tensor, trained: Tensor) -> None:
        mean, whole = losses.detach().mean().item(), trained.detach().item()
        if abs(mean - whole) > LOSS_TOLERANCE * max(abs(mean), abs(whole)):
            raise ValueError(
                f"The loss of {type(self.classifier.model).__name__} is {whole:.4g}, "
                f"where that of its logits is {mean:.4g}: it has other terms or "
                "weights, which hypergradient='alignment' does not see. "
                f"{NOT_BY_ALIGNMENT}"
            )


def rows_of(batch: Batch, rows: list[int]) -> dict[str, Tensor]:
    """Return the batch of the given rows, which may come more than once.

    Args:
        batch: entries with one element a record, tensors or lists.
        rows: numbers of records.

    Returns:
        Their entries.

    Examples:
        >>> rows_of({"label": torch.tensor([5, 6]), "id": ["a", "b"]}, [1, 1])
        {'label': tensor([6, 6]), 'id': ['b', 'b']}
    """
    return {
        key: value[torch.as_tensor(rows, device=value.device)]
        if isinstance(value, Tensor)
        else [value[row] for row in rows]
        for key, value in batch.items()
    }
