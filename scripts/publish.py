"""Make a folder to hand on of a run's best checkpoint: bf16 weights, and a model card.

    python scripts/publish.py checkpoints/bilingual to=checkpoints/base card=docs/base.md

The folder can be talked to, fine-tuned and gone on from (init_from=), and takes a fifth of a step
folder's bytes: it has no state of the optimizers. README.md, the card, is the page card= and behind
it what the run recorded. Sources are named as they are seen from here.
"""

import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

import torch
from safetensors.torch import save_file

from smallgpt import console, files, settings
from smallgpt.console import UserError
from smallgpt.runs import checkpoint, metrics
from smallgpt.runs.checkpoint import Checkpoint

LEFT_OUT = ("format", "files", "crc32", "scaler")  # of meta.json; publish writes the first three


@dataclass
class PublishSettings:
    to: str = ""  # folder to write; it must not be there yet
    card: str = ""  # a page in Markdown that begins the model card


def main() -> None:
    runs, words = settings.split_words(sys.argv[1:])
    s = settings.load(PublishSettings, words, doc=__doc__)
    if len(runs) != 1 or not s.to:
        raise UserError(
            "give one run and to=FOLDER: scripts/publish.py checkpoints/<run> to=FOLDER"
        )
    to = Path(s.to)
    if to.exists():
        raise UserError(f"{to} is there already: delete it, or choose another folder with to=")
    found = checkpoint.required(runs[0])
    page = read_page(Path(s.card)) if s.card else f"# {to.name}\n"
    publish(found, to, f"{page}\n{recorded(found)}")
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    print(f"{to}: step {found.step} of {found.run}, {size / 1e6:.1f} MB")


def read_page(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as problem:
        raise UserError(f"cannot read card={path}: {problem.strerror}") from None


def publish(found: Checkpoint, to: Path, card: str) -> None:
    """Write the folder whole, or not at all."""
    tokenizer = checkpoint.tokenizer_of(found)
    making = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)  # of an interrupted call
    step = checkpoint.step_folder(making, found.step)
    temporary = step.with_suffix(".tmp")
    temporary.mkdir(parents=True)
    halved = {}
    for name, weight in checkpoint.open_weights(found).items():
        halved[name] = weight.to(torch.bfloat16)
    file = temporary / checkpoint.WEIGHTS
    save_file(halved, file)
    meta = {key: value for key, value in found.meta.items() if key not in LEFT_OUT}
    meta["sources"] = [seen_from_here(source) for source in found.sources]
    meta["scaler"] = {}
    meta["crc32"] = {checkpoint.WEIGHTS: files.checksum(file)}
    checkpoint.publish(temporary, step, meta)
    checkpoint.point(making, "best", found.step)
    tokenizer.save(making / "tokenizer.json")
    shutil.copyfile(found.run / "config.yaml", making / "config.yaml")
    (making / "README.md").write_text(card, encoding="utf-8")
    os.replace(making, to)


def seen_from_here(source: dict) -> dict:
    """A source whose path holds for whoever stands in the same folder of another machine."""
    if source["kind"] != "text":
        return source
    path = Path(source["path"])
    here = Path.cwd()
    nearer = path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name
    return {**source, "path": nearer}


# -- the card --------------------------------------------------------------------------------------


def recorded(found: Checkpoint) -> str:
    """What the run recorded, in Markdown."""
    shape = checkpoint.model_config(found.meta["model"], found.path)
    weights = checkpoint.open_weights(found).shapes
    parameters = sum(map(math.prod, weights.values()))
    rows = {
        "parameters": f"{parameters:,}, bf16",
        "shape": f"{shape.n_layer} layers, {shape.n_embd} wide, {shape.n_head} heads, "
        f"context {shape.block_size} tokens, vocabulary {shape.vocab_size:,}",
        "tokens read": f"{found.meta['tokens']:,}",
        "time": f"{found.meta['seconds'] / 3600:.2f} hours",
        "held-out bits per byte": held_out_bits(found),
        "trained with": f"torch {found.meta['versions']['torch']}, settings in config.yaml",
    }
    lines = ["## What the run recorded", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "| source | passes an epoch | sha256 |", "|---|---|---|"]
    for source in map(seen_from_here, found.sources):
        name = source.get("path") or source.get("name", source["kind"])
        sha256 = source.get("sha256", "")
        lines.append(f"| {name} | {source.get('weight', '')} | {sha256} |")
    return "\n".join([*lines, ""])


def held_out_bits(found: Checkpoint) -> str:
    """At the step of the checkpoint, as training measured it."""
    for record in metrics.read(found.run, "val"):
        if record["step"] == found.step:
            return f"{record['bits_per_byte']:.4f}"
    return "not measured at this step"


if __name__ == "__main__":
    console.run(main)
