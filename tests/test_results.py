"""docs/results.md quotes the stored studies."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from pyhealth.bilevel.study.results import document
from pyhealth.bilevel.study.statistics import holm, over_seeds

DOCS = Path(__file__).parents[1] / "docs"
STUDIES = ["ptbxl", "synthetic"]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS.parent / "benchmarks"), *sys.path])


KEYS = ["task", "n_records", "configuration", "budget"]


@pytest.mark.parametrize("study", STUDIES)
def test_the_tables_are_those_of_the_stored_comparison(study):
    from results_document import controls

    folder, text = DOCS / "results" / study, (DOCS / "results.md").read_text()
    assert document(pd.read_csv(folder / "comparison.csv")) in text
    assert controls(pd.read_csv(folder / "runs.csv")) in text


@pytest.mark.parametrize("study", STUDIES)
def test_the_stored_comparison_is_that_of_the_stored_runs(study):
    folder = DOCS / "results" / study
    runs = pd.read_csv(folder / "runs.csv")
    compared = pd.read_csv(folder / "comparison.csv").set_index(KEYS)
    assert len(compared) == runs.groupby(KEYS).ngroups
    for (task, size), part in runs.groupby(["task", "n_records"]):
        areas = part.set_index(["configuration", "budget", "seed"])["roc_auc"]
        p_values = {}
        for key in part.groupby(["configuration", "budget"]).groups:
            row = compared.loc[(task, size, *key)]
            assert row["roc_auc"] == pytest.approx(areas[key].mean())
            if key == ("A", "steps"):
                assert row["verdict"] == "the reference"
                continue
            interval, p_value = over_seeds(
                (areas[key] - areas["A", "steps"]).dropna().to_numpy()
            )
            assert row["difference"] == pytest.approx(interval.mean)
            assert row["seeds_low"] == pytest.approx(interval.low, nan_ok=True)
            p_values[key] = p_value
        for key, p_value in holm(p_values).items():
            found = compared.loc[(task, size, *key)]["p_holm"]
            assert found == pytest.approx(p_value, nan_ok=True)


def test_five_seeds_of_six_configurations_were_run():
    runs = pd.read_csv(DOCS / "results" / "ptbxl" / "runs.csv")
    largest = runs[(runs["n_records"] == 500) & (runs["budget"] == "steps")]
    seeds = largest.groupby(["task", "configuration"])["seed"].nunique()
    for letter in ("A", "A+", "D", "E", "F", "S"):
        assert seeds["MI", letter] == 5
    assert {"MI", "STTC", "HYP"} <= set(runs["task"])
    assert {500, 1000} == set(runs["n_records"])
    assert not runs.duplicated([*KEYS, "seed"]).any()
    small = runs[(runs["n_records"] == 1000) & (runs["budget"] == "steps")]
    assert set(small.groupby(["task", "configuration"])["seed"].nunique()) == {3}
    assert set(small["task"]) == {"MI", "STTC", "HYP"}


def test_the_document_says_what_the_intervals_carry():
    folder = DOCS / "results" / "ptbxl"
    compared = pd.read_csv(folder / "comparison.csv").set_index(KEYS)
    of_mi = compared.loc["MI", 500]
    assert of_mi.loc[("D", "steps"), "verdict"] == "helps"
    assert of_mi.loc[("S", "steps"), "verdict"] == "helps"
    for key in (("A", "seconds"), ("A+", "steps"), ("A+", "seconds")):
        assert of_mi.loc[key, "verdict"] == "no difference shown at 5 seeds"
    tau = (
        compared["agreement"].xs("steps", level="budget").xs("D", level="configuration")
    )
    assert abs(tau["MI", 500]) < 0.1 < 0.5 < tau["HYP", 500]
    leak = of_mi["leak_auroc"].xs("steps", level="budget")
    assert leak["E"] > leak["D"] > leak["F"] and abs(leak["F"] - 0.5) < 0.03
    others = compared.drop(("MI", 500)).xs("steps", level="budget")
    others = others[others["verdict"] != "the reference"]
    assert set(others["verdict"]) == {"no difference shown at 3 seeds"}
    assert (others["difference"] > 0).all()


def test_the_document_says_what_learning_adds():
    runs = pd.read_csv(DOCS / "results" / "ptbxl" / "runs.csv")
    intervals, p_values = {}, {}
    for key, part in runs.query("budget == 'steps'").groupby(["task", "n_records"]):
        area = part.pivot(index="seed", columns="configuration", values="roc_auc")
        for control in {"S", "E"} & set(area.columns):
            found = over_seeds((area["D"] - area[control]).dropna())
            intervals[*key, control], p_values[*key, control] = found
    apart = [key for key, i in intervals.items() if not i.low < 0 < i.high]
    assert len(intervals) == 7
    assert apart == [("MI", 1000, "E")]
    assert p_values[apart[0]] == pytest.approx(0.017, abs=5e-4)
    assert holm(p_values)[apart[0]] == pytest.approx(0.12, abs=5e-3)
