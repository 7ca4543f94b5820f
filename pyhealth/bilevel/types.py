"""The types that the modules of this package hand to each other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["Batch", "Tensors"]

#: Weights, hyper-parameters or gradients by name.
type Tensors = Mapping[str, Tensor]

#: A batch as PyHealth's loaders make it; only its tensors are read.
type Batch = Mapping[str, Tensor]
