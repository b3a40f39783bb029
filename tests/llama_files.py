"""A small Llama as transformers and llama.cpp have it, made without the code under test."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from smallgpt.tokenizer import STAND_INS

# As SmolLM2's: special tokens first, some bytes have no token, the merges in the order of the ids.
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LACKING = [character for character, byte in STAND_INS.items() if byte in (0x04, 0xC0, 0xF1, 0xFF)]
MERGES = ["h e", "l l", "he ll", "Ġ w", "Ġ Ġ", "ĠĠ ĠĠ", "hell o", "o r", "Ġw or", "1 2", "ä ½"]
BYTES = [character for character in STAND_INS if character not in LACKING]
TOKENS = [*SPECIALS, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
ROWS = len(TOKENS) + 3  # rounded up
SYSTEM = "You are a small Llama."
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
)
SHAPE = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,  # not 8/3 of the width
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-2,  # so large that no other can be taken for it
    "rope_theta": 5000.0,
}


def their_model(tied: bool):
    """transformers' Llama with random values everywhere: a swapped tensor cannot hide."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = SHAPE | {"tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.2)
    return model


def save_folder(model, folder: Path, **options: object) -> Path:
    """What transformers saves, and a tokenizer.json like SmolLM2's beside it."""
    model.save_pretrained(folder, **options)
    added = [{"id": i, "content": name, "special": True} for i, name in enumerate(SPECIALS)]
    tokenizer = {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(TOKENS)},
            "merges": MERGES,
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    about = {"bos_token": SPECIALS[1], "chat_template": TEMPLATE}
    write_json(folder / "tokenizer_config.json", about)
    return folder


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def facts_of(changed: str = "general.name", value: object = "x") -> dict[str, object]:
    """What a GGUF of this Llama says, with one fact changed; None leaves it out."""
    facts = {
        "general.architecture": "llama",
        "general.name": "A small Llama",
        "llama.block_count": SHAPE["num_hidden_layers"],
        "llama.context_length": SHAPE["max_position_embeddings"],
        "llama.embedding_length": SHAPE["hidden_size"],
        "llama.feed_forward_length": SHAPE["intermediate_size"],
        "llama.attention.head_count": SHAPE["num_attention_heads"],
        "llama.attention.head_count_kv": SHAPE["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": SHAPE["rms_norm_eps"],
        "llama.rope.freq_base": SHAPE["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*TOKENS, *(f"[PAD{i}]" for i in range(ROWS - len(TOKENS)))],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 3) + [5] * (ROWS - len(TOKENS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    }
    facts[changed] = value
    return {key: value for key, value in facts.items() if value is not None}


def to_llama_cpp(name: str, w: np.ndarray) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to the rows of q and k."""
    heads = {"q_proj": SHAPE["num_attention_heads"], "k_proj": SHAPE["num_key_value_heads"]}
    for part, n_head in heads.items():
        if part in name:
            by_head = w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:])
            return by_head.swapaxes(1, 2).reshape(w.shape)
    return w


def write_gguf(
    file: Path, weights: Mapping[str, Tensor], facts: dict[str, object], kind: str = "F32"
) -> dict[str, Tensor]:
    """Write transformers' weights by the package gguf, matrices quantised to this kind; returns
    what they are then, by transformers' names. q and k are quantised in llama.cpp's order of rows,
    which quantises each row alone."""
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in facts.items():
        if key != "general.architecture":
            add_fact(writer, key, value)
        elif value != "llama":
            writer.kv_data[0][key].value = value
    quantized = {}
    for their_name, weight in weights.items():
        w = weight.detach().numpy()
        number = gguf.GGMLQuantizationType["F32" if w.ndim == 1 else kind]
        quantized[their_name] = torch.from_numpy(
            gguf.dequantize(gguf.quantize(w, number), number).copy()
        )
        packed = gguf.quantize(to_llama_cpp(their_name, w), number)
        name = names.get_name(their_name, try_suffixes=(".weight",)) or their_name
        writer.add_tensor(name, packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quantized


def add_fact(writer, key: str, value: object) -> None:
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
