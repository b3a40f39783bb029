"""What the tests of a grid and of a search share: trainings that are not made."""

from pathlib import Path

import pytest

from helpers import ROOT
from smallgpt.sweeps import compare, jobs


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """The folder of the data of a sweep of stand-ins; see tests/stand_in.py for its files."""
    monkeypatch.setattr(jobs, "SCRIPTS", {"sentiment_train": ROOT / "tests" / "stand_in.py"})
    monkeypatch.setattr(jobs, "POLL", 0.01)
    monkeypatch.setattr(jobs, "LOOK", 0.1)
    monkeypatch.setattr(compare, "draw", lambda *args: None)  # it takes half a second
    (tmp_path / "data").mkdir()
    return tmp_path / "data"
