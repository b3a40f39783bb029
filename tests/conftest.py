"""Helpers of the tests that start the scripts: a tiny corpus, tiny settings, and quick real processes.

Importing torch takes two seconds, so most processes here are forked from a server that has imported the scripts
already (`start`): they are processes like any other, with their own pid, exit status, stdout and stderr, and can be
killed. What depends on how a user starts a script (torchrun, a terminal) goes through the real command: `run_train`.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small, repetitive corpus in two languages: 400 dialogues, no two the same."""
    draw, colours = random.Random(0), ["red", "blue", "green", "黑色", "白色"]
    path = tmp_path_factory.mktemp("corpus") / "chat.txt"
    turns = [(i, draw.choice(colours)) for i in range(400)]
    path.write_text(
        "\n".join(f"what is {c} {i}?\n{c} is fine\n" for i, c in turns), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def tiny(chat_file: Path) -> Callable[..., list[str]]:
    """tiny(out_dir, key=value...) -> train.py's arguments for a run of a second; a dot in a key is written `__`."""

    def args(out_dir: Path, **changes: object) -> list[str]:
        cache = chat_file.parent / "tokens"
        keys = {**TINY, "data.path": chat_file, "data.cache": cache, "out_dir": out_dir}
        keys |= {k.replace("__", "."): v for k, v in changes.items()}
        return [f"{k}={v}" for k, v in keys.items()]

    return args


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


def wait_for(condition: Callable[[], object], what: str, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s in vain for {what}"
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(
    script: str, argv: list[str], folder: str, name: str, stdin: str | None, env: dict, limits: dict
) -> None:
    """In the forked process: become `python <script>.py argv`, with its files where `Started` looks for them."""
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
    os.environ.update(env)
    sys.argv = [f"{script}.py", *argv]
    if (
        "file_size" in limits
    ):  # like a full disk, but for one process only: a larger file gives EFBIG
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"],) * 2)
    if "die_at" in limits:
        die_at(*limits["die_at"])
    module = __import__(script)
    module.settings.cli(module.main)


def die_at(count: int, where: str) -> None:
    """SIGKILL this process just before it makes its count-th change to the file system at a path holding `where`."""
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


@pytest.fixture(scope="session")
def forks():
    """multiprocessing's fork server, with the scripts imported."""
    before = {k: os.environ.get(k) for k in (*ENV, "PYTHONPATH")}
    os.environ.update(ENV, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    context = multiprocessing.get_context("forkserver")
    # what the scripts import late: torch.manual_seed imports torch._dynamo, half of the start
    late = ["torch._dynamo", "torch.utils.tensorboard", "matplotlib.pyplot", "sklearn.svm"]
    context.set_forkserver_preload(
        ["conftest", "train", "chat", "sentiment_train", "classify", *late]
    )
    context.Process(target=int).start()  # the server takes its environment from here
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})
    return context


@pytest.fixture(scope="session")
def start(forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Started]:
    """start("train", args) -> a running process; stdin is its input, ranks as torchrun would set them in env."""
    folder, processes = tmp_path_factory.mktemp("output"), []

    def start(
        script: str, argv: list[str], stdin: str | None = None, env: dict | None = None, **limits
    ) -> Started:
        name = str(len(processes))
        args = (script, [str(a) for a in argv], str(folder), name, stdin, env or {}, limits)
        process = forks.Process(target=child, args=args)
        processes.append(process)
        process.start()
        return Started(process, folder, name)

    yield start
    for process in processes:
        process.kill()


@pytest.fixture(scope="session")
def run(start) -> Callable[..., Result]:
    """run("train", args) -> the result of a process that ended by itself."""
    return lambda script, argv, **kw: start(script, argv, **kw).wait()


@pytest.fixture(scope="session")
def start_ranks(start) -> Callable[..., list[Started]]:
    """start_ranks(2, args) -> the processes that torchrun would start, of train.py or another script."""

    def start_ranks(size: int, argv: list[str], script: str = "train", **kw) -> list[Started]:
        env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            start(script, argv, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, **kw)
            for r in range(size)
        ]

    return start_ranks


@pytest.fixture(scope="session")
def run_ranks(start_ranks) -> Callable[..., list[Result]]:
    return lambda size, argv, **kw: [p.wait() for p in start_ranks(size, argv, **kw)]


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


def losses(folder: Path, split: str) -> dict[int, float]:
    """{step: loss} of a run, the last record of a step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if r["split"] == split}


def last_weights(folder: Path) -> dict:
    name = (folder / "latest").read_text(encoding="utf-8").strip()
    return load_file(folder / name / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    a, b = last_weights(a), last_weights(b)
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))
