"""A run of this project as a folder that other programs read.

    open_source        a run or step folder -> Source: model, tokenizer, what the run recorded
    new_folder         a folder that appears whole or not at all
    write_tokenizer    the files that transformers' tokenizers read

What each format has of its own is in export_hf.py, export_gguf.py and export_onnx.py.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model import GPT, GPTClassifier, GPTConfig
from smallgpt import turns
from smallgpt.console import UserError
from smallgpt.files import flush
from smallgpt.runs import checkpoint
from smallgpt.runs.checkpoint import Checkpoint
from smallgpt.tokenizer import Tokenizer
from smallgpt.weights.export_tokenizer import tokenizer_config, tokenizer_json
from smallgpt.weights.pretrained import model_of


@dataclass
class Source:
    """What is exported: the best (or the given) checkpoint of a run."""

    found: Checkpoint
    model: GPT | GPTClassifier  # in float32 on the CPU, without dropout
    tokenizer: Tokenizer
    head: dict[str, Any] | None  # of a classifier, as its run recorded it

    @property
    def config(self) -> GPTConfig:
        gpt = self.model.gpt if self.head else self.model
        return gpt.config

    @property
    def longest(self) -> int:
        """The longest text, in tokens."""
        return self.head["block_size"] if self.head else self.config.block_size

    @property
    def ends(self) -> list[int]:
        """The tokens that end a reply."""
        return sorted(turns.of(self.tokenizer).ends)

    @property
    def silent(self) -> list[int]:
        """The ids that no reply may hold: they stand for no text, or only round the vocabulary
        up."""
        beyond = range(self.tokenizer.vocab_size, self.config.vocab_size)
        return [*turns.of(self.tokenizer).silent, *beyond]

    def weights(self) -> dict[str, Tensor]:
        """By the names of model.GPT; and head.weight of a classifier, which has no use for the LM
        head."""
        found = {}
        for name, weight in self.model.named_parameters():
            name = name.removeprefix("gpt.")
            if not (self.head and name == "lm_head.weight"):
                found[name] = weight.detach()
        return found


def open_source(path: str) -> Source:
    """The checkpoint at path. UserError if there is none."""
    found = checkpoint.required(path)
    head = found.meta.get("head")
    if head and head.get("scale") is not None:
        raise UserError(f"{path} foretells a number: only classifiers of labels can be exported")
    model, tokenizer = model_of(found)
    return Source(found, model.float().eval(), tokenizer, head)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all is written. UserError if there is
    something at `out` already."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already: delete it, or give another folder as out=")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        usual_mode = usual_mode_in(temporary)
        for file in temporary.iterdir():
            file.chmod(usual_mode)  # safetensors lets only their owner read them
            flush(file)
        temporary.chmod(usual_mode | (usual_mode & 0o444) >> 2)  # who may read it may enter it
        flush(temporary)
        os.replace(temporary, out)
        flush(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def usual_mode_in(folder: Path) -> int:
    """The mode that a new file gets from the user's umask."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def write_json(file: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def write_tokenizer(source: Source, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    is_classifier = source.head is not None
    has_prefix = bool(source.head["prefix"]) if source.head else True
    content = tokenizer_json(source.tokenizer, has_prefix, strips=is_classifier)
    write_json(folder / "tokenizer.json", content, indent=None)
    config = tokenizer_config(source.longest, is_classifier)
    write_json(folder / "tokenizer_config.json", config)


def require(*packages: str) -> None:
    """UserError unless these packages are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} is missing: pip install {' '.join(missing)} "
            "(or all that exports need: pip install '.[export]')"
        )
