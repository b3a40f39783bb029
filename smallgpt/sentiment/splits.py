"""Sentiment and sentence-pair sets -> labelled examples in three splits.

    python scripts/data.py fetch name=sst2 to=data             a public set, checksummed
    python scripts/data.py stats set=chnsenticorp path=data    what it holds, and what was dropped
    python scripts/data.py text sst2=data to=data/x.txt        its training texts, to pretrain on

A set's reader (sets.py) returns the splits it comes with. What it lacks is cut off here, by the
text alone: so a text is on one side only, and no other setting changes which texts are the test.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from smallgpt.console import UserError
from smallgpt.files import unit_hash
from smallgpt.sentiment.sets import (
    DEFAULT_MEASURES,
    MEASURES,
    READERS,
    Example,
    ReviewSettings,
    SetFiles,
    Splits,
)
from smallgpt.sentiment.tables import Columns, show

SPLITS = ("train", "validation", "test")
NUMBER = "score"  # the one label of a set whose labels are numbers
SEEDS_TRIED = 20  # for one that leaves each label a training example


@dataclass
class Reviews:
    """A set, ready for training."""

    splits: dict[str, list[Example]]  # train, validation and test; perhaps further tests
    labels: list[str]  # their names, in the order of the classes
    measures: tuple[str, ...] = DEFAULT_MEASURES  # what is scored, the first before all
    notes: list[str] = field(default_factory=list)  # what was guessed, dropped and held out
    columns: Columns | None = None  # of set=csv: the titles of text, pair and label

    @property
    def is_number(self) -> bool:
        """Is a number foretold of each text, and no class?"""
        return "pearson" in self.measures

    @property
    def fingerprint(self) -> str:
        """A hash of every example in its place."""
        content = repr((self.splits, self.labels)).encode()
        return hashlib.blake2b(content, digest_size=12).hexdigest()


def load(s: ReviewSettings) -> Reviews:
    """Read the set, drop what would falsify a result, cut off the splits it lacks.

    UserError if it cannot be used."""
    problems = s.check()  # of settings that another version recorded
    if problems:
        raise UserError("; ".join(problems))
    files = SetFiles(s)
    splits = READERS[s.set](files)
    notes = files.notes
    for split in splits:
        refuse_missing_labels(split, splits[split])
        splits[split] = drop_empty(split, splits[split], notes)
    if s.set == "sst2_sentences":
        keep_whole_sentences(splits, notes)
    lacking = [split for split in ("test", "validation") if split not in splits]
    if "test" in lacking:
        splits["train"] = deduplicate(splits["train"], notes)
        cut_off(splits, "test", s)
    if "validation" in lacking:
        cut_off(splits, "validation", s)
        if s.set == "sst2":
            hold_out_whole_sentences(splits, notes)
    tests = tests_of(splits)
    drop_overlap(splits, "validation", tests, notes)
    drop_overlap(splits, "train", ["validation", *tests], notes)
    splits["train"] = deduplicate(splits["train"], notes)
    for split in SPLITS:
        if not splits[split]:
            reason = "; ".join(notes) or "too few rows"
            raise UserError(f"the {split} split of {s.set} is empty ({reason}): add some")
    measures = MEASURES.get(s.set, DEFAULT_MEASURES)
    reviews = Reviews(splits, [NUMBER], measures, notes, files.columns)
    if reviews.is_number:
        refuse_words(splits)
    else:
        reviews.labels = label_names(splits)
        refuse_unknown_labels(splits, reviews.labels, lacking, s)
    if s.train_size:
        names = [] if reviews.is_number else reviews.labels
        splits["train"] = limit(splits["train"], names, s, notes)
    return reviews


def tests_of(splits: Iterable[str]) -> list[str]:
    """The names of the splits that nothing may be trained on or chosen by."""
    return [name for name in splits if name.startswith("test")]


# ---- steps of load


def refuse_missing_labels(split: str, examples: list[Example]) -> None:
    """UserError for a text without a label.

    "none" and "null" may be names of labels; "nan" is what pandas writes into an empty cell."""
    missing = []
    for row, e in enumerate(examples, 1):
        if e.text.strip() and e.label.lower() in ("", "nan"):
            missing.append(row)
    if missing:
        raise UserError(
            f"{len(missing)} example(s) of the {split} split have no label, the first is row "
            f"{missing[0]}: fill them in or remove them"
        )


def drop_empty(split: str, examples: list[Example], notes: list[str]) -> list[Example]:
    """The examples that have a text."""
    kept = [e for e in examples if e.text.strip()]
    dropped = len(examples) - len(kept)
    if dropped:
        notes.append(f"{split}: dropped {dropped} with an empty text")
    return kept


def cut_off(splits: Splits, name: str, s: ReviewSettings) -> None:
    """Move a part of the training split to a split of its own."""
    splits["train"], splits[name] = cut(splits["train"], name, s, s.split_seed)


def cut(
    examples: list[Example],
    name: str,
    s: ReviewSettings,
    split_seed: int,
) -> tuple[list[Example], list[Example]]:
    """The examples that stay, and those of the split: about its fraction, and at least one text."""
    if name == "test":
        fraction = s.test_fraction
        seed = split_seed
    else:
        fraction = s.val_fraction
        seed = split_seed + 1
    hashes = [unit_hash(e.split_key, seed) for e in examples]
    lowest = min(hashes, default=0.0)
    stay: list[Example] = []
    taken: list[Example] = []
    for e, number in zip(examples, hashes, strict=True):
        if number < fraction or number == lowest:
            taken.append(e)
        else:
            stay.append(e)
    return stay, taken


def drop_overlap(splits: Splits, split: str, others: list[str], notes: list[str]) -> None:
    """Drop from a split the copies of what others hold."""
    held_out = set()
    for other in others:
        held_out.update(e.key for e in splits[other])
    kept = [e for e in splits[split] if e.key not in held_out]
    dropped = len(splits[split]) - len(kept)
    if dropped:
        notes.append(f"{split}: dropped {dropped} that are also in {' or '.join(others)}")
    splits[split] = kept


def deduplicate(examples: list[Example], notes: list[str]) -> list[Example]:
    """Each text once, and none that has two labels."""
    labels_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for text, pair, label in examples:
        labels_of[text, pair].add(label)
    unanimous = []
    for e in examples:
        if len(labels_of[e.text, e.pair]) == 1:
            unanimous.append(e)
    kept = list(dict.fromkeys(unanimous))
    torn = len(examples) - len(unanimous)
    copies = len(unanimous) - len(kept)
    if torn:
        notes.append(f"train: dropped {torn} whose text has more than one label")
    if copies:
        notes.append(f"train: dropped {copies} copies")
    return kept


def limit(
    examples: list[Example], labels: list[str], s: ReviewSettings, notes: list[str]
) -> list[Example]:
    """train_size of the examples. Those of a smaller number are among those of a larger."""
    if s.train_size > len(examples):
        notes.append(f"train: there are {len(examples)}, fewer than data.train_size={s.train_size}")
    seed = s.split_seed + 2
    by_hash = sorted(examples, key=lambda e: unit_hash(e.split_key, seed))
    kept = by_hash[: s.train_size]
    absent = set(labels) - {e.label for e in kept}
    if absent:
        raise UserError(
            f"data.train_size={s.train_size} leaves no example of the label {min(absent)!r}: "
            "raise it"
        )
    return kept


# ---- labels


def refuse_words(splits: Splits) -> None:
    """UserError for a label that is no number."""
    for split, examples in splits.items():
        for e in examples:
            try:
                is_number = math.isfinite(float(e.label))
            except ValueError:
                is_number = False
            if not is_number:
                raise UserError(f"the {split} split has the label {e.label!r}: it must be a number")


def label_names(splits: Splits) -> list[str]:
    """The labels of the training split, in the order of their numbers or names."""
    names = {e.label for e in splits["train"]}
    if all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names):
        labels = sorted(names, key=lambda name: (float(name), name))
    else:
        labels = sorted(names)
    if len(labels) < 2:
        raise UserError(
            f"all {len(splits['train'])} training examples have the label {labels[0]!r}: add others"
        )
    return labels


def refuse_unknown_labels(
    splits: Splits, labels: list[str], cut_off_splits: list[str], s: ReviewSettings
) -> None:
    """UserError for a label that no training example has."""
    for split in dict.fromkeys([*SPLITS, *splits]):
        unknown = sorted({e.label for e in splits[split]} - set(labels))
        if not unknown:
            continue
        problem = f"the {split} split has the label {unknown[0]!r}, which no training example has"
        if split in cut_off_splits:
            raise UserError(f"{problem}: {rare_label(splits, unknown[0], cut_off_splits, s)}")
        raise UserError(f"{problem} (they have {show(labels)}): correct it, or add examples of it")


def rare_label(splits: Splits, label: str, cut_off_splits: list[str], s: ReviewSettings) -> str:
    """Why the cut took all examples of a label out of the training split, and what helps."""
    whole = list(splits["train"])
    for split in cut_off_splits:
        whole += splits[split]
    counts = Counter(e.label for e in whole)
    reason = f"the set has {counts[label]} of it, of {len(counts)} labels in all"
    seed = find_split_seed(whole, cut_off_splits, s)
    if seed is not None:
        return f"{reason}; data.split_seed={seed} leaves each label in training"
    return (
        f"{reason}, and no data.split_seed below {SEEDS_TRIED} leaves each label in training; add "
        "examples, remove such labels, or name another data.label_column"
    )


def find_split_seed(
    whole: list[Example], cut_off_splits: list[str], s: ReviewSettings
) -> int | None:
    """A split seed that leaves each label in the training split, None if none of the first does."""
    labels = {e.label for e in whole}
    for seed in range(SEEDS_TRIED):
        train = whole
        for split in cut_off_splits:
            train, _ = cut(train, split, s, seed)
        if {e.label for e in train} == labels:
            return seed
    return None


# ---- texts that are a part of others


def spaced(text: str) -> str:
    """Words between single spaces, one before and one behind.

    So a text is a part of another only at the borders of words."""
    return f" {' '.join(text.split())} "


def is_substring(text: str, other: str) -> bool:
    """Whether a text is a true part of another, both `spaced`."""
    return text != other and text in other


def find_substrings(candidates: set[str], texts: set[str]) -> set[str]:
    """Those of the candidates that are a part of one of the texts, all `spaced`.

    A candidate is compared only with the texts that hold its opening, its first three words."""
    texts_by_opening: dict[str, list[str]] = {opening(c): [] for c in candidates}
    for text in texts:
        for run in short_runs(text) & texts_by_opening.keys():
            texts_by_opening[run].append(text)
    found = set()
    for candidate in candidates:
        others = texts_by_opening[opening(candidate)]
        if any(is_substring(candidate, other) for other in others):
            found.add(candidate)
    return found


def opening(text: str) -> str:
    """The first three words, or as many as there are."""
    return " ".join(text.split()[:3])


def short_runs(text: str) -> set[str]:
    """All runs of one, two and three words: "a b c" -> a, b, c, a b, b c, a b c."""
    words = text.split()
    runs = set(words)
    runs.update(map(" ".join, zip(words, words[1:], strict=False)))
    runs.update(map(" ".join, zip(words, words[1:], words[2:], strict=False)))
    return runs


def long_runs(text: str) -> set[str]:
    """All runs of three words or more, `spaced`."""
    words = text.split()
    runs = set()
    for begin in range(len(words)):
        for end in range(begin + 3, len(words) + 1):
            runs.add(spaced(" ".join(words[begin:end])))
    return runs


def whole_sentences(examples: list[Example], phrases: list[Example]) -> list[Example]:
    """Those of SST-2's examples that have five words and are a part of no phrase."""
    texts = {spaced(e.text) for e in phrases}
    candidates = set()
    for e in examples:
        if len(e.text.split()) >= 5:
            candidates.add(spaced(e.text))
    whole = candidates - find_substrings(candidates, texts)
    return [e for e in examples if spaced(e.text) in whole]


def keep_whole_sentences(splits: Splits, notes: list[str]) -> None:
    """Keep only whole sentences in SST-2's training split."""
    phrases = splits["train"]
    splits["train"] = whole_sentences(phrases, phrases)
    dropped = len(phrases) - len(splits["train"])
    notes.append(f"train: dropped {dropped} phrases, parts of others or under five words")


def hold_out_whole_sentences(splits: Splits, notes: list[str]) -> None:
    """Keep only whole sentences in SST-2's validation split, and no part of them in training.

    The training split holds phrases of its sentences: in the validation split they would be parts
    of what is trained on, and no test of anything."""
    sentences = whole_sentences(splits["validation"], splits["train"] + splits["validation"])
    held_out = set(sentences)
    given_back = [e for e in splits["validation"] if e not in held_out]
    parts: set[str] = set()
    for e in sentences:
        parts |= long_runs(e.text)

    before = splits["train"] + given_back
    train = [e for e in before if spaced(e.text) not in parts]
    dropped = len(before) - len(train)
    notes.append(
        f"validation: {len(sentences)} whole sentences, held out with {dropped} training phrases, "
        "parts of them"
    )
    splits["train"] = train
    splits["validation"] = sentences
