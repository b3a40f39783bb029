"""Splits: documented counts, no text on two sides, clear refusals; texts to pretrain on."""

import hashlib
import os
import random
import re
import shutil
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from labelled import read, refused

from helpers import DATA, write_csv
from scripts import data as data_script
from smallgpt.console import UserError
from smallgpt.files import unit_hash
from smallgpt.sentiment import leaks
from smallgpt.sentiment.leaks import training_texts
from smallgpt.sentiment.sets import Example, ReviewSettings
from smallgpt.sentiment.splits import SPLITS, Reviews, find_substrings, load, spaced

WORDS = (
    "the room was clean and quiet but breakfast cost too much we would not stay again 很好 不错"
).split()


def made(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """n different texts with two labels."""
    draw = random.Random(seed)
    return [
        (" ".join(draw.choices(WORDS, k=8)) + f" {seed} {i}", draw.choice(["bad", "good"]))
        for i in range(n)
    ]


def loaded(path: Path, **settings) -> Reviews:
    s = ReviewSettings(path=str(path), **settings)
    assert s.check() == []
    return load(s)


def texts(r: Reviews, split: str) -> list[str]:
    return [e.text for e in r.splits[split]]


# ---- any table


def test_a_table_is_cut_in_three(tmp_path):
    rows = made(3000)
    r = loaded(write_csv(tmp_path / "x.csv", rows))
    sizes = {split: len(r.splits[split]) for split in SPLITS}
    assert sum(sizes.values()) == 3000 and r.labels == ["bad", "good"] and r.notes == []
    assert abs(sizes["test"] - 600) < 60 and abs(sizes["validation"] - 240) < 45
    assert {(e.text, e.label) for split in SPLITS for e in r.splits[split]} == set(rows)


def test_the_split_depends_on_the_text_alone(tmp_path):
    """Not on the order of the file, on labels, on what else is in it, on capitals or on spaces."""
    rows = made(300)
    before = set(texts(loaded(write_csv(tmp_path / "x.csv", rows)), "test"))
    changed = [
        (text.upper().replace(" ", "  "), "good" if label == "bad" else "bad")
        for text, label in rows
    ]
    after = loaded(write_csv(tmp_path / "y.csv", [*made(50, seed=1), *reversed(changed)]))
    known = {text.upper().replace(" ", "  "): text for text, _ in rows}
    assert {known[t] for t in texts(after, "test") if t in known} == before
    assert set(texts(loaded(tmp_path / "x.csv", split_seed=7), "test")) != before


def test_the_split_is_the_same_on_every_platform():
    """The number of a text, pinned: another one would move texts between splits trained on."""
    e = Example("很好 Good!", "", "1")
    assert e.split_key == "很好good"
    assert unit_hash(e.split_key, 0) == 2702845286699924480 / 2**64
    assert unit_hash(e.split_key, 1) == 10906338334959185920 / 2**64


def test_a_text_is_split_by_its_letters_and_digits(tmp_path):
    """Against the first version's formula, written out: published results depend on its splits."""
    rows = made(500)
    r = loaded(write_csv(tmp_path / "x.csv", rows), split_seed=5)

    def number(text: str, seed: int) -> float:
        plain = "".join(c for c in text if c.isalnum()).lower()
        found = hashlib.blake2b(plain.encode(), digest_size=8, key=str(seed).encode())
        return int.from_bytes(found.digest(), "big") / 2**64

    test = {text for text, _ in rows if number(text, 5) < 0.2}
    validation = {text for text, _ in rows if number(text, 6) < 0.1} - test
    assert set(texts(r, "test")) == test and set(texts(r, "validation")) == validation


def test_a_split_key_is_letters_and_digits():
    """Against the plain definition, on all kinds of characters; without any, it is the text."""
    draw = random.Random(0)
    for _ in range(300):
        codes = [
            draw.choice([draw.randrange(32, 0x3000), draw.randrange(0x4E00, 0x9FFF)])
            for _ in range(30)
        ]
        both = "".join(map(chr, codes)) + "\t"
        plain = "".join(c for c in both if c.isalnum() or c == "\t").strip().lower()
        assert Example(both[:-1], "", "").split_key == plain
    odd = [("😀", ""), ("😎", ""), ("!", ""), ("a", "b"), ("ab", "")]
    assert len({Example(*e, "").split_key for e in odd}) == 5


def test_a_larger_train_size_holds_a_smaller_ones_examples(tmp_path):
    path = write_csv(tmp_path / "x.csv", made(400))
    whole, some, more = loaded(path), loaded(path, train_size=40), loaded(path, train_size=80)
    assert len(some.splits["train"]) == 40 and len(more.splits["train"]) == 80
    assert set(some.splits["train"]) < set(more.splits["train"]) < set(whole.splits["train"])
    assert (
        some.splits["test"] == whole.splits["test"]
        and some.splits["validation"] == whole.splits["validation"]
    )
    large = loaded(path, train_size=10_000)
    assert set(large.splits["train"]) == set(whole.splits["train"])
    assert large.notes == [
        f"train: there are {len(whole.splits['train'])}, fewer than data.train_size=10000"
    ]
    assert "train_size=1 leaves no example of the label" in refused(path, train_size=1)


def test_a_small_table_has_three_splits_too(tmp_path):
    for seed in range(20):
        r = loaded(
            write_csv(tmp_path / "x.csv", [(f"text {seed} {i}", "ab"[i % 2]) for i in range(30)])
        )
        assert all(r.splits[split] for split in SPLITS)


def test_a_test_file_of_ones_own(tmp_path):
    train, test = made(200), made(30, seed=1)
    write_csv(tmp_path / "test.csv", [*test, (train[0][0].upper() + "!!", train[0][1])])
    r = loaded(write_csv(tmp_path / "x.csv", train), test_path=str(tmp_path / "test.csv"))
    assert texts(r, "test")[:-1] == [text for text, _ in test]
    assert any("1 that are also in" in note for note in r.notes)
    assert train[0][0] not in texts(r, "train") + texts(r, "validation")


def test_what_only_looks_like_a_copy_stays(tmp_path):
    """Regression: rows of vowel signs, emoji or 5/5 were dropped as "also in test" of 55."""
    pairs = [("कमरा अच्छा", "कमरे अच्छे"), ("good 😀", "good 😡"), ("5/5", "55"), ("1 0", "10")]
    train = made(100) + [(text, "good") for text, _ in pairs]
    test = write_csv(tmp_path / "test.csv", [(text, "bad") for _, text in pairs])
    r = loaded(write_csv(tmp_path / "x.csv", train), test_path=str(test))
    assert r.notes == []
    assert {text for text, _ in pairs} < {*texts(r, "train"), *texts(r, "validation")}
    assert len(texts(r, "train") + texts(r, "validation")) == 104


def test_copies_and_torn_labels_are_dropped_and_said(tmp_path):
    empty = [("", "good"), ("   ", "bad"), ("\t", "")]  # the last is a blank line
    rows = made(100) + [("same", "good")] * 3 + [("torn", "good"), ("torn", "bad")] + empty
    r = loaded(write_csv(tmp_path / "x.csv", rows))
    assert r.notes == [
        "train: dropped 2 with an empty text",
        "train: dropped 2 whose text has more than one label",
        "train: dropped 2 copies",
    ]
    everything = [text for split in SPLITS for text in texts(r, split)]
    assert len(everything) == 101 and everything.count("same") == 1 and "torn" not in everything


def test_emoji_numbers_and_long_texts_are_texts(tmp_path):
    odd = [
        (text, "good") for text in ("😀👍", "😡", "5591577e64", "007", "长" * 200_000, "NA", "None")
    ]
    r = loaded(write_csv(tmp_path / "x.csv", made(100) + odd))
    assert {text for text, _ in odd} < {
        text for split in SPLITS for text in texts(r, split)
    } and r.notes == []


def test_labels_are_learnt_in_their_order(tmp_path):
    rows = [
        (f"text {i}", label)
        for i, label in enumerate(["10", "9", "-1", "2.5", "9.0", "10.00"] * 40)
    ]
    assert loaded(write_csv(tmp_path / "x.csv", rows)).labels == ["-1", "2.5", "9", "10"]
    rows = [
        (f"text {i}", label)
        for i, label in enumerate(["none", "null", "积极", "NA", "Good", "good"] * 40)
    ]
    assert loaded(write_csv(tmp_path / "x.csv", rows)).labels == [
        "Good",
        "NA",
        "good",
        "none",
        "null",
        "积极",
    ]


def test_many_labels_take_no_time(tmp_path):
    """Regression: hours, where a wrong column was named; each label was compared with all."""
    rows = [(f"text {i}", str(i)) for i in range(5000)]
    message = refused(write_csv(tmp_path / "x.csv", rows))
    assert "which no training example has" in message and "data.label_column" in message
    assert len(message) < 300


def test_numbers_as_labels_in_two_spellings(tmp_path):
    write_csv(tmp_path / "test.csv", [(f"b {i}", f"{i % 2}.0") for i in range(50)])
    train = [(f"a {i}", f"{i % 2}") for i in range(50)]
    r = loaded(write_csv(tmp_path / "x.csv", train), test_path=str(tmp_path / "test.csv"))
    assert r.labels == ["0", "1"] and Counter(e.label for e in r.splits["test"]) == {
        "0": 25,
        "1": 25,
    }


def test_pairs(tmp_path):
    rows = [(a, b[0], b[1]) for (a, _), b in zip(made(100), made(100, seed=1), strict=True)]
    rows += [("same", "one", "good"), ("same", "other", "bad")]
    path = write_csv(tmp_path / "x.csv", rows, ("first", "second", "label"))
    r = loaded(path, text_column="first", pair_column="second", label_column="label")
    assert {tuple(e) for split in SPLITS for e in r.splits[split]} == set(rows) and r.notes == []


def test_other_columns_separators_and_json(tmp_path):
    rows = made(60)
    expected = loaded(write_csv(tmp_path / "x.csv", rows))
    semicolon = tmp_path / "y.csv"
    semicolon.write_bytes(
        "".join(f"{b};{a}\r\n" for a, b in [("正文", "标签"), *rows]).encode("gb18030")
    )
    lines = tmp_path / "z.jsonl"
    lines.write_text(
        "".join(f'{{"标签": "{b}", "正文": "{a}"}}\n' for a, b in rows), encoding="utf-8"
    )
    for path in (semicolon, lines):
        assert loaded(path, text_column="正文", label_column="标签").splits == expected.splits


# ---- mistakes


@pytest.mark.parametrize("label", ["", " ", "nan", "NaN"])
def test_a_label_that_is_missing(tmp_path, label):
    assert "2 example(s) of the train split have no label, the first is row 2" in refused(
        write_csv(tmp_path / "x.csv", [("a", "good"), ("b", label), ("c", label), ("d", "bad")])
    )


def test_one_class_and_unknown_classes(tmp_path):
    one = write_csv(tmp_path / "one.csv", [(text, "good") for text, _ in made(50)])
    assert "training examples have the label 'good'" in refused(one)
    path = write_csv(tmp_path / "x.csv", made(50))
    write_csv(tmp_path / "test.csv", [*made(9, seed=1), ("hm", "meh")])
    message = refused(path, test_path=str(tmp_path / "test.csv"))
    assert "the test split has the label 'meh'" in message and "bad, good" in message
    assert "label '2': it must be one of 0, 1" in refused(
        write_csv(tmp_path / "y.csv", [("a", "0"), ("b", "2")], ("review", "label")),
        set="chnsenticorp",
    )


@pytest.mark.parametrize("rare", [1, 2, 3, 5])
def test_a_rare_label_gets_a_split_seed_that_helps(tmp_path, rare):
    """Regression: "correct it", though the file was right: the cut had taken all of a label."""
    common = [(f"text number {i}", "ab"[i % 2]) for i in range(60)]
    rows = common + [(f"rare text {i}", f"rare {i}") for i in range(rare)]
    path = write_csv(tmp_path / "x.csv", rows)
    refusals = 0
    for seed in range(12):
        try:
            assert len(loaded(path, split_seed=seed).labels) == 2 + rare
        except UserError as error:
            refusals += 1
            assert "the set has 1 of it" in str(error)
            proposed = re.search(r"data.split_seed=(\d+)", str(error))[1]
            assert len(loaded(path, split_seed=int(proposed)).labels) == 2 + rare
    assert refusals > 0


def test_rare_labels_beside_a_test_file(tmp_path):
    """Only validation is cut off then; no seed helps a label that only the test file has."""
    common = [(f"text number {i}", "ab"[i % 2]) for i in range(60)]
    test = write_csv(tmp_path / "test.csv", [("one", "a"), ("two", "b")])
    for i in range(100):
        path = write_csv(tmp_path / "x.csv", [*common, (f"rare {i}", "c")])
        try:
            loaded(path, test_path=str(test))
        except UserError as error:
            proposed = re.search(r"data.split_seed=(\d+)", str(error))[1]
            assert loaded(path, test_path=str(test), split_seed=int(proposed)).labels == [*"abc"]
            break
    else:
        pytest.fail("no text was cut off")
    write_csv(test, [("one", "a"), ("two", "never")])
    message = refused(path, test_path=str(test), split_seed=int(proposed))
    assert "split_seed" not in message and "correct it, or add examples of it" in message


def test_too_few_examples(tmp_path):
    assert "split of csv is empty" in refused(
        write_csv(tmp_path / "x.csv", [("a", "0"), ("b", "1")])
    )
    rows = made(20)
    path, test = write_csv(tmp_path / "x.csv", rows), write_csv(tmp_path / "t.csv", rows)
    assert (
        "is empty" in (message := refused(path, test_path=str(test))) and "also in test" in message
    )


# ---- the real sets


@cache
def real(name: str, folder: str, test_path: str = "") -> Reviews:
    if not (DATA / folder).exists():
        pytest.skip(f"no {DATA / folder}: set SMALLGPT_DATA")
    return loaded(DATA / folder, set=name, test_path=test_path)


def counts(r: Reviews) -> dict[str, int]:
    return {split: len(r.splits[split]) for split in SPLITS}


REAL = {
    "chnsenticorp": (
        ("chnsenticorp", "chnsenticorp"),
        {"train": 5673, "validation": 566, "test": 1526},
        "6996acf58ac411518e000218",
        ["train: dropped 1 with an empty text"],
    ),
    "online_shopping": (
        ("online_shopping", "online_shopping_10_cats"),
        {"train": 45260, "validation": 4862, "test": 12584},
        "12c7ce85a5baf9f04b21f22a",
        [
            "train: dropped 1 with an empty text",
            "train: dropped 36 whose text has more than one label",
            "train: dropped 31 copies",
        ],
    ),
    "online_shopping_9": (
        ("online_shopping_9", "online_shopping_10_cats"),
        {"train": 37992, "validation": 4091, "test": 10625},
        "187c2dadfd2733ca586a27b4",
        [
            "train: dropped 1 with an empty text",
            "train: dropped 36 whose text has more than one label",
            "train: dropped 29 copies",
        ],
    ),
    "sst2": (
        ("sst2", "glue/SST-2"),
        {"train": 61454, "validation": 659, "test": 872},
        "d24cce40b8746816f7202c67",
        [
            "validation: 659 whole sentences, held out with 4868 training phrases, parts of them",
            "train: dropped 5 that are also in validation or test",
            "train: dropped 8 whose text has more than one label",
            "train: dropped 355 copies",
        ],
    ),
    "sst2_sentences": (
        ("sst2_sentences", "glue/SST-2"),
        {"train": 6038, "validation": 659, "test": 872},
        "48aaa89dcc2e579a91a00cf0",
        ["train: dropped 60652 phrases, parts of others or under five words"],
    ),
    "mrpc": (
        ("mrpc", "glue/MRPC", str(DATA / "msr_paraphrase")),
        {"train": 3662, "validation": 407, "test": 1725},
        "0ae586a3ad9ed61e036f0fbe",
        [
            "validation: dropped 1 that are also in test",
            "train: dropped 6 that are also in validation or test",
        ],
    ),
    "mrpc, original": (
        ("mrpc", "msr_paraphrase"),
        {"train": 3643, "validation": 426, "test": 1725},
        "9fc95b53bd5517c8fdc9bd4d",
        [
            "validation: dropped 1 that are also in test",
            "train: dropped 6 that are also in validation or test",
        ],
    ),
    "tweets": (
        ("tweets", "tweet_sentiment_extraction"),
        {"train": 24611, "validation": 2727, "test": 3534},
        "b005397057254081dae98499",
        [
            "train: dropped 1 with an empty text",
            "validation: dropped 39 that are also in test",
            "train: dropped 76 that are also in validation or test",
            "train: dropped 8 whose text has more than one label",
            "train: dropped 19 copies",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_sets(name):
    """The splits are pinned: trunks are pretrained on the training texts, and results compared."""
    args, expected, fingerprint, notes = REAL[name]
    r = real(*args)
    assert counts(r) == expected and r.notes == notes and r.fingerprint == fingerprint
    keys = {split: {e.key for e in r.splits[split]} for split in SPLITS}
    assert not (
        keys["test"] & keys["validation"] or keys["train"] & (keys["test"] | keys["validation"])
    )
    for split in SPLITS:  # the files are sorted by label: a split by position would have one class
        shares = Counter(e.label for e in r.splits[split])
        assert min(shares.values()) > 0.2 * expected[split] and list(r.labels) == sorted(shares)


READ = {  # as the files' own documentation counts them
    "chnsenticorp": {"train": {"positive": 5322, "negative": 2444}},
    "online_shopping": {"train": {"positive": 31728, "negative": 31046}},
    "online_shopping_9": {"train": {"positive": 26728, "negative": 26046}},
    "sst2": {
        "train": {"positive": 37569, "negative": 29780},
        "test": {"positive": 444, "negative": 428},
    },
    "mrpc": {
        "train": {"paraphrase": 2474, "different": 1194},
        "validation": {"paraphrase": 279, "different": 129},
        "test": {"paraphrase": 1147, "different": 578},
    },
    "mrpc, original": {
        "train": {"paraphrase": 2753, "different": 1323},
        "test": {"paraphrase": 1147, "different": 578},
    },
    "tweets": {
        "train": {"neutral": 11118, "positive": 8582, "negative": 7781},
        "test": {"neutral": 1430, "positive": 1103, "negative": 1001},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_real_files_lose_no_row(name):
    (reader, folder, *test_path), *_ = REAL[name]
    if not (DATA / folder).exists():
        pytest.skip(f"no {DATA / folder}: set SMALLGPT_DATA")
    found = read(set=reader, path=str(DATA / folder), test_path="".join(test_path))
    for split, examples in found.items():
        assert dict(Counter(e.label for e in examples)) == READ[name][split]
    assert found.keys() == READ[name].keys()


def test_glues_mrpc_test_has_the_labels_of_the_original(tmp_path):
    glue, original = (
        real(*REAL["mrpc"][0]).splits["test"],
        real(*REAL["mrpc, original"][0]).splits["test"],
    )
    assert [e.label for e in glue] == [e.label for e in original]
    assert (
        "PCCW 's chief operating officer" in glue[0].text
        and "PCCW's chief operating officer" in original[0].text
    )
    folder = tmp_path / "MRPC"
    shutil.copytree(DATA / "glue" / "MRPC", folder)
    assert "name it in data.test_path" in refused(folder, set="mrpc")
    lines = (folder / "test.tsv").read_text(encoding="utf-8").split("\n")
    os.chmod(folder / "test.tsv", 0o644)
    (folder / "test.tsv").write_text(
        "\n".join([lines[0], lines[2], lines[1], *lines[3:]]), encoding="utf-8"
    )
    assert "same pairs in the same order" in refused(
        folder, set="mrpc", test_path=str(DATA / "msr_paraphrase")
    )


def test_mrpcs_dev_ids_make_glues_splits(tmp_path):
    if not (DATA / "msr_paraphrase").exists():
        pytest.skip(f"no {DATA / 'msr_paraphrase'}: set SMALLGPT_DATA")
    for file in (*(DATA / "msr_paraphrase").iterdir(), DATA / "glue" / "MRPC" / "dev_ids.tsv"):
        shutil.copy(file, tmp_path)
    splits = read(set="mrpc", path=str(tmp_path))
    assert counts(Reviews(splits, [])) == {"train": 3668, "validation": 408, "test": 1725}


def test_parts_of_texts_are_found_like_a_naive_search_finds_them():
    draw = random.Random(0)
    found_some = 0
    for _ in range(200):
        lines = [" ".join(draw.choices("abc", k=draw.randrange(1, 7))) for _ in range(12)]
        texts = {spaced(line) for line in lines}
        candidates = set(draw.sample(sorted(texts), len(texts) // 2))
        expected = {c for c in candidates if any(c in text and c != text for text in texts)}
        assert find_substrings(candidates, texts) == expected
        found_some += bool(expected)
    assert found_some > 50
    assert find_substrings({spaced("a b")}, {spaced("xa b"), spaced("a b")}) == set()


@pytest.mark.slow
def test_phrases_of_held_out_sentences_are_not_trained_on():
    """SST-2's training split holds phrases of its sentences: 4,868 of the 659 held-out ones."""
    r = real(*REAL["sst2"][0])
    held = [f" {' '.join(text.split())} " for text in texts(r, "validation")]
    train = {f" {' '.join(text.split())} " for text in texts(r, "train")}
    for text in held:
        words = text.split()
        assert len(words) >= 5
        for i in range(len(words)):
            for j in range(i + 3, len(words) + 1):
                assert f" {' '.join(words[i:j])} " not in train
    some = random.Random(0).sample(held, 25)
    assert not any(text in other and text != other for text in some for other in train)


def test_whole_sentences_of_sst2_have_its_validation_split(tmp_path):
    """Else a run on the sentences that comes before one on the phrases could have trained on the
    sentences that the second is judged by."""
    draw = random.Random(0)
    rows = ["sentence\tlabel"]
    sentences = [" ".join([*draw.choices(WORDS[:12], k=9), f"w{i}"]) for i in range(200)]
    for i, sentence in enumerate(sentences):
        words = sentence.split()
        phrases = [words[:3], words[2:8], words[4:]]
        rows += [f"{text}\t{i % 2}" for text in (sentence, *map(" ".join, phrases))]
    (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\n", encoding="utf-8")
    phrases = loaded(tmp_path, set="sst2")
    whole = loaded(tmp_path, set="sst2_sentences")
    held_out = texts(whole, "validation")
    assert held_out == texts(phrases, "validation") and len(held_out) > 10
    assert sorted(held_out + texts(whole, "train")) == sorted(sentences)
    assert len(phrases.splits["train"]) > 2 * len(whole.splits["train"])


# ---- texts to pretrain on


def letters(text: str) -> str:
    return "".join(c for c in text if c.isalnum()).lower()


@pytest.mark.slow
def test_the_export_holds_no_held_out_text(tmp_path):
    loaded_sets = [real(*REAL[name][0]) for name in ("chnsenticorp", "mrpc")]
    written, left = training_texts(loaded_sets, tmp_path / "new" / "x.txt")
    dialogues = (
        (tmp_path / "new" / "x.txt").read_text(encoding="utf-8").removesuffix("\n\n").split("\n\n")
    )
    assert len(dialogues) == written and left > 0
    assert written + left == sum(len(r.splits["train"]) for r in loaded_sets)
    everything = "\n".join(map(letters, dialogues))
    whole = set(everything.split("\n"))
    held = {
        letters(t)
        for r in loaded_sets
        for s in ("validation", "test")
        for e in r.splits[s]
        for t in e[:2]
    } - {""}
    assert not held & whole
    long = sorted(text for text in held if len(text) >= leaks.WINDOW)
    assert not [text for text in random.Random(0).sample(long, 1500) if text in everything]


def test_the_export_of_one_set_leaves_out_the_tests_of_the_others(tmp_path):
    shared = "a long sentence that stands in the test split of one set only"
    test = [Example(shared, "", "a"), Example("Short!", "", "a")]
    held = Reviews({"train": [], "validation": [], "test": test}, ["a"])
    pairs = [("x", f"so: {shared.upper()}?"), ("short", ""), ("short one", ""), ("😀\n", "二")]
    others = [Example(text, pair, "a") for text, pair in pairs]
    both = [held, Reviews({"train": others, "validation": [], "test": []}, ["a"])]
    assert training_texts(both, tmp_path / "x.txt") == (2, 2)
    assert (tmp_path / "x.txt").read_text(encoding="utf-8") == "short one\n\n😀\n二\n\n"


def test_the_export_leaves_out_phrases_of_its_sentences(tmp_path):
    """SST-2's 61,000 phrases are cut from 6,000 sentences: ten copies of each word to learn."""
    pairs = [
        ("a fine , quiet film", ""),
        ("fine ,  quiet", ""),
        ("quiet", ""),
        ("ne , qui", ""),
        ("film a", ""),
        ("A fine , quiet film", ""),
        ("quiet film", "a pair stays"),
        ("很好看的电影", ""),
        ("很好看", ""),
    ]
    examples = [Example(text, pair, "a") for text, pair in pairs]
    assert training_texts(
        [Reviews({"train": examples, "validation": [], "test": []}, ["a"])], tmp_path / "x"
    ) == (7, 2)
    written = (tmp_path / "x").read_text(encoding="utf-8").split("\n\n")
    assert "fine , quiet" not in written and "quiet" not in written


def test_the_command(tmp_path, monkeypatch, capsys):
    path = write_csv(tmp_path / "x.csv", [*made(100), ("", "good")], ("body", "stars"))
    options = ["text_column=body", "label_column=stars"]

    def run(*argv) -> str:
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
        data_script.main()
        return capsys.readouterr().out

    lines = run("stats", "set=csv", f"path={path}", *options).split("\n")
    assert [line.split()[:2] for line in lines[:3]] == [["csv", split] for split in SPLITS]
    assert sum(int(line.split()[2]) for line in lines[:3]) == 100 and "bad " in lines[0]
    assert lines[3:] == ["  train: dropped 1 with an empty text", ""]
    both = []  # two entries of one set: the tests of both are left out
    for seed in range(2):
        settings = [*options, f"split_seed={seed}"]
        both += [f"csv={path}", *(f"csv.{setting}" for setting in settings)]
    out = run("text", *both, f"to={tmp_path / 'x.txt'}")
    written = (tmp_path / "x.txt").read_text(encoding="utf-8").split("\n\n")[:-1]
    assert f"wrote {len(written)} texts to {tmp_path / 'x.txt'}; left out" in out
    for seed in range(2):
        r = loaded(path, text_column="body", label_column="stars", split_seed=seed)
        assert 0 < len(written) and not {*texts(r, "test"), *texts(r, "validation")} & {*written}
    for wrong, message in (
        (["set=csv", f"path={path}", "text_colum=x"], "did you mean text_column"),
        (["set=imdb", "path=x"], "no set 'imdb'"),
    ):
        with pytest.raises(UserError, match=message):
            run("stats", *wrong)
