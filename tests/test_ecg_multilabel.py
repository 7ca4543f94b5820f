"""Several labels at once, and which records are used."""

from __future__ import annotations

import ast
import csv
import json
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from pyhealth.bilevel.study.data import prepare
from pyhealth.bilevel.study.run import run
from pyhealth.bilevel.study.scores import by_label, score
from pyhealth.bilevel.study.settings import RunSettings
from pyhealth.datasets import get_dataloader
from pyhealth.datasets.ptbxl import CohortSplit, PTBXLDataset, StratFoldSplit
from pyhealth.models.taskaug_resnet import TaskAugResNet
from pyhealth.processors import ecg_record_processor
from pyhealth.tasks.ecg_classification import ECGBinaryClassification
from pyhealth.tasks.ecg_multilabel_classification import ECGMultilabelClassification
from pyhealth.tasks.record_filter import QUALITY_FLAGS, RecordFilter

SHORT = {"sampling_rate": 100, "length": 200}


def task_of(labels="superclass", **arguments):
    return ECGMultilabelClassification(labels, **SHORT, **arguments)


def rows_of(root):
    """The published table and statements, read without the project."""
    with open(root / "ptbxl_database.csv", newline="") as file:
        rows = {int(row["ecg_id"]): row for row in csv.DictReader(file)}
    with open(root / "scp_statements.csv", newline="") as file:
        statements = {row[""]: row for row in csv.DictReader(file)}
    return rows, statements


def by_hand(row, statements, labels, limit=0.0):
    found = set()
    for code, likelihood in ast.literal_eval(row["scp_codes"]).items():
        known = statements.get(code)
        if known is None:
            continue
        if labels in ("form", "rhythm"):
            found |= {code} if known[labels] == "1.0" else set()
        elif known["diagnostic"] == "1.0" and likelihood >= limit:
            column = {"superclass": "class", "subclass": "subclass"}[labels]
            found.add(known[f"diagnostic_{column}"])
    return found


# Labels -----------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["superclass", "subclass", "form", "rhythm"])
def test_the_labels_are_those_of_the_published_codes(corpus, dataset, labels):
    rows, statements = rows_of(corpus)
    table = dataset.records(task_of(labels, labelled_only=False))
    assert len(table) == len(rows)
    for ecg_id, names in table.select("ecg_id", "label").iter_rows():
        assert sorted(names) == sorted(by_hand(rows[ecg_id], statements, labels))
    labelled = dataset.records(task_of(labels))
    assert set(labelled["ecg_id"]) == {
        ecg_id for ecg_id, row in rows.items() if by_hand(row, statements, labels)
    }


@pytest.mark.parametrize("labels", ["superclass", "subclass"])
def test_a_statement_counts_from_its_likelihood_on(corpus, dataset, labels):
    rows, statements = rows_of(corpus)
    table = dataset.records(task_of(labels, min_likelihood=80, labelled_only=False))
    found = dict(table.select("ecg_id", "label").iter_rows())
    expected = {i: by_hand(row, statements, labels, 80) for i, row in rows.items()}
    assert {i: set(names) for i, names in found.items()} == expected
    assert expected != {i: by_hand(row, statements, labels) for i, row in rows.items()}


def test_the_datasets_limit_holds_too(corpus, cache_dir):
    rows, statements = rows_of(corpus)
    strict = PTBXLDataset(
        corpus, sampling_rate=100, cache_dir=cache_dir, min_likelihood=80
    )
    for labels, limit in (("subclass", 80), ("form", 0)):
        table = strict.records(task_of(labels, labelled_only=False))
        for ecg_id, names in table.select("ecg_id", "label").iter_rows():
            assert set(names) == by_hand(rows[ecg_id], statements, labels, limit)


@pytest.fixture(scope="module")
def superclasses(dataset):
    return dataset.set_task(task_of(), split=StratFoldSplit())


def test_superclasses_come_in_the_benchmarks_order(corpus, superclasses):
    rows, statements = rows_of(corpus)
    for part in superclasses:
        assert part.label_names == ["CD", "HYP", "MI", "NORM", "STTC"]
        for index in range(len(part)):
            sample = part[index]
            expected = by_hand(rows[sample["ecg_id"]], statements, "superclass")
            vector = [float(name in expected) for name in part.label_names]
            assert sample["label"].tolist() == vector
            assert set(part.labels[index]) == expected != set()
    folds = {
        int(row["strat_fold"])
        for i, row in rows.items()
        if i in superclasses[2].ecg_ids
    }
    assert folds == {10}


def test_another_label_reads_no_waveform_again(dataset, superclasses, monkeypatch):
    monkeypatch.setattr(ecg_record_processor, "read_digital", None)
    for task in (
        task_of("subclass"),
        task_of("rhythm", normalize="lead"),
        ECGBinaryClassification("STTC", **SHORT),
    ):
        train, *_ = dataset.set_task(task, split=StratFoldSplit())
        assert train.path == superclasses[0].path
        assert train[0]["ecg"].shape == (12, 200)


def test_labels_that_no_training_record_has_are_left_out(
    corpus, dataset, caplog, monkeypatch
):
    rows, statements = rows_of(corpus)
    rare = Counter(
        name for row in rows.values() for name in by_hand(row, statements, "subclass")
    )
    monkeypatch.setattr(logging.getLogger("pyhealth"), "propagate", True)
    train, val, _ = dataset.set_task(
        task_of("subclass"), split=StratFoldSplit(train=[1], val=[2], test=[3])
    )
    names = {
        name
        for ecg_id in train.ecg_ids
        for name in by_hand(rows[ecg_id], statements, "subclass")
    }
    assert set(train.label_names) == names < set(rare)
    missing = {
        name
        for part in (val,)
        for ecg_id in part.ecg_ids
        for name in by_hand(rows[ecg_id], statements, "subclass")
    } - names
    assert missing
    for name in missing:
        assert name in caplog.text
    assert "No training record has the label" in caplog.text
    for index, ecg_id in enumerate(val.ecg_ids):
        expected = by_hand(rows[ecg_id], statements, "subclass") & names
        vector = [float(name in expected) for name in val.label_names]
        assert val[index]["label"].tolist() == vector


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": "class"}, r"\['superclass', 'subclass', 'form', 'rhythm'\], got"),
        ({"min_likelihood": 101}, "0 to 100, got 101"),
        ({"labels": "form", "min_likelihood": 1}, "no likelihood of a form"),
        ({"normalize": "voltage"}, "voltage"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        ECGMultilabelClassification(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "counts"),
    [
        ("PTBXL_ROOT", None),
        (
            "PTBXL100_ROOT",
            {
                1: {"NORM": 940, "MI": 549, "STTC": 526, "CD": 481, "HYP": 263},
                2: {"NORM": 967, "MI": 538, "STTC": 524, "CD": 485, "HYP": 264},
                9: {"NORM": 955, "MI": 540, "STTC": 528, "CD": 495, "HYP": 268},
            },
        ),
    ],
)
def test_the_published_records_have_their_labels(variable, counts, tmp_path):
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    root = Path(os.environ[variable])
    dataset = PTBXLDataset(root, sampling_rate=100, cache_dir=tmp_path)
    rows, statements = rows_of(root)
    for labels in ("superclass", "subclass", "form", "rhythm"):
        table = dataset.records(task_of(labels, labelled_only=False))
        for ecg_id, names in table.select("ecg_id", "label").iter_rows():
            assert set(names) == by_hand(rows[ecg_id], statements, labels)
        if labels == "superclass" and counts:
            listed = table.explode("label").group_by("strat_fold", "label").len()
            found = {(f, name): n for f, name, n in listed.iter_rows() if name}
            expected = {(f, k): n for f, of in counts.items() for k, n in of.items()}
            assert found == expected


# Cohorts ----------------------------------------------------------------------------


def test_a_cohort_keeps_the_share_of_every_rarest_label(dataset):
    task = task_of()
    records = dataset.records(task)
    count = Counter(name for names in records["label"] for name in names)
    pool = records.filter(pl.col("strat_fold") != 10)

    def rarest(table):
        """Share of patients by the rarest label that they have."""
        grouped = table.explode("label").group_by("patient_id").agg("label")
        rarest_of = [min(names, key=count.get) for names in grouped["label"]]
        return Counter(rarest_of), len(grouped)

    train, val, _ = dataset.set_task(task, split=CohortSplit(100, seed=1))
    drawn = records.filter(pl.col("ecg_id").is_in(train.ecg_ids + val.ecg_ids))
    assert len(drawn) == 100
    of_pool, patients = rarest(pool)
    of_cohort, drawn_patients = rarest(drawn)
    assert set(of_pool) == {"CD", "HYP", "MI", "NORM", "STTC"}
    for name, of_all in of_pool.items():
        assert abs(of_cohort[name] - of_all / patients * drawn_patients) <= 2


# Which records ----------------------------------------------------------------------


def test_filters_leave_records_out(corpus, dataset):
    rows, _ = rows_of(corpus)

    def left(**arguments):
        records = RecordFilter(**arguments)
        task = ECGBinaryClassification("MI", **SHORT, records=records)
        return set(dataset.records(task)["ecg_id"])

    assert left() == set(rows)
    human = {i for i, row in rows.items() if row["validated_by_human"] == "True"}
    assert left(validated_by_human=True) == human < set(rows)
    for flag in QUALITY_FLAGS:
        clean = {i for i, row in rows.items() if not row[flag].strip()}
        assert left(without_flags=[flag]) == clean
    assert len(left(without_flags=QUALITY_FLAGS)) < len(rows)
    ages = {i: float(row["age"]) for i, row in rows.items() if row["age"]}
    assert left(min_age=60) == {i for i, age in ages.items() if age >= 60}
    assert left(max_age=60) == {i for i, age in ages.items() if age <= 60}
    both = {i for i in human if 40 <= ages.get(i, -1) <= 70}
    assert left(validated_by_human=True, min_age=40, max_age=70) == both


def test_samples_and_splits_see_the_same_records(dataset):
    records = RecordFilter(min_age=60, without_flags=["static_noise"])
    task = ECGBinaryClassification("MI", **SHORT, records=records)
    table = dataset.records(task)
    label_of = dict(table.select("ecg_id", "label").iter_rows())
    fold_of = dict(table.select("ecg_id", "strat_fold").iter_rows())
    whole = dataset.set_task(task)
    assert sorted(whole.ecg_ids) == sorted(label_of)
    parts = dataset.set_task(task, split=StratFoldSplit())
    assert sorted(i for part in parts for i in part.ecg_ids) == sorted(label_of)
    for part, folds in zip(parts, (range(1, 9), [9], [10]), strict=True):
        assert {fold_of[i] for i in part.ecg_ids} <= set(folds)
        assert part.labels == [label_of[i] for i in part.ecg_ids]
        assert [sample["ecg_id"] for sample in part] == part.ecg_ids
    train, val, _ = dataset.set_task(task, split=CohortSplit(40))
    assert len(train) + len(val) == 40
    assert set(train.ecg_ids + val.ecg_ids) <= set(label_of)
    assert dataset.skipped_records == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"without_flags": ["noise"]}, r"baseline_drift.*got \['noise'\]"),
        ({"min_age": 91}, "min_age must lie between 0 and 90"),
        ({"max_age": 90}, "max_age must lie between 0 and 89"),
        ({"min_age": -1}, "got -1"),
    ],
)
def test_wrong_filters_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        RecordFilter(**arguments)


# Training ---------------------------------------------------------------------------


def test_a_policy_for_several_labels_shares_its_magnitudes(superclasses):
    train, *_ = superclasses
    with pytest.raises(ValueError, match=r"is multilabel.*shared_magnitudes=True"):
        TaskAugResNet(train, base_width=4)
    for model in (
        TaskAugResNet(train, base_width=4, shared_magnitudes=True),
        TaskAugResNet(train, base_width=4, policy_stages=0),
    ):
        batch = next(iter(get_dataloader(train, batch_size=8)))
        result = model(**batch)
        assert result["logit"].shape == (8, 5)
        assert torch.isfinite(result["loss"])


@pytest.mark.slow
def test_a_run_scores_every_label(dataset, tmp_path):
    data = prepare(dataset, task_of())
    settings = RunSettings(
        base_width=4,
        epochs=2,
        outer_loss="model",
        shared_magnitudes=True,
        alignment_records=4,
        device="cpu",
    )
    predictions = run(settings, data, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    stored = pd.read_csv(tmp_path / "predictions.csv")
    names = ["CD", "HYP", "MI", "NORM", "STTC"]
    label = stored[[f"label/{name}" for name in names]].to_numpy()
    probability = stored[[f"probability/{name}" for name in names]].to_numpy()
    assert label.tolist() == [
        data.test[i]["label"].tolist() for i in range(len(stored))
    ]
    test = metrics["test"]
    assert test["roc_auc"] == pytest.approx(roc_auc_score(label, probability))
    assert test["pr_auc"] == pytest.approx(average_precision_score(label, probability))
    assert test["positives"] == dict(zip(names, label.sum(axis=0), strict=True))
    assert test["roc_auc_low"] < test["roc_auc"] < test["roc_auc_high"]
    for index, name in enumerate(names):
        own = roc_auc_score(label[:, index], probability[:, index])
        assert test["labels"][name]["roc_auc"] == pytest.approx(own)
    history = pd.read_csv(tmp_path / "history.csv")
    assert metrics["best_epoch"] == history["loss"].idxmin()
    assert history.filter(like="probability/").nunique().max() == 2  # it learned
    for picture in ("roc_pr.png", "policy.png", "ecg_augmented.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    assert score(predictions) == test
    assert list(by_label(stored)) == names


def test_a_label_of_one_class_does_not_count():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"patient_id": range(40)})
    for name, label in (("A", np.arange(40) % 2), ("B", np.zeros(40, int))):
        table[f"label/{name}"] = label
        table[f"probability/{name}"] = rng.random(40)
    scores = score(table)
    assert scores["roc_auc"] == scores["labels"]["A"]["roc_auc"]
    assert scores["labels"]["B"]["roc_auc"] is None
    none = score(table[["patient_id", "label/B", "probability/B"]])
    assert none["roc_auc"] is None and none["roc_auc_low"] is None
