"""Chat text files: reading them and getting some.

A chat text file is UTF-8, one utterance a line, a blank line between dialogues. A `.jsonl` or `.json` file
has one dialogue a line: a list of strings, or an object with `messages`, `conversations`, `dialog` or
`dialogue`. Either may be gzipped (`.gz`).
"""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from smallgpt.console import UserError

BLOCK = 1 << 20  # bytes read at once
MAX_LINES = (
    1 << 12
)  # read beyond BLOCK to finish a dialogue; a longer one is cut, so that memory stays flat
JSON_KEYS = ("messages", "conversations", "dialog", "dialogue")


def is_json(path: Path) -> bool:
    """Does the name promise one JSON dialogue a line?"""
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".json"))


def read_dialogues(path: str | Path, errors: str = "strict") -> Iterator[list[str]]:
    """Stream the dialogues of one file, each a list of utterances. UserError names a bad file and line."""
    for first, block, _ in blocks(Path(path)):
        yield from parse(Path(path), first, block, errors)


def blocks(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Cut a file into pieces of about BLOCK bytes that end where a dialogue ends, for `parse`.

    Yields (number of the first line, the bytes, bytes read from disk so far). Cutting is cheap and `parse` is
    not, which is what lets worker processes share one file, gzipped or not.
    """
    try:
        with open(path, "rb") as raw:
            gzipped = path.name.lower().endswith(".gz")
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if gzipped else raw
            first = 1
            while lines := stream.readlines(BLOCK):
                for line in () if is_json(path) else itertools.islice(stream, MAX_LINES):
                    lines.append(line)
                    if not line.strip():
                        break
                yield first, b"".join(lines), raw.tell()
                first += len(lines)
    except (OSError, EOFError, zlib.error) as problem:  # unreadable, or a damaged .gz
        raise UserError(f"cannot read {path}: {problem}") from problem


def parse(path: Path, first: int, block: bytes, errors: str) -> Iterator[list[str]]:
    """The dialogues of one of `blocks`. Utterances are stripped; whitespace-only lines are blank lines."""
    try:
        lines = block.decode("utf-8-sig", errors).split(
            "\n"
        )  # splitlines() would cut at U+2028 as well
    except UnicodeDecodeError as e:
        line = first + e.object.count(b"\n", 0, e.start)
        fix = "convert the file or set data.errors=replace"
        raise UserError(f"{path}, line {line}: not UTF-8; {fix}") from None
    if not is_json(path):
        yield from (
            list(group) for text, group in itertools.groupby(map(str.strip, lines), bool) if text
        )
        return
    for number, line in enumerate(lines, first):
        try:
            turns = _json_turns(line, errors) if line.strip() else []
        except (ValueError, RecursionError) as problem:
            raise UserError(
                f"{path}, line {number}: not a dialogue in JSON: {problem}"
            ) from problem
        if turns:
            yield turns


def _json_turns(line: str, errors: str) -> list[str]:
    """The utterances of one JSON line, without system prompts; ValueError says what is wrong with it."""
    turns = json.loads(line)
    if isinstance(turns, dict):
        turns = next((turns[key] for key in JSON_KEYS if key in turns), None)
    if not isinstance(turns, list):
        raise ValueError(f"neither a list nor an object with {', '.join(JSON_KEYS)}")
    texts = []
    for turn in turns:
        if isinstance(turn, dict):
            if "system" in (turn.get("role"), turn.get("from")):
                continue
            turn = turn.get("content", turn.get("value"))
        if not isinstance(turn, str):
            raise ValueError("an utterance is neither a string nor an object with content or value")
        # JSON can spell half a surrogate pair ("\ud83d"), which no UTF-8 text can hold: `errors` decides
        texts.append(" ".join(turn.encode("utf-8", errors).decode("utf-8").splitlines()).strip())
    return [text for text in texts if text]
