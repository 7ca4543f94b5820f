"""tools/upstream_check.py: each check passes on a small PyHealth and can fail.

The PyHealth of most tests is a folder of some lines that the test writes, and so are
the files laid over it; only the lists of exports and of what is left out are real.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("upstream_check", "upstream_files", "upstream_rules", "upstream_runs")
MODULES += ("upstream_tree",)
CLASS = '''"""A module."""


class {name}:
    """A class.

    Examples:
        >>> {name}().one
        1
    """

    one = 1
'''
PAGE = "{name}\n{line}\n\n.. autoclass:: {name}\n   :members:\n"
SECTION = "Title\n=====\n\n.. toctree::\n    :maxdepth: 3\n\n    {section}/theirs\n"
GATE = """\
import subprocess, sys
base, head = sys.argv[2], sys.argv[4]
command = ["git", "diff", "--name-only", f"{base}..{head}"]
names = subprocess.check_output(command, text=True).split()
for folder in ("pyhealth/", "docs/", "examples/"):
    assert any(name.startswith(folder) for name in names), folder
sys.exit("refused: a file named forbidden" if "examples/forbidden.py" in names else 0)
"""


@pytest.fixture
def tools(monkeypatch):
    """The program's modules by name."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return {name: importlib.import_module(name) for name in MODULES}


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


@pytest.fixture
def theirs(tools, tmp_path):
    """A checkout of a PyHealth of some lines."""
    files = {
        "pyhealth/__init__.py": "",
        "pyproject.toml": '[project]\nname = "pyhealth"\ndependencies = [\n]\n',
        "docs/index.rst": "Title\n=====\n\n.. toctree::\n\n   api/data\n   api/tasks\n",
        "tests/core/test_theirs.py": (
            "import pyhealth.models\n\n\ndef test_theirs():\n"
            "    assert not hasattr(pyhealth.models, 'Spoilt')\n"
        ),
        "tools/check_pr_rules.py": GATE,
    }
    for package in tools["upstream_files"].EXPORTS:
        folder = f"pyhealth/{package}"
        files[f"{folder}/__init__.py"] = "import os\nfrom .base import Base"  # no \n
        files[f"{folder}/base.py"] = "class Base: pass\n"
        files[f"docs/api/{package}.rst"] = SECTION.format(section=package)
    write(tmp_path / "theirs", files)
    return tmp_path / "theirs"


@pytest.fixture
def ours(tools, tmp_path):
    """A repository with a class for every export, its page and its test."""
    listed, tests = tools["upstream_files"], {}
    files = {
        "pyhealth/bilevel/__init__.py": '"""Training of two levels."""\n',
        "examples/a.py": "import pyhealth\n\nif __name__ == '__main__':\n    pass\n",
        "tests/test_ours.py": "",
    }
    names = [("bilevel", "a", "A"), *listed.exported_names()]
    for package, module, name in names:
        path = f"pyhealth/{package}/{module}.py"
        files[path] = files.get(path, "") + CLASS.format(name=name)
        full = f"pyhealth.{package}.{module}.{name}"
        page = PAGE.format(name=full, line="=" * len(full))
        files[f"docs/api/{package}/{full}.rst"] = page
        line = f"from pyhealth.{package}.{module} import {name}"
        use = f"\n\ndef test_{name}():\n    {line}\n    assert {name}.one == 1\n"
        files["tests/test_ours.py"] += use
    for entry in listed.LEFT_OUT:
        file, _, test = entry.partition("::")
        tests.setdefault(file, []).append(f"def {test or 'test_a'}():\n    assert 0\n")
    for file, texts in tests.items():
        name = file if file.endswith(".py") else f"{file}/targets.py"
        files[f"tests/{name}"] = "\n\n".join(["from pathlib import Path\n", *texts])
    write(tmp_path / "ours", files)
    return tmp_path / "ours"


@pytest.fixture
def check(tools, theirs, ours, capsys):
    """Make some checks of the two; return exit status and output."""

    def make(*names, more=()):
        argv = ["--pyhealth", str(theirs), *more, "--only", *names]
        status = tools["upstream_check"].main(argv, ours)
        return status, capsys.readouterr().out

    return make


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


A = "pyhealth/bilevel/a.py"
#: What makes each check fail: the change of our files or of theirs, and what is said.
VIOLATIONS = {
    "new-paths": (
        lambda ours, theirs: write(theirs, {"pyhealth/datasets/ptbxl.py": ""}),
        "pyhealth/datasets/ptbxl.py is in PyHealth already",
    ),
    "doc-examples": (
        lambda ours, theirs: replace(ours / A, ">>> ", ""),
        f"{A}:4: A has no >>> in its docstring",
    ),
    "pages": (
        lambda ours, theirs: write(ours, {A: CLASS.format(name="B")}),
        f"{A}:4: no page in docs/api names pyhealth.bilevel.a.B",
    ),
    "columns": (
        lambda ours, theirs: replace(ours / A, "one = 1\n", f"one = 1  # {'x' * 80}\n"),
        f"{A}:12: 95 columns",
    ),
    "example-scripts": (
        lambda ours, theirs: write(ours, {"examples/b.py": "import pyhealth\n"}),
        "examples/b.py has no if __name__ == '__main__'",
    ),
    "tests-of-exports": (
        lambda ours, theirs: replace(ours / "tests/test_ours.py", "RecordFilter", "A"),
        "no test uses RecordFilter of pyhealth.tasks",
    ),
    "lint": (
        lambda ours, theirs: replace(ours / A, "\n\nclass", "\nimport os\n\n\nclass"),
        f"{A}:3: F401",
    ),
    "gate": (
        lambda ours, theirs: write(ours, {"examples/forbidden.py": ""}),
        "refused: a file named forbidden",
    ),
    "imports": (
        lambda ours, theirs: replace(ours / A, "        1\n", "        2\n"),
        "pyhealth.bilevel.a: 1 examples fail",
    ),
    "documentation": (
        lambda ours, theirs: replace(ours / A, "A class.", "A class :nonsense:`a`."),
        'Unknown interpreted text role "nonsense"',
    ),
    "our-tests": (
        lambda ours, theirs: write(ours, {"tests/test_b.py": "def test_b(): 1 / 0"}),
        "FAILED test_b.py::test_b - ZeroDivisionError",
    ),
    "pyhealth-tests": (
        lambda ours, theirs: replace(
            ours / "pyhealth/models/taskaug_policy.py",
            "class",
            "import pyhealth.models as m\n\nm.Spoilt = 1\n\n\nclass",
        ),
        "tests/core/test_theirs.py::test_theirs",
    ),
}


@pytest.mark.slow
def test_every_check_passes_on_what_is_right(tools, check):
    names = tools["upstream_check"].CHECKS
    assert set(names) == VIOLATIONS.keys() | {"patch"}
    status, out = check(*names, more=["--tests=."])
    assert status == 0, out
    assert set(re.findall(r"^ok +([\w-]+) \(", out, re.MULTILINE)) == set(names)
    assert "FAIL" not in out


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.endswith("-tests"))
        for name in VIOLATIONS
    ],
)
def test_every_check_fails_on_a_violation(name, check, ours, theirs):
    violate, said = VIOLATIONS[name]
    violate(ours, theirs)
    status, out = check(name, more=["--tests=."])
    assert status == 1
    assert re.search(rf"^FAIL +{name} \(", out, re.MULTILINE)
    assert said in out
    assert out.endswith(f"upstream-check failed: {name}\n")


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(root).parts
    }


def test_the_patch_makes_the_tree(tools, check, ours, theirs, tmp_path):
    """Empty files, other line ends and a missing newline at the end included."""
    write(ours, {"examples/empty.py": "", "examples/crlf.py": "a = 1\r\nb = '\x0c'"})
    before = contents(theirs)
    status, out = check("new-paths", more=["--patch", str(tmp_path / "a.patch")])
    assert status == 0
    assert contents(theirs) == before
    tree = tools["upstream_tree"].UpstreamTree.lay(ours, tmp_path / "a", str(theirs))
    shutil.copytree(theirs, tmp_path / "b")
    git = {"cwd": tmp_path / "b", "check": True}
    subprocess.run(["git", "init", "--quiet"], **git)
    subprocess.run(["git", "apply", "--check", tmp_path / "a.patch"], **git)
    subprocess.run(["git", "apply", tmp_path / "a.patch"], **git)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert tree.patch(with_new_files=False) in out
    for name in tree.new:
        assert f"    {name}\n" in out


def test_a_patch_that_is_wrong_is_found(tools, check, monkeypatch):
    wrong = tools["upstream_tree"].unified_patch
    monkeypatch.setattr(
        tools["upstream_tree"],
        "unified_patch",
        lambda name, *texts: wrong(name, *texts).replace("class A", "class B"),
    )
    status, out = check("patch")
    assert status == 1
    assert f"{A} is not the same after the patch" in out


def test_what_changes_in_pyhealths_own_files(tools, ours, theirs, tmp_path):
    tree = tools["upstream_tree"].UpstreamTree.lay(ours, tmp_path / "a", str(theirs))
    packages = tools["upstream_files"].EXPORTS
    assert tree.changed.keys() == {
        *(f"pyhealth/{package}/__init__.py" for package in packages),
        *(f"docs/api/{package}.rst" for package in packages),
        "docs/index.rst",
        "pyproject.toml",
    }
    for before, after in tree.changed.values():
        kept = [line for line in after.split("\n") if line in before.split("\n")]
        assert [line for line in kept if line] == [
            line for line in before.split("\n") if line
        ]
    assert '"wfdb>=4.3"' in tree.changed["pyproject.toml"][1]
    assert "   api/tasks\n   api/bilevel\n" in tree.changed["docs/index.rst"][1]
    assert "bilevel/pyhealth.bilevel.a.A" in tree.new["docs/api/bilevel.rst"]


def test_what_is_left_out_is_not_laid_and_roots_are_found(tools, ours):
    write(ours, {"tests/test_root.py": "ROOT = Path(__file__).resolve().parents[1]\n"})
    files = tools["upstream_files"].new_files(ours)
    laid = {n.removeprefix("tests/taskaug/") for n in files if n.startswith("tests/")}
    assert laid == {"test_ours.py", "test_root.py", "test_faults.py", "test_study.py"}
    assert files["tests/taskaug/test_root.py"].endswith("parents[2]\n")
    assert "def test_" not in files["tests/taskaug/test_study.py"]
    (ours / "tests/test_study.py").unlink()
    with pytest.raises(ValueError, match=r"LEFT_OUT names .*test_study\.py"):
        tools["upstream_files"].new_files(ours)


def test_the_copy_is_what_is_imported(tools, theirs, tmp_path):
    """An editable install of this project would serve pyhealth.bilevel."""
    write(tmp_path / "other", {"pyhealth/__init__.py": ""})

    def imported(name, cwd):
        command = [sys.executable, "-c", f"import {name} as m; print(m.__file__)"]
        return tools["upstream_runs"].run(command, theirs, cwd).stdout

    found = imported("pyhealth.models", tmp_path).strip()
    assert Path(found) == theirs / "pyhealth/models/__init__.py"
    assert "has no pyhealth.bilevel" in imported("pyhealth.bilevel", tmp_path)
    assert "not from" in imported("pyhealth", tmp_path / "other")


@pytest.mark.slow
def test_our_tests_see_no_corpus(check, ours, monkeypatch):
    monkeypatch.setenv("PTBXL_ROOT", os.devnull)
    text = "import os\n\n\ndef test_b():\n    assert 'PTBXL_ROOT' not in os.environ\n"
    write(ours, {"tests/test_b.py": text})
    status, out = check("our-tests", more=["--tests=tests/test_b.py"])
    assert status == 0
    assert "1 passed" in out


@pytest.mark.slow
def test_a_test_of_pyhealth_that_failed_before_does_not_count(check, theirs):
    replace(theirs / "tests/core/test_theirs.py", "not hasattr", "hasattr")
    status, out = check("pyhealth-tests")
    assert status == 0
    assert "1 failed" in out
    assert "1 fail without our files, too" in out


def test_a_folder_that_is_no_pyhealth_is_told(tools, ours, tmp_path, capsys):
    status = tools["upstream_check"].main(["--pyhealth", str(tmp_path)], ours)
    assert status == 2
    assert "has no pyhealth/__init__.py" in capsys.readouterr().err


def test_the_installed_pyhealth_takes_our_files(tools, tmp_path):
    tree = tools["upstream_tree"].UpstreamTree.lay(ROOT, tmp_path / "a", None)
    installed = importlib.metadata.distribution("pyhealth")
    assert not tree.overwritten
    assert len(tree.changed) == 4
    for name, (before, after) in tree.changed.items():
        package = name.split("/")[1]
        offered = {
            alias.asname
            for node in ast.parse(after).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        modules = tools["upstream_files"].EXPORTS[package]
        assert offered >= {name for names in modules.values() for name in names}
        assert before == Path(installed.locate_file(name)).read_text()
    runs = tools["upstream_runs"]
    (tmp_path / "work").mkdir()
    assert not runs.patch_applies(tree, None, tmp_path / "work").faults


def test_the_examples_run(tools):
    for module in tools.values():
        assert doctest.testmod(module).failed == 0


def test_merging_names_attributes_that_events_have():
    text = (ROOT / "docs/merging.md").read_text()
    table = text.partition("Attributes of an event:")[2]
    named = re.findall(r"^\| `[\w.]+` \| `(\w+)`", table, re.MULTILINE)
    assert {"ecg_id", "record_path", "timestamp"} <= set(named)
    listed = (ROOT / "pyhealth/datasets/configs/ptbxl.yaml").read_text()
    for name in set(named) - {"timestamp"}:
        assert f'- "{name}"\n' in listed
