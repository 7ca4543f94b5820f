"""What fuzzing has found, and a little more of it each time."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
from fuzz.targets import FUZZ, TARGETS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_stays_mended(name):
    found = sorted((FUZZ / "corpus" / name).iterdir())
    assert len(found) >= 5
    for path in found:
        TARGETS[name](path.read_bytes())


@pytest.mark.parametrize(("name", "runs"), [("header", 1000), ("scp_codes", 100_000)])
def test_nothing_new_is_found_at_once(name, runs, tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; it has no wheel for this machine")
    corpus = shutil.copytree(FUZZ / "corpus" / name, tmp_path / "corpus")
    command = [sys.executable, str(FUZZ / "targets.py"), name, f"-runs={runs}"]
    done = subprocess.run(
        [*command, "-seed=1", "-detect_leaks=0", str(corpus)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    told = f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, told
    (count,) = re.findall(r"Done (\d+) runs", done.stderr)
    assert int(count) >= runs  # the corpus is run in any case
