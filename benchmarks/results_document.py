"""Put a study's tables into docs/results.md.

    python benchmarks/results_document.py --study output/study --name ptbxl

copies runs.csv and comparison.csv of a study to docs/results/NAME and writes the
tables between the lines ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of the document;
without ``--study`` from what is there.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
from pathlib import Path

import pandas as pd
from markdown_table import markdown

from pyhealth.bilevel.study.results import document
from pyhealth.bilevel.study.statistics import over_seeds

DOCS = Path(__file__).parents[1] / "docs"
#: What a learned policy is held against, beside no augmentation: policies that learn
#: from nothing.
CONTROLS = {"S": "random signs", "E": "random frozen"}


def controls(runs: pd.DataFrame) -> str:
    """Return the differences between D and the controls, paired by seed."""
    rows = []
    for (task, size), part in runs.groupby(["task", "n_records"], sort=False):
        steps = part[part["budget"] == "steps"]
        area = steps.pivot(index="seed", columns="configuration", values="roc_auc")
        for letter, title in CONTROLS.items():
            if {"D", letter} <= set(area.columns):
                paired = (area["D"] - area[letter]).dropna()
                interval, p_value = over_seeds(paired)
                cells = [
                    task,
                    str(size or "all"),
                    f"D - {letter} ({title})",
                    str(len(paired)),
                ]
                shown = "-" if math.isnan(p_value) else f"{p_value:.3f}"
                rows.append([*cells, str(interval), shown])
    return markdown(
        ["task", "records", "difference", "seeds", "AUROC", "p, uncorrected"], rows
    )


def main() -> None:
    """Copy, and write."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/results.md.")
    parser.add_argument("--study", help="folder of a study")
    parser.add_argument("--name", required=True, help="of the tables in the document")
    arguments = parser.parse_args()
    folder = DOCS / "results" / arguments.name
    if arguments.study:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("runs.csv", "comparison.csv"):
            shutil.copyfile(Path(arguments.study) / name, folder / name)
    runs = pd.read_csv(folder / "runs.csv")
    tables = document(pd.read_csv(folder / "comparison.csv"))
    tables += f"\n\n### Against policies that learn from nothing\n\n{controls(runs)}"
    path = DOCS / "results.md"
    start, end = f"<!-- {arguments.name} -->\n", f"<!-- end of {arguments.name} -->"
    pattern = re.compile(f"(?<={re.escape(start)}).*(?={re.escape(end)})", re.DOTALL)
    text = path.read_text(encoding="utf-8")
    if not pattern.search(text):
        raise ValueError(f"{path} has no lines {start.strip()} and {end}.")
    content = pattern.sub(lambda _: f"\n{tables}\n\n", text)
    path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
