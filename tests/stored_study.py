"""A finished study on disk, with test predictions whose order is known."""

import json

import numpy as np
import pandas as pd
import torch

from pyhealth.bilevel.study.configurations import CONFIGURATIONS
from pyhealth.bilevel.study.jobs import Job
from pyhealth.bilevel.study.run import score
from pyhealth.models.taskaug_policy import TaskAugPolicy

CONFIG = {
    "settings": {"epochs": 2, "lr": 0.001},
    "task": {
        "task_label": "MI",
        "sampling_rate": 100,
        "length": 1000,
        "normalize": "lead",
        "leads": ["I", "II"],
    },
    "data": {
        "root": "/data/ptbxl",
        "records_train": 400,
        "records_val": 100,
        "test_fold": 9,
        "digest": "0" * 64,
    },
    "versions": {"torch": "2.14"},
    "threads": 1,
}


def store(folder, job, probability, label, seconds=10.0):
    """Write a run as ``run`` does, with given test predictions."""
    target = folder / job.name
    target.mkdir(parents=True)
    predictions = pd.DataFrame(
        {
            "ecg_id": range(len(label)),
            "patient_id": [str(i // 2) for i in range(len(label))],
            "label": label,
            "probability": probability,
        }
    )
    predictions.to_csv(target / "predictions.csv", index=False)
    learned = CONFIGURATIONS[job.configuration].learns
    policy = TaskAugPolicy(1, sampling_rate=100)
    policy.randomize_(torch.Generator().manual_seed(0)).save(target / "policy.json")
    metrics = {
        "best_epoch": 1,
        "epochs": 2,
        "seconds": seconds,
        "policy_p_value": 0.03 if learned else None,
        "leak_auroc": 0.5 if learned else None,
        "val": {"roc_auc": 0.7},
        "test": score(predictions),
    }
    (target / "metrics.json").write_text(json.dumps(metrics))
    (target / "config.json").write_text(json.dumps(CONFIG))


def stored_study(folder):
    """Write a study: D is better by far, E no better, S worse; some have one seed."""
    rng = np.random.default_rng(0)
    label = np.arange(300) % 3 == 0
    strength = {"A": 1.0, "D": 2.5, "E": 1.0, "S": 0.0}
    for seed in range(5):
        for letter, size in strength.items():
            probability = 1 / (1 + np.exp(-size * label - rng.normal(size=300)))
            job = Job("MI", 500, seed, letter)
            store(folder, job, probability, label.astype(int))
    store(folder, Job("MI", 500, 0, "A+"), rng.random(300), label.astype(int))
    store(folder, Job("MI", 500, 0, "A", "seconds"), rng.random(300), label * 1)
    return folder
