"""A 1-D ResNet-18 for ECGs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .temporal_convolution import TemporalConv, signal_layout


class _ResNet1D(nn.Module):
    """ResNet-18 (He et al. 2016) over time, leads as channels.

    The signals go through it as (B, C, 1, T), which has faster convolutions than
    (B, C, T); the ``state_dict`` is that of the same network of ``Conv1d`` and
    ``BatchNorm1d``.

    Args:
        in_channels: number of leads.
        num_outputs: number of logits.
        base_width: channels of the first of the four stages.
        kernel_size: odd length of the convolutions.
        stem_kernel_size: odd length of the first convolution; default kernel_size.
        stem_pool: whether a max-pool follows the first convolution.
        blocks: residual blocks in each stage.
    """

    def __init__(
        self,
        in_channels: int,
        num_outputs: int,
        base_width: int = 64,
        kernel_size: int = 7,
        stem_kernel_size: int | None = None,
        stem_pool: bool = True,
        blocks: Sequence[int] = (2, 2, 2, 2),
    ) -> None:
        super().__init__()
        stem_kernel_size = stem_kernel_size or kernel_size
        for size in (kernel_size, stem_kernel_size):
            if size < 1 or size % 2 == 0:
                raise ValueError(f"A kernel must have an odd length, got {size}.")
        stem = [
            TemporalConv(in_channels, base_width, stem_kernel_size, stride=2),
            _Norm(base_width),
            nn.ReLU(),
        ]
        if stem_pool:
            stem.append(nn.MaxPool2d((1, 3), stride=(1, 2), padding=(0, 1)))
        self.stem = nn.Sequential(*stem)
        width, stages = base_width, []
        for stage, count in enumerate(blocks):
            for block in range(count):
                out = base_width * 2**stage
                stride = 2 if stage and not block else 1
                stages.append(_BasicBlock(width, out, kernel_size, stride))
                width = out
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map signals (B, C, T) to logits (B, outputs)."""
        x = x.unsqueeze(2).contiguous(memory_format=signal_layout())
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class _Norm(nn.BatchNorm2d):
    """BatchNorm in float32 at least: its second derivative cancels in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        value, tangent = forward_ad.unpack_dual(x)
        forward_alone = tangent is not None and not torch.is_grad_enabled()
        if forward_alone and self.training and self.momentum is not None:
            return self._with_tangent(value, tangent, self.momentum)
        return super().forward(x)

    def _with_tangent(self, x: Tensor, tangent: Tensor, momentum: float) -> Tensor:
        """Normalise a batch in forward mode.

        ``y / weight`` has a symmetric Jacobian in x, so torch's backward kernel gives
        the forward derivative too, for which torch itself passes ten times over x.
        """
        weight, weight_tangent = forward_ad.unpack_dual(self.weight)
        bias, bias_tangent = forward_ad.unpack_dual(self.bias)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = self.running_mean, self.running_var
        y, mean, scale = torch.native_batch_norm(
            x, weight, bias, *running, True, momentum, self.eps
        )
        slope, _, _ = torch.ops.aten.native_batch_norm_backward(
            tangent,
            x,
            weight,
            None,
            None,
            mean,
            scale,
            True,
            self.eps,
            [True, False, False],
        )
        if weight_tangent is not None:
            factor = weight_tangent * scale
            slope.addcmul_(x, _by_channel(factor)).sub_(_by_channel(factor * mean))
        if bias_tangent is not None:
            slope.add_(_by_channel(bias_tangent))
        return forward_ad.make_dual(y, slope)


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


class _BasicBlock(nn.Module):
    """Two convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int
    ) -> None:
        super().__init__()
        # No bias: the batch normalisation behind it would subtract it again, and its
        # gradient, rounding noise, would upset Adam's second moment.
        self.conv1 = TemporalConv(in_channels, out_channels, kernel_size, stride)
        self.norm1 = _Norm(out_channels)
        self.conv2 = TemporalConv(out_channels, out_channels, kernel_size, stride=1)
        self.norm2 = _Norm(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                TemporalConv(in_channels, out_channels, 1, stride),
                _Norm(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))
