"""scripts/sweep.py: which runs there are, what survives an end, what the table says.

Most sweeps here start a stand-in for sentiment_train.py, tests/stand_in.py; the last one is true.
"""

import csv
import json
import logging
import math
import os
import random
import shutil
import signal
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_rel

from helpers import ENV, mistake, said, starts, wait_for
from scripts import sweep as program
from smallgpt import settings
from smallgpt.console import UserError
from smallgpt.sweeps import compare, jobs

DRAW = compare.draw


@pytest.fixture
def figures(stand_in, monkeypatch) -> None:
    """The figure is drawn."""
    monkeypatch.setattr(compare, "draw", DRAW)


@pytest.fixture
def sweep(stand_in, tmp_path, monkeypatch) -> Callable[..., Path]:
    """sweep("grid.mask=[true,false]", ...) -> the folder of the sweep, after its end."""

    def sweep(*argv: str) -> Path:
        monkeypatch.setattr(
            sys, "argv", ["scripts/sweep.py", *arguments(stand_in, tmp_path), *argv]
        )
        assert program.main() == 0
        return tmp_path / "s"

    return sweep


def arguments(data: Path, out: Path) -> list[str]:
    return ["name=s", f"out_dir={out}", f"set.data.path={data}"]


def keys_of(run: Path) -> dict:
    """The settings with which a run was last started, as text."""
    return dict(word.split("=", 1) for word in starts(run)[-1]["argv"])


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def rows(folder: Path) -> list[dict]:
    with open(folder / "table.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


# --- the grid, the table, the figure --------------------------------------------------------------


def test_a_grid_times_seeds_gives_one_table_and_one_figure(sweep, figures, capsys):
    folder = sweep(
        "grid.mask=[true,false]",
        "grid.freeze=[none,'all_but_last:1']",
        "seeds=[0,1,3]",
        "workers=2",
    )
    runs = sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert len(runs) == 12 and "mask-true_freeze-all_but_last-1_seed-3" in runs
    assert all(len(starts(folder / run)) == 1 for run in runs)
    table = rows(folder)
    assert [(r["mask"], r["freeze"]) for r in table] == [
        ("true", "none"),
        ("true", "all_but_last:1"),
        ("false", "none"),
        ("false", "all_but_last:1"),
    ]
    scores = {
        m: [
            result(folder / f"mask-{m}_freeze-none_seed-{i}")["test"]["accuracy"] for i in (0, 1, 3)
        ]
        for m in ("true", "false")
    }
    for mask, row in (("true", table[0]), ("false", table[2])):
        assert float(row["accuracy"]) == pytest.approx(statistics.mean(scores[mask]), abs=1e-6)
        assert float(row["accuracy_sd"]) == pytest.approx(statistics.stdev(scores[mask]), abs=1e-6)
        assert float(row["macro_f1"]) == pytest.approx(
            statistics.mean(scores[mask]) - 0.1, abs=1e-6
        )
        assert (row["n"], float(row["seconds"]), row["train"]) == (
            "3",
            pytest.approx(61.3333, abs=1e-3),
            "4000",
        )
        assert (float(row["largest class"]), float(row["TF-IDF + linear SVM"])) == (0.6, 0.65)
    low, high = ttest_rel(scores["false"], scores["true"]).confidence_interval(0.95)
    assert float(table[2]["difference"]) == pytest.approx((low + high) / 2, abs=1e-6)
    assert float(table[2]["ci95"]) == pytest.approx((high - low) / 2, abs=1e-6)
    assert table[0]["difference"] == table[0]["ci95"] == "", (
        "the first row is what the others are compared with"
    )

    text = (folder / "table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    header, line, *body = text.split("\n\n")[0].splitlines()
    assert len(body) == 4 and len({row.count("|") for row in (header, line, *body)}) == 1
    assert body[2].startswith(
        "| false | none | 4,000 | 76.67 ± 9.87 | 66.67 ± 9.87 | -5.67 ± 1.90 | 3 | 61 | 60.00 |"
    )
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_the_interval_is_that_of_the_paired_t_test():
    draw = np.random.default_rng(0)
    for n in (2, 3, 10):
        a, b = draw.normal(size=(2, n))
        low, high = ttest_rel(a, b).confidence_interval(0.95)
        mean, half = compare.compare(
            pd.Series(a), pd.Series(b[::-1], index=range(n)[::-1])
        )  # paired by seed
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)
    mean, half = compare.compare(pd.Series({0: 0.9, 2: 0.5}), pd.Series({0: 0.8, 1: 0.1}))
    assert mean == pytest.approx(0.1) and math.isnan(half), (
        "one pair has no interval; the others are no pairs"
    )


def test_differences_that_are_all_the_same_are_compared_quietly():
    """Regression: scipy warns of them, and a tiny test set has them often."""
    a, b = pd.Series([0.5, 0.75, 1.0]), pd.Series([0.25, 0.5, 0.75])
    with warnings.catch_warnings(action="error"):
        assert compare.compare(a, b) == (0.25, 0.0)
        assert compare.compare(a, a) == (0.0, 0.0)


def test_one_seed_has_no_spread(sweep):
    folder = sweep("grid.mask=[false,true]", "seeds=[5]")
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert "| true | 4,000 | 127.50 | 117.50 | +7.50 | 1 |" in text and "nan" not in text
    assert [r["ci95"] + r["accuracy_sd"] for r in rows(folder)] == ["", ""]


def test_a_learning_curve(sweep, figures, monkeypatch):
    """data.train_size is the x axis; 0 is all there are. The baselines were trained on as many."""
    from matplotlib.axes import Axes

    drawn, plot, errorbar = {}, Axes.plot, Axes.errorbar

    def spy(original):
        def call(self, x, y, *args, label="", **kw):
            drawn[label] = [*x], [*y]
            return original(self, x, y, *args, label=label, **kw)

        return call

    monkeypatch.setattr(Axes, "plot", spy(plot))
    monkeypatch.setattr(Axes, "errorbar", spy(errorbar))
    folder = sweep("grid.data.train_size=[0,100,1000]", "grid.mask=[true,false]", "seeds=[1]")
    assert [r["train"] for r in rows(folder)] == ["4000", "4000", "100", "100", "1000", "1000"]
    assert {"mask=true", "mask=false", "largest class", "TF-IDF + linear SVM"} <= drawn.keys()
    assert drawn["mask=false"] == ([100, 1000, 4000], pytest.approx([0.72] * 3))
    assert drawn["largest class"][1] == [0.6] * 6, "also where another class is the largest"


@pytest.mark.parametrize(
    "largest, says", [(0.687, "largest class: 68.70%, off the scale"), (0.86, "largest class")]
)
def test_a_largest_class_far_below_the_cells_does_not_squeeze_them(
    tmp_path, monkeypatch, largest, says
):
    """Four cells between 88 and 89 % were one spot at the edge, since the axis began at 68.7 %."""
    drawn = []
    monkeypatch.setattr("smallgpt.plots.save", lambda fig, file: drawn.append(fig))
    both = pd.Series([0.88, 0.89])

    def row(mask: str, largest: float) -> compare.Row:
        baselines = {"largest class": largest, "TF-IDF + linear SVM": 0.89}
        return compare.Row({"mask": mask}, {"accuracy": both}, 60, 9, baselines=baselines)

    DRAW([row("true", largest)], tmp_path / "f.png")
    (ax,) = drawn[0].axes
    assert says in [line.get_label() for line in ax.lines]
    assert (ax.get_xlim()[0] > 0.8) and (ax.get_xlim()[0] <= largest) == (largest > 0.8)
    # of two sets, say: one number would be wrong of one of them, so both are drawn
    DRAW([row("true", largest), row("false", 0.5)], tmp_path / "f.png")
    assert drawn[1].axes[0].get_xlim()[0] < 0.5


def test_a_figure_with_labels_of_all_kinds_is_drawn_quietly(sweep, figures, monkeypatch):
    """Would warn of each Chinese character that no font has, or stop at a $ as mathematics."""
    odd = '["中文$x$_y", "a|b", "a very long path/' + "part/" * 20 + '"]'
    logged = []
    monkeypatch.setattr(logging.Logger, "handle", lambda self, record: logged.append(record))
    with warnings.catch_warnings(action="error"):
        folder = sweep(f"grid.trunk={odd}", "grid.mask=[true,false]", "seeds=[0]")
    assert not logged
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert r"| a\|b | true |" in text and "| 中文$x$_y | false |" in text


# --- what reaches sentiment_train.py --------------------------------------------------------------


def test_the_command_line_adds_to_the_file_and_the_file_to_its_config(sweep, tmp_path):
    base = "run: other\nepochs: 9\noptim: {lr: 1e-4}\ndata: {set: csv}\n"
    (tmp_path / "base.yaml").write_text(base, encoding="utf-8")
    (tmp_path / "train.yaml").write_text(
        "base: base.yaml\nepochs: 4\npool: mean\n", encoding="utf-8"
    )
    lines = [
        f"config: {tmp_path / 'train.yaml'}",
        "set: {epochs: 2, data.set: sst2}",
        "seeds: [7]",
        "grid: {optim.lr: [1, 2], mask: [true]}",
    ]
    (tmp_path / "s.yaml").write_text("\n".join(lines), encoding="utf-8")
    folder = sweep(str(tmp_path / "s.yaml"), "set.trunk=a/b", "grid.optim.lr=[3e-4]")
    (run,) = (p for p in folder.iterdir() if p.is_dir())
    assert keys_of(run) == {
        "epochs": "2",
        "optim.lr": "3e-4",
        "data.set": "sst2",
        "pool": "mean",
        "data.path": str(tmp_path / "data"),
        "trunk": "a/b",
        "mask": "true",
        "seed": "7",
        "out_dir": str(folder),
        "run": run.name,
    }


def test_values_arrive_as_they_were_meant(sweep):
    from sentiment_train import SentimentSettings

    typed = {
        "trunk": "a: b #c=d, {e} [f] \"g\" 'h' 中\\文",
        "data.text_column": "007",
        "data.label_column": "true",
        "data.pair_column": "null",
        "optim.lr": 1e-5,
        "max_steps": 3,
    }
    given = [f"set.{k}={v}" for k, v in typed.items()]
    folder = sweep("grid.epochs=[1]", "set.mask=false", "seeds=[0]", *given)
    (run,) = (p for p in folder.iterdir() if p.is_dir())
    s = settings.load(SentimentSettings, starts(run)[0]["argv"])
    found = {
        k: getattr(s.data if k.startswith("data.") else s, k.rpartition(".")[2], None)
        for k in typed
    }
    assert found | {"optim.lr": s.optim.lr} == typed and s.run == run.name and s.mask is False


def test_a_value_of_the_grid_is_what_was_typed(sweep):
    """Regression: YAML made true of the column Yes, and cut the column "Label #1" at its #."""
    titles = ["Yes", "007", "Label #1", "a=b"]
    given = "grid.data.label_column=[Yes, 007, 'Label #1', a=b]"
    folder = sweep(given, "set.trunk=/a/run #7", "seeds=[0]")
    found = [keys_of(run) for run in folder.iterdir() if run.is_dir()]
    assert sorted(keys["data.label_column"] for keys in found) == sorted(titles)
    assert {keys["trunk"] for keys in found} == {"/a/run #7"}


def test_runs_share_the_machine(sweep, stand_in, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    folder = sweep("grid.mask=[true,false]", "seeds=[0]", "workers=2")
    assert {starts(run.parent)[0]["OMP_NUM_THREADS"] for run in folder.glob("*/result.json")} == {
        "3"
    }
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    (stand_in / "slow").touch()  # so that both run at the same time
    s = program.SweepSettings(
        set={"data.path": str(stand_in)},
        grid={"mask": ["true", "false"]},
        seeds=[1],
    )
    todo = program.plan(s, folder, program.common_settings(s))
    processes = [jobs.launch(run, slot, 2) for slot, run in enumerate(todo)]
    wait_for(lambda: all((run.folder / "ready").exists() for run in todo), "both runs")
    for process in processes:
        process.kill()
        process.wait()
    assert [starts(run.folder)[0]["CUDA_VISIBLE_DEVICES"] for run in todo] == ["4", "6"]


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_every_run_saved_and_nothing_running(
    start, sweep, stand_in, tmp_path, number
):
    argv = [*arguments(stand_in, tmp_path), "grid.mask=[true,false]", "seeds=[0,1]", "workers=2"]
    folder = tmp_path / "s"
    first = [folder / f"mask-{mask}_seed-0" for mask in ("true", "false")]
    (stand_in / "slow").touch()
    process = start("stand_in", argv)
    wait_for(lambda: all((run / "ready").exists() for run in first), "two runs at once")
    process.kill(number)
    ended = process.wait()
    assert (ended.status, ended.err.count("Traceback")) == (128 + number, 0)
    assert "the same command continues" in ended.out
    assert "stopping 2 run(s): each saves its state first" in ended.out
    assert all(
        (run / "step-00000001").exists() and not alive(starts(run)[0]["pid"]) for run in first
    )
    assert not list(folder.glob("*seed-1/starts.jsonl")), "nothing new was begun"
    assert not (folder / "table.md").exists()

    (stand_in / "slow").unlink()
    sweep(*argv)
    assert [result(run)["resumed"] for run in first] == [True, True]
    assert {r["n"] for r in rows(folder)} == {"2"}


def test_a_kill_in_the_middle(start, sweep, stand_in, tmp_path):
    """Would repeat finished runs, or train twice at once what a killed sweep has left behind."""
    argv = [*arguments(stand_in, tmp_path), "grid.mask=[true,false]", "seeds=[0]"]
    done, interrupted = (tmp_path / "s" / f"mask-{mask}_seed-0" for mask in ("true", "false"))
    sweep(*argv[:3], "grid.mask=[true]", "seeds=[0]")
    (stand_in / "slow").touch()
    process = start("stand_in", argv)
    wait_for((interrupted / "ready").exists, "the second run")
    process.kill()
    assert process.wait().status == -signal.SIGKILL
    (left,) = starts(interrupted)
    assert alive(left["pid"])
    second = start("stand_in", argv)
    wait_for(lambda: "waiting" in said(second), "a second sweep")
    assert len(starts(interrupted)) == 1

    (stand_in / "slow").unlink()
    os.kill(left["pid"], signal.SIGTERM)
    assert second.wait().status == 0
    assert len(starts(done)) == 1 and len(starts(interrupted)) == 2
    assert not result(done)["resumed"] and result(interrupted)["resumed"]


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "null"])
def test_a_run_whose_report_was_cut_short_is_taken_up_again(sweep, damage):
    folder = sweep("grid.mask=[true,false]", "seeds=[0]")
    run = folder / "mask-true_seed-0"
    text = (run / "result.json").read_text(encoding="utf-8")
    (run / "result.json").write_text(damage(text), encoding="utf-8")
    sweep("grid.mask=[true,false]", "seeds=[0]")
    assert len(starts(run)) == 2 and result(run)["test"]
    assert len(starts(folder / "mask-false_seed-0")) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 40, b"null", b"\xff"])
def test_a_damaged_record_is_as_none(sweep, content):
    """Regression: after a full disk every start ended in a traceback that named no file."""
    folder = sweep("grid.mask=[true]", "seeds=[0]")
    (folder / "mask-true_seed-0" / "sweep.json").write_bytes(content)
    sweep("grid.mask=[true]", "seeds=[0]")
    assert len(starts(folder / "mask-true_seed-0")) == 1


def test_an_error_stops_the_runs_and_each_saves(sweep, stand_in, tmp_path, monkeypatch):
    """An error of the sweep itself, such as a full disk, must not leave its runs alone."""
    first, third = (tmp_path / "s" / f"lm_weight-{i}_seed-0" for i in (1, 3))
    (stand_in / "slow").touch()
    launch = jobs.launch

    def wait_and_launch(job, *args):
        if job.cell["lm_weight"] == "2":
            wait_for((first / "ready").exists, "the first run")
            raise OSError("No space left on device")
        return launch(job, *args)

    monkeypatch.setattr(jobs, "launch", wait_and_launch)
    with pytest.raises(OSError, match="No space left"):
        sweep("grid.lm_weight=[1,2,3]", "seeds=[0]", "workers=2")
    assert (first / "step-00000001").exists() and not alive(starts(first)[0]["pid"])
    assert not starts(third)


def test_the_first_row_is_that_of_the_first_combination(sweep):
    """Also where its first seed failed: the differences of all others are from it."""
    folder = sweep("grid.mask=[true,false]", "seeds=[0,1]")
    (folder / "mask-true_seed-0" / "result.json").unlink()
    runs = [
        jobs.Job("sentiment_train", {"mask": mask}, seed, folder / f"mask-{mask}_seed-{seed}", {})
        for seed in (0, 1)
        for mask in ("true", "false")
    ]
    table = compare.rows_of(runs)
    assert [(row.cell["mask"], len(row.main)) for row in table] == [("true", 1), ("false", 2)]
    assert math.isnan(table[0].difference) and table[1].difference == pytest.approx(-0.055)


def test_a_failing_run_is_named_with_its_log_and_the_others_run(sweep, tmp_path, capsys):
    argv = ["grid.lm_weight=[13,1]", "seeds=[0,1]"]
    with pytest.raises(UserError) as error:
        sweep(*argv)
    lines = str(error.value).splitlines()
    folder = tmp_path / "s"
    log = folder / "lm_weight-13_seed-1" / "log.txt"
    assert lines[0] == "2 of 4 runs failed" and len(lines) == 3
    ended = "ended with status 1: error: lm_weight=13 is no good"
    assert lines[2] == f"  - lm_weight=13, seed=1 {ended} (see {log})"
    assert "some progress" in log.read_text(encoding="utf-8")
    assert [(r["lm_weight"], r["n"]) for r in rows(folder)] == [("1", "2")], (
        "the table has what there is"
    )
    # it had not begun: other settings may correct it
    folder = sweep("grid.lm_weight=[1]", "seeds=[0,1]", "set.epochs=1", "name=t")
    with pytest.raises(UserError, match="2 of 4 runs failed"):
        sweep(*argv)
    assert len(starts(tmp_path / "s" / "lm_weight-1_seed-0")) == 1


def test_a_mistyped_setting_can_be_corrected(sweep):
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        sweep("grid.mask=[true]", "seeds=[0]", "set.lm_weight=13")
    sweep("grid.mask=[true]", "seeds=[0]", "set.lm_weight=1")


def test_changed_settings_are_refused(sweep, tmp_path):
    config, base = tmp_path / "train.yaml", tmp_path / "base.yaml"
    config.write_text("base: base.yaml\npool: mean\n", encoding="utf-8")
    base.write_text("epochs: 4\n", encoding="utf-8")
    argv = [f"config={config}", "grid.mask=[true]"]
    folder = sweep(*argv, "seeds=[0]")
    with pytest.raises(
        UserError,
        match=r"mask-true_seed-0: pool was mean and is now last: put it back, or .* name=",
    ):
        sweep(*argv, "seeds=[1,0]", "set.pool=last")
    base.write_text("epochs: 5\n", encoding="utf-8")
    with pytest.raises(UserError, match="epochs was 4 and is now 5"):
        sweep(*argv, "seeds=[0]")
    base.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="epochs was 4 and is now not set"):
        sweep(*argv, "seeds=[0]")
    assert not (folder / "mask-true_seed-1").exists(), "nothing was begun"
    base.write_text("# as many as before\nepochs: 4\n", encoding="utf-8")
    sweep(*argv, "seeds=[0,1]", "workers=2")
    assert len(starts(folder / "mask-true_seed-0")) == 1 and rows(folder)[0]["n"] == "2"


def test_runs_of_different_trunks_are_not_averaged(sweep, monkeypatch):
    """Regression: the table mixed two trunks, as one was trained anew in the middle of a sweep."""
    monkeypatch.setattr("smallgpt.sweeps.jobs.pretrained.digest", lambda trunk: "")  # it is gone
    argv = ["grid.mask=[true,false]", "seeds=[0,1]"]
    folder = sweep(*argv)
    for seed in (0, 1):
        file = folder / f"mask-false_seed-{seed}" / "result.json"
        file.write_text(
            json.dumps(result(file.parent) | {"hashes": {"trunk": str(seed)}}), encoding="utf-8"
        )
    with pytest.raises(UserError, match="mask=false: data or trunk have changed between its runs"):
        sweep(*argv)
    for i, file in enumerate(
        sorted(folder.glob("*/result.json"))
    ):  # one seed: no cell mixes anything
        file.write_text(
            json.dumps(result(file.parent) | {"hashes": {"data": i < 2}}), encoding="utf-8"
        )
    with pytest.raises(UserError, match="the data have changed between the runs"):
        sweep("grid.mask=[true,false]", "seeds=[0]")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "grid is empty: give settings and their values, such as grid.mask=[true,false]"),
        (["grid.mask=true"], "grid.mask must be list[str], written [a, b], not true"),
        (["grid.data.train_size=[]"], "grid.data.train_size must be a list"),
        (
            ["grid.mask=[true]", "seeds=[1,2,1]"],
            "seeds=[1, 2, 1] must be one or more different numbers",
        ),
        (["grid.mask=[true]", "seeds=[]"], "seeds=[] must be one or more"),
        (["grid.mask=[true]", "workers=-1"], "workers must be int >= 0, not -1"),
        (["grid.mask=[true]", "name=a/b"], "name='a/b' must be a plain folder name"),
        (["grid.mask=[true]", "set.run=x"], "run is set by the sweep itself"),
        (["grid.seed=[1,2]"], "seed is set by the sweep itself"),
        (["grid.data.set=[sst2]", "set.data.set=csv"], "data.set is in set and in grid"),
        (["grid.mask=[true,true]"], "the same folder, mask-true_seed-0"),
        (["grid.trunk=[a/b,a-b]"], "the same folder, trunk-a-b_seed-0"),
        (["grid.mask=[true]", "config=no/such.yaml"], "config: there is no file no/such.yaml"),
        (
            ["grid.mask=[true]", "config={here}/list.yaml"],
            "list.yaml: must hold `key: value` lines, not a list",
        ),
        (
            ["grid.mask=[true]", "config={here}/broken.yaml"],
            "broken.yaml:1: mapping values are not allowed in this",
        ),
        (["grid.mask=[true]", "config={here}/circle.yaml"], "circle.yaml: base: goes in a circle"),
        (["grid.mask=[true]", "trunk=x"], "unknown key trunk"),
    ],
)
def test_mistakes(tmp_path, stand_in, monkeypatch, argv, says):
    for name, text in {"list": "- 1", "broken": "a: b: c", "circle": "base: circle.yaml"}.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    argv = [f"out_dir={tmp_path}", *(arg.format(here=tmp_path) for arg in argv)]
    monkeypatch.setattr(sys, "argv", ["scripts/sweep.py", *argv])
    with pytest.raises(UserError) as error:
        program.main()
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


# --- the true script ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_true_sweep(run, tiny, tmp_path, monkeypatch):
    """A trunk and two values of mask, each run the process that a user's would be."""
    assert run("train", tiny(tmp_path, run="trunk", max_steps=2, prompts="[]")).status == 0
    draw = random.Random(0)
    with open(tmp_path / "reviews.csv", "w", encoding="utf-8", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(["Text", "Sentiment"])
        for i in range(100):
            sheet.writerow(
                [
                    f"room {i} was {draw.choice(['bad', 'dirty'] if i % 2 else ['good', '很好'])}",
                    i % 2,
                ]
            )
    argv = [
        f"out_dir={tmp_path}",
        "grid.mask=[true,false]",
        "seeds=[3]",
        f"set.trunk={tmp_path / 'trunk'}",
        f"set.data.path={tmp_path / 'reviews.csv'}",
        "set.max_steps=2",
        "set.device=cpu",
        "workers=2",
    ]
    for key, value in ENV.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", ["scripts/sweep.py", *argv])
    assert program.main() == 0
    folder = tmp_path / "sweep"
    for row, mask in zip(rows(folder), ("true", "false"), strict=True):
        found = result(folder / f"mask-{mask}_seed-3")
        assert found["mask"] == (mask == "true") and found["seed"] == 3
        assert float(row["accuracy"]) == pytest.approx(found["test"]["accuracy"], abs=1e-6)
        largest = next(v for k, v in found["baselines"].items() if k.startswith("always "))
        assert float(row["largest class"]) == pytest.approx(largest["accuracy"], abs=1e-6)
    message = mistake(run("scripts.sweep", [*argv, "set.max_steps=3"]))
    assert "mask-true_seed-3: max_steps was 2 and is now 3" in message
    assert (
        run(
            "train", [*tiny(tmp_path, run="trunk", max_steps=2, prompts="[]"), "max_steps=3"]
        ).status
        == 0
    )
    message = mistake(
        run("scripts.sweep", argv)
    )  # it would have shown the old trunk's numbers as the new one's
    assert "its trunk was trained again since: delete" in message
    shutil.rmtree(tmp_path / "trunk")
    assert run("scripts.sweep", argv).status == 0, "the results stand when the trunk is gone"
