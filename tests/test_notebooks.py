"""Every notebook runs headless on a tiny model, and is committed executed, with pictures, and small.

The cell tagged `config` is replaced: the model becomes a tiny random one and `interp.run` takes each method's own
example, so that every other cell runs as it is.
"""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 1_000_000

TINY = """
import interp
from interp.core.spec import find

MODEL = "tiny-llama"
PROMPT = "When Mary and John went to the store, John gave a drink to"


def run_example(name, model, **_options):
    spec = find(name)
    return spec.run(model, *spec.example(model))


interp.run = run_example
"""


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.needs_package("ipykernel")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_a_tiny_model(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(path)
    configs = [cell for cell in notebook.cells if "config" in cell.metadata.get("tags", [])]
    assert len(configs) == 1, "a notebook has one cell tagged config"
    configs[0].source = TINY
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_executed_with_static_figures_and_small(path: Path) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells), "make notebooks executes it"
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    figures = [out for out in outputs if "application/vnd.plotly.v1+json" in out.get("data", {})]
    assert figures
    assert all("image/png" in figure.data for figure in figures)
    assert path.stat().st_size < MAX_BYTES
