"""Pretrain this project and nanoGPT on the same text, machine and time; compare held-out bits per
byte.

    python bench/real_run.py config/chat_zh.yaml [key=value ...] --nanogpt PATH --minutes 30

PATH is a checkout of nanoGPT. The settings file names the text and the shape of the model. The two
run side by side, each pinned to one half of the cores. Each is first timed for a few steps, then
run with as many steps as fit into the minutes: both schedules end when the time does. Both train on
the same dialogues and are judged on the same held-out ones. nanoGPT gets the recipe of its own
config/train_shakespeare_char.py (characters, AdamW 1e-3), the same shape, tokens per step and
torch.compile.
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from smallgpt import settings  # noqa: E402
from smallgpt.runs import metrics  # noqa: E402
from smallgpt.text.tokens import find_sources, held_out, read_dialogues  # noqa: E402
from train import TrainSettings  # noqa: E402


def run(command: list[str], cwd: Path, log: Path, half: int) -> float:
    """Run to the end on one half of the cores, each line with its time into log; wall seconds."""
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[half * len(cores) // 2 : (half + 1) * len(cores) // 2]
    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command],
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(len(cores)), "PYTHONUNBUFFERED": "1"},
        )
        for line in process.stdout:
            out.write(f"{time.perf_counter() - start:.1f}\t{line}")
            out.flush()
    if process.wait():
        raise SystemExit(f"{command} failed, see {log}")
    return time.perf_counter() - start


def ours(config: str, changes: list[str], minutes: float, out: Path) -> dict:
    """Time 30 steps, then the run: wall time, steps, and held-out bits per byte at every
    evaluation."""

    def train(name: str, steps: int, *more: str) -> float:
        command = [
            sys.executable,
            "train.py",
            config,
            *changes,
            f"out_dir={out}",
            f"run={name}",
            f"max_steps={steps}",
        ]
        return run([*command, *more], ROOT, out / f"{name}.log", half=0)

    shutil.rmtree(out / "timing", ignore_errors=True)
    train(
        "timing",
        30,
        "eval_every=1000000",
        "save_every=1000000",
        "data.eval_blocks=8",
        "compile=true",
    )
    # the middle of the records: the first pays for the compiler
    speeds = sorted(r["tokens_per_second"] for r in metrics.read(out / "timing", "train"))
    s = settings.load(TrainSettings, [config, *changes])
    spare = 60  # starting, compiling, evaluating, saving
    steps = int((minutes * 60 - spare) * speeds[len(speeds) // 2] / s.batch_tokens)
    seconds = train("ours", steps, "compile=true", "resume=never", "data.eval_blocks=0")
    val = metrics.read(out / "ours", "val")
    start = val[-1]["time"] - seconds  # the last evaluation ends the run
    curve = [{"seconds": r["time"] - start, "bits_per_byte": r["bits_per_byte"]} for r in val]
    return {
        "seconds": seconds,
        "steps": steps,
        "bits_per_byte": curve[-1]["bits_per_byte"],
        "curve": curve,
    }


def nanogpt(s: TrainSettings, checkout: Path, minutes: float, out: Path) -> dict:
    """The same with nanoGPT: its own train.py in a copy of the checkout, characters as tokens."""
    copy = out / "nanogpt"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "assets"))
    text = {True: [], False: []}
    for source in find_sources(s.data.path, Path(s.data.cache)):
        for turns in read_dialogues(source.path, s.data.errors):
            text[held_out(turns, s.data)].append("\n".join(turns) + "\n\n")
    val, train = ("".join(text[side]) for side in (True, False))
    chars = sorted(set(train) | set(val))  # as its prepare.py does: the vocabulary of all the text
    table = {c: i for i, c in enumerate(chars)}
    folder = copy / "data" / "chat"
    folder.mkdir()
    for name, side in (("train", train), ("val", val)):
        np.fromiter((table[c] for c in side), np.uint16, len(side)).tofile(folder / f"{name}.bin")
    (folder / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": len(chars), "itos": chars, "stoi": table})
    )
    m = s.model
    options = {
        "dataset": "chat",
        "device": "cpu",
        "compile": True,
        "block_size": m.block_size,
        "n_layer": m.n_layer,
        "n_head": m.n_head,
        "n_embd": m.n_embd,
        "batch_size": s.batch_tokens // m.block_size,
        "gradient_accumulation_steps": 1,
        "dropout": 0.0,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "beta2": 0.99,
        "warmup_iters": 100,
        "eval_iters": 10,
        "log_interval": 10,
        "always_save_checkpoint": True,
    }

    def train_it(name: str, iters: int, eval_interval: int) -> float:
        arguments = {
            "max_iters": iters,
            "lr_decay_iters": iters,
            "out_dir": name,
            "eval_interval": eval_interval,
        }
        command = [
            sys.executable,
            "train.py",
            *(f"--{k}={v}" for k, v in {**options, **arguments}.items()),
        ]
        return run(command, copy, out / f"nanogpt-{name}.log", half=1)

    train_it("timing", 30, 10**6)
    log = (out / "nanogpt-timing.log").read_text(encoding="utf-8")
    times = re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", log)
    spare = 0.05 * minutes * 60 + 60  # for its evaluations; for starting and compiling
    iters = int((minutes * 60 - spare) / (sorted(map(float, times))[len(times) // 2] / 1000))
    seconds = train_it("final", iters, max(1, iters // 6))

    sys.path.insert(0, str(copy))
    for name in ("model", "train"):
        sys.modules.pop(name, None)
    from model import GPT, GPTConfig  # nanoGPT's

    saved = torch.load(copy / "final" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()})
    tokens = torch.from_numpy(np.fromfile(folder / "val.bin", np.uint16).astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for i in range(0, len(tokens) - 1, m.block_size):
            x, y = tokens[i : i + m.block_size][None], tokens[i + 1 : i + 1 + m.block_size][None]
            nats += model(x[:, : y.size(1)], y)[1].item() * y.numel()
    n_bytes = len(val.encode()) - len(val[0].encode())
    per_char = len(val) / n_bytes / math.log(2)
    curve = [
        {"seconds": float(t), "bits_per_byte": float(v) * per_char}
        for t, v in re.findall(
            r"([\d.]+)\tstep \d+: train loss [\d.]+, val loss ([\d.]+)",
            (out / "nanogpt-final.log").read_text(encoding="utf-8"),
        )
    ]
    return {
        "seconds": seconds,
        "steps": iters,
        "bits_per_byte": nats / math.log(2) / n_bytes,
        "curve": curve,
    }


def draw(result: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in (
        ("small-gpt", result["ours"]["curve"]),
        ("nanoGPT", result["nanogpt"]["curve"]),
    ):
        final = result["ours" if name == "small-gpt" else "nanogpt"]["bits_per_byte"]
        x, y = [p["seconds"] / 60 for p in points], [p["bits_per_byte"] for p in points]
        ax.plot(x, y, marker="o", ms=3, label=f"{name}: {final:.3f} at the end")
    ax.set(xlabel="minutes, start and compilation included", ylabel="held-out bits per byte")
    ax.set_ylim(top=min(4.0, ax.get_ylim()[1]))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    fig.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("changes", nargs="*", help="key=value")
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/real_run"))
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    s = settings.load(TrainSettings, [args.config, *args.changes])
    with ThreadPoolExecutor() as pool:
        mine = pool.submit(ours, args.config, args.changes, args.minutes, out)
        theirs = nanogpt(s, args.nanogpt.resolve(), args.minutes, out)
        mine = mine.result()
    result = {"minutes": args.minutes, "cores": os.cpu_count(), "ours": mine, "nanogpt": theirs}
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    draw(result, out / "real_run.png")
    for name in ("ours", "nanogpt"):
        r = result[name]
        print(
            f"{name:8} {r['steps']:6} steps {r['seconds']:6.0f} s  "
            f"{r['bits_per_byte']:.4f} bits/byte held out"
        )


if __name__ == "__main__":
    main()
