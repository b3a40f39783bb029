"""A corpus of 10^12 tokens and more: nothing is read at its start, and no index overflows."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model import IGNORE
from smallgpt.text.batches import Corpus, TokenFile
from smallgpt.text.tokens import open_tokens

N_TRAIN = 2**41  # tokens: places past 2**31 and 2**40 come up in every batch
N_VAL = 2**33
BLOCK_SIZE = 1024


class Special:
    bos, pad = 1, 4

    @staticmethod
    def token_bytes() -> np.ndarray:
        return np.ones(2**16, np.int64)


class Places:
    """Tokens without a file: the one at place k is 10 + k."""

    def __len__(self) -> int:
        return N_TRAIN

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(N_TRAIN)
        return np.arange(start, stop) + 10


def corpus(train: object, val: object) -> Corpus:
    return Corpus(Special(), [[train, val]], [1.0], "f", BLOCK_SIZE, eval_blocks=0)


def places_of(rows: range) -> np.ndarray:
    """(K, BLOCK_SIZE): where in the corpus the tokens of these rows are."""
    x, y = corpus(Places(), np.arange(10, 10**4)).train_batch(rows, seed=0)
    assert torch.equal(x + 1, y)  # in a row one place follows the other
    return x.numpy() - 10


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A folder of token files with N_TRAIN and N_VAL tokens, all 0 and none on the disk."""
    meta = {"dtype": "uint16", "train": N_TRAIN, "val": N_VAL, "counts": {}}
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    for side in ("train", "val"):
        file = tmp_path / f"{side}.bin"
        file.touch()
        try:
            os.truncate(file, 2 * meta[side])
        except OSError as error:
            pytest.skip(f"no sparse files of 4 TB here: {error}")
        if getattr(file.stat(), "st_blocks", 10**9) > 1000:
            pytest.skip("files are not sparse here")
    return tmp_path


def test_rows_lie_anywhere_in_a_large_corpus():
    """An index of 32 bits would wrap, and repeat the beginning of the corpus."""
    places = places_of(range(4000))
    firsts = places[:, 0]
    assert 0 <= places.min() and places.max() < N_TRAIN
    assert len(set(firsts // BLOCK_SIZE)) == 4000
    assert (firsts > 2**40).sum() > 1800 and (firsts < 2**40).sum() > 1800
    per_epoch = N_TRAIN // BLOCK_SIZE
    late = places_of(range(1000 * per_epoch, 1000 * per_epoch + 100))
    assert 0 <= late.min() and late.max() < N_TRAIN and len(set(late[:, 0])) == 100


def test_tokens_past_2_to_the_40_are_those_of_the_file(sparse):
    """The row of a place must come from that place of the file."""
    rows = range(8)
    places = places_of(rows)
    assert places.max() > 2**40
    with open(sparse / "train.bin", "r+b") as file:
        for row in places:
            file.seek(int(row[0]) * 2)
            file.write((row % 60_000 + 10).astype(np.uint16).tobytes())
    with open(sparse / "val.bin", "r+b") as file:
        file.seek((N_VAL - 3) * 2)
        file.write(np.array([21, 22, 23], np.uint16).tobytes())
    found = open_tokens(sparse)
    large = corpus(found.train, found.val)
    x, _ = large.train_batch(rows, seed=0)
    assert np.array_equal(x.numpy(), places % 60_000 + 10)
    assert large.n_val_blocks == N_VAL // BLOCK_SIZE
    x, y = large.val_batch(range(large.n_val_blocks - 1, large.n_val_blocks))
    assert x[0, -3:].tolist() == [21, 22, 23] and y[0, -3:].tolist() == [22, 23, IGNORE]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_a_large_corpus_starts_at_once_and_costs_no_memory(sparse):
    """Regression: the files were mapped. A row then left its pages and their page tables with the
    process, and with the system's read-ahead megabytes: seconds a batch."""

    def held() -> int:
        """KiB of mapped files and of page tables."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        values = dict(line.split(":", 1) for line in status.splitlines())
        return sum(int(values[name].split()[0]) for name in ("RssFile", "VmPTE"))

    start = time.process_time()
    found = open_tokens(sparse)
    large = corpus(found.train, found.val)
    assert time.process_time() - start < 3
    large.train_batch(range(64), seed=1)
    before = held()
    for step in range(100):
        large.train_batch(range(step * 64, (step + 1) * 64), seed=0)
    assert held() - before < 2048


def test_a_token_file_that_shrinks_is_named(tmp_path):
    """A mapped file ended the process with SIGBUS, without a word."""
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "train.bin")
    file = TokenFile(tmp_path / "train.bin", np.dtype(np.uint16), 20)
    assert file[3:6].tolist() == [3, 4, 5] and file[7:7].tolist() == []
    with pytest.raises(OSError, match=r"train.bin became shorter"):
        file[5:15]
