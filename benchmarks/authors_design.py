"""The design of the published TaskAug code, written anew as a baseline to measure.

A 1-D ResNet-18 of width 32-256 with kernel 15, a stem of stride 2 and no max-pool; two
stages that compute seven operations each and keep one a batch; the hypergradient with
one Neumann term, every second derivative by torch's own double backward, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from pyhealth.models.ecg_augmentations import AUGMENTATIONS

OPERATIONS = [op for name, op in AUGMENTATIONS.items() if name != "lead_dropout"]
WIDTHS, KERNEL = (32, 64, 128, 256), 15


class Conv1dResNet(nn.Module):
    """A straightforward ResNet-18 of Conv1d, BatchNorm1d and ReLU."""

    def __init__(self, widths=WIDTHS, kernel=KERNEL, pool=False) -> None:
        super().__init__()
        first = widths[0]
        stem = [*_convolution(12, first, kernel, 2), nn.ReLU()]
        self.stem = nn.Sequential(*stem, *([nn.MaxPool1d(3, 2, 1)] if pool else []))
        blocks, channels = [], first
        for stage, width in enumerate(widths):
            for block in range(2):
                stride = 2 if stage and not block else 1
                blocks.append(_Block(channels, width, kernel, stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map signals (B, 12, T) to logits (B, 1)."""
        return self.head(self.blocks(self.stem(x)).mean(dim=-1))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *_convolution(channels, width, kernel, stride),
            nn.ReLU(),
            *_convolution(width, width, kernel, 1),
        )
        same = channels == width and stride == 1
        self.shortcut = nn.Sequential(
            *([] if same else _convolution(channels, width, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.path(x) + self.shortcut(x)).relu()


class AuthorsDesign:
    """Inner step and outer step on one batch."""

    def __init__(self, rate: float = 250.0, lr: float = 1e-3) -> None:
        self.network = Conv1dResNet()
        self.logits = torch.zeros(2, len(OPERATIONS), requires_grad=True)
        self.magnitudes = torch.zeros(2, len(OPERATIONS), requires_grad=True)
        self.weights = list(self.network.parameters())
        self.optimizer = torch.optim.Adam(self.weights, lr=lr)
        self.rate, self.lr = rate, lr

    def augment(self, x: Tensor) -> Tensor:
        """Compute every operation of each stage and keep one."""
        for logits, magnitudes in zip(self.logits, self.magnitudes, strict=True):
            values = torch.stack(
                [
                    op.apply(
                        x,
                        (op.low + (op.high - op.low) * magnitude.sigmoid()).expand(
                            len(x)
                        ),
                        op.draw(x.shape),
                        self.rate,
                    )
                    for op, magnitude in zip(OPERATIONS, magnitudes, strict=True)
                ]
            )
            soft = logits.softmax(dim=0)
            hard = torch.zeros_like(soft)
            hard[int(torch.multinomial(soft.detach(), 1))] = 1
            choice = hard + soft - soft.detach()  # straight-through
            x = torch.einsum("o,obct->bct", choice, values)
        return x

    def loss(self, x: Tensor, label: Tensor) -> Tensor:
        """Return the training loss."""
        return binary_cross_entropy_with_logits(self.network(x), label)

    def iteration(self, x: Tensor, label: Tensor, val_x: Tensor, val_label: Tensor):
        """Take an inner step, then return the hypergradient."""
        self.optimizer.zero_grad()
        with torch.no_grad():
            augmented = self.augment(x)
        self.loss(augmented, label).backward()
        self.optimizer.step()
        term = torch.autograd.grad(self.loss(val_x, val_label), self.weights)
        grads = torch.autograd.grad(
            self.loss(self.augment(x), label), self.weights, create_graph=True
        )
        product = torch.autograd.grad(grads, self.weights, term, retain_graph=True)
        vector = [
            self.lr * (2 * g - self.lr * h) for g, h in zip(term, product, strict=True)
        ]
        policy = (self.logits, self.magnitudes)
        return torch.autograd.grad(grads, policy, [-v for v in vector])


def _convolution(channels: int, width: int, kernel: int, stride: int):
    convolution = nn.Conv1d(
        channels, width, kernel, stride, padding=kernel // 2, bias=False
    )
    return convolution, nn.BatchNorm1d(width)
