"""Chat text -> token files -> batches.

    python scripts/data.py embedded to=data/         small Chinese and English chats, no network
    python scripts/data.py fetch name=lccc to=data/       a public corpus from the Hugging Face hub
    python scripts/data.py stats path=data/*.txt            dialogues, utterances, bytes

Each file (its format: dialogues.py) is tokenised once into `<cache>/<key>/{train,val}.bin`, keyed by content,
tokenizer and split, in memory that does not grow with it. What is read back from there: batches.py.
"""

import contextlib
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from smallgpt.console import UserError
from smallgpt.settings import Count, Free, Share
from smallgpt.text.batches import Corpus
from smallgpt.text.formats import blocks, is_json, parse, read_dialogues
from smallgpt.tokenizer import Tokenizer, TokenizerSettings, named, train

FORMAT = 1  # of the cached files: raise it when reading, splitting or writing changes
PER_WORKER = 4 << 20  # bytes of text that are worth starting a process for


@dataclass
class DataSettings:
    path: Free[str | list[str]] = ""  # a file, a glob, or [a, b]; "file@0.5" = seen half as often
    val_fraction: Share = 0.01  # share of the dialogues held out for validation
    split_seed: int = 0  # another seed holds out other dialogues
    isolate: bool = False  # no attention across dialogues in a packed block
    errors: Literal["strict", "replace"] = "strict"  # bytes that are not UTF-8
    cache: Free[str] = "data/tokens"  # folder of the tokenised files
    eval_blocks: Count = 256  # validation blocks per evaluation; 0 = all


class Source(NamedTuple):
    path: Path
    weight: float  # times its training tokens are seen per epoch
    hash: str  # sha256 of the file, and how it is read


def prepare(
    data: DataSettings,
    tokenizer: TokenizerSettings | Tokenizer,
    block_size: int,
    quiet: bool = False,
) -> Corpus:
    """Tokenise what is not in the cache yet and open it. Every rank calls this; a lock lets one do the work.

    `tokenizer` is trained on the training split, named, or given (resuming). UserError: no or unreadable
    files, too few training tokens for one block of `block_size`, an empty validation split.
    """
    cache = Path(data.cache)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        sources = _sources(data.path, cache)
        split = [FORMAT, data.split_seed, data.val_fraction, data.errors]
        if isinstance(tokenizer, TokenizerSettings):
            tokenizer = _tokenizer(tokenizer, data, sources, split, cache)
        folders = [cache / _digest(source.hash, tokenizer.hash, split) for source in sources]
        if todo := {f: s.path for f, s in zip(folders, sources, strict=True) if not _tokens(f)}:
            _tokenise(todo, data, tokenizer, quiet)
    weights = [source.weight for source in sources]
    fingerprint = _digest([[s.hash, s.weight] for s in sources], tokenizer.hash, split)
    tokens = [_tokens(folder) for folder in folders]
    return Corpus(tokenizer, tokens, weights, fingerprint, block_size, data.eval_blocks)


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def _sources(path: Any, cache: Path) -> list[Source]:
    """Expand `data.path` in its order, each file once (its last weight counts), and hash the contents."""
    if not path:
        raise UserError(
            "data.path is not set: give a chat text file, for example the one that "
            "`python scripts/data.py embedded` writes"
        )
    weights: dict[Path, float] = {}
    for entry in path if isinstance(path, list | tuple) else [path]:
        pattern, weight = os.path.expanduser(str(entry)), 1.0
        with contextlib.suppress(
            ValueError
        ):  # an @ that is not followed by a number belongs to the name
            weight = float(pattern[pattern.rindex("@") + 1 :])
            pattern = pattern[: pattern.rindex("@")]
        if not 0 < weight < float("inf"):
            raise UserError(f"data.path: the weight in {str(entry)!r} must be a positive number")
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files = [file for file in found if os.path.isfile(file)]
        if not files:
            raise UserError(
                f"data.path: no file at {pattern!r} (write FOLDER/* for the files of a folder)"
            )
        weights |= {
            Path(os.path.abspath(file)): weight for file in files
        }  # a link's name says what it is

    index_file = (
        cache / "index.json"
    )  # path -> size, time, hash: later starts need not read the files
    index = json.loads(index_file.read_text(encoding="utf-8")) if index_file.exists() else {}
    for file in weights:
        stamp = [file.stat().st_size, file.stat().st_mtime_ns]
        if index.get(str(file), [])[:2] != stamp:
            try:
                with open(file, "rb") as stream:
                    index[str(file)] = [*stamp, hashlib.file_digest(stream, "sha256").hexdigest()]
            except OSError as problem:
                raise UserError(f"data.path: cannot read {file}: {problem}") from problem
    temporary = index_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
    temporary.replace(index_file)
    return [
        Source(
            file, weight, f"{index[str(file)][2]} {is_json(file)} {file.suffix.lower() == '.gz'}"
        )
        for file, weight in weights.items()
    ]


def _tokenizer(
    wanted: TokenizerSettings, data: DataSettings, sources: list[Source], split: list, cache: Path
) -> Tokenizer:
    """Get the tokenizer that the settings ask for; a trained one is kept, keyed by what it was trained on."""
    if wanted.kind not in ("char", "bpe"):
        return named(wanted.kind)
    path = cache / f"tokenizer-{_digest(asdict(wanted), [s.hash for s in sources], split)}.json"
    if not path.exists():
        train(
            wanted,
            lambda: (
                turn
                for source in sources
                for turns in read_dialogues(source.path, data.errors)
                if not held_out(turns, data)
                for turn in turns
            ),
        ).save(path)
    return Tokenizer.load(path)


def held_out(turns: list[str], data: DataSettings) -> bool:
    """In the validation split? A function of the text alone, so duplicates are never on both sides."""
    digest = hashlib.blake2b(
        "\n".join(turns).encode(), digest_size=8, key=str(data.split_seed).encode()
    )
    return int.from_bytes(digest.digest(), "big") < data.val_fraction * 2**64


def _tokens(folder: Path) -> list[np.ndarray] | None:
    """The (train, val) tokens of a source, mapped from disk; None unless they were written to the end."""
    if not (folder / "meta.json").exists():
        return None
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    files = [(folder / f"{side}.bin", meta[side]) for side in ("train", "val")]
    if any(
        not f.exists() or f.stat().st_size != n * np.dtype(meta["dtype"]).itemsize for f, n in files
    ):
        return None
    # an empty file cannot be mapped
    return [np.memmap(f, meta["dtype"], "r") if n else np.empty(0, meta["dtype"]) for f, n in files]


def _tokenise(
    todo: dict[Path, Path], data: DataSettings, tokenizer: Tokenizer, quiet: bool
) -> None:
    """Write the token files of `todo` (folder -> text file), the same whatever the number of workers."""
    size, start = sum(path.stat().st_size for path in todo.values()), time.perf_counter()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers = min(cores, size // PER_WORKER)
    shared = Path(data.cache) / f"tokenizer-{tokenizer.hash[:24]}.json"
    tokenizer.save(shared)  # the workers read it from here
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    spawn = multiprocessing.get_context(
        "spawn"
    )  # forking a process that has threads (torch, CUDA) may hang
    with (
        (
            ProcessPoolExecutor(workers, spawn, _follow_parent)
            if workers > 1
            else contextlib.nullcontext()
        ) as pool,
        tqdm(
            total=size, unit="B", unit_scale=True, desc="tokenising", disable=quiet or None
        ) as bar,
    ):
        for folder, path in todo.items():
            temporary = folder.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
            temporary.mkdir()
            lengths, before = {"train": 0, "val": 0}, bar.n
            work = functools.partial(_encode, shared, data, dtype, path)
            with contextlib.ExitStack() as stack:
                files = [
                    stack.enter_context(open(temporary / f"{side}.bin", "wb")) for side in lengths
                ]
                for position, *both in _in_order(pool, work, blocks(path), 2 * workers):
                    for side, file, tokens in zip(lengths, files, both, strict=True):
                        file.write(tokens.data)
                        lengths[side] += len(tokens)
                    bar.update(before + position - bar.n)
            meta = {"text": str(path), "dtype": dtype.name, **lengths}
            (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)  # from here on it is trusted
    if bar.disable and not quiet:
        seconds = time.perf_counter() - start
        print(
            f"tokenised {size / 1e6:.1f} MB of {len(todo)} file(s) in {seconds:.1f} s",
            file=sys.stderr,
        )


def _follow_parent() -> None:
    """Run in each worker: without this, the workers of a killed run would wait for work forever."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _in_order(pool: Executor | None, work: Callable, items: Iterable, ahead: int) -> Iterator:
    """map(work, items) with at most `ahead` items in flight: pool.map would read a whole file into memory."""
    if pool is None:
        yield from map(work, items)
        return
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    yield from (future.result() for future in pending)


_load = functools.cache(Tokenizer.load)  # once per worker


def _encode(
    tokenizer: Path, data: DataSettings, dtype: np.dtype, path: Path, block: tuple
) -> tuple:
    """One of `blocks` -> (bytes of disk read so far, train tokens, val tokens)."""
    first, text, position = block
    sides: tuple[list, list] = [], []
    for turns in parse(path, first, text, data.errors):
        sides[held_out(turns, data)].append(turns)
    return position, *(_load(tokenizer).encode_dialogues(side).astype(dtype) for side in sides)
