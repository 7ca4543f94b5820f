"""A batch's work in pieces, of which one at a time holds its activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .types import Batch

__all__ = ["Piece", "pieces_of", "records_are_independent"]


@dataclass(frozen=True)
class Piece:
    """Some records of a batch.

    Attributes:
        batch: their entries, tensors and lists, by key.
        rows: which of the whole batch's records they are.
        share: how many of all they are, in (0, 1].

    Examples:
        >>> Piece({"label": torch.zeros(2, 1)}, slice(0, 2), share=0.5).rows
        slice(0, 2, None)
    """

    batch: Batch
    rows: slice
    share: float


def pieces_of(batch: Batch, records: int, size: int | None) -> list[Piece]:
    """Cut a batch into pieces.

    A mean over the batch's records is the sum of the pieces' means times their shares.

    Args:
        batch: entries with one element a record, by key.
        records: number of records.
        size: largest number of records in a piece; None for one piece.

    Returns:
        The pieces in order; one alone holds the very batch.

    Examples:
        >>> batch = {"ecg": torch.zeros(5, 12, 100), "patient_id": list("abcde")}
        >>> [piece.batch["patient_id"] for piece in pieces_of(batch, 5, size=2)]
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    if size is None or size >= records:
        return [Piece(batch, slice(0, records), 1.0)]
    cuts = [slice(at, min(at + size, records)) for at in range(0, records, size)]
    return [
        Piece(
            {key: value[rows] for key, value in batch.items()},
            rows,
            (rows.stop - rows.start) / records,
        )
        for rows in cuts
    ]


def records_are_independent(model: nn.Module, forward: Callable[[], object]) -> bool:
    """Return whether a training forward may be split without changing its result.

    It may not where records share batch statistics, where a random number is drawn (a
    dropout mask would be another one), or where a buffer is updated.

    Args:
        model: in training mode; its buffers are left as they are.
        forward: calls the model.

    Returns:
        False for any of the three. A layer of another kind that mixes the records of a
        batch is not seen.

    Examples:
        >>> x = torch.ones(2, 3)
        >>> model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))
        >>> records_are_independent(model, lambda: model(x))
        False
        >>> records_are_independent(model, lambda: model[0](x))
        True
    """
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return False
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    before = _random_states()
    with torch.no_grad():
        forward()
    drawn = any(map(_differ, before, _random_states()))
    updated = any(_differ(buffer, kept) for buffer, kept in buffers)
    for buffer, kept in buffers:
        buffer.copy_(kept)
    return not drawn and not updated


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.equal(one, other)


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
