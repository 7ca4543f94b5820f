"""A learnable, class-dependent augmentation policy for ECGs (TaskAug)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Self, overload

import pandas as pd
import torch
from torch import Tensor, nn

from . import policy_file
from .ecg_augmentations import Augmentation
from .operation_set import OperationSet, column_of_labels
from .policy_draw import PolicyDraw, StageDraw
from .policy_file import Provenance

__all__ = ["TaskAugPolicy"]


class TaskAugPolicy(nn.Module):
    """K stages, each of which applies one of the ECG operations to a record.

    A stage draws an operation from a categorical distribution (Gumbel-max) and
    applies it with a magnitude that depends on the record's class. The policy is
    differentiable: magnitudes through the drawn operation, logits through the
    straight-through estimator over ALL operations. A stage returns
    ``sum_i w_i op_i(x)`` with ``w_i = onehot_i + (soft_i - soft_i at the draw)``; the
    bracket is zero at the present logits, so exactly one operation is applied, and
    its derivative weighs every operation by what it would have done. Operations that
    were not drawn need values only, no graph. ``soft`` is the plain softmax: where a
    loss is nearly linear in the operations' effects its mean over draws is the true
    gradient, while the softmax with the draw's Gumbel noise is too short by a third.

    A magnitude is stored as an unbounded number and mapped by a sigmoid onto its
    operation's interval, so no step of an optimiser can leave the interval.

    Args:
        num_stages: number of stages K; 0 gives the policy that changes nothing.
        temperature: of the softmax in the backward pass; 1 gives the true slope of the
            probabilities, which are the softmax at 1 in any case.
        shared_magnitudes: use one magnitude for both classes (one parameter).
        selection: draw an operation for each record ("sample") or one for the whole
            batch ("batch", as the authors do; a noisier gradient).
        sampling_rate: of the signals, hertz.
        operations: names of the operations to choose from; default all of
            :data:`~pyhealth.models.ecg_augmentations.AUGMENTATIONS`.
        initial_magnitude: where the magnitudes start, as a share of their interval.
        dropout_by: whether ``lead_dropout`` drops a "lead" or all leads of an
            "electrode" (12 standard leads only).

    Attributes:
        logits: (K, O), unnormalised log-probabilities of the operations.
        mag_neg: (K, O), unbounded magnitudes for label 0.
        mag_pos: (K, O), those for label 1; the same parameter if shared.
        provenance: facts on how the policy came to be, read from and written to its
            file.

    Raises:
        ValueError: if an argument is outside its range, or an operation is unknown.

    Source:
        Raghu et al., Data Augmentation for Electrocardiograms, CHIL 2022, section 4.
        Departures: the logit gradient covers all operations, not only the drawn one;
        one draw a record; the plain softmax in the backward pass; bounded magnitudes
        without clamping.

    Examples:
        >>> policy = TaskAugPolicy(num_stages=2, sampling_rate=100)
        >>> x, labels = torch.randn(4, 12, 1000), torch.tensor([0.0, 1.0, 0.0, 1.0])
        >>> policy(x, labels).shape
        torch.Size([4, 12, 1000])
        >>> policy.probabilities()[0, 0].item()
        0.125
    """

    _bounds: Tensor

    def __init__(
        self,
        num_stages: int = 2,
        temperature: float = 1.0,
        shared_magnitudes: bool = False,
        selection: Literal["sample", "batch"] = "sample",
        sampling_rate: float = 250,
        operations: Sequence[str] | None = None,
        initial_magnitude: float = 0.5,
        dropout_by: Literal["lead", "electrode"] = "lead",
    ) -> None:
        super().__init__()
        if num_stages < 0:
            raise ValueError(f"num_stages must be 0 or more, got {num_stages}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        if not sampling_rate > 0:
            raise ValueError(f"sampling_rate must be positive, got {sampling_rate}.")
        for name, value, (one, other) in (
            ("selection", selection, ("sample", "batch")),
            ("dropout_by", dropout_by, ("lead", "electrode")),
        ):
            if value not in (one, other):
                raise ValueError(f"{name} must be {one!r} or {other!r}, got {value!r}.")
        if not 0 < initial_magnitude < 1:
            raise ValueError(
                f"initial_magnitude must lie between 0 and 1, got {initial_magnitude}."
            )
        self.num_stages = num_stages
        self.temperature = temperature
        self.shared_magnitudes = shared_magnitudes
        self.selection = selection
        self.sampling_rate = sampling_rate
        self.initial_magnitude = initial_magnitude
        self.dropout_by = dropout_by
        self.provenance: dict[str, object] = {}
        self._operations = OperationSet(operations)
        size = (num_stages, len(self.operations))
        start = math.log(initial_magnitude / (1 - initial_magnitude))
        self.logits = nn.Parameter(torch.zeros(size))
        self.mag_neg = nn.Parameter(torch.full(size, start))
        own = nn.Parameter(torch.full(size, start))
        self.mag_pos = self.mag_neg if shared_magnitudes else own
        bounds = torch.tensor([(op.low, op.high) for op in self.operations]).T
        self.register_buffer("_bounds", bounds, persistent=False)

    @property
    def op_names(self) -> tuple[str, ...]:
        """Names of the operations, in the order of the logits' columns."""
        return self._operations.names

    @property
    def operations(self) -> tuple[Augmentation, ...]:
        """The operations themselves, with range and unit, in the same order."""
        return self._operations.entries

    def probabilities(self) -> Tensor:
        """Return the probability of each operation (K, O), detached."""
        return self.logits.detach().softmax(dim=-1)

    def magnitudes(self) -> dict[str, Tensor]:
        """Return "neg" and "pos" magnitudes (K, O) in their own units, detached."""
        return {
            "neg": self._bounded(self.mag_neg.detach()),
            "pos": self._bounded(self.mag_pos.detach()),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return the policy as a table, one row a stage and operation."""
        probability, magnitude = self.probabilities(), self.magnitudes()
        return pd.DataFrame(
            [
                {
                    "stage": stage,
                    "operation": op.name,
                    "probability": probability[stage, column].item(),
                    "magnitude_neg": magnitude["neg"][stage, column].item(),
                    "magnitude_pos": magnitude["pos"][stage, column].item(),
                    "unit": op.unit,
                }
                for stage in range(self.num_stages)
                for column, op in enumerate(self.operations)
            ]
        )

    def randomize_(self, generator: torch.Generator | None = None) -> TaskAugPolicy:
        """Set a random policy in place: normal logits, magnitudes anywhere in range.

        Args:
            generator: source of the randomness; torch's global one by default.

        Returns:
            The policy itself.
        """
        with torch.no_grad():
            self.logits.copy_(torch.randn(self.logits.shape, generator=generator))
            for magnitude in dict.fromkeys((self.mag_neg, self.mag_pos)):
                share = torch.rand(magnitude.shape, generator=generator)
                magnitude.copy_(torch.logit(share, eps=1e-3))
        return self

    def sample(
        self,
        shape: torch.Size,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        complete: bool = True,
    ) -> PolicyDraw:
        """Make every random number of one application, without a graph.

        Args:
            shape: shape of the signals, (B, C, T).
            labels: classes (B,) or (B, 1); only their number is checked, and not if
                the magnitudes are shared, since the draw does not depend on the class.
            generator: source of the randomness; torch's global one by default.
            complete: draw for all operations on all records, which the gradient to
                the logits needs; otherwise for the chosen operations only.

        Returns:
            A draw for :meth:`apply`.
        """
        if labels is not None and self.num_stages and not self.shared_magnitudes:
            column_of_labels(labels, shape[0])
        with torch.no_grad():
            stages = [
                self._operations.sample(
                    logits,
                    self._soft(stage),
                    shape,
                    shape[0] if self.selection == "sample" else 1,
                    generator,
                    complete=complete,
                    dropout_by=self.dropout_by,
                )
                for stage, logits in enumerate(self.logits)
            ]
        return PolicyDraw(tuple(stages))

    @overload
    def apply(self, x: Callable[[nn.Module], None]) -> Self: ...
    @overload
    def apply(
        self, x: Tensor, labels: Tensor | None = None, *, draw: PolicyDraw
    ) -> Tensor: ...
    @overload
    def apply(self, x: Tensor, labels: Tensor | None, draw: PolicyDraw) -> Tensor: ...
    def apply(
        self,
        x: Tensor | Callable[[nn.Module], None],
        labels: Tensor | None = None,
        draw: PolicyDraw | None = None,
    ) -> Tensor | Self:
        """Augment with a given draw: a deterministic function of the parameters.

        With a function as the only argument it is ``torch.nn.Module.apply``.

        Args:
            x: signals (B, C, T).
            labels: classes (B,) or (B, 1) in [0, 1]; may be None if the magnitudes
                are shared. A value between 0 and 1 mixes the two magnitudes.
            draw: from :meth:`sample`. Only a complete draw carries the gradient to
                the logits.

        Returns:
            Augmented signals (B, C, T).
        """
        if not isinstance(x, Tensor):  # nn.Module's own, to initialise parts by
            return super().apply(x)
        if draw is None:
            raise TypeError("Pass the draw to apply, see sample().")
        for stage, stage_draw in enumerate(draw.stages, draw.first):
            x = self._apply_stage(stage, x, labels, stage_draw)
        return x

    def enumerate_stage(
        self,
        stage: int,
        x: Tensor,
        labels: Tensor | None,
        draw: StageDraw,
        shift: Tensor | float = 0.0,
    ) -> Tensor:
        """Apply every operation of one stage to every record, with the draw's noise.

        Args:
            stage: number of the stage.
            x: signals (B, C, T) as they enter the stage.
            labels: classes (B,) or (B, 1), see :meth:`apply`.
            draw: complete draw of that stage; which operation it chose does not matter.
            shift: added to the unbounded magnitudes, (B, O) or for all alike.

        Returns:
            Signals (O, B, C, T).
        """
        magnitude = self._magnitude_of(stage, labels, len(x), shift)
        return self._operations.apply_each(x, magnitude, draw, self.sampling_rate)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw and apply; carries gradient to the policy where gradients are on.

        Args:
            x: signals (B, C, T).
            labels: classes (B,) or (B, 1), see :meth:`apply`.
            generator: source of the randomness; torch's global one by default.

        Returns:
            Augmented signals (B, C, T).
        """
        draw = self.sample(x.shape, labels, generator, complete=torch.is_grad_enabled())
        return self.apply(x, labels, draw)

    def save(self, path: str | Path, provenance: Provenance | None = None) -> None:
        """Write the policy to a JSON file that :meth:`load` reads.

        Args:
            path: file to write.
            provenance: see :meth:`to_json`.
        """
        Path(path).write_text(self.to_json(provenance), encoding="utf-8")

    def to_json(self, provenance: Provenance | None = None) -> str:
        """Return the policy as JSON text: for people, and exact for :meth:`load`.

        Args:
            provenance: facts on how the policy came to be, in plain values (digest of
                the data, seed, task); added to what ``self.provenance`` has.

        Returns:
            The text of a policy file.

        Raises:
            ValueError: if a parameter is not finite.
            TypeError: if the provenance is not of plain values.
        """
        settings = {name: getattr(self, name) for name in policy_file.SETTINGS}
        return policy_file.policy_text(
            settings | {"operations": list(self.op_names)},
            {name: p.detach().cpu() for name, p in self.named_parameters()},
            self.to_frame().to_dict(orient="records"),
            {**self.provenance, **(provenance or {})},
        )

    @classmethod
    def load(cls, path: str | Path) -> TaskAugPolicy:
        """Read a policy; it draws and applies as the saved one did, to the bit.

        Args:
            path: file written by :meth:`save`.

        Returns:
            The policy, on the CPU.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is no policy file, of another version, or damaged.
        """
        settings, parameters, provenance = policy_file.read_policy(path)
        try:
            policy = cls(**settings)
        except ValueError as error:
            raise ValueError(f"The policy file {path}: {error}") from error
        policy_file.check_shapes(path, parameters, dict(policy.named_parameters()))
        policy.to(parameters["logits"].dtype)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter.copy_(parameters[name].reshape(parameter.shape))
        policy.provenance = provenance
        return policy

    def extra_repr(self) -> str:
        """Return the settings shown by ``repr``."""
        return (
            f"num_stages={self.num_stages}, operations={list(self.op_names)}, "
            f"shared_magnitudes={self.shared_magnitudes}, "
            f"selection={self.selection!r}, sampling_rate={self.sampling_rate}"
        )

    def _apply_stage(
        self, stage: int, x: Tensor, labels: Tensor | None, draw: StageDraw
    ) -> Tensor:
        magnitude = self._magnitude_of(stage, labels, len(x))
        result = self._operations.apply_chosen(x, magnitude, draw, self.sampling_rate)
        if not draw.complete:
            return result
        with torch.no_grad():
            values = self._operations.apply_each(x, magnitude, draw, self.sampling_rate)
        slope = self._soft(stage) - draw.soft  # zero at the draw
        return result + torch.einsum("o,obct->bct", slope.to(x.dtype), values)

    def _soft(self, stage: int) -> Tensor:
        return (self.logits[stage] / self.temperature).softmax(dim=-1)

    def _magnitude_of(
        self,
        stage: int,
        labels: Tensor | None,
        records: int,
        shift: Tensor | float = 0.0,
    ) -> Tensor:
        """Return each record's magnitudes (B, O), in the operations' units."""
        negative = self._bounded(self.mag_neg[stage] + shift)
        if self.shared_magnitudes:
            return negative.expand(records, -1)
        if labels is None:
            raise ValueError(
                "A policy with class-specific magnitudes needs labels; pass them, or "
                "build the policy with shared_magnitudes=True."
            )
        share = column_of_labels(labels, records).to(negative)
        positive = self._bounded(self.mag_pos[stage] + shift)
        return torch.lerp(negative.expand(records, -1), positive, share)

    def _bounded(self, unbounded: Tensor) -> Tensor:
        return torch.lerp(self._bounds[0], self._bounds[1], unbounded.sigmoid())
