"""What scripts/export.py writes computes in transformers what it computes here, and comes back.

The models are random, with logits of about 10: a forgotten or swapped tensor cannot hide."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import GPT, GPTConfig
from smallgpt import tokenizer as tokenizers
from smallgpt.console import UserError
from smallgpt.runs.checkpoint import Checkpoint
from smallgpt.sampling import Conversation, SampleSettings
from smallgpt.tokenizer import Tokenizer, TokenizerSettings
from smallgpt.weights import export, export_hf
from smallgpt.weights.export import Source
from smallgpt.weights.pretrained import load_trunk, open_model, open_trunk

torch.set_num_threads(1)

GPT2 = {"pos": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
FORMS = {
    "GPT2LMHeadModel": GPT2 | {"bias": True},
    "GPT2LMHeadModel without biases, untied": GPT2 | {"tie_weights": False},
    "ApertusForCausalLM": {},
    "ApertusForCausalLM, grouped, untied": {"n_kv_head": 2, "tie_weights": False},
    "ArceeForCausalLM": {"qk_norm": False},
    "Qwen3ForCausalLM": {"mlp": "swiglu"},
    "LlamaForCausalLM": {"mlp": "swiglu", "qk_norm": False, "rope_base": 50000.0},
}
PIECES = [
    *["the", " cat", " sat", "it's", " we'll", "'RE", " 12", "3456", "你好", "世界", "é", "ß"],
    *["\n", "\t", "  ", "   ", "?!", ".", "😀", "👩‍👩‍👧", "\u00a0", "\u200b", "ΑΣ", "İ", "<|sep|>"],
    *["<|bos|>", "<|end|>", "\ufeff", "\x00", "\x1c", "ﬁ", "e\u0301", "\u2028", "안녕", "ا"],
]


def stress_lines(count: int) -> list[str]:
    """Texts of pieces that tokenizers are known to differ on."""
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randrange(1, 20))) for _ in range(count)]


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    texts = [text for text in stress_lines(300) if "<|" not in text]
    found = {}
    for kind in ("char", "bpe"):
        settings = TokenizerSettings(kind=kind, vocab_size=500, min_count=1)
        found[kind] = tokenizers.train(settings, texts)
    return found


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in model.parameters():
        p.copy_(0.25 * torch.randn(p.shape) if p.dim() == 2 else p + 0.3 * torch.randn(p.shape))
    return model.eval()


def source_of(tokenizer: Tokenizer, **shape: object) -> Source:
    """A language model of this form, of whose run nothing is known."""
    rows = 64 * -(-tokenizer.vocab_size // 64)
    sizes = dict(vocab_size=rows, block_size=64, n_layer=2, n_head=4, n_embd=64)
    config = GPTConfig(**sizes | shape)
    nothing = Checkpoint(Path("runs/lively/step-00000001"), {"step": 1})
    return Source(nothing, config, lively(GPT(config)), tokenizer, head=None)


def written(source: Source, folder: Path) -> Path:
    with export.new_folder(folder) as temporary:
        export_hf.write(source, temporary)
    return folder


def some_ids(vocab: int) -> Tensor:
    return torch.randint(vocab, (3, 40), generator=torch.Generator().manual_seed(1))


def assert_close(a: Tensor, b: Tensor) -> None:
    """To 1e-5 of the largest logit."""
    assert a.shape == b.shape
    assert float(b.abs().max()) > 3
    assert (a - b).abs().max() <= 1e-5 * b.abs().max(), (a - b).abs().max()


# --- language models ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_same_logits_in_transformers_and_comes_back(
    hub, trained, tmp_path, name
):
    """A wrong name, a transposed matrix or another epsilon would give other logits."""
    source = source_of(trained["bpe"], **FORMS[name])
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
    hub, trained, tmp_path, gpt2_folder, kind
):
    """One other id, and the model reads another text."""
    if kind == "gpt2":  # it has ids without a token, and a pattern with look-ahead
        tokenizer = open_trunk(str(gpt2_folder)).tokenizer
    else:
        tokenizer = trained[kind]
    theirs = hub.AutoTokenizer.from_pretrained(written(source_of(tokenizer), tmp_path / "out"))
    for text in stress_lines(200):
        ids = tokenizer.encode(text)
        found = theirs(text, add_special_tokens=False, split_special_tokens=True)
        assert found.input_ids == ids, text
        assert theirs.decode(ids) == text
    for name, id in tokenizer.encoding._special_tokens.items():
        assert theirs.convert_tokens_to_ids(name) == id


def test_a_dialogue_is_written_as_in_training(hub, trained, tmp_path):
    """The template of a chat would differ from what the model has read."""
    tokenizer = trained["bpe"]
    theirs = hub.AutoTokenizer.from_pretrained(written(source_of(tokenizer), tmp_path / "out"))
    turns = ["the cat", "你好", "it's 12"]
    messages = []
    for number, turn in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": turn})
    whole = theirs.apply_chat_template(messages, return_dict=False)
    assert whole == tokenizer.encode_dialogue(turns)
    prompt = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
    assert prompt == [*tokenizer.encode_dialogue(turns)[:-1], tokenizer.sep]
    assert theirs("the cat").input_ids == [tokenizer.bos, *tokenizer.encode("the cat")]


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ApertusForCausalLM"])
def test_greedy_replies_are_those_of_chat(hub, trained, tmp_path, name):
    """A reply that begins or ends otherwise, or says an id without text, is another reply."""
    source = source_of(trained["char"], **FORMS[name])
    folder = written(source, tmp_path / "out")
    theirs = hub.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = hub.AutoTokenizer.from_pretrained(folder)
    greedy = SampleSettings(temperature=0, repetition_penalty=1, max_tokens=20)
    _, ours, our_tokenizer = open_model(folder)
    for text in ("the cat", "你好", "it's 12", "?"):
        said = Conversation(ours.eval(), our_tokenizer, greedy)
        said.say(text)
        expected = "".join(said.reply())
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        found = theirs.generate(**prompt, do_sample=False, max_new_tokens=20)
        reply = found[0, prompt["input_ids"].size(1) :]
        assert said.reply_tokens > 0
        assert export_text(tokenizer.decode(reply, skip_special_tokens=True)) == expected


def export_text(reply: str) -> str:
    """As chat.py shows it: on one line."""
    from smallgpt.sampling import one_line

    return one_line(reply)


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
def test_a_form_that_no_class_has_is_refused_by_the_setting_in_its_way(
    trained, tmp_path, shape, words
):
    """An inexact export would be another model, silently."""
    with pytest.raises(UserError, match=words) as caught:
        written(source_of(trained["char"], **shape), tmp_path / "out")
    assert "to=onnx" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_is_left_alone(trained, tmp_path):
    source = source_of(trained["char"])
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
        ({"intermediate_size": 100}, "intermediate_size is 100"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 3}, "blocks.2.norm1.weight is absent"),
        ({"vocab_size": 320}, r"wte.weight is \(\d+, 64\), and should be \(320, 64\)"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"scaled \(yarn\)"),
    ],
)
def test_a_folder_of_another_form_is_refused_by_the_name_of_the_field(
    trained, tmp_path, fields, words
):
    """What is opened all the same would be another model, silently."""
    folder = written(source_of(trained["bpe"]), tmp_path / "out")
    change(folder, **fields)
    with pytest.raises(UserError, match=words) as caught:
        open_trunk(str(folder))
    assert str(folder) in str(caught.value)


def test_an_xielu_that_is_no_squared_relu_is_refused(trained, tmp_path):
    """A published Apertus has learned its xIELU: its weights would be read as another model's."""
    folder = written(source_of(trained["bpe"]), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.act_fn.alpha_p"] += 0.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="its xIELU is no squared ReLU"):
        open_trunk(str(folder))


def test_a_damaged_tokenizer_of_an_export_is_named(trained, tmp_path):
    folder = written(source_of(trained["bpe"]), tmp_path / "out")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["model"]["vocab"]["Ġ"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json is damaged .*: export the model again"):
        open_trunk(str(folder))


def test_a_gpt2_that_knows_no_turns_is_a_trunk_and_no_chat(gpt2_folder):
    """It would be asked for tokens that it has no rows for."""
    with pytest.raises(UserError, match="has not learned to talk in turns"):
        open_model(gpt2_folder)
