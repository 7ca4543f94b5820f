"""What is run in a copy of PyHealth: imports, tests, lint, documentation, the patch.

Each check takes a laid tree, and a folder where it writes, and returns what it found.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from upstream_files import TESTS, exported_names, module_of, pages_by_section
from upstream_tree import UpstreamTree, copy_pyhealth

__all__ = [
    "Finding",
    "documentation",
    "imports",
    "lint",
    "our_tests",
    "patch_applies",
    "pull_request_gate",
    "pyhealth_tests",
]

HERE = Path(__file__).resolve().parent
#: Packages of PyHealth whose tests our files could break.
TOUCHED = r"\bpyhealth\.(datasets|tasks|models|processors|trainer)\b"
FEW_FILES = 8
TWO_PROCESSES = ["-n", "2", "--dist", "loadfile"]
CORPORA = ("PTBXL_ROOT", "PTBXL100_ROOT")
#: PyHealth's documented rules: ruff's usual ones, PEP 8's warnings, 88 columns.
RULES = ["--isolated", "--line-length=88", "--extend-select=E501,W"]


@dataclass
class Finding:
    """What a check found: faults, none if it passes, and what else is worth saying."""

    faults: list[str] = field(default_factory=list)
    note: str = ""


def run(
    command: list[str | Path], tree: Path, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command that imports PyHealth from the tree only, and without a corpus."""
    environment = {k: v for k, v in os.environ.items() if k not in CORPORA}
    paths = (HERE / "upstream_guard", tree)
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "UPSTREAM_TREE": str(tree),
        "LITDATA_DISABLE_VERSION_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def imports(tree: UpstreamTree, folder: Path) -> Finding:
    """Our modules come from the copy, PyHealth offers our names, the examples run."""
    modules = [
        module_of(name)
        for name in tree.new
        if name.startswith("pyhealth/") and name.endswith(".py")
    ]
    wanted, found = folder / "imports.json", folder / "faults.json"
    wanted.write_text(json.dumps({"modules": modules, "exports": exported_names()}))
    script = HERE / "upstream_imports.py"
    done = run([sys.executable, script, tree.root, wanted, found], tree.root, tree.root)
    faults = json.loads(found.read_text()) if found.is_file() else _faults(done)
    return Finding(faults, f"{len(modules)} modules")


def our_tests(tree: UpstreamTree, arguments: list[str]) -> Finding:
    """Our tests pass in the copy, on invented data only.

    Args:
        tree: the laid tree.
        arguments: of pytest, files below ``tests/``; if empty, the tests that are not
            slow.
    """
    folder = tree.root / TESTS
    chosen = [argument.removeprefix("tests/") for argument in arguments]
    # A second process takes longer to start than a few files take.
    return _pytest(tree.root, folder, chosen or [*TWO_PROCESSES, "-m", "not slow"])


def pyhealth_tests(tree: UpstreamTree, source: str | None, folder: Path) -> Finding:
    """PyHealth's tests of what our files touch pass as they do without our files."""
    files = pyhealth_test_files(tree.root)
    if not files:
        return Finding(note="this PyHealth comes without tests: none were run")
    processes = TWO_PROCESSES if len(files) > FEW_FILES else []
    found = _pytest(tree.root, tree.root, [*files, *processes])
    if found.faults:
        plain = folder / "plain"
        copy_pyhealth(plain, source)
        failed = _failures(found.faults)
        known = _failures(_pytest(plain, plain, failed).faults)
        found.note += f"; {len(known)} fail without our files, too, and do not count"
        found.faults = sorted(set(failed) - set(known))
    return found


def pyhealth_test_files(root: Path) -> list[str]:
    """Return PyHealth's test files that import what our files touch."""
    return [
        path.relative_to(root).as_posix()
        for path in sorted((root / "tests").rglob("test_*.py"))
        if not path.is_relative_to(root / TESTS)
        and re.search(TOUCHED, path.read_text(encoding="utf-8"))
    ]


def lint(tree: UpstreamTree) -> Finding:
    """Ruff finds nothing in our files, nor in lines added to PyHealth's."""
    rules = [] if _has_ruff_settings(tree.root) else RULES
    ours = [n for n in tree.new if n.startswith("pyhealth/") and n.endswith(".py")]
    theirs = [name for name in tree.changed if name.endswith(".py")]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache"]
    command += ["--output-format=json", *rules, *ours, *theirs]
    done = run(command, tree.root, tree.root)
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        return Finding([done.stdout.strip()])
    faults = []
    for fault in found:
        name = Path(fault["filename"]).relative_to(tree.root.resolve()).as_posix()
        row = fault["location"]["row"]
        if name in tree.new or row in _added_rows(*tree.changed[name]):
            faults.append(f"{name}:{row}: {fault['code']} {fault['message']}")
    return Finding(faults, "PyHealth's settings" if not rules else " ".join(rules))


def documentation(tree: UpstreamTree, folder: Path) -> Finding:
    """Sphinx builds our pages without a warning, with autodoc as PyHealth sets it."""
    source = folder / "docs"
    for name in tree.new:
        if name.startswith("docs/"):
            copy = source / name.removeprefix("docs/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree.root / name, copy)
    sections = pages_by_section(tree.new)
    for section, entries in sections.items():
        page = source / f"api/{section}.rst"
        if not page.exists():  # PyHealth's: only our part of it is built
            page.write_text(_toctree(section, entries))
    index = _toctree("PyHealth", [f"api/{section}" for section in sections])
    (source / "index.rst").write_text(index)
    (source / "conf.py").write_text(SPHINX_SETTINGS)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    done = run([*command, source, folder / "html"], tree.root, tree.root)
    faults = [line for line in _faults(done) if LISTED_TWICE not in line]
    return Finding(faults, f"{sum(map(len, sections.values()))} pages")


#: What PyHealth's docs/conf.py sets for the extensions that our pages need.
SPHINX_SETTINGS = """\
project = "PyHealth"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
napoleon_use_rtype = True
napoleon_use_param = True
"""
#: An attribute that stands in a docstring's Attributes section and in the class. With
#: these settings Sphinx says so of PyHealth's own classes, too.
LISTED_TWICE = "WARNING: duplicate object description"


def patch_applies(tree: UpstreamTree, source: str | None, folder: Path) -> Finding:
    """``git apply`` makes the laid tree out of a fresh copy of PyHealth."""
    patch, fresh = folder / "merge.patch", folder / "fresh"
    patch.write_bytes(tree.patch().encode())
    copy_pyhealth(fresh, source)
    # A repository of its own: inside another one git would pass over these files.
    subprocess.run(["git", "init", "--quiet"], cwd=fresh, check=True)
    done = run(["git", "apply", "--whitespace=nowarn", patch], tree.root, fresh)
    if done.returncode:
        return Finding(_faults(done))
    expected, found = _contents(tree.root), _contents(fresh)
    names = sorted(expected.keys() | found.keys())
    faults = [
        f"{name} is not the same after the patch"
        for name in names
        if expected.get(name) != found.get(name)
    ]
    return Finding(faults, f"{len(tree.new)} files new, {len(tree.changed)} changed")


def pull_request_gate(tree: UpstreamTree, source: str | None) -> Finding:
    """PyHealth's own check of pull requests passes, where there is one."""
    gate = tree.root / "tools/check_pr_rules.py"
    if not gate.is_file():
        return Finding(note="this PyHealth comes without tools/check_pr_rules.py")
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / "fresh"
        copy_pyhealth(fresh, source)
        commits = [_commit(fresh)]
        for name in [*tree.new, *tree.changed]:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree.root / name, fresh / name)
        commits.append(_commit(fresh))
        script = fresh / "tools/check_pr_rules.py"
        command = [sys.executable, script, "--base", commits[0], "--head", commits[1]]
        return Finding(_faults(run(command, tree.root, fresh)))


def _commit(folder: Path) -> str:
    """Commit everything in a folder and return the commit."""
    identity = ["-c", "user.name=check", "-c", "user.email=check@localhost"]
    identity += ["-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
    for command in (
        ["init", "--quiet"],
        ["add", "--all", "--force"],
        ["commit", "--quiet", "--allow-empty", "--message=check"],
    ):
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    head = ["git", "rev-parse", "HEAD"]
    return subprocess.check_output(head, cwd=folder, text=True).strip()


def _pytest(root: Path, cwd: Path, arguments: list[str]) -> Finding:
    """Return the summary lines of what failed, and the last line."""
    command = [sys.executable, "-m", "pytest", f"--rootdir={root}", "-c", os.devnull]
    command += ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "markers=slow: takes more than a few seconds"]
    command += ["-W", "ignore:A newer version of litdata:UserWarning"]
    command += arguments
    done = run(command, root, cwd)
    lines = done.stdout.strip().splitlines() or [f"ended with {done.returncode}"]
    if done.returncode == 0:
        return Finding(note=lines[-1])
    summary = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return Finding(summary or lines[-20:], lines[-1])


def _failures(summary: list[str]) -> list[str]:
    """Return the tests, or files, that pytest's summary names."""
    return [line.split(" ", 1)[1].split(" - ")[0] for line in summary]


def _faults(done: subprocess.CompletedProcess[str]) -> list[str]:
    if done.returncode == 0:
        return []
    text = done.stdout.strip()
    return text.splitlines() if text else [f"ended with {done.returncode}"]


def _has_ruff_settings(root: Path) -> bool:
    if any((root / name).is_file() for name in ("ruff.toml", ".ruff.toml")):
        return True
    project = root / "pyproject.toml"
    return project.is_file() and "[tool.ruff" in project.read_text(encoding="utf-8")


def _added_rows(before: str, after: str) -> set[int]:
    lines = before.split("\n")
    return {
        row for row, line in enumerate(after.split("\n"), start=1) if line not in lines
    }


def _toctree(title: str, entries: list[str]) -> str:
    lines = [title, "=" * len(title), "", ".. toctree::", ""]
    return "\n".join([*lines, *(f"   {entry}" for entry in entries)]) + "\n"


def _contents(root: Path) -> dict[str, bytes]:
    passed_over = {".git", "__pycache__", ".pytest_cache"}
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not passed_over & set(path.relative_to(root).parts)
    }
