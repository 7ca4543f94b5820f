"""Where each estimator of the derivative points, against the truth by force."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from recovery_data import BATCH_SIZE, VAL_SEED, Cohort, Part
from recovery_truth import new_model
from rows import Rows
from torch import Tensor
from tqdm import tqdm

from pyhealth.bilevel.classifier import classifier_parameters
from pyhealth.bilevel.step import BiLevelStep

#: Epochs of the run with the uniform policy at whose ends the estimators are asked.
CHECKPOINTS = (8,)
#: Pairs of a training and a validation batch at each of them.
PAIRS = 16
INNER_LR = 1e-3


@dataclass(frozen=True)
class Estimator:
    """One way to form the policy's derivative.

    Attributes:
        settings: of :class:`~pyhealth.bilevel.step.BiLevelStep`.
        policy: of :class:`~pyhealth.models.taskaug_policy.TaskAugPolicy`.
        val_records: validation records a pair.
    """

    settings: Mapping = field(default_factory=dict)
    policy: Mapping = field(default_factory=lambda: {"shared_magnitudes": True})
    val_records: int = BATCH_SIZE


ESTIMATORS = {
    "one_step": Estimator({"method": "one_step"}),
    "one_step, batch statistics": Estimator(
        {"method": "one_step", "val_statistics": "batch"}
    ),
    "one_step, ranking": Estimator({"method": "one_step", "outer_loss": "ranking"}),
    "one_step, calibrated": Estimator(
        {"method": "one_step", "outer_loss": "calibrated"}
    ),
    "one_step, ranking, a draw a batch": Estimator(
        {"method": "one_step", "outer_loss": "ranking"},
        {"shared_magnitudes": True, "selection": "batch"},
    ),
    "neumann, 1 term": Estimator(
        {"method": "neumann", "outer_loss": "ranking", "neumann_lr": 1e-2}
    ),
    "neumann, 8 terms": Estimator(
        {
            "method": "neumann",
            "outer_loss": "ranking",
            "neumann_lr": 1e-2,
            "neumann_terms": 8,
        }
    ),
    "darts": Estimator({"method": "darts"}),
    "alignment": Estimator({"method": "alignment"}),
    "alignment, ranking": Estimator({"method": "alignment", "outer_loss": "ranking"}),
    "alignment, calibrated": Estimator(
        {"method": "alignment", "outer_loss": "calibrated"}
    ),
    "alignment, ranking, batch statistics": Estimator(
        {"method": "alignment", "outer_loss": "ranking", "val_statistics": "batch"}
    ),
    "alignment, ranking, class-specific": Estimator(
        {"method": "alignment", "outer_loss": "ranking"}, {}
    ),
    "alignment, ranking, 16 training records": Estimator(
        {"method": "alignment", "outer_loss": "ranking", "alignment_records": 16}
    ),
    "alignment, ranking, 256 validation records": Estimator(
        {"method": "alignment", "outer_loss": "ranking"}, val_records=256
    ),
}


def run_direction(
    cohort: Cohort,
    plants: Mapping[str, float],
    rows: Rows,
    seeds: int,
    checkpoints: tuple[int, ...] = CHECKPOINTS,
    pairs: int = PAIRS,
) -> None:
    """Ask every estimator along a run with a uniform policy, for every plant.

    Args:
        cohort: the clean data.
        plants: magnitude by operation.
        rows: where the hypergradients go.
        seeds: runs.
        checkpoints: epochs after which the estimators are asked.
        pairs: batch pairs at each.
    """
    planted = {
        f"{operation}/{magnitude:g}": cohort.val.planted(operation, magnitude, VAL_SEED)
        for operation, magnitude in plants.items()
    }
    for seed in range(seeds):
        jobs = [
            {"seed": seed, "epoch": epoch, "plant": plant, "estimator": name}
            for epoch in checkpoints
            for plant in planted
            for name in ESTIMATORS
        ]
        if all(job in rows for job in jobs):
            continue
        model = new_model(cohort, seed, shared_magnitudes=True)
        step = step_of(model, seed, Estimator())
        loader = cohort.train.loader(seed)
        for epoch in range(max(checkpoints)):
            for batch in loader:
                step.inner(batch)
            for job in tqdm([j for j in jobs if j["epoch"] == epoch + 1]):
                if job not in rows:
                    part = planted[job["plant"]]
                    seen = _ask(step, cohort.train, part, job, pairs)
                    rows.append(job | {"logits": [h.tolist() for h in seen]})


def step_of(model, seed: int, estimator: Estimator, optimizer=None) -> BiLevelStep:
    """Return a step of the estimator that goes on from an optimiser's state."""
    model.augment = False  # the step augments, not the model
    params = classifier_parameters(model, model.policy)
    own = torch.optim.Adam(params.values(), lr=INNER_LR)
    if optimizer is not None:
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    generator = torch.Generator().manual_seed(seed)
    return BiLevelStep(
        model,
        model.policy,
        params,
        own,
        "ecg",
        "label",
        generator,
        **estimator.settings,
    )


def _ask(
    run: BiLevelStep, train: Part, val: Part, job: Mapping, pairs: int
) -> list[Tensor]:
    """Return the logits' hypergradient of every pair, with the run left as it is."""
    estimator = ESTIMATORS[job["estimator"]]
    # The same pairs for every estimator and plant.
    generator = torch.Generator().manual_seed(1000 + job["seed"])
    seen = []
    for pair in range(pairs):
        model = copy.deepcopy(run.model)
        policy = type(model.policy)(1, sampling_rate=100, **estimator.policy)
        model.policy = policy
        step = step_of(model, pair, estimator, run.optimizer)
        batches = (
            batch_of(train, generator),
            batch_of(val, generator, estimator.val_records),
        )
        seen.append(step.inner_and_outer(*batches)[1]["logits"][0])
    return seen


def batch_of(
    part: Part, generator: torch.Generator, records: int = BATCH_SIZE
) -> dict[str, Tensor]:
    """Return a batch of records drawn without replacement."""
    rows = torch.randperm(len(part.label), generator=generator)[:records]
    return {"ecg": part.ecg[rows], "label": part.label[rows]}
