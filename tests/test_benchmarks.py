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


@pytest.mark.parametrize("kind", ["avx2", "avx512", "avx512_other"])
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


@pytest.mark.parametrize("name", ["scale_synthetic", "scale_real", "reading_real"])
def test_the_tables_of_scale_are_the_measured_ones(name):
    from rows import Rows

    module = importlib.import_module(name.split("_")[0])
    table = module.document(Rows(RESULTS / f"{name}.jsonl"))
    assert table.count("\n") >= 3
    assert table in (ROOT / "docs" / "scale.md").read_text()


def test_smaller_numbers_and_ten_million_records_are_the_measured_ones():
    import scale
    import storage
    from rows import Rows

    text = (ROOT / "docs" / "scale.md").read_text()
    assert storage.document(Rows(RESULTS / "storage_real.jsonl")) in text
    assert scale.paper(Rows(RESULTS / "scale_synthetic.jsonl")) in text


def test_what_scale_is_said_to_meet_it_meets():
    from rows import Rows

    rows = [row for row in Rows(RESULTS / "scale_synthetic.jsonl")]
    alone = [row for row in rows if row["workers"] == 1]
    assert max(row["peak_mib"] for row in alone) < 2 * 1024
    assert max(row["peak_mib"] for row in alone if row["stage"] != "train") < 1844
    for rate, limit, kilobytes in ((100, 1.5, 130), (500, 3.0, 130)):
        prepared = {
            row["stage"]: row
            for row in alone
            if row["rate"] == rate and row["records"] == 21799
        }
        assert prepared["set_task"]["seconds"] / 21799 * 1000 < limit
        assert prepared["set_task"]["disk_mib"] * 2**20 / 21799 / 1000 < kilobytes
        assert prepared["again"]["seconds"] < 2
    peaks = {}
    for row in alone:
        peaks.setdefault((row["rate"], row["stage"]), []).append(row["peak_mib"])
    assert all(max(two) - min(two) < 205 for two in peaks.values())
