"""Run a grid of fine-tunings times seeds, and compare them: one table, one figure.

    python scripts/sweep.py config/sweep_ablation.yaml set.trunk=checkpoints/trunk_zh
    python scripts/sweep.py config/sweep_train_size.yaml workers=2

Each run is a `python sentiment_train.py` of its own, under out_dir/name/. The same command again
goes on where it stopped: finished runs are kept, an interrupted one resumes. With several GPUs
several run at once.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, hardware, plots, settings
from smallgpt.console import UserError
from smallgpt.files import read_json, write_atomic
from smallgpt.parallel.world import StopRequest
from smallgpt.runs import checkpoint
from smallgpt.settings import Count
from smallgpt.weights import pretrained

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes

SCRIPT = Path(__file__).resolve().parent.parent / "sentiment_train.py"
# those of report.py, under names that all runs share
BASELINES = ("largest class", "TF-IDF + linear SVM")
SIZE = "data.train_size"  # in the grid, it is the x axis of the figure


@dataclass
class SweepSettings:
    name: str = "sweep"  # folder of the sweep under out_dir
    out_dir: str = "checkpoints"  # where it lives
    config: str = ""  # YAML of sentiment_train.py that all runs share
    set: dict[str, str] = field(default_factory=dict)  # settings of all runs: set.epochs=2
    grid: dict[str, list[str]] = field(default_factory=dict)  # values, every combination is run
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # a run of a combination for each
    workers: Count = 0  # runs at once; 0 = one per GPU, or one

    def check(self) -> list[str]:
        """Problems that the types do not show, in plain words."""
        problems = [p.replace("run=", "name=") for p in checkpoint.name_problems(self.name)]
        for key, values in self.grid.items():
            if not values:
                problems.append(f"grid.{key} must be a list of values, such as [a, b], not []")
            if key in self.set:
                problems.append(f"{key} is in set and in grid: leave one out")
        for key in ("run", "out_dir", "seed"):
            if key in self.grid or key in self.set:
                own = "is set by the sweep itself (name, out_dir, seeds): leave it out"
                problems.append(f"{key} {own}")
        if not self.grid:
            example = "such as grid.mask=[true,false]"
            problems.append(f"grid is empty: give settings and their values, {example}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds={self.seeds} must be one or more different numbers")
        return problems


@dataclass
class Run:
    """One fine-tuning of the sweep."""

    cell: dict[str, Any]  # the combination of the grid
    seed: int
    folder: Path
    keys: dict[str, Any]  # all settings of sentiment_train.py but run and out_dir

    @property
    def name(self) -> str:
        return cell_name({**self.cell, "seed": self.seed})

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def record(self) -> Path:
        """The settings that it was started with."""
        return self.folder / "sweep.json"

    def result(self) -> dict[str, Any] | None:
        """result.json, which a finished run has; None if there is none, or only a part of it."""
        return read_json(self.folder / "result.json")


Row = dict[str, Any]  # of the table: a combination, and what its runs have reached


def cell_name(cell: dict[str, Any]) -> str:
    """A combination as people read it: mask=true, freeze=none."""
    parts = []
    for key, value in cell.items():
        short = key.rpartition(".")[2]
        parts.append(f"{short}={value}")
    return ", ".join(parts)


# --- which runs there are -------------------------------------------------------------------------


def shared(path: Path) -> dict[str, str]:
    """The settings in a YAML file and its bases, by dotted names, as text.

    The runs get them one by one, and not the file: so a run's record shows whether the file has
    changed since."""
    found: dict[str, str] = {}
    try:
        for values in settings.read_yaml(path).values():
            found |= settings.dotted(values)
    except UserError as error:
        raise UserError(f"config: {error}") from None
    return found


def plan(s: SweepSettings, folder: Path) -> list[Run]:
    """Every run; seeds outermost: an interrupted sweep has compared all combinations on the first.

    UserError if one was begun with other settings."""
    common = shared(Path(s.config)) if s.config else {}
    common |= s.set
    for key in ("run", "out_dir"):
        common.pop(key, None)
    cells = []
    for values in itertools.product(*s.grid.values()):
        cell = dict(zip(s.grid, values, strict=True))
        cells.append(cell)
    todo: dict[str, Run] = {}
    for seed, cell in itertools.product(s.seeds, cells):
        keys = {**common, **cell, "seed": str(seed)}
        spoken = cell_name({**cell, "seed": seed})
        name = spoken.replace(", ", "_")
        name = re.sub(r"[^\w.-]", "-", name)
        if name.lower() in todo:
            raise UserError(
                f"two combinations in grid have the same folder, {name}: write their values "
                "differently"
            )
        run = Run(cell, seed, folder / name, keys)
        check_settings(run)
        check_trunk(run)
        todo[name.lower()] = run
    return list(todo.values())


def check_settings(run: Run) -> None:
    """UserError if the run was begun with other settings."""
    if not run.record.exists():
        return
    before = json.loads(run.record.read_text(encoding="utf-8"))
    has_begun = run.result() or checkpoint.step_folders(run.folder)
    if before == run.keys or not has_begun:
        return
    changed = set()
    for key in before | run.keys:
        if before.get(key) != run.keys.get(key):
            changed.add(key)
    key = min(changed)
    then = before.get(key, "not set")
    now = run.keys.get(key, "not set")
    raise UserError(
        f"{run.folder}: {key} was {then} and is now {now}: put it back, or choose another name="
    )


def check_trunk(run: Run) -> None:
    """UserError if the run is finished, and its trunk is another one now."""
    result = run.result() or {}
    then = result.get("hashes", {}).get("trunk")
    if not then:
        return
    trunk = str(run.keys.get("trunk", ""))
    now = pretrained.digest(trunk)  # "" where the trunk is gone
    if now and now != then:
        raise UserError(
            f"{run.folder}: its trunk was trained again since: delete {run.folder.parent}, or "
            "choose another name"
        )


# --- running them ---------------------------------------------------------------------------------


def launch(run: Run, slot: int, workers: int) -> subprocess.Popen:
    """Start a run, its output going to log.txt.

    UserError if a process of an earlier sweep still trains it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    keys = dict(run.keys)
    keys["out_dir"] = str(run.folder.parent)
    keys["run"] = run.folder.name
    words = [f"{key}={value}" for key, value in keys.items()]
    command = [sys.executable, str(SCRIPT), *words]
    env = share_of_machine(run, slot, workers)
    with open(run.log, "a", encoding="utf-8") as log:
        lock(log, run.folder)
        record = json.dumps(run.keys, ensure_ascii=False, indent=1)
        write_atomic(run.record, record)
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)


def share_of_machine(run: Run, slot: int, workers: int) -> dict[str, str]:
    """The environment of a run: one GPU, or its part of the cores."""
    env = dict(os.environ)
    if hardware.gpus(run.keys.get("device", "auto")):
        indices = map(str, range(torch.cuda.device_count()))
        every_gpu = ",".join(indices)
        gpus = env.get("CUDA_VISIBLE_DEVICES", every_gpu).split(",")
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    elif workers > 1:
        threads = max(1, torch.get_num_threads() // workers)  # more than cores crawl
        env.setdefault("OMP_NUM_THREADS", str(threads))
    return env


def lock(log: TextIO, folder: Path) -> None:
    """Lock the log of a run. UserError if another process has it.

    The lock belongs to the open file, which the run inherits: it outlives a sweep that is killed.
    """
    try:
        import fcntl

        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process, perhaps of a sweep that was killed, still trains {folder}: wait for "
            "it or end it, and give the same command"
        ) from None
    except (ImportError, OSError):
        pass  # Windows and some network file systems have no such lock


def run_all(todo: list[Run], workers: int) -> tuple[list[str], int]:
    """Run those that are not finished, `workers` at a time.

    Returns what went wrong, one entry per failed run, and the signal that stopped the sweep (each
    run has saved its state then), or 0."""
    waiting = [run for run in todo if not run.result()]
    problems: list[str] = []
    running: dict[int, tuple[Run, subprocess.Popen]] = {}  # slot -> what runs there
    n_done = len(todo) - len(waiting)
    with (
        tqdm(todo, initial=n_done, unit="run", disable=None) as bar,
        StopRequest() as stop,
    ):
        try:
            while (running or waiting) and not stop.signal:
                while waiting and len(running) < workers:
                    run = waiting.pop(0)
                    slot = min(set(range(workers)) - running.keys())
                    running[slot] = run, launch(run, slot, workers)
                time.sleep(0.05)
                for slot, (run, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    result = run.result()
                    if result:
                        accuracy = result["test"]["accuracy"]
                        tqdm.write(f"{run.name}: test accuracy {accuracy:.2%}", file=sys.stdout)
                        bar.update()
                    elif not stop.signal:
                        problems.append(why_failed(run, process.returncode))
        finally:  # after a signal or an error, some are left
            stop_all([process for _, process in running.values()])
    return problems, stop.signal


def why_failed(run: Run, status: int) -> str:
    """The end of a failed run, with the last line of its log."""
    log = run.log.read_text(encoding="utf-8", errors="replace")
    lines = log.strip().splitlines()
    last = lines[-1] if lines else ""
    return f"{run.name} ended with status {status}: {last} (see {run.log})"


def stop_all(processes: list[subprocess.Popen]) -> None:
    if not processes:
        return
    tqdm.write(f"stopping {len(processes)} run(s): each saves its state first", file=sys.stdout)
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


# --- comparing them -------------------------------------------------------------------------------


def compare(values: pd.Series, reference: pd.Series) -> tuple[float, float]:
    """Mean of the differences of two series over seeds, and half the width of its 95 % confidence
    interval (Student's t; nan of one pair).

    Paired: the same seed is the same head and order, so pairs tell more than two means."""
    differences = (values - reference).dropna()
    mean = differences.mean()
    quantile = student.ppf(0.975, len(differences) - 1)
    half_width = quantile * differences.sem()
    return float(mean), float(half_width)


def table(todo: list[Run]) -> list[Row]:
    """One row per combination with a finished run: mean, standard deviation, n, seconds, difference
    from the first.

    UserError if the data or a trunk have changed between runs that are compared."""
    results = {run.folder: run.result() for run in todo}
    finished = [run for run in todo if results[run.folder]]
    hashes = [results[run.folder].get("hashes") for run in finished]
    data = {found.get("data") for found in hashes if found is not None}
    grid_has_data = any(key.startswith("data.") for key in todo[0].cell)
    if len(data) > 1 and not grid_has_data:
        raise UserError("the data have changed between the runs: choose another name=")
    rows: list[Row] = []
    first_seed = todo[0].seed
    cells = [run.cell for run in todo if run.seed == first_seed]
    for cell in cells:
        runs = [run for run in finished if run.cell is cell]
        of_cell = {run.seed: results[run.folder] for run in runs}
        if of_cell:
            reference = rows[0]["by_seed"] if rows else None
            rows.append(table_row(cell, of_cell, reference))
    return rows


def table_row(
    cell: dict[str, Any],
    results: dict[int, dict[str, Any]],
    reference: pd.Series | None,
) -> Row:
    """A row of the table: the results of a combination, by seed. `reference`: the first row's."""
    first = results[min(results)]
    hashes = first.get("hashes")
    others = [found.get("hashes") for found in results.values()]
    if any(other != hashes for other in others):
        raise UserError(
            f"{cell_name(cell)}: data or trunk have changed between its runs: choose another name="
        )
    seeds = list(results)
    scores = [found["test"] for found in results.values()]
    tests = pd.DataFrame(scores, index=seeds)
    accuracy = tests["accuracy"]
    macro_f1 = tests["macro_f1"]
    difference = ci95 = math.nan
    if reference is not None:
        difference, ci95 = compare(accuracy, reference)
    baselines = [found["accuracy"] for found in first["baselines"].values()]
    seconds = [found["seconds"] for found in results.values()]
    return {
        **cell,
        "n": len(results),
        "macro_f1": macro_f1.mean(),
        "macro_f1_sd": macro_f1.std(),
        "accuracy": accuracy.mean(),
        "accuracy_sd": accuracy.std(),
        "difference": difference,
        "ci95": ci95,
        "seconds": np.mean(seconds),
        "train": first["examples"]["train"],
        **dict(zip(BASELINES, baselines, strict=True)),
        "by_seed": accuracy,
    }


def percent(value: float, spread: float = math.nan, sign: str = "") -> str:
    """0.7667, 0.0987 -> 76.67 ± 9.87"""
    text = "" if math.isnan(value) else f"{100 * value:{sign}.2f}"
    return text if math.isnan(spread) else f"{text} ± {100 * spread:.2f}"


def write(s: SweepSettings, rows: list[Row], folder: Path) -> str:
    """table.md, table.csv and figure.png; returns the table."""
    sheet = pd.DataFrame(rows).drop(columns="by_seed")  # utf-8-sig: the mark is for spreadsheets
    sheet.to_csv(folder / "table.csv", index=False, float_format="%.6g", encoding="utf-8-sig")
    heads = [
        *s.grid,
        "training examples",
        "test accuracy, %",
        "macro F1, %",
        "difference from the first",
        "n",
        "seconds a run",
        *BASELINES,
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        values = [row[key] for key in s.grid]
        values = [value.replace("|", "\\|") for value in values]
        baselines = [percent(row[name]) for name in BASELINES]
        cells = [
            *values,
            f"{row['train']:,}",
            percent(row["accuracy"], row["accuracy_sd"]),
            percent(row["macro_f1"], row["macro_f1_sd"]),
            percent(row["difference"], row["ci95"], "+"),
            f"{row['n']}",
            f"{row['seconds']:.0f}",
            *baselines,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "± is the standard deviation over seeds; of the differences (points, paired by seed) the "
        "95 % interval."
    )
    text = "\n".join([*lines, "", note, ""])
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw(s, rows, folder / "figure.png")
    return text


# --- the figure -----------------------------------------------------------------------------------


def draw(s: SweepSettings, rows: list[Row], file: Path) -> None:
    """Test accuracy of each combination, every seed a dot; over the training size, if the grid has
    it, as curves."""
    labels = []
    for row in rows:
        cell = {key: row[key] for key in s.grid if key != SIZE}
        name = cell_name(cell) or "this model"
        labels.append(textwrap.fill(name, 40))
    if SIZE in s.grid:
        fig, ax = plots.figure(7, 4.6)
        draw_curves(ax, rows, labels)
        accuracy = ax.yaxis
    else:
        height = 1.8 + 0.5 * len(rows)
        fig, ax = plots.figure(7, height)
        draw_dots(ax, rows, labels)
        accuracy = ax.xaxis
    accuracy.set(
        major_formatter=lambda value, _: f"{100 * value:g}",
        label_text="test accuracy, % (mean ± SD over seeds)",
    )
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    ax.grid(alpha=0.3)
    plots.save(fig, file)


BASELINE_STYLES = dict(zip(BASELINES, ("D--", "s:"), strict=True))
BASELINE_LINE = {"color": "0.4", "ms": 3, "lw": 1}


def draw_curves(ax: "Axes", rows: list[Row], labels: list[str]) -> None:
    """Accuracy over the training size, a curve for each label."""
    rows_of: dict[str, list[Row]] = {}
    for label, row in zip(labels, rows, strict=True):
        rows_of.setdefault(label, []).append(row)
    for label, group in rows_of.items():
        group.sort(key=lambda row: row["train"])
        sizes = [row["train"] for row in group]
        means = [row["accuracy"] for row in group]
        spreads = [np.nan_to_num(row["accuracy_sd"]) for row in group]
        ax.errorbar(sizes, means, spreads, fmt="o-", ms=4, capsize=3, label=label)
    for name, style in BASELINE_STYLES.items():
        by_size = sorted(rows, key=lambda row: row["train"])
        sizes = [row["train"] for row in by_size]
        values = [row[name] for row in by_size]
        ax.plot(sizes, values, style, **BASELINE_LINE, label=name)
    ticks = sorted({row["train"] for row in rows})
    ax.set(xscale="log", xlabel="training examples")
    ax.set_xticks(ticks, [f"{size:,}" for size in ticks])
    ax.minorticks_off()


def draw_dots(ax: "Axes", rows: list[Row], labels: list[str]) -> None:
    """Accuracies side by side: a line for each combination, a dot for each seed."""
    lines = range(len(rows))
    for line, row in enumerate(rows):
        mean = row["accuracy"]
        spread = np.nan_to_num(row["accuracy_sd"])
        seeds = row["by_seed"]
        ax.errorbar(mean, line, xerr=spread, fmt="|", ms=14, capsize=4, color="C0")
        ax.plot(seeds, [line] * len(seeds), "o", ms=4, color="C0", alpha=0.5)
    lowest_seeds = [row["by_seed"].min() for row in rows]
    linear_models = [row[BASELINES[1]] for row in rows]
    lowest = min(lowest_seeds + linear_models)
    for name, style in BASELINE_STYLES.items():
        values = [row[name] for row in rows]
        is_one = len(set(values)) == 1
        if is_one and values[0] < lowest - 0.05:  # it would squeeze the others into a corner
            value = 100 * values[0]
            ax.plot([], [], " ", label=f"{name}: {value:.1f} %, off the scale")
        else:
            ax.plot(values, lines, style, **BASELINE_LINE, label=name)
    ax.set_ylim(len(rows) - 0.5, -0.5)  # the first at the top
    ax.set_yticks(lines, labels)


def main() -> int:
    s = settings.load(SweepSettings, doc=__doc__)
    folder = Path(s.out_dir) / s.name
    todo = plan(s, folder)
    device = todo[0].keys.get("device", "auto")
    n_gpus = hardware.gpus(device)
    workers = s.workers or max(1, n_gpus)
    print(
        f"{len(todo)} runs, {workers} at once, in {folder}; the log.txt of each is in its folder",
        flush=True,
    )
    problems, number = run_all(todo, workers)
    if number:
        print(f"stopped by a signal; what ran is saved in {folder}, and the same command continues")
        return 128 + number
    rows = table(todo)
    if rows:
        print(f"\n{write(s, rows, folder)}")
        print(f"table.md, table.csv and figure.png are in {folder}")
    if problems:
        lines = [f"{len(problems)} of {len(todo)} runs failed", *problems]
        raise UserError("\n  - ".join(lines))
    return 0


if __name__ == "__main__":
    console.run(main)
