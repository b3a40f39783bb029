"""Checkpoints: self-contained step folders, written atomically, read without unpickling anything.

    checkpoints/<run>/step-00001000/model.safetensors   full weights under clean names
                                   /state/*.safetensors  optimizer state, one file per process, reshardable
                                   /meta.json            model config, step, data; written last, lists every file

`state/` is written by torch.distributed.checkpoint through its safetensors storage (the default one pickles). It holds
no random state: the training loop derives all randomness from (seed, step, rank).
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.optim import Optimizer

from smallgpt.console import UserError
from smallgpt.files import flush, write_atomic
from smallgpt.parallel.world import World
from smallgpt.tokenizer import Tokenizer

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


def optimizer_tensors(module: nn.Module, optimizers: list[Optimizer]) -> dict[str, torch.Tensor]:
    """Every state tensor as `parameter name/state name`; hyper-parameters come from the settings, not from here."""
    names = {p: n for n, p in module.named_parameters()}
    return {
        f"{names[p]}/{key}": value
        for o in optimizers
        for p, state in o.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def digest(weights: dict[str, torch.Tensor]) -> str:
    """A hash of weights by name: whether two are the same, wherever they lie."""
    found = hashlib.blake2b(digest_size=12)
    for name in sorted(weights):
        found.update(
            name.encode() + weights[name].cpu().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def save(
    run: Path, module: nn.Module, optimizers: list[Optimizer], meta: dict, world: World, keep: int
) -> None:
    """Write step folder meta["step"], point `latest` to it, and prune. A collective: every rank must call it.

    If anything fails (a full disk) every rank raises UserError, and the older checkpoints are untouched."""
    final = run / f"step-{meta['step']:08d}"
    tmp = run / f".{final.name}.tmp"
    error = ""
    try:
        if world.main:
            shutil.rmtree(tmp, ignore_errors=True)
            (tmp / "state").mkdir(parents=True)
    except OSError as e:
        error = str(e)
    world.sum(0)  # the folder is there now, for every process that shares it
    if not error and not (tmp / "state").is_dir():
        error = f"process {world.rank} does not see {run}, a folder that all machines must share"
    failed = world.sum(bool(error))[0]  # all or none enter the collectives below
    full = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    try:
        if not failed:
            state = optimizer_tensors(module, optimizers)
            writer = dcp.HuggingFaceStorageWriter(str(tmp / "state"), save_distributed=True)
            with warnings.catch_warnings(
                action="ignore"
            ):  # "assuming the intent is to save in a single process"
                dcp.save(state, storage_writer=writer, no_dist=world.size == 1)
        if world.main and not failed:
            # named_parameters lists a tied matrix once, and safetensors wants each tensor once
            save_file(
                {n: full[n].contiguous() for n, _ in module.named_parameters()},
                tmp / "model.safetensors",
            )
            publish(tmp, final, meta)
            point(run, "latest", meta["step"])
    except (OSError, SafetensorError, CheckpointException) as e:
        error = " ".join(str(e).split())[-300:]
    if world.sum(bool(error))[0]:
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError(
            f"could not save {final} ({error or 'another process failed'}); is the disk full? The older "
            "checkpoints are intact: make room, then the same command continues from the last"
        )
    if world.main:
        prune(run, keep)


def publish(tmp: Path, final: Path, meta: dict) -> None:
    """Flush every file of tmp to the disk, write meta.json last, give the folder its real name."""
    files = sorted(p for p in tmp.rglob("*") if p.is_file())
    meta = {
        "format": FORMAT,
        **meta,
        "files": {p.relative_to(tmp).as_posix(): p.stat().st_size for p in files},
    }
    (tmp / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
    for file in [*files, tmp / "meta.json", tmp / "state", tmp]:
        flush(file)
    shutil.rmtree(final, ignore_errors=True)  # a damaged folder of the same step
    os.replace(tmp, final)
    flush(final.parent)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Anything but safetensors, such as a pickle, is refused."""
    try:
        yield
    except (SafetensorError, CheckpointException) as e:
        raise UserError(
            f"{file} does not hold valid safetensors: {' '.join(str(e).split())[-300:]}"
        ) from None


def load_weights(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Put the saved weights into module; every name and shape must agree, or UserError says which do not."""
    with reading(file := checkpoint.path / "model.safetensors"):
        weights = load_file(file)
    wanted = {n: tuple(p.shape) for n, p in module.named_parameters()}
    found = {n: tuple(t.shape) for n, t in weights.items()}
    wrong = [n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)]
    if wrong:
        n = sorted(wrong)[0]
        raise UserError(
            f"the weights in {checkpoint.path} do not fit this model: {len(wrong)} tensors differ, for example "
            f"{n} is {found.get(n, 'absent')} in the file and {wanted.get(n, 'absent')} in the model"
        )
    # strict=False only for the second name of a tied matrix; all names were compared above
    set_model_state_dict(
        module, weights, options=StateDictOptions(full_state_dict=True, strict=False)
    )


def load_optimizers(
    checkpoint: Checkpoint, module: nn.Module, optimizers: list[Optimizer], world: World
) -> None:
    """Put the saved state into the optimizers, whatever the number of processes that wrote it."""
    with reading(folder := checkpoint.path / "state"):
        reader = dcp.HuggingFaceStorageReader(str(folder))
        saved = reader.read_metadata().state_dict_metadata.keys()
    names = {p: n for n, p in module.named_parameters()}
    targets: dict[str, torch.Tensor] = {}
    for o in optimizers:
        for p in (p for g in o.param_groups for p in g["params"]):
            for key in (k.rpartition("/")[2] for k in saved if k.rpartition("/")[0] == names[p]):
                like = torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p)
                targets[f"{names[p]}/{key}"] = o.state[p][key] = like
    if targets.keys() != saved:
        raise UserError(
            f"the optimizer state in {checkpoint.path} belongs to another optimizer or other parameters"
        )
    with reading(folder), warnings.catch_warnings(action="ignore"):
        dcp.load(targets, storage_reader=reader, no_dist=world.size == 1)


def tokenizer_of(found: Checkpoint) -> Tokenizer:
    """The tokenizer saved with a checkpoint. UserError if it is not the one the model was trained with."""
    tokenizer = Tokenizer.load(found.run / "tokenizer.json")
    if tokenizer.hash != found.meta["tokenizer"]:
        raise UserError(
            f"{found.run / 'tokenizer.json'} is not the tokenizer that {found.path} was trained with"
        )
    return tokenizer


def open_model(
    path: Path | str, model_class: type, config_class: type
) -> tuple[Checkpoint, nn.Module, Tokenizer]:
    """The best (or the given) checkpoint at path as (checkpoint, model on the CPU, tokenizer); needs nothing else.

    model_class(config_class(**fields)) must build the model; the fields come from the checkpoint."""
    found = required(path)
    if "head" in found.meta:
        raise UserError(
            f"{path} is a classifier: use it with python scripts/classify.py {path} TEXT, or as a trunk"
        )
    tokenizer = tokenizer_of(found)
    load_weights(found, module := model_class(shape(found.meta["model"], found.path, config_class)))
    return found, module, tokenizer
