"""Run a grid of fine-tunings times seeds, and compare them: one table, one figure.

    python scripts/sweep.py config/sweep_ablation.yaml set.trunk=checkpoints/trunk_zh
    python scripts/sweep.py config/sweep_train_size.yaml workers=2

Each run is a `python sentiment_train.py` of its own, under out_dir/name/. The same command again goes on where it
stopped: finished runs are kept, an interrupted one resumes. With several GPUs several run at once.
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
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, hardware, plots, settings
from smallgpt.console import UserError
from smallgpt.files import write_atomic
from smallgpt.parallel.world import StopRequest
from smallgpt.runs import checkpoint
from smallgpt.settings import Count
from smallgpt.weights import pretrained

SCRIPT = Path(__file__).resolve().parent.parent / "sentiment_train.py"
BASELINES = (
    "largest class",
    "TF-IDF + linear SVM",
)  # of report.py, under names that all runs share


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

    def result(self) -> dict[str, Any] | None:
        """result.json, which a finished run has; None if there is none, or only a part of it (a kill)."""
        try:
            return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None


def cell_name(cell: dict[str, Any]) -> str:
    """A combination as people read it: mask=true, freeze=none."""
    return ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in cell.items())


def shared(path: Path) -> dict[str, str]:
    """The settings in a YAML file and its bases, by dotted names, as text. The runs get them one by one, and not the
    file: so a run's record shows whether the file has changed since."""
    found: dict[str, str] = {}
    try:
        for values in settings.read_yaml(path).values():
            found |= settings.dotted(values)
    except UserError as error:
        raise UserError(f"config: {error}") from None
    return found


def plan(s: SweepSettings, folder: Path) -> list[Run]:
    """Every run; seeds outermost, so that an interrupted sweep has compared all combinations on the first of them.
    UserError if one was begun with other settings."""
    common = {**(shared(Path(s.config)) if s.config else {}), **s.set}
    cells = [
        dict(zip(s.grid, values, strict=True)) for values in itertools.product(*s.grid.values())
    ]
    todo: dict[str, Run] = {}
    for seed, cell in itertools.product(s.seeds, cells):
        name = re.sub(r"[^\w.-]", "-", cell_name({**cell, "seed": seed}).replace(", ", "_"))
        keys = {**common, **cell, "seed": str(seed)}
        run = Run(
            cell,
            seed,
            folder / name,
            {k: v for k, v in keys.items() if k not in ("run", "out_dir")},
        )
        if todo.setdefault(name.lower(), run) is not run:
            raise UserError(
                f"two combinations in grid have the same folder, {name}: write their values differently"
            )
        record = run.folder / "sweep.json"
        before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else run.keys
        if before != run.keys and (
            run.result() or checkpoint.step_folders(run.folder)
        ):  # else it never began
            key = min(k for k in before | run.keys if before.get(k) != run.keys.get(k))
            then, now = (keys[key] if key in keys else "not set" for keys in (before, run.keys))
            raise UserError(
                f"{run.folder}: {key} was {then} and is now {now}: put it back, or choose another name="
            )
        then = (run.result() or {}).get("hashes", {}).get("trunk")
        if then and pretrained.digest(str(run.keys.get("trunk", ""))) not in ("", then):
            raise UserError(
                f"{run.folder}: its trunk was trained again since: delete {folder}, or choose another name"
            )
    return [*todo.values()]


def launch(run: Run, slot: int, workers: int) -> subprocess.Popen:
    """Start a run, its output going to log.txt. UserError if a process of an earlier sweep still trains it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    keys = {**run.keys, "out_dir": str(run.folder.parent), "run": run.folder.name}
    command = [
        sys.executable,
        str(SCRIPT),
        *(f"{k}={v}" for k, v in keys.items()),
    ]
    env = dict(os.environ)
    if hardware.gpus(run.keys.get("device", "auto")):
        gpus = env.get(
            "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
        ).split(",")
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    elif workers > 1:
        env.setdefault(
            "OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // workers))
        )  # more than cores crawl
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        try:  # the lock belongs to the open file, which the run inherits: so it outlives a sweep that was killed
            import fcntl

            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process, perhaps of a sweep that was killed, still trains {run.folder}: wait for "
                "it or end it, and give the same command"
            ) from None
        except (ImportError, OSError):
            pass  # Windows and some network file systems have no such lock
        write_atomic(run.folder / "sweep.json", json.dumps(run.keys, ensure_ascii=False, indent=1))
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)


def run_all(todo: list[Run], workers: int) -> tuple[list[str], int]:
    """Run those that are not finished, `workers` at a time. Returns what went wrong, one entry per failed run, and the
    signal that stopped the sweep (each run has saved its state then), or 0."""
    waiting = [run for run in todo if not run.result()]
    problems: list[str] = []
    running: dict[int, tuple[Run, subprocess.Popen]] = {}  # slot -> what runs there
    with (
        tqdm(todo, initial=len(todo) - len(waiting), unit="run", disable=None) as bar,
        StopRequest() as stop,
    ):
        try:
            while (running or waiting) and not stop.signal:
                while waiting and len(running) < workers:
                    run, slot = waiting.pop(0), min({*range(workers)} - running.keys())
                    running[slot] = run, launch(run, slot, workers)
                time.sleep(0.05)
                for slot in [
                    i for i, (_, process) in running.items() if process.poll() is not None
                ]:
                    run, process = running.pop(slot)
                    name, log = cell_name({**run.cell, "seed": run.seed}), run.folder / "log.txt"
                    if found := run.result():
                        tqdm.write(
                            f"{name}: test accuracy {found['test']['accuracy']:.2%}",
                            file=sys.stdout,
                        )
                        bar.update()
                    elif not stop.signal:
                        last = (
                            log.read_text(encoding="utf-8", errors="replace")
                            .strip()
                            .splitlines()[-1:]
                        )
                        problems.append(
                            f"{name} ended with status {process.returncode}: {''.join(last)} (see {log})"
                        )
        finally:
            if running:  # a signal, or an error
                tqdm.write(
                    f"stopping {len(running)} run(s): each saves its state first", file=sys.stdout
                )
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    return problems, stop.signal


def compare(values: pd.Series, reference: pd.Series) -> tuple[float, float]:
    """Mean of the differences of two series over seeds, and half the width of its 95 % confidence interval (Student's
    t; nan of one pair). Paired: the same seed is the same head and order, so pairs tell more than two means."""
    d = (values - reference).dropna()
    return float(d.mean()), float(student.ppf(0.975, len(d) - 1) * d.sem())


def table(todo: list[Run]) -> list[dict[str, Any]]:
    """One row per combination with a finished run: mean, standard deviation, n, seconds, difference from the first."""
    rows: list[dict[str, Any]] = []
    data = {
        found["hashes"].get("data") for run in todo if "hashes" in (found := run.result() or {})
    }
    if len(data) > 1 and not any(key.startswith("data.") for key in todo[0].cell):
        raise UserError("the data have changed between the runs: choose another name=")
    for cell in [run.cell for run in todo if run.seed == todo[0].seed]:
        if not (
            results := {
                run.seed: found for run in todo if run.cell is cell and (found := run.result())
            }
        ):
            continue
        if len({json.dumps(found.get("hashes")) for found in results.values()}) > 1:
            raise UserError(
                f"{cell_name(cell)}: data or trunk have changed between its runs: choose another name="
            )
        row: dict[str, Any] = {**cell, "n": len(results)}
        for key in ("macro_f1", "accuracy"):
            by_seed = pd.Series({seed: r["test"][key] for seed, r in results.items()})
            row |= {key: by_seed.mean(), f"{key}_sd": by_seed.std()}
        row["difference"], row["ci95"] = (
            compare(by_seed, rows[0]["by_seed"]) if rows else (math.nan, math.nan)
        )
        one = results[min(results)]
        row |= {
            "seconds": np.mean([r["seconds"] for r in results.values()]),
            "train": one["examples"]["train"],
        }
        row |= {k: v["accuracy"] for k, v in zip(BASELINES, one["baselines"].values(), strict=True)}
        rows.append(row | {"by_seed": by_seed})  # the last one, of the accuracy
    return rows


def write(s: SweepSettings, rows: list[dict[str, Any]], folder: Path) -> str:
    """table.md, table.csv and figure.png; returns the table."""
    sheet = pd.DataFrame(rows).drop(columns="by_seed")  # utf-8-sig: the mark is for spreadsheets
    sheet.to_csv(folder / "table.csv", index=False, float_format="%.6g", encoding="utf-8-sig")

    def percent(value: float, spread: float = math.nan, sign: str = "") -> str:
        text = "" if math.isnan(value) else f"{100 * value:{sign}.2f}"
        return text if math.isnan(spread) else f"{text} ± {100 * spread:.2f}"

    heads = [
        "training examples",
        "test accuracy, %",
        "macro F1, %",
        "difference from the first",
        "n",
        "seconds a run",
    ]
    lines = [
        f"| {' | '.join([*s.grid, *heads, *BASELINES])} |",
        "|---" * len([*s.grid, *heads, *BASELINES]) + "|",
    ]
    for r in rows:
        means = percent(r["accuracy"], r["accuracy_sd"]), percent(r["macro_f1"], r["macro_f1_sd"])
        cells = [
            *(r[k].replace("|", "\\|") for k in s.grid),
            f"{r['train']:,}",
            *means,
            percent(r["difference"], r["ci95"], "+"),
            f"{r['n']}",
            f"{r['seconds']:.0f}",
            *(percent(r[k]) for k in BASELINES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = "± is the standard deviation over seeds; of the differences (points, paired by seed) the 95 % interval."
    (folder / "table.md").write_text(text := "\n".join([*lines, "", note, ""]), encoding="utf-8")
    draw(s, rows, folder / "figure.png")
    return text


def draw(s: SweepSettings, rows: list[dict[str, Any]], file: Path) -> None:
    """Test accuracy of each combination, every seed a dot; over the training size, if the grid has it, as curves."""
    size, lines = "data.train_size", {}  # label -> its rows
    over_size = size in s.grid
    for r in rows:
        label = cell_name({k: r[k] for k in s.grid if k != size}) or "this model"
        lines.setdefault(textwrap.fill(label, 40), []).append(r)
    fig, ax = plots.figure(7, 4.6 if over_size else 1.8 + 0.5 * len(rows))
    for i, (label, mine) in enumerate(lines.items()):
        mine.sort(key=lambda r: r["train"])
        y, sd = [r["accuracy"] for r in mine], [np.nan_to_num(r["accuracy_sd"]) for r in mine]
        if over_size:
            ax.errorbar(
                [r["train"] for r in mine],
                y,
                sd,
                fmt="o-",
                ms=4,
                capsize=3,
                color=f"C{i}",
                label=label,
            )
        else:
            ax.errorbar(y, [i], xerr=sd, fmt="|", ms=14, capsize=4, color="C0")
            ax.plot(mine[0]["by_seed"], [i] * mine[0]["n"], "o", ms=4, color="C0", alpha=0.5)
    lowest = min(min(r["by_seed"].min(), r[BASELINES[1]]) for r in rows)
    for name, style in zip(BASELINES, ("D--", "s:"), strict=True):
        points = sorted((r["train"] if over_size else i, r[name]) for i, r in enumerate(rows))
        value, *others = {r[name] for r in rows}
        if (
            not (over_size or others) and value < lowest - 0.05
        ):  # it would squeeze what is compared into a corner
            ax.plot([], [], " ", label=f"{name}: {100 * value:.1f} %, off the scale")
            continue
        x, y = zip(*(points if over_size else (point[::-1] for point in points)), strict=True)
        ax.plot(x, y, style, color="0.4", ms=3, lw=1, label=name)
    if over_size:
        ax.set(xscale="log", xlabel="training examples")
        ax.set_xticks(sizes := sorted({r["train"] for r in rows}), [f"{n:,}" for n in sizes])
        ax.minorticks_off()
    else:
        ax.set(ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=lines)
    accuracy = ax.yaxis if over_size else ax.xaxis
    accuracy.set(
        major_formatter=lambda v, _: f"{100 * v:g}",
        label_text="test accuracy, % (mean ± SD over seeds)",
    )
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    ax.grid(alpha=0.3)
    plots.save(fig, file)


def main() -> int:
    s = settings.load(SweepSettings, doc=__doc__)
    folder = Path(s.out_dir) / s.name
    todo = plan(s, folder)
    workers = s.workers or max(1, hardware.gpus(todo[0].keys.get("device", "auto")))
    print(
        f"{len(todo)} runs, {workers} at once, in {folder}; the log.txt of each is in its folder",
        flush=True,
    )
    problems, number = run_all(todo, workers)
    if number:
        print(f"stopped by a signal; what ran is saved in {folder}, and the same command continues")
        return 128 + number
    if rows := table(todo):
        print(
            "\n" + write(s, rows, folder),
            f"table.md, table.csv and figure.png are in {folder}",
            sep="\n",
        )
    if problems:
        raise UserError("\n  - ".join([f"{len(problems)} of {len(todo)} runs failed", *problems]))
    return 0


if __name__ == "__main__":
    console.run(main)
