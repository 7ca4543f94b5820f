"""Bi-level training: weights on training data, an augmentation policy on validation."""

from .hypergradient import hypergradient
from .inner_step import inner_step_of
from .trainer import BiLevelTrainer

__all__ = ["BiLevelTrainer", "hypergradient", "inner_step_of"]
