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
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, median, stdev

from markdown_table import markdown

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
    wanted = (row for row in rows if row.get("epochs") in (None, arguments.epochs))
    print(*document(wanted), sep="\n\n")


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


def document(rows: Iterable[Mapping]) -> tuple[str, str]:
    """Return the tables in Markdown, as docs/speed.md has them."""
    rows = list(rows)
    cosines, scores = defaultdict(list), defaultdict(dict)
    for row in rows:
        if "cosines" in row:
            cosines[row["method"]] += row["cosines"]
        else:
            scores[row["precision"]][row["seed"]] = row["auroc"]
    directions = [
        [name, f"{len(all_)}", f"{median(all_):.3f}", f"{min(all_):.3f}"]
        for name, all_ in cosines.items()
    ]
    fp32, bf16 = (scores[name] for name in PRECISIONS)
    lines = [
        [f"{seed}", f"{fp32[seed]:.3f}", f"{bf16[seed]:.3f}"]
        for seed in sorted(fp32.keys() & bf16.keys())
    ]
    lines.append(["mean", *(f"{fmean(scores[p].values()):.3f}" for p in PRECISIONS)])
    if len(lines) > 2:
        spread = [f"{stdev(scores[p].values()):.3f}" for p in PRECISIONS]
        lines.append(["standard deviation", *spread])
    return (
        markdown(["hypergradient", "batch pairs", "median", "lowest"], directions),
        markdown(["seed", *PRECISIONS], lines),
    )


if __name__ == "__main__":
    main()
