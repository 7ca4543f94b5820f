"""A learned augmentation policy as a plain transform for any PyTorch loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self, overload

import pandas as pd
import torch
from torch import Tensor, nn

from .drawn_augmentation import DrawnAugmentation
from .policy_draw import PolicyDraw
from .published_policies import published_policy
from .taskaug_policy import TaskAugPolicy

__all__ = ["LearnedAugmentation"]


class LearnedAugmentation(nn.Module):
    """A frozen policy: augments in training mode, changes nothing in eval mode.

    It has buffers and no parameters, so no optimiser can take it, and needs nothing of
    bi-level training. It can be a layer of a model (``eval()`` then turns it off as it
    does dropout), a call in a training loop, or a transform in a dataset, whose workers
    get a copy.

    Magnitudes are in units (seconds, standard deviations of a lead, fractions), so a
    policy learned at one sampling rate serves at another: say the signals' rate, and a
    mask of a second is as many samples as a second has. White noise keeps its standard
    deviation, which at a higher rate is spread over a wider band.

    Args:
        policy: the policy; it is copied.
        sampling_rate: of the signals to come, hertz; default the policy's own.
        magnitudes: "class" uses each record's own label, as the policy was learned;
            "mean" the mean of both classes' magnitudes and no label at all.

    Raises:
        ValueError: if an argument is outside its range.

    Examples:
        >>> policy = TaskAugPolicy(num_stages=1, sampling_rate=100)
        >>> augment = LearnedAugmentation(policy, sampling_rate=250)
        >>> x, labels = torch.randn(4, 12, 2500), torch.tensor([0, 1, 0, 1])
        >>> augment(x, labels).shape
        torch.Size([4, 12, 2500])
        >>> augment.eval()(x) is x
        True
        >>> list(augment.parameters())
        []
    """

    def __init__(
        self,
        policy: TaskAugPolicy,
        sampling_rate: float | None = None,
        magnitudes: Literal["class", "mean"] = "class",
    ) -> None:
        super().__init__()
        if magnitudes not in ("class", "mean"):
            raise ValueError(
                f"magnitudes must be 'class' or 'mean', got {magnitudes!r}."
            )
        if sampling_rate is not None and not sampling_rate > 0:
            raise ValueError(f"sampling_rate must be positive, got {sampling_rate}.")
        self.magnitudes = magnitudes
        self._policy = _frozen(policy)
        if sampling_rate is not None:
            self._policy.sampling_rate = sampling_rate

    @classmethod
    def load(
        cls,
        path: str | Path,
        sampling_rate: float | None = None,
        magnitudes: Literal["class", "mean"] = "class",
    ) -> Self:
        """Read the file of a policy.

        Args:
            path: file written by :meth:`TaskAugPolicy.save`.
            sampling_rate: see the class.
            magnitudes: see the class.

        Returns:
            The transform, on the CPU.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is no policy file, of another version, or damaged.
        """
        return cls(TaskAugPolicy.load(path), sampling_rate, magnitudes)

    @classmethod
    def published(
        cls,
        name: str,
        sampling_rate: float | None = None,
        magnitudes: Literal["class", "mean"] = "class",
    ) -> Self:
        """Return a policy that comes with the package.

        Its card, ``policies/<name>.md`` in the repository, says what it was learned on,
        how it scored and what it cannot do.

        Args:
            name: the label that it was learned for, one of
                :func:`~pyhealth.models.published_policies.published_policies`.
            sampling_rate: see the class.
            magnitudes: see the class.

        Returns:
            The transform, on the CPU.

        Raises:
            ValueError: if there is no such policy, or an argument is outside its range.

        Examples:
            >>> augment = LearnedAugmentation.published("MI", sampling_rate=500)
            >>> augment(torch.randn(2, 12, 5000), torch.tensor([0, 1])).shape
            torch.Size([2, 12, 5000])
        """
        return cls(published_policy(name), sampling_rate, magnitudes)

    @property
    def sampling_rate(self) -> float:
        """Sampling rate of the signals, hertz."""
        return self._policy.sampling_rate

    @property
    def provenance(self) -> dict[str, object]:
        """Facts on how the policy came to be."""
        return self._policy.provenance

    def to_frame(self) -> pd.DataFrame:
        """Return the policy as a table, one row a stage and operation."""
        return self._policy.to_frame()

    def sample(
        self, shape: torch.Size, generator: torch.Generator | None = None
    ) -> PolicyDraw:
        """Make every random number of one application.

        Args:
            shape: shape of the signals, (B, C, T) or (C, T).
            generator: source of the randomness; torch's global one by default.

        Returns:
            A draw for :meth:`apply`; kept, it gives the same bytes again.
        """
        shape = torch.Size((1, *shape) if len(shape) == 2 else shape)
        return self._policy.sample(shape, generator=generator, complete=False)

    @overload
    def apply(self, x: Callable[[nn.Module], None]) -> Self: ...
    @overload
    def apply(
        self, x: Tensor, labels: Tensor | float | None = None, *, draw: PolicyDraw
    ) -> Tensor: ...
    @overload
    def apply(
        self, x: Tensor, labels: Tensor | float | None, draw: PolicyDraw
    ) -> Tensor: ...
    def apply(
        self,
        x: Tensor | Callable[[nn.Module], None],
        labels: Tensor | float | None = None,
        draw: PolicyDraw | None = None,
    ) -> Tensor | Self:
        """Augment with a given draw, in training and in eval mode.

        With a function as the only argument it is ``torch.nn.Module.apply``.

        Args:
            x: signals (B, C, T) or one record (C, T), any float dtype.
            labels: classes (B,) or (B, 1), for one record one number; in [0, 1], where
                a number between mixes the magnitudes of both. Not needed with
                ``magnitudes="mean"`` or if the policy's magnitudes are shared.
            draw: from :meth:`sample`.

        Returns:
            Augmented signals, shape and dtype of ``x``.

        Raises:
            ValueError: if labels are missing or outside [0, 1], or a shape or the
                device does not fit.
        """
        if not isinstance(x, Tensor):  # nn.Module's own, to initialise parts by
            return super().apply(x)
        if draw is None:
            raise TypeError("Pass the draw to apply, see sample().")
        self._check(x)
        batch = x[None] if x.dim() == 2 else x
        result = self._policy.apply(batch, self._shares(batch, labels), draw)
        return result[0] if x.dim() == 2 else result

    def forward(
        self,
        x: Tensor,
        labels: Tensor | float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw and apply; in eval mode return ``x`` itself.

        Args:
            x: signals (B, C, T) or one record (C, T), any float dtype.
            labels: see :meth:`apply`.
            generator: source of the randomness; torch's global one by default.

        Returns:
            Augmented signals, shape and dtype of ``x``.

        Raises:
            ValueError: see :meth:`apply`.
        """
        if not self.training:
            return x
        self._check(x)
        return self.apply(x, labels, self.sample(x.shape, generator))

    def exportable(self) -> DrawnAugmentation:
        """Return the same augmentation as ``torch.export`` takes it.

        Returns:
            A module of signals, labels and a draw of its own kind. It shares the
            buffers and does not check labels; 0.5 for all is ``magnitudes="mean"``.

        Examples:
            >>> augment = LearnedAugmentation(TaskAugPolicy(1, sampling_rate=100))
            >>> module = augment.exportable()
            >>> x, labels = torch.randn(3, 12, 100), torch.zeros(3)
            >>> module(x, labels, module.sample(x.shape)).shape
            torch.Size([3, 12, 100])
        """
        return DrawnAugmentation(self._policy)

    def extra_repr(self) -> str:
        """Return the settings shown by ``repr``."""
        return f"magnitudes={self.magnitudes!r}, sampling_rate={self.sampling_rate}"

    def _check(self, x: Tensor) -> None:
        if x.dim() not in (2, 3) or not x.is_floating_point():
            raise ValueError(
                "Signals must be floats of shape (B, C, T) or (C, T), got "
                f"{x.dtype} {tuple(x.shape)}."
            )
        if x.device != self._policy.logits.device:
            raise ValueError(
                f"The signals are on {x.device}, the augmentation is on "
                f"{self._policy.logits.device}; call augment.to({str(x.device)!r})."
            )

    def _shares(self, batch: Tensor, labels: Tensor | float | None) -> Tensor | None:
        """Return how much of the positive class's magnitude each record gets, (B,)."""
        policy = self._policy
        if policy.shared_magnitudes or not policy.num_stages:
            return None
        if self.magnitudes == "mean":
            return batch.new_full((len(batch),), 0.5, dtype=policy.mag_neg.dtype)
        if labels is None:
            raise ValueError(
                "This policy has magnitudes of its own for each class and needs "
                "labels: pass them, or build the augmentation with magnitudes='mean'."
            )
        labels = torch.as_tensor(labels, device=batch.device)
        if ((labels < 0) | (labels > 1)).any():
            raise ValueError(
                "Labels must lie in [0, 1], the negative and the positive class, got "
                f"{labels.min().item():g} to {labels.max().item():g}. For other labels "
                "build the augmentation with magnitudes='mean'."
            )
        return labels


def _frozen(policy: TaskAugPolicy) -> TaskAugPolicy:
    """Return a copy whose parameters are buffers."""
    policy = copy.deepcopy(policy)
    for name in ("logits", "mag_neg", "mag_pos"):
        value = getattr(policy, name).detach()
        delattr(policy, name)
        policy.register_buffer(name, value)
    return policy
