"""Which operation truly helps against each nuisance, found by force."""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np
import torch
from recovery_data import TEST_SEED, Cohort, Part, nuisances
from rows import Rows
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from pyhealth.bilevel import BiLevelTrainer
from pyhealth.models.ecg_augmentations import AUGMENTATIONS
from pyhealth.models.taskaug_policy import TaskAugPolicy
from pyhealth.models.taskaug_resnet import TaskAugResNet

WIDTH = 8
EPOCHS = 25
#: Epochs before the end whose test scores are averaged: one epoch's score jumps.
SCORED_LAST = 5
UNIFORM = "uniform"
FORCED = (UNIFORM, *AUGMENTATIONS)


def new_model(
    cohort: Cohort, seed: int, num_stages: int = 1, **policy
) -> TaskAugResNet:
    """Return the small network; the seed alone decides its first weights."""
    torch.manual_seed(seed)
    model = TaskAugResNet(cohort.samples, base_width=WIDTH, policy_stages=1)
    model.policy = TaskAugPolicy(num_stages, sampling_rate=100, **policy)
    return model


def test_parts(cohort: Cohort) -> dict[str, Part]:
    """Return the clean test part and one for each nuisance and strength."""
    planted = {
        f"{operation}/{magnitude:g}": cohort.test.planted(
            operation, magnitude, TEST_SEED
        )
        for operation, magnitude in nuisances()
    }
    return {"clean": cohort.test, **planted}


class TestScores:
    """Collects the test AUROC of the last epochs of a run; for ``on_epoch``."""

    def __init__(self, parts: dict[str, Part], epochs: int) -> None:
        self.parts, self.first = parts, epochs - SCORED_LAST
        self._scores: dict[str, list[float]] = defaultdict(list)

    def __call__(self, trainer: BiLevelTrainer) -> None:
        if len(trainer.history) <= self.first:
            return
        for name, part in self.parts.items():
            self._scores[name].append(auroc(trainer.model, part))

    def mean(self) -> dict[str, float]:
        """Return the mean over the epochs, by part."""
        return {name: float(np.mean(s)) for name, s in self._scores.items()}


@torch.no_grad()
def auroc(model: TaskAugResNet, part: Part) -> float:
    """Return the AUROC of the model on a part, without augmentation."""
    model.eval()
    scores = torch.cat([model(ecg=x)["logit"] for x in part.ecg.split(256)])
    return float(roc_auc_score(part.label.flatten(), scores.flatten()))


def run_truth(cohort: Cohort, rows: Rows, seeds: int, epochs: int = EPOCHS) -> None:
    """Train with each operation forced on every record; score on every nuisance.

    The training does not see the nuisance, so one run serves all of them.
    """
    jobs = [
        {"forced": forced, "seed": seed} for seed in range(seeds) for forced in FORCED
    ]
    parts = test_parts(cohort)
    for job in tqdm([job for job in jobs if job not in rows], desc="truth"):
        started, seed = time.perf_counter(), job["seed"]
        only = None if job["forced"] == UNIFORM else [job["forced"]]
        model = new_model(cohort, seed, operations=only, shared_magnitudes=True)
        scores = TestScores(parts, epochs)
        trainer = BiLevelTrainer(
            model, metrics=["roc_auc"], device="cpu", enable_logging=False, seed=seed
        )
        trainer.train(
            cohort.train.loader(seed),
            cohort.val.loader(),
            epochs=epochs,
            hypergradient=None,
            load_best_model_at_last=False,
            on_epoch=scores,
        )
        rows.append(
            {**job, "auroc": scores.mean(), "seconds": time.perf_counter() - started}
        )
