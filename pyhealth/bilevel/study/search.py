"""Augmentation policies found by trying: many trainings, the best on validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ...models.ecg_augmentations import AUGMENTATIONS
from ...models.taskaug_policy import TaskAugPolicy
from .data import PreparedData
from .settings import RunSettings
from .training import train

__all__ = ["search"]

logger = logging.getLogger(__name__)

#: RandAugment's grid: operations a record, and the magnitude of them all as a share of
#: each one's interval.
RANDAUGMENT: dict[str, list[float]] = {
    "stages": [1, 2, 3],
    "magnitude": [0.2, 0.5, 0.8],
}
#: Random trials before the estimator has something to estimate from: a search for as
#: long as one bi-level training has some ten trials.
STARTUP = 3
#: A searched operation's logit and its magnitude, as a share of the interval.
LOGITS, SHARES = (-3.0, 3.0), (0.02, 0.98)

type Proposal = Callable[[optuna.Trial, float], TaskAugPolicy]


def search(
    settings: RunSettings, data: PreparedData, folder: Path
) -> tuple[Path, float]:
    """Try policies and return the one with the best validation AUROC.

    "randaugment" tries every point of :data:`RANDAUGMENT`: N operations one after the
    other, each drawn from all with equal probability, one magnitude for all. "searched"
    lets a tree-structured Parzen estimator choose probabilities and magnitudes (shared
    by the classes) until ``search_seconds`` of training are spent; the trial under way
    is ended. Every trial trains with the settings' seed and never sees the test part.

    What was tried lies in ``folder/search.log``, so a search that was killed goes on
    with the trial that it was killed in.

    Args:
        settings: of the run, with policy "randaugment" or "searched".
        data: the records.
        folder: where to write.

    Returns:
        The best trial's policy file, and the seconds that all trials took.

    Source:
        Cubuk et al., RandAugment, 2020; Bergstra et al., Algorithms for
        hyper-parameter optimization, 2011, by Optuna.

    Examples:
        >>> settings = RunSettings(policy="randaugment")
        >>> search(settings, data, Path("output"))  # doctest: +SKIP
    """
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "search.log"))),
        direction="maximize",
        study_name=settings.policy,
        load_if_exists=True,
    )
    for killed in study.get_trials(states=[TrialState.RUNNING]):
        study.enqueue_trial(killed.system_attrs.get("fixed_params", killed.params))
        study.tell(killed.number, state=TrialState.FAIL)
    propose = _any_policy(settings.policy_stages)
    if settings.policy == "randaugment":
        propose = _randaugment
        for values in product(*RANDAUGMENT.values()):
            point = dict(zip(RANDAUGMENT, values, strict=True))
            study.enqueue_trial(point, skip_if_exists=True)
    while not _finished(study, settings):
        # Seeded anew, so that a search that was stopped does not draw the same again.
        seed = settings.seed + 10_000 * len(study.trials)
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed)
        trial = study.ask()
        study.tell(trial, _try(trial, propose, settings, data, folder))
    best = study.best_trial
    return _policy_file(folder, best.number), _seconds(study)


def _finished(study: optuna.Study, settings: RunSettings) -> bool:
    tried = len(study.get_trials(states=[TrialState.COMPLETE]))
    if settings.policy == "randaugment":
        return tried >= math.prod(len(values) for values in RANDAUGMENT.values())
    assert settings.search_seconds is not None  # RunSettings sees to it
    return tried > 0 and _seconds(study) >= settings.search_seconds


def _try(
    trial: optuna.Trial,
    propose: Proposal,
    settings: RunSettings,
    data: PreparedData,
    folder: Path,
) -> float:
    path = _policy_file(folder, trial.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    propose(trial, data.task.sampling_rate).save(path)
    try:
        trainer = train(replace(settings, policy=str(path)), data, path.parent)
    except ArithmeticError:  # a training that diverges is the worst there is
        logger.exception("Trial %d", trial.number)
        return 0.0
    seconds = sum(row["seconds"] for row in trainer.history)
    trial.set_user_attr("seconds", seconds)
    return max(row["roc_auc"] for row in trainer.history)


def _seconds(study: optuna.Study) -> float:
    return sum(trial.user_attrs.get("seconds", 0.0) for trial in study.trials)


def _policy_file(folder: Path, number: int) -> Path:
    return folder / f"trial_{number:03d}" / "policy.json"


def _randaugment(trial: optuna.Trial, sampling_rate: float) -> TaskAugPolicy:
    return TaskAugPolicy(
        int(trial.suggest_categorical("stages", RANDAUGMENT["stages"])),
        initial_magnitude=trial.suggest_categorical(
            "magnitude", RANDAUGMENT["magnitude"]
        ),
        shared_magnitudes=True,
        sampling_rate=sampling_rate,
    )


def _any_policy(stages: int) -> Proposal:
    def propose(trial: optuna.Trial, sampling_rate: float) -> TaskAugPolicy:
        policy = TaskAugPolicy(
            stages, shared_magnitudes=True, sampling_rate=sampling_rate
        )

        def suggest(kind: str, bounds: tuple[float, float]) -> torch.Tensor:
            return torch.tensor(
                [
                    [
                        trial.suggest_float(f"{kind}/{stage}/{name}", *bounds)
                        for name in AUGMENTATIONS
                    ]
                    for stage in range(stages)
                ]
            )

        with torch.no_grad():
            policy.logits.copy_(suggest("logit", LOGITS))
            policy.mag_neg.copy_(torch.logit(suggest("magnitude", SHARES)))
        return policy

    return propose
