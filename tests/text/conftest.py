"""Small chat files, and corpora made of them."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from smallgpt.text.batches import Corpus
from smallgpt.text.tokens import DataSettings, prepare
from smallgpt.tokenizer import TokenizerSettings


@pytest.fixture
def write_chat() -> Callable[..., Path]:
    """write_chat(path, n, seed) -> a file of n dialogues, Chinese and English, all different."""

    def write(path: Path, n: int = 300, seed: int = 0) -> Path:
        draw = random.Random(seed)
        words = ["你好", "吃了吗", "天气不错", "hello", "fine", "🙂", "再见", "why not"]
        dialogues = []
        for i in range(n):
            n_turns = draw.randint(1, 4)
            turns = [f"{i} {' '.join(draw.choices(words, k=5))}\n" for _ in range(n_turns)]
            dialogues.append("".join(turns))
        path.write_text("\n".join(dialogues), encoding="utf-8")
        return path

    return write


@pytest.fixture
def settings(tmp_path: Path, write_chat) -> Callable[..., DataSettings]:
    """settings(*paths, **changes) -> DataSettings of these files, by default of a new one."""

    def make(*paths: object, **changes: object) -> DataSettings:
        found = [str(path) for path in paths] or [str(write_chat(tmp_path / "chat.txt"))]
        defaults = {"path": found, "val_fraction": 0.1, "cache": str(tmp_path / "cache")}
        return DataSettings(**defaults | changes)

    return make


@pytest.fixture
def ready() -> Callable[..., Corpus]:
    """ready(data, block_size) -> a corpus of characters."""

    def ready(data: DataSettings, block_size: int = 16, quiet: bool = True) -> Corpus:
        tokenizer = TokenizerSettings(kind="char", min_count=1)
        return prepare(data, tokenizer, block_size, quiet)

    return ready
