"""Adapters: what trains is a product of two thin matrices, and what is saved an ordinary
classifier."""

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

import sentiment_train
from fine_tuning import ALONE, CPU, predictions, result_of
from helpers import last_weights, losses, same_weights
from sentiment_train import SentimentSettings, make_classifier, prepare
from smallgpt import load_classifier, settings
from smallgpt.optim import lr_factor
from smallgpt.runs import lora
from smallgpt.runs.metrics import read
from smallgpt.sentiment.batches import Buckets
from smallgpt.weights.pretrained import open_trunk

torch.set_num_threads(1)
RANK = 2
LAYERS = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc", "mlp.proj")


class Product(nn.Module):
    """W + B A by torch's own parametrization, from the same beginning."""

    def __init__(self, a: Tensor, out_features: int):
        super().__init__()
        self.a = nn.Parameter(a.clone())
        self.b = nn.Parameter(a.new_zeros(out_features, RANK))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.b @ self.a


@pytest.fixture
def asked(fine, tmp_path) -> Callable[..., SentimentSettings]:
    return lambda **changes: settings.load(SentimentSettings, fine(tmp_path, **changes))


def test_three_steps_equal_those_of_torchs_parametrization(fit, asked):
    """The factors would get another gradient, rate or decay than W + B A gives them, or what is
    saved would not be that sum."""
    case = dict(lora=RANK, dropout=0.0, dtype="float64", max_steps=3, eval_every=3, pool="mean")
    folder = fit(**case)
    s = asked(**case)
    task = prepare(s, ALONE)
    begun = make_classifier(s, task, CPU).double()
    plain = make_classifier(asked(**case | {"lora": 0}), task, CPU).double()
    plain.requires_grad_(False)
    trained = [plain.head.weight, plain.gpt.norm.weight]
    plain.head.load_state_dict(begun.head.state_dict())
    for block, adapted in zip(plain.gpt.blocks, begun.gpt.blocks, strict=True):
        for name in LAYERS:
            layer = block.get_submodule(name)
            a = adapted.get_submodule(name).lora_a.detach()
            product = Product(a, layer.out_features)
            parametrize.register_parametrization(layer, "weight", product)
            trained += [product.a, product.b]
    for p in trained:
        p.requires_grad_(True)
    matrices = [p for p in trained if p.dim() == 2]
    groups = [
        {"params": matrices, "weight_decay": s.optim.weight_decay},
        {"params": [plain.gpt.norm.weight], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(s.optim.beta1, s.optim.beta2))
    train = task.inputs["train"]
    buckets = Buckets(train.data.lengths, s.batch_size, s.seed)
    for step in range(3):
        rows = buckets.of(step)
        tokens, lengths = train.tokens(rows)
        loss = F.cross_entropy(plain(tokens, lengths), torch.from_numpy(train.data.labels[rows]))
        assert losses(folder, "train")[step + 1] == pytest.approx(float(loss.detach()), rel=1e-9)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, s.optim.clip)
        for group in adamw.param_groups:
            group["lr"] = s.optim.lr * lr_factor(step, 3, s.optim)
        adamw.step()
        adamw.zero_grad()
    saved = last_weights(folder)
    for i in range(2):
        for name in LAYERS:
            wanted = plain.gpt.blocks[i].get_submodule(name).weight
            assert torch.allclose(saved[f"gpt.blocks.{i}.{name}.weight"], wanted, 1e-9, 1e-12)
    assert torch.allclose(saved["head.weight"], plain.head.weight, 1e-9, 1e-12)


@pytest.mark.parametrize("freeze, first", [("none", 0), ("all_but_last:1", 1)])
def test_what_trains_by_name(asked, freeze, first):
    """The embeddings, a norm or a whole matrix would train beside the factors."""
    s = asked(lora=RANK, freeze=freeze)
    model = make_classifier(s, prepare(s, ALONE), CPU)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = [f"gpt.blocks.{i}.{layer}" for i in range(first, 2) for layer in LAYERS]
    factors = [f"{layer}.{factor}" for layer in layers for factor in ("lora_a", "lora_b")]
    assert trained == {"head.weight", "gpt.norm.weight", *factors}
    dropouts = [block.drop.p for block in model.gpt.blocks]
    assert dropouts == [0.0] * first + [0.1] * (2 - first)


@pytest.mark.parametrize("freeze", ["none", "all_but_last:1"])
def test_what_changes_has_the_rank_and_nothing_else_changes(fit, trunk, freeze):
    """A saved classifier had the names of adapters, or its embeddings and norms had moved."""
    folder = fit(lora=RANK, freeze=freeze)
    before, after = open_trunk(str(trunk)).weights, last_weights(folder)
    assert after.keys() == {"head.weight", *(f"gpt.{name}" for name in before)}
    first = 0 if freeze == "none" else 1
    adapted = [f"blocks.{i}.{layer}.weight" for i in range(first, 2) for layer in LAYERS]
    for name in before:
        change = after[f"gpt.{name}"] - before[name]
        if name in adapted:
            assert torch.linalg.matrix_rank(change.double(), atol=1e-5) == RANK, name
        else:
            assert change.any() == (name == "norm.weight"), name
    found = result_of(folder)
    per_block = 2 * (4 * (32 + 32) + 2 * (32 + 128))  # rank 2, 32 wide
    assert found["trainable"] == (2 - first) * per_block + 32 + 2 * 32


def test_resume_is_exact(fit, tmp_path):
    """The factors cannot be told from the merged weights: a run that went on from those alone
    would be another one."""
    case = dict(lora=RANK, save_every=3, keep=9, max_steps=8, dropout=0.1, save="async")
    whole = fit(run="whole", **case)
    part = fit(run="part", resume=whole / "step-00000003", **case)
    again = losses(part, "train")
    assert list(again) == [4, 5, 6, 7, 8]
    assert all(again[step] == losses(whole, "train")[step] for step in again)
    assert same_weights(part, whole)
    assert [r["loss"] for r in read(part, "val")] == [r["loss"] for r in read(whole, "val")]


def test_what_is_saved_is_an_ordinary_classifier(fit):
    """scripts/classify.py gives the report's probabilities, and the run can be a trunk."""
    folder = fit(lora=RANK)
    model = load_classifier(folder, "cpu", "float32")
    rows = predictions(folder)
    found = model.score([row["text"] for row in rows]).exp()[:, model.labels.index("good")]
    assert found.tolist() == pytest.approx([float(row["p_good"]) for row in rows], abs=2e-4)
    again = fit(run="again", trunk=folder, lora=1, max_steps=1)
    assert result_of(again)["trunk"].startswith(str(folder))


def test_merged_weights_give_what_the_factors_gave():
    torch.manual_seed(0)
    layer = nn.Linear(5, 7, dtype=torch.float64)
    model = nn.ModuleList([layer])
    x = torch.randn(3, 5, dtype=torch.float64)
    before = layer(x)
    lora.adapt(model, RANK)
    assert torch.equal(layer(x), before)  # B is 0
    nn.init.normal_(layer.lora_b)
    weights = lora.merged(dict(model.named_parameters()))
    assert weights.keys() == {"0.weight", "0.bias"}
    found = F.linear(x, weights["0.weight"], weights["0.bias"])
    assert torch.allclose(found, layer(x), 1e-12) and not torch.allclose(found, before)


@pytest.mark.parametrize(
    "argument, says",
    [
        ("freeze=trunk", "lora=2 adapts the blocks, and freeze=trunk forbids it"),
        ("mesh.tp=2", "lora=2 must be 0, or mesh.tp=1"),
        ("adversarial=0.1", "adversarial=0.1 must be 0, or freeze=none and lora=0"),
        ("lora=-1", "lora must be int >= 0, not -1"),
    ],
)
def test_mistakes(fine, tmp_path, mistake_of, argument, says):
    message = mistake_of(sentiment_train.main, [*fine(tmp_path, lora=RANK), argument])
    assert says in message and "\n" not in message


def test_another_rank_is_another_run(fit, fine, tmp_path, mistake_of):
    fit(lora=RANK, max_steps=2)
    message = mistake_of(sentiment_train.main, fine(tmp_path, lora=3, max_steps=4))
    assert "lora was 2 and is now 3" in message
