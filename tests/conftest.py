"""The fixtures that start processes and make tiny runs; what they are made of is in helpers.py."""

import inspect
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fine_tuning import fine, fit, gpt2, labelled, pairs, trunk  # noqa: F401, fixtures
from helpers import ENV, ROOT, TINY, Result, Started, child, group_variables, mistake
from smallgpt import console

HANDS = {"start", "start_ranks", "run_ranks"}  # fixtures that give running processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What holds a process in its hands may kill it, signal it, or wait for several: it is slow."""
    for item in items:
        if HANDS & {*inspect.signature(item.function).parameters}:
            item.add_marker(pytest.mark.slow)


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
    """tiny(out_dir, key=value...) -> train.py's arguments for a run of a second; a dot in a key is
    written `__`."""

    def args(out_dir: Path, **changes: object) -> list[str]:
        cache = chat_file.parent / "tokens"
        keys = {**TINY, "data.path": chat_file, "data.cache": cache, "out_dir": out_dir}
        keys |= {k.replace("__", "."): v for k, v in changes.items()}
        return [f"{k}={v}" for k, v in keys.items()]

    return args


@pytest.fixture(scope="session")
def forks():
    """multiprocessing's fork server, with the scripts imported."""
    before = {k: os.environ.get(k) for k in (*ENV, "PYTHONPATH")}
    os.environ.update(ENV, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    context = multiprocessing.get_context("forkserver")
    # what the scripts import late, where it is used
    late = [
        "smallgpt.runs.state",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "matplotlib.pyplot",
        "sklearn.svm",
    ]
    context.set_forkserver_preload(
        ["helpers", "train", "chat", "sentiment_train", "scripts.classify", "scripts.sweep", *late]
    )
    context.Process(target=int).start()  # the server takes its environment from here
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})
    return context


@pytest.fixture(scope="session")
def start(forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Started]:
    """start("train", args) -> a running process; stdin is its input, ranks as torchrun would set
    them in env."""
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
    """start_ranks(2, args) -> the processes that torchrun would start, of train.py or another
    script."""

    def start_ranks(size: int, argv: list[str], script: str = "train", **kw) -> list[Started]:
        env = group_variables(size)
        return [
            start(script, argv, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, **kw)
            for r in range(size)
        ]

    return start_ranks


@pytest.fixture(scope="session")
def run_ranks(start_ranks) -> Callable[..., list[Result]]:
    return lambda size, argv, **kw: [p.wait() for p in start_ranks(size, argv, **kw)]


@pytest.fixture
def mistake_of(monkeypatch, capsys) -> Callable[..., str]:
    """mistake_of(train.main, args) -> the message of a command that must end as a user's mistake
    does; in this process, a tenth of the time of one of its own."""

    def mistake_of(main: Callable[[], int | None], argv: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            console.run(main)
        return mistake(Result(end.value.code, *capsys.readouterr()))

    return mistake_of
