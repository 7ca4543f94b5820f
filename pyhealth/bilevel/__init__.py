"""Bi-level training: weights on training data, an augmentation policy on validation."""

from .hypergradient import hypergradient
from .inner_step import inner_step_of

__all__ = ["hypergradient", "inner_step_of"]
