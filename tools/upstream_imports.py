"""Import our modules from a copy of PyHealth and run their examples.

Runs in a process of its own, started by ``upstream_check.py`` in the copy:

    python upstream_imports.py TREE MODULES_AND_EXPORTS.json FAULTS.json

What modules and examples print is not mixed with the faults, which go to a file.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def main(tree: Path, wanted: dict[str, list]) -> list[str]:
    """Return what is wrong with the modules and exports of a tree.

    Args:
        tree: the folder that holds the copy's ``pyhealth/``.
        wanted: "modules", their names, and "exports", triples of package, module and
            name.
    """
    faults, modules = [], []
    for name in wanted["modules"]:
        try:
            modules.append(importlib.import_module(name))
        except Exception as error:  # whatever a module raises when it is imported
            faults.append(f"{name} cannot be imported: {error!r}")
    for package, module, name in wanted["exports"]:
        short = importlib.import_module(f"pyhealth.{package}")
        long = importlib.import_module(f"pyhealth.{package}.{module}")
        if getattr(short, name, None) is not getattr(long, name):
            faults.append(f"pyhealth.{package} does not offer {name}")
    for module in [*modules, *_modules_of_pyhealth()]:
        if not Path(module.__file__).resolve().is_relative_to(tree.resolve()):
            faults.append(f"{module.__name__} is from {module.__file__}")
    return faults + [fault for module in modules for fault in _failed_examples(module)]


def _modules_of_pyhealth() -> list[ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "pyhealth" and getattr(module, "__file__", None)
    ]


def _failed_examples(module: ModuleType) -> list[str]:
    out = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
    ):
        failed = doctest.testmod(module).failed
    if not failed:
        return []
    return [f"{module.__name__}: {failed} examples fail\n{out.getvalue()}"]


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
    Path(sys.argv[3]).write_text(json.dumps(found))
