"""docs/ablation.ipynb runs from top to bottom, and says what its last run said."""

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from helpers import ROOT


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    small = {"DIR": str(tmp_path), "SEEDS": "3", "STEPS": "20", "TRAIN": "100", "WORKERS": "2"}
    for name, value in small.items():
        monkeypatch.setenv(f"ABLATION_{name}", value)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    notebook = nbformat.read(ROOT / "docs" / "ablation.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}
    ).execute()
    table = pd.read_csv(tmp_path / "ablation" / "table.csv")
    assert len(table) == 4 and set(table.n) == {1} and table.accuracy.between(0.3, 1).all()
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in shown) == 2, "two figures"


def test_the_committed_outputs_name_no_machine():
    text = (ROOT / "docs" / "ablation.ipynb").read_text(encoding="utf-8")
    assert (
        "/home/" not in text
        and "/root/" not in text
        and "/work/" not in text
        and "/tmp/" not in text
    )
