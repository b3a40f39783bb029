"""kill -9 at random moments: does every restart go on, and is nothing lost that was saved?

    python bench/faults.py                                                train.py, DDP
    python bench/faults.py --script train_fsdp.py mesh.shard=2            and any settings

Two runs of two processes: one is left alone; of the other, `torchrun --max-restarts` restarts what
is killed. A moment is drawn evenly from 0 to --span seconds after the kill before, so it may fall
into the start, a step, an evaluation or a save; and so is the process. After each kill the run must
go on from a checkpoint at least as new as the newest whole one at that moment, and in the end both
runs must have the same losses and, bit for bit, the same weights. Linux only.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import ROOT, torchrun, write_chats  # noqa: E402
from bench.parity import last_step, losses  # noqa: E402

TOO_SHORT = "the run ended before the last kill: give it more --steps"
GOES_ON = re.compile(r"continuing from step (\d+)")
SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "compile": "false",
    "batch_tokens": 512,
    "log_every": 1,
    "prompts": "[]",
    "data.val_fraction": 0.1,
    "data.eval_blocks": 4,
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 64,
    "model.block_size": 64,
    "optim.warmup": 2,
}


def command(script: str, folder: Path, run: str, settings: list[str], restarts: int) -> list[str]:
    """The command of a run of two processes on this machine."""
    paths = [f"data.path={folder / 'chat.txt'}", f"data.cache={folder / 'tokens'}"]
    paths += [f"out_dir={folder}", f"run={run}"]
    small = [f"{key}={value}" for key, value in SETTINGS.items()]
    launcher = [*torchrun(2), f"--max-restarts={restarts}"]
    return [*launcher, str(ROOT / script), *small, *paths, *settings]


def newest_step(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 before the first."""
    whole = [path.parent.name for path in run.glob("step-*/meta.json")]
    return max((int(name.removeprefix("step-")) for name in whole), default=0)


def workers(agent: int) -> dict[int, int]:
    """Rank -> process id, of the training processes that torchrun's agent has started."""
    found = {}
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text(encoding="utf-8")
    for pid in map(int, children.split()):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        for entry in environment:
            if entry.startswith(b"RANK="):
                found[int(entry.removeprefix(b"RANK="))] = pid
    return found


class Restarted:
    """A run under torchrun whose processes are killed now and then."""

    def __init__(self, words: list[str], run: Path):
        self.run = run
        self.agent = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", env=ENV
        )
        self.lines: list[str] = []
        self.saved = 0  # newest whole checkpoint at the last kill
        self.problems: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Follow what is printed: each start says where it goes on."""
        for line in self.agent.stdout:
            self.lines.append(line)
            started = line.startswith("run ")
            found = GOES_ON.search(line)
            step = int(found[1]) if found else 0
            if started and step < self.saved:
                self.problems.append(f"step {self.saved} was saved, and it went on from {step}")

    def kill(self, draw: random.Random, span: float) -> dict | None:
        """Kill one process at a random moment; None if the run ended before."""
        moment = draw.uniform(0, span)
        end = time.monotonic() + moment
        while time.monotonic() < end or len(workers(self.agent.pid)) < 2:
            if self.agent.poll() is not None:
                return None
            time.sleep(0.002)
        rank, pid = draw.choice(sorted(workers(self.agent.pid).items()))
        self.saved = newest_step(self.run)
        os.kill(pid, signal.SIGKILL)
        return {"after_seconds": round(moment, 2), "rank": rank, "saved": self.saved}


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}


def kill_often(words: list[str], run: Path, kills: int, span: float, draw: random.Random) -> dict:
    """Start the run, kill a process so many times, and let it end."""
    restarted = Restarted(words, run)
    made = []
    for number in range(1, kills + 1):
        killed = restarted.kill(draw, span)
        if killed is None:
            restarted.problems.append(TOO_SHORT)
            break
        print(f"kill {number:>2}: {killed}", file=sys.stderr)
        made.append(killed)
    status = restarted.agent.wait()
    restarted.reader.join()
    if status:
        print("".join(restarted.lines[-40:]), file=sys.stderr)
        restarted.problems.append(f"torchrun ended with status {status}")
    return {"kills": made, "problems": restarted.problems}


def differences(a: Path, b: Path) -> list[str]:
    """What is not the same in the last checkpoints and the logs of two runs."""
    found = []
    if losses(a) != losses(b):
        found.append("the losses differ")
    ends = [last_step(run) for run in (a, b)]
    if ends[0].name != ends[1].name:
        return [*found, f"one ended at {ends[0].name}, the other at {ends[1].name}"]
    one, other = (load_file(end / "model.safetensors") for end in ends)
    changed = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    if changed:
        found.append(f"{len(changed)} of {len(one)} weights differ, for example {changed[0]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--span", type=float, default=20.0, help="seconds between two kills, at most"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--script", default="train.py")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("settings", nargs="*", help="more settings of the script, key=value")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    settings = [f"max_steps={args.steps}", "save_every=5", "eval_every=50", *args.settings]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_chats(folder / "chat.txt")
        whole = command(args.script, folder, "whole", settings, restarts=0)
        subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, env=ENV)
        words = command(args.script, folder, "killed", settings, restarts=args.kills)
        result = kill_often(
            words, folder / "killed", args.kills, args.span, random.Random(args.seed)
        )
        problems = result["problems"]
        if problems in ([], [TOO_SHORT]):
            problems += differences(folder / "whole", folder / "killed")
    print(f"{len(result['kills'])} kills: {'; '.join(problems) or 'nothing was lost'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
