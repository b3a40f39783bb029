"""Labelled examples -> token ids -> batches of like length.

The batch of a step is a pure function of (data, seed, step): resuming is exact, and the number of
processes may change.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import IGNORE, Reads
from smallgpt.parallel.strategy import Single
from smallgpt.sentiment.sets import Example
from smallgpt.text.batches import key_of, permute
from smallgpt.tokenizer import Tokenizer

# Batches whose examples are sorted by length together: less padding, and still a mixture.
SORTED_TOGETHER = 32
CPU_TOKENS = 1024  # of an evaluation's batch: on a CPU its activations then stay in the cache


@dataclass
class Encoded:
    """Examples of one split as the model reads them."""

    ids: list[np.ndarray]  # int64, each as long as its text
    labels: np.ndarray  # int64 (N,), of classes; float64 where the label is a number
    cut: int  # texts that lost their middle

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 (N,)"""
        return np.array([len(ids) for ids in self.ids])


def shorten(ids: list[int], room: int) -> list[int]:
    """The beginning and the end: reviews say there what they mean (Sun et al. 2019, How to
    fine-tune BERT)."""
    if len(ids) <= room:
        return ids
    tail = room // 2
    return ids[: room - tail] + ids[len(ids) - tail :]


def add_leading_space(text: str, tokenizer: Tokenizer) -> str:
    """The text, after a space if it begins with a word: "good" is then the token at first that it
    is later on, since in BPE the space before a word belongs to it (as add_prefix_space of RoBERTa,
    Liu et al. 2019). Chinese and its like set no spaces between words."""
    begins_with_word = text[:1].isalpha() and text[0] < "\u2e80"
    return f" {text}" if begins_with_word and tokenizer.kind != "char" else text


def prefix_of(tokenizer: Tokenizer, rows: int) -> list[int]:
    """What each text begins with: <|bos|>, unless the trunk, of so many rows, never saw one."""
    return [tokenizer.bos] if tokenizer.bos < rows else []


def encode_text(
    tokenizer: Tokenizer,
    text: str,
    pair: str,
    block_size: int,
    prefix: list[int],
    cue: Sequence[int] = (),
) -> tuple[list[int], bool]:
    """Ids of prefix + text + cue, or prefix + text [sep] pair + cue, at most block_size of them;
    and whether something was cut. Of a pair the longer side gives first, so that both stay."""
    first = tokenizer.encode(add_leading_space(text, tokenizer))
    second = tokenizer.encode(add_leading_space(pair, tokenizer))
    room = block_size - len(prefix) - len(cue) - bool(pair)
    is_cut = len(first) + len(second) > room
    if is_cut:
        for_second = min(len(second), max(room // 2, room - len(first)))
        first = shorten(first, room - for_second)
        second = shorten(second, for_second)
    ids = [*prefix, *first]
    if pair:
        ids += [tokenizer.sep, *second]
    return [*ids, *cue], is_cut


def encode(
    examples: list[Example],
    labels: list[str],
    tokenizer: Tokenizer,
    block_size: int,
    prefix: list[int],
    cue: Sequence[int] = (),
) -> Encoded:
    """Token ids of every example. labels: the classes; one alone stands for a number."""
    number_of = {label: number for number, label in enumerate(labels)}
    ids = []
    cut = 0
    for example in examples:
        text, pair, _ = example
        found, is_cut = encode_text(tokenizer, text, pair, block_size, prefix, cue)
        ids.append(np.array(found, np.int64))
        cut += is_cut
    if len(labels) == 1:
        numbers = np.array([float(example.label) for example in examples])
    else:
        numbers = np.array([number_of[example.label] for example in examples], np.int64)
    return Encoded(ids, numbers, cut)


class Buckets:
    """Global batches of examples of similar length: step -> indices."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self.batches_of = functools.lru_cache(maxsize=2)(self.bucket)

    def of(self, step: int) -> np.ndarray:
        """The examples of a global step; the last batch of an epoch may be smaller."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.batches_of(epoch)[number]

    def bucket(self, epoch: int) -> list[np.ndarray]:
        """All batches of an epoch: shuffle the examples, sort each window of them by length, cut
        the windows into batches, shuffle the batches."""
        order = self.shuffle(len(self.lengths), 0, epoch)
        window_size = SORTED_TOGETHER * self.batch_size
        batches = []
        for first in range(0, len(order), window_size):
            window = order[first : first + window_size]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            for at in range(0, len(window), self.batch_size):
                batches.append(window[at : at + self.batch_size])
        return [batches[number] for number in self.shuffle(len(batches), 1, epoch)]

    def shuffle(self, count: int, purpose: int, epoch: int) -> np.ndarray:
        """range(count) in the order of this seed, purpose and epoch."""
        return permute(np.arange(count), count, key_of(self.seed, purpose, np.uint64(epoch)))


def share_rows(
    rows: np.ndarray, longest: int, strategy: Single, max_tokens: int
) -> list[np.ndarray]:
    """This data rank's part of a global batch, cut into micro-batches of at most max_tokens
    (padding counted). Every rank gets the same number of micro-batches, if need be empty ones:
    each of them is a collective. A pipeline needs a multiple of its depth."""
    of_rank_0 = -(-len(rows) // strategy.data_size)
    fitting = max(1, max_tokens // longest)
    turns = -(-of_rank_0 // (fitting * strategy.depth))
    mine = rows[strategy.data_rank :: strategy.data_size]
    return np.array_split(mine, turns * strategy.depth)


def collate(
    ids: Sequence[Sequence[int] | np.ndarray], fill: int, width: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens int64 (B, T), padded on the right with `fill` to the longest, or to `width`; and
    lengths (B,)."""
    lengths = torch.tensor([len(one) for one in ids])
    tokens = torch.full((len(ids), width or int(lengths.max())), fill)
    for row, one in zip(tokens, ids, strict=True):
        row[: len(one)] = torch.as_tensor(one)
    return tokens, lengths


class Collated(NamedTuple):
    """What the classifier reads of a batch."""

    x: Tensor  # tokens (B, T), or what the frozen part made of them: (B, T, C) or (B, C)
    lengths: Tensor  # (B,)
    reads: Reads  # what x is


class Inputs:
    """Batches of one split for the model: tokens, or the cached states of its frozen part."""

    def __init__(self, data: Encoded, fill: int, width: int, device: torch.device):
        self.data = data
        self.fill = fill  # the token of padding
        self.width = width  # of every batch; 0 = that of its longest text
        self.device = device
        self.states: list[Tensor] = []  # of each text, (T, C) or (C,); empty = not cached

    @property
    def largest(self) -> int:
        """The largest token id that the model reads."""
        return int(np.concatenate([*self.data.ids, [self.fill] if self.width else []]).max())

    def tokens(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) and lengths (B,)."""
        tokens, lengths = collate([self.data.ids[row] for row in rows], self.fill, self.width)
        return tokens.to(self.device), lengths.to(self.device)

    def of(self, rows: np.ndarray) -> Collated:
        """What the model reads of these examples."""
        if not self.states:
            return Collated(*self.tokens(rows), "tokens")
        lengths = torch.tensor([len(self.data.ids[row]) for row in rows], device=self.device)
        states = [self.states[row] for row in rows]
        reads = "pooled" if states[0].dim() == 1 else "states"
        return Collated(pad_sequence(states, batch_first=True), lengths, reads)

    def targets(self, rows: np.ndarray) -> Tensor:
        """The next token of each position (B, T); IGNORE where there is none."""
        tokens, lengths = self.tokens(rows)
        next_position = torch.arange(1, tokens.size(1), device=tokens.device)
        is_real = next_position < lengths[:, None]
        return F.pad(torch.where(is_real, tokens[:, 1:], IGNORE), (0, 1), value=IGNORE)


def drop_tokens(
    tokens: Tensor,
    lengths: Tensor,
    share: float,
    fill: int,
    sep: int,
    width: int,
    cue: int = 0,
) -> tuple[Tensor, Tensor]:
    """Leave out each token (B, T) with probability `share`, but neither a row's first one, nor the
    separator of a pair, nor the last `cue`, nor all else of an example: the others close up, padded
    with `fill` to the longest or to `width`. A classifier then cannot rely on single words (word
    dropout, Iyyer et al. 2015). Returns the new tokens and lengths (B,)."""
    positions = torch.arange(tokens.size(1), device=tokens.device)
    is_real = positions < lengths[:, None]
    is_sign = (tokens == sep) | (positions >= lengths[:, None] - cue)  # no word of a text
    kept = torch.rand(tokens.shape, device=tokens.device) >= share
    kept |= is_sign
    kept[:, 0] = True
    kept &= is_real
    words_left = (kept & ~is_sign).sum(1, keepdim=True)
    kept |= is_real & (words_left < 2)  # a label of nothing but [bos] teaches nothing
    lengths = kept.sum(1)
    kept_first = torch.sort(~kept, dim=1, stable=True).indices
    tokens = tokens.gather(1, kept_first)[:, : width or int(lengths.max())]
    is_real = positions[: tokens.size(1)] < lengths[:, None]
    return tokens.where(is_real, fill), lengths


def length_batches(
    lengths: Sequence[int] | np.ndarray, max_tokens: int, width: int, device: torch.device
) -> list[np.ndarray]:
    """All examples, from short to long, in batches of at most max_tokens, each padded to its
    longest or to `width`; on a CPU in smaller ones."""
    if device.type == "cpu":
        max_tokens = min(max_tokens, CPU_TOKENS)
    order = np.argsort(lengths, kind="stable")
    batches = []
    first = 0
    for end in range(1, len(order)):
        size_with_next = (end + 1 - first) * (width or lengths[order[end]])
        if size_with_next > max_tokens:
            batches.append(order[first:end])
            first = end
    if len(order):
        batches.append(order[first:])
    return batches


def score(strategy: Single, inputs: Inputs, max_tokens: int) -> np.ndarray:
    """Scores (N, n_classes) of a split, its batches shared by all data ranks.

    Each makes the same number of passes (one without a batch left reads the first again, for
    nothing), so that a layout whose forward communicates works here, too."""
    batches = length_batches(inputs.data.lengths, max_tokens, inputs.width, inputs.device)
    n_classes, _ = strategy.shapes["head.weight"]
    scores = np.zeros((len(inputs.data.ids), n_classes))
    for first in range(0, len(batches), strategy.data_size):
        mine = first + strategy.data_rank
        rows = batches[mine] if mine < len(batches) else batches[0]
        x, lengths, reads = inputs.of(rows)
        found = strategy.evaluate(x, lengths, None, reads)
        if mine < len(batches):
            scores[rows] = found.cpu().double().numpy()  # MPS has no float64
    strategy.settle()
    return np.array(strategy.sum(*scores.ravel())).reshape(scores.shape)
