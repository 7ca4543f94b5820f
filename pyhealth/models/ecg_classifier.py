"""A trained classifier as a plain module: signals in, probabilities out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ECGClassifier"]

#: What makes probabilities of logits, by the kind of the label.
_OUTPUTS: dict[str, Callable[[], nn.Module]] = {
    "binary": nn.Sigmoid,
    "multilabel": nn.Sigmoid,
    "multiclass": lambda: nn.Softmax(dim=-1),
}


class ECGClassifier(nn.Module):
    """A network and its output, with nothing of datasets, labels and policies.

    ``TaskAugResNet.classifier()`` makes one; ``torch.export`` and ONNX take it.

    Args:
        backbone: maps signals (B, C, T) to logits (B, outputs).
        kind: of the label, "binary", "multilabel" or "multiclass".

    Raises:
        ValueError: if the kind is none of these.

    Examples:
        >>> backbone = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
        >>> ECGClassifier(backbone, "multiclass")(torch.zeros(2, 4, 100))[0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def __init__(self, backbone: nn.Module, kind: str) -> None:
        super().__init__()
        if kind not in _OUTPUTS:
            raise ValueError(f"kind must be one of {list(_OUTPUTS)}, got {kind!r}.")
        self.backbone = backbone
        self.output = _OUTPUTS[kind]()

    def forward(self, ecg: Tensor) -> Tensor:
        """Map signals (B, C, T) to probabilities (B, outputs)."""
        # Not in half precision, in which a probability near 1 has no neighbours.
        wide = torch.promote_types(ecg.dtype, torch.float32)
        return self.output(self.backbone(ecg).to(wide))
