"""The notebook runs from top to bottom, and is stored with what it showed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "taskaug_ecg_colab.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_it_is_stored_with_its_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) == 8 + 2  # the operations, the policy, the curves
    assert not [o for o in outputs(notebook) if o.output_type == "error"]
    # No path of the machine that it was run on.
    assert "/root" not in NOTEBOOK.read_text() and "/work" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_it_runs(notebook, monkeypatch):
    monkeypatch.delenv("PTBXL_ROOT", raising=False)
    stored = pictures(notebook)
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    assert pictures(notebook) == stored
