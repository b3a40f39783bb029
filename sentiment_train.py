"""Fine-tune a pretrained GPT with a classification head, in one process or several (DDP).

    python sentiment_train.py config/sentiment_chnsenticorp.yaml trunk=checkpoints/trunk_zh2
    torchrun --nproc_per_node=2 sentiment_train.py config/sentiment_sst2.yaml trunk=checkpoints/trunk_en
    python sentiment_train.py trunk=gpt2 data.path=my.csv data.text_column=review data.label_column=stars

The same command again continues an interrupted run. The validation split chooses the checkpoint; the test split is
read once, at the end, into checkpoints/<run>/report.md. Any setting can be changed as key=value, e.g. mask=false.
"""

import functools
import math
import platform
import signal
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from model import GPT, GPTClassifier, GPTConfig
from smallgpt import console, hardware, settings
from smallgpt.console import UserError
from smallgpt.optim import OptimSettings, layer_scale, lr_factor, make_optimizers, set_lr, update
from smallgpt.parallel.strategy import choose
from smallgpt.parallel.world import StopRequest, World, start
from smallgpt.runs import checkpoint
from smallgpt.runs.metrics import Metrics, read
from smallgpt.sentiment import freeze, leaks, report
from smallgpt.sentiment import splits as sets_of_examples
from smallgpt.sentiment.adversarial import Adversary
from smallgpt.sentiment.batches import Buckets, Inputs, drop_tokens, encode, score, share
from smallgpt.sentiment.sets import ReviewSettings
from smallgpt.settings import (
    Amount,
    Count,
    Device,
    Free,
    Positive,
    PositiveFloat,
    PositiveFraction,
    Precision,
    Rate,
    Switch,
)
from smallgpt.weights.pretrained import Trunk, grow, open_trunk


@dataclass
class SentimentSettings:
    run: Free[str] = "sentiment"  # name of the run's folder under out_dir
    out_dir: Free[str] = "checkpoints"  # where run folders live
    seed: int = 0  # of the head, the order of the batches and dropout
    device: Free[Device] = "auto"  # auto = a GPU if there is one
    dtype: Free[Precision] = "auto"  # precision of matrix products
    compile: Free[Switch] = "auto"  # torch.compile; auto = no: every batch has a new shape
    epochs: Free[PositiveFloat] = 3.0  # passes over the training examples
    max_steps: Free[Count] = 0  # optimisation steps instead of epochs; 0 = by epochs
    batch_size: Positive = 32  # examples per step, over all processes
    micro_tokens: Free[Positive] = 16384  # most tokens per forward pass and process (memory)
    eval_every: Free[Count] = 0  # steps between evaluations; 0 = once an epoch
    save_every: Free[Count] = 0  # steps between checkpoints; 0 = at evaluations
    log_every: Free[Positive] = 10  # steps between records of the training loss
    patience: Free[Count] = 0  # stop after so many evaluations without a better one; 0 = never
    select: Literal["accuracy", "macro_f1", "loss"] = "accuracy"  # on validation: names the best
    keep: Free[Positive] = 1  # newest checkpoints kept, besides the best
    resume: Free[str] = "auto"  # auto = go on | never | PATH of a run or step folder to go on from
    trunk: Free[str] = ""  # run or step folder of train.py | gpt2 or its folder | small-gpt's .pth
    allow_leaks: Free[bool] = False  # go on with a trunk that has read test texts: worth nothing
    mask: bool = True  # pool real tokens only; false = pad to block_size, read padding like text
    freeze: str = "none"  # none | trunk = train the head | all_but_last:2 = and the last 2 blocks
    pool: Literal["last", "mean"] = "last"  # the head reads the last token's state, or the mean
    block_size: Count = 0  # longest text in tokens, longer lose their middle; 0 = the trunk's
    dropout: Rate = 0.1  # in the trained part of the trunk
    token_dropout: Rate = 0.0  # share of each training text's tokens left out, new at every step
    adversarial: Amount = 0.0  # length of a perturbation, in token embeddings, such as 0.1; 0 = off
    class_weights: Literal["none", "balanced"] = "none"  # balanced = each class counts the same
    label_smoothing: Rate = 0.0  # share of the target spread over all classes
    layer_decay: PositiveFraction = 1.0  # a layer's learning rate, as a fraction of the one above
    lm_weight: Amount = 0.0  # weight of the language-model loss beside the classification loss
    cache_gb: Free[Amount] = 4.0  # memory for states of the frozen part; 0 = computed every time
    data: ReviewSettings = field(default_factory=ReviewSettings)  # the labelled set
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(lr=3e-4, warmup=50, min_lr=0.0)
    )  # optimizer

    def check(self) -> list[str]:
        """Problems that the types do not show, in plain words."""
        problems = checkpoint.name_problems(self.run)
        if not freeze.is_valid(self.freeze):
            choices = "none, trunk or all_but_last:K, such as all_but_last:2"
            problems.append(f"freeze={self.freeze!r} must be {choices}")
        if self.freeze == "trunk" and self.lm_weight:
            problems.append("lm_weight trains the trunk, and freeze=trunk forbids it: choose one")
        if self.token_dropout and self.lm_weight:
            problems.append(
                "token_dropout must be 0 with lm_weight: there is no next word in a gap"
            )
        if self.adversarial and self.freeze != "none":
            problems.append(f"adversarial={self.adversarial} must be 0, or freeze=none")
        return problems


def build(s: SentimentSettings, labels: list[str]) -> tuple[GPTClassifier, Trunk]:
    """The classifier that the settings ask for, its trunk's weights loaded; and the trunk."""
    if not s.trunk:
        raise UserError(
            "trunk is not set: give a run folder of train.py, gpt2, a GPT-2 folder or a small-gpt .pth"
        )
    trunk = open_trunk(s.trunk)
    config = checkpoint.shape(trunk.fields, trunk.name, GPTConfig)
    if s.block_size > config.block_size:
        raise UserError(f"block_size={s.block_size} is more than the trunk's {config.block_size}")
    rows = max(trunk.rows, 64 * math.ceil(trunk.tokenizer.vocab_size / 64))
    config = replace(config, dropout=s.dropout, vocab_size=max(config.vocab_size, rows))
    model = GPTClassifier(GPT(config), len(labels), s.pool, s.mask)
    missing = model.gpt.load_state_dict(grow(trunk.weights, config.vocab_size), strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys, missing

    freeze.freeze(model, s.freeze, trunk.rows)
    if not (s.lm_weight or config.tie_weights):
        model.gpt.lm_head.requires_grad_(False)  # it has no part in the loss
    return model, trunk


def finetune(s: SentimentSettings, world: World) -> int:
    """The whole run."""
    say = print if world.main else lambda *_, **__: None
    device, run, cache = world.device, Path(s.out_dir) / s.run, Path(s.out_dir) / ".cache"
    dtype, why = hardware.choose_dtype(s.dtype, device)
    ctx = hardware.autocast(device, dtype)
    started = time.time()

    data = sets_of_examples.load(s.data)
    torch.manual_seed(s.seed)  # the same head on every rank
    model, trunk = build(s, data.labels)
    model = model.to(device, torch.float64 if dtype == torch.float64 else torch.float32).train()
    tests = [text for e in data.splits["test"] for text in e[:2] if text]
    notes = [
        *data.notes,
        *leaks.check(tests, trunk.name, trunk.corpora, cache, world, s.allow_leaks),
    ]

    tokenizer, config = trunk.tokenizer, model.gpt.config
    block_size = s.block_size or config.block_size
    width = 0 if s.mask else block_size
    prefix = [tokenizer.bos] if tokenizer.bos < trunk.rows else []  # GPT-2 never saw ours
    splits = {
        k: encode(v, data.labels, tokenizer, block_size, prefix) for k, v in data.splits.items()
    }
    notes += [
        f"{k}: {v.cut} texts have over {block_size} tokens and lose their middle"
        for k, v in splits.items()
    ]
    inputs = {k: Inputs(v, tokenizer.pad, width, device) for k, v in splits.items()}
    train, buckets = inputs["train"], Buckets(splits["train"].lengths, s.batch_size, s.seed)
    if (
        s.freeze != "none"
        and train.largest < trunk.rows
        and not (s.lm_weight and config.tie_weights)
    ):
        model.gpt.wte.requires_grad_(False)  # no text has a new token: nothing to learn down there
    max_steps = s.max_steps or max(1, round(s.epochs * buckets.steps_per_epoch))
    eval_every = s.eval_every or buckets.steps_per_epoch
    labels = torch.from_numpy(splits["train"].labels).to(device)
    weights = torch.ones(len(data.labels), device=device, dtype=model.head.weight.dtype)
    if s.class_weights == "balanced":
        weights = len(labels) / len(weights) / labels.bincount().to(weights.dtype)

    identity = {
        "model": asdict(config),
        "tokenizer": tokenizer.hash,
        "data": data.fingerprint,
        "seed": s.seed,
        "trunk": trunk.name,
        "pairs": any(e.pair for e in data.splits["train"]),
        "head": {
            "labels": data.labels,
            "pool": s.pool,
            "mask": s.mask,
            "block_size": block_size,
            "prefix": prefix,
            "rows": trunk.rows,
        },
        "freeze": s.freeze,
        "batch_size": s.batch_size,
        "optim.name": s.optim.name,
        "lm_weight": s.lm_weight,
        "token_dropout": s.token_dropout,
        "adversarial": s.adversarial,
        "class_weights": s.class_weights,
        "select": s.select,
        "label_smoothing": s.label_smoothing,
        "layer_decay": s.layer_decay,
    }
    adversary = Adversary(model.gpt.wte, s.adversarial)
    optimizers = make_optimizers(
        model, s.optim, lambda name: layer_scale(name, config.n_layer, s.layer_decay)
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    resumed = checkpoint.starting_point(run, s.resume, say)
    step = resumed.step if resumed else 0
    evaluated = {r["step"]: r for r in read(run, "val") if r["step"] <= step}
    world.must_agree(
        f"{s.out_dir} and data.path", step, len(evaluated), int(data.fingerprint[:8], 16)
    )
    if resumed:
        checkpoint.check_same(resumed.meta, identity, resumed.path)
        checkpoint.load_weights(resumed, model)
        checkpoint.load_optimizers(resumed, model, optimizers, world)
        scaler.load_state_dict(
            resumed.meta["scaler"] or scaler.state_dict()
        )  # {}: that run needed none
        started -= resumed.meta.get("seconds", 0)
    strategy = choose(model, world)
    if s.compile == "true":
        model.gpt.compile_parts()
    if world.main:
        run.mkdir(parents=True, exist_ok=True)
        settings.write(s, run / "config.yaml")
        tokenizer.save(run / "tokenizer.json")

    trainable = freeze.trainable(model)
    total = sum(p.numel() for p in model.parameters())
    say(
        f"run      {run}: "
        + (f"continuing from step {step} of {max_steps}" if step else f"{max_steps} steps")
    )
    say(
        f"model    {trunk.name}, {total / 1e6:.1f}M parameters, {trainable:,} of them trained (freeze={s.freeze})"
    )
    counts = ", ".join(f"{len(data.splits[k]):,} {k}" for k in sets_of_examples.SPLITS)
    say(f"data     {s.data.set}: {counts}; {', '.join(data.labels)}")
    say(*(f"         {note}" for note in notes), sep="\n")
    say(
        f"batch    {s.batch_size} examples, {buckets.steps_per_epoch} steps an epoch, {world.size} process(es)"
    )
    say(f"device   {device.type}, {strategy.name}; {str(dtype)[6:]}: {why}")

    room = s.cache_gb
    for split in (
        ("validation",) if s.token_dropout else ("train", "validation")
    ):  # other tokens at every step
        if why := freeze.keep(model, inputs[split], ctx, s.micro_tokens, room, trunk.rows):
            say(f"frozen   {split}: {why}")
        room -= sum(state.nbytes for state in inputs[split].kept) / 2**30
    metrics = Metrics(run, world, step, max_steps)

    def quality(r: dict) -> tuple[float, float]:
        return (-r["loss"] if s.select == "loss" else r[s.select], -r["loss"])

    checkpoint.forget_lost(run, evaluated, quality, world.main)

    def save() -> None:
        nonlocal saved
        if saved != step:
            meta = {
                "step": step,
                "seconds": time.time() - started,
                **identity,
                "scaler": scaler.state_dict(),
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
            }
            checkpoint.save(run, model, optimizers, meta, world, s.keep)
            saved = step

    saved = (
        step if resumed and resumed.run == run else 0
    )  # the last step of which this run has a checkpoint
    fresh, began = 0, time.perf_counter()
    with StopRequest() as stop:
        while True:
            last = step >= max_steps
            if step and (last or step % (s.save_every or eval_every) == 0):
                save()
            if step and step not in evaluated and (last or step % eval_every == 0):
                val = splits["validation"].labels
                result = report.evaluate(
                    score(model, inputs["validation"], world, ctx, s.micro_tokens), val
                )
                checkpoint.check_loss(run, step, result["loss"])
                if quality(result) > max(map(quality, evaluated.values()), default=(-math.inf,)):
                    save()
                    if world.main:
                        checkpoint.point(run, "best", step)
                        checkpoint.prune(run, s.keep)
                metrics.log({"step": step, "split": "val", **result})
                evaluated[step] = result
                fresh, began = 0, time.perf_counter()
            best = max(evaluated, key=lambda k: (*quality(evaluated[k]), -k), default=0)
            if s.patience and sum(k > best for k in evaluated) >= s.patience:
                say(
                    f"no better validation {s.select} in {s.patience} evaluations: stopping after step {step}"
                )
                last = True
            if last:
                break

            lr = set_lr(optimizers, lr_factor(step, max_steps, s.optim))
            world.seed(s.seed, step)  # dropout
            rows = buckets.of(step)
            share_of = (
                1 / weights[labels[rows]].sum()
            )  # examples of this step over all ranks, weighted
            lm_share = s.lm_weight / max(1, int((buckets.lengths[rows] - 1).sum()))
            parts = share(rows, width or int(buckets.lengths[rows].max()), world, s.micro_tokens)
            nats, hits = 0.0, 0
            for i, part in enumerate(parts):
                here = (
                    1.0 if len(part) else 0.0
                )  # a rank without examples takes part in the collectives all the same
                part = part if len(part) else rows[:1]
                x, lengths = train.of(part)
                if s.token_dropout:
                    x, lengths = drop_tokens(
                        x, lengths, s.token_dropout, tokenizer.pad, tokenizer.sep, width
                    )
                targets = train.targets(part) if s.lm_weight else None
                y, loss_of = (
                    labels[part],
                    functools.partial(F.cross_entropy, label_smoothing=s.label_smoothing),
                )
                for perturbed, final in adversary.passes():
                    with strategy.accumulate(last=final and i == len(parts) - 1):
                        with ctx:
                            out = strategy.model(x, lengths, targets)
                        scores, lm = out if s.lm_weight else (out, 0.0)
                        loss = (
                            here
                            * share_of
                            * loss_of(scores.to(weights.dtype), y, weights, reduction="sum")
                        )
                        scaler.scale((loss + here * lm_share * lm) * strategy.loss_scale).backward()
                    if not perturbed:
                        nats, hits = (
                            nats + float(loss.detach()),
                            hits + here * int((scores.argmax(1) == y).sum()),
                        )
            nats, hits, stopping = world.sum(nats, hits, stop.signal > 0)
            if stopping:
                break
            norm = update(optimizers, scaler, strategy.clip, s.optim.clip, nats, step, saved)
            step, fresh = step + 1, fresh + len(rows)
            metrics.step(nats, len(rows), "examples")
            if step % s.log_every == 0 or step == max_steps:
                speed = fresh / (time.perf_counter() - began)
                metrics.log(
                    {
                        "step": step,
                        "split": "train",
                        "loss": nats,
                        "accuracy": hits / len(rows),
                        "lr": lr,
                        "grad_norm": norm,
                        "examples_per_second": speed,
                    }
                )
                fresh, began = 0, time.perf_counter()
        if not last:
            save()
    metrics.close()
    if not last:
        say(f"stopped by a signal after step {step}, saved in {run}; the same command continues")
        return 128 + (stop.signal or signal.SIGTERM)

    checkpoint.load_weights(
        checkpoint.required(run / f"step-{best:08d}"), model
    )  # other ranks may see an older `best`
    scores = score(model, inputs["test"], world, ctx, s.micro_tokens)
    if world.main:
        result = {
            "set": s.data.set,
            "trunk": trunk.name,
            "mask": s.mask,
            "freeze": s.freeze,
            "pool": s.pool,
            "seed": s.seed,
            "step": best,
            "select": s.select,
            "validation": evaluated[best],
            "test": report.evaluate(scores, splits["test"].labels),
            "baselines": report.baselines(data, cache),
            "examples": {k: len(v) for k, v in data.splits.items()},
            "trainable": trainable,
            "seconds": round(time.time() - started, 1),
            "notes": notes,
            "hashes": {"data": data.fingerprint, "trunk": checkpoint.digest(trunk.weights)},
        }
        say(
            "\n"
            + report.write(
                run, data.splits["test"], scores, splits["test"].labels, data.labels, result
            )
        )
        say(
            f"the report, its pictures and predictions.csv are in {run}; to use it: python scripts/classify.py {run} TEXT"
        )
    return 0


def main() -> int:
    s = settings.load(SentimentSettings, doc=__doc__)
    with start(s.device) as world, checkpoint.alone(Path(s.out_dir) / s.run, world.main):
        return finetune(s, world)


if __name__ == "__main__":
    console.run(main)
