"""The documents quote what the benchmarks measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


@pytest.mark.parametrize("kind", ["avx2", "avx512"])
def test_the_speed_tables_are_the_measured_ones(kind):
    from speed import document

    content = json.loads((RESULTS / f"speed_{kind}.json").read_text())
    assert len(content["rows"]) == 17
    assert document(content) in (ROOT / "docs" / "speed.md").read_text()


def test_the_recovery_tables_are_the_measured_ones():
    from recovery import rows_of
    from recovery_document import documents

    *tables, summary = documents(rows_of(RESULTS, "real"))
    assert len(tables) == 3
    text = (ROOT / "docs" / "recovery.md").read_text()
    assert all(table in text for table in tables)
    assert summary in (ROOT / "README.md").read_text()


def test_the_precision_tables_are_the_measured_ones():
    from precision import document
    from rows import Rows

    tables = document(Rows(RESULTS / "precision_real.jsonl"))
    text = (ROOT / "docs" / "speed.md").read_text()
    assert all(table in text for table in tables)


@pytest.mark.parametrize("name", ["leak_synthetic", "reestimation_real"])
def test_the_tables_of_leaks_and_statistics_are_the_measured_ones(name):
    from rows import Rows

    module = importlib.import_module(name.split("_")[0])
    table = module.document(Rows(RESULTS / f"{name}.jsonl"))
    assert table.count("\n") >= 7
    assert table in (ROOT / "docs" / "learning.md").read_text()
