"""smallgpt/text/base.py: the text of checkpoints/base."""

import json
import re
import zipfile

import pytest

from helpers import ROOT
from smallgpt.text import base


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("hey there ! i'm fine . whats up ?", "Hey there! I'm fine. What's up?"),
        ("I do n't know , it 's 17.6 GBP at 19:45", "I don't know, it's 17.6 GBP at 19:45"),
        ("im sure thats it", "I'm sure that's it"),
        ("well . . . i see ( a bit )", "Well... I see (a bit)"),
        ("Dont you? yes", "Don't you? Yes"),
        ("2 , i.e. 3 if i may", "2, i.e. 3 if I may"),
    ],
)
def test_english_has_one_spelling(typed, expected):
    """The chat answers "i do n't know ." to one and "I don't know." to the next."""
    assert base.spelled(typed) == expected


def test_messages_become_sentences():
    """Two messages run into one another: "Yes It is late"."""
    assert base.joined_sentences(["Yes", "It is late", "ok!", "bye"]) == "Yes. It is late, ok! bye"
    assert base.joined_sentences(["hi"]) == "hi" and base.joined_sentences([]) == ""
    assert base.joined_chinese("我 很好 。A B") == "我很好。A B"


@pytest.mark.parametrize("text", ["mail me at a.b@c.de", "call 0122 357 6412", "see www.x.org"])
def test_addresses_are_unwanted(text):
    """The model learns somebody's telephone number by heart."""
    assert base.is_unwanted(text)
    assert not base.is_unwanted("It costs 100-150 yuan, from 10:30 to 12:00 in 2018.")


def test_a_dialogue_is_cut_where_something_is_left_out(tmp_path):
    """An answer is learnt to what was not said before it, or an unwanted utterance is written."""
    writer = base.Writer(tmp_path / "new", base.is_unwanted)
    dialogues = [
        ["a", " b  c ", "", "a test text", "d", "shit", "e", "f"],
        ["alone"],
        ["e", "f"],
    ]
    counts = writer.write("chat", dialogues, 2, lambda text: "test" in text)
    assert (tmp_path / "new" / "chat.txt").read_text(encoding="utf-8") == "a\nb c\n\ne\nf\n\n"
    assert counts == base.Counts(2, 4, 12, held_out=1, unwanted=1, single=2, copies=1)
    assert writer.write("texts", [["alone"], ["alone"]], 1, bool).dialogues == 0
    assert writer.write("texts", [["alone"], ["alone"]], 1, str.isdigit).copies == 1


def packed(path, name: str, content: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)


def test_every_form_is_read(tmp_path):
    """An origin's format is taken for another's, and its text is lost or spelled wrongly."""

    def file(name: str, content: object) -> list:
        (tmp_path / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return [tmp_path / name]

    spaced = ["好 久 不 见", "是 啊"]
    assert list(base.lccc(file("lccc.json", [spaced]))) == [["好久不见", "是啊"]]
    (tmp_path / "toy.txt").write_text("\t".join(spaced) + "\n", encoding="utf-8")
    toy = [*file("toy.json", {"train": [spaced]}), tmp_path / "toy.txt"]
    assert list(base.cdial(toy)) == [["好久不见", "是啊"]] * 2
    messages = [{"messages": [{"message": "嗨"}, {"message": "你好"}]}]
    assert list(base.kdconv(file("kd.json", messages))) == [["嗨", "你好"]]
    exchanges = [{"dialogue": [["__SILENCE__", "hi ."], ["ok", "i see"]]}]
    assert list(base.persona_en(file("p.json", exchanges))) == [["Hi.", "Ok", "I see"]]
    chinese = [{"dialogue": [["很好 。", "是 吗"]]}]
    assert list(base.persona_zh(file("z.json", chinese))) == [["很好。", "是吗"]]

    packed(tmp_path / "c.zip", "c.json", json.dumps({"1": {"messages": [{"content": "你好"}]}}))
    assert list(base.crosswoz([tmp_path / "c.zip"])) == [["你好"]]
    packed(tmp_path / "m.zip", "m.json", json.dumps({"1": {"log": [{"text": "a train ."}]}}))
    assert list(base.multiwoz([tmp_path / "m.zip"])) == [["A train."]]
    turns = {"1": {"messages": [[{"text": "yes"}, {"text": "im ok"}], [{"text": "good"}]]}}
    packed(tmp_path / "w.whl", "chitchat_dataset/dataset.json", json.dumps(turns))
    assert list(base.chitchat([tmp_path / "w.whl"])) == [["Yes, I'm ok", "Good"]]
    packed(tmp_path / "f.zip", "f/plot", "a film .\nanother\n")
    assert list(base.lines_of_archives([tmp_path / "f.zip"])) == [["a film ."], ["another"], [""]]


def test_the_sources_are_pinned():
    """A source has moved on since it was read, and the text cannot be made again."""
    names = [part.name for part in base.PARTS]
    assert len(names) == len(set(names))
    for part in base.PARTS:
        assert part.origin and part.licence
        for address, digest in part.files.values():
            assert re.fullmatch("[0-9a-f]{64}", digest)
            assert re.search("/[0-9a-f]{40}/|/[0-9a-f]{60}/", address), address


def test_chatterbot_is_read_from_its_package():
    """Regression: one entry of the package is a string, whose letters would be utterances."""
    pytest.importorskip("chatterbot_corpus")
    dialogues = list(base.chatterbot("chinese"))
    assert ["什么是ai", "人工智能是工程和科学的分支,致力于构建具有思维的机器。"] in dialogues
    assert all(isinstance(turns, list) for turns in dialogues)
    assert sum(map(len, dialogues)) < 3 * len(dialogues)


def test_the_page_lists_every_part():
    """docs/base.md, which begins the card, names another origin or licence than the code."""
    page = (ROOT / "docs" / "base.md").read_text(encoding="utf-8")
    for part in base.PARTS:
        assert f"| {part.name} | {part.origin} | {part.licence} |" in page
