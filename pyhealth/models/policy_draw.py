"""The randomness of one application of an augmentation policy, apart from the policy.

A draw is made once and applied as often as wanted: what is applied is then a function
of the parameters alone, which second derivatives and finite differences need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PolicyDraw", "StageDraw", "gumbel_choice"]


@dataclass(frozen=True)
class StageDraw:
    """All randomness of one stage for one batch; carries no graph.

    Attributes:
        soft: probabilities (O,) of the O operations when the draw was made.
        rows: for each operation, the records (indices) that it was drawn for.
        noise: each operation's own draw by name: for all B records if ``complete``,
            else for its ``rows`` only.
        complete: whether the gradient to the logits can be formed, which needs the
            value of every operation on every record.

    Examples:
        >>> rows = (torch.tensor([0, 2]), torch.tensor([1]))
        >>> draw = StageDraw(torch.tensor([0.5, 0.5]), rows, {}, complete=False)
        >>> [rows.tolist() for rows in draw.tiled(2).rows]
        [[0, 2, 3, 5], [1, 4]]
    """

    soft: Tensor
    rows: tuple[Tensor, ...]
    noise: Mapping[str, Tensor]
    complete: bool

    def chosen_only(self) -> StageDraw:
        """Return the same draw without what only the gradient to the logits needs."""
        if not self.complete:
            return self
        named = zip(self.noise.items(), self.rows, strict=True)
        noise = {name: value[rows] for (name, value), rows in named if len(rows)}
        return StageDraw(self.soft, self.rows, noise, complete=False)

    def tiled(self, copies: int) -> StageDraw:
        """Return the draw for so many copies, one after the other, of its records."""
        records = sum(len(rows) for rows in self.rows)
        starts = records * torch.arange(copies, device=self.soft.device)[:, None]
        return StageDraw(
            self.soft,
            tuple((starts + rows).flatten() for rows in self.rows),
            {n: v.repeat(copies, *[1] * (v.dim() - 1)) for n, v in self.noise.items()},
            self.complete,
        )


@dataclass(frozen=True)
class PolicyDraw:
    """The draws of all stages; applying it again gives the same bytes.

    Attributes:
        stages: one :class:`StageDraw` a stage, in order.
        first: number of the first of them; others than 0 leave stages out.

    Examples:
        >>> soft, rows = torch.tensor([1.0]), (torch.tensor([0, 1]),)
        >>> draw = PolicyDraw((StageDraw(soft, rows, {"no_op": rows[0]}, True),))
        >>> draw.chosen_only().stages[0].complete
        False
    """

    stages: tuple[StageDraw, ...]
    first: int = 0

    def chosen_only(self) -> PolicyDraw:
        """Return the same draw without what only the gradient to the logits needs."""
        stages = tuple(stage.chosen_only() for stage in self.stages)
        return PolicyDraw(stages, self.first)


def gumbel_choice(
    logits: Tensor, rows: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw from a categorical distribution by the largest of perturbed logits.

    Args:
        logits: (O,), unnormalised log-probabilities.
        rows: number of draws.
        generator: source of the randomness; torch's global one by default.

    Returns:
        Numbers from 0 to O - 1, (rows,), on the logits' device.

    Source:
        Gumbel 1954; the Gumbel-max trick of Maddison, Tarlow, Minka, NeurIPS 2014.

    Examples:
        >>> gumbel_choice(torch.tensor([0.0, 50.0]), rows=3)
        tensor([1, 1, 1])
    """
    source = logits.device if generator is None else generator.device
    size = (rows, len(logits))
    uniform = torch.rand(size, device=source, generator=generator).to(logits)
    tiny = torch.finfo(uniform.dtype).tiny
    gumbel = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
    return (logits + gumbel).argmax(dim=-1)
