"""Bits per byte of runs on held-out dialogues, file by file: one run beside another.

    python bench/held_out.py checkpoints/bilingual checkpoints/before \\
        --text zh 'data/base/zh_*.txt' --text en 'data/base/en_*.txt'

A run is judged on the dialogues that its own settings held out (data.val_fraction and
data.split_seed, which must be the same in all runs), in blocks as long as its context. The last
column is how far a run is below the last one.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.common import heading, parser, row  # noqa: E402
from smallgpt import console  # noqa: E402
from smallgpt.console import UserError  # noqa: E402
from smallgpt.runs.checkpoint import Checkpoint  # noqa: E402
from smallgpt.text.tokens import DataSettings, prepare  # noqa: E402
from smallgpt.weights.pretrained import open_model  # noqa: E402
from train import to_batch  # noqa: E402

ROWS = 16  # blocks a pass


@dataclass
class Judged:
    """A run's result on one text."""

    bits_per_byte: float
    n_bytes: int  # that were held out


def main() -> None:
    options = arguments().parse_args()
    texts = dict(options.text)
    results = {run: judge(run, texts, options.cache) for run in options.runs}
    first = results[options.runs[0]]
    sizes = {name: found.n_bytes for name, found in first.items()}
    for run, found in results.items():
        for name, size in sizes.items():
            if found[name].n_bytes != size:
                raise UserError(f"{run} held out other dialogues of {name} than {options.runs[0]}")
    print("held-out bytes: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()) + "\n")
    titles = ["run"]
    for name in texts:
        titles += [name, "below the last"]
    print(heading(titles))
    last = results[options.runs[-1]]
    for run, found in results.items():
        cells = [run]
        for name in texts:
            bits = found[name].bits_per_byte
            below = 1 - bits / last[name].bits_per_byte
            cells += [f"{bits:.4f}", f"{below:.1%}"]
        print(row(cells))


def arguments() -> argparse.ArgumentParser:
    p = parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN")
    p.add_argument("--text", nargs=2, action="append", required=True, metavar=("NAME", "GLOB"))
    p.add_argument("--cache", default="data/tokens", help="folder of the tokenised files")
    return p


def judge(run: str, texts: dict[str, str], cache: str) -> dict[str, Judged]:
    """The best checkpoint of a run on what it held out of each text."""
    found, model, tokenizer = open_model(run)
    model.eval()
    split = split_of(found)
    judged = {}
    for name, pattern in texts.items():
        data = DataSettings(path=pattern, cache=cache, eval_blocks=0, **split)
        corpus = prepare(data, tokenizer, model.config.block_size, quiet=True)
        nats = 0.0
        n_bytes = 0
        for first in range(0, corpus.n_val_blocks, ROWS):
            x, y = corpus.val_batch(range(first, first + ROWS))
            isolate = found.meta["settings"]["data.isolate"]
            batch = to_batch(x, y, corpus, isolate, torch.device("cpu"))
            with torch.inference_mode():
                nats += float(model(*batch.inputs))
            n_bytes += corpus.val_bytes(y)
        judged[name] = Judged(nats / math.log(2) / n_bytes, n_bytes)
    return judged


def split_of(found: Checkpoint) -> dict[str, float | int]:
    """What decided which dialogues a run held out."""
    saved = found.meta["settings"]
    try:
        return {name: saved[f"data.{name}"] for name in ("val_fraction", "split_seed")}
    except KeyError:
        raise UserError(f"{found.path} does not record how its text was split") from None


if __name__ == "__main__":
    console.run(main)
