"""GPT-2 (Radford et al. 2019) from the files that OpenAI and Hugging Face publish: its form, weights and tokenizer, as
model.GPT and Tokenizer have them. Nothing is unpickled: what torch.save wrote is read with weights_only=True.
"""

import json
import re
import zipfile
from pathlib import Path
from pickle import (
    UnpicklingError,
)  # what torch.load raises when it refuses; nothing here loads a pickle
from typing import Any

import torch
from safetensors.torch import load_file
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str
from torch import Tensor

from smallgpt.console import UserError
from smallgpt.runs import checkpoint
from smallgpt.tokenizer import STAND_INS, Tokenizer, bytes_of, named

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# GPT-2's form, which small-gpt shares. Both normalise with an epsilon of 1e-5, as nn.LayerNorm does unless told.
FORM = {
    "pos": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "qk_norm": False,
    "bias": True,
    "tie_weights": True,
}
# What a config.json may say of the form; the first value is what Hugging Face takes where it says nothing.
GPT2_FORM = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
NAMES = {  # theirs -> ours; first GPT-2's, then small-gpt's
    "wte": "wte",
    "wpe": "wpe",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "ln_f": "norm",
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc",
    "mlp.c_proj": "mlp.proj",
    "ln1": "norm1",
    "ln2": "norm2",
    "attention.W_q": "attn.q",
    "attention.W_k": "attn.k",
    "attention.W_v": "attn.v",
    "attention.out_net": "attn.proj",
    "ffn.dense1": "mlp.fc",
    "ffn.out_net": "mlp.proj",
}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tokenizer]:
    """GPTConfig's fields, float32 weights by the names of model.GPT, and the tokenizer of a folder as transformers
    saves it, of a GPT-2 with any head or none. UserError naming what is missing, damaged or of another form."""
    file = next((folder / f for f in WEIGHTS if (folder / f).is_file()), None)
    if not file:
        raise UserError(
            f"{folder} has a config.json but no weights: put {' or '.join(WEIGHTS)} there"
        )
    fields = _fields(folder / "config.json")
    with checkpoint.reading(file):
        weights = renamed(torch_load(file) if file.suffix == ".bin" else load_file(file))
    for key, w in list(weights.items()):
        if re.search(r"(qkv|proj|fc)\.weight$", key):  # Conv1D keeps its matrix as (in, out)
            w = weights[key] = w.t().contiguous()
        if "qkv" in key:
            del weights[key]
            weights |= {
                key.replace("qkv", x): part
                for x, part in zip("qkv", w.tensor_split(3), strict=True)
            }
    fit(weights, fields, file)
    tokenizer = tokenizer_of(folder)
    if (
        rows := fields["vocab_size"]
    ) != tokenizer.bos:  # the first of our special tokens follows all of theirs
        raise UserError(
            f"{folder}: the tokenizer files make {tokenizer.bos} tokens, the weights have {rows} rows"
        )
    return fields, weights, tokenizer


def _fields(file: Path) -> dict[str, Any]:
    """GPTConfig's fields, from config.json; UserError naming what model.GPT cannot equal."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        sizes = {
            key: int(config[key])
            for key in ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions")
        }
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file} must be the config of a GPT-2: {type(e).__name__} {e}") from None
    for key, values in (GPT2_FORM | {"n_inner": (None, 4 * sizes["n_embd"])}).items():
        if (value := config.get(key, values[0])) not in values:
            raise UserError(
                f"{file}: {key} is {value!r}; only a GPT-2 with {values[0]!r} can be opened here"
            )
    return FORM | {key.replace("n_positions", "block_size"): size for key, size in sizes.items()}


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """From OpenAI's encoder.json and vocab.bpe; from Hugging Face's vocab.json and merges.txt, the same under other
    names, or tokenizer.json, which holds both; without any of them, GPT-2's own, which tiktoken publishes."""
    folder = Path(folder)
    known = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), ("tokenizer.json",))
    files = next(
        (group for group in known if any((folder / file).exists() for file in group)), None
    )
    if not files:
        return named("gpt2")
    try:
        found, *rest = [(folder / file).read_text(encoding="utf-8") for file in files]
        if rest:
            ids, merges = json.loads(found), rest[0].splitlines()
            merges = merges[1:] if merges[0].startswith("#version") else merges
        else:
            model = json.loads(found)["model"]
            ids, merges = model["vocab"], model["merges"]
        tokens = [*STAND_INS, *("".join(merge).replace(" ", "") for merge in merges)]
        ranks = [bytes_of(token) for token in tokens]
        if ids != {token: i for i, token in enumerate([*tokens, ENDOFTEXT])}:
            raise ValueError("the ids are not in the order of the merges")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise UserError(
            f"{folder} must hold {' and '.join(files)} of a tokenizer like GPT-2's: {e}"
        ) from None
    return Tokenizer("gpt2", r50k_pat_str, ranks, {ENDOFTEXT: len(ranks)})


def torch_load(file: Path) -> dict[str, Any]:
    """What torch.save wrote, if it is a dictionary of tensors and plain values; anything else is refused unexecuted."""
    try:  # mapped into memory, where the format allows: the optimizer's state beside the weights is never read
        return dict(
            torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            ).items()
        )
    except (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError):
        raise UserError(
            f"{file} is damaged, or holds more than tensors, which would not be safe to load"
        ) from None


def renamed(found: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that belong to a trunk, in float32, by our names; masks and heads are left out."""
    weights = {}
    for name, tensor in found.items():
        parts = re.fullmatch(
            r"(?:_orig_mod\.)?(?:transformer\.)?(?:h(\.\d+\.))?(.+)(\.weight|\.bias)", name
        )
        if parts and parts[2] in NAMES and isinstance(tensor, Tensor):
            weights[(f"blocks{parts[1]}" if parts[1] else "") + NAMES[parts[2]] + parts[3]] = (
                tensor.float()
            )
    return weights


def fit(weights: dict[str, Tensor], fields: dict[str, Any], file: Path) -> None:
    """UserError unless these are the weights of a GPT of the form FORM, each with its shape."""
    C = fields["n_embd"]
    shapes = {"norm1": (C,), "norm2": (C,), "mlp.fc": (4 * C, C), "mlp.proj": (C, 4 * C)}
    shapes |= {f"attn.{part}": (C, C) for part in ("q", "k", "v", "proj")}
    shapes = {
        f"blocks.{i}.{part}": s for i in range(fields["n_layer"]) for part, s in shapes.items()
    } | {"norm": (C,)}
    wanted = {"wte.weight": (fields["vocab_size"], C), "wpe.weight": (fields["block_size"], C)}
    wanted |= {f"{part}.weight": shape for part, shape in shapes.items()}
    wanted |= {f"{part}.bias": shape[:1] for part, shape in shapes.items() if fields["bias"]}
    got = {name: tuple(w.shape) for name, w in weights.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise UserError(
                f"{file} is damaged or of another form: {name} is {got.get(name, 'absent')}, and should be "
                f"{wanted.get(name, 'absent')}"
            )
