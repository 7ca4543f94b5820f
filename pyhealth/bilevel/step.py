"""One step of bi-level training: the weights, then the policy's hypergradient."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..models.taskaug_policy import TaskAugPolicy
from .alignment import alignment_gradient
from .distributed import Average, Gather
from .functional import call_with
from .hypergradient import METHODS, Method, Tensors, gradient_of, hypergradient
from .inner_step import inner_step_of
from .micro_batch import Piece, pieces_of, records_are_independent
from .outer_loss import OUTER_LOSSES, OuterLoss

__all__ = [
    "OUTER_METHODS",
    "Batch",
    "BiLevelStep",
    "OuterMethod",
    "classifier_parameters",
]

#: How the policy's derivative is formed: by "alignment", see
#: :func:`~pyhealth.bilevel.alignment.alignment_gradient`, or by a :data:`Method`.
type OuterMethod = Method | Literal["alignment"]
OUTER_METHODS: tuple[str, ...] = ("alignment", *METHODS)

# Below PyHealth's trainer, whose log file then gets these lines too.
logger = logging.getLogger("pyhealth.trainer.bilevel")

PRECISIONS = ("fp32", "bf16")

#: How far the mean of the enumerated losses may be from the model's loss: more than
#: rounding to bf16, less than a term or a weight.
LOSS_TOLERANCE = 0.02
NOT_BY_ALIGNMENT = "Use hypergradient='one_step' for this model."

#: What a piece of a batch adds to the outer loss, of the model's output.
type OuterPart = Callable[[Mapping[str, Tensor]], Tensor]

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

    A step whose loss, gradient or hypergradient is not finite is not taken: weights,
    optimiser and buffers stay as they were, and the hypergradient is zero.

    Args:
        model: a PyHealth model whose output has a "loss"; for "alignment", and for an
            ``outer_loss`` other than "model", a "logit" and "y_true" as well, and for
            "alignment" the loss is that of PyHealth's ``get_loss_function``.
        policy: the augmentation policy.
        params: the weights to train, see :func:`classifier_parameters`.
        optimizer: steps the weights (and the policy, if it is trained jointly).
        input_key: the signals' key in a batch.
        label_key: the labels' key in a batch.
        generator: CPU generator of all draws.
        method: "alignment", see
            :func:`~pyhealth.bilevel.alignment.alignment_gradient`, or a method of
            :func:`~pyhealth.bilevel.hypergradient.hypergradient`.
        neumann_terms: Hessian products, "neumann" only.
        neumann_lr: step of the series, "neumann" only.
        val_statistics: BatchNorm in the validation forward: "running" statistics, as at
            test time, or those of the "batch".
        outer_loss: what the policy lowers: the "model"'s own loss, or a name of
            :data:`~pyhealth.bilevel.outer_loss.OUTER_LOSSES`.
        alignment_records: training records that "alignment" enumerates in a step,
            shared out among the policy's stages.
        average: over the processes that each take a part of a batch, see
            :class:`~pyhealth.bilevel.distributed.Processes`; default one process.
        gather: the rows of all these processes; an ``outer_loss`` that is no mean over
            records needs it.
        keep_graph: keep the graph of the inner step's gradient and differentiate it
            again, which saves a third of an outer step; False forms the second
            derivative anew, in less memory. A model that torch cannot differentiate
            twice in reverse mode falls back to that.
        micro_batch: largest number of records in one pass, to save memory; None for
            whole batches. The validation part is split where its BatchNorm uses
            running statistics, and costs a forward pass more unless ``outer_loss`` is
            "model", which must then be a mean over records. The training part is split
            only where records do not share anything: with BatchNorm or an active
            dropout (one mask must serve both steps) it stays whole, and so do the
            records that "alignment" enumerates and a joint inner step. Where it is
            split no graph is kept. The numbers are those of the unsplit step.
        precision: "fp32", or "bf16" for the model's forward passes under
            ``torch.autocast``; weights, gradients and the policy stay as they are.

    Attributes:
        finite: 0-dim tensor, whether the last step was taken.

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
        method: OuterMethod = "one_step",
        neumann_terms: int = 1,
        neumann_lr: float | None = None,
        val_statistics: Literal["running", "batch"] = "running",
        outer_loss: str = "model",
        alignment_records: int = 64,
        average: Average | None = None,
        gather: Gather | None = None,
        keep_graph: bool = True,
        precision: Literal["fp32", "bf16"] = "fp32",
        micro_batch: int | None = None,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be 1 or more, got {micro_batch}.")
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
        self.outer_loss = outer_loss
        self.alignment_records = alignment_records
        self.average = average
        self.gather = gather
        self.finite = torch.tensor(True)
        # A fused optimiser (the trainer's on CUDA) leaves a step out on the device, and
        # nothing waits for it. Elsewhere the answer is asked for: on the CPU that costs
        # nothing. The series of "neumann" asks for its norms in any case.
        self._asks = not optimizer.defaults.get("fused") or method == "neumann"
        self.precision = precision
        self.micro_batch = micro_batch
        self._losses_checked = False
        self._splits: bool | None = None  # the training part; found out by trying
        # Where a kept graph failed, reverse over reverse would fail again.
        self._first_try: Literal["forward", "reverse"] = "reverse"

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
        buffers = self._buffers()
        seed = self._draw_seed()
        pieces = self._training_pieces(batch, augmented, seed, whole=joint)
        loss, _ = self._backward(pieces, seed)
        self._take_if(self._finite(loss), buffers)
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
        exact = self.method in ("one_step", "neumann")  # through this augmented batch
        draw = self.policy.sample(x.shape, labels, self.generator, complete=exact)
        # Without the policy's graph, which is made when the network's is gone.
        with torch.no_grad():
            leaf = self.policy.apply(x, labels, draw.chosen_only())
        seed = self._draw_seed()
        self.optimizer.zero_grad()
        buffers = self._buffers()
        pieces = self._training_pieces(batch, leaf, seed)
        keeps = exact and self.keep_graph and not self._splits
        leaf.requires_grad_(keeps)
        loss, grads = self._backward(pieces, seed, create_graph=keeps)
        finite = self._finite(loss)
        if self._asks and not finite:
            self._take_if(finite, buffers)
            return loss, self._zeros()
        if self.method == "alignment":
            gradient = self._alignment(batch, val_batch, seed)
        elif self.method == "darts":
            through = self._augmented_validation(val_batch)
            gradient = self._to_policy(through, self._darts(val_batch, through))
        else:
            cotangent = self._through_weights(pieces, leaf, grads, val_batch, seed)
            gradient = self._to_policy(self.policy.apply(x, labels, draw), cotangent)
        of = val_batch if self.method == "darts" else batch
        gradient = self._mean(gradient, self._records(of))
        for value in gradient.values():
            finite = finite & value.isfinite().all()
        self._take_if(finite, buffers)
        zeros = self._zeros()
        return loss, {n: torch.where(finite, g, zeros[n]) for n, g in gradient.items()}

    def _finite(self, loss: Tensor) -> Tensor:
        # One number tells it: where the norm overflows, so would Adam's squares.
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return (loss + norm).isfinite()

    def _take_if(self, finite: Tensor, buffers: Tensors) -> None:
        """Step the weights if all was finite; else put the buffers back."""
        self.finite = finite
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(torch.where(finite, buffer, buffers[name]))

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _zeros(self) -> dict[str, Tensor]:
        return {n: torch.zeros_like(p) for n, p in self.policy.named_parameters()}

    def _training_pieces(
        self, batch: Batch, x: Tensor, seed: int, whole: bool = False
    ) -> list[Piece]:
        """Return the augmented batch, in pieces where that changes nothing."""
        records, moved = self._records(batch), {**batch, self.input_key: x}
        if self.micro_batch is None or whole:
            return pieces_of(moved, records, None)
        if self._splits is None:
            self._splits = self._can_split(moved, seed)
        return pieces_of(moved, records, self.micro_batch if self._splits else None)

    def _can_split(self, batch: Batch, seed: int) -> bool:
        first = pieces_of(batch, self._records(batch), self.micro_batch)[0].batch
        self.model.train()
        with _fixed_seed(seed), self._autocast():
            splits = records_are_independent(self.model, lambda: self.model(**first))
        if not splits:
            logger.info(
                "micro_batch=%d splits the validation part only: with batch statistics "
                "or dropout the records of a training batch stay together.",
                self.micro_batch,
            )
        return splits

    def _through_weights(
        self,
        pieces: list[Piece],
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
            return self._of_augmented(pieces, augmented, grads, val_batch, seed)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not augmented.requires_grad:
                raise
            self.keep_graph, self._first_try = False, "forward"
            logger.warning("No second backward pass through this model: %s", error)
        grads = {name: weight.grad for name, weight in self.params.items()}
        return self._of_augmented(pieces, augmented.detach(), grads, val_batch, seed)

    def _of_augmented(self, pieces, augmented, grads, val_batch, seed) -> Tensor:
        def train_loss(params: Tensors, hparams: Tensors, piece: Piece) -> Tensor:
            moved = {**piece.batch, self.input_key: hparams["x"][piece.rows]}
            output = self._pure_output(params, moved, seed, training=True)
            return piece.share * output["loss"]

        records = {"train": len(augmented), "val": self._records(val_batch)}
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
                "train_grads": grads if augmented.requires_grad else None,
            }
        return hypergradient(
            [partial(train_loss, piece=piece) for piece in pieces],
            None,
            self.params,
            {"x": augmented},
            method=self.method,
            average=lambda tensors, of: self._mean(tensors, records[of]),
            val_gradient=lambda at: self._validation_gradient(at, val_batch, seed),
            first_try=self._first_try,
            **settings,
        )["x"]

    def _alignment(
        self, batch: Batch, val_batch: Batch, seed: int
    ) -> dict[str, Tensor]:
        """Return the policy's derivative by comparing all operations."""
        inner_step = inner_step_of(self.optimizer, self.params)
        weights = {name: p.detach() for name, p in self.params.items()}
        after, slope = inner_step(weights, {n: p.grad for n, p in self.params.items()})
        gradients = self._mean(
            self._validation_gradient(after, val_batch, seed), self._records(val_batch)
        )
        direction = {name: slope[name] * gradients[name] for name in after}

        def record_losses(params: Tensors, x: Tensor, rows: list[int]) -> Tensor:
            chosen = {**_rows_of(batch, rows), self.input_key: x}
            output = self._pure_output(params, chosen, seed, training=True)
            losses = self._losses_of(output).reshape(len(x), -1).mean(dim=1)
            self._check_losses(losses, output["loss"])
            return losses

        x, labels = self._signals(batch)
        first = slice(self.alignment_records)
        return alignment_gradient(
            self.policy,
            x[first],
            labels[first],
            record_losses,
            weights,
            direction,
            self.generator,
        )

    def _losses_of(self, output: Mapping[str, Tensor]) -> Tensor:
        missing = {"logit", "y_true"} - output.keys()
        if missing:
            raise ValueError(
                f"hypergradient='alignment' needs {sorted(missing)} in the output of "
                f"{type(self.model).__name__}. {NOT_BY_ALIGNMENT}"
            )
        loss = self.model.get_loss_function()
        return loss(output["logit"], output["y_true"], reduction="none")

    def _check_losses(self, losses: Tensor, trained: Tensor) -> None:
        """Make sure, once, that what is enumerated is what the model is trained on."""
        if self._losses_checked:
            return
        self._losses_checked = True
        mean, trained = losses.detach().mean().item(), trained.detach().item()
        if abs(mean - trained) > LOSS_TOLERANCE * max(abs(mean), abs(trained)):
            raise ValueError(
                f"The loss of {type(self.model).__name__} is {trained:.4g}, where that "
                f"of its logits is {mean:.4g}: it has other terms or weights, which "
                f"hypergradient='alignment' does not see. {NOT_BY_ALIGNMENT}"
            )

    def _darts(self, val_batch: Batch, augmented: Tensor) -> Tensor:
        seed = self._draw_seed()
        moved = {**val_batch, self.input_key: augmented.detach()}

        def cotangent(piece: Piece, outer: OuterPart) -> Tensor:
            def val_loss(params: Tensors, hparams: Tensors) -> Tensor:
                batch = {**piece.batch, self.input_key: hparams["x"]}
                return outer(self._pure_output(params, batch, seed, training=False))

            x = {"x": piece.batch[self.input_key]}
            return hypergradient(None, val_loss, self.params, x, method="darts")["x"]

        parts = self._validation_parts(self.params, moved, seed)
        return torch.cat([cotangent(piece, outer) for piece, outer in parts])

    def _augmented_validation(self, val_batch: Batch) -> Tensor:
        x, labels = self._signals(val_batch)
        return self.policy(x, labels, self.generator)

    def _to_policy(self, augmented: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        leaves = dict(self.policy.named_parameters())
        cotangent = _without_undefined(cotangent)
        # Where every record drew no_op no magnitude took part, and its derivative is
        # zero; that is the only way in which a parameter can be unused here.
        gradients = torch.autograd.grad(
            augmented, list(leaves.values()), grad_outputs=cotangent, allow_unused=True
        )
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }

    def _validation_gradient(
        self, params: Tensors, batch: Batch, seed: int
    ) -> dict[str, Tensor]:
        """Return the gradient of the outer loss in the weights."""

        def val_loss(at: Tensors, piece: Piece, outer: OuterPart) -> Tensor:
            return outer(self._pure_output(at, piece.batch, seed, training=False))

        parts = self._validation_parts(params, batch, seed)
        return gradient_of(
            [partial(val_loss, piece=piece, outer=outer) for piece, outer in parts],
            params,
        )

    def _validation_parts(
        self, params: Tensors, batch: Batch, seed: int
    ) -> list[tuple[Piece, OuterPart]]:
        """Return scalars of pieces of a batch whose sum has the outer loss's gradient.

        A loss that is no mean over records is differentiated in the logits of all of
        them first; a piece's scalar is then its logits times that derivative.
        """
        shares = self.val_statistics == "batch" and any(
            isinstance(module, _BatchNorm) for module in self.model.modules()
        )
        size = None if shares else self.micro_batch
        pieces = pieces_of(batch, self._records(batch), size)
        if self.outer_loss == "model":
            return [
                (piece, lambda output, share=piece.share: share * output["loss"])
                for piece in pieces
            ]
        outer_loss = OUTER_LOSSES[self.outer_loss]
        if len(pieces) == 1 and self.gather is None:
            return [(pieces[0], lambda out: outer_loss(out["logit"], out["y_true"]))]
        logits, labels = [], []
        for piece in pieces:
            with torch.no_grad():
                output = self._pure_output(params, piece.batch, seed, training=False)
            logits.append(output["logit"])
            labels.append(output["y_true"])
        slope = self._slope_in_logits(outer_loss, torch.cat(logits), torch.cat(labels))
        return [
            (
                piece,
                lambda output, slope=slope[piece.rows]: (slope * output["logit"]).sum(),
            )
            for piece in pieces
        ]

    def _slope_in_logits(
        self, outer_loss: OuterLoss, logit: Tensor, label: Tensor
    ) -> Tensor:
        """Return the derivative of the loss of all processes' records in one's own.

        It is scaled so that the mean over the processes is the derivative of the whole.
        """
        own = slice(None)
        if self.gather is not None:
            logit, own = self.gather(logit)
            label, _ = self.gather(label)
        logit.requires_grad_()
        slope = torch.autograd.grad(outer_loss(logit, label), logit)[0]
        return slope[own] * (len(logit) / len(slope[own]))

    def _backward(
        self, pieces: list[Piece], seed: int, create_graph: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Write ``.grad``; return the loss and the gradients, with graph if asked."""
        self.model.train()
        total, records = 0, pieces[-1].rows.stop
        for piece in pieces:
            with _fixed_seed(seed), self._autocast():
                loss = piece.share * self.model(**piece.batch)["loss"]
            total = total + loss.detach()
            if not create_graph:
                loss.backward()
        if create_graph:  # not backward(), which would tie .grad to the graph for good
            weights = list(self.params.values())
            grads = torch.autograd.grad(
                loss, weights, create_graph=True, allow_unused=True
            )
            for weight, gradient in zip(weights, grads, strict=True):
                if gradient is not None:
                    gradient = gradient.detach()
                    # A copy where several processes average it in place.
                    gradient = gradient if self.average is None else gradient.clone()
                weight.grad = gradient
        else:
            grads = [parameter.grad for parameter in self.params.values()]
        unused = [name for name, p in self.params.items() if p.grad is None]
        if unused:
            raise ValueError(
                f"No gradient reaches {', '.join(unused)}: the model's loss does not "
                "use it. Call requires_grad_(False) on it to leave it out."
            )
        grads = dict(zip(self.params, grads, strict=True))
        if self.average is None:
            return total, grads
        return self._average_in_place(total, records), grads

    def _average_in_place(self, loss: Tensor, records: int) -> Tensor:
        """Average loss, gradients and running statistics over the processes."""
        tensors = {f"grad {i}": g for i, g in enumerate(self._gradients())}
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                tensors[f"mean {name}"] = module.running_mean
                tensors[f"var {name}"] = module.running_var
        means = self._mean({"loss": loss, **tensors}, records)
        for name, tensor in tensors.items():
            # .data: a kept graph holds the running statistics, though it reads none of
            # them in training, and would refuse to go backward after a visible change.
            tensor.data.copy_(means[name])
        return means["loss"]

    def _mean(self, tensors: Tensors, records: int) -> Tensors:
        return tensors if self.average is None else self.average(tensors, records)

    def _records(self, batch: Batch) -> int:
        return len(batch[self.input_key])

    def _gradients(self) -> list[Tensor]:
        return [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _pure_output(
        self, params: Tensors, batch: Batch, seed: int, *, training: bool
    ) -> dict[str, Tensor]:
        self.model.train(training)
        if not training and self.val_statistics == "batch":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()  # only these: dropout stays off
        with _fixed_seed(seed), self._autocast():
            # Copies of the buffers take what a training forward would update in them.
            output = call_with(self.model, params, batch)
        self.model.train()
        if "logit" in output and output["logit"].dtype in (torch.bfloat16, torch.half):
            # Losses are formed in float32, as autocast would do.
            output = {**output, "logit": output["logit"].float()}
        return output

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
        device = self.generator.device
        seed = torch.randint(2**31, (), generator=self.generator, device=device)
        return int(seed.item())


def _rows_of(batch: Batch, rows: list[int]) -> dict[str, object]:
    """Return the batch of the given rows, which may come more than once."""
    return {
        key: value[torch.as_tensor(rows, device=value.device)]
        if isinstance(value, Tensor)
        else [value[row] for row in rows]
        for key, value in batch.items()
    }


def _without_undefined(cotangent: Tensor) -> Tensor:
    """Set single undefined derivatives in the signals to zero.

    The modulus of a spectrum (PyHealth's ContraWR) has no derivative where a mask or a
    flat lead leaves silence: torch gives nan there, and zero is a subgradient. Where
    most are nan, a loss or the weights' derivative was; that stays, and is not taken.
    """
    undefined = cotangent.isnan()
    single = undefined.float().mean() < 0.5
    return torch.where(undefined & single, 0, cotangent)


@contextmanager
def _fixed_seed(seed: int) -> Iterator[None]:
    """Seed the global generators (dropout reads them) and put them back after."""
    # manual_seed reseeds every CUDA device, also where the batch is still on the CPU.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
