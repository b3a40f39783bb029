"""The trainings of a sweep: each has a folder, a lock, and a process that somebody starts.

Several sweeps, on one machine or on many, may share a folder. Who gets the lock of a training
trains it. The lock ends with that process, however it ends, and the training is open again to all.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import torch
from tqdm import tqdm

from smallgpt import hardware, settings
from smallgpt.console import UserError
from smallgpt.files import read_json, write_atomic
from smallgpt.parallel.world import StopRequest
from smallgpt.runs import checkpoint, metrics
from smallgpt.runs.metrics import say
from smallgpt.weights import pretrained

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = {"train": ROOT / "train.py", "sentiment_train": ROOT / "sentiment_train.py"}
POLL = 0.1  # seconds between looks at one's own processes
LOOK = 1.0  # seconds between looks at what others do

Script = Literal["sentiment_train", "train"]
Cell = dict[str, str]  # a combination of settings: {"mask": "true", "freeze": "none"}


@dataclass
class Job:
    """One training of the sweep."""

    script: Script
    cell: Cell
    seed: int
    folder: Path
    keys: dict[str, str]  # all settings of the script but run and out_dir

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
        """What a finished training has found; {} if it is not finished."""
        if self.script == "train":
            return pretraining_result(self.folder)
        found = read_json(self.folder / "result.json")
        return found if isinstance(found, dict) else {}


def pretraining_result(folder: Path) -> dict[str, Any]:
    """The best evaluation of a pretraining that has made all its steps; {} before."""
    config_file = folder / "config.yaml"
    evaluations = metrics.read(folder, "val")
    if not evaluations or not config_file.exists():
        return {}
    config = settings.read_yaml(config_file)[config_file]
    if evaluations[-1]["step"] < int(config["max_steps"]):
        return {}
    meta = {}
    newest = checkpoint.read_pointer(folder, "latest")
    if newest:
        meta = read_json(newest / "meta.json") or {}
    return {
        "validation": min(evaluations, key=lambda record: record["loss"]),
        "seconds": meta.get("seconds", 0.0),
        "hashes": {"data": meta.get("data")},
    }


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


def check(job: Job) -> None:
    """UserError if the training has begun with other settings than now, or with a trunk that has
    changed since."""
    check_settings(job)
    check_trunk(job)


def check_settings(job: Job) -> None:
    """UserError if the training has begun, with other settings than now."""
    before = read_json(job.record)
    has_begun = job.result() or checkpoint.step_folders(job.folder)
    if not isinstance(before, dict) or not has_begun:
        return
    changed = [key for key in before | job.keys if before.get(key) != job.keys.get(key)]
    if changed:
        key = min(changed)
        then = before.get(key, "not set")
        now = job.keys.get(key, "not set")
        raise UserError(
            f"{job.folder}: {key} was {then} and is now {now}: put it back, or choose another name="
        )


def check_trunk(job: Job) -> None:
    """UserError if the training began with a trunk that has changed since."""
    hashes = job.result().get("hashes", {})
    then = hashes.get("trunk")
    if not then:
        return
    trunk = job.keys.get("trunk", pretrained.own_model())
    now = pretrained.digest(trunk)
    if now not in ("", then):
        raise UserError(
            f"{job.folder}: its trunk was trained again since: delete {job.folder.parent}, or "
            "choose another name"
        )


# --- running them ---------------------------------------------------------------------------------


class Queue(Protocol):
    """Which trainings there are to do: a grid's, or those that a search asks for."""

    def open_jobs(self) -> Iterable[Job]:
        """Those without a result, in the order in which they should be begun. Others may have the
        lock of some."""
        ...

    def should_end(self, job: Job) -> bool:
        """Should a training that runs here be ended early? It saves its state first."""
        ...

    def ended(self, job: Job, status: int) -> None:
        """The training has ended here with this exit status."""
        ...

    def count(self) -> tuple[int, int]:
        """How many trainings are finished, by anybody, and of how many."""
        ...


@dataclass
class Worker:
    """A training that runs here."""

    job: Job
    process: subprocess.Popen
    is_told_to_end: bool = False


class Crew:
    """Trains what is in a queue, `size` jobs at once, each in a process of its own."""

    def __init__(self, size: int):
        self.size = size
        self.workers: dict[int, Worker] = {}  # by slot, which chooses the GPU
        self.is_waiting = False

    def work(self, queue: Queue) -> int:
        """Until nothing is left to do. Returns the signal that stopped it before, or 0; each
        training has saved its state by then."""
        finished, total = queue.count()
        bar = tqdm(total=total, initial=finished, unit="run", disable=None)
        next_look = 0.0
        with bar, StopRequest() as stop:
            try:
                while not stop.signal:
                    has_changed = self.gather(queue)
                    now = time.monotonic()
                    if has_changed or now >= next_look:
                        self.end_early(queue)
                        is_left = self.begin(queue)
                        finished, bar.total = queue.count()
                        bar.update(finished - bar.n)
                        if not is_left and not self.workers:
                            break
                        next_look = now + LOOK
                    time.sleep(POLL)
            finally:
                self.stop()
        return stop.signal

    def gather(self, queue: Queue) -> bool:
        """Tell the queue which processes have ended. Returns whether one has."""
        ended = []
        for slot, worker in self.workers.items():
            if worker.process.poll() is not None:
                ended.append(slot)
        for slot in ended:
            worker = self.workers.pop(slot)
            queue.ended(worker.job, worker.process.returncode)
        return bool(ended)

    def end_early(self, queue: Queue) -> None:
        """Stop those that the queue has seen enough of: each saves its state first."""
        for worker in self.workers.values():
            if not worker.is_told_to_end and queue.should_end(worker.job):
                worker.process.terminate()
                worker.is_told_to_end = True

    def begin(self, queue: Queue) -> bool:
        """Begin jobs while there is room. Returns whether one is left that another process has."""
        is_left = False
        jobs = iter(queue.open_jobs())
        while len(self.workers) < self.size:
            job = next(jobs, None)
            if job is None:
                break
            if any(worker.job.folder == job.folder for worker in self.workers.values()):
                continue
            slot = min(set(range(self.size)) - self.workers.keys())
            process = launch(job, slot, self.size)
            if process:
                self.workers[slot] = Worker(job, process)
                self.is_waiting = False
            else:
                is_left = True
        if is_left and not self.workers and not self.is_waiting:
            say("what is left is trained by other processes: waiting")
            self.is_waiting = True
        return is_left

    def stop(self) -> None:
        """Tell those that run to save their state and to end, and wait until they have."""
        n = len(self.workers)
        if n:
            say(f"stopping {n} run(s): each saves its state first")
        for worker in self.workers.values():
            worker.process.terminate()
        for worker in self.workers.values():
            worker.process.wait()


def launch(job: Job, slot: int, workers: int) -> subprocess.Popen | None:
    """Start a job, its output going to log.txt. None if another process has its lock, or has
    finished it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    keys = {**job.keys, "out_dir": str(job.folder.parent), "run": job.folder.name}
    arguments = [f"{key}={value}" for key, value in keys.items()]
    with open(job.log, "a", encoding="utf-8") as log:
        if not lock(log) or job.result():
            return None
        write_atomic(job.record, json.dumps(job.keys, ensure_ascii=False, indent=1))
        return subprocess.Popen(
            [sys.executable, str(SCRIPTS[job.script]), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(job, slot, workers),
        )


def lock(log: TextIO) -> bool:
    """Lock a job. False if another process trains it.

    The lock belongs to the open file, which the training inherits: it outlives a sweep that was
    killed, and ends with the training."""
    try:
        import fcntl

        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass  # Windows and some network file systems have no such lock
    return True


def environment(job: Job, slot: int, workers: int) -> dict[str, str]:
    """Environment variables that share the machine: a GPU for each slot, or some of the cores."""
    env = dict(os.environ)
    if hardware.gpus(job.keys.get("device", "auto")):
        visible = env.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            visible = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    elif workers > 1:  # more threads than cores crawl
        threads = max(1, torch.get_num_threads() // workers)
        env.setdefault("OMP_NUM_THREADS", str(threads))
    return env


def why_failed(job: Job, status: int) -> str:
    """The last line of its log, which is the message of an error."""
    text = job.log.read_text(encoding="utf-8", errors="replace")
    lines = text.strip().splitlines()
    last = lines[-1] if lines else ""
    return f"{job.name} ended with status {status}: {last} (see {job.log})"
