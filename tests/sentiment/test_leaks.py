"""The leak check: what is found, what is not looked at, and that the report never mixes them up."""

import csv
import dataclasses
import gzip
import hashlib
import json
import os
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch

from smallgpt.console import UserError
from smallgpt.files import hash_files
from smallgpt.parallel.world import World
from smallgpt.sentiment import leaks
from smallgpt.sentiment.leaks import HeldOut, training_texts
from smallgpt.sentiment.sets import Example, ReviewSettings
from smallgpt.sentiment.splits import Reviews, load

ALONE = World(0, 1, torch.device("cpu"))
ENGLISH = "this sentence is in the test split of a set of reviews"
OTHER = "and this one here is in no corpus at all, is it, or is it now?"
UNKNOWN = {"kind": "unknown", "name": "the text of gpt2"}
HINDI = (
    "यह होटल बहुत अच्छा है और यहाँ का खाना भी बहुत स्वादिष्ट था"  # 29 letters, 56 with their vowel signs
)


def corpus(path: Path, *texts: str) -> dict:
    """Write a corpus file; the source that training records of it."""
    content = "\n\n".join(texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"kind": "text", "path": str(path.resolve()), "weight": 1.0, "sha256": sha256}


def labelled(path: Path, n: int = 60, **changes) -> tuple[Reviews, dict]:
    """Write a labelled set; its splits, and the source that training records of it."""
    texts = [f"this is the very long distinctive review number {i * 7919}" for i in range(n)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Text", "Sentiment"])
        rows.writerows([text, ("bad", "good")[i % 2]] for i, text in enumerate(texts))
    settings = ReviewSettings(path=str(path.resolve()), **changes)
    reviews = load(settings)
    record = dataclasses.asdict(settings)
    return reviews, {"kind": "set", "settings": record, "fingerprint": reviews.fingerprint}


def noted(tests: list[str], sources: list[dict], cache: Path, allowed: bool = True) -> str:
    """The note of a check for a report."""
    (note,) = leaks.check(tests, [], "the trunk", sources, cache, ALONE, allowed)
    return note


# ---- letters


def letters(text: str) -> str:
    """What counts in a text, without a table: letters, digits, marks, emoji; in lower case."""
    kept = ""
    for c in unicodedata.normalize("NFC", text):
        is_mark = unicodedata.category(c)[0] == "M" and not "\ufe00" <= c <= "\ufe0f"
        if c.isalnum() or is_mark or unicodedata.category(c) == "So":
            kept += c.lower() if len(c.lower()) == 1 else c
    return kept


def noisy(draw: random.Random, text: str) -> str:
    """The same letters, with other capitals, and with spaces and punctuation between them."""
    parts = []
    for c in text:
        upper = c.upper()
        is_the_same = len(upper) == 1 and upper.lower() == c
        parts.append(upper if is_the_same and draw.random() < 0.5 else c)
        parts.append(draw.choice(["", "", " ", "，", "!\n"]))
    return "".join(parts)


def telling(text: str) -> bool:
    """Long enough to be no coincidence: two strangers did write "lol that was a great movie"."""
    return len(text) >= (20 if any("\u4e00" <= c <= "\u9fff" for c in text) else 40)


ALPHABETS = {
    "latin": "abc",
    "chinese": "的一是不了在人有我他",
    "mixed": "aé1的😀",
    "hindi": "यहतबुअिाी्ै",
    "emoji": "😀😂🙏❤☆",
}


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS)
@pytest.mark.parametrize("size", [50, 1 << 20])
def test_held_out_texts_are_found_like_a_naive_search_finds_them(alphabet, size, monkeypatch):
    draw = random.Random(size)
    chunks = leaks._chunks
    monkeypatch.setattr(leaks, "_chunks", lambda texts: chunks(texts, size))
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(400))) for _ in range(60)]
    texts += ["", "，。"]
    held = ["".join(draw.choices(alphabet, k=draw.randrange(100))) for _ in range(40)] + ["", "!"]
    for _ in range(60):  # parts of texts, whole texts, and parts of two texts, which are in no text
        at = draw.randrange(len(texts) - 1)
        text = draw.choice([texts[at], texts[at] + texts[at + 1]])
        begin = draw.randrange(len(text) + 1)
        length = draw.choice([19, 20, 21, 39, 40, 41, 77, 500])
        held.append(noisy(draw, text[begin : begin + length]))
    plain = [letters(text) for text in texts]
    searchable = [letters(text) for text in held if len(letters(text)) >= leaks.WINDOW]
    wanted = [text for text in searchable if telling(text)]
    expected = sum(any(text in other for other in plain) for text in wanted)
    out = HeldOut(held)
    out.read(iter(noisy(draw, text) for text in texts))
    assert len(out.runs) == len(searchable) > 40
    assert out.searchable == len(wanted)
    assert out.found == expected and 5 < expected < len(searchable)
    for text in held:  # each for itself
        alone = HeldOut([text])
        alone.read(texts)
        in_corpus = any(letters(text) in other for other in plain)
        assert alone.found == (telling(letters(text)) and in_corpus)


def test_touching_a_held_out_text():
    draw = random.Random(0)
    held = "".join(draw.choices("abcdefgh的一是不了", k=95))
    out = HeldOut([held, "short"])
    for length in range(96):
        for begin in range(0, 96 - length, 3):
            text = "x" + held[begin : begin + length] + "y"
            expected = any(held[i : i + 20] in text for i in (0, 20, 40, 60, 75))
            assert out.touches(noisy(draw, text)) == expected
            assert expected or length < 39
    assert not HeldOut([]).touches(held) and not HeldOut(["short"]).touches("short")
    assert HeldOut([]).found == 0


def test_the_hash_is_the_polynomial_that_it_is_said_to_be():
    text = "Is it the polynomial, or not?"
    code_points = [ord(c) for c in letters(text)]
    for i, found in enumerate(leaks.windows(text).tolist()):
        run = code_points[i : i + leaks.WINDOW]
        assert found == sum(c * leaks.BASE**k for k, c in enumerate(run)) % 2**64
    assert len(leaks.windows(text)) == len(code_points) - leaks.WINDOW + 1


@pytest.mark.parametrize("sign", ["ि", "ा", "ं", "्", "\u0301", "\u0e31", "\u05b8", "😀", "❤"])
def test_texts_that_differ_in_marks_or_emoji_are_two_texts(sign):
    """Regression: what isalnum does not know was dropped. So the vowel signs of Hindi, the marks of
    other scripts and emoji made no difference: a text was found in a corpus that had another."""
    plain = "".join(random.Random(0).choices("कतपहबमनलसर", k=45))
    other = plain[:30] + sign + plain[30:]
    out = HeldOut([plain, other])
    assert out.searchable == 2
    out.read([other])
    assert out.found == 1


def test_hindi_is_found():
    """Regression: without vowel signs the sentence had 29 letters, too few to be looked for."""
    out = HeldOut([HINDI])
    out.read([f"- {HINDI.replace(' ', '  ')}!"])
    assert out.searchable == out.found == 1
    assert leaks.windows(HINDI).size > leaks.WINDOW


def test_a_letter_is_the_same_however_unicode_spells_it():
    """A mark may be in its letter or behind it, and an emoji may have a variant behind it."""
    composed = "é ü ñ क़ が ❤" * 8
    decomposed = unicodedata.normalize("NFD", composed).replace("❤", "❤\ufe0f")
    assert decomposed != composed
    out = HeldOut([composed])
    out.read([decomposed])
    assert out.found == 1


# ---- sources


def test_a_trunk_that_read_the_test_is_refused_wherever_it_is_used(tmp_path, monkeypatch):
    """Regression: a corpus was looked for where its training had named it; from another folder it
    was gone, and the report had "found: 0"."""
    reviews, _ = labelled(tmp_path / "leak.csv")
    tests = [example.text for example in reviews.splits["test"]]
    source = corpus(tmp_path / "leak.txt", *(f"{text}\na reply" for text in tests))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    n = len(tests)
    with pytest.raises(UserError, match=f"^{n} of {n} test texts are in what the trunk was train"):
        noted(tests, [source], tmp_path / "cache", allowed=False)
    note = noted(tests, [source], tmp_path / "cache")
    assert note == f"test texts searched for in {source['path']}: found {n}"


class SecondRank:
    """A process that learns what the main one has found."""

    def __init__(self, found: int) -> None:
        self.result = leaks.Search(1, found=found, searched=["a.txt"])

    def by_main(self, work) -> leaks.Search:
        return self.result


def test_every_rank_stops_and_rank_0_alone_searches(tmp_path, monkeypatch):
    monkeypatch.setattr(leaks, "search", lambda *_: pytest.fail("rank 1 must not search"))
    arguments = [[ENGLISH], [], "t", [UNKNOWN], tmp_path]
    with pytest.raises(UserError, match="^3 of 1 test texts"):
        leaks.check(*arguments, SecondRank(3), False)
    found = ["test texts searched for in a.txt: found 3"]
    assert leaks.check(*arguments, SecondRank(3), True) == found
    leaks.check(*arguments, SecondRank(0), False)


def test_no_number_stands_for_what_was_not_looked_at(tmp_path):
    """Regression: "found: 0" was reported of corpora that were gone."""
    sources = [corpus(tmp_path / f"{name}.txt", f"some text of {name}") for name in "abcd"]
    a, b, c, d = (source["path"] for source in sources)
    os.remove(c)
    Path(d).write_text("another text\n", encoding="utf-8")
    _, gone_set = labelled(tmp_path / "gone.csv")
    os.remove(tmp_path / "gone.csv")
    csv_name = f"csv in {tmp_path / 'gone.csv'}"
    missing = f"{c} (gone), {d} (changed since), the text of gpt2 (unknown), {csv_name} (gone)"
    cache = tmp_path / "cache"
    note = noted([ENGLISH], [*sources, UNKNOWN, gone_set], cache)
    assert note == f"test texts searched for in {a}, {b}: found 0; NOT searched: {missing}"
    note = noted([ENGLISH], [sources[2], sources[3], UNKNOWN, gone_set], cache)
    assert note == f"not searched for test texts: {missing}"
    note = noted([ENGLISH], [UNKNOWN], cache)
    assert note == "not searched for test texts: the text of gpt2 (unknown)"
    assert noted([ENGLISH], [], cache) == "not searched for test texts: no source is recorded"


def test_texts_too_short_to_search_for_are_counted(tmp_path):
    """Regression: "found: 0" also counted texts so short that they are never looked for."""
    source = corpus(tmp_path / "a.txt", "so good", ENGLISH)
    note = noted(["so good", "So bad!", OTHER], [source], tmp_path / "cache")
    assert note.endswith(": found 0; too short to search for: 2 of 3")
    assert noted(["so good", "So bad!", OTHER], [source], tmp_path / "cache") == note  # kept
    note = noted(["so good", "so bad"], [source], tmp_path / "cache")
    assert note == "not searched for test texts: all 2 are too short"


def cut_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"a line\n" * 1000)[:-20])


DAMAGES = {
    "a damaged .gz": ("corpus.txt.gz", cut_gzip, "cannot be read"),
    "a folder": ("corpus.txt", Path.mkdir, "gone"),
    "a folder that is a file now": ("file/corpus.txt", lambda path: path.parent.touch(), "gone"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_corpus_that_cannot_be_read_is_named(name, tmp_path):
    file, damage, reason = DAMAGES[name]
    path = tmp_path / file
    damage(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    source = {"kind": "text", "path": str(path), "weight": 1.0, "sha256": sha256}
    for _ in range(2):  # nothing is kept of a search that broke off
        note = noted([ENGLISH], [source], tmp_path / "cache")
        assert note == f"not searched for test texts: {path} ({reason})"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_corpus_without_permission_is_named(tmp_path):
    source = corpus(tmp_path / "a.txt", ENGLISH)
    os.chmod(tmp_path / "a.txt", 0)
    assert "(cannot be read)" in noted([ENGLISH], [source], tmp_path / "cache")


def test_the_training_split_of_a_labelled_set_is_searched(tmp_path):
    """Its test split was not read: the same set in the same split is no leak."""
    reviews, source = labelled(tmp_path / "set.csv")
    name = f"csv in {tmp_path / 'set.csv'}"
    cache = tmp_path / "cache"
    texts = {split: [e.text for e in reviews.splits[split]] for split in reviews.splits}
    assert noted(texts["test"], [source], cache) == f"test texts searched for in {name}: found 0"
    with pytest.raises(UserError, match=f"^{len(texts['train'])} of"):
        noted(texts["train"], [source], cache, allowed=False)
    newer = {**source, "settings": {**source["settings"], "a_setting_of_another_version": 1}}
    assert noted(texts["test"], [newer], cache).endswith("found 0")
    older = {**source, "settings": {"path": source["settings"]["path"]}}
    assert noted(texts["test"], [older], cache).endswith("found 0")
    labelled(tmp_path / "set.csv", n=50)
    note = noted(texts["test"], [source], cache)
    assert note == f"not searched for test texts: {name} (changed since)"
    (tmp_path / "set.csv").write_text("Text\n", encoding="utf-8")
    note = noted(texts["test"], [source], cache)
    assert note == f"not searched for test texts: {name} (cannot be read)"


def test_a_record_of_another_version_is_not_searched(tmp_path):
    records = [
        {"kind": "set", "settings": {"set": "a_set_of_tomorrow"}, "fingerprint": "0"},
        {"kind": "web", "name": "a page"},
        {"kind": "web"},
        {},
    ]
    note = noted([ENGLISH], records, tmp_path)
    names = ["a_set_of_tomorrow", "a page", "a source of another version"]
    assert note == f"not searched for test texts: {', '.join(f'{n} (unknown)' for n in names)}"


def test_each_source_is_searched_once(tmp_path, monkeypatch):
    """A chain of trunks names the text of the first one again, with a weight of its own."""
    read = []
    read_dialogues = leaks.read_dialogues
    monkeypatch.setattr(
        leaks, "read_dialogues", lambda path, errors: read.append(path) or read_dialogues(path)
    )
    one = corpus(tmp_path / "a.txt", ENGLISH)
    _, reviews = labelled(tmp_path / "set.csv")
    sources = [one, reviews, UNKNOWN, {**one, "weight": 0.5}, one, {**reviews}, UNKNOWN]
    note = noted([ENGLISH], sources, tmp_path / "cache")
    assert read == [tmp_path / "a.txt"]
    searched = f"{tmp_path / 'a.txt'}, csv in {tmp_path / 'set.csv'}"
    assert note.startswith(f"test texts searched for in {searched}: found 1; NOT searched: the")
    assert note.count("gpt2") == 1


def test_a_note_names_ten_sources_and_counts_the_rest(tmp_path):
    sources = [corpus(tmp_path / f"{i:04}.txt", f"text {i}") for i in range(30)]
    for source in sources[:12]:
        os.remove(source["path"])
    note = noted([ENGLISH], sources, tmp_path / "cache")
    searched, not_searched = note.split("; NOT searched: ")
    assert searched.count(".txt") == 10 and searched.endswith("0021.txt, 8 more: found 0")
    assert not_searched.count(".txt (gone)") == 10 and not_searched.endswith(", 2 more")


def test_a_chain_goes_from_the_first_to_the_last(tmp_path):
    """Read from the last to the first, or with a corpus of its own arrow for each file, the order
    of the training could not be told."""
    first, second = ({"kind": "text", "path": f"/{name}.txt"} for name in "ab")
    stars = {"kind": "set", "settings": {"set": "csv", "path": "/stars.csv"}}
    tweets = {"kind": "set", "settings": {"set": "tweets", "path": ""}}
    recorded = [tweets, stars, first, second, UNKNOWN]  # what was read last comes first
    wanted = "the text of gpt2 -> /a.txt, /b.txt -> csv in /stars.csv -> tweets"
    assert leaks.chain(recorded) == wanted
    assert leaks.chain([]) == "no source is recorded"


def test_validation_texts_that_were_read_are_told(tmp_path):
    """The chain before a task had the task's validation texts with their labels, and looked good
    for that."""
    source = corpus(tmp_path / "a.txt", ENGLISH)
    arguments = ("the trunk", [source], tmp_path / "cache", ALONE, False)
    _, told = leaks.check([OTHER], [ENGLISH, OTHER], *arguments)
    assert told.startswith("1 of 2 validation texts are in what the trunk was trained on: ")
    (note,) = leaks.check([OTHER], [OTHER], *arguments)
    assert note == f"test texts searched for in {source['path']}: found 0"


# ---- what is kept


def test_corpora_are_searched_once(tmp_path):
    """And again where a file or the texts change."""
    chat = corpus(tmp_path / "chat.txt.gz", f"hello\n{ENGLISH.title()}!", "bye\n")
    cache = tmp_path / "cache"
    tests = [ENGLISH, OTHER]
    assert noted(tests, [chat], cache).endswith("found 1")
    (kept,) = cache.glob("leaks-*.json")
    kept.write_text('{"found": 7, "too_short": 0}', encoding="utf-8")
    assert noted(tests[::-1], [chat], cache).endswith("found 7")
    assert noted(tests[1:], [chat], cache).endswith("found 0")
    shutil.move(tmp_path / "chat.txt.gz", tmp_path / "moved.gz")  # the same content elsewhere
    moved = {**chat, "path": str(tmp_path / "moved.gz")}
    assert noted(tests, [moved], cache).endswith("moved.gz: found 7")
    chat = corpus(tmp_path / "chat.txt.gz", f"{OTHER}\n{ENGLISH}")
    assert noted(tests, [chat], cache).endswith("found 2")


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path, monkeypatch):
    source = corpus(tmp_path / "a.txt", ENGLISH)
    index = tmp_path / "cache" / "sha256.json"
    path = tmp_path / "a.txt"
    assert hash_files([path], index) == {path: source["sha256"]}
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert hash_files([path, tmp_path / "none"], index) == {path: source["sha256"]}
    monkeypatch.undo()
    changed = corpus(path, OTHER)
    assert hash_files([path], index) == {path: changed["sha256"]}
    assert json.loads(index.read_text(encoding="utf-8"))[str(path)][2] == changed["sha256"]


@pytest.mark.parametrize("content", ["", "{", "\0" * 40, "[]", "7", '{"found": null}', '{"%s": 1}'])
def test_damaged_caches_are_made_again(content, tmp_path):
    """Regression: an emptied file in .cache/ was a JSONDecodeError at every start."""
    source = corpus(tmp_path / "a.txt", ENGLISH)
    cache = tmp_path / "cache"
    note = noted([ENGLISH], [source], cache)
    kept = sorted(cache.iterdir())
    before = [json.loads(file.read_bytes()) for file in kept]
    assert len(kept) == 2 and note.endswith("found 1")
    for file in kept:
        file.write_text(content.replace("%s", source["path"]), encoding="utf-8")
    assert noted([ENGLISH], [source], cache) == note
    for file, content_before in zip(kept, before, strict=True):
        content_now = json.loads(file.read_bytes())
        assert content_now | content_before == content_now


# ---- texts to pretrain on


def test_hindi_of_a_held_out_text_is_left_out(tmp_path):
    """Regression: without vowel signs, a text that shares only consonants was left out, too."""
    consonants = "".join(c for c in HINDI if c.isalnum())
    texts = [f"सुनो: {HINDI}", f"{consonants} नया", "कुछ और"]
    train = [Example(text, "", "a") for text in texts]
    held = [Example(HINDI, "", "a")]
    reviews = Reviews({"train": train, "validation": [], "test": held}, ["a"])
    assert training_texts([reviews], tmp_path / "x.txt") == (2, 1)
    assert HINDI not in (tmp_path / "x.txt").read_text(encoding="utf-8")
