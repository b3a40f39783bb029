"""Token files -> batches.

The batch of a step is a pure function of (data, seed, indices). So resuming is exact, the number of processes
may change between runs, and there is no loader state to save, or to lose.
"""

from typing import TYPE_CHECKING

import numpy as np

from smallgpt.console import UserError
from smallgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


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

    A Feistel network is a bijection of [0, 4**half); whatever lands outside [0, n) goes round again (cycle
    walking), four times at most on average (Black and Rogaway 2002).
    """
    half = (max(n - 1, 1).bit_length() + 1) // 2
    x, key = i.astype(np.uint64), np.broadcast_to(key, i.shape)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & (2**half - 1)
        for turn in range(6):
            left, right = (
                right,
                left ^ (mix(right ^ mix(key[todo] + np.uint64(turn))) & (2**half - 1)),
            )
        x[todo] = (left << half) | right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


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
        eval_blocks: int,
    ) -> None:
        self.tokenizer, self.fingerprint, self.block_size = tokenizer, fingerprint, block_size
        trains = [
            (train, weight)
            for (train, _), weight in zip(tokens, weights, strict=True)
            if len(train)
        ]
        self._train = [train for train, _ in trains]
        self._val = [val for _, val in tokens]
        self.n_train_tokens, self.n_val_tokens = (
            sum(map(len, side)) for side in (self._train, self._val)
        )
        if not self.n_train_tokens + self.n_val_tokens:
            raise UserError("the corpus is empty: the files of data.path hold no dialogue")
        if self.n_train_tokens <= block_size:
            raise UserError(
                f"the corpus has {self.n_train_tokens:,} training tokens, shorter than one block "
                f"of block_size={block_size}: use a smaller block_size or more text"
            )
        if not self.n_val_tokens:
            raise UserError(
                "the validation split is empty: raise data.val_fraction, change data.split_seed "
                "or add dialogues"
            )
        self._n_blocks = [max(1, len(train) // block_size) for train in self._train]
        draws = [max(1, round(w * n)) for n, (_, w) in zip(self._n_blocks, trains, strict=True)]
        self._ends = np.cumsum(draws)  # of each source among the draws of an epoch
        self._draws = np.array(draws)
        self.blocks_per_epoch = int(self._ends[-1])
        self._val_starts = np.cumsum([0, *map(len, self._val)])[
            :-1
        ].tolist()  # read one after the other
        self._all_val_blocks = -(-(self.n_val_tokens - 1) // block_size)
        self.n_val_blocks = min(eval_blocks or self._all_val_blocks, self._all_val_blocks)
        self._bytes = tokenizer.token_bytes()

    def train_batch(self, indices: range, seed: int) -> "tuple[Tensor, Tensor]":
        """x, y int64 (len(indices), block_size) of global sample indices (step * rows per step + row).

        An epoch visits its blocks in an order of its own, and every pass over a source shifts the block grid.
        """
        epoch, place = np.divmod(
            np.arange(indices.start, indices.stop, indices.step), self.blocks_per_epoch
        )
        slot = permute(place, self.blocks_per_epoch, key_of(seed, 0, epoch))
        source = np.searchsorted(self._ends, slot, side="right")
        rows = np.empty((len(slot), self.block_size + 1), np.int64)
        for s in np.unique(source):
            mine, tokens, n, draws = source == s, self._train[s], self._n_blocks[s], self._draws[s]
            # the c-th draw ever from this source is block c % n of pass c // n: a weight of 0.5 takes turns
            passes, block = np.divmod(epoch[mine] * draws + slot[mine] - (self._ends[s] - draws), n)
            key = key_of(seed, 1 + s, passes)
            start = permute(block, n, key) * self.block_size + (key % self.block_size).astype(
                np.int64
            )
            rows[mine] = tokens[(start[:, None] + np.arange(self.block_size + 1)) % len(tokens)]
        return self._inputs_and_targets(rows)

    def val_batch(self, indices: range) -> "tuple[Tensor, Tensor]":
        """x, y int64 (len(indices), block_size) of the fixed validation blocks range(n_val_blocks).

        The last block is padded; an index past it gives a row with no valid target.
        """
        rows = np.full((len(indices), self.block_size + 1), self.tokenizer.pad, np.int64)
        for row, i in zip(rows, indices, strict=True):
            left = i * self._all_val_blocks // self.n_val_blocks * self.block_size  # evenly spaced
            right = left + self.block_size + 1
            found = np.concatenate(
                [
                    tokens[max(left - at, 0) : max(right - at, 0)]
                    for tokens, at in zip(self._val, self._val_starts, strict=True)
                ]
            )
            row[: len(found)] = found
        return self._inputs_and_targets(rows)

    def val_bytes(self, y: "Tensor") -> int:
        """UTF-8 bytes of text that the valid targets in y stand for."""
        return int(self._bytes[y[y >= 0].cpu().numpy()].sum())

    def _inputs_and_targets(self, rows: np.ndarray) -> "tuple[Tensor, Tensor]":
        """(K, block_size + 1) -> x, y; no dialogue's start is to be predicted from the one before."""
        import torch

        y = rows[:, 1:]
        ignored = (y == self.tokenizer.bos) | (y == self.tokenizer.pad)
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(np.where(ignored, -1, y))
