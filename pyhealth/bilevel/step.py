"""One step of bi-level training: the weights, then the policy's hypergradient."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..models.taskaug_policy import TaskAugPolicy
from .hypergradient import Method, Tensors, hypergradient
from .inner_step import inner_step_of

__all__ = ["Batch", "BiLevelStep", "classifier_parameters"]

# Below PyHealth's trainer, whose log file then gets these lines too.
logger = logging.getLogger("pyhealth.trainer.bilevel")

PRECISIONS = ("fp32", "bf16")

#: A batch as PyHealth's loaders make it; only tensors are read here.
type Batch = Mapping[str, Tensor]


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


class BiLevelStep:
    """Inner steps and hypergradients of one training run.

    The inner step trains the weights on an augmented batch. The outer one gives the
    derivative of the clean validation loss after that very step in the policy. Both
    use one draw, one dropout mask and the same weights; the outer one leaves weights,
    buffers, ``.grad`` and the global random state as they are.

    The augmented batch itself is the hyper-parameter of the network part: its
    derivative is formed first, then one backward pass takes it through the policy.

    Args:
        model: a PyHealth model whose output has a "loss".
        policy: the augmentation policy.
        params: the weights to train, see :func:`classifier_parameters`.
        optimizer: steps the weights (and the policy, if it is trained jointly).
        input_key: the signals' key in a batch.
        label_key: the labels' key in a batch.
        generator: CPU generator of all draws.
        method: see :func:`~pyhealth.bilevel.hypergradient.hypergradient`.
        neumann_terms: Hessian products, "neumann" only.
        neumann_lr: step of the series, "neumann" only.
        val_statistics: BatchNorm in the validation forward: "running" statistics, as at
            test time, or those of the "batch".
        keep_graph: keep the graph of the inner step's gradient and differentiate it
            again, which saves a third of an outer step; False forms the second
            derivative anew, in less memory. A model that torch cannot differentiate
            twice in reverse mode falls back to that.
        precision: "fp32", or "bf16" for the model's forward passes under
            ``torch.autocast``; weights, gradients and the policy stay as they are.

    Examples:
        See :class:`~pyhealth.bilevel.trainer.BiLevelTrainer`, which drives it.

        >>> BiLevelStep.__name__
        'BiLevelStep'
    """

    def __init__(
        self,
        model: nn.Module,
        policy: TaskAugPolicy,
        params: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        input_key: str,
        label_key: str,
        generator: torch.Generator,
        method: Method = "one_step",
        neumann_terms: int = 1,
        neumann_lr: float | None = None,
        val_statistics: Literal["running", "batch"] = "running",
        keep_graph: bool = True,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {list(PRECISIONS)}, got {precision!r}."
            )
        self.model = model
        self.policy = policy
        self.params = dict(params)
        self.optimizer = optimizer
        self.input_key = input_key
        self.label_key = label_key
        self.generator = generator
        self.method = method
        self.neumann_terms = neumann_terms
        self.neumann_lr = neumann_lr
        self.val_statistics = val_statistics
        self.keep_graph = keep_graph
        self.precision = precision

    def inner(self, batch: Batch, joint: bool = False) -> Tensor:
        """Take one inner step.

        Args:
            batch: training batch.
            joint: let the training loss's gradient reach the policy.

        Returns:
            The training loss, detached.
        """
        x, labels = self._signals(batch)
        with torch.set_grad_enabled(joint):
            augmented = self.policy(x, labels, self.generator)
        self.optimizer.zero_grad()
        loss, _ = self._backward(batch, augmented, self._draw_seed())
        self.optimizer.step()
        return loss

    def inner_and_outer(
        self, batch: Batch, val_batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one inner step and return the hypergradient that belongs to it.

        Args:
            batch: training batch.
            val_batch: clean validation batch.

        Returns:
            The training loss, detached, and the policy's hypergradient by name.
        """
        x, labels = self._signals(batch)
        draw = self.policy.sample(x.shape, labels, self.generator)
        augmented = self.policy.apply(x, labels, draw)
        seed = self._draw_seed()
        self.optimizer.zero_grad()
        keeps = self.method != "darts" and self.keep_graph
        leaf = augmented.detach().requires_grad_(keeps)
        loss, grads = self._backward(batch, leaf, seed, create_graph=keeps)
        if not loss.isfinite():
            raise ArithmeticError(
                f"The training loss is {loss.item()}. Take a smaller inner_lr, and "
                "look for records with extreme values."
            )
        if self.method == "darts":
            through = self._augmented_validation(val_batch)
            cotangent = self._darts(val_batch, through)
        else:
            through = augmented
            cotangent = self._through_weights(batch, leaf, grads, val_batch, seed)
        self.optimizer.step()
        return loss, self._to_policy(through, cotangent)

    def _through_weights(
        self,
        batch: Batch,
        augmented: Tensor,
        grads: Tensors,
        val_batch: Batch,
        seed: int,
    ) -> Tensor:
        """Return the hypergradient of the augmented batch.

        The inner step's own graph is differentiated a second time. Where torch cannot
        do that, now and later hypergradient() forms the derivative anew.
        """
        try:
            return self._of_augmented(batch, augmented, grads, val_batch, seed)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self.keep_graph:
                raise
            self.keep_graph = False
            logger.warning("No second backward pass through this model: %s", error)
        grads = {name: gradient.detach() for name, gradient in grads.items()}
        return self._of_augmented(batch, augmented.detach(), grads, val_batch, seed)

    def _of_augmented(self, batch, augmented, grads, val_batch, seed) -> Tensor:
        def train_loss(params: Tensors, hparams: Tensors) -> Tensor:
            return self._pure_loss(params, batch, hparams["x"], seed, training=True)

        settings: dict[str, object]
        if self.method == "one_step":
            settings = {
                "inner_step": inner_step_of(self.optimizer, self.params),
                "train_grads": grads,
            }
        else:
            settings = {
                "lr": self.neumann_lr,
                "neumann_terms": self.neumann_terms,
                "train_grads": grads if self.keep_graph else None,
            }
        return hypergradient(
            train_loss,
            lambda params: self._validation_loss(params, val_batch, seed),
            self.params,
            {"x": augmented},
            method=self.method,
            **settings,
        )["x"]

    def _darts(self, val_batch: Batch, augmented: Tensor) -> Tensor:
        seed = self._draw_seed()
        return hypergradient(
            None,
            lambda params, hparams: self._validation_loss(
                params, {**val_batch, self.input_key: hparams["x"]}, seed
            ),
            self.params,
            {"x": augmented},
            method="darts",
        )["x"]

    def _augmented_validation(self, val_batch: Batch) -> Tensor:
        x, labels = self._signals(val_batch)
        return self.policy(x, labels, self.generator)

    def _to_policy(self, augmented: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        leaves = dict(self.policy.named_parameters())
        # Where every record drew no_op no magnitude took part, and its derivative is
        # zero; that is the only way in which a parameter can be unused here.
        gradients = torch.autograd.grad(
            augmented, list(leaves.values()), grad_outputs=cotangent, allow_unused=True
        )
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }

    def _validation_loss(self, params: Tensors, batch: Batch, seed: int) -> Tensor:
        x = batch[self.input_key]
        return self._pure_loss(params, batch, x, seed, training=False)

    def _backward(
        self, batch: Batch, x: Tensor, seed: int, create_graph: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Write ``.grad``; return the loss and the gradients, with graph if asked."""
        self.model.train()
        with _fixed_seed(seed), self._autocast():
            loss = self.model(**{**batch, self.input_key: x})["loss"]
        if create_graph:  # not backward(), which would tie .grad to the graph for good
            weights = list(self.params.values())
            grads = torch.autograd.grad(
                loss, weights, create_graph=True, allow_unused=True
            )
            for weight, gradient in zip(weights, grads, strict=True):
                weight.grad = None if gradient is None else gradient.detach()
        else:
            loss.backward()
            grads = [parameter.grad for parameter in self.params.values()]
        unused = [name for name, p in self.params.items() if p.grad is None]
        if unused:
            raise ValueError(
                f"No gradient reaches {', '.join(unused)}: the model's loss does not "
                "use it. Call requires_grad_(False) on it to leave it out."
            )
        return loss.detach(), dict(zip(self.params, grads, strict=True))

    def _pure_loss(
        self, params: Tensors, batch: Batch, x: Tensor, seed: int, *, training: bool
    ) -> Tensor:
        # Copies take the running statistics that a training forward would update.
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        self.model.train(training)
        if not training and self.val_statistics == "batch":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()  # only these: dropout stays off
        with _fixed_seed(seed), self._autocast():
            output = functional_call(
                self.model,
                ({**params}, buffers),
                kwargs={**batch, self.input_key: x},
            )
        self.model.train()
        return output["loss"]

    def _autocast(self) -> torch.autocast:
        # Not cached: a cached cast of a weight would tie one derivative to another.
        return torch.autocast(
            self.policy.logits.device.type,
            dtype=torch.bfloat16,
            enabled=self.precision == "bf16",
            cache_enabled=False,
        )

    def _signals(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.policy.logits.device
        return batch[self.input_key].to(device), batch[self.label_key].to(device)

    def _draw_seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generator).item())


@contextmanager
def _fixed_seed(seed: int) -> Iterator[None]:
    """Seed the global generators (dropout reads them) and put them back after."""
    # manual_seed reseeds every CUDA device, also where the batch is still on the CPU.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
