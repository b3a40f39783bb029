"""Run folders: which checkpoints a run has, which of them are whole, which to begin or continue from.

checkpoints/<run>/step-00001000/    a checkpoint (checkpoint.py) if it has a meta.json and all that this lists
checkpoints/<run>/latest, best      names of step folders
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from smallgpt.settings import UserError

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """One valid step folder and what its meta.json says."""

    path: Path
    meta: dict

    @property
    def run(self) -> Path:
        return self.path.parent

    @property
    def step(self) -> int:
        return self.meta["step"]


def damage(path: Path) -> str:
    """What is wrong with a step folder, in words; empty when nothing is."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        files = {path / name: size for name, size in meta["files"].items()}
    except FileNotFoundError:
        return "it has no meta.json: the save was cut short"
    except (ValueError, KeyError, AttributeError, TypeError):
        return "its meta.json is unreadable"
    if meta.get("format") != FORMAT:
        return f"its format is {meta.get('format')}, this program reads {FORMAT}"
    if path / "model.safetensors" not in files:
        return "it has no weights"
    for file, size in files.items():
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            return f"{file.relative_to(path)} has {found} bytes instead of {size}"
    return ""


def find(
    path: Path | str, say: Callable[[str], None] = print, prefer: str = "latest"
) -> Checkpoint | None:
    """The checkpoint at path: a step folder, or a run folder's `latest` (or `best`), else its newest whole one.

    Damaged folders are named through say and passed over. None if the run has no checkpoint yet; UserError if it has
    only damaged ones, or if a step folder that was asked for is damaged."""
    path = Path(path)
    if re.fullmatch(r"step-\d+", path.name):
        if problem := damage(path) if path.is_dir() else "there is no such folder":
            raise UserError(f"cannot use the checkpoint {path}: {problem}")
        return Checkpoint(path, json.loads((path / "meta.json").read_text(encoding="utf-8")))
    steps = step_folders(path)[::-1]
    pointed = read_pointer(path, prefer) or read_pointer(path, "latest")
    for step in sorted(
        steps, key=lambda p: p != pointed
    ):  # the one pointed to first, then newest to oldest
        if not (problem := damage(step)):
            return find(step)
        say(f"passing over the damaged checkpoint {step}: {problem}")
    if steps:
        raise UserError(f"every checkpoint in {path} is damaged; start again with another run=name")
    return None


def step_folders(run: Path) -> list[Path]:
    """The step folders of a run, oldest first. step-00000100-mine, a copy that somebody keeps, is none of them."""
    return sorted(p for p in run.glob("step-*") if re.fullmatch(r"step-\d+", p.name))


def read_pointer(run: Path, name: str) -> Path | None:
    """The step folder that `latest` or `best` names; None if there is none. A pointer cannot lead out of the run."""
    try:
        target = (run / name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return run / target if re.fullmatch(r"step-\d+", target) else None


def point(run: Path, name: str, step: int) -> None:
    """Make `latest` or `best` name the folder of this step, atomically."""
    write_atomic(run / name, f"step-{step:08d}\n")


def write_atomic(path: Path, text: str, shared: bool = False) -> None:
    """Write a small file at once: a reader, in another process or after a kill, finds the old text or the new.
    shared: other processes may be writing the same file."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and those that `latest` and `best` name."""
    kept = {read_pointer(run, "latest"), read_pointer(run, "best")}
    for old in step_folders(run)[:-keep]:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def required(path: Path | str) -> Checkpoint:
    """The best (or the given) checkpoint at path; UserError if there is none."""
    if not Path(path).is_dir() or not (found := find(path, prefer="best")):
        raise UserError(
            f"there is no checkpoint (no step-... folder) in {path}: has a training run saved there yet?"
        )
    return found


def shape(fields: dict, where: Path | str, config_class: type) -> Any:
    """The settings of a model that were read from `where`, as a config_class. UserError if they are not valid."""
    try:
        config = config_class(**fields)
    except TypeError as e:
        raise UserError(
            f"{where} is of another kind, or another version of this program: {e}"
        ) from None
    if problems := config.check():
        raise UserError(f"the model settings in {where} are not valid: {'; '.join(problems)}")
    return config


def starting_point(run: Path, resume: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to continue from, as `resume` asks: this run's own, or else the one it is to begin from."""
    own = bool(step_folders(run))
    if own and Path(resume).resolve() in [
        p.resolve() for p in step_folders(run) if p != read_pointer(run, "latest")
    ]:
        raise UserError(
            f"{run} has gone on from {resume}: to go back to it, choose another run=name as well"
        )
    if resume == "never":
        if own:
            raise UserError(
                f"{run} already holds checkpoints: choose another run=name, or delete the folder"
            )
        return None
    where = run if resume == "auto" or own else Path(resume)
    found = find(where, say)
    if found is None and resume != "auto":
        raise UserError(f"resume={resume}: there is no checkpoint in that folder")
    return found


def check_same(meta: dict, now: dict, where: Path) -> None:
    """A resumed run must be the same optimisation; the first difference is named."""
    what = {
        "data": "the corpus (or its split) has changed: its fingerprint",
        "tokenizer": "the tokenizer's hash",
    }
    then_flat, now_flat = (
        {**m, **{f"model.{k}": v for k, v in m["model"].items()}} for m in (meta, now)
    )
    for key in now_flat:
        # a setting that an older version did not have was off
        if key != "model" and (then_flat.get(key) or 0) != (now_flat[key] or 0):
            raise UserError(
                f"cannot continue from {where}: {what.get(key, key)} was {then_flat.get(key)} and is now "
                f"{now_flat[key]}; put it back, or start afresh with another run=name"
            )


def forget_lost(
    run: Path, evaluated: dict[int, Any], quality: Callable[[Any], Any], main: bool
) -> None:
    """Make `best` a checkpoint that is there, after a damaged one was passed over: evaluations whose step folder is not
    whole are dropped, best first (of equally good ones the first), until one remains that has it."""
    best = 0
    while evaluated and damage(
        run / f"step-{(best := max(evaluated, key=lambda k: (quality(evaluated[k]), -k))):08d}"
    ):
        del evaluated[best]
    if main and evaluated:
        point(run, "best", best)
    elif main:
        (run / "best").unlink(missing_ok=True)


@contextmanager
def alone(run: Path, main: bool) -> Iterator[None]:
    """Hold the run folder's lock, on the main process: two programs that train one run would delete each other's
    checkpoints. UserError if another holds it."""
    if not main:
        yield
        return
    new = [folder for folder in (run, run.parent) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"another process trains {run} now: end it, wait for it, or choose another run=name"
        ) from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            if {p.name for p in run.iterdir()} <= {".lock"}:  # nothing came of it
                (run / ".lock").unlink(missing_ok=True)
                for folder in new:
                    folder.rmdir()


def check_loss(run: Path, step: int, loss: float) -> None:
    """UserError if the validation loss after this step is no number: `latest` is that step, which no run can use."""
    if not math.isfinite(loss):
        older = [p for p in step_folders(run) if p.name < f"step-{step:08d}"]
        again = (
            f"go on in another run=name with resume={older[-1]}"
            if older
            else "start again with another run=name"
        )
        raise UserError(
            f"the validation loss is {loss} at step {step}: lower optim.lr, and {again}"
        )


def name_problems(run: str) -> list[str]:
    """What is wrong with the name of a run, in plain words."""
    if Path(run).name != run or run in ("", "..", ".") or run.startswith("step-"):
        return [
            f"run={run!r} must be a plain folder name (not step-...); out_dir says where it lives"
        ]
    return []
