"""What tests share: tiny settings, quick real processes, what a run left behind.

Importing torch takes two seconds, so most processes here are forked from a server that has imported
the scripts already (the fixture `start`): they are processes like any other, with their own pid,
exit status, stdout and stderr, and can be killed. What depends on how a user starts a script
(torchrun, a terminal) goes through the real command.
"""

import csv
import ctypes
import importlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from smallgpt import console
from smallgpt.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def dialogue_ids(tokenizer: Tokenizer, turns: list[str], roles: Sequence[str] = ()) -> list[int]:
    """The pieces of `encode_turns` as one list."""
    pieces = tokenizer.encode_turns(turns, roles)
    return [id for piece in pieces for id in piece]


ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONUTF8": "1",
}


TINY = {
    "device": "cpu",
    "dtype": "float32",
    "compile": "false",
    "max_steps": 12,
    "batch_tokens": 256,
    "eval_every": 4,
    "save_every": 4,
    "log_every": 1,
    "prompts": "[hi]",
    "data.val_fraction": 0.1,
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.block_size": 32,
    "optim.lr": 0.01,
    "optim.warmup": 2,
    "sample.max_tokens": 4,
}


@dataclass
class Result:
    status: int
    out: str
    err: str


class Started:
    """A process of ours, and the files its output goes to."""

    def __init__(self, process, folder: Path, name: str):
        self.process, self.pid, self.files = (
            process,
            process.pid,
            [folder / f"{name}.{end}" for end in ("out", "err")],
        )

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def alive(self) -> bool:
        return self.process.exitcode is None

    def wait(self, timeout: float = 60) -> Result:
        """Its exit status (negative: the signal it died of) and what it wrote."""
        self.process.join(timeout)
        late = self.process.exitcode is None
        if late:
            self.process.kill()
            self.process.join()
        result = Result(
            self.process.exitcode,
            *(f.read_text(encoding="utf-8", errors="replace") for f in self.files),
        )
        assert not late, (
            f"not finished after {timeout} s\n{result.out[-500:]}\n{result.err[-2000:]}"
        )
        return result


def run_cases(
    start_ranks: Callable[..., list[Started]], script: str, timeout: float
) -> dict[str, dict]:
    """What the processes of a script found, by case: two run most of them, four the rest. The main
    one prints a line {"case": ..., what was found} for each."""
    cases = {}
    for size in (2, 4):
        group = start_ranks(size, [], script=script)
        results = [process.wait(timeout) for process in group]
        for result in results:
            assert result.status == 0 and result.err == "", result.err[-3000:]
        for line in results[0].out.splitlines():
            case = json.loads(line)
            cases[case.pop("case")] = case
    return cases


def wait_for(condition: Callable[[], object], what: str, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s in vain for {what}"
        time.sleep(0.005)


# what the folder of any run holds, beside its step folders
RUN_FILES = {
    "config.yaml",
    "tokenizer.json",
    "metrics.jsonl",
    "tensorboard",
    "latest",
    "best",
    ".lock",
}


def drawn_seed() -> random.Random:
    """Moments that differ from run to run; the seed is printed where the test fails, and
    SMALLGPT_SEED sets it."""
    seed = int(os.environ.get("SMALLGPT_SEED", time.time_ns()))
    print(f"SMALLGPT_SEED={seed}")
    return random.Random(seed)


def group_variables(size: int) -> dict[str, str]:
    """What torchrun sets alike for all processes of a group on this machine."""
    return {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(
    script: str, argv: list[str], folder: str, name: str, stdin: str | None, env: dict, limits: dict
) -> None:
    """In the forked process: become `python <script>.py argv`, with its files where `Started` looks
    for them."""
    for fd, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), fd)
    if stdin is not None:
        Path(folder, f"{name}.in").write_bytes(stdin.encode("utf-8", "surrogateescape"))
        os.dup2(os.open(f"{folder}/{name}.in", os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # tests that a shell began with & inherit an ignored one
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and those under nohup this one
    os.environ.update(env)
    sys.argv = [f"{script}.py", *argv]
    if (
        "file_size" in limits
    ):  # like a full disk, but for one process only: a larger file gives EFBIG
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"],) * 2)
    if "namespace" in limits:  # of the network: another machine, as it were
        with open(f"/var/run/netns/{limits['namespace']}", "rb") as namespace:
            ctypes.CDLL(None).setns(namespace.fileno(), 0)
    if "die_at" in limits:
        die_at(*limits["die_at"])
    console.run(importlib.import_module(script).main)


def die_at(count: int, where: str) -> None:
    """SIGKILL this process just before it makes its count-th change to the file system at a path
    holding `where`."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
        changes = changes or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if changes and where in str(args[0]):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def command(args: list[str], *torchrun: str) -> list[str]:
    """The command a user types: python train.py ..., or with torchrun's options."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, args)]


def run_train(args: list[str], *torchrun: str) -> Result:
    """Run the command a user types, to its end."""
    done = subprocess.run(command(args, *torchrun), env=ENV, capture_output=True, timeout=120)
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def mistake(result: Result) -> str:
    """The message of a run that must have ended as a user's mistake does."""
    assert result.status == 2, (result.status, result.out[-500:], result.err[-2000:])
    assert "Traceback" not in result.err
    message = result.err[result.err.index("error: ") :]
    assert result.err.count("error:") == 1
    return message.removeprefix("error: ").strip()


def sentence(result: Result) -> str:
    """What one of several processes said at its end: one line of ours, and no traceback. torch may
    print lines of its own about the connection."""
    assert "Traceback" not in result.err, result.err[-2000:]
    lines = [line for line in result.err.splitlines() if line.startswith(("error: ", "(process "))]
    assert len(lines) == 1, result.err[-2000:]
    return lines[0]


def said(process: Started) -> str:
    """What it has written so far."""
    file = process.files[0]
    return file.read_text(encoding="utf-8") if file.exists() else ""


def json_lines(file: Path) -> list[dict]:
    """The objects in a file of JSON Lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def starts(run: Path) -> list[dict]:
    """One entry for each time that a run of tests/stand_in.py was started."""
    file = run / "starts.jsonl"
    return json_lines(file) if file.exists() else []


def losses(folder: Path, split: str) -> dict[int, float]:
    """{step: loss} of a run, the last record of a step."""
    records = json_lines(folder / "metrics.jsonl")
    return {r["step"]: r["loss"] for r in records if r["split"] == split}


def last_weights(folder: Path) -> dict:
    name = (folder / "latest").read_text(encoding="utf-8").strip()
    return load_file(folder / name / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    a, b = last_weights(a), last_weights(b)
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))


DATA = Path(os.environ.get("SMALLGPT_DATA", ROOT.parent / "shared" / "data"))


def write_csv(
    path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("Text", "Sentiment")
) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path
