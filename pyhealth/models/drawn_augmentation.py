"""A learned augmentation as a graph of tensors, for ``torch.export``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .taskaug_policy import TaskAugPolicy

__all__ = ["DrawnAugmentation"]


class DrawnAugmentation(nn.Module):
    """A policy applied with randomness that comes in as tensors.

    :class:`~pyhealth.models.learned_augmentation.LearnedAugmentation` sorts the records
    of a batch by operation, which no graph of fixed operations can do. This one passes
    every record through every operation and picks, in eight times the work, and takes
    any number of records. It has no state: the same draw gives the same result.

    Args:
        policy: the policy; made by
            :meth:`~pyhealth.models.learned_augmentation.LearnedAugmentation.exportable`
            of one whose parameters are buffers.

    Examples:
        >>> augment = DrawnAugmentation(TaskAugPolicy(num_stages=1, sampling_rate=100))
        >>> x, labels = torch.randn(4, 12, 1000), torch.tensor([0.0, 1.0, 0.0, 1.0])
        >>> draw = augment.sample(x.shape)
        >>> augment(x, labels, draw).equal(augment(x, labels, draw))
        True
    """

    def __init__(self, policy: TaskAugPolicy) -> None:
        super().__init__()
        self.policy = policy

    def sample(
        self, shape: torch.Size, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Make every random number of one application.

        Args:
            shape: shape of the signals, (B, C, T).
            generator: source of the randomness; torch's global one by default.

        Returns:
            For each stage "<stage>/chosen", the number (B,) of each record's operation,
            and "<stage>/<operation>", the operation's noise, which begins with B.
        """
        tensors = {}
        draw = self.policy.sample(shape, generator=generator, complete=True)
        for number, stage in enumerate(draw.stages):
            chosen = torch.empty(shape[0], dtype=torch.long, device=stage.soft.device)
            for column, rows in enumerate(stage.rows):
                chosen[rows] = column
            tensors[f"{number}/chosen"] = chosen
            tensors |= {f"{number}/{name}": n for name, n in stage.noise.items()}
        return tensors

    def forward(self, x: Tensor, labels: Tensor, draw: dict[str, Tensor]) -> Tensor:
        """Augment.

        Args:
            x: signals (B, C, T).
            labels: classes (B,) in [0, 1]; 0.5 for the mean of both classes'
                magnitudes. Without effect if the policy's magnitudes are shared.
            draw: from :meth:`sample`.

        Returns:
            Augmented signals (B, C, T).
        """
        policy, magnitudes = self.policy, self.policy.magnitudes()
        share = labels.to(magnitudes["neg"]).reshape(-1, 1)
        for number in range(policy.num_stages):
            magnitude = torch.lerp(
                magnitudes["neg"][number], magnitudes["pos"][number], share
            )
            values = [
                op.apply(
                    x,
                    magnitude[:, column],
                    draw[f"{number}/{op.name}"],
                    policy.sampling_rate,
                )
                for column, op in enumerate(policy.operations)
            ]
            picked = draw[f"{number}/chosen"][None, :, None, None].expand_as(x[None])
            x = torch.stack(values).gather(0, picked)[0]
        return x
