"""Run a grid of fine-tunings times seeds, and compare them: one table, one figure.

    python sentiment_sweep.py config/sweep_ablation.yaml set.trunk=checkpoints/trunk_zh
    python sentiment_sweep.py config/sweep_train_size.yaml workers=2

Each run is a `python sentiment_train.py` of its own, under out_dir/name/. The same command again goes on where it
stopped: finished runs are kept, an interrupted one resumes. With several GPUs several run at once.
"""

import csv
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from tqdm import tqdm

from smallgpt import runs, settings
from smallgpt.settings import UserError

SCRIPT = Path(__file__).with_name("sentiment_train.py")


@dataclass
class SweepSettings:
    name: str = "sweep"  # folder of the sweep under out_dir
    out_dir: str = "checkpoints"  # where it lives
    config: str = ""  # YAML of sentiment_train.py that all runs share
    set: dict[str, Any] = field(default_factory=dict)  # further settings of all runs, such as set.epochs=2
    grid: dict[str, Any] = field(default_factory=dict)  # setting -> list of its values; all combinations are run
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # each combination is run once with each
    workers: int = 0  # runs at once; 0 = one per GPU, or one

    def check(self) -> list[str]:
        """Problems with these settings, in plain words."""
        problems = [p.replace("run=", "name=") for p in runs.name_problems(self.name)]
        lists = {k: v for k, v in self.grid.items() if not isinstance(v, list) or not v}
        problems += [f"grid.{k} must be a list of values, such as [none, trunk]" for k in lists]
        own = [k for k in ("run", "out_dir", "seed") if k in (*self.grid, *self.set)]
        problems += [f"{k} is set by the sweep itself: leave it out" for k in own]
        if not self.grid:
            problems.append("grid is empty: give settings and their values, such as grid.mask=[true,false]")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds={self.seeds} must be different numbers, at least one")
        return problems


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def cell_name(cell: dict[str, Any]) -> str:
    """A combination as people read it: mask=true, freeze=none."""
    return ", ".join(f"{k.rpartition('.')[2]}={show(v)}" for k, v in cell.items())


def plan(s: SweepSettings, folder: Path) -> list[tuple[dict[str, Any], int, Path, list[str]]]:
    """(combination, seed, run folder, arguments of sentiment_train.py) of every run; seeds outermost, so that an
    interrupted sweep has compared all combinations on the first of them."""
    runs_ = []
    for seed in s.seeds:
        for values in itertools.product(*s.grid.values()):
            cell = dict(zip(s.grid, values, strict=True))
            name = "_".join(f"{k.rpartition('.')[2]}-{show(v)}".replace(":", "") for k, v in cell.items())
            name = "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{name}_seed-{seed}")
            keys = {**s.set, **cell, "seed": seed, "out_dir": folder, "run": name}
            args = [*([s.config] if s.config else []), *(f"{k}={show(v)}" for k, v in flat(keys).items())]
            runs_.append((cell, seed, folder / name, args))
    if len({run for *_, run, _ in runs_}) < len(runs_):
        raise UserError("two values of the grid look the same in a folder's name: write them differently")
    return runs_


def flat(keys: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections written as dotted keys: set.optim.lr=1 arrives as {"optim": {"lr": 1}}."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def execute(args: list[str], run: Path, slot: int, workers: int, started: list[subprocess.Popen]) -> str:
    """Run one, if it is not finished yet; its output goes to log.txt. Returns what went wrong, "" if nothing."""
    record = run / "arguments.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != args:
        return f"{run} was made with other settings: choose another name=, or delete the folder"
    if (run / "result.json").exists():
        return ""
    run.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(args, ensure_ascii=False), encoding="utf-8")
    env = dict(os.environ)
    if torch.cuda.is_available():
        gpus = env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    elif workers > 1:
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))  # more threads than cores crawl
    with open(run / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, str(SCRIPT), *args], stdout=log, stderr=log, env=env)
        started.append(process)
        status = process.wait()
    if status == 0 and (run / "result.json").exists():
        return ""
    last = (run / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return f"{run.name} ended with status {status}: {last[0] if last else ''} (all of it: {run / 'log.txt'})"


def run_all(todo: list[tuple], workers: int) -> None:
    """Run them, `workers` at a time. UserError if one failed; an interrupt is passed on, and each saves its state."""
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(workers):
        slots.put(slot)
    started: list[subprocess.Popen] = []
    stop = False

    def one(item: tuple) -> str:
        if stop:
            return ""
        cell, seed, run, args = item
        slot = slots.get()
        try:
            problem = execute(args, run, slot, workers, started)
        finally:
            slots.put(slot)
        if not problem and (run / "result.json").exists():
            test = json.loads((run / "result.json").read_text(encoding="utf-8"))["test"]
            tqdm.write(f"{cell_name(cell)}, seed {seed}: test accuracy {test['accuracy']:.2%}")
        return problem

    with ThreadPoolExecutor(workers) as pool:
        try:
            problems = list(tqdm(pool.map(one, todo), total=len(todo), unit="run", disable=None))
        except KeyboardInterrupt:
            stop = True
            for process in started:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            raise
    if failed := [p for p in problems if p]:
        raise UserError(f"{len(failed)} of {len(todo)} runs failed; the first: {failed[0]}")


def compare(values: list[float], reference: list[float]) -> tuple[float, float]:
    """Mean of the paired differences, and half the width of its 95 % confidence interval (Student's t; nan for one
    pair): the same seed is the same head, the same order and the same examples, so pairs tell more than two means."""
    d = np.array(values) - np.array(reference)
    half = student.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.nan
    return float(d.mean()), float(half)


def table(s: SweepSettings, done: list[tuple]) -> list[dict[str, Any]]:
    """One row per combination: mean, standard deviation, n, seconds, difference from the first combination."""
    rows: list[dict[str, Any]] = []
    for cell in (dict(zip(s.grid, v, strict=True)) for v in itertools.product(*s.grid.values())):
        results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for c, _, run, _ in done if c == cell]
        row: dict[str, Any] = {**{k: show(v) for k, v in cell.items()}, "n": len(results)}
        for key in ("accuracy", "macro_f1"):
            values = [r["test"][key] for r in results]
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            row |= {key: float(np.mean(values)), f"{key}_sd": sd, f"{key}_values": values}
        row["difference"], row["ci95"] = compare(row["accuracy_values"], (rows or [row])[0]["accuracy_values"])
        row |= {"seconds": float(np.mean([r["seconds"] for r in results])), "train": results[0]["examples"]["train"]}
        row["baselines"] = {k: v["accuracy"] for k, v in results[0]["baselines"].items()}
        rows.append(row)
    return rows


def write(s: SweepSettings, rows: list[dict[str, Any]], folder: Path) -> str:
    """table.md, table.csv and figure.png; returns the table."""
    keys = list(s.grid)
    numbers = ["accuracy", "accuracy_sd", "macro_f1", "macro_f1_sd", "n", "seconds", "difference", "ci95"]
    with open(folder / "table.csv", "w", encoding="utf-8", newline="") as file:
        sheet = csv.DictWriter(file, [*keys, *numbers], extrasaction="ignore")
        sheet.writeheader()
        sheet.writerows(rows)
    heads = [*keys, "test accuracy", "macro F1", "n", "seconds a run", "difference from the first (95 % interval)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for i, r in enumerate(rows):
        gap = f"{100 * r['difference']:+.2f} ± {100 * r['ci95']:.2f} points" if i else ""
        cells = [*(r[k] for k in keys), *(f"{r[k]:.2%} ± {100 * r[f'{k}_sd']:.2f}" for k in ("accuracy", "macro_f1"))]
        cells += [str(r["n"]), f"{r['seconds']:.0f}", gap]
        lines.append(f"| {' | '.join(cells)} |")
    base = "; ".join(f"{k} {v:.2%}" for k, v in rows[-1]["baselines"].items())
    text = "\n".join([*lines, "", f"± is the standard deviation over seeds. On the same split: {base}.", ""])
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw(s, rows, folder / "figure.png")
    return text


def draw(s: SweepSettings, rows: list[dict[str, Any]], file: Path) -> None:
    """Test accuracy of each combination, every seed a dot; over the training size, if the grid has it, as curves."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    size = "data.train_size"
    others = [k for k in s.grid if k != size]
    fig, ax = plt.subplots(figsize=(7, 1.4 + 0.5 * len(rows) if size not in s.grid else 4.2), layout="constrained")
    if size in s.grid:
        for i, line in enumerate(dict.fromkeys(tuple(r[k] for k in others) for r in rows)):
            mine = sorted((r for r in rows if tuple(r[k] for k in others) == line), key=lambda r: r["train"])
            x, sd = [r["train"] for r in mine], [np.nan_to_num(r["accuracy_sd"]) for r in mine]
            label = cell_name(dict(zip(others, line, strict=True))) or "this model"
            y = [r["accuracy"] for r in mine]
            ax.errorbar(x, y, yerr=sd, marker="o", ms=4, capsize=3, color=f"C{i}", label=label)
        for j, name in enumerate(rows[0]["baselines"]):
            mine = sorted({r["train"]: r["baselines"].get(name, math.nan) for r in rows}.items())
            ax.plot(*zip(*mine, strict=True), color="0.4", ls=["--", ":"][j % 2], lw=1, label=name)
        ax.set(xscale="log", xlabel="training examples", ylabel="test accuracy")
        ax.legend(frameon=False)
    else:
        for i, r in enumerate(rows):
            ax.plot(r["accuracy_values"], [i] * r["n"], "o", ms=4, color="C0", alpha=0.5)
            sd = np.nan_to_num(r["accuracy_sd"])
            ax.errorbar(r["accuracy"], i, xerr=sd, marker="|", ms=14, capsize=4, color="C0")
        for name, value in rows[0]["baselines"].items():
            ax.axvline(value, color="0.5", ls="--", lw=1)
            ax.annotate(name, (value, 1.0), xycoords=("data", "axes fraction"), rotation=0, fontsize=7, ha="center",
                        va="bottom", color="0.4")  # fmt: skip
        ax.set_yticks(range(len(rows)), [cell_name({k: r[k] for k in s.grid}) for r in rows])
        ax.invert_yaxis()
        ax.set(xlabel="test accuracy: mean and standard deviation over seeds")
    ax.grid(alpha=0.3)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def main() -> None:
    s = settings.load(SweepSettings, doc=__doc__)
    folder = Path(s.out_dir) / s.name
    todo = plan(s, folder)
    workers = s.workers or max(1, torch.cuda.device_count())
    print(f"{len(todo)} runs, {workers} at once, in {folder}", flush=True)
    run_all(todo, workers)
    print("\n" + write(s, table(s, todo), folder))
    print(f"table.md, table.csv and figure.png are in {folder}")


if __name__ == "__main__":
    settings.cli(main)
