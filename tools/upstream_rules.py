"""PyHealth's rules for contributed code that can be read off the files.

Each rule takes a laid tree and returns its faults, one line each.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from upstream_files import TESTS, exported_names, module_of, pages_by_section
from upstream_tree import UpstreamTree

__all__ = [
    "example_scripts",
    "examples_in_docstrings",
    "line_lengths",
    "new_paths",
    "pages",
    "tests_of_exports",
]

MAX_COLUMNS = 88
DIRECTIVE = re.compile(r"^\.\. auto(class|function|module):: (\S+)", re.MULTILINE)

type Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def new_paths(tree: UpstreamTree) -> list[str]:
    """No file of ours has the path of one that PyHealth has."""
    return [f"{name} is in PyHealth already" for name in tree.overwritten]


def examples_in_docstrings(tree: UpstreamTree) -> list[str]:
    """Every public top-level class and function has a ``>>>`` in its docstring."""
    return [
        f"{file}:{node.lineno}: {node.name} has no >>> in its docstring"
        for file, node in _public(tree)
        if ">>>" not in (ast.get_docstring(node) or "")
    ]


def pages(tree: UpstreamTree) -> list[str]:
    """Every public class is on a page, and every page is in a toctree."""
    faults = []
    documented = _documented(tree)
    for file, node in _public(tree):
        name = f"{module_of(file)}.{node.name}"
        if isinstance(node, ast.ClassDef) and name not in documented:
            faults.append(f"{file}:{node.lineno}: no page in docs/api names {name}")
    without_docs = tree.toctree_lines()
    for section, entries in pages_by_section(tree.new).items():
        name = f"docs/api/{section}.rst"
        if name in without_docs:
            continue  # an installed PyHealth has no docs: the report lists the lines
        toctrees = (tree.root / name).read_text(encoding="utf-8")
        faults += [
            f"{name} has no toctree line for {entry}"
            for entry in entries
            if not re.search(rf"^\s+{re.escape(entry)}$", toctrees, re.MULTILINE)
        ]
    return faults


def line_lengths(tree: UpstreamTree) -> list[str]:
    """No line of ours is longer than 88 columns, in Python files and pages."""
    return [
        f"{name}:{number}: {len(line)} columns"
        for name, text in tree.new.items()
        if name.endswith((".py", ".rst"))
        for number, line in enumerate(text.split("\n"), start=1)
        if len(line) > MAX_COLUMNS
    ]


def example_scripts(tree: UpstreamTree) -> list[str]:
    """There is an example that uses PyHealth, and scripts do nothing when imported."""
    scripts = {
        name: text
        for name, text in tree.new.items()
        if name.startswith("examples/") and name.endswith(".py")
    }
    faults = [
        f"{name} has no if __name__ == '__main__'"
        for name, text in scripts.items()
        if not any(_is_main_guard(node) for node in ast.parse(text).body)
    ]
    if not any("pyhealth" in text for text in scripts.values()):
        faults.append("no script in examples/ uses PyHealth")
    return faults


def tests_of_exports(tree: UpstreamTree) -> list[str]:
    """Every name that PyHealth's packages would offer is used by a test."""
    used: set[str] = set()
    for name, text in tree.new.items():
        if name.startswith(f"{TESTS}/test_"):
            nodes = list(ast.walk(ast.parse(text)))
            used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    return [
        f"no test uses {name} of pyhealth.{package}"
        for package, _, name in exported_names()
        if name not in used
    ]


def _public(tree: UpstreamTree) -> Iterator[tuple[str, Definition]]:
    """Yield file and node of each public top-level class and function."""
    for name, text in tree.new.items():
        if not (name.startswith("pyhealth/") and name.endswith(".py")):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, Definition.__value__) and not node.name.startswith("_"):
                yield name, node


def _documented(tree: UpstreamTree) -> set[str]:
    """Return the full names that our pages show.

    A page may name a class by a module that imports it from another one of ours.
    """
    defined: dict[str, set[str]] = {}
    for file, node in _public(tree):
        defined.setdefault(module_of(file), set()).add(node.name)
    result = set()
    for name, text in tree.new.items():
        if not name.startswith("docs/api/"):
            continue
        for kind, target in DIRECTIVE.findall(text):
            if kind == "module":
                result |= {f"{target}.{n}" for n in defined.get(target, ())}
                continue
            module, _, attribute = target.rpartition(".")
            result |= {target, f"{_origin(tree, module, attribute)}.{attribute}"}
    return result


def _origin(tree: UpstreamTree, module: str, name: str) -> str:
    """Return the module that ``module`` imports ``name`` from, itself otherwise."""
    text = tree.new.get(module.replace(".", "/") + ".py", "")
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        if name in {alias.name for alias in node.names}:
            parents = module.split(".")[: -node.level or None]
            return ".".join([*parents, node.module or ""])
    return module


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
