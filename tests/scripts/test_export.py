"""The command scripts/export.py: what it writes of a real run, and what it says of mistakes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import export
from smallgpt.runs import metrics
from smallgpt.weights.pretrained import open_trunk


@pytest.fixture
def exported(monkeypatch, capsys) -> Callable[..., str]:
    """exported(run, "to=hf", out=folder) -> what the command prints."""

    def exported(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        export.main()
        return capsys.readouterr().out

    return exported


def test_the_card_holds_what_the_run_recorded(trunk, tmp_path, exported):
    """A published model would come without its data and its scores, or with a stranger's paths."""
    out = tmp_path / "out"
    shown = exported(trunk, "to=hf", f"out={out}")
    names = {path.name for path in out.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all(str(out / name) in shown for name in names)
    card = (out / "README.md").read_text(encoding="utf-8")
    last = metrics.read(trunk, "val")[-1]
    assert f"validation: loss {last['loss']:.4f}" in card
    (source,) = open_trunk(str(trunk)).sources
    assert source["sha256"] in card and "chat.txt" in card
    assert str(Path(source["path"]).parent) not in card and str(trunk) not in card
    assert "- seed 0" in card and "licence" in card


def test_mistakes_are_one_sentence(trunk, tmp_path, mistake_of):
    for words, message in [
        ([], "give a run and out=FOLDER"),
        ([trunk], "give a run and out=FOLDER"),
        ([trunk, trunk, f"out={tmp_path / 'x'}"], "one run at a time"),
        ([trunk, "to=pickle", f"out={tmp_path / 'x'}"], "to must be hf|onnx|gguf, not pickle"),
        ([tmp_path / "absent", f"out={tmp_path / 'x'}"], "there is no checkpoint"),
        ([trunk, f"out={tmp_path}"], "is there already: delete it, or give another folder"),
    ]:
        (tmp_path / "something").touch()
        assert message in mistake_of(export.main, words)
        assert [path.name for path in tmp_path.iterdir()] == ["something"]
