"""scripts/sweep.py with search: what is drawn, what is pruned, what reads the test; and sweeps that
share a folder.

They start the stand-in for sentiment_train.py, tests/stand_in.py; the last one is of train.py.
"""

import csv
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ENV, json_lines, mistake, said, starts, wait_for
from scripts import sweep as program
from smallgpt.console import UserError
from smallgpt.sweeps.search import Range, parse_range, spelled

pytest.importorskip("optuna")

SPACE = ["search.dropout=0..0.6", "search.optim.lr=1e-4..1e-2 log", "search.mask=[true,false]"]


@pytest.fixture
def words(stand_in, tmp_path) -> Callable[..., list[str]]:
    """words("trials=3") -> the command line of a search, or of a grid without its space."""

    def words(*argv: str, space: list[str] = SPACE) -> list[str]:
        return ["name=s", f"out_dir={tmp_path}", f"set.data.path={stand_in}", *space, *argv]

    return words


@pytest.fixture
def search(words, tmp_path, monkeypatch) -> Callable[..., Path]:
    """search("trials=3", ...) -> the folder of the search, after its end."""

    def search(*argv: str, space: list[str] = SPACE) -> Path:
        monkeypatch.setattr(sys, "argv", ["scripts/sweep.py", *words(*argv, space=space)])
        assert program.main() == 0
        return tmp_path / "s"

    return search


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def trials(folder: Path) -> list[dict]:
    """The rows of trials.csv, in the order of their numbers."""
    with open(folder / "trials.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return sorted(rows, key=lambda row: row["trial"])


# --- what a search does ---------------------------------------------------------------------------


def test_the_test_is_read_by_the_best_settings_alone(search, capsys):
    """A test score that a trial has seen would be one that the search could have chosen by."""
    folder = search("trials=4", "seeds=[1,2]")
    found = trials(folder)
    assert [row["state"] for row in found] == ["complete"] * 4
    for row in found:
        result = read(folder / row["trial"] / "result.json")
        assert "test" not in result and "baselines" not in result
        (start,) = starts(folder / row["trial"])
        assert {"score_test=false", "seed=1000", f"dropout={row['dropout']}"} <= {*start["argv"]}
        assert result["validation"]["accuracy"] == pytest.approx(float(row["accuracy"]), abs=1e-6)
    best = max(found, key=lambda row: float(row["accuracy"]))
    again = sorted(path.name for path in folder.glob("*_seed-*"))
    assert again == [f"{best['trial']}_seed-{seed}" for seed in (1, 2)]
    for name, seed in zip(again, (1, 2), strict=True):
        (start,) = starts(folder / name)
        drawn = {f"{key}={best[key]}" for key in ("dropout", "optim.lr", "mask")}
        assert drawn | {f"seed={seed}"} <= {*start["argv"]}
        assert "score_test=false" not in start["argv"]
    shown = capsys.readouterr().out
    assert f"best: {best['trial']}" in shown and "they alone have read the test" in shown
    (row,) = csv.DictReader(open(folder / "table.csv", encoding="utf-8-sig", newline=""))
    assert (row["n"], row["dropout"]) == ("2", best["dropout"])

    search("trials=4", "seeds=[1,2,3]")  # the same command: only the third seed is new
    assert len(list(folder.glob("trial-????"))) == 4
    assert all(len(starts(path)) == 1 for path in folder.glob("trial-*"))


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_process(search, tmp_path):
    """Two machines with the same sampler would draw the same first trials, or nobody could repeat
    a search."""
    drawn = []
    for name, seed in (("a", 1000), ("b", 1000), ("c", 1001)):
        search("trials=3", "seeds=[0]", f"search_seed={seed}", f"name={name}")
        drawn.append([row["dropout"] for row in trials(tmp_path / name)])
    first, again, other = drawn
    assert again == first and len({*first}) == 3 and not {*first} & {*other}


def test_a_trial_that_is_worse_than_most_is_ended_early(search, stand_in, capsys):
    (stand_in / "worst").write_text("trial-0005", encoding="utf-8")
    folder = search("trials=7", "seeds=[0]")
    found = trials(folder)
    assert [row["state"] for row in found].count("pruned") == 1
    assert (found[5]["state"], float(found[5]["accuracy"])) == ("pruned", 0.1)
    assert (folder / "trial-0005" / "step-00000001").exists(), "it saved its state"
    assert "pruned after evaluation 1" in capsys.readouterr().out
    assert not list(folder.glob("trial-0005_seed-*"))


def test_without_pruning_every_trial_is_trained_to_its_end(search, stand_in):
    search("trials=5", "seeds=[0]", "prune=false")
    (stand_in / "worst").write_text("trial-0005", encoding="utf-8")
    (stand_in / "seconds").write_text("0.5", encoding="utf-8")
    folder = search("trials=6", "seeds=[0]", "prune=false")
    assert [row["state"] for row in trials(folder)] == ["complete"] * 6


def test_loss_is_the_lower_the_better(search):
    folder = search("trials=3", "seeds=[0]", "set.select=loss")
    best = min(trials(folder), key=lambda row: float(row["loss"]))
    assert (folder / f"{best['trial']}_seed-0").exists()


# --- interruptions, and several at once -----------------------------------------------------------


def test_after_ctrl_c_the_same_command_goes_on_with_the_same_trial(
    start, search, words, stand_in, tmp_path
):
    """It would draw others in the place of trials that were stopped, or count them twice."""
    search("trials=1", "seeds=[0]")
    folder = tmp_path / "s"
    interrupted = folder / "trial-0001"
    (stand_in / "slow").touch()
    process = start("stand_in", words("trials=3", "seeds=[0]"))
    wait_for((interrupted / "ready").exists, "the second trial")
    before = starts(interrupted)[0]["argv"]
    process.kill(signal.SIGINT)
    ended = process.wait()
    assert (ended.status, ended.err.count("Traceback")) == (130, 0)
    assert "the same command continues" in ended.out
    assert not (folder / "trials.csv").exists() or len(trials(folder)) == 1

    (stand_in / "slow").unlink()
    search("trials=3", "seeds=[0]")
    assert [len(starts(folder / f"trial-{i:04d}")) for i in range(3)] == [1, 2, 1]
    assert starts(interrupted)[1]["argv"] == before
    assert read(interrupted / "result.json")["resumed"]
    assert [row["state"] for row in trials(folder)] == ["complete"] * 3


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_two_sweeps_at_once_divide_the_runs(start, words, stand_in, tmp_path, kind):
    """Each run would be trained twice, or one sweep would end with half a table."""
    space = SPACE if kind == "search" else ["grid.lm_weight=[1,2,3,4,5,6,7,8]"]
    argv = words("trials=8", "seeds=[0]", space=space)
    (stand_in / "seconds").write_text("0.3", encoding="utf-8")
    both = [start("stand_in", argv) for _ in range(2)]
    ended = [process.wait() for process in both]
    assert [result.status for result in ended] == [0, 0], ended[0].err + ended[1].err
    folder = tmp_path / "s"
    runs = [path for path in folder.iterdir() if path.is_dir()]
    assert len(runs) == (9 if kind == "search" else 8)
    assert all(len(starts(run)) == 1 for run in runs)
    parents = {starts(run)[0]["parent"] for run in runs}
    assert parents == {process.pid for process in both}, "one of them has trained nothing"
    tables = [result.out[result.out.index("\n| ") :] for result in ended]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_what_a_killed_sweep_leaves_is_taken_over(start, words, stand_in, tmp_path, kind):
    """A machine that dies would leave a hole in the table, and the others waiting for ever."""
    space = SPACE if kind == "search" else ["grid.lm_weight=[1,2,3]"]
    argv = words("trials=3", "seeds=[0]", space=space)
    folder = tmp_path / "s"
    (stand_in / "slow").touch()
    first = start("stand_in", argv)
    wait_for(lambda: list(folder.glob("*/ready")), "the first run")
    (ready,) = folder.glob("*/ready")
    (left,) = starts(ready.parent)
    (stand_in / "slow").unlink()
    second = start("stand_in", argv)
    wait_for(lambda: "waiting" in said(second), "what the first one holds")
    first.kill()
    assert first.wait().status == -signal.SIGKILL
    assert len(starts(ready.parent)) == 1, "its run outlives it, and still has the lock"
    os.kill(left["pid"], signal.SIGKILL)
    ended = second.wait()
    assert ended.status == 0, ended.err
    assert len(starts(ready.parent)) == 2 and read(ready.parent / "result.json")
    assert len(list(folder.glob("*/result.json"))) == (4 if kind == "search" else 3)
    if kind == "search":
        assert [row["state"] for row in trials(folder)] == ["complete"] * 3


# --- mistakes -------------------------------------------------------------------------------------


def test_ranges():
    assert parse_range("1e-4..1e-2 log") == Range(1e-4, 1e-2, is_log=True, is_whole=False)
    assert parse_range("2..8") == Range(2, 8, is_log=False, is_whole=True)
    assert parse_range("-1..0.5") == Range(-1, 0.5, is_log=False, is_whole=False)
    assert [spelled(value) for value in (0.00031623, 12.0, 8, "none")] == [
        "0.0003162",
        "12",
        "8",
        "none",
    ]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["search.dropout=0.1"], "search.dropout must be a range, such as 1e-4..1e-2 log"),
        (["search.dropout=0.3..0.1"], "0.3..0.1: the first number must be below the second"),
        (["search.optim.lr=0..1 log"], "0..1 log: a log range begins above 0"),
        (["search.optim.lr=a..b"], "a..b: a range is of numbers"),
        (["search.mask=[true]"], "search.mask must have two or more different values"),
        (["search.seed=0..9"], "seed is set by the sweep itself"),
        (["search.dropout=0..1", "grid.mask=[true]"], "grid and search exclude each other"),
        (["search.dropout=0..1", "set.dropout=0"], "dropout is in set and in search"),
        (["search.dropout=0..1", "search_seed=2"], "search_seed=2 must be none of seeds"),
        (["search.dropout=0..1", "set.score_test=true"], "score_test is set by the search itself"),
        (["search.select=[loss,accuracy]"], "select is what trials are judged by"),
        (["search.dropout=0..1", "trials=0"], "trials must be int >= 1"),
    ],
)
def test_mistakes(words, tmp_path, mistake_of, argv, says):
    message = mistake_of(program.main, words(*argv, space=[]))
    assert says in message and "\n" not in message
    assert not (tmp_path / "s").exists()


def test_the_missing_package_is_named(words, mistake_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    message = mistake_of(program.main, words())
    assert message.startswith("a search needs the package optuna: pip install optuna")


def test_a_search_that_has_changed_is_refused(search, words, mistake_of, tmp_path):
    """The trials of two spaces, or of two recipes, would be compared as if they were of one."""
    search("trials=2", "seeds=[0]")
    wider = ["search.dropout=0..0.9", *SPACE[1:]]
    message = mistake_of(program.main, words("seeds=[0]", space=wider))
    assert "search was {" in message and "put it back, or choose another name=" in message
    message = mistake_of(program.main, words("seeds=[0]", "set.epochs=9"))
    assert "trial-0000: epochs was not set and is now 9" in message
    message = mistake_of(program.main, words("seeds=[0]", "set.select=loss"))
    assert "select was accuracy and is now loss" in message
    assert len(list((tmp_path / "s").glob("trial-????"))) == 2


def test_a_search_ends_when_every_trial_fails(search, tmp_path):
    """A mistyped setting would be tried twenty times."""
    with pytest.raises(UserError) as error:
        search("set.lm_weight=13", "seeds=[0]")
    message = str(error.value)
    assert message.startswith("no trial has succeeded")
    assert message.count("lm_weight=13 is no good") == 3
    assert len(list((tmp_path / "s").glob("trial-????"))) == 3


def test_a_trial_that_fails_does_not_end_the_search(search, stand_in):
    """A learning rate that is too high makes the loss infinite: that is a result."""
    (stand_in / "broken").write_text("trial-0001", encoding="utf-8")
    folder = search("trials=3", "seeds=[0]")
    assert [row["state"] for row in trials(folder)] == ["complete", "fail", "complete"]


# --- the true script ------------------------------------------------------------------------------


@pytest.mark.slow
def test_pretraining_is_searched_by_bits_per_byte(start, run, tiny, tmp_path, monkeypatch):
    """A token's loss cannot compare tokenizers; and train.py has no test split."""
    own = ("run=", "out_dir=", "optim.lr=")
    common = [f"set.{word}" for word in tiny(tmp_path) if not word.startswith(own)]
    common = [word.replace("max_steps=12", "max_steps=4") for word in common]
    space = ["search.optim.lr=1e-4..1e-1 log", "trials=2", "seeds=[1]"]
    argv = ["script=train", "name=s", f"out_dir={tmp_path}", *common, *space]
    for key, value in ENV.items():
        monkeypatch.setenv(key, value)
    ended = start("scripts.sweep", argv).wait(timeout=180)
    assert ended.status == 0, ended.err
    folder = tmp_path / "s"
    found = trials(folder)
    for row in found:
        records = json_lines(folder / row["trial"] / "metrics.jsonl")
        (last,) = (r for r in records if r["split"] == "val" and r["step"] == 4)
        assert float(row["bits_per_byte"]) == pytest.approx(last["bits_per_byte"], rel=1e-5)
    best = min(found, key=lambda row: float(row["bits_per_byte"]))
    (row,) = csv.DictReader(open(folder / "table.csv", encoding="utf-8-sig", newline=""))
    assert (row["n"], row["optim.lr"]) == ("1", best["optim.lr"])
    assert float(row["bits_per_byte"]) != float(best["bits_per_byte"]), "the seed is another"
    assert "held-out bits per byte" in ended.out and "they flatter a little" in ended.out
    message = mistake(run("scripts.sweep", [*argv, "set.max_steps=5"]))
    assert "max_steps was 4 and is now 5" in message
