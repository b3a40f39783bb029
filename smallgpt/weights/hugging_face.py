"""Folders of transformers: those that scripts/export.py writes, and models of others in these
classes, such as a Llama.

    read           a folder -> GPTConfig, weights by the names of model.GPT, Tokenizer
    read_config    config.json -> the Form and the GPTConfig
    is_classifier  does its class classify?

A tensor is read when it is asked for. A GPT-2 is read by gpt2.py.
"""

from pathlib import Path
from typing import Any

import torch

from model import GPTConfig
from smallgpt.console import UserError
from smallgpt.runs import checkpoint
from smallgpt.runs.lazy import LazyTensor, Weights
from smallgpt.tokenizer import Tokenizer
from smallgpt.weights import forms, gpt2, llama
from smallgpt.weights.forms import Form

SIZES = {  # theirs -> ours
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
    "intermediate_size": "mlp_width",
}
# What config.json may hold of what model.GPT does not have.
PLAIN = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}
# What transformers takes where there is none.
LLAMA_DEFAULTS = {"hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-6}


def read(folder: Path) -> tuple[GPTConfig, Weights, Tokenizer]:
    """A folder as transformers saves it, with any head or none. UserError names what is missing,
    damaged or of another form."""
    file = folder / "config.json"
    found = gpt2.read_json(file) if file.is_file() else {}
    if found.get("model_type", "gpt2") == "gpt2":
        return gpt2.read(folder)
    form, config = read_config(file, found)
    source, files = gpt2.weight_files(folder)
    tensors = gpt2.open_shards(files)
    weights = trunk_weights(tensors, config, form, source)
    gpt2.check_shapes(weights.shapes, config, source)
    return config, weights, tokenizer_of(folder, config.vocab_size)


def read_config(file: Path, found: dict[str, Any]) -> tuple[Form, GPTConfig]:
    """config.json as a Form and a GPTConfig. UserError names the field that model.GPT cannot
    equal."""
    name = found["model_type"]
    if name == "llama":
        found = LLAMA_DEFAULTS | found
    activation = found.get("hidden_act")
    form = forms.LLAMA_LIKE.get((name, activation))
    if form is None:
        known = [" with ".join(kind) for kind in forms.LLAMA_LIKE]
        raise UserError(
            f"{file}: model_type is {name!r} with hidden_act {activation!r}; only gpt2, "
            f"{', '.join(known)} can be opened here"
        )
    gpt2.check_fields(found, PLAIN, file, form.model_type)
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    sizes = gpt2.read_sizes(found, SIZES, file)
    head_size = found.get("head_dim") or sizes["n_embd"] // sizes["n_head"]
    llama.check_head_size(head_size, sizes, file)
    numbers = {
        "rope_base": rope_base(file, found),
        "norm_eps": found.get("rms_norm_eps"),
    }
    own = llama.read_numbers(numbers, file)
    own["tie_weights"] = bool(found.get("tie_word_embeddings", False))
    settings = form.needs | sizes | own
    return form, checkpoint.model_config(settings, file)


def is_classifier(folder: Path) -> bool:
    """Whether the model of a folder is one of texts and labels."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    first, *_ = gpt2.read_json(file).get("architectures") or [""]
    return str(first).endswith("ForSequenceClassification")


def rope_base(file: Path, found: dict[str, Any]) -> float | None:
    """The base of the rotary frequencies. UserError where they are scaled."""
    rope = found.get("rope_parameters") or {}  # of transformers 5
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
    if kind != "default":
        raise UserError(
            f"{file}: its rotary positions are scaled ({kind}); only plain ones can be opened here"
        )
    return rope.get("rope_theta", found.get("rope_theta"))


def trunk_weights(
    tensors: dict[str, LazyTensor], config: GPTConfig, form: Form, source: Path
) -> Weights:
    """The tensors of a trunk, in float32, by our names; heads are left out. UserError where a
    constant of the form has another value."""
    rest = {}
    for name, tensor in tensors.items():
        part = ".".join(name.split(".")[-3:])  # mlp.act_fn.alpha_p
        if part not in form.constants:
            rest[name] = tensor
        elif not same(tensor, form.constants[part]):
            raise UserError(
                f"{source}: its xIELU is no squared ReLU, {name} is not {form.constants[part]}; "
                "only an Apertus that scripts/export.py has written can be opened here"
            )
    weights = llama.trunk_weights(rest, form.names, config.tie_weights)
    if form.has_gate_like_fc:
        drop_gates(weights.tensors, source)
    return weights


def same(tensor: LazyTensor, value: Any) -> bool:
    """Whether a small tensor has this value. The first four digits: it may have been bfloat16."""
    return torch.allclose(tensor.read().float(), torch.tensor(value), rtol=1e-2)


def drop_gates(weights: dict[str, LazyTensor], source: Path) -> None:
    """relu(gate) * up is relu(up)^2 where both matrices are the same. UserError where they are
    not."""
    gates = [name for name in weights if name.endswith(".mlp.gate.weight")]
    for name in gates:
        gate = weights.pop(name).read()
        up = weights[name.replace("gate", "fc")].read()
        if not gate.equal(up):
            raise UserError(
                f"{source}: relu(gate) * up has two matrices in {name}; only a squared ReLU, whose "
                "matrices are the same, can be opened here"
            )


# --- tokenizer ------------------------------------------------------------------------------------


def tokenizer_of(folder: Path, rows: int) -> Tokenizer:
    """tokenizer.json, with <|bos|> and the chat template of tokenizer_config.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: put the one there that was saved with the weights")
    exported = gpt2.read_exported_tokenizer([file])
    if exported:
        return exported
    found = gpt2.read_json(file)
    settings = folder / "tokenizer_config.json"
    about = gpt2.read_json(settings) if settings.is_file() else {}
    try:
        pattern = llama.PATTERNS[splitting(found.get("pre_tokenizer"))]
        model = found["model"]
        if model.get("type", "BPE") != "BPE" or found.get("normalizer"):
            raise KeyError("another kind")
    except KeyError:
        raise UserError(
            f"{file} is another kind of tokenizer: a byte-level BPE that splits as GPT-2's or "
            "SmolLM's can be read here; take a model with one like these"
        ) from None
    try:
        specials = {token["content"]: token["id"] for token in found.get("added_tokens", [])}
        ids = {token: id for token, id in model["vocab"].items() if token not in specials}
        merges = gpt2.merges_of(model)
        bos = about.get("bos_token")
        bos = specials.get(bos["content"] if isinstance(bos, dict) else bos)
        template = chat_template(folder, about)
        return llama.make_tokenizer(ids, merges, specials, pattern, bos, rows, template)
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise UserError(
            f"{file} is damaged ({type(problem).__name__} {problem}): download it again"
        ) from None


def splitting(pre_tokenizer: Any) -> str:
    """The name in PATTERNS of what a tokenizer.json splits by. KeyError where it is another."""
    steps = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    kinds = [(step or {}).get("type") for step in steps]
    splits_digits = steps[0].get("individual_digits", False) if steps[0] else False
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and splits_digits:
        return "smollm"
    raise KeyError(str(kinds))


def chat_template(folder: Path, about: dict[str, Any]) -> str:
    """The Jinja source by which transformers writes a dialogue; empty if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = about.get("chat_template", "")
    return template if isinstance(template, str) else ""
