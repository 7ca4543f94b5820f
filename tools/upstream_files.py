"""What a merge into PyHealth would add: our files, at their places in its tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

__all__ = [
    "EXPORTS",
    "LEFT_OUT",
    "TESTS",
    "exported_names",
    "module_of",
    "new_files",
    "pages_by_section",
]

#: Where our tests go: beside PyHealth's tests/core, which unittest runs; ours need
#: pytest.
TESTS = "tests/taskaug"
#: Suffixes of the files that are laid; byte-code and editors' files are not.
SUFFIXES = {".py", ".yaml", ".json", ".md", ".jinja", ".rst", ".ipynb"}
#: Folders that are laid but for docs and tests, and where, as setup.py has it.
FOLDERS = {
    "pyhealth": "pyhealth",
    "policies": "pyhealth/models/policies",
    "examples": "examples",
}

#: What PyHealth's packages would offer by name, by package and module.
EXPORTS: dict[str, dict[str, tuple[str, ...]]] = {
    "datasets": {
        "ecg_folder": ("ECGFolderDataset",),
        "ptbxl": ("CohortSplit", "PTBXLDataset", "StratFoldSplit"),
        "ptbxl_synthetic": ("write_synthetic_ptbxl",),
    },
    "models": {
        "learned_augmentation": ("LearnedAugmentation",),
        "taskaug_policy": ("TaskAugPolicy",),
        "taskaug_resnet": ("TaskAugResNet",),
    },
    "processors": {"ecg_processor": ("ECGProcessor",)},
    "tasks": {
        "ecg_classification": ("ECGBinaryClassification",),
        "ecg_folder_classification": ("ECGFolderClassification",),
        "ecg_multilabel_classification": ("ECGMultilabelClassification",),
        "record_filter": ("RecordFilter",),
    },
}

#: Test files, folders and single tests that say nothing about PyHealth, and why. They
#: are not laid. Other tests run in the copy as they are.
LEFT_OUT: dict[str, str] = {
    "fuzz": "the fuzzer and its corpus of some hundred files stay here",
    "test_fuzz.py": "runs the fuzzer",
    "test_properties.py": "shares targets and corpus with the fuzzer",
    "test_benchmarks.py": "compares docs/ with benchmarks/results, which stay here",
    "test_results.py": "compares docs/results.md with the stored studies",
    "test_packaging.py": "is about this distribution",
    "test_makefile.py": "is about the Makefile",
    "test_published_policies.py": "compares policies with cards and docs/policies.md",
    "test_readme.py": "is about README.md",
    "test_documentation.py": "is about the documentation site",
    "test_structure.py": "holds this repository's structure",
    "test_docs.py": (
        "looks at every module below pyhealth/, in the copy PyHealth's too; the "
        "checks examples and imports do its work for our modules"
    ),
    "test_upstream_check.py": "is about this check",
    "test_faults.py::test_the_document_names_a_test_of_every_fault": (
        "reads docs/faults.md"
    ),
    "test_study.py::test_the_documented_letters_are_those_there_are": (
        "reads docs/study.md"
    ),
}

# The repository's root as seen from a test file: one folder deeper there than here.
ROOT_OF_TEST = re.compile(r"(Path\(__file__\)(?:\.resolve\(\))?\s*\.parents)\[1\]")


def new_files(root: Path) -> dict[str, str]:
    """Read what would be added to PyHealth.

    Args:
        root: of this repository.

    Returns:
        Text by path in PyHealth's tree.

    Raises:
        ValueError: if the repository lacks one of the tests that are left out.

    Examples:
        >>> files = new_files(Path(__file__).resolve().parents[1])
        >>> "pyhealth/datasets/ptbxl.py" in files
        True
    """
    result = {}
    for folder, place in FOLDERS.items():
        for path in _files_below(root / folder):
            name = f"{place}/{path.relative_to(root / folder).as_posix()}"
            result[name] = _text_of(path)
    # PyHealth has docs/api/datasets.rst and its like; only the pages are ours.
    for path in sorted((root / "docs/api").glob("*/*.rst")):
        result[path.relative_to(root).as_posix()] = _text_of(path)
    result |= _tests(root / "tests")
    result |= _own_section_pages(result)
    return dict(sorted(result.items()))


def module_of(name: str) -> str:
    """Return the module of a file below ``pyhealth/``.

    Examples:
        >>> module_of("pyhealth/bilevel/__init__.py"), module_of("pyhealth/a/b.py")
        ('pyhealth.bilevel', 'pyhealth.a.b')
    """
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def exported_names() -> list[tuple[str, str, str]]:
    """Return every export as package, module and name.

    Examples:
        >>> ("datasets", "ptbxl", "PTBXLDataset") in exported_names()
        True
    """
    return [
        (package, module, name)
        for package, modules in EXPORTS.items()
        for module, names in modules.items()
        for name in names
    ]


def _tests(folder: Path) -> dict[str, str]:
    """Read the tests without those left out, and look for the root a level higher."""
    named = {name.partition("::")[0] for name in LEFT_OUT}
    missing = [name for name in sorted(named) if not (folder / name).exists()]
    if missing:
        raise ValueError(f"LEFT_OUT names {missing}, which tests/ does not have.")
    result = {}
    for path in _files_below(folder):
        name = path.relative_to(folder).as_posix()
        if name in LEFT_OUT or name.partition("/")[0] in LEFT_OUT:
            continue
        text = _text_of(path)
        for entry in LEFT_OUT:
            file, _, test = entry.partition("::")
            if test and file == name:
                text = _without_function(text, test, path)
        result[f"{TESTS}/{name}"] = ROOT_OF_TEST.sub(r"\1[2]", text)
    return result


def _without_function(text: str, name: str, path: Path) -> str:
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            lines = text.split("\n")
            kept = lines[: first - 1] + lines[node.end_lineno :]
            return re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept)).rstrip("\n") + "\n"
    raise ValueError(f"LEFT_OUT names {name}, which {path} does not have.")


def _own_section_pages(files: dict[str, str]) -> dict[str, str]:
    """Write the page of each section that PyHealth does not have, such as bilevel."""
    result = {}
    for section, pages in pages_by_section(files).items():
        init = f"pyhealth/{section}/__init__.py"
        if init not in files:
            continue
        (title, *_) = (ast.get_docstring(ast.parse(files[init])) or section).split("\n")
        lines = [section.capitalize(), "=" * len(section), "", title, ""]
        lines += [".. toctree::", "    :maxdepth: 3", ""]
        lines += [f"    {page}" for page in pages]
        result[f"docs/api/{section}.rst"] = "\n".join(lines) + "\n"
    return result


def pages_by_section(files: dict[str, str]) -> dict[str, list[str]]:
    """Return the toctree entries of our pages, by section of ``docs/api``.

    Examples:
        >>> pages_by_section({"docs/api/models/pyhealth.models.A.rst": ""})
        {'models': ['models/pyhealth.models.A']}
    """
    result: dict[str, list[str]] = {}
    for name in files:
        match = re.fullmatch(r"docs/api/(\w+)/(.+)\.rst", name)
        if match:
            result.setdefault(match[1], []).append(f"{match[1]}/{match[2]}")
    return result


def _files_below(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES
        and not any(part.startswith((".", "__pycache__")) for part in path.parts[-4:])
    ]


def _text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8")
