"""Measure what a step of bi-level training costs: ``make bench``.

    python benchmarks/speed.py [--quick]
    python benchmarks/speed.py --table      # prints what was measured last

The variants of a round run one after the other, and every figure is the median over
rounds of a ratio within a round, so that other load on the machine falls on both sides.
Targets that are missed are printed like those that are met.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from authors_design import AuthorsDesign, Conv1dResNet
from markdown_table import markdown
from torch.nn.functional import binary_cross_entropy_with_logits

from pyhealth.bilevel.classifier import classifier_parameters
from pyhealth.bilevel.step import BiLevelStep
from pyhealth.datasets import create_sample_dataset
from pyhealth.models.taskaug_resnet import TaskAugResNet

RESULTS = Path(__file__).parent / "results"
#: (what, numerator, denominator, target if any, whether more is better); "a-b"
#: subtracts the times of two variants.
TABLE = (
    ("plain fp32: Conv1d / ours", "conv1d", "plain", 1.3, True),
    ("plain bf16: Conv1d fp32 / ours bf16", "conv1d", "plain_bf16", 4.0, True),
    ("augmentation of an inner step / plain", "augment", "plain", 0.03, False),
    ("policy part of an outer step / plain", "policy", "plain", 0.08, False),
    ("outer one_step / plain, fp32", "one_step-inner", "plain", 3.3, False),
    (
        "outer one_step / plain, bf16",
        "one_step_bf16-inner_bf16",
        "plain_bf16",
        4.0,
        False,
    ),
    ("outer neumann 1 / plain, fp32", "neumann-inner", "plain", 6.0, False),
    ("outer alignment, default / plain", "alignment-inner", "plain", None, False),
    ("authors' / neumann fp32", "authors", "neumann_theirs", 4.0, True),
    ("authors' / one_step fp32", "authors", "one_step_theirs", None, True),
    ("authors' / one_step bf16", "authors", "one_step_theirs_bf16", 8.0, True),
)
PEAK_TARGET = 2.5
PEAKS = {
    "one_step": "inner and outer one_step / plain",
    "lean": "the same, keep_graph=False",
    "pieces": "the same, keep_graph=False, micro_batch=2",
    "alignment": "inner and outer alignment / plain",
}
#: Seconds from the start of the example program to its first epoch's line.
START_TARGET = 8.0
EXAMPLE = (
    Path(__file__).parents[1]
    / "examples"
    / "ptbxl_ecg_classification_taskaug_resnet.py"
)
#: What of PyHealth every program that trains has to import.
IMPORTS = "import pyhealth.datasets, pyhealth.models, pyhealth.trainer"
#: A call shorter than this is timed three times, and the median counts.
SHORT_SECONDS = 1.0
#: Records of the bf16 rows, and of what they are compared with, on a processor that
#: does not compute in bf16: a step takes nine times as long there.
BATCH_WITHOUT_BF16 = 4


class Variants:
    """Everything that is timed, on one batch of random signals."""

    def __init__(self, batch: int, length: int = 2500) -> None:
        torch.manual_seed(0)
        self.batch = {
            "ecg": torch.randn(batch, 12, length),
            "label": (torch.arange(batch) % 2).float()[:, None],
        }
        samples = [{"patient_id": "0", "ecg": [[0.0]], "label": 0}]
        samples.append({**samples[0], "label": 1})
        self.dataset = create_sample_dataset(
            samples, {"ecg": "tensor"}, {"label": "binary"}
        )
        self.model = self._model()

    def all(self) -> dict[str, Callable[[], object]]:
        """Return the timed calls by name."""
        theirs = self._model(base_width=32, kernel_size=15, stem_pool=False)
        authors, batch = AuthorsDesign(), self.batch
        inner = self.step()
        return {
            "conv1d": self._conv1d(),
            "plain": lambda: self.plain("fp32"),
            "plain_bf16": lambda: self.plain("bf16"),
            "augment": self.augment,
            "policy": self.policy,
            "inner": lambda: inner.inner(batch),
            "inner_bf16": self._timed(self.step(precision="bf16"), outer=False),
            "one_step": self._timed(self.step()),
            "one_step_bf16": self._timed(self.step(precision="bf16")),
            "neumann": self._timed(self.step(method="neumann", neumann_lr=1e-3)),
            "alignment": self._timed(
                self.step(method="alignment", outer_loss="ranking")
            ),
            "one_step_theirs": self._timed(self.step(theirs)),
            "one_step_theirs_bf16": self._timed(self.step(theirs, precision="bf16")),
            "neumann_theirs": self._timed(
                self.step(theirs, method="neumann", neumann_lr=1e-3)
            ),
            "authors": lambda: authors.iteration(*batch.values(), *batch.values()),
        }

    def step(self, model=None, **settings) -> BiLevelStep:
        """Return a step with an optimiser and a generator of its own."""
        model = model or self.model
        params = classifier_parameters(model, model.policy)
        optimizer = torch.optim.Adam(params.values(), lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        return BiLevelStep(
            model,
            model.policy,
            params,
            optimizer,
            "ecg",
            "label",
            generator,
            **settings,
        )

    def plain(self, precision: str) -> None:
        """Forward and backward of the backbone, nothing else."""
        self.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            loss = self.model(**self.batch)["loss"]
        loss.backward()

    def augment(self) -> None:
        """Augment as an inner step does: drawn operations, no graph."""
        with torch.no_grad():
            self.model.policy(self.batch["ecg"], self.batch["label"])

    def policy(self) -> None:
        """Do an outer step's part in the policy, forward and backward."""
        augmented = self.model.policy(self.batch["ecg"], self.batch["label"])
        augmented.backward(self.batch["ecg"])

    def _timed(self, step: BiLevelStep, outer: bool = True) -> Callable[[], object]:
        if outer:
            return lambda: step.inner_and_outer(self.batch, self.batch)
        return lambda: step.inner(self.batch)

    def _conv1d(self) -> Callable[[], None]:
        network = Conv1dResNet((64, 128, 256, 512), kernel=7, pool=True)

        def step() -> None:
            network.zero_grad()
            logit = network(self.batch["ecg"])
            binary_cross_entropy_with_logits(logit, self.batch["label"]).backward()

        return step

    def _model(self, **settings) -> TaskAugResNet:
        model = TaskAugResNet(self.dataset, sampling_rate=250, **settings)
        model.augment = False
        return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the batch")
    parser.add_argument("--batch", type=int, help="records; 64, or 16 if quick")
    parser.add_argument("--rounds", type=int, help="measured rounds; 2, or 1 if quick")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--table", action="store_true", help="print the last result")
    parser.add_argument("--peak-of", choices=("plain", *PEAKS))
    arguments = parser.parse_args()
    batch = arguments.batch or (16 if arguments.quick else 64)
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print(peak(arguments.peak_of, batch))
        return
    if arguments.table:
        for path in sorted(RESULTS.glob("speed_*.json")):
            content = json.loads(path.read_text())
            print(f"{content['machine']}, {content['capability']}")
            print(f"{document(content)}\n")
        return
    rounds = arguments.rounds or (1 if arguments.quick else 2)
    slow = "AVX512" not in torch.backends.cpu.get_cpu_capability()
    rows = ratios([row for row in TABLE if "bf16" not in row[0]], batch, rounds)
    rows += ratios(
        [row for row in TABLE if "bf16" in row[0]],
        min(batch, BATCH_WITHOUT_BF16) if slow else batch,
        rounds,
    )
    rows += peaks(batch)
    rows += starts(rounds)
    RESULTS.mkdir(exist_ok=True)
    content = {**machine(), "rows": rows}
    path = RESULTS / f"speed_{content['capability'].lower()}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(document(content))


def document(content: dict) -> str:
    """Return the table in Markdown, as docs/speed.md has it."""
    lines = []
    for row in content["rows"]:
        sign = "≥" if row["more_is_better"] else "≤"
        target = "" if row["target"] is None else f"{sign} {row['target']:g}"
        measured = f"{row['median']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
        verdict = {None: "", True: "met", False: "missed"}[row["met"]]
        lines.append([row["what"], target, measured, verdict])
    return markdown(["what", "target", "measured", ""], lines)


def timings(names: set[str], batch: int, rounds: int) -> list[dict[str, float]]:
    """Time the variants once a round; the first round only warms up."""
    variants, result = Variants(batch).all(), []
    variants = {name: call for name, call in variants.items() if name in names}
    for _ in range(rounds + 1):
        result.append({name: seconds(call) for name, call in variants.items()})
    return result[1:]


def seconds(call: Callable[[], object]) -> float:
    """Time a call; a short one three times, of which the median counts."""
    times = []
    while not times or (len(times) < 3 and times[0] < SHORT_SECONDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def ratios(table: list[tuple], batch: int, rounds: int) -> list[dict]:
    names = {name for row in table for name in (*row[1].split("-"), row[2])}
    measured, rows = timings(names, batch, rounds), []
    for what, over, under, target, more in table:
        first, _, second = over.partition("-")
        values = [
            (times[first] - (times[second] if second else 0)) / times[under]
            for times in measured
        ]
        rows.append({**_row(what, target, more, values), "batch": batch})
    return rows


def peaks(batch: int) -> list[dict]:
    """Compare peak memory in processes of their own, above what starting takes."""
    size = {}
    for name in ("plain", *PEAKS):
        command = [sys.executable, __file__, "--peak-of", name, "--batch", str(batch)]
        output = subprocess.run(command, capture_output=True, text=True, check=True)
        size[name] = float(output.stdout.split()[-1])
    return [
        _row(f"peak memory: {label}", PEAK_TARGET, False, [size[name] / size["plain"]])
        for name, label in PEAKS.items()
    ]


def peak(name: str, batch: int) -> float:
    """Return the MiB of this process's peak above what it held before (Linux)."""
    variants = Variants(batch)
    calls = {
        "plain": lambda: variants.plain("fp32"),
        "one_step": variants._timed(variants.step()),
        "lean": variants._timed(variants.step(keep_graph=False)),
        "pieces": variants._timed(variants.step(keep_graph=False, micro_batch=2)),
        "alignment": variants._timed(
            variants.step(method="alignment", outer_loss="ranking")
        ),
    }
    before = _memory("VmRSS")
    calls[name]()
    return _memory("VmHWM") - before


def starts(rounds: int) -> list[dict]:
    """Time the example program's start, with a warm cache, beside PyHealth's own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-u",
            str(EXAMPLE),
            "--synthetic",
            "--cache_dir",
            folder,
        ]
        command += ["--output_dir", f"{folder}/output"]
        until_line("epoch 0:", command)  # writes the corpus and the cache
        times = [until_line("epoch 0:", command) for _ in range(rounds)]
    imports = [sys.executable, "-u", "-c", f"{IMPORTS}; print('imported')"]
    own = [until_line("imported", imports) for _ in range(rounds)]
    return [
        _row("start to the first epoch's line, s", START_TARGET, False, times),
        _row("of it PyHealth's own imports, s", None, False, own),
    ]


def until_line(text: str, command: list[str]) -> float:
    """Return the seconds until a program prints a line with a text, and end it."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        lines = []
        for line in program.stdout:
            lines.append(line)
            if text in line:
                taken = time.perf_counter() - started
                program.kill()
                return taken
    raise RuntimeError(f"{command} ended without {text!r}:\n{''.join(lines)}")


def _memory(entry: str) -> float:
    """Return an entry of this process's memory, MiB."""
    # Not getrusage: a process begins with the peak of the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(entry))
    return int(line.split()[1]) / 1024


def machine() -> dict[str, object]:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.partition(": ")[2] for x in lines if x.startswith("model name"))
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {
        "machine": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "pyhealth")},
        "commit": commit.strip(),
        "date": datetime.date.today().isoformat(),
    }


def _row(what: str, target: float | None, more: bool, values: list[float]) -> dict:
    median = statistics.median(values)
    met = None
    if target is not None:
        met = median >= target if more else median <= target
    return {
        "what": what,
        "target": target,
        "more_is_better": more,
        "median": median,
        "low": min(values),
        "high": max(values),
        "met": met,
    }


if __name__ == "__main__":
    main()
