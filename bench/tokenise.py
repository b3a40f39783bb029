"""How fast a corpus becomes token files, and in how much memory.

    python bench/tokenise.py data/*.txt [--megabytes 10 100]

Makes a corpus of each size by repeating the dialogues of the files (a number before each first
utterance keeps them apart), then times reading, splitting, encoding and writing, for a character
and a BPE tokenizer that exist already.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import heading, memory_of_this, numbers_of, parser, row  # noqa: E402
from smallgpt.text.formats import read_dialogues  # noqa: E402
from smallgpt.text.tokens import DataSettings, prepare  # noqa: E402
from smallgpt.tokenizer import Tokenizer, TokenizerSettings, train  # noqa: E402


def repeat(files: list[Path], size: int, out: Path) -> None:
    """Write about `size` bytes of dialogues to out."""
    dialogues = [found.turns for file in files for found in read_dialogues(file)]
    written, n = 0, 0
    with open(out, "w", encoding="utf-8") as f:
        while written < size:
            turns = dialogues[n % len(dialogues)]
            text = f"{n} " + "\n".join(turns) + "\n\n"
            f.write(text)
            written += len(text.encode())
            n += 1


def one(corpus: Path, tokenizer: Path, cache: Path) -> None:
    """In a process of its own, so that the peak memory is this run's: print seconds and MiB."""
    # forget the peak inherited from the parent
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    ready = Tokenizer.load(tokenizer)
    data = DataSettings(path=str(corpus), cache=str(cache))
    for _ in ("first", "again"):
        start = time.perf_counter()
        prepare(data, ready, 256, quiet=True)
        print(time.perf_counter() - start)
    largest_worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(memory_of_this("VmHWM"), largest_worker)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("files", nargs="+", type=Path)
    p.add_argument("--megabytes", nargs="+", type=int, default=[10, 100])
    p.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        one(*args.files)
        return
    print(f"{os.cpu_count()} cores\n")
    titles = ("text", "tokenizer", "MB/s", "later start, s", "peak MiB: main, largest worker")
    print(heading(titles))
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("char", "bpe"):
            tokenizer = Path(folder) / f"{kind}.json"
            dialogues = chain.from_iterable(map(read_dialogues, args.files))
            texts = chain.from_iterable(dialogue.turns for dialogue in dialogues)
            train(TokenizerSettings(kind), texts).save(tokenizer)
            for megabytes in args.megabytes:
                corpus = Path(folder) / f"{megabytes}.txt"
                if not corpus.exists():
                    repeat(args.files, megabytes * 10**6, corpus)
                cache = f"{folder}/cache-{kind}-{megabytes}"
                words = (__file__, "--one", str(corpus), str(tokenizer), cache)
                seconds, again, main_peak, worker_peak = numbers_of(*words)
                speed = corpus.stat().st_size / 1e6 / seconds
                cells = (
                    f"{megabytes} MB",
                    kind,
                    f"{speed:.1f}",
                    f"{again:.3f}",
                    f"{main_peak:.0f}, {worker_peak:.0f}",
                )
                print(row(cells), flush=True)


if __name__ == "__main__":
    main()
