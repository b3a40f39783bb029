"""Checkpoints: self-contained step folders, written whole or not at all, read without unpickling.

    checkpoints/<run>/step-00001000/model.safetensors    full weights under clean names
                                    state/*.safetensors  optimizer state, one file per process
                                    meta.json            settings, step, sources; written last,
                                                         lists every file
    checkpoints/<run>/latest, best                       names of step folders

`state/` is written by torch.distributed.checkpoint through its safetensors storage (the default
one pickles), and can be read by any number of processes. It holds no random state: the loops
derive all randomness from (seed, step, rank).

A folder is found by the sizes of its files, which takes no time. The bytes are compared, by the
checksums in meta.json, by who reads them: those of the weights before the first tensor is read,
however few are wanted; those of the optimizer state before it is put together from slices of
several files, by all processes, which divide the files among themselves.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file

from model import GPTConfig
from smallgpt.adam import Optimizer, is_cut
from smallgpt.console import UserError
from smallgpt.files import checksum, flush, write_atomic
from smallgpt.parallel.strategy import Single, shapes_of
from smallgpt.parallel.world import World
from smallgpt.runs import lazy, lora
from smallgpt.runs.lazy import Weights
from smallgpt.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
VALUE = "value"  # in the state: of a parameter that is not among the weights
ASIDE = ".old"  # ends the name of a step folder while another one takes its place
FORMAT = 2  # of meta.json
READABLE = (1, 2)  # 1 had no sources and no settings: its runs can be used, but not continued

# One process alone is meant. (A filter for the time of a save would not reach its threads.)
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Checkpoint:
    """One whole step folder and what its meta.json holds."""

    path: Path
    meta: dict

    @property
    def run(self) -> Path:
        return self.path.parent

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def sources(self) -> list[dict]:
        """What the weights were trained on, also in the runs they began from."""
        unknown = {"kind": "unknown", "name": f"the text of {self.path}"}
        return self.meta.get("sources", [unknown])

    def verify(self, *names: str) -> None:
        """UserError if one of these files holds other bytes than were written. Of files that an
        older version wrote nothing is known."""
        checksums = self.meta.get("crc32", {})
        for name in names:
            file = self.path / name
            if name in checksums and checksum(file) != checksums[name]:
                raise UserError(
                    f"{file} is damaged, some of its bytes have changed since they were written: "
                    + instead_of(self.path)
                )


# --- finding --------------------------------------------------------------------------------------


def why_damaged(path: Path) -> str:
    """What is wrong with a step folder, in words; empty when nothing is."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        sizes = {path / name: size for name, size in meta["files"].items()}
    except FileNotFoundError:
        return "it has no meta.json: the save was cut short"
    except (ValueError, KeyError, AttributeError, TypeError):
        return "its meta.json is unreadable"
    if meta.get("format") not in READABLE:
        return f"its format is {meta.get('format')}, this program reads {READABLE[-1]}"
    if path / WEIGHTS not in sizes:
        return "it has no weights"
    for file, size in sizes.items():
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            return f"{file.relative_to(path)} has {found} bytes instead of {size}"
    return ""


def instead_of(damaged: Path) -> str:
    """What to do about a damaged step folder, in words."""
    others = [path for path in step_folders(damaged.parent) if path.name != damaged.name]
    whole = [path for path in others if not why_damaged(path)]
    if not whole:
        return (
            f"there is no other checkpoint in {damaged.parent}, start again with another run=name"
        )
    return f"delete {damaged}, and {whole[-1]} takes its place"


def is_step_name(name: str) -> bool:
    """step-00000100 is one; step-00000100-mine, a copy that somebody keeps, is not."""
    return re.fullmatch(r"step-\d+", name) is not None


def step_folders(run: Path) -> list[Path]:
    """The step folders of a run, oldest first."""
    return sorted(path for path in run.glob("step-*") if is_step_name(path.name))


def step_folder(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}"


def find(
    path: Path | str, say: Callable[[str], None] = print, prefer: str = "latest"
) -> Checkpoint | None:
    """The checkpoint at path: a step folder, or a run folder's `latest` (or `best`), else its
    newest whole one.

    Damaged folders are named through `say` and passed over. None if the run has no checkpoint yet;
    UserError if it has only damaged ones, or if a step folder that was asked for is damaged."""
    path = Path(path)
    if is_step_name(path.name):
        return read_checkpoint(path)
    steps = step_folders(path)[::-1]
    pointed = read_pointer(path, prefer) or read_pointer(path, "latest")
    steps.sort(key=lambda step: step != pointed)  # the one pointed to first, then newest to oldest
    for step in steps:
        problem = why_damaged(step)
        if not problem:
            return read_checkpoint(step)
        say(f"passing over the damaged checkpoint {step}: {problem}")
    if steps:
        raise UserError(f"every checkpoint in {path} is damaged; start again with another run=name")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a step folder; UserError if it is damaged."""
    problem = why_damaged(path) if path.is_dir() else "there is no such folder"
    if problem:
        raise UserError(f"cannot use the checkpoint {path}: {problem}")
    return Checkpoint(path, json.loads((path / "meta.json").read_text(encoding="utf-8")))


def required(path: Path | str) -> Checkpoint:
    """The best (or the given) checkpoint at path; UserError if there is none."""
    found = find(path, prefer="best") if Path(path).is_dir() else None
    if found is None:
        raise UserError(
            f"there is no checkpoint (no step-... folder) in {path}: "
            "has a training run saved there yet?"
        )
    return found


def read_pointer(run: Path, name: str) -> Path | None:
    """The step folder that `latest` or `best` names; None if there is none. A pointer cannot lead
    out of the run."""
    try:
        target = (run / name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return run / target if is_step_name(target) else None


def point(run: Path, name: str, step: int) -> None:
    """Make `latest` or `best` name the folder of this step, atomically."""
    write_atomic(run / name, f"{step_folder(run, step).name}\n")


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and those that `latest` and `best` name."""
    kept = {read_pointer(run, "latest"), read_pointer(run, "best")}
    for old in step_folders(run)[:-keep]:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def name_problems(run: str) -> list[str]:
    """What is wrong with the name of a run, in plain words."""
    is_plain = Path(run).name == run and run not in ("", "..", ".")
    if is_plain and not run.startswith("step-"):
        return []
    return [f"run={run!r} must be a plain folder name (not step-...); out_dir says where it lives"]


# --- writing --------------------------------------------------------------------------------------


class Saver:
    """Writes the checkpoints of a run, one at a time: at once, or in threads beside the training.

    In the background each process copies its state before `save` returns: the files hold the state
    at the call. The main process publishes the folder when every one has written its files. The
    loop learns of it from the `progress` of all processes together, which it gives to `settle`.
    Where anything fails (a full disk) every rank raises UserError, and the older checkpoints are
    untouched."""

    def __init__(self, run: Path, world: World, keep: int, in_background: bool = False):
        self.run = run
        self.world = world
        self.keep = keep
        self.in_background = in_background
        self.group: dist.ProcessGroup | None = None  # of the threads
        self.step = 0  # that is being saved; 0 = none
        self.is_best = False  # whether `best` is to name it
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.thread: Future[None] | None = None  # writes it
        self.error = ""  # what went wrong in this process, in words

    @property
    def final(self) -> Path:
        return step_folder(self.run, self.step)

    @property
    def temporary(self) -> Path:
        return self.run / f".{self.final.name}.tmp"

    def save(self, strategy: Single, optimizers: list[Optimizer], meta: dict) -> None:
        """Write step folder meta["step"], point `latest` to it, and prune. A collective: every rank
        must call it."""
        from smallgpt.runs import state  # half a second of imports, after the first step

        self.finish()
        self.step = meta["step"]
        self.is_best = False
        self.error = self.make_folder()
        self.check(self.world.sum(bool(self.error))[0])
        weights = lora.merged(strategy.gather_weights())
        tensors = optimizer_tensors(strategy.names(), optimizers)
        folder = self.temporary / "state"
        if not self.in_background:
            self.write(partial(state.save, tensors, folder), weights, meta)
            self.finish()
            return
        if self.group is None and dist.is_initialized():  # training's own would mix up the two
            limit = timedelta(seconds=self.world.timeout)
            self.group = dist.new_group(backend="gloo", timeout=limit)
        wait_for_state = state.save_async(tensors, folder, self.group)
        weights = copied(weights, strategy.model)
        self.thread = self.executor.submit(self.write, wait_for_state, weights, meta)

    def make_folder(self) -> str:
        """An empty folder to write into, for every process; returns what went wrong, in words. A
        collective."""
        error = ""
        if self.world.main:
            try:
                shutil.rmtree(self.temporary, ignore_errors=True)
                (self.temporary / "state").mkdir(parents=True)
            except OSError as problem:
                error = str(problem)
        self.world.sum(0)  # the folder is there now, for every process that shares it
        if error or (self.temporary / "state").is_dir():
            return error
        rank = self.world.rank
        return f"process {rank} does not see {self.run}, a folder that all machines must share"

    def write(
        self,
        write_state: Callable[[], dict[str, int]],
        weights: dict[str, torch.Tensor],
        meta: dict,
    ) -> None:
        """Write this process's files, and publish the folder: write_state returns when all
        processes have written their state, and gives the checksums of its files."""
        try:
            checksums = write_state()
            if self.world.main:
                contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
                file = self.temporary / WEIGHTS
                save_file(contiguous, file)
                checksums[WEIGHTS] = checksum(file)
                publish(self.temporary, self.final, {**meta, "crc32": checksums})
                point(self.run, "latest", self.step)
        except (OSError, SafetensorError) as problem:
            self.error = brief(problem)

    def progress(self) -> tuple[bool, bool]:
        """Is this process still writing? Has it failed?"""
        if self.thread and not self.thread.done():
            return True, False
        self.wait()
        return False, bool(self.error)

    def wait(self) -> None:
        """Wait for this process's files. (result() raises what is a mistake of this program.)"""
        if self.thread:
            self.thread.result()

    def settle(self, writing: float, failed: float) -> None:
        """What follows from the progress of all processes: so many are writing, so many failed."""
        if writing or not self.step:
            return
        self.check(failed)
        if self.world.main:
            if self.is_best:
                point(self.run, "best", self.step)
            prune(self.run, self.keep)
        self.step = 0

    def check(self, failed: float) -> None:
        """UserError if so many processes failed to save."""
        if not failed:
            return
        problem = self.problem()
        shutil.rmtree(self.temporary, ignore_errors=True)
        if self.world.main:
            put_back(self.run)
        self.step = 0
        raise UserError(problem)

    def problem(self) -> str:
        """Why this checkpoint could not be saved, and what to do, in words."""
        why = self.error or "another process failed"
        return (
            f"could not save {self.final} ({why}); is the disk full? The older checkpoints are "
            "intact: make room, then the same command continues from the last"
        )

    def finish(self) -> None:
        """Wait until what is being saved is published. A collective."""
        if self.step:
            self.wait()
            self.settle(0, self.world.sum(bool(self.error))[0])

    def close(self) -> str:
        """Wait for this process's files and for no other process, since the run ends by an error;
        returns why they could not be saved, in words. (A process that died is told elsewhere.)"""
        if self.thread:
            self.thread.exception()
        if not self.step or not self.error:
            return ""
        if self.world.main:  # whose writing ends after that of all others
            shutil.rmtree(self.temporary, ignore_errors=True)
        return self.problem()

    def name_best(self, step: int) -> None:
        """Make `best` name this step, whose folder is there or being written."""
        if step == self.step:
            self.is_best = True
        elif self.world.main:
            point(self.run, "best", step)
            prune(self.run, self.keep)


def copied(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights, copied where they lie in the memory of the model, which updates change."""
    memory = set()
    for p in model.parameters():
        part = p.to_local() if is_cut(p) else p
        memory.add(part.untyped_storage().data_ptr())
    copies = {}
    for name, weight in weights.items():
        is_shared = weight.untyped_storage().data_ptr() in memory
        copies[name] = weight.clone() if is_shared else weight
    return copies


def brief(problem: BaseException) -> str:
    """What went wrong, on one line, and not that it was an "Error while serializing: I/O error"."""
    _, _, end = str(problem).rpartition(" error: ")
    return " ".join(end.split())[-300:]


def optimizer_tensors(
    names: dict[str, nn.Parameter], optimizers: list[Optimizer]
) -> dict[str, torch.Tensor]:
    """Every state tensor as `parameter name/state name`, and as `parameter name/value` what is not
    among the saved weights; hyper-parameters come from the settings, not from here."""
    name_of = {p: name for name, p in names.items()}
    tensors = {}
    for name, p in names.items():
        if lora.is_factor(name):
            tensors[f"{name}/{VALUE}"] = p.detach()
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name_of[p]}/{key}"] = value
    return tensors


def publish(temporary: Path, final: Path, meta: dict) -> None:
    """Flush every file of temporary to the disk, write meta.json last, give the folder its real
    name."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
    content = json.dumps({"format": FORMAT, **meta, "files": sizes}, indent=1, ensure_ascii=False)
    (temporary / "meta.json").write_text(content, encoding="utf-8")
    usual_mode = (temporary / "meta.json").stat().st_mode
    for file in files:
        file.chmod(usual_mode)  # safetensors lets only their owner read them
    folders = [path for path in temporary.rglob("*") if path.is_dir()]
    for path in [*files, temporary / "meta.json", *folders, temporary]:
        flush(path)
    aside = final.with_name(f".{final.name}{ASIDE}")
    if final.exists():  # it was damaged, or training has gone back behind it
        os.replace(final, aside)
    os.replace(temporary, final)
    flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def put_back(run: Path) -> None:
    """Give the step folders that were put aside, for one that was then not published, their names
    again."""
    for aside in run.glob(f".step-*{ASIDE}"):
        final = aside.with_name(aside.name.removeprefix(".").removesuffix(ASIDE))
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, final)


# --- reading --------------------------------------------------------------------------------------


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Anything but safetensors, such as a pickle, is refused."""
    try:
        yield
    except SafetensorError as problem:
        raise UserError(f"{file} does not hold valid safetensors: {brief(problem)}") from None


def open_weights(checkpoint: Checkpoint) -> Weights:
    """The saved weights, verified when the first tensor is read."""
    file = checkpoint.path / WEIGHTS
    with reading(file):
        return lazy.in_file(file, partial(checkpoint.verify, WEIGHTS))


def read_weights(
    checkpoint: Checkpoint,
    shapes: dict[str, tuple[int, ...]],
    trunk: Mapping[str, torch.Tensor] | None = None,
) -> Weights:
    """The saved weights for a model of these shapes. Every name and shape must be the same, or
    UserError names one that is not. trunk: where adapted matrices begin, see `lora.unmerged`."""
    weights = open_weights(checkpoint)
    found = weights.shapes
    wanted = {name: shape for name, shape in shapes.items() if not lora.is_factor(name)}
    names = sorted(wanted.keys() | found.keys())
    wrong = [name for name in names if wanted.get(name) != found.get(name)]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"the weights in {checkpoint.path} do not fit this model: {len(wrong)} tensors differ, "
            f"for example {first} is {found.get(first, 'absent')} in the file and "
            f"{wanted.get(first, 'absent')} in the model"
        )
    return lora.unmerged(weights, shapes, trunk)


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put the saved weights into a plain model."""
    weights = read_weights(checkpoint, shapes_of(model))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


def all_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def verify_state(checkpoint: Checkpoint, world: World) -> None:
    """UserError, in the process that finds it, if the optimizer state is damaged. The processes
    divide its files among themselves, whoever needs which of them."""
    names = sorted(name for name in checkpoint.meta["files"] if name.startswith("state/"))
    checkpoint.verify(*names[world.rank :: world.size])


def load_optimizers(checkpoint: Checkpoint, strategy: Single, optimizers: list[Optimizer]) -> None:
    """Put the saved state into the optimizers, whatever the number of processes that wrote it."""
    from smallgpt.runs import state  # half a second of imports

    folder = checkpoint.path / "state"
    if not folder.is_dir():
        raise UserError(
            f"{checkpoint.path} was published without the optimizers' state: begin another run "
            f"with init_from={checkpoint.run} and a run= of its own"
        )
    with reading(folder):
        saved = state.saved_tensors(folder)
    keys_of: dict[str, list[str]] = {}  # parameter name -> its state names
    for full_name in saved:
        name, _, key = full_name.rpartition("/")
        keys_of.setdefault(name, []).append(key)
    names = strategy.names()
    name_of = {p: name for name, p in names.items()}
    elsewhere = strategy.shapes.keys() - names.keys()  # parameters of other processes only
    mine = {name for name in saved if name.rpartition("/")[0] not in elsewhere}
    targets: dict[str, torch.Tensor] = {}
    stateless = set()
    for optimizer in optimizers:
        for p in all_parameters(optimizer):
            name = name_of[p]
            for key in keys_of.get(name, []):
                like = saved[f"{name}/{key}"]
                if like.shape == p.shape:  # else it is one number, or one of each row
                    like = p  # which may be cut
                empty = torch.zeros_like(like, device=p.device)
                optimizer.state[p][key] = empty
                targets[f"{name}/{key}"] = empty
            if saved and name not in keys_of:  # nothing is saved before float16 has found its scale
                stateless.add(name)
    differs = bool(stateless) or targets.keys() != mine
    if strategy.world.sum(differs)[0]:  # a process may hold other parameters than the next
        raise UserError(
            f"the optimizer state in {checkpoint.path} belongs to another optimizer or "
            "other parameters"
        )
    verify_state(checkpoint, strategy.world)
    with reading(folder):
        state.load(targets, folder)
    with torch.no_grad():
        for optimizer in optimizers:
            for p, kept in optimizer.state.items():
                if VALUE in kept:
                    p.copy_(kept.pop(VALUE))


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of weights by name: whether two are the same, wherever they lie. They are read one
    after the other."""
    found = hashlib.blake2b(digest_size=12)
    for name in sorted(weights):
        content = weights[name].cpu().flatten().view(torch.uint8)
        found.update(name.encode())
        found.update(content.numpy())
    return found.hexdigest()


def model_config(fields: dict, where: Path | str) -> GPTConfig:
    """The shape of a model that was read from `where`. UserError if it is not valid."""
    try:
        config = GPTConfig(**fields)
    except TypeError as problem:
        raise UserError(
            f"{where} is of another kind, or another version of this program: {problem}"
        ) from None
    problems = config.check()
    if problems:
        raise UserError(f"the model settings in {where} are not valid: {'; '.join(problems)}")
    return config


def tokenizer_of(found: Checkpoint) -> Tokenizer:
    """The tokenizer saved with a checkpoint. UserError if it is not the one the model was trained
    with."""
    file = found.run / "tokenizer.json"
    tokenizer = Tokenizer.load(file)
    if tokenizer.hash != found.meta["tokenizer"]:
        raise UserError(f"{file} is not the tokenizer that {found.path} was trained with")
    return tokenizer
