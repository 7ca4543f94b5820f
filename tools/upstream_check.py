"""Check that this project can be merged into PyHealth, in a copy of it.

    python tools/upstream_check.py
    python tools/upstream_check.py --pyhealth ../PyHealth --patch merge.patch

The files are laid over a copy of the installed PyHealth, or of a checkout, in a
temporary folder; import lines, toctree lines and requirements are added to PyHealth's
own files, and everything is checked there. Neither PyHealth nor this checkout is
written to. The change of PyHealth's own files and the list of new files are printed.
The exit status is 1 if a check fails, and the last line names those that did.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import upstream_rules as rules
import upstream_runs as runs
from upstream_runs import Finding
from upstream_tree import UpstreamTree

ROOT = Path(__file__).resolve().parents[1]
#: In the order in which they are begun.
CHECKS = (
    "new-paths",
    "doc-examples",
    "pages",
    "columns",
    "example-scripts",
    "tests-of-exports",
    "lint",
    "patch",
    "gate",
    "imports",
    "documentation",
    "our-tests",
    "pyhealth-tests",
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; PYHEALTH_SRC and UPSTREAM_TESTS are its defaults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--pyhealth",
        default=os.environ.get("PYHEALTH_SRC") or None,
        help="a checkout of PyHealth (PYHEALTH_SRC); default: the installed one",
    )
    parser.add_argument(
        "--tests",
        type=shlex.split,
        default=shlex.split(os.environ.get("UPSTREAM_TESTS", "")),
        help="arguments of pytest, such as files or -k (UPSTREAM_TESTS); default: all "
        "of our tests but the slow ones",
    )
    parser.add_argument("--patch", type=Path, help="file for a patch to git apply")
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=CHECKS, help="checks to make"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, ours: Path = ROOT) -> int:
    """Lay the tree, make the checks, print the patch; return the exit status.

    Args:
        argv: the command line; that of the process if None.
        ours: the repository whose files are laid.
    """
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="upstream_check_") as temporary:
        folder = Path(temporary).resolve()
        try:
            tree = UpstreamTree.lay(ours, folder / "tree", arguments.pyhealth)
        except ValueError as error:
            print(f"upstream-check: {error}", file=sys.stderr)
            return 2
        show_patch(tree)
        if arguments.patch:
            arguments.patch.write_bytes(tree.patch().encode())
        found = checks(tree, folder, arguments)
        # Two at a time: the long ones each wait for a process of their own.
        with ThreadPoolExecutor(2) as pool:
            names = [name for name in CHECKS if name in arguments.only]
            passed = list(pool.map(lambda name: passes(name, found[name]), names))
    failed = [name for name, fine in zip(names, passed, strict=True) if not fine]
    if failed:
        print(f"upstream-check failed: {', '.join(failed)}")
    return int(bool(failed))


def checks(
    tree: UpstreamTree, folder: Path, arguments: argparse.Namespace
) -> dict[str, Callable[[], Finding]]:
    """Return the checks by name."""
    source = arguments.pyhealth
    return {
        "new-paths": lambda: Finding(rules.new_paths(tree)),
        "doc-examples": lambda: Finding(rules.examples_in_docstrings(tree)),
        "pages": lambda: Finding(rules.pages(tree)),
        "columns": lambda: Finding(rules.line_lengths(tree)),
        "example-scripts": lambda: Finding(rules.example_scripts(tree)),
        "tests-of-exports": lambda: Finding(rules.tests_of_exports(tree)),
        "lint": lambda: runs.lint(tree),
        "patch": lambda: runs.patch_applies(tree, source, folder),
        "gate": lambda: runs.pull_request_gate(tree, source),
        "imports": lambda: runs.imports(tree, folder),
        "documentation": lambda: runs.documentation(tree, folder),
        "our-tests": lambda: runs.our_tests(tree, arguments.tests),
        "pyhealth-tests": lambda: runs.pyhealth_tests(tree, source, folder),
    }


def passes(name: str, check: Callable[[], Finding]) -> bool:
    """Make a check, tell how it went and return whether it passed."""
    start = time.monotonic()
    found = check()
    word = "FAIL" if found.faults else "ok"
    note = f": {found.note}" if found.note else ""
    lines = [f"{word:5} {name} ({time.monotonic() - start:.0f} s){note}"]
    print("\n      ".join([*lines, *found.faults]), flush=True)
    return not found.faults


def show_patch(tree: UpstreamTree) -> None:
    """Print what changes in PyHealth's own files and which files are new."""
    print(f"Laid over {tree.origin}. Changes of its own files:\n")
    print(tree.patch(with_new_files=False))
    for page, entries in tree.toctree_lines().items():
        print(f"{page}, not part of an installed PyHealth, would get the lines")
        print("".join(f"    {entry}\n" for entry in entries))
    print(f"{len(tree.new)} new files:")
    print("".join(f"    {name}\n" for name in tree.new))


if __name__ == "__main__":
    sys.exit(main())
