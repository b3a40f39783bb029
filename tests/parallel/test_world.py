"""Several processes: the numbers are those of one, whatever the launcher, and no process is left
waiting."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from helpers import (
    ENV,
    Result,
    command,
    free_port,
    group_variables,
    json_lines,
    losses,
    mistake,
    run_train,
    steps,
    wait_for,
)
from smallgpt.console import UserError
from smallgpt.parallel import world


def same_losses(a: Path, b: Path, rel: float, at_least: int = 10) -> None:
    for split in ("train", "val"):
        x, y = losses(a, split), losses(b, split)
        assert x.keys() == y.keys() and len(x) >= (at_least if split == "train" else 2)
        assert x == pytest.approx(y, rel=rel, abs=0)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(out, tiny, run) -> dict[str, Path]:
    """The same run in one process, in each precision: the truth of this file."""
    kinds = {"float64": {"dtype": "float64"}, "float32": {}, "muon": {"optim__name": "muon"}}
    for name, changes in kinds.items():
        assert run("train", tiny(out, run=name, **changes)).status == 0
    return {name: out / name for name in kinds}


@pytest.mark.slow
def test_torchrun_gives_the_losses_of_one_process(out, alone, tiny):
    result = run_train(
        tiny(out, run="ddp64", dtype="float64"), "--standalone", "--nproc_per_node=2"
    )
    assert result.status == 0, result.err
    assert (
        "2 process(es) x 1 accumulation x 4 sequences" in result.out
        and result.out.count("finished 12 steps") == 1
    )
    same_losses(out / "ddp64", alone["float64"], 1e-9)
    # one process wrote, once
    records = json_lines(out / "ddp64" / "metrics.jsonl")
    assert len(records) == 12 + 3 and len(list((out / "ddp64" / "tensorboard").iterdir())) == 1
    # and of the whole batch
    assert [r["tokens"] for r in records if r["split"] == "train"] == [
        256 * s for s in range(1, 13)
    ]
    single = json_lines(alone["float64"] / "metrics.jsonl")
    for key in ("grad_norm", "lr"):
        one, two = ([r[key] for r in rs if r["split"] == "train"] for rs in (single, records))
        assert one == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize(
    "kind, changes, rel",
    [
        ("float32", {}, 1e-5),
        # five Newton-Schulz steps in bfloat16 turn a difference in the last bit of a gradient into
        # one of 1e-3
        ("muon", {"optim__name": "muon"}, 1e-2),
    ],
)
def test_two_processes_in_float32(out, alone, tiny, run_ranks, kind, changes, rel):
    for result in run_ranks(2, tiny(out, run=f"ddp-{kind}", **changes)):
        assert result.status == 0, result.err
    one, two = losses(alone[kind], "train"), losses(out / f"ddp-{kind}", "train")
    assert {s: two[s] for s in range(1, 11)} == pytest.approx(
        {s: one[s] for s in range(1, 11)}, rel=rel, abs=0
    )


def test_accumulation_does_not_change_the_sum(out, alone, tiny, run, run_ranks):
    """8 sequences at once, 8 x 1, and 2 processes x 2 x 2 are the same step."""
    result = run("train", tiny(out, run="eight", dtype="float64", micro_batch=1))
    assert "1 process(es) x 8 accumulation x 1 sequences" in result.out
    same_losses(out / "eight", alone["float64"], 1e-9)
    main, _ = run_ranks(2, tiny(out, run="two-two", dtype="float64", micro_batch=2))
    assert "2 process(es) x 2 accumulation x 2 sequences" in main.out
    same_losses(out / "two-two", alone["float64"], 1e-9)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_signal_to_one_process_stops_all_and_another_number_goes_on(
    out, alone, tiny, start_ranks, run_ranks, before, after
):
    args, folder = tiny(out, run=f"{before}to{after}", dtype="float64"), out / f"{before}to{after}"
    processes = start_ranks(before, args)
    wait_for(
        lambda: (folder / "metrics.jsonl").exists() and len(losses(folder, "train")) >= 3,
        "three steps",
    )
    processes[-1].kill(signal.SIGTERM)
    assert [p.wait().status for p in processes] == [143] * before
    assert 3 <= max(losses(folder, "train")) < 12
    for result in run_ranks(after, args):
        assert result.status == 0, result.err
    same_losses(folder, alone["float64"], 1e-9)


@pytest.mark.slow
def test_two_nodes(out, alone, tiny):
    """Two torchrun agents: LOCAL_RANK is 0 on both, and yet only one of them writes."""
    args, port = tiny(out, run="nodes", dtype="float64"), free_port()
    where = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = [
        subprocess.Popen(
            command(args, *where, f"--node_rank={i}"), env=ENV, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    texts = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert "finished 12 steps" in texts[0] and texts[1] == ""
    same_losses(out / "nodes", alone["float64"], 1e-9)
    assert (
        len(json_lines(out / "nodes" / "metrics.jsonl")) == 12 + 3
        and len(list((out / "nodes" / "tensorboard").iterdir())) == 1
    )
    assert steps(out / "nodes") == [8, 12]


@pytest.mark.slow
def test_ctrl_c_on_torchrun_saves(out, tiny):
    """A terminal sends SIGINT to torchrun, which passes it on to its workers."""
    args = tiny(out, run="ctrl-c", max_steps=5000, eval_every=5000, save_every=5000)
    agent = subprocess.Popen(
        command(args, "--standalone", "--nproc_per_node=2"),
        env=ENV,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    folder = out / "ctrl-c"
    wait_for(
        lambda: (folder / "metrics.jsonl").exists() and len(losses(folder, "train")) >= 3,
        "three steps",
    )
    os.killpg(agent.pid, signal.SIGINT)
    text, _ = agent.communicate(timeout=60)
    assert "the same command continues" in text
    assert steps(folder) == [max(losses(folder, "train"))]


# --- when something goes wrong, all stop ----------------------------------------------------------


def one_message(results: list[Result]) -> str:
    """All processes ended as after a user's mistake, and one of them said why."""
    assert [r.status for r in results] == [2] * len(results), [
        (r.status, r.err[-500:]) for r in results
    ]
    spoken = [r for r in results if "error: " in r.err]
    assert len(spoken) == 1
    return mistake(spoken[0])


def test_a_loss_that_is_no_number_stops_all(out, tiny, run_ranks):
    args = tiny(out, run="nan", eval_every=100)
    assert [r.status for r in run_ranks(2, [*args, "max_steps=2"])] == [0, 0]
    message = one_message(run_ranks(2, [*args, "optim.lr=1e30", "optim.clip=0", "save_every=100"]))
    assert "no update was made" in message and steps(out / "nan") == [2]


def test_mistakes_are_said_once(out, tiny, run_ranks):
    assert "data.path" in one_message(
        run_ranks(2, tiny(out, run="x", data__path="/no/such/file.txt"))
    )
    message = one_message(run_ranks(2, tiny(out, run="x", batch_tokens=32)))
    assert "model.block_size=32 x 2 data-parallel reader(s) = 64, for example 64" in message


@pytest.fixture
def by_hand(monkeypatch) -> dict[str, str]:
    """The variables of torchrun, set by hand."""
    env = {**group_variables(1), "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env


def test_a_port_in_use_is_one_sentence(by_hand):
    """Regression: it was a traceback of torch, a DistNetworkError."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(by_hand["MASTER_PORT"])))
        other.listen()
        with pytest.raises(UserError) as error, world.start("cpu"):
            pass
    where = f"127.0.0.1:{by_hand['MASTER_PORT']}"
    assert str(error.value).startswith(f"the processes cannot meet at {where} (address already")
    assert "MASTER_PORT" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "variables, sentence",
    [
        ({"RANK": "1", "MASTER_ADDR": "no-such-host.invalid"}, "Name or service not known"),
        ({"RANK": "1"}, "Connection refused"),  # nobody listens
        ({}, "process 1 of 2 did not answer within timeout=1 seconds; these did: process 0 on"),
    ],
)
def test_who_does_not_come_is_not_waited_for_longer_than_the_limit(
    by_hand, monkeypatch, variables, sentence
):
    """Regression: torch tried an address for 30 minutes that no name server knows."""
    for name, value in {"WORLD_SIZE": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(UserError) as error, world.start("cpu", timeout=1):
        pass
    assert time.monotonic() - began < 10
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["optim.lr=0.5", "eval_every=3"])
def test_machines_with_different_settings_are_told(out, tiny, start, change):
    """They would train something else, or one of them would wait for an evaluation for ever."""
    args = tiny(out, run="different")
    env = {**group_variables(2), "LOCAL_RANK": "0"}
    argv = args, [*args, change]
    processes = [start("train", a, env={**env, "RANK": str(r)}) for r, a in enumerate(argv)]
    results = [process.wait() for process in processes]
    message = one_message(results)
    key, _, value = change.partition("=")
    assert f"the processes were started differently: {key} is " in message
    assert f"{value} in process 1 on " in message


def main() -> None:
    """What each of two processes does: it may wait for the other one for two seconds only."""
    with world.start("cpu", timeout=2) as both:

        def work() -> str:
            assert both.main
            time.sleep(4)
            return "found"

        assert both.by_main(work) == "found"
        print("all know it", flush=True)

        def fail() -> None:
            raise UserError("what the main process reads is damaged")

        both.by_main(fail)


def test_the_others_wait_for_long_work_of_the_main_process(run_ranks):
    """Regression: a search of many minutes, such as the one for test texts in a corpus, ended the
    run: the others waited for it in a sum of their own, which has a time limit."""
    results = run_ranks(2, [], script="parallel.test_world")
    assert [result.out for result in results] == ["all know it\n"] * 2, results[0].err
    assert one_message(results).endswith("what the main process reads is damaged")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_named(by_hand, monkeypatch, name):
    """Regression: RANK=$SLURM_PROCID outside Slurm was a ValueError of int()."""
    for value in ("", "x", "-1"):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"{name}={value} is no number"), world.start("cpu"):
            pass


def test_nohup_keeps_a_run_going():
    """Regression: a run behind nohup stopped when its SSH session ended, for SIGHUP was taken."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with world.StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.signal
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with world.StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def end_of_group(processes) -> list[Result]:
    """As torchrun does: when one process has failed, end the others; their results."""
    wait_for(lambda: not all(p.alive() for p in processes), "one of them to fail", timeout=20)
    end = time.monotonic() + 3
    while time.monotonic() < end and any(p.alive() for p in processes):
        time.sleep(0.01)
    for p in processes:
        if p.alive():
            p.kill()
    return [p.wait() for p in processes]


def test_a_mistake_on_one_machine_only_is_said_too(out, tiny, start):
    """The corpus was not copied to the second machine: its processes used to end without a word."""
    env = {**group_variables(2), "LOCAL_RANK": "0"}
    good, bad = tiny(out, run="y"), tiny(out, run="y", data__path="/no/such/file.txt")
    processes = [start("train", a, env={**env, "RANK": str(r)}) for r, a in enumerate((good, bad))]
    results = end_of_group(processes)
    assert "/no/such/file.txt" in results[1].err and results[1].status == 2


@pytest.mark.parametrize("differs", ["out_dir", "data.path"])
def test_machines_that_see_different_files_are_told(out, tiny, run, start, chat_file, differs):
    """Each machine has a disk of its own: on resuming, the second one sees no checkpoint, or
    another corpus."""
    args = [*tiny(out, run="mine"), "max_steps=8"]
    if differs == "out_dir":
        assert run("train", [*args, "max_steps=4"]).status == 0
    other = out / "other.txt"
    other.parent.mkdir(exist_ok=True)
    other.write_text(chat_file.read_text(encoding="utf-8") + "\none more\nchat\n", encoding="utf-8")
    elsewhere = {"out_dir": out / "elsewhere", "data.path": other}[differs]
    env = {**group_variables(2), "LOCAL_RANK": "0"}
    argv = args, [*args, f"{differs}={elsewhere}"]
    processes = [start("train", a, env={**env, "RANK": str(r)}) for r, a in enumerate(argv)]
    message = one_message(end_of_group(processes))
    assert re.search(
        "the processes see different files: all machines must share .* and data.path", message
    )


def test_a_checkpoint_that_cannot_be_written_stops_all(out, tiny, start_ranks):
    """Only the main process fails to make the folder; the others must not wait in a collective for
    it."""
    (out / "full").mkdir()
    (out / "full" / ".step-00000004.tmp").write_text("in the way", encoding="utf-8")
    message = one_message(end_of_group(start_ranks(2, tiny(out, run="full"))))
    assert "could not save" in message and "step-00000004" in message


def test_a_full_disk_stops_all(out, tiny, start_ranks):
    results = end_of_group(start_ranks(2, tiny(out, run="fuller"), file_size=60_000))
    assert "could not save" in one_message(results)
    assert not list((out / "fuller").glob(".step*")) and steps(out / "fuller") == []
