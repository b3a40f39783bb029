"""Freezing the lower part of a trunk. What does not train says the same of a text every time: it is asked once.

Models come by argument: `model.gpt.trunk(x, layers=, norm=)`, `model.pooled(h, lengths)`, `model.first_block`.
"""

import re

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from smallgpt.console import UserError
from smallgpt.sentiment.batches import Inputs, in_order


def freeze(model: nn.Module, how: str, rows: int) -> None:
    """Freeze what `how` says of a classifier: none, trunk (all but the head), all_but_last:K (all but the last K
    blocks, the final norm and the head). New tokens, ids from `rows` on, always train. UserError for too large a K."""
    gpt, n_layer = model.gpt, model.gpt.config.n_layer
    if how == "none":
        return
    count = int(how.partition(":")[2] or 0)
    if count >= n_layer:
        raise UserError(
            f"freeze={how}: the trunk has {n_layer} blocks; train fewer of them, or use freeze=none"
        )
    model.first_block = n_layer - count
    for part in [
        gpt.wte,
        gpt.wpe,
        gpt.lm_head,
        *gpt.blocks[: model.first_block],
        *([] if count else [gpt.norm]),
    ]:
        if part is not None:
            part.requires_grad_(False)
    gpt.drop.p = 0.0
    for block in gpt.blocks[: model.first_block]:
        block.drop.p = block.attn.dropout = 0.0
    if (
        rows < gpt.config.vocab_size
    ):  # the old rows get no gradient, and AdamW leaves alone what has none and no decay
        weight = gpt.wte.weight.requires_grad_(True)
        weight.no_decay, weight.first_row = True, rows
        weight.register_hook(lambda g: g * (torch.arange(len(g), device=g.device) >= rows)[:, None])


def trainable(model: nn.Module) -> int:
    """How many numbers train; of an embedding that is frozen up to its new rows, only those."""
    return sum(
        p[getattr(p, "first_row", 0) :].numel() for p in model.parameters() if p.requires_grad
    )


def is_valid(how: str) -> bool:
    """Is it a value of the setting `freeze`?"""
    return bool(re.fullmatch(r"none|trunk|all_but_last:[1-9]\d*", how))


def below(model: nn.Module, idx: Tensor, lengths: Tensor) -> Tensor:
    """What the frozen part makes of tokens idx (B, T): the hidden states (B, T, C) that go into the first trained
    block, or the pooled one (B, C) if the whole trunk is frozen. The model's forward takes either in place of idx."""
    whole = model.first_block == model.gpt.config.n_layer
    at = lengths - 1 if whole and model.pool == "last" and model.mask else None
    h = model.gpt.trunk(idx, layers=slice(model.first_block), norm=whole, at=at)
    return h if not whole else h[:, 0] if at is not None else model.pooled(h, lengths)


@torch.no_grad()
def keep(
    model: nn.Module,
    inputs: Inputs,
    ctx: torch.autocast,
    max_tokens: int,
    gigabytes: float,
    rows: int,
) -> str:
    """Let the frozen part read every example once; `inputs` gives what it said from now on. Returns why not, in words,
    if it is no use or takes more than so many GiB."""
    config, first = model.gpt.config, model.first_block
    if not first or not gigabytes:
        return ""
    if model.gpt.wte.weight.requires_grad and inputs.largest >= rows:
        return "new tokens train below the frozen part, which therefore runs every time"
    tokens = 1 if first == config.n_layer else inputs.width or inputs.data.lengths.mean()
    size = len(inputs.data.ids) * tokens * config.n_embd * 4 / 2**30
    if size > gigabytes:
        return f"keeping what the frozen part says would take {size:.1f} GiB (cache_gb={gigabytes}): it runs every time"
    kept: list[Tensor] = [torch.empty(0)] * len(inputs.data.ids)
    batches = in_order(inputs.data.lengths, max_tokens, inputs.width, inputs.device)
    for batch in tqdm(batches, desc="frozen part, once", disable=None, leave=False):
        idx, lengths = inputs.tokens(batch)
        with ctx:
            states = below(model, idx, lengths)
        for i, state, n in zip(batch, states, lengths.tolist(), strict=True):
            kept[i] = (state if state.dim() == 1 or inputs.width else state[:n]).clone()
    inputs.kept = kept
    return ""
