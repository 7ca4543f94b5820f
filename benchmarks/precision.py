"""Does bf16 point where float32 points, and end where it ends?

    python benchmarks/precision.py --data_root FOLDER

asks for the same hypergradients in both precisions along a float32 run, and trains with
both, on the records of ``recovery.py``. Without ``--data_root`` they are invented. What
was computed lies in ``--output`` and is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

METHODS = ("one_step", "neumann", "alignment")
PRECISIONS = ("fp32", "bf16")
#: Epochs of the float32 run after which both are asked, and batch pairs each time.
CHECKPOINTS, PAIRS = (1, 4), 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", help="folder of PTB-XL; an invented corpus")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
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
    rows = Rows(Path(arguments.output) / f"precision_{name}.jsonl")
    for seed in range(arguments.seeds):
        compare_directions(data, seed, rows)
        for precision in PRECISIONS:
            job = {"precision": precision, "seed": seed, "epochs": arguments.epochs}
            if job not in rows:
                rows.append({**job, "auroc": train(data, **job)})
    print_tables(rows, arguments.epochs)


def compare_directions(data, seed: int, rows) -> None:
    """Ask for the same hypergradients in both precisions, along a float32 run."""
    import torch
    from recovery_direction import Estimator, batch_of, step_of
    from recovery_truth import new_model

    jobs = [
        {"method": method, "seed": seed, "epoch": epoch}
        for epoch in CHECKPOINTS
        for method in METHODS
    ]
    if all(job in rows for job in jobs):
        return
    model = new_model(data, seed)
    run = step_of(model, seed, Estimator())
    loader = data.train.loader(seed)
    for epoch in range(1, max(CHECKPOINTS) + 1):
        for batch in loader:
            run.inner(batch)
        for job in [job for job in jobs if job["epoch"] == epoch]:
            generator, cosines = torch.Generator().manual_seed(seed), []
            for pair in range(PAIRS):
                batches = [batch_of(part, generator) for part in (data.train, data.val)]
                found = []
                for precision in PRECISIONS:
                    settings = {"method": job["method"], "precision": precision}
                    if job["method"] == "neumann":
                        settings["neumann_lr"] = 1e-2
                    asked = copy.deepcopy(model)
                    step = step_of(asked, pair, Estimator(settings), run.optimizer)
                    gradient = step.inner_and_outer(*batches)[1]
                    found.append(torch.cat([g.flatten() for g in gradient.values()]))
                cosines.append(torch.cosine_similarity(*found, dim=0).item())
            if job not in rows:
                rows.append({**job, "cosines": cosines})


def train(data, precision: str, seed: int, epochs: int) -> float:
    """Return the test AUROC, averaged over the last epochs of a run."""
    from recovery_truth import TestScores, new_model

    from pyhealth.bilevel import BiLevelTrainer

    scores = TestScores({"test": data.test}, epochs)
    trainer = BiLevelTrainer(
        new_model(data, seed),
        metrics=["roc_auc"],
        device="cpu",
        enable_logging=False,
        seed=seed,
        precision=precision,
    )
    trainer.train(
        data.train.loader(seed),
        data.val.loader(),
        policy_dataloader=data.val.loader(seed),
        epochs=epochs,
        hypergradient="one_step",
        outer_loss="model",
        load_best_model_at_last=False,
        on_epoch=scores,
    )
    return scores.mean()["test"]


def print_tables(rows, epochs: int) -> None:
    """Print the cosines by method and the AUROC by precision."""
    import numpy as np
    import pandas as pd

    cosines = pd.DataFrame([r for r in rows if "cosines" in r]).explode("cosines")
    by_method = cosines.astype({"cosines": float}).groupby("method", sort=False)
    print("Cosine of the bf16 with the float32 hypergradient, a batch pair")
    print(by_method["cosines"].agg(["min", "median", "max", "count"]).round(4))
    runs = pd.DataFrame([r for r in rows if r.get("epochs") == epochs])
    table = runs.pivot_table("auroc", "seed", "precision")[list(PRECISIONS)]
    print(f"\nTest AUROC after {epochs} epochs, by seed")
    print(table.round(3).to_string())
    difference = (table["bf16"] - table["fp32"]).to_numpy()
    print(f"mean difference {difference.mean():+.3f},", end=" ")
    print(
        f"standard deviation of float32 over seeds {np.std(table['fp32'], ddof=1):.3f}"
    )


if __name__ == "__main__":
    main()
