"""What a large corpus costs: its start, and a batch of it, by time and by memory.

    python bench/large.py [--tokens 10_000_000 1_000_000_000_000] [--files 1 1000]

The token files are sparse: they have the size named and take no room on the disk. Each row is
measured in a process of its own. Its batches have 64 rows of 1,024 tokens, are all different, and
the best of 20 counts. The batches of a sparse file come through the page cache like those of a
real one, without the time of the disk.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import heading, memory_of_this, numbers_of, parser, row  # noqa: E402
from smallgpt.text.tokens import DataSettings, prepare  # noqa: E402
from smallgpt.tokenizer import TokenizerSettings  # noqa: E402

TOKENIZER = TokenizerSettings("char", min_count=1)
ROWS, BLOCK_SIZE, ROUNDS = 64, 1024, 20


def make(folder: Path, n_files: int, n_tokens: int) -> DataSettings:
    """A cache of small chats, its token files then stretched to n_tokens in all."""
    chats = folder / "chats"
    chats.mkdir()
    for i in range(n_files):
        lines = [f"question {i} {k}\nanswer {i * k}\n\n" for k in range(300)]
        (chats / f"{i}.txt").write_text("".join(lines), encoding="utf-8")
    data = DataSettings(path=str(chats / "*.txt"), cache=str(folder / "cache"))
    prepare(data, TOKENIZER, BLOCK_SIZE, quiet=True)
    for file in Path(data.cache).glob("*/meta.json"):
        meta = json.loads(file.read_text(encoding="utf-8"))
        meta["val"] = n_tokens // n_files // 100
        meta["train"] = n_tokens // n_files - meta["val"]
        for side in ("train", "val"):
            os.truncate(file.parent / f"{side}.bin", meta[side] * 2)  # uint16
        file.write_text(json.dumps(meta), encoding="utf-8")
    return data


def one(path: str, cache: str) -> None:
    """In a process of its own: print what a start and a batch cost."""
    import torch  # noqa: F401, its import is not what is measured

    import model  # noqa: F401

    data = DataSettings(path=path, cache=cache)
    start = time.perf_counter()
    corpus = prepare(data, TOKENIZER, BLOCK_SIZE, quiet=True)
    startup = time.perf_counter() - start
    corpus.train_batch(range(ROWS), 1)
    before = memory_of_this("VmRSS")
    train_times = []
    val_times = []
    for i in range(ROUNDS):
        rows = range(i * ROWS, (i + 1) * ROWS)
        start = time.perf_counter()
        corpus.train_batch(rows, 0)
        train_times.append(time.perf_counter() - start)
        start = time.perf_counter()
        corpus.val_batch(range(i, i + ROWS))
        val_times.append(time.perf_counter() - start)
    print(startup, 1e3 * min(train_times), 1e3 * min(val_times))
    print(before, memory_of_this("VmRSS") - before)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tokens", nargs="+", type=int, default=[10**7, 10**12])
    p.add_argument("--files", nargs="+", type=int, default=[1, 1000])
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        one(*args.one)
        return
    titles = ["tokens", "files", "start, s", "batch, ms", "validation, ms"]
    print(heading([*titles, "MiB: then, 20 batches more"]))
    for n_files in args.files:
        for n_tokens in args.tokens:
            with tempfile.TemporaryDirectory() as folder:
                data = make(Path(folder), n_files, n_tokens)
                found = numbers_of(__file__, "--one", data.path, data.cache)
            startup, train, val, before, more = found
            cells = (
                f"{n_tokens:,}",
                f"{n_files:,}",
                f"{startup:.2f}",
                f"{train:.1f}",
                f"{val:.1f}",
                f"{before:.0f}, {more:.0f}",
            )
            print(row(cells), flush=True)


if __name__ == "__main__":
    main()
