"""The runs of a study on the cores of this machine, or on a Dask cluster."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dask
import torch
from dask.distributed import Client, Future, LocalCluster, get_worker
from distributed.scheduler import KilledWorker
from filelock import FileLock
from tqdm import tqdm

from ...datasets.dask_futures import as_completed
from .data import PreparedData
from .jobs import Job, StudyPlan, settings_of_job
from .run import run
from .run_folder import check_same_run, configuration_of

__all__ = ["Outcome", "client_of", "run_study"]

#: Torch's generators and threads belong to the process, so a process runs one job.
_ONE_AT_A_TIME = threading.Lock()
#: What a worker process finds in its environment before it starts.
_ENVIRONMENT = {"LITDATA_DISABLE_VERSION_CHECK": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: the job.
        state: "done", "failed", or "left out" because one that it needs failed.
        message: its test AUROC, or what went wrong and where to read on.

    Examples:
        >>> print(Outcome(Job("MI", 0, 0, "A"), "done", "AUROC 0.812, 40 s"))
        MI/all/A/seed_0: AUROC 0.812, 40 s
    """

    job: Job
    state: str
    message: str

    def __str__(self) -> str:
        prefix = "" if self.state == "done" else f"{self.state}: "
        return f"{self.job.name}: {prefix}{self.message}"


@contextlib.contextmanager
def client_of(
    scheduler: str | None = None, workers: int | None = None
) -> Iterator[tuple[Client, int]]:
    """Connect to a running Dask scheduler, or start workers on this machine.

    Args:
        scheduler: address of a running one, such as "tcp://host:8786".
        workers: processes to start here; default one a core, or one where there is a
            GPU. With a scheduler, ignored.

    Yields:
        The client, and the torch threads of a job (0: those of the worker's cores).

    Raises:
        OSError: if no scheduler answers.

    Examples:
        >>> with client_of(workers=2) as (client, threads):  # doctest: +SKIP
        ...     run_study(plan, prepare_part, "output", client, threads)
    """
    if scheduler is not None:
        with Client(scheduler) as client:
            yield client, 0
        return
    cores = _cores()
    # A computer that slept for minutes must not count its workers as dead.
    dask.config.set({"distributed.scheduler.worker-ttl": None})
    workers = workers or (1 if torch.cuda.is_available() else cores)
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=":0",
            memory_limit=0,
            env=_ENVIRONMENT,
            silence_logs=logging.WARNING,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client, max(1, cores // workers)


def run_study(
    plan: StudyPlan,
    prepare: Callable[[str, int, int], PreparedData],
    folder: str | Path,
    client: Client,
    threads: int = 1,
    say: Callable[[str], None] = tqdm.write,
) -> list[Outcome]:
    """Run what is missing of a study.

    Every run is kept in a folder of its own, so a study that was stopped goes on where
    it was, with the same arguments. A job that raises is reported and its log kept; a
    worker that dies loses at most an epoch, another one goes on with its job.

    Args:
        plan: what to run.
        prepare: returns the data of a task, a cohort size (0: all) and a seed.
        folder: of the study, which the workers must see under the same path.
        client: of the Dask cluster.
        threads: torch threads of a job; 0 for those of the worker's cores.
        say: takes one line a job.

    Returns:
        How each job ended, in the order of the plan.

    Raises:
        ValueError: if a run in the folder was made with other settings or data.
        OSError: if all workers are gone.

    Examples:
        >>> run_study(plan, prepare, "output", client)  # doctest: +SKIP
    """
    folder = Path(folder).resolve()
    outcomes: dict[Job, Outcome] = {}
    futures: dict[Job, Future[Outcome]] = {}
    jobs = plan.jobs()
    data: dict[tuple[str, int, int], PreparedData] = {}
    for job in jobs:
        part = (job.task, job.n_records, job.seed)
        if part not in data:
            data = {part: prepare(*part)}  # the jobs of a part come one after another
        if _is_done(job, plan, data[part], folder):
            outcomes[job] = _outcome(job, folder)
            continue
        needed = [futures[other] for other in job.needs if other in futures]
        futures[job] = client.submit(
            _run_job,
            job,
            plan,
            data[part],
            folder,
            threads,
            needed,
            key=f"{folder}/{job.name}",
            pure=False,
        )
    with tqdm(total=len(jobs), initial=len(outcomes), desc="runs", unit="run") as bar:
        job_of = {future: job for job, future in futures.items()}
        for future in as_completed(client, list(job_of), "runs"):
            job = job_of.pop(future)
            outcome = _result(future, job, folder)
            # Let go of it: what is done is not done again where its worker dies.
            del futures[job]
            outcomes[outcome.job] = outcome
            say(str(outcome))
            bar.update()
    return [outcomes[job] for job in jobs]


def _is_done(job: Job, plan: StudyPlan, data: PreparedData, folder: Path) -> bool:
    target = folder / job.name
    if not (target / "metrics.json").exists():
        return False
    if all((folder / needed.name / "metrics.json").exists() for needed in job.needs):
        settings = settings_of_job(job, plan, folder)
        wanted = configuration_of(settings, data)
        # What follows from D's seconds is another number where D was run again.
        derived = ("max_seconds", "search_seconds") if job.needs else ()
        allowed = ("device", *derived)
        check_same_run(target / "config.json", wanted, may_differ=allowed)
    return True


def _result(future: Future[Outcome], job: Job, folder: Path) -> Outcome:
    try:
        return future.result()
    except KilledWorker as error:
        if missing := _missing(job, folder):  # the one that it needs was killed
            return Outcome(job, "left out", f"it needs {', '.join(missing)}")
        message = (
            f"{error.allowed_failures + 1} workers died in it (out of memory?); its "
            f"log is {folder / job.name / 'run.log'}"
        )
        return Outcome(job, "failed", message)


def _missing(job: Job, folder: Path) -> list[str]:
    return [
        needed.name
        for needed in job.needs
        if not (folder / needed.name / "metrics.json").exists()
    ]


def _outcome(job: Job, folder: Path) -> Outcome:
    metrics = json.loads((folder / job.name / "metrics.json").read_text())
    area = metrics["test"]["roc_auc"]
    shown = "one class only" if area is None else f"AUROC {area:.3f}"
    return Outcome(job, "done", f"{shown}, {metrics['seconds']:.0f} s")


def _run_job(
    job: Job,
    plan: StudyPlan,
    data: PreparedData,
    folder: Path,
    threads: int,
    needed: list[Outcome],
) -> Outcome:
    """Run one job in a worker; ``needed`` is there for Dask to do those jobs before."""
    if missing := _missing(job, folder):
        return Outcome(job, "left out", f"it needs {', '.join(missing)}")
    target = folder / job.name
    target.mkdir(parents=True, exist_ok=True)
    # A client that left and came back may find its earlier self's job still running.
    lock = FileLock(target / "run.lock")
    with _ONE_AT_A_TIME, lock, _logged_to(target / "run.log"):
        if (target / "metrics.json").exists():
            return _outcome(job, folder)
        torch.set_num_threads(threads or _threads_of_worker())
        try:
            settings = settings_of_job(job, plan, folder)
            first = job.seed == plan.seeds[0]  # the others' would look much the same
            run(settings, data, target, resume=True, pictures=first)
        except Exception as error:  # noqa: BLE001
            # Whatever it is, it is reported with its log, and the other jobs go on.
            traceback.print_exc()
            message = f"{type(error).__name__}: {error} ({target / 'run.log'})"
            return Outcome(job, "failed", message)
    return _outcome(job, folder)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # a batch system may give a part of them
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads_of_worker() -> int:
    return max(1, _cores() // get_worker().state.nthreads)


@contextlib.contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Send everything that a job says to its log."""
    logger = logging.getLogger("pyhealth")
    with path.open("a") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        before, logger.handlers = logger.handlers, [handler]
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            logger.handlers = before
