"""Labelled examples -> token ids -> batches without padding waste.

The batch of a step is a pure function of (data, seed, step), as everywhere here: so resuming is exact, and the number
of processes may change.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from smallgpt.parallel.world import World
from smallgpt.sentiment.sets import Example
from smallgpt.text.batches import key_of, permute
from smallgpt.tokenizer import Tokenizer

SORTED = (
    32  # batches whose examples are sorted by length together: less padding, and still a mixture
)


class Encoded(NamedTuple):
    """Examples of one split as the model reads them."""

    ids: list[np.ndarray]  # int64, each as long as its text
    labels: np.ndarray  # int64 (N,)
    cut: int  # texts that lost their middle

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids])


def shorten(ids: list[int], room: int) -> list[int]:
    """The beginning and the end: reviews say there what they mean (Sun et al. 2019, How to fine-tune BERT)."""
    return ids if len(ids) <= room else ids[: room - room // 2] + ids[len(ids) - room // 2 :]


def lead(text: str, tokenizer: Tokenizer) -> str:
    """The text, after a space if it begins with a word: so "good" is the token first that it is later on, where in BPE
    the space before a word belongs to it (as add_prefix_space of RoBERTa, Liu et al. 2019)."""
    word = (
        text[:1].isalpha() and text[0] < "\u2e80"
    )  # Chinese and its like set no spaces between words
    return f" {text}" if word and tokenizer.kind != "char" else text


def encode_text(
    tokenizer: Tokenizer, text: str, pair: str, block_size: int, prefix: list[int]
) -> tuple[list[int], bool]:
    """Ids of prefix + text, or prefix + text [sep] pair, at most block_size of them; and whether something was cut.
    Of a pair the longer side gives first, so that both stay."""
    a, b = tokenizer.encode(lead(text, tokenizer)), tokenizer.encode(lead(pair, tokenizer))
    room = block_size - len(prefix) - bool(pair)
    if cut := len(a) + len(b) > room:
        for_b = min(len(b), max(room // 2, room - len(a)))
        a, b = shorten(a, room - for_b), shorten(b, for_b)
    return [*prefix, *a, *([tokenizer.sep, *b] if pair else [])], cut


def encode(
    examples: list[Example],
    labels: list[str],
    tokenizer: Tokenizer,
    block_size: int,
    prefix: list[int],
) -> Encoded:
    """Token ids of every example."""
    both = [encode_text(tokenizer, e.text, e.pair, block_size, prefix) for e in examples]
    index = {label: i for i, label in enumerate(labels)}
    ids = [np.array(ids, np.int64) for ids, _ in both]
    return Encoded(
        ids, np.array([index[e.label] for e in examples], np.int64), sum(cut for _, cut in both)
    )


class Buckets:
    """Global batches of examples of similar length: step -> indices."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self._epoch = lru_cache(maxsize=2)(self._order)

    def of(self, step: int) -> np.ndarray:
        """The examples of a global step; the last batch of an epoch may be smaller."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[batch]

    def _order(self, epoch: int) -> list[np.ndarray]:
        n, size = len(self.lengths), self.batch_size
        order = permute(np.arange(n), n, key_of(self.seed, 0, np.uint64(epoch)))
        batches = []
        for first in range(0, n, SORTED * size):
            window = order[first : first + SORTED * size]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        shuffled = permute(
            np.arange(len(batches)), len(batches), key_of(self.seed, 1, np.uint64(epoch))
        )
        return [batches[i] for i in shuffled]


def share(rows: np.ndarray, longest: int, world: World, max_tokens: int) -> list[np.ndarray]:
    """This rank's part of a global batch, cut into micro-batches of at most max_tokens (padding counted). Every rank
    gets the same number of micro-batches, if need be empty ones: each of them is a collective."""
    most, fit = (
        -(-len(rows) // world.size),
        max(1, max_tokens // longest),
    )  # examples of rank 0, of a micro-batch
    return np.array_split(rows[world.rank :: world.size], -(-most // fit))


def pad(
    ids: Sequence[Sequence[int] | np.ndarray], fill: int, width: int = 0
) -> tuple[Tensor, Tensor]:
    """idx int64 (B, T), padded on the right with `fill` to the longest, or to `width`; lengths (B,)."""
    lengths = torch.tensor([len(i) for i in ids])
    idx = torch.full((len(ids), width or int(lengths.max())), fill)
    for row, i in zip(idx, ids, strict=True):
        row[: len(i)] = torch.as_tensor(i)
    return idx, lengths


class Inputs:
    """Batches of one split for the model: token ids, or what the frozen part has made of them once."""

    def __init__(self, data: Encoded, fill: int, width: int, device: torch.device):
        self.data, self.fill, self.width, self.device = data, fill, width, device
        self.kept: list[Tensor] = []

    @property
    def largest(self) -> int:
        """The largest token id that the model reads."""
        return int(np.concatenate([*self.data.ids, [self.fill] if self.width else []]).max())

    def tokens(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        idx, lengths = pad([self.data.ids[i] for i in rows], self.fill, self.width)
        return idx.to(self.device), lengths.to(self.device)

    def of(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """x (B, T), (B, T, C) or (B, C), as GPTClassifier takes it, and lengths (B,)."""
        if not self.kept:
            return self.tokens(rows)
        lengths = torch.tensor([len(self.data.ids[i]) for i in rows], device=self.device)
        return torch.nn.utils.rnn.pad_sequence(
            [self.kept[i] for i in rows], batch_first=True
        ), lengths

    def targets(self, rows: np.ndarray) -> Tensor:
        """The next token of each position (B, T); -1 where there is none."""
        idx, lengths = self.tokens(rows)
        real = torch.arange(1, idx.size(1), device=idx.device) < lengths[:, None]
        return F.pad(torch.where(real, idx[:, 1:], -1), (0, 1), value=-1)


def drop_tokens(
    idx: Tensor, lengths: Tensor, share: float, fill: int, sep: int, width: int
) -> tuple[Tensor, Tensor]:
    """Leave out each token of idx (B, T) with probability `share`, but neither a row's first one, nor the separator of
    a pair, nor all else of an example: the others close up, padded with `fill` to the longest or to `width`. So a
    classifier cannot rely on single words (word dropout, Iyyer et al. 2015). Returns the new idx and lengths (B,)."""
    kept = (torch.rand(idx.shape, device=idx.device) >= share) | (idx == sep)
    kept[:, 0] = True
    position = torch.arange(idx.size(1), device=idx.device)
    real = position < lengths[:, None]
    kept &= real
    kept |= real & (
        (kept & (idx != sep)).sum(1, keepdim=True) < 2
    )  # a label of nothing but [bos] teaches nothing
    order, lengths = torch.sort(~kept, dim=1, stable=True).indices, kept.sum(1)
    idx = idx.gather(1, order)[:, : width or int(lengths.max())]
    return idx.where(position[: idx.size(1)] < lengths[:, None], fill), lengths


def in_order(
    lengths: Sequence[int] | np.ndarray, max_tokens: int, width: int, device: torch.device
) -> list[np.ndarray]:
    """All examples, from short to long, in batches of at most max_tokens, each padded to its longest or to `width`; on
    a CPU in smaller ones, whose activations stay in its cache."""
    max_tokens = min(max_tokens, 1024) if device.type == "cpu" else max_tokens
    order = np.argsort(lengths, kind="stable")
    batches, first = [], 0
    for i in range(1, len(order)):
        if (i + 1 - first) * (width or lengths[order[i]]) > max_tokens:
            batches.append(order[first:i])
            first = i
    return [*batches, order[first:]] if len(order) else []


@torch.no_grad()
def score(
    model: nn.Module, inputs: Inputs, world: World, ctx: torch.autocast, max_tokens: int
) -> np.ndarray:
    """Scores (N, n_classes) of a split, its batches shared by all ranks."""
    model.eval()
    found = np.zeros((len(inputs.data.ids), model.head.out_features))
    for rows in in_order(inputs.data.lengths, max_tokens, inputs.width, inputs.device)[
        world.rank :: world.size
    ]:
        with ctx:
            found[rows] = model(*inputs.of(rows)).cpu().double().numpy()  # MPS has no float64
    model.train()
    return np.array(world.sum(*found.ravel())).reshape(found.shape)
