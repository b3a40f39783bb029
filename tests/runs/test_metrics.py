"""What a run tells: metrics.jsonl, its damaged lines, and the lines for people."""

import json
import math
import random

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smallgpt.parallel.world import World
from smallgpt.runs import metrics
from smallgpt.runs.metrics import Metrics, drop_partial_line, read

ALONE = World(0, 1, torch.device("cpu"))
OTHER = World(1, 2, torch.device("cpu"))


def record(step: int, split: str = "train", loss: float = 0.5) -> dict:
    return {"step": step, "split": split, "loss": loss}


def lines(*records: dict) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


DAMAGED = {
    "NULs": b"\0" * 300,
    "NULs before a record": b"\0" * 30 + b'{"step": 9, "split": "train", "loss": 9}',
    "a half": b'{"step": 9, "spl',
    "two glued": b'{"step": 9, "spl{"step": 9, "split": "train", "loss": 9}',
    "nothing": b"",
    "not UTF-8": b'{"step": 9, "split": "train", "loss": "\xff\xfe"}',
    "UTF-16": '{"step": 9, "split": "train"'.encode("utf-16-le"),
    "a list": b"[9]",
    "a number": b"9",
    "null": b"null",
    "no step": b'{"split": "train", "loss": 9}',
    "no split": b'{"step": 9, "loss": 9}',
    "a step that is none": b'{"step": "9", "split": "train", "loss": 9}',
    "other line ends": b"\x0b\x0c\x1c\r\xe2\x80\xa8",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_is_passed_over(name, tmp_path):
    """Regression: a line of NULs, as a crash leaves it, was a JSONDecodeError at every start."""
    file = tmp_path / "metrics.jsonl"
    whole = [record(1), record(2), record(3)]
    for at in range(4):
        content = lines(*whole[:at]) + DAMAGED[name] + b"\n" + lines(*whole[at:])
        file.write_bytes(content)
        assert read(tmp_path, "train") == whole
        drop_partial_line(file)
        assert file.read_bytes() == content


def test_the_last_whole_line_of_a_step_counts(tmp_path):
    """A resumed run repeats steps. Another process may read while a line is being written."""
    assert read(tmp_path, "train") == []
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"")
    assert read(str(tmp_path), "train") == []
    records = [record(10), record(20), record(5), record(20, loss=0.1), record(20, "val")]
    content = lines(*records)
    newest = lines(record(20, loss=0.01))
    for length in range(len(newest)):
        file.write_bytes(content + newest[:length])
        assert read(tmp_path, "train") == [record(5), record(10), record(20, loss=0.1)]
        assert read(tmp_path, "val") == [record(20, "val")]
    file.write_bytes(content + newest)
    assert read(tmp_path, "train")[-1] == record(20, loss=0.01)


def test_half_a_line_is_cut_off_before_the_next(tmp_path):
    file = tmp_path / "metrics.jsonl"
    drop_partial_line(file)
    assert not file.exists()
    draw = random.Random(0)
    whole = lines(record(1), record(2))
    for partial in (b"", b"\0" * 4096, whole[: draw.randrange(1, 20)], b"\xff"):
        for before in (b"", whole):
            file.write_bytes(before + partial)
            drop_partial_line(file)
            assert file.read_bytes() == before


def test_a_run_begins_on_a_new_line_and_writes_what_json_knows(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(lines(record(1)) + b'{"step": 2, "sp')
    told = Metrics(tmp_path, ALONE, 1, 10)
    told.log({**record(2), "grad_norm": math.inf, "macro_f1": math.nan})
    told.close()
    _, line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert found.pop("time") > 1e9
    assert found == {**record(2), "grad_norm": None, "macro_f1": None}
    assert [r["step"] for r in read(tmp_path, "train")] == [1, 2]


def test_a_record_is_a_line_for_people(tmp_path, capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    told = Metrics(tmp_path, ALONE, 10, 100)
    now = 130.0
    speed = {"lr": 3e-4, "grad_norm": 0.987, "tokens_per_second": 12345.6}
    told.log({**record(40, loss=1.23456), **speed, "mfu": 0.4321})
    told.log({**record(40), **speed, "mfu": None})
    told.log({**record(40), "accuracy": 0.5, "lr": 1.0, "grad_norm": 1.0, "examples_per_second": 9})
    told.log({**record(40, "val"), "bits_per_byte": 1.5})
    told.log({**record(40, "val"), "accuracy": 0.98765, "macro_f1": 0.5})
    told.text("replies", "hi -> hello\nbye -> bye", 40)
    metrics.say("said")
    told.close()
    rate = "lr 3.00e-04 | norm 0.99 | 12,346 tokens/s"
    slow = "lr 1.00e+00 | norm 1.00 | 9 examples/s"
    assert capsys.readouterr().out.splitlines() == [
        f"step 40/100 | train loss 1.2346 | {rate} | mfu 43.2% | 01:00 left",
        f"step 40/100 | train loss 0.5000 | {rate} | 01:00 left",
        f"step 40/100 | train loss 0.5000 | accuracy 50.00% | {slow} | 01:00 left",
        "step 40/100 | val loss 0.5000 | 1.5000 bits/byte",
        "step 40/100 | val loss 0.5000 | accuracy 98.77% | macro F1 50.00%",
        "hi -> hello",
        "bye -> bye",
        "said",
    ]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(tmp_path):
    for first, last, loss in ((0, 4, 1.0), (2, 4, 0.5)):
        told = Metrics(tmp_path, ALONE, first, 4)
        for step in range(first + 1, last + 1):
            told.log(record(step, loss=loss))
        told.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/train")
    assert [(e.step, e.value) for e in events] == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)]


def test_only_the_main_process_tells(tmp_path, capsys):
    told = Metrics(tmp_path, OTHER, 0, 4)
    told.step(1.0, 10)
    told.log(record(1))
    told.text("replies", "hi", 1)
    told.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
