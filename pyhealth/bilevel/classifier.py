"""A PyHealth model as the classifier of a bi-level run: its weights, its passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.taskaug_policy import TaskAugPolicy
from .functional import call_with
from .types import Batch, Tensors

__all__ = [
    "PRECISIONS",
    "Classifier",
    "augmented_by_trainer",
    "classifier_parameters",
    "fixed_seed",
]

PRECISIONS = ("fp32", "bf16")

#: The switch of a model that augments by itself.
SWITCH = "augment"


def classifier_parameters(
    model: nn.Module, policy: nn.Module
) -> dict[str, nn.Parameter]:
    """Return the parameters that the training loss trains, by name.

    Left out are the policy's, those of a policy of the model's own that another one
    replaces, and ``BaseModel._dummy_param``, an empty parameter that
    only says on which device a PyHealth model is.

    Args:
        model: the classifier, which may hold the policy.
        policy: the policy.

    Returns:
        The trainable parameters by their names in the model.

    Examples:
        >>> list(classifier_parameters(torch.nn.Linear(2, 1), TaskAugPolicy()))
        ['weight', 'bias']
    """
    policies = [policy, getattr(model, "policy", None)]
    of_policy = {
        id(parameter)
        for owner in policies
        if isinstance(owner, TaskAugPolicy)
        for parameter in owner.parameters()
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in of_policy
        and name.rpartition(".")[2] != "_dummy_param"
    }


class Classifier:
    """The forward passes of a model: those of its own weights, and pure ones.

    Every pass has a seed for what is random in the model, dropout above all, so that
    two passes can share one mask; the global random state stays as it is.

    Args:
        model: a PyHealth model.
        input_key: the signals' key in a batch.
        label_key: the labels' key in a batch.
        val_statistics: BatchNorm on clean data: "running" statistics, as at test time,
            or those of the "batch".
        precision: "fp32", or "bf16" under ``torch.autocast``.
        device_type: of the passes, "cpu" or "cuda".

    Raises:
        ValueError: for another precision.

    Examples:
        >>> class Mean(nn.Linear):
        ...     def forward(self, ecg):
        ...         return {"loss": super().forward(ecg).mean()}
        >>> classifier = Classifier(Mean(2, 1, bias=False), "ecg", "label")
        >>> weight = {"weight": torch.tensor([[3.0, 1.0]])}
        >>> classifier.pure(weight, {"ecg": torch.ones(5, 2)}, seed=0, training=False)
        {'loss': tensor(4.)}
    """

    def __init__(
        self,
        model: nn.Module,
        input_key: str,
        label_key: str,
        val_statistics: Literal["running", "batch"] = "running",
        precision: Literal["fp32", "bf16"] = "fp32",
        device_type: str = "cpu",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {list(PRECISIONS)}, got {precision!r}."
            )
        self.model = model
        self.input_key = input_key
        self.label_key = label_key
        self.val_statistics = val_statistics
        self.precision = precision
        self.device_type = device_type

    def records(self, batch: Batch) -> int:
        """Return the number of a batch's records."""
        return len(batch[self.input_key])

    def trained(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Pass a training batch through the model as it is; buffers move.

        Args:
            batch: the batch, augmented.
            seed: of dropout.

        Returns:
            The model's output.
        """
        self.model.train()
        with fixed_seed(seed), self.autocast():
            return self.model(**batch)

    def pure(
        self, params: Tensors, batch: Batch, seed: int, *, training: bool
    ) -> dict[str, Tensor]:
        """Pass a batch at given weights; nothing of the model moves.

        Args:
            params: weights by name.
            batch: the batch.
            seed: of dropout.
            training: as in training, or as on clean data.

        Returns:
            The model's output.
        """
        self.model.train(training)
        if not training and self.val_statistics == "batch":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()  # only these: dropout stays off
        with fixed_seed(seed), self.autocast():
            # Copies of the buffers take what a training forward would update in them.
            output = call_with(self.model, params, batch)
        self.model.train()
        if "logit" in output and output["logit"].dtype in (torch.bfloat16, torch.half):
            # Losses are formed in float32, as autocast would do.
            output = {**output, "logit": output["logit"].float()}
        return output

    def autocast(self) -> torch.autocast:
        """Return the context of the passes' precision."""
        # Not cached: a cached cast of a weight would tie one derivative to another.
        return torch.autocast(
            self.device_type,
            dtype=torch.bfloat16,
            enabled=self.precision == "bf16",
            cache_enabled=False,
        )


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Seed the global generators (dropout reads them) and put them back after.

    Args:
        seed: to set meanwhile.

    Examples:
        >>> with fixed_seed(0):
        ...     one = torch.rand(())
        >>> with fixed_seed(0):
        ...     print(torch.rand(()) == one)
        tensor(True)
    """
    # manual_seed reseeds every CUDA device, also where the batch is still on the CPU.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def augmented_by_trainer(model: nn.Module) -> Iterator[None]:
    """Keep a model's own forward from augmenting a second time.

    Args:
        model: a PyHealth model; its switch ``augment``, if any, is off meanwhile.

    Examples:
        >>> model = nn.Identity()
        >>> model.augment = True
        >>> with augmented_by_trainer(model):
        ...     print(model.augment)
        False
    """
    before = getattr(model, SWITCH, None)
    if not isinstance(before, bool):  # a model's own layer may have that name
        yield
        return
    setattr(model, SWITCH, False)
    try:
        yield
    finally:
        setattr(model, SWITCH, before)
