"""What bench/time_to_quality.py starts: a training that tells each step, a preparation, a judge.

    python bench/workers.py JOB [...]

Each job runs in a process of its own, imports only what it needs, and is timed by its lines.
"""

import json
import math
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from smallgpt import console, settings  # noqa: E402
from smallgpt.console import UserError  # noqa: E402
from smallgpt.settings import Positive  # noqa: E402
from smallgpt.text.tokens import (  # noqa: E402
    DataSettings,
    find_sources,
    held_out,
    prepare,
    read_dialogues,
)
from smallgpt.tokenizer import TokenizerSettings  # noqa: E402

JUDGED_ROWS = 16  # sequences of a forward pass
IGNORED = -1  # nanoGPT's target of a position that has none


@dataclass
class Preparation:
    """What text and tokens are made from. Unlike TrainSettings it needs no torch."""

    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    block_size: Positive = 256


# ---- trainings


def train_ours(config: str, evaluate_at: str) -> int:
    """train.py, evaluated after the steps of this JSON list."""
    import train
    from smallgpt.runs.run import Run

    steps = json.loads(evaluate_at)
    marks = set(steps)

    def is_due(run: Run, every: int) -> bool:
        return run.step in marks and run.step not in run.history

    Run.due = is_due
    sys.argv = ["train.py", config]
    return train.main()


def train_hugging_face(config: str, evaluate_at: str) -> None:
    """Hugging Face's GPT-2."""
    from bench import hugging_face

    steps = json.loads(evaluate_at)
    marks = set(steps)
    hugging_face.main(config, marks)


# ---- preparations: each prints a line when it is done, and then the bytes that are held out


def tell_done(held_out_bytes: Iterator[int]) -> None:
    """Counting them is no part of the preparation."""
    print("prepared")
    print(f"held out: {sum(held_out_bytes)} bytes")


def tokens(config: str) -> None:
    """Our token files, into data.cache."""
    s = settings.load(Preparation, [config])
    corpus = prepare(s.data, s.tokenizer, s.block_size)

    def held_out_bytes() -> Iterator[int]:
        for block in range(corpus.n_val_blocks):
            indices = range(block, block + 1)
            _, y = corpus.val_batch(indices)
            yield corpus.val_bytes(y)

    tell_done(held_out_bytes())


def token_ids(config: str, folder: str) -> None:
    """Our token files as nanoGPT reads them, the sources one after the other."""
    s = settings.load(Preparation, [config])
    corpus = prepare(s.data, s.tokenizer, s.block_size, quiet=True)
    tokenizer = corpus.tokenizer
    sizes = tokenizer.token_bytes()
    train_parts = [file[:] for file in corpus._train]
    val_parts = [file[:] for file in corpus._val]
    train = np.concatenate(train_parts)
    val = np.concatenate(val_parts)
    vocab_size = 64 * math.ceil(tokenizer.vocab_size / 64)  # as our model rounds it
    write_nanogpt_data(Path(folder), train, val, vocab_size)
    write_alphabet(Path(folder), sizes, ignored=tokenizer.bos)
    targets = val[1:]
    tell_done(iter(sizes[targets]))


def characters(config: str, folder: str) -> None:
    """The dialogues in characters, as nanoGPT's data/shakespeare_char/prepare.py makes them."""
    s = settings.load(Preparation, [config])
    train, val = read_texts(s.data)
    characters_in_use = set(train) | set(val)
    alphabet = sorted(characters_in_use)
    ids = {character: i for i, character in enumerate(alphabet)}

    def encode(text: str) -> np.ndarray:
        return np.fromiter(map(ids.get, text), np.uint32, len(text))

    val_ids = encode(val)
    write_nanogpt_data(Path(folder), encode(train), val_ids, len(alphabet))
    spelled = [character.encode("utf-8") for character in alphabet]
    sizes = np.array(list(map(len, spelled)))
    write_alphabet(Path(folder), sizes)
    targets = val_ids[1:]
    tell_done(iter(sizes[targets]))


def read_texts(data: DataSettings) -> tuple[str, str]:
    """The text to train on, and what is held out; a line break begins it, which is no target."""
    cache = Path(data.cache)
    cache.mkdir(parents=True, exist_ok=True)
    train = []
    val = ["\n"]
    for source in find_sources(data.path, cache):
        for dialogue in read_dialogues(source.path, data.errors):
            side = val if held_out(dialogue.spoken, data) else train
            text = "\n".join(dialogue.turns)
            side.append(text + "\n\n")
    return "".join(train), "".join(val)


def write_nanogpt_data(folder: Path, train: np.ndarray, val: np.ndarray, vocab_size: int) -> None:
    """The dataset that nanoGPT's train.py reads: ids below vocab_size, one after the other.

    UserError where its two bytes an id are too few."""
    if vocab_size > 1 << 16:
        raise UserError(
            f"nanoGPT's ids have two bytes, which are too few for {vocab_size}: lower "
            "tokenizer.vocab_size, or leave nanogpt-bpe out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    train.astype(np.uint16).tofile(folder / "train.bin")
    val.astype(np.uint16).tofile(folder / "val.bin")
    meta = {"vocab_size": vocab_size}
    pickled = pickle.dumps(meta)
    (folder / "meta.pkl").write_bytes(pickled)


def write_alphabet(folder: Path, sizes: np.ndarray, ignored: int = -1) -> None:
    """What the judge must know: the bytes that each id stands for, and the id that is no target,
    as a bos is none."""
    alphabet = {"bytes": sizes.tolist(), "ignored": ignored}
    text = json.dumps(alphabet)
    (folder / "alphabet.json").write_text(text, encoding="utf-8")


# ---- the judge of nanoGPT's checkpoints


def judge(checkout: str, folder: str, device: str, *snapshots: str) -> None:
    """Bits per byte of each snapshot over all of val.bin in this folder, a line each."""
    import torch

    from bench.common import import_nanogpt

    nanogpt = import_nanogpt(checkout)
    text = Path(folder, "alphabet.json").read_text(encoding="utf-8")
    alphabet = json.loads(text)
    sizes = np.array(alphabet["bytes"])
    val = np.fromfile(Path(folder, "val.bin"), np.uint16)
    for file in snapshots:
        saved = torch.load(file, map_location=device, weights_only=True)
        model = nanogpt_model(nanogpt, saved)
        model.to(device).eval()
        nats = 0.0
        n_bytes = 0
        for x, y in blocks(val, model.config.block_size):
            y[y == alphabet["ignored"]] = IGNORED
            targets = y[y != IGNORED]
            x_there = torch.from_numpy(x).to(device)
            y_there = torch.from_numpy(y).to(device)
            with torch.no_grad():
                _, mean_loss = model(x_there, y_there)
            nats += float(mean_loss) * len(targets)
            n_bytes += sizes[targets].sum()
        bits = nats / math.log(2)
        bits_per_byte = bits / n_bytes
        print(f"judged {Path(file).stem}: {bits_per_byte:.4f} bits per byte")


def nanogpt_model(nanogpt, saved: dict):
    """The model of a checkpoint; torch.compile has prefixed its names."""
    shape = saved["model_args"]
    config = nanogpt.GPTConfig(**shape)
    model = nanogpt.GPT(config)
    weights = {}
    for name, weight in saved["model"].items():
        plain_name = name.removeprefix("_orig_mod.")
        weights[plain_name] = weight
    model.load_state_dict(weights)
    return model


def blocks(ids: np.ndarray, block_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """x, y (JUDGED_ROWS, block_size) of all ids but the first, each once a target; IGNORED fills
    the last y."""
    shape = (JUDGED_ROWS, block_size)
    per_pass = JUDGED_ROWS * block_size
    for start in range(0, len(ids) - 1, per_pass):
        part = ids[start : start + per_pass + 1]
        n_targets = len(part) - 1
        x = np.zeros(per_pass, np.int64)
        y = np.full(per_pass, IGNORED, np.int64)
        x[:n_targets] = part[:-1]
        y[:n_targets] = part[1:]
        yield x.reshape(shape), y.reshape(shape)


JOBS = {
    "ours": train_ours,
    "hf": train_hugging_face,
    "tokens": tokens,
    "token_ids": token_ids,
    "characters": characters,
    "judge": judge,
}


def main() -> int | None:
    job, *arguments = sys.argv[1:]
    return JOBS[job](*arguments)


if __name__ == "__main__":
    console.run(main)
