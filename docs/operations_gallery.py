"""The gallery of operations, made from the registry: a ninth appears by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pyhealth.bilevel.ecg_paper import plot_ecg
from pyhealth.models.ecg_augmentations import AUGMENTATIONS, Augmentation
from pyhealth.processors.ecg_processor import ECGProcessor

RATE = 100
STRENGTHS = {"weak": 0.25, "medium": 0.5, "strong": 1.0}
HEAD = """# Operations

Each operation on one invented ten-second ECG, at a quarter, a half and the whole of its
range: before in black, after in blue. The page and its pictures are made from the
registry `AUGMENTATIONS` by the build of this documentation.
"""


def write_gallery(root: Path, folder: Path) -> None:
    """Write operations.md and its pictures.

    Args:
        root: folder of a corpus in PTB-XL's layout, at 100 Hz.
        folder: where to write.
    """
    record = sorted(root.glob("records100/**/*.hea"))[0].with_suffix("")
    processor = ECGProcessor(RATE, 10 * RATE, "none")
    ecg = processor.process(str(record))
    text = HEAD
    for op in AUGMENTATIONS.values():
        text += f"\n## {op.name}\n\n{_summary(op)}\n\n"
        if op.low == op.high:
            text += "It has no magnitude and changes nothing.\n"
            continue
        for name, share in STRENGTHS.items():
            magnitude = op.low + share * (op.high - op.low)
            picture = f"{op.name}_{name}.png"
            plot_ecg(
                [ecg.numpy(), _applied(op, ecg, magnitude).numpy()],
                folder / picture,
                sampling_rate=RATE,
                suptitle=f"{op.name}, {name}: {magnitude:g} {op.unit}",
            )
            text += f"![{op.name} at {magnitude:g} {op.unit}]({picture})\n\n"
    (folder / "operations.md").write_text(text, encoding="utf-8")


def _summary(op: Augmentation) -> str:
    first = (op.apply.__doc__ or op.name).strip().splitlines()[0]
    return f"{first} Magnitude: {op.low:g} to {op.high:g}, {op.unit}."


def _applied(op: Augmentation, ecg: Tensor, magnitude: float) -> Tensor:
    x = ecg[None]
    generator = torch.Generator().manual_seed(1)
    draw = op.draw(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return op.apply(x, x.new_full((1,), magnitude), draw, RATE)[0]
