"""Every public class and function has an example, and every example runs."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: By file and not by import: the installed PyHealth has many modules that are not ours.
FILES = {
    path.relative_to(ROOT)
    .with_suffix("")
    .as_posix()
    .removesuffix("/__init__")
    .replace("/", "."): path
    for path in sorted((ROOT / "pyhealth").rglob("*.py"))
}


def public(path):
    """Return {name: docstring} of a file's public top-level classes and functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: ast.get_docstring(node) or ""
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
    }


def test_there_are_modules():
    assert "pyhealth.models.ecg_augmentations" in FILES
    assert "pyhealth.bilevel" in FILES


@pytest.mark.parametrize("module", FILES)
def test_examples_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example that writes leaves nothing behind
    result = doctest.testmod(importlib.import_module(module), report=True)
    assert result.failed == 0, "the examples' output is shown above"


@pytest.mark.parametrize("module", FILES)
def test_public_names_have_an_example(module):
    without = [
        name for name, text in public(FILES[module]).items() if ">>>" not in text
    ]
    assert not without, f"{module}: no >>> in the docstring of {', '.join(without)}"


@pytest.mark.parametrize("module", FILES)
def test_all_names_what_is_there(module):
    imported = importlib.import_module(module)
    missing = [n for n in getattr(imported, "__all__", ()) if not hasattr(imported, n)]
    assert not missing
    for name in getattr(imported, "__all__", ()):
        value = getattr(imported, name)
        if isinstance(value, type) or callable(value):
            assert value.__doc__, f"{module}.{name} has no docstring"
