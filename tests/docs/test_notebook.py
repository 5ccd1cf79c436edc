"""The notebook runs from top to bottom in a kernel of its own, at a small size; its outputs are of a real run."""

from pathlib import Path

import pytest
from doc_blocks import ROOT

NOTEBOOK = ROOT / "examples/quickstart.ipynb"
SMALL = "PRETRAIN_EPOCHS, FINETUNE_EPOCHS, NUM_TEST_IMAGES = 0.2, 0.1, 24"


@pytest.mark.slow
def test_the_notebook_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SMALL))
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [o.text for o in notebook.cells[-2].outputs if o.output_type == "stream"]
    assert "CKA of twin features" in "".join(printed)


def test_outputs_are_committed() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run all cells in a fresh kernel, then save"
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
