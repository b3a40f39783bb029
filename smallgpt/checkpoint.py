"""Checkpoints: self-contained step folders, written atomically, read without unpickling anything.

    checkpoints/<run>/step-00001000/model.safetensors   full weights under clean names
                                   /state/*.safetensors  optimizer state, one file per process, reshardable
                                   /meta.json            model config, step, data; written last, lists every file

`state/` is written by torch.distributed.checkpoint through its safetensors storage (the default one pickles). It holds
no random state: the training loop derives all randomness from (seed, step, rank).
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.optim import Optimizer

from smallgpt.dist import World
from smallgpt.runs import FORMAT, Checkpoint, point, prune, required, shape
from smallgpt.settings import UserError
from smallgpt.tokenizer import Tokenizer


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


def flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush a folder
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
            f"{path} is a classifier: use it with python classify.py {path} TEXT, or as a trunk"
        )
    tokenizer = tokenizer_of(found)
    load_weights(found, module := model_class(shape(found.meta["model"], found.path, config_class)))
    return found, module, tokenizer
