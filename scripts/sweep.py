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
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pandas as pd
import torch
from scipy.stats import ttest_rel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from smallgpt import console, hardware, plots, settings
from smallgpt.console import UserError
from smallgpt.files import read_json, write_atomic
from smallgpt.parallel.world import StopRequest
from smallgpt.runs import checkpoint
from smallgpt.settings import Count
from smallgpt.weights import pretrained

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes

SCRIPT = ROOT / "sentiment_train.py"
SIZE = "data.train_size"  # the x axis of the figure, where the grid has it
LARGEST_CLASS, SVM = "largest class", "TF-IDF + linear SVM"  # report.py's baselines, in its order

Cell = dict[str, str]  # one combination of the grid: {"mask": "true", "freeze": "none"}


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

    cell: Cell
    seed: int
    folder: Path
    keys: dict[str, str]  # all settings of sentiment_train.py but run and out_dir

    @property
    def name(self) -> str:
        return cell_name({**self.cell, "seed": str(self.seed)})

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def record(self) -> Path:
        return self.folder / "sweep.json"

    def result(self) -> dict[str, Any]:
        """result.json, which a finished run has; {} if there is none, or only a part of it."""
        found = read_json(self.folder / "result.json")
        return found if isinstance(found, dict) else {}


@dataclass
class Row:
    """The finished runs of a combination, a row of the table."""

    cell: Cell
    accuracy: pd.Series  # on the test split, by seed
    macro_f1: pd.Series
    seconds: float  # a run
    train: int  # examples
    baselines: dict[str, float]  # their accuracy
    difference: float = math.nan  # of the accuracy from that of the first row
    ci95: float = math.nan  # half the width of its 95 % confidence interval

    def flat(self) -> dict[str, Any]:
        """The row of table.csv."""
        return {
            **self.cell,
            "n": len(self.accuracy),
            "macro_f1": self.macro_f1.mean(),
            "macro_f1_sd": self.macro_f1.std(),
            "accuracy": self.accuracy.mean(),
            "accuracy_sd": self.accuracy.std(),
            "difference": self.difference,
            "ci95": self.ci95,
            "seconds": self.seconds,
            "train": self.train,
            **self.baselines,
        }


def main() -> int:
    s = settings.load(SweepSettings, doc=__doc__)
    folder = Path(s.out_dir) / s.name
    runs = plan(s, folder)
    gpus = hardware.gpus(runs[0].keys.get("device", "auto"))
    workers = s.workers or max(1, gpus)
    logs = "the log.txt of each is in its folder"
    print(f"{len(runs)} runs, {workers} at once, in {folder}; {logs}", flush=True)
    problems, number = run_all(runs, workers)
    if number:
        print(f"stopped by a signal; what ran is saved in {folder}, and the same command continues")
        return 128 + number
    rows = table(runs)
    if rows:
        print("\n" + write(rows, folder))
        print(f"table.md, table.csv and figure.png are in {folder}")
    if problems:
        heading = f"{len(problems)} of {len(runs)} runs failed"
        raise UserError("\n  - ".join([heading, *problems]))
    return 0


# --- which runs there are -------------------------------------------------------------------------


def plan(s: SweepSettings, folder: Path) -> list[Run]:
    """Every run. UserError if one was begun with other settings, or with another trunk.

    Seeds are outermost: an interrupted sweep has compared all combinations on the first of them."""
    common = shared(Path(s.config)) if s.config else {}
    common = {**common, **s.set}
    combinations = itertools.product(*s.grid.values())
    cells = [dict(zip(s.grid, values, strict=True)) for values in combinations]
    runs: dict[str, Run] = {}
    for seed, cell in itertools.product(s.seeds, cells):
        keys = {**common, **cell, "seed": str(seed)}
        keys.pop("run", None)  # of the shared file
        keys.pop("out_dir", None)
        run = Run(cell, seed, folder / folder_name(cell, seed), keys)
        same = run.folder.name.lower()  # on a disk that knows no capitals
        if same in runs:
            raise UserError(
                f"two combinations in grid have the same folder, {run.folder.name}: "
                "write their values differently"
            )
        runs[same] = run
    for run in runs.values():
        check_settings(run)
        check_trunk(run)
    return list(runs.values())


def cell_name(cell: Cell) -> str:
    """A combination as people read it: mask=true, freeze=none."""
    pairs = []
    for key, value in cell.items():
        _, _, last = key.rpartition(".")
        pairs.append(f"{last}={value}")
    return ", ".join(pairs)


def folder_name(cell: Cell, seed: int) -> str:
    """mask-true_freeze-none_seed-0"""
    name = cell_name({**cell, "seed": str(seed)}).replace(", ", "_")
    return re.sub(r"[^\w.-]", "-", name)


def shared(path: Path) -> dict[str, str]:
    """The settings in a YAML file and its bases, by dotted names, as text.

    The runs get them one by one, and not the file: a run's record shows whether it has changed."""
    found: dict[str, str] = {}
    try:
        for values in settings.read_yaml(path).values():
            found |= settings.dotted(values)
    except UserError as error:
        raise UserError(f"config: {error}") from None
    return found


def check_settings(run: Run) -> None:
    """UserError if the run has begun, with other settings than now."""
    before = read_json(run.record)
    has_begun = run.result() or checkpoint.step_folders(run.folder)
    if not isinstance(before, dict) or not has_begun:
        return
    changed = [key for key in before | run.keys if before.get(key) != run.keys.get(key)]
    if changed:
        key = min(changed)
        then = before.get(key, "not set")
        now = run.keys.get(key, "not set")
        raise UserError(
            f"{run.folder}: {key} was {then} and is now {now}: put it back, or choose another name="
        )


def check_trunk(run: Run) -> None:
    """UserError if the run was trained from a trunk that has changed since."""
    hashes = run.result().get("hashes", {})
    then = hashes.get("trunk")
    if not then:
        return
    trunk = run.keys.get("trunk", pretrained.own_model())
    now = pretrained.digest(trunk)
    if now not in ("", then):
        raise UserError(
            f"{run.folder}: its trunk was trained again since: delete {run.folder.parent}, or "
            "choose another name"
        )


# --- running them ---------------------------------------------------------------------------------


def run_all(runs: list[Run], workers: int) -> tuple[list[str], int]:
    """Run those that are not finished, `workers` at a time.

    Returns what went wrong, an entry for each run that failed; and the signal that stopped the
    sweep, or 0. Each run has saved its state by then."""
    waiting = [run for run in runs if not run.result()]
    n_finished = len(runs) - len(waiting)
    problems: list[str] = []
    runner = Runner(workers)
    bar = tqdm(total=len(runs), initial=n_finished, unit="run", disable=None)
    with bar, StopRequest() as stop, ThreadPoolExecutor(workers) as pool:
        try:
            pending = {pool.submit(runner.train, run): run for run in waiting}
            while pending and not stop.signal:
                # now and then a look at stop.signal: a signal does not end this wait
                done, _ = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in done:
                    run = pending.pop(future)
                    status = future.result()
                    found = run.result()
                    if found:
                        accuracy = f"test accuracy {found['test']['accuracy']:.2%}"
                        tqdm.write(f"{run.name}: {accuracy}", file=sys.stdout)
                        bar.update()
                    elif not stop.signal:
                        problems.append(why_failed(run, status))
        finally:
            runner.stop()
    return problems, stop.signal


class Runner:
    """Trains runs, each in a process that a thread waits for."""

    def __init__(self, workers: int):
        self.workers = workers
        self.processes: dict[int, subprocess.Popen] = {}  # by slot, which chooses the GPU
        self.is_stopped = False
        self.lock = threading.Lock()  # no process begins beside `stop`

    def train(self, run: Run) -> int | None:
        """Train a run to its end. Returns its exit status; None if the sweep was stopped before."""
        with self.lock:
            if self.is_stopped:
                return None
            free = set(range(self.workers)) - self.processes.keys()
            slot = min(free)
            process = launch(run, slot, self.workers)
            self.processes[slot] = process
        status = process.wait()
        with self.lock:
            del self.processes[slot]
        return status

    def stop(self) -> None:
        """Begin no more runs, and tell those that run to save their state and to end."""
        with self.lock:
            self.is_stopped = True
            n = len(self.processes)
            if n:
                tqdm.write(f"stopping {n} run(s): each saves its state first", file=sys.stdout)
            for process in self.processes.values():
                process.terminate()


def launch(run: Run, slot: int, workers: int) -> subprocess.Popen:
    """Start a run, its output going to log.txt."""
    run.folder.mkdir(parents=True, exist_ok=True)
    keys = {**run.keys, "out_dir": str(run.folder.parent), "run": run.folder.name}
    arguments = [f"{key}={value}" for key, value in keys.items()]
    with open(run.log, "a", encoding="utf-8") as log:
        lock(log, run)
        write_atomic(run.record, json.dumps(run.keys, ensure_ascii=False, indent=1))
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(run, slot, workers),
        )


def lock(log: TextIO, run: Run) -> None:
    """UserError if a process of an earlier sweep still trains this run.

    The lock belongs to the open file, which the run inherits: it outlives a sweep that was
    killed."""
    try:
        import fcntl

        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process, perhaps of a sweep that was killed, still trains {run.folder}: "
            "wait for it or end it, and give the same command"
        ) from None
    except (ImportError, OSError):
        pass  # Windows and some network file systems have no such lock


def environment(run: Run, slot: int, workers: int) -> dict[str, str]:
    """Environment variables that share the machine: a GPU for each slot, or some of the cores."""
    env = dict(os.environ)
    if hardware.gpus(run.keys.get("device", "auto")):
        visible = env.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            visible = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    elif workers > 1:  # more threads than cores crawl
        threads = max(1, torch.get_num_threads() // workers)
        env.setdefault("OMP_NUM_THREADS", str(threads))
    return env


def why_failed(run: Run, status: int) -> str:
    """The last line of its log, which is the message of an error."""
    text = run.log.read_text(encoding="utf-8", errors="replace")
    lines = text.strip().splitlines()
    last = lines[-1] if lines else ""
    return f"{run.name} ended with status {status}: {last} (see {run.log})"


# --- comparing them -------------------------------------------------------------------------------


def table(runs: list[Run]) -> list[Row]:
    """A row for each combination with a finished run. UserError if data or trunk have changed."""
    cells = {cell_name(run.cell): run.cell for run in runs}
    results: dict[str, dict[int, dict]] = {name: {} for name in cells}  # -> seed -> result.json
    for run in runs:
        found = run.result()
        if found:
            results[cell_name(run.cell)][run.seed] = found

    check_data(results, runs[0].cell)
    rows: list[Row] = []
    for name, by_seed in results.items():
        if not by_seed:
            continue
        row = summarize(cells[name], by_seed)
        if rows:
            row.difference, row.ci95 = compare(row.accuracy, rows[0].accuracy)
        rows.append(row)
    return rows


def check_data(results: dict[str, dict[int, dict]], cell: Cell) -> None:
    """UserError if runs that are compared have read different data or trunks."""
    data = set()
    for name, by_seed in results.items():
        hashes = [found.get("hashes", {}) for found in by_seed.values()]
        if any(other != hashes[0] for other in hashes):
            raise UserError(
                f"{name}: data or trunk have changed between its runs: choose another name="
            )
        data |= {each["data"] for each in hashes if "data" in each}
    is_compared = any(key.startswith("data.") for key in cell)
    if len(data) > 1 and not is_compared:
        raise UserError("the data have changed between the runs: choose another name=")


def summarize(cell: Cell, by_seed: dict[int, dict]) -> Row:
    """The row of a combination, from the results of its runs."""
    tests = {seed: found["test"] for seed, found in by_seed.items()}
    accuracy = {seed: test["accuracy"] for seed, test in tests.items()}
    macro_f1 = {seed: test["macro_f1"] for seed, test in tests.items()}
    seconds = [found["seconds"] for found in by_seed.values()]
    one = by_seed[min(by_seed)]
    largest_class, svm = one["baselines"].values()
    return Row(
        cell,
        accuracy=pd.Series(accuracy),
        macro_f1=pd.Series(macro_f1),
        seconds=float(np.mean(seconds)),
        train=one["examples"]["train"],
        baselines={LARGEST_CLASS: largest_class["accuracy"], SVM: svm["accuracy"]},
    )


def compare(values: pd.Series, reference: pd.Series) -> tuple[float, float]:
    """Mean difference of two series over seeds, and half the width of its 95 % interval.

    The interval is that of the paired t-test: the same seed is the same head and order, so pairs
    tell more than two means. One pair has none, nan."""
    values, reference = values.align(reference, join="inner")
    mean = float((values - reference).mean())
    if len(values) < 2:
        return mean, math.nan
    with warnings.catch_warnings(action="ignore"):  # differences that are all the same
        low, high = ttest_rel(values, reference).confidence_interval(0.95)
    return mean, float(high - low) / 2


def write(rows: list[Row], folder: Path) -> str:
    """table.md, table.csv and figure.png; returns the table."""
    sheet = pd.DataFrame([row.flat() for row in rows])
    # utf-8-sig: the mark is for spreadsheets
    sheet.to_csv(folder / "table.csv", index=False, float_format="%.6g", encoding="utf-8-sig")
    text = markdown(rows)
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw(rows, folder / "figure.png")
    return text


def markdown(rows: list[Row]) -> str:
    """The table, and what its numbers are."""
    titles = [
        *rows[0].cell,
        "training examples",
        "test accuracy, %",
        "macro F1, %",
        "difference from the first",
        "n",
        "seconds a run",
        *rows[0].baselines,
    ]
    lines = [table_line(titles), "|---" * len(titles) + "|"]
    for row in rows:
        words = [
            *(value.replace("|", "\\|") for value in row.cell.values()),
            f"{row.train:,}",
            percent(row.accuracy.mean(), row.accuracy.std()),
            percent(row.macro_f1.mean(), row.macro_f1.std()),
            percent(row.difference, row.ci95, sign="+"),
            f"{len(row.accuracy)}",
            f"{row.seconds:.0f}",
            *(percent(accuracy) for accuracy in row.baselines.values()),
        ]
        lines.append(table_line(words))
    note = (
        "± is the standard deviation over seeds; of the differences (points, paired by seed) the "
        "95 % interval."
    )
    return "\n".join([*lines, "", note, ""])


def table_line(words: list[str]) -> str:
    return f"| {' | '.join(words)} |"


def percent(value: float, spread: float = math.nan, sign: str = "") -> str:
    """76.67 ± 9.87; without a spread if that is nan, and empty if the value is."""
    if math.isnan(value):
        return ""
    text = f"{100 * value:{sign}.2f}"
    return text if math.isnan(spread) else f"{text} ± {100 * spread:.2f}"


# --- the figure -----------------------------------------------------------------------------------


def draw(rows: list[Row], file: Path) -> None:
    """Test accuracy of each combination; over the training size, if the grid has it, as curves."""
    if SIZE in rows[0].cell:
        fig, ax = plots.figure(7, 4.6)
        draw_over_size(ax, rows)
        accuracy = ax.yaxis
    else:
        fig, ax = plots.figure(7, 1.8 + 0.5 * len(rows))
        draw_side_by_side(ax, rows)
        accuracy = ax.xaxis
    accuracy.set_major_formatter(lambda value, _: f"{100 * value:g}")
    accuracy.set_label_text("test accuracy, % (mean ± SD over seeds)")
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    ax.grid(alpha=0.3)
    plots.save(fig, file)


BASELINE_STYLES = {LARGEST_CLASS: "D--", SVM: "s:"}
GREY = {"color": "0.4", "ms": 3, "lw": 1}


def draw_over_size(ax: "Axes", rows: list[Row]) -> None:
    """A curve for each combination of the other settings, and for each baseline."""
    rows = sorted(rows, key=lambda row: row.train)
    curves: dict[str, list[Row]] = {}
    for row in rows:
        others = {key: value for key, value in row.cell.items() if key != SIZE}
        curves.setdefault(cell_name(others), []).append(row)
    for i, (name, curve) in enumerate(curves.items()):
        sizes = [row.train for row in curve]
        means = [row.accuracy.mean() for row in curve]
        spreads = np.nan_to_num([row.accuracy.std() for row in curve])
        label = textwrap.fill(name or "this model", 40)
        style = {"fmt": "o-", "ms": 4, "capsize": 3, "color": f"C{i}"}
        ax.errorbar(sizes, means, spreads, label=label, **style)
    sizes = [row.train for row in rows]
    for name, style in BASELINE_STYLES.items():
        values = [row.baselines[name] for row in rows]
        ax.plot(sizes, values, style, label=name, **GREY)
    ticks = sorted(set(sizes))
    ax.set(xscale="log", xlabel="training examples")
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.minorticks_off()


def draw_side_by_side(ax: "Axes", rows: list[Row]) -> None:
    """A line for each combination: mean and spread, and every seed a dot."""
    bar = {"fmt": "|", "ms": 14, "capsize": 4, "color": "C0"}
    dot = {"ms": 4, "color": "C0", "alpha": 0.5}
    for i, row in enumerate(rows):
        mean = row.accuracy.mean()
        spread = np.nan_to_num(row.accuracy.std())
        height = [i] * len(row.accuracy)
        ax.errorbar([mean], [i], xerr=[spread], **bar)
        ax.plot(row.accuracy, height, "o", **dot)
    lowest = min(row.accuracy.min() for row in rows)
    lowest = min(lowest, *(row.baselines[SVM] for row in rows))
    for name, style in BASELINE_STYLES.items():
        values = [row.baselines[name] for row in rows]
        if len(set(values)) == 1 and values[0] < lowest - 0.05:
            # it would squeeze what is compared into a corner
            note = f"{name}: {100 * values[0]:.1f} %, off the scale"
            ax.plot([], [], " ", label=note)
        else:
            ax.plot(values, range(len(rows)), style, label=name, **GREY)
    labels = [textwrap.fill(cell_name(row.cell), 40) for row in rows]
    ax.set_ylim(len(rows) - 0.5, -0.5)  # from top to bottom
    ax.set_yticks(range(len(rows)), labels)


if __name__ == "__main__":
    console.run(main)
