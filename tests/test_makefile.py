"""The Makefile's targets, with stubs for the interpreters: nothing is installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

STUB = """#!/bin/sh
case "$1 $2" in
"-c "*) echo {version} "$0"; exit {status} ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") echo "$*" >>"{folder}/installs"; test ! -e "{folder}/offline" ;;
"-m ruff" | "-m mypy") echo "$*" >>"{folder}/checks"; test ! -e "{folder}/untidy" ;;
esac
"""
UV_STUB = """#!/bin/sh
case "$1" in
venv) for last; do :; done; mkdir -p "$last/bin"; cp "$5" "$last/bin/python" ;;
pip) echo "uv $*" >>"{folder}/installs" ;;
esac
"""


class Checkout:
    """A folder with the Makefile and a PATH whose interpreters are stubs."""

    def __init__(self, folder):
        self.folder = folder
        self.stubs = folder / "stubs"
        (folder / "pyhealth").mkdir()
        (folder / "home").mkdir()
        for name in ("Makefile", "setup.py", "pyproject.toml"):
            shutil.copy2(ROOT / name, folder)
        for name in ("python3.13", "python3.12", "python3"):
            self.stub(self.stubs / name, version="3.9")
        self.stub(self.stubs / "uv", "#!/bin/sh\nexit 1\n")

    def stub(self, path, text=STUB, version="3.9", status=0):
        """Write a stub; with a status it fails as an unselected pyenv version does."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = text.format(folder=self.folder, version=version, status=status)
        path.write_text(text)
        path.chmod(0o755)

    def make(self, *arguments):
        """Run make here with the stubs in front on PATH."""
        return subprocess.run(
            [shutil.which("make"), *arguments],
            cwd=self.folder,
            env={
                "PATH": f"{self.stubs}:{os.defpath}",
                "HOME": str(self.folder / "home"),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installs(self):
        """The install commands so far."""
        return self._log("installs")

    def checks(self):
        """The style checks so far."""
        return self._log("checks")

    def _log(self, name):
        log = self.folder / name
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def checkout(tmp_path):
    """A stubbed checkout; without make there is no Makefile to test."""
    if shutil.which("make") is None:
        pytest.skip("make is not on PATH")
    return Checkout(tmp_path)


def test_make_says_what_is_missing_when_no_interpreter_fits(checkout):
    done = checkout.make("demo")
    assert done.returncode != 0
    assert "no Python 3.12 or 3.13 found" in done.stderr
    assert "make demo PYTHON=/path/to/python3.13" in done.stderr
    assert not (checkout.folder / ".venv").exists()
    assert not checkout.installs()


@pytest.mark.parametrize(
    "fitting",
    ["stubs/python3.12", "stubs/python3", "home/.pyenv/versions/3.13.1/bin/python"],
)
def test_make_passes_over_interpreters_that_do_not_run(checkout, fitting):
    checkout.stub(checkout.stubs / "python3.13", version="3.13", status=127)
    checkout.stub(checkout.folder / fitting, version="3.12")
    done = checkout.make("venv")
    assert done.returncode == 0, done.stderr
    assert fitting.rpartition("/")[2] in done.stdout
    assert len(checkout.installs()) == 1


def test_make_uses_uv_where_it_runs(checkout):
    checkout.stub(checkout.stubs / "python3.13", version="3.13")
    checkout.stub(checkout.stubs / "uv", UV_STUB)
    assert checkout.make("venv").returncode == 0
    (install,) = checkout.installs()
    assert install.startswith("uv pip install")
    assert "--compile-bytecode -e .[test]" in install


def test_make_installs_once_and_again_when_the_requirements_change(checkout):
    checkout.stub(checkout.stubs / "python3.13", version="3.13")
    (checkout.folder / "build").mkdir()
    assert checkout.make("venv").returncode == 0
    assert checkout.make("venv").returncode == 0
    assert len(checkout.installs()) == 1
    assert not (checkout.folder / "build").exists()
    stamp = checkout.folder / ".venv/.installed"
    later = stamp.stat().st_mtime + 10
    os.utime(checkout.folder / "pyproject.toml", (later, later))
    os.utime(stamp, (later - 5, later - 5))
    kept = checkout.folder / ".venv/kept"
    kept.touch()
    assert checkout.make("venv").returncode == 0
    assert len(checkout.installs()) == 2
    assert kept.exists()  # brought up to date in place


def test_make_repairs_an_interrupted_install(checkout):
    checkout.stub(checkout.stubs / "python3.13", version="3.13")
    (checkout.folder / "offline").touch()
    assert checkout.make("venv").returncode != 0
    half = checkout.folder / ".venv/lib/half"
    half.mkdir(parents=True)
    (checkout.folder / "offline").unlink()
    assert checkout.make("venv").returncode == 0
    assert not half.exists()
    assert len(checkout.installs()) == 2


@pytest.mark.parametrize("harm", ["moved checkout", "lost interpreter"])
def test_make_replaces_an_environment_that_no_longer_fits(checkout, harm):
    checkout.stub(checkout.stubs / "python3.13", version="3.13")
    assert checkout.make("venv").returncode == 0
    old = checkout.folder / ".venv/old"
    old.touch()
    if harm == "moved checkout":
        (checkout.folder / ".venv/.installed").write_text("/elsewhere\n")
    else:
        (checkout.folder / ".venv/bin/python").unlink()
    assert checkout.make("venv").returncode == 0
    assert not old.exists()
    assert len(checkout.installs()) == 2


def test_make_installs_into_an_environment_made_by_hand(checkout):
    checkout.stub(checkout.folder / ".venv/bin/python", version="3.13")
    theirs = checkout.folder / ".venv/theirs"
    theirs.touch()
    assert checkout.make("venv").returncode == 0
    assert theirs.exists()
    assert len(checkout.installs()) == 1


def test_make_help_lists_all_targets(checkout):
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    done = checkout.make("help")
    listed = re.findall(r"^make ([a-z-]+) +\S", done.stdout, flags=re.MULTILINE)
    assert set(listed) == set(phony.split()) - {"outdated"}  # a prerequisite only


def test_the_commit_hook_runs_the_checks_of_make_lint(checkout):
    checkout.stub(checkout.stubs / "python3.13", version="3.13")
    assert checkout.make("lint").returncode == 0
    checks = checkout.checks()
    assert [line.split()[1:3] for line in checks] == [
        ["ruff", "check"],
        ["ruff", "format"],
        ["mypy"],
    ]

    folder = checkout.folder
    shutil.copy2(ROOT / ".pre-commit-config.yaml", folder)
    environment = {
        "PATH": f"{checkout.stubs}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "PIP_NO_INDEX": "1",
    }

    def commit_hooks():
        return subprocess.run(
            [sys.executable, "-m", "pre_commit", "run", "--all-files"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    subprocess.run(["git", "init", "-q"], cwd=folder, env=environment, check=True)
    add = ["git", "add", "Makefile", ".pre-commit-config.yaml"]
    subprocess.run(add, cwd=folder, env=environment, check=True)
    done = commit_hooks()
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkout.checks() == checks * 2
    (folder / "untidy").touch()  # what the checks find stops the commit
    assert commit_hooks().returncode != 0


def test_the_release_checklist_names_targets_and_changes_the_version(checkout):
    text = (ROOT / "docs/releasing.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"\bmake ([a-z-]+)$", text, flags=re.MULTILINE)
    assert {"test", "dist", "demo"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    for name in ("CITATION.cff", "CHANGELOG.md"):
        shutil.copy2(ROOT / name, checkout.folder)
    for command in re.findall(r"^ +(sed .*)$", text, flags=re.MULTILINE):
        subprocess.run(command, shell=True, cwd=checkout.folder, check=True)
    for name, line in (
        ("pyproject.toml", r'version = "0\.2\.0"'),
        ("CITATION.cff", r"version: 0\.2\.0"),
        ("CHANGELOG.md", r"## \[0\.2\.0\] - \d{4}-\d\d-\d\d"),
    ):
        changed = (checkout.folder / name).read_text()
        assert len(re.findall(rf"^{line}$", changed, flags=re.MULTILINE)) == 1
