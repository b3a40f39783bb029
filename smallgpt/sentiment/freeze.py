"""Freezing the lower part of a trunk. What does not train makes the same of a text at every step:
it runs once per text, and its states are cached."""

import re

import torch
from torch import Tensor
from tqdm import tqdm

from model import GPTClassifier
from smallgpt.console import UserError
from smallgpt.parallel.strategy import Single
from smallgpt.runs import lora
from smallgpt.sentiment.batches import Inputs, length_batches

EMBEDDING = "gpt.wte.weight"  # its canonical name


def is_valid(how: str) -> bool:
    """Is it a value of the setting `freeze`?"""
    return re.fullmatch(r"none|trunk|all_but_last:[1-9]\d*", how) is not None


def trained_blocks(how: str, n_layer: int) -> int:
    """How many of the last blocks train."""
    if how == "none":
        return n_layer
    count = int(how.partition(":")[2] or 0)
    if count >= n_layer:
        raise UserError(
            f"freeze={how}: the trunk has {n_layer} blocks; train fewer of them, or use freeze=none"
        )
    return count


def freeze(model: GPTClassifier, how: str, rows: int, rank: int = 0) -> None:
    """Freeze what `how` names: none, trunk (all but the head), all_but_last:K (all but the last K
    blocks, the final norm and the head). UserError for too large a K.

    rank: of the adapters that train in place of the other blocks, whose embeddings are then frozen,
    too; 0 = the blocks train themselves.

    New tokens, ids from `rows` on, always train: the model gives the rows below no gradient, and
    AdamW leaves alone what has neither gradient nor decay (`undecayed`)."""
    if how == "none" and not rank:
        return
    gpt = model.gpt
    count = trained_blocks(how, gpt.config.n_layer)
    model.first_block = gpt.config.n_layer - count
    frozen_blocks = gpt.blocks[: model.first_block]
    parts = [gpt.wte, gpt.lm_head, *frozen_blocks]
    if gpt.wpe is not None:
        parts.append(gpt.wpe)
    if count == 0:
        parts.append(gpt.norm)
    for part in parts:
        part.requires_grad_(False)
    if rank:
        lora.adapt(gpt.blocks[model.first_block :], rank)
    if model.first_block:
        gpt.drop.p = 0.0  # dropout would make the states differ from step to step
    for block in frozen_blocks:
        block.drop.p = 0.0
        block.attn.dropout = 0.0
    if rows < gpt.config.vocab_size:
        gpt.wte.requires_grad_(True)
        gpt.first_trained_row = rows


def undecayed(model: GPTClassifier) -> set[str]:
    """Names of the matrices that weight decay must leave alone: the embedding, if its old rows are
    frozen."""
    return {EMBEDDING} if model.gpt.first_trained_row else set()


def count_trainable(model: GPTClassifier) -> int:
    """How many numbers train; of an embedding that is frozen up to its new rows, only those."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained - model.gpt.first_trained_row * model.gpt.config.n_embd


@torch.no_grad()
def cache_frozen_states(strategy: Single, inputs: Inputs, max_tokens: int, gigabytes: float) -> str:
    """Let the frozen part read every example once; `inputs` gives its states from now on. A
    collective: each process reads them all.

    Returns why not, in words, if that is no use or takes more than so many GiB."""
    model = strategy.model
    config = model.gpt.config
    first_new = model.gpt.first_trained_row
    if not model.first_block or not gigabytes:
        return ""
    if strategy.depth > 1:
        return "the stages of a pipeline read tokens: it runs every time"
    if first_new and inputs.largest >= first_new:
        return "new tokens train below the frozen part, which therefore runs every time"
    size = cache_size(model, inputs) / 2**30
    if size > gigabytes:
        return (
            f"caching the states of the frozen part would take {size:.1f} GiB "
            f"(cache_gb={gigabytes}): it runs every time"
        )
    states: list[Tensor] = [torch.empty(0)] * len(inputs.data.ids)
    batches = length_batches(inputs.data.lengths, max_tokens, inputs.width, inputs.device)
    pooled = model.first_block == config.n_layer
    for batch in tqdm(batches, desc="frozen part, once", disable=None, leave=False):
        tokens, lengths = inputs.tokens(batch)
        with strategy.autocast:
            found = model.run_frozen(tokens, lengths)
        for row, state, length in zip(batch, found, lengths.tolist(), strict=True):
            is_whole = pooled or inputs.width  # the mask being off, padding is read like text
            states[row] = (state if is_whole else state[:length]).clone()
    strategy.settle()
    inputs.states = states
    return ""


def cache_size(model: GPTClassifier, inputs: Inputs) -> float:
    """Bytes of all states, in float32."""
    config = model.gpt.config
    states_per_text = inputs.width or inputs.data.lengths.mean()
    if model.first_block == config.n_layer:
        states_per_text = 1
    return len(inputs.data.ids) * states_per_text * config.n_embd * 4
