"""A tracker: what reaches the page of a run, what does not, and one curve across resumes.

The packages write into folders here, as they do without a network.
"""

import contextlib
import importlib.util
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ROOT
from smallgpt.console import UserError
from smallgpt.runs import tracker
from smallgpt.runs.metrics import read
from smallgpt.runs.tracker import Tracker, tracker_problems, without_folders

OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}


class Pages:
    """A stand-in for the packages: what each page was told."""

    def __init__(self, monkeypatch):
        self.opened: list[tuple[str, dict]] = []  # (id, settings)
        self.told: list[tuple[dict, int]] = []
        monkeypatch.setitem(tracker.OPEN, "wandb", self.open)

    def open(self, run: Path, page_id: str, settings: dict) -> "Pages":
        self.opened.append((page_id, settings))
        return self

    def log(self, numbers: dict, step: int) -> None:
        self.told.append((numbers, step))

    def finish(self) -> None:
        self.told.append(({}, -1))


def keep_record(run: Path, step: int, split: str) -> None:
    line = json.dumps({"step": step, "split": split, "loss": 0.5})
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        print(line, file=file)


def test_a_resumed_run_goes_on_with_its_page_and_repeats_no_step(tmp_path, monkeypatch):
    """The steps after the last checkpoint were a zigzag in the curve, and each sitting a page."""
    pages = Pages(monkeypatch)
    for first in (1, 3):  # the second sitting repeats step 3
        told = Tracker("wandb", tmp_path, {"seed": 0})
        for step in range(first, first + 3):
            keep_record(tmp_path, step, "train")
            told.log({"loss/train": 0.1 * step}, step, "train")
        told.log({"loss/val": 0.1 * step}, step, "val")
        keep_record(tmp_path, step, "val")
        told.close()
    (first_id, _), (second_id, _) = pages.opened
    assert first_id == second_id
    assert [step for _, step in pages.told] == [1, 2, 3, 3, -1, 4, 5, 5, -1]


def test_a_page_begun_late_is_told_what_comes_from_then_on(tmp_path, monkeypatch):
    """Steps that were made without this tracker are not on its page: none may be passed over."""
    pages = Pages(monkeypatch)
    keep_record(tmp_path, 8, "train")
    (tmp_path / "tracker.json").write_text('{"swanlab": "1234"}', encoding="utf-8")
    told = Tracker("wandb", tmp_path, {})
    told.log({"loss/train": 1.0}, 5, "train")
    assert pages.told == [({"loss/train": 1.0}, 5)]
    kept = json.loads((tmp_path / "tracker.json").read_text(encoding="utf-8"))
    assert kept["swanlab"] == "1234" and kept["wandb"] == pages.opened[0][0]


def test_no_folder_of_the_user_is_sent():
    """A page that others see would show user names, and what the work is called at home."""
    settings = {
        "data.path": ["/home/ann/secret project/a.txt", "data/b.txt"],
        "trunk": "~/runs/trunk/",
        "model.n_layer": 2,
        "prompts": ["/system hello", "你好"],
    }
    assert without_folders(settings) == {
        "data.path": ["a.txt", "b.txt"],
        "trunk": "trunk",
        "model.n_layer": 2,
        "prompts": ["/system hello", "你好"],
    }


def test_a_package_that_is_missing_is_named(mistake_of, tmp_path, monkeypatch):
    import train

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind in ("swanlab", "wandb", "trackio"):
        (problem,) = tracker_problems(kind)
        assert problem == f"tracker={kind} needs the package {kind}: pip install {kind}"
    assert tracker_problems("none") == []
    message = mistake_of(train.main, [f"out_dir={tmp_path}", "tracker=wandb"])
    assert "pip install wandb" in message and not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_opened_is_one_sentence(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise RuntimeError("No API key configured.\nMore lines")

    monkeypatch.setitem(tracker.OPEN, "wandb", fail)
    with pytest.raises(UserError) as error:
        Tracker("wandb", tmp_path, {})
    assert str(error.value) == (
        "tracker=wandb could not begin (No API key configured.): run `wandb login`, or set "
        "WANDB_MODE=offline, or leave tracker out"
    )
    assert not (tmp_path / "tracker.json").exists(), "the next start would pass over its steps"


# --- the true packages, without a network ---------------------------------------------------------


@pytest.fixture
def sitting(run, tiny, tmp_path) -> Callable[[str, int], None]:
    """sitting("wandb", 4) trains a run up to this step, with a tracker of this kind."""
    home = tmp_path / "home"
    env = {**OFFLINE, "HOME": str(home), "HF_HOME": str(home), "WANDB_CACHE_DIR": str(home)}

    def sitting(kind: str, steps: int) -> None:
        words = tiny(tmp_path, run="r", max_steps=steps, prompts="[]")
        ended = run("train", [*words, f"tracker={kind}"], env=env)
        assert ended.status == 0, ended.err[-2000:]

    return sitting


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, pattern", [("wandb", "wandb/*/*.wandb"), ("swanlab", "swanlog/*/**/*")]
)
def test_an_offline_page_has_numbers_and_settings_and_nothing_of_the_machine(
    sitting, chat_file, tmp_path, kind, pattern
):
    pytest.importorskip(kind)
    sitting(kind, 4)
    files = [path for path in (tmp_path / "r").glob(pattern) if path.is_file()]
    written = b"".join(path.read_bytes() for path in files if path.suffix != ".log")
    for name in (b"loss/train", b"bits_per_byte/val", b"model.n_layer"):
        assert name in written
    secrets = (str(ROOT), str(chat_file.parent), "train.py", "safetensors==")
    for secret in secrets:
        assert secret.encode() not in written


@pytest.mark.slow
def test_trackio_has_one_curve_of_two_sittings(sitting, tmp_path):
    pytest.importorskip("trackio")
    sitting("trackio", 4)
    sitting("trackio", 8)
    (database,) = (tmp_path / "home").rglob("small-gpt.db")
    with contextlib.closing(sqlite3.connect(database)) as pages:
        rows = pages.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
        ((config,),) = pages.execute("SELECT config FROM configs").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    numbers = [(step, json.loads(metrics)) for _, step, metrics in rows]
    losses = {step: found["loss/train"] for step, found in numbers if "loss/train" in found}
    assert losses == {r["step"]: r["loss"] for r in read(tmp_path / "r", "train")}
    assert sum("loss/train" in found for _, found in numbers) == 8
    assert [step for step, found in numbers if "bits_per_byte/val" in found] == [4, 8]
    assert json.loads(config)["model.n_layer"] == 1
