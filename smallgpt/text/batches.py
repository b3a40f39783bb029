"""Token files -> batches.

The batch of a step is a pure function of (data, seed, indices). So resuming is exact, the number of processes
may change between runs, and there is no loader state to save, or to lose.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from smallgpt.console import UserError
from smallgpt.tokenizer import Tokenizer

if (
    TYPE_CHECKING
):  # importing torch takes a second or two, which what only counts or tokenises need not wait
    from torch import Tensor

FEISTEL_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """A well mixed hash of uint64: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> 31)


def key_of(seed: int, *parts: np.ndarray | int) -> np.ndarray:
    """A uint64 for (seed, parts...), elementwise where a part is an array."""
    key = np.array([seed % 2**64], np.uint64)
    for part in parts:
        key = mix(key ^ np.asarray(part).astype(np.uint64))
    return key


def permute(i: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where shuffling range(n) with `key` puts i: int64 (K,) in [0, n), in O(K) memory whatever n.

    A Feistel network permutes [0, 4**half_bits); whatever lands outside [0, n) goes round again (cycle
    walking), four times at most on average (Black and Rogaway 2002).
    """
    half_bits = (max(n - 1, 1).bit_length() + 1) // 2
    x = i.astype(np.uint64)
    key = np.broadcast_to(key, i.shape)
    outside = np.arange(len(x))
    while len(outside):
        x[outside] = _feistel(x[outside], half_bits, key[outside])
        outside = outside[x[outside] >= n]
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half_bits: int, key: np.ndarray) -> np.ndarray:
    """A bijection of [0, 4**half_bits): each round scrambles one half by the other."""
    low_bits = 2**half_bits - 1
    left = x >> half_bits
    right = x & low_bits
    for i in range(FEISTEL_ROUNDS):
        round_key = mix(key + np.uint64(i))
        scrambled = left ^ (mix(right ^ round_key) & low_bits)
        left, right = right, scrambled
    return (left << half_bits) | right


class Corpus:
    """Batches of token files. `tokens` holds (train, val) of each source, `weights` its passes per epoch.

    Each source is read as a circle of `n_train // block_size` blocks (at least one): where it closes, a bos
    starts the first dialogue, so nothing special happens there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: list[list[np.ndarray]],
        weights: list[float],
        fingerprint: str,
        block_size: int,
        eval_blocks: int,  # at most so many for validation; 0 = all
        sources: Sequence[dict] = (),  # for meta.json: kind, path, weight and sha256 of each file
    ) -> None:
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.block_size = block_size
        self.sources = list(sources)
        self._bytes = tokenizer.token_bytes()

        self._train = [train for train, _ in tokens if len(train)]
        self._val = [val for _, val in tokens]
        self.n_train_tokens = sum(map(len, self._train))
        self.n_val_tokens = sum(map(len, self._val))
        self._check_sizes()

        # an epoch draws weight * n_blocks blocks of each source
        weights = [w for w, (train, _) in zip(weights, tokens, strict=True) if len(train)]
        self._n_blocks = [max(1, len(train) // block_size) for train in self._train]
        draws = [max(1, round(w * n)) for w, n in zip(weights, self._n_blocks, strict=True)]
        self._draws = np.array(draws)
        self._draws_end = np.cumsum(draws)  # of each source among those of an epoch
        self.blocks_per_epoch = int(self._draws_end[-1])

        # the sources are validated as one text, one after the other
        self._val_ends = np.cumsum([len(val) for val in self._val])
        self._all_val_blocks = -(-(self.n_val_tokens - 1) // block_size)
        self.n_val_blocks = min(eval_blocks or self._all_val_blocks, self._all_val_blocks)

    def _check_sizes(self) -> None:
        """UserError where there is too little to train on, or nothing to validate with."""
        if not self.n_train_tokens + self.n_val_tokens:
            raise UserError("the corpus is empty: the files of data.path hold no dialogue")
        if not self.n_train_tokens or not self.n_val_tokens:
            bos = self.tokenizer.bos
            n_dialogues = sum(np.count_nonzero(t == bos) for t in self._train + self._val)
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
                f"the validation split is empty, of {n_dialogues:,} dialogues: raise "
                "data.val_fraction, change data.split_seed or add dialogues"
            )
        if self.n_train_tokens <= self.block_size:
            raise UserError(
                f"the corpus has {self.n_train_tokens:,} training tokens, shorter than one block "
                f"of block_size={self.block_size}: use a smaller block_size or more text"
            )

    def train_batch(self, indices: range, seed: int) -> "tuple[Tensor, Tensor]":
        """x, y int64 (len(indices), block_size) of global sample indices (step * rows per step + row).

        An epoch visits its blocks in an order of its own, and every pass over a source shifts the block grid.
        """
        sample = np.arange(indices.start, indices.stop, indices.step)
        epoch, position = np.divmod(sample, self.blocks_per_epoch)
        draw = permute(position, self.blocks_per_epoch, key_of(seed, 0, epoch))
        source_of = np.searchsorted(self._draws_end, draw, side="right")
        rows = np.empty((len(sample), self.block_size + 1), np.int64)
        for source in np.unique(source_of):
            mine = source_of == source
            rows[mine] = self._train_rows(source, epoch[mine], draw[mine], seed)
        return self._inputs_and_targets(rows)

    def _train_rows(
        self, source: int, epoch: np.ndarray, draw: np.ndarray, seed: int
    ) -> np.ndarray:
        """The blocks (K, block_size + 1) of draws (K,) that fall on one source in epochs (K,)."""
        tokens = self._train[source]
        n_blocks = self._n_blocks[source]
        draws_per_epoch = self._draws[source]
        draw_in_epoch = draw - (self._draws_end[source] - draws_per_epoch)
        # draw d ever of this source is block d % n_blocks of pass d // n_blocks: half a weight takes turns
        passes, block = np.divmod(epoch * draws_per_epoch + draw_in_epoch, n_blocks)
        key = key_of(seed, 1 + source, passes)
        shift = (key % self.block_size).astype(np.int64)
        start = permute(block, n_blocks, key) * self.block_size + shift
        positions = start[:, None] + np.arange(self.block_size + 1)
        return tokens[positions % len(tokens)]

    def val_batch(self, indices: range) -> "tuple[Tensor, Tensor]":
        """x, y int64 (len(indices), block_size) of the fixed validation blocks range(n_val_blocks).

        The last block is padded; an index past it gives a row with no valid target.
        """
        rows = np.full((len(indices), self.block_size + 1), self.tokenizer.pad, np.int64)
        for row, i in zip(rows, indices, strict=True):
            block = i * self._all_val_blocks // self.n_val_blocks  # evenly spaced
            found = self._val_tokens(block * self.block_size, self.block_size + 1)
            row[: len(found)] = found
        return self._inputs_and_targets(rows)

    def _val_tokens(self, start: int, length: int) -> np.ndarray:
        """`length` tokens of the validation text from `start` on, fewer at its end."""
        parts = []
        for tokens, end in zip(self._val, self._val_ends.tolist(), strict=True):
            offset = start - (end - len(tokens))
            parts.append(tokens[max(offset, 0) : max(offset + length, 0)])
        return np.concatenate(parts)

    def val_bytes(self, y: "Tensor") -> int:
        """UTF-8 bytes of text that the valid targets in y stand for."""
        from model import IGNORE

        targets = y[y != IGNORE].cpu().numpy()
        return int(self._bytes[targets].sum())

    def _inputs_and_targets(self, rows: np.ndarray) -> "tuple[Tensor, Tensor]":
        """(K, block_size + 1) -> x, y; no dialogue's start is to be predicted from the one before."""
        import torch

        from model import IGNORE

        inputs, targets = rows[:, :-1], rows[:, 1:]
        ignored = (targets == self.tokenizer.bos) | (targets == self.tokenizer.pad)
        targets = np.where(ignored, IGNORE, targets)
        return torch.from_numpy(inputs.copy()), torch.from_numpy(targets)
