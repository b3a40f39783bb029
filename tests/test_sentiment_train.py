"""sentiment_train.py: what trains, what a batch and its loss are, which checkpoint is chosen, what
the report says.

Most runs here are calls of `finetune` in this process (`fit`); what a user meets goes through the
command (`run`).
"""

import json
import math
import os
import re
import shutil
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import sentiment_train
from fine_tuning import (
    ALONE,
    BLOCK,
    CPU,
    assert_same_predictions,
    made,
    predictions,
    result_of,
)
from helpers import (
    RUN_FILES,
    drawn_seed,
    group_variables,
    json_lines,
    last_weights,
    losses,
    same_weights,
    steps,
    wait_for,
    write_csv,
)
from model import GPTClassifier
from sentiment_train import SentimentSettings, make_classifier, prepare
from smallgpt import hardware, settings
from smallgpt.console import UserError
from smallgpt.optim import layer_scale, lr_factor, make_optimizers
from smallgpt.parallel.strategy import Single
from smallgpt.runs.metrics import read
from smallgpt.sentiment import report, splits
from smallgpt.sentiment.batches import (
    Buckets,
    Encoded,
    Inputs,
    collate,
    drop_tokens,
    score,
)
from smallgpt.sentiment.sets import ReviewSettings
from smallgpt.weights.pretrained import open_trunk

torch.set_num_threads(1)


@pytest.fixture
def asked(fine, tmp_path) -> Callable[..., SentimentSettings]:
    return lambda **changes: settings.load(SentimentSettings, fine(tmp_path, **changes))


def begun(s: SentimentSettings) -> tuple[GPTClassifier, splits.Reviews, dict[str, Encoded], int]:
    """What a run has before its first step: the model in float64, the set, its ids, the id of
    padding."""
    task = prepare(s, ALONE)
    ids = {name: inputs.data for name, inputs in task.inputs.items()}
    return make_classifier(s, task, CPU).double(), task.data, ids, task.trunk.tokenizer.pad


def test_a_run_learns_what_the_words_say(fine, tmp_path, run):
    result = run(
        "sentiment_train", fine(tmp_path, max_steps=0, epochs=6, eval_every=0, pool="mean")
    )
    assert result.status == 0 and not result.err, result.err
    folder = tmp_path / "r"
    found, train_loss = result_of(folder), losses(folder, "train")
    assert (
        list(train_loss) == list(range(1, max(train_loss) + 1)) and len(losses(folder, "val")) == 6
    )
    assert train_loss[1] == pytest.approx(math.log(2), rel=0.1) and min(train_loss.values()) < 0.4
    majority, tfidf = found["baselines"].values()
    assert (
        found["test"]["accuracy"] > majority["accuracy"] + 0.15
        and tfidf["accuracy"] > majority["accuracy"] + 0.15
    )
    assert (
        result.out.count("| **this model** |") == 1
        and f"python scripts/classify.py {folder} TEXT" in result.out
    )

    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text in result.out
    for name, values in found["baselines"].items():
        assert f"| {name} | {values['accuracy']:.2%} | {values['macro_f1']:.2%} | |" in text
    assert list(found["baselines"]) == ["always good", "TF-IDF (word) + linear SVM"]
    assert f"| **this model** | {found['test']['accuracy']:.2%} |" in text
    assert f"Chosen at step {found['step']} by validation accuracy" in text
    assert "\n- device: cpu, one process; float32\n" in text
    for name, width in (("curves", 1350), ("confusion", 690)):
        picture = (folder / f"{name}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000
        assert struct.unpack(">I", picture[16:20])[0] == width
    names = RUN_FILES | {
        "result.json",
        "report.md",
        "predictions.csv",
        "curves.png",
        "confusion.png",
    }
    assert {p.name for p in folder.iterdir()} - names == {f"step-{k:08d}" for k in steps(folder)}

    # the same command again: no step, the same report
    def kept() -> list[object]:
        return [
            (folder / "metrics.jsonl").read_bytes(),
            *(p.stat().st_mtime_ns for p in folder.glob("step-*")),
        ]

    before, table = kept(), (folder / "predictions.csv").read_bytes()
    (folder / "predictions.csv").unlink()
    again = run("sentiment_train", fine(tmp_path, max_steps=0, epochs=6, eval_every=0, pool="mean"))
    assert (
        again.status == 0
        and f"continuing from step {max(train_loss)} of {max(train_loss)}" in again.out
    )
    assert kept() == before and (folder / "predictions.csv").read_bytes() == table
    assert (
        result_of(folder)["test"] == found["test"]
        and len(predictions(folder)) == found["examples"]["test"]
    )
    meta = json.loads(
        (folder / f"step-{max(train_loss):08d}" / "meta.json").read_text(encoding="utf-8")
    )
    assert (
        result_of(folder)["seconds"] > meta["seconds"] > 0
    )  # of the training, not of the last start


# --- what trains ----------------------------------------------------------------------------------


def trained(model: GPTClassifier) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


BLOCKS = [
    f"gpt.blocks.{i}.{part}.weight"
    for i in (0, 1)
    for part in (
        "norm1",
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.proj",
        "attn.q_norm",
        "attn.k_norm",
        "norm2",
        "mlp.fc",
        "mlp.proj",
    )
]
TRAINED = {
    "none": {"head.weight", "gpt.norm.weight", "gpt.wte.weight", *BLOCKS},
    "trunk": {"head.weight"},
    "all_but_last:1": {"head.weight", "gpt.norm.weight", *BLOCKS[10:]},
}


@pytest.mark.parametrize("freeze", TRAINED)
def test_what_trains_by_name(asked, freeze):
    model, *_ = begun(s := asked(freeze=freeze))
    assert trained(model) == TRAINED[freeze]
    names = {p: name for name, p in model.named_parameters()}
    optimized = [
        names[p]
        for o in make_optimizers(dict(model.named_parameters()), s.optim)
        for g in o.param_groups
        for p in g["params"]
    ]
    assert sorted(optimized) == sorted(TRAINED[freeze])
    dropouts = [
        model.gpt.drop.p,
        *(b.drop.p for b in model.gpt.blocks),
        *(b.attn.dropout for b in model.gpt.blocks),
    ]
    n_frozen = {"none": 0, "trunk": 2, "all_but_last:1": 1}[freeze]
    expected = [0.0 if n_frozen > i else 0.1 for i in range(2)]
    assert dropouts == [0.0 if n_frozen else 0.1, *expected, *expected]


@pytest.mark.parametrize("freeze", ["none", "trunk", "all_but_last:1"])
def test_a_language_model_head_of_its_own_trains_only_for_its_own_loss(
    asked, monkeypatch, trunk, freeze
):
    untied = open_trunk(str(trunk))
    weights = {**untied.weights, "lm_head.weight": untied.weights["wte.weight"]}
    config = replace(untied.config, tie_weights=False)
    untied = replace(untied, config=config, weights=weights)
    monkeypatch.setattr(sentiment_train, "open_trunk", lambda _: untied)
    assert trained(begun(asked(freeze=freeze))[0]) == TRAINED[freeze]
    if freeze != "trunk":
        with_lm = trained(begun(asked(freeze=freeze, lm_weight=0.5))[0])
        assert with_lm == TRAINED[freeze] | ({"gpt.lm_head.weight"} if freeze == "none" else set())


def at(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / f"step-{step:08d}" / "model.safetensors")


def optimized(folder: Path) -> set[str]:
    """The parameters that the last checkpoint has an optimizer state of."""
    files = (folder / (folder / "latest").read_text(encoding="utf-8").strip() / "state").glob(
        "*.safetensors"
    )
    return {key.rpartition("/")[0] for file in files for key in safe_open(file, "pt").keys()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("freeze", ["trunk", "all_but_last:1"])
def test_new_tokens_train_and_what_is_frozen_stays_bit_for_bit(fit, gpt2, freeze, name):
    """Weight decay moves a row without a gradient, too: 257 old rows and the padding between them
    and 320."""
    # without the mask every text is padded with <|pad|>, which is new to GPT-2
    folder = fit(
        trunk=gpt2, mask=False, freeze=freeze, optim__weight_decay=0.5, optim__name=name, cache_gb=4
    )
    opened, after = open_trunk(str(gpt2)), last_weights(folder)
    pad = opened.tokenizer.pad
    assert (opened.rows, len(after["gpt.wte.weight"])) == (257, 320) and pad >= 257
    trains = {
        name for name in after if name.startswith("gpt.blocks.1.") or name.startswith("gpt.norm.")
    }
    trains = {"head.weight", "gpt.wte.weight"} | (trains if freeze != "trunk" else set())
    for part, w in opened.weights.items():
        assert after[f"gpt.{part}"][: len(w)].equal(w) == (
            f"gpt.{part}" not in trains or part == "wte.weight"
        ), part
    before = begun(settings.load(SentimentSettings, [str(folder / "config.yaml")]))[0].float()
    moved = (after["gpt.wte.weight"] != before.gpt.wte.weight).any(1)
    assert moved.nonzero().flatten().tolist() == [pad]
    assert optimized(folder) == trains
    rest = sum(w.numel() for name, w in after.items() if name in trains - {"gpt.wte.weight"})
    assert (
        result_of(folder)["trainable"] == rest + (320 - 257) * 32
    )  # not the old rows of the same matrix


@pytest.mark.parametrize("freeze", ["trunk", "all_but_last:1"])
def test_new_tokens_that_no_text_has_cost_nothing(fit, gpt2, freeze, capsys):
    """GPT-2's texts hold none of our special tokens: nothing has to go down through the frozen
    blocks, no time, no gradient, and no parameter of which DDP waits in vain for a gradient."""
    folder = fit(trunk=gpt2, freeze=freeze)
    assert (
        "gpt.wte.weight" not in optimized(folder)
        and "runs every time" not in capsys.readouterr().out
    )
    assert result_of(folder)["trainable"] == sum(
        last_weights(folder)[name].numel() for name in optimized(folder)
    )
    meta = json.loads((folder / "step-00000008" / "meta.json").read_text(encoding="utf-8"))
    assert meta["head"]["prefix"] == []  # a token that GPT-2 never saw would only disturb it


def test_a_fine_tuned_gpt2_as_trunk_is_still_a_gpt2(fit, gpt2):
    """It had forgotten which rows come from pretraining, and began every text with an untrained
    token."""
    first = fit(trunk=gpt2)
    second = fit(trunk=first, run="again", max_steps=1)
    assert open_trunk(str(second)).rows == open_trunk(str(first)).rows == 257
    assert (
        json.loads((second / "step-00000001" / "meta.json").read_text(encoding="utf-8"))["head"][
            "prefix"
        ]
        == []
    )


# --- the frozen part is asked once ----------------------------------------------------------------

CASES = [
    (f, m, p) for f in ("trunk", "all_but_last:1") for m in (True, False) for p in ("last", "mean")
]


@pytest.mark.parametrize("freeze, mask, pool", CASES)
def test_what_is_kept_equals_what_is_computed_every_time(fit, monkeypatch, freeze, mask, pool):
    calls = []
    run_frozen = GPTClassifier.run_frozen
    monkeypatch.setattr(GPTClassifier, "run_frozen", lambda *a: calls.append(1) or run_frozen(*a))
    case = dict(
        freeze=freeze,
        mask=mask,
        pool=pool,
        dropout=0.3,
        micro_tokens=512,
        max_steps=6,
        eval_every=3,
    )
    kept = fit(run="kept", **case)
    assert calls
    calls.clear()
    plain = fit(run="plain", cache_gb=0, **case)
    assert not calls
    for split in ("train", "val"):
        for x, y in zip(read(kept, split), read(plain, split), strict=True):
            assert all(x[k] == pytest.approx(y[k], abs=1e-4) for k in ("loss", "accuracy"))
    assert_same_predictions(kept, plain, 1e-4)
    if freeze != "trunk" and mask:  # dropout was at work, and the same in both
        dry = fit(run="dry", **case | {"dropout": 0.0})
        assert losses(dry, "train") != pytest.approx(losses(kept, "train"), abs=0.01)


def test_the_language_model_loss_goes_with_what_is_kept(fit):
    case = dict(freeze="all_but_last:1", lm_weight=0.5, micro_tokens=512)
    kept, plain = fit(run="kept", **case), fit(run="plain", cache_gb=0, **case)
    assert losses(kept, "train") == pytest.approx(losses(plain, "train"), abs=1e-4)
    norms = [[r["grad_norm"] for r in read(folder, "train")] for folder in (kept, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    without = fit(run="without", **case | {"lm_weight": 0})
    assert losses(without, "train") != pytest.approx(losses(kept, "train"), abs=1e-3)


def test_too_much_to_keep_is_said_and_computed(fit, capsys):
    folder = fit(freeze="all_but_last:1", cache_gb=1e-6)
    said = capsys.readouterr().out
    assert (
        len(
            re.findall(
                r"frozen   (?:train|validation): .*\(cache_gb=1e-06\): it runs every time", said
            )
        )
        == 2
    )
    assert losses(folder, "train") == pytest.approx(
        losses(fit(run="s", freeze="all_but_last:1"), "train"), abs=1e-4
    )


# --- pooling --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("mask", [True, False])
def test_a_text_has_the_same_scores_in_any_company(asked, mask, pool):
    """And they are those of the text by hand: alone; or, without the mask, padded to the whole
    block."""
    model, _, ids, fill = begun(asked(mask=mask, pool=pool))
    data, model = ids["test"], model.eval()
    assert len({*data.lengths}) > 10 and data.lengths.max() == BLOCK  # there is something to pad
    width = 0 if mask else BLOCK
    by_hand = []
    for i in data.ids:
        idx = torch.full((1, BLOCK), fill)
        idx[0, : len(i)] = torch.from_numpy(i)
        h = model.gpt.trunk(idx if not mask else idx[:, : len(i)])[0]
        by_hand.append(model.head(h[-1] if pool == "last" else h.mean(0)).numpy())
    inputs = Inputs(data, fill, width, CPU)
    for tokens in (1, 300, 10**6):  # each alone, some together, all together
        found = score(Single(model, ALONE, torch.float64), inputs, tokens)
        assert np.abs(found - by_hand).max() < 1e-12 and model.training  # training goes on
    model.eval()
    # a batch in training order is padded to its longest
    rows = np.array([int(data.lengths.argmin()), int(data.lengths.argmax())])
    assert np.abs(model(*inputs.of(rows)[:2]).numpy() - np.array(by_hand)[rows]).max() < 1e-12
    # the other way to treat padding gives other scores: the two are told apart
    other = GPTClassifier(model.gpt, 2, pool, not mask).eval().double()
    other.head = model.head
    both = Inputs(data, fill, BLOCK - width, CPU)
    assert np.abs(score(Single(other, ALONE, torch.float64), both, 300) - by_hand).max() > 1e-3


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", ["none", "trunk"])
def test_token_dropout_is_drawn_anew_at_each_step_and_the_same_again_on_resume(
    fit, tmp_path, monkeypatch, freeze
):
    """Also above a frozen part, which must not be asked only once then."""
    seen, drop = [], drop_tokens
    monkeypatch.setattr(
        sentiment_train, "drop_tokens", lambda *a: seen.append(drop(*a)) or seen[-1]
    )
    case = dict(freeze=freeze, token_dropout=0.4, dropout=0.0, save_every=4, keep=2)
    whole = fit(run="whole", **case)
    assert len(seen) == 8 and {x.dtype for x, _ in seen} == {torch.int64}
    part = fit(run="part", resume=whole / "step-00000004", **case)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(seen[4:8], seen[8:], strict=True))
    again, first = losses(part, "train"), losses(whole, "train")
    assert list(again) == [5, 6, 7, 8] and all(again[k] == first[k] for k in again)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_weights": "balanced", "label_smoothing": 0.1},
        {"class_weights": "balanced", "lm_weight": 0.3},
        {"lm_weight": 2.0, "label_smoothing": 0.2, "mask": False},
        {"adversarial": 0.3},
        {"adversarial": 0.1, "class_weights": "balanced", "lm_weight": 0.3},
        {"adversarial": 0.2, "label_smoothing": 0.1, "mask": False},
    ],
    ids=str,
)
def test_a_step_is_that_of_the_whole_batch_however_it_is_cut(fit, asked, changes):
    """Loss and gradient equal F.cross_entropy's mean over the batch, and Hugging Face's
    language-model loss. With `adversarial`, the loss of embeddings perturbed along their own
    gradient is added."""
    s = asked(dropout=0.0, **changes)
    model, data, ids, fill = begun(s)
    rows = Buckets(ids["train"].lengths, s.batch_size, s.seed).of(0)
    idx, lengths = collate([ids["train"].ids[i] for i in rows], fill, 0 if s.mask else BLOCK)
    y = torch.from_numpy(ids["train"].labels)
    count = torch.bincount(y).double()
    weight = len(y) / (2 * count) if s.class_weights == "balanced" else None
    assert len({*y[rows].tolist()}) == 2 and count[0] != count[1]
    labels = idx.masked_fill(torch.arange(idx.size(1)) >= lengths[:, None], -100)

    def both(embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        context = model.gpt.context(embedded)
        h = model.gpt.norm(model.gpt.run_blocks(embedded, context))
        pooled = h[torch.arange(len(rows)), lengths - 1] if s.mask else h[:, -1]
        loss = F.cross_entropy(
            model.head(pooled), y[rows], weight=weight, label_smoothing=s.label_smoothing
        )
        lm = F.cross_entropy(
            model.gpt.lm_head(h)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        return loss, loss + s.lm_weight * lm

    embedded = model.gpt.wte(idx)
    loss, total = both(embedded)
    if s.adversarial:
        (grad,) = torch.autograd.grad(total, embedded, retain_graph=True)
        moves = [
            g / g.norm() * s.adversarial * model.gpt.wte.weight.norm(dim=1).median() for g in grad
        ]
        total = total + both(embedded + torch.stack(moves).detach())[1]
    total.backward()
    loss = float(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    for tokens in (60, 10**6):
        folder = fit(
            run=f"r{tokens}",
            dtype="float64",
            max_steps=1,
            micro_tokens=tokens,
            dropout=0.0,
            **changes,
        )
        (record,) = read(folder, "train")
        assert record["loss"] == pytest.approx(loss, rel=1e-9)
        assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-9)


def test_layer_decay_by_name(asked, fit):
    expected = {
        "head.weight": 1.0,
        "gpt.norm.weight": 1.0,
        "gpt.blocks.1.attn.q.weight": 0.5,
        "gpt.blocks.1.norm2.weight": 0.5,
        "gpt.blocks.0.mlp.fc.weight": 0.25,
        "gpt.wte.weight": 0.125,
        "gpt.wpe.weight": 0.125,
    }
    assert {name: layer_scale(name, 2, 0.5) for name in expected} == expected
    assert layer_scale("gpt.blocks.0.mlp.fc.weight", 12, 0.9) == pytest.approx(0.9**12)
    s = asked(layer_decay=0.5)
    model, *_ = begun(s)
    names = {p: name for name, p in model.named_parameters()}
    (adamw,) = make_optimizers(
        dict(model.named_parameters()), s.optim, lambda name: layer_scale(name, 2, 0.5)
    )
    rates = {names[p]: g["peak_lr"] for g in adamw.param_groups for p in g["params"]}
    assert rates.keys() == TRAINED["none"]
    assert all(
        rates[name] == pytest.approx(0.01 * x) for name, x in expected.items() if name in rates
    )
    # what is logged is the rate of the head, whatever group comes first
    logged = [r["lr"] for r in read(fit(layer_decay=0.5), "train")]
    assert logged == pytest.approx([0.01 * lr_factor(i, 8, s.optim) for i in range(8)])


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lm_weight": 0.3, "class_weights": "balanced", "micro_tokens": 200},
        {"adversarial": 0.2, "micro_tokens": 200},
        {
            "freeze": "trunk",
            "trunk": "gpt2",
        },  # of the embedding only new rows may train, and no text has them
        {"freeze": "all_but_last:1", "mask": False, "trunk": "gpt2"},
    ],
    ids=str,
)
def test_two_processes_are_one(fine, fit, tmp_path, gpt2, start_ranks, changes):
    """33 examples in batches of 16: in every epoch one batch has a single example, and one rank
    none."""
    changes = {**changes, **({"trunk": gpt2} if "trunk" in changes else {})}
    case = dict(
        dtype="float64", data__train_size=33, max_steps=7, eval_every=4, dropout=0.0, **changes
    )
    args = fine(tmp_path, run="two", **case)
    for result in [p.wait() for p in start_ranks(2, args, script="sentiment_train")]:
        assert result.status == 0, result.err
    one, two = fit(run="one", **case), tmp_path / "two"
    for split, n in (("train", 7), ("val", 2)):
        a, b = read(one, split), read(two, split)
        assert len(a) == len(b) == n and len({r["loss"] for r in a}) > 1
        for key in ("loss", "accuracy", "grad_norm" if split == "train" else "macro_f1"):
            assert [r[key] for r in a] == pytest.approx([r[key] for r in b], rel=1e-9, abs=1e-15), (
                key
            )
    assert_same_predictions(one, two, 1e-9)
    x, y = result_of(one), result_of(two)
    assert x["step"] == y["step"] and x["test"] == pytest.approx(y["test"], rel=1e-9)
    assert (
        len((two / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 9
    )  # one of them wrote


# --- exact resume ---------------------------------------------------------------------------------

KILLABLE = dict(
    max_steps=14, eval_every=4, save_every=3, micro_tokens=400, lm_weight=0.1, adversarial=0.1
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, fine, run) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert run("sentiment_train", fine(out, **KILLABLE)).status == 0
    return out / "r"


def assert_same(folder: Path, reference: Path) -> None:
    for split in ("train", "val"):
        assert losses(folder, split) == losses(reference, split)
    assert same_weights(folder, reference) and steps(folder) == steps(reference)
    a, b = result_of(folder), result_of(reference)
    assert all(a[k] == b[k] for k in ("step", "test", "baselines", "notes", "trainable"))
    assert (folder / "predictions.csv").read_bytes() == (reference / "predictions.csv").read_bytes()


MOMENTS = {
    "evaluated and saved, before best names it": (1, ".best.tmp"),
    "trained, before the report": (1, "report.md"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_delicate_moment_then_resume_is_exact(
    fine, tmp_path, start, uninterrupted, moment
):
    args = fine(tmp_path, **KILLABLE)
    assert start("sentiment_train", args, die_at=MOMENTS[moment]).wait().status == -signal.SIGKILL
    assert start("sentiment_train", args).wait().status == 0
    assert_same(tmp_path / "r", uninterrupted)


def test_kill_9_at_random_moments_then_resume_is_exact(fine, tmp_path, start, uninterrupted):
    draw, args, kills = drawn_seed(), fine(tmp_path, **KILLABLE), 0
    metrics = tmp_path / "r" / "metrics.jsonl"

    def lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    while kills < 2:
        process, target = start("sentiment_train", args), lines() + draw.randrange(1, 8)
        wait_for(lambda p=process, n=target: lines() >= n or not p.alive(), "some steps")
        time.sleep(draw.uniform(0, 0.02))
        if not process.alive():
            break
        process.kill()
        kills += process.wait().status == -signal.SIGKILL
    assert start("sentiment_train", args).wait().status == 0 and kills
    assert_same(tmp_path / "r", uninterrupted)


def test_a_signal_saves_and_the_same_command_continues(fine, tmp_path, start, run, uninterrupted):
    args, folder = fine(tmp_path, **KILLABLE), tmp_path / "r"
    process = start("sentiment_train", args)
    wait_for(
        lambda: (folder / "metrics.jsonl").exists() and len(losses(folder, "train")) >= 2,
        "two steps",
    )
    process.kill(signal.SIGTERM)
    stopped = process.wait()
    assert stopped.status == 143 and "the same command continues" in stopped.out and not stopped.err
    done = max(losses(folder, "train"))
    assert (
        2 <= done < 14 and (folder / "latest").read_text(encoding="utf-8") == f"step-{done:08d}\n"
    )
    assert not (folder / "report.md").exists()
    again = run("sentiment_train", args)
    assert again.status == 0 and f"continuing from step {done} of 14" in again.out
    assert_same(folder, uninterrupted)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"freeze": "trunk", "lm_weight": 0, "adversarial": 0}, "freeze was none and is now trunk"),
        ({"pool": "mean"}, "pool was last and is now mean"),
        ({"select": "loss"}, "select was accuracy and is now loss"),
        ({"batch_size": 8}, "batch_size was 16 and is now 8"),
        ({"trunk": "gpt2"}, "the tokenizer's hash was"),
        ({"data__split_seed": 1}, "data.split_seed was 0 and is now 1"),
        ({"resume": "never"}, "already holds checkpoints"),
    ],
    ids=str,
)
def test_what_may_not_change_on_resume(fine, gpt2, uninterrupted, mistake_of, changes, says):
    changes = {**changes, **({"trunk": gpt2} if "trunk" in changes else {})}
    config, result = (
        (uninterrupted / name).read_bytes() for name in ("config.yaml", "result.json")
    )
    args = fine(uninterrupted.parent, **{**KILLABLE, **changes})
    message = mistake_of(sentiment_train.main, args)
    assert says in message and "\n" not in message
    assert config == (uninterrupted / "config.yaml").read_bytes()
    assert result == (uninterrupted / "result.json").read_bytes()


# --- which checkpoint is chosen -------------------------------------------------------------------


def verdicts(
    monkeypatch, values: list[tuple[float, float, float]]
) -> list[tuple[float, float, float]]:
    """Let the validation of each evaluation be these (accuracy, macro F1, loss); the test stays
    what it is. Returns the list of those still to come."""
    evaluate, left = report.evaluate, list(values)

    def scripted(scores: np.ndarray, labels: np.ndarray, measures: tuple) -> dict[str, float]:
        if len(labels) > 40:  # the test
            return evaluate(scores, labels, measures)
        return dict(zip(("accuracy", "macro_f1", "loss"), left.pop(0), strict=True))

    monkeypatch.setattr(report, "evaluate", scripted)
    return left


VALUES = [
    (0.5, 0.4, 1.0),
    (0.8, 0.5, 0.6),
    (0.8, 0.7, 0.5),
    (0.8, 0.7, 0.5),
    (0.7, 0.6, 0.1),
    (0.7, 0.1, 0.1),
]


@pytest.mark.parametrize(
    "changes, best, last",
    [
        ({}, 3, 6),  # of three with 80 % the lowest loss, of two with that the earlier
        ({"select": "macro_f1"}, 3, 6),
        ({"select": "loss"}, 5, 6),
        ({"patience": 2}, 3, 5),
        ({"patience": 1, "select": "macro_f1"}, 3, 4),
        ({"patience": 4}, 3, 6),
    ],
    ids=str,
)
def test_validation_chooses_and_the_test_is_of_what_it_chose(fit, monkeypatch, changes, best, last):
    left = verdicts(monkeypatch, VALUES)
    case = dict(max_steps=6, eval_every=1, keep=10, **changes)
    folder = fit(**case)
    assert len(left) == 6 - last and steps(folder) == list(range(1, last + 1))
    assert (folder / "best").read_text(encoding="utf-8") == f"step-{best:08d}\n"
    found = result_of(folder)
    assert found["step"] == best and found["validation"]["loss"] == VALUES[best - 1][2]

    # recomputed from the weights of that checkpoint, each text alone
    model, data, ids, _ = begun(settings.load(SentimentSettings, [str(folder / "config.yaml")]))
    model.load_state_dict(at(folder, best), strict=False)
    model.eval()
    with torch.no_grad():
        h = [model(torch.from_numpy(i)[None], torch.tensor([len(i)]))[0] for i in ids["test"].ids]
    scores, y = torch.stack(h), torch.from_numpy(ids["test"].labels)
    assert found["test"]["loss"] == pytest.approx(float(F.cross_entropy(scores, y)), abs=1e-5)
    assert found["test"]["accuracy"] == pytest.approx(
        float((scores.argmax(1) == y).double().mean())
    )
    for row, e, p in zip(
        predictions(folder), data.splits["test"], scores.softmax(1)[:, 1].tolist(), strict=True
    ):
        assert (row["text"], row["label"]) == (e.text, e.label) and float(
            row["p_good"]
        ) == pytest.approx(p, abs=1e-3)

    # once more, with a `best` that another process still sees as it was: the same checkpoint; and
    # nothing is evaluated
    (folder / "best").write_text("step-00000001\n", encoding="utf-8")
    left.clear()
    assert result_of(fit(**case)) | {"seconds": 0, "validation": 0} == found | {
        "seconds": 0,
        "validation": 0,
    }


def test_the_labels_of_the_test_change_nothing_but_its_scores(fit, tmp_path):
    train_rows, test_rows = made(120, 1), made(60, 2)
    write_csv(tmp_path / "train.csv", train_rows)
    write_csv(tmp_path / "test.csv", test_rows)
    write_csv(
        tmp_path / "turned.csv",
        [(text, {"bad": "good", "good": "bad"}[label]) for text, label in test_rows],
    )
    case = dict(data__path=tmp_path / "train.csv", max_steps=12, eval_every=2)
    a = fit(run="a", data__test_path=tmp_path / "test.csv", **case)
    b = fit(run="b", data__test_path=tmp_path / "turned.csv", **case)
    assert losses(a, "train") == losses(b, "train") and losses(a, "val") == losses(b, "val")
    x, y = result_of(a), result_of(b)
    assert x["step"] == y["step"] and x["validation"] | {"time": 0} == y["validation"] | {"time": 0}
    assert x["test"]["accuracy"] == pytest.approx(1 - y["test"]["accuracy"])
    assert [p["prediction"] for p in predictions(a)] == [p["prediction"] for p in predictions(b)]


def test_a_sealed_test_is_neither_scored_nor_shown(fit, monkeypatch):
    """A search for settings would see the test that its best settings are to be judged by."""
    read = []
    score = sentiment_train.score
    monkeypatch.setattr(sentiment_train, "score", lambda *a: read.append(a[1]) or score(*a))
    folder = fit(score_test=False)
    result = result_of(folder)
    assert "test" not in result and "baselines" not in result
    assert result["validation"]["accuracy"] > 0.5 and result["hashes"]["data"]
    assert not (folder / "report.md").exists() and not (folder / "predictions.csv").exists()
    n_validation = result["examples"]["validation"]
    assert read and {len(inputs.data.ids) for inputs in read} == {n_validation}
    assert n_validation != result["examples"]["test"], "or the line above says nothing"

    assert "test" in result_of(fit(score_test=True)), "the same run, opened later"


def test_a_run_that_begins_from_anothers_checkpoint_keeps_its_own(fit, monkeypatch):
    """Its first evaluation may be its best, before its first step: `best` then named a folder that
    was never written, and the test was made with the last checkpoint under the number of the first.
    """
    first = fit()
    left = verdicts(monkeypatch, [(0.9, 0.9, 0.1), (0.5, 0.5, 0.9)])
    folder = fit(run="s", resume=first / "step-00000008", max_steps=12)
    assert not left and result_of(folder)["step"] == 8 and steps(folder) == [8, 12]
    assert all(at(folder, 8)[name].equal(w) for name, w in at(first, 8).items())
    assert result_of(folder)["test"] == result_of(first)["test"]


# --- users' mistakes: one sentence, status 2, no traceback ----------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory, labelled, trunk) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    rows = made(60, 5)
    files = {
        "one": write_csv(folder / "one.csv", [(text, "good") for text, _ in rows]),
        "columns": write_csv(folder / "columns.csv", rows, ("review", "stars")),
        "nan": write_csv(folder / "nan.csv", [*rows[:3], ("a text without", "NaN"), *rows[4:]]),
        "meh": write_csv(folder / "meh.csv", [*made(20, 6), ("so so", "meh")]),
        "latin": folder / "latin.csv",
        "empty": folder / "trunk",
    }
    files["latin"].write_bytes(
        b"Text,Sentiment\n" + b"".join(b"caf\xe9 no %d,good\n" % i for i in range(30))
    )
    files["empty"].mkdir()
    return files


@pytest.mark.parametrize(
    "argument, says",
    [
        ("trunk=", "trunk is not set: give a run folder of train.py, smollm2"),
        ("trunk={empty}", "there is no checkpoint (no step-... folder) in "),
        ("trunk=/no/such/folder", "there is no trunk '/no/such/folder'"),
        ("data.path=/no/such/file.csv", "there is no file /no/such/file.csv"),
        (
            "data.path={columns} data.label_column=stars",
            "no column 'Text'; it has: review, stars. Set data.text_",
        ),
        (
            "data.label_column=label",
            "no column 'label'; it has: Text, Sentiment. Set data.label_column",
        ),
        ("data.path={one}", "training examples have the label 'good'"),
        ("data.path={nan}", "1 example(s) of the train split have no label, the first is row 4"),
        (
            "data.test_path={meh}",
            "the test split has the label 'meh', which no training example has (they have bad,",
        ),
        (
            "data.path={latin}",
            "latin.csv, line 2: neither UTF-8 nor GB18030; name its encoding in data.encoding",
        ),
        ("freeze=all_but_last:9", "freeze=all_but_last:9: the trunk has 2 blocks"),
        ("freeze=nonsense", "freeze='nonsense' must be none, trunk or all_but_last:K"),
        ("freeze=all_but_last:0", "freeze='all_but_last:0' must be none, trunk or all_but_last:K"),
        ("block_size=49", "block_size=49 is more than the trunk's 48"),
        ("adversarial=0.1 freeze=trunk", "adversarial=0.1 must be 0, or freeze=none"),
        ("adversarial=0.1 mesh.pp=2", "adversarial=0.1 must be 0, or mesh.pp=1"),
        ("mesh.tp=2", "mesh.tp=2 is 2 processes, but there are 1"),
        ("mesh.shard=0", "shard=0 and replicate=0 both take all processes"),
        ("adversarial=-0.1", "adversarial must be float >= 0, not -0.1"),
        ("adversarial=nan", "adversarial must be float >= 0, not nan"),
        ("lm_weight=0.5 token_dropout=0.1", "there is no next word in a gap"),
        ("lm_weight=0.5 freeze=trunk", "lm_weight trains the trunk, and freeze=trunk forbids it"),
        ("label_smoothing=1", "label_smoothing must be float >= 0 and < 1, not 1"),
        ("dropout=1.5", "dropout must be float >= 0 and < 1, not 1.5"),
        ("data.train_size=1", "data.train_size=1 leaves no example of the label"),
        (
            "optim.lr=1e30 optim.clip=0",
            "no update was made, the last checkpoint is step 0: lower optim.lr",
        ),
    ],
    ids=lambda v: v.partition(" ")[0],
)
def test_mistakes(fine, tmp_path, mistake_of, bad, argument, says):
    args = [*fine(tmp_path / "out"), *argument.format(**bad).split(" ")]
    message = mistake_of(sentiment_train.main, args)
    assert says in message and "\n" not in message
    assert not (tmp_path / "out" / "r" / "best").exists()


@pytest.mark.parametrize("differs", ["out_dir", "data.path"])
def test_machines_that_see_different_files_are_told(fine, tmp_path, labelled, run, start, differs):
    """Each machine has a disk of its own: the first one had a checkpoint and waited for the second
    in loading it."""
    if differs == "out_dir":
        assert run("sentiment_train", fine(tmp_path, max_steps=4)).status == 0
    other = tmp_path / "other.csv"
    other.write_text(
        labelled.read_text(encoding="utf-8").replace("lovely", "awful"), encoding="utf-8"
    )
    elsewhere = {"out_dir": tmp_path / "elsewhere", "data.path": other}[differs]
    env = {**group_variables(2), "LOCAL_RANK": "0"}
    argv = fine(tmp_path), [*fine(tmp_path), f"{differs}={elsewhere}"]
    processes = [
        start("sentiment_train", a, env={**env, "RANK": str(r)}) for r, a in enumerate(argv)
    ]
    for result in (p.wait() for p in processes):
        assert (
            result.status == 2
            and "the processes see different files: all machines must share" in result.err
        )


def test_a_validation_loss_that_is_no_number_ends_the_run_before_it_is_the_best(
    fit, tmp_path, monkeypatch
):
    """It was written as null, which the next start of the run could not compare with anything."""
    evaluate = report.evaluate
    monkeypatch.setattr(report, "evaluate", lambda *args: evaluate(*args) | {"loss": math.nan})
    with pytest.raises(UserError, match="the validation loss is nan at step 4: lower optim.lr"):
        fit()
    assert not (tmp_path / "r" / "best").exists()
    monkeypatch.setattr(report, "evaluate", evaluate)
    assert result_of(fit())["step"] in (4, 8)


def test_a_run_whose_best_checkpoint_was_lost_reports_the_best_it_has(fit, tmp_path):
    """The newest step was the best and was lost; that of the others had been pruned, and the report
    asked for it."""
    folder = fit(eval_every=2, save_every=2, keep=2)
    records = json_lines(folder / "metrics.jsonl")
    for record in records:
        if record["split"] == "val":
            record["accuracy"] = {2: 0.99, 4: 0.5, 6: 0.4, 8: 1.0}[record["step"]]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records), encoding="utf-8"
    )
    for step in (2, 4, 8):
        shutil.rmtree(folder / f"step-0000000{step}", ignore_errors=True)
    (folder / "best").write_text("step-00000008", encoding="utf-8")
    assert result_of(fit(eval_every=2, save_every=2, keep=2))["step"] in (6, 8)


def test_a_run_goes_on_where_auto_chooses_float16(fit, monkeypatch):
    """Begun on a CPU, which needs no gradient scaler, and continued on a GPU without bf16, which
    does."""
    fit(max_steps=4)
    monkeypatch.setattr(hardware, "choose_dtype", lambda *_: (torch.float16, "as on a V100"))
    assert result_of(fit(max_steps=8))["step"] in (4, 8)


def test_empty_texts_are_dropped_and_counted(fit, tmp_path):
    rows = made(120, 7)
    write_csv(
        tmp_path / "gaps.csv",
        [*rows[:50], ("", "good"), (" \t", "bad"), ("\n", "good"), *rows[50:]],
    )
    folder = fit(data__path=tmp_path / "gaps.csv", max_steps=2)
    assert "- train: dropped 3 with an empty text" in (folder / "report.md").read_text(
        encoding="utf-8"
    )
    assert sum(result_of(folder)["examples"].values()) == 120


@pytest.fixture(scope="module")
def leaky(tmp_path_factory, tiny, labelled, run) -> tuple[Path, Path, int, int]:
    """A trunk whose corpus holds seven of the test texts; its corpus; that number; and how many
    test texts there are. The corpus was given by a relative path, as people type it."""
    folder = tmp_path_factory.mktemp("leaky")
    data = splits.load(ReviewSettings(path=str(labelled)))
    long = [
        e.text
        for e in data.splits["test"]
        if sum(c.isalnum() for c in e.text) >= 20 and "\n" not in e.text
    ]
    also = [e.text for e in data.splits["train"][:20]]  # what is trained on may have been read
    found = [f"Well, {text.upper()}!" for text in long[:7]]
    halves = [text[: len(text) // 2] for text in long[7:]]
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join([*also, *found, *halves]) + "\n", encoding="utf-8")
    args = tiny(folder, run="trunk", max_steps=1, model__block_size=BLOCK, batch_tokens=BLOCK * 8)
    result = run("train", [*args, f"data.path={os.path.relpath(corpus)}"])
    assert result.status == 0, result.err
    return folder / "trunk", corpus, 7, len(data.splits["test"])


def test_a_trunk_that_has_read_the_test_is_refused(fine, fit, leaky, tmp_path, mistake_of):
    """Regression: a corpus given by a relative path was looked for where the fine-tuning ran, and
    what was not there was reported as "found: 0"."""
    trunk, corpus, found, n = leaky
    (source,) = open_trunk(str(trunk)).sources
    assert source["path"] == str(corpus) and source["kind"] == "text"
    message = mistake_of(sentiment_train.main, fine(tmp_path, trunk=trunk))
    assert message.startswith(f"{found} of {n} test texts are in what {trunk}")
    assert "allow_leaks=true" in message

    def report_of(**changes) -> str:
        folder = fit(trunk=trunk, max_steps=2, **changes)
        return (folder / "report.md").read_text(encoding="utf-8")

    said = report_of(allow_leaks=True)
    assert f"test texts searched for in {corpus}: found {found}" in said
    corpus.rename(corpus.with_name("gone.txt"))
    said = report_of(run="gone")
    assert f"not searched for test texts: {corpus} (gone)" in said and "found 0" not in said
    corpus.write_text("another text\n", encoding="utf-8")
    said = report_of(run="changed")
    assert f"not searched for test texts: {corpus} (changed since)" in said
    corpus.with_name("gone.txt").rename(corpus)


def test_a_trunk_spelled_otherwise_is_the_same_trunk(fit, trunk, fine, tmp_path):
    """Regression: the same trunk by a relative path was refused as another one on resuming."""
    folder = fit(max_steps=2)
    again = fit(max_steps=4, trunk=os.path.relpath(trunk))
    assert again == folder and max(losses(folder, "train")) == 4


def test_a_classifier_as_trunk_is_searched_for_what_it_was_trained_on(
    fine, fit, labelled, tmp_path, mistake_of
):
    """Its labelled texts stand in no corpus file: a classifier of the hotel reviews of others
    passed for innocent. The same set in the same split is no leak, as only its training split was
    read."""
    copy = Path(shutil.copy(labelled, tmp_path / "copy.csv"))
    first = fit(max_steps=2, data__path=copy)
    again = fit(run="again", trunk=first, max_steps=2)
    said = (again / "report.md").read_text(encoding="utf-8")
    assert re.search(rf"test texts searched for in .*csv in {copy}.*: found 0", said)
    args = fine(tmp_path, run="other", trunk=again, data__split_seed=5)
    message = mistake_of(sentiment_train.main, args)
    assert re.match(rf"\d+ of \d+ test texts are in what {again}", message) and message[0] != "0"
    copy.unlink()
    said = (fit(run="third", trunk=first, max_steps=2) / "report.md").read_text(encoding="utf-8")
    assert f"NOT searched: csv in {copy} (gone)" in said


def test_settings_and_errors_are_of_one_kind():
    assert (
        SentimentSettings().check() == [] and asdict(SentimentSettings())["optim"]["min_lr"] == 0.0
    )
    with pytest.raises(UserError, match="epochs must be float > 0, not 0"):
        settings.load(SentimentSettings, ["epochs=0"])
