"""The shape of the program: short files and functions, imports that go one way."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("pyhealth", "benchmarks", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
MODULES = {
    name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
    for name, path in FILES.items()
    if name.startswith("pyhealth/")
}
MAX_LINES_OF_FILE = 400
#: Without the docstring.
MAX_LINES_OF_FUNCTION = 50
#: Longer ones, with the reason.
LONG = {
    "BiLevelStep.__init__": "17 arguments, handed to the parts of a step",
    "BiLevelTrainer.train": "27 arguments, which are PyHealth's way of setting a run",
    "hypergradient": "three methods told from each other in one place",
}
#: From the bottom up: a module imports from its own layer and from those before it.
LAYERS = (
    "pyhealth.processors",
    "pyhealth.tasks",
    "pyhealth.models",
    "pyhealth.datasets",
    "pyhealth.bilevel",
    "pyhealth.bilevel.study",
)


def layer(module):
    return max(
        i for i, name in enumerate(LAYERS) if f"{module}.".startswith(f"{name}.")
    )


def imported(module):
    """Yield the modules of ours that a module imports, at its head or in a function."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = ".".join(above) if node.level else ""
            start = ".".join(filter(None, (start, node.module)))
            found = [start, *(f"{start}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in found if name in MODULES)


def functions(tree, prefix=""):
    """Yield each function's full name and its lines without the docstring."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                described = ast.get_docstring(node, clean=False) is not None
                doc = first.end_lineno - first.lineno + 1 if described else 0
                yield f"{prefix}{node.name}", node.end_lineno - node.lineno + 1 - doc
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def public_annotations(tree):
    """Yield the annotations that a user of a module or class meets."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_annotations(node)
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation
        elif isinstance(node, ast.TypeAlias):
            yield node.value
        elif isinstance(node, ast.FunctionDef) and (
            not node.name.startswith("_") or node.name.endswith("__")
        ):
            own = node.args
            named = [*own.posonlyargs, *own.args, own.vararg, *own.kwonlyargs]
            yield from (a.annotation for a in [*named, own.kwarg] if a and a.annotation)
            yield from [node.returns] if node.returns else []


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= (
        MAX_LINES_OF_FILE
    )


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    long = {
        function: lines
        for function, lines in functions(tree)
        if lines > MAX_LINES_OF_FUNCTION and function not in LONG
    }
    assert not long


def test_the_reasons_are_for_functions_that_are_long():
    found = {
        function
        for path in FILES.values()
        for function, lines in functions(ast.parse(path.read_text(encoding="utf-8")))
        if lines > MAX_LINES_OF_FUNCTION
    }
    assert found == set(LONG)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    upwards = [name for name in imported(module) if layer(name) > layer(module)]
    assert not upwards


def test_no_import_leads_back():
    graph = {module: set(imported(module)) - {module} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_modules_of_ours_are_imported_relatively(module):
    """As PyHealth does in most of its packages; one way is easier to search for."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    absolute = [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and not node.level
        and f"{node.module}.".startswith("pyhealth.")
    ]
    assert not absolute


@pytest.mark.parametrize("module", MODULES)
def test_no_public_type_is_any(module):
    """mypy holds that there is a type everywhere; it should say something, too."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    unknown = [
        ast.unparse(annotation)
        for annotation in public_annotations(tree)
        if any(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(annotation))
    ]
    assert not unknown
