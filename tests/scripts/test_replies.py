"""scripts/replies.py as its users type it."""

import pytest

from scripts import replies

PROMPTS = "what is red 3?\nhi | there\nho\n\n你好\n再见\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny, run):
    folder = tmp_path_factory.mktemp("runs")
    assert run("train", tiny(folder, run="made")).status == 0
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return folder / "made"


def test_the_same_answers_each_time(model, run):
    """A page of replies cannot be made again, or a group's prompts are not all answered."""
    args = [model, f"prompts={model.parent / 'prompts.txt'}", "sample.max_tokens=5"]
    first, second = run("scripts.replies", args), run("scripts.replies", args)
    assert first.status == 0, first.err
    assert first.out == second.out
    asked = [line.partition(" → ")[0].strip() for line in first.out.splitlines()]
    assert asked == [line for line in PROMPTS.splitlines() if line]


def test_a_table_of_the_first_of_each_group(model, run):
    """A prompt breaks its row of the table, or a language is left out."""
    prompts = f"prompts={model.parent / 'prompts.txt'}"
    out = run("scripts.replies", [model, prompts, "each=2", "form=table", "device=cpu"]).out
    heading, *rows = out.splitlines()
    assert str(model) in heading and "temperature 0.0" in heading and "seed 0" in heading
    cells = [row.split(" | ")[0].lstrip("| ") for row in rows if row.startswith("| ")]
    assert cells == ["prompt", "what is red 3?", "hi \\| there", "prompt", "你好", "再见"]


@pytest.mark.parametrize(
    "args, says",
    [
        ("", "which model?"),
        ("a b", "which model?"),
        ("/none", "there is no checkpoint"),
        ("/none prompts=/none.txt", "cannot read /none.txt"),
        ("/none echo=3", "unknown key echo"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, mistake_of, args, says):
    """A mistake has a traceback for an answer."""
    prompts = tmp_path / "config" / "prompts.txt"
    prompts.parent.mkdir()
    prompts.write_text("hi\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # without the model of the repository
    assert says in mistake_of(replies.main, args.split())
