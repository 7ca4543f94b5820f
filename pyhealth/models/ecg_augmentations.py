"""Eight differentiable augmentations of an electrocardiogram, and their registry.

Each operation is a pure function of a batch of signals, a magnitude a record, and
a *draw*: all randomness of the call, made beforehand and free of parameters. With
the draw held fixed, an operation is a smooth function of its magnitude, so a
magnitude can be learned. The functions know no class and no policy;
:data:`AUGMENTATIONS` joins each to its draw, its interval and its unit.

Conventions shared by all operations:
    - ``x`` is (B, C, T): records, leads, samples; any float dtype, any device.
    - ``magnitude`` is (B,), in the operation's own unit; zero is the identity.
    - The draw's first dimension is B, so a batch equals each record alone.
    - ``rate`` is the sampling rate in hertz.
    - The result has the shape, dtype and device of ``x``.

Source: Raghu, Shanmugam, Pomerantsev, Guttag, Stultz. Data Augmentation for
Electrocardiograms. CHIL 2022 (the seven operations and the idea of learning their
magnitudes). Departures are named in each operation. Lead dropout is an extension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from .ecg_draws import (
    WANDER_HERTZ,
    WARP_COSINES,
    Draw,
    empty_noise,
    lead_noise,
    normal_noise,
    signed_noise,
    uniform_noise,
    wander_noise,
    warp_noise,
)
from .ecg_interpolation import interpolate

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "baseline_wander",
    "gaussian_noise",
    "lead_dropout",
    "magnitude_scale",
    "no_op",
    "temporal_displacement",
    "temporal_warp",
    "time_mask",
]

#: Width (scale of the logistic edge, seconds) over which a time mask fades.
MASK_EDGE_SECONDS = 0.02
#: Temperature of the relaxed Bernoulli gate of a dropped lead.
DROPOUT_TEMPERATURE = 0.5


def gaussian_noise(x: Tensor, magnitude: Tensor, draw: Tensor, rate: float) -> Tensor:
    """Add white noise in proportion to each lead's own spread.

    Args:
        x: signals (B, C, T).
        magnitude: noise level (B,), standard deviations of the lead.
        draw: standard normal noise (B, C, T).
        rate: sampling rate, hertz; not used.

    Returns:
        Noisy signals (B, C, T).

    Examples:
        >>> x = torch.ones(1, 1, 4) * torch.tensor([0.0, 1.0, 0.0, 1.0])
        >>> gaussian_noise(x, torch.zeros(1), torch.ones(1, 1, 4), rate=100.0)
        tensor([[[0., 1., 0., 1.]]])
    """
    return x + (_column(magnitude) * _spread(x) * draw).to(x.dtype)


def magnitude_scale(x: Tensor, magnitude: Tensor, draw: Tensor, rate: float) -> Tensor:
    """Scale a whole record by one random gain.

    Args:
        x: signals (B, C, T).
        magnitude: largest change of the gain (B,), fraction of the amplitude.
        draw: uniform in [-1, 1] (B,), the share of that change.
        rate: sampling rate, hertz; not used.

    Returns:
        Scaled signals (B, C, T).

    Convention:
        A positive draw makes the record larger. All leads share the gain, so the
        voltage ratios between leads, which axis and hypertrophy rest on, are kept.

    Examples:
        >>> x = torch.ones(1, 1, 3)
        >>> magnitude_scale(x, torch.tensor([0.5]), torch.tensor([1.0]), rate=100.0)
        tensor([[[1.5000, 1.5000, 1.5000]]])
    """
    return x * (1 + _column(magnitude * draw)).to(x.dtype)


def time_mask(x: Tensor, magnitude: Tensor, draw: Tensor, rate: float) -> Tensor:
    """Silence one stretch of time in all leads, with soft edges.

    Args:
        x: signals (B, C, T).
        magnitude: length of the silent stretch (B,), seconds.
        draw: uniform in [0, 1] (B,), the stretch's place: 0 at the start of the
            record, 1 at its end.
        rate: sampling rate, hertz.

    Returns:
        Masked signals (B, C, T); the silent stretch is zero.

    Convention:
        The edges are logistic with scale :data:`MASK_EDGE_SECONDS` seconds, so the
        length has a true derivative; a stretch shorter than that scale only dips
        the signal. The stretch lies inside the record.

    Examples:
        >>> x = torch.ones(1, 1, 101)
        >>> y = time_mask(x, torch.tensor([0.4]), torch.tensor([0.5]), rate=100.0)
        >>> [round(v, 2) for v in y[0, 0, ::25].tolist()]
        [1.0, 0.92, 0.0, 0.92, 1.0]
    """
    time = _steps(x) / rate
    duration = (x.shape[-1] - 1) / rate
    start = (draw * (duration - magnitude))[:, None]
    end = start + magnitude[:, None]
    silent = torch.sigmoid((time - start) / MASK_EDGE_SECONDS) - torch.sigmoid(
        (time - end) / MASK_EDGE_SECONDS
    )
    return x * (1 - silent).to(x.dtype)[:, None, :]


def baseline_wander(x: Tensor, magnitude: Tensor, draw: Tensor, rate: float) -> Tensor:
    """Add a slow drift of each lead's baseline.

    Args:
        x: signals (B, C, T).
        magnitude: root mean square of the drift (B,), standard deviations of the lead.
        draw: standard normal (B, C, 2 F), the sine and cosine coefficients of the
            F frequencies in :data:`WANDER_HERTZ`.
        rate: sampling rate, hertz.

    Returns:
        Drifting signals (B, C, T).

    Convention:
        The drift is a Gaussian process with a flat spectrum over WANDER_HERTZ and,
        on average over draws, unit variance before the magnitude. The original uses
        a single sinusoid.

    Examples:
        >>> x = torch.randn(2, 12, 500, generator=torch.Generator().manual_seed(0))
        >>> draw = AUGMENTATIONS["baseline_wander"].draw(x.shape)
        >>> baseline_wander(x, torch.zeros(2), draw, rate=100.0).equal(x)
        True
    """
    time = _steps(x) / rate
    phase = 2 * math.pi * time.new_tensor(WANDER_HERTZ)[:, None] * time
    basis = torch.cat([phase.sin(), phase.cos()]) / math.sqrt(len(WANDER_HERTZ))
    drift = draw.to(basis.dtype) @ basis
    return x + (_column(magnitude) * _spread(x) * drift).to(x.dtype)


def temporal_warp(x: Tensor, magnitude: Tensor, draw: Tensor, rate: float) -> Tensor:
    """Stretch and squeeze time smoothly, as a changing heart rate does.

    Args:
        x: signals (B, C, T).
        magnitude: largest relative change of speed (B,), below 1.
        draw: uniform in [-1, 1] (B, :data:`WARP_COSINES`), the weights of the cosines
            of which the speed profile is made.
        rate: sampling rate, hertz; not used, since the warp is relative.

    Returns:
        Warped signals (B, C, T).

    Convention:
        Output time t shows input time t + magnitude * integral of the profile. The
        profile lies within [-1, 1] and its integral vanishes at both ends, so time
        stays in order, the record keeps its length and no edge has to be invented.

    Examples:
        >>> x = torch.arange(5.0).reshape(1, 1, 5)
        >>> temporal_warp(x, torch.zeros(1), torch.ones(1, WARP_COSINES), rate=100.0)
        tensor([[[0., 1., 2., 3., 4.]]])
    """
    steps = _steps(x)
    span = max(x.shape[-1] - 1, 1)
    order = torch.arange(1, 1 + WARP_COSINES, dtype=steps.dtype, device=steps.device)
    order = math.pi * order[:, None]
    integral = torch.sin(order * steps / span) * span / order / WARP_COSINES
    return interpolate(x, magnitude[:, None] * (draw.to(steps.dtype) @ integral))


def temporal_displacement(
    x: Tensor, magnitude: Tensor, draw: Tensor, rate: float
) -> Tensor:
    """Delay a whole record by a fractional number of samples.

    Args:
        x: signals (B, C, T).
        magnitude: largest delay (B,), seconds.
        draw: uniform in [-1, 1] (B,), the share of that delay.
        rate: sampling rate, hertz.

    Returns:
        Delayed signals (B, C, T).

    Convention:
        A positive delay moves the trace right. The edge sample is repeated: an ECG
        does not go on at its own start, so nothing wraps round. The original shifts
        by whole samples, which has no derivative.

    Examples:
        >>> x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        >>> temporal_displacement(x, torch.ones(1), torch.ones(1), rate=1.0)
        tensor([[[1., 1., 2., 3.]]])
    """
    delay = (magnitude * draw * rate)[:, None]
    return interpolate(x, -delay.expand(-1, x.shape[-1]))


def no_op(x: Tensor, magnitude: Tensor, draw: Tensor, rate: float) -> Tensor:
    """Leave the signals as they are.

    Args:
        x: signals (B, C, T).
        magnitude: (B,), without effect.
        draw: empty (B, 0).
        rate: sampling rate, hertz; not used.

    Returns:
        ``x`` itself.

    Examples:
        >>> x = torch.ones(1, 1, 3)
        >>> no_op(x, torch.zeros(1), torch.empty(1, 0), rate=100.0) is x
        True
    """
    return x


def lead_dropout(x: Tensor, magnitude: Tensor, draw: Tensor, rate: float) -> Tensor:
    """Silence leads at random, as detached electrodes do.

    Args:
        x: signals (B, C, T).
        magnitude: probability of a drop (B,), in [0, 1).
        draw: logistic noise (B, C); minus infinity marks a lead that always stays.
            ``ecg_draws.lead_noise`` drops lead by lead, ``electrode_noise`` all leads
            of an electrode.
        rate: sampling rate, hertz; not used.

    Returns:
        Signals (B, C, T), each lead multiplied by its gate in [0, 1].

    Convention:
        The gate is a relaxed Bernoulli variable (Maddison et al. 2017, the binary
        concrete) with :data:`DROPOUT_TEMPERATURE`: a lead is dropped more than half
        with the stated probability, and most draws carry a gradient.

    Examples:
        >>> x = torch.ones(1, 3, 2)
        >>> draw = torch.tensor([[-math.inf, 0.0, 9.0]])
        >>> lead_dropout(x, torch.tensor([0.5]), draw, rate=100.0)[0, :, 0]
        tensor([1.0000e+00, 5.0000e-01, 1.5230e-08])
    """
    # odds ** (1 / temperature) written without a logarithm: finite, with a finite
    # slope, at probability zero, where logit(p) is minus infinity.
    power = 1 / DROPOUT_TEMPERATURE
    wide = _wide(x)
    probability = magnitude.to(wide)[:, None]
    kept = (1 - probability) ** power
    dropped = probability**power * torch.exp(power * draw.to(wide))
    return x * (kept / (kept + dropped)).to(x.dtype)[:, :, None]


class _Apply(Protocol):
    def __call__(
        self, x: Tensor, magnitude: Tensor, draw: Tensor, rate: float
    ) -> Tensor: ...


@dataclass(frozen=True)
class Augmentation:
    """One entry of the registry: everything a policy or a page needs to know.

    Attributes:
        name: public name, the name of the function.
        apply: the operation, ``apply(x, magnitude, draw, rate)``.
        draw: makes its randomness, ``draw(shape, dtype=, device=, generator=)``.
        low: smallest magnitude, the identity.
        high: largest magnitude a policy may reach.
        unit: unit of the magnitude, for people.

    Examples:
        >>> op = AUGMENTATIONS["temporal_displacement"]
        >>> op.high, op.unit
        (0.5, 's')
        >>> x = torch.zeros(2, 12, 1000)
        >>> op.apply(x, torch.full((2,), 0.1), op.draw(x.shape), rate=100.0).shape
        torch.Size([2, 12, 1000])
    """

    name: str
    apply: _Apply
    draw: Draw
    low: float
    high: float
    unit: str


_SPREADS = "standard deviations of the lead"

#: The operations by name, in the order of a policy's logits. The order is public.
AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType(
    {
        op.name: op
        for op in (
            Augmentation(
                "gaussian_noise", gaussian_noise, normal_noise, 0.0, 0.5, _SPREADS
            ),
            Augmentation(
                "magnitude_scale",
                magnitude_scale,
                signed_noise,
                0.0,
                0.5,
                "of the amplitude",
            ),
            Augmentation("time_mask", time_mask, uniform_noise, 0.0, 2.0, "s"),
            Augmentation(
                "baseline_wander", baseline_wander, wander_noise, 0.0, 1.0, _SPREADS
            ),
            Augmentation(
                "temporal_warp", temporal_warp, warp_noise, 0.0, 0.3, "of the speed"
            ),
            Augmentation(
                "temporal_displacement",
                temporal_displacement,
                signed_noise,
                0.0,
                0.5,
                "s",
            ),
            Augmentation("no_op", no_op, empty_noise, 0.0, 0.0, ""),
            Augmentation(
                "lead_dropout", lead_dropout, lead_noise, 0.0, 0.5, "probability"
            ),
        )
    }
)


def _column(per_record: Tensor) -> Tensor:
    return per_record[:, None, None]


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype for times and positions: half floats cannot count samples."""
    return torch.promote_types(x.dtype, torch.float32)


def _steps(x: Tensor) -> Tensor:
    """Return the sample numbers 0..T-1."""
    return torch.arange(x.shape[-1], dtype=_wide(x), device=x.device)


def _spread(x: Tensor) -> Tensor:
    """Return each lead's standard deviation over time (B, C, 1)."""
    return x.std(dim=-1, keepdim=True, correction=0)
