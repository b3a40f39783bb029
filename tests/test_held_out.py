"""bench/held_out.py: one run beside another, on what both held out."""

import sys

import pytest

from bench import held_out
from helpers import mistake
from smallgpt.console import UserError
from smallgpt.runs import metrics


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, run):
    """Two runs that held out the same dialogues, and one that held out more."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {"a": {}, "b": {"seed": 1}, "other": {"data__val_fraction": 0.2}}
    for name, change in changes.items():
        result = run("train", tiny(folder, run=name, **change))
        assert result.status == 0, mistake(result)
    return folder


def test_it_measures_what_training_measured(runs, chat_file):
    """A run is judged on text that it was trained on, or its bytes are counted wrongly."""
    found = held_out.judge(str(runs / "a"), {"all": str(chat_file)}, str(runs / "tokens"))
    last = metrics.read(runs / "a", "val")[-1]
    assert found["all"].bits_per_byte == pytest.approx(last["bits_per_byte"], rel=1e-5)
    dialogues = chat_file.read_text(encoding="utf-8")
    assert 0.05 < found["all"].n_bytes / len(dialogues.encode()) < 0.15


def test_the_table_compares_with_the_last(runs, chat_file, monkeypatch, capsys):
    """The bar is checked against the wrong run, or runs of other splits are compared."""

    def command(*names: str) -> str:
        words = [*(str(runs / name) for name in names), "--text", "all", str(chat_file)]
        monkeypatch.setattr(sys, "argv", ["held_out.py", *words, "--cache", str(runs / "tokens")])
        held_out.main()
        return capsys.readouterr().out

    rows = command("a", "b").splitlines()[2:]
    assert rows[0] == "| run | all | below the last |"
    bits, below = [cell.strip() for cell in rows[2].split("|")[2:4]]
    last_bits, none = [cell.strip() for cell in rows[3].split("|")[2:4]]
    assert none == "0.0%"
    assert float(below.rstrip("%")) == pytest.approx(
        100 * (1 - float(bits) / float(last_bits)), abs=0.06
    )
    with pytest.raises(UserError, match="other held out other dialogues of all than .*a"):
        command("a", "other")
