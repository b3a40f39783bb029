"""Was a test text read in training the trunk? Searches what the trunk was trained on for the test's texts."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smallgpt.console import UserError
from smallgpt.files import write_atomic
from smallgpt.parallel.world import World
from smallgpt.sentiment import splits
from smallgpt.sentiment.sets import ReviewSettings
from smallgpt.text.formats import read_dialogues

WINDOW = 20  # letters and digits: a run that two Chinese texts hardly share by chance, about four English words


@functools.cache
def _folding() -> np.ndarray:
    """uint32 (0x110000,): code point -> its lower case; 0 for what is neither letter nor digit."""
    table = np.zeros(0x110000, np.uint32)
    for i in range(0x40000):  # Unicode has no letters beyond plane 3
        if (c := chr(i)).isalnum():
            table[i] = ord(low) if len(low := c.lower()) == 1 else i
    return table


def windows(text: str) -> np.ndarray:
    """uint64 (n,): a hash of each run of WINDOW letters and digits of a text, whatever stands between them."""
    folded = _folding()[np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)]
    h = folded[folded > 0].astype(np.uint64)
    if len(h) < WINDOW:
        return h[:0]
    # polynomial hash modulo 2**64 by doubling: runs of 1, 2, 4, 8, 16, and then 16 + 4 = 20
    runs = {1: h}
    for n in (1, 2, 4, 8):
        runs[2 * n] = runs[n][:-n] + _power(n) * runs[n][n:]
    return runs[16][:-4] + _power(16) * runs[4][16:]


def _power(n: int) -> np.uint64:
    return np.uint64(pow(0x9E3779B97F4A7C15, n, 2**64))


def has_chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


class HeldOut:
    """Texts that no corpus may hold."""

    def __init__(self, texts: Iterable[str]) -> None:
        # every WINDOW-th run and the last one cover a text; a text shorter than a run is in half of all corpora
        both = [(windows(text), has_chinese(text)) for text in texts]
        self.runs = [np.unique(np.append(w[::WINDOW], w[-1:])) for w, _ in both if len(w)]
        # two people may well write "lol that was a great movie", but not a Chinese sentence of as many characters
        self._telling = [chinese or len(w) > WINDOW for w, chinese in both if len(w)]
        self._all = np.unique(np.concatenate([*self.runs, np.zeros(0, np.uint64)]))
        self._seen = np.zeros(len(self._all), bool)

    def read(self, texts: Iterable[str]) -> None:
        """Take note of what a corpus holds. Runs do not go over the end of a text."""
        for chunk in _chunks(texts):
            self._seen[self._hits(chunk)] = True

    def touches(self, text: str) -> bool:
        """Does this one text share a run with a held-out text?"""
        return len(self._hits(text)) > 0

    def _hits(self, text: str) -> np.ndarray:
        """Places in _all of the runs of a text that are there."""
        if not len(self._all):
            return np.zeros(0, np.int64)
        runs = windows(text)
        at = np.searchsorted(self._all, runs).clip(max=len(self._all) - 1)
        return at[self._all[at] == runs]

    @property
    def found(self) -> int:
        """How many held-out texts were in what was read, from beginning to end: of those with 20 Chinese characters
        or 40 other letters, as shorter ones are written twice by chance."""
        whole = (bool(self._seen[np.searchsorted(self._all, runs)].all()) for runs in self.runs)
        return sum(seen and telling for seen, telling in zip(whole, self._telling, strict=True))


def _chunks(texts: Iterable[str], size: int = 1 << 20) -> Iterator[str]:
    """Texts joined, so that numpy has something to do; the joint is a letter that no text has."""
    part: list[str] = []
    length = 0
    for text in texts:
        part.append(text)
        length += len(text)
        if length > size:
            yield "\U0003134a".join(part)
            part, length = [], 0
    yield "\U0003134a".join(part)


Corpora = list[
    str | ReviewSettings
]  # text files, and labelled sets of which the training split was read


def search(texts: list[str], corpora: Corpora, cache: Path) -> tuple[int, list[str]]:
    """How many of the texts stand in the corpora, from beginning to end, and which corpora are not there to be read.
    What was found is kept in `cache`, by the texts, the names, sizes and times of the files, and the sets' examples."""
    files = [Path(c) for c in corpora if isinstance(c, str) and Path(c).is_file()]
    missing = [c for c in corpora if isinstance(c, str) and not Path(c).is_file()]
    sets = []
    for s in (c for c in corpora if isinstance(c, ReviewSettings)):
        try:
            sets.append(splits.load(s))
        except UserError:
            missing.append(f"{s.set} in {s.path}")
    stamps = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files] + [
        r.fingerprint for r in sets
    ]
    asked = repr((WINDOW, sorted(texts), stamps)).encode("utf-8", "replace")
    kept = cache / f"leaks-{hashlib.blake2b(asked, digest_size=12).hexdigest()}.json"
    if not kept.exists():
        held = HeldOut(texts)
        for file in tqdm(files, desc="looking for test texts", disable=None, leave=False):
            held.read(turn for turns in read_dialogues(file, "replace") for turn in turns)
        for r in sets:
            held.read(text for e in r.splits["train"] for text in e[:2])
        cache.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(held.found), shared=True)
    return json.loads(kept.read_text(encoding="utf-8")), missing


def check(
    texts: list[str], trunk: str, corpora: Corpora, cache: Path, world: World, allowed: bool
) -> list[str]:
    """What `search` finds in the corpora of a trunk, in words for a report; rank 0 searches. UserError on every rank if
    anything is found and that is not `allowed`."""
    found, absent = search(texts, corpora, cache) if world.main else (0, [])
    found = int(world.sum(found)[0])
    if found and not allowed:
        raise UserError(
            f"{found} of {len(texts):,} test texts are in what {trunk} was trained on: take another trunk, train it "
            "without them (`python scripts/data.py text` writes such a text), or set allow_leaks=true"
        )
    notes = [f"test texts found in the trunk's training text: {found}"]
    if absent:
        notes.append(f"not searched for test texts, being absent: {', '.join(absent)}")
    return notes


def training_texts(sets: list[splits.Reviews], to: Path) -> tuple[int, int]:
    """Write the training texts of sets as a chat text file, one a dialogue, a pair as two utterances, to pretrain on.
    Left out: copies of held-out texts of any of the sets, and what shares 39 letters in a row with one (or 20, by
    chance: of each text HeldOut knows every 20th run of 20); and what is a part of another training text, as SST-2's
    phrases are of its sentences. Returns (written, left out)."""
    out = [e for r in sets for split in ("validation", "test") for e in r.splits[split]]
    held, keys = HeldOut(text for e in out for text in (e.text, e.pair)), {e.key for e in out}
    examples = {e[:2]: e for r in sets for e in r.splits["train"]}.values()
    kept = [
        e
        for e in examples
        if e.key not in keys and not held.touches(e.text) and not held.touches(e.pair)
    ]
    texts = {splits.spaced(text) for e in kept for text in (e.text, e.pair) if text}
    parts = splits.find_substrings(texts, texts)
    kept = [e for e in kept if e.pair or splits.spaced(e.text) not in parts]
    to.parent.mkdir(parents=True, exist_ok=True)
    with open(to, "w", encoding="utf-8", newline="\n") as file:
        for e in kept:
            file.writelines(" ".join(text.split()) + "\n" for text in (e.text, e.pair) if text)
            file.write("\n")
    return len(kept), len(examples) - len(kept)
