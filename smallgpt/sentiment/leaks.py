"""Was a test text read in training the trunk? Searches what the trunk was trained on.

The training of a trunk recorded its sources, a dict each:

    {"kind": "text", "path": "/data/chat.txt", "weight": 1.0, "sha256": "9f86..."}
    {"kind": "set", "settings": {...}, "fingerprint": "3f2a..."}    a labelled set's training split
    {"kind": "unknown", "name": "the text of gpt2"}                 nobody can read it

A source that is gone, or no longer what was recorded, is not searched, and the report says so.
"""

import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from smallgpt.console import UserError
from smallgpt.files import digest, hash_files, read_json, write_cache
from smallgpt.parallel.world import World
from smallgpt.sentiment import splits
from smallgpt.sentiment.sets import READERS, Example, from_source
from smallgpt.text.formats import read_dialogues

VERSION = 2  # of the search: raised when it finds other texts, so that no old result is read
WINDOW = 20  # letters: two Chinese texts hardly share so many by chance; about four English words
BASE = 0x9E3779B97F4A7C15  # of the polynomial hash; odd, so that no letter is lost modulo 2**64
JOINT = "\U0003134a"  # a letter that no text has: between two texts it keeps their letters apart
NAMED = 10  # sources that a note names; the others are counted

Source = dict[str, Any]


# ---- letters -> hashes


@functools.cache
def _folding() -> np.ndarray:
    """uint32 (0x110000,): code point -> its lower case; 0 for what is no letter.

    Letters are also digits, the marks on letters (the vowel signs of Hindi) and emoji."""
    table = np.zeros(0x110000, np.uint32)
    for code in range(0x40000):  # Unicode has no letters beyond plane 3
        char = chr(code)
        is_variant = 0xFE00 <= code <= 0xFE0F  # an emoji in colour, or in black and white
        category = unicodedata.category(char)
        is_mark_or_emoji = category in ("Mn", "Mc", "Me", "So") and not is_variant
        if char.isalnum() or is_mark_or_emoji:
            lower = char.lower()
            table[code] = ord(lower) if len(lower) == 1 else code
    return table


def letters(text: str) -> np.ndarray:
    """uint64 (n,): the letters of a text in lower case, without what stands between them."""
    composed = unicodedata.normalize("NFC", text)  # a letter and its accent are one code point
    code_points = np.frombuffer(composed.encode("utf-32-le", "replace"), np.uint32)
    folded = _folding()[code_points]
    return folded[folded > 0].astype(np.uint64)


def windows(text: str) -> np.ndarray:
    """uint64 (n - 19,): a hash of each run of WINDOW letters of a text.

    The hash of c0, c1, ..., c19 is the polynomial c0 + c1 * BASE + ... + c19 * BASE**19 modulo
    2**64. Two runs are joined to a longer one, so that five steps make the runs of 20 letters."""
    runs_1 = letters(text)
    if len(runs_1) < WINDOW:
        return runs_1[:0]
    runs_2 = _join(runs_1, runs_1, 1)
    runs_4 = _join(runs_2, runs_2, 2)
    runs_8 = _join(runs_4, runs_4, 4)
    runs_16 = _join(runs_8, runs_8, 8)
    return _join(runs_16, runs_4, 16)


def _join(first: np.ndarray, second: np.ndarray, length: int) -> np.ndarray:
    """Hashes of joined runs: one of `first`, `length` letters long, and the next of `second`."""
    behind = second[length:]
    power = np.uint64(pow(BASE, length, 2**64))
    return first[: len(behind)] + power * behind


def has_chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


# ---- held-out texts in a corpus


class HeldOut:
    """Texts that no corpus may hold.

    Every WINDOW-th run of letters and the last one cover a text: a corpus that holds these holds
    the text. A text shorter than a run is not looked for: half of all corpora have it."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.runs: list[np.ndarray] = []  # of each text that is long enough: hashes that cover it
        self.is_telling: list[bool] = []  # of the same texts: would two people hardly write it?
        for text in texts:
            hashes = windows(text)
            if len(hashes):
                covering = np.append(hashes[::WINDOW], hashes[-1])
                self.runs.append(np.unique(covering))
                # two write "lol that was a great movie", but no Chinese sentence of 20 characters
                self.is_telling.append(has_chinese(text) or len(hashes) > WINDOW)
        nothing = np.zeros(0, np.uint64)
        self._hashes = np.unique(np.concatenate([nothing, *self.runs]))  # of all texts, sorted
        self._seen = np.zeros(len(self._hashes), bool)  # in what was read

    def read(self, texts: Iterable[str]) -> None:
        """Take note of what a corpus holds. Runs do not go over the end of a text."""
        for chunk in _chunks(texts):
            self._seen[self._positions(chunk)] = True

    def touches(self, text: str) -> bool:
        """Does this one text share a run with a held-out text?"""
        return len(self._positions(text)) > 0

    def _positions(self, text: str) -> np.ndarray:
        """Where in _hashes the runs of a text are, those that are there."""
        if not len(self._hashes):
            return np.zeros(0, np.int64)
        hashes = windows(text)
        last = len(self._hashes) - 1
        positions = np.searchsorted(self._hashes, hashes).clip(max=last)
        is_there = self._hashes[positions] == hashes
        return positions[is_there]

    @property
    def searchable(self) -> int:
        """How many texts `found` can find: those of 20 letters, Chinese among them, or of 40."""
        return sum(self.is_telling)

    @property
    def found(self) -> int:
        """How many of the searchable texts were in what was read, from beginning to end."""
        count = 0
        for runs, is_telling in zip(self.runs, self.is_telling, strict=True):
            positions = np.searchsorted(self._hashes, runs)
            if is_telling and self._seen[positions].all():
                count += 1
        return count


def _chunks(texts: Iterable[str], size: int = 1 << 20) -> Iterator[str]:
    """Texts joined to chunks of about `size` letters: numpy is slow on short ones."""
    chunk: list[str] = []
    length = 0
    for text in texts:
        chunk.append(text)
        length += len(text)
        if length > size:
            yield JOINT.join(chunk)
            chunk = []
            length = 0
    yield JOINT.join(chunk)


# ---- the sources of a trunk


class NotSearched(Exception):
    """Why a source is not searched, in a word or two."""


@dataclass
class Corpus:
    """A source that is what the trunk was trained on."""

    name: str
    hash: str  # of what it holds
    texts: Callable[[], Iterator[str]]


def open_sources(sources: list[Source], cache: Path) -> tuple[list[Corpus], list[str]]:
    """The sources that can be searched, each once; and the names of the others, with the reason."""
    paths = [Path(source.get("path", "")) for source in sources if source.get("kind") == "text"]
    hashes = hash_files(paths, cache / "sha256.json")
    corpora: dict[tuple[str, str], Corpus] = {}
    not_searched: dict[str, None] = {}  # a set that keeps its order
    for source in sources:
        try:
            corpus = _open(source, hashes)
            corpora[corpus.name, corpus.hash] = corpus
        except NotSearched as reason:
            not_searched[f"{name_of(source)} ({reason})"] = None
    return list(corpora.values()), list(not_searched)


def name_of(source: Source) -> str:
    """A source in a report: its file, csv in its file, the text of gpt2."""
    kind = source.get("kind")
    if kind == "text":
        return str(source.get("path"))
    if kind == "set":
        settings = from_source(source)
        return f"{settings.set} in {settings.path}" if settings.path else settings.set
    return str(source.get("name", "a source of another version"))


def _open(source: Source, hashes: dict[Path, str]) -> Corpus:
    kind = source.get("kind")
    if kind == "text":
        return _open_text(source, hashes)
    if kind == "set":
        return _open_set(source)
    raise NotSearched("unknown")


def _open_text(source: Source, hashes: dict[Path, str]) -> Corpus:
    path = Path(source.get("path", ""))
    if path not in hashes:
        raise NotSearched("gone")
    if not hashes[path]:
        raise NotSearched("cannot be read")
    if hashes[path] != source.get("sha256"):
        raise NotSearched("changed since")

    def texts() -> Iterator[str]:
        for dialogue in read_dialogues(path, "replace"):
            yield from dialogue.turns

    return Corpus(str(path), hashes[path], texts)


def _open_set(source: Source) -> Corpus:
    settings = from_source(source)
    if settings.path and not Path(settings.path).exists():
        raise NotSearched("gone")
    if settings.set not in READERS:
        raise NotSearched("unknown")
    try:
        reviews = splits.load(settings)
    except (UserError, OSError):
        raise NotSearched("cannot be read") from None
    if reviews.fingerprint != source.get("fingerprint"):
        raise NotSearched("changed since")

    def texts() -> Iterator[str]:
        yield from texts_of(reviews.splits["train"])

    return Corpus(name_of(source), reviews.fingerprint, texts)


# ---- the check


@dataclass
class Search:
    """Which sources were searched for the test's texts, and what was found."""

    tests: int  # texts of the test split
    too_short: int = 0  # those that cannot be told from what others write by chance
    found: int = 0
    searched: list[str] = field(default_factory=list)  # names of sources
    not_searched: list[str] = field(default_factory=list)  # and the reason

    def note(self) -> str:
        """A line of the report. No number stands in it for what was not looked at."""
        if not self.searched:
            reason = brief(self.not_searched) or "no source is recorded"
            return f"not searched for test texts: {reason}"
        if self.too_short == self.tests:
            return f"not searched for test texts: all {self.tests:,} are too short"
        parts = [f"test texts searched for in {brief(self.searched)}: found {self.found:,}"]
        if self.not_searched:
            parts.append(f"NOT searched: {brief(self.not_searched)}")
        if self.too_short:
            parts.append(f"too short to search for: {self.too_short:,} of {self.tests:,}")
        return "; ".join(parts)


def brief(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = [f"{len(names) - NAMED:,} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more])


def search(tests: list[str], sources: list[Source], cache: Path) -> Search:
    """Search the sources of a trunk for the texts of a test.

    What was found is kept in `cache`, by the texts and by what the sources hold."""
    corpora, not_searched = open_sources(sources, cache)
    result = Search(len(tests), not_searched=not_searched)
    if not corpora:
        return result
    hashes = sorted(corpus.hash for corpus in corpora)
    kept_file = cache / f"leaks-{digest(VERSION, sorted(tests), hashes)}.json"
    kept = read_json(kept_file)
    if _is_result(kept):
        result.searched = [corpus.name for corpus in corpora]
        result.found = kept["found"]
        result.too_short = kept["too_short"]
        return result
    held_out = HeldOut(tests)
    for corpus in tqdm(corpora, desc="looking for test texts", disable=None, leave=False):
        try:
            held_out.read(corpus.texts())
            result.searched.append(corpus.name)
        except (UserError, OSError):
            result.not_searched.append(f"{corpus.name} (cannot be read)")
    result.found = held_out.found
    result.too_short = len(tests) - held_out.searchable
    if len(result.searched) == len(corpora):
        write_cache(kept_file, {"found": result.found, "too_short": result.too_short})
    return result


def _is_result(kept: Any) -> bool:
    if not isinstance(kept, dict):
        return False
    return isinstance(kept.get("found"), int) and isinstance(kept.get("too_short"), int)


def check(
    tests: list[str],
    validation: list[str],
    trunk_name: str,
    sources: list[Source],
    cache: Path,
    world: World,
    allowed: bool,
) -> list[str]:
    """What `search` finds, in words for a report. The main process searches, for all: a collective.

    UserError if a test text is found and that is not `allowed`. Validation texts are only counted:
    they may choose the wrong run, but the test stays honest."""
    result = world.by_main(partial(search, tests, sources, cache))
    if result.found and not allowed:
        raise UserError(
            f"{result.found} of {len(tests):,} test texts are in what {trunk_name} was trained on: "
            "take another trunk, train it without them (`python scripts/data.py text` writes such "
            "a text), or set allow_leaks=true"
        )
    notes = [result.note()]
    read = 0
    if validation:
        read = world.by_main(partial(search, validation, sources, cache)).found
    if read:
        notes.append(
            f"{read} of {len(validation):,} validation texts are in what {trunk_name} was trained "
            "on: the validation scores are too high, and may choose the wrong run"
        )
    return notes


def chain(sources: list[Source]) -> str:
    """Every link of what a trunk was trained on, from the first to the last: its corpora, then
    labelled sets, each after an arrow. sources: the last ones first, as a run records them."""
    links: list[list[str]] = []
    is_after_text = False
    for source in reversed(sources):
        is_text = source.get("kind") == "text"
        if is_text and is_after_text:
            links[-1].insert(0, name_of(source))  # of one pretraining, in its order
        else:
            links.append([name_of(source)])
        is_after_text = is_text
    return " -> ".join(brief(link) for link in links) or "no source is recorded"


# ---- texts to pretrain on


def training_texts(sets: list[splits.Reviews], to: Path) -> tuple[int, int]:
    """Write the training texts of sets as a chat text file, to pretrain on.

    A text is a dialogue, a pair one of two utterances. Left out are copies of held-out texts of any
    of the sets; what shares 39 letters in a row with one (or 20, by chance: of each text HeldOut
    knows every 20th run of 20); and what is a part of another training text, as SST-2's phrases are
    of its sentences. Returns (written, left out)."""
    examples = _each_text_once(sets)
    kept = _without_held_out(examples, sets)
    kept = _without_parts(kept)
    to.parent.mkdir(parents=True, exist_ok=True)
    with open(to, "w", encoding="utf-8", newline="\n") as file:
        for example in kept:
            for text in (example.text, example.pair):
                if text:
                    file.write(" ".join(text.split()) + "\n")
            file.write("\n")
    return len(kept), len(examples) - len(kept)


def held_out_examples(sets: list[splits.Reviews]) -> list[Example]:
    """The validation and test examples of the sets."""
    found = []
    for reviews in sets:
        for split in ("validation", *splits.tests_of(reviews.splits)):
            found += reviews.splits[split]
    return found


def texts_of(examples: Iterable[Example]) -> Iterator[str]:
    """The texts of examples, two of a pair."""
    for example in examples:
        yield example.text
        if example.pair:
            yield example.pair


def _each_text_once(sets: list[splits.Reviews]) -> list[Example]:
    """The training examples of the sets, the last of those with the same text and pair."""
    examples = {}
    for reviews in sets:
        for example in reviews.splits["train"]:
            examples[example.text, example.pair] = example
    return list(examples.values())


def _without_held_out(examples: list[Example], sets: list[splits.Reviews]) -> list[Example]:
    """Those that are no copy of a held-out text, and share no long run of letters with one."""
    examples_held_out = held_out_examples(sets)
    keys = {example.key for example in examples_held_out}
    held_out = HeldOut(texts_of(examples_held_out))
    kept = []
    for example in examples:
        touches = held_out.touches(example.text) or held_out.touches(example.pair)
        if example.key not in keys and not touches:
            kept.append(example)
    return kept


def _without_parts(examples: list[Example]) -> list[Example]:
    """Those that are no part of another text. A pair stays."""
    texts = set()
    for example in examples:
        texts.update(splits.spaced(text) for text in (example.text, example.pair) if text)
    parts = splits.find_substrings(texts, texts)
    return [e for e in examples if e.pair or splits.spaced(e.text) not in parts]
