"""GPT-2 (Radford et al. 2019) from the files that OpenAI and Hugging Face publish.

    read            a folder, as transformers saves it -> GPTConfig, weights, Tokenizer
    read_config     config.json -> GPTConfig
    open_shards     the files of a model -> tensors by their names there
    open_tensors    model.safetensors or pytorch_model.bin -> tensors by the names of the file
    trunk_weights   those tensors by the names of model.GPT, heads and masks left out
    check_shapes    are these the weights of that model? Also asked of runs and of small-gpt
    tokenizer_of    vocab.json and merges.txt, the same under OpenAI's names, or tokenizer.json

A tensor is read when it is asked for, but for those that torch.save wrote in its oldest format.
Nothing is unpickled: what torch.save wrote is read with weights_only=True.
"""

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

# what torch.load raises when it refuses; nothing here loads a pickle
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str
from torch import Tensor

from model import GPTConfig
from smallgpt.console import UserError
from smallgpt.parallel.strategy import shapes_of
from smallgpt.runs import checkpoint, lazy
from smallgpt.runs.lazy import LazyTensor, Weights
from smallgpt.tokenizer import STAND_INS, Tokenizer, bytes_of, named
from smallgpt.weights.export_tokenizer import is_exported, read_exported
from smallgpt.weights.names import GPT2, SMALL_GPT, inverse, rename

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEXES = tuple(f"{name}.index.json" for name in WEIGHTS)  # of weights that are kept in shards

# GPT-2's form, which small-gpt shares. (Of a GPT-2, config.json may name another epsilon than
# LayerNorm's 1e-5, and a head of its own.)
FORM = {
    "pos": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "qk_norm": False,
    "bias": True,
    "tie_weights": True,
}
# What config.json may hold. The first value is what transformers takes where there is none.
GPT2_FORM = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
SIZES = {  # theirs -> ours
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
OURS = inverse(GPT2) | inverse(SMALL_GPT)  # theirs -> ours
CONV1D = ("qkv.weight", "proj.weight", "fc.weight")

TOKENIZER_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("tokenizer.json",))
OTHER_TOKENIZERS = {
    "vocab.txt": "BERT-like",
    "spiece.model": "SentencePiece",
    "tokenizer.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
}
PUBLISHED_ROWS = 50257  # of the tokenizer that OpenAI published with GPT-2
SPECIAL = re.compile(r"<.+>|\[.+\]")  # how a token looks that no merge makes, such as [PAD]


def read(folder: Path) -> tuple[GPTConfig, Weights, Tokenizer]:
    """A folder with a GPT-2 with any head or none, as transformers saves it.

    The weights are float32, by the names of model.GPT. UserError names what is missing, damaged
    or of another form."""
    config, weights = read_model(folder)
    return config, weights, tokenizer_of(folder, config.vocab_size)


def read_model(folder: Path) -> tuple[GPTConfig, Weights]:
    """The model of a folder without its tokenizer."""
    source, files = weight_files(folder)
    config_file = folder / "config.json"
    config = read_config(config_file)
    tensors = open_shards(files)
    weights = from_conv1d(trunk_weights(Weights(tensors)))
    if "lm_head.weight" in tensors and not config.tie_weights:
        weights.tensors["lm_head.weight"] = tensors["lm_head.weight"].then(Tensor.float)
    rows, *_ = weights.shapes.get("wte.weight", (0,))
    if rows and rows != config.vocab_size:
        raise UserError(
            f"{config_file} has vocab_size {config.vocab_size}, and the embedding in {source} has "
            f"{rows} rows: take both files from the same model, or set vocab_size to {rows}"
        )
    check_shapes(weights.shapes, config, source)
    return config, weights


# --- config.json ----------------------------------------------------------------------------------


def check_fields(config: dict[str, Any], form: Mapping[str, tuple], file: Path, kind: str) -> None:
    """UserError where a field of config.json has no value of those that a form accepts. A field
    that is missing has the first one."""
    for field, accepted in form.items():
        value = config.get(field, accepted[0])
        if value not in accepted:
            raise UserError(
                f"{file}: {field} is {value!r}; only a {kind} with {accepted[0]!r} can be opened "
                "here"
            )


def read_config(file: Path) -> GPTConfig:
    """config.json as a GPTConfig. UserError names the field that model.GPT cannot equal."""
    if not file.is_file():
        raise UserError(f"{file} is missing: put the one there that was saved with the weights")
    config = read_json(file)
    check_fields(config, GPT2_FORM, file, "GPT-2")
    sizes = read_sizes(config, SIZES, file)
    width = 4 * sizes["n_embd"]
    if config.get("n_inner") not in (None, width):
        raise UserError(
            f"{file}: n_inner is {config['n_inner']!r}; only a GPT-2 with {width}, four times its "
            "n_embd, can be opened here"
        )
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) not in (int, float) or not epsilon > 0:
        raise UserError(
            f"{file}: layer_norm_epsilon is {epsilon!r}, and must be above 0: download it again"
        )
    own = {"norm_eps": epsilon, "tie_weights": bool(config.get("tie_word_embeddings", True))}
    return checkpoint.model_config(FORM | sizes | own, file)


def read_sizes(found: dict[str, Any], table: dict[str, str], file: Path) -> dict[str, int]:
    """The sizes of a model by our names. UserError if one is missing or none."""
    sizes = {}
    for theirs, ours in table.items():
        value = found.get(theirs)
        if type(value) is not int or value < 1:
            raise UserError(
                f"{file} is damaged: {theirs} is {value!r}, and must be a size; download it again"
            )
        sizes[ours] = value
    return sizes


# --- weights --------------------------------------------------------------------------------------


def has_files(folder: Path) -> bool:
    """Is this folder meant to be a GPT-2's?"""
    names = ("config.json", *WEIGHTS, *INDEXES)
    return any((folder / name).is_file() for name in names)


def weight_files(folder: Path) -> tuple[Path, list[Path]]:
    """The file that a message names, and the files with tensors: itself, or the shards it lists."""
    for name, index in zip(WEIGHTS, INDEXES, strict=True):
        if (folder / name).is_file():
            return folder / name, [folder / name]
        if (folder / index).is_file():
            return folder / index, shards(folder / index)
    raise UserError(
        f"{folder} has a config.json but no weights: put {' or '.join(WEIGHTS)} there "
        f"(of weights in shards, all shards and {' or '.join(INDEXES)})"
    )


def shards(index: Path) -> list[Path]:
    """The files that an index lists: {"weight_map": {"wte.weight": "model-00001-of-00002..."}}."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} lists no shards of weights: download it again")
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {', '.join(missing)}, of {len(names)} shards that {index.name} "
            "lists: download what is missing"
        )
    return [index.parent / name for name in names]


def open_shards(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """The tensors of all files of a model, by their names there."""
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors |= open_tensors(file).tensors
    return tensors


def open_tensors(file: Path) -> Weights:
    """What save_file or torch.save wrote, if it is a dictionary of tensors and plain values."""
    if file.suffix != ".safetensors":
        return lazy.in_memory(torch_load(file))
    check_download(file)
    try:
        return lazy.in_file(file)
    except SafetensorError as e:
        raise UserError(
            f"{file} does not hold valid safetensors ({e}): download it again"
        ) from None


def torch_load(file: Path) -> dict[str, Any]:
    """What torch.save wrote. Anything but tensors and plain values is refused unexecuted."""
    check_download(file)
    # mapped into memory, where the format allows: an optimizer beside the weights is never read
    mmap = zipfile.is_zipfile(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        return dict(found.items())
    except (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError):
        raise UserError(
            f"{file} is damaged, or holds more than tensors, which would not be safe to load: "
            "download it again, or take the safetensors of the same model"
        ) from None


def trunk_weights(theirs: Weights) -> Weights:
    """The tensors of a trunk, in float32, by our names; masks and heads are left out."""
    weights = {}
    for their_name, tensor in theirs.tensors.items():
        plain = their_name.removeprefix("_orig_mod.").removeprefix("transformer.")
        name = rename(plain, OURS)
        if name:
            weights[name] = tensor.then(Tensor.float)
    return Weights(weights)


def from_conv1d(weights: Weights) -> Weights:
    """GPT-2's matrices as nn.Linear has them.

    Its Conv1D keeps them as (in, out), nn.Linear as (out, in); and its c_attn is q, k and v in
    one, (3 C, C) once it is transposed, with a bias (3 C,)."""
    linear = {}
    for name, tensor in weights.tensors.items():
        if name.endswith(CONV1D) and tensor.like.dim() == 2:
            tensor = tensor.then(Tensor.t)
        if ".qkv." not in name:
            linear[name] = tensor
            continue
        for number, letter in enumerate("qkv"):
            linear[name.replace("qkv", letter)] = tensor.then(partial(third, number=number))
    return Weights(linear)


def third(w: Tensor, number: int) -> Tensor:
    """q, k or v (C, ...) of all three (3 C, ...)."""
    return w.tensor_split(3)[number]


def check_shapes(found: dict[str, tuple[int, ...]], config: GPTConfig, file: Path) -> None:
    """UserError unless the shapes, of weights in `file`, are all those of GPT(config)."""
    expected = shapes_of(lazy.hollow(config))
    surplus = sorted(found.keys() - expected.keys())
    for name in [*expected, *surplus]:
        is_now, should_be = found.get(name, "absent"), expected.get(name, "absent")
        if is_now != should_be:
            raise UserError(
                f"{file} is damaged or of another form: {name} is {is_now}, and should be "
                f"{should_be}; download it again, or take another model"
            )


# --- tokenizer ------------------------------------------------------------------------------------

# ids of tokens by what they spell, {b"he": 256}; and of those that spell nothing, by name
Vocabulary = tuple[dict[bytes, int], dict[str, int]]


def tokenizer_of(folder: str | Path, rows: int = 0) -> Tokenizer:
    """The tokenizer of a folder; without any files, GPT-2's own, which tiktoken publishes.

    It has at least as many ids as the embedding has rows: those without a token (of [PAD], or of
    a size rounded up) spell nothing. Our own special tokens follow."""
    folder = Path(folder)
    files = tokenizer_files(folder)
    exported = read_exported_tokenizer(files)
    if exported:
        return exported
    if files:
        ids, specials = read_vocabulary(files)
    else:
        ids, specials = published_vocabulary(folder, rows)
    tokens = max([*ids.values(), *specials.values()]) + 1
    if 0 < rows < tokens:
        raise UserError(
            f"{folder}: the tokenizer files make {tokens} tokens, the weights have {rows} rows: "
            "take both from the same model"
        )
    ranks = [b""] * (max(ids.values()) + 1)
    for token, i in ids.items():
        ranks[i] = token
    if rows > tokens:
        ranks += [b""] * (rows - len(ranks))
    return Tokenizer("gpt2", r50k_pat_str, ranks, specials)


def read_exported_tokenizer(files: list[Path]) -> Tokenizer | None:
    """The tokenizer that scripts/export.py wrote; None where another program did."""
    if [file.name for file in files] != ["tokenizer.json"]:
        return None
    content = read_json(files[0])
    if not is_exported(content):
        return None
    try:
        return read_exported(content)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError(
            f"{files[0]} is damaged ({type(e).__name__} {e}): export the model again"
        ) from None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the first form that is there as a whole; none where there is no form at all."""
    problem = ""
    for names in TOKENIZER_FILES:
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return [folder / name for name in names]
        if len(missing) < len(names):
            problem = (
                f"{folder} must hold {' and '.join(names)} of the same model. No such file: "
                f"{', '.join(missing)}"
            )
    if problem:
        raise UserError(problem)
    for name, kind in OTHER_TOKENIZERS.items():
        if (folder / name).is_file():
            raise UserError(
                f"{folder / name} is a {kind} vocabulary, which cannot be read here: a GPT-2 needs "
                "vocab.json and merges.txt; take a model that comes with these"
            )
    return []


def published_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """GPT-2's own, for a folder without a tokenizer. tiktoken downloads it once."""
    advice = "put vocab.json and merges.txt (or tokenizer.json) of its model there"
    if 0 < rows < PUBLISHED_ROWS:
        raise UserError(f"{folder} has no tokenizer: {advice}")
    try:
        encoding = named("gpt2").encoding
    except UserError as e:
        raise UserError(
            f"{folder} has no tokenizer, and GPT-2's own could not be downloaded: {advice}"
        ) from e
    return encoding._mergeable_ranks, {ENDOFTEXT: encoding.eot_token}


def read_vocabulary(files: list[Path]) -> Vocabulary:
    """UserError where the files are damaged, of several models, or no byte-level BPE."""
    try:
        ids, merges = read_merges(files) if len(files) == 2 else read_tokenizer_json(files[0])
        merged = [merge.replace(" ", "") for merge in merges]
        problem = why_unlike_gpt2(ids, merged)
    except (KeyError, TypeError, AttributeError) as e:
        problem = f"it is damaged ({type(e).__name__} {e})"
    if problem:
        raise UserError(
            f"{files[0].parent} must hold {' and '.join(file.name for file in files)} of a "
            f"tokenizer like GPT-2's: {problem}; take the files of one model"
        )
    spelled = {bytes_of(token): ids[token] for token in [*STAND_INS, *merged]}
    specials = {ENDOFTEXT: ids[ENDOFTEXT]} if ENDOFTEXT in ids else {}
    return spelled, specials


def read_merges(files: list[Path]) -> tuple[dict[str, int], list[str]]:
    """vocab.json and merges.txt as ids {"he": 256} and merges ["h e"]."""
    ids = read_json(files[0])
    check_download(files[1])
    lines = files[1].read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    return ids, [line for line in lines if line.strip()]


def read_tokenizer_json(file: Path) -> tuple[dict[str, int], list[str]]:
    """The same of tokenizer.json. UserError if it splits or changes texts as GPT-2's does not."""
    found = read_json(file)
    model = found["model"]
    kind = model.get("type", "BPE")
    splitter = (found.get("pre_tokenizer") or {}).get("type", "ByteLevel")
    normalizer = (found.get("normalizer") or {}).get("type", "none")
    if (kind, splitter, normalizer) != ("BPE", "ByteLevel", "none"):
        raise UserError(
            f"{file} is another kind of tokenizer ({kind}, pre_tokenizer {splitter}, normalizer "
            f"{normalizer}): GPT-2's is BPE, ByteLevel, none; take a model with one like GPT-2's"
        )
    return model["vocab"], merges_of(model)


def merges_of(model: dict[str, Any]) -> list[str]:
    """The merges of a tokenizer.json, which spells each as "h e" or as ["h", "e"]."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def why_unlike_gpt2(ids: dict[str, int], merged: list[str]) -> str:
    """Why these are not the tokens of one byte-level BPE; empty when they are."""
    tokens = set(merged) | STAND_INS.keys()
    for token in [*STAND_INS, *merged]:
        if token not in ids:
            return f"there is no id of the token {token!r}"
        if not set(token) <= STAND_INS.keys():
            return f"the token {token!r} does not spell bytes"
    for token, i in ids.items():
        if type(i) is not int or i < 0:
            return f"{i!r}, the id of the token {token!r}, is none"
        if token not in tokens and not SPECIAL.fullmatch(token):
            return f"no merge makes the token {token!r}"
    if len(set(ids.values())) < len(ids):
        return "two tokens share an id"
    if any(ids[first] >= ids[second] for first, second in pairwise(merged)):
        return "the ids are not in the order of the merges"
    return ""


# --- files of others ------------------------------------------------------------------------------


def check_download(file: Path) -> None:
    """UserError where a file is what a download may leave in the place of the real one."""
    with open(file, "rb") as stream:
        start = stream.read(64).lower()
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}"
        )
    if start.lstrip().startswith((b"<!doctype html", b"<html")):
        raise UserError(
            f"{file} is a web page, not the file itself: download it again (from Hugging Face, "
            "with /resolve/ in the address instead of /blob/)"
        )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, in any Unicode, with a byte order mark or without."""
    check_download(file)
    try:
        found = json.loads(file.read_bytes())
    except ValueError as e:
        raise UserError(f"{file} is damaged ({e}): download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged (it holds no JSON object): download it again")
    return found
