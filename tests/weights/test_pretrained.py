"""Trunks from three kinds of place compute what they computed there, keep their ids, and never run a pickle's code."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import DATA
from model import GPT, GPTClassifier, GPTConfig
from smallgpt import tokenizer
from smallgpt.console import UserError
from smallgpt.parallel.world import World
from smallgpt.runs import checkpoint
from smallgpt.sentiment.sets import ReviewSettings
from smallgpt.tokenizer import STAND_INS
from smallgpt.weights import gpt2
from smallgpt.weights.pretrained import Trunk, corpora, grow, open_trunk

hub = pytest.importorskip("transformers")
torch.set_num_threads(1)

GPT2_FILES = DATA / "tokenizers" / "gpt2"
MERGES = ["h e", "l l", "he ll", "Ġ w"]
IDS = {
    token: i for i, token in enumerate([*STAND_INS, "he", "ll", "hell", "Ġw", "<|endoftext|>"])
}  # 261
SIZES = dict(vocab_size=len(IDS), n_positions=24, n_layer=2, n_head=4, n_embd=32)


class Evil:
    """Unpickled, it makes a folder: the proof that somebody's code was run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Random values everywhere, biases and norms too: a forgotten or swapped tensor cannot hide."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.copy_(0.2 * torch.randn(p.shape) if p.dim() == 2 else p + 0.3 * torch.randn(p.shape))
    return model.eval()


def ours(trunk: Trunk) -> GPT:
    """The model of a trunk; every parameter must come from it."""
    model = GPT(GPTConfig(**trunk.fields))
    missing, unexpected = model.load_state_dict(trunk.weights, strict=False)
    assert not unexpected and set(missing) <= (
        {"lm_head.weight"} if model.config.tie_weights else set()
    )
    assert all(w.dtype == torch.float32 for w in trunk.weights.values())
    return model.eval()


def some_ids(vocab: int, length: int = 24) -> Tensor:
    return torch.randint(vocab, (3, length), generator=torch.Generator().manual_seed(1))


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), (a - b).abs().max()


# --- GPT-2 -----------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps(IDS), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return lively(hub.GPT2LMHeadModel(hub.GPT2Config(**SIZES, attn_implementation="eager")))


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory) -> Path:
    """The folder that save_pretrained writes, with a tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2") / "mine"
    theirs.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "mine"))


def change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")


def as_bin(folder: Path, weights: dict, **how: bool) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", **how)


def old_names(theirs: nn.Module) -> dict[str, Tensor]:
    """As the files of 2019: without `transformer.`, with the masks of attention, without the tied lm_head."""
    weights = {
        n.removeprefix("transformer."): w
        for n, w in theirs.state_dict().items()
        if n != "lm_head.weight"
    }
    for i in range(SIZES["n_layer"]):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return weights


@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "bin", "bin of 2019", "float16"])
def test_gpt2_gives_the_same_logits(folder, theirs, form):
    if form == "bin":
        as_bin(folder, theirs.state_dict())  # with transformer. and lm_head.weight
    elif form == "bin of 2019":
        as_bin(folder, old_names(theirs), _use_new_zipfile_serialization=False)
    elif form == "float16":
        theirs = hub.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float16)
        theirs.save_pretrained(folder)
        theirs = theirs.float().eval()
    trunk = open_trunk(str(folder))
    idx = some_ids(len(IDS))
    assert_close(ours(trunk)(idx), theirs(idx).logits)
    assert (trunk.rows, trunk.fields["vocab_size"], trunk.fields["block_size"]) == (261, 261, 24)
    assert (trunk.name, trunk.corpora, trunk.tokenizer.bos) == (
        str(folder),
        [f"the text of {folder}"],
        261,
    )


@torch.no_grad()
def test_a_classifier_of_hugging_face_goes_on_here(tmp_path):
    config = hub.GPT2Config(**SIZES, num_labels=3, pad_token_id=0)
    theirs = lively(hub.GPT2ForSequenceClassification(config))
    theirs.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    gpt = GPTClassifier(ours(open_trunk(str(tmp_path))), n_classes=3).eval()
    gpt.head.weight.copy_(theirs.score.weight)
    lengths = torch.tensor([24, 5, 1])
    idx = some_ids(len(IDS)).clamp(min=1)
    idx[torch.arange(24) >= lengths[:, None]] = 0
    assert_close(gpt(idx, lengths), theirs(idx).logits)


@torch.no_grad()
def test_growth_keeps_the_old_rows_and_what_the_model_says_of_them(saved):
    trunk = open_trunk(str(saved))
    rows = trunk.tokenizer.vocab_size
    assert rows == trunk.rows + 6  # our special tokens
    before = {name: w.clone() for name, w in trunk.weights.items()}
    torch.manual_seed(0)
    grown = grow(trunk.weights, rows)
    assert grown["wte.weight"].shape == (rows, 32)
    assert grown["wte.weight"][: trunk.rows].equal(before["wte.weight"])
    assert 0.005 < grown["wte.weight"][trunk.rows :].std() < 0.05
    assert trunk.weights.keys() == grown.keys() and all(
        trunk.weights[n].equal(before[n]) for n in before
    )
    idx = some_ids(len(IDS))
    old, new = (
        ours(trunk)(idx),
        ours(trunk._replace(weights=grown, fields=trunk.fields | {"vocab_size": rows}))(idx),
    )
    assert_close(new[..., : trunk.rows], old, 1e-6)
    assert grow(grown, 5)["wte.weight"].equal(grown["wte.weight"])  # never shrinks


def test_an_untied_head_grows_with_the_embedding():
    weights = {
        "wte.weight": torch.ones(4, 2000),
        "lm_head.weight": torch.zeros(4, 2000),
        "norm.weight": torch.ones(3),
    }
    grown = grow(weights, 6, std=0.5)
    for name in ("wte.weight", "lm_head.weight"):
        assert grown[name][:4].equal(weights[name]) and grown[name].shape == (6, 2000)
        assert abs(float(grown[name][4:].std()) - 0.5) < 0.05
    assert not grown["wte.weight"][4:].equal(grown["lm_head.weight"][4:])
    assert grown["norm.weight"] is weights["norm.weight"]


def test_a_pickle_is_refused_unexecuted(folder, theirs, tmp_path):
    ran = tmp_path / "ran"
    for how in (True, False):
        (folder / "model.safetensors").touch()
        as_bin(
            folder, theirs.state_dict() | {"extra": Evil(ran)}, _use_new_zipfile_serialization=how
        )
        with pytest.raises(
            UserError, match="pytorch_model.bin is damaged, or holds more than tensors"
        ):
            open_trunk(str(folder))
    torch.save({"state_dict": {}, "evil": Evil(ran)}, tmp_path / "cpt.pth")
    with pytest.raises(UserError, match="cpt.pth is damaged, or holds more than tensors"):
        open_trunk(str(tmp_path / "cpt.pth"))
    shutil.copy(tmp_path / "cpt.pth", folder / "model.safetensors")
    with pytest.raises(UserError, match="does not hold valid safetensors"):
        open_trunk(str(folder))
    assert not ran.exists()
    torch.load(tmp_path / "cpt.pth", weights_only=False)
    assert ran.exists()  # so it would have been run


@pytest.mark.parametrize(
    "field",
    [
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 100},
        {"model_type": "gpt_neo"},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
    ],
    ids=lambda field: "=".join(map(str, *field.items())),
)
def test_a_gpt2_of_another_form_is_refused_by_the_name_of_the_field(folder, field):
    change(folder, **field)
    with pytest.raises(UserError, match=f"config.json: {next(iter(field))} is "):
        open_trunk(str(folder))


def test_what_is_said_in_other_words_is_the_same_form(folder):
    change(folder, activation_function="gelu_pytorch_tanh", n_inner=128)
    assert open_trunk(str(folder)).rows == 261


def test_missing_and_damaged_files_of_gpt2(folder):
    weights = load_file(folder / "model.safetensors")

    def says(what: str) -> None:
        with pytest.raises(UserError, match=what):
            open_trunk(str(folder))

    name = "transformer.h.1.mlp.c_fc.bias"
    save_file({n: w for n, w in weights.items() if n != name}, folder / "model.safetensors")
    says(r"blocks.1.mlp.fc.bias is absent, and should be \(128,\)")
    save_file(
        weights | {"transformer.wpe.weight": torch.zeros(23, 32)}, folder / "model.safetensors"
    )
    says(r"wpe.weight is \(23, 32\), and should be \(24, 32\)")
    change(folder, n_layer=1)
    save_file(weights, folder / "model.safetensors")
    says(r"blocks.1.attn.k.bias is \(32,\), and should be absent")
    (folder / "model.safetensors").write_bytes(b"half a file")
    says("does not hold valid safetensors")
    (folder / "model.safetensors").unlink()
    says("no weights: put model.safetensors or pytorch_model.bin there")
    (folder / "pytorch_model.bin").write_bytes(b"half a file")
    says("pytorch_model.bin is damaged")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    says("config.json must be the config of a GPT-2: KeyError 'vocab_size'")
    (folder / "config.json").unlink()
    says("config.json must be the config of a GPT-2: FileNotFoundError")


# --- tokenizers of GPT-2 ---------------------------------------------------------------------------------------------


def tokenizer_json() -> str:
    """What transformers 5 saves alone."""
    import tokenizers

    pairs = [tuple(merge.split()) for merge in MERGES]
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocab=IDS, merges=pairs)).to_str()


@pytest.mark.parametrize("form", ["vocab.json", "no head line", "encoder.json", "tokenizer.json"])
def test_every_form_of_the_tokenizer_files_is_read_alike(folder, form):
    if form == "no head line":
        (folder / "merges.txt").write_text("\n".join(MERGES), encoding="utf-8")
    elif form == "encoder.json":
        (folder / "vocab.json").rename(folder / "encoder.json")
        (folder / "merges.txt").rename(folder / "vocab.bpe")
    elif form == "tokenizer.json":
        (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    found = open_trunk(str(folder)).tokenizer
    assert found.encode("hell wx") == [IDS["hell"], IDS["Ġw"], IDS["x"]]
    assert found.decode([IDS["<|endoftext|>"]], specials=True) == "<|endoftext|>"


def test_a_tokenizer_of_another_kind_or_size_is_refused(folder, monkeypatch):
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match="must hold vocab.json and merges.txt.*merges.txt"):
        open_trunk(str(folder))
    write_tokenizer(folder)
    (folder / "vocab.json").write_text(
        json.dumps(IDS | {"he": IDS["ll"], "ll": IDS["he"]}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="ids are not in the order"):
        open_trunk(str(folder))
    (folder / "merges.txt").write_text("\n".join(MERGES[:-1]), encoding="utf-8")
    shorter = [token for token in IDS if token != "Ġw"]
    (folder / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(shorter)}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="260 tokens, the weights have 261 rows"):
        open_trunk(str(folder))
    for file in ("vocab.json", "merges.txt"):
        (folder / file).unlink()
    char = tokenizer.train(tokenizer.TokenizerSettings("char"), ["no network in a test"])
    monkeypatch.setattr("smallgpt.weights.gpt2.named", {"gpt2": char}.__getitem__)
    with pytest.raises(UserError, match="256 tokens, the weights have 261 rows"):
        open_trunk(str(folder))


def test_the_real_files_under_both_names(tmp_path):
    if not GPT2_FILES.is_dir():
        pytest.skip(f"no GPT-2 files at {GPT2_FILES}: set SMALLGPT_DATA")
    config = hub.GPT2Config(n_positions=8, n_layer=1, n_head=1, n_embd=2)
    hub.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(GPT2_FILES / name, tmp_path / theirs)
    trunk = open_trunk(str(tmp_path))
    assert trunk.tokenizer.hash == gpt2.tokenizer_of(GPT2_FILES).hash
    assert (trunk.rows, trunk.tokenizer.vocab_size, trunk.tokenizer.bos) == (50257, 50263, 50257)
    assert trunk.tokenizer.encode("Hello world") == [15496, 995]


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """Hugging Face's cache, in a process that has no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_without_network_the_user_learns_which_files_to_put_where(offline):
    with pytest.raises(UserError) as caught:
        open_trunk("gpt2-medium")
    for word in (
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
        "openai-community/gpt2-medium",
    ):
        assert word in str(caught.value)


def test_what_the_hub_has_cached_is_opened(offline, saved):
    cached = offline / "models--openai-community--gpt2"
    shutil.copytree(saved, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc", encoding="utf-8")
    trunk = open_trunk("gpt2")
    assert trunk.name == "gpt2" and trunk.weights["wte.weight"].equal(
        open_trunk(str(saved)).weights["wte.weight"]
    )


def test_nothing_there(tmp_path):
    for path in ("gpt3", str(tmp_path / "absent"), ""):
        with pytest.raises(UserError, match="there is no (trunk|checkpoint)"):
            open_trunk(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        open_trunk(str(tmp_path))


# --- CJL196/small-gpt ------------------------------------------------------------------------------------------------

TEXT = "你好\n好呀ab\n\nab你\ufeff好😀\n\n\n好。"
CHARS = (
    "好你ab呀\ufeff😀。"  # by frequency (4, 2, 2, 2, then once each), equals by first occurrence
)


class Ancestor:
    """small-gpt's forward pass, written anew as plain functions of its state_dict."""

    def __init__(
        self,
        bias: bool = True,
        gelu: str = "none",
        vocab: int = 3 + len(CHARS),
        T: int = 16,
        C: int = 24,
    ):
        self.meta = dict(block_size=T, vocab_size=vocab, n_layer=2, n_head=3, n_embd=C, bias=bias)
        self.gelu, draw, w = gelu, torch.Generator().manual_seed(0), {}

        def linear(name: str, n_out: int, n_in: int) -> None:
            w[f"{name}.weight"] = 0.2 * torch.randn(n_out, n_in, generator=draw)
            if bias:
                w[f"{name}.bias"] = 0.3 * torch.randn(n_out, generator=draw)

        def norm(name: str) -> None:
            w[f"{name}.weight"] = 1 + 0.3 * torch.randn(C, generator=draw)
            if bias:
                w[f"{name}.bias"] = 0.3 * torch.randn(C, generator=draw)

        for i in range(2):
            at = f"transformer.h.{i}"
            norm(f"{at}.ln1"), norm(f"{at}.ln2")
            for part in ("W_q", "W_k", "W_v", "out_net"):
                linear(f"{at}.attention.{part}", C, C)
            w[f"{at}.attention.attention.mask"] = torch.ones(1, T, T).tril()
            linear(f"{at}.ffn.dense1", 4 * C, C), linear(f"{at}.ffn.out_net", C, 4 * C)
        norm("transformer.ln_f")
        w["transformer.wte.weight"] = 0.2 * torch.randn(vocab, C, generator=draw)
        w["transformer.wpe.weight"] = 0.2 * torch.randn(T, C, generator=draw)
        w["lm_head.weight"] = w["transformer.wte.weight"]
        self.w = w

    def save(self, file: Path, prefix: str = "", **changes: object) -> Path:
        """With the optimizer beside the weights, as its training writes it."""
        state = {prefix + name: w for name, w in self.w.items()}
        optimizer = {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 1e-3, "params": [0]}],
        }
        torch.save(
            {
                "global_step": 3,
                "global_epoch": 0,
                "dataset": "data/train.txt",
                "state_dict": state,
                "optimizer": optimizer,
                **self.meta,
                **changes,
            },
            file,
        )
        return file

    def __call__(self, idx: Tensor) -> Tensor:
        w, T, C = self.w, idx.size(1), self.meta["n_embd"]

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, (C,), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

        x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
        for i in range(2):
            at = f"transformer.h.{i}"
            h = norm(x, f"{at}.ln1")
            q, k, v = (
                linear(h, f"{at}.attention.W_{name}").unflatten(-1, (3, -1)) for name in "qkv"
            )  # (B, T, H, D)
            scores = torch.einsum("bthd,bshd->bhts", q, k) / (C // 3) ** 0.5
            scores = scores.masked_fill(
                w[f"{at}.attention.attention.mask"][:, :T, :T] == 0, float("-inf")
            )
            h = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
            x = x + linear(h, f"{at}.attention.out_net")
            h = F.gelu(linear(norm(x, f"{at}.ln2"), f"{at}.ffn.dense1"), approximate=self.gelu)
            x = x + linear(h, f"{at}.ffn.out_net")
        return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def beside(folder: Path, text: str = TEXT, name: str = "train.txt") -> None:
    (folder / name).write_text(text, encoding="utf-8", newline="")


@torch.no_grad()
@pytest.mark.parametrize(("bias", "prefix"), [(True, "_orig_mod."), (False, "")])
def test_small_gpt_gives_the_same_logits(tmp_path, bias, prefix):
    """Exactly so with our GELU; with its own, the exact one, within what the two forms differ by."""
    beside(tmp_path)
    idx = some_ids(3 + len(CHARS), 16)
    for gelu, tolerance in (("tanh", 1e-5), ("none", 2e-3)):
        ancestor = Ancestor(bias, gelu)
        trunk = open_trunk(str(ancestor.save(tmp_path / "cpt90M.pth", prefix)))
        assert_close(ours(trunk)(idx), ancestor(idx), tolerance)
    assert trunk.name.endswith("cpt90M.pth") and trunk.corpora == [str(tmp_path / "train.txt")]


def test_small_gpt_keeps_its_ids(tmp_path):
    Ancestor().save(tmp_path / "cpt90M.pth")
    beside(tmp_path, TEXT.replace("\n", "\r\n"))  # as a download on Windows may leave it
    trunk = open_trunk(str(tmp_path / "cpt90M.pth"))
    found = trunk.tokenizer
    assert found.encode(CHARS) == list(range(3, 3 + len(CHARS)))
    assert (found.sep, found.pad, trunk.rows) == (1, 2, 3 + len(CHARS))
    for text in (
        "没见过 xyz\n你好",
        "\x00😁é",
    ):  # characters it never saw are spelled in new ids, and come back
        assert found.decode(found.encode(text)) == text
        assert all(i >= trunk.rows for c in text for i in found.encode(c) if c not in CHARS)
    new = {found.bos, found.end, found.cls, found.pair}
    assert len(new) == 4 and all(i >= trunk.rows for i in new)
    grown = grow(trunk.weights, found.vocab_size)
    assert grown["wte.weight"][: trunk.rows].equal(trunk.weights["wte.weight"])


def test_the_vocabulary_is_that_of_a_counter_over_all_dialogues(tmp_path):
    """The ancestor's way, on a text longer than a piece that is read at a time: split, flatten, count, sort."""
    rng = torch.Generator().manual_seed(3)
    numbers = torch.randint(600, (1 << 13,), generator=rng).tolist()
    letters = [chr(0x4E00 + i**2 // 500) for i in numbers]
    text = "".join(
        "\n" if i % 11 == 0 else "\n\n" if i % 37 == 0 else c for i, c in enumerate(letters)
    )
    text = text * 150 + "龙虎虎"
    beside(tmp_path, text, "corpus.txt")
    counts = Counter(c for dialogue in text.split("\n\n") for c in dialogue if c != "\n")
    expected = [c for c, _ in sorted(counts.items(), key=lambda item: item[1], reverse=True)]
    Ancestor(vocab=3 + len(expected), C=3).save(tmp_path / "x.pth")
    assert len(text) > 1 << 20
    assert open_trunk(str(tmp_path / "x.pth")).tokenizer.encode("".join(expected)) == list(
        range(3, 3 + len(expected))
    )


def test_small_gpt_without_its_corpus_or_with_another(tmp_path):
    file = Ancestor().save(tmp_path / "cpt90M.pth")

    def says(what: str) -> None:
        with pytest.raises(UserError, match=what):
            open_trunk(str(file))

    says("put the text it was trained on beside it, as train.txt")
    beside(tmp_path, TEXT + "新")
    says("9 different characters and should have 8")
    beside(tmp_path, TEXT[:-1])  # a download that was cut short
    says("7 different characters and should have 8")
    (tmp_path / "train.txt").write_bytes(TEXT.encode("gb18030"))
    says("different characters and should have 8")
    beside(tmp_path)
    open_trunk(str(file))
    Ancestor().save(file, n_layer=3)
    says("blocks.2.attn.k.bias is absent")
    wte = torch.zeros(5 + len(CHARS), 24)  # its classifier has <start>, <extract> and two classes
    classifier = Ancestor()
    classifier.w |= {"transformer.wte.weight": wte, "lm_head.weight": torch.zeros(2, 24)}
    classifier.save(file)
    says("wte.weight is")
    torch.save({"wte.weight": torch.zeros(2, 2)}, file)
    says("is no checkpoint of small-gpt, it has no state_dict")
    torch.save([1, 2], file)
    says("damaged, or holds more")


# --- runs of train.py ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(run, tiny, chat_file, tmp_path_factory) -> Path:
    """A run, and one that goes on from it with another corpus."""
    out = tmp_path_factory.mktemp("runs")
    (out / "more.txt").write_text(
        chat_file.read_text(encoding="utf-8").replace("is", "seems"), encoding="utf-8"
    )
    short = dict(max_steps=4, prompts="[]")
    first = run("train", tiny(out, run="first", **short))
    second = run(
        "train",
        tiny(out, run="second", init_from=out / "first", data__path=f"{out}/more*@2", **short),
    )
    assert first.status == second.status == 0, first.err + second.err
    return out


@torch.no_grad()
def test_a_run_folder_and_a_step_folder(runs, chat_file):
    trunk, step = open_trunk(str(runs / "first")), open_trunk(str(runs / "first" / "step-00000004"))
    found, model, tok = checkpoint.open_model(runs / "first", GPT, GPTConfig)
    idx = some_ids(tok.vocab_size)
    assert ours(trunk)(idx).equal(model.eval()(idx)) and ours(step)(idx).equal(model(idx))
    assert trunk.name == step.name == str(found.path) and trunk.name.endswith("first/step-00000004")
    assert trunk.rows == trunk.fields["vocab_size"] == found.meta["model"]["vocab_size"]
    assert set(trunk.fields) == {f.name for f in dataclasses.fields(GPTConfig)}
    assert trunk.tokenizer.hash == tok.hash and trunk.rows >= tok.vocab_size
    assert trunk.corpora == step.corpora == [str(chat_file)]


def test_corpora_follow_where_a_run_began(runs, chat_file):
    assert open_trunk(str(runs / "second")).corpora == [str(runs / "more.txt"), str(chat_file)]


def test_corpora_of_broken_chains(tmp_path):
    def config(name: str, text: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").write_text(text, encoding="utf-8")

    a, b = tmp_path / "a", tmp_path / "b"
    config(
        "a",
        f"data: {{path: [gone.txt@1e-1, a@home.txt, {tmp_path}/x*]}}\ninit_from: {b}/step-00000007\n",
    )
    config("b", f"data: {{path: gone.txt}}\ninit_from: {a}\n")
    config("classifier", f"data: {{path: labelled.csv}}\ntrunk: {b}\n")
    (tmp_path / "x1").touch(), (tmp_path / "x2").mkdir()
    assert corpora(str(a)) == [
        "gone.txt",
        "a@home.txt",
        str(tmp_path / "x1"),
    ]  # a circle, and a file that is not there
    assert corpora(f"{a}/step-00000001") == corpora(str(a))
    labelled = ReviewSettings(path="labelled.csv")
    assert corpora(str(tmp_path / "classifier")) == [
        labelled,
        *corpora(str(b)),
    ] and "gone.txt" in corpora(str(b))
    config("classifier", f"data: {{path: labelled.csv, from_a_later_version: 1}}\ntrunk: {b}\n")
    assert corpora(str(tmp_path / "classifier")) == [labelled, *corpora(str(b))], (
        "the search went no further"
    )
    config("b", "data: [")
    # what was read there is not known any more: a report must not say that all was searched
    assert corpora(str(a)) == [
        "gone.txt",
        "a@home.txt",
        str(tmp_path / "x1"),
        f"the text of {b}/step-00000007",
    ]
    shutil.rmtree(b)
    assert corpora(str(a))[0] == "gone.txt" and corpora(str(b)) == [f"the text of {b}"]
    config("classifier", "trunk: gpt2\ndata: {path: labelled.csv}\n")
    assert corpora(str(tmp_path / "classifier")) == [labelled, "the text of gpt2"]


@torch.no_grad()
def test_a_classifier_gives_its_trunk(runs, tmp_path):
    """Fine-tuning can go on from a fine-tuned one: its trunk is kept, its head is left."""
    trunk = open_trunk(str(runs / "first"))
    head = {"labels": ["0", "1"], "rows": 100}
    meta = {"step": 7, "model": trunk.fields, "tokenizer": trunk.tokenizer.hash, "head": head}
    checkpoint.save(
        tmp_path, GPTClassifier(ours(trunk), 2), [], meta, World(0, 1, torch.device("cpu")), keep=1
    )
    trunk.tokenizer.save(tmp_path / "tokenizer.json")
    again = open_trunk(str(tmp_path))
    assert again.weights.keys() == trunk.weights.keys()
    assert all(again.weights[n].equal(trunk.weights[n]) for n in trunk.weights)
    assert (
        again.rows == 100
    )  # of the trunk before it, not of the classifier: the others never saw pretraining
    assert again.fields == trunk.fields and again.name == str(tmp_path / "step-00000007")


def test_damaged_runs(runs, tmp_path):
    copy = shutil.copytree(runs / "first", tmp_path / "copy")
    shutil.copy(tmp_path / "copy" / "tokenizer.json", tmp_path / "good.json")
    tokenizer.train(tokenizer.TokenizerSettings("char"), ["other"]).save(copy / "tokenizer.json")
    with pytest.raises(UserError, match="is not the tokenizer that"):
        open_trunk(str(copy))
    shutil.copy(tmp_path / "good.json", copy / "tokenizer.json")
    (copy / "step-00000004" / "meta.json").unlink()
    with pytest.raises(UserError, match="no meta.json"):
        open_trunk(str(copy / "step-00000004"))
