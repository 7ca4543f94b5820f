"""Checkpoint files: whole or not there, data and never code, a bounded number."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pyhealth.bilevel.checkpoint import (
    CheckpointError,
    CheckpointFolder,
    read_checkpoint,
    write_whole,
)
from pyhealth.bilevel.loader_position import (
    LoaderPosition,
    global_random_state,
    set_global_random_state,
)
from pyhealth.datasets import create_sample_dataset, get_dataloader


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.prepare(size=1000)
    return folder


def names(folder):
    return sorted(path.name for path in folder.folder.iterdir())


# Writing


def test_the_newest_few_are_kept(folder):
    for step in (1, 9, 10, 100):
        folder.write({"step": step}, step)
    assert names(folder) == ["step-00000010.ckpt", "step-00000100.ckpt"]
    assert folder.newest() == {"step": 100}


def test_a_step_may_be_written_twice(folder):
    for value in ("before", "after"):
        folder.write({"at": value}, 5)
    assert names(folder) == ["step-00000005.ckpt"]
    assert folder.newest() == {"at": "after"}


def test_a_run_that_starts_anew_replaces_an_earlier_ones_checkpoints(folder):
    for step in (50, 60):
        folder.write({"run": "old"}, step)
    anew = CheckpointFolder(folder.folder)
    anew.prepare(size=1000)
    assert len(names(folder)) == 2
    anew.write({"run": "new"}, 0)
    assert folder.newest() == {"run": "new"}


def test_a_run_that_goes_on_keeps_the_one_before(folder):
    for step in (1, 2):
        folder.write({"step": step}, step)
    resumed = CheckpointFolder(folder.folder)
    assert resumed.newest() == {"step": 2}
    resumed.write({"step": 3}, 3)
    assert names(folder) == ["step-00000002.ckpt", "step-00000003.ckpt"]


def test_one_content_or_the_other_is_there_at_every_moment(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    write_whole(path, b"old")

    def spied(original):
        def spy(*args):
            seen.append(path.read_bytes())
            original(*args)
            seen.append(path.read_bytes())

        return spy

    for name in ("fsync", "replace", "close"):
        monkeypatch.setattr(os, name, spied(getattr(os, name)))
    write_whole(path, b"new")
    # fsync of the file, replace, fsync and close of the folder; before and after each
    assert seen == [b"old"] * 3 + [b"new"] * 5
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_last_good_one(folder, monkeypatch):
    folder.write({"step": 1}, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"step-00000002.*No space left.*00000001.ckpt is whole.*free"
        ) as caught:
            folder.write({"step": 2}, 2)
    assert caught.value.errno == errno.ENOSPC
    assert names(folder) == ["step-00000001.ckpt"]  # nothing unfinished either
    assert folder.newest() == {"step": 1}


def test_a_file_that_may_not_grow_leaves_the_last_good_one(folder):
    """The kernel itself cuts the write off in its middle."""
    folder.write({"weights": torch.zeros(10)}, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match="could not be written: File too large"):
            folder.write({"weights": torch.zeros(100_000)}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(folder) == ["step-00000001.ckpt"]
    assert folder.newest()["weights"].shape == (10,)


def test_too_little_space_is_seen_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.prepare(size=900_000)
    with pytest.raises(OSError, match=r"has 3 MB free.*need about 3 MB") as caught:
        folder.prepare(size=1_000_000)
    assert caught.value.errno == errno.ENOSPC


def test_a_folder_that_cannot_be_written_to_is_seen_before_training(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written to .*file.*Choose another"):
        CheckpointFolder(tmp_path / "file").prepare(size=1)

    def refuse(*args, **kwargs):  # root may write anywhere, so permissions are no test
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(OSError, match=r"cannot be written.*Permission denied"):
        CheckpointFolder(tmp_path / "read_only").prepare(size=1)


def test_what_a_killed_run_left_unfinished_is_removed(folder):
    folder.write({"step": 1}, 1)
    (folder.folder / "step-00000002.ckpt.77.unfinished").write_bytes(b"half")
    folder.prepare(size=1)
    assert names(folder) == ["step-00000001.ckpt"]


# Reading


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def carrying_code(path, proof):
    torch.save({"state": Code(proof)}, path)


def test_a_file_that_carries_code_is_refused_and_the_code_does_not_run(tmp_path):
    path, proof = tmp_path / "step-00000001.ckpt", tmp_path / "proof"
    carrying_code(path, proof)
    with pytest.raises(CheckpointError, match=r"was refused.*nothing of it was run"):
        read_checkpoint(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # so the file does carry code


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path):
    path, proof = tmp_path / "bare.ckpt", tmp_path / "proof"
    path.write_bytes(pickle.dumps(Code(proof)))
    with pytest.raises(CheckpointError, match="truncated or no checkpoint"):
        read_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_told(folder, share):
    path = folder.write({"weights": torch.arange(1000)}, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        CheckpointError, match=r"^\S+step-00000001.ckpt is truncated or no checkpoint.$"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize("entry", ["data.pkl", "data/0"])
@pytest.mark.parametrize("seed", range(20))
def test_changed_bytes_are_told(folder, entry, seed):
    path = folder.write({"weights": torch.arange(1000)}, 1)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        changed = next(i for i in archive.infolist() if i.filename.endswith(entry))
    generator = random.Random(seed)
    start = changed.header_offset + generator.randrange(200)
    content[start : start + 200] = generator.randbytes(200)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^\S+step-00000001.ckpt is damaged.$"):
        read_checkpoint(path)


def test_another_zip_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("note.txt", "hello")
    with pytest.raises(CheckpointError, match="no checkpoint of a bi-level run"):
        read_checkpoint(tmp_path / "other.zip")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*none.ckpt"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_something_else_that_torch_can_read_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint of a bi-level run"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_where_the_newest_is_damaged_the_one_before_is_used(folder, caplog):
    folder.write({"step": 1}, 1)
    folder.write({"step": 2}, 2).write_bytes(b"damaged")
    logger = logging.getLogger("pyhealth.trainer.bilevel")  # does not propagate
    logger.addHandler(caplog.handler)
    try:
        assert folder.newest() == {"step": 1}
    finally:
        logger.removeHandler(caplog.handler)
    assert "step-00000002.ckpt is truncated" in caplog.text
    assert folder.last.name == "step-00000001.ckpt"


def test_where_all_are_damaged_the_run_does_not_silently_start_anew(folder):
    folder.write({"step": 1}, 1).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"None of the checkpoints.*Remove them"):
        folder.newest()


def test_no_checkpoint_is_no_error(folder):
    assert folder.newest() is None


# Where a loader stands


class Numbers(Dataset):
    """Items with noise from each of the three global generators."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        noise = torch.rand(()).item() + np.random.rand() + random.random()
        return torch.tensor([index, noise], dtype=torch.float64)


def samples():
    return create_sample_dataset(
        [{"patient_id": str(i), "x": [float(i)], "y": i % 2} for i in range(20)],
        {"x": "tensor"},
        {"y": "binary"},
    )


LOADERS = {
    "pyhealth": lambda seed: get_dataloader(samples(), 3, shuffle=True, seed=seed),
    "pyhealth, in order": lambda seed: get_dataloader(samples(), 3),
    "global": lambda seed: DataLoader(Numbers(), 3, shuffle=True),
    "generator": lambda seed: DataLoader(
        Numbers(), 3, shuffle=True, generator=torch.Generator().manual_seed(seed)
    ),
    "sampler": lambda seed: DataLoader(
        Numbers(),
        3,
        sampler=torch.utils.data.RandomSampler(
            Numbers(),
            replacement=True,
            num_samples=100,
            generator=torch.Generator().manual_seed(seed),
        ),
    ),
}


def shown(batches):
    return [
        batch["patient_id"] if isinstance(batch, dict) else batch.tolist()
        for batch in batches
    ]


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 15])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_goes_on_from_any_batch_to_the_bit(kind, taken):
    torch.manual_seed(5)
    position = LoaderPosition(LOADERS[kind](1))
    batches = position.endless()
    for _ in range(taken):
        next(batches)
    torch.rand(3)  # others use the global generator too
    state, of_globals = position.state_dict(), global_random_state()
    expected = shown(next(batches) for _ in range(10))

    torch.manual_seed(77)
    resumed = LoaderPosition(LOADERS[kind](2))  # another seed: the state decides
    resumed.load_state_dict(state)
    set_global_random_state(of_globals)
    rest = resumed.endless()
    assert shown(next(rest) for _ in range(10)) == expected
    assert len(set(map(str, expected))) > 6


def test_a_loader_without_batches_is_an_error():
    position = LoaderPosition(DataLoader([], 3))
    with pytest.raises(ValueError, match="no batch"):
        next(position.endless())
