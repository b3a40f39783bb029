"""Opening a pretrained trunk to fine-tune: a run of train.py, OpenAI's GPT-2, or a checkpoint of CJL196/small-gpt.

All become one thing: the fields of a GPTConfig, float32 weights under the names of model.GPT, and a Tokenizer whose ids
are the rows of those weights. Nothing is unpickled (gpt2.torch_load).
"""

import functools
import glob
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from smallgpt.console import UserError
from smallgpt.runs import checkpoint
from smallgpt.sentiment.sets import ReviewSettings
from smallgpt.tokenizer import BYTES, CHAR_PATTERN, Tokenizer
from smallgpt.weights import gpt2

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")


class Trunk(NamedTuple):
    """A pretrained model. Its tokenizer may have more ids than it has rows: `grow` gives them some."""

    fields: dict[str, Any]  # GPTConfig's; vocab_size = rows of the weights
    weights: dict[
        str, Tensor
    ]  # float32, by the parameter names of model.GPT; no lm_head.weight where it is tied
    tokenizer: Tokenizer
    rows: int  # of the embedding that come from pretraining; ids >= rows are new
    corpora: list[
        str | ReviewSettings
    ]  # text files and labelled sets it was trained on, as far as is known
    name: str  # for reports


def open_trunk(path: str) -> Trunk:
    """The trunk at path: a run folder (its best checkpoint) or step folder, of pretraining or of a classifier; a folder
    with GPT-2's files, or one of gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a small-gpt .pth. UserError if none."""
    place, name = Path(path), path.removeprefix("openai-community/")
    if place.is_file():
        return _small_gpt(place)
    if not place.name.startswith("step-") and any(
        (place / file).is_file() for file in ("config.json", *gpt2.WEIGHTS)
    ):
        return _gpt2(place, path)
    if place.is_dir():
        return _run(path)
    if name not in HUB:
        raise UserError(
            f"there is no trunk {path!r}: give a run folder of train.py, a folder with GPT-2's config.json "
            f"and model.safetensors, a .pth of small-gpt, or one of {', '.join(HUB)}"
        )
    from huggingface_hub import snapshot_download

    try:
        place = Path(snapshot_download(f"openai-community/{name}", allow_patterns=list(HUB_FILES)))
    except (
        Exception
    ) as e:  # of several families, by the version of the hub; the way out is always the same
        raise UserError(
            f"cannot download {name} ({' '.join(str(e).split())[:150]}): put {', '.join(HUB_FILES)} of "
            f"https://huggingface.co/openai-community/{name} in a folder, and give that folder"
        ) from e
    return _gpt2(place, name)


@functools.cache
def digest(path: str) -> str:
    """A hash of the weights that the trunk at path has now; empty if it is there no more."""
    try:
        return checkpoint.digest(open_trunk(path).weights)
    except UserError:
        return ""


def grow(weights: dict[str, Tensor], rows: int, std: float = 0.02) -> dict[str, Tensor]:
    """The weights with rows of normal(0, std) at the end of wte (V, C), and of an untied lm_head, up to `rows`, for new
    tokens. The old rows stay bit for bit; where there are enough, nothing changes."""
    old = [(name, weights[name]) for name in ("wte.weight", "lm_head.weight") if name in weights]
    return weights | {
        name: torch.cat([w, std * torch.randn(max(0, rows - len(w)), w.size(1))]) for name, w in old
    }


def _run(path: str) -> Trunk:
    """A checkpoint of train.py; or of a classifier, which holds a trunk under gpt.*, to go on with."""
    found = checkpoint.required(path)
    tokenizer = checkpoint.tokenizer_of(found)
    with checkpoint.reading(file := found.path / "model.safetensors"):
        weights = {
            name.removeprefix("gpt."): w.float()
            for name, w in load_file(file).items()
            if name != "head.weight"
        }
    fields = found.meta["model"] | {"vocab_size": len(weights["wte.weight"])}
    rows = found.meta.get("head", {}).get(
        "rows", fields["vocab_size"]
    )  # a classifier's trunk may have had fewer
    return Trunk(fields, weights, tokenizer, rows, corpora(path), str(found.path))


def corpora(path: str) -> list[str | ReviewSettings]:
    """Text files, also gone ones, and labelled sets that a run and those it began from were trained on, by their
    config.yaml. What has none, or is gone, ends the search as "the text of" it."""
    found, seen = [], []
    while path and path not in seen:
        seen.append(path)
        place = Path(path)
        if (
            place.suffix == ".pth" and not place.is_dir()
        ):  # of small-gpt, which has its text beside it
            found += _corpus_beside(place) or [f"the text of {path}"]
            break
        try:
            run = place.parent if place.name.startswith("step-") else place
            config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            if config.get("trunk"):  # a setting of another version must not end the search
                found.append(
                    ReviewSettings(
                        **{k: v for k, v in config["data"].items() if hasattr(ReviewSettings, k)}
                    )
                )
            entries = [] if config.get("trunk") else config["data"]["path"] or []
            for entry in entries if isinstance(entries, list) else [entries]:
                pattern = re.sub(
                    r"@[0-9.]+(e[-+]?[0-9]+)?$", "", os.path.expanduser(str(entry))
                )  # @weight
                matches = (
                    [] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
                )
                found += [file for file in matches if os.path.isfile(file)] or [pattern]
        except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError):
            found.append(f"the text of {path}")
            break
        path = config.get("trunk") or config.get("init_from")
    return [corpus for i, corpus in enumerate(found) if corpus not in found[:i]]


def _gpt2(folder: Path, name: str) -> Trunk:
    fields, weights, tokenizer = gpt2.read(folder)
    return Trunk(fields, weights, tokenizer, fields["vocab_size"], [f"the text of {name}"], name)


def _small_gpt(file: Path) -> Trunk:
    """A checkpoint of https://github.com/CJL196/small-gpt (cpt90M.pth, cpt300M.pth).

    Its model is GPT-2's (pre-norm, learned positions, tied head) with `bias` everywhere or nowhere, but for one thing:
    its GELU is the exact one, ours the tanh form, which is at most 5e-4 away from it."""
    found, keys = (
        gpt2.torch_load(file),
        ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias"),
    )
    if missing := [key for key in ("state_dict", *keys) if key not in found]:
        raise UserError(
            f"{file} is no checkpoint of small-gpt, it has no {missing[0]} (of a GPT-2 give the folder)"
        )
    fields = gpt2.FORM | {key: found[key] for key in keys}
    gpt2.fit(weights := gpt2.renamed(found["state_dict"]), fields, file)
    if not (texts := _corpus_beside(file)):
        raise UserError(
            f"{file} has no vocabulary: put the text it was trained on beside it, as train.txt"
        )
    tokenizer = _small_gpt_tokenizer(texts[0], rows := fields["vocab_size"])
    return Trunk(fields, weights, tokenizer, rows, texts, str(file))


def _corpus_beside(file: Path) -> list[str]:
    return [
        str(text)
        for text in (file.parent / "train.txt", file.parent / "corpus.txt")
        if text.is_file()
    ][:1]


def _small_gpt_tokenizer(text: str, rows: int) -> Tokenizer:
    """Its vocabulary with its ids: <unk>, <sep>, <pad>, then the characters of its corpus, most frequent first, of
    equally frequent ones the first to occur. What it lacks (most single bytes, <|bos|>) gets ids after these.

    Another text would silently give each character another's row, so the numbers must agree; small-gpt's need not."""
    counts: Counter[str] = Counter()
    with open(
        text, encoding="utf-8", errors="replace"
    ) as stream:  # what is not UTF-8 gives a wrong number, below
        while chunk := stream.read(1 << 20):
            counts.update(chunk)
    del counts["\n"]  # a line ends with <sep>, an empty line separates dialogues
    ranks = [b"", b"", b"", *(c.encode("utf-8") for c, _ in counts.most_common())]
    if len(ranks) != rows:
        raise UserError(
            f"{text} is not what the checkpoint beside it was trained on: it has "
            f"{len(ranks) - 3} different characters and should have {rows - 3}"
        )
    return Tokenizer(
        "char", CHAR_PATTERN, ranks + sorted(set(BYTES) - set(ranks)), {"<|sep|>": 1, "<|pad|>": 2}
    )
