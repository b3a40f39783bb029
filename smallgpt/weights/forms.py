"""The classes of transformers that compute what a GPT of this project computes.

    LANGUAGE_MODELS   the classes, each a Form: what a GPTConfig must have for it, its config.json,
    CLASSIFIERS       and the names of its tensors
    form_of           the Form of a GPTConfig; UserError names the setting that is in the way
    their_config      config.json of a model
    their_tensors     model.safetensors of a model

The names of tensors are in names.py.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig
from smallgpt.console import UserError
from smallgpt.weights import gpt2, names

HEADS = {"lm_head": "lm_head", "head": "score"}  # of all classes

LLAMA_SIZES = {  # theirs -> ours
    "vocab_size": "vocab_size",
    "max_position_embeddings": "block_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "kv_heads",
    "hidden_size": "n_embd",
    "intermediate_size": "mlp_size",
    "head_dim": "head_size",
}
LLAMA_FIELDS = {"attention_bias": False, "mlp_bias": False}

# xIELU (Huang and Schlag 2024) is alpha_p x^2 + beta x above 0. These values make it relu(x)^2.
RELU2_AS_XIELU = {
    "mlp.act_fn.alpha_p": [0.5413248546129181],  # log(e - 1): its softplus is 1
    "mlp.act_fn.alpha_n": [-1e4],  # its softplus is 0
    "mlp.act_fn.beta": 0.0,
    "mlp.act_fn.eps": -1e-6,
}


@dataclass(frozen=True)
class Form:
    """A class of transformers, and which models of this project it equals."""

    name: str  # of the class: Qwen3ForCausalLM
    model_type: str  # in config.json
    needs: dict[str, Any]  # settings of a GPTConfig
    fields: dict[str, Any]  # of config.json, the same in every such model
    sizes: dict[str, str] = field(default_factory=lambda: LLAMA_SIZES)  # theirs -> ours
    names: dict[str, str] = field(default_factory=lambda: names.HUGGING_FACE)  # ours -> theirs
    constants: dict[str, Any] = field(default_factory=dict)  # tensors that every block has
    has_gate_like_fc: bool = False  # relu(x)^2 as relu(gate) * up


MODERN = {"pos": "rope", "norm": "rmsnorm", "bias": False}
GPT2 = Form(
    "GPT2LMHeadModel",
    "gpt2",
    needs={"pos": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False, "n_kv_head": 0},
    fields={"activation_function": "gelu_new"},
    sizes=gpt2.SIZES,
    names={ours: f"transformer.{theirs}" for ours, theirs in names.GPT2.items()},
)
QWEN3 = Form(
    "Qwen3ForCausalLM",
    "qwen3",
    needs=MODERN | {"mlp": "swiglu", "qk_norm": True},
    fields=LLAMA_FIELDS | {"hidden_act": "silu"},
)
LLAMA = Form(
    "LlamaForCausalLM",
    "llama",
    needs=MODERN | {"mlp": "swiglu", "qk_norm": False},
    fields=LLAMA_FIELDS | {"hidden_act": "silu"},
)
ARCEE = Form(
    "ArceeForCausalLM",
    "arcee",
    needs=MODERN | {"mlp": "relu2", "qk_norm": False},
    fields=LLAMA_FIELDS | {"hidden_act": "relu2"},
)
APERTUS = Form(
    "ApertusForCausalLM",
    "apertus",
    needs=MODERN | {"mlp": "relu2", "qk_norm": True},
    fields=LLAMA_FIELDS | {"hidden_act": "xielu"},
    names=names.APERTUS,
    constants=RELU2_AS_XIELU,
)
SQUARED_RELU_AS_QWEN3 = Form(
    "Qwen3ForSequenceClassification",  # there is no classifier of Apertus
    "qwen3",
    needs=APERTUS.needs,
    fields=LLAMA_FIELDS | {"hidden_act": "relu"},
    has_gate_like_fc=True,
)
LANGUAGE_MODELS = (GPT2, QWEN3, LLAMA, ARCEE, APERTUS)
CLASSIFIERS = (
    replace(GPT2, name="GPT2ForSequenceClassification"),
    replace(QWEN3, name="Qwen3ForSequenceClassification"),
    replace(LLAMA, name="LlamaForSequenceClassification"),
    replace(ARCEE, name="ArceeForSequenceClassification"),
    SQUARED_RELU_AS_QWEN3,
)
# What hugging_face.py reads, by the model_type and hidden_act of config.json.
LLAMA_LIKE = {
    (form.model_type, form.fields["hidden_act"]): form
    for form in (LLAMA, QWEN3, ARCEE, APERTUS, SQUARED_RELU_AS_QWEN3)
}


def form_of(config: GPTConfig, forms: tuple[Form, ...]) -> Form:
    """The form of a model. UserError if there is none: it names the settings that are in the way of
    the class that comes next."""
    found = asdict(config)
    found["n_kv_head"] = 0 if config.kv_heads == config.n_head else config.n_kv_head
    nearest = None
    for form in forms:
        in_the_way = [name for name, value in form.needs.items() if found[name] != value]
        if not in_the_way:
            return form
        if nearest is None or len(in_the_way) < len(nearest[1]):
            nearest = form, in_the_way
    form, in_the_way = nearest
    ours = " and ".join(f"model.{name}={found[name]}" for name in in_the_way)
    theirs = ", ".join(f"{name}={form.needs[name]}" for name in in_the_way)
    raise UserError(
        f"no class of transformers computes this model, the nearest is {form.name}: {ours} is in "
        f"the way of its {theirs}; export it with to=onnx, which takes every form"
    )


def their_config(config: GPTConfig, form: Form) -> dict[str, Any]:
    """The part of config.json that the shape of the model decides."""
    sizes = {theirs: getattr(config, ours) for theirs, ours in form.sizes.items()}
    found = {
        "architectures": [form.name],
        "model_type": form.model_type,
        "dtype": "float32",
        "torch_dtype": "float32",  # of transformers 4
        **sizes,
        **form.fields,
        "tie_word_embeddings": config.tie_weights or form in CLASSIFIERS,  # they have no LM head
    }
    if form.model_type == "gpt2":
        dropouts = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
        own = {"layer_norm_epsilon": config.norm_eps or 1e-5, "n_inner": config.mlp_size}
        return found | own | dict.fromkeys(dropouts, config.dropout)
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    of_transformers_4 = {"rope_theta": config.rope_base, "rope_scaling": None}
    return found | {
        "rms_norm_eps": config.norm_eps or 1e-6,
        "attention_dropout": config.dropout,
        "rope_parameters": rope,
        **of_transformers_4,
    }


def their_tensors(
    weights: Mapping[str, Tensor], config: GPTConfig, form: Form
) -> dict[str, Tensor]:
    """The tensors of model.safetensors, in float32, of a model's weights by our names."""
    weights = dict(weights)
    if form.model_type == "gpt2":
        weights = as_gpt2(weights, config.n_layer)
        for name in weights:
            if name.endswith(gpt2.CONV1D):  # (in, out), the opposite of gpt2.from_conv1d
                weights[name] = weights[name].t()
    if form.has_gate_like_fc:
        for layer in range(config.n_layer):
            mlp = f"blocks.{layer}.mlp"
            weights[f"{mlp}.gate.weight"] = weights[f"{mlp}.fc.weight"]
    table = HEADS | form.names
    tensors = {}
    for name, weight in weights.items():
        tensors[names.rename(name, table)] = as_saved(weight)
    for layer in range(config.n_layer):
        for name, value in form.constants.items():
            tensors[f"model.layers.{layer}.{name}"] = torch.tensor(value)
    return tensors


def as_saved(weight: Tensor) -> Tensor:
    """In float32, in a memory of its own."""
    return weight.detach().float().clone(memory_format=torch.contiguous_format)


def as_gpt2(weights: Mapping[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    """GPT-2 has q, k and v in one, and biases everywhere: a model without gets those that change
    nothing."""
    joined = dict(weights)
    for layer in range(n_layer):
        attn = f"blocks.{layer}.attn"
        for kind in ("weight", "bias"):
            thirds = [joined.pop(f"{attn}.{letter}.{kind}", None) for letter in "qkv"]
            if thirds[0] is not None:
                joined[f"{attn}.qkv.{kind}"] = torch.cat(thirds)
    found = {}
    for name, weight in joined.items():
        found[name] = weight
        in_layer = name.startswith(("blocks.", "norm.")) and name.endswith(".weight")
        if in_layer:
            zeros = torch.zeros(weight.size(0))
            found.setdefault(name.removesuffix("weight") + "bias", zeros)
    return found
