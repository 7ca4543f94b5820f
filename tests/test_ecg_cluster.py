"""Samples prepared by a real Dask scheduler's workers, in processes of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import dask
import pytest
import torch
from dask.distributed import Client, LocalCluster

from pyhealth.datasets import base_dataset, ecg_cluster
from pyhealth.datasets.ptbxl import PTBXLDataset
from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl
from pyhealth.processors.ecg_record_processor import RecordError
from pyhealth.tasks.ecg_classification import ECGBinaryClassification
from pyhealth.tasks.ecg_task import ECGRecords

pytestmark = pytest.mark.slow  # processes that import PyHealth

SETTINGS = {"sampling_rate": 100, "length": 50}


class DeadlyRecords(ECGRecords):
    """Kills the process that reads the records, as often as is left in a file."""

    def __init__(self, left: Path):
        super().__init__("ptbxl", 100)
        self.left = str(left)

    def __call__(self, patient):
        if left := int(Path(self.left).read_text()):
            Path(self.left).write_text(str(left - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(patient)


class DeadlyTask(ECGBinaryClassification):
    def __init__(self, left: Path):
        self.left = left
        super().__init__("NORM", **SETTINGS)

    def records_task(self):
        return DeadlyRecords(self.left)


@pytest.fixture(scope="module")
def client():
    """Two workers, of which the second thread of each must not mix up the ranks."""
    settings = {"distributed.scheduler.allowed-failures": 1}
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=2, threads_per_worker=2, dashboard_address=None
        ) as cluster,
        Client(cluster.scheduler_address) as client,
    ):
        yield client


@pytest.fixture
def root(tmp_path):
    return write_synthetic_ptbxl(tmp_path / "data", 40, sampling_rates=[100])


@pytest.fixture
def opened(root, tmp_path, monkeypatch):
    """Return a dataset whose table is made; parts are small."""
    monkeypatch.setattr(ecg_cluster, "PART_SIZE", 3)

    def opened(name, client=None):
        dataset = PTBXLDataset(root, 100, cache_dir=tmp_path / name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base_dataset, "in_notebook", lambda: True)
            dataset.records()
        dataset.client = client
        return dataset

    return opened


def same_samples(ours, theirs):
    assert [s["ecg_id"] for s in ours] == [s["ecg_id"] for s in theirs]
    assert ours.patient_ids == theirs.patient_ids
    assert ours.labels == theirs.labels
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one["ecg"], other["ecg"], rtol=0, atol=0)


def test_a_cluster_prepares_what_one_process_does(opened, client):
    task = ECGBinaryClassification("NORM", **SETTINGS)
    theirs = opened("alone").set_task(task)
    dataset = opened("cluster", client)
    ours = dataset.set_task(task)
    same_samples(ours, theirs)
    assert len(list(Path(ours.path).glob("chunk-*.bin"))) == -(-len(ours) // 3)
    assert not [path for path in Path(ours.path).iterdir() if path.is_dir()]
    # And finds it there the next time, with or without the cluster.
    dataset.client = None
    assert dataset.set_task(task).path == ours.path


def test_a_folder_that_the_workers_do_not_see_is_named(opened, client, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"is not there on .* under the same path"
    ):
        ecg_cluster._written(tmp_path / "elsewhere", lambda part: None)


def test_a_relative_cache_is_the_same_for_workers_elsewhere(
    root, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert PTBXLDataset(root, 100, cache_dir="cache").cache_dir.is_absolute()


def test_a_worker_that_dies_loses_nothing(opened, client, tmp_path):
    theirs = opened("alone").set_task(ECGBinaryClassification("NORM", **SETTINGS))
    left = tmp_path / "left"
    left.write_text("1")
    ours = opened("cluster", client).set_task(DeadlyTask(left))
    assert left.read_text() == "0"
    same_samples(ours, theirs)


def test_records_that_kill_every_worker_are_given_up(opened, client, tmp_path):
    left = tmp_path / "left"
    left.write_text("100")
    dataset = opened("cluster", client)
    with pytest.raises(OSError, match="workers died while they prepared the same"):
        dataset.set_task(DeadlyTask(left))
    left.write_text("0")
    assert len(dataset.set_task(DeadlyTask(left))) == len(dataset.records())


def test_a_record_that_cannot_be_read_is_named_and_nothing_is_half_made(
    opened, client, root
):
    dataset = opened("cluster", client)
    path = sorted(root.rglob("*.dat"))[-1]
    content = path.read_bytes()
    path.write_bytes(content[:100])
    task = ECGBinaryClassification("NORM", **SETTINGS)
    with pytest.raises(RecordError, match=path.stem):
        dataset.set_task(task)
    assert not list(dataset.cache_dir.rglob("samples_*/index.json"))
    path.write_bytes(content)
    assert len(dataset.set_task(task)) == len(dataset.records())


def test_a_part_without_a_readable_record_is_left_out(opened, client, root):
    dataset = opened("cluster", client)
    table = dataset.records().sort("patient_id")
    first_part = table["patient_id"].unique().sort()[:3].to_list()
    lost = table.filter(table["patient_id"].is_in(first_part))
    for path in lost["record_path"]:
        Path(f"{path}.dat").unlink()
    samples = dataset.set_task(
        ECGBinaryClassification("NORM", on_error="skip", **SETTINGS)
    )
    assert sorted(dataset.skipped_records) == sorted(lost["ecg_id"])
    assert len(samples) == len(table) - len(lost)


def test_records_that_are_skipped_are_listed(opened, client, root):
    dataset = opened("cluster", client)
    path = sorted(root.rglob("*.dat"))[3]
    path.unlink()
    samples = dataset.set_task(
        ECGBinaryClassification("NORM", on_error="skip", **SETTINGS)
    )
    assert dataset.skipped_records == [4]
    assert len(samples) == len(dataset.records()) - 1
