"""Hypergradients: the derivative of a validation loss in hyper-parameters.

The weights w are trained on ``L_train(w, phi)``; the hyper-parameters phi (a policy, or
the augmented batch itself) should lower ``L_val``. Everything here is a pure function
of dictionaries of tensors: weights, buffers, ``.grad`` and generators stay untouched.

The mixed derivative ``d/dphi <dL_train/dw, v>`` equals the directional derivative of
``dL_train/dphi`` along v in w. It is computed that way, forward mode over reverse mode,
which costs about two ordinary gradients and stores no second graph. A network with an
operation that torch cannot differentiate so (SiLU, say) is differentiated twice in
reverse mode, which gives the same numbers more slowly. A caller who needs dL_train/dw
anyway can keep its graph and hand it over: only the second backward pass is then left.

A network of ReLUs is piecewise smooth: its derivative is exact where it exists and says
nothing of the jumps of dL_train/dw at the kinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "METHODS",
    "InnerStep",
    "Method",
    "Tensors",
    "TrainLoss",
    "gradient_of",
    "hypergradient",
    "refuse_once_differentiable",
]

type Tensors = Mapping[str, Tensor]
#: ``inner_step(params, grads)`` -> (params after the step, its elementwise derivative
#: in the gradient, with the sign of a decrease: ``D = -d params_after / d grads``).
type InnerStep = Callable[
    [Tensors, Tensors], tuple[dict[str, Tensor], dict[str, Tensor]]
]
type TrainLoss = Callable[[Tensors, Tensors], Tensor]
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
    _check_validation(method, val_loss, val_gradient)
    losses = train_loss if isinstance(train_loss, Sequence) else [train_loss]
    val_gradient = val_gradient or (lambda at: gradient_of([val_loss], at))
    average = average or (lambda tensors, of: tensors)
    graph = None
    if _carry_graph(train_grads):
        graph = _Graph(train_grads, params, hparams)
        own = {name: value.detach() for name, value in train_grads.items()}
        train_grads = average(own, "train")
    params = {name: value.detach() for name, value in params.items()}
    hparams = {name: value.detach() for name, value in hparams.items()}

    def along(direction: Tensors, of: Literal["params", "hparams"]):
        if graph is not None:
            return graph.derivative_along(direction, of)
        return _sum(
            _derivative_along(loss, params, hparams, direction, of, first_try)
            for loss in losses
        )

    if method == "darts":
        return gradient_of([lambda h: val_loss(params, h)], hparams)
    if method == "neumann":
        gradient = average(val_gradient(params), "val")
        vector = _neumann(
            lambda term: average(along(term, "params"), "train"),
            gradient,
            lr,
            neumann_terms,
        )
    else:
        if train_grads is None:
            own = gradient_of(
                [lambda p, loss=loss: loss(p, hparams) for loss in losses], params
            )
            train_grads = average(own, "train")
        step = inner_step or _gradient_descent(lr)
        after, slope = step(params, train_grads)
        gradient = average(val_gradient(after), "val")
        vector = {name: slope[name] * gradient[name] for name in params}
        del after, slope, gradient  # as large as the weights; the peak is yet to come
    mixed = along(vector, "hparams")
    return {name: -value for name, value in mixed.items()}


def _check_arguments(method, train_loss, lr, neumann_terms, inner_step, train_grads):
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


def _check_validation(method, val_loss, val_gradient) -> None:
    if (val_loss is None) == (val_gradient is None):
        raise ValueError("Give val_loss or val_gradient, one of the two.")
    if method == "darts" and val_gradient is not None:
        raise ValueError("method 'darts' ignores val_gradient; give val_loss.")


def _carry_graph(train_grads: Tensors | None) -> bool:
    return any(gradient.requires_grad for gradient in (train_grads or {}).values())


def gradient_of(
    losses: Iterable[Callable[[Tensors], Tensor]], at: Tensors
) -> dict[str, Tensor]:
    """Return the gradient of a sum of scalars, with one graph at a time.

    Args:
        losses: functions of ``at``; each is called once.
        at: tensors by name, left as they are.

    Returns:
        The gradient by name.

    Raises:
        ValueError: if a loss does not use one of the tensors.

    Examples:
        >>> gradient_of([lambda p: p["w"], lambda p: 2 * p["w"]], {"w": torch.ones(())})
        {'w': tensor(3.)}
    """
    leaves = _leaves(at)
    with torch.enable_grad():
        return _sum(_named_gradient(loss(leaves), leaves) for loss in losses)


def _named_gradient(
    value: Tensor, leaves: Tensors, create_graph: bool = False
) -> dict[str, Tensor]:
    if not value.requires_grad:
        raise ValueError(f"No gradient reaches any of {', '.join(leaves)}.")
    gradients = torch.autograd.grad(
        value,
        list(leaves.values()),
        allow_unused=True,  # so that the error below can name the parameter
        create_graph=create_graph,
    )
    result = dict(zip(leaves, gradients, strict=True))
    unused = [name for name, gradient in result.items() if gradient is None]
    if unused:
        raise ValueError(
            f"No gradient reaches {', '.join(unused)}: the loss does not use it. Leave "
            "it out, or look for a detach() that cuts the graph."
        )
    return result


def _derivative_along(
    loss: Callable[[Tensors, Tensors], Tensor],
    params: Tensors,
    hparams: Tensors,
    direction: Tensors,
    of: Literal["params", "hparams"],
    first_try: Literal["forward", "reverse"],
) -> dict[str, Tensor]:
    """Return d/de of the gradient of loss(params + e direction, hparams) at e = 0.

    The gradient is the one in ``params`` (a Hessian product) or in ``hparams`` (the
    mixed derivative).
    """
    ways = [_forward_over_reverse, _reverse_over_reverse]
    first, second = ways if first_try == "forward" else reversed(ways)
    try:
        return first(loss, params, hparams, direction, of)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torch cannot go that way through some operation
        return second(loss, params, hparams, direction, of)


def _forward_over_reverse(loss, params, hparams, direction, of) -> dict[str, Tensor]:
    leaves = _leaves(params if of == "params" else hparams)
    start = leaves if of == "params" else params
    with forward_ad.dual_level(), torch.enable_grad():
        moving = {
            name: forward_ad.make_dual(start[name], direction[name]) for name in start
        }
        value = loss(moving, hparams if of == "params" else leaves)
        if value.requires_grad and forward_ad.unpack_dual(value).tangent is None:
            raise ValueError(
                f"No gradient reaches {', '.join(params)}: the training loss does not "
                "use the params that it is given."
            )
        gradients = _named_gradient(value, leaves)
        tangents = {
            name: forward_ad.unpack_dual(gradient).tangent
            for name, gradient in gradients.items()
        }
    # No tangent: the gradient does not depend on the weights, its derivative is zero.
    return {
        name: torch.zeros_like(leaves[name]) if tangent is None else tangent.detach()
        for name, tangent in tangents.items()
    }


def _reverse_over_reverse(loss, params, hparams, direction, of) -> dict[str, Tensor]:
    weights, others = _leaves(params), _leaves(hparams)
    with torch.enable_grad():
        value = loss(weights, others)
        wanted = weights if of == "params" else {**weights, **others}
        gradients = _named_gradient(value, wanted, create_graph=True)
        refuse_once_differentiable(gradients.values())
    wanted = weights if of == "params" else others
    bending = [name for name in weights if gradients[name].requires_grad]
    if not bending:
        return {name: torch.zeros_like(leaf) for name, leaf in wanted.items()}
    edges = [torch.autograd.graph.get_gradient_edge(gradients[n]) for n in bending]
    del value, gradients  # their graph is enough
    # Used, as was just seen; a gradient that does not bend has derivative zero.
    derivatives = torch.autograd.grad(
        edges,
        list(wanted.values()),
        grad_outputs=[direction[name] for name in bending],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(wanted, derivatives, strict=True))


def _sum(terms: Iterable[Tensors]) -> dict[str, Tensor]:
    terms = iter(terms)
    total = dict(next(terms))
    for term in terms:
        for name in total:
            total[name] = total[name] + term[name]
        del term  # as large as the weights, and not needed beside the next one
    return total


def _leaves(tensors: Tensors) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in tensors.items()}


class _Graph:
    """The graph of dL_train/dw, kept by the caller for second derivatives."""

    def __init__(self, train_grads: Tensors, params: Tensors, hparams: Tensors) -> None:
        # A gradient that does not bend carries no graph and adds nothing.
        self.train_grads = {n: g for n, g in train_grads.items() if g.requires_grad}
        refuse_once_differentiable(self.train_grads.values())
        self.wanted = {"params": params, "hparams": hparams}

    def derivative_along(
        self, direction: Tensors, of: Literal["params", "hparams"]
    ) -> dict[str, Tensor]:
        """Return what :func:`_derivative_along` returns; "hparams" frees the graph."""
        wanted = self.wanted[of]
        derivatives = torch.autograd.grad(
            list(self.train_grads.values()),
            list(wanted.values()),
            grad_outputs=[direction[name] for name in self.train_grads],
            retain_graph=of == "params",
            allow_unused=True,
        )
        result = dict(zip(wanted, derivatives, strict=True))
        for name, derivative in result.items():
            if derivative is None and of == "hparams":
                raise ValueError(
                    f"No gradient reaches {name}: the training gradients do not depend "
                    "on it. Look for a detach() that cuts the graph."
                )
            if derivative is None:  # the loss is linear in this weight
                result[name] = torch.zeros_like(wanted[name])
        return result


def refuse_once_differentiable(tensors: Iterable[Tensor]) -> None:
    """Raise where a part of the graph can be differentiated but once.

    Torch marks that part by a node that raises when it is reached. The node has no
    inputs, though, so a derivative in given tensors passes it by and is wrong.

    Args:
        tensors: first derivatives, with their graphs.

    Raises:
        RuntimeError: if there is such a part.

    Examples:
        >>> x = torch.ones((), requires_grad=True)
        >>> (slope,) = torch.autograd.grad(x**3, x, create_graph=True)
        >>> refuse_once_differentiable([slope])
    """
    waiting, seen = [tensor.grad_fn for tensor in tensors], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                "The model holds an operation that torch can differentiate only once "
                "in reverse mode (@once_differentiable)."
            )
        waiting += [following for following, _ in node.next_functions]


def _neumann(hessian_product, gradient, lr, terms) -> dict[str, Tensor]:
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
    def step(params, grads):
        after = {name: params[name] - lr * grads[name] for name in params}
        slope = {name: torch.full_like(params[name], lr) for name in params}
        return after, slope

    return step
