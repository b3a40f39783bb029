"""A program whose lines are timed, and what they tell about where its time went.

The clock is the wall's, or the CPU time of the program and of all processes that it starts. A
stopwatch stands still while its program evaluates or saves: what is compared is training.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from smallgpt.console import UserError  # noqa: E402

TREE_REFRESH = 1.0  # seconds between two looks for new processes of a program
TIMED_STEPS = 5  # at least so many tell how long a step is
SKIPPED_STEPS = 2  # the first compiles, the second may do so again

ClockName = Literal["wall", "cpu"]


def usable_cores() -> list[int]:
    """The cores that this thread, and what it starts, may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


# ---- the clocks


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its ended children; 0.0 if it is gone. Linux only."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    fields = status.rpartition(")")[2].split()  # behind the name, which may hold spaces
    ticks = sum(map(int, fields[11:15]))  # user and system time, its own and its children's
    return ticks / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """The processes that any thread of a process has started and that still run. Linux only."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            text = file.read_text(encoding="utf-8")
        except OSError:
            continue  # the thread has ended
        found += map(int, text.split())
    return found


class WallClock:
    """Seconds since the program began."""

    def __init__(self, pid: int):
        self.began = time.perf_counter()

    def read(self) -> float:
        return time.perf_counter() - self.began


class CPUClock:
    """CPU seconds of a program: of its process and all that come from it."""

    def __init__(self, pid: int):
        self.pid = pid
        self.looked = float("-inf")
        self.processes: list[int] = []

    def read(self) -> float:
        now = time.perf_counter()
        if now - self.looked > TREE_REFRESH:
            self.looked = now
            self.processes = self.find_processes()
        return sum(map(cpu_seconds, self.processes))

    def find_processes(self) -> list[int]:
        found = [self.pid]
        for pid in found:  # which grows
            found += children(pid)
        return found


CLOCKS = {"wall": WallClock, "cpu": CPUClock}


# ---- a program


class Program:
    """A process whose standard output is read line by line.

    With what it starts it is a session of its own, so that nothing of it outlives `kill`. It runs
    on the cores of the thread that starts it, one thread of its own on each.
    """

    running: set["Program"] = set()

    def __init__(self, command: list[str], cwd: Path, log: Path, clock: ClockName):
        self.command = command
        self.log = log
        n_threads = len(usable_cores())
        # compiled code of an earlier run would hide what compiling costs
        self.compiled = log.with_suffix(".compiled")
        variables = {
            "OMP_NUM_THREADS": str(n_threads),
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.compiled),
        }
        shutil.rmtree(self.compiled, ignore_errors=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.output = open(log, "w", encoding="utf-8")
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.output,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self.clock = CLOCKS[clock](self.process.pid)
        Program.running.add(self)

    def lines(self) -> Iterator[tuple[float, str]]:
        """(clock, text) of each line when it comes. UserError if the program fails."""
        for line in self.process.stdout:
            seconds = self.clock.read()
            self.output.write(f"{seconds:.2f}\t{line}")
            self.output.flush()
            yield seconds, line.rstrip("\n")
        if self.process.wait():
            what = " ".join(self.command[1:])
            raise UserError(f"{what} failed: {self.log} has its messages")

    def kill(self) -> None:
        """End it, and all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended by itself
        self.process.wait()
        self.output.close()
        shutil.rmtree(self.compiled, ignore_errors=True)
        Program.running.discard(self)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def kill_all() -> None:
    """End every program that still runs."""
    for program in list(Program.running):
        program.kill()


# ---- what the lines tell


@dataclass(frozen=True)
class Phrases:
    """The lines of a program that mark its time, as regular expressions."""

    ready: str  # the first step comes next
    step: str  # one more step was made
    judged: str  # an evaluation is over: (steps made, bits per byte or nothing)
    saving: str = ""  # it begins to save, and makes a step before the next line


class Point(NamedTuple):
    """A point of a learning curve."""

    step: int
    seconds: float
    bits_per_byte: float


@dataclass(frozen=True)
class Timing:
    """How long a run takes, in seconds."""

    start: float  # until the first step could begin: imports, opening the text, the model
    warm_up: float  # by which the first steps are longer than the others: compilation
    step: float  # one of the others

    def steps_within(self, seconds: float) -> int:
        """How many steps fit into so many seconds; 0 if the start does not."""
        rest = seconds - self.start - self.warm_up
        return max(0, round(rest / self.step))


class Stopwatch:
    """Where the time of a program went, from its lines and the clock at each."""

    def __init__(self, phrases: Phrases):
        self.phrases = phrases
        self.ready = 0.0  # seconds until the first step could begin
        self.steps: list[
            float
        ] = []  # seconds of training at the end of each step, `ready` included
        self.points: list[Point] = []
        self.paused = 0.0  # seconds of evaluating and saving, which do not count
        self.last_mark = 0.0  # on the program's clock, as the next one is
        self.save_began: float | None = None

    def hear(self, clock: float, line: str) -> None:
        """Take note of a line that came at this time."""
        judged = re.match(self.phrases.judged, line)
        if judged:
            self.paused += clock - self.last_mark
            self.last_mark = clock
            self.note_value(*judged.groups())
        elif re.match(self.phrases.step, line):
            self.end_save(clock)
            self.last_mark = clock
            self.steps.append(clock - self.paused)
        elif re.match(self.phrases.ready, line):
            self.ready = self.last_mark = clock
        elif self.phrases.saving and re.match(self.phrases.saving, line):
            self.save_began = clock

    def note_value(self, step: str, bits_per_byte: str | None = None) -> None:
        """A value that the program prints itself."""
        if bits_per_byte:
            point = Point(int(step), self.steps[-1], float(bits_per_byte))
            self.points.append(point)

    def end_save(self, clock: float) -> None:
        """No line ends a save: what is longer than a step, from its beginning to the next step's
        end, was the save."""
        if self.save_began is not None:
            saving = clock - self.save_began - self.step_seconds
            self.paused += max(0.0, saving)
            self.save_began = None

    @property
    def timed_steps(self) -> int:
        """Steps that tell how long a step is."""
        return max(0, len(self.steps) - SKIPPED_STEPS)

    @property
    def step_seconds(self) -> float:
        """A step's mean time, without the first ones; 0.0 before there are others."""
        if not self.timed_steps:
            return 0.0
        return (self.steps[-1] - self.steps[SKIPPED_STEPS - 1]) / self.timed_steps

    def is_steady(self, seconds: float) -> bool:
        """Have so many seconds of steps passed that the length of a step is known?"""
        return self.timed_steps >= TIMED_STEPS and self.timed_steps * self.step_seconds >= seconds

    def timing(self) -> "Timing":
        """What the steps so far tell about a run of any length."""
        first = self.steps[SKIPPED_STEPS - 1] - self.ready
        warm_up = max(0.0, first - SKIPPED_STEPS * self.step_seconds)
        return Timing(self.ready, warm_up, self.step_seconds)
