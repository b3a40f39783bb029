"""A GPT-2 computes here what it computes in transformers, and keeps its ids.

Whatever is wrong with its folder is named, and no pickle's code is ever run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import DATA
from model import GPT, GPTClassifier, GPTConfig
from smallgpt.console import UserError
from smallgpt.tokenizer import STAND_INS, Tokenizer
from smallgpt.weights import gpt2

torch.set_num_threads(1)

GPT2_FILES = DATA / "tokenizers" / "gpt2"
NANO_SORT = DATA / "weights" / "gpt-nano-sort"
TEXT = "hell wx, héllo 你好"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 548105171\n"
WEB_PAGE = b'\n<!DOCTYPE html>\n<html lang="en"><body>model.safetensors</body></html>'


def model_of(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """The model; every parameter must come from the weights."""
    model = GPT(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    assert all(w.dtype == torch.float32 for w in weights.values())
    return model.eval()


def opened(folder: Path) -> GPT:
    config, weights, _ = gpt2.read(folder)
    return model_of(config, weights)


def some_ids(vocab: int) -> Tensor:
    return torch.randint(vocab, (3, 24), generator=torch.Generator().manual_seed(1))


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), (a - b).abs().max()


def refused(folder: Path) -> str:
    """The message of a user's mistake. It must name the folder or a file in it."""
    with pytest.raises(UserError) as caught:
        gpt2.read(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# --- the folder, changed --------------------------------------------------------------------------


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def change(folder: Path, **fields: object) -> None:
    config = config_of(folder) | fields
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def ids_of(folder: Path) -> dict[str, int]:
    return json.loads((folder / "vocab.json").read_text(encoding="utf-8"))


def write_ids(folder: Path, ids: dict[str, object]) -> None:
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")


def merges_of(folder: Path) -> list[str]:
    return (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]


def write_merges(folder: Path, merges: list[str]) -> None:
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(lines, encoding="utf-8")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def set_rows(folder: Path, rows: int, vocab_size: int | None = None) -> None:
    """An embedding of so many rows; config.json agrees unless told otherwise."""
    tensors = tensors_of(folder)
    old = tensors["transformer.wte.weight"]
    more = torch.zeros(max(0, rows - len(old)), old.size(1))
    tensors["transformer.wte.weight"] = torch.cat([old, more])[:rows]
    save_file(tensors, folder / "model.safetensors")
    change(folder, vocab_size=rows if vocab_size is None else vocab_size)


def as_bin(folder: Path, tensors: dict, **how: bool) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin", **how)


def as_shards(folder: Path, stem: str = "model", end: str = "safetensors") -> None:
    """The weights in two files and an index, as transformers saves large models."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002.{end}"
        weight_map |= dict.fromkeys(part, file)
        shard = {name: tensors[name] for name in part}
        if end == "bin":
            torch.save(shard, folder / file)
        else:
            save_file(shard, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index), encoding="utf-8")


def tokenizer_json(folder: Path, **changes: object) -> None:
    """What transformers 5 saves alone."""
    model = {
        "type": "BPE",
        "vocab": ids_of(folder),
        "merges": [m.split() for m in merges_of(folder)],
    }
    splitter = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    content = {"version": "1.0", "normalizer": None, "pre_tokenizer": splitter, "model": model}
    text = json.dumps(content | changes)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


# --- the same numbers as in transformers ----------------------------------------------------------


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Random values everywhere, biases and norms too."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.copy_(0.2 * torch.randn(p.shape) if p.dim() == 2 else p + 0.3 * torch.randn(p.shape))
    return model.eval()


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip("transformers")


def their_config(hub, folder: Path, **more: object):
    return hub.GPT2Config(**config_of(folder), attn_implementation="eager", **more)


def old_names(theirs: nn.Module) -> dict[str, Tensor]:
    """As the files of 2019: without `transformer.`, with the masks, without the tied lm_head."""
    state = theirs.state_dict()
    tensors = {n.removeprefix("transformer."): w for n, w in state.items() if "lm_head" not in n}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


@torch.no_grad()
@pytest.mark.parametrize(
    "form", ["safetensors", "shards", "bin", "bin of 2019", "float16", "bfloat16", "untied"]
)
def test_gpt2_gives_the_same_logits(hub, gpt2_folder, form):
    """With a head of its own, and with another epsilon, too: both were once refused."""
    own = {"tie_word_embeddings": False, "layer_norm_epsilon": 0.1} if form == "untied" else {}
    theirs = lively(hub.GPT2LMHeadModel(their_config(hub, gpt2_folder, **own)))
    shutil.copytree(gpt2_folder, gpt2_folder.with_name("tokenizer"))
    shutil.rmtree(gpt2_folder)
    theirs.save_pretrained(gpt2_folder, max_shard_size="20KB" if form == "shards" else "1GB")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(gpt2_folder.with_name("tokenizer") / name, gpt2_folder)
    if form == "shards":
        assert len(list(gpt2_folder.glob("model-*-of-*.safetensors"))) > 2
    elif form == "bin":
        as_bin(gpt2_folder, theirs.state_dict())  # with transformer. and lm_head.weight
    elif form == "bin of 2019":
        as_bin(gpt2_folder, old_names(theirs), _use_new_zipfile_serialization=False)
    elif form in ("float16", "bfloat16"):
        dtype = getattr(torch, form)
        theirs = hub.GPT2LMHeadModel.from_pretrained(gpt2_folder, dtype=dtype)
        theirs.save_pretrained(gpt2_folder)
        theirs = theirs.float().eval()
    idx = some_ids(261)
    assert_close(opened(gpt2_folder)(idx), theirs(idx).logits)


@torch.no_grad()
def test_a_classifier_of_hugging_face_goes_on_here(hub, gpt2_folder):
    config = their_config(hub, gpt2_folder, num_labels=3, pad_token_id=0)
    theirs = lively(hub.GPT2ForSequenceClassification(config))
    theirs.save_pretrained(gpt2_folder)
    gpt = GPTClassifier(opened(gpt2_folder), n_classes=3).eval()
    gpt.head.weight.copy_(theirs.score.weight)
    lengths = torch.tensor([24, 5, 1])
    idx = some_ids(261).clamp(min=1)
    idx[torch.arange(24) >= lengths[:, None]] = 0
    assert_close(gpt(idx, lengths), theirs(idx).logits)


@torch.no_grad()
def test_published_weights_give_the_published_logits(tmp_path):
    """minGPT's gpt-nano that sorts letters; its head is not tied."""
    if not NANO_SORT.is_dir():
        pytest.skip(f"no published weights at {NANO_SORT}: set SMALLGPT_DATA")
    file = tmp_path / "model.safetensors"
    shutil.copyfile(NANO_SORT / "gpt-nano-sort.hf-gpt2.safetensors", file)
    shutil.copyfile(NANO_SORT / "config.json", tmp_path / "config.json")
    model = model_of(*gpt2.read_model(tmp_path))
    published = json.loads((NANO_SORT / "expected_logits.json").read_text(encoding="utf-8"))
    assert_close(model(torch.tensor(published["idx"])), torch.tensor(published["logits"]))


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    ["no prefix", "heads and masks", "float16 bin", "bfloat16", "shards", "shards of bin"],
)
def test_every_way_to_save_weights_is_read_alike(gpt2_folder, form):
    """Regression: weights in shards used to be "no weights"."""
    _, expected, _ = gpt2.read(gpt2_folder)
    tensors = tensors_of(gpt2_folder)
    file = gpt2_folder / "model.safetensors"
    if form == "no prefix":
        save_file({n.removeprefix("transformer."): w for n, w in tensors.items()}, file)
    elif form == "heads and masks":
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["score.weight"] = torch.ones(2, 32)
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(tensors, file)
    elif form == "float16 bin":
        expected = {name: w.half().float() for name, w in expected.items()}
        as_bin(gpt2_folder, {name: w.half() for name, w in tensors.items()})
    elif form == "bfloat16":
        expected = {name: w.bfloat16().float() for name, w in expected.items()}
        save_file({name: w.bfloat16() for name, w in tensors.items()}, file)
    elif form == "shards":
        as_shards(gpt2_folder)
    else:
        as_shards(gpt2_folder, "pytorch_model", "bin")
    _, found, _ = gpt2.read(gpt2_folder)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert all(w.dtype == torch.float32 for w in found.values())


def test_what_is_missing_of_weights_in_shards_is_named(gpt2_folder):
    as_shards(gpt2_folder)
    index = gpt2_folder / "model.safetensors.index.json"
    (gpt2_folder / "model-00002-of-00002.safetensors").unlink()
    message = refused(gpt2_folder)
    assert "lacks model-00002-of-00002.safetensors, of 2 shards" in message
    for content in ("{}", '{"weight_map": []}', "[]", '{"weight_map"'):
        index.write_text(content, encoding="utf-8")
        message = refused(gpt2_folder)
        assert str(index) in message and message.endswith("download it again")
    index.unlink()
    assert "all shards and model.safetensors.index.json" in refused(gpt2_folder)


def test_no_weights(gpt2_folder):
    (gpt2_folder / "model.safetensors").unlink()
    assert "no weights: put model.safetensors or pytorch_model.bin there" in refused(gpt2_folder)


def test_each_tensor_that_is_missing_surplus_or_of_another_shape_is_named(gpt2_folder):
    """One forgotten bias would leave random numbers in a model that looks pretrained."""
    config, weights = gpt2.read_model(gpt2_folder)
    shapes = weights.shapes
    file = Path("some.file")
    for name, shape in shapes.items():
        assert tuple(weights[name].shape) == shape
        rest = {n: other for n, other in shapes.items() if n != name}
        first, *others = shape
        fewer = (first - 1, *others)
        with pytest.raises(UserError) as caught:
            gpt2.check_shapes(rest, config, file)
        assert f"some.file is damaged or of another form: {name} is absent" in str(caught.value)
        assert f"should be {shape}" in str(caught.value)
        with pytest.raises(UserError) as caught:
            gpt2.check_shapes(rest | {name: fewer}, config, file)
        assert f"{name} is {fewer}, and should be" in str(caught.value)
    with pytest.raises(UserError, match=r"blocks.2.norm1.bias is \(32,\), and should be absent"):
        gpt2.check_shapes(shapes | {"blocks.2.norm1.bias": (32,)}, config, file)


def test_weights_that_config_json_contradicts(gpt2_folder):
    set_rows(gpt2_folder, rows=320, vocab_size=261)
    message = refused(gpt2_folder)
    assert "config.json has vocab_size 261" in message and "has 320 rows" in message
    assert message.endswith("or set vocab_size to 320")
    change(gpt2_folder, vocab_size=320)
    assert gpt2.read(gpt2_folder)[0].vocab_size == 320  # the advice cures
    change(gpt2_folder, n_positions=25)
    assert "wpe.weight is (24, 32), and should be (25, 32)" in refused(gpt2_folder)
    change(gpt2_folder, n_positions=24, n_layer=1)
    assert "blocks.1.attn.k.bias is (32,), and should be absent" in refused(gpt2_folder)
    change(gpt2_folder, n_layer=3)
    assert "blocks.2.norm1.weight is absent, and should be (32,)" in refused(gpt2_folder)


def test_a_pickle_is_refused_unexecuted(gpt2_folder, evil):
    tensors = tensors_of(gpt2_folder) | {"extra": evil}
    bin_file = gpt2_folder / "pytorch_model.bin"
    for zipped in (True, False):
        as_bin(gpt2_folder, tensors, _use_new_zipfile_serialization=zipped)
        message = refused(gpt2_folder)
        assert "pytorch_model.bin is damaged, or holds more than tensors" in message
    shutil.copy(bin_file, gpt2_folder / "model.safetensors")
    assert "does not hold valid safetensors" in refused(gpt2_folder)
    assert not evil.folder.exists()
    torch.load(bin_file, weights_only=False)
    assert evil.folder.exists()  # so it would have been run


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"layer_norm_epsilon": 0},
        {"n_inner": 100},
        {"model_type": "gpt_neo"},
        {"add_cross_attention": True},
        {"quantization_config": {"bits": 8}},  # its int8 would be taken for weights
    ],
    ids=lambda field: "=".join(map(str, *field.items())),
)
def test_a_gpt2_of_another_form_is_refused_by_the_name_of_the_field(gpt2_folder, field):
    change(gpt2_folder, **field)
    assert f"config.json: {next(iter(field))} is " in refused(gpt2_folder)


def test_what_is_said_in_other_words_is_the_same_form(gpt2_folder):
    change(gpt2_folder, activation_function="gelu_pytorch_tanh", n_inner=128)
    assert gpt2.read(gpt2_folder)[0].n_embd == 32


@pytest.mark.parametrize("value", [None, 0, -1, "12", 1.5, True])
@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_layer", "n_head", "n_embd"])
def test_a_size_that_is_none_is_named(gpt2_folder, field, value):
    change(gpt2_folder, **{field: value})
    assert f"config.json is damaged: {field} is {value!r}" in refused(gpt2_folder)


def test_config_json_that_is_missing_or_impossible(gpt2_folder):
    change(gpt2_folder, n_head=5)
    assert "n_embd=32 is not divisible by n_head=5" in refused(gpt2_folder)
    (gpt2_folder / "config.json").unlink()
    assert "config.json is missing: put the one there" in refused(gpt2_folder)


# --- files that a download, an editor or another system left --------------------------------------


def prepare(folder: Path, name: str) -> Path:
    """The folder in the form that has this file."""
    if name == "pytorch_model.bin":
        as_bin(folder, tensors_of(folder))
    elif "of-00002" in name or "index" in name:
        as_shards(folder)
    elif name == "tokenizer.json":
        tokenizer_json(folder)
    return folder / name


FILES = [
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "model-00002-of-00002.safetensors",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_not_downloaded_whole_is_named(gpt2_folder, name):
    """Regression: a pointer of Git LFS used to be "not valid safetensors", or an unsafe pickle."""
    file = prepare(gpt2_folder, name)
    gpt2.read(gpt2_folder)  # so far it is good
    whole = file.read_bytes()
    file.write_bytes(POINTER)
    message = refused(gpt2_folder)
    assert message.startswith(f"{file} is a Git LFS pointer") and "git lfs pull" in message
    file.write_bytes(WEB_PAGE)
    message = refused(gpt2_folder)
    assert message.startswith(f"{file} is a web page") and "/resolve/" in message
    for part in (whole[: len(whole) // 2], b""):
        file.write_bytes(part)
        message = refused(gpt2_folder)
        assert name in message
        assert "download it again" in message or "take the files of one model" in message
    file.write_bytes(whole)
    gpt2.read(gpt2_folder)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("how", ["byte order mark", "CRLF", "UTF-16"])
def test_text_files_that_an_editor_saved_otherwise(gpt2_folder, name, how):
    """Regression: a byte order mark in config.json used to be a JSONDecodeError."""
    if (name, how) == ("merges.txt", "UTF-16"):
        return  # only JSON knows its Unicode by itself
    expected = gpt2.read(gpt2_folder)[2].hash
    file = prepare(gpt2_folder, name)
    text = file.read_text(encoding="utf-8")
    if how == "byte order mark":
        file.write_text(text, encoding="utf-8-sig")
    elif how == "CRLF":
        file.write_text(text.replace(", ", ",\n"), encoding="utf-8", newline="\r\n")
    else:
        file.write_text(text, encoding="utf-16")
    assert gpt2.read(gpt2_folder)[2].hash == expected


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["vocab.json", "no head line", "encoder.json", "tokenizer.json", "no merges.txt"]
)
def test_every_form_of_the_tokenizer_files_is_read_alike(gpt2_folder, form):
    expected, ids = gpt2.read(gpt2_folder)[2], ids_of(gpt2_folder)
    if form == "no head line":
        merges = "\n".join(merges_of(gpt2_folder))
        (gpt2_folder / "merges.txt").write_text(merges, encoding="utf-8")
    elif form == "encoder.json":
        (gpt2_folder / "vocab.json").rename(gpt2_folder / "encoder.json")
        (gpt2_folder / "merges.txt").rename(gpt2_folder / "vocab.bpe")
    elif form == "tokenizer.json":
        tokenizer_json(gpt2_folder)
    elif form == "no merges.txt":  # tokenizer.json holds what the other form lacks
        tokenizer_json(gpt2_folder)
        write_ids(gpt2_folder, ids)
    found = gpt2.read(gpt2_folder)[2]
    assert found.hash == expected.hash
    assert found.encode("hell wx") == [ids["hell"], ids["Ġw"], ids["x"]]
    assert found.decode([ids["<|endoftext|>"]], specials=True) == "<|endoftext|>"


@pytest.mark.parametrize("rows", [261, 262, 320])
@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_rows_without_a_token_are_ids_without_text(gpt2_folder, rows, form):
    """Regression: a padded or extended vocabulary used to be refused.

    Rows are rounded up to a multiple of 64, or added for a [PAD]: what is pretrained stays at its
    ids, and our special tokens come after all rows."""
    exact = gpt2.read(gpt2_folder)[2]
    set_rows(gpt2_folder, rows)
    if rows == 262:
        (gpt2_folder / "added_tokens.json").write_text('{"[PAD]": 261}', encoding="utf-8")
    if form == "tokenizer.json":
        tokenizer_json(gpt2_folder, added_tokens=[{"id": 261, "content": "[PAD]"}])
    config, weights, found = gpt2.read(gpt2_folder)
    assert config.vocab_size == len(weights["wte.weight"]) == found.bos == rows
    assert found.encode(TEXT) == exact.encode(TEXT)
    assert found.decode(found.encode(TEXT)) == TEXT
    surplus = range(261, rows)
    assert found.decode(surplus, specials=True) == ""
    assert (found.hash == exact.hash) == (rows == 261)  # runs of older versions go on


def test_special_tokens_may_come_first_and_have_any_name(gpt2_folder):
    """The tokenizers library gives <s>, <pad>, ... the first ids where they are asked for."""
    ids = ids_of(gpt2_folder)
    first = ["<s>", "<pad>", "[CLS]"]
    moved = {token: i for i, token in enumerate(first)}
    moved |= {token: i + len(first) for token, i in ids.items()}
    write_ids(gpt2_folder, moved)
    set_rows(gpt2_folder, 264)
    found = gpt2.read(gpt2_folder)[2]
    assert found.encode("hell wx") == [ids["hell"] + 3, ids["Ġw"] + 3, ids["x"] + 3]
    assert found.decode(found.encode(TEXT)) == TEXT
    assert found.decode([0, 1, 2]) == "" and found.bos == 264


def test_more_tokens_than_rows(gpt2_folder):
    set_rows(gpt2_folder, 260)
    message = refused(gpt2_folder)
    assert "the tokenizer files make 261 tokens, the weights have 260 rows" in message


def test_vocab_and_merges_that_are_not_of_one_model(gpt2_folder):
    ids, merges = ids_of(gpt2_folder), merges_of(gpt2_folder)

    def why(new_ids: dict[str, object], new_merges: list[str]) -> str:
        write_ids(gpt2_folder, new_ids)
        write_merges(gpt2_folder, new_merges)
        message = refused(gpt2_folder)
        assert "must hold vocab.json and merges.txt of a tokenizer like GPT-2's: " in message
        return message

    swapped = ids | {"he": ids["ll"], "ll": ids["he"]}
    assert "the ids are not in the order of the merges" in why(swapped, merges)
    assert "the ids are not in the order of the merges" in why(ids, [*merges, merges[0]])
    without = {token: i for token, i in ids.items() if token != "Ġw"}
    assert "there is no id of the token 'Ġw'" in why(without, merges)
    assert "no merge makes the token 'Ġw'" in why(ids, merges[:-1])
    assert "two tokens share an id" in why(ids | {"<|endoftext|>": 0}, merges)
    assert "'256', the id of the token 'he', is none" in why(ids | {"he": "256"}, merges)
    assert "there is no id of the token '!'" in why({"a": 0, "b": 1, "ab": 2}, ["a b"])
    foreign = ids | {"▁x": 261}  # a space as SentencePiece writes it
    assert "the token '▁x' does not spell bytes" in why(foreign, [*merges, "▁ x"])
    (gpt2_folder / "merges.txt").unlink()
    message = refused(gpt2_folder)
    assert "must hold vocab.json and merges.txt" in message
    assert message.endswith("No such file: merges.txt")


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "tokenizer.model"])
def test_a_vocabulary_of_another_kind_is_named(gpt2_folder, name):
    """Regression: with BERT's vocab.txt the message used to be that a download had failed."""
    for file in ("vocab.json", "merges.txt"):
        (gpt2_folder / file).unlink()
    (gpt2_folder / name).write_text("[PAD]\n[UNK]\n一\n", encoding="utf-8")
    message = refused(gpt2_folder)
    kind = "BERT-like" if name == "vocab.txt" else "SentencePiece"
    assert message.startswith(f"{gpt2_folder / name} is a {kind} vocabulary")
    assert "vocab.json and merges.txt" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "WordPiece", "vocab": {"[PAD]": 0}}},
        {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0]]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        {"normalizer": {"type": "Lowercase"}},
    ],
    ids=["WordPiece", "Unigram", "Sequence", "Lowercase"],
)
def test_a_tokenizer_json_of_another_kind_is_named(gpt2_folder, changes, request):
    """It would give other ids than in training, and nobody would see it."""
    tokenizer_json(gpt2_folder, **changes)
    message = refused(gpt2_folder)
    assert "tokenizer.json is another kind of tokenizer" in message
    assert request.node.callspec.id in message


@pytest.mark.parametrize("content", [{}, {"model": 3}, {"model": {"vocab": [], "merges": []}}])
def test_a_tokenizer_json_of_no_kind(gpt2_folder, content):
    tokenizer_json(gpt2_folder)
    (gpt2_folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert "must hold tokenizer.json of a tokenizer like GPT-2's" in refused(gpt2_folder)


def test_a_folder_without_a_tokenizer(gpt2_folder, monkeypatch):
    """GPT-2's own is meant where the rows are enough for it; otherwise nothing is downloaded."""
    ids, whole = ids_of(gpt2_folder), gpt2.read(gpt2_folder)[2]
    for name in ("vocab.json", "merges.txt"):
        (gpt2_folder / name).unlink()

    def offline(name: str) -> Tokenizer:
        raise UserError("no network")

    def never(name: str) -> Tokenizer:
        raise AssertionError("a download that cannot help")

    monkeypatch.setattr(gpt2, "named", never)
    assert "has no tokenizer: put vocab.json and merges.txt (or tokenizer.json)" in refused(
        gpt2_folder
    )
    monkeypatch.setattr(gpt2, "PUBLISHED_ROWS", len(ids))
    monkeypatch.setattr(gpt2, "named", offline)
    message = refused(gpt2_folder)
    assert "GPT-2's own could not be downloaded: put vocab.json and merges.txt" in message
    # one of so many tokens, <|endoftext|> among them, stands for it
    published = Tokenizer("gpt2", gpt2.r50k_pat_str, list(ranks(whole)), {"<|endoftext|>": 260})
    monkeypatch.setattr(gpt2, "named", {"gpt2": published}.__getitem__)
    assert gpt2.read(gpt2_folder)[2].hash == whole.hash
    set_rows(gpt2_folder, 320)
    assert gpt2.read(gpt2_folder)[2].bos == 320


def ranks(tokenizer: Tokenizer) -> list[bytes]:
    spelled = tokenizer.encoding._mergeable_ranks
    assert sorted(spelled.values()) == list(range(len(STAND_INS) + 4))
    return sorted(spelled, key=spelled.__getitem__)


def test_the_real_files_under_both_names(tmp_path):
    if not GPT2_FILES.is_dir():
        pytest.skip(f"no GPT-2 files at {GPT2_FILES}: set SMALLGPT_DATA")
    for name, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(GPT2_FILES / name, tmp_path / theirs)
    found = gpt2.tokenizer_of(tmp_path, 50257)
    assert found.hash == gpt2.tokenizer_of(GPT2_FILES).hash
    assert (found.vocab_size, found.bos) == (50263, 50257)
    assert found.encode("Hello world") == [15496, 995]
    padded = gpt2.tokenizer_of(tmp_path, 50304)  # as nanoGPT pads it
    assert padded.encode("Hello world") == [15496, 995] and padded.bos == 50304
