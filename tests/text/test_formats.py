"""Chat files -> dialogues: every format, known by its content; what is dropped is counted."""

import gzip
import io
import json
import os
import pickle
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from smallgpt import parquet
from smallgpt.console import UserError
from smallgpt.text import formats
from smallgpt.text.formats import (
    JSON,
    JSON_LINES,
    PARQUET,
    TEXT,
    Counts,
    Dialogue,
    misnamed,
    read_dialogues,
    sniff,
)

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def json_lines(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def saved(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, errors: str = "strict", counts: Counts | None = None) -> Iterator[list[str]]:
    """What is said in each dialogue of a file, without system prompts."""
    for dialogue in read_dialogues(path, errors, counts):
        yield dialogue.spoken


def counted(path: Path, errors: str = "strict") -> tuple[list[list[str]], Counts]:
    counts = Counts()
    return list(read(path, errors, counts)), counts


# -- plain text ------------------------------------------------------------------------------------


def test_text_of_every_platform_reads_the_same(tmp_path):
    plain = "你好\n吃了吗\n\nbye \u2028 now\n"
    messy = "\ufeff\r\n\r\n  你好\r\n吃了吗\r\n \t\u3000\r\n\r\nbye \u2028 now"
    for name, text in (("a.txt", plain), ("b.txt", messy)):
        (tmp_path / name).write_bytes(text.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert list(read(path)) == [["你好", "吃了吗"], ["bye \u2028 now"]], path


def test_cutting_into_blocks_never_cuts_a_dialogue(tmp_path, monkeypatch, write_chat):
    path = write_chat(tmp_path / "a.txt")
    whole = list(read(path))
    lines = saved(tmp_path / "a.jsonl", json_lines(*whole))
    array = saved(tmp_path / "a.json", json.dumps(whole, indent=1))
    for size in (1, 100, 1000):
        monkeypatch.setattr(formats, "BLOCK", size)
        assert list(read(path)) == list(read(lines)) == list(read(array)) == whole
    assert len(list(formats.blocks(path, sniff(path)))) > 10
    assert len(list(formats.blocks(array, sniff(array)))) > 10


LONG = {
    "novel.txt": "a line of a book without a blank line\n" * 450_000,
    "lines.jsonl": json.dumps(["a line of a dialogue"] * 9) + "\n",
    "array.json": json.dumps(["a line of a dialogue"] * 9) + ",\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_reading_memory_is_flat(tmp_path, name):
    """A novel, one paragraph a line, is a single dialogue; it must not be in memory at once."""
    text = LONG[name] if name == "novel.txt" else LONG[name] * 80_000
    path = saved(tmp_path / name, f"[{text[:-2]}]" if name == "array.json" else text)  # 17 MB
    del text
    tracemalloc.start()
    blocks = formats.blocks(path, sniff(path))
    assert sum(len(block.data) for block in blocks) > 0.95 * path.stat().st_size > 15e6
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9e6, peak


def test_a_dialogue_that_is_cut_is_counted(tmp_path, monkeypatch):
    """Regression: a long text without a blank line used to be cut without a word."""
    monkeypatch.setattr(formats, "BLOCK", 100)
    monkeypatch.setattr(formats, "MAX_LINES", 10)
    long = saved(tmp_path / "long.txt", "a line of a novel\n" * 100 + "\nshort\n")
    found, counts = counted(long)
    assert sum(map(len, found)) == 101 and counts.cut == len(found) - 2 > 3
    assert "put a blank line between dialogues" in counts.notes()[0]
    short = saved(tmp_path / "short.txt", "a line\n\n" * 100)
    assert counted(short)[1].notes() == []


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_bytes_that_are_not_utf8(tmp_path, monkeypatch, gz):
    monkeypatch.setattr(formats, "BLOCK", 16)  # so that the bad line is not in the first block
    path = tmp_path / f"a.txt{gz}"
    raw = "好\n\n好\n\n好\n\n好好好\n".encode() + "好".encode("gbk") + b"\n"
    path.write_bytes(gzip.compress(raw) if gz else raw)
    with pytest.raises(UserError, match=rf"a\.txt{gz}, line 8: not UTF-8.*data\.errors=replace"):
        list(read(path))
    assert list(read(path, "replace"))[-1] == ["好好好", "\ufffd\ufffd"]


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "latin-1"])
def test_replacing_is_no_advice_for_another_encoding(tmp_path, encoding):
    """Regression: data.errors=replace was the advice for GBK, of which it leaves nothing."""
    text = "café\n\ndéjà vu\n" if encoding == "latin-1" else "你好\n\n吃了嗎\n"
    path = saved(tmp_path / "a.txt", text.encode(encoding))
    with pytest.raises(UserError, match="a.txt, line 1: not UTF-8; save it in UTF-8") as error:
        list(read(path))
    assert "data.errors" not in str(error.value)


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(os.urandom(9999))
    for raw in (whole[:5000], whole[:50] + b"x" * 50 + whole[100:]):
        path = saved(tmp_path / "a.txt.gz", raw)
        with pytest.raises(UserError, match="cannot read .*a.txt.gz"):
            list(read(path, "replace"))


def test_a_missing_file_is_named_once(tmp_path):
    path = tmp_path / "none.txt"
    with pytest.raises(UserError) as error:
        list(read(path))
    assert str(error.value) == f"cannot read {path}: No such file or directory"


# -- JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        ["hi", "two\nlines", " "],
        {"dialog": ["hi", "two\r\nlines"]},
        {"dialogue": ["hi", "two\nlines"], "id": 3},
        {"messages": None, "conversations": ["hi", "two\nlines"]},
        {"text": "hi\n\ntwo lines\n"},
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "two\nlines"},
            ]
        },
        {
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "two\nlines"},
            ]
        },
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_json_forms(tmp_path, line, name):
    raw = ("\ufeff" + json.dumps(line) + "\r\n\r\n" + json.dumps(["bye"])).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert list(read(tmp_path / name)) == [["hi", "two lines"], ["bye"]]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("gz", [False, True])
def test_an_array_of_dialogues(tmp_path, monkeypatch, indent, gz):
    """Regression: one JSON array, as json.dump writes it, used to be refused."""
    monkeypatch.setattr(formats, "BLOCK", 50)
    values = [GOOD, ["好", '}]\\" \r\n['], {"text": "one\ntwo"}, {"id": 1}, GOOD]
    raw = json.dumps(values, indent=indent, ensure_ascii=False).encode()
    path = saved(tmp_path / "a.json", gzip.compress(raw) if gz else raw)
    found, counts = counted(path)
    assert found == [["hi", "ho"], ["好", '}]\\"  ['], ["one", "two"], ["hi", "ho"]]
    assert counts.first_skipped.startswith("dialogue 4: it has no messages")
    assert counts.skipped == 1 and sniff(path) == (JSON, gz)


def test_an_array_of_texts_and_objects_over_several_lines(tmp_path):
    texts = saved(tmp_path / "a.json", json.dumps(["one\ntwo", "three"], indent=2))
    assert list(read(texts)) == [["one", "two"], ["three"]]
    following = json.dumps(GOOD, indent=2) + "\n" + json.dumps(GOOD, indent=2)
    assert list(read(saved(tmp_path / "b.json", following))) == [["hi", "ho"]] * 2


def test_a_broken_array_names_the_line_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 100)
    lines = ["[", *[json.dumps(GOOD) + ","] * 20, '{"messages": oops},', json.dumps(GOOD), "]"]
    for text, line in (("\n".join(lines), 22), ("\n".join(lines[:9])[:-9], 9)):
        path = saved(tmp_path / "a.json", text)
        with pytest.raises(
            UserError, match=rf"a\.json, line {line}: not JSON.*one dialogue a line"
        ):
            list(read(path))


BAD = [
    "{",
    "3",
    "[" * 100_000,
    "[]",
    '{"txt": "hi"}',
    '{"text": 3}',
    '{"text": " "}',
    '{"messages": "hi"}',
    "[1]",
    '[["hi"]]',
    '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": null}]}',
    '{"messages": [{"role": "system", "content": "be kind"}]}',
    '["", "an answer to nothing"]',
    '["half a pair \\ud83d"]',
    "{'messages': ['quotes of Python']}",
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_dialogue_is_skipped_and_counted(tmp_path, bad):
    """Regression: one bad line used to refuse the whole corpus."""
    path = saved(tmp_path / "a.jsonl", f'["hi"]\n["ho"]\n\n{bad}\n["end"]\n{bad}\n')
    found, counts = counted(path)
    assert found == [["hi"], ["ho"], ["end"]]
    assert counts.notes()[0].startswith("skipped 2 of 5 dialogues, the first at line 4: ")


@pytest.mark.parametrize("bad", [bad for bad in BAD[4:] if bad not in ("[1]", '[["hi"]]')])
def test_a_file_without_one_good_dialogue_is_refused(tmp_path, bad):
    path = saved(tmp_path / "a.jsonl", f"\n{bad}\n{bad}\n")
    with pytest.raises(UserError, match="a.jsonl: none of its 2 dialogues can be read.* line 2: "):
        list(read(path))


def test_half_a_surrogate_pair_can_be_replaced(tmp_path):
    path = saved(tmp_path / "a.jsonl", '["half \\ud83d"]\n')
    assert list(read(path, "replace")) == [["half ?"]]


def turns_of(*pairs: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def test_a_dialogue_ends_before_an_empty_turn(tmp_path):
    """Regression: an empty reply used to vanish: the next question was learned as the reply."""
    empty = turns_of(("user", "A?"), ("assistant", " \n"), ("user", "B?"), ("assistant", "b"))
    path = saved(tmp_path / "a.jsonl", json_lines(empty, ["C?", "", "D?"], GOOD))
    found, counts = counted(path)
    assert found == [["A?"], ["C?"], ["hi", "ho"]]
    assert counts.notes() == ["dialogues ended before an empty turn: 2, 5 turns dropped"]


@pytest.mark.parametrize("role", ["system", "System", "SYSTEM", "developer", "Developer "])
def test_system_and_developer_turns_are_prompts(tmp_path, role):
    """Regression: only `system` in lower case was known: prompts were learned as utterances."""
    chat = turns_of((role, "be kind"), ("user", "hi"), ("assistant", "ho"))
    shared = {"conversations": [{"from": role, "value": ""}, {"from": "human", "value": "hi"}]}
    counts = Counts()
    path = saved(tmp_path / "a.jsonl", json_lines(chat, shared))
    assert list(read_dialogues(path, counts=counts)) == [
        Dialogue(["be kind", "hi", "ho"], ["system", "user", "assistant"]),
        Dialogue(["hi"], ["user"]),
    ]
    assert counts.prompts == 1 and counts.notes() == []


def test_roles_are_kept_whatever_a_data_set_calls_them(tmp_path):
    """Else the assistant's turns of ShareGPT's `gpt` would not be found."""
    asked = [("user", "human"), ("human", "Prompter"), ("", "")]
    answered = [("assistant", "gpt"), ("bot", " Model"), ("narrator", "narrator")]
    for pairs, expected in ((asked, "user"), (answered, "assistant")):
        *known, other = pairs
        lines = json_lines(*[turns_of((a, "1"), (b, "2")) for a, b in [*known, other]])
        *found, unknown = read_dialogues(saved(tmp_path / "a.jsonl", lines))
        assert [dialogue.roles for dialogue in found] == [[expected, expected]] * 2
        assert unknown.roles == list(other)
    (text,) = read_dialogues(saved(tmp_path / "a.txt", "hi\nho\n"))
    assert text == Dialogue(["hi", "ho"], ["", ""])


WITHOUT_ASSISTANT = {
    "its turns have no roles, which data.loss_on=assistant needs": ["hi", "ho"],
    "the role 'narrator' is none of system, user and assistant": turns_of(
        ("user", "hi"), ("narrator", "ho"), ("assistant", "he")
    ),
    "the assistant says nothing in it": turns_of(("system", "be kind"), ("user", "hi")),
}


@pytest.mark.parametrize("why", WITHOUT_ASSISTANT)
def test_dialogues_without_known_turns_of_the_assistant_are_skipped_if_these_are_learned(
    tmp_path, why
):
    """Else a misspelt role would silently teach nothing."""
    lines = json_lines(GOOD, WITHOUT_ASSISTANT[why])
    path = saved(tmp_path / "a.jsonl", lines)
    assert len(list(read_dialogues(path))) == 2
    counts = Counts()
    assert len(list(read_dialogues(path, counts=counts, loss_on="assistant"))) == 1
    assert counts.notes() == [f"skipped 1 of 2 dialogues, the first at line 2: {why}"]
    path.write_bytes(lines.partition(b"\n")[2])
    with pytest.raises(UserError, match=f"none of its 1 dialogues can be read.*{why}; write a"):
        list(read_dialogues(path, loss_on="assistant"))


@pytest.mark.parametrize("role", ["tool", "TOOL", "function", "observation"])
def test_tool_turns_are_left_out_and_the_speaker_goes_on(tmp_path, role):
    """Else what the assistant says after a tool would be learned as what the user says."""
    chat = turns_of(
        ("user", "weather?"), ("assistant", "I look."), (role, "22 C"), ("assistant", "Warm.")
    )
    found, counts = counted(saved(tmp_path / "a.jsonl", json_lines(chat, chat)))
    assert found == [["weather?", "I look. Warm."]] * 2
    assert counts.tool_turns == 2 and counts.notes()[0].startswith("tool turns left out: 2")


def test_counts_of_blocks_add_up(tmp_path, monkeypatch):
    lines = json_lines(*[["hi", "", "x"], {"id": 1}, turns_of(("system", "s"), ("user", "u"))] * 50)
    path = saved(tmp_path / "a.jsonl", lines)
    _, whole = counted(path)
    monkeypatch.setattr(formats, "BLOCK", 64)
    total = Counts()
    for block in formats.blocks(path, sniff(path)):
        part = Counts()
        list(formats.parse(path, sniff(path), block, "strict", part))
        total.add(part)
    assert total == whole and (whole.dialogues, whole.skipped, whole.turns_after) == (100, 50, 100)
    assert total.first_skipped.startswith("line 2: ")


# -- the format is in the content ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.ndjson", "a", "a.txt.gz", "a.csv"]
)
def test_the_name_decides_nothing(tmp_path, name):
    """Regression: JSON Lines under another name was trained on as plain text, braces and all."""
    contents = {
        TEXT: b"hi\nho\n\n[laughs] hi\nho\n",
        JSON_LINES: json_lines(GOOD, GOOD),
        JSON: json.dumps([GOOD, GOOD]).encode(),
    }
    for kind, content in contents.items():
        for gzipped in (False, True):
            path = saved(tmp_path / name, gzip.compress(content) if gzipped else content)
            assert sniff(path) == (kind, gzipped)
            assert len(list(read(path))) == 2
            promised = {"a.jsonl": JSON_LINES, "a.json": JSON}.get(name, TEXT)
            assert misnamed(path, sniff(path)) == ((kind, gzipped) != (promised, ".gz" in name))


@pytest.mark.parametrize(
    "text",
    [
        "[laughs] well\n[1]\nhello\nthere\n",
        '{name} says hi\n\n"quoted"\n[...]\n',
        "[[Link]] is where it is\nyes\nno\n",
        '["hi"]\nis how JSON is written\nI see\nthanks\n',
        'hi\n\n["hi"]\n',
        "",
        "\n",
    ],
)
def test_brackets_do_not_make_json_of_a_text(tmp_path, text):
    path = saved(tmp_path / "a.txt", text)
    assert sniff(path).kind == TEXT
    assert sum(map(len, read(path))) == len([line for line in text.split("\n") if line])


@pytest.mark.parametrize("text", ["{'role': 'user'}\n" * 9, '{"version": 1,\n "data": [1,\n 2]}'])
def test_json_that_holds_no_dialogue_is_not_trained_on_as_text(tmp_path, text):
    with pytest.raises(UserError, match="a.txt: none of its .* dialogues can be read"):
        list(read(saved(tmp_path / "a.txt", text)))


def test_json_that_is_nested_too_deeply(tmp_path):
    path = saved(tmp_path / "a.json", "[" * 100_000)
    with pytest.raises(UserError, match="a.json"):
        list(read(path))


def test_a_first_line_longer_than_what_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "HEAD", 100)
    lines = json_lines({"text": "word " * 100}, GOOD)
    assert len(list(read(saved(tmp_path / "a.jsonl", lines)))) == 2


def archives() -> dict[str, bytes]:
    """Name -> an archive of a chat."""
    chat = json_lines(GOOD)
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("a.jsonl", chat)
    with tarfile.open(fileobj=tarred, mode="w:gz") as file:
        file.addfile(tarfile.TarInfo("a.jsonl"))
    twice = gzip.compress(gzip.compress(chat))
    return {"a.zip": zipped.getvalue(), "a.tar.gz": tarred.getvalue(), "a.gz": twice}


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.gz"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_an_archive_is_named_and_to_be_unpacked(tmp_path, name, errors):
    """Regression: data.errors=replace was the advice, which trains on the bytes of the archive."""
    path = saved(tmp_path / name, archives()[name])
    with pytest.raises(UserError, match=f"{name} is .*: unpack it and name the file in it"):
        list(read(path, errors))


def numpy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(100))
    return file.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (numpy_file(), "is a NumPy array, no text"),
        (pickle.dumps({"a": "text"}), "is a pickle, no text"),
        (b"\x89PNG\r\n\x1a\n" + os.urandom(99), "is a PNG image, no text"),
        (b"%PDF-1.7\nhi", "is a PDF document, no text"),
        (os.urandom(9999), "is no text: .* control characters"),
        (np.arange(999, dtype=np.uint16).tobytes(), "is no text: .* control characters"),
        ("hello, 你好\n".encode("utf-16"), "is text in UTF-16: save it in UTF-8"),
        ("hello, 你好\n".encode("utf-32"), "is text in UTF-32: save it in UTF-8"),
        ("hello, 你好\n".encode("utf-16-le"), "UTF-16 without a mark .* save it in UTF-8"),
    ],
)
@pytest.mark.parametrize("gz", [False, True])
def test_what_is_no_text_is_named(tmp_path, content, message, gz):
    path = saved(tmp_path / "a.txt", gzip.compress(content) if gz else content)
    for errors in ("strict", "replace"):
        with pytest.raises(UserError, match=message) as error:
            list(read(path, errors))
        assert "errors=replace" not in str(error.value)


# -- Parquet ---------------------------------------------------------------------------------------


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.txt"])
def test_parquet_columns(tmp_path, monkeypatch, name):
    monkeypatch.setattr(parquet, "BATCH_ROWS", 3)
    monkeypatch.setattr(formats, "BLOCK", 50)
    turns = [{"role": "System", "content": "s"}, {"role": "user", "content": "好\nhi"}]
    null = [{"role": "user", "content": None}]
    path = write_parquet(tmp_path / name, id=list(range(10)), messages=[turns, null, *[turns] * 8])
    found, counts = counted(path)
    assert found == [["好 hi"]] * 9 and sniff(path) == (PARQUET, False)
    assert counts.notes()[0] == (
        "skipped 1 of 10 dialogues, the first at row 2: a turn is null, no text"
    )
    positions = [block.position for block in formats.blocks(path, sniff(path))]
    assert positions == sorted(positions) and positions[-1] == path.stat().st_size
    path = write_parquet(tmp_path / name, text=["one\ntwo", "three"])
    assert list(read(path)) == [["one", "two"], ["three"]]
    shared = [[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]]
    path = write_parquet(tmp_path / name, conversations=shared)
    assert list(read(path)) == [["hi", "ho"]]


def test_parquet_that_cannot_be_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", prompt=["hi"], reply=["ho"])
    with pytest.raises(UserError, match="from a column messages, .* columns are prompt, reply"):
        list(read(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="a.parquet is a damaged Parquet file .*: download or wri"):
        list(read(path))


def test_parquet_damaged_in_the_middle(tmp_path):
    """Its end, which is read first, is whole: the damage shows when its rows are read."""
    texts = [f"what is said {i}" for i in range(10_000)]
    path = write_parquet(tmp_path / "a.parquet", text=texts)
    content = bytearray(path.read_bytes())
    content[100:20_000] = b"\xff" * 19_900
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.parquet is a damaged Parquet file"):
        list(read(path))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = saved(tmp_path / "a.parquet", b"PAR1\x15...PAR1")
    with pytest.raises(UserError, match="a.parquet is a Parquet file, .*: pip install pyarrow"):
        list(read(path))
