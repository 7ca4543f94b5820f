"""The straight-through derivative beside the enumerated one, for the page on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from pyhealth.bilevel import hypergradient
from pyhealth.bilevel.types import Tensors
from pyhealth.models.policy_draw import PolicyDraw, StageDraw
from pyhealth.models.taskaug_policy import TaskAugPolicy

OPERATIONS = ("gaussian_noise", "time_mask", "no_op", "baseline_wander")
RECORDS, LR = 8, 0.1


def logit_gradients() -> tuple[tuple[str, ...], Tensor, Tensor, Tensor]:
    """Return the operations' names and three derivatives in the logits.

    A stage draws one operation for the whole batch, so its expectation is a sum over
    four choices. The exact derivative is that of this sum; ours is the mean over the
    choices of the straight-through one; the last one leaves out, as an ordinary
    straight-through estimator would, what the operations that were not drawn would do.
    """
    torch.manual_seed(2)
    policy = TaskAugPolicy(
        1,
        operations=OPERATIONS,
        selection="batch",
        sampling_rate=100,
        initial_magnitude=0.25,
    ).double()
    weights = {
        "conv": torch.randn(4, 2, 7, dtype=torch.float64) / 4,
        "head": torch.randn(1, 4, dtype=torch.float64) / 2,
    }
    y = (torch.arange(RECORDS) % 2).double()[:, None]
    x, clean = (_signals(y) for _ in range(2))
    base = policy.sample(x.shape, y).stages[0]
    share = policy.probabilities()[0]
    exact, ours, drawn_only = (torch.zeros_like(share) for _ in range(3))
    for column in range(len(OPERATIONS)):
        draw = _choice(base, column)
        augmented = policy.apply(x, y, draw)

        def train_loss(w: Tensors, h: Tensors) -> Tensor:
            return cross_entropy(_logit(w, h["x"]), y)

        cotangent = hypergradient(
            train_loss,
            lambda w: cross_entropy(_logit(w, clean), y),
            weights,
            {"x": augmented},
            lr=LR,
        )["x"]
        (of_all,) = torch.autograd.grad(
            augmented, policy.logits, cotangent, retain_graph=True
        )
        ours += share[column] * of_all[0]
        effect = (cotangent * augmented.detach()).sum()
        one = torch.eye(len(share), dtype=share.dtype)[column]
        drawn_only += share[column] * effect * share[column] * (one - share)
        after = _stepped(train_loss, weights, augmented.detach())
        loss = cross_entropy(_logit(after, clean), y)
        exact += share[column] * loss.detach() * (one - share)
    return OPERATIONS, exact, ours.detach(), drawn_only.detach()


def _signals(y: Tensor) -> Tensor:
    time = torch.arange(200, dtype=torch.float64) / 100
    wave = torch.sin(2 * torch.pi * 3 * time) * (1 + y[:, :, None])
    return wave + 0.3 * torch.randn(len(y), 2, 200, dtype=torch.float64)


def _logit(w: Tensors, x: Tensor) -> Tensor:
    hidden = nn.functional.conv1d(x, w["conv"], stride=2)
    hidden = nn.functional.batch_norm(hidden, None, None, training=True)
    return nn.functional.softplus(hidden).mean(dim=-1) @ w["head"].T


def _choice(base: StageDraw, column: int) -> PolicyDraw:
    """Return the draw in which all records got one operation."""
    nobody = torch.arange(0)
    rows = [nobody] * len(OPERATIONS)
    rows[column] = torch.arange(RECORDS)
    return PolicyDraw((StageDraw(base.soft, tuple(rows), base.noise, True),))


def _stepped(train_loss, weights: Tensors, x: Tensor) -> Tensors:
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    slopes = torch.autograd.grad(train_loss(leaves, {"x": x}), list(leaves.values()))
    return {
        name: leaf.detach() - LR * slope
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True)
    }
