"""A language model as one file for llama.cpp, ollama and LM Studio.

    write      model.gguf, README.md

The classes are those of transformers (forms.py); llama.cpp has the same under other names. Measured
differences are in docs/export.md: its default cache of half precision alone changes logits by
thousandths.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from smallgpt.console import UserError
from smallgpt.tokenizer import BPE_PATTERN, Tokenizer
from smallgpt.weights import forms, names
from smallgpt.weights.export import Source, require
from smallgpt.weights.export_card import card
from smallgpt.weights.export_tokenizer import CHAT_TEMPLATE, merges, named_once, printed
from smallgpt.weights.forms import Form

USE = """With llama.cpp (its default cache is of half precision; for the exact numbers add
`-ctk f32 -ctv f32 -fa off`):

```
llama-cli -m model.gguf -cnv
llama-server -m model.gguf
```

With ollama: `echo "FROM ./model.gguf" > Modelfile && ollama create mine && ollama run mine`."""

# kinds of a token
NORMAL = 1
CONTROL = 3
UNUSED = 5
BYTE = 6
SPACE = "▁"  # of SentencePiece

# What llama.cpp calls the ways to split a text, by their patterns.
SPLITS = {BPE_PATTERN: "llama-bpe", r50k_pat_str: "gpt-2"}

SIZES = {  # theirs, behind the architecture -> ours
    "context_length": "block_size",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "mlp_size",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "kv_heads",
    "vocab_size": "vocab_size",
}


def write(source: Source, folder: Path) -> None:
    """Write all files of the export. UserError where llama.cpp computes no such model, or where the
    package gguf is missing."""
    if source.head:
        raise UserError(
            "llama.cpp has no classifiers of this kind: export it with to=onnx, which is exact, or "
            "to=hf"
        )
    form = forms.form_of(source.config, forms.LANGUAGE_MODELS)
    split_of(source.tokenizer)
    require("gguf")
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "model.gguf", form.model_type)
    for key, value in facts(source, form).items():
        add(writer, key, value)
    for name, tensor in tensors(source, form):
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = card(source, "gguf", USE, limits(source))
    (folder / "README.md").write_text(text, encoding="utf-8")


def add(writer: Any, key: str, value: Any) -> None:
    """One fact, in the type that llama.cpp wants."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def facts(source: Source, form: Form) -> dict[str, Any]:
    """What the file holds beside the tensors."""
    c = source.config
    found: dict[str, Any] = {
        "general.name": source.found.run.name,
        "general.file_type": 0,  # all float32
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    for theirs, ours in SIZES.items():
        found[f"{form.model_type}.{theirs}"] = getattr(c, ours)
    own = {"attention.layer_norm_epsilon": c.norm_eps or 1e-5}
    if c.pos == "rope":
        own = {
            "attention.layer_norm_rms_epsilon": c.norm_eps or 1e-6,
            "attention.key_length": c.head_size,
            "attention.value_length": c.head_size,
            "rope.dimension_count": c.head_size,
            "rope.freq_base": c.rope_base,
        }
    found |= {f"{form.model_type}.{key}": value for key, value in own.items()}
    for name, value in form.constants.items():  # mlp.act_fn.alpha_p, a number of each block
        (number,) = value if isinstance(value, list) else [value]
        found[f"xielu.{name.rpartition('.')[2]}"] = [number] * c.n_layer
    return found | tokenizer_facts(source.tokenizer, c.vocab_size)


def tensors(source: Source, form: Form) -> Iterator[tuple[str, Tensor]]:
    """The tensors by llama.cpp's names, in float32."""
    c = source.config
    weights = source.weights()
    if form is forms.GPT2:
        weights = forms.as_gpt2(weights, c.n_layer)
    elif c.tie_weights:
        weights["lm_head.weight"] = weights["wte.weight"]  # its apertus wants it
    heads = {"q": c.n_head, "k": c.kv_heads}
    for name, weight in weights.items():
        letter = name.removesuffix(".weight")[-1:]
        if form.model_type in names.PAIRED and f".attn.{letter}." in name and letter in heads:
            weight = names.to_pairs(weight, heads[letter])
        yield names.rename(name, names.GGUF), forms.as_saved(weight)


# --- the tokenizer --------------------------------------------------------------------------------


def tokenizer_facts(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The vocabulary, with a token for each of the rows of the embedding."""
    specials = named_once(tokenizer.encoding._special_tokens)
    spelled = spell_characters(tokenizer) if tokenizer.kind == "char" else spell_bpe(tokenizer)
    tokens = [f"[UNUSED{id}]" for id in range(rows)]
    types = [UNUSED] * rows
    for id, (text, kind) in spelled.items():
        tokens[id] = text
        types[id] = kind
    for name, id in specials.items():
        tokens[id] = name
        types[id] = CONTROL
    found = {
        "tokens": tokens,
        "token_type": types,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.end,
        "eot_token_id": tokenizer.sep,
        "padding_token_id": tokenizer.pad,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    if tokenizer.kind == "char":
        own = {"model": "llama", "scores": [0.0] * rows, "add_space_prefix": False}
    else:
        pairs = [f"{first} {second}" for first, second in merges(tokenizer)]
        own = {"model": "gpt2", "pre": split_of(tokenizer), "merges": pairs}
    return {f"tokenizer.ggml.{key}": value for key, value in (found | own).items()}


def split_of(tokenizer: Tokenizer) -> str:
    """How llama.cpp calls the way in which a text is split. UserError where it has none such."""
    if tokenizer.lowercase:
        raise UserError(
            "llama.cpp does not read all text in small letters, as tokenizer.lowercase=true wants: "
            "export it with to=hf"
        )
    pattern = tokenizer.encoding._pat_str
    if pattern in SPLITS or tokenizer.kind == "char":
        return SPLITS.get(pattern, "")
    raise UserError(
        f"llama.cpp does not split text as tokenizer.kind={tokenizer.kind}: export it with to=hf"
    )


def spell_characters(tokenizer: Tokenizer) -> dict[int, tuple[str, int]]:
    """id -> text and kind, as SentencePiece has them: a space is ▁, any other byte <0x0A>."""
    spelled = {}
    for token, id in tokenizer.encoding._mergeable_ranks.items():
        if token == b" ":
            spelled[id] = SPACE, NORMAL
        elif token.decode("utf-8", "replace") == SPACE:
            continue  # it is taken
        elif len(token) == 1:
            spelled[id] = f"<0x{token[0]:02X}>", BYTE
        else:
            spelled[id] = token.decode("utf-8"), NORMAL
    return spelled


def spell_bpe(tokenizer: Tokenizer) -> dict[int, tuple[str, int]]:
    """id -> text and kind, as GPT-2 has them."""
    ranks = tokenizer.encoding._mergeable_ranks
    return {id: (printed(token), NORMAL) for token, id in ranks.items()}


def limits(source: Source) -> list[str]:
    """What llama.cpp does otherwise than chat.py."""
    found = [
        "llama.cpp may end a reply before it begins, or say ids that stand for no text; chat.py "
        "never does. A trained model all but never wants to.",
        "chat.py makes repetitions less likely; llama.cpp has its own --repeat-penalty.",
    ]
    if source.tokenizer.kind == "char":
        found.append("The character ▁ (U+2581) is read as a space.")
    elif source.tokenizer.kind == "bpe":
        found.append(
            "llama.cpp splits text otherwise at several spaces, at line breaks and at combining "
            "marks, so that they may become other tokens; all other text becomes the same."
        )
    return found
