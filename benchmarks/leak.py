"""The leak AUROC of policies that were learned in different ways.

    python benchmarks/leak.py [--epochs 15] [--seeds 2]

trains on the invented corpus at 100 Hz, width 16, and prints one row a configuration:
how well the class can be told from the augmentation alone (0.5: not at all). What was
computed lies in ``--output`` and is not computed again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from markdown_table import markdown
from rows import Rows

PATIENTS = 400
#: What differs between the rows. The magnitudes are a class's own unless shared.
CONFIGURATIONS = {
    "random frozen": {"policy": "random"},
    "alignment": {"hypergradient": "alignment"},
    "one_step": {"hypergradient": "one_step"},
    "neumann": {"hypergradient": "neumann"},
    "darts": {"hypergradient": "darts"},
    "joint": {"policy": "joint"},
    "alignment, shared": {"hypergradient": "alignment", "shared_magnitudes": True},
    "darts, shared": {"hypergradient": "darts", "shared_magnitudes": True},
}


def main() -> None:
    """Run all configurations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", default="benchmarks/results")
    arguments = parser.parse_args()
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

    import torch

    import pyhealth
    from pyhealth.bilevel.study.data import prepare
    from pyhealth.bilevel.study.run import run
    from pyhealth.bilevel.study.settings import RunSettings
    from pyhealth.datasets.ptbxl import PTBXLDataset
    from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
    from pyhealth.tasks.ecg_classification import ECGBinaryClassification

    pyhealth.logger.setLevel(logging.WARNING)
    torch.set_num_threads(1)
    rows = Rows(Path(arguments.output) / "leak_synthetic.jsonl")
    base = RunSettings(base_width=16, epochs=arguments.epochs)
    with tempfile.TemporaryDirectory() as folder:
        root = write_synthetic_ptbxl(
            Path(folder) / "ptbxl", PATIENTS, sampling_rates=(100,)
        )
        dataset = PTBXLDataset(
            root, sampling_rate=100, cache_dir=Path(folder) / "cache"
        )
        task = ECGBinaryClassification("MI", sampling_rate=100)
        data = prepare(dataset, task)
        for name, changes in CONFIGURATIONS.items():
            for seed in range(arguments.seeds):
                job = {
                    "configuration": name,
                    "seed": seed,
                    "epochs": arguments.epochs,
                }
                if job not in rows:
                    target = Path(folder) / name / str(seed)
                    run(replace(base, seed=seed, **changes), data, target)
                    rows.append(job | scores_of(target))
    print(document(rows))


def scores_of(folder: Path) -> dict[str, float]:
    """Read what the table needs of a run."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "leak_auroc": metrics["leak_auroc"],
        "val_auroc": metrics["val"]["roc_auc"],
        "test_auroc": metrics["test"]["roc_auc"],
    }


def document(rows: Iterable[Mapping]) -> str:
    """Return the table in Markdown, as docs/learning.md has it."""
    rows, lines = list(rows), []
    for name in dict.fromkeys(row["configuration"] for row in rows):
        runs = [row for row in rows if row["configuration"] == name]
        leak = [row["leak_auroc"] for row in runs]
        lines.append(
            [
                name,
                str(len(runs)),
                f"{fmean(leak):.3f} ({min(leak):.3f} to {max(leak):.3f})",
                f"{fmean(row['val_auroc'] for row in runs):.3f}",
                f"{fmean(row['test_auroc'] for row in runs):.3f}",
            ]
        )
    header = ["policy", "seeds", "leak AUROC", "validation AUROC", "test AUROC"]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
