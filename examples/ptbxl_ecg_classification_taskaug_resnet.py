"""Train an ECG classifier whose augmentation is learned, on PTB-XL.

    python examples/ptbxl_ecg_classification_taskaug_resnet.py --synthetic

runs everything on a small invented corpus; ``--data_root`` takes the real one. See
``--help`` for all arguments, and README.md for what each mode does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

# PyHealth is imported inside the functions: its Dask workers import this script again.

TASKS = ("MI", "HYP", "STTC", "CD", "NORM")
#: Tasks with several labels.
GROUPS = ("superclass", "subclass", "form", "rhythm")
MODES = ("standard", "bilevel", "ablation", "lr_sweep", "study", "report")
ALONE = ("standard", "bilevel")
ABLATION = ("A", "B", "C", "D", "E", "F")
SYNTHETIC_PATIENTS = 400
#: What a run uses where nothing is said: full size on real data, small on invented.
DEFAULTS = {
    "real": {"sampling_rate": 250, "base_width": 64},
    "synthetic": {"sampling_rate": 100, "base_width": 16},
}


#: ``add_argument`` of a group of arguments.
type Add = Callable[..., argparse.Action]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in what depends on the corpus."""
    parser = argparse.ArgumentParser(
        description="Train an ECG classifier with a learned augmentation (TaskAug).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_data_arguments(parser)
    add_training_arguments(parser.add_argument_group("training").add_argument)
    add_policy_arguments(parser.add_argument_group("augmentation policy").add_argument)
    add_study_arguments(parser.add_argument_group("studies").add_argument)
    add_output_arguments(parser.add_argument_group("output").add_argument)
    arguments = parser.parse_args(argv)
    check_together(parser, arguments)
    for name, value in DEFAULTS["synthetic" if arguments.synthetic else "real"].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which records and labels."""
    group = parser.add_argument_group("records and labels")
    add = group.add_argument
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--data_root", help="folder of PTB-XL, or its address (s3://bucket/ptbxl)"
    )
    source.add_argument(
        "--records_root", help="folder of your own WFDB records with a records.csv"
    )
    source.add_argument(
        "--synthetic", action="store_true", help="use a small invented corpus"
    )
    add(
        "--download",
        action="store_true",
        help="first fetch what --data_root lacks of PTB-XL, every file verified",
    )
    add(
        "--task",
        choices=(*TASKS, *GROUPS),
        nargs="+",
        default=["MI"],
        help="superclass to find, several in a study; or a group of labels at once",
    )
    add("--sampling_rate", type=int, help="hertz; 250, or 100 with --synthetic")
    add("--length", type=int, help="samples of a signal; ten seconds")
    add(
        "--normalize",
        choices=("lead", "record", "dataset", "none"),
        default="lead",
        help="scaling of the signals; 'dataset' keeps voltage, which HYP needs",
    )
    add(
        "--leads", help="of your own records, such as I,II,V5; the twelve standard ones"
    )
    add(
        "--n_records",
        type=int,
        nargs="+",
        help="draw a cohort of this size; all records; a study takes several sizes",
    )
    add(
        "--protocol",
        choices=("patient", "paper"),
        default="patient",
        help="how a cohort is drawn; 'paper' draws records, as the authors did",
    )
    add("--cache_dir", help="where prepared data are kept; the user's cache")


def add_training_arguments(add: Add) -> None:
    """Add what says how the classifier is trained."""
    add("--mode", choices=MODES, default="bilevel", help="what to run")
    add("--epochs", type=int, default=10, help="passes over the training records")
    add("--batch_size", type=int, default=64, help="records a step")
    add("--lr", type=float, default=1e-3, help="learning rate of the weights")
    add(
        "--base_width", type=int, help="width of the ResNet; 64, or 16 with --synthetic"
    )
    add("--seed", type=int, default=0, help="of cohort, weights, order and draws")
    add("--num_seeds", type=int, default=1, help="repetitions with further seeds")
    add(
        "--reestimate_statistics",
        action="store_true",
        help="evaluate with BatchNorm statistics of the clean training records",
    )
    add("--device", help="cpu or cuda; the best there is")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the training; bf16 is fast on GPUs and CPUs that compute in it",
    )


def add_policy_arguments(add: Add) -> None:
    """Add what says how the policy is learned."""
    add("--policy_stages", type=int, default=2, help="stages K of the policy")
    add("--outer_lr", type=float, default=3e-2, help="learning rate of the policy")
    add(
        "--hypergradient",
        choices=("alignment", "one_step", "neumann", "darts"),
        default="alignment",
        help="derivative of the validation loss in the policy",
    )
    add(
        "--outer_loss",
        choices=("model", "ranking", "calibrated"),
        help="what the policy lowers on the validation records; 'ranking', or 'model' "
        "with several labels",
    )
    add(
        "--alignment_records",
        type=int,
        default=64,
        help="training records that 'alignment' compares the operations on, a step",
    )
    add("--outer_every", type=int, default=1, help="inner steps a step of the policy")
    add("--warmup_epochs", type=int, default=1, help="epochs before the policy moves")
    add("--policy_from", help="policy.json of another run, to use as it is")


def add_study_arguments(add: Add) -> None:
    """Add what says what a study compares, and where it runs."""
    add(
        "--configurations",
        metavar="LETTERS",
        help="what a study compares, such as A,A+,D,E; all of them",
    )
    add(
        "--equal_steps_only",
        action="store_true",
        help="leave out a study's runs without augmentation for D's seconds",
    )
    add("--workers", type=int, help="processes of a study; one a core")
    add("--scheduler", help="address of a running Dask scheduler for a study")


def add_output_arguments(add: Add) -> None:
    """Add what says where a run writes, and how it goes on."""
    add("--output_dir", default="output/taskaug", help="where to write")
    add(
        "--resume",
        action="store_true",
        help="go on with what is in --output_dir; begin where there is nothing",
    )
    add(
        "--checkpoint_every",
        type=int,
        metavar="STEPS",
        help="write checkpoints within epochs too; after each epoch only",
    )


def check_together(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> None:
    """Refuse arguments that do not go together."""
    sources = (arguments.data_root, arguments.records_root, arguments.synthetic)
    if not any(sources) and arguments.mode != "report":
        parser.error("give --data_root FOLDER, --records_root FOLDER or --synthetic")
    if arguments.download and not arguments.data_root:
        parser.error("--download fetches PTB-XL into --data_root FOLDER; give one")
    if arguments.records_root:
        arguments.task = ["label"]
    elif arguments.leads:
        parser.error("--leads is for --records_root; PTB-XL has the standard twelve")
    if arguments.configurations and arguments.mode != "study":
        parser.error(f"--mode={arguments.mode} takes no --configurations; leave it out")
    if arguments.equal_steps_only and arguments.mode != "study":
        parser.error("--equal_steps_only is for --mode=study; leave it out")
    if arguments.protocol == "paper" and not arguments.n_records:
        parser.error("--protocol=paper draws a cohort; give --n_records")
    if set(arguments.task) & set(GROUPS) and arguments.mode not in ALONE:
        parser.error(
            f"--mode={arguments.mode} compares binary tasks, one label against the rest"
        )
    if arguments.policy_from and arguments.mode != "bilevel":
        parser.error(f"--mode={arguments.mode} takes no --policy_from; leave one out")
    several = [
        name
        for name in ("task", "n_records")
        if len(getattr(arguments, name) or []) > 1 and arguments.mode != "study"
    ]
    if several:
        parser.error(f"--mode={arguments.mode} takes one --{several[0]}")


def synthetic_root(arguments: argparse.Namespace) -> Path:
    """Return the folder of the invented corpus, written on the first call."""
    import platformdirs

    from pyhealth.datasets import ptbxl_synthetic

    folder = Path(ptbxl_synthetic.__file__).parent
    sources = sorted(folder.glob("ptbxl_synthetic*.py"))
    code = b"".join(source.read_bytes() for source in sources)
    version = hashlib.sha256(code).hexdigest()[:8]
    cache = arguments.cache_dir or platformdirs.user_cache_path("pyhealth")
    root = Path(cache) / f"ptbxl_synthetic_{SYNTHETIC_PATIENTS}_{version}"
    # The table is written last, so where it is the corpus is whole.
    if not (root / "ptbxl_database.csv").exists():
        print(f"Writing an invented corpus of {SYNTHETIC_PATIENTS} patients to {root}")
        ptbxl_synthetic.write_synthetic_ptbxl(
            root, SYNTHETIC_PATIENTS, sampling_rates=(100,)
        )
    return root


def open_dataset(arguments: argparse.Namespace):
    """Open the corpus, written first if it is the invented one."""
    from pyhealth.datasets.ecg_folder import ECGFolderDataset
    from pyhealth.datasets.ptbxl import PTBXLDataset

    cache_dir = arguments.cache_dir
    if arguments.records_root:
        return ECGFolderDataset(arguments.records_root, cache_dir=cache_dir)
    if arguments.synthetic:
        root = synthetic_root(arguments)
        cache_dir = root.parent
    else:
        root = arguments.data_root
    # The smaller recording where it is enough: a rate of 100 needs no 500.
    recorded = 100 if arguments.synthetic or arguments.sampling_rate <= 100 else 500
    if arguments.download:
        PTBXLDataset.download(root, sampling_rates=[recorded])
    return PTBXLDataset(root, sampling_rate=recorded, cache_dir=cache_dir)


def prepare_data(arguments: argparse.Namespace, dataset, task: str, size: int, seed):
    """Prepare the samples of a task and a cohort; the waveforms are read once."""
    from pyhealth.bilevel.study.data import prepare
    from pyhealth.tasks.ecg_classification import ECGBinaryClassification
    from pyhealth.tasks.ecg_folder_classification import ECGFolderClassification
    from pyhealth.tasks.ecg_multilabel_classification import ECGMultilabelClassification

    signals = {
        "sampling_rate": arguments.sampling_rate,
        "length": arguments.length,
        "normalize": arguments.normalize,
    }
    if arguments.records_root:
        if arguments.leads:
            signals["leads"] = arguments.leads.split(",")
        made = ECGFolderClassification(**signals)
    elif task in GROUPS:
        made = ECGMultilabelClassification(task, **signals)
    else:
        made = ECGBinaryClassification(task, **signals)
    return prepare(dataset, made, size or None, seed, arguments.protocol)


def settings_of(arguments: argparse.Namespace):
    """Return the run's settings."""
    from pyhealth.bilevel.study.settings import RunSettings

    policy = "joint" if arguments.mode == "standard" else "learned"
    # With several labels there are no two classes to give magnitudes of their own, nor
    # pairs of records to rank.
    several = arguments.task[0] in GROUPS
    return RunSettings(
        policy=arguments.policy_from or policy,
        policy_stages=arguments.policy_stages,
        base_width=arguments.base_width,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        outer_lr=arguments.outer_lr,
        hypergradient=arguments.hypergradient,
        outer_loss=arguments.outer_loss or ("model" if several else "ranking"),
        shared_magnitudes=several,
        alignment_records=arguments.alignment_records,
        outer_every=arguments.outer_every,
        warmup_epochs=arguments.warmup_epochs,
        seed=arguments.seed,
        device=arguments.device,
        reestimate_statistics=arguments.reestimate_statistics,
        precision=arguments.precision,
    )


def run_alone(arguments: argparse.Namespace) -> None:
    """Train with every seed in this process, or in those of a launcher."""
    from dataclasses import replace

    from pyhealth.bilevel.distributed import Processes, prepared_by_main
    from pyhealth.bilevel.study.run import run

    processes = Processes(arguments.device)
    say = print if processes.is_main else (lambda text: None)  # once, not by each
    (task,), (size,) = arguments.task, arguments.n_records or [0]
    with prepared_by_main(processes):
        dataset = open_dataset(arguments)
        data = prepare_data(arguments, dataset, task, size, arguments.seed)
    say(
        f"{task}: {len(data.train)} records to train, {len(data.val)} to "
        f"validate, {len(data.test)} to test (fold {data.description['test_fold']})"
    )
    settings = settings_of(arguments)
    for seed in range(arguments.seed, arguments.seed + arguments.num_seeds):
        folder = Path(arguments.output_dir)
        folder = folder / f"seed_{seed}" if arguments.num_seeds > 1 else folder
        run(
            replace(settings, seed=seed),
            data,
            folder,
            arguments.resume,
            arguments.checkpoint_every,
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        say(f"\n{task}, seed {seed}, test records: {describe(metrics['test'])}")
        if metrics["leak_auroc"] is not None:
            say(f"leak AUROC {metrics['leak_auroc']:.3f} (0.5: nothing given away)")
    say("\nPictures:")
    for picture in sorted(Path(arguments.output_dir).rglob("*.png")):
        say(f"  {picture}")


def describe(scores: dict) -> str:
    """Return the scores of one run in one line."""
    names = {"roc_auc": "AUROC", "pr_auc": "AUPRC", "accuracy": "accuracy"}
    names |= {"brier": "Brier", "calibration_error": "calibration error"}
    shown = [
        f"{name} {scores[key]:.3f}"
        for key, name in names.items()
        if scores[key] is not None  # the areas, where there is one class only
    ]
    if scores["roc_auc"] is not None:
        shown[0] += f" ({scores['roc_auc_low']:.3f} to {scores['roc_auc_high']:.3f})"
    if "labels" not in scores:
        return f"{', '.join(shown)} (n = {scores['n']}, {scores['positives']} positive)"
    lines = [
        f"  {name}: {describe(of)}"
        for name, of in scores["labels"].items()
        if of["roc_auc"] is not None
    ]
    return "\n".join([f"macro {', '.join(shown)} (n = {scores['n']})", *lines])


def run_several(arguments: argparse.Namespace) -> None:
    """Run a study, an ablation or a sweep: what is missing of it, side by side."""
    from pyhealth.bilevel.checkpoint import write_whole
    from pyhealth.bilevel.study.cluster import client_of, run_study
    from pyhealth.bilevel.study.configurations import CONFIGURATIONS, chosen, lr_sweep
    from pyhealth.bilevel.study.jobs import StudyPlan

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"--mode={arguments.mode} starts processes of its own: run it without "
            "torchrun or accelerate launch."
        )
    letters = (arguments.configurations or ",".join(CONFIGURATIONS)).split(",")
    configurations = {
        "study": lambda: chosen(letters),
        "ablation": lambda: chosen(ABLATION),
        "lr_sweep": lr_sweep,
    }[arguments.mode]()
    plan = StudyPlan(
        settings_of(arguments),
        configurations,
        arguments.task,
        arguments.n_records or [0],
        range(arguments.seed, arguments.seed + arguments.num_seeds),
        equal_seconds=arguments.mode == "study" and not arguments.equal_steps_only,
    )
    dataset = open_dataset(arguments)
    with client_of(arguments.scheduler, arguments.workers) as (client, threads):
        if arguments.scheduler:  # many machines read the records, too
            dataset.client = client
        outcomes = run_study(
            plan,
            lambda *part: prepare_data(arguments, dataset, *part),
            arguments.output_dir,
            client,
            threads,
        )
    command = {"command": shlex.join(["python", *sys.argv])}
    write_whole(Path(arguments.output_dir) / "study.json", json.dumps(command).encode())
    report(arguments)
    failed = [str(outcome) for outcome in outcomes if outcome.state != "done"]
    if failed:
        raise ArithmeticError("\n".join([f"{len(failed)} runs failed:", *failed]))


def report(arguments: argparse.Namespace) -> None:
    """Print what a study has stored, and make its tables and page of it."""
    from pyhealth.bilevel.study.report import write_report
    from pyhealth.bilevel.study.results import summary, write_tables

    print(f"\n{summary(write_tables(arguments.output_dir))}")
    print(f"\nReport: {write_report(arguments.output_dir)}")


def run_mode(arguments: argparse.Namespace) -> None:
    """Run the mode and print what happened."""
    if arguments.mode == "report":
        return report(arguments)
    if arguments.mode in ALONE:
        return run_alone(arguments)
    return run_several(arguments)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = parse_arguments(argv)
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    # Torch's threads wait asleep, not spinning: where other programs used two cores
    # too, a training step took 0.2 s instead of 1.4 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import pyhealth

    # PyHealth tells every step of its own; what is asked for here is the training.
    pyhealth.logger.setLevel(logging.WARNING)
    logging.getLogger("pyhealth.trainer.bilevel").setLevel(logging.INFO)
    try:
        run_mode(arguments)
    except (OSError, ValueError, ArithmeticError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(
            f"Stopped; see {arguments.output_dir}. To go on, give the same command"
            f"{' with --resume' if arguments.mode in ALONE else ''}.",
            file=sys.stderr,
        )
        return getattr(stopped, "exit_code", 130)  # of a signal that training noted
    return 0


if __name__ == "__main__":
    sys.exit(main())
