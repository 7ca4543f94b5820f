"""Data of the recovery benchmark: small cohorts in memory, with planted nuisances."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyhealth.datasets import SampleDataset, get_dataloader
from pyhealth.datasets.ptbxl import CohortSplit, PTBXLDataset
from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
from pyhealth.models.ecg_augmentations import AUGMENTATIONS
from pyhealth.tasks.ecg_classification import ECGBinaryClassification

SAMPLING_RATE = 100
BATCH_SIZE = 64
#: Records drawn for training and validation; of the training ones the first 750 train.
N_RECORDS = 1875
N_TRAIN = 750
N_TEST = 1000
#: Patients of the invented corpus.
N_PATIENTS = 2600
#: Magnitudes of each nuisance, in its own unit: from the policy's limit upwards.
STRENGTHS = {
    "gaussian_noise": (0.5, 1.0, 2.0),
    "magnitude_scale": (0.5, 0.8, 0.95),
    "time_mask": (2.0, 5.0, 8.0),
    "baseline_wander": (1.0, 2.0, 4.0),
    "temporal_warp": (0.3, 0.6, 0.9),
    "temporal_displacement": (0.5, 1.5, 3.0),
    "lead_dropout": (0.5, 0.75, 0.9),
}
#: Seeds of the planted nuisance in the validation and the test records.
VAL_SEED, TEST_SEED = 11, 7


@dataclass(frozen=True)
class Part:
    """Signals (N, 12, T) and labels (N, 1) of one part of the cohort."""

    ecg: Tensor
    label: Tensor

    def first(self, count: int) -> Part:
        """Return the first records."""
        return Part(self.ecg[:count], self.label[:count])

    def planted(self, operation: str, magnitude: float, seed: int) -> Part:
        """Return the part with a nuisance in every record."""
        op, generator = AUGMENTATIONS[operation], torch.Generator().manual_seed(seed)
        pieces = [
            op.apply(
                x,
                torch.full((len(x),), magnitude),
                op.draw(x.shape, generator=generator),
                SAMPLING_RATE,
            )
            for x in self.ecg.split(256)
        ]
        return Part(torch.cat(pieces), self.label)

    def loader(
        self, seed: int | None = None, batch_size: int = BATCH_SIZE
    ) -> DataLoader:
        """Return batches, shuffled if there is a seed."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(
            _Records(self),
            batch_size if seed is not None else 256,
            shuffle=seed is not None,
            drop_last=seed is not None,
            generator=generator,
        )


@dataclass(frozen=True)
class Cohort:
    """A training part, a validation part and a test part; all of them clean."""

    samples: SampleDataset
    train: Part
    val: Part
    test: Part


class _Records(Dataset):
    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part.label)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"ecg": self.part.ecg[index], "label": self.part.label[index]}


def cohort(root: str | None, cache_dir: str) -> Cohort:
    """Prepare PTB-XL at 100 Hz from ``root``, or an invented corpus of its layout."""
    test: tuple[int, ...] = (9,)
    if root is None:
        root, test = str(_synthetic(Path(cache_dir))), (8, 9, 10)
    dataset = PTBXLDataset(root, sampling_rate=SAMPLING_RATE, cache_dir=cache_dir)
    # One scaler for the corpus: scaled by record or lead, a gain would leave no trace.
    task = ECGBinaryClassification(
        "MI", sampling_rate=SAMPLING_RATE, normalize="dataset"
    )
    parts = dataset.set_task(task, split=CohortSplit(N_RECORDS, seed=0, test=test))
    train, val, rest = (Part(*_tensors(part)) for part in parts)
    return Cohort(parts[0], train.first(N_TRAIN), val, rest.first(N_TEST))


def nuisances() -> Iterator[tuple[str, float]]:
    """Yield every operation with every strength that is planted."""
    for operation, magnitudes in STRENGTHS.items():
        for magnitude in magnitudes:
            yield operation, magnitude


def _synthetic(folder: Path) -> Path:
    root = folder / f"recovery_synthetic_{N_PATIENTS}"
    if not (root / "ptbxl_database.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as half_made:
            made = Path(half_made) / "corpus"
            write_synthetic_ptbxl(made, N_PATIENTS, sampling_rates=(SAMPLING_RATE,))
            made.rename(root)
    return root


def _tensors(samples: SampleDataset) -> tuple[Tensor, Tensor]:
    batches = list(get_dataloader(samples, 256))
    return tuple(torch.cat([b[key] for b in batches]) for key in ("ecg", "label"))
