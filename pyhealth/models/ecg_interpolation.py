"""Reading a sampled signal between its samples, differentiably."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["interpolate"]


def interpolate(x: Tensor, shift: Tensor) -> Tensor:
    """Read every record at sample positions t + shift, edges repeated.

    Six-point, fourth-order cubic convolution (Keys 1981, IEEE TASSP 29:1153): the
    kernel has a continuous slope, so the derivative in ``shift`` exists everywhere,
    and at half a sample it passes 0.99 of a 40 Hz wave at 250 Hz (linear: 0.88).

    Args:
        x: signals (B, C, T).
        shift: offsets (B, T), samples.

    Returns:
        (B, C, T), the dtype of ``x``.

    Examples:
        >>> x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        >>> interpolate(x, torch.full((1, 4), 1.0))
        tensor([[[2., 3., 4., 4.]]])
    """
    whole = shift.floor()
    taps = _keys_taps(shift - whole)
    last = x.shape[-1] - 1
    start = torch.arange(last + 1, device=x.device) + whole.long()
    result = torch.zeros_like(x)
    for offset, tap in enumerate(taps, start=-2):
        index = (start + offset).clamp(0, last)[:, None, :].expand_as(x)
        result = result + tap.to(x.dtype)[:, None, :] * x.gather(-1, index)
    return result


def _keys_taps(f: Tensor) -> tuple[Tensor, ...]:
    """Weights of samples -2..3 for a position f in [0, 1) after sample 0.

    The kernel's polynomials are factored by their zeros, so a whole shift gives
    weights of exactly 0 and 1: the identity is exact in every dtype.
    """
    g = 1 - f
    return (
        f * g * g / 12,
        f * g * (7 * f - 8) / 12,
        g * (1 + f - 4 / 3 * f * f),
        f * (1 + g - 4 / 3 * g * g),
        g * f * (7 * g - 8) / 12,
        g * f * f / 12,
    )
