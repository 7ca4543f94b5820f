"""The policy's optimiser, and the statistics of its hypergradients."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from ..models.taskaug_policy import TaskAugPolicy
from .types import PolicyOptimizerState

__all__ = ["PolicyOptimizer", "signal_to_noise", "tell_policy"]

# Below PyHealth's trainer, whose log file then gets these lines too.
logger = logging.getLogger("pyhealth.trainer.bilevel")

#: Adam's decays: means over about 10 hypergradients and 100 squares of them.
OUTER_BETAS = (0.9, 0.99)

#: Random sign patterns of the test whether a policy learned anything.
SIGN_FLIPS = 999

#: Above this p-value a learned policy is said to be no other than its start.
NOTHING_LEARNED = 0.05


class PolicyOptimizer:
    """Adam on the mean of several hypergradients.

    The authors take RMSprop, whose first step, without a correction for its empty
    history, moves every parameter by ten times the learning rate, and the next ones by
    nearly as much: with hypergradients that are mostly noise the policy would be thrown
    about before it has learned anything.

    Args:
        policy: the policy to learn.
        lr: learning rate.
        accumulate: hypergradients that are averaged for one step.

    Examples:
        >>> policy = TaskAugPolicy(num_stages=1, operations=("no_op", "time_mask"))
        >>> outer = PolicyOptimizer(policy, lr=0.1, accumulate=1)
        >>> gradient = {n: torch.ones_like(p) for n, p in policy.named_parameters()}
        >>> outer.add(gradient, torch.tensor(True))
        >>> policy.logits.data
        tensor([[-0.1000, -0.1000]])
    """

    def __init__(self, policy: TaskAugPolicy, lr: float, accumulate: int) -> None:
        self.params = dict(policy.named_parameters())
        self.optimizer = torch.optim.Adam(
            self.params.values(), lr=lr, betas=OUTER_BETAS
        )
        self.accumulate = accumulate
        self.waiting: list[tuple[dict[str, Tensor], Tensor]] = []
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.earlier: list[Tensor] = []

    def add(self, gradient: dict[str, Tensor], finite: Tensor) -> None:
        """Take one hypergradient; step the policy when there are enough.

        Args:
            gradient: by the policy's parameter names; all zeros says nothing (a ranking
                loss of a validation batch of one class) and is not used.
            finite: 0-dim, whether it is to be used.
        """
        finite = finite & torch.stack([g.any() for g in gradient.values()]).any()
        gradient = {name: torch.where(finite, g, 0) for name, g in gradient.items()}
        self.seen.append((gradient["logits"].flatten(), finite))
        self.waiting.append((gradient, finite))
        if len(self.waiting) < self.accumulate:
            return
        count = torch.stack([finite for _, finite in self.waiting]).sum()
        for name, parameter in self.params.items():
            total = sum(gradient[name] for gradient, _ in self.waiting)
            parameter.grad = total / count.clamp_min(1)
        self._step_if(count > 0)
        self.waiting = []

    def statistics(self) -> tuple[float, float]:
        """Return norm and signal-to-noise ratio of the epoch, which ends with this.

        The ratio is that of :func:`signal_to_noise`.
        """
        seen = [logits for logits, finite in self.seen if finite]
        self.seen = []
        self.earlier += seen
        if not seen:
            return math.nan, math.nan
        rows = torch.stack(seen)
        return rows.norm(dim=1).mean().item(), signal_to_noise(rows)

    def p_value(self) -> float:
        """Return how often chance alone would point as far as this run's mean did.

        A sign-flip test on the length of the logits' mean hypergradient: were there no
        direction in them, every hypergradient could as well have had the other sign.

        Returns:
            In (0, 1]; nan before the first whole epoch with hypergradients.
        """
        if not self.earlier:
            return math.nan
        seen = torch.stack(self.earlier).cpu().double()
        generator = torch.Generator().manual_seed(0)
        flips = torch.randint(2, (SIGN_FLIPS, len(seen)), generator=generator)
        by_chance = ((2.0 * flips - 1).double() @ seen).norm(dim=1)
        # A run of one hypergradient ties with itself: rounding must not decide it.
        reached = by_chance >= seen.sum(dim=0).norm() * (1 - 1e-9)
        return (1 + reached.sum().item()) / (1 + SIGN_FLIPS)

    def state_dict(self) -> PolicyOptimizerState:
        """Return everything that later steps depend on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "waiting": self.waiting,
            "seen": self.seen,
            "earlier": self.earlier,
        }

    def load_state_dict(self, state: PolicyOptimizerState) -> None:
        """Take over what :meth:`state_dict` returned."""
        device = self.params["logits"].device
        self.optimizer.load_state_dict(state["optimizer"])
        self.waiting = [
            ({name: g.to(device) for name, g in gradient.items()}, finite.to(device))
            for gradient, finite in state["waiting"]
        ]
        self.seen = [(g.to(device), finite.to(device)) for g, finite in state["seen"]]
        self.earlier = [g.to(device) for g in state["earlier"]]

    def _step_if(self, wanted: Tensor) -> None:
        # Taken and, if unwanted, taken back on the device itself: asking it first would
        # make it wait in every step, and these are some dozens of numbers.
        before = {
            p: (p.detach().clone(), self._moments(p)) for p in self.params.values()
        }
        self.optimizer.step()
        self.optimizer.zero_grad()
        for parameter, (value, moments) in before.items():
            parameter.data.copy_(torch.where(wanted, parameter.data, value))
            for name, moment in self.optimizer.state[parameter].items():
                moment.copy_(torch.where(wanted, moment, moments.get(name, 0)))

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state[parameter]
        return {name: moment.clone() for name, moment in state.items()}


def tell_policy(p_value: float) -> None:
    """Log whether a policy's direction can be told from chance.

    Args:
        p_value: of :meth:`PolicyOptimizer.p_value`; nan where nothing was learned says
            nothing.

    Examples:
        >>> tell_policy(0.01)
    """
    if p_value > NOTHING_LEARNED:
        logger.warning(
            "THE POLICY CANNOT BE TOLD FROM ITS START: hypergradients of random signs "
            "point as far with p = %.2f. Its probabilities are chance. More epochs, "
            "larger batches, accumulate=..., or more validation records may show a "
            "direction.",
            p_value,
        )
    elif not math.isnan(p_value):
        logger.info("The policy's direction is not chance: p = %.3f", p_value)


def signal_to_noise(gradients: Tensor) -> float:
    """Return the length of the mean over its standard error; near 1 it is noise.

    Args:
        gradients: (N, D), one row a hypergradient.

    Returns:
        0 or more; nan for fewer than two rows.

    Examples:
        >>> round(signal_to_noise(torch.tensor([[1.0, 0.0], [3.0, 0.0]])), 3)
        2.0
    """
    if len(gradients) < 2:
        return math.nan
    error = (gradients.var(dim=0).sum() / len(gradients)).sqrt()
    return (gradients.mean(dim=0).norm() / error).item()
