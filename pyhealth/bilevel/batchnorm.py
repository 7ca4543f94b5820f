"""BatchNorm statistics of the data that a network is evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from .types import Batch

__all__ = ["batchnorm_statistics_kept", "clean_statistics", "reestimate_batchnorm"]


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Set running statistics to the plain average over some batches.

    In training, BatchNorm follows augmented batches while the weights still move; at
    test time the signals are clean and the weights at rest. This replaces the running
    mean and variance of every BatchNorm layer that keeps them by their average over
    ``batches``. Weights, modes, momenta and torch's random state stay as they are, and
    dropout and a model's own augmentation are off meanwhile. A model without BatchNorm
    is left alone.

    Args:
        model: a PyHealth model, called with a batch's entries as keywords.
        batches: batches to average over, all with equal weight: clean training batches
            for an evaluation on clean data.

    Raises:
        ValueError: if there are no batches.

    Source:
        The "precise BatchNorm" of Wu and Johnson, Rethinking "Batch" in BatchNorm,
        arXiv 2105.07576, section 3; the averaging is ``torch.optim.swa_utils``'s.

    Examples:
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm = torch.nn.BatchNorm1d(1)
        ...     def forward(self, ecg):
        ...         return self.norm(ecg)
        >>> model = Model()
        >>> reestimate_batchnorm(model, [{"ecg": torch.tensor([[1.0], [3.0]])}])
        >>> model.norm.running_mean, model.norm.running_var
        (tensor([2.]), tensor([2.]))
    """
    modes = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in _running(model)}
    model.eval()
    clean = _OnlyBatchNormTrains(model)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            update_bn(batches, clean)
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if momenta and not clean.called:
        raise ValueError("There are no batches to estimate the statistics from.")


@contextmanager
def batchnorm_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Put the running statistics back at the end.

    Args:
        model: the model whose statistics change meanwhile.

    Yields:
        Nothing.

    Examples:
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> with batchnorm_statistics_kept(norm):
        ...     _ = norm(torch.ones(2, 1))
        >>> norm.running_mean
        tensor([0.])
    """
    layers = list(_running(model))
    kept = [{name: b.clone() for name, b in m.named_buffers()} for m in layers]
    try:
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            for name, value in buffers.items():
                getattr(layer, name).copy_(value)


@contextmanager
def clean_statistics(
    model: nn.Module, batches: Iterable[Batch], wanted: bool = True
) -> Iterator[None]:
    """Use the running statistics of clean data meanwhile.

    Args:
        model: the model, see :func:`reestimate_batchnorm`.
        batches: clean training batches.
        wanted: False for nothing at all.

    Examples:
        >>> with clean_statistics(torch.nn.Linear(1, 1), [], wanted=False):
        ...     pass
    """
    if not wanted:
        yield
        return
    with batchnorm_statistics_kept(model):
        reestimate_batchnorm(model, batches)
        yield


class _OnlyBatchNormTrains(nn.Module):
    """What ``update_bn`` calls: takes a batch, and puts only BatchNorm in train mode.

    In train mode dropout would thin the features that the statistics are taken of, and
    a model with a policy would augment.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.called = False

    def train(self, mode: bool = True) -> _OnlyBatchNormTrains:
        for layer in _running(self.model):
            layer.train(mode)
        return self

    def forward(self, batch: Batch) -> None:
        self.called = True
        self.model(**batch)


def _running(model: nn.Module) -> Iterator[_BatchNorm]:
    """Yield the layers that keep running statistics."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            yield module
