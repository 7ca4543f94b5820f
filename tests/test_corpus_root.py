"""A corpus in an object store: a real server of S3's protocol on loopback."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer
from records import write

from pyhealth.bilevel.study.data import prepare
from pyhealth.datasets import base_dataset
from pyhealth.datasets.corpus_root import CorpusRoot
from pyhealth.datasets.ecg_folder import ECGFolderDataset
from pyhealth.datasets.ptbxl import PTBXLDataset
from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
from pyhealth.processors.ecg_record_processor import (
    ECGRecordProcessor,
    MissingRecordError,
    RecordError,
)
from pyhealth.tasks.ecg_classification import ECGBinaryClassification

pytestmark = pytest.mark.slow  # a server on loopback

SHORT = {"sampling_rate": 100, "length": 50}
ADDRESS = "s3://corpora/ptbxl"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same corpus on the disk, with a table of one's own records."""
    folder = tmp_path_factory.mktemp("store") / "ptbxl"
    root = write_synthetic_ptbxl(folder, 40, sampling_rates=[100])
    headers = sorted(root.rglob("*.hea"))
    rows = [
        f"{header.relative_to(root).with_suffix('')},P{i},{i % 2}"
        for i, header in enumerate(headers)
    ]
    (root / "records.csv").write_text("\n".join(["record,patient,label", *rows]))
    return root


@pytest.fixture(scope="module", autouse=True)
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def store(server, local):
    """The store's file system, with the corpus in it."""
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("corpora")
    filesystem.put(str(local), "corpora/ptbxl", recursive=True)
    return filesystem


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The event table is built by a Dask worker inside this process: 0.6 s."""
    monkeypatch.setattr(base_dataset, "in_notebook", lambda: True)


def opened(cache_dir, root=ADDRESS, kind=PTBXLDataset, **settings):
    if kind is PTBXLDataset:
        settings.setdefault("sampling_rate", 100)
    return kind(root, cache_dir=cache_dir, **settings)


def same_samples(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one["ecg_id"] == other["ecg_id"]
        assert one["patient_id"] == other["patient_id"]
        torch.testing.assert_close(one["ecg"], other["ecg"], rtol=0, atol=0)
        assert one["label"] == other["label"]


def test_ptbxl_in_a_store_is_what_it_is_on_the_disk(store, local, tmp_path):
    task = ECGBinaryClassification("NORM", **SHORT)
    theirs = opened(tmp_path / "a", local).set_task(task)
    remote = opened(tmp_path / "b")
    paths = remote.records()["record_path"]
    assert all(path.startswith(f"{ADDRESS}/records100/") for path in paths)
    same_samples(remote.set_task(task), theirs)


def test_ones_own_records_in_a_store(store, local, tmp_path):
    theirs = opened(tmp_path / "a", local, ECGFolderDataset)
    remote = opened(tmp_path / "b", ADDRESS, ECGFolderDataset)
    task = type(theirs.default_task)(**SHORT)
    same_samples(remote.set_task(task), theirs.set_task(task))


def test_a_record_that_is_not_in_the_store_is_named(store, tmp_path, local):
    lines = (local / "records.csv").read_text().splitlines()
    lines[3] = lines[3].replace("records100/", "records/")
    store.pipe("corpora/wrong/records.csv", "\n".join(lines).encode())
    store.copy("corpora/ptbxl/records100", "corpora/wrong/records100", recursive=True)
    with pytest.raises(ValueError, match=r"1 of \d+ rows .*line 4: records/.*missing"):
        opened(tmp_path, "s3://corpora/wrong", ECGFolderDataset)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(PTBXLDataset, "ptbxl_database.csv"), (ECGFolderDataset, "records.csv")],
)
def test_the_tables_are_copied_once_and_again_when_they_change(
    store, tmp_path, kind, name
):
    somebody = s3fs.S3FileSystem(skip_instance_cache=True)  # else: knows nothing of us
    table = somebody.cat(f"corpora/ptbxl/{name}")
    first, second = (opened(tmp_path, kind=kind) for _ in range(2))
    assert first.cache_dir == second.cache_dir
    try:
        rows = table.splitlines(keepends=True)
        somebody.pipe(f"corpora/ptbxl/{name}", b"".join(rows[:-1]))
        third, fourth = (opened(tmp_path, kind=kind) for _ in range(2))
        assert first.cache_dir != third.cache_dir == fourth.cache_dir
        assert len(third.records()) == len(first.records()) - 1
    finally:
        somebody.pipe(f"corpora/ptbxl/{name}", table)
    assert not [path for path in tmp_path.rglob("tables/*/*") if path.is_dir()]


def test_a_table_that_changes_while_it_is_copied_is_not_used(
    store, tmp_path, monkeypatch
):
    versions = itertools.count()
    monkeypatch.setattr(CorpusRoot, "_key", lambda self, name: str(next(versions)))
    store.pipe("corpora/busy/records.csv", b"record,patient,label\n")
    with pytest.raises(OSError, match="was changed while it was copied"):
        opened(tmp_path, "s3://corpora/busy", ECGFolderDataset)
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed"
)
def test_a_package_that_is_missing_for_a_store_is_named(tmp_path):
    with pytest.raises(ImportError, match=r"gs://corpora/ptbxl: .*gcsfs"):
        opened(tmp_path, "gs://corpora/ptbxl")


def test_a_run_says_which_corpus_it_was_trained_on(store, tmp_path):
    task = ECGBinaryClassification("NORM", **SHORT)
    assert prepare(opened(tmp_path), task).description["root"] == ADDRESS


def test_a_file_address_is_a_folder(local, tmp_path):
    assert CorpusRoot.of(f"file://{local}") == CorpusRoot.of(local)
    ours = opened(tmp_path, f"file://{local}").records()
    assert Path(ours["record_path"][0]).is_relative_to(local)


@pytest.mark.parametrize("lacking", ["ptbxl_database.csv", "scp_statements.csv"])
def test_a_table_that_is_missing_in_a_store_is_named(store, tmp_path, lacking):
    for name in {"ptbxl_database.csv", "scp_statements.csv"} - {lacking}:
        store.copy(f"corpora/ptbxl/{name}", f"corpora/{lacking}/{name}")
    with pytest.raises(FileNotFoundError, match=f"s3://corpora/{lacking}/{lacking} is"):
        opened(tmp_path, f"s3://corpora/{lacking}")


def test_a_rate_that_is_missing_in_a_store_is_told(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="no records500/ folder; pass sampli"):
        opened(tmp_path, sampling_rate=500)


def test_no_place_for_the_copies_is_told(store):
    with pytest.raises(ValueError, match="Pass cache_dir"):
        PTBXLDataset(ADDRESS, sampling_rate=100)


@pytest.mark.parametrize("address", ["ftp://host/a", "memory://a", "http://host/a"])
def test_another_kind_of_address_is_refused(address, tmp_path):
    with pytest.raises(ValueError, match="a folder, or an address of s3, gs, az"):
        opened(tmp_path, address)


def test_a_store_that_does_not_answer_is_told(store, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(OSError, match=f"{ADDRESS} cannot be read .*credentials"):
            opened(tmp_path)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("suffix", [".hea", ".dat"])
def test_a_missing_file_of_a_record_is_named(store, local, suffix):
    header = next(iter(sorted(local.rglob("*.hea"))))
    for end in {".hea", ".dat"} - {suffix}:
        content = header.with_suffix(end).read_bytes()
        store.pipe(f"corpora/half/{header.stem}{end}", content)
    if store.exists(f"corpora/half/{header.stem}{suffix}"):
        store.rm(f"corpora/half/{header.stem}{suffix}")
    path = f"s3://corpora/half/{header.stem}"
    with pytest.raises(MissingRecordError, match=f"the file {header.stem}{suffix} is"):
        ECGRecordProcessor(100).process(path)


def test_a_damaged_record_in_a_store_is_left_to_wfdb_and_named(store, local):
    header = next(iter(sorted(local.rglob("*.hea"))))
    store.pipe(f"corpora/cut/{header.stem}.hea", header.read_bytes())
    content = header.with_suffix(".dat").read_bytes()
    store.pipe(f"corpora/cut/{header.stem}.dat", content[:-6])
    with pytest.raises(RecordError, match=f"^s3://corpora/cut/{header.stem}: cannot"):
        ECGRecordProcessor(100).process(f"s3://corpora/cut/{header.stem}")


def test_a_record_of_another_format_in_a_store(store, tmp_path):
    signal = np.random.default_rng(0).normal(size=(2, 100)).round(2)
    write(tmp_path, signal, gain=100.0, fmt="212")
    for name in os.listdir(tmp_path):
        store.put(str(tmp_path / name), f"corpora/packed/{name}")
    out = ECGRecordProcessor(100, ["I", "II"]).process("s3://corpora/packed/r")
    np.testing.assert_allclose(out.numpy(), signal, atol=1e-6)
