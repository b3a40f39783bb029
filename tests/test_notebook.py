"""The notebooks of docs/ run from top to bottom, and say what their last run said."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from helpers import ROOT

NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))


@pytest.fixture
def execute(monkeypatch) -> Callable[..., list]:
    """execute("ablation", DIR=...) -> what a notebook shows, run with these variables; without
    the cells that install."""

    def execute(name: str, **variables: str | Path) -> list:
        for key, value in variables.items():
            monkeypatch.setenv(f"{name.upper()}_{key}", str(value))
        for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.setenv(key, "1")
        notebook = nbformat.read(ROOT / "docs" / f"{name}.ipynb", as_version=4)
        kept = [c for c in notebook.cells if "install" not in c.metadata.get("tags", [])]
        notebook.cells = kept
        resources = {"metadata": {"path": str(ROOT / "docs")}}
        NotebookClient(notebook, timeout=300, resources=resources).execute()
        return [output for c in kept if c.cell_type == "code" for output in c.outputs]

    return execute


@pytest.mark.slow
def test_the_ablation_runs_from_top_to_bottom(execute, tmp_path):
    shown = execute("ablation", DIR=tmp_path, SEEDS=3, STEPS=20, TRAIN=100, WORKERS=2)
    table = pd.read_csv(tmp_path / "ablation" / "table.csv")
    assert len(table) == 4 and set(table.n) == {1} and table.accuracy.between(0.3, 1).all()
    assert sum("image/png" in o.get("data", {}) for o in shown) == 2, "two figures"


@pytest.mark.slow
def test_the_first_run_runs_from_top_to_bottom(execute, trunk, tmp_path):
    """A beginner's first call fails, or the exports label texts otherwise than the model does."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    shown = execute("first_run", MODEL=trunk, DIR=tmp_path)
    printed = "".join(o["text"] for o in shown if o.get("name") == "stdout")  # no progress bars
    assert "> What is the capital of France?" in printed and "TF-IDF" in printed
    found = re.findall(r"^(good|bad)\s+([01]\.\d+)\s+(.+)$", printed, flags=re.M)
    assert len(found) == 9, "three texts: here, in transformers, in ONNX Runtime"
    here, in_transformers, in_onnx = found[:3], found[3:6], found[6:]
    for ours, *theirs in zip(here, in_transformers, in_onnx, strict=True):
        for label, probability, text in theirs:
            assert (label, text) == (ours[0], ours[2])
            assert float(probability) == pytest.approx(float(ours[1]), abs=1e-3)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_outputs_are_of_a_whole_run_and_name_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not [name for name in ("/home/", "/root/", "/work/", "/tmp/") if name in text]
    cells = json.loads(text)["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", [])]
    assert shown and not [output for output in shown if output["output_type"] == "error"]
