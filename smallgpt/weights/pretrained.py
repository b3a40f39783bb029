"""Opening what was trained before: a run of train.py, a folder of transformers (such as a GPT-2, a
Llama or an export of ours), a GGUF, or a checkpoint of small-gpt.

    open_model      a run -> (Checkpoint, GPT, Tokenizer)
    model_of        a Checkpoint -> its GPT or GPTClassifier, and its Tokenizer
    open_talker     what knows the turns of a dialogue -> (name, GPT, Tokenizer), to talk to
    open_trunk      any of them -> Trunk, to fine-tune
    load_trunk      a Trunk -> a GPT with rows for the token ids that the trunk does not have yet
    digest          a hash of the weights that a trunk has now

A Trunk is the same thing wherever it comes from: the GPTConfig, float32 weights by the names of
model.GPT, and a tokenizer whose ids are the rows of those weights. Opening it reads names and
shapes; a tensor is read when it is asked for. Nothing is unpickled.
"""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPT, GPTClassifier, GPTConfig
from smallgpt import hardware
from smallgpt.console import UserError, shell_word
from smallgpt.files import hash_file
from smallgpt.runs import checkpoint, lazy
from smallgpt.runs.checkpoint import Checkpoint
from smallgpt.runs.lazy import Weights
from smallgpt.tokenizer import BYTES, CHAR_PATTERN, Tokenizer
from smallgpt.weights import gguf, gpt2, hugging_face, llama

OWN = Path("checkpoints/base")  # the model that the repository holds
HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_FILES = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
SMALL_GPT_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")


@dataclass
class Trunk:
    """A pretrained model. Its tokenizer may have more ids than it has rows: `load_trunk` gives them
    some."""

    config: GPTConfig  # vocab_size = rows of the weights
    weights: Mapping[str, Tensor]  # float32; no lm_head.weight where it is tied
    tokenizer: Tokenizer
    rows: int  # of the embedding that come from pretraining; ids >= rows are new
    name: str  # for reports
    sources: list[dict[str, Any]]  # what it was trained on, as sentiment/leaks.py reads it
    notes: list[str] = field(default_factory=list)  # what a report should hold of it
    marks: Tensor | None = None  # of a classifier of pairs: see GPTClassifier


def own_model() -> str:
    """The folder of the model that the repository holds; "" where it is not there."""
    return str(OWN) if OWN.is_dir() else ""


def open_model(path: Path | str) -> tuple[Checkpoint, GPT, Tokenizer]:
    """The best (or the given) checkpoint at path, its model on the CPU, and its tokenizer.

    Path is a run or step folder of train.py; nothing else is needed."""
    found = checkpoint.required(path)
    if "head" in found.meta:
        raise UserError(
            f"{path} is a classifier: use it with "
            f"python scripts/classify.py {shell_word(path)} TEXT, or as a trunk"
        )
    return found, *model_of(found)


def model_of(found: Checkpoint) -> tuple[GPT | GPTClassifier, Tokenizer]:
    """The model of a checkpoint on the CPU, a classifier where it has a head, and its tokenizer."""
    tokenizer = checkpoint.tokenizer_of(found)
    config = checkpoint.model_config(found.meta["model"], found.path)
    head = found.meta.get("head")
    with lazy.SkipInit():
        model: GPT | GPTClassifier = GPT(config)
        if head:
            n_classes = len(head["labels"])
            marks = int(head.get("marks", 0))  # older versions had none, or True
            sep = tokenizer.sep
            model = GPTClassifier(model, n_classes, head["pool"], head["mask"], sep, marks)
    checkpoint.load_weights(found, model)
    return model, tokenizer


def open_trunk(path: str) -> Trunk:
    """The trunk at path. UserError if there is none.

    Path is a run folder (its best checkpoint) or step folder, of pretraining or of a classifier; a
    folder as transformers saves it, of GPT-2, a Llama or another class in forms.py; a GGUF of a
    Llama; smollm2; gpt2, gpt2-medium, gpt2-large or gpt2-xl; or a small-gpt .pth."""
    trunk = _open(path)
    check_memory(trunk)
    return trunk


def _open(path: str) -> Trunk:
    where = Path(path)
    if is_gguf(path):
        file = where if where.exists() else llama.of_package(path)
        return _published(path, *llama.read(file))
    if where.is_file():
        return _open_small_gpt(where)
    if is_of_transformers(where):
        return _published(path, *hugging_face.read(where))
    if where.is_dir():
        return _open_run(path)
    name = path.removeprefix("openai-community/")
    if name in HUB:
        return _published(name, *gpt2.read(_download(name)))
    known = ", ".join([*llama.PACKAGES, *HUB])
    raise UserError(
        f"there is no trunk {path!r}: give a run folder of train.py, a folder with the config.json "
        f"and model.safetensors of a GPT-2 or a Llama, a .gguf, a .pth of small-gpt, or {known}"
    )


def check_memory(trunk: Trunk) -> None:
    """UserError if the weights alone, in float32, are more than this machine's memory."""
    sizes = [tensor.like.numel() for tensor in trunk.weights.tensors.values()]
    need = 4 * sum(sizes)
    memory = hardware.memory()
    if memory and need > memory:
        raise UserError(
            f"{trunk.name} has {sum(sizes) / 1e9:.1f} billion parameters, which take "
            f"{need / 2**30:.1f} GB in float32: this machine has {memory / 2**30:.1f} GB; take a "
            "smaller model"
        )


def open_talker(path: str) -> tuple[str, GPT, Tokenizer]:
    """The name of a model, the model on the CPU, and its tokenizer.

    Path is what `open_model` opens; a Llama: a folder, a GGUF, or smollm2; or an export of ours.
    Tokens that these have never read are rows of zeros."""
    where = Path(path)
    if not is_foreign(path):
        found, model, tokenizer = open_model(path)
        return str(found.path), model, tokenizer
    if hugging_face.is_classifier(where):
        raise UserError(f"{path} is a classifier: use it as a trunk, trunk={shell_word(path)}")
    trunk = open_trunk(path)
    is_ours = trunk.tokenizer.published is None
    if is_ours and trunk.tokenizer.end >= trunk.rows:
        raise UserError(
            f"{path} has not learned to talk in turns, it has no <|sep|> and <|end|>: "
            f"use it as a trunk, trunk={shell_word(path)}"
        )
    rows = max(trunk.rows, trunk.tokenizer.vocab_size)
    with lazy.SkipInit():
        model = GPT(replace(trunk.config, vocab_size=rows))
    load_trunk(model, trunk, std=0.0)
    return trunk.name, model, trunk.tokenizer


def is_foreign(path: str) -> bool:
    """Is this no run of ours, but a GGUF or a folder of transformers?"""
    return is_gguf(path) or is_of_transformers(Path(path))


def is_of_transformers(folder: Path) -> bool:
    """Is this a folder as transformers saves it? That of a step has a model.safetensors, too."""
    is_step = folder.name.startswith("step-") and not (folder / "config.json").is_file()
    return gpt2.has_files(folder) and not is_step


def is_gguf(path: str) -> bool:
    """Is this a GGUF, or the name of one that can be installed?"""
    where = Path(path)
    if where.is_file():
        return gguf.is_gguf(where) or where.suffix == ".gguf"
    return path in llama.PACKAGES and not where.exists()


@functools.cache
def digest(path: str) -> str:
    """A hash of the weights that the trunk at path has now; empty if it is there no more."""
    try:
        return checkpoint.digest(open_trunk(path).weights)
    except UserError:
        return ""


@torch.no_grad()
def load_trunk(gpt: GPT, trunk: Trunk, std: float = 0.02) -> None:
    """Put a trunk's weights into a GPT of its shape that may have more tokens.

    The rows of new tokens, in the embedding and in an untied LM head, are normal(0, std). The old
    ones stay bit for bit."""
    for name, p in gpt.named_parameters():
        weight = trunk.weights[name]
        if weight.shape == p.shape:
            p.copy_(weight)
            continue
        rows = len(weight)
        p[:rows] = weight
        p[rows:] = std * torch.randn(len(p) - rows, *p.shape[1:])


# --- runs of train.py and sentiment_train.py ------------------------------------------------------


def _open_run(path: str) -> Trunk:
    """A checkpoint of train.py; or of a classifier, which keeps its trunk under gpt.*"""
    found = checkpoint.required(path)
    tokenizer = checkpoint.tokenizer_of(found)
    tensors = {}
    for name, tensor in checkpoint.open_weights(found).tensors.items():
        if name != "head.weight":
            tensors[name.removeprefix("gpt.")] = tensor.then(Tensor.float)
    marks = tensors.pop("marks.weight", None)  # of a classifier alone
    weights = Weights(tensors)

    rows = weights.shapes["wte.weight"][0]
    config = checkpoint.model_config(found.meta["model"] | {"vocab_size": rows}, found.path)
    gpt2.check_shapes(weights.shapes, config, found.path / checkpoint.WEIGHTS)
    head = found.meta.get("head", {})
    return Trunk(
        config,
        weights,
        tokenizer,
        rows=head.get("rows", rows),  # a classifier's trunk may have had fewer
        name=str(found.path),
        sources=found.meta.get("sources", [_unknown(path)]),
        marks=marks and marks.read(),
    )


def _unknown(name: str) -> dict[str, Any]:
    """The source of a trunk that does not tell what it was trained on."""
    return {"kind": "unknown", "name": f"the text of {name}"}


# --- models of others -----------------------------------------------------------------------------


def _published(name: str, config: GPTConfig, weights: Weights, tokenizer: Tokenizer) -> Trunk:
    """The trunk of files that do not tell what it was trained on."""
    rows = config.vocab_size
    known = range(min(rows, tokenizer.vocab_size))  # the rows behind them only round up
    textless = sum(not tokenizer.decode([i], specials=True) for i in known)
    notes = []
    if textless:
        notes.append(f"{textless} of the {rows:,} rows of {name} stand for no token")
    return Trunk(config, weights, tokenizer, rows, name, [_unknown(name)], notes)


def _download(name: str) -> Path:
    """The folder of Hugging Face's cache with this GPT-2, downloaded where it is not there."""
    from huggingface_hub import snapshot_download

    repository = f"openai-community/{name}"
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except Exception as e:  # of several families, by the version of the hub; the advice is the same
        reason = " ".join(str(e).split())[:150]
        raise UserError(
            f"cannot download {name} ({reason}): put {', '.join(HUB_FILES)} of "
            f"https://huggingface.co/{repository} in a folder, and give that folder"
        ) from e


# --- CJL196/small-gpt -----------------------------------------------------------------------------


def _open_small_gpt(file: Path) -> Trunk:
    """A checkpoint of https://github.com/CJL196/small-gpt (cpt90M.pth, cpt300M.pth).

    Its model is GPT-2's (pre-norm, learned positions, tied head) with `bias` everywhere or
    nowhere. One thing differs: its GELU is the exact one, ours the tanh form, at most 5e-4 away."""
    if file.suffix not in (".pth", ".pt"):
        raise UserError(
            f"{file} is a file of a model: give the folder that holds it, {file.parent}"
        )
    found = gpt2.torch_load(file)
    for key in ("state_dict", *SMALL_GPT_SIZES):
        if key not in found:
            raise UserError(
                f"{file} is no checkpoint of small-gpt, it has no {key}: of a GPT-2 or a run give "
                "the folder"
            )
    sizes = {key: found[key] for key in SMALL_GPT_SIZES}
    config = checkpoint.model_config(gpt2.FORM | sizes, file)
    weights = gpt2.trunk_weights(lazy.in_memory(found["state_dict"]))
    gpt2.check_shapes(weights.shapes, config, file)

    corpus = _corpus_beside(file)
    tokenizer = _small_gpt_tokenizer(corpus, config.vocab_size)
    source = {
        "kind": "text",
        "path": str(corpus.resolve()),
        "weight": 1.0,
        "sha256": hash_file(corpus),
    }
    return Trunk(config, weights, tokenizer, config.vocab_size, str(file), [source])


def _corpus_beside(file: Path) -> Path:
    """The text that a checkpoint was trained on: its vocabulary is made from it."""
    for name in ("train.txt", "corpus.txt"):
        corpus = file.with_name(name)
        if corpus.is_file():
            gpt2.check_download(corpus)
            return corpus
    raise UserError(
        f"{file} has no vocabulary: put the text it was trained on beside it, as train.txt"
    )


def _small_gpt_tokenizer(corpus: Path, rows: int) -> Tokenizer:
    """Its vocabulary with its ids: <unk>, <sep>, <pad>, then the characters of its corpus.

    The most frequent comes first, of equally frequent ones the first to occur. What it lacks (most
    single bytes, <|bos|>) gets ids after these. With another text each character would silently
    have another's row: so the numbers of characters must agree."""
    counts = _count_characters(corpus)
    del counts["\n"]  # a line ends with <sep>, an empty line separates dialogues
    characters = [character for character, _ in counts.most_common()]
    specials = [b"", b"", b""]  # <unk>, <sep>, <pad>
    if len(specials) + len(characters) != rows:
        raise UserError(
            f"{corpus} is not what the checkpoint beside it was trained on: it has "
            f"{len(characters)} different characters and should have {rows - len(specials)}"
        )
    spelled = [character.encode("utf-8") for character in characters]
    other_bytes = sorted(set(BYTES) - set(spelled))
    ranks = specials + spelled + other_bytes
    return Tokenizer("char", CHAR_PATTERN, ranks, {"<|sep|>": 1, "<|pad|>": 2})


def _count_characters(file: Path) -> Counter[str]:
    """How often each character occurs, in the order of their first occurrence."""
    counts: Counter[str] = Counter()
    # what is not UTF-8 is one character more: the numbers will not agree
    with open(file, encoding="utf-8", errors="replace") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), ""):
            counts.update(chunk)
    return counts
