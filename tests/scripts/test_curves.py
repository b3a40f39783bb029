"""scripts/curves.py: what a person sees in the terminal and in the picture."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import curves
from smallgpt.console import UserError

Show = Callable[..., str]


@pytest.fixture
def show(monkeypatch, capsys) -> Show:
    """show("runs/a", "x=tokens") -> what is printed in a terminal of 60 columns."""

    def show(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["scripts/curves.py", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "60")
        curves.main()
        return capsys.readouterr().out

    return show


def write_run(folder: Path, train: list[float], val: dict[int, float]) -> Path:
    """A run with a training loss for each step; of val, by step, the bits per byte are a half."""
    folder.mkdir(parents=True)
    records = [
        {"step": i, "split": "train", "tokens": 100 * i, "loss": loss}
        for i, loss in enumerate(train, 1)
    ]
    records += [
        {"step": i, "split": "val", "tokens": 100 * i, "loss": loss, "bits_per_byte": loss / 2}
        for i, loss in val.items()
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def chart(text: str) -> list[list[str]]:
    """The words of each row below the head of the first chart."""
    rows = text.split("\n\n")[1].splitlines()[2:]
    return [row.split() for row in rows]


def test_the_curves_of_a_true_run(run, tiny, tmp_path, show):
    assert run("train", tiny(tmp_path, run="first", prompts="[]")).status == 0
    text = show(tmp_path / "first", "x=tokens")
    assert f"{tmp_path / 'first'}: best validation" in text
    assert [row[0] for row in chart(text)] == [f"{256 * step:,}" for step in range(1, 13)]
    assert f"wrote {tmp_path / 'first' / 'curve.png'}" in text
    assert (tmp_path / "first" / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_row_is_the_mean_of_its_part_of_the_run_and_marks_it(tmp_path, show):
    """Would show a single noisy step, or a mark that is not where the number says."""
    falling = [10.0 - 9 * i / 119 for i in range(120)]
    text = show(write_run(tmp_path / "a", falling, {60: 7.75, 120: 7.0}))
    rows = chart(text)
    assert [row[0] for row in rows] == [f"{10 * i}" for i in range(1, 13)]
    means = [sum(falling[i : i + 10]) / 10 for i in range(0, 120, 10)]
    assert [row[1] for row in rows] == [f"{mean:.3f}" for mean in means]
    assert rows[5][2] == "7.750" and rows[11][2] == "7.000", "validation, in its own rows only"
    assert len(rows[4]) == 3, "a number, and one mark"
    lines = text.splitlines()
    assert max(len(line) for line in lines[3:-2]) < 60, "a line must not wrap"
    marks = [line.find("-") for line in lines[4:16]]
    assert marks == sorted(marks, reverse=True) and len(set(marks)) == 12, "the loss falls"
    assert lines[15].index("o") > lines[15].index("-"), "the validation loss is higher"


def test_runs_are_drawn_to_one_scale_and_named_by_their_folders(tmp_path, show):
    """Regression: curves of two runs could not be compared by eye: each had a scale of its own."""
    low = write_run(tmp_path / "low", [2.0, 1.0], {2: 1.0})
    high = write_run(tmp_path / "高 #2", [4.0, 3.0], {2: 3.5})
    text = show(low, high, f"out={tmp_path / 'both.png'}")
    assert f"{low}: best validation 0.500 bits/byte" in text
    assert f"{high}: best validation 1.750 bits/byte" in text
    scales = [line.split()[-2:] for line in text.splitlines() if line.startswith("step")]
    assert scales == [["1.00", "4.00"]] * 2
    assert (tmp_path / "both.png").exists() and not (low / "curve.png").exists()


def test_a_terminal_of_any_width_and_encoding_shows_it(tmp_path, show, monkeypatch):
    """Regression: the braille dots of the chart were question marks in a GBK console."""
    folder = write_run(tmp_path / "a", [3.0, 2.0, 1.0], {3: 2.0})
    show(folder).encode("ascii")
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((8, 8)))
    assert "3.000" in show(folder)


def test_a_run_that_has_just_begun_or_gone_wrong(tmp_path, show):
    """Regression: no validation yet was a traceback; a loss that is no number is null in JSON."""
    young = write_run(tmp_path / "young", [5.0], {})
    assert "no validation yet" in show(young)
    wild = write_run(tmp_path / "wild", [5.0, 6.0], {1: 4.0})
    lost = {"step": 3, "split": "val", "tokens": 300, "loss": None, "bits_per_byte": None}
    with open(wild / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(lost) + "\n")
    text = show(wild)
    assert "best validation 2.000" in text and "nan" not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "which runs?"),
        (["{here}/none"], "none has no metrics.jsonl with training records"),
        (["{here}/tuned"], "tuned is a fine-tuning, whose curves are in its folder"),
        (["{here}/a", "x=epoch"], "x must be step|tokens, not epoch"),
        (["{here}/a", "y=tokens"], "unknown key y"),
        (["{here}/a", "--x", "tokens"], "there is no file --x; settings are written key=value"),
        (["{here}/a", "out={here}/a.jpeg"], "a.jpeg must end with .png"),
        (["{here}/a", "out={here}/none/a.png"], "there is no folder {here}/none"),
    ],
)
def test_mistakes(tmp_path, show, words, says):
    write_run(tmp_path / "a", [2.0, 1.0], {})
    tuned = write_run(tmp_path / "tuned", [2.0, 1.0], {})
    evaluation = {"step": 1, "split": "val", "loss": 0.7, "accuracy": 0.5}
    with open(tuned / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(evaluation) + "\n")
    with pytest.raises(UserError) as error:
        show(*(word.format(here=tmp_path) for word in words))
    message = str(error.value)
    assert says.format(here=tmp_path) in message and "\n" not in message


def test_a_folder_with_an_equals_sign_is_a_run(tmp_path, show):
    """A run may be named lr=0.1; only its path has a slash before the sign."""
    folder = write_run(tmp_path / "lr=0.1", [2.0, 1.0], {})
    assert f"{folder}: no validation yet" in show(folder)
