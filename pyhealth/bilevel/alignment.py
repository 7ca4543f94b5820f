"""The policy's derivative by comparing what each operation would have taught.

A policy's choice is discrete, and a network of ReLUs is only piecewise smooth in its
input: the derivative of ``dL_train/dw`` in the augmented signal exists almost
everywhere, yet it misses the jumps at the kinks, which for shifts in time and for the
choice of an operation are most of the effect. Here nothing is differentiated in the
signal. A few records are passed through EVERY operation, and each record's training
loss is differentiated along one direction in the weights, the one that would lower the
validation loss (forward mode, one pass). An operation whose losses fall faster along it
than the others' pulls the weights where validation wants them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..models.taskaug_policy import PolicyDraw, StageDraw, TaskAugPolicy
from .hypergradient import Tensors

__all__ = ["RecordLosses", "alignment_gradient"]

#: ``record_losses(params, x, labels)`` -> training loss of each record (R,).
type RecordLosses = Callable[[Tensors, Tensor, Tensor], Tensor]

#: Half the distance, in the unbounded parameter, over which a magnitude is compared;
#: at the middle of an interval 0.6 spans 0.35 to 0.65 of it.
MAGNITUDE_STEP = 0.6


def alignment_gradient(
    policy: TaskAugPolicy,
    x: Tensor,
    labels: Tensor,
    record_losses: RecordLosses,
    params: Tensors,
    direction: Tensors,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the policy's derivative of the validation loss after one inner step.

    With the inner step ``w' = w - u(dL_train/dw)`` and the direction
    ``v = D * dL_val/dw'`` the validation loss after it is, to first order in the step,
    a constant minus the mean of the records' ``s = d/de loss(w + e v)``. That mean over
    the policy's draws is enumerated: the logits get
    ``-p_i (s_i - sum_j p_j s_j)``, exactly; a magnitude gets a central difference of
    width :data:`MAGNITUDE_STEP`. Both signs and all operations share each record's
    noise. What a record does to the others through a batch normalisation is left out.

    Args:
        policy: with K stages of O operations.
        x: clean training signals (R, C, T); 2 K O R of them are classified at once.
        labels: their classes, (R,) or (R, 1).
        record_losses: training loss of each record at given weights.
        params: weights by name.
        direction: v by name.
        generator: source of the operations' noise.

    Returns:
        The derivative by the names of the policy's parameters.

    Raises:
        RuntimeError: from torch, if it has no forward mode for a layer of the model.

    Source:
        The inner product of gradients as a data reward: Wang et al., Optimizing data
        usage via differentiable rewards, ICML 2020. Enumerating a stage's operations
        on the same records and the central differences are ours.

    Examples:
        >>> policy = TaskAugPolicy(1, operations=["no_op", "gaussian_noise"])
        >>> x, labels, w = torch.ones(3, 1, 9), torch.zeros(3), {"w": torch.ones(())}
        >>> h = alignment_gradient(
        ...     policy, x, labels, lambda p, x, y: p["w"] * x.std(dim=(1, 2)), w, w
        ... )
        >>> h["logits"].abs().max()  # the noise is in proportion to the spread, 0
        tensor(0.)
    """
    signals = [
        _variants(policy, stage, x, labels, generator)
        for stage in range(policy.num_stages)
    ]
    shape = (policy.num_stages, 2, len(policy.operations), len(x))
    copies = shape[0] * shape[1] * shape[2]
    with torch.no_grad(), forward_ad.dual_level():
        moving = {
            name: forward_ad.make_dual(params[name], direction[name]) for name in params
        }
        tiled = labels.repeat(copies, *[1] * (labels.dim() - 1))
        losses = record_losses(moving, torch.cat(signals), tiled)
        slope = forward_ad.unpack_dual(losses).tangent
    if slope is None:
        raise ValueError("The training loss does not depend on the weights given.")
    return _to_parameters(policy, slope.reshape(shape), labels)


def _to_parameters(
    policy: TaskAugPolicy, slope: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Turn slopes (K, sign, O, R) into the derivative in logits and magnitudes."""
    probability = policy.probabilities()
    value = slope.mean(dim=(1, 3))
    mean = (probability * value).sum(dim=-1, keepdim=True)
    result = {"logits": -probability * (value - mean)}
    change = (
        -probability[..., None] * (slope[:, 1] - slope[:, 0]) / (2 * MAGNITUDE_STEP)
    )
    if policy.shared_magnitudes:
        return result | {"mag_neg": change.mean(dim=-1)}
    share = labels.reshape(-1).to(change)
    return result | {
        "mag_neg": (change * (1 - share)).mean(dim=-1),
        "mag_pos": (change * share).mean(dim=-1),
    }


@torch.no_grad()
def _variants(
    policy: TaskAugPolicy,
    stage: int,
    x: Tensor,
    labels: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Return (2 O R, C, T): one stage enumerated, the others as drawn."""
    draw = policy.sample(x.shape, labels, generator)
    before, after = draw.stages[:stage], draw.stages[stage + 1 :]
    x = policy.apply(x, labels, PolicyDraw(before))
    x = policy.enumerate_stage(stage, x, labels, draw.stages[stage], MAGNITUDE_STEP)
    copies = 2 * len(policy.operations)
    later = tuple(_tiled(one, copies, len(labels)) for one in after)
    labels = labels.repeat(copies, *[1] * (labels.dim() - 1))
    return policy.apply(x.flatten(0, 2), labels, PolicyDraw(later, stage + 1))


def _tiled(draw: StageDraw, copies: int, records: int) -> StageDraw:
    """Repeat a stage's draw for copies of the same records."""
    starts = records * torch.arange(copies, device=draw.soft.device)[:, None]
    return StageDraw(
        draw.soft,
        tuple((starts + rows).flatten() for rows in draw.rows),
        {n: v.repeat(copies, *[1] * (v.dim() - 1)) for n, v in draw.noise.items()},
        draw.complete,
    )
