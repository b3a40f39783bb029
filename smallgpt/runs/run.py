"""A run: one folder from its lock to its last line, for both training loops.

The loop calls the run, the run never calls the loop:

    with Run(s, world) as run:
        run.identify(facts)                   # data, tokenizer, shape: is it the same run?
        ...                                   # model, strategy, optimizers
        run.resume(strategy, optimizers)      # the optimizers' state; the weights are there
        run.begin(max_steps, {...})           # config.yaml; what is about to happen
        for step in run.steps(max_steps, save_every):
            if run.due(eval_every):
                run.evaluated(...)            # logs it; saves and names the best
            if step >= max_steps:
                break
            ...                               # one update
            run.log(...)
        return run.status
"""

import math
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from filelock import FileLock, Timeout

from model import GPTConfig
from smallgpt import settings
from smallgpt.adam import Optimizer
from smallgpt.console import UserError
from smallgpt.parallel.strategy import Single
from smallgpt.parallel.world import StopRequest, World
from smallgpt.runs import checkpoint, metrics
from smallgpt.runs.checkpoint import Checkpoint
from smallgpt.runs.tracker import Tracker, TrackerKind
from smallgpt.tokenizer import Tokenizer

RESTART_WAIT = 60  # seconds that a restart waits for what it replaces to end


class RunSettings(Protocol):
    """What a run needs of a script's settings."""

    run: str
    out_dir: str
    resume: str
    save: Literal["sync", "async"]
    log_every: int
    tracker: TrackerKind
    keep: int


@dataclass
class Facts:
    """What a checkpoint records besides the settings, so that it can be used without them."""

    model: GPTConfig
    tokenizer: Tokenizer
    data: str  # fingerprint of what is trained on
    sources: list[dict]  # where it came from, with hashes; also what the trunk was trained on
    identity: dict[str, Any] = field(default_factory=dict)  # more that may not change, as the head
    tokens_per_step: int = 0  # of pretraining
    init_from: str = ""  # run whose weights a pretraining began with


class Run:
    """The folder out_dir/run: its lock, checkpoints, log and end.

    `step` is the number of updates made so far, `history` the result of each evaluation by step.
    `select` names the measure that chooses the best checkpoint; ties go to the lower loss.
    """

    def __init__(self, s: RunSettings, world: World, select: str = "loss"):
        self.s = s
        self.world = world
        self.select = select
        self.folder = Path(s.out_dir) / s.run
        self.stack = ExitStack()
        self.found: Checkpoint | None = None  # where it continues
        self.step = 0
        self.saved = 0  # the last step of which this run has a checkpoint
        self.history: dict[int, dict] = {}
        self.saver = checkpoint.Saver(self.folder, world, s.keep, in_background=s.save == "async")
        self.stop_signal = 0  # that ended the run early
        self.full_speed = 0.0  # tokens per second at the hardware's peak; 0 = unknown

    def __enter__(self) -> "Run":
        self.stack.enter_context(lock(self.folder, self.world.main))
        try:
            if self.world.main:
                checkpoint.put_back(self.folder)
            self.world.sum(0)  # what this one replaces has written its last checkpoint
            self.look_up()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """The lock is held until no thread writes."""
        try:
            if kind is None:
                self.saver.finish()
            else:
                problem = self.saver.close()
                if problem:
                    self.say(problem)
        finally:
            self.stack.close()

    def look_up(self) -> None:
        """Find the checkpoint to continue from, and what was evaluated up to there."""
        self.found = starting_point(self.folder, self.s.resume, self.say)
        if self.found:
            self.step = self.found.step
            self.saved = self.step if self.found.run.resolve() == self.folder.resolve() else 0
        records = metrics.read(self.folder, "val")
        self.history = {r["step"]: r for r in records if r["step"] <= self.step}
        self.began = time.time()
        if self.found:  # seconds of earlier sittings count, too
            self.began -= self.found.meta.get("seconds", 0.0)

    def say(self, text: str) -> None:
        """A line for people, from the main process; above the progress bar where there is one."""
        if self.world.main:
            metrics.say(text)

    # --- beginning --------------------------------------------------------------------------------

    def identify(self, facts: Facts) -> None:
        """Take note of what is trained on what. UserError if the checkpoint to continue from is of
        another optimisation, or if the machines read different files."""
        self.facts = facts
        # the first that differs is named, so what says most comes first
        self.identity = {
            "tokenizer": facts.tokenizer.hash,
            **settings.identity(self.s),
            **facts.identity,
            "data": facts.data,
            **{f"model.{name}": value for name, value in asdict(facts.model).items()},
        }
        number = int(facts.data[:8], 16)
        files = f"{self.s.out_dir} and data.path"
        self.world.must_agree(files, self.step, len(self.history), number)
        if self.found:
            check_same(self.found, self.identity, settings.identity(type(self.s)()))

    def resume(self, strategy: Single, optimizers: list[Optimizer]) -> None:
        """Put the state of the checkpoint to continue from, if there is one, into the optimizers.
        The model was built with its weights."""
        self.strategy = strategy
        self.optimizers = optimizers
        if self.found:
            checkpoint.load_optimizers(self.found, strategy, optimizers)
            if self.found.meta["scaler"]:  # empty where that run needed none
                strategy.scaler.load_state_dict(self.found.meta["scaler"])
        self.forget_lost()

    def begin(self, max_steps: int, lines: dict[str, str]) -> None:
        """Write config.yaml and tokenizer.json, and say what is about to happen, a line each:
        {"model": "5.1M parameters", ...}.

        The settings of a finished run stay what they were: these trained nothing."""
        finished = self.step >= max_steps
        plan = f"{max_steps} steps"
        if self.step:
            plan = f"continuing from step {self.step} of {max_steps}"
        if finished:
            plan += ", finished: nothing is left to train"
        if self.world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.facts.tokenizer.save(self.folder / "tokenizer.json")
            if not finished or not (self.folder / "config.yaml").exists():
                settings.write(self.s, self.folder / "config.yaml")
        for name, text in {"run": f"{self.folder}: {plan}", **lines}.items():
            self.say(f"{name:<8} {text}")

    # --- the loop ---------------------------------------------------------------------------------

    def steps(self, max_steps: int, save_every: int) -> Iterator[int]:
        """The numbers of the updates to make, and max_steps, at which there is none left to make.

        Checkpoints are saved between them. After SIGTERM, SIGINT or SIGHUP to any rank all save
        and stop here, together; then `status` is not 0."""
        self.max_steps = max_steps
        tracker = None
        if self.s.tracker != "none" and self.world.main and self.step < max_steps:
            tracker = Tracker(self.s.tracker, self.folder, settings.flat(self.s))
        self.metrics = metrics.Metrics(self.folder, self.world, self.step, max_steps, tracker)
        self.stack.callback(self.metrics.close)
        self.restart_clock()
        with self.metrics.bar_shown(), StopRequest() as stop:
            while True:
                last = self.step >= max_steps
                if last or (self.step and self.step % save_every == 0):
                    self.save()  # before evaluating: whatever happens there, nothing is lost
                if last:
                    self.saver.finish()
                elif self.poll(stop):
                    self.stop_signal = stop.signal or signal.SIGTERM
                    self.save()
                    self.saver.finish()
                    self.say(
                        f"stopped by a signal after step {self.step}, saved in {self.folder}; "
                        "the same command continues"
                    )
                    return
                yield self.step
                if last:
                    return
                self.step += 1

    def poll(self, stop: StopRequest) -> bool:
        """Was any rank asked to stop? The same sum brings what is being saved to its end. A
        collective."""
        asked, writing, failed = self.world.sum(stop.signal > 0, *self.saver.progress())
        self.saver.settle(writing, failed)
        return asked > 0

    @property
    def status(self) -> int:
        """The exit status: 0, or 128 + the signal that stopped the run."""
        return 128 + self.stop_signal if self.stop_signal else 0

    def due(self, every: int) -> bool:
        """Is this step, the last one always, to be evaluated?"""
        if not self.step or self.step in self.history:
            return False
        return self.step % every == 0 or self.step >= self.max_steps

    def evaluated(self, result: dict[str, Any]) -> None:
        """Log the result of a validation; the best checkpoint so far is saved and named `best`.

        result: at least "loss" and what `select` names. UserError if the loss is no number."""
        self.check_loss(result["loss"])
        if not self.history or self.quality(result) > self.quality(self.history[self.best]):
            self.save()
            self.saver.name_best(self.step)
        self.metrics.log({"step": self.step, "split": "val", **result})
        self.history[self.step] = result
        self.restart_clock()

    def quality(self, result: dict[str, Any]) -> tuple[float, float]:
        """What is compared between evaluations: the higher the better."""
        measure = -result["loss"] if self.select == "loss" else result[self.select]
        return measure, -result["loss"]

    @property
    def best(self) -> int:
        """The step of the best evaluation, of equally good ones the first; 0 before any."""
        return max(self.history, key=lambda k: (self.quality(self.history[k]), -k), default=0)

    @property
    def best_loss(self) -> float:
        """The validation loss of the best evaluation."""
        return self.history[self.best]["loss"]

    def out_of_patience(self, patience: int) -> bool:
        """Were there so many evaluations since the best one? 0 = patience has no end."""
        if not patience:
            return False
        best = self.best
        since = sum(step > best for step in self.history)
        if since < patience:
            return False
        self.say(
            f"no better validation {self.select} in {patience} evaluations: "
            f"stopping after step {self.step}"
        )
        return True

    def log(self, count: int, unit: Literal["tokens", "examples"], **record: float) -> None:
        """One update was made, of `count` tokens or examples: every log_every-th is recorded."""
        self.metrics.step(record["loss"], count, unit)
        self.fresh += count
        done = self.step + 1
        if done % self.s.log_every and done != self.max_steps:
            return
        speed = self.fresh / (time.perf_counter() - self.clock)
        record = {"step": done, "split": "train", **record, f"{unit}_per_second": speed}
        if self.full_speed:
            record["mfu"] = speed / self.full_speed
        self.metrics.log(record)
        self.restart_clock()

    def text(self, tag: str, text: str) -> None:
        """A piece of text for the console and TensorBoard, such as sample replies."""
        self.metrics.text(tag, text, self.step)
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was not training does not count in the speed."""
        self.fresh = 0
        self.clock = time.perf_counter()

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step, or begin to, unless this run has it. A collective."""
        if self.saved == self.step:
            return
        meta = {
            "step": self.step,
            "seconds": self.seconds,
            "settings": self.identity,
            "model": asdict(self.facts.model),
            "tokenizer": self.facts.tokenizer.hash,
            "data": self.facts.data,
            "sources": self.facts.sources,
            **self.facts.identity,
            "tokens": self.step * self.facts.tokens_per_step,
            "init_from": self.facts.init_from,
            "scaler": self.strategy.scaler.state_dict(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        self.saver.save(self.strategy, self.optimizers, meta)
        self.saved = self.step
        self.restart_clock()

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, its earlier sittings included."""
        return time.time() - self.began

    def load_best(self) -> None:
        """Put the weights of the best evaluation into the model."""
        self.saver.finish()
        folder = checkpoint.step_folder(self.folder, self.best)  # a rank may see an older `best`
        found = checkpoint.required(folder)
        self.strategy.set_weights(checkpoint.read_weights(found, self.strategy.shapes))

    def check_loss(self, loss: float) -> None:
        """UserError if the validation loss is no number: no run can go on from this step."""
        if math.isfinite(loss):
            return
        folders = checkpoint.step_folders(self.folder)
        older = [p for p in folders if p.name < checkpoint.step_folder(self.folder, self.step).name]
        again = "start again with another run=name"
        if older:
            again = f"go on in another run=name with resume={older[-1]}"
        raise UserError(
            f"the validation loss is {loss} at step {self.step}: lower optim.lr, and {again}"
        )

    def forget_lost(self) -> None:
        """Make `best` a checkpoint that is there, after a damaged one was passed over: evaluations
        whose step folder is not whole are dropped, best first, until one remains that has it."""
        while self.history:
            folder = checkpoint.step_folder(self.folder, self.best)
            if not checkpoint.why_damaged(folder):
                break
            del self.history[self.best]
        self.world.must_agree(self.s.out_dir, len(self.history), self.best)
        if not self.world.main:
            return
        if self.history:
            checkpoint.point(self.folder, "best", self.best)
        else:
            (self.folder / "best").unlink(missing_ok=True)


def starting_point(run: Path, resume: str, say) -> Checkpoint | None:
    """The checkpoint to continue from, as `resume` asks: this run's own, or else the one it is to
    begin from."""
    folders = checkpoint.step_folders(run)
    if resume == "never":
        if folders:
            raise UserError(
                f"{run} already holds checkpoints: choose another run=name, or delete the folder"
            )
        return None
    if resume == "auto":
        return checkpoint.find(run, say)
    latest = checkpoint.read_pointer(run, "latest")
    older = [folder.resolve() for folder in folders if folder != latest]
    if Path(resume).resolve() in older:
        raise UserError(
            f"{run} has gone on from {resume}: to go back to it, choose another run=name as well"
        )
    found = checkpoint.find(run if folders else Path(resume), say)
    if found is None:
        raise UserError(f"resume={resume}: there is no checkpoint in that folder")
    return found


def check_same(found: Checkpoint, now: dict[str, Any], defaults: dict[str, Any]) -> None:
    """A resumed run must be the same optimisation; the first difference is named.

    now, defaults: identities. A setting that the version which wrote the checkpoint did not have
    had its default."""
    then = found.meta.get("settings")
    if then is None:
        raise UserError(
            f"{found.path} was written by an older version, which recorded less: it can be used, "
            f"but not continued; begin another run=name with init_from={found.path}"
        )
    what = {
        "data": "the corpus (or its split) has changed: its fingerprint",
        "tokenizer": "the tokenizer's hash",
    }
    for key, value in now.items():
        before = then.get(key, defaults.get(key, value))
        if before != value:
            raise UserError(
                f"cannot continue from {found.path}: {what.get(key, key)} was {before} and is now "
                f"{value}; put it back, or start afresh with another run=name"
            )


def merge_sources(own: list[dict], inherited: list[dict]) -> list[dict]:
    """Both, each once: a corpus that has moved is the same if its hash is."""
    merged: dict[str, dict] = {}
    for source in [*own, *inherited]:
        key = source.get("sha256") or source.get("fingerprint") or source.get("name")
        merged.setdefault(str(key), source)
    return list(merged.values())


@contextmanager
def lock(run: Path, main: bool) -> Iterator[None]:
    """Hold the run folder's lock, on the main process: two programs that train one run would delete
    each other's checkpoints. UserError if another holds it."""
    if not main:
        yield
        return
    new = [folder for folder in (run, run.parent) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    held = FileLock(run / ".lock")
    # torchrun starts again before every process of before has ended, if some are on other machines
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    try:
        with suppress(NotImplementedError):  # a file system without locks
            held.acquire(timeout=RESTART_WAIT if is_restart else 0)
    except Timeout:
        raise UserError(
            f"another process trains {run} now: end it, wait for it, or choose another run=name"
        ) from None
    try:
        yield
    finally:
        held.release()
        remove_empty(run, new)


def remove_empty(run: Path, new: list[Path]) -> None:
    """Leave nothing behind of a run that came to nothing: its lock, and the folders made for it."""
    with suppress(OSError):
        names = {path.name for path in run.iterdir()}
        if names <= {".lock"}:
            (run / ".lock").unlink(missing_ok=True)
            for folder in new:
                folder.rmdir()
