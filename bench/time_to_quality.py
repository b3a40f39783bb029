"""How much each codebase learns from the same text, on the same machine, in the same time.

    python bench/time_to_quality.py config/chat_zh.yaml 'data.path=FOLDER/*' --nanogpt PATH

Every contender is trained for --minutes, start, compilation and tokenising included, and judged in
bits per byte on the same held-out dialogues. What it spends on evaluating and saving does not
count. They take turns with all cores, or with --side-by-side have one core each.

    ours                 train.py with the settings as given
    gpt2                 train.py with GPT-2's form and AdamW, the same shape
    hf                   Hugging Face's GPT-2, with the tokens, batches and AdamW of gpt2
    nanogpt-char         nanoGPT's train.py and its settings for characters, the same shape
    nanogpt-char-readme  the same with the shape that its README names for a CPU
    nanogpt-bpe          nanogpt-char, but with our tokens

--ablate 'NAME: key=value ...' adds ours with these settings, as often as it is given.

How many steps fit is found beforehand, by timing a few; every schedule ends at that step. So a run
ends somewhat before or after the budget, which the table tells, and what it knew at the budget is
interpolated. Everything is kept in --out: the same command again goes on with what is missing.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench.common import cpu_name, parser  # noqa: E402
from bench.contenders import (  # noqa: E402
    FOREVER,
    NANOGPTS,
    OURS,
    Contender,
    SmallGPT,
    Task,
    make_contender,
)
from bench.quality_report import Report, Trained  # noqa: E402
from bench.stopwatch import (  # noqa: E402
    ClockName,
    Program,
    Stopwatch,
    Timing,
    kill_all,
    usable_cores,
)
from smallgpt import console, files, hardware, settings  # noqa: E402
from smallgpt.console import UserError  # noqa: E402
from train import TrainSettings  # noqa: E402

LONGEST_TIMING = 20.0  # seconds of steps from which the length of a step is taken
FAR = 5.0  # percent from the budget
DEFAULTS = settings.flat(TrainSettings())
FEWEST_STEPS = 10  # a run of fewer tells nothing


# ---- what is kept


class Results:
    """results.json: written after each run, so that an interrupted comparison goes on."""

    def __init__(self, file: Path, conditions: dict[str, Any]):
        """UserError where the file holds a comparison under other conditions."""
        self.file = file
        self.lock = threading.Lock()
        self.content = files.read_json(self.file)
        if self.content is None:
            self.content = {
                "benchmark": "time_to_quality",
                "conditions": conditions,
                "preparations": {},  # name -> seconds
                "held_out_bytes": 0,
                "contenders": {},
            }
        before = self.content["conditions"]
        for name, value in conditions.items():
            if before.get(name) != value:
                raise UserError(
                    f"{file} holds a comparison with {name}={before.get(name)}, and now it is "
                    f"{value}: give another --out, or delete its folder"
                )

    def write(self) -> None:
        text = json.dumps(self.content, indent=1, ensure_ascii=False)
        files.write_atomic(self.file, text + "\n")

    def of(self, contender: Contender) -> dict[str, Any]:
        """What is known of a contender. UserError where it was another one under this name.

        A setting that the version which trained it did not have had its default."""
        definition = json.loads(json.dumps(contender.definition()))
        entry = {"definition": definition, "timing": None, "runs": {}}
        known = self.content["contenders"].setdefault(contender.name, entry)
        changed = []
        for name in {**known["definition"], **definition}:
            before = known["definition"].get(name, DEFAULTS.get(name))
            if before != definition.get(name):
                changed.append(name)
        if not changed:
            return known
        raise UserError(
            f"{self.file} holds runs of {contender.name} with other settings "
            f"({', '.join(changed)}): give it another name, or another --out"
        )

    def prepared(self, task: Task) -> bool:
        return task.name in self.content["preparations"]

    def note_preparation(self, task: Task, seconds: float, held_out: int) -> None:
        """UserError where other text was held out than before."""
        with self.lock:
            before = self.content["held_out_bytes"] or held_out
            if before != held_out:
                raise UserError(
                    f"{task.name} holds out {held_out:,} bytes and others {before:,}: bits per "
                    "byte cannot be compared (does tokenizer.lowercase change the text?)"
                )
            self.content["held_out_bytes"] = held_out
            self.content["preparations"][task.name] = seconds
            self.write()

    def note_timing(self, contender: Contender, timing: Timing) -> None:
        with self.lock:
            self.of(contender)["timing"] = asdict(timing)
            self.write()

    def note_run(self, contender: Contender, seed: int, trained: Trained) -> None:
        """Its timing is better than the one before, which was of few steps."""
        with self.lock:
            known = self.of(contender)
            known["runs"][str(seed)] = asdict(trained)
            known["timing"] = asdict(trained.timing)
            self.write()

    def preparation_seconds(self, contender: Contender) -> float:
        """What its text cost before the run, as if it alone had needed it."""
        seconds = self.content["preparations"]
        return sum(seconds[task.name] for task in contender.tasks())

    def runs(self, contender: Contender) -> dict[int, Trained]:
        """By seed, in order."""
        records = self.of(contender)["runs"]
        seeds = sorted(map(int, records))
        return {seed: Trained.read(records[str(seed)]) for seed in seeds}


# ---- running


class Slots:
    """Parts of the machine that a job has to itself: a core each, or all of them at once."""

    def __init__(self, side_by_side: bool):
        cores = usable_cores()
        self.parts = [[core] for core in cores] if side_by_side else [cores]

    def run(self, jobs: list[Callable[[], None]]) -> None:
        """Run the jobs in their order, as many at a time as there are parts. The first error ends
        all of them."""
        parts = iter(self.parts)

        def bind() -> None:
            """This thread, and so every process that it starts, to a part of its own."""
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, next(parts))

        with ThreadPoolExecutor(len(self.parts), initializer=bind) as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(future.done() for future in futures):
                    kill_all()  # a job may just be starting its next program
                    time.sleep(0.05)
                raise


@dataclass
class Comparison:
    """The contenders, under the same conditions."""

    contenders: list[Contender]
    seeds: list[int]
    budget: float  # seconds of every run
    steps: int  # of every run; 0 = as many as fit into the budget
    clock: ClockName
    out: Path
    results: Results
    slots: Slots

    def run(self) -> None:
        """Make what is missing: preparations one by one, then timings, then runs, seed by seed."""
        for contender in self.contenders:
            for task in contender.tasks():
                if not self.results.prepared(task):
                    self.slots.run([partial(self.prepare, task)])
        timings = []
        for contender in self.contenders:
            is_known = self.results.of(contender)["timing"] is not None
            if not is_known and not self.steps:
                timings.append(partial(self.time, contender))
        self.slots.run(timings)
        trainings = []
        for seed in self.seeds:
            for contender in self.contenders:
                if seed not in self.results.runs(contender):
                    trainings.append(partial(self.train, contender, seed))
        self.slots.run(trainings)

    def report(self) -> Report:
        """Of the runs that were asked for."""
        runs = {}
        preparations = {}
        for contender in self.contenders:
            found = self.results.runs(contender)
            runs[contender.name] = {seed: found[seed] for seed in self.seeds}
            preparations[contender.name] = self.results.preparation_seconds(contender)
        content = self.results.content
        return Report(
            runs, preparations, self.budget, content["conditions"], content["held_out_bytes"]
        )

    def prepare(self, task: Task) -> None:
        """Make text or tokens, timed."""
        say(f"preparing {task.name}")
        seconds = 0.0
        held_out = 0
        log = self.out / "logs" / f"{task.name}.log"
        with Program(task.command, Path.cwd(), log, self.clock) as program:
            for clock, line in program.lines():
                if line == "prepared":
                    seconds = clock
                found = re.match(r"held out: (\d+) bytes", line)
                if found:
                    held_out = int(found[1])
        self.results.note_preparation(task, seconds, held_out)
        say(f"prepared {task.name} in {seconds:.1f} s")

    def time(self, contender: Contender) -> None:
        """Begin a run without an end, and end it when its speed is known."""
        wanted = min(LONGEST_TIMING, self.budget / 10)
        name = f"{contender.name}-timing"
        say(f"timing {contender.name}")
        watch = self.watch(contender, name, seed=0, steps=FOREVER, until=wanted)
        timing = watch.timing()
        self.results.note_timing(contender, timing)
        shutil.rmtree(self.folder(name))
        say(
            f"timed {contender.name}: {timing.start + timing.warm_up:.1f} s to start, "
            f"{timing.step * 1000:.1f} ms a step"
        )

    def train(self, contender: Contender, seed: int) -> None:
        """One run, as long as the budget."""
        name = f"{contender.name}-{seed}"
        preparation = self.results.preparation_seconds(contender)
        steps = contender.fitting(self.steps) or self.steps_within_budget(contender, preparation)
        say(f"{contender.name}, seed {seed}: {steps} steps")
        watch = self.watch(contender, name, seed, steps)
        curve = []
        for point in contender.curve(self.folder(name), watch):
            curve.append([preparation + point.seconds, point.bits_per_byte])
        trained = Trained(watch.timing(), steps, watch.paused, curve)
        self.results.note_run(contender, seed, trained)
        shutil.rmtree(self.folder(name))
        say(
            f"{contender.name}, seed {seed}: {trained.last:.4f} bits per byte "
            f"after {trained.end:.0f} s{self.deviation(trained)}"
        )

    def deviation(self, trained: Trained) -> str:
        """How far the end is from the budget, in words, if it is far."""
        if self.steps:
            return ""
        percent = 100 * (trained.end / self.budget - 1)
        return f" ({percent:+.0f} % of the budget)" if abs(percent) >= FAR else ""

    def steps_within_budget(self, contender: Contender, preparation: float) -> int:
        """UserError if there are next to none."""
        timing = Timing(**self.results.of(contender)["timing"])
        steps = contender.fitting(timing.steps_within(self.budget - preparation))
        if steps >= FEWEST_STEPS:
            return steps
        raise UserError(
            f"{contender.name} can make {steps} steps of {timing.step:.2f} s in {self.budget:.0f} "
            f"s, of which {preparation + timing.start + timing.warm_up:.0f} s are tokenising, "
            "start and compilation: raise --minutes"
        )

    def watch(
        self, contender: Contender, name: str, seed: int, steps: int, until: float = 0.0
    ) -> Stopwatch:
        """Run a contender with the stopwatch in hand, to its end or until so many seconds of steps
        are timed."""
        folder = self.folder(name)
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
        folder.mkdir(parents=True)
        launch = contender.launch(folder, seed, steps)
        watch = Stopwatch(contender.phrases)
        log = self.out / "logs" / f"{name}.log"
        with Program(launch.command, launch.cwd, log, self.clock) as program:
            for clock, line in program.lines():
                n_points = len(watch.points)
                watch.hear(clock, line)
                contender.hear(folder, line)
                if len(watch.points) > n_points:
                    point = watch.points[-1]
                    say(f"{name}: {point.bits_per_byte:.4f} after {point.seconds:.0f} s")
                if until and watch.is_steady(until):
                    break
        return watch

    def folder(self, name: str) -> Path:
        """Of a run, as long as it lasts."""
        return self.out / "runs" / name


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# ---- the command


def arguments() -> argparse.ArgumentParser:
    p = parser(__doc__)
    p.add_argument("config", help="settings of train.py")
    p.add_argument("changes", nargs="*", metavar="key=value")
    names = [*OURS, *NANOGPTS]
    p.add_argument("--contenders", nargs="*", choices=names, help="default: all that can run")
    p.add_argument("--ablate", action="append", default=[], metavar="'NAME: key=value ...'")
    p.add_argument("--nanogpt", type=Path, metavar="PATH", help="a checkout of nanoGPT")
    p.add_argument("--minutes", type=float, default=10.0, help="budget of each run")
    p.add_argument("--steps", type=int, default=0, help="of each run, instead of --minutes")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--side-by-side", action="store_true", help="one core each")
    p.add_argument("--out", type=Path, default=Path("checkpoints/time_to_quality"))
    return p


def make_contenders(args: argparse.Namespace, out: Path) -> list[Contender]:
    """Those that the command names. UserError where one of them cannot be."""
    names = args.contenders
    if names is None:
        names = list(OURS)
        if not find_spec("transformers"):
            names.remove("hf")
            say("transformers is not installed: without hf")
        if args.nanogpt:
            names += NANOGPTS
    words = [args.config, *args.changes, f"device={args.device}"]
    s = settings.load(TrainSettings, words)
    nanogpt = args.nanogpt and args.nanogpt.resolve()
    contenders = [make_contender(name, s, out, nanogpt) for name in names]
    for text in args.ablate:
        name, colon, changes = text.partition(":")
        if not colon or not re.fullmatch(r"[\w.-]+", name) or name in (*OURS, *NANOGPTS):
            raise UserError(
                f"--ablate {text!r}: write 'NAME: key=value ...' with a name of its own, of "
                "letters, digits, dots and dashes"
            )
        changed = settings.load(TrainSettings, [*words, *shlex.split(changes)])
        contenders.append(SmallGPT(name, changed, out))
    return contenders


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for two runs to be compared."""
    is_cuda = args.device == "cuda"
    return {
        "minutes": 0.0 if args.steps else args.minutes,
        "steps": args.steps,
        "clock": args.clock,
        "side by side": args.side_by_side,
        "device": torch.cuda.get_device_name() if is_cuda else "CPU",
        "machine": cpu_name(),
        "cores": len(usable_cores()),
        "torch": torch.__version__,
    }


def check(args: argparse.Namespace) -> None:
    """UserError where options do not fit the machine."""
    if args.clock == "cpu" and not Path("/proc/self/task").is_dir():
        raise UserError("--clock cpu reads /proc, which this system lacks: use --clock wall")
    if args.device == "cuda":
        hardware.choose_device("cuda")
        if args.side_by_side:
            raise UserError("--side-by-side gives each a core: leave it out with --device cuda")


def main(words: list[str] | None = None) -> None:
    args = arguments().parse_intermixed_args(words)
    check(args)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / "results.json", conditions(args))
    comparison = Comparison(
        contenders=make_contenders(args, out),
        seeds=args.seeds,
        budget=math.inf if args.steps else args.minutes * 60,
        steps=args.steps,
        clock=args.clock,
        out=out,
        results=results,
        slots=Slots(args.side_by_side),
    )
    try:
        comparison.run()
    finally:
        kill_all()
    report = comparison.report()
    print(f"\n{report.describe()}\n\n{report.table()}\n")
    report.draw(out / "curves.png")
    print(f"{out / 'results.json'}, {out / 'curves.png'}")


if __name__ == "__main__":
    console.run(main)
