"""Checkpoints of a training run: written whole or not at all, read without code."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["CheckpointError", "CheckpointFolder", "read_checkpoint", "write_whole"]

logger = logging.getLogger("pyhealth.trainer.bilevel")

PREFIX, SUFFIX, UNFINISHED = "step-", ".ckpt", ".unfinished"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which one and why.

    Examples:
        >>> raise CheckpointError("run.ckpt is truncated.")
        Traceback (most recent call last):
        pyhealth.bilevel.checkpoint.CheckpointError: run.ckpt is truncated.
    """


class CheckpointFolder:
    """A bounded number of checkpoints of one run, named by the steps they are after.

    Args:
        folder: where they lie; made by :meth:`prepare`.
        keep: how many are kept.

    Examples:
        >>> folder = CheckpointFolder("checkpoints")
        >>> folder.prepare(size=1000)
        >>> folder.write({"epoch": 3}, step=120).name
        'step-00000120.ckpt'
        >>> folder.newest()
        {'epoch': 3}
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.last: Path | None = None
        self._own: list[Path] = []

    def prepare(self, size: int) -> None:
        """Make the folder and see that checkpoints can be written.

        Args:
            size: of one checkpoint, bytes, roughly.

        Raises:
            OSError: if the folder cannot be written to or has too little space.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(f"*{UNFINISHED}"):  # of a killed run
                path.unlink()
            write_whole(self.folder / "writable", b"")
            (self.folder / "writable").unlink()
        except OSError as error:
            raise OSError(
                error.errno,
                f"Checkpoints cannot be written to {self.folder}: {error.strerror}. "
                "Choose another output folder.",
            ) from error
        needed, free = (self.keep + 1) * size, shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{self.folder} has {free / 1e6:.0f} MB free, and the checkpoints need "
                f"about {needed / 1e6:.0f} MB. Free some space or choose another "
                "output folder.",
            )

    def write(self, state: dict[str, object], step: int) -> Path:
        """Write a checkpoint, then remove what is more than ``keep``.

        Checkpoints of an earlier run in the same folder are removed too, once this run
        has one of its own.

        Args:
            state: tensors, numbers, texts, lists, tuples and dicts of them.
            step: steps taken so far.

        Returns:
            The file.

        Raises:
            OSError: if it cannot be written; earlier checkpoints are left as they are.
        """
        path = self.folder / f"{PREFIX}{step:08d}{SUFFIX}"
        content = io.BytesIO()
        torch.save(state, content)
        try:
            with content.getbuffer() as whole:
                write_whole(path, whole)
        except OSError as error:
            kept = f"{self.last} is whole" if self.last else "There is none before it"
            raise OSError(
                error.errno,
                f"The checkpoint {path} could not be written: {error.strerror}. "
                f"{kept}; free some space and go on with resume=True.",
            ) from error
        self._keep_only(path)
        return path

    def newest(self) -> dict[str, object] | None:
        """Return the newest checkpoint that can be read; None if there is none at all.

        Raises:
            CheckpointError: if there are some and none can be read.
        """
        paths = self._paths()
        for path in reversed(paths):
            try:
                return self.read(path)
            except CheckpointError as error:
                logger.warning("%s The one before it is used.", error)
        if paths:
            raise CheckpointError(
                f"None of the checkpoints in {self.folder} can be read. Remove them to "
                "start anew."
            )
        return None

    def read(self, path: str | Path) -> dict[str, object]:
        """Read a checkpoint to go on from.

        Args:
            path: file written by :meth:`write`, of this folder or of another one.

        Returns:
            What was written.

        Raises:
            CheckpointError: if it cannot be used.
        """
        state = read_checkpoint(path)
        self.last = Path(path)
        self._own = [path for path in self._paths() if path <= self.last]
        return state

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{PREFIX}*{SUFFIX}"))

    def _keep_only(self, written: Path) -> None:
        self.last = written
        self._own = [*(path for path in self._own if path != written), written]
        self._own = self._own[-self.keep :]
        for path in self._paths():
            if path not in self._own:
                path.unlink()


def read_checkpoint(path: str | Path) -> dict[str, object]:
    """Read a checkpoint without running any code that it may carry.

    Args:
        path: file to read.

    Returns:
        Its content, tensors on the CPU.

    Raises:
        CheckpointError: if it is missing, truncated, or more than data.

    Examples:
        >>> read_checkpoint("no.ckpt")
        Traceback (most recent call last):
        pyhealth.bilevel.checkpoint.CheckpointError: There is no checkpoint no.ckpt.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    # A zip's directory stands at its end, so a truncated file is none.
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated or no checkpoint.")
    _check_sums(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it holds more than data, and nothing of it was run. "
            "Use only checkpoints that this trainer wrote."
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{path} is no checkpoint of a bi-level run.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is no checkpoint of a bi-level run.")
    return state


def _check_sums(path: str | Path) -> None:
    # Before anything is unpickled: a changed pickle can raise anything, or load.
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a changed header, too, can raise anything
        raise CheckpointError(f"{path} is damaged.") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged.")


def write_whole(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file so that at any moment its old or its new content is there, whole.

    Args:
        path: file to write or replace.
        content: of the file.

    Raises:
        OSError: if it cannot be written; the old content is left as it is.

    Examples:
        >>> write_whole("note.txt", b"whole")
        >>> Path("note.txt").read_text()
        'whole'
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(FileNotFoundError):
            unfinished.unlink()
        raise
    # The rename itself is on the disk once the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
