"""The policies that come with the package, and their cards."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from pyhealth.models.learned_augmentation import LearnedAugmentation
from pyhealth.models.published_policies import published_policies, published_policy
from pyhealth.models.taskaug_policy import TaskAugPolicy

ROOT = Path(__file__).parents[1]
NAMES = ("CD", "HYP", "MI", "STTC")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def path_of(name):
    return ROOT / "policies" / f"{name}.json"


def card_of(name):
    return (ROOT / "policies" / f"{name}.md").read_text(encoding="utf-8")


def rows_of(text, first):
    """The cells of the table whose header begins with a word."""
    (table,) = re.findall(rf"\| {first} \|.*\n\|[ -|]*\n((?:\|.*\n)+)", text)
    return [[c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()]


def test_the_four_labels_are_there():
    assert published_policies() == NAMES
    for suffix in ("json", "md"):
        found = {path.stem for path in (ROOT / "policies").glob(f"*.{suffix}")}
        assert found == set(NAMES)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no published policy 'NORM'.*CD, HYP, MI, ST"
    ):
        published_policy("NORM")
    with pytest.raises(ValueError, match="no published policy"):
        LearnedAugmentation.published("../setup")


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_loaded_by_name_and_augments(name):
    x, labels = torch.randn(64, 12, 1000), torch.arange(64) % 2
    augment = LearnedAugmentation.published(name, sampling_rate=250)
    assert augment.sampling_rate == 250
    augmented = augment(x, labels, generator=torch.Generator().manual_seed(0))
    from_file = LearnedAugmentation.load(path_of(name), sampling_rate=250)
    same = from_file(x, labels, generator=torch.Generator().manual_seed(0))
    assert augmented.equal(same)
    assert augmented.isfinite().all() and not augmented.allclose(x)
    mean = LearnedAugmentation.published(name, magnitudes="mean")
    assert mean(x).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_says_where_it_comes_from(name):
    origin = published_policy(name).provenance
    assert origin["task"] == origin["signals"]["task_label"] == name
    assert origin["policy"] == origin["training"]["policy"] == "learned"
    assert origin["seed"] == origin["training"]["seed"]
    assert origin["corpus"]["folds"] == [1, 2, 9]
    cohort = origin["cohort"]
    assert cohort["records_train"] + cohort["records_val"] == 500
    assert f"seed={origin['seed']}, test=(9,)" in cohort["split"]
    assert (
        '"/' not in path_of(name).read_text()
    )  # no path of the machine it was made on


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_that_of_the_file(name):
    from policy_card import card

    assert card_of(name) == card(path_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_the_card_are_those_of_policy_and_scores(name):
    text, policy = card_of(name), published_policy(name)
    rows = rows_of(text, "stage")
    assert len(rows) == len(policy.to_frame()) == 16
    for cells, row in zip(rows, policy.to_frame().itertuples(), strict=True):
        assert cells[:2] == [str(row.stage), row.operation]
        numbers = (row.probability, row.magnitude_neg, row.magnitude_pos)
        for cell, number in zip(cells[2:5], numbers, strict=True):
            assert float(cell) == pytest.approx(number, abs=5.1e-4)
    scores = policy.provenance["test_scores"]
    rows = rows_of(text, "trained with")
    assert [cells[0] for cells in rows] == list(scores)
    for cells in rows:
        of = scores[cells[0]]
        low, high = re.fullmatch(r"[\d.]+ \(([\d.]+) to ([\d.]+)\)", cells[1]).groups()
        shown = [float(cells[1].split()[0]), float(low), float(high), float(cells[2])]
        stored = [of[k] for k in ("roc_auc", "roc_auc_low", "roc_auc_high", "pr_auc")]
        assert shown == pytest.approx(stored, abs=5.1e-4)
        assert of["n"] == policy.provenance["cohort"]["records_test"] == 2183


@pytest.mark.parametrize("name", NAMES)
def test_the_scores_fit_together(name):
    origin, prose = published_policy(name).provenance, " ".join(card_of(name).split())
    scores = {key: of["roc_auc"] for key, of in origin["test_scores"].items()}
    assert set(origin["differences"]) == {"no augmentation", "random policy"}
    for other, interval in origin["differences"].items():
        gain = scores["this policy"] - scores[other]
        assert interval["roc_auc"] == pytest.approx(gain, abs=1e-9)
        assert interval["low"] < gain < interval["high"]
        ends = f"({interval['low']:+.3f} to {interval['high']:+.3f})"
        assert f": {gain:+.3f} {ends}" in prose
    assert f"Leak AUROC {origin['leak_auroc']:.3f}" in prose
    assert (origin["policy_p_value"] >= 0.05) == ("told from its start" in prose)
    assert "was not shown" in prose and "Not a medical device" in prose


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_is_that_of_the_last_epoch(name):
    policy = published_policy(name)
    training = policy.provenance["training"]
    assert policy.provenance["epoch"] == training["epochs"] - 1
    assert policy.probabilities().sub(1 / 8).abs().max() > 0.01  # it has moved


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_the_card_runs(name):
    (code,) = re.findall(r"```python\n(.*?)```", card_of(name), flags=re.DOTALL)
    names = {}
    exec(compile(code, f"{name}.md", "exec"), names)
    assert names["augmented"].shape == names["signals"].shape


def test_the_overview_is_that_of_the_files():
    from policy_card import overview

    text = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
    assert f"\n{overview(map(path_of, NAMES))}\n" in text


@pytest.mark.slow
def test_the_command_learns_and_writes_a_policy_and_its_card(corpus, tmp_path):
    from published_policies import main

    document = (ROOT / "docs/policies.md").read_bytes()
    command = ["--data_root", str(corpus), "--labels", "MI", "--n_records", "60"]
    command += ["--epochs", "2", "--output", str(tmp_path / "runs")]
    command += ["--policies", str(tmp_path / "policies")]
    main(command)
    found = {path.name for path in (tmp_path / "policies").iterdir()}
    assert found == {"MI.json", "MI.md"}
    published = TaskAugPolicy.load(tmp_path / "policies/MI.json")
    history = pd.read_csv(tmp_path / "runs/MI/n60/D/seed_0/history.csv").iloc[-1]
    last = [history[f"probability/0/{name}"] for name in published.op_names]
    assert published.probabilities()[0].tolist() == pytest.approx(last)
    origin = published.provenance
    assert origin["training"]["epochs"] == 2
    metrics = tmp_path / "runs/MI/n60/frozen/seed_0/metrics.json"
    scores = json.loads(metrics.read_text())
    assert origin["test_scores"]["this policy"] == scores["test"]
    trained_with = TaskAugPolicy.load(metrics.with_name("policy.json"))
    assert trained_with.to_frame().equals(published.to_frame())
    before = metrics.stat().st_mtime_ns
    main(command)  # nothing is trained again
    assert metrics.stat().st_mtime_ns == before
    assert (ROOT / "docs/policies.md").read_bytes() == document
