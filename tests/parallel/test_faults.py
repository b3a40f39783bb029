"""One of several processes fails, dies or hangs: the others end soon, and one sentence says why."""

import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import faults
from helpers import Result, command, drawn_seed, mistake, sentence, wait_for
from smallgpt.parallel import peers

TIMEOUT = 10  # seconds, in which all must have started on a busy machine, too
CASES = [
    ("raise", 1),
    ("raise", 0),
    ("mistake", 1),
    ("kill", 1),
    ("kill", 0),
    ("stop", 1),
    ("hang", 1),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def ends(start_ranks) -> dict[tuple[str, int], list[Result]]:
    """(how, rank) -> how three processes ended, of which that rank misbehaved in that way. All
    groups run at the same time: they mostly wait."""
    groups = {}
    for how, rank in CASES:
        argv = [f"how={how}", f"rank={rank}", f"timeout={TIMEOUT}"]
        groups[how, rank] = start_ranks(3, argv, script="misbehaving")
    results = {}
    for (how, rank), processes in groups.items():
        others = [process for process in processes if process is not processes[rank]]
        for process in others:
            process.wait()
        if how == "stop":
            processes[rank].kill()
        results[how, rank] = [process.wait() for process in processes]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_traceback_of_the_first_is_the_only_one(ends, rank):
    """Regression: every other process printed a traceback about a closed connection before it."""
    results = ends["raise", rank]
    assert [r.status for r in results] == [1, 1, 1]
    for other, result in enumerate(results):
        if other == rank:
            assert result.err.rstrip().endswith("ZeroDivisionError: a bug of this process only")
        else:
            assert without_host(result) == (
                f"(process {other}: process {rank} failed first: ZeroDivisionError: a bug of this "
                "process only)"
            )


@pytest.mark.slow
def test_a_mistake_on_one_machine_is_said_by_process_0(ends):
    """Regression: process 0 showed a traceback, and process 1 was ended before it could speak."""
    results = ends["mistake", 1]
    assert [r.status for r in results] == [2, 2, 2]
    assert without_host(results[0]) == "error: process 1: its disk is full; make room"
    assert sentence(results[1]) == "(process 1: its disk is full; make room)"


@pytest.mark.slow
@pytest.mark.parametrize("how, rank", [("kill", 1), ("kill", 0), ("stop", 1)])
def test_who_is_killed_or_stopped_is_named(ends, how, rank):
    """The others would wait for half an hour, or say that some connection was closed."""
    for other, result in enumerate(ends[how, rank]):
        if other != rank:
            assert result.status == 1
            assert f"no answer from process {rank}: killed" in without_host(result)
            assert ("error: " in result.err) == (other == 0)


@pytest.mark.slow
def test_who_hangs_is_named_with_the_line_where(ends):
    """It must end, too: it may hold a GPU and the lock of the run."""
    results = ends["hang", 1]
    assert [r.status for r in results] == [1, 1, 1]
    for result in results:
        said = without_host(result)
        assert "others waited in vain for process 1 (at tests/misbehaving.py:" in said
        assert "in misbehave)" in said


def test_a_process_that_waits_for_its_gpu_does_not_hang(monkeypatch):
    """Regression: with NCCL the main thread waits at a line of ours, for a number of the GPU, where
    the collective is; such a process was called hung. (A stand-in for the GPU.)"""
    gpu = torch.device("cuda", 1)
    main = threading.main_thread()
    has_ended = {gpu: False}

    def default_stream(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(query=lambda: has_ended[device])

    monkeypatch.setattr(torch.cuda, "default_stream", default_stream)
    assert peers.place_of(main, gpu) == peers.WAITING
    has_ended[gpu] = True
    assert peers.place_of(main, gpu).endswith("in place_of")


def without_host(result: Result) -> str:
    """What it said, without this machine's name."""
    return sentence(result).replace(f" on {socket.gethostname()}", "")


@pytest.mark.slow
def test_torchrun_brings_back_what_is_killed(out, tiny, run_ranks):
    """The losses and weights are those of a run that nobody touched, whenever the kills come."""
    few = {"max_steps": 300, "save_every": 10, "eval_every": 100, "prompts": "[]"}
    for result in run_ranks(2, tiny(out, run="whole", **few)):
        assert result.status == 0, result.err
    words = ["--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    words = command(tiny(out, run="killed", **few), *words)
    killed = faults.kill_often(words, out / "killed", 2, span=6, draw=drawn_seed())
    assert killed["kills"] and killed["problems"] in ([], [faults.TOO_SHORT])
    assert faults.differences(out / "whole", out / "killed") == []


@pytest.mark.slow
def test_a_second_job_on_a_run_is_refused(out, tiny, start_ranks):
    """Two rendezvous know nothing of each other: both would write the same checkpoints."""
    args = tiny(out, run="busy", max_steps=5000, eval_every=5000, save_every=5000)
    first = start_ranks(2, args)
    wait_for((out / "busy" / "metrics.jsonl").exists, "the first job")
    second = [process.wait() for process in start_ranks(2, args)]
    assert f"another process trains {out / 'busy'} now" in mistake(second[0])
    assert [r.status for r in second] == [2, 2]
    first[1].kill(signal.SIGTERM)
    assert [process.wait().status for process in first] == [143, 143]
