"""`from smallgpt import load_chat, load_classifier`, as a program uses them."""

import subprocess
import sys
import typing

import pytest

import smallgpt
from helpers import ENV, ROOT
from smallgpt import SampleSettings, load_chat, load_classifier
from smallgpt.console import UserError
from smallgpt.inference import Chat, Prediction, Turn
from smallgpt.sampling import Conversation
from smallgpt.weights.pretrained import open_model

CPU = {"device": "cpu", "dtype": "float32"}
GREEDY = SampleSettings(temperature=0, max_tokens=12)
EMPTY = Prediction("", 0.0, {})
ASKS = ["你好", "the room was quiet", "我们 吃了晚饭?"]


@pytest.fixture
def chat(trunk) -> Chat:
    return load_chat(trunk, GREEDY, **CPU)


def history(*said: str) -> list[Turn]:
    """The turns of user, assistant, ..."""
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(said)]


# --- a chat ---------------------------------------------------------------------------------------


def test_replies_are_those_of_a_conversation(chat, trunk):
    """A program gets another reply than chat.py, or the turns before are forgotten."""
    _, model, tokenizer = open_model(trunk)
    talk = Conversation(model.eval(), tokenizer, GREEDY)
    for ask in ASKS:
        talk.say(ask)
        assert chat.reply(ask) == "".join(talk.reply())
    assert chat.talk.ids == talk.ids
    first = load_chat(trunk, GREEDY, **CPU).reply(ASKS[0])
    chat.reset()
    assert chat.reply(ASKS[0]) == first


def test_a_stream(trunk):
    """The pieces are not those of the reply, or one that is closed leaves half a turn."""
    lively = SampleSettings(temperature=2, max_tokens=12)
    chat = load_chat(trunk, lively, **CPU)
    pieces = list(chat.stream(ASKS[0]))
    assert len(pieces) > 1 and all(pieces)
    assert "".join(pieces) == load_chat(trunk, lively, **CPU).reply(ASKS[0])
    stream = chat.stream(ASKS[1])
    next(stream)
    stream.close()
    assert chat.talk.ids[-1] == chat.talk.tokenizer.sep
    assert chat.reply(ASKS[2])


def test_a_history_is_what_was_said(chat, trunk):
    """A server rebuilds a dialogue from its text, and the model then reads other tokens."""
    said = []
    for ask in ASKS:
        said += [ask, chat.reply(ask)]
    chat.talk.say("so?")
    chat.talk.make_room()
    ids = list(chat.talk.ids)
    chat.reset()
    chat.set_history(history(*said, "so?"))
    assert chat.talk.ids == ids

    other = load_chat(trunk, GREEDY, **CPU)
    other.set_history(history(*said[:2], "so?"))
    chat.set_history(history(*said[:2], "so?"))
    assert "".join(chat.pieces()) == "".join(other.pieces())


def test_a_reply_keeps_the_tokens_that_the_model_chose(chat):
    """Regression: chat.py reads on from the model's tokens, and the server read from others that
    spell the same."""
    tokenizer = chat.talk.tokenizer
    spelled = [ord(c) for c in "quiet"]  # ids 0 to 255 are the bytes
    chat.tokens_of["quiet"] = spelled
    chat.set_history(history("hi", "quiet", "quiet"))
    sep = tokenizer.sep
    asked = tokenizer.encode("quiet")
    expected = [tokenizer.bos, *tokenizer.encode("hi"), sep, *spelled, sep, *asked, sep]
    assert chat.talk.ids == expected


def test_what_is_remembered_is_bounded(chat):
    """A server that runs for months remembers every reply."""
    chat.talk.settings = SampleSettings(temperature=2, max_tokens=3)
    for i in range(80):
        chat.reset()
        chat.reply(f"{i}")
    assert 20 < len(chat.tokens_of) <= 64


# --- a classifier ---------------------------------------------------------------------------------


def test_labels_and_probabilities(fit):
    """A label is not the likeliest, an empty text gets one, or the order is lost."""
    classify = load_classifier(fit(), **CPU)
    texts = ["the room was lovely", " ", "太吵 " * 30, "the room was awful", ""]
    found = classify(texts)
    assert [bool(p.label) for p in found] == [True, False, True, True, False]
    for text, prediction in zip(texts, found, strict=True):
        if not text.strip():
            assert prediction == EMPTY
            continue
        assert prediction.probabilities.keys() == {"good", "bad"}
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert prediction.probability == max(prediction.probabilities.values())
        assert prediction.probabilities[prediction.label] == prediction.probability
        (alone,) = classify([text])
        assert alone.probability == pytest.approx(prediction.probability, abs=1e-5)
    assert classify([]) == [] and classify([" "]) == [EMPTY]


# --- the door -------------------------------------------------------------------------------------


def test_mistakes(trunk, fit, tmp_path):
    """A program gets a stack of our internals instead of a sentence."""
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_chat(tmp_path / "none")
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_classifier(tmp_path / "none")
    with pytest.raises(UserError, match="temperature must be float >= 0"):
        load_chat(trunk, SampleSettings(temperature=-1))
    with pytest.raises(UserError, match="is a classifier"):
        load_chat(fit())
    with pytest.raises(UserError, match="without a classification head"):
        load_classifier(trunk)
    with pytest.raises(AttributeError, match="no attribute 'load_caht'"):
        smallgpt.load_caht  # noqa: B018


def test_the_import_is_quick():
    """`import smallgpt` waits for torch, which takes two seconds."""
    code = "import smallgpt, sys; print('torch' in sys.modules, sorted(smallgpt.__all__))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False ['SampleSettings', 'load_chat', 'load_classifier']"


@pytest.mark.parametrize("function", [load_chat, load_classifier, Chat.reply, Chat.stream])
def test_types_are_stated(function):
    """An editor cannot say what a function takes and gives."""
    hints = typing.get_type_hints(function)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    assert hints.keys() == {*names, "return"} - {"self"}
