"""Chat files -> dialogues.

Plain text is UTF-8, one utterance a line, a blank line between dialogues. JSON Lines has a dialogue
a line, a JSON file an array of them, a Parquet file (through pyarrow) one in each row:

    ["hi", "hello"]
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    {"dialog": ["hi", "hello"]}
    {"text": "each line of a text is an utterance"}

Of turns with a role (or a `from`) the role is kept. All but Parquet may be gzipped. The first bytes
of a file decide how it is read, whatever its name is. Line breaks in the turns of JSON become
spaces. What is not read is counted in `Counts`.
"""

import contextlib
import functools
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from smallgpt import files
from smallgpt.console import UserError
from smallgpt.parquet import open_parquet

HEAD = 1 << 20  # bytes that decide the format ...
LINES_LOOKED_AT = 100  # ... and lines of them
BLOCK = 1 << 20  # bytes read at once
MAX_LINES = 1 << 12  # read beyond BLOCK to finish a dialogue; a longer one is cut
MAX_VALUE = 1 << 26  # characters of one dialogue in a JSON array

TEXT, JSON_LINES, JSON, PARQUET = "plain text", "JSON Lines", "JSON", "Parquet"
UNITS = {TEXT: "line", JSON_LINES: "line", JSON: "dialogue", PARQUET: "row"}  # what is numbered
NAMED_AS = {".jsonl": JSON_LINES, ".json": JSON, ".parquet": PARQUET}  # any other name: plain text

DIALOGUE_KEYS = ("messages", "conversations", "dialog", "dialogue")
KEYS = (*DIALOGUE_KEYS, "text")
ROLES = {  # as data sets write them -> as they are called here
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
TOOL_ROLES = {"tool", "function", "function_call", "observation"}
LossOn = Literal["all", "assistant"]  # whose turns a language model is trained on

CONTROL = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\x1b")  # bytes that no text holds

OPENS_JSON = re.compile(r'[\[{]\s*["\'\[{\]}]')  # ["hi  {"messages  [{"role  []  {'text
OPENS_OBJECT = re.compile(r'(\[\s*)?\{\s*"[^"\n]*"\s*:')  # {"version": ... [{"id": ...
ARRAY_START = re.compile(r"\s*\[?")
BETWEEN_VALUES = re.compile(r"[\s,]*")


class Format(NamedTuple):
    """How a file is read."""

    kind: str  # TEXT, JSON_LINES, JSON or PARQUET
    gzipped: bool

    def __str__(self) -> str:
        return f"{self.kind}, gzipped" if self.gzipped else self.kind


class Dialogue(NamedTuple):
    """What is said, turn by turn."""

    turns: list[str]
    roles: list[str]  # of each turn: system, user, assistant, or what else a file has; "" = unknown

    @property
    def spoken(self) -> list[str]:
        """The turns without system prompts, which nobody speaks."""
        if "system" not in self.roles:
            return self.turns
        pairs = zip(self.turns, self.roles, strict=True)
        return [turn for turn, role in pairs if role != "system"]


class Block(NamedTuple):
    """A piece of a file that ends where a dialogue ends: lines of text, or of JSON Lines."""

    first: int  # number of its first line; of its first dialogue in an array, row in a Parquet file
    data: bytes
    position: int  # bytes read from disk so far
    continues: bool = False  # its first dialogue began in the block before


@dataclass
class Counts:
    """What was read of a file, and what was not."""

    dialogues: int = 0
    skipped: int = 0  # dialogues that cannot be read
    first_skipped: str = ""  # where the first of them is, and why
    ended: int = 0  # dialogues that end before an empty turn
    turns_after: int = 0  # the empty turns, and what came after them
    prompts: int = 0  # system prompts; those of developers are among them
    tool_turns: int = 0  # left out
    cut: int = 0  # too long without a blank line
    only_read: int = 0  # tokens of turns that are not learned

    def add(self, other: "Counts") -> None:
        """Count what another block of the same file held."""
        self.first_skipped = self.first_skipped or other.first_skipped
        for name, count in vars(other).items():
            if isinstance(count, int):
                setattr(self, name, getattr(self, name) + count)

    def skip(self, where: str, why: str) -> None:
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"{where}: {why}"

    def check(self, path: Path) -> None:
        """UserError where there are dialogues, but none can be read."""
        if self.skipped and not self.dialogues:
            raise UserError(
                f"{path}: none of its {self.skipped:,} dialogues can be read, the first at "
                f"{self.first_skipped}; write a dialogue as "
                '{"messages": [{"role": "user", "content": "hi"}, ...]}'
            )

    def notes(self) -> list[str]:
        """What was not read as it stands there, a sentence each."""
        notes = []
        if self.skipped:
            total = self.dialogues + self.skipped
            where = self.first_skipped
            notes.append(f"skipped {self.skipped:,} of {total:,} dialogues, the first at {where}")
        if self.ended:
            dropped = f"{self.turns_after:,} turns dropped"
            notes.append(f"dialogues ended before an empty turn: {self.ended:,}, {dropped}")
        if self.tool_turns:
            notes.append(
                f"tool turns left out: {self.tool_turns:,} "
                "(what one speaker says before and after them is joined)"
            )
        if self.cut:
            notes.append(
                f"dialogues without a blank line in more than {BLOCK / 1e6:.0f} MB: "
                f"cut {self.cut:,} times; put a blank line between dialogues"
            )
        return notes


def read_dialogues(
    path: str | Path,
    errors: str = "strict",
    counts: Counts | None = None,
    loss_on: LossOn = "all",
) -> Iterator[Dialogue]:
    """Stream the dialogues of one file; `counts` what was dropped.

    UserError: a file that is missing or no chat; bytes that are not UTF-8, unless `errors` is
    "replace".
    """
    path = Path(path)
    counts = Counts() if counts is None else counts
    form = sniff(path)
    for block in blocks(path, form):
        yield from parse(path, form, block, errors, counts, loss_on)
    counts.check(path)


# -- what a file is --------------------------------------------------------------------------------


def sniff(path: Path) -> Format:
    """Know a file's format by its first bytes. UserError names what is no text, and what to do."""
    with _reading(path), open(path, "rb") as raw:
        head = raw.read(HEAD)
        kind = files.kind_of(head)
        gzipped = kind == files.GZIP
        if gzipped:
            raw.seek(0)
            head = _decompress(raw).read(HEAD)
            kind = files.kind_inside(head)
    if kind == files.PARQUET and not gzipped:
        return Format(PARQUET, False)
    problem = why_not_text(kind, head)
    if problem:
        raise UserError(f"{path} {problem}")
    return Format(text_format(head.decode("utf-8-sig", "replace")), gzipped)


def misnamed(path: Path, form: Format) -> bool:
    """Does the name of a file promise another format?"""
    name = path.name.lower()
    stem = name.removesuffix(".gz")
    promised = Format(NAMED_AS.get(Path(stem).suffix, TEXT), stem != name)
    return form != promised


def why_not_text(kind: files.Kind, head: bytes) -> str | None:
    """What a file is, if no UTF-8 text, and what cures that."""
    if kind == files.PARQUET:
        return f"is {kind.name} compressed with gzip: unpack it"
    if kind.family == "archive":
        return f"is {kind.name}: unpack it and name the file in it"
    if kind.family == "binary":
        return f"is {kind.name}, no text: name a chat in plain text, JSON Lines, JSON or Parquet"
    encoding = files.marked_encoding(head)
    if encoding in ("utf-16", "utf-32"):
        return f"is text in {encoding.upper()}: save it in UTF-8"
    n_control = len(head) - len(head.translate(None, CONTROL))
    if n_control > len(head) / 50:
        return (
            f"is no text: {n_control:,} of its first {len(head):,} bytes are control characters; "
            "name a chat in UTF-8 (UTF-16 without a mark looks like this, too: save it in UTF-8)"
        )
    return None


def text_format(text: str) -> str:
    """TEXT, JSON_LINES or JSON, from the beginning of a file."""
    text = text.strip()
    if _is_document(text):
        return JSON
    lines = [line.strip() for line in text.split("\n", LINES_LOOKED_AT) if line.strip()]
    n_json = sum(OPENS_JSON.match(line) is not None for line in lines)
    if n_json > len(lines) / 2:
        return JSON_LINES
    return JSON if OPENS_OBJECT.match(text) else TEXT


def _is_document(text: str) -> bool:
    """One JSON array of dialogues, or objects over several lines each, and not JSON Lines?

    A line of JSON Lines may be an array too, but one of turns: its first value is no dialogue.
    """
    start = ARRAY_START.match(text).end()
    try:
        value, end = _decode_value(text, start)
    except (ValueError, RecursionError):
        return False
    is_in_array = start > 0
    if is_in_array and _is_dialogue(value):
        return True
    is_over_lines = "\n" in text[:end]
    return is_over_lines and isinstance(value, str | dict if is_in_array else dict)


def _is_dialogue(value: Any) -> bool:
    if isinstance(value, dict):
        return not value.keys().isdisjoint(KEYS)
    return isinstance(value, list)


def _decode_value(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at or after `start`, and where it ends."""
    start = BETWEEN_VALUES.match(text, start).end()
    return json.JSONDecoder().raw_decode(text, start)


# -- cutting a file into blocks --------------------------------------------------------------------


def blocks(path: Path, form: Format) -> Iterator[Block]:
    """Cut a file into pieces of about BLOCK bytes that end where a dialogue ends, for `parse`.

    Cutting is cheap and `parse` is not: that is what lets worker processes share one file."""
    with _reading(path), open(path, "rb") as raw:
        stream = _decompress(raw) if form.gzipped else raw
        if form.kind == PARQUET:
            yield from _gather(_parquet_rows(path))
        elif form.kind == JSON:
            yield from _gather((value, raw.tell()) for value in _json_values(path, stream))
        elif form.kind == JSON_LINES:
            yield from _line_blocks(stream, raw.tell)
        else:
            yield from _text_blocks(stream, raw.tell)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as problem:  # unreadable, or a damaged .gz
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"cannot read {path}: {reason}") from problem


def _decompress(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(gzip.GzipFile(fileobj=raw))


def _chunks_of_lines(stream: BinaryIO) -> Iterator[list[bytes]]:
    return iter(functools.partial(stream.readlines, BLOCK), [])


def _line_blocks(stream: BinaryIO, position: Callable[[], int]) -> Iterator[Block]:
    first = 1
    for lines in _chunks_of_lines(stream):
        yield Block(first, b"".join(lines), position())
        first += len(lines)


def _text_blocks(stream: BinaryIO, position: Callable[[], int]) -> Iterator[Block]:
    first = 1
    unfinished = False
    for lines in _chunks_of_lines(stream):
        continues = unfinished and bool(lines[0].strip())
        unfinished = True
        for line in itertools.islice(stream, MAX_LINES):
            lines.append(line)
            if not line.strip():
                unfinished = False
                break
        yield Block(first, b"".join(lines), position(), continues)
        first += len(lines)


def _gather(values: Iterable[tuple[str, int]]) -> Iterator[Block]:
    """(a dialogue as one line of JSON, bytes read from disk so far)... -> blocks of JSON Lines."""
    first, lines, size, position = 1, [], 0, 0
    for line, position in values:
        lines.append(line)
        size += len(line)
        if size >= BLOCK:
            yield Block(first, _encode_lines(lines), position)
            first += len(lines)
            lines, size = [], 0
    if lines:
        yield Block(first, _encode_lines(lines), position)


def _encode_lines(lines: list[str]) -> bytes:
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _json_values(path: Path, stream: BinaryIO) -> Iterator[str]:
    """The values in an array, or those that follow each other, each on one line.

    Bytes that are not UTF-8 pass through: `parse` has a word for them."""
    reader = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    text = reader.read(BLOCK)
    at = ARRAY_START.match(text).end()
    lines_before = 0  # of `text`
    while True:
        at = BETWEEN_VALUES.match(text, at).end()
        try:
            _, end = _decode_value(text, at)
        except RecursionError:
            raise UserError(f"{path}: a value in it is nested too deeply for a dialogue") from None
        except json.JSONDecodeError as problem:
            unfinished = len(text) - at
            more = reader.read(max(BLOCK, unfinished)) if unfinished < MAX_VALUE else ""
            if more:  # the value may end there
                lines_before += text.count("\n", 0, at)
                text, at = text[at:] + more, 0
                continue
            if text[at:].strip() in ("", "]"):
                return
            line = lines_before + text.count("\n", 0, problem.pos) + 1
            raise UserError(
                f"{path}, line {line}: not JSON ({problem.msg}): correct the line, or write one "
                "dialogue a line, of which a bad one can be skipped"
            ) from None
        yield text[at:end].replace("\r", " ").replace("\n", " ")
        at = end


def _parquet_rows(path: Path) -> Iterator[tuple[str, int]]:
    """(a row as one line of JSON, about how many bytes were read from disk so far)..."""
    with open_parquet(path) as table:
        columns = [key for key in KEYS if key in table.columns]
        if not columns:
            raise UserError(
                f"{path}: dialogues are read from a column {', '.join(KEYS)}, and its columns are "
                f"{', '.join(table.columns)}: rename one"
            )
        bytes_per_row = path.stat().st_size / max(table.n_rows, 1)
        for n_rows, row in enumerate(table.rows(columns[:1]), 1):
            line = json.dumps(row, ensure_ascii=False, default=str)
            yield line, round(n_rows * bytes_per_row)


# -- reading the dialogues of a block --------------------------------------------------------------


def parse(
    path: Path,
    form: Format,
    block: Block,
    errors: str,
    counts: Counts,
    loss_on: LossOn = "all",
) -> Iterator[Dialogue]:
    """The dialogues of one of `blocks`. Utterances are stripped; a line of whitespace is blank.

    loss_on: "assistant" skips the dialogues in which the assistant's turns are not known."""
    text = _decode(path, form, block, errors)
    lines = text.split("\n")  # splitlines() would cut at U+2028 as well
    if form.kind == TEXT:
        counts.cut += block.continues
        for is_dialogue, group in itertools.groupby(map(str.strip, lines), bool):
            if is_dialogue:
                counts.dialogues += 1
                yield _without_roles(list(group))
        return
    for number, line in enumerate(lines, block.first):
        if not line.strip():
            continue
        try:
            dialogue = _dialogue(line, errors, counts)
            if loss_on == "assistant":
                check_roles(dialogue.roles)
        except (ValueError, RecursionError) as problem:
            counts.skip(f"{UNITS[form.kind]} {number:,}", str(problem))
            continue
        counts.dialogues += 1
        counts.prompts += dialogue.roles.count("system")
        yield dialogue


def check_roles(roles: list[str]) -> None:
    """ValueError where the roles do not tell which turns are the assistant's, or none is."""
    unknown = [role for role in roles if role not in ROLES.values()]
    if "" in unknown:
        raise ValueError("its turns have no roles, which data.loss_on=assistant needs")
    if unknown:
        raise ValueError(f"the role {unknown[0]!r} is none of system, user and assistant")
    if "assistant" not in roles:
        raise ValueError("the assistant says nothing in it")


def _without_roles(turns: list[str]) -> Dialogue:
    return Dialogue(turns, [""] * len(turns))


def _decode(path: Path, form: Format, block: Block, errors: str) -> str:
    try:
        return block.data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as problem:
        number = block.first + block.data.count(b"\n", 0, problem.start)
        text = block.data.decode("utf-8", "replace")
        n_bad = text.count("\ufffd")
        n_good = sum(c > "\x7f" for c in text) - n_bad
        fix = "save it in UTF-8 (of Chinese text: iconv -f GB18030 -t UTF-8 OLD > NEW)"
        if n_bad <= n_good:  # a few damaged characters, not another encoding
            fix = f"{fix}, or set data.errors=replace"
        where = f"{UNITS[form.kind]} {number:,}"
        raise UserError(f"{path}, {where}: not UTF-8; {fix}") from None


def _dialogue(line: str, errors: str, counts: Counts) -> Dialogue:
    """One dialogue in JSON; ValueError says why it is none."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as problem:
        raise ValueError(f"not JSON ({problem.msg} at column {problem.colno})") from None
    is_text = isinstance(value, str)
    if isinstance(value, dict):
        key = next((key for key in KEYS if value.get(key) is not None), None)
        if key is None:
            raise ValueError(f"it has no {', '.join(KEYS)}")
        value = value[key]
        is_text = key == "text" and isinstance(value, str)
    if is_text:
        text = _valid(value, errors)
        utterances = [line.strip() for line in text.split("\n") if line.strip()]
        found = _without_roles(utterances)
    elif isinstance(value, list):
        found = _turns(value, errors, counts)
    else:
        raise ValueError(f"{_show(value)} is no list of turns")
    if not found.spoken:
        raise ValueError("nothing is said in it")
    return found


def _turns(turns: list, errors: str, counts: Counts) -> Dialogue:
    """The turns of a dialogue up to an empty one, without tool turns and empty system prompts."""
    said: list[str] = []
    roles: list[str] = []
    after_tool = False
    n_tool = n_dropped = 0
    for i, turn in enumerate(turns):
        role, content = _role_and_content(turn)
        if role in TOOL_ROLES:
            n_tool += 1
            after_tool = True
            continue
        if role == "system" and content is None:
            continue
        if not isinstance(content, str):
            raise ValueError(f"a turn is {_show(content)}, no text")
        utterance = " ".join(_valid(content, errors).splitlines()).strip()
        if not utterance and role == "system":
            continue
        if not utterance:
            n_dropped = len(turns) - i
            break
        if after_tool and role in roles[-1:]:
            said[-1] += " " + utterance
        else:
            said.append(utterance)
            roles.append(role)
        after_tool = False
    found = Dialogue(said, roles)
    if found.spoken:
        counts.tool_turns += n_tool
        counts.turns_after += n_dropped
        counts.ended += n_dropped > 0
    return found


def _role_and_content(turn: Any) -> tuple[str, Any]:
    if not isinstance(turn, dict):
        return "", turn
    written = turn.get("role") or turn.get("from") or ""
    role = str(written).strip().lower()
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    return ROLES.get(role, role), content


def _valid(text: str, errors: str) -> str:
    """JSON can spell half a surrogate pair, "\\ud83d", that UTF-8 cannot: `errors` decides."""
    return text.encode("utf-8", errors).decode("utf-8")


def _show(value: Any) -> str:
    """The beginning of a value as JSON writes it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."
