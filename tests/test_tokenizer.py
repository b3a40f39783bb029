"""Tokenizers lose nothing, never mistake text for a special token, and survive the disk."""

import base64
import gzip
import json
import pickle
import random
import shutil
from hashlib import sha1
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from helpers import DATA, dialogue_ids
from smallgpt import tokenizer as module
from smallgpt.console import UserError
from smallgpt.tokenizer import SPECIALS, Tokenizer, TokenizerSettings, named, train
from smallgpt.weights.gpt2 import tokenizer_of

GPT2 = DATA / "tokenizers" / "gpt2"
TALK = [
    "你好，世界！",
    "你好吗？我很好。",
    "Hello there, you?",
    "It's 2024, I'm there.",
    "哈哈哈哈😀",
] * 4
ODD = [
    "",
    " ",
    "  \t x",
    "\r\n\n",
    "龘靐齉",
    "👩‍👩‍👧‍👦 ❤️",
    "e\u0301 \u0000\u2028",
    "हिन्दी 한국어 ありがとう",
    "\U0010ffff",
    "".join(SPECIALS),
    "<|endoftext|>你好<|end|>",
]


def random_text(rng: random.Random, length: int) -> str:
    ranges = [
        (0, 0x80),
        (0x80, 0x800),
        (0x4E00, 0xA000),
        (0x1F000, 0x1FA00),
        (0, 0xD800),
        (0xE000, 0x110000),
    ]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(length))


def files_of(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in sorted((DATA / "chat").glob(pattern))]
    return found or pytest.skip(f"no chat data under {DATA}: set SMALLGPT_DATA")


@pytest.fixture(scope="module", params=["char", "bpe"])
def tok(request) -> Tokenizer:
    return train(TokenizerSettings(kind=request.param, vocab_size=400), TALK)


# -- lossless --------------------------------------------------------------------------------------


def test_any_text_comes_back_exactly(tok):
    rng = random.Random(0)
    for text in ODD + TALK + [random_text(rng, rng.randrange(40)) for _ in range(300)]:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert tok.token_bytes()[ids].sum() == len(text.encode("utf-8"))
        assert not ids or max(ids) < tok.bos


def test_every_code_point_comes_back(tok):
    """A split pattern with a hole would drop the characters that match no alternative."""
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    assert tok.decode(tok.encode(text)) == text


def test_lone_surrogates_are_replaced_in_training_and_encoding():
    for kind in ("char", "bpe"):
        tok = train(TokenizerSettings(kind=kind, vocab_size=300), ["ab\ud800", "ab\ud800"])
        assert tok.decode(tok.encode("a\udc00b")) == "a\ufffdb"


@pytest.mark.parametrize(
    "text", [" " * 1_000_000 + "x", "哈" * 300_000, "a" * 1_000_000, "\n" * 1_000_000]
)
def test_long_runs_neither_overflow_nor_crawl(tok, text):
    """GPT-4's pattern asks `\\s+(?!\\S)`: a million spaces overflow the regex engine's stack."""
    assert tok.decode(tok.encode(text)) == text


# -- dialogues and special tokens ------------------------------------------------------------------


def test_text_that_spells_a_special_token_stays_text(tok):
    """Else a user could type the end of the dialogue, or a corpus could contain one."""
    specials = {tok.bos, tok.sep, tok.end, tok.pad, tok.cls, tok.pair}
    for name in SPECIALS:
        assert not specials & set(tok.encode(name))
        assert list(dialogue_ids(tok, [name])) == [tok.bos, *tok.encode(name), tok.end]


def test_dialogue_layout(tok):
    turns = ["你好", "hi", "<|end|>"]
    a, b, c = map(tok.encode, turns)
    assert dialogue_ids(tok, turns) == [tok.bos, *a, tok.sep, *b, tok.sep, *c, tok.end]
    assert dialogue_ids(tok, ["one"]) == [tok.bos, *tok.encode("one"), tok.end]
    assert tok.encode_turns(turns) == [[tok.bos], [*a, tok.sep], [*b, tok.sep], [*c, tok.end]]


def test_a_system_prompt_follows_an_empty_turn(tok):
    """No token is added for it: every tokenizer that was ever saved can write one."""
    turns, roles = ["be kind", "hi", "ho"], ["system", "user", "assistant"]
    prompt, *spoken = map(tok.encode, turns)
    expected = [tok.bos, tok.sep, *prompt, tok.sep, *spoken[0], tok.sep, *spoken[1], tok.end]
    assert dialogue_ids(tok, turns, roles) == expected
    assert dialogue_ids(tok, turns[1:], roles[1:]) == dialogue_ids(tok, turns[1:])


def test_special_ids_are_the_last_six_in_order(tok):
    ids = [tok.bos, tok.sep, tok.end, tok.pad, tok.cls, tok.pair]
    assert ids == list(range(tok.vocab_size - 6, tok.vocab_size)) and tok.vocab_size <= 400
    assert tok.decode(ids) == "" and tok.decode(ids, specials=True) == "".join(SPECIALS)


def test_ignored_targets_are_an_error_not_the_last_token(tok):
    for outside in (-1, tok.vocab_size):
        with pytest.raises(KeyError):
            tok.decode([outside])


def test_token_bytes_add_up_to_the_chat_file(tok):
    dialogues = [["你好", "hi there"], ["😀", "", "…"], ["x"]]
    file = "".join("\n".join(turns) + "\n\n" for turns in dialogues)
    sizes = tok.token_bytes()
    assert sizes.dtype == np.int64 and sizes.shape == (tok.vocab_size,)
    n_bytes = sum(sizes[dialogue_ids(tok, turns)].sum() for turns in dialogues)
    assert n_bytes == len(file.encode("utf-8"))


# -- streaming -------------------------------------------------------------------------------------


def test_stream_never_shows_half_a_character(tok):
    """Decoding token by token prints U+FFFD for each byte of a character spelled in bytes."""
    text = "龘a😀你好"
    stream = tok.stream()
    shown = [stream.push(i) for i in tok.encode(text)]
    assert "".join(shown) == text and not any("\ufffd" in piece for piece in shown)
    assert stream.flush() == ""


def test_stream_equals_decode_on_any_ids(tok):
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(tok.vocab_size) for _ in range(rng.randrange(30))]
        stream = tok.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tok.decode(ids)


def test_stream_flush_shows_an_unfinished_character_and_starts_afresh(tok):
    stream = tok.stream()
    assert [stream.push(i) for i in tok.encode("龘")[:-1]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(tok.encode("a")[0]) == "a"


# -- training --------------------------------------------------------------------------------------


def test_char_takes_frequent_characters_most_frequent_first():
    texts = ["乙丙丙é", "乙丙甲a"]
    tok = train(TokenizerSettings(min_count=2), texts)
    assert [tok.decode([i]) for i in range(256, tok.bos)] == ["丙", "乙"]
    assert len(tok.encode("甲")) == 3 and tok.encode("a") == [97]
    tok = train(TokenizerSettings(min_count=1, vocab_size=262 + 3), texts)
    assert [tok.decode([i]) for i in range(256, tok.bos)] == ["丙", "乙", "é"]


def test_bpe_learns_words_of_both_scripts(tok):
    if tok.kind == "bpe":
        assert len(tok.encode("你好")) == len(tok.encode(" there")) == 1


def test_training_is_deterministic_and_reads_texts_once(tok):
    settings = TokenizerSettings(kind=tok.kind, vocab_size=400)
    assert train(settings, lambda: iter(TALK)).hash == train(settings, iter(TALK)).hash == tok.hash
    assert train(settings, ["别的"] * 9).hash != tok.hash


def test_an_empty_corpus_still_gives_the_bytes(tok):
    assert train(TokenizerSettings(kind=tok.kind), []).vocab_size == 262


@pytest.mark.parametrize(
    "settings, words",
    [
        (TokenizerSettings(kind="bpe", vocab_size=261), ["261", "at least 262"]),
        (TokenizerSettings(kind="char", vocab_size=0), ["at least 262"]),
        (
            TokenizerSettings(kind="gpt2", lowercase=True),
            ["lowercase", "gpt2 was published with capitals"],
        ),
        (TokenizerSettings(kind="gtp2"), ["gtp2", "char", "bpe", "gpt2", "cl100k_base"]),
    ],
)
def test_impossible_settings_are_named(settings, words):
    with pytest.raises(UserError) as error:
        train(settings, TALK)
    assert all(word in str(error.value) for word in words)


def test_both_libraries_split_alike():
    """BPE is trained by one regex engine and applied by another: differences waste tokens."""
    from tokenizers import Regex, pre_tokenizers

    rng = random.Random(2)
    parts = [
        "it's WE'LL",
        " ",
        "  ",
        "\n",
        "你好",
        "，",
        "ok",
        "2024",
        "é",
        "e\u0301",
        "❤️",
        "한",
        "〇",
        "⺀",
    ]
    text = "".join(rng.choice(parts) for _ in range(2000))
    split = pre_tokenizers.Split(Regex(module.BPE_PATTERN), "isolated").pre_tokenize_str(text)
    pieces = [piece.encode("utf-8") for piece, _ in split]
    ranks = module.BYTES + sorted({piece for piece in pieces if len(piece) > 1})
    tok = Tokenizer("pieces", module.BPE_PATTERN, ranks, {})
    assert [ranks[i] for i in tok.encode(text)] == pieces


def test_sample_is_bounded_and_takes_both_speakers():
    """Dropping every second utterance would have kept one speaker of each two-turn dialogue."""
    turns = ["question", "a reply!"] * 50_000
    kept = module._sample(iter(turns), limit=40_000)
    assert 8_000 <= sum(map(len, kept)) <= 40_000
    assert 0.4 < kept.count("question") / len(kept) < 0.6
    assert kept == module._sample(iter(turns), limit=40_000)
    assert module._sample(turns[:10], limit=40_000) == turns[:10]
    assert module._sample(["x" * 99] * 20, limit=9)  # texts longer than the limit still leave one


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_an_uncased_tokenizer_reads_capitals_as_small_letters(kind, tmp_path):
    cased, fresh = (
        train(TokenizerSettings(kind, vocab_size=400, lowercase=low), TALK * 9)
        for low in (False, True)
    )
    fresh.save(tmp_path / "tokenizer.json")
    assert cased.encode("HELLO There") != cased.encode("hello there") and cased.hash != fresh.hash
    for tok in (fresh, Tokenizer.load(tmp_path / "tokenizer.json")):
        for text in [*TALK, *ODD, "HELLO There", "ÄÖÜ Ⅷ"]:
            assert (
                tok.encode(text) == tok.encode(text.lower())
                and tok.decode(tok.encode(text)) == text.lower()
            )
        assert dialogue_ids(tok, ["HELLO", "IT"]) == dialogue_ids(tok, ["hello", "it"])
    ranks = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["ranks"]
    learnt = [base64.b64decode(token).decode("utf-8", "replace") for token in ranks[256:]]
    assert learnt and learnt == [token.lower() for token in learnt]


# -- the disk --------------------------------------------------------------------------------------


def test_saved_tokenizer_comes_back_the_same(tok, tmp_path):
    tok.save(tmp_path / "run" / "tokenizer.json")
    for again in (
        Tokenizer.load(tmp_path / "run" / "tokenizer.json"),
        pickle.loads(pickle.dumps(tok)),
    ):
        assert (again.hash, again.kind, again.vocab_size) == (tok.hash, tok.kind, tok.vocab_size)
        assert dialogue_ids(again, TALK) == dialogue_ids(tok, TALK)
        assert (again.token_bytes() == tok.token_bytes()).all()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer.json"]


def test_damaged_files_are_refused_by_name(tok, tmp_path):
    path = tmp_path / "tokenizer.json"
    tok.save(path)
    whole = path.read_text(encoding="utf-8")

    def edited(**changes) -> str:
        return json.dumps(json.loads(whole) | changes)

    swapped = json.loads(whole)["ranks"][::-1]
    for text in (
        "",
        "[]",
        "{}",
        whole[:-9],
        edited(kind="x"),
        edited(format=99),
        edited(ranks=swapped),
        edited(lowercase=True),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="tokenizer.json is no usable tokenizer"):
            Tokenizer.load(path)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=missing.name):
            Tokenizer.load(missing)


@pytest.mark.parametrize(
    "ranks, specials",
    [
        (module.BYTES[1:], {}),
        ([*module.BYTES, b"a"], {}),
        (module.BYTES, {"<|x|>": 7}),
        (module.BYTES, {"<|x|>": 256, "<|y|>": 256}),
    ],
)
def test_parts_that_cannot_be_lossless_are_refused(ranks, specials):
    with pytest.raises(ValueError, match="share an id or a spelling"):
        Tokenizer("char", module.CHAR_PATTERN, ranks, specials)


def test_unused_ids_decode_to_nothing():
    """p50k_base has a gap in its ranks, cl100k_base among its specials; both may be sampled."""
    tok = Tokenizer("gaps", module.CHAR_PATTERN, [*module.BYTES, b"", "é".encode()], {"<|x|>": 260})
    assert (tok.bos, tok.vocab_size) == (261, 267)
    assert (
        tok.decode([256, 257, 258, 260]) == "é" and tok.decode([260, 259], specials=True) == "<|x|>"
    )


# -- published encodings ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    if not GPT2.exists():
        pytest.skip(f"no GPT-2 files at {GPT2}: set SMALLGPT_DATA")
    return tokenizer_of(GPT2)


def test_gpt2_has_its_own_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.kind, gpt2.bos, gpt2.vocab_size) == ("gpt2", 50257, 50263)
    assert (
        gpt2.decode([15496, 50256]) == "Hello"
        and gpt2.decode([50256], specials=True) == "<|endoftext|>"
    )


def test_gpt2_agrees_with_transformers(gpt2):
    hub = pytest.importorskip("transformers")
    vocab, merges = (
        json.loads((GPT2 / "encoder.json").read_text(encoding="utf-8")),
        GPT2 / "vocab.bpe",
    )
    pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").splitlines()[1:]]
    theirs = hub.GPT2Tokenizer(vocab=vocab, merges=pairs)
    for text in TALK + [text for text in ODD if "<|" not in text]:
        assert gpt2.encode(text) == theirs.encode(text)


def test_gpt2_of_files_is_the_named_encoding(gpt2, tmp_path, monkeypatch):
    root = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(GPT2 / name, tmp_path / sha1((root + name).encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert named("gpt2").hash == gpt2.hash


def test_gpt2_files_that_are_missing_or_disagree(gpt2, tmp_path):
    shutil.copy(GPT2 / "encoder.json", tmp_path)
    with pytest.raises(UserError, match="must hold encoder.json and vocab.bpe.*No such file"):
        tokenizer_of(tmp_path)
    lines = (GPT2 / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    (tmp_path / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="not in the order"):
        tokenizer_of(tmp_path)


def test_without_a_network_the_message_says_which_file_goes_where(monkeypatch):
    import requests

    url = "https://example.org/a.tiktoken"

    def offline(name: str):
        raise requests.ConnectionError(request=requests.Request("GET", url))

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError) as error:
        train(TokenizerSettings(kind="cl100k_base"), [])
    expected = ("cl100k_base", url, sha1(url.encode("utf-8")).hexdigest(), "TIKTOKEN_CACHE_DIR")
    assert all(word in str(error.value) for word in expected)


# -- real chat -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_real_chat_is_compressed_and_comes_back(kind):
    turns = []
    for path in files_of("zh/chatterbot*", "zh/lccc*", "en/chatterbot*", "en/meld*"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            turns += file.read(200_000).split("\n")
    tok = train(TokenizerSettings(kind=kind, vocab_size=4096), turns)
    ids = dialogue_ids(tok, turns)
    assert tok.decode(ids) == "".join(turns)
    sizes = tok.token_bytes()[ids]
    assert sizes.mean() > {"char": 1.5, "bpe": 2.5}[kind]
