"""Trunks from every kind of place: the numbers and ids of there, and what they were trained on."""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, GPTClassifier, GPTConfig
from smallgpt import tokenizer
from smallgpt.console import UserError
from smallgpt.parallel.strategy import Single
from smallgpt.parallel.world import World
from smallgpt.runs import checkpoint
from smallgpt.weights import pretrained
from smallgpt.weights.pretrained import Trunk, load_trunk, open_model, open_trunk

torch.set_num_threads(1)


def alone(model: torch.nn.Module) -> Single:
    """The strategy of one process."""
    return Single(model, World(0, 1, torch.device("cpu")), torch.float32)


def ours(trunk: Trunk) -> GPT:
    """The model of a trunk; every parameter must come from it."""
    model = GPT(trunk.config)
    missing, unexpected = model.load_state_dict(trunk.weights, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_weights else set()
    assert not unexpected and set(missing) <= tied
    assert all(w.dtype == torch.float32 for w in trunk.weights.values())
    return model.eval()


def some_ids(vocab: int, length: int = 24) -> Tensor:
    return torch.randint(vocab, (3, length), generator=torch.Generator().manual_seed(1))


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), (a - b).abs().max()


# --- growing --------------------------------------------------------------------------------------


@torch.no_grad()
def test_growth_keeps_the_old_rows_and_what_the_model_says_of_them(gpt2_folder):
    trunk = open_trunk(str(gpt2_folder))
    rows = trunk.tokenizer.vocab_size
    assert rows == trunk.rows + 6  # our special tokens
    torch.manual_seed(0)
    grown = GPT(dataclasses.replace(trunk.config, vocab_size=rows))
    load_trunk(grown, trunk)
    assert grown.wte.weight[: trunk.rows].equal(trunk.weights["wte.weight"])
    assert 0.005 < grown.wte.weight[trunk.rows :].std() < 0.05
    others = [name for name in trunk.weights if name != "wte.weight"]
    assert all(grown.get_parameter(name).equal(trunk.weights[name]) for name in others)
    idx = some_ids(trunk.rows)
    assert_close(grown.eval()(idx)[..., : trunk.rows], ours(trunk)(idx), 1e-6)


@torch.no_grad()
def test_an_untied_head_grows_with_the_embedding(gpt2_folder):
    """Its new rows would be those of another initialisation, or missing."""
    trunk = open_trunk(str(gpt2_folder))
    head = torch.ones_like(trunk.weights["wte.weight"])
    trunk = dataclasses.replace(trunk, weights={**trunk.weights, "lm_head.weight": head})
    shape = dataclasses.replace(trunk.config, tie_weights=False, vocab_size=trunk.rows + 50)
    grown = GPT(shape)
    load_trunk(grown, trunk, std=0.5)
    new = [table[trunk.rows :] for table in (grown.wte.weight, grown.lm_head.weight)]
    assert all(abs(float(rows.std()) - 0.5) < 0.05 for rows in new)
    assert not new[0].equal(new[1])
    assert grown.lm_head.weight[: trunk.rows].equal(head)


# --- GPT-2, in a folder or on the hub -------------------------------------------------------------


def test_a_folder_with_gpt2(gpt2_folder):
    trunk = open_trunk(str(gpt2_folder))
    name = str(gpt2_folder)
    assert (trunk.name, trunk.rows, trunk.tokenizer.bos) == (name, 261, 261)
    assert (trunk.config.vocab_size, trunk.config.block_size) == (261, 24)
    assert trunk.sources == [{"kind": "unknown", "name": f"the text of {name}"}]
    assert trunk.notes == []


def test_rows_that_stand_for_no_token_are_said(gpt2_folder):
    """A vocabulary that is too short for its weights must not go unnoticed."""
    config = json.loads((gpt2_folder / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] = 320
    (gpt2_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    file = gpt2_folder / "model.safetensors"
    tensors = load_file(file)
    wte = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = torch.cat([wte, torch.zeros(59, 32)])
    save_file(tensors, file)
    trunk = open_trunk(str(gpt2_folder))
    assert trunk.rows == 320
    assert trunk.notes == [f"59 of the 320 rows of {gpt2_folder} stand for no token"]


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
    for word in (*pretrained.HUB_FILES, "https://huggingface.co/openai-community/gpt2-medium"):
        assert word in str(caught.value)


@pytest.mark.parametrize("path", ["gpt2", "openai-community/gpt2"])
def test_what_the_hub_has_cached_is_opened(offline, gpt2_folder, path):
    cached = offline / "models--openai-community--gpt2"
    shutil.copytree(gpt2_folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc", encoding="utf-8")
    trunk = open_trunk(path)
    assert trunk.name == "gpt2"
    assert trunk.sources == [{"kind": "unknown", "name": "the text of gpt2"}]
    folder = open_trunk(str(gpt2_folder))
    assert trunk.weights["wte.weight"].equal(folder.weights["wte.weight"])


def test_nothing_there(tmp_path):
    for path in ("gpt3", str(tmp_path / "absent"), ""):
        with pytest.raises(UserError, match="there is no (trunk|checkpoint)"):
            open_trunk(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        open_trunk(str(tmp_path))


def test_one_file_of_a_model(gpt2_folder):
    """Its weights alone have no tokenizer: it used to be called damaged."""
    with pytest.raises(UserError, match=f"give the folder that holds it, {gpt2_folder}$"):
        open_trunk(str(gpt2_folder / "model.safetensors"))


def test_the_digest_is_of_the_weights(gpt2_folder):
    copy = shutil.copytree(gpt2_folder, gpt2_folder.with_name("copy"))
    found = pretrained.digest(str(gpt2_folder))
    assert found and found == pretrained.digest(str(copy))
    tensors = load_file(copy / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] += 1e-3
    save_file(tensors, copy / "model.safetensors")
    pretrained.digest.cache_clear()
    assert found != pretrained.digest(str(copy))
    assert pretrained.digest(str(gpt2_folder / "absent")) == ""


# --- CJL196/small-gpt -----------------------------------------------------------------------------

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
    """Exactly so with our GELU; with its own, the exact one, within their difference."""
    beside(tmp_path)
    idx = some_ids(3 + len(CHARS), 16)
    for gelu, tolerance in (("tanh", 1e-5), ("none", 2e-3)):
        ancestor = Ancestor(bias, gelu)
        trunk = open_trunk(str(ancestor.save(tmp_path / "cpt90M.pth", prefix)))
        assert_close(ours(trunk)(idx), ancestor(idx), tolerance)
    assert trunk.name.endswith("cpt90M.pth")


def test_the_source_of_small_gpt_is_the_text_beside_it(tmp_path, monkeypatch):
    """Its path is absolute: a run that begins here is tested for leaks from another folder."""
    Ancestor().save(tmp_path / "cpt90M.pth")
    beside(tmp_path)
    monkeypatch.chdir(tmp_path)
    sha256 = hashlib.sha256(TEXT.encode("utf-8")).hexdigest()
    path = str(tmp_path / "train.txt")
    expected = {"kind": "text", "path": path, "weight": 1.0, "sha256": sha256}
    assert open_trunk("cpt90M.pth").sources == [expected]


def test_small_gpt_is_not_unpickled(tmp_path, evil):
    torch.save({"state_dict": {}, "evil": evil}, tmp_path / "cpt.pth")
    with pytest.raises(UserError, match="cpt.pth is damaged, or holds more than tensors"):
        open_trunk(str(tmp_path / "cpt.pth"))
    assert not evil.folder.exists()
    torch.load(tmp_path / "cpt.pth", weights_only=False)
    assert evil.folder.exists()  # so it would have been run


@pytest.mark.parametrize("name", ["cpt90M.pth", "train.txt"])
def test_a_pointer_of_git_lfs_beside_or_instead_of_small_gpt(tmp_path, name):
    file = Ancestor().save(tmp_path / "cpt90M.pth")
    beside(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"
    (tmp_path / name).write_text(pointer, encoding="utf-8")
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        open_trunk(str(file))


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
    grown = GPT(dataclasses.replace(trunk.config, vocab_size=found.vocab_size))
    load_trunk(grown, trunk)
    assert grown.wte.weight[: trunk.rows].equal(trunk.weights["wte.weight"])


def test_the_vocabulary_is_that_of_a_counter_over_all_dialogues(tmp_path):
    """The ancestor's way (split, flatten, count, sort), on a text longer than one piece."""
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
    says("blocks.2.norm1.weight is absent")
    wte = torch.zeros(5 + len(CHARS), 24)  # its classifier has <start>, <extract> and two classes
    classifier = Ancestor()
    classifier.w |= {"transformer.wte.weight": wte, "lm_head.weight": torch.zeros(2, 24)}
    classifier.save(file)
    says("wte.weight is")
    torch.save({"wte.weight": torch.zeros(2, 2)}, file)
    says("is no checkpoint of small-gpt, it has no state_dict")
    torch.save([1, 2], file)
    says("damaged, or holds more")


# --- runs of train.py -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(run, tiny, tmp_path_factory) -> Path:
    """A run of train.py."""
    out = tmp_path_factory.mktemp("runs")
    result = run("train", tiny(out, run="first", max_steps=4, prompts="[]"))
    assert result.status == 0, result.err
    return out / "first"


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def change_meta(run: Path, **changes: object) -> None:
    """Other facts in the meta.json of a run's checkpoint; None takes one away."""
    file = run / "step-00000004" / "meta.json"
    meta = json.loads(file.read_text(encoding="utf-8")) | changes
    meta = {key: value for key, value in meta.items() if value is not None}
    file.write_text(json.dumps(meta), encoding="utf-8")


@torch.no_grad()
def test_a_run_folder_and_a_step_folder(trained):
    trunk, step = open_trunk(str(trained)), open_trunk(str(trained / "step-00000004"))
    found, model, its_tokenizer = open_model(trained)
    idx = some_ids(its_tokenizer.vocab_size)
    expected = model.eval()(idx)
    assert ours(trunk)(idx).equal(expected) and ours(step)(idx).equal(expected)
    assert trunk.name == step.name == str(found.path) == str(trained / "step-00000004")
    assert trunk.rows == trunk.config.vocab_size == found.meta["model"]["vocab_size"]
    assert trunk.tokenizer.hash == its_tokenizer.hash and trunk.rows >= its_tokenizer.vocab_size


def test_the_sources_of_a_run_are_those_of_its_checkpoint(copied):
    """Facts with hashes, as they were at training; another run's YAML is not read for them."""
    sources = [
        {"kind": "text", "path": "/gone/chat.txt", "weight": 2.0, "sha256": "ab"},
        {"kind": "set", "settings": {"set": "csv", "path": "/my.csv"}, "fingerprint": "cd"},
        {"kind": "unknown", "name": "the text of gpt2"},
    ]
    change_meta(copied, sources=sources)
    for path in (copied, copied / "step-00000004"):
        assert open_trunk(str(path)).sources == sources
    change_meta(copied, sources=[])
    assert open_trunk(str(copied)).sources == []
    change_meta(copied, sources=None)  # as an older version wrote it
    unknown = {"kind": "unknown", "name": f"the text of {copied}"}
    assert open_trunk(str(copied)).sources == [unknown]
    (copied / "config.yaml").write_text("data: [", encoding="utf-8")
    assert open_trunk(str(copied)).sources == [unknown]


@torch.no_grad()
def test_a_classifier_gives_its_trunk(trained, tmp_path):
    """Fine-tuning can go on from a fine-tuned one: its trunk is kept, its head is left."""
    trunk = open_trunk(str(trained))
    head = {"labels": ["0", "1"], "rows": 100}
    meta = {
        "step": 7,
        "model": dataclasses.asdict(trunk.config),
        "tokenizer": trunk.tokenizer.hash,
        "head": head,
    }
    classifier = GPTClassifier(ours(trunk), 2)
    strategy = alone(classifier)
    checkpoint.Saver(tmp_path, strategy.world, keep=1).save(strategy, [], meta)
    trunk.tokenizer.save(tmp_path / "tokenizer.json")
    again = open_trunk(str(tmp_path))
    assert again.weights.keys() == trunk.weights.keys()
    assert all(again.weights[name].equal(trunk.weights[name]) for name in trunk.weights)
    # of the trunk before it, not of the classifier: the others never saw pretraining
    assert again.rows == 100
    assert again.config == trunk.config and again.name == str(tmp_path / "step-00000007")
    with pytest.raises(UserError, match="is a classifier: use it with python scripts/classify.py"):
        open_model(tmp_path)


def test_damaged_runs(copied, tmp_path):
    shutil.copy(copied / "tokenizer.json", tmp_path / "good.json")
    other = tokenizer.train(tokenizer.TokenizerSettings("char"), ["other"])
    other.save(copied / "tokenizer.json")
    for opener in (open_trunk, open_model):
        with pytest.raises(UserError, match="is not the tokenizer that"):
            opener(str(copied))
    shutil.copy(tmp_path / "good.json", copied / "tokenizer.json")
    meta = json.loads((copied / "step-00000004" / "meta.json").read_text(encoding="utf-8"))
    change_meta(copied, model=meta["model"] | {"n_layer": 2})
    with pytest.raises(UserError, match="blocks.1.norm1.weight is absent"):
        open_trunk(str(copied))
    change_meta(copied, model=meta["model"] | {"of_a_later_version": 2})
    for opener in (open_trunk, open_model):
        with pytest.raises(UserError, match="another version of this program"):
            opener(str(copied))
    (copied / "step-00000004" / "meta.json").unlink()
    with pytest.raises(UserError, match="no meta.json"):
        open_trunk(str(copied / "step-00000004"))


@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_head_is_part_of_a_trunk(trained, tmp_path, tied):
    config = dataclasses.replace(open_trunk(str(trained)).config, tie_weights=tied)
    its_tokenizer = open_trunk(str(trained)).tokenizer
    model = GPT(config)
    meta = {"step": 1, "model": dataclasses.asdict(config), "tokenizer": its_tokenizer.hash}
    strategy = alone(model)
    checkpoint.Saver(tmp_path, strategy.world, keep=1).save(strategy, [], meta)
    its_tokenizer.save(tmp_path / "tokenizer.json")
    trunk = open_trunk(str(tmp_path))
    assert ("lm_head.weight" in trunk.weights) == (not tied)
    assert trunk.config == config and isinstance(trunk.config, GPTConfig)
