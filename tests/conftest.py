"""Shared, read-only things that are slow to make, made once a session.

PyHealth is imported where it is used: what only hands tests out need not wait for it.
"""

import logging
import os
import shutil

# Before litdata is imported: it would ask a registry for its newest version.
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
# Before torch is, here and in what tests start: the networks are tiny, and more threads
# cost time, a great deal of it where they spin while other tests use the cores.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
from filelock import FileLock


@pytest.fixture(autouse=True, scope="session")
def events_are_read_in_this_process():
    """As in notebooks: a worker process would first import PyHealth, for seconds.

    Programs that tests start have worker processes, if they do not say otherwise.
    """
    from dask.distributed import LocalCluster

    from pyhealth.datasets import base_dataset

    def cluster(**settings):
        return LocalCluster(**settings | {"processes": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_dataset, "DaskCluster", cluster)
        yield


@pytest.fixture(autouse=True, scope="module")
def usual_log_levels():
    """A program sets the levels of its process; the next file's tests read the log."""
    loggers = [
        logging.getLogger(name) for name in ("pyhealth", "pyhealth.trainer.bilevel")
    ]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def no_log_files():
    """PyHealth's Trainer never takes its log files back."""
    yield
    logger = logging.getLogger("pyhealth.trainer")
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One PyHealth cache for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A synthetic PTB-XL of 200 patients at both rates. Never write into it."""
    from pyhealth.datasets.ptbxl_synthetic import write_synthetic_ptbxl

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one for all workers
        folder = folder.parent
    with FileLock(folder / "ptbxl.lock"):
        if not (folder / "ptbxl").exists():
            made = write_synthetic_ptbxl(folder / "unfinished", 200, seed=0)
            made.rename(folder / "ptbxl")
    return folder / "ptbxl"


@pytest.fixture(scope="session")
def dataset(corpus, cache_dir):
    """The synthetic corpus at 100 Hz, its event table built."""
    from pyhealth.datasets.ptbxl import PTBXLDataset

    dataset = PTBXLDataset(corpus, sampling_rate=100, cache_dir=cache_dir)
    dataset.records()
    return dataset


@pytest.fixture(scope="session")
def parts(dataset):
    """Train, validation and test samples of MI, two seconds at 100 Hz."""
    from pyhealth.datasets.ptbxl import StratFoldSplit
    from pyhealth.tasks.ecg_classification import ECGBinaryClassification

    task = ECGBinaryClassification("MI", sampling_rate=100, length=200)
    return dataset.set_task(task, split=StratFoldSplit())


@pytest.fixture(scope="session")
def browser():
    """A real browser, without a window."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        yield made
        made.close()
