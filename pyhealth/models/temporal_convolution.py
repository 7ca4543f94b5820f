"""A convolution over time whose second derivatives cost no more than they must.

``<g, conv(x, w)>`` is linear in each of g, x and w. So the convolution, its gradient
in x and its gradient in w are three readings of one trilinear form, and the derivative
of each is made of the other two. Written so, a derivative of any order is a sum of
ordinary forward and backward convolutions. Torch's own second derivative convolves with
a kernel as long as the signal, and forms gradients that nobody asked for.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

__all__ = ["TemporalConv", "signal_layout"]

type Geometry = tuple[int, int, int]  #: stride, padding, length of the input
type _Gradients = tuple[Tensor | None, Tensor | None, None]


class _Context(Protocol):
    # What torch keeps for a derivative; its own FunctionCtx says half of it.
    geometry: Geometry
    saved_tensors: tuple[Tensor, Tensor]
    needs_input_grad: tuple[bool, bool, bool]
    next_functions: tuple[tuple[Node, int], ...]

    def set_materialize_grads(self, value: bool) -> None: ...
    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def save_for_forward(self, *tensors: Tensor) -> None: ...


def signal_layout() -> torch.memory_format:
    """Return the memory layout of (B, C, 1, T) in which convolutions run fastest here.

    Channels last is 1.4 times as fast with AVX-512, and what a GPU's tensor cores take.
    On a CPU with AVX2 only, its weight gradient takes 1.6 times as long.

    Returns:
        ``torch.channels_last`` or ``torch.contiguous_format``.

    Examples:
        >>> signal_layout() in (torch.channels_last, torch.contiguous_format)
        True
    """
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    fast = wide or torch.cuda.is_available()
    return torch.channels_last if fast else torch.contiguous_format


class TemporalConv(nn.Conv1d):
    """``torch.nn.Conv1d`` for signals (B, C, 1, T), without bias, padded by half.

    Parameters, initial values and ``state_dict`` are those of ``torch.nn.Conv1d``; the
    weight only lies in memory in the order of :func:`signal_layout`, which copying,
    loading and optimisers keep.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd length of the kernel, samples.
        stride: samples from one output to the next.

    Examples:
        >>> convolution = TemporalConv(12, 8, kernel_size=7, stride=2)
        >>> convolution(torch.zeros(4, 12, 1, 1000)).shape
        torch.Size([4, 8, 1, 500])
        >>> convolution.weight.shape
        torch.Size([8, 12, 7])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            bias=False,
        )
        weight = self.weight.detach().unsqueeze(2)
        weight = weight.contiguous(memory_format=signal_layout())
        self.weight = nn.Parameter(weight.squeeze(2))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, 1, T) to (B, O, 1, T')."""
        geometry = (self.stride[0], self.padding[0], x.shape[-1])
        weight = self.weight.unsqueeze(2)
        # Autocast's part, done here: it does not reach the derivatives' convolutions.
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return _Convolution.apply(x, weight, geometry)


class _Bilinear(torch.autograd.Function):
    """A function of two tensors, linear in each, and a geometry."""

    @staticmethod
    def setup_context(
        ctx: _Context, inputs: tuple[Tensor, Tensor, Geometry], output: Tensor
    ) -> None:
        first, second, ctx.geometry = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)

    @classmethod
    def jvp_of(
        cls,
        ctx: _Context,
        first_tangent: Tensor | None,
        second_tangent: Tensor | None,
        _: Tensor | None,
    ) -> Tensor:
        first, second = ctx.saved_tensors
        terms = []
        if first_tangent is not None:
            terms.append(cls.apply(first_tangent, second, ctx.geometry))
        if second_tangent is not None:
            terms.append(cls.apply(first, second_tangent, ctx.geometry))
        return sum(terms[1:], start=terms[0])


class _Convolution(_Bilinear):
    """y = conv(x, w)."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        stride, padding, _ = geometry
        dtype = _computed_in(x)
        # Not torch.conv2d, whose operands autocast would narrow again.
        y = torch.ops.aten.convolution(
            x.to(dtype),
            w.to(dtype),
            None,
            [1, stride],
            [0, padding],
            [1, 1],
            False,
            [0, 0],
            1,
        )
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: _Context, g: Tensor | None) -> _Gradients:
        x, w = ctx.saved_tensors
        gx = _InputGradient.apply(g, w, ctx.geometry) if _wanted(ctx, 0, g) else None
        gw = _WeightGradient.apply(g, x, ctx.geometry) if _wanted(ctx, 1, g) else None
        return gx, gw, None

    @staticmethod
    def jvp(ctx: _Context, *tangents: Tensor | None) -> Tensor:
        return _Convolution.jvp_of(ctx, *tangents)


class _InputGradient(_Bilinear):
    """gx = the gradient of <g, conv(x, w)> in x."""

    @staticmethod
    def forward(g: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        shape = (len(g), w.shape[1], 1, geometry[2])
        x = g.new_empty(1).expand(shape)  # only its shape is read
        return _gradient(0, g, x, w, geometry)

    @staticmethod
    def backward(ctx: _Context, x: Tensor | None) -> _Gradients:
        g, w = ctx.saved_tensors
        gg = _Convolution.apply(x, w, ctx.geometry) if _wanted(ctx, 0, x) else None
        gw = _WeightGradient.apply(g, x, ctx.geometry) if _wanted(ctx, 1, x) else None
        return gg, gw, None

    @staticmethod
    def jvp(ctx: _Context, *tangents: Tensor | None) -> Tensor:
        return _InputGradient.jvp_of(ctx, *tangents)


class _WeightGradient(_Bilinear):
    """gw = the gradient of <g, conv(x, w)> in w."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        stride, padding, _ = geometry
        size = 2 * padding + 1
        if size == 1:
            # A matrix product: with torch 2.14.1 and AVX-512 the convolution's own
            # writes out of bounds (8 to 16 channels, channels last, two threads, 3 or
            # 31 records).
            return torch.einsum("boht,biht->oi", g, x[..., ::stride])[:, :, None, None]
        w = x.new_empty(1).expand(g.shape[1], x.shape[1], 1, size)
        return _gradient(1, g, x, w, geometry)

    @staticmethod
    def backward(ctx: _Context, w: Tensor | None) -> _Gradients:
        g, x = ctx.saved_tensors
        gg = _Convolution.apply(x, w, ctx.geometry) if _wanted(ctx, 0, w) else None
        gx = _InputGradient.apply(g, w, ctx.geometry) if _wanted(ctx, 1, w) else None
        return gg, gx, None

    @staticmethod
    def jvp(ctx: _Context, *tangents: Tensor | None) -> Tensor:
        return _WeightGradient.jvp_of(ctx, *tangents)


def _wanted(ctx: _Context, position: int, incoming: Tensor | None) -> bool:
    """Return whether this backward pass will use the gradient of an input.

    ``needs_input_grad`` only says whether someone might; in a derivative in the
    signal alone, say, the weights' gradients would be formed and thrown away.
    """
    if incoming is None or not ctx.needs_input_grad[position]:
        return False
    node = ctx.next_functions[position][0]
    if not node.next_functions:  # a leaf: torch does not answer for these
        return True
    return torch._C._will_engine_execute_node(node)


def _gradient(
    of: Literal[0, 1], g: Tensor, x: Tensor, w: Tensor, geometry: Geometry
) -> Tensor:
    """Return the gradient in the signal (0) or in the weight (1)."""
    stride, padding, _ = geometry
    dtype = _computed_in(g)
    operands = [operand.to(dtype) for operand in (g, x, w)]
    mask = (of == 0, of == 1, False)
    gradients = torch.ops.aten.convolution_backward(
        *operands, None, [1, stride], [0, padding], [1, 1], False, [0, 0], 1, mask
    )
    return gradients[of].to(g.dtype)


def _computed_in(x: Tensor) -> torch.dtype:
    """Return the precision to convolve a signal in; its results are rounded to its own.

    Where the processor has no 16-bit convolution (AVX2 only), torch's stand-in is far
    slower than the one in 32 bit, whose sums are at least as exact.
    """
    narrow = x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu"
    emulated = narrow and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulated else x.dtype
