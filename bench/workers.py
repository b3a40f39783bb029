"""What bench/time_to_quality.py starts: a training that tells each step, a preparation, a judge.

    python bench/workers.py JOB SETTINGS.yaml [...]

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


@dataclass
class Preparation:
    """What text and tokens are made from. Unlike TrainSettings it needs no torch."""

    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    block_size: Positive = 256


# ---- trainings


def ours(config: str, evaluate_at: str) -> int:
    """train.py; only when it evaluates is decided here."""
    import train
    from smallgpt.runs.run import Run

    marks = set(json.loads(evaluate_at))

    def is_due(run: Run, every: int) -> bool:
        return run.step in marks and run.step not in run.history

    Run.due = is_due
    sys.argv = ["train.py", config]
    return train.main()


def hugging_face(config: str, evaluate_at: str) -> None:
    """transformers' GPT-2 in a small loop, with our tokens, batches and AdamW."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from model import IGNORE
    from smallgpt import hardware
    from smallgpt.optim import lr_factor, make_optimizers, set_lr
    from smallgpt.parallel.strategy import share_batch
    from train import TrainSettings, round_vocabulary, to_batch

    s = settings.load(TrainSettings, [config])
    marks = set(json.loads(evaluate_at))
    device = hardware.choose_device(s.device)
    dtype, why = hardware.choose_dtype(s.dtype, device)
    corpus = prepare(s.data, s.tokenizer, s.model.block_size)
    round_vocabulary(s.model, corpus.tokenizer.vocab_size)
    torch.manual_seed(s.seed)
    model = gpt2_of_hugging_face(s.model).to(device).train()
    forward = torch.compile(model) if s.compile == "true" else model
    optimizers = make_optimizers(dict(model.named_parameters()), s.optim)
    shares = share_batch(s.batch_tokens, s.model.block_size, s.micro_batch, 1)
    autocast = hardware.autocast(device, dtype)
    print(f"device   {device.type}; {hardware.name_of(dtype)}: {why}; compile={s.compile}")

    def nats_of(x: Tensor, y: Tensor) -> Tensor:
        """Summed loss of targets y (B, T), given tokens x (B, T)."""
        with autocast:
            logits = forward(input_ids=x, use_cache=False).logits  # (B, T, V)
        flat = logits.float().flatten(0, 1)
        return F.cross_entropy(flat, y.flatten(), ignore_index=IGNORE, reduction="sum")

    @torch.no_grad()
    def evaluate() -> str:
        """The held-out loss, as train.py prints it."""
        model.eval()
        nats = 0.0
        tokens = n_bytes = 0
        for first in range(0, corpus.n_val_blocks, shares.micro):
            x, y = corpus.val_batch(range(first, first + shares.micro))
            batch = to_batch(x, y, corpus, False, device)
            x_there, y_there, _ = batch.inputs
            nats += float(nats_of(x_there, y_there))
            tokens += batch.n_targets
            n_bytes += corpus.val_bytes(y)
        model.train()
        return f"val loss {nats / tokens:.4f} | {nats / math.log(2) / n_bytes:.4f} bits/byte"

    for step in range(s.max_steps):
        set_lr(optimizers, lr_factor(step, s.max_steps, s.optim))
        batches = []
        for rows in shares.of(step, 0):
            x, y = corpus.train_batch(rows, s.seed)
            batches.append(to_batch(x, y, corpus, False, device))
        targets = sum(batch.n_targets for batch in batches)
        nats = 0.0
        for batch in batches:
            x, y, _ = batch.inputs
            loss = nats_of(x, y)
            (loss / targets).backward()
            nats += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.optim.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        print(f"step {done}/{s.max_steps} | train loss {nats / targets:.4f}")
        if done in marks:
            print(f"step {done}/{s.max_steps} | {evaluate()}")


def gpt2_of_hugging_face(config):
    """GPT2LMHeadModel of the same shape, with fused attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(theirs)


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
            _, y = corpus.val_batch(range(block, block + 1))
            yield corpus.val_bytes(y)

    tell_done(held_out_bytes())


def token_ids(config: str, folder: str) -> None:
    """Our token files as nanoGPT reads them, the sources one after the other."""
    s = settings.load(Preparation, [config])
    corpus = prepare(s.data, s.tokenizer, s.block_size, quiet=True)
    tokenizer = corpus.tokenizer
    sizes = tokenizer.token_bytes()
    train = np.concatenate([file[:] for file in corpus._train])
    val = np.concatenate([file[:] for file in corpus._val])
    rows = 64 * math.ceil(tokenizer.vocab_size / 64)
    write_nanogpt_data(Path(folder), train, val, rows)
    write_alphabet(Path(folder), sizes, ignored=tokenizer.bos)
    tell_done(iter([int(sizes[val[1:]].sum())]))


def characters(config: str, folder: str) -> None:
    """The dialogues in characters, as nanoGPT's data/shakespeare_char/prepare.py makes them."""
    s = settings.load(Preparation, [config])
    Path(s.data.cache).mkdir(parents=True, exist_ok=True)
    texts: dict[bool, list[str]] = {True: [], False: []}
    for source in find_sources(s.data.path, Path(s.data.cache)):
        for turns in read_dialogues(source.path, s.data.errors):
            text = "\n".join(turns) + "\n\n"
            texts[held_out(turns, s.data)].append(text)
    train = "".join(texts[False])
    val = "\n" + "".join(texts[True])  # its first character is no target
    alphabet = sorted(set(train) | set(val))
    ids = {character: i for i, character in enumerate(alphabet)}
    write_nanogpt_data(
        Path(folder),
        np.fromiter(map(ids.get, train), np.uint16, len(train)),
        np.fromiter(map(ids.get, val), np.uint16, len(val)),
        len(alphabet),
    )
    sizes = [len(character.encode("utf-8")) for character in alphabet]
    write_alphabet(Path(folder), np.array(sizes))
    tell_done(iter([len(val[1:].encode("utf-8"))]))


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
    meta = pickle.dumps({"vocab_size": vocab_size})
    (folder / "meta.pkl").write_bytes(meta)


def write_alphabet(folder: Path, sizes: np.ndarray, ignored: int = -1) -> None:
    """What the judge must know: the bytes that each id stands for, and the id that is no target,
    as a bos is none."""
    alphabet = {"bytes": sizes.tolist(), "ignored": ignored}
    (folder / "alphabet.json").write_text(json.dumps(alphabet), encoding="utf-8")


# ---- the judge


def judge(checkout: str, folder: str, device: str, *snapshots: str) -> None:
    """Prints the bits per byte of checkpoints of nanoGPT over all of val.bin, a line each."""
    import torch

    from bench.common import import_nanogpt

    theirs = import_nanogpt(checkout)
    alphabet = json.loads(Path(folder, "alphabet.json").read_text(encoding="utf-8"))
    sizes = np.array(alphabet["bytes"])
    val = np.fromfile(Path(folder, "val.bin"), np.uint16).astype(np.int64)
    for file in snapshots:
        saved = torch.load(file, map_location=device, weights_only=True)
        model = theirs.GPT(theirs.GPTConfig(**saved["model_args"])).to(device).eval()
        weights = {}
        for name, weight in saved["model"].items():
            weights[name.removeprefix("_orig_mod.")] = weight
        model.load_state_dict(weights)
        nats = 0.0
        n_bytes = 0
        for x, y in blocks(val, saved["model_args"]["block_size"]):
            is_target = (y >= 0) & (y != alphabet["ignored"])
            y = np.where(is_target, y, -1)  # which nanoGPT ignores
            x_there, y_there = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
            with torch.no_grad():
                _, loss = model(x_there, y_there)
            nats += float(loss) * int(is_target.sum())
            n_bytes += int(sizes[y[is_target]].sum())
        bits_per_byte = nats / math.log(2) / n_bytes
        print(json.dumps({"snapshot": file, "bits_per_byte": bits_per_byte, "bytes": n_bytes}))


def blocks(ids: np.ndarray, block_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """x, y (JUDGED_ROWS, block_size) of all ids but the first, each once a target; y is padded
    with -1."""
    n_targets = len(ids) - 1
    per_pass = JUDGED_ROWS * block_size
    for start in range(0, n_targets, per_pass):
        part = ids[start : start + per_pass + 1]
        x = np.zeros(per_pass, np.int64)
        y = np.full(per_pass, -1, np.int64)
        x[: len(part) - 1] = part[:-1]
        y[: len(part) - 1] = part[1:]
        yield x.reshape(JUDGED_ROWS, block_size), y.reshape(JUDGED_ROWS, block_size)


JOBS = {
    "ours": ours,
    "hf": hugging_face,
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
