"""The leak AUROC of policies that were learned in different ways.

    python benchmarks/leak.py [--epochs 15] [--seeds 2]

trains on the invented corpus at 100 Hz, width 16, and prints one row a configuration:
how well the class can be told from the augmentation alone (0.5: not at all).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from dataclasses import replace
from pathlib import Path

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
    parser.add_argument("--outer_lr", type=float, default=3e-2)
    arguments = parser.parse_args()
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

    import pandas as pd
    import torch

    import pyhealth
    from pyhealth.bilevel.experiment import RunSettings, prepare, run
    from pyhealth.datasets.ptbxl import PTBXLDataset
    from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
    from pyhealth.tasks.ecg_classification import ECGBinaryClassification

    pyhealth.logger.setLevel(logging.WARNING)
    torch.set_num_threads(1)
    base = RunSettings(
        base_width=16, epochs=arguments.epochs, outer_lr=arguments.outer_lr
    )
    rows = []
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
                target = Path(folder) / name / str(seed)
                run(replace(base, seed=seed, **changes), data, target)
                metrics = json.loads((target / "metrics.json").read_text())
                rows.append(
                    {
                        "configuration": name,
                        "seed": seed,
                        "leak AUROC": metrics["leak_auroc"],
                        "validation AUROC": metrics["val"]["roc_auc"],
                        "test AUROC": metrics["test"]["roc_auc"],
                        "best epoch": metrics["best_epoch"],
                    }
                )
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).groupby("configuration", sort=False)
    columns = ["leak AUROC", "validation AUROC", "test AUROC"]
    print(table[columns].agg(["mean", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
