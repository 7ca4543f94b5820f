"""A copy of PyHealth with our files in it, and the patch that makes it."""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from upstream_files import EXPORTS, new_files, pages_by_section

__all__ = ["UpstreamTree", "unified_patch"]

#: What a checkout may hold that is no part of PyHealth.
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "venv", ".pixi", "build", "dist", "_build", "*.egg-info"
)
#: What our files import that PyHealth does not require, directly or through others.
REQUIREMENT = "wfdb>=4.3"
EXTRA = 'taskaug = ["jinja2", "optuna>=4"]'


@dataclass
class UpstreamTree:
    """A folder with PyHealth and our files at the places they would have in it.

    Attributes:
        root: the folder; it holds ``pyhealth/``.
        origin: where PyHealth came from, in words.
        is_checkout: whether it is a checkout of PyHealth, with tests and docs.
        new: text of the files that are added, by path.
        changed: text of PyHealth's own files before and after, by path.
        overwritten: paths of ours that PyHealth has already; theirs is kept.
    """

    root: Path
    origin: str
    is_checkout: bool
    new: dict[str, str]
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    overwritten: list[str] = field(default_factory=list)

    @classmethod
    def lay(cls, ours: Path, target: Path, source: str | None) -> UpstreamTree:
        """Copy PyHealth to ``target`` and lay our files over it.

        Args:
            ours: root of this repository.
            target: folder to make.
            source: a checkout of PyHealth; the installed PyHealth if None.

        Raises:
            ValueError: if there is no PyHealth, or it lacks a package of ours.
        """
        origin = copy_pyhealth(target, source)
        tree = cls(target, origin, source is not None, new_files(ours))
        for name in sorted(tree.new):
            path = target / name
            if path.exists():
                tree.overwritten.append(name)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tree.new[name].encode())
        for name in tree.overwritten:
            del tree.new[name]
        for name, text in tree._edits().items():
            path = target / name
            before = path.read_bytes().decode("utf-8")
            tree.changed[name] = (before, text)
            path.write_bytes(text.encode())
        return tree

    def patch(self, with_new_files: bool = True) -> str:
        """Return the change of PyHealth's own files, and the new ones, as a patch."""
        parts = [unified_patch(name, *pair) for name, pair in self.changed.items()]
        if with_new_files:
            parts += [
                unified_patch(name, None, text) for name, text in self.new.items()
            ]
        return "".join(parts)

    def toctree_lines(self) -> dict[str, list[str]]:
        """Return the lines for PyHealth's section pages that this tree does not have.

        An installed PyHealth comes without its documentation.
        """
        return {
            f"docs/api/{section}.rst": pages
            for section, pages in pages_by_section(self.new).items()
            if not (self.root / f"docs/api/{section}.rst").exists()
        }

    def _edits(self) -> dict[str, str]:
        """Return the new text of PyHealth's files that change."""
        result = {}
        for package, modules in EXPORTS.items():
            name = f"pyhealth/{package}/__init__.py"
            text = self._text(name)
            if text is None:
                raise ValueError(f"{self.origin} has no {name}: is it PyHealth 2.1?")
            result[name] = with_exports(text, modules)
        for section, pages in pages_by_section(self.new).items():
            name = f"docs/api/{section}.rst"
            text = None if name in self.new else self._text(name)
            if text is not None:
                result[name] = with_toctree_lines(text, pages, f"{section}/", name)
            elif name in self.new and (index := self._text("docs/index.rst")):
                added = [f"api/{section}"]
                changed = result.get("docs/index.rst", index)
                result["docs/index.rst"] = with_toctree_lines(
                    changed, added, "api/", "docs/index.rst"
                )
        if (text := self._text("pyproject.toml")) is not None:
            result["pyproject.toml"] = with_requirements(text)
        return result

    def _text(self, name: str) -> str | None:
        path = self.root / name
        return path.read_bytes().decode("utf-8") if path.is_file() else None


def copy_pyhealth(target: Path, source: str | None) -> str:
    """Copy PyHealth alone into a new folder and say where it came from.

    Args:
        target: folder to make.
        source: a checkout; the installed PyHealth if None. Of that the files in its
            own list are taken, so nothing that another package put beside them.

    Raises:
        ValueError: if there is none.
    """
    if source is not None:
        folder = Path(source)
        if not (folder / "pyhealth/__init__.py").is_file():
            raise ValueError(f"{folder} has no pyhealth/__init__.py.")
        shutil.copytree(folder, target, symlinks=True, ignore=NOT_COPIED)
        return f"the checkout {folder}"
    try:
        installed = importlib.metadata.distribution("pyhealth")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            "PyHealth is not installed. Install it, or set PYHEALTH_SRC to a checkout."
        ) from error
    files = [path for path in installed.files or () if path.parts[0] == "pyhealth"]
    if not files:
        raise ValueError(
            "The installed PyHealth has no files of its own (an editable install?). "
            "Set PYHEALTH_SRC to its checkout."
        )
    for path in files:
        copy = target / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        if Path(path.locate()).is_file():
            shutil.copy2(path.locate(), copy)  # with its time: byte-code stays valid
    return f"the installed PyHealth {installed.version}"


def with_exports(text: str, modules: dict[str, tuple[str, ...]]) -> str:
    """Add import lines after the last relative import of an ``__init__`` file.

    The form ``X as X`` marks a re-export for ruff. An ``__all__`` gets the names, too.

    Examples:
        >>> print(with_exports("from .a import A", {"b": ("B",)}), end="")
        from .a import A
        from .b import B as B
    """
    nodes = ast.parse(text).body
    last = max(
        (n.end_lineno or 0 for n in nodes if isinstance(n, ast.ImportFrom) and n.level),
        default=0,
    )
    lines = text.split("\n")
    added = []
    for module, names in modules.items():
        pairs = [f"{name} as {name}" for name in names]
        line = f"from .{module} import {', '.join(pairs)}"
        if len(pairs) > 1 or len(line) > 88:
            line = f"from .{module} import (\n    " + ",\n    ".join(pairs) + ",\n)"
        added += line.split("\n")
    lines[last:last] = added
    if lines[-1]:
        lines.append("")  # the file had no newline at its end
    result = "\n".join(lines)
    entries = [f'    "{name}",' for names in modules.values() for name in names]
    opening = re.search(r"^__all__ = \[\n", result, re.MULTILINE)
    if opening:
        end = opening.end()
        result = result[:end] + "\n".join(entries) + "\n" + result[end:]
    return result


def with_toctree_lines(text: str, pages: list[str], prefix: str, name: str) -> str:
    r"""Add entries after the last one in a page's toctrees that has the prefix.

    Raises:
        ValueError: if there is none.

    Examples:
        >>> text = ".. toctree::\n\n    models/A\n    B <models/B>\n"
        >>> print(with_toctree_lines(text, ["models/C"], "models/", "models.rst"))
        .. toctree::
        <BLANKLINE>
            models/A
            B <models/B>
            models/C
        <BLANKLINE>
    """
    lines = text.split("\n")
    entry = re.compile(rf"(\s+)(?:[^<]*<)?{re.escape(prefix)}[\w./]+>?\s*")
    last = [n for n, line in enumerate(lines) if entry.fullmatch(line)]
    if not last:
        raise ValueError(f"{name} has no toctree with entries {prefix}...")
    indent = re.match(r"\s*", lines[last[-1]])[0]
    lines[last[-1] + 1 : last[-1] + 1] = [f"{indent}{page}" for page in pages]
    return "\n".join(lines)


def with_requirements(text: str) -> str:
    r"""Add our requirements to PyHealth's ``pyproject.toml``.

    Reading records needs one package more; what only a study needs is an extra.

    Examples:
        >>> text = "[project]\ndependencies = [\n]\n"
        >>> print(with_requirements(text), end="")
        [project]
        dependencies = [
          "wfdb>=4.3",
        ]
        <BLANKLINE>
        [project.optional-dependencies]
        taskaug = ["jinja2", "optuna>=4"]
    """
    if not re.search(r"^\s*['\"]wfdb\b", text, re.MULTILINE):
        line = f'dependencies = [\n  "{REQUIREMENT}",\n'
        text, count = re.subn(r"(?m)^dependencies = \[\n", line, text, count=1)
        if not count:
            raise ValueError("pyproject.toml has no list of dependencies.")
    heading = "[project.optional-dependencies]\n"
    if heading in text:
        return text.replace(heading, heading + EXTRA + "\n", 1)
    return text.rstrip("\n") + f"\n\n{heading}{EXTRA}\n"


def unified_patch(name: str, before: str | None, after: str) -> str:
    r"""Return the change of one file as ``git apply`` takes it.

    Args:
        name: path of the file.
        before: its text; None if it is new.
        after: its text then.

    Examples:
        >>> print(unified_patch("a.py", "a\n", "b\n"), end="")
        diff --git a/a.py b/a.py
        --- a/a.py
        +++ b/a.py
        @@ -1 +1 @@
        -a
        +b
    """
    head = f"diff --git a/{name} b/{name}\n"
    if before is None:
        head += "new file mode 100644\n"
        if not after:
            return head + "index 0000000..e69de29\n"
    diff = difflib.unified_diff(
        _lines(before or ""),
        _lines(after),
        "/dev/null" if before is None else f"a/{name}",
        f"b/{name}",
    )
    return head + "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
        for line in diff
    )


def _lines(text: str) -> list[str]:
    # Not splitlines(): it also parts at form feeds and Unicode's separators.
    return [line for line in re.split(r"(?<=\n)", text) if line]
