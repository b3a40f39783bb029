"""Token files -> batches.

The batch of a step is a pure function of (data, seed, indices). So resuming is exact, the number of
processes may change between runs, and there is no loader state to save, or to lose."""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smallgpt.console import UserError
from smallgpt.tokenizer import Tokenizer

if (
    TYPE_CHECKING
):  # importing torch takes a second or two, which what only counts or tokenises need not wait
    from torch import Tensor

FEISTEL_ROUNDS = 6
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
COUNTED_AT_ONCE = 1 << 24  # tokens


@dataclass(frozen=True)
class TokenFile:
    """Token ids on disk: `file[start:stop]` reads those and no others.

    It is not mapped into memory. The pages of a mapped file, and their page tables, stay with the
    process: 8 to 10 KiB for each row it ever read of a large corpus. And each mapping holds a
    descriptor, of which a process may have about a thousand.
    """

    path: Path
    dtype: np.dtype
    length: int  # tokens

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> np.ndarray:
        """OSError: the file is gone, or shorter than it was."""
        start, stop, _ = part.indices(self.length)
        tokens = np.empty(max(stop - start, 0), self.dtype)
        rest = memoryview(tokens.view(np.uint8))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start * self.dtype.itemsize)
            while len(rest):  # one call reads 2 GiB at most
                n_bytes = file.readinto(rest)
                if not n_bytes:
                    raise OSError(f"{self.path} became shorter while it was read: start again")
                rest = rest[n_bytes:]
        return tokens


def mix(x: np.ndarray) -> np.ndarray:
    """A well mixed hash of uint64: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = x + GOLDEN_RATIO
    x = (x ^ (x >> 30)) * MULTIPLIER_1
    x = (x ^ (x >> 27)) * MULTIPLIER_2
    return x ^ (x >> 31)


def key_of(seed: int, *parts: np.ndarray | int) -> np.ndarray:
    """A uint64 for (seed, parts...), elementwise where a part is an array."""
    key = np.array([seed % 2**64], np.uint64)
    for part in parts:
        number = np.asarray(part).astype(np.uint64)
        key = mix(key ^ number)
    return key


def permute(i: np.ndarray, n: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Where shuffling range(n) with `key` puts i: int64 (K,) in [0, n), in O(K) memory whatever n.

    n and key may differ from one to the next. A Feistel network permutes [0, 4**half_bits);
    whatever lands outside [0, n) goes round again (cycle walking), four times at most on average
    (Black and Rogaway 2002)."""
    n = np.broadcast_to(n, i.shape).astype(np.uint64)
    key = np.broadcast_to(key, i.shape)
    largest = np.maximum(n, 2) - 1
    _, bit_length = np.frexp(largest.astype(np.float64))  # exact below 2**53
    half_bits = (bit_length + 1) // 2
    half_bits = half_bits.astype(np.uint64)
    x = i.astype(np.uint64)
    outside = np.arange(len(x))
    while len(outside):
        x[outside] = _feistel(x[outside], half_bits[outside], key[outside])
        is_outside = x[outside] >= n[outside]
        outside = outside[is_outside]
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half_bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A bijection of [0, 4**half_bits): each round scrambles one half by the other."""
    low_bits = (np.uint64(1) << half_bits) - np.uint64(1)
    left = x >> half_bits
    right = x & low_bits
    for i in range(FEISTEL_ROUNDS):
        round_key = mix(key + np.uint64(i))
        mask = mix(right ^ round_key) & low_bits
        left, right = right, left ^ mask
    return (left << half_bits) | right


class Corpus:
    """Batches of token files.

    `tokens` holds (train, val) of each source, with ~id for an id that is read and never a target;
    `weights` its passes per epoch. Each source is read as a circle of `n_train // block_size`
    blocks (at least one). Where it closes, a bos starts the first dialogue, so nothing special
    happens there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: list[list[TokenFile]],
        weights: list[float],
        fingerprint: str,
        block_size: int,
        eval_blocks: int,  # at most so many for validation; 0 = all
        sources: Sequence[dict] = (),  # for meta.json: kind, path, weight and sha256 of each file
    ) -> None:
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.block_size = block_size
        self._row_length = block_size + 1  # inputs, and targets one to the right
        self.sources = list(sources)
        self._bytes = tokenizer.token_bytes()

        self._train: list[TokenFile] = []
        self._val: list[TokenFile] = []
        train_weights: list[float] = []
        for (train, val), weight in zip(tokens, weights, strict=True):
            self._val.append(val)
            if len(train):
                self._train.append(train)
                train_weights.append(weight)
        self.n_train_tokens = sum(map(len, self._train))
        self.n_val_tokens = sum(map(len, self._val))
        self._check_sizes()

        # an epoch draws weight * n_blocks blocks of each source
        n_blocks = [max(1, len(train) // block_size) for train in self._train]
        self._n_blocks = np.array(n_blocks, np.int64)
        wanted = np.array(train_weights) * self._n_blocks
        rounded = wanted.round().astype(np.int64)
        self._draws = rounded.clip(min=1)
        self._draws_end = self._draws.cumsum()  # of each source among those of an epoch
        self.blocks_per_epoch = int(self._draws_end[-1])

        # the sources are validated as one text, one after the other
        lengths = [len(val) for val in self._val]
        self._val_ends = list(itertools.accumulate(lengths))
        self._all_val_blocks = math.ceil((self.n_val_tokens - 1) / block_size)
        self.n_val_blocks = self._all_val_blocks
        if eval_blocks:
            self.n_val_blocks = min(eval_blocks, self._all_val_blocks)
        self._check_targets()

    def _check_sizes(self) -> None:
        """UserError where there is too little to train on, or nothing to validate with."""
        if not self.n_train_tokens + self.n_val_tokens:
            raise UserError("the corpus is empty: the files of data.path hold no dialogue")
        if not self.n_train_tokens or not self.n_val_tokens:
            n_dialogues = self._count_dialogues()
            if n_dialogues == 1:
                raise UserError(
                    "the corpus is a single dialogue, but training and validation each need some: "
                    "put a blank line between dialogues (in JSON Lines, one dialogue a line)"
                )
            if not self.n_train_tokens:
                raise UserError(
                    f"all {n_dialogues:,} dialogues are held out for validation: lower "
                    "data.val_fraction or change data.split_seed"
                )
            raise UserError(
                "the validation split is empty: raise data.val_fraction, change data.split_seed "
                f"or add dialogues to the {n_dialogues:,}"
            )
        if self.n_train_tokens <= self.block_size:
            raise UserError(
                f"the corpus has {self.n_train_tokens:,} training tokens, shorter than one block "
                f"of block_size={self.block_size}: use a smaller block_size or more text"
            )

    def _check_targets(self) -> None:
        """UserError where the validation blocks hold no target, as those of a long prompt do."""
        for i in range(self.n_val_blocks):
            start = self._val_start(i)
            targets = self._val_tokens(start + 1, start + self._row_length)
            if (targets >= 0).any():
                return
        raise UserError(
            f"the {self.n_val_blocks} validation blocks of {self.block_size} tokens hold no turn "
            "of the assistant: raise data.eval_blocks or data.val_fraction"
        )

    def _count_dialogues(self) -> int:
        total = 0
        for file in [*self._train, *self._val]:
            for first in range(0, len(file), COUNTED_AT_ONCE):
                tokens = file[first : first + COUNTED_AT_ONCE]
                starts = tokens == self.tokenizer.bos
                total += np.count_nonzero(starts)
        return total

    def train_batch(self, indices: range, seed: int) -> "tuple[Tensor, Tensor]":
        """x, y int64 (len(indices), block_size) of global samples (step * rows per step + row).

        An epoch visits its blocks in an order of its own, and every pass over a source shifts the
        block grid.
        """
        sample = np.arange(indices.start, indices.stop, indices.step, dtype=np.int64)
        epoch, position = np.divmod(sample, self.blocks_per_epoch)
        key = key_of(seed, 0, epoch)
        draw = permute(position, self.blocks_per_epoch, key)
        source = self._draws_end.searchsorted(draw, side="right")

        n_blocks = self._n_blocks[source]
        draws_per_epoch = self._draws[source]
        first_draw = self._draws_end[source] - draws_per_epoch
        nth_draw = epoch * draws_per_epoch + (draw - first_draw)  # of this source, ever
        # at a weight of 0.5, the second epoch draws what the first did not
        passes, nth_of_pass = np.divmod(nth_draw, n_blocks)
        key = key_of(seed, 1 + source, passes)
        block = permute(nth_of_pass, n_blocks, key)
        shift = (key % self.block_size).astype(np.int64)
        start = block * self.block_size + shift

        rows = np.empty((len(sample), self._row_length), np.int64)
        places = zip(source.tolist(), start.tolist(), strict=True)
        for row, place in zip(rows, places, strict=True):
            row[:] = self._train_tokens(*place)
        return self._inputs_and_targets(rows)

    def _train_tokens(self, source: int, start: int) -> np.ndarray:
        """The row (block_size + 1,) of a source that begins there."""
        tokens = self._train[source]
        start %= len(tokens)
        parts = []
        n_missing = self._row_length
        while n_missing:
            part = tokens[start : start + n_missing]
            parts.append(part)
            n_missing -= len(part)
            start = 0  # round the circle
        return np.concatenate(parts)

    def val_batch(self, indices: range) -> "tuple[Tensor, Tensor]":
        """x, y int64 (len(indices), block_size) of the fixed validation blocks range(n_val_blocks).

        The last block is padded; an index past it gives a row with no valid target.
        """
        rows = np.empty((len(indices), self._row_length), np.int64)
        rows.fill(self.tokenizer.pad)
        for row, i in zip(rows, indices, strict=True):
            start = self._val_start(i)
            found = self._val_tokens(start, start + self._row_length)
            row[: len(found)] = found
        return self._inputs_and_targets(rows)

    def _val_start(self, i: int) -> int:
        """Where in the validation text its i-th evaluated block begins; they are evenly spaced."""
        block = i * self._all_val_blocks // self.n_val_blocks
        return block * self.block_size

    def _val_tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the validation text, fewer at its end."""
        first = bisect.bisect_right(self._val_ends, start)
        last = bisect.bisect_left(self._val_ends, stop)
        parts = [np.empty(0, np.int64)]
        for source in range(first, min(last + 1, len(self._val))):
            tokens = self._val[source]
            source_start = self._val_ends[source] - len(tokens)
            left = max(start - source_start, 0)
            right = stop - source_start
            parts.append(tokens[left:right])
        return np.concatenate(parts)

    def val_bytes(self, y: "Tensor") -> int:
        """UTF-8 bytes of text that the valid targets in y stand for."""
        from model import IGNORE

        targets = y[y != IGNORE].cpu().numpy()
        lengths = self._bytes[targets]
        return int(lengths.sum())

    def _inputs_and_targets(self, rows: np.ndarray) -> "tuple[Tensor, Tensor]":
        """(K, block_size + 1) -> x, y. The start of a dialogue is no target of the one before."""
        import torch

        from model import IGNORE

        is_only_read = rows < 0
        ids = np.where(is_only_read, ~rows, rows)
        inputs = ids[:, :-1].copy()
        targets = ids[:, 1:]
        is_start = targets == self.tokenizer.bos
        is_padding = targets == self.tokenizer.pad
        is_ignored = is_start | is_padding | is_only_read[:, 1:]
        targets = np.where(is_ignored, IGNORE, targets)
        return torch.from_numpy(inputs), torch.from_numpy(targets)
