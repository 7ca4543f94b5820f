"""The inner optimiser's next step as a pure function, with its derivative."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, cast

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .hypergradient import InnerStep
from .types import Tensors

__all__ = ["inner_step_of"]

#: Elements of Adam whose gradient scale is below this share of the network's are taken
#: as dead: what they carry is rounding noise.
DEAD_SHARE = 1e-6


class _Group(TypedDict, total=False):
    # The options of SGD, and of Adam and AdamW.
    lr: float
    weight_decay: float
    momentum: float
    dampening: float
    nesterov: bool
    betas: tuple[float, float]
    eps: float
    decoupled_weight_decay: bool


class _State(TypedDict, total=False):
    momentum_buffer: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float | Tensor


def inner_step_of(optimizer: Optimizer, params: Mapping[str, Tensor]) -> InnerStep:
    """Return the step that an optimiser would take next, as a pure function.

    The returned ``inner_step(params, grads)`` gives the weights after the step and the
    elementwise derivative D of the decrease in the gradient. The optimiser's state is
    read, never changed; a parameter without state is at its first step.

    Adam divides by the root of its second moment. Where that root is tiny (a dead unit,
    a bias that a normalisation cancels) D explodes although the gradient there is
    rounding noise, so D is set to zero where the root is below :data:`DEAD_SHARE` times
    the root mean square over all parameters. At Adam's first step the update is nearly
    ``lr * sign(gradient)``, so D is nearly zero and so is the hypergradient.

    Args:
        optimizer: a ``torch.optim`` SGD, Adam or AdamW.
        params: the optimiser's parameters by the names that will be used.

    Returns:
        The step, for :func:`~pyhealth.bilevel.hypergradient.hypergradient`.

    Raises:
        ValueError: for another optimiser, for ``amsgrad`` or ``maximize``, or for a
            parameter that the optimiser does not hold.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> step = inner_step_of(torch.optim.SGD([w], lr=0.1), {"w": w})
        >>> step({"w": w.detach()}, {"w": torch.tensor([2.0])})
        ({'w': tensor([0.8000])}, {'w': tensor([0.1000])})
    """
    if type(optimizer) not in (SGD, Adam, AdamW):
        raise ValueError(
            f"inner_step_of reads SGD, Adam and AdamW, got {type(optimizer).__name__}."
        )
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    groups: dict[str, _Group] = {}
    states: dict[str, _State] = {}
    for name, parameter in params.items():
        if id(parameter) not in group_of:
            raise ValueError(f"The optimiser does not hold parameter {name!r}.")
        groups[name] = cast(_Group, group_of[id(parameter)])
        states[name] = optimizer.state.get(parameter, {})
        for option in ("amsgrad", "maximize"):
            if groups[name].get(option):
                raise ValueError(f"inner_step_of does not support {option}=True.")

    if isinstance(optimizer, SGD):
        return _sgd_step(groups, states)
    return _adam_step(groups, states)


def _sgd_step(groups: Mapping[str, _Group], states: Mapping[str, _State]) -> InnerStep:
    def step(
        params: Tensors, grads: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        after, slope = {}, {}
        for name, w in params.items():
            group, buffer = groups[name], states[name].get("momentum_buffer")
            gradient = grads[name] + group["weight_decay"] * w
            update, factor = gradient, 1.0
            if group["momentum"]:
                share = 1.0 if buffer is None else 1 - group["dampening"]
                update = share * gradient
                if buffer is not None:
                    update = update + group["momentum"] * buffer
                factor = share
                if group["nesterov"]:
                    update = gradient + group["momentum"] * update
                    factor = 1 + group["momentum"] * share
            after[name] = w - group["lr"] * update
            slope[name] = torch.full_like(w, group["lr"] * factor)
        return after, slope

    return step


def _adam_step(groups: Mapping[str, _Group], states: Mapping[str, _State]) -> InnerStep:
    def step(
        params: Tensors, grads: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        after, slope, roots = {}, {}, {}
        for name, w in params.items():
            after[name], slope[name], roots[name] = _adam_element(
                w, grads[name], groups[name], states[name]
            )
        dead = DEAD_SHARE * _root_mean_square(roots)
        for name, root in roots.items():
            slope[name] = torch.where(root > dead, slope[name], 0)
        return after, slope

    return step


def _adam_element(
    w: Tensor, gradient: Tensor, group: _Group, state: _State
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (w after the step, its slope, the root of the second moment).

    Kingma & Ba 2015, algorithm 1. The update is u = lr m / (r + eps), r = sqrt(v), with
    m and v (bias-corrected) linear in g and g^2 by the shares s1 and s2. Hence
    du/dg = lr [s1 - m s2 g / (r (r + eps))] / (r + eps).
    """
    lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
    beta1, beta2 = group["betas"]
    if group["decoupled_weight_decay"]:  # AdamW sets it
        w = w * (1 - lr * decay)
    else:
        gradient = gradient + decay * w
    first = state.get("exp_avg", torch.zeros_like(w))
    second = state.get("exp_avg_sq", torch.zeros_like(w))
    time = _double(state.get("step", 0)) + 1
    share1 = (1 - beta1) / (1 - beta1**time)
    share2 = (1 - beta2) / (1 - beta2**time)
    mean = beta1 * first / (1 - beta1**time) + share1 * gradient
    root = (beta2 * second / (1 - beta2**time) + share2 * gradient.square()).sqrt()
    update = lr * mean / (root + eps)
    bend = mean * share2 * gradient / (root * (root + eps))
    slope = lr * (share1 - torch.where(root > 0, bend, 0)) / (root + eps)
    return w - update, slope, root


def _double(step: float | Tensor) -> float | Tensor:
    """Return Adam's count of steps in double precision, for exact powers."""
    # A fused optimiser counts on the device; reading that here would wait for it.
    if isinstance(step, Tensor) and step.device.type != "cpu":
        return step.double()
    return float(step)


def _root_mean_square(tensors: Mapping[str, Tensor]) -> Tensor:
    first, *others = (value.square().sum() for value in tensors.values())
    total = sum(others, start=first)
    return (total / sum(value.numel() for value in tensors.values())).sqrt()
