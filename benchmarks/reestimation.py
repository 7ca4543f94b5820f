"""What re-estimated BatchNorm statistics change in the test score.

    python benchmarks/reestimation.py --data_root FOLDER

trains every configuration of the ablation on the records of ``recovery.py`` and scores
each of the last epochs twice: with the statistics that the augmented batches left, and
with those of the clean training records. Without ``--data_root`` the records are
invented. What was computed lies in ``--output`` and is not computed again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean

from markdown_table import markdown

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

#: Settings of each configuration's policy; "learned" is taken out: whether it learns.
CONFIGURATIONS = {
    "A no augmentation": {"num_stages": 0},
    "B Gaussian noise 0.1 SD": {
        "num_stages": 1,
        "operations": ["gaussian_noise"],
        "initial_magnitude": 0.2,
    },
    "C TaskAug K=1": {"num_stages": 1, "learned": True},
    "D TaskAug K=2": {"num_stages": 2, "learned": True},
    "E random frozen K=2": {"num_stages": 2, "random": True},
    "F TaskAug K=2 shared": {
        "num_stages": 2,
        "learned": True,
        "shared_magnitudes": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", help="folder of PTB-XL; an invented corpus")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--cache_dir", default=".cache/benchmarks")
    arguments = parser.parse_args()

    import torch
    from recovery_data import cohort
    from rows import Rows

    torch.set_num_threads(arguments.threads)
    data = cohort(arguments.data_root, arguments.cache_dir)
    name = "synthetic" if arguments.data_root is None else "real"
    rows = Rows(Path(arguments.output) / f"reestimation_{name}.jsonl")
    for seed in range(arguments.seeds):
        for configuration in CONFIGURATIONS:
            job = {
                "configuration": configuration,
                "seed": seed,
                "epochs": arguments.epochs,
            }
            if job not in rows:
                rows.append({**job, "auroc": train(data, **job)})
    print(document(row for row in rows if row["epochs"] == arguments.epochs))


def train(data, configuration: str, seed: int, epochs: int) -> dict[str, float]:
    """Return the test AUROC with either kind of statistics."""
    import torch
    from recovery_truth import new_model

    from pyhealth.bilevel import BiLevelTrainer

    settings = dict(CONFIGURATIONS[configuration])
    learned, random = settings.pop("learned", False), settings.pop("random", False)
    model = new_model(data, seed, **settings)
    if random:
        model.policy.randomize_(torch.Generator().manual_seed(seed))
    scores = BothScores(data, epochs)
    trainer = BiLevelTrainer(
        model, metrics=["roc_auc"], device="cpu", enable_logging=False, seed=seed
    )
    trainer.train(
        data.train.loader(seed),
        data.val.loader(),
        policy_dataloader=data.val.loader(seed),
        epochs=epochs,
        hypergradient="alignment" if learned else None,
        load_best_model_at_last=False,
        on_epoch=scores,
    )
    return scores.mean()


class BothScores:
    """Scores the last epochs with running and with re-estimated statistics."""

    def __init__(self, data, epochs: int) -> None:
        from recovery_truth import TestScores

        self.train = data.train
        self.running, self.reestimated = (
            TestScores({"test": data.test}, epochs) for _ in range(2)
        )

    def __call__(self, trainer) -> None:
        from pyhealth.bilevel.batchnorm import (
            batchnorm_statistics_kept,
            reestimate_batchnorm,
        )

        self.running(trainer)
        with batchnorm_statistics_kept(trainer.model):
            reestimate_batchnorm(trainer.model, self.train.loader())
            self.reestimated(trainer)

    def mean(self) -> dict[str, float]:
        """Return the mean AUROC of both."""
        return {
            "running": self.running.mean()["test"],
            "reestimated": self.reestimated.mean()["test"],
        }


def document(rows: Iterable[Mapping]) -> str:
    """Return the table in Markdown, as docs/learning.md has it."""
    rows, lines = list(rows), []
    for name in dict.fromkeys(row["configuration"] for row in rows):
        scores = [row["auroc"] for row in rows if row["configuration"] == name]
        change = [score["reestimated"] - score["running"] for score in scores]
        lines.append(
            [
                name,
                str(len(scores)),
                f"{fmean(score['running'] for score in scores):.3f}",
                f"{fmean(score['reestimated'] for score in scores):.3f}",
                f"{fmean(change):+.3f} ({min(change):+.3f} to {max(change):+.3f})",
            ]
        )
    header = ["configuration", "seeds", "running", "re-estimated", "difference"]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
