"""Waiting for what another process does."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest


def until(happened: Callable[[], bool], pid: int) -> None:
    """Return when it has happened; the process must not end before.

    Looking without a pause would take a core from the very process.
    """
    process = psutil.Process(pid)
    while not happened():
        with pytest.raises(psutil.TimeoutExpired):
            process.wait(timeout=0.02)
