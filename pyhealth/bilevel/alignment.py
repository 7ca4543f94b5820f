"""The policy's derivative by comparing what each operation would have taught.

A policy's choice is discrete, and a network of ReLUs is only piecewise smooth in its
input: the derivative of ``dL_train/dw`` in the augmented signal exists almost
everywhere, yet it misses the jumps at the kinks, which for shifts in time and for the
choice of an operation are most of the effect. Here nothing is differentiated in the
signal. Records are passed through EVERY operation, and each record's training loss is
differentiated along one direction in the weights, the one that would lower the
validation loss (forward mode, one pass). An operation whose losses fall faster along it
than the others' pulls the weights where validation wants them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..models.policy_draw import PolicyDraw
from ..models.taskaug_policy import TaskAugPolicy
from .second_derivatives import refuse_once_differentiable
from .types import Tensors

__all__ = ["RecordLosses", "alignment_gradient", "magnitude_signs"]

#: ``record_losses(params, signals, rows)`` -> training loss of each signal (N,), which
#: is made of the record that ``rows`` names, a number from 0 to R - 1 each.
type RecordLosses = Callable[[Tensors, Tensor, list[int]], Tensor]

#: How far, in the unbounded parameter, magnitudes are moved up or down to compare them;
#: from the middle of an interval 0.6 leads to 0.35 and 0.65 of it.
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
    the policy's draws is enumerated: the logits get ``-p_i (s_i - sum_j p_j s_j)``. For
    the magnitudes' sake an operation takes half of the records with a magnitude that is
    :data:`MAGNITUDE_STEP` higher and half with one that much lower, as
    :func:`magnitude_signs` says; a magnitude gets ``-p_i sign (s_i - b) / step``, in
    expectation a central difference, with the mean of the record's other operations as
    b. All operations share each record's noise. What a record does to the others
    through a batch normalisation is left out.

    Args:
        policy: with K stages of O operations.
        x: clean training signals (R, C, T); every K-th of them is for one stage, and
            O R augmented signals are classified at once.
        labels: their classes, (R,) or (R, 1).
        record_losses: training loss of each signal at given weights.
        params: weights by name.
        direction: v by name.
        generator: source of the operations' noise.

    Returns:
        The derivative by the names of the policy's parameters.

    Raises:
        ValueError: if the loss does not use the weights.
        RuntimeError: if torch can differentiate a part of the model neither in forward
            mode nor twice in reverse mode.

    Source:
        The inner product of gradients as a data reward: Wang et al., Optimizing data
        usage via differentiable rewards, ICML 2020. Enumerating a stage's operations
        on the same records and the signed magnitudes are ours; the random signs are
        those of Spall's simultaneous perturbation (IEEE TAC 37, 1992).

    Examples:
        >>> policy = TaskAugPolicy(1, operations=["no_op", "gaussian_noise"])
        >>> x, labels, w = torch.ones(3, 1, 9), torch.zeros(3), {"w": torch.ones(())}
        >>> h = alignment_gradient(
        ...     policy, x, labels, lambda p, x, _: p["w"] * x.std(dim=(1, 2)), w, w
        ... )
        >>> h["logits"].abs().max()  # the noise is in proportion to the spread, 0
        tensor(0.)
    """
    stages, operations = policy.num_stages, len(policy.operations)
    signals, signs, rows, classes = [], [], [], []
    for stage in range(stages):
        # Every K-th record, but all of them where there are fewer than stages.
        own = slice(stage, None, stages) if len(x) >= stages else slice(None)
        draw = policy.sample(x[own].shape, labels[own], generator)
        classes.append(labels[own])
        signs.append(magnitude_signs(labels[own], operations, generator))
        signals.append(_variants(policy, stage, x[own], labels[own], draw, signs[-1]))
        rows += operations * list(range(len(x))[own])
    sizes = [len(one) for one in signals]
    variants = torch.cat(signals)
    del signals  # as large again
    slope = _slopes(
        lambda moving: record_losses(moving, variants, rows), params, direction
    )
    found = [
        _of_stage(
            policy, stage, one.reshape(operations, -1), signs[stage], classes[stage]
        )
        for stage, one in enumerate(slope.split(sizes))
    ]
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def _slopes(
    losses: Callable[[Tensors], Tensor], params: Tensors, direction: Tensors
) -> Tensor:
    """Return the derivative of each loss along a direction in the weights."""
    try:
        with torch.no_grad(), forward_ad.dual_level():
            moving = {
                name: forward_ad.make_dual(params[name], direction[name])
                for name in params
            }
            slope = forward_ad.unpack_dual(losses(moving)).tangent
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torch has no forward mode for a layer of the model
        slope = _slopes_in_reverse(losses, params, direction)
    if slope is None:
        raise ValueError("The training loss does not depend on the weights given.")
    return slope


def _slopes_in_reverse(
    losses: Callable[[Tensors], Tensor], params: Tensors, direction: Tensors
) -> Tensor | None:
    """Return the slopes by reverse mode, applied twice; None if there are none."""
    with torch.enable_grad():
        weights = {n: p.detach().requires_grad_() for n, p in params.items()}
        found = losses(weights)
        # The gradient is linear in the losses' weights, with the slopes as its matrix.
        unit = torch.zeros_like(found, requires_grad=True)
        gradients = torch.autograd.grad(
            found, list(weights.values()), unit, create_graph=True, allow_unused=True
        )
    bent = {
        name: gradient
        for name, gradient in zip(weights, gradients, strict=True)
        if gradient is not None and gradient.requires_grad
    }
    if not bent:
        return None
    refuse_once_differentiable(bent.values())
    return torch.autograd.grad(
        list(bent.values()), unit, [direction[name] for name in bent]
    )[0]


def magnitude_signs(
    labels: Tensor, operations: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw which records an operation takes with a higher magnitude.

    Args:
        labels: classes of R records, (R,) or (R, 1).
        operations: number of operations O.
        generator: source of the draw.

    Returns:
        1 or -1 for each operation and record (O, R), either with probability 1/2. The
        numbers of both differ by one at most, over all records and in each class.

    Examples:
        >>> signs = magnitude_signs(torch.tensor([0.0, 1.0, 0.0, 1.0]), operations=3)
        >>> signs.sum(dim=1)
        tensor([0., 0., 0.])
    """
    device = labels.device if generator is None else generator.device
    size = (operations, len(labels))
    place = torch.rand(size, generator=generator, device=device).to(labels.device)
    first = torch.randint(2, (operations, 1), generator=generator, device=device)
    # Records in an order of chance within their class; every second one has one sign.
    order = (labels.reshape(len(labels), -1)[:, 0] + place).argsort(dim=1)
    alternating = torch.arange(len(labels), device=labels.device)
    alternating = (alternating + first.to(labels.device)) % 2
    return torch.empty_like(place).scatter(1, order, 2.0 * alternating - 1)


def _of_stage(
    policy: TaskAugPolicy, stage: int, slope: Tensor, signs: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Turn slopes and signs (O, R') into a stage's derivative, (O,) by parameter."""
    probability = policy.probabilities()[stage]
    value = slope.mean(dim=1)
    result = {"logits": -probability * (value - probability @ value)}
    others = (slope.sum(dim=0) - slope) / max(len(slope) - 1, 1)
    moves = probability.new_tensor([op.high > op.low for op in policy.operations])
    weight = probability * moves / MAGNITUDE_STEP
    change = -weight[:, None] * signs * (slope - others)
    if policy.shared_magnitudes:
        return result | {"mag_neg": change.mean(dim=1)}
    share = labels.reshape(-1).to(change)
    return result | {
        "mag_neg": (change * (1 - share)).mean(dim=1),
        "mag_pos": (change * share).mean(dim=1),
    }


@torch.no_grad()
def _variants(
    policy: TaskAugPolicy,
    stage: int,
    x: Tensor,
    labels: Tensor,
    draw: PolicyDraw,
    signs: Tensor,
) -> Tensor:
    """Return (O R, C, T): one stage enumerated, the others as drawn."""
    # The other stages are applied for their values alone.
    others = draw.chosen_only().stages
    before, after = others[:stage], others[stage + 1 :]
    x = policy.apply(x, labels, PolicyDraw(before))
    shift = MAGNITUDE_STEP * signs.T
    x = policy.enumerate_stage(stage, x, labels, draw.stages[stage], shift)
    copies = len(policy.operations)
    later = tuple(one.tiled(copies) for one in after)
    labels = labels.repeat(copies, *[1] * (labels.dim() - 1))
    return policy.apply(x.flatten(0, 1), labels, PolicyDraw(later, stage + 1))
