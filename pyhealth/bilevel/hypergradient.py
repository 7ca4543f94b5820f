"""Hypergradients: the derivative of a validation loss in hyper-parameters.

The weights w are trained on ``L_train(w, phi)``; the hyper-parameters phi (a policy, or
the augmented batch itself) should lower ``L_val``. Everything here is a pure function
of dictionaries of tensors: weights, buffers, ``.grad`` and generators stay untouched.

A network of ReLUs is piecewise smooth: its derivative is exact where it exists and says
nothing of the jumps of dL_train/dw at the kinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .second_derivatives import (
    GradientGraph,
    TrainLoss,
    derivative_along,
    gradient_of,
)
from .types import Tensors

__all__ = ["METHODS", "InnerStep", "Method", "hypergradient"]

#: ``inner_step(params, grads)`` -> (params after the step, its elementwise derivative
#: in the gradient, with the sign of a decrease: ``D = -d params_after / d grads``).
type InnerStep = Callable[
    [Tensors, Tensors], tuple[dict[str, Tensor], dict[str, Tensor]]
]
type Method = Literal["one_step", "neumann", "darts"]
METHODS: tuple[str, ...] = ("one_step", "neumann", "darts")

#: A Neumann term this many times the first one means the series does not converge.
DIVERGENCE_RATIO = 100.0


def hypergradient(
    train_loss: TrainLoss | Sequence[TrainLoss] | None,
    val_loss: Callable[..., Tensor] | None,
    params: Tensors,
    hparams: Tensors,
    lr: float | None = None,
    method: Method = "one_step",
    neumann_terms: int = 1,
    inner_step: InnerStep | None = None,
    train_grads: Tensors | None = None,
    average: Callable[[Tensors, Literal["train", "val"]], Tensors] | None = None,
    val_gradient: Callable[[Tensors], Tensors] | None = None,
    first_try: Literal["forward", "reverse"] = "forward",
) -> dict[str, Tensor]:
    """Return the derivative of the validation loss in the hyper-parameters.

    With g = dL_val/dw and H = d2L_train/dw2:

    - ``one_step``: the exact derivative of ``L_val(w')`` for one inner step
      ``w' = w - u(dL_train/dw)``: ``-d/dphi <dL_train/dw (w, phi), D * g(w')>``, where
      D is the elementwise derivative of u.
    - ``neumann``: implicit differentiation at w, the inverse Hessian as a truncated
      series: ``p = lr * sum_{j=0..J} (I - lr H)^j g(w)``, then
      ``-d/dphi <dL_train/dw, p>``. J is ``neumann_terms``: J Hessian products, J + 1
      summands. J = 0 is ``one_step`` with D = lr taken at w.
    - ``darts``: the first-order form that lets the validation batch itself pass the
      policy: ``d/dphi val_loss(params, hparams)``. It is kept for comparison. With
      class-specific magnitudes it rewards writing the label into the signal.

    Args:
        train_loss: ``train_loss(params, hparams)`` -> scalar; deterministic. Several
            of them are summed, and differentiated one after the other, so that one
            graph at a time is held. ``darts`` takes None.
        val_loss: ``val_loss(params)`` -> scalar; ``val_loss(params, hparams)`` for
            ``darts``.
        params: trainable weights w by name.
        hparams: hyper-parameters phi by name.
        lr: inner learning rate eta. Needed by ``neumann``, and by ``one_step`` without
            an ``inner_step``.
        method: one of :data:`METHODS`.
        neumann_terms: number J of Hessian products, ``neumann`` only.
        inner_step: the inner optimiser's update for ``one_step``; default plain
            gradient descent with ``lr``. See
            :func:`~pyhealth.bilevel.inner_step.inner_step_of`.
        train_grads: dL_train/dw at (params, hparams) where the caller has it already;
            ``one_step`` only, unless it carries its graph (``create_graph=True``) from
            the very tensors in ``params`` and ``hparams``: second derivatives then go
            backward through that graph, which is freed. It is the cheapest way where
            the memory allows it.
        average: takes the mean over several processes, whose losses are means of their
            own records, of what comes from the "val" or the "train" loss: the gradient
            g and Hessian products. Each process then gets its part of the result, whose
            mean is the derivative. ``train_grads`` without graph must be means already.
        val_gradient: ``val_gradient(params)`` -> dL_val/dw by name, where the caller
            has a leaner way to it; ``val_loss`` is then None. Not for ``darts``.
        first_try: how second derivatives are formed, if torch can for all operations:
            "forward" over reverse, the fewest convolutions of torch's own, or
            "reverse" twice, which holds less at a time.

    Returns:
        The derivative by name, like ``hparams``.

    Raises:
        ValueError: if an argument is missing, or given to a method that ignores it, or
            a parameter has no gradient (its name is said).
        ArithmeticError: if the Neumann series diverges.

    Source:
        Liu, Simonyan, Yang, DARTS, ICLR 2019 (one unrolled step, first-order form);
        Lorraine, Vicol, Duvenaud, AISTATS 2020, algorithm 3 (Neumann series). A long
        series is a small step times a large inverse: damp it by a smaller ``lr``.

    Examples:
        On ``L_train = |w - phi|^2 / 2`` and ``L_val = |w|^2 / 2`` a step of size 0.1
        moves w by a tenth of phi, so the derivative is 0.1 w':

        >>> w, phi = {"w": torch.tensor([1.0])}, {"phi": torch.tensor([3.0])}
        >>> hypergradient(
        ...     lambda p, h: (p["w"] - h["phi"]).square().sum() / 2,
        ...     lambda p: p["w"].square().sum() / 2,
        ...     w, phi, lr=0.1,
        ... )
        {'phi': tensor([0.1200])}
    """
    _check_arguments(method, train_loss, lr, neumann_terms, inner_step, train_grads)
    gradient_at = _validation(method, val_loss, val_gradient, params)
    losses = _listed(train_loss)
    lr = math.nan if lr is None else lr  # not read then
    average = average or (lambda tensors, of: tensors)
    graph = None
    if train_grads is not None and _carry_graph(train_grads):
        graph = GradientGraph(train_grads, params, hparams)
        own = {name: value.detach() for name, value in train_grads.items()}
        train_grads = average(own, "train")
    params = {name: value.detach() for name, value in params.items()}
    hparams = {name: value.detach() for name, value in hparams.items()}

    def along(
        direction: Tensors, of: Literal["params", "hparams"]
    ) -> dict[str, Tensor]:
        if graph is not None:
            return graph.derivative_along(direction, of)
        return derivative_along(losses, params, hparams, direction, of, first_try)

    if method == "darts":
        return dict(gradient_at(hparams))
    if method == "neumann":
        vector = _neumann(
            lambda term: average(along(term, "params"), "train"),
            average(gradient_at(params), "val"),
            lr,
            neumann_terms,
        )
    else:
        if train_grads is None:
            own = gradient_of([_at(hparams, loss) for loss in losses], params)
            train_grads = average(own, "train")
        vector = _one_step(
            inner_step or _gradient_descent(lr),
            params,
            train_grads,
            lambda after: average(gradient_at(after), "val"),
        )
    mixed = along(vector, "hparams")
    return {name: -value for name, value in mixed.items()}


def _check_arguments(
    method: Method,
    train_loss: TrainLoss | Sequence[TrainLoss] | None,
    lr: float | None,
    neumann_terms: int,
    inner_step: InnerStep | None,
    train_grads: Tensors | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}.")
    has_graph = _carry_graph(train_grads)
    ignored = {
        "neumann_terms": method != "neumann" and neumann_terms != 1,
        "inner_step": method != "one_step" and inner_step is not None,
        "train_grads": train_grads is not None
        and not (method == "one_step" or (method == "neumann" and has_graph)),
        "train_loss": method == "darts" and train_loss is not None,
        "lr": lr is not None and (method == "darts" or inner_step is not None),
    }
    for name, is_ignored in ignored.items():
        if is_ignored:
            raise ValueError(
                f"method {method!r} ignores {name}"
                f"{' where inner_step is given' if name == 'lr' else ''}; leave it out."
            )
    if method != "darts" and train_loss is None:
        raise ValueError(f"method {method!r} needs train_loss.")
    if method == "neumann" and neumann_terms < 0:
        raise ValueError(f"neumann_terms must be 0 or more, got {neumann_terms}.")
    if method != "darts" and lr is None and inner_step is None:
        raise ValueError(f"method {method!r} needs lr, the inner learning rate.")


def _validation(
    method: Method,
    val_loss: Callable[..., Tensor] | None,
    val_gradient: Callable[[Tensors], Tensors] | None,
    params: Tensors,
) -> Callable[[Tensors], Tensors]:
    """Return what gives dL_val/dw at given weights, and for "darts" dL_val/dphi."""
    if val_loss is not None and val_gradient is None:
        if method == "darts":
            fixed = {name: value.detach() for name, value in params.items()}
            return partial(gradient_of, [partial(val_loss, fixed)])
        return partial(gradient_of, [val_loss])
    if val_loss is not None or val_gradient is None:
        raise ValueError("Give val_loss or val_gradient, one of the two.")
    if method == "darts":
        raise ValueError("method 'darts' ignores val_gradient; give val_loss.")
    return val_gradient


def _listed(train_loss: TrainLoss | Sequence[TrainLoss] | None) -> Sequence[TrainLoss]:
    if train_loss is None:
        return []
    return train_loss if isinstance(train_loss, Sequence) else [train_loss]


def _at(hparams: Tensors, loss: TrainLoss) -> Callable[[Tensors], Tensor]:
    return lambda params: loss(params, hparams)


def _carry_graph(train_grads: Tensors | None) -> bool:
    return any(gradient.requires_grad for gradient in (train_grads or {}).values())


def _one_step(
    inner_step: InnerStep,
    params: Tensors,
    train_grads: Tensors,
    val_gradient: Callable[[Tensors], Tensors],
) -> dict[str, Tensor]:
    after, slope = inner_step(params, train_grads)
    gradient = val_gradient(after)
    return {name: slope[name] * gradient[name] for name in params}


def _neumann(
    hessian_product: Callable[[Tensors], Tensors],
    gradient: Tensors,
    lr: float,
    terms: int,
) -> dict[str, Tensor]:
    # sum_{j<=J} (I - lr H)^j g: term_{j+1} = term_j - lr H term_j.
    term, total, first = gradient, dict(gradient), _norm(gradient)
    for _ in range(terms):
        product = hessian_product(term)
        term = {name: term[name] - lr * product[name] for name in term}
        size = _norm(term)
        # A gradient that is not finite is no fault of the series.
        if math.isfinite(first) and not size <= DIVERGENCE_RATIO * first:
            raise ArithmeticError(
                f"The Neumann series diverges: a term is {size / first:.3g} times the "
                "first. Take a smaller neumann_lr or fewer neumann_terms."
            )
        total = {name: total[name] + term[name] for name in total}
    return {name: lr * value for name, value in total.items()}


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(value.square().sum().item() for value in tensors.values()))


def _gradient_descent(lr: float) -> InnerStep:
    def step(
        params: Tensors, grads: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        after = {name: params[name] - lr * grads[name] for name in params}
        slope = {name: torch.full_like(params[name], lr) for name in params}
        return after, slope

    return step
