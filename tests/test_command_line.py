"""The command line, on the very path that real data take."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from pyhealth.bilevel import BiLevelTrainer
from pyhealth.bilevel.epoch import EpochRunner
from pyhealth.bilevel.study.configurations import CONFIGURATIONS
from pyhealth.bilevel.study.data import PreparedData, prepare
from pyhealth.bilevel.study.settings import RunSettings
from pyhealth.bilevel.study.training import train
from pyhealth.datasets.ptbxl import PTBXLDataset
from pyhealth.models.taskaug_policy import TaskAugPolicy

pytestmark = pytest.mark.slow  # whole runs

SCRIPT = (
    Path(__file__).parents[1]
    / "examples"
    / "ptbxl_ecg_classification_taskaug_resnet.py"
)
SMALL = ("--epochs=2", "--base_width=4", "--length=300", "--batch_size=64")
PICTURES = {"learning_curves.png", "policy.png", "roc_pr.png", "ecg_augmented.png"}
TABLES = {
    "config.json",
    "records.csv",
    "history.csv",
    "metrics.json",
    "predictions.csv",
    "policy.json",
    "best.ckpt",
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("command_line", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arguments_of(corpus, cache_dir, dataset):
    """Return the arguments of every run; ``dataset`` has built its event table."""
    return lambda folder: [
        f"--data_root={corpus}",
        "--sampling_rate=100",
        f"--output_dir={folder}",
        f"--cache_dir={cache_dir}",
        *SMALL,
    ]


@pytest.fixture(scope="module")
def run(script, arguments_of):
    """Run the command line on the corpus."""
    return lambda folder, *arguments: script.main([*arguments_of(folder), *arguments])


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bilevel")
    assert run(folder, "--mode=bilevel", "--warmup_epochs=0") == 0
    return folder


def test_a_run_writes_every_file(finished):
    assert {path.name for path in finished.iterdir()} >= TABLES | PICTURES
    for name in PICTURES:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_metrics_are_those_of_the_written_predictions(finished, dataset):
    predictions = pd.read_csv(finished / "predictions.csv", dtype={"patient_id": str})
    test = json.loads((finished / "metrics.json").read_text())["test"]
    records = dataset.records().to_pandas().set_index("ecg_id")
    fold_10 = records[records["strat_fold"] == 10]
    assert sorted(predictions["ecg_id"]) == sorted(fold_10.index)
    own = records.loc[predictions["ecg_id"]]
    assert predictions["label"].tolist() == own["mi"].tolist()
    assert predictions["patient_id"].tolist() == own["patient_id"].tolist()
    label, probability = predictions["label"], predictions["probability"]
    assert test["n"] == len(fold_10)
    assert test["positives"] == fold_10["mi"].sum()
    assert test["roc_auc"] == pytest.approx(roc_auc_score(label, probability))
    assert test["pr_auc"] == pytest.approx(average_precision_score(label, probability))
    assert test["accuracy"] == pytest.approx(((probability >= 0.5) == label).mean())


def test_the_configuration_says_what_was_run(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"]["epochs"] == 2
    assert config["settings"]["seed"] == 0
    assert config["task"]["task_label"] == "MI"
    assert config["versions"]["pyhealth"] == "2.1.0"
    assert len(config["data"]["digest"]) == 64
    parts = pd.read_csv(finished / "records.csv")["part"].value_counts()
    for name in ("train", "val", "test"):
        assert config["data"][f"records_{name}"] == parts[name]


def test_history_and_policy_agree(finished):
    history = pd.read_csv(finished / "history.csv")
    policy = json.loads((finished / "policy.json").read_text())
    assert history["epoch"].tolist() == [0, 1]
    row = history.iloc[policy["provenance"]["epoch"]]
    assert policy["provenance"]["epoch"] == history["roc_auc"].idxmax()
    loaded = TaskAugPolicy.load(finished / "policy.json").to_frame()
    for entry, own in zip(policy["stages"], loaded.to_dict("records"), strict=True):
        column = f"{entry['stage']}/{entry['operation']}"
        assert entry == own
        assert row[f"probability/{column}"] == pytest.approx(entry["probability"])
        assert row[f"magnitude_pos/{column}"] == pytest.approx(entry["magnitude_pos"])
    assert history.iloc[1]["probability/0/no_op"] != pytest.approx(1 / 8, abs=1e-4)


def test_the_policy_says_where_it_is_from_and_what_it_gives_away(finished):
    config = json.loads((finished / "config.json").read_text())
    policy = TaskAugPolicy.load(finished / "policy.json")
    assert policy.provenance["data_digest"] == config["data"]["digest"]
    assert policy.provenance["task"] == "MI"
    assert policy.provenance["seed"] == 0
    metrics = json.loads((finished / "metrics.json").read_text())
    assert 0.3 < metrics["leak_auroc"] < 1  # of a policy that has hardly moved
    assert 0 < metrics["policy_p_value"] <= 1


def test_a_policy_is_carried_over_by_one_argument(finished, run, tmp_path, capsys):
    learned = TaskAugPolicy.load(finished / "policy.json")
    learned.sampling_rate = 250  # as if learned on other recordings
    source = tmp_path / "mi.json"
    learned.save(source)
    assert run(tmp_path, f"--policy_from={source}", "--base_width=8") == 0
    history = pd.read_csv(tmp_path / "history.csv")
    columns = [name for name in history if name.startswith(("prob", "magnitude"))]
    assert (history[columns].nunique() == 1).all()
    used = TaskAugPolicy.load(tmp_path / "policy.json")
    assert used.to_frame().equals(learned.to_frame())
    assert used.provenance == learned.provenance
    assert (learned.sampling_rate, used.sampling_rate) == (250, 100)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["policy"] == str(source)

    assert run(tmp_path, "--policy_from=absent.json") == 2
    assert "absent.json" in capsys.readouterr().err
    assert run(tmp_path, "--policy_from=best.ckpt") == 2
    assert "the path of a policy.json, got 'best.ckpt'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, f"--policy_from={source}", "--mode=ablation")
    assert "--mode=ablation takes no --policy_from" in capsys.readouterr().err


def test_statistics_are_estimated_again(finished, run, tmp_path):
    arguments = ("--mode=bilevel", "--warmup_epochs=0", "--reestimate_statistics")
    assert run(tmp_path, *arguments) == 0
    plain, clean = (pd.read_csv(f / "history.csv") for f in (finished, tmp_path))
    assert (plain["train_loss"] == clean["train_loss"]).all()
    assert (plain["loss"] != clean["loss"]).all()


def test_one_seed_repeats_a_run(finished, run, tmp_path):
    assert run(tmp_path, "--mode=bilevel", "--warmup_epochs=0") == 0
    for name in ("predictions.csv", "policy.json", "records.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_standard_trains_the_policy_on_the_training_loss(run, tmp_path):
    assert run(tmp_path, "--mode=standard") == 0
    policy = TaskAugPolicy.load(tmp_path / "policy.json")
    assert policy.logits.abs().max() > 0
    history = pd.read_csv(tmp_path / "history.csv")
    assert history["hypergradient_norm"].isna().all()


def test_ablation_compares_six_configurations(run, script, tmp_path, capsys):
    small = ("--epochs=1", "--warmup_epochs=0", "--workers=2")
    assert run(tmp_path, "--mode=ablation", *small) == 0
    table = pd.read_csv(tmp_path / "comparison.csv")
    assert table["configuration"].tolist() == list("ABCDEF")
    assert set(table["budget"]) == {"steps"}
    shown = capsys.readouterr().out
    for score in table["roc_auc"]:
        assert f"{score:.3f}" in shown
    assert "one seed shows nothing" in shown
    runs = pd.read_csv(tmp_path / "runs.csv").set_index("configuration")
    folders = {letter: tmp_path / runs.loc[letter, "folder"] for letter in "ABCDEF"}
    policies = {
        letter: TaskAugPolicy.load(folder / "policy.json")
        for letter, folder in folders.items()
    }
    stages = {letter: policy.num_stages for letter, policy in policies.items()}
    assert stages == {"A": 0, "B": 1, "C": 1, "D": 2, "E": 2, "F": 2}
    assert policies["B"].op_names == ("gaussian_noise",)
    assert policies["B"].magnitudes()["neg"].item() == pytest.approx(0.1)
    assert policies["F"].shared_magnitudes
    digests = {
        json.loads((folder / "config.json").read_text())["data"]["digest"]
        for folder in folders.values()
    }
    assert len(digests) == 1
    # All of it again from what is stored, without the data.
    made = ("comparison.csv", "runs.csv", "results.md", "report.html")
    before = {name: (tmp_path / name).read_bytes() for name in made}
    for name in made:
        (tmp_path / name).unlink()
    assert script.main(["--mode=report", f"--output_dir={tmp_path}"]) == 0
    assert before == {name: (tmp_path / name).read_bytes() for name in made}


def test_every_configuration_starts_from_the_same_backbone(parts, monkeypatch):
    starts = []

    def keep(trainer, *args, **kwargs):
        state = trainer.model.backbone.state_dict()
        starts.append({name: value.clone() for name, value in state.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(BiLevelTrainer, "train", keep)
    data = PreparedData(parts[0].task, *parts, {})
    trained = set(CONFIGURATIONS) - {"H", "J"}  # these train others of the same kind
    for letter in trained:
        settings = CONFIGURATIONS[letter].settings(RunSettings(base_width=4))
        with pytest.raises(KeyboardInterrupt):
            train(settings, data, Path())
    assert len(starts) == len(trained)
    for name, value in starts[0].items():
        assert all(torch.equal(value, start[name]) for start in starts)


def test_lr_sweep_runs_three_rates_and_two_seeds(run, tmp_path, capsys):
    several = ("--num_seeds=2", "--workers=2", "--epochs=1", "--warmup_epochs=0")
    assert run(tmp_path, "--mode=lr_sweep", *several) == 0
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert sorted(runs["seed"]) == [0, 0, 0, 1, 1, 1]
    rates = [
        json.loads((tmp_path / folder / "config.json").read_text())["settings"][
            "outer_lr"
        ]
        for folder in runs["folder"]
    ]
    assert sorted(set(rates)) == [1e-4, 1e-3, 1e-2]
    table = pd.read_csv(tmp_path / "comparison.csv")
    assert table["seeds"].tolist() == [2, 2, 2]
    assert table["verdict"][0] == "the reference"


def test_a_cohort_is_drawn_by_n_records(run, tmp_path):
    assert run(tmp_path, "--n_records=100", "--warmup_epochs=0") == 0
    parts = pd.read_csv(tmp_path / "records.csv").groupby("part")
    sizes = parts.size()
    assert sizes["train"] + sizes["val"] == 100
    patients = parts["patient_id"].agg(set)
    assert not patients["train"] & patients["val"]
    assert not patients["test"] & (patients["train"] | patients["val"])


def test_the_papers_protocol_draws_records(script, dataset):
    arguments = script.parse_arguments(
        ["--synthetic", "--n_records=150", "--protocol=paper", "--length=200"]
    )
    data = script.prepare_data(arguments, dataset, "MI", 150, seed=0)
    assert "n_records=150" in data.description["split"]
    assert "protocol='paper'" in data.description["split"]
    with pytest.raises(ValueError, match="draws a cohort; give n_records"):
        prepare(dataset, data.task, None, protocol="paper")
    assert (len(data.train), len(data.val)) == (120, 30)
    assert set(data.train.patient_ids) & set(data.val.patient_ids)
    assert not set(data.test.patient_ids) & set(data.train.patient_ids)


def test_all_superclasses_by_one_command(run, tmp_path, capsys):
    assert run(tmp_path, "--task=superclass", "--warmup_epochs=0") == 0
    printed = capsys.readouterr().out
    test = json.loads((tmp_path / "metrics.json").read_text())["test"]
    low, high = (test[f"roc_auc_{end}"] for end in ("low", "high"))
    assert f"macro AUROC {test['roc_auc']:.3f} ({low:.3f} to {high:.3f})" in printed
    for name, of in test["labels"].items():
        assert f"  {name}: AUROC {of['roc_auc']:.3f} (" in printed
    config = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert (config["outer_loss"], config["shared_magnitudes"]) == ("model", True)


def test_synthetic_runs_the_same_path(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SYNTHETIC_PATIENTS", 120)
    fixed = ["--synthetic", f"--output_dir={tmp_path / 'a'}", "--epochs=2"]
    arguments = [*fixed, f"--cache_dir={tmp_path}", "--base_width=4", "--length=200"]
    assert script.main(arguments) == 0
    roots = list(tmp_path.glob("ptbxl_synthetic_120_*"))
    assert [root.is_dir() for root in roots] == [True]
    assert list(roots[0].rglob("*_lr.dat"))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["data"]["root"] == str(roots[0].resolve())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data_root=nowhere"], "ptbxl_database.csv is missing"),
        (["--n_records=100000"], "A cohort of 100000 records"),
        (["--length=0"], "length must be 1 or more"),
        (["--epochs=0"], "epochs must be 1 or more"),
        (["--policy_stages=-1"], "num_stages must be 0 or more"),
    ],
)
def test_an_error_is_one_sentence(run, tmp_path, capsys, arguments, words):
    assert run(tmp_path, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert words in error


def test_a_failing_run_keeps_what_it_had_written(run, tmp_path, capsys, monkeypatch):
    original = EpochRunner.epoch

    def second_fails(runner):
        if runner.run.epoch == 1:
            raise ArithmeticError("The training loss is nan in epoch 1.")
        original(runner)

    monkeypatch.setattr(EpochRunner, "epoch", second_fails)
    assert run(tmp_path) == 2
    assert "nan in epoch 1" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1
    assert (tmp_path / "config.json").exists()


#: Runs the command line, and dies where the third checkpoint after the first epoch is
#: about to get its name. Not forked: a fork of polars' threads does not work.
DEADLY = """
import os, runpy, signal, sys
from pathlib import Path
history, script, *arguments = sys.argv[1:]
original, left = os.replace, 3

def deadly(source, target):
    global left
    left -= "step-" in str(target) and Path(history).exists()
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    original(source, target)

os.replace = deadly
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def test_a_killed_run_goes_on_with_resume(finished, arguments_of, run, tmp_path):
    same = ("--mode=bilevel", "--warmup_epochs=0", "--resume", "--checkpoint_every=1")
    arguments = [*arguments_of(tmp_path), *same]
    killed = subprocess.run(
        [sys.executable, "-c", DEADLY, tmp_path / "history.csv", SCRIPT, *arguments],
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1
    assert not (tmp_path / "predictions.csv").exists()

    assert run(tmp_path, *same) == 0
    for name in ("predictions.csv", "policy.json", "records.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    histories = [
        pd.read_csv(folder / "history.csv", dtype=str).drop(columns="seconds")
        for folder in (tmp_path, finished)
    ]
    assert histories[0].equals(histories[1])
    ours, theirs = (torch.load(f / "best.ckpt") for f in (tmp_path, finished))
    assert all(value.equal(theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr=0.5"], "has settings lr 0.001, now it is 0.5"),
        (["--task=HYP"], "has task task_label 'MI', now it is 'HYP'"),
        (["--n_records=150"], "has other data"),
    ],
)
def test_resume_refuses_another_run(finished, run, capsys, arguments, words):
    before = (finished / "config.json").read_bytes()
    assert run(finished, "--warmup_epochs=0", "--resume", *arguments) == 2
    assert words in capsys.readouterr().err
    assert (finished / "config.json").read_bytes() == before


def test_a_signal_is_the_exit_code(run, tmp_path, capsys, monkeypatch):
    original = EpochRunner.epoch

    def stopped(runner):
        signal.raise_signal(signal.SIGTERM)
        original(runner)

    monkeypatch.setattr(EpochRunner, "epoch", stopped)
    assert run(tmp_path) == 143
    assert "same command with --resume" in capsys.readouterr().err
    assert list((tmp_path / "checkpoints").glob("step-00000001.ckpt"))


def test_a_corpus_without_the_test_folds_needs_a_cohort(dataset, monkeypatch):
    records = dataset.records()
    two = records.filter(records["strat_fold"].is_in([1, 2]))
    monkeypatch.setattr(dataset, "records", lambda task=None: two)
    with pytest.raises(ValueError, match=r"folds \[1, 2\].*Set n_records"):
        prepare(dataset, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--leads=II"], "--leads is for --records_root"),
        (["--configurations=A", "--mode=ablation"], "takes no --configurations"),
        (["--equal_steps_only", "--mode=ablation"], "is for --mode=study"),
        (["--protocol=paper"], "give --n_records"),
        (["--task=rhythm", "--mode=study"], "one label against the rest"),
        (["--download"], "fetches PTB-XL into --data_root"),
        (["--task", "MI", "CD"], "takes one --task"),
    ],
)
def test_what_a_mode_would_ignore_is_refused(script, capsys, arguments, words):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--synthetic", *arguments])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("rate", "recorded"), [(100, 100), (250, 500)])
def test_download_fetches_the_recording_that_is_read(
    script, tmp_path, monkeypatch, rate, recorded
):
    calls = []

    def download(root, sampling_rates):
        calls.append((Path(root), sampling_rates))
        raise OSError("stop here")

    monkeypatch.setattr(PTBXLDataset, "download", download)
    arguments = [f"--data_root={tmp_path}", "--download", f"--sampling_rate={rate}"]
    assert script.main(arguments) == 2
    assert calls == [(tmp_path, [recorded])]


def test_the_source_of_data_is_needed(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--mode=bilevel"])
    assert stopped.value.code == 2
    assert "--data_root" in capsys.readouterr().err
