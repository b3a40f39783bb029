"""Opening a pretrained trunk to fine-tune: a run of train.py, OpenAI's GPT-2, or a checkpoint of CJL196/small-gpt.

All become one thing: the fields of a GPTConfig, float32 weights under the names of model.GPT, and a Tokenizer whose ids
are the rows of those weights. Nothing is unpickled: .pth and .bin files are read with weights_only=True.
"""

import glob
import json
import os
import re
import zipfile
from collections import Counter
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises when it refuses; nothing here loads a pickle
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str
from torch import Tensor

from smallgpt import checkpoint, runs
from smallgpt.sets import ReviewSettings
from smallgpt.settings import UserError
from smallgpt.tokenizer import BYTES, CHAR_PATTERN, STAND_INS, Tokenizer, gpt2_from_files, named

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# GPT-2's form, which small-gpt shares. Both normalise with an epsilon of 1e-5, as nn.LayerNorm does unless told.
FORM = {"pos": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False, "bias": True, "tie_weights": True}
# What a config.json may say of the form; the first value is what Hugging Face takes where it says nothing.
GPT2_FORM = {
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}  # fmt: skip
NAMES = {  # theirs -> ours; first GPT-2's, then small-gpt's
    "wte": "wte", "wpe": "wpe", "ln_1": "norm1", "ln_2": "norm2", "ln_f": "norm", "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.proj", "ln1": "norm1", "ln2": "norm2",
    "attention.W_q": "attn.q", "attention.W_k": "attn.k", "attention.W_v": "attn.v",
    "attention.out_net": "attn.proj", "ffn.dense1": "mlp.fc", "ffn.out_net": "mlp.proj",
}  # fmt: skip


class Trunk(NamedTuple):
    """A pretrained model. Its tokenizer may have more ids than it has rows: `grow` gives them some."""

    fields: dict[str, Any]  # GPTConfig's; vocab_size = rows of the weights
    weights: dict[str, Tensor]  # float32, by the parameter names of model.GPT; no lm_head.weight where it is tied
    tokenizer: Tokenizer
    rows: int  # of the embedding that come from pretraining; ids >= rows are new
    corpora: list[str | ReviewSettings]  # text files and labelled sets it was trained on, as far as is known
    name: str  # for reports


def open_trunk(path: str) -> Trunk:
    """The trunk at path: a run folder (its best checkpoint) or step folder, of pretraining or of a classifier; a folder
    with GPT-2's files, or one of gpt2, gpt2-medium, gpt2-large, gpt2-xl; or a small-gpt .pth. UserError if none."""
    place, name = Path(path), path.removeprefix("openai-community/")
    if place.is_file():
        return _small_gpt(place)
    if not place.name.startswith("step-") and any((place / file).is_file() for file in ("config.json", *WEIGHTS)):
        return _gpt2(place, path)
    if place.is_dir():
        return _run(path)
    if name not in HUB:
        raise UserError(f"there is no trunk {path!r}: give a run folder of train.py, a folder with GPT-2's config.json "
                        f"and model.safetensors, a .pth of small-gpt, or one of {', '.join(HUB)}")  # fmt: skip
    from huggingface_hub import snapshot_download

    try:
        place = Path(snapshot_download(f"openai-community/{name}", allow_patterns=list(HUB_FILES)))
    except Exception as e:  # of several families, by the version of the hub; the way out is always the same
        raise UserError(f"cannot download {name} ({' '.join(str(e).split())[:150]}): put {', '.join(HUB_FILES)} of "
                        f"https://huggingface.co/openai-community/{name} in a folder, and give that folder") from e
    return _gpt2(place, name)


def grow(weights: dict[str, Tensor], rows: int, std: float = 0.02) -> dict[str, Tensor]:
    """The weights with rows of normal(0, std) at the end of wte (V, C), and of an untied lm_head, up to `rows`, for new
    tokens. The old rows stay bit for bit; where there are enough, nothing changes."""
    old = [(name, weights[name]) for name in ("wte.weight", "lm_head.weight") if name in weights]
    return weights | {name: torch.cat([w, std * torch.randn(max(0, rows - len(w)), w.size(1))]) for name, w in old}


def _run(path: str) -> Trunk:
    """A checkpoint of train.py; or of a classifier, which holds a trunk under gpt.*, to go on with."""
    found = runs.required(path)
    tokenizer = checkpoint.tokenizer_of(found)
    with checkpoint.reading(file := found.path / "model.safetensors"):
        weights = {name.removeprefix("gpt."): w.float() for name, w in load_file(file).items() if name != "head.weight"}
    fields = found.meta["model"] | {"vocab_size": len(weights["wte.weight"])}
    rows = found.meta.get("head", {}).get("rows", fields["vocab_size"])  # a classifier's trunk may have had fewer
    return Trunk(fields, weights, tokenizer, rows, corpora(path), str(found.path))


def corpora(path: str) -> list[str | ReviewSettings]:
    """Text files, also gone ones, and labelled sets that a run and those it began from were trained on, by their
    config.yaml. What has none, or is gone, ends the search as "the text of" it."""
    found, seen = [], []
    while path and path not in seen:
        seen.append(path)
        place = Path(path)
        try:
            run = place.parent if place.name.startswith("step-") else place
            config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            if config.get("trunk"):  # a setting of another version must not end the search
                found.append(ReviewSettings(**{k: v for k, v in config["data"].items() if hasattr(ReviewSettings, k)}))
            entries = [] if config.get("trunk") else config["data"]["path"] or []
            for entry in entries if isinstance(entries, list) else [entries]:
                pattern = re.sub(r"@[0-9.]+(e[-+]?[0-9]+)?$", "", os.path.expanduser(str(entry)))  # @weight
                matches = [] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
                found += [file for file in matches if os.path.isfile(file)] or [pattern]
        except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError):
            found += (_corpus_beside(place) if place.suffix == ".pth" else []) or [f"the text of {path}"]
            break
        path = config.get("trunk") or config.get("init_from")
    return [corpus for i, corpus in enumerate(found) if corpus not in found[:i]]


def _gpt2(folder: Path, name: str) -> Trunk:
    """GPT-2 (Radford et al. 2019) as Hugging Face's transformers saves it, with any head or none."""
    file = next((folder / f for f in WEIGHTS if (folder / f).is_file()), None)
    if not file:
        raise UserError(f"{folder} has a config.json but no weights: put {' or '.join(WEIGHTS)} there")
    fields = _gpt2_fields(folder / "config.json")
    with checkpoint.reading(file):
        weights = _renamed(_torch_load(file) if file.suffix == ".bin" else load_file(file))
    for key, w in list(weights.items()):
        if re.search(r"(qkv|proj|fc)\.weight$", key):  # Conv1D keeps its matrix as (in, out)
            w = weights[key] = w.t().contiguous()
        if "qkv" in key:
            del weights[key]
            weights |= {key.replace("qkv", x): part for x, part in zip("qkv", w.tensor_split(3), strict=True)}
    _fit(weights, fields, file)
    tokenizer = _gpt2_tokenizer(folder)
    if (rows := fields["vocab_size"]) != tokenizer.bos:  # the first of our special tokens follows all of theirs
        raise UserError(f"{folder}: the tokenizer files make {tokenizer.bos} tokens, the weights have {rows} rows")
    return Trunk(fields, weights, tokenizer, rows, [f"the text of {name}"], name)


def _gpt2_fields(file: Path) -> dict[str, Any]:
    """GPTConfig's fields, from config.json; UserError naming what model.GPT cannot equal."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        sizes = {key: int(config[key]) for key in ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions")}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file} must be the config of a GPT-2: {type(e).__name__} {e}") from None
    for key, values in (GPT2_FORM | {"n_inner": (None, 4 * sizes["n_embd"])}).items():
        if (value := config.get(key, values[0])) not in values:
            raise UserError(f"{file}: {key} is {value!r}; only a GPT-2 with {values[0]!r} can be opened here")
    return FORM | {key.replace("n_positions", "block_size"): size for key, size in sizes.items()}


def _gpt2_tokenizer(folder: Path) -> Tokenizer:
    """From OpenAI's vocab.bpe and encoder.json; from Hugging Face's merges.txt and vocab.json, the same under other
    names, or tokenizer.json, which holds both; without any of them, GPT-2's own."""
    there = {file.name for file in folder.iterdir()}
    if there & {"vocab.bpe", "encoder.json"}:
        return gpt2_from_files(folder)
    try:
        if there & {"vocab.json", "merges.txt"}:
            ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = merges[1:] if merges[0].startswith("#version") else merges
        elif "tokenizer.json" in there:
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            ids, merges = model["vocab"], model["merges"]
        else:
            return named("gpt2")
        tokens = [*STAND_INS, *("".join(merge).replace(" ", "") for merge in merges)]
        ranks = [bytes(STAND_INS[c] for c in token) for token in tokens]
        if ids != {token: i for i, token in enumerate([*tokens, ENDOFTEXT])}:
            raise ValueError("the ids are not in the order of the merges")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise UserError(f"{folder} must hold vocab.json and merges.txt of a tokenizer like GPT-2's: {e}") from None
    return Tokenizer("gpt2", r50k_pat_str, ranks, {ENDOFTEXT: len(ranks)})


def _small_gpt(file: Path) -> Trunk:
    """A checkpoint of https://github.com/CJL196/small-gpt (cpt90M.pth, cpt300M.pth).

    Its model is GPT-2's (pre-norm, learned positions, tied head) with `bias` everywhere or nowhere, but for one thing:
    its GELU is the exact one, ours the tanh form, which is at most 5e-4 away from it."""
    found, keys = _torch_load(file), ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
    if missing := [key for key in ("state_dict", *keys) if key not in found]:
        raise UserError(f"{file} is no checkpoint of small-gpt, it has no {missing[0]} (of a GPT-2 give the folder)")
    fields = FORM | {key: found[key] for key in keys}
    _fit(weights := _renamed(found["state_dict"]), fields, file)
    if not (texts := _corpus_beside(file)):
        raise UserError(f"{file} has no vocabulary: put the text it was trained on beside it, as train.txt")
    tokenizer = _small_gpt_tokenizer(texts[0], rows := fields["vocab_size"])
    return Trunk(fields, weights, tokenizer, rows, texts, str(file))


def _corpus_beside(file: Path) -> list[str]:
    return [str(text) for text in (file.parent / "train.txt", file.parent / "corpus.txt") if text.is_file()][:1]


def _small_gpt_tokenizer(text: str, rows: int) -> Tokenizer:
    """Its vocabulary with its ids: <unk>, <sep>, <pad>, then the characters of its corpus, most frequent first, of
    equally frequent ones the first to occur. What it lacks (most single bytes, <|bos|>) gets ids after these.

    Another text would silently give each character another's row, so the numbers must agree; small-gpt's need not."""
    counts: Counter[str] = Counter()
    with open(text, encoding="utf-8", errors="replace") as stream:  # what is not UTF-8 gives a wrong number, below
        while chunk := stream.read(1 << 20):
            counts.update(chunk)
    del counts["\n"]  # a line ends with <sep>, an empty line separates dialogues
    ranks = [b"", b"", b"", *(c.encode("utf-8") for c, _ in counts.most_common())]
    if len(ranks) != rows:
        raise UserError(f"{text} is not what the checkpoint beside it was trained on: it has "
                        f"{len(ranks) - 3} different characters and should have {rows - 3}")  # fmt: skip
    return Tokenizer("char", CHAR_PATTERN, ranks + sorted(set(BYTES) - set(ranks)), {"<|sep|>": 1, "<|pad|>": 2})


def _torch_load(file: Path) -> dict[str, Any]:
    """What torch.save wrote, if it is a dictionary of tensors and plain values; anything else is refused unexecuted."""
    try:  # mapped into memory, where the format allows: the optimizer's state beside the weights is never read
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)).items())
    except (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError):
        raise UserError(f"{file} is damaged, or holds more than tensors, which would not be safe to load") from None


def _renamed(found: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that belong to a trunk, in float32, by our names; masks and heads are left out."""
    weights = {}
    for name, tensor in found.items():
        parts = re.fullmatch(r"(?:_orig_mod\.)?(?:transformer\.)?(?:h(\.\d+\.))?(.+)(\.weight|\.bias)", name)
        if parts and parts[2] in NAMES and isinstance(tensor, Tensor):
            weights[(f"blocks{parts[1]}" if parts[1] else "") + NAMES[parts[2]] + parts[3]] = tensor.float()
    return weights


def _fit(weights: dict[str, Tensor], fields: dict[str, Any], file: Path) -> None:
    """UserError unless these are the weights of a GPT of the form FORM, each with its shape."""
    C = fields["n_embd"]
    shapes = {"norm1": (C,), "norm2": (C,), "mlp.fc": (4 * C, C), "mlp.proj": (C, 4 * C)}
    shapes |= {f"attn.{part}": (C, C) for part in ("q", "k", "v", "proj")}
    shapes = {f"blocks.{i}.{part}": s for i in range(fields["n_layer"]) for part, s in shapes.items()} | {"norm": (C,)}
    wanted = {"wte.weight": (fields["vocab_size"], C), "wpe.weight": (fields["block_size"], C)}
    wanted |= {f"{part}.weight": shape for part, shape in shapes.items()}
    wanted |= {f"{part}.bias": shape[:1] for part, shape in shapes.items() if fields["bias"]}
    got = {name: tuple(w.shape) for name, w in weights.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise UserError(f"{file} is damaged or of another form: {name} is {got.get(name, 'absent')}, and should be "
                            f"{wanted.get(name, 'absent')}")  # fmt: skip
