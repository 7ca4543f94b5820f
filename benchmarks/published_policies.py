"""Learn the published policies, and write them and their cards into policies/.

    python benchmarks/published_policies.py --data_root path/to/ptbxl

learns a policy for each label with the settings of docs/results.md, and publishes what
it is after the last epoch. How good it is, a network says that is trained with it
frozen, beside one without augmentation and one with a random policy, on the same
records. Written are ``policies/<LABEL>.json``, ``policies/<LABEL>.md`` and the table of
docs/policies.md. Runs that are finished in ``--output`` are not made again. To try the
command on an invented corpus: ``--synthetic --epochs 2 --n_records 100 --output
output/try --policies output/try/policies``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from policy_card import card, overview

if TYPE_CHECKING:
    from pyhealth.models.taskaug_policy import TaskAugPolicy

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("MI", "STTC", "CD", "HYP")
#: Those of docs/results.md.
SETTINGS = {"base_width": 8, "epochs": 30, "outer_every": 2}
RATE, NORMALIZE = 100, "dataset"
#: Rows of a card's table of scores, and the runs that they are of.
RUNS = {
    "no augmentation": "A",
    "random policy": "E",
    "this policy": "frozen",
    "while it was learned": "D",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Learn what is missing, and write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_root", help="folder of PTB-XL")
    source.add_argument("--synthetic", action="store_true", help="an invented corpus")
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=LABELS)
    parser.add_argument("--n_records", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=SETTINGS["epochs"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output/policies"))
    parser.add_argument("--policies", type=Path, default=ROOT / "policies")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

    import pyhealth

    pyhealth.logger.setLevel(logging.WARNING)
    torch.set_num_threads(1)  # the sums of several are other ones
    dataset, corpus = open_dataset(arguments)
    for label in arguments.labels:
        learned = learn(arguments, dataset, label)
        publish(label, learned, corpus, arguments.policies)
    write_overview(arguments.policies)


def open_dataset(arguments: argparse.Namespace):
    """Return the corpus and what a card calls it."""
    from pyhealth.datasets.ptbxl import PTBXLDataset
    from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl

    root, name = arguments.data_root, "PTB-XL 1.0.3"
    if arguments.synthetic:
        root, name = arguments.output / "ptbxl", "an invented corpus"
        if not root.exists():
            write_synthetic_ptbxl(root, 200, sampling_rates=(RATE,))
    dataset = PTBXLDataset(
        root, sampling_rate=RATE, cache_dir=arguments.output / "cache"
    )
    folds = sorted(map(int, dataset.records()["strat_fold"].unique()))
    return dataset, {
        "name": name,
        "records": len(dataset.records()),
        "folds": folds,
    }


def learn(arguments: argparse.Namespace, dataset, label: str) -> dict[str, Path]:
    """Return the folders of the runs by configuration, made if missing."""
    from pyhealth.bilevel.study.configurations import chosen
    from pyhealth.bilevel.study.data import prepare
    from pyhealth.bilevel.study.jobs import Job, StudyPlan, settings_of_job
    from pyhealth.bilevel.study.run import run
    from pyhealth.bilevel.study.settings import RunSettings
    from pyhealth.tasks.ecg_classification import ECGBinaryClassification

    plan = StudyPlan(
        RunSettings(**SETTINGS | {"epochs": arguments.epochs}),
        chosen("ADE"),
        [label],
        [arguments.n_records],
        [arguments.seed],
        equal_seconds=False,
    )
    task = ECGBinaryClassification(label, sampling_rate=RATE, normalize=NORMALIZE)
    data = prepare(dataset, task, arguments.n_records, arguments.seed)

    def folder_of(job: Job, settings: RunSettings) -> Path:
        folder = arguments.output / job.name
        if not (folder / "metrics.json").exists():
            run(settings, data, folder, resume=True, pictures=False)
        return folder

    folders = {
        job.configuration: folder_of(job, settings_of_job(job, plan, arguments.output))
        for job in plan.jobs()
    }
    last = folders["D"] / "last_policy.json"
    policy_after_training(folders["D"]).save(last)
    job = Job(label, arguments.n_records, arguments.seed, "frozen")
    settings = replace(plan.base, policy=str(last), seed=arguments.seed)
    return folders | {"frozen": folder_of(job, settings)}


def policy_after_training(folder: Path) -> TaskAugPolicy:
    """Return the policy of a run's last epoch; policy.json is that of the best one.

    The best epoch is the network's, and may lie before the policy's first step.
    """
    from pyhealth.models.taskaug_policy import TaskAugPolicy

    policy = TaskAugPolicy.load(folder / "policy.json")
    weights = torch.load(folder / "last.ckpt", weights_only=True)
    prefix = "policy."
    policy.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    policy.provenance["epoch"] = metrics["epochs"] - 1
    return policy


def publish(label: str, runs: dict[str, Path], corpus: dict, target: Path) -> None:
    """Write the policy's file, which has all that its card says, and the card."""
    policy = policy_after_training(runs["D"])
    policy.provenance |= facts(runs, corpus)
    target.mkdir(parents=True, exist_ok=True)
    policy.save(target / f"{label}.json")
    text = card(target / f"{label}.json")
    (target / f"{label}.md").write_text(text, encoding="utf-8")


def facts(runs: dict[str, Path], corpus: dict) -> dict:
    """Return what the runs have stored on data, settings and scores."""
    configuration = json.loads((runs["D"] / "config.json").read_text())
    metrics = {
        name: json.loads((runs[key] / "metrics.json").read_text())
        for name, key in RUNS.items()
    }
    of_data = configuration["data"]
    cohort = ("split", "records_train", "records_val", "records_test", "test_fold")
    return {
        "corpus": corpus,
        "cohort": {key: of_data[key] for key in cohort},
        "signals": configuration["task"],
        "training": configuration["settings"],
        "threads": configuration["threads"],
        "versions": configuration["versions"],
        "test_patients": predictions(runs["D"])["patient_id"].nunique(),
        "test_scores": {name: of["test"] for name, of in metrics.items()},
        "differences": {
            name: difference(runs["frozen"], runs[RUNS[name]])
            for name in ("no augmentation", "random policy")
        },
        "leak_auroc": metrics["this policy"]["leak_auroc"],
        "policy_p_value": metrics["while it was learned"]["policy_p_value"],
    }


def predictions(folder: Path) -> pd.DataFrame:
    """Return the test predictions of a run."""
    return pd.read_csv(folder / "predictions.csv", dtype={"patient_id": str})


def difference(one: Path, other: Path) -> dict[str, float]:
    """Return the AUROC difference of two runs and its 95 % interval over patients."""
    from pyhealth.bilevel.study.statistics import bootstrap_by_patient

    found = bootstrap_by_patient([(predictions(one), predictions(other))])
    return {"roc_auc": found.mean, "low": found.low, "high": found.high}


def write_overview(policies: Path, document: Path = ROOT / "docs/policies.md") -> None:
    """Write the table of docs/policies.md, if these are the published policies."""
    if policies.resolve() != ROOT / "policies":
        return
    text = document.read_text(encoding="utf-8")
    pattern = re.compile("(?<=<!-- policies -->\n).*(?=<!-- end -->)", re.DOTALL)
    table = overview(sorted(policies.glob("*.json")))
    document.write_text(pattern.sub(lambda _: f"\n{table}\n\n", text), encoding="utf-8")


if __name__ == "__main__":
    main()
