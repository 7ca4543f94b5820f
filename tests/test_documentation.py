"""The documentation: it builds without a warning, and its code runs."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SCRIPT = "examples/ptbxl_ecg_classification_taskaug_resnet.py"
PAGES = {page.name: page for page in sorted(DOCS.glob("*.md"))}
#: Languages of blocks that are no code to run: output, data.
NOT_RUN = {"text", "{toctree}", "{include}", "{literalinclude}"}
#: Commands of other tools, in the shell blocks of the pages that explain them.
OTHER_COMMANDS = (
    "make",
    "pip",
    "python benchmarks",
    "python examples",
    "cd",
    "git",
    "torchrun",
    "sbatch",
)


def blocks(page):
    """Return (language, code) of every fenced block of a page."""
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(r"^```(\S*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def parse_arguments():
    spec = importlib.util.spec_from_file_location("command_line", ROOT / SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.parse_arguments


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_language_that_is_tested(page):
    assert {language for language, _ in blocks(page)} <= {"python", "sh", *NOT_RUN}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "python" in dict(blocks(page))]
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if "sh" in dict(blocks(page))])
def test_the_commands_of_a_page_are_those_that_there_are(page, parse_arguments):
    for language, code in blocks(page):
        if language != "sh":
            continue
        for line in code.replace("\\\n", " ").splitlines():
            line = line.partition("#")[0].strip()
            if line.startswith(f"python {SCRIPT}"):
                parse_arguments(shlex.split(line)[2:])  # it exits on a wrong one
            elif line:
                assert line.startswith(OTHER_COMMANDS)
                target = re.fullmatch(r"make ([\w-]+).*", line)
                if target:
                    makefile = (ROOT / "Makefile").read_text()
                    assert re.search(rf"^{target[1]}:", makefile, flags=re.MULTILINE)


def test_the_figure_of_the_logits_shows_what_is_said_of_it(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    from straight_through import logit_gradients

    _, exact, ours, drawn_only = logit_gradients()
    assert torch.cosine_similarity(exact, ours, dim=0, eps=1e-20) > 0.99
    assert drawn_only.norm() < 1e-3 * exact.norm()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "trees", DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "html" / "_generated" / "operations.html").read_text()
    assert "lead_dropout" in page
    for picture in re.findall(r'src="([^"]+\.png)"', page):
        assert (tmp_path / "html" / "_generated" / picture).resolve().is_file()
