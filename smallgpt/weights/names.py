"""The names of the tensors of model.GPT in the files of others, for both directions.

    HUGGING_FACE, APERTUS, ...      ours -> theirs, without the number of the block and the kind
    rename                          a whole name by such a table, or by its inverse
    to_pairs, to_halves             the rows of q and k, as llama.cpp has them and as we do

Arcee has the names of Llama without `gate`, Qwen3 those of Llama with `q_norm` and `k_norm`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

# transformers' LlamaForCausalLM, Qwen3ForCausalLM and ArceeForCausalLM
HUGGING_FACE = {
    "wte": "model.embed_tokens",
    "blocks.#.norm1": "model.layers.#.input_layernorm",
    "blocks.#.attn.q": "model.layers.#.self_attn.q_proj",
    "blocks.#.attn.k": "model.layers.#.self_attn.k_proj",
    "blocks.#.attn.v": "model.layers.#.self_attn.v_proj",
    "blocks.#.attn.q_norm": "model.layers.#.self_attn.q_norm",
    "blocks.#.attn.k_norm": "model.layers.#.self_attn.k_norm",
    "blocks.#.attn.proj": "model.layers.#.self_attn.o_proj",
    "blocks.#.norm2": "model.layers.#.post_attention_layernorm",
    "blocks.#.mlp.fc": "model.layers.#.mlp.up_proj",
    "blocks.#.mlp.gate": "model.layers.#.mlp.gate_proj",
    "blocks.#.mlp.proj": "model.layers.#.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
# transformers' ApertusForCausalLM
APERTUS = HUGGING_FACE | {
    "blocks.#.norm1": "model.layers.#.attention_layernorm",
    "blocks.#.norm2": "model.layers.#.feedforward_layernorm",
}
# OpenAI's GPT-2, which transformers' GPT2LMHeadModel has below `transformer.`
GPT2 = {
    "wte": "wte",
    "wpe": "wpe",
    "blocks.#.norm1": "h.#.ln_1",
    "blocks.#.attn.qkv": "h.#.attn.c_attn",
    "blocks.#.attn.proj": "h.#.attn.c_proj",
    "blocks.#.norm2": "h.#.ln_2",
    "blocks.#.mlp.fc": "h.#.mlp.c_fc",
    "blocks.#.mlp.proj": "h.#.mlp.c_proj",
    "norm": "ln_f",
}
# CJL196/small-gpt's
SMALL_GPT = {
    "blocks.#.norm1": "h.#.ln1",
    "blocks.#.attn.q": "h.#.attention.W_q",
    "blocks.#.attn.k": "h.#.attention.W_k",
    "blocks.#.attn.v": "h.#.attention.W_v",
    "blocks.#.attn.proj": "h.#.attention.out_net",
    "blocks.#.norm2": "h.#.ln2",
    "blocks.#.mlp.fc": "h.#.ffn.dense1",
    "blocks.#.mlp.proj": "h.#.ffn.out_net",
}
# llama.cpp's gpt2, llama, qwen3, arcee and apertus
GGUF = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "blocks.#.norm1": "blk.#.attn_norm",
    "blocks.#.attn.q": "blk.#.attn_q",
    "blocks.#.attn.k": "blk.#.attn_k",
    "blocks.#.attn.v": "blk.#.attn_v",
    "blocks.#.attn.qkv": "blk.#.attn_qkv",  # of gpt2 all three
    "blocks.#.attn.q_norm": "blk.#.attn_q_norm",
    "blocks.#.attn.k_norm": "blk.#.attn_k_norm",
    "blocks.#.attn.proj": "blk.#.attn_output",
    "blocks.#.norm2": "blk.#.ffn_norm",
    "blocks.#.mlp.fc": "blk.#.ffn_up",
    "blocks.#.mlp.gate": "blk.#.ffn_gate",
    "blocks.#.mlp.proj": "blk.#.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
# Of these llama.cpp turns neighbouring rows of q and k; of qwen3 and apertus, as we, the halves.
PAIRED = ("llama", "arcee")


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """theirs -> ours"""
    return {theirs: ours for ours, theirs in table.items()}


def rename(name: str, table: Mapping[str, str]) -> str:
    """blocks.3.attn.q.weight -> blk.3.attn_q.weight; empty where the table lacks the name."""
    part, _, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", part)
    block = number[1] if number else ""
    pattern = part.replace(f".{block}.", ".#.") if block else part
    renamed = table.get(pattern, "").replace("#", block)
    return renamed and f"{renamed}.{kind}"


def to_pairs(w: Tensor, heads: int) -> Tensor:
    """The rows of q or k (heads * D, ...) in the order of llama.cpp: of each head 0, D/2, 1, ..."""
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_halves(w: Tensor, heads: int) -> Tensor:
    """What `to_pairs` was given: of each head the first halves of all pairs, then the second."""
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
