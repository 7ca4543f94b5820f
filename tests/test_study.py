"""A study: its jobs, the workers that do them, and what is made of the results."""

import importlib.util
import json
import math
import os
import re
import signal
import threading
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from dask.distributed import Client, LocalCluster
from processes import until
from pyhealth.datasets.utils import collate_fn_dict_with_padding
from scipy import stats
from sklearn.metrics import roc_auc_score
from stored_study import stored_study

from pyhealth.bilevel.study import search as search_module
from pyhealth.bilevel.study.cluster import client_of, run_study
from pyhealth.bilevel.study.configurations import CONFIGURATIONS, Configuration, chosen
from pyhealth.bilevel.study.data import prepare
from pyhealth.bilevel.study.jobs import Job, StudyPlan, settings_of_job
from pyhealth.bilevel.study.results import (
    comparison,
    document,
    read_runs,
    summary,
    write_tables,
)
from pyhealth.bilevel.study.run import run
from pyhealth.bilevel.study.scores import score
from pyhealth.bilevel.study.search import RANDAUGMENT, search
from pyhealth.bilevel.study.settings import RunSettings
from pyhealth.bilevel.study.statistics import (
    Interval,
    _WeightedAUROC,
    agreement,
    bootstrap_by_patient,
    holm,
    over_seeds,
    verdict,
)
from pyhealth.bilevel.study.training import Mixup, random_signs, train
from pyhealth.datasets import dask_futures
from pyhealth.models.taskaug_policy import TaskAugPolicy
from pyhealth.tasks.ecg_classification import ECGBinaryClassification

pytestmark = pytest.mark.slow  # real workers

ROOT = Path(__file__).parents[1]
BASE = RunSettings(
    base_width=4, epochs=2, warmup_epochs=0, alignment_records=2, device="cpu"
)


def prepared(dataset, label="MI", size=100, seed=0):
    task = ECGBinaryClassification(label, sampling_rate=100, length=200)
    return prepare(dataset, task, size or None, seed)


@pytest.fixture(scope="module")
def data(dataset):
    return prepared(dataset)


@pytest.fixture(scope="module")
def cluster():
    with client_of(workers=2) as (client, _):
        yield client


def plan_of(letters, seeds=(0,), base=BASE, **settings):
    configurations = chosen(letters)
    return StudyPlan(base, configurations, ["MI"], [100], seeds, **settings)


# Jobs -------------------------------------------------------------------------------


def test_every_job_comes_after_those_it_needs():
    plan = StudyPlan(BASE, CONFIGURATIONS, ["MI", "CD"], [100, 0], range(2))
    jobs = plan.jobs()
    assert len(jobs) == len(set(jobs)) == 2 * 2 * 2 * (len(CONFIGURATIONS) + 2)
    for place, job in enumerate(jobs):
        assert all(jobs.index(needed) < place for needed in job.needs)
    assert len({job.name for job in jobs}) == len(jobs)


def test_seconds_are_those_of_the_learned_policy(data, tmp_path):
    plan = plan_of(["A", "D", "J"])
    folder = tmp_path / Job("MI", 100, 0, "D").name
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"seconds": 1.5}))
    searched = settings_of_job(Job("MI", 100, 0, "J"), plan, tmp_path)
    assert (searched.search_seconds, searched.max_seconds) == (1.5, None)
    longer = settings_of_job(Job("MI", 100, 0, "A", "seconds"), plan, tmp_path)
    assert (longer.max_seconds, longer.policy) == (1.5, "none")
    history = train(longer, data, tmp_path / "longer").history
    seconds = [row["seconds"] for row in history]
    assert sum(seconds[:-1]) < 1.5 <= sum(seconds)
    assert len(history) > BASE.epochs


def test_an_unknown_configuration_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no configuration Q; there are A, A\+"):
        chosen(["A", "Q"])


# Kinds of augmentation --------------------------------------------------------------


def test_mixup_mixes_signal_and_label_alike(data):
    samples = [data.train[i] for i in range(8)]
    plain = collate_fn_dict_with_padding(samples)
    mix = Mixup(collate_fn_dict_with_padding, seed=3)
    mixed = mix(samples)
    assert mixed["ecg"].shape == plain["ecg"].shape
    assert mixed["ecg_id"] == plain["ecg_id"]
    own = 0
    for i in range(8):
        # Each is w * itself + (1 - w) * another, signal and label with one w.
        fits = []
        for j in range(8):
            slope = (plain["ecg"][i] - plain["ecg"][j]).flatten()
            rest = (mixed["ecg"][i] - plain["ecg"][j]).flatten()
            weight = (rest @ slope / (slope @ slope)).item() if slope.any() else 1.0
            ecg = torch.lerp(plain["ecg"][j], plain["ecg"][i], weight)
            label = torch.lerp(plain["label"][j], plain["label"][i], weight)
            close = torch.allclose(ecg, mixed["ecg"][i], atol=1e-4)
            fits.append(close and torch.allclose(label, mixed["label"][i], atol=1e-4))
        assert any(fits)
        own += torch.allclose(mixed["ecg"][i], plain["ecg"][i], atol=1e-4)
    assert own < 8
    assert mix(samples)["ecg"].equal(mixed["ecg"])  # a resumed run mixes the same
    other = Mixup(collate_fn_dict_with_padding, seed=4)(samples)
    assert not other["ecg"].equal(mixed["ecg"])


def test_random_signs_keep_sizes_and_repeat():
    gradient = {"logits": torch.randn(2, 400), "mag_neg": torch.randn(2, 400)}
    changed = random_signs(gradient)
    flips = torch.cat([(changed[n] * gradient[n]).flatten() < 0 for n in gradient])
    for name, value in gradient.items():
        assert changed[name].abs().equal(value.abs())
        assert random_signs(gradient)[name].equal(changed[name])
    assert 0.45 < flips.float().mean() < 0.55
    again = random_signs({n: g + 1e-6 for n, g in gradient.items()})
    assert not torch.cat([again[n].sign() for n in again]).equal(
        torch.cat([changed[n].sign() for n in changed])
    )


def test_training_on_the_validation_records_takes_as_many_steps(data, tmp_path):
    """Some 80 + 20 records in batches of 20: 4 epochs of 5 steps for 5 of 4."""
    assert len(data.train) + len(data.val) == 100
    settings = replace(BASE, policy="none", epochs=5, batch_size=20)
    trainer = train(replace(settings, train_on_validation=True), data, tmp_path)
    assert len(trainer.history) == round(5 * len(data.train) / 100)
    state = trainer.model.backbone.state_dict()
    steps = {int(v) for name, v in state.items() if name.endswith("batches_tracked")}
    # The last weights, not those of an epoch that these records would have picked.
    assert steps == {len(trainer.history) * 5}
    assert steps.pop() == pytest.approx(5 * math.ceil(len(data.train) / 20), abs=5)


def test_the_union_holds_every_record_once(data):
    both = data.train.joined(data.val)
    assert sorted(both.ecg_ids) == sorted(data.train.ecg_ids + data.val.ecg_ids)
    label_of = data.train.label_of | data.val.label_of
    for sample in both:
        assert sample["label"].item() == label_of[sample["ecg_id"]]
    assert both[0]["ecg"].shape == (12, 200)


def test_randaugment_tries_its_grid_and_keeps_the_best(data, tmp_path):
    settings = replace(BASE, policy="randaugment", epochs=1)
    best, seconds = search(settings, data, tmp_path / "search")
    folders = sorted((tmp_path / "search").glob("trial_*"))
    points = set()
    scores = {}
    for folder in folders:
        policy = TaskAugPolicy.load(folder / "policy.json")
        assert policy.shared_magnitudes
        assert policy.probabilities().numpy() == pytest.approx(1 / 8)
        points.add((policy.num_stages, round(policy.initial_magnitude, 6)))
        history = pd.read_csv(folder / "history.csv")
        scores[folder.name] = history["roc_auc"].max()
    assert points == set(product(*RANDAUGMENT.values()))
    assert scores[best.parent.name] == max(scores.values())
    assert seconds > 0
    # Found again without a training.
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("history.csv")}
    assert search(settings, data, tmp_path / "search") == (best, seconds)
    assert written == {path: path.stat().st_mtime_ns for path in written}


class Killed(BaseException):
    """Leaves as a kill does: nothing is tidied up."""


@pytest.mark.parametrize("policy", ["randaugment", "searched"])
def test_a_killed_search_does_the_trial_under_way_again(
    data, tmp_path, monkeypatch, policy
):
    def train_until_killed(settings, data, folder):
        if folder.name == "trial_001":
            raise Killed
        return train(settings, data, folder)

    settings = replace(BASE, policy=policy, epochs=1, search_seconds=1e9)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(search_module, "train", train_until_killed)
        search(settings, data, tmp_path)
    (history,) = tmp_path.glob("trial_*/history.csv")
    spent = pd.read_csv(history)["seconds"].sum()

    # In so many seconds a search of Optuna's has one more trial.
    best, seconds = search(
        replace(settings, search_seconds=spent * 1.01), data, tmp_path
    )
    assert seconds > spent
    grid = math.prod(map(len, RANDAUGMENT.values()))
    last = grid if policy == "randaugment" else 2
    proposed = [
        (tmp_path / f"trial_{number:03d}/policy.json").read_text()
        for number in (1, last)
    ]
    assert proposed[0] == proposed[1]
    trained = {path.parent.name for path in tmp_path.glob("trial_*/history.csv")}
    assert trained == {f"trial_{n:03d}" for n in range(last + 1)} - {"trial_001"}
    assert best.parent.name in trained


def test_a_search_ends_when_its_seconds_are_spent(data, tmp_path):
    settings = replace(BASE, policy="searched", epochs=1, search_seconds=1e-6)
    best, seconds = search(settings, data, tmp_path)
    assert [path.name for path in tmp_path.glob("trial_*")] == ["trial_000"]
    more = replace(settings, search_seconds=2.5 * seconds)
    search(more, data, tmp_path)
    folders = sorted(tmp_path.glob("trial_*"))
    assert len(folders) > 1
    policies = [TaskAugPolicy.load(folder / "policy.json") for folder in folders]
    assert not policies[0].logits.equal(policies[1].logits)
    assert best == folders[0] / "policy.json"
    with pytest.raises(ValueError, match="needs search_seconds"):
        RunSettings(policy="searched")


def test_a_trial_that_diverges_is_the_worst(data, tmp_path, monkeypatch):
    def train_or_fail(settings, data, folder):
        if folder.name == "trial_000":
            raise ArithmeticError("The training loss is nan.")
        return train(settings, data, folder)

    monkeypatch.setattr(search_module, "train", train_or_fail)
    settings = replace(BASE, policy="randaugment", epochs=1)
    best, _ = search(settings, data, tmp_path)
    assert best.parent.name != "trial_000"
    assert len(list(tmp_path.glob("trial_*/history.csv"))) == 8


# Workers ----------------------------------------------------------------------------


def test_a_study_runs_everything_once_and_then_nothing(
    dataset, cluster, tmp_path, data
):
    plan = plan_of(["A", "A+", "D", "I", "S"], seeds=(0, 1))
    lines = []
    part = partial(prepared, dataset)
    outcomes = run_study(plan, part, tmp_path, cluster, say=lines.append)
    assert [outcome.state for outcome in outcomes] == ["done"] * 14
    assert sorted(lines) == sorted(str(outcome) for outcome in outcomes)
    runs = read_runs(tmp_path)
    assert len(runs) == 14
    for path in runs["folder"]:
        assert (Path(path) / "run.log").exists()
        predictions = pd.read_csv(Path(path) / "predictions.csv")
        assert sorted(predictions["ecg_id"]) == sorted(data.test.ecg_ids)
    # Seeds draw cohorts of their own; one seed has one cohort for all configurations.
    digest = {}
    for row in runs.itertuples():
        config = json.loads((Path(row.folder) / "config.json").read_text())
        digest.setdefault(row.seed, set()).add(config["data"]["digest"])
    assert [len(found) for found in digest.values()] == [1, 1]
    assert digest[0] != digest[1]

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.csv")}
    again = run_study(plan, part, tmp_path, cluster, say=lines.append)
    assert len(lines) == 14  # nothing was run
    assert [str(outcome) for outcome in again] == [str(o) for o in outcomes]
    assert written == {path: path.stat().st_mtime_ns for path in written}

    other = plan_of(["D"], base=replace(BASE, epochs=3))
    with pytest.raises(ValueError, match=r"settings epochs 2, now it is 3"):
        run_study(other, part, tmp_path, cluster)


def test_the_worker_gives_what_this_process_gives(dataset, cluster, data, tmp_path):
    plan = plan_of(["D"], equal_seconds=False)
    run_study(plan, partial(prepared, dataset), tmp_path, cluster)
    settings = plan.configurations["D"].settings(BASE)
    here = run(settings, data, tmp_path / "here", pictures=False)
    there = pd.read_csv(tmp_path / "MI/n100/D/seed_0/predictions.csv")
    np.testing.assert_array_equal(there["ecg_id"], here["ecg_id"])
    np.testing.assert_allclose(there["probability"], here["probability"], rtol=1e-6)


def test_a_job_that_raises_is_reported_and_sinks_nothing_else(
    dataset, cluster, tmp_path
):
    plan = plan_of(["A", "J"])
    path = tmp_path / "policy.json"
    broken = Configuration("broken", {"policy": str(path)})
    plan = replace(plan, configurations={**plan.configurations, "D": broken})
    outcomes = {
        outcome.job.name.split("/")[2]: outcome
        for outcome in run_study(plan, partial(prepared, dataset), tmp_path, cluster)
    }
    assert outcomes["A"].state == "done"
    assert outcomes["D"].state == "failed"
    assert str(path) in outcomes["D"].message
    log = tmp_path / "MI/n100/D/seed_0/run.log"
    assert str(log) in outcomes["D"].message
    assert "Traceback" in log.read_text()
    for name in ("J", "A_seconds"):
        assert outcomes[name].state == "left out"
        assert "it needs MI/n100/D/seed_0" in outcomes[name].message
    assert len(read_runs(tmp_path)) == 1
    # Mended, it does what was left.
    TaskAugPolicy(1, sampling_rate=100).save(path)
    plan = replace(plan, configurations={"A": plan.configurations["A"], "D": broken})
    again = run_study(plan, partial(prepared, dataset), tmp_path, cluster)
    assert [outcome.state for outcome in again] == ["done"] * 3


def test_a_killed_run_loses_at_most_an_epoch(dataset, tmp_path):
    plan = plan_of(["A"], base=replace(BASE, epochs=60))
    target = tmp_path / plan.jobs()[0].name

    def kill_in_the_middle(pid):
        until(lambda: epochs_in(target) >= 20, pid)
        os.kill(pid, signal.SIGKILL)

    with client_of(workers=1) as (client, _):
        (pid,) = client.run(os.getpid).values()
        killer = threading.Thread(target=kill_in_the_middle, args=[pid])
        killer.start()
        (outcome,) = run_study(plan, partial(prepared, dataset), tmp_path, client)
        killer.join()
    assert outcome.state == "done"
    assert epochs_in(target) == 60
    log = (target / "run.log").read_text()
    assert log.count("Going on from") == 1
    trained = [int(n) for n in re.findall(r" epoch (\d+): train_loss", log)]
    assert sorted(set(trained)) == list(range(60))
    assert len(trained) <= 61


def epochs_in(folder):
    history = folder / "history.csv"
    return len(pd.read_csv(history)) if history.exists() else 0


def test_a_worker_that_is_killed_loses_no_job(dataset, tmp_path):
    """A real process, killed when the first job has ended and the next are running."""
    plan = plan_of(["A", "B", "E"], seeds=(0, 1), base=replace(BASE, epochs=30))
    first = tmp_path / plan.jobs()[0].name / "history.csv"
    with client_of(workers=2) as (client, _):
        before = client.run(os.getpid)
        killed = []

        def kill_once(line):
            if not killed:  # a job ended: the worker that did it is in the next one
                victim = next(iter(before.values()))
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

        part = partial(prepared, dataset)
        outcomes = run_study(plan, part, tmp_path, client, say=kill_once)
        client.wait_for_workers(2, timeout=60)
        after = client.run(os.getpid)
    assert killed and killed[0] not in after.values()
    assert first.exists()
    assert [outcome.state for outcome in outcomes] == ["done"] * 6
    runs = read_runs(tmp_path)
    assert not runs.duplicated(["configuration", "seed"]).any()
    assert len(runs) == 6
    for path in runs["folder"]:
        assert len(pd.read_csv(Path(path) / "history.csv")) == 30


def test_a_study_without_workers_does_not_wait_for_ever(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(dask_futures, "CHECK_EVERY", 0.2)
    part = partial(prepared, dataset)
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as empty,
        Client(empty) as client,
        pytest.raises(OSError, match="All workers are gone, 1 runs are left"),
    ):
        run_study(plan_of(["A"]), part, tmp_path, client)


def test_the_documented_letters_are_those_there_are():
    text = (ROOT / "docs" / "study.md").read_text()
    for letter, configuration in CONFIGURATIONS.items():
        assert f"| {letter} | {configuration.title} |" in text


def test_the_slurm_file_asks_for_one_run_a_job():
    path = ROOT / "examples" / "slurm_workers.py"
    spec = importlib.util.spec_from_file_location("slurm_workers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wanted = ["--queue=cpu", "--cores=4", "--directive=--gres=gpu:1"]
    with module.cluster_of(module.parse_arguments(wanted)) as cluster:
        script = cluster.job_script()
        survived = cluster.scheduler.allowed_failures
    for line in ("-p cpu", "--cpus-per-task=4", "--gres=gpu:1", "-t 08:00:00"):
        assert f"#SBATCH {line}" in script
    assert "--nthreads 1" in script
    assert "--nworkers" not in script or "--nworkers 1" in script
    assert survived == 20  # a run goes on in the next job, walltime after walltime


# Statistics -------------------------------------------------------------------------


def test_over_seeds_is_the_paired_t_test():
    a, b = [0.81, 0.84, 0.80, 0.86], [0.80, 0.80, 0.79, 0.81]
    interval, p_value = over_seeds(np.subtract(a, b))
    expected = stats.ttest_rel(a, b)
    assert p_value == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((ends.low, ends.high))
    alone, p_value = over_seeds([0.1])
    assert alone.mean == 0.1
    assert math.isnan(alone.low) and math.isnan(p_value)
    assert not alone.above_zero and not alone.below_zero
    assert over_seeds([0.0, 0.0])[1] == 1.0


def test_the_bootstrap_draws_patients_not_records():
    """Ten copies of each record say no more than one, if they are one patient's."""
    rng = np.random.default_rng(0)
    label = np.arange(60) % 2
    table = pd.DataFrame(
        {
            "ecg_id": range(60),
            "patient_id": [f"p{i}" for i in range(60)],
            "label": label,
            "probability": 0.5 * label + rng.normal(size=60),
        }
    )
    other = table.assign(probability=rng.normal(size=60))
    interval = bootstrap_by_patient([(table, other)])
    difference = roc_auc_score(label, table["probability"]) - roc_auc_score(
        label, other["probability"]
    )
    assert interval.mean == pytest.approx(difference)
    assert interval.low < difference < interval.high

    def copies(frame):
        many = pd.concat([frame] * 10, ignore_index=True)
        return many.assign(ecg_id=range(len(many)))

    many = bootstrap_by_patient([(copies(table), copies(other))])
    assert (many.low, many.high) == pytest.approx((interval.low, interval.high))
    # Weighted as scikit-learn weights, ties included.
    tied = table.assign(probability=table["probability"].round(1))
    half = np.arange(60) % 3
    assert _WeightedAUROC(tied)(half) == pytest.approx(
        roc_auc_score(label, tied["probability"], sample_weight=half)
    )
    shuffled = other.sample(frac=1, random_state=1)
    assert bootstrap_by_patient([(table, shuffled)]) == interval
    with pytest.raises(ValueError, match="different records"):
        bootstrap_by_patient([(table, other.head(50))])


def test_holm_is_the_step_down_procedure():
    adjusted = holm({"a": 0.01, "b": 0.02, "c": 0.03, "d": math.nan, "e": 0.9})
    assert adjusted == pytest.approx(
        {"a": 0.04, "b": 0.06, "c": 0.06, "d": math.nan, "e": 0.9}, nan_ok=True
    )
    assert holm({}) == {}


@pytest.mark.parametrize(
    ("seeds", "patients", "p_value", "number", "words"),
    [
        ((0.01, 0.03), (0.005, 0.04), 0.01, 5, "helps"),
        ((-0.03, -0.01), (-0.04, -0.005), 0.01, 5, "hurts"),
        ((0.01, 0.03), (-0.005, 0.04), 0.01, 5, "no difference shown at 5 seeds"),
        ((0.01, 0.03), (0.005, 0.04), 0.06, 5, "no difference shown at 5 seeds"),
        ((0.01, 0.03), (0.005, 0.04), math.nan, 5, "no difference shown at 5 seeds"),
        ((0.01, 0.03), (0.005, 0.04), 0.01, 1, "one seed shows nothing"),
    ],
)
def test_a_verdict_needs_everything(seeds, patients, p_value, number, words):
    intervals = (Interval(sum(ends) / 2, *ends) for ends in (seeds, patients))
    assert verdict(*intervals, p_value, number) == words


def test_agreement_of_policies():
    up = np.arange(8.0)
    assert agreement([up, 2 * up, up + 1]) == pytest.approx(1.0)
    assert agreement([up, -up]) == pytest.approx(-1.0)
    assert math.isnan(agreement([up]))
    assert math.isnan(agreement([np.ones(8), up]))  # uniform orders nothing


def test_scores_of_hand_made_predictions():
    table = pd.DataFrame({"label": [0, 0, 1, 1], "probability": [0.1, 0.6, 0.4, 0.9]})
    table["patient_id"] = list("abcd")
    scores = score(table)
    assert scores["roc_auc"] == 0.75
    assert scores["brier"] == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    # Each probability is alone in its bin: 0.1, 0.6, 0.6 and 0.1 away from its label.
    assert scores["calibration_error"] == pytest.approx(0.35)


# Results ----------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    return stored_study(tmp_path)


def test_the_comparison_says_what_was_shown(stored):
    runs = read_runs(stored)
    assert len(runs) == 22
    table = comparison(runs).set_index(["configuration", "budget"])
    assert list(table.index) == [
        ("A", "steps"),
        ("A", "seconds"),
        ("A+", "steps"),
        ("D", "steps"),
        ("E", "steps"),
        ("S", "steps"),
    ]
    verdicts = table.xs("steps", level="budget")["verdict"]
    assert verdicts.to_dict() == {
        "A": "the reference",
        "A+": "one seed shows nothing",
        "D": "helps",
        "E": "no difference shown at 5 seeds",
        "S": "hurts",
    }
    d = table.loc["D", "steps"]
    means = runs.groupby("configuration")["roc_auc"].mean()
    assert d["difference"] == pytest.approx(
        means["D"]
        - runs.query("configuration == 'A' and budget == 'steps'")["roc_auc"].mean()
    )
    assert d["seeds_low"] < d["difference"] < d["seeds_high"]
    assert d["patients_low"] < d["difference"] < d["patients_high"]
    assert d["p_value"] < d["p_holm"] < 0.05
    assert d["agreement"] == pytest.approx(1.0)
    assert math.isnan(table.loc[("E", "steps"), "agreement"])


def test_the_summary_and_the_files_show_the_same(stored):
    compared = write_tables(stored)
    text = summary(compared)
    assert "MI, 500 records to train and validate on, 300 test records" in text
    for row in compared.itertuples():
        assert row.title in text and f"{row.roc_auc:.3f}" in text
        assert row.verdict in text
    again = pd.read_csv(stored / "comparison.csv")
    assert again["verdict"].tolist() == compared["verdict"].tolist()
    text = (stored / "results.md").read_text()
    assert text == f"{document(again)}\n"  # also from the file alone
    assert text.startswith("### MI, 500 records\n\n|  | configuration | seeds |")
    assert text.count("\n| ") == 2 + len(compared)
    runs = pd.read_csv(stored / "runs.csv")
    assert all((stored / path / "predictions.csv").exists() for path in runs["folder"])


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        read_runs(tmp_path)
