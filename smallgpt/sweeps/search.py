"""A search for good settings, on Optuna: trials that are chosen by what the earlier ones found.

What is known lies in the sweep's folder (search.jsonl, a journal of Optuna's): the same command
goes on with it, and several at once share it. Validation chooses and prunes; the test is not read.
"""

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from filelock import FileLock

from smallgpt.console import UserError
from smallgpt.runs import metrics
from smallgpt.runs.metrics import say
from smallgpt.sweeps.compare import ALL_MEASURES
from smallgpt.sweeps.jobs import Job, Script, cell_name, why_failed

if TYPE_CHECKING:  # an optional package
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STUDY = "search"
RANGE = re.compile(r"(\S+?)\.\.(\S+?)( log)?")
FAILURES = 3  # so many, and no trial that succeeds: it is not the drawn values that are wrong
# statuses of a training that was asked to stop: no verdict on its settings
STOPPED = {
    code
    for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM))
    for code in (-number, 128 + number)
}

Space = dict[str, str | list[str]]  # setting -> a range, 1e-4..1e-2 log, or a list of values


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have."""

    low: float
    high: float
    is_log: bool
    is_whole: bool


def parse_range(text: str) -> Range:
    """1e-4..1e-2 log | 0..0.3 | 2..8. ValueError: what is wrong with it."""
    match = RANGE.fullmatch(text)
    if not match:
        raise ValueError(
            f"must be a range, such as 1e-4..1e-2 log, or a list of values, [a, b], not {text}"
        )
    low, high, log = match.groups()
    try:
        span = Range(float(low), float(high), bool(log), is_whole(low) and is_whole(high))
    except ValueError:
        raise ValueError(f"{text}: a range is of numbers") from None
    if not span.low < span.high:
        raise ValueError(f"{text}: the first number must be below the second")
    if span.is_log and span.low <= 0:
        raise ValueError(f"{text}: a log range begins above 0")
    return span


def is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", text) is not None


def space_problems(space: Space) -> list[str]:
    """What is wrong with a search space, in plain words."""
    problems = []
    for key, given in space.items():
        if isinstance(given, list):
            if len({*given}) < 2:
                problems.append(f"search.{key} must have two or more different values")
            continue
        try:
            parse_range(given)
        except ValueError as error:
            problems.append(f"search.{key} {error}")
    return problems


def distribution(given: str | list[str]) -> "BaseDistribution":
    """What Optuna draws from."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(given, list):
        return CategoricalDistribution(given)
    span = parse_range(given)
    if span.is_whole:
        return IntDistribution(int(span.low), int(span.high), log=span.is_log)
    return FloatDistribution(span.low, span.high, log=span.is_log)


def spelled(value: Any) -> str:
    """A drawn value as it is written in a setting: 0.0003162."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Search:
    """The trials of a sweep: a queue of trainings, made as they are asked for."""

    def __init__(
        self,
        folder: Path,
        script: Script,
        common: dict[str, str],
        space: Space,
        trials: int,
        seed: int,
        prune: bool,
    ):
        """common: settings of all trials. seed: of the trials, and of what is drawn."""
        try:
            import optuna
        except ModuleNotFoundError:
            raise UserError(
                "a search needs the package optuna: pip install optuna; a grid works without"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna = optuna
        self.folder = folder
        self.script: Script = script
        self.common = common
        self.space = space
        self.trials = trials
        self.seed = seed
        self.problems: dict[Path, str] = {}  # of the trainings that failed here
        self.reported: dict[Path, int] = {}  # how many evaluations of those that run here
        self.pruned: set[Path] = set()  # those that were told to end here
        self.measure = "bits_per_byte"
        if script == "sentiment_train":
            self.measure = common.get("select", "accuracy")
        is_lower_better = self.measure in ("bits_per_byte", "loss")
        self.sign = -1 if is_lower_better else 1
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / ".search.lock")  # one process counts and asks at a time
        with self.lock:
            self.storage = open_journal(folder / "search.jsonl")
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=STUDY,
                direction="minimize" if is_lower_better else "maximize",
                pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
            self.check_space()

    def check_space(self) -> None:
        """UserError if the trials so far were drawn from another space, or judged otherwise."""
        now = {"search": self.space, "select": self.measure, "search_seed": self.seed}
        then = self.study.user_attrs
        for key, value in now.items():
            if key not in then:
                self.study.set_user_attr(key, value)
            elif then[key] != value:
                raise UserError(
                    f"{self.folder}: {key} was {then[key]} and is now {value}: put it back, or "
                    "choose another name="
                )

    # --- the queue of trainings -------------------------------------------------------------------

    def open_jobs(self) -> Iterator[Job]:
        """Trials that nobody has finished: those begun first, perhaps by a process that has died.
        Then new ones, as long as they are taken."""
        for trial in self.in_state("RUNNING"):
            job = self.job(trial)
            if job.folder in self.problems:
                continue
            if job.result():  # of a training that outlived its sweep
                self.tell_result(job)
            else:
                yield job
        while self.has_hope():
            trial = self.ask()
            if trial is None:
                return
            yield self.job(trial)

    def should_end(self, job: Job) -> bool:
        """Is a trial worse than the median of the others was after as many evaluations?"""
        with self.lock:
            if self.is_finished(job) or not self.report(job):
                return False
            trial = self.storage.get_trial(self.trial_id(job))
            is_worse = self.study.pruner.prune(self.study, trial)
        if is_worse:
            self.pruned.add(job.folder)
        return is_worse

    def ended(self, job: Job, status: int) -> None:
        """Tell the others how a trial has ended."""
        if job.result():
            self.tell_result(job)
        elif job.folder in self.pruned:
            self.tell(job, "PRUNED")
            say(f"{self.title(job)}: pruned after evaluation {self.reported[job.folder]}")
        else:
            self.problems[job.folder] = why_failed(job, status)
            if status not in STOPPED:
                self.tell(job, "FAIL")

    def count(self) -> tuple[int, int]:
        """Trials that have ended, and trials in all."""
        running = len(self.in_state("RUNNING"))
        asked = len(self.study.get_trials(deepcopy=False))
        return asked - running, max(asked, self.trials)

    # --- trials -----------------------------------------------------------------------------------

    def in_state(self, *names: str) -> list["FrozenTrial"]:
        """The trials in one of these states, in the order of their numbers."""
        states = [self.optuna.trial.TrialState[name] for name in names]
        return self.study.get_trials(deepcopy=False, states=states)

    def has_hope(self) -> bool:
        """Do trials succeed, or did few fail?"""
        return len(self.problems) < FAILURES or bool(self.in_state("COMPLETE", "PRUNED"))

    def ask(self) -> "FrozenTrial | None":
        """A new trial; None if there are enough. Its values depend on its number and on what was
        found before, not on the process that asks."""
        distributions = {key: distribution(given) for key, given in self.space.items()}
        with self.lock:
            n = len(self.study.get_trials(deepcopy=False))
            if n >= self.trials:
                return None
            (seed,) = np.random.SeedSequence([self.seed, n]).generate_state(1)
            self.study.sampler = self.optuna.samplers.TPESampler(seed=int(seed))
            trial = self.study.ask(distributions)
        return self.study.get_trials(deepcopy=False)[trial.number]

    def job(self, trial: "FrozenTrial") -> Job:
        """The training of a trial, which does not read the test."""
        drawn = self.drawn(trial)
        keys = {**self.common, **drawn, "seed": str(self.seed)}
        if self.script == "sentiment_train":
            keys["score_test"] = "false"
        return Job(self.script, drawn, self.seed, self.folder / trial_name(trial), keys)

    def drawn(self, trial: "FrozenTrial") -> dict[str, str]:
        """The settings that the trial tries, in the order of the space."""
        return {key: spelled(trial.params[key]) for key in self.space}

    def jobs(self) -> list[Job]:
        """Of all trials so far."""
        return [self.job(trial) for trial in self.study.get_trials(deepcopy=False)]

    def trial_id(self, job: Job) -> int:
        """Optuna's number for the trial of a job."""
        study_id = self.storage.get_study_id_from_name(STUDY)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, self.number(job))

    @staticmethod
    def number(job: Job) -> int:
        """trial-0007 -> 7"""
        _, _, number = job.folder.name.rpartition("-")
        return int(number)

    # --- what the processes tell each other, one at a time ---

    def is_finished(self, job: Job) -> bool:
        """Has somebody told how the trial has ended?"""
        trial = self.storage.get_trial(self.trial_id(job))
        return trial.state.is_finished()

    def report(self, job: Job) -> bool:
        """Tell of the evaluations of a trial. Returns whether there are new ones."""
        evaluations = metrics.read(job.folder, "val")
        seen = self.reported.get(job.folder, 0)
        trial_id = self.trial_id(job)
        for count, record in enumerate(evaluations[seen:], seen + 1):
            self.storage.set_trial_intermediate_value(trial_id, count, record[self.measure])
        self.reported[job.folder] = len(evaluations)
        return len(evaluations) > seen

    def tell(self, job: Job, state: str, value: float | None = None) -> bool:
        """Tell how a trial has ended. Returns whether nobody had told before."""
        with self.lock:
            if self.is_finished(job):
                return False
            self.report(job)
            states = self.optuna.trial.TrialState
            self.study.tell(self.number(job), value, states[state])
        return True

    def tell_result(self, job: Job) -> None:
        """Tell what a finished training has found."""
        value = job.result()["validation"][self.measure]
        if self.tell(job, "COMPLETE", value):
            best = self.best()
            so_far = f"best: {trial_name(best)}, {self.show(best.value)}"
            say(f"{self.title(job)}: validation {self.show(value)} ({so_far})")

    def title(self, job: Job) -> str:
        return f"{job.folder.name}: {cell_name(job.cell)}"

    def show(self, value: float) -> str:
        """accuracy 81.25%"""
        measure = ALL_MEASURES[self.measure]
        return f"{measure.title} {measure.show(value)}"

    # --- what was found ---------------------------------------------------------------------------

    def best(self) -> "FrozenTrial":
        """The best trial, of equally good ones the first. UserError if none has succeeded."""
        done = self.in_state("COMPLETE")
        if not done:
            problems = "\n  - ".join(self.problems.values())
            raise UserError(
                f"no trial has succeeded: correct what they report, and delete {self.folder} or "
                f"choose another name=\n  - {problems}"
            )
        return max(done, key=lambda trial: (self.sign * trial.value, -trial.number))

    def write(self) -> Path:
        """trials.csv: a row for each trial, the best first."""
        rows = []
        for trial in self.study.get_trials(deepcopy=False):
            rows.append(
                {
                    "trial": trial_name(trial),
                    "state": trial.state.name.lower(),
                    self.measure: trial.value,
                    **self.drawn(trial),
                }
            )
        table = pd.DataFrame(rows).sort_values(self.measure, ascending=self.sign < 0)
        file = self.folder / "trials.csv"
        table.to_csv(file, index=False, float_format="%.6g", encoding="utf-8-sig")
        return file


def trial_name(trial: "FrozenTrial") -> str:
    """The folder of a trial."""
    return f"trial-{trial.number:04d}"


def open_journal(file: Path) -> Any:
    """Optuna's storage in a file. Half a line, which a crash of the machine leaves, is cut off."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = os.path.abspath(file)
    lock = JournalFileOpenLock(path)  # of a process that has died, it ends after 30 seconds
    lock.acquire()
    try:
        metrics.drop_partial_line(file)
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(path, lock))
