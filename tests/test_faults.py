"""Trouble with the corpus, the cache and the machine: each has one answer.

docs/faults.md lists them; faults that other tests make are not made here again.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wfdb
from processes import until

from pyhealth.datasets.ecg_dataset import UNFINISHED
from pyhealth.datasets.ecg_samples import CacheError
from pyhealth.datasets.ptbxl import PTBXLDataset, StratFoldSplit
from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
from pyhealth.processors.ecg_record_processor import ECGRecordProcessor, RecordError
from pyhealth.tasks.ecg_classification import ECGBinaryClassification

pytestmark = pytest.mark.slow  # every fault prepares a cache

ROOT = Path(__file__).parents[1]
TABLE = "ptbxl_database.csv"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_synthetic_ptbxl(
        tmp_path_factory.mktemp("faults") / "data", 30, sampling_rates=(100,)
    )


@pytest.fixture
def root(small, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(small, tmp_path / "data"))


def opened(root):
    return PTBXLDataset(root, sampling_rate=100, cache_dir=root.parent / "cache")


def prepared(root, label="MI", normalize="lead", **arguments):
    task = ECGBinaryClassification(
        label, sampling_rate=100, length=200, normalize=normalize, **arguments
    )
    return opened(root).set_task(task, split=StratFoldSplit())


def read(root):
    return pd.read_csv(root / TABLE, dtype=str, keep_default_na=False)


def record_of(root, row=0):
    return root / read(root)["filename_lr"][row]


# The table --------------------------------------------------------------------------


def change(column, value, row=3):
    def changed(root):
        table = read(root)
        table.loc[row, column] = value
        table.to_csv(root / TABLE, index=False)

    return changed


def twice(root):
    table = read(root)
    pd.concat([table, table.iloc[[3]]]).to_csv(root / TABLE, index=False)


def latin_1(root):
    change("report", "Überleitungsstörung")(root)
    (root / TABLE).write_bytes((root / TABLE).read_text().encode("latin-1"))


TABLE_FAULTS = {
    "semicolons": (
        lambda root: read(root).to_csv(root / TABLE, index=False, sep=";"),
        r"cannot be read as a table|has no column ecg_id",
    ),
    "tabs": (
        lambda root: read(root).to_csv(root / TABLE, index=False, sep="\t"),
        r"cannot be read as a table|are separated by commas",
    ),
    "latin-1": (latin_1, r"is not in UTF-8 .*save it in UTF-8"),
    "empty": (lambda root: (root / TABLE).write_text(""), "is empty. Fetch"),
    "header only": (
        lambda root: read(root).iloc[:0].to_csv(root / TABLE, index=False),
        "has no row",
    ),
    "a web page": (
        lambda root: (root / TABLE).write_text("<html>\n<body>404</body>\n</html>\n"),
        "has no column ecg_id, patient_id, strat_fold, filename_lr, found <html>",
    ),
    "an ecg_id twice": (twice, r"row 41: ecg_id 4 is in row 4 too"),
    "no ecg_id": (change("ecg_id", ""), r"row 4: ecg_id is empty"),
    "half an ecg_id": (change("ecg_id", "4.5"), r"ecg_id '4\.5' is no whole number"),
    "no fold": (change("strat_fold", ""), r"ecg_id 4: strat_fold is empty"),
    "fold nan": (change("strat_fold", "nan"), r"strat_fold 'nan' is not 1 to 10"),
    "fold 11": (change("strat_fold", "11"), r"strat_fold '11' is not 1 to 10"),
    "no patient": (change("patient_id", ""), r"ecg_id 4: patient_id is empty"),
    "no path": (change("filename_lr", ""), r"ecg_id 4: filename_lr is empty"),
    "a path out of root": (
        change("filename_lr", "records100/../../secret"),
        r"filename_lr 'records100/\.\./\.\./secret' leaves the folder",
    ),
    "an absolute path": (change("filename_lr", "/etc/x"), "'/etc/x' leaves the folder"),
    "a Windows path": (change("filename_lr", r"..\x"), "leaves the folder"),
}


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_a_wrong_table_is_refused_when_it_is_opened(root, fault):
    make, words = TABLE_FAULTS[fault]
    make(root)
    with pytest.raises(ValueError, match=words) as caught:
        opened(root)
    assert str(caught.value).startswith(str(root / TABLE))
    assert re.search("Fetch|mend", str(caught.value))
    assert "\n" not in str(caught.value)
    assert not (root.parent / "cache").exists() or not any(
        (root.parent / "cache").rglob("*.parquet")
    )


def test_many_wrong_rows_are_counted(root):
    table = read(root)
    table["strat_fold"] = "0"
    table.to_csv(root / TABLE, index=False)
    with pytest.raises(ValueError, match=r"40 of 40 rows .*row 10: .*; and 30 more\."):
        opened(root)


def test_codes_without_a_statement_are_counted_and_named_once(root, caplog):
    table = read(root)
    table.loc[[2, 5], "scp_codes"] = "{'NORM': 100.0, 'NEW': 0.0}"
    table.loc[7, "scp_codes"] = "{'ODD': 50.0}"
    table.to_csv(root / TABLE, index=False)
    dataset = opened(root)
    dataset.records()
    dataset.records()
    said = [r.message for r in caplog.records if "does not have" in r.message]
    assert said == [
        "scp_statements.csv does not have the codes NEW (2 records), ODD (1 records); "
        "they are ignored."
    ]


def test_a_label_that_nobody_has_is_named(root):
    table = read(root)
    table["scp_codes"] = "{'NORM': 100.0}"
    table.to_csv(root / TABLE, index=False)
    with pytest.raises(ValueError, match=r"All 32 records .* label 0 for MI\. Take"):
        prepared(root)


def test_one_class_can_be_evaluated_with_processors_of_others(root, small, tmp_path):
    train, *_ = prepared(Path(shutil.copytree(small, tmp_path / "other" / "data")))
    table = read(root)
    table["scp_codes"] = "{'NORM': 100.0}"
    table.to_csv(root / TABLE, index=False)
    task = ECGBinaryClassification("MI", sampling_rate=100, length=200)
    samples = opened(root).set_task(
        task,
        input_processors=train.input_processors,
        output_processors=train.output_processors,
    )
    assert set(samples.labels) == {0}
    assert samples[0]["label"].item() == 0


def test_a_linked_folder_of_records_is_followed(root, tmp_path):
    """Records on another disk: a link that the user made, unlike a path in a table."""
    elsewhere = (root / "records100").rename(tmp_path / "elsewhere")
    (root / "records100").symlink_to(elsewhere)
    assert [len(part) for part in prepared(root)] == [32, 4, 4]


# Records ----------------------------------------------------------------------------


def rewritten(path, old, new, count=-1):
    header = Path(f"{path}.hea")
    text = header.read_text()
    assert old in text
    header.write_text(text.replace(old, new, count))


def test_samples_that_disagree_with_the_header_are_found(root):
    path = record_of(root)
    data = bytearray(Path(f"{path}.dat").read_bytes())
    data[24 * 7 + 2] ^= 4  # sample 7 of lead II
    Path(f"{path}.dat").write_bytes(data)
    with pytest.raises(RecordError, match=r"samples of lead II disagree .*checksum"):
        prepared(root)
    skipping = opened(root)
    task = ECGBinaryClassification("MI", sampling_rate=100, on_error="skip")
    assert len(skipping.set_task(task)) == 39
    assert skipping.skipped_records == [1]


def test_a_header_without_checksums_is_believed(root):
    path = record_of(root)
    before = ECGRecordProcessor(100).process(path)
    record = wfdb.rdheader(str(path))
    for checksum in record.checksum:
        rewritten(path, f" {checksum} 0 ", " 0 0 ", 1)
    assert ECGRecordProcessor(100).process(path).equal(before)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/mV", "/V"),
        ("1000.0(0)/mV", "1(0)/mV"),
        ("/mV", "/uV"),
        ("1000.0(0)/mV", "1000000.0(0)/mV"),
    ],
)
def test_a_gain_that_is_wrong_by_1000_is_found(root, old, new):
    path = record_of(root)
    rewritten(path, old, new)
    with pytest.raises(RecordError, match=r"no ECG has\. Mend gain or unit"):
        ECGRecordProcessor(100).process(path)


@pytest.fixture
def two_gains(tmp_path):
    """Half a second at gain 1000 and half a second at gain 500, and the signal."""
    signal = np.random.default_rng(0).normal(size=(100, 2)).round(2)
    for name, gain, part in (("a", 1000.0, signal[:50]), ("b", 500.0, signal[50:])):
        wfdb.wrsamp(
            name,
            fs=100,
            units=["mV"] * 2,
            sig_name=["I", "II"],
            p_signal=part,
            fmt=["16"] * 2,
            adc_gain=[gain] * 2,
            baseline=[0] * 2,
            write_dir=str(tmp_path),
        )
    (tmp_path / "both.hea").write_text("both/2 2 100 100\na 50\nb 50\n")
    return tmp_path, signal


def test_segments_keep_their_own_gains(two_gains):
    folder, signal = two_gains
    signals = ECGRecordProcessor(100, ["I", "II"]).read(folder / "both")
    np.testing.assert_allclose(signals, signal.T, atol=2e-3)


def test_several_samples_a_frame_are_no_damage(two_gains):
    folder, _ = two_gains
    lines = (folder / "a.hea").read_text().splitlines()
    lines[0] = "a 1 100 50"
    lines[1] = lines[1].replace(" 16 ", " 16x2 ", 1)
    (folder / "a.hea").write_text("\n".join(lines[:2]) + "\n")
    signals = ECGRecordProcessor(100, ["I"]).read(folder / "a")
    expected = wfdb.rdrecord(str(folder / "a")).p_signal.T
    np.testing.assert_array_equal(signals, expected)


# The cache --------------------------------------------------------------------------


def damage_of(pattern, content=None):
    def damaged(cache):
        (path, *_) = (p for p in sorted(cache.rglob(pattern)) if p.is_file())
        path.unlink() if content is None else path.write_bytes(content)

    return damaged


CACHE_FAULTS = {
    "a chunk is missing": damage_of("samples_*/*.bin"),
    "a chunk is short": damage_of("samples_*/*.bin", b"x" * 100),
    "the index is half": damage_of("samples_*/index.json", b'{"chunks": ['),
    "the schema is damaged": damage_of("samples_*/schema.pkl", b"x" * 100),
    "the events are damaged": damage_of("*.parquet", b"x" * 100),
    "the moments are damaged": damage_of("moments.npy", b"x" * 100),
}


@pytest.mark.parametrize("fault", CACHE_FAULTS)
def test_a_damaged_cache_is_named_and_made_again(root, fault):
    train, *_ = prepared(root, normalize="dataset")
    before = train[0]["ecg"]
    cache = root.parent / "cache"
    CACHE_FAULTS[fault](cache)
    with pytest.raises(CacheError) as caught:
        prepared(root, normalize="dataset")[0][0]
    folder = Path(caught.value.args[0])
    assert folder.is_relative_to(cache)
    assert f"{folder} cannot be read" in str(caught.value)
    assert "Delete this folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)
    train, *_ = prepared(root, normalize="dataset")
    assert train[0]["ecg"].equal(before)


def test_a_disk_that_fills_up_is_not_called_damage(root, monkeypatch):
    prepared(root)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space left") as caught:
            prepared(root, normalize="dataset")
    assert not isinstance(caught.value, CacheError)
    assert len(prepared(root, normalize="dataset")[0]) == 32


# The machine ------------------------------------------------------------------------

PREPARE = """\
import os, sys
sys.path.insert(0, sys.argv[2])
import test_faults
from pathlib import Path
from dask.distributed import LocalCluster
from pyhealth.datasets import base_dataset
if sys.argv[3] == "quick":  # without a worker process, which imports PyHealth, too
    base_dataset.DaskCluster = lambda **settings: LocalCluster(
        **settings | {"processes": False}
    )
if __name__ == "__main__":
    train, val, test = test_faults.prepared(Path(sys.argv[1]))
    print([len(part) for part in (train, val, test)], float(train[0]["ecg"].sum()))
"""


def process_of(root, kind="quick", **keywords):
    here = Path(__file__).parent
    command = [sys.executable, "-c", PREPARE, str(root), str(here), kind]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | keywords.pop("env", {})
    return subprocess.Popen(command, env=environment, **pipes, **keywords)


def last_line(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def expected(small, tmp_path_factory):
    root = shutil.copytree(small, tmp_path_factory.mktemp("expected") / "data")
    train, *_ = prepared(Path(root))
    return f"[32, 4, 4] {float(train[0]['ecg'].sum())}"


def test_two_processes_prepare_the_same_cache_at_once(root, expected):
    both = [process_of(root), process_of(root)]
    assert [last_line(process) for process in both] == [expected] * 2


@pytest.mark.parametrize("seen", [f"{UNFINISHED}-*", "samples_*"])
def test_an_interrupted_set_task_is_done_again(root, expected, seen):
    cache = root.parent / "cache"
    process = process_of(root, start_new_session=True)
    until(lambda: any(cache.rglob(seen)), process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert last_line(process_of(root)) == expected
    assert not any(cache.rglob(f"{UNFINISHED}-*"))


def test_half_a_table_of_a_killed_process_is_cleared_away(root):
    half = opened(root).cache_dir / f"{UNFINISHED}-1"
    half.mkdir(parents=True)
    (half / "part.0.parquet").write_bytes(b"x" * 100)
    assert [len(part) for part in prepared(root)] == [32, 4, 4]
    assert not half.exists()


def test_a_full_disk_is_an_error_and_costs_nothing(root, expected):
    """A limit on the size of files stands for a disk that ends."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = process_of(root, "as users do", preexec_fn=limited)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "File too large" in error
    assert last_line(process_of(root)) == expected


def test_clock_and_locale_change_nothing(root, expected):
    """The zone that is a day ahead, and a language with a decimal comma."""
    environment = {"TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8"}
    assert (
        last_line(
            process_of(root, "as users do", env=environment | {"PYTHONUTF8": "0"})
        )
        == expected
    )


def test_a_root_that_cannot_be_written_is_enough(root, expected):
    for path in [root, *root.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    try:
        assert last_line(process_of(root)) == expected
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


# The document -----------------------------------------------------------------------


def test_the_document_names_a_test_of_every_fault():
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| `(\w+\.py)::(\w+)` \|$", text, re.M)
    assert len(rows) >= 25
    assert len({fault for fault, *_ in rows}) == len(rows)
    for _, _, file, name in rows:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        }, f"{file} has no {name}"
    listed = {name for *_, file, name in rows if file == "test_faults.py"}
    tree = ast.parse(Path(__file__).read_text())
    here = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    made = {name for name in here if name.startswith("test_")}
    assert listed == made - {"test_the_document_names_a_test_of_every_fault"}
