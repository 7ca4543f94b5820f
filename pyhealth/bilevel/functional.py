"""A model as a pure function of its parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

from .types import Tensors

__all__ = ["call_with"]


def call_with(
    model: nn.Module, params: Tensors, inputs: Mapping[str, object]
) -> dict[str, Tensor]:
    """Call a model with other parameters and copies of its buffers.

    ``torch.func.functional_call`` alone leaves the other parameters in a model that
    holds one module under two names (PyHealth's TCN does): it swaps such a tensor in
    twice, and the second swap remembers the first one's as the original. Here each
    place is named once; a tensor that several modules share is swapped in each of them.

    Args:
        model: the model, left as it is.
        params: parameters by the names of ``model.named_parameters()``; those left out
            keep the model's own.
        inputs: keyword arguments of the call.

    Returns:
        What the model returns.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> model = nn.Sequential()
        >>> model.one = model.two = layer
        >>> weight = {"one.weight": torch.tensor([[3.0]])}
        >>> call_with(model, weight, {"input": torch.ones(1, 1)})
        tensor([[9.]])
        >>> model.one.weight is layer.weight and layer.weight.requires_grad
        True
    """
    given = {
        id(own): params[name]
        for name, own in model.named_parameters()
        if name in params
    }
    copies: dict[int, Tensor] = {}
    tensors = {}
    for module_name, module in model.named_modules():  # each module once
        prefix = f"{module_name}." if module_name else ""
        for name, own in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(own) in given:
                tensors[prefix + name] = given[id(own)]
        for name, own in module.named_buffers(recurse=False, remove_duplicate=False):
            if id(own) not in copies:
                copies[id(own)] = own.clone()
            tensors[prefix + name] = copies[id(own)]
    return functional_call(model, tensors, kwargs=dict(inputs), tie_weights=False)
