"""The operations that a policy chooses from: their noise, and their application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .ecg_augmentations import AUGMENTATIONS, Augmentation
from .ecg_draws import Draw, electrode_noise
from .policy_draw import StageDraw, gumbel_choice

__all__ = ["OperationSet", "column_of_labels"]


class OperationSet:
    """O operations in the order of a policy's columns.

    Args:
        names: of the operations; default all of
            :data:`~pyhealth.models.ecg_augmentations.AUGMENTATIONS`.

    Attributes:
        entries: the operations, with range and unit.

    Raises:
        ValueError: if an operation is unknown or named twice, or there is none.

    Examples:
        >>> operations = OperationSet(["no_op", "time_mask"])
        >>> operations.names
        ('no_op', 'time_mask')
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        names = tuple(AUGMENTATIONS) if names is None else tuple(names)
        unknown = [name for name in names if name not in AUGMENTATIONS]
        if unknown or not names or len(set(names)) != len(names):
            raise ValueError(
                f"operations must be one or more different names of "
                f"{list(AUGMENTATIONS)}, got {list(names)}."
            )
        self.entries = tuple(AUGMENTATIONS[name] for name in names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the operations."""
        return tuple(op.name for op in self.entries)

    def sample(
        self,
        logits: Tensor,
        soft: Tensor,
        shape: torch.Size,
        draws: int,
        generator: torch.Generator | None = None,
        *,
        complete: bool = True,
        dropout_by: Literal["lead", "electrode"] = "lead",
    ) -> StageDraw:
        """Draw operations and what they need, without a graph.

        Args:
            logits: (O,), which choose the operations.
            soft: (O,), their probabilities, kept in the draw.
            shape: of the signals, (B, C, T).
            draws: B for one operation a record, 1 for one for all of them.
            generator: source of the randomness; torch's global one by default.
            complete: draw noise for every operation and record, or for the chosen only.
            dropout_by: whether ``lead_dropout`` drops a "lead" or all leads of an
                "electrode" (12 standard leads only).

        Returns:
            The draw of a stage.
        """
        chosen = gumbel_choice(logits, draws, generator).expand(shape[0])
        rows = tuple(
            (chosen == column).nonzero().squeeze(1)
            for column in range(len(self.entries))
        )
        source = logits.device if generator is None else generator.device
        noise = {}
        for op, own in zip(self.entries, rows, strict=True):
            if complete or len(own):
                size = shape if complete else torch.Size([len(own), *shape[1:]])
                drawn = _draw_of(op, dropout_by)(
                    size, dtype=logits.dtype, device=source, generator=generator
                )
                noise[op.name] = drawn.to(logits.device)
        return StageDraw(soft, rows, noise, complete)

    def apply_each(
        self, x: Tensor, magnitude: Tensor, draw: StageDraw, rate: float
    ) -> Tensor:
        """Return what each operation makes of each record.

        Args:
            x: signals (B, C, T).
            magnitude: (B, O), in the operations' units.
            draw: a complete one.
            rate: of the signals, hertz.

        Returns:
            Signals (O, B, C, T).
        """
        return torch.stack(
            [
                op.apply(x, magnitude[:, column], draw.noise[op.name], rate)
                for column, op in enumerate(self.entries)
            ]
        )

    def apply_chosen(
        self, x: Tensor, magnitude: Tensor, draw: StageDraw, rate: float
    ) -> Tensor:
        """Return what the drawn operation makes of each record.

        Args:
            x: signals (B, C, T).
            magnitude: (B, O), in the operations' units.
            draw: complete or not.
            rate: of the signals, hertz.

        Returns:
            Signals (B, C, T).
        """
        pieces = []
        for column, (op, rows) in enumerate(zip(self.entries, draw.rows, strict=True)):
            if len(rows):
                noise = draw.noise[op.name]
                noise = noise[rows] if draw.complete else noise
                strength = magnitude[rows, column]
                pieces.append(op.apply(x[rows], strength, noise, rate))
        order = torch.cat(draw.rows).argsort()
        return torch.cat(pieces)[order]


def column_of_labels(labels: Tensor, records: int) -> Tensor:
    """Return labels as a column, which each operation's magnitude depends on.

    Args:
        labels: classes (B,) or (B, 1).
        records: number B of the records that they are for.

    Returns:
        The labels (B, 1).

    Raises:
        ValueError: if their number is another one.

    Examples:
        >>> column_of_labels(torch.tensor([0.0, 1.0]), records=2)
        tensor([[0.],
                [1.]])
    """
    if labels.numel() != records:
        raise ValueError(
            f"{records} records need {records} labels, got shape {tuple(labels.shape)}."
        )
    return labels.reshape(records, 1)


def _draw_of(op: Augmentation, dropout_by: str) -> Draw:
    by_electrode = op.name == "lead_dropout" and dropout_by == "electrode"
    return electrode_noise if by_electrode else op.draw
