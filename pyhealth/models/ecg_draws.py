"""Randomness of the ECG augmentations, drawn apart from their parameters.

Every function has the same signature: ``draw(shape, *, **options)``,
where ``shape`` is the shape (B, C, T) of the signals to augment, ``dtype`` and
``device`` those of the draw, and ``generator`` the source of the randomness (torch's
global one by default). It returns a tensor whose first dimension is B. No draw
depends on a parameter, so the same draw can be applied again under other parameters.
"""

from __future__ import annotations

import math
from typing import Protocol, TypedDict, Unpack

import torch
from torch import Tensor

__all__ = [
    "WANDER_HERTZ",
    "WARP_COSINES",
    "Draw",
    "DrawOptions",
    "electrode_noise",
    "empty_noise",
    "lead_noise",
    "normal_noise",
    "signed_noise",
    "uniform_noise",
    "wander_noise",
    "warp_noise",
]

#: Frequencies (hertz) that make up a baseline wander: respiration and movement.
WANDER_HERTZ = tuple(0.05 * k for k in range(1, 11))
#: Number of cosines that make up the speed profile of a temporal warp.
WARP_COSINES = 5
#: Electrodes of each standard lead: right arm 0, left arm 1, left leg 2, V1-V6 3-8.
LEAD_ELECTRODES = (
    (0, 1),
    (0, 2),
    (1, 2),
    *[(0, 1, 2)] * 3,
    *[(electrode,) for electrode in range(3, 9)],
)


class DrawOptions(TypedDict, total=False):
    """What a draw takes besides the shape, with torch's own meaning and defaults.

    Examples:
        >>> options = DrawOptions(dtype=torch.float64)
        >>> uniform_noise(torch.Size([3, 12, 1000]), **options).dtype
        torch.float64
    """

    dtype: torch.dtype
    device: torch.device | str | None
    generator: torch.Generator | None


class Draw(Protocol):
    """Signature of every function of this module.

    Examples:
        >>> draw: Draw = uniform_noise
        >>> draw(torch.Size([3, 12, 1000])).shape
        torch.Size([3])
    """

    def __call__(self, shape: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
        """Draw for signals of ``shape`` (B, C, T)."""
        ...


def normal_noise(shape: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
    """Draw standard normal noise (B, C, T) for ``gaussian_noise``.

    Examples:
        >>> normal_noise(torch.Size([2, 12, 10])).shape
        torch.Size([2, 12, 10])
    """
    return torch.randn(shape, **options)


def wander_noise(shape: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
    """Draw the normal coefficients (B, C, 2 F) of ``baseline_wander``.

    Examples:
        >>> wander_noise(torch.Size([2, 12, 10])).shape
        torch.Size([2, 12, 20])
    """
    size = (*shape[:2], 2 * len(WANDER_HERTZ))
    return torch.randn(size, **options)


def uniform_noise(shape: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
    """Draw one uniform number in [0, 1) a record (B,), for ``time_mask``.

    Examples:
        >>> uniform_noise(torch.Size([2, 12, 10])).shape
        torch.Size([2])
    """
    return torch.rand(shape[0], **options)


def signed_noise(shape: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
    """Draw one uniform number in [-1, 1) a record (B,), for gains and delays.

    Examples:
        >>> signed_noise(torch.Size([2, 12, 10])).abs().le(1).all()
        tensor(True)
    """
    uniform = torch.rand(shape[0], **options)
    return 2 * uniform - 1


def warp_noise(shape: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
    """Draw the weights in [-1, 1) (B, WARP_COSINES) of ``temporal_warp``.

    Examples:
        >>> warp_noise(torch.Size([2, 12, 10])).shape
        torch.Size([2, 5])
    """
    size = (shape[0], WARP_COSINES)
    return 2 * torch.rand(size, **options) - 1


def empty_noise(shape: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
    """Draw nothing (B, 0), for ``no_op``.

    Examples:
        >>> empty_noise(torch.Size([2, 12, 10])).shape
        torch.Size([2, 0])
    """
    return torch.rand(shape[0], 0, **options)


def lead_noise(shape: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
    """Draw for ``lead_dropout`` that decides on each lead by itself.

    Args:
        shape: shape of the signals, (B, C, T).
        **options: dtype, device and generator of the draw.

    Returns:
        Logistic noise (B, C); the lead nearest to staying is set to minus infinity,
        so at least one lead always stays.

    Examples:
        >>> lead_noise(torch.Size([4, 12, 1000])).isinf().sum(dim=1)
        tensor([1, 1, 1, 1])
    """
    return _keep_one(_logistic(shape[:2], **options))


def electrode_noise(shape: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
    """Draw for ``lead_dropout`` that decides on each electrode.

    The limb leads are tied: without the right-arm electrode, leads I and II and the
    three augmented leads are gone, and only III is left of the six. A lead's noise is
    the largest of its electrodes', so it drops if any of them does.

    Args:
        shape: shape of the signals, (B, 12, T), leads in the standard order I, II,
            III, aVR, aVL, aVF, V1 to V6.
        **options: dtype, device and generator of the draw.

    Returns:
        Noise (B, 12), with at least one lead that always stays.

    Raises:
        ValueError: if the signals do not have twelve leads.

    Examples:
        >>> noise = electrode_noise(torch.Size([1, 12, 10]))
        >>> bool(noise[0, 3] == noise[0, 4])  # aVR and aVL share all electrodes
        True
    """
    if shape[1] != 12:
        raise ValueError(
            f"electrode_noise needs the 12 standard leads, got {shape[1]}; "
            "use lead_noise for other lead sets."
        )
    noise = _logistic(torch.Size([shape[0], 9]), **options)
    leads = torch.stack(
        [noise[:, list(electrodes)].amax(dim=1) for electrodes in LEAD_ELECTRODES],
        dim=1,
    )
    return _keep_one(leads)


def _logistic(size: torch.Size, **options: Unpack[DrawOptions]) -> Tensor:
    uniform = torch.rand(size, **options)
    # Kept off 0 and 1, where the logit is infinite.
    return torch.logit(uniform, eps=torch.finfo(uniform.dtype).eps)


def _keep_one(noise: Tensor) -> Tensor:
    stays = noise.argmin(dim=1, keepdim=True)
    return noise.scatter(1, stays, -math.inf)
