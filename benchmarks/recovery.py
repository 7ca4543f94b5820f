"""Does the policy's derivative find the operation that truly helps?

    python benchmarks/recovery.py truth            # trains with each operation forced
    python benchmarks/recovery.py direction        # asks every estimator
    python benchmarks/recovery.py result           # trains with the learned policy
    python benchmarks/recovery.py table            # prints what is there

One nuisance at a time is planted in the validation and test records, none in the
training records. What was computed lies in ``--output`` and is not computed again, so
a command that was stopped goes on where it was. Without ``--data_root`` an invented
corpus is used; with it PTB-XL at 100 Hz.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rows import Rows

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

STEPS = ("truth", "direction", "result", "table")
#: How the policy learns in "result".
SETTINGS = {
    "hypergradient": "alignment",
    "outer_loss": "ranking",
    "alignment_records": 64,
    "outer_lr": 0.03,
}


def main() -> None:
    arguments = parse_arguments()
    import torch
    from recovery_document import documents
    from recovery_tables import kept_plants, valid_plants

    torch.set_num_threads(arguments.threads)
    name = "synthetic" if arguments.data_root is None else "real"
    rows = rows_of(Path(arguments.output), name)
    if arguments.step == "table":
        print(*documents(rows), sep="\n\n")
        return
    from recovery_data import cohort

    data = cohort(arguments.data_root, arguments.cache_dir)
    if arguments.step == "truth":
        from recovery_truth import run_truth

        run_truth(data, rows["truth"], arguments.seeds)
    elif arguments.step == "direction":
        from recovery_direction import run_direction

        # An estimator can be right or wrong only where the truth is plain.
        pairs = (plant.split("/") for plant in valid_plants(rows["truth"]))
        plants = {operation: float(magnitude) for operation, magnitude in pairs}
        run_direction(data, plants, rows["direction"], arguments.seeds)
    else:
        from recovery_result import run_result

        run_result(
            data,
            kept_plants(rows["truth"]),
            rows["result"],
            arguments.seeds,
            arguments.configurations,
            **SETTINGS,
        )


def rows_of(folder: Path, name: str) -> dict[str, Rows]:
    """Return the stored rows of each step, of the corpus of this name."""
    return {step: Rows(folder / f"recovery_{step}_{name}.jsonl") for step in STEPS[:3]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--data_root", help="folder of PTB-XL; an invented corpus")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument(
        "--configurations",
        nargs="+",
        default=["learned", "sign-shuffled", "one_step"],
        help="of step result; two processes may share the work",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--cache_dir", default=".cache/benchmarks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
