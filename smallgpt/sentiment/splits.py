"""Sentiment and sentence-pair sets -> labelled examples in three splits.

    python scripts/data.py fetch name=sst2 to=data/            a public set, checksummed
    python scripts/data.py stats set=chnsenticorp path=data          what a set holds, and what was dropped from it
    python scripts/data.py stats set=csv path=my.tsv,text_column=review,label_column=stars
    python scripts/data.py text sst2=data tweets=data to=data/x.txt    their training texts, to pretrain on

A set's reader (sets.py) returns the splits it comes with. What it lacks is cut off here, by the text alone: so a text
is on one side only, and no other setting changes which texts are the test.
"""

import hashlib
import re
from dataclasses import dataclass, field

from smallgpt.console import UserError
from smallgpt.sentiment.sets import READERS, Example, ReviewSettings, Splits
from smallgpt.sentiment.tables import show

SPLITS = ("train", "validation", "test")


@dataclass
class Reviews:
    """A set, ready for training: examples of train, validation and test, the names of the labels, what was done."""

    splits: dict[str, list[Example]]
    labels: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """A hash of every example in its place."""
        return hashlib.blake2b(
            repr((self.splits, self.labels)).encode(), digest_size=12
        ).hexdigest()


def load(s: ReviewSettings) -> Reviews:
    """Read the set, drop what would falsify a result, cut off the splits it lacks. UserError if it cannot be used."""
    notes: list[str] = []
    splits = READERS[s.set](s)
    for split, examples in splits.items():
        # "none" and "null" may be names of labels; a table has nothing in a cell without a value, or pandas' nan
        missing = [
            i
            for i, e in enumerate(examples, 1)
            if e.text.strip() and e.label.lower() in ("", "nan")
        ]
        if missing:
            raise UserError(
                f"{len(missing)} example(s) of the {split} split have no label, the first is row "
                f"{missing[0]}: fill them in or remove them"
            )
        splits[split] = [e for e in examples if e.text.strip()]
        if empty := len(examples) - len(splits[split]):
            notes.append(f"{split}: dropped {empty} with an empty text")
    if "test" not in splits:  # one table: each text once, then cut by the text
        splits["train"] = once(splits["train"], notes)
        cut(splits, "test", s.test_fraction, s.split_seed)
    if "validation" not in splits:
        cut(splits, "validation", s.val_fraction, s.split_seed + 1)
        if s.set == "sst2":
            whole_sentences(splits, notes)
    for split, others in (("validation", ["test"]), ("train", ["validation", "test"])):
        taken = {e.key for other in others for e in splits[other]}
        kept = [e for e in splits[split] if e.key not in taken]
        if len(kept) < len(splits[split]):
            notes.append(
                f"{split}: dropped {len(splits[split]) - len(kept)} that are also in {' or '.join(others)}"
            )
        splits[split] = kept
    splits["train"] = once(splits["train"], notes)
    for split in SPLITS:
        if not splits[split]:
            raise UserError(
                f"the {split} split of {s.set} is empty ({'; '.join(notes) or 'too few rows'}): add some"
            )
    labels = label_names(splits)
    if s.train_size:
        if s.train_size > len(splits["train"]):
            notes.append(
                f"train: there are {len(splits['train'])}, fewer than data.train_size={s.train_size}"
            )
        splits["train"] = sorted(splits["train"], key=lambda e: place(e, s.split_seed + 2))[
            : s.train_size
        ]
        if absent := set(labels) - {e.label for e in splits["train"]}:
            raise UserError(
                f"data.train_size={s.train_size} leaves no example of the label {min(absent)!r}: raise it"
            )
    return Reviews(splits, labels, notes)


def label_names(splits: Splits) -> list[str]:
    """The labels of the training split, in the order of their numbers or names; the other splits must know no more."""
    names = {e.label for e in splits["train"]}
    labels = sorted(
        names, key=(lambda name: (float(name), name)) if all(map(is_number, names)) else None
    )
    if len(labels) < 2:
        raise UserError(
            f"all {len(splits['train'])} training examples have the label {labels[0]!r}: add others"
        )
    for split in SPLITS:
        if unknown := sorted({e.label for e in splits[split]} - names):
            raise UserError(
                f"the {split} split has the label {unknown[0]!r}, which no training example has "
                f"(they have {show(labels)}): correct it, or add examples of it"
            )
    return labels


def is_number(name: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d+)?", name) is not None


def place(example: Example, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.blake2b(
        example.key.encode("utf-8", "replace"), digest_size=8, key=str(seed).encode()
    )
    return int.from_bytes(digest.digest(), "big") / 2**64


def cut(splits: Splits, name: str, fraction: float, seed: int) -> None:
    """Move about `fraction` of the training split, but at least one text, to a split of its own."""
    places = [place(e, seed) for e in splits["train"]]
    lowest = min(places, default=0.0)
    sides: tuple[list[Example], list[Example]] = [], []
    for e, at in zip(splits["train"], places, strict=True):
        sides[at < fraction or at == lowest].append(e)
    splits["train"], splits[name] = sides


def once(examples: list[Example], notes: list[str]) -> list[Example]:
    """Each text once, and none that has two labels."""
    labels: dict[tuple[str, str], set[str]] = {}
    for e in examples:
        labels.setdefault(e[:2], set()).add(e.label)
    kept = list({e[:2]: e for e in examples if len(labels[e[:2]]) == 1}.values())
    torn = sum(len(labels[e[:2]]) > 1 for e in examples)
    if torn:
        notes.append(f"train: dropped {torn} whose text has more than one label")
    if again := len(examples) - torn - len(kept):
        notes.append(f"train: dropped {again} copies")
    return kept


def spaced(text: str) -> str:
    """Words between single spaces, one before and behind: so a text is in another only at the borders of words."""
    return f" {' '.join(text.split())} "


def inner(candidates: set[str], texts: set[str]) -> set[str]:
    """Those of the candidates that are a part of another of the texts, all `spaced`."""
    around: dict[tuple[str, ...], list[str]] = {tuple(c.split()[:3]): [] for c in candidates}
    for (
        text
    ) in texts:  # compare a candidate with the texts that hold its first three words, or all it has
        words = text.split()
        for n in (1, 2, 3):
            for gram in {*zip(*(words[i:] for i in range(n)), strict=False)} & around.keys():
                around[gram].append(text)
    return {
        c
        for c in candidates
        if any(c in text and c != text for text in around[tuple(c.split()[:3])])
    }


def whole_sentences(splits: Splits, notes: list[str]) -> None:
    """SST-2's training split holds phrases of its sentences. Phrases in the validation split would be parts of what is
    trained on, and are no test of anything: keep whole sentences there, and no part of them in training."""
    candidates = {spaced(e.text) for e in splits["validation"] if len(e.text.split()) >= 5}
    phrases = {spaced(e.text) for side in ("train", "validation") for e in splits[side]}
    whole = candidates - inner(candidates, phrases)
    wholes = [e for e in splits["validation"] if spaced(e.text) in whole]
    parts = set()  # of three words or more
    for words in (e.text.split() for e in wholes):
        parts |= {
            f" {' '.join(words[i:j])} "
            for i in range(len(words))
            for j in range(i + 3, len(words) + 1)
        }
    held = set(wholes)
    back = [e for e in splits["validation"] if e not in held]
    train = [e for e in splits["train"] + back if spaced(e.text) not in parts]
    dropped = len(splits["train"]) + len(back) - len(train)
    notes.append(
        f"validation: {len(wholes)} whole sentences, held out with {dropped} training phrases, parts of them"
    )
    splits["train"], splits["validation"] = train, wholes
