"""Train an ECG classifier whose augmentation is learned, on PTB-XL.

    python examples/ptbxl_ecg_classification_taskaug_resnet.py --synthetic

runs everything on a small invented corpus; ``--data_root`` takes the real one. See
``--help`` for all arguments, and README.md for what each mode does.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from pathlib import Path

# PyHealth is imported inside the functions: its Dask workers import this script again.

TASKS = ("MI", "HYP", "STTC", "CD", "NORM")
MODES = ("standard", "bilevel", "ablation", "lr_sweep")
SYNTHETIC_PATIENTS = 400
#: What a run uses where nothing is said: full size on real data, small on invented.
DEFAULTS = {
    "real": {"sampling_rate": 250, "base_width": 64},
    "synthetic": {"sampling_rate": 100, "base_width": 16},
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in what depends on the corpus."""
    parser = argparse.ArgumentParser(
        description="Train an ECG classifier with a learned augmentation (TaskAug).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_root", help="folder of PTB-XL")
    source.add_argument(
        "--synthetic", action="store_true", help="use a small invented corpus"
    )
    add("--task", choices=TASKS, default="MI", help="superclass to find")
    add("--mode", choices=MODES, default="bilevel", help="what to run")
    add("--epochs", type=int, default=10, help="passes over the training records")
    add("--batch_size", type=int, default=64, help="records a step")
    add("--lr", type=float, default=1e-3, help="learning rate of the weights")
    add("--policy_stages", type=int, default=2, help="stages K of the policy")
    add("--sampling_rate", type=int, help="hertz; 250, or 100 with --synthetic")
    add("--length", type=int, help="samples of a signal; ten seconds")
    add(
        "--normalize",
        choices=("lead", "record", "dataset", "none"),
        default="lead",
        help="scaling of the signals; 'dataset' keeps voltage, which HYP needs",
    )
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
        default="ranking",
        help="what the policy lowers on the validation records",
    )
    add(
        "--alignment_records",
        type=int,
        default=64,
        help="training records that 'alignment' compares the operations on, a step",
    )
    add("--warmup_epochs", type=int, default=1, help="epochs before the policy moves")
    add("--n_records", type=int, help="draw a cohort of this size; all records")
    add("--seed", type=int, default=0, help="of cohort, weights, order and draws")
    add("--num_seeds", type=int, default=1, help="repetitions with further seeds")
    add("--policy_from", help="policy.json of another run, to use as it is")
    add(
        "--reestimate_statistics",
        action="store_true",
        help="evaluate with BatchNorm statistics of the clean training records",
    )
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
    add("--cache_dir", help="where prepared data are kept; the user's cache")
    add(
        "--base_width", type=int, help="width of the ResNet; 64, or 16 with --synthetic"
    )
    add("--device", help="cpu or cuda; the best there is")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the training; bf16 is fast on GPUs and CPUs that compute in it",
    )
    arguments = parser.parse_args(argv)
    if arguments.policy_from and arguments.mode != "bilevel":
        parser.error(f"--mode={arguments.mode} takes no --policy_from; leave one out")
    for name, value in DEFAULTS["synthetic" if arguments.synthetic else "real"].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def synthetic_root(arguments: argparse.Namespace) -> Path:
    """Return the folder of the invented corpus, written on the first call."""
    import platformdirs

    from pyhealth.datasets import ptbxl_synthetic, ptbxl_synthetic_tables

    code = b"".join(
        Path(module.__file__).read_bytes()
        for module in (ptbxl_synthetic, ptbxl_synthetic_tables)
    )
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


def prepare_data(arguments: argparse.Namespace):
    """Open the corpus and prepare the samples of the task."""
    from pyhealth.bilevel.distributed import Processes, prepared_by_main
    from pyhealth.bilevel.experiment import prepare
    from pyhealth.datasets.ptbxl import PTBXLDataset
    from pyhealth.tasks.ecg_classification import ECGBinaryClassification

    task = ECGBinaryClassification(
        arguments.task,
        sampling_rate=arguments.sampling_rate,
        length=arguments.length,
        normalize=arguments.normalize,
    )
    with prepared_by_main(Processes(arguments.device)):
        cache_dir = arguments.cache_dir
        if arguments.synthetic:
            root = synthetic_root(arguments)
            cache_dir = root.parent
        else:
            root = Path(arguments.data_root)
        # The smaller recording where it is enough: a rate of 100 needs no 500.
        recorded = 100 if arguments.synthetic or arguments.sampling_rate <= 100 else 500
        dataset = PTBXLDataset(root, sampling_rate=recorded, cache_dir=cache_dir)
        return prepare(dataset, task, arguments.n_records, arguments.seed)


def settings_of(arguments: argparse.Namespace):
    """Return the run's settings."""
    from pyhealth.bilevel.experiment import RunSettings

    policy = "joint" if arguments.mode == "standard" else "learned"
    return RunSettings(
        policy=arguments.policy_from or policy,
        policy_stages=arguments.policy_stages,
        base_width=arguments.base_width,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        outer_lr=arguments.outer_lr,
        hypergradient=arguments.hypergradient,
        outer_loss=arguments.outer_loss,
        alignment_records=arguments.alignment_records,
        warmup_epochs=arguments.warmup_epochs,
        seed=arguments.seed,
        device=arguments.device,
        reestimate_statistics=arguments.reestimate_statistics,
        precision=arguments.precision,
    )


def run_mode(arguments: argparse.Namespace) -> None:
    """Prepare the data, run the mode and print what happened."""
    from pyhealth.bilevel.comparison import ablation, compare, lr_sweep, summary
    from pyhealth.bilevel.distributed import Processes

    data = prepare_data(arguments)
    is_main = Processes(arguments.device).is_main
    say = print if is_main else (lambda text: None)  # once, not by each process
    say(
        f"{arguments.task}: {len(data.train)} records to train, {len(data.val)} to "
        f"validate, {len(data.test)} to test (fold {data.description['test_fold']})"
    )
    base = settings_of(arguments)
    configurations = {
        "standard": lambda: {"standard": base},
        "bilevel": lambda: {"bilevel": base},
        "ablation": lambda: ablation(base),
        "lr_sweep": lambda: lr_sweep(base),
    }[arguments.mode]()
    seeds = range(arguments.seed, arguments.seed + arguments.num_seeds)
    table = compare(
        configurations,
        seeds,
        data,
        arguments.output_dir,
        arguments.resume,
        arguments.checkpoint_every,
    )
    say(f"\n{arguments.task} on the test records")
    say(summary(table))
    say("\nPictures:")
    for picture in sorted(Path(arguments.output_dir).rglob("*.png")):
        say(f"  {picture}")


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
            f"Stopped; see {arguments.output_dir}. To go on, give the same command "
            "with --resume.",
            file=sys.stderr,
        )
        return getattr(stopped, "exit_code", 130)  # of a signal that training noted
    return 0


if __name__ == "__main__":
    sys.exit(main())
