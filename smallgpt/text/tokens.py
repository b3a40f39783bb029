"""Dialogues -> token files, once, cached. `python scripts/data.py` gets dialogues.

Each file is tokenised once into `<cache>/<key>/{train,val}.bin`, keyed by content, format,
tokenizer and split, in memory that does not grow with it. formats.py has what is read, batches.py
what is made of the tokens.

With loss_on=assistant the tokens of the other turns are stored as ~id, a negative number.
"""

import contextlib
import functools
import glob
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from smallgpt import files
from smallgpt.console import UserError
from smallgpt.parquet import splits_of
from smallgpt.settings import Count, Free, Share
from smallgpt.text.batches import Corpus, TokenFile
from smallgpt.text.claims import is_first, make_together
from smallgpt.text.formats import (
    TEXT,
    Block,
    Counts,
    Dialogue,
    Format,
    LossOn,
    blocks,
    misnamed,
    parse,
    read_dialogues,
    sniff,
)
from smallgpt.tokenizer import Tokenizer, TokenizerSettings, named, train

FORMAT = 1  # of the cached files: raise it when reading, splitting or writing changes
PER_WORKER = 4 << 20  # bytes of text that are worth starting a process for
SIDES = ("train", "val")
DTYPES = ("uint16", "uint32", "int16", "int32")  # of token files; signed where not all are learned


@dataclass
class DataSettings:
    path: Free[str | list[str]] = ""  # file, glob, folder of Parquet, [a, b]; a@0.5: half as often
    val_fraction: Share = 0.01  # share of the dialogues held out for validation
    split_seed: int = 0  # another seed holds out other dialogues
    isolate: bool = False  # no attention across dialogues in a packed block
    loss_on: LossOn = "all"  # whose turns are learned: assistant needs a corpus with roles
    errors: Literal["strict", "replace"] = "strict"  # bytes that are not UTF-8
    cache: Free[str] = "data/tokens"  # folder of the tokenised files
    eval_blocks: Count = 256  # validation blocks per evaluation; 0 = all


class Source(NamedTuple):
    """A chat file, and how it is read."""

    path: Path
    weight: float  # times its training tokens are seen per epoch
    sha256: str
    form: Format

    @property
    def key(self) -> str:
        """What its tokens depend on; of plain text, as caches of earlier versions spell it."""
        kind = False if self.form.kind == TEXT else self.form.kind
        return f"{self.sha256} {kind} {self.form.gzipped}"


class TokenFiles(NamedTuple):
    """The tokens of a source, on disk."""

    train: TokenFile
    val: TokenFile
    counts: Counts  # what was read, and what was dropped


def prepare(
    data: DataSettings,
    tokenizer: TokenizerSettings | Tokenizer,
    block_size: int,
    quiet: bool = False,
) -> Corpus:
    """Tokenise what is not in the cache yet and open it. Every rank calls this; they divide the
    files among themselves, and all return when the last file is there.

    `tokenizer` is trained on the training split, named, or given (resuming). UserError: no or
    unreadable files, too few training tokens for one block of `block_size`, an empty validation
    split."""
    sources, tokenizer = open_sources(data, tokenizer, quiet)
    split = split_key(data)
    if data.loss_on != "all":
        split.append(data.loss_on)
    cache = Path(data.cache)
    folders = [cache / files.digest(s.key, tokenizer.hash, split) for s in sources]
    found = find_tokens(dict(zip(folders, sources, strict=True)), data, tokenizer, quiet)
    tokens = [found[folder] for folder in folders]
    if not quiet and is_first():
        for source, its_tokens in zip(sources, tokens, strict=True):
            say_how_it_was_read(source, its_tokens)
    if any(its_tokens.counts.prompts for its_tokens in tokens):
        split.append("system")  # version 1 left system prompts out
    return Corpus(
        tokenizer,
        tokens=[[t.train, t.val] for t in tokens],
        weights=[source.weight for source in sources],
        fingerprint=files.digest([[s.key, s.weight] for s in sources], tokenizer.hash, split),
        block_size=block_size,
        eval_blocks=data.eval_blocks,
        sources=list(map(record_of, sources, tokens)),
    )


def record_of(source: Source, tokens: TokenFiles) -> dict[str, Any]:
    """What meta.json holds of a source; `prompts` only where it has system prompts."""
    record = {
        "kind": "text",
        "path": str(source.path.resolve()),
        "weight": source.weight,
        "sha256": source.sha256,
    }
    if tokens.counts.prompts:
        record["prompts"] = tokens.counts.prompts
    return record


def open_sources(
    data: DataSettings, tokenizer: TokenizerSettings | Tokenizer, quiet: bool = False
) -> tuple[list[Source], Tokenizer]:
    """The files of `data.path`, and the tokenizer, as in `prepare`."""
    cache = Path(data.cache)
    cache.mkdir(parents=True, exist_ok=True)
    sources = find_sources(data.path, cache, quiet)
    if data.loss_on == "assistant":
        refuse_plain_text(sources)
    if isinstance(tokenizer, TokenizerSettings):
        tokenizer = find_tokenizer(tokenizer, data, sources, quiet)
    return sources, tokenizer


def split_key(data: DataSettings) -> list:
    """What decides which dialogues are read, and which of them are held out."""
    return [FORMAT, data.split_seed, data.val_fraction, data.errors]


def refuse_plain_text(sources: list[Source]) -> None:
    """UserError for a file that cannot say which turns are the assistant's."""
    for source in sources:
        if source.form.kind == TEXT:
            raise UserError(
                f"data.loss_on=assistant needs roles, and {source.path} is plain text, which has "
                "none: give JSON Lines or Parquet with messages, or set data.loss_on=all"
            )


def say_how_it_was_read(source: Source, tokens: TokenFiles) -> None:
    if misnamed(source.path, source.form):
        print(f"data.path: {source.path} is read as {source.form}", file=sys.stderr)
    notes = tokens.counts.notes()
    if tokens.counts.only_read:
        n_tokens = len(tokens.train) + len(tokens.val)
        n_learned = n_tokens - tokens.counts.only_read - tokens.counts.dialogues  # no <|bos|> is
        notes.append(f"data.loss_on=assistant learns {n_learned:,} of its {n_tokens:,} tokens")
    for note in notes:
        print(f"{source.path}: {note}", file=sys.stderr)


def held_out(turns: list[str], data: DataSettings) -> bool:
    """In the validation split? The text alone decides: duplicates are never on both sides."""
    return files.unit_hash("\n".join(turns), data.split_seed) < data.val_fraction


# -- which files -----------------------------------------------------------------------------------


def find_sources(path: Any, cache: Path, quiet: bool = False) -> list[Source]:
    """The files of `data.path` in its order, each once (its last weight counts).

    What was found out about a file is kept in the cache until its size or time change."""
    if not path:
        raise UserError(
            "data.path is not set: give a chat text file, for example the one that "
            "`python scripts/data.py embedded` writes"
        )
    weights: dict[Path, float] = {}
    for entry in path if isinstance(path, list | tuple) else [path]:
        pattern, weight = split_weight(str(entry))
        if not 0 < weight < float("inf"):
            raise UserError(f"data.path: the weight in {str(entry)!r} must be a positive number")
        for file in expand(pattern, quiet):
            weights[file] = weight
    records = cache / "sources"
    records.mkdir(exist_ok=True)
    file_of = {records / f"{files.digest(str(file))}.json": file for file in weights}

    def find(record: Path) -> Source | None:
        file = file_of[record]
        return read_source(record, file, weights[file])

    # before any is read to its end: UserError names a file that cannot be read
    forms = {record: sniff(file) for record, file in file_of.items() if not find(record)}

    def make(record: Path, n_missing: int) -> Source:
        file = file_of[record]
        return examine(record, file, weights[file], forms[record])

    found = make_together(file_of, find, make, "read the files of data.path", quiet)
    return [found[record] for record in file_of]


def read_source(record: Path, file: Path, weight: float) -> Source | None:
    """The source that `examine` recorded, unless the file has another size or time by now."""
    try:
        size, changed, sha256, kind, gzipped = files.read_json(record)
        status = file.stat()
    except (TypeError, ValueError, OSError):
        return None
    if (size, changed) != (status.st_size, status.st_mtime_ns):
        return None
    return Source(file, weight, sha256, Format(kind, gzipped))


def examine(record: Path, file: Path, weight: float, form: Format) -> Source:
    """Read a file to its end for its hash, and record it."""
    try:
        status = file.stat()
        sha256 = files.hash_file(file)
    except OSError as error:
        raise UserError(f"data.path: cannot read {file} to its end: {error.strerror}") from error
    known = [status.st_size, status.st_mtime_ns, sha256, form.kind, form.gzipped]
    files.write_atomic(record, json.dumps(known))
    return Source(file, weight, sha256, form)


def split_weight(entry: str) -> tuple[str, float]:
    """chat.txt@0.5 -> (chat.txt, 0.5). An @ that no number follows belongs to the name."""
    pattern, at, number = entry.rpartition("@")
    try:
        return (pattern, float(number)) if at else (entry, 1.0)
    except ValueError:
        return entry, 1.0


def expand(pattern: str, quiet: bool = False) -> list[Path]:
    """The files that a name, a glob or the folder of a data set stands for; absolute paths."""
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        return training_files(Path(os.path.abspath(pattern)), quiet)
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [Path(os.path.abspath(file)) for file in found if os.path.isfile(file)]
    if not paths:
        raise UserError(f"data.path: no file at {pattern!r}")
    return paths


def training_files(folder: Path, quiet: bool) -> list[Path]:
    """The files of the training split of a Hugging Face data set."""
    splits = splits_of(folder)
    if not splits:
        raise UserError(
            f"data.path: no file at {str(folder)!r}: it is a folder without Parquet files (write "
            "FOLDER/* for the files of a folder)"
        )
    names = [name for name in splits if name.startswith("train")]
    if len(splits) == 1:
        names = list(splits)
    if len(names) != 1:
        first, *_ = next(iter(splits.values()))
        raise UserError(
            f"data.path: {folder} has the splits {', '.join(splits)}, of which it is not clear "
            f"which to train on: name the files of one, such as {first}"
        )
    others = [name for name in splits if name not in names]
    if others and not quiet and is_first():
        left_out = ", ".join(others)
        print(f"data.path: {folder}: reads {names[0]}, leaves out {left_out}", file=sys.stderr)
    return splits[names[0]]


# -- which tokenizer -------------------------------------------------------------------------------


def find_tokenizer(
    wanted: TokenizerSettings, data: DataSettings, sources: list[Source], quiet: bool
) -> Tokenizer:
    """The tokenizer of the settings; a trained one is cached, keyed by what it was trained on."""
    if wanted.kind not in ("char", "bpe"):
        return named(wanted.kind)
    key = files.digest(asdict(wanted), [source.key for source in sources], split_key(data))
    path = Path(data.cache) / f"tokenizer-{key}.json"

    def find(path: Path) -> Tokenizer | None:
        with contextlib.suppress(UserError):  # missing or damaged: train it
            return Tokenizer.load(path)
        return None

    def make(path: Path, n_missing: int) -> Tokenizer:
        tokenizer = train(wanted, training_utterances(sources, data))
        tokenizer.save(path)
        return tokenizer

    return make_together([path], find, make, "train the tokenizer", quiet)[path]


def training_utterances(sources: list[Source], data: DataSettings) -> Iterator[str]:
    for source in sources:
        for dialogue in read_dialogues(source.path, data.errors):
            # one prompt, the same in thousands of dialogues, would take the vocabulary for itself
            spoken = dialogue.spoken
            if not held_out(spoken, data):
                yield from spoken


# -- token files -----------------------------------------------------------------------------------


def open_tokens(folder: Path) -> TokenFiles | None:
    """The tokens of a source; None unless they were written to the end and nothing is damaged."""
    meta = files.read_json(folder / "meta.json")
    if not isinstance(meta, dict) or meta.get("dtype") not in DTYPES:
        return None
    dtype = np.dtype(meta["dtype"])
    opened = []
    for side in SIDES:
        file, length = folder / f"{side}.bin", meta.get(side)
        if not isinstance(length, int) or not file.is_file():
            return None
        if file.stat().st_size != length * dtype.itemsize:
            return None
        opened.append(TokenFile(file, dtype, length))
    counts = meta.get("counts", {})
    try:
        if counts.pop("system_turns", 0):  # an earlier version left them out
            return None
        return TokenFiles(*opened, Counts(**counts))
    except (TypeError, AttributeError):
        return None


def find_tokens(
    sources: dict[Path, Source], data: DataSettings, tokenizer: Tokenizer, quiet: bool
) -> dict[Path, TokenFiles]:
    """The tokens of each source, by folder, written where they are missing."""
    found = {folder: open_tokens(folder) for folder in sources}
    todo = {folder: sources[folder] for folder, tokens in found.items() if tokens is None}
    if todo:
        found |= tokenise(todo, data, tokenizer, quiet)
    return found


def tokenise(
    todo: dict[Path, Source], data: DataSettings, tokenizer: Tokenizer, quiet: bool
) -> dict[Path, TokenFiles]:
    """Write the token files of `todo` (folder -> source) together with other processes: the same
    files, whoever writes them, with any number of workers."""
    quiet = quiet or not is_first()
    start = time.perf_counter()
    sizes = {folder: source.path.stat().st_size for folder, source in todo.items()}
    largest_first = sorted(todo, key=sizes.get, reverse=True)  # none is begun late
    size = sum(sizes.values())
    dtype = dtype_of(tokenizer.vocab_size, data.loss_on)
    n_done = n_made = 0
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew())
        bar = stack.enter_context(
            tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", disable=quiet or None)
        )
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        tokenizer_file = Path(temporary) / "tokenizer.json"
        tokenizer.save(tokenizer_file)  # the workers read it from here

        def find(folder: Path) -> TokenFiles | None:
            nonlocal n_done
            tokens = open_tokens(folder)
            if tokens is not None:
                n_done += sizes[folder]
                bar.update(n_done - bar.n)
            return tokens

        def make(folder: Path, n_missing: int) -> TokenFiles:
            nonlocal n_made
            n_made += 1
            crew.grow(min(share_of_cores(n_missing), size // PER_WORKER))
            source = todo[folder]
            encode = functools.partial(encode_block, tokenizer_file, data, dtype, source)
            pieces = in_order(crew.pool, encode, blocks(source.path, source.form), 2 * crew.size)
            write_tokens(folder, source, dtype, pieces, bar)
            return find(folder)

        found = make_together(largest_first, find, make, "tokenise", quiet)
    if bar.disable and not quiet:
        seconds = time.perf_counter() - start
        others = f", {len(todo) - n_made} of them by other processes" if n_made < len(todo) else ""
        print(
            f"tokenised {size / 1e6:.1f} MB of {len(todo)} file(s) in {seconds:.1f} s{others}",
            file=sys.stderr,
        )
    return found


def dtype_of(vocab_size: int, loss_on: LossOn) -> np.dtype:
    """The smallest that holds all tokens; those that are stored as ~id, too."""
    if loss_on == "all":
        return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    return np.dtype(np.int16 if vocab_size <= 1 << 15 else np.int32)


class Piece(NamedTuple):
    """One block of a file, encoded."""

    tokens: tuple[np.ndarray, np.ndarray]  # of each of SIDES
    position: int  # bytes read from disk so far
    counts: Counts


_load = functools.cache(Tokenizer.load)  # once per worker


def encode_block(
    tokenizer_file: Path, data: DataSettings, dtype: np.dtype, source: Source, block: Block
) -> Piece:
    """Runs in the workers."""
    tokenizer = _load(tokenizer_file)
    counts = Counts()
    train_tokens: list[int] = []
    val_tokens: list[int] = []
    for dialogue in parse(source.path, source.form, block, data.errors, counts, data.loss_on):
        side = val_tokens if held_out(dialogue.spoken, data) else train_tokens
        side += signed_ids(tokenizer, dialogue, data.loss_on)
    tokens = (np.array(train_tokens, dtype), np.array(val_tokens, dtype))
    counts.only_read = sum(int((side < 0).sum()) for side in tokens)
    return Piece(tokens, block.position, counts)


def signed_ids(tokenizer: Tokenizer, dialogue: Dialogue, loss_on: LossOn) -> list[int]:
    """The ids of a dialogue, as ~id where no loss counts them."""
    first, *turns = tokenizer.encode_turns(*dialogue)
    tokens = first
    for ids, role in zip(turns, dialogue.roles, strict=True):
        is_learned = loss_on in ("all", role)
        tokens += ids if is_learned else [~id for id in ids]
    return tokens


def write_tokens(
    folder: Path, source: Source, dtype: np.dtype, pieces: Iterable[Piece], bar: tqdm
) -> None:
    """Write the token files of one source, to be trusted from the moment `folder` has its name."""
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
    temporary.mkdir()
    lengths = dict.fromkeys(SIDES, 0)
    counts = Counts()
    bytes_before = bar.n
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(open(temporary / f"{side}.bin", "wb")) for side in SIDES]
        for piece in pieces:
            for side, output, tokens in zip(SIDES, outputs, piece.tokens, strict=True):
                output.write(tokens.data)
                lengths[side] += len(tokens)
            counts.add(piece.counts)
            bar.update(bytes_before + piece.position - bar.n)
    counts.check(source.path)
    for side in SIDES:
        files.flush(temporary / f"{side}.bin")
    meta = {"text": str(source.path), "dtype": dtype.name, **lengths, "counts": asdict(counts)}
    files.write_atomic(temporary / "meta.json", json.dumps(meta))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    files.flush(folder.parent)


# -- worker processes ------------------------------------------------------------------------------


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_cores(n_files: int) -> int:
    """The cores for one of the files that are worked on: the processes that torchrun started on
    this machine divide them."""
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, usable_cores() // min(n_files, n_processes))


class Crew(contextlib.ExitStack):
    """Worker processes, of which there are more when other processes leave cores idle."""

    pool: ProcessPoolExecutor | None = None
    size = 1  # without a pool, this process works

    def grow(self, size: int) -> None:
        """To `size` workers, if it has fewer."""
        if size > self.size:
            self.close()
            self.size = size
            self.pool = self.enter_context(start_pool(size))


def start_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that are spawned: forking one that has threads (torch, CUDA) may hang."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), follow_parent)


def follow_parent() -> None:
    """Run in each worker: without this, the workers of a killed run would wait for work forever."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """A spawned process runs the user's script again, as a module, unless it is hidden.

    A script without `if __name__ == "__main__"` would call `prepare` there, which waits for the
    lock forever; and train.py would import torch, which no worker needs."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def in_order(pool: Executor | None, work: Callable, items: Iterable, ahead: int) -> Iterator:
    """map(work, items), at most `ahead` items in flight: pool.map would read all items first."""
    if pool is None:
        yield from map(work, items)
        return
    pending: deque[Future] = deque()
    for item in items:
        with hidden_main():  # submitting starts processes
            pending.append(pool.submit(work, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    for future in pending:
        yield future.result()
