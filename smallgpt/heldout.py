"""Finds the texts of held-out examples in other text, by hashes of their runs of letters."""

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

WINDOW = 20  # letters and digits: a run that two Chinese texts hardly share by chance, about four English words


@cache
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
