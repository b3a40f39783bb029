"""torchrun --nnodes=1:2: a run goes on with one machine less, and with one more.

The machines are two of torchrun's agents, with a process each."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.faults import newest_step, workers
from helpers import ENV, ROOT, free_port, losses, wait_for

# A lost machine is given up after four seconds without a sign of life. Whoever is there waits two
# seconds for others.
CONDITIONS = "keep_alive_interval=1,keep_alive_max_attempt=4,last_call_timeout=2"


FEW = {"dtype": "float64", "max_steps": 200, "save_every": 3, "eval_every": 100, "prompts": "[]"}


class Machines:
    """The agents of a run, and what they and their processes print."""

    def __init__(self, folder: Path, argv: list[str]):
        self.slow = folder / "slow"  # steps take their time while it is there
        self.slow.touch()
        self.output = folder / "output.txt"
        self.argv = argv
        self.port = free_port()
        self.agents: list[subprocess.Popen] = []

    def start(self) -> subprocess.Popen:
        """One more agent; the first one has the store in which they meet."""
        is_host = int(not self.agents)
        words = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
        words += [f"--rdzv-endpoint=127.0.0.1:{self.port}", "--rdzv-id=elastic"]
        words.append(f"--rdzv-conf={CONDITIONS},is_host={is_host}")
        script = str(ROOT / "tests" / "patient.py")
        env = {**ENV, "SLOW": str(self.slow), "PYTHONUNBUFFERED": "1"}
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with open(self.output, "a", encoding="utf-8") as output:
            agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words, script, *self.argv],
                env=env,
                stdout=output,
                stderr=output,
            )
        self.agents.append(agent)
        return agent

    def starts(self, size: int) -> int:
        """How often the run has started with so many processes."""
        return self.output.read_text(encoding="utf-8").count(f"= {size} process(es) x")

    def wait_for_start(self, size: int, run: Path) -> None:
        """Until the run has started with so many processes once more, and saved a step."""
        before = self.starts(size)
        wait_for(lambda: self.starts(size) > before, f"a start with {size} process(es)", 120)
        saved = newest_step(run)
        wait_for(lambda: newest_step(run) > saved, "a checkpoint", 120)


@pytest.fixture
def machines(tmp_path, tiny):
    """None yet; their run will have 200 steps."""
    found = Machines(tmp_path, tiny(tmp_path, run="elastic", **FEW))
    yield found
    for agent in found.agents:
        kill(agent)


def kill(agent: subprocess.Popen) -> None:
    """The machine is gone: its agent, and the process that it has started."""
    if agent.poll() is None:
        processes = workers(agent.pid).values()
        for pid in [agent.pid, *processes]:
            os.kill(pid, signal.SIGKILL)
    agent.wait()


@pytest.mark.slow
def test_a_machine_less_and_a_machine_more(machines, tmp_path, tiny, run):
    """Nothing that was saved is lost, and the losses are those of a run that nobody touched."""
    folder = tmp_path / "elastic"
    stays = machines.start()
    leaves = machines.start()
    machines.wait_for_start(2, folder)
    kill(leaves)
    saved = newest_step(folder)
    machines.wait_for_start(1, folder)
    returns = machines.start()
    machines.wait_for_start(2, folder)
    machines.slow.unlink()
    statuses = [stays.wait(120), returns.wait(120)]
    text = machines.output.read_text(encoding="utf-8")
    assert statuses == [0, 0], text
    assert f"continuing from step {saved} of 200" in text
    assert run("train", tiny(tmp_path, run="whole", **FEW)).status == 0
    for split in ("train", "val"):
        truth = losses(tmp_path / "whole", split)
        assert losses(folder, split) == pytest.approx(truth, rel=1e-9, abs=0)
