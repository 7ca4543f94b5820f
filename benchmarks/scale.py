"""What it takes to prepare and read a whole corpus: time and memory of each stage.

    python benchmarks/scale.py [--records 21799] [--data_root FOLDER]
    python benchmarks/scale.py --table      # prints what was measured last

Each stage runs in a process of its own, on a tenth of the records and on all of them:
memory that is flat in records is the same in both. ``--data_root`` measures a corpus
that is there in place of an invented one (which takes minutes to write, once). A stage
that lies in ``--output`` is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

import psutil
from markdown_table import markdown
from rows import Rows

if TYPE_CHECKING:
    from pyhealth.datasets.ecg_samples import ECGSamples
    from pyhealth.datasets.ptbxl import CohortSplit, PTBXLDataset

TABLE = "ptbxl_database.csv"
#: Records a patient of the invented corpus, a little less than there are.
RECORDS_A_PATIENT = 1.15
#: Hertz of the samples by the rate on the disk.
SAMPLED_AT = {100: 100, 500: 250}
#: Stages in their order; a later one finds what an earlier one has prepared.
STAGES = {
    "table": "open, make the event table",
    "set_task": "set_task, first time",
    "again": "open, set_task with another label",
    "read": "read every sample once",
    "train": "train one epoch",
}
#: Those that several processes do.
PARALLEL = ["table", "set_task"]
#: Steps of training to one of the policy.
OUTER_EVERY = 20
#: Seconds between two looks at the memory.
INTERVAL = 0.02
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=21799)
    parser.add_argument("--data_root", help="folder of PTB-XL; an invented corpus")
    parser.add_argument("--rates", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", default=".cache/scale", help="corpus and caches")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--stage", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(measured(*arguments.stage)))
        return
    name = "real" if arguments.data_root else "synthetic"
    rows = Rows(Path(arguments.output) / f"scale_{name}.jsonl")
    if not arguments.table:
        run(arguments, rows)
    print(document(rows))
    if not arguments.data_root:
        print(f"\n{paper(rows)}")


def run(arguments: argparse.Namespace, rows: Rows) -> None:
    """Measure what is not there yet."""
    folder = Path(arguments.folder).resolve()
    whole = Path(arguments.data_root or corpus(folder / "corpus", arguments)).resolve()
    total = min(arguments.records, count(whole))
    settings = itertools.product(
        arguments.rates, (total // 10, total), arguments.workers
    )
    for rate, records, workers in settings:
        job = {"rate": rate, "records": records, "workers": workers}
        stages = list(STAGES) if workers == 1 else PARALLEL
        if all({**job, "stage": stage} in rows for stage in stages):
            continue
        root = part(whole, folder / f"part_{records}", records)
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            for stage in stages:
                row = in_own_process(stage, root, cache, rate, workers)
                rows.append({**job, "stage": stage, **row, **machine()})


def corpus(root: Path, arguments: argparse.Namespace) -> Path:
    """Write an invented corpus of at least the records that are asked for."""
    from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl

    if not (root / TABLE).exists():
        patients = math.ceil(arguments.records / RECORDS_A_PATIENT)
        write_synthetic_ptbxl(root, patients, sampling_rates=arguments.rates)
    if count(root) < arguments.records:
        raise ValueError(f"{root} is smaller than --records; give another --folder.")
    return root


def count(root: Path) -> int:
    with (root / TABLE).open(encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


def part(whole: Path, root: Path, records: int) -> Path:
    """Make a root of the first records of another; waveforms are linked."""
    root.mkdir(parents=True, exist_ok=True)
    with (whole / TABLE).open(encoding="utf-8", newline="") as file:
        kept = list(itertools.islice(csv.reader(file), records + 1))
    with (root / TABLE).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(kept)
    for path in whole.iterdir():
        if path.name != TABLE and not (root / path.name).exists():
            (root / path.name).symlink_to(path)
    return root


def machine() -> dict[str, str | int]:
    """Return what the figures depend on."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {"capability": capability, "cores": os.cpu_count() or 0}


def in_own_process(
    stage: str, root: Path, cache: str, rate: int, workers: int
) -> dict[str, float]:
    """Run a stage, and watch the memory of its process and of those it starts."""
    values = [stage, str(root), cache, str(rate), str(workers)]
    command = [sys.executable, __file__, "--stage", *values]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=output, stderr=told)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(INTERVAL)
        for file in (output, told):
            file.seek(0)
        lines, error = output.read().splitlines(), told.read()[-2000:]
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {error}")
    return {**json.loads(lines[-1]), "peak_mib": peak / MIB}


def memory(pid: int) -> float:
    """Return the bytes of a process tree; what is shared counts once (PSS)."""
    total = 0
    try:
        own = psutil.Process(pid)
        for process in [own, *own.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.NoSuchProcess:  # ended meanwhile
        pass
    return total


def measured(
    stage: str, root: str, cache: str, rate: str, workers: str
) -> dict[str, float]:
    """Do a stage; return its seconds without imports, and bytes on the disk."""
    from pyhealth.bilevel import BiLevelTrainer
    from pyhealth.datasets.ptbxl import PTBXLDataset
    from pyhealth.tasks.ecg_classification import ECGBinaryClassification

    del BiLevelTrainer  # what every training program has imported
    imported = memory(os.getpid())
    started = time.perf_counter()
    dataset = PTBXLDataset(root, int(rate), cache, int(workers))
    dataset.records()
    if stage == "set_task":
        started = time.perf_counter()
    if stage != "table":
        label = "MI" if stage == "set_task" else "STTC"
        task = ECGBinaryClassification(label, SAMPLED_AT[int(rate)])
        samples = dataset.set_task(task)
    if stage == "read":
        started = time.perf_counter()
        read(samples)
    if stage == "train":
        parts = dataset.set_task(task, split=cohort(dataset))
        started = time.perf_counter()
        train(*parts[:2])
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "imported_mib": imported / MIB,
        "disk_mib": on_disk(Path(cache)) / MIB,
    }


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read(samples: ECGSamples) -> None:
    """Read all samples, in batches and shuffled, as training does."""
    from pyhealth.datasets import get_dataloader

    found = sum(len(batch["ecg"]) for batch in get_dataloader(samples, 64, True))
    if found != len(samples):
        raise RuntimeError(f"{found} of {len(samples)} samples were read.")


def cohort(dataset: PTBXLDataset) -> CohortSplit:
    """Return a split that tests on the last fold and uses all others."""
    from pyhealth.datasets.ptbxl import CohortSplit

    folds = dataset.records()["strat_fold"]
    last = folds.max()
    return CohortSplit(int((folds != last).sum()), test=(last,))


def train(train: ECGSamples, val: ECGSamples) -> None:
    """Train a narrow network and its policy for one epoch."""
    from pyhealth.bilevel import BiLevelTrainer
    from pyhealth.datasets import get_dataloader
    from pyhealth.models.taskaug_resnet import TaskAugResNet

    model = TaskAugResNet(
        train, base_width=8, sampling_rate=train.processor.sampling_rate
    )
    trainer = BiLevelTrainer(model, device="cpu", enable_logging=False, seed=0)
    trainer.train(
        get_dataloader(train, 64, True),
        get_dataloader(val, 64),
        policy_dataloader=get_dataloader(val, 64, True),
        epochs=1,
        warmup_epochs=0,
        outer_every=OUTER_EVERY,
    )


def document(rows: Iterable[Mapping]) -> str:
    """Return the tables in Markdown, as docs/scale.md has them."""
    rows = list(rows)
    texts = []
    for rate in dict.fromkeys(row["rate"] for row in rows):
        texts.append(f"### {rate} Hz, samples at {SAMPLED_AT[rate]} Hz\n")
        of_rate = [row for row in rows if row["rate"] == rate]
        texts.append(stages_table(of_rate) + "\n")
        texts.append(f"{disk_line(of_rate)} {break_even_line(of_rate)}\n")
    return "\n".join(texts).rstrip()


def stages_table(rows: list[Mapping]) -> str:
    """Return the table of one rate: a row a stage and number of processes."""
    sizes = sorted({row["records"] for row in rows})
    lines = []
    for stage, workers in dict.fromkeys((row["stage"], row["workers"]) for row in rows):
        found = {
            row["records"]: row
            for row in rows
            if (row["stage"], row["workers"]) == (stage, workers)
        }
        if len(found) == len(sizes):
            cells = [STAGES[stage], str(workers)]
            cells += [f"{found[n]['seconds']:.1f}" for n in sizes]
            cells.append(f"{slope(found, 'seconds') * 1000:.2f}")
            cells += [f"{found[n]['peak_mib'] / 1024:.2f}" for n in sizes]
            lines.append(cells)
    header = ["stage", "processes", *(f"s, {n:,} records" for n in sizes)]
    header += ["ms a record more", *(f"peak GiB, {n:,} records" for n in sizes)]
    return markdown(header, lines)


def paper(rows: Iterable[Mapping], records: int = 10_000_000) -> str:
    """Return what so many records would take, from the slopes of one process."""
    rate = max(row["rate"] for row in rows)
    lines = []
    for stage in ("table", "set_task", "again", "read"):
        found = {
            row["records"]: row
            for row in rows
            if (row["rate"], row["stage"], row["workers"]) == (rate, stage, 1)
        }
        hours = slope(found, "seconds") * records / 3600
        gigabytes = max(0.0, slope(found, "peak_mib")) * records * MIB / 1e9
        lines.append([STAGES[stage], f"{hours:.1f}", f"{gigabytes:.0f}"])
    return markdown(["stage", "core hours", "GB of memory more"], lines)


def slope(found: Mapping[int, Mapping], what: str) -> float:
    """Return what a record more takes of something."""
    (few, first), *_, (many, last) = sorted(found.items())
    return (last[what] - first[what]) / (many - few)


def break_even_line(rows: list[Mapping]) -> str:
    """Return from how many records on several processes pay, on straight lines."""
    lines = {}
    for workers in sorted({row["workers"] for row in rows}):
        found = {
            row["records"]: row
            for row in rows
            if (row["stage"], row["workers"]) == ("set_task", workers)
        }
        rise, records = slope(found, "seconds"), max(found)
        lines[workers] = (rise, found[records]["seconds"] - rise * records)
    (own_rise, own_start), (rise, start) = lines[1], lines[max(lines)]
    records = (start - own_start) / (own_rise - rise)
    return (
        f"{max(lines)} processes start {start - own_start:.0f} s later and are faster "
        f"from {round(records, -3):,.0f} records on."
    )


def disk_line(rows: list[Mapping]) -> str:
    """Return what lies on the disk after set_task."""
    row = max(
        (row for row in rows if row["stage"] == "set_task"), key=lambda r: r["records"]
    )
    kilobytes = row["disk_mib"] * MIB / 1000 / row["records"]
    start = row["imported_mib"] / 1024
    return (
        f"On the disk: {kilobytes:.0f} kB a record. Imports alone: {start:.2f} GiB of "
        f"memory. Measured on {row['cores']} cores, {row['capability']}."
    )


if __name__ == "__main__":
    main()
