"""The command scripts/export.py: what it writes of a real run, and what it says of mistakes."""

import json
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from exporting import run_example
from fine_tuning import made
from helpers import write_csv
from scripts import classify, export
from smallgpt.files import read_json
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
    assert "- seed 0" in card and "licences of these data were not recorded" in card


def test_the_card_of_a_published_run_is_kept(trunk, tmp_path, exported):
    """The licences that the run's own card names would be lost."""
    run = tmp_path / "published"
    shutil.copytree(trunk, run)
    page = "# mine\n\n## What it has read\n\n| chat.txt | MIT |\n"
    (run / "README.md").write_text(page, encoding="utf-8")
    exported(run, "to=hf", f"out={tmp_path / 'out'}")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## The card of the run\n\n### mine" in card
    assert "#### What it has read\n\n| chat.txt | MIT |" in card


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


TEXTS = ["the room was dirty", "很好 干净", " lovely\t", "<|sep|>", "a\tb", "x", "12 + 3"]
LONG = ["station " * 90, "station " * 60 + "\t" + "lovely " * 70]


def expected_of(
    run: Path, texts: list[str], monkeypatch, capsys
) -> list[tuple[str, pytest.approx]]:
    """What scripts/classify.py answers: labels and probabilities."""
    words = ["classify.py", str(run), "device=cpu", "dtype=float32", "json=true", *texts]
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()
    classify.main()
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = []
    for answer in answers:
        probability = answer["probabilities"][answer["label"]]
        found.append((answer["label"], pytest.approx(probability, abs=1e-4)))
    return found


@pytest.mark.slow
def test_a_pipeline_answers_as_classify_does(gpt2, fit, tmp_path, exported, monkeypatch, capsys):
    """A user would publish a classifier, and others get other labels."""
    hub = pytest.importorskip("transformers")
    run = fit(trunk=gpt2)
    exported(run, "to=hf", f"out={tmp_path / 'out'}")
    pipeline = hub.pipeline("text-classification", str(tmp_path / "out"))
    found = [(best["label"], best["score"]) for best in pipeline(TEXTS)]
    assert found == expected_of(run, TEXTS, monkeypatch, capsys)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    accuracy = read_json(run / "result.json")["test"]["accuracy"]
    assert f"accuracy {accuracy:.4f}" in card and "text classifier (bad, good)" in card


@pytest.mark.slow
def test_the_example_without_torch_answers_as_classify_does(
    gpt2, fit, tmp_path, exported, monkeypatch, capsys
):
    """A user would move a classifier to a server, and get other labels there: of pairs, of texts
    that lose their middle, or of padding that is read."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    rows = [(first, second, label) for (first, label), (second, _) in pairwise(made(120))]
    pairs = write_csv(tmp_path / "pairs.csv", rows, ("one", "two", "label"))
    columns = dict(data__text_column="one", data__pair_column="two", data__label_column="label")
    run = fit(trunk=gpt2, pool="mean", mask=False, data__path=pairs, **columns)
    exported(run, "to=onnx", f"out={tmp_path / 'out'}")
    texts = TEXTS + LONG
    lines = run_example(tmp_path / "out" / "classify.py", *texts)
    found = []
    for line, text in zip(lines, texts, strict=True):
        label, probability, shown = line.split("\t", 2)
        assert shown == text
        found.append((label, float(probability)))
    assert found == expected_of(run, texts, monkeypatch, capsys)
