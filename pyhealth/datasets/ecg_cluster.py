"""Samples prepared on a Dask cluster that is already there."""

from __future__ import annotations

import pickle
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from itertools import batched
from pathlib import Path

import litdata
import polars as pl
from dask.distributed import Client
from distributed.scheduler import KilledWorker
from tqdm import tqdm

from ..tasks.base_task import BaseTask
from ..utils import set_env
from .base_dataset import _litdata_merge, _proc_transform_fn, _task_transform_fn
from .dask_futures import as_completed

__all__ = ["process_on_cluster", "transform_on_cluster"]

#: Records, or patients, that a worker takes at a time: what is lost with one that dies.
PART_SIZE = 2000
#: PyHealth's writers tell their rank by the environment, which is the process's.
_ONE_AT_A_TIME = threading.Lock()
SCHEMA = "schema.pkl"


def transform_on_cluster(
    client: Client, task: BaseTask, events: pl.LazyFrame, output_dir: Path
) -> None:
    """Apply a task to the patients of an event table; PyHealth's ``_task_transform``.

    Args:
        client: of the cluster, whose workers see the same files.
        task: the task.
        events: the event table.
        output_dir: where the samples go.

    Raises:
        Exception: whatever the task raises; the samples are then removed.

    Examples:
        >>> transform_on_cluster(client, task, events, folder)  # doctest: +SKIP
    """
    patients = events.select("patient_id").unique().collect().to_series().sort()
    settings = pickle.dumps(task)
    arguments = [(settings, ids, events) for ids in batched(patients, PART_SIZE)]
    _run(client, _transform, arguments, output_dir)


def process_on_cluster(client: Client, task_df: Path, output_dir: Path) -> None:
    """Apply the processors to a task's samples; PyHealth's ``_proc_transform``.

    Args:
        client: of the cluster, whose workers see the same files.
        task_df: the task's samples.
        output_dir: where the processed samples go; holds the fitted processors.

    Raises:
        Exception: whatever a processor raises; the samples are then removed.

    Examples:
        >>> process_on_cluster(client, task_df, folder)  # doctest: +SKIP
    """
    total = len(litdata.StreamingDataset(str(task_df)))
    arguments = [
        (task_df, start, min(start + PART_SIZE, total))
        for start in range(0, total, PART_SIZE)
    ]
    _run(client, _process, arguments, output_dir)


def _run(
    client: Client,
    function: Callable[..., None],
    arguments: Sequence[tuple[object, ...]],
    output_dir: Path,
) -> None:
    # What goes on in a worker after a failure writes here, and nowhere else.
    attempt = output_dir / f"attempt-{uuid.uuid4()}"
    attempt.mkdir()
    ranks = range(len(arguments))
    futures = client.map(
        function, ranks, *zip(*arguments, strict=True), folder=attempt, pure=False
    )
    try:
        with tqdm(total=len(futures), desc="parts", unit="part") as bar:
            for future in as_completed(client, futures, "parts"):
                future.result()
                bar.update()
        for path in attempt.iterdir():
            if path.is_file():  # a folder is what a worker that died has begun
                path.replace(output_dir / path.name)
        shutil.rmtree(attempt, ignore_errors=True)
        with set_env(DATA_OPTIMIZER_NUM_WORKERS=str(len(futures))):
            _litdata_merge(output_dir)
    except BaseException as error:
        client.cancel(futures)
        shutil.rmtree(output_dir, ignore_errors=True)
        if isinstance(error, KilledWorker):
            raise OSError(
                f"{error.allowed_failures + 1} workers died while they prepared the "
                "same records (out of memory?). See the workers' logs."
            ) from error
        raise


def _transform(
    rank: int, task: bytes, ids: Sequence[str], events: pl.LazyFrame, *, folder: Path
) -> None:
    # PyHealth looks through the table once for 128 patients: better through this part.
    own = events.filter(pl.col("patient_id").is_in(ids)).collect().lazy()
    _written(folder, lambda part: _task_transform_fn((rank, task, ids, own, part)))


def _process(rank: int, task_df: Path, start: int, end: int, *, folder: Path) -> None:
    _written(folder, lambda part: _proc_transform_fn((rank, task_df, start, end, part)))


def _written(folder: Path, write: Callable[[Path], None]) -> None:
    """Write into a folder of one's own, then hand over what is whole.

    A worker that is taken for dead and is not writes beside the one in its place.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not there on {socket.gethostname()}: the workers must see "
            "cache_dir under the same path."
        )
    with _ONE_AT_A_TIME, tempfile.TemporaryDirectory(dir=folder) as name:
        own = Path(name)
        if (schema := folder.parent / SCHEMA).exists():
            shutil.copy(schema, own)
        with set_env(DATA_OPTIMIZER_NUM_WORKERS="1"):  # a part is whole with one list
            write(own)
        made = [path for path in own.iterdir() if path.name != SCHEMA]
        # The list of chunks last: it says that they are there.
        for path in sorted(made, key=lambda path: path.suffix == ".json"):
            path.replace(folder / path.name)
