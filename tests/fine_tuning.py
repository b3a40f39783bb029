"""What tests of fine-tuning share: a tiny trunk, a tiny set, a run of a second in this process, and
several runs in one group of processes (`main`)."""

import csv
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import write_csv
from model import GPT, GPTConfig
from sentiment_train import SentimentSettings, finetune
from smallgpt import settings
from smallgpt.parallel.world import World, start
from smallgpt.sentiment import report
from smallgpt.tokenizer import STAND_INS
from smallgpt.weights import forms
from smallgpt.weights.gpt2 import FORM

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
BLOCK = 48
SMALL = {
    "device": "cpu",
    "dtype": "float32",
    "max_steps": 8,
    "batch_size": 16,
    "eval_every": 4,
    "log_every": 1,
    "optim.lr": 0.01,
    "optim.warmup": 2,
}
WORDS = {
    "bad": ["dirty", "awful", "noisy", "很差", "太吵"],
    "good": ["lovely", "great", "quiet", "很好", "干净"],
    "": [
        *"the room was near a big old station, we had our dinner there".split(),
        *"房间 离车站 不远 我们 吃了晚饭".split(),
    ],
}


def made(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """n different texts, most of them short, each with a word that decides its label; four of ten
    are bad."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        label = "bad" if i % 5 < 2 else "good"
        words = draw.choices(WORDS[""], k=min(20, int(draw.paretovariate(0.8))))
        words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS[label]))
        rows.append((f"{' '.join(words)} {seed}.{i}", label))
    return rows


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """300 reviews; some hold commas, quotes and newlines."""
    rows = [
        (t + ', said "he"\nand left' if i % 10 == 0 else t, label)
        for i, (t, label) in enumerate(made(300))
    ]
    return write_csv(tmp_path_factory.mktemp("reviews") / "splits.csv", rows)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """160 pairs: two texts with the same words in another order, or with other ones."""
    draw = random.Random(0)
    words = "red blue green old new big small dirty lovely quiet room station 房间 离车站".split()
    rows = []
    for i in range(160):
        label = "good" if i % 2 else "bad"  # alike or not
        first = draw.sample(words, 4)
        second = draw.sample(first if i % 2 else words, 4)
        rows.append((f"{' '.join(first)} {i}", " ".join(second), label))
    header = ("Text", "Second", "Sentiment")
    return write_csv(tmp_path_factory.mktemp("pairs") / "pairs.csv", rows, header)


@pytest.fixture(scope="session")
def trunk(tmp_path_factory, tiny, run) -> Path:
    """A run of train.py with two blocks."""
    out = tmp_path_factory.mktemp("pretrained")
    shape = dict(model__n_layer=2, model__block_size=BLOCK, batch_tokens=4 * BLOCK)
    result = run("train", tiny(out, run="trunk", max_steps=4, prompts="[]", **shape))
    assert result.status == 0, result.err
    return out / "trunk"


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Path:
    """The files of a GPT-2 of two blocks that knows 256 bytes and <|endoftext|>: our special tokens
    are new to it."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPTConfig(**FORM, vocab_size=257, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32)
    weights = dict(GPT(config).named_parameters())
    save_file(forms.their_tensors(weights, config, forms.GPT2), folder / "model.safetensors")
    sizes = dict(vocab_size=257, n_positions=BLOCK, n_layer=2, n_head=2, n_embd=32)
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    ids = {token: i for i, token in enumerate([*STAND_INS, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def fine(trunk, labelled) -> Callable[..., list[str]]:
    """fine(out_dir, key=value...) -> sentiment_train.py's arguments; a dot in a key is written
    `__`."""

    def args(out_dir: Path, **changes: object) -> list[str]:
        keys = {**SMALL, "trunk": trunk, "data.path": labelled, "out_dir": out_dir, "run": "r"}
        keys |= {k.replace("__", "."): v for k, v in changes.items()}
        return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items()]

    return args


@pytest.fixture
def fit(fine, tmp_path, monkeypatch) -> Callable[..., Path]:
    """fit(key=value...) -> the folder of a finished run, made in this process, without pictures and
    baselines."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(report, "baselines", lambda *_: {})

    def fit(**changes: object) -> Path:
        s = settings.load(SentimentSettings, fine(tmp_path, **changes))
        assert finetune(s, ALONE) == 0
        return tmp_path / s.run

    return fit


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def predictions(folder: Path) -> list[dict[str, str]]:
    with open(folder / "predictions.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_predictions(a: Path, b: Path, tolerance: float) -> None:
    """The same texts in the same order, with the same probabilities (which the file rounds to
    1e-4)."""
    ours, theirs = predictions(a), predictions(b)
    assert len(ours) == len(theirs) > 20
    for x, y in zip(ours, theirs, strict=True):
        assert (x["text"], x["label"]) == (y["text"], y["label"])
        assert float(x["p_good"]) == pytest.approx(float(y["p_good"]), abs=tolerance + 1.01e-4)


def main(after_each: Callable[[SentimentSettings], None] = lambda s: None) -> int:
    """In each process of a group: the fine-tunings whose settings a JSON file lists."""
    report.draw = lambda *_: None
    report.baselines = lambda *_: {}
    with start("cpu") as world:
        for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            s = settings.load(SentimentSettings, arguments)
            assert finetune(s, world) == 0
            after_each(s)
    return 0
