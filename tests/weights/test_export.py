"""What scripts/export.py writes computes in transformers what it computes here, and comes back.

The models are random, with logits of about 10: a forgotten or swapped tensor cannot hide."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporting import (
    GPT2,
    assert_close,
    classifier_of,
    some_ids,
    source_of,
    stress_lines,
    vocabulary,
)
from helpers import dialogue_ids
from model import GPT
from smallgpt.console import UserError
from smallgpt.sampling import Conversation, SampleSettings, one_line
from smallgpt.sentiment.batches import encode_text
from smallgpt.weights import export, export_hf
from smallgpt.weights.export import Source
from smallgpt.weights.pretrained import load_trunk, open_talker, open_trunk

torch.set_num_threads(1)

FORMS = {
    "GPT2LMHeadModel": GPT2 | {"bias": True},
    "GPT2LMHeadModel without biases, untied": GPT2 | {"tie_weights": False},
    "ApertusForCausalLM": {},
    "ApertusForCausalLM, grouped, untied": {"n_kv_head": 2, "tie_weights": False},
    "ArceeForCausalLM": {"qk_norm": False},
    "Qwen3ForCausalLM": {"mlp": "swiglu"},
    "LlamaForCausalLM": {"mlp": "swiglu", "qk_norm": False, "rope_base": 50000.0},
}


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip("transformers")


def written(source: Source, folder: Path) -> Path:
    with export.new_folder(folder) as temporary:
        export_hf.write(source, temporary)
    return folder


# --- language models ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_same_logits_in_transformers_and_comes_back(hub, tmp_path, name):
    """A wrong name, a transposed matrix or another epsilon would give other logits."""
    source = source_of(vocabulary("bpe"), **FORMS[name])
    folder = written(source, tmp_path / "out")
    theirs = hub.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == name.partition(",")[0].partition(" ")[0]
    ids = some_ids(source.tokenizer.vocab_size)
    expected = source.model(ids)
    assert_close(theirs(ids).logits, expected)

    theirs.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    hub.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 1
    for path in (folder, tmp_path / "again"):
        trunk = open_trunk(str(path))
        ours = GPT(trunk.config)
        load_trunk(ours, trunk)
        assert ours.eval()(ids).equal(expected)
        assert trunk.tokenizer.hash == source.tokenizer.hash
        assert trunk.rows == source.config.vocab_size


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_the_ids_are_the_same_and_text_that_spells_a_token_stays_text(
    hub, tmp_path, gpt2_folder, kind
):
    """One other id, and the model reads another text."""
    if kind == "gpt2":  # it has ids without a token, and a pattern with look-ahead
        tokenizer = open_trunk(str(gpt2_folder)).tokenizer
    else:
        tokenizer = vocabulary(kind)
    theirs = hub.AutoTokenizer.from_pretrained(written(source_of(tokenizer), tmp_path / "out"))
    for text in stress_lines(1000):
        ids = tokenizer.encode(text)
        found = theirs(text, add_special_tokens=False, split_special_tokens=True)
        assert found.input_ids == ids, text
        assert theirs.decode(ids) == text
    for name, id in tokenizer.encoding._special_tokens.items():
        assert theirs.convert_tokens_to_ids(name) == id


def test_a_dialogue_is_written_as_in_training(hub, tmp_path):
    """The template of a chat would differ from what the model has read."""
    tokenizer = vocabulary("bpe")
    theirs = hub.AutoTokenizer.from_pretrained(written(source_of(tokenizer), tmp_path / "out"))
    turns = ["the cat", "你好", "it's 12"]
    messages = []
    for number, turn in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": turn})
    whole = theirs.apply_chat_template(messages, return_dict=False)
    assert whole == dialogue_ids(tokenizer, turns)
    prompt = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
    assert prompt == [*dialogue_ids(tokenizer, turns)[:-1], tokenizer.sep]
    messages.insert(0, {"role": "system", "content": "be kind"})
    roles = [message["role"] for message in messages]
    whole = theirs.apply_chat_template(messages, return_dict=False)
    assert whole == dialogue_ids(tokenizer, ["be kind", *turns], roles)
    assert theirs("the cat").input_ids == [tokenizer.bos, *tokenizer.encode("the cat")]


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ApertusForCausalLM"])
def test_greedy_replies_are_those_of_chat(hub, tmp_path, name):
    """A reply that begins or ends otherwise, or says an id without text, is another reply."""
    source = source_of(vocabulary("char"), **FORMS[name])
    folder = written(source, tmp_path / "out")
    theirs = hub.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = hub.AutoTokenizer.from_pretrained(folder)
    not_alone = range(0x80, 0x100)  # bytes of longer characters: a reply of them could not be read
    theirs.generation_config.suppress_tokens += not_alone
    banned = [*source.silent, *not_alone]
    greedy = SampleSettings(temperature=0, repetition_penalty=1, max_tokens=8)
    _, ours, our_tokenizer = open_talker(str(folder))
    talk = Conversation(ours.eval(), our_tokenizer, greedy)
    talk.banned = torch.tensor(banned)
    talk.banned_first = torch.tensor([*banned, *source.ends])
    messages = []
    for text in ("the cat", "你好", "it's 12", "?"):
        talk.say(text)
        expected = "".join(talk.reply())
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found = theirs.generate(**prompt, do_sample=False, max_new_tokens=8)
        reply = found[0, prompt["input_ids"].size(1) :]
        messages.append(
            {"role": "assistant", "content": tokenizer.decode(reply, skip_special_tokens=True)}
        )
        assert one_line(messages[-1]["content"]) == expected != ""
    assert prompt["input_ids"][0].tolist() == talk.ids[: talk.reply_begin], "a turn was forgotten"


# --- classifiers ----------------------------------------------------------------------------------

CLASSIFIERS = {
    "GPT2ForSequenceClassification": GPT2 | {"bias": True},
    "Qwen3ForSequenceClassification": {"mlp": "swiglu", "n_kv_head": 2, "tie_weights": False},
    "LlamaForSequenceClassification": {"mlp": "swiglu", "qk_norm": False},
    "ArceeForSequenceClassification": {"qk_norm": False},
    "Qwen3ForSequenceClassification with relu": {},
}
TEXTS = ["the cat", " 你好 ", "it's", "é", "?!", "<|sep|> the", "\tthe\n", "12 the 😀", "the " * 9]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "bpe") for name in CLASSIFIERS), ("GPT2ForSequenceClassification", "char")],
)
def test_each_classifier_gives_the_same_probabilities_in_a_pipeline(hub, tmp_path, name, kind):
    """Another token at the end, a forgotten leading space or a padded state would change them."""
    source = classifier_of(vocabulary(kind), **CLASSIFIERS[name])
    folder = written(source, tmp_path / "out")
    theirs = hub.pipeline("text-classification", str(folder), top_k=None, batch_size=4)
    assert type(theirs.model).__name__ == name.partition(" ")[0]
    pairs = [(text, "") for text in TEXTS] + list(pairwise(TEXTS))
    inputs = [{"text": text, "text_pair": pair} if pair else text for text, pair in pairs]
    prefix = source.head["prefix"]
    for (text, pair), found in zip(pairs, theirs(inputs), strict=True):
        ids, is_cut = encode_text(source.tokenizer, text.strip(), pair.strip(), 48, prefix)
        assert not is_cut
        expected = source.model(torch.tensor([ids]), torch.tensor([len(ids)])).softmax(-1)[0]
        by_label = {score["label"]: score["score"] for score in found}
        probabilities = torch.tensor([by_label[label] for label in source.head["labels"]])
        torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=1e-5)

    trunk = open_trunk(str(folder))
    weights = dict(source.model.gpt.named_parameters())
    assert all(trunk.weights[name].equal(weights[name]) for name in trunk.weights)
    with pytest.raises(UserError, match="is a classifier: use it as a trunk"):
        open_talker(str(folder))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"pool": "mean"}, "has pool=mean"),
        ({"mask": False}, "has mask=false"),
        ({"mlp": "gelu"}, "model.mlp=gelu is in the way"),
        ({"cue": [3]}, "has cue="),
        ({"marks": 2}, "has marks=2"),
    ],
)
def test_a_classifier_that_no_class_has_is_refused_by_the_setting(tmp_path, how, words):
    with pytest.raises(UserError, match=words) as caught:
        written(classifier_of(vocabulary("bpe"), **how), tmp_path / "out")
    assert "to=onnx" in str(caught.value)


# --- what cannot be exported or opened ------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"mlp": "gelu"}, "model.mlp=gelu is in the way"),
        ({"bias": True}, "model.bias=True is in the way"),
        ({"norm": "layernorm"}, "model.norm=layernorm is in the way"),
        (GPT2 | {"n_kv_head": 2}, "model.n_kv_head=2 is in the way"),
        (GPT2 | {"mlp": "swiglu"}, "model.mlp=swiglu is in the way"),
    ],
)
def test_a_form_that_no_class_has_is_refused_by_the_setting_in_its_way(tmp_path, shape, words):
    """An inexact export would be another model, silently."""
    with pytest.raises(UserError, match=words) as caught:
        written(source_of(vocabulary("char"), **shape), tmp_path / "out")
    assert "to=onnx" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_is_left_alone(tmp_path):
    source = source_of(vocabulary("char"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear", encoding="utf-8")
    for name in ("mine", "mine/diary.txt"):
        with pytest.raises(UserError, match="is there already: delete it, or give another folder"):
            written(source, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert written(source, tmp_path / "empty" / "new").is_dir()
    assert written(source, tmp_path / "empty2").stat().st_mode & 0o777 == usual_mode(tmp_path)


def usual_mode(folder: Path) -> int:
    probe = folder / "probe"
    probe.mkdir()
    return probe.stat().st_mode & 0o777


def change(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2'"),
        ({"intermediate_size": 100}, r"fc.weight is \(256, 64\), and should be \(100, 64\)"),
        ({"rms_norm_eps": 0}, "norm_eps is 0, and must be a number above 0"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 3}, "blocks.2.norm1.weight is absent"),
        ({"vocab_size": 320}, r"wte.weight is \(\d+, 64\), and should be \(320, 64\)"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"scaled \(yarn\)"),
    ],
)
def test_a_folder_of_another_form_is_refused_by_the_name_of_the_field(tmp_path, fields, words):
    """What is opened all the same would be another model, silently."""
    folder = written(source_of(vocabulary("bpe")), tmp_path / "out")
    change(folder, **fields)
    with pytest.raises(UserError, match=words) as caught:
        open_trunk(str(folder))
    assert str(folder) in str(caught.value)


def test_an_xielu_that_is_no_squared_relu_is_refused(tmp_path):
    """A published Apertus has learned its xIELU: its weights would be read as another model's."""
    folder = written(source_of(vocabulary("bpe")), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.act_fn.alpha_p"] += 0.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="its xIELU is no squared ReLU"):
        open_trunk(str(folder))


def test_a_damaged_tokenizer_of_an_export_is_named(tmp_path):
    folder = written(source_of(vocabulary("bpe")), tmp_path / "out")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["model"]["vocab"]["Ġ"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json is damaged .*: export the model again"):
        open_trunk(str(folder))


def test_a_gpt2_that_knows_no_turns_is_a_trunk_and_no_chat(gpt2_folder):
    """It would be asked for tokens that it has no rows for."""
    with pytest.raises(UserError, match="has not learned to talk in turns"):
        open_talker(str(gpt2_folder))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ApertusForCausalLM", "LlamaForCausalLM"])
def test_weights_without_head_and_prefix_are_read_alike(hub, tmp_path, name):
    """transformers saves a model without its head so: `layers.0...`, not `model.layers.0...`."""
    folder = written(source_of(vocabulary("bpe"), **FORMS[name]), tmp_path / "out")
    expected = open_trunk(str(folder))
    before = (folder / "config.json").read_bytes()
    hub.AutoModel.from_pretrained(folder).save_pretrained(folder)
    (folder / "config.json").write_bytes(before)
    assert "norm.weight" in load_file(folder / "model.safetensors")
    found = open_trunk(str(folder))
    assert found.weights.keys() == expected.weights.keys()
    assert all(found.weights[key].equal(expected.weights[key]) for key in found.weights)
