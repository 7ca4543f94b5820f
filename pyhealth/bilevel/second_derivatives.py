"""First derivatives by name, and second ones along a direction in the weights.

The mixed derivative ``d/dphi <dL_train/dw, v>`` equals the directional derivative of
``dL_train/dphi`` along v in w. It is computed that way, forward mode over reverse mode,
which costs about two ordinary gradients and stores no second graph. A network with an
operation that torch cannot differentiate so (SiLU, say) is differentiated twice in
reverse mode, which gives the same numbers more slowly. A caller who needs dL_train/dw
anyway can keep its graph: only the second backward pass is then left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .types import Tensors

__all__ = [
    "GradientGraph",
    "TrainLoss",
    "derivative_along",
    "gradient_of",
    "refuse_once_differentiable",
]

#: ``train_loss(params, hparams)`` -> scalar.
type TrainLoss = Callable[[Tensors, Tensors], Tensor]


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


def derivative_along(
    losses: Iterable[TrainLoss],
    params: Tensors,
    hparams: Tensors,
    direction: Tensors,
    of: Literal["params", "hparams"],
    first_try: Literal["forward", "reverse"] = "forward",
) -> dict[str, Tensor]:
    """Return d/de of the gradient of loss(params + e direction, hparams) at e = 0.

    The gradient is the one in ``params`` (a Hessian product) or in ``hparams`` (the
    mixed derivative).

    Args:
        losses: functions of ``params`` and ``hparams`` that are summed; one graph at a
            time is held.
        params: weights by name.
        hparams: hyper-parameters by name.
        direction: in the weights, by name.
        of: in what the gradient is taken.
        first_try: "forward" over reverse mode or "reverse" twice; where torch cannot go
            that way through some operation, the other one is taken.

    Returns:
        The derivative by the names of ``of``.

    Raises:
        ValueError: if a loss does not use one of the tensors.

    Examples:
        >>> w, phi = {"w": torch.tensor(2.0)}, {"phi": torch.tensor(3.0)}
        >>> derivative_along(
        ...     [lambda p, h: p["w"] ** 2 * h["phi"]], w, phi, w, of="hparams"
        ... )
        {'phi': tensor(8.)}
    """
    ways = [_forward_over_reverse, _reverse_over_reverse]
    first, second = ways if first_try == "forward" else reversed(ways)

    def of_one(loss: TrainLoss) -> dict[str, Tensor]:
        try:
            return first(loss, params, hparams, direction, of)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch cannot go that way through some operation
            return second(loss, params, hparams, direction, of)

    return _sum(of_one(loss) for loss in losses)


class GradientGraph:
    """The graph of dL_train/dw, kept by the caller for second derivatives.

    Args:
        train_grads: dL_train/dw by name, with their graph.
        params: the very weights that they were formed at.
        hparams: the very hyper-parameters.

    Raises:
        RuntimeError: if a part of the graph can be differentiated but once.

    Examples:
        >>> w, phi = (torch.tensor(v, requires_grad=True) for v in (2.0, 3.0))
        >>> (slope,) = torch.autograd.grad(w**2 * phi, w, create_graph=True)
        >>> graph = GradientGraph({"w": slope}, {"w": w}, {"phi": phi})
        >>> graph.derivative_along({"w": w.detach()}, "hparams")
        {'phi': tensor(8.)}
    """

    def __init__(self, train_grads: Tensors, params: Tensors, hparams: Tensors) -> None:
        # A gradient that does not bend carries no graph and adds nothing.
        self.train_grads = {n: g for n, g in train_grads.items() if g.requires_grad}
        refuse_once_differentiable(self.train_grads.values())
        self.wanted = {"params": params, "hparams": hparams}

    def derivative_along(
        self, direction: Tensors, of: Literal["params", "hparams"]
    ) -> dict[str, Tensor]:
        """Return what :func:`derivative_along` returns; "hparams" frees the graph.

        Args:
            direction: in the weights, by name.
            of: in what the gradient is taken.
        """
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


def _forward_over_reverse(
    loss: TrainLoss,
    params: Tensors,
    hparams: Tensors,
    direction: Tensors,
    of: Literal["params", "hparams"],
) -> dict[str, Tensor]:
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


def _reverse_over_reverse(
    loss: TrainLoss,
    params: Tensors,
    hparams: Tensors,
    direction: Tensors,
    of: Literal["params", "hparams"],
) -> dict[str, Tensor]:
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


def _sum(terms: Iterable[Tensors]) -> dict[str, Tensor]:
    terms = iter(terms)
    total = dict(next(terms))
    for term in terms:
        for name in tuple(total):  # one by one: no second sum is held meanwhile
            total[name] = total[name] + term[name]
        del term  # as large as the weights, and not needed beside the next one
    return total


def _leaves(tensors: Tensors) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in tensors.items()}
