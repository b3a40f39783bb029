"""Fine-tune a pretrained GPT with a classification head, in one process or several.

    python sentiment_train.py config/sentiment_chnsenticorp.yaml trunk=checkpoints/trunk_zh
    torchrun --nproc_per_node=2 sentiment_train.py config/sentiment_sst2.yaml \\
        trunk=checkpoints/trunk_en
    python sentiment_train.py trunk=gpt2 data.path=my.csv \\
        data.text_column=review data.label_column=stars

    torchrun --nproc_per_node=4 sentiment_train.py config/sentiment_csv_tp2_pp2.yaml \\
        trunk=checkpoints/trunk_en data.path=my.csv

Several processes hold a whole model each (DDP), unless `mesh` cuts it as in train_fsdp.py. The same
command again continues an interrupted run, also with another mesh. The validation split chooses the
checkpoint; the test split is scored after training, into checkpoints/<run>/report.md. Any setting
can be changed as key=value, e.g. mask=false.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from model import GPT, GPTClassifier, GPTConfig
from smallgpt import console, hardware, settings
from smallgpt.console import UserError
from smallgpt.files import read_json
from smallgpt.optim import (
    OptimSettings,
    check_finite,
    layer_scale,
    lr_factor,
    make_optimizers,
    set_lr,
    update,
)
from smallgpt.parallel.layout import MeshSettings, MeshSpread
from smallgpt.parallel.strategy import Single, shapes_of
from smallgpt.parallel.world import World, start
from smallgpt.runs import checkpoint
from smallgpt.runs.run import Facts, Run, merge_sources
from smallgpt.runs.tracker import TrackerKind, tracker_problems
from smallgpt.sentiment import freeze, leaks, regression, report, sets, splits
from smallgpt.sentiment.adversarial import Adversary, typical_norm
from smallgpt.sentiment.batches import (
    Buckets,
    Inputs,
    add_leading_space,
    drop_tokens,
    encode,
    prefix_of,
    score,
    share_rows,
)
from smallgpt.sentiment.sets import ReviewSettings
from smallgpt.sentiment.splits import Reviews
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
from smallgpt.weights import pretrained
from smallgpt.weights.pretrained import Trunk, load_trunk, open_trunk, own_model

Selected = Literal["accuracy", "macro_f1", "f1", "matthews", "pearson", "spearman", "loss"]
OPTIM = OptimSettings(lr=3e-4, warmup=50, min_lr=0.0)
MESH = MeshSettings(shard=1, replicate=0)  # a whole model on each process
Files = list[str]
Words = dict[str, str]  # label -> its word


@dataclass
class SentimentSettings:
    run: Free[str] = "sentiment"  # name of the run's folder under out_dir
    out_dir: Free[str] = "checkpoints"  # where run folders live
    seed: int = 0  # of the head, the order of the batches and dropout
    device: Free[Device] = "auto"  # auto = a GPU if there is one
    dtype: Free[Precision] = "auto"  # precision of matrix products
    timeout: Free[Positive] = 600  # seconds that other processes may be waited for
    compile: Free[Switch] = "auto"  # torch.compile; auto = no: every batch has a new shape
    epochs: Free[PositiveFloat] = 3.0  # passes over the training examples
    max_steps: Free[Count] = 0  # optimisation steps instead of epochs; 0 = by epochs
    batch_size: Positive = 32  # examples per step, over all processes
    micro_tokens: Free[Positive] = 16384  # most tokens per forward pass and process (memory)
    recompute: Free[Count] = 0  # every n-th block computes its activations again (memory); 0 = none
    eval_every: Free[Count] = 0  # steps between evaluations; 0 = once an epoch
    save_every: Free[Count] = 0  # steps between checkpoints; 0 = at evaluations
    save: Free[Literal["sync", "async"]] = "sync"  # async = written while training goes on
    log_every: Free[Positive] = 10  # steps between records of the training loss
    tracker: Free[TrackerKind] = "none"  # a page for the curves, too (docs/usage.md)
    patience: Free[Count] = 0  # stop after so many evaluations without a better one; 0 = never
    select: Selected = "accuracy"  # what of the set's measures names the best, on validation
    score_test: Free[bool] = True  # false = the test stays unread, as in a search for settings
    keep: Free[Positive] = 1  # newest checkpoints kept, besides the best
    resume: Free[str] = "auto"  # auto = go on | never | PATH of a run or step folder to go on from
    trunk: Free[str] = field(  # run folder | smollm2, a Llama's folder, a GGUF | gpt2 | a .pth
        default_factory=own_model
    )
    before: Free[Files] = field(default_factory=list)  # YAML files of fine-tunings that come first
    allow_leaks: Free[bool] = False  # go on with a trunk that has read test texts: worth nothing
    trunk_blocks: Count = 0  # the lowest blocks of the trunk that are used; 0 = all
    mask: bool = True  # pool real tokens only; false = pad to block_size, read padding like text
    freeze: str = "none"  # none | trunk = train the head | all_but_last:2 = and the last 2 blocks
    lora: Count = 0  # rank of adapters, which train in place of the blocks' matrices; 0 = none
    pool: Literal["last", "mean"] = "last"  # the head reads the last token's state, or the mean
    marks: Count = 0  # of a pair: mark runs of tokens that both texts have, up to so many; 0 = none
    cue: str = ""  # text behind each text, with pool=last: " The sentiment is"
    label_words: Words = field(default_factory=dict)  # the head's beginning: label_words.neg=bad
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
    optim: OptimSettings = field(default_factory=lambda: replace(OPTIM))  # optimizer
    mesh: Free[MeshSettings] = field(default_factory=lambda: replace(MESH))  # how the model is cut

    def check(self) -> list[str]:
        """Problems that the types do not show, in plain words."""
        problems = checkpoint.name_problems(self.run) + tracker_problems(self.tracker)
        if not freeze.is_valid(self.freeze):
            choices = "none, trunk or all_but_last:K, such as all_but_last:2"
            problems.append(f"freeze={self.freeze!r} must be {choices}")
        if self.freeze == "trunk" and self.lm_weight:
            problems.append("lm_weight trains the trunk, and freeze=trunk forbids it: choose one")
        if self.token_dropout and self.lm_weight:
            problems.append(
                "token_dropout must be 0 with lm_weight: there is no next word in a gap"
            )
        if self.adversarial and (self.freeze != "none" or self.lora):
            problems.append(f"adversarial={self.adversarial} must be 0, or freeze=none and lora=0")
        if self.adversarial and self.mesh.pp > 1:
            problems.append(
                f"adversarial={self.adversarial} must be 0, or mesh.pp=1: a text's second pass "
                "begins where its first has ended"
            )
        return problems + self.lora_problems() + self.head_problems()

    def lora_problems(self) -> list[str]:
        """The same, of the adapters."""
        problems = []
        if self.lora and self.freeze == "trunk":
            problems.append(
                f"lora={self.lora} adapts the blocks, and freeze=trunk forbids it: choose one"
            )
        if self.lora and self.mesh.tp > 1:
            problems.append(f"lora={self.lora} must be 0, or mesh.tp=1: thin matrices are not cut")
        return problems

    def head_problems(self) -> list[str]:
        """The same, of the head and what it reads."""
        problems = []
        if self.marks and self.freeze != "none":
            problems.append(
                f"marks={self.marks} needs freeze=none: the first block has to learn them"
            )
        if self.cue and self.pool != "last":
            problems.append(f"cue needs pool=last: with pool={self.pool} the head reads the text")
        for label, word in self.label_words.items():
            if not word.strip():
                problems.append(f"label_words.{label} must be a word, such as good")
        return problems


# --- what is fine-tuned on what -------------------------------------------------------------------


@dataclass
class Task:
    """A labelled set as a trunk reads it."""

    data: Reviews
    trunk: Trunk
    digest: str  # a hash of the trunk's weights
    config: GPTConfig  # the trunk's, with what this fine-tuning changes
    head: dict[str, Any]  # how a text is read, and what is made of it; see `head_record`
    inputs: dict[str, Inputs]  # by split
    notes: list[str]  # what the report should hold

    @property
    def report(self):
        """The module that knows what such a classifier is worth."""
        return regression if self.data.is_number else report

    def read(self, strategy: Single, split: str, max_tokens: int) -> np.ndarray:
        """Scores (N, n_classes) of a split; where the label is a number, predictions (N, 1). A
        collective."""
        scores = score(strategy, self.inputs[split], max_tokens)
        mean, deviation = self.head.get("scale", (0.0, 1.0))
        return mean + deviation * scores

    def evaluate(self, split: str, scores: np.ndarray) -> dict[str, float]:
        """The set's measures of what `read` gives."""
        labels = self.inputs[split].data.labels
        return self.report.evaluate(scores, labels, self.data.measures)

    def facts(self, s: SentimentSettings) -> Facts:
        """What a checkpoint must hold for its texts to be read again as they were in training."""
        is_of_pairs = any(example.pair for example in self.data.splits["train"])
        identity = {"trunk": self.digest, "head": self.head, "pairs": is_of_pairs}
        own_source = sets.source(s.data, self.data.fingerprint)
        sources = merge_sources([own_source], self.trunk.sources)
        return Facts(self.config, self.trunk.tokenizer, self.data.fingerprint, sources, identity)


def prepare(s: SentimentSettings, world: World) -> Task:
    """Open the set and the trunk. UserError if there is none, or if they do not fit."""
    data = splits.load(s.data)
    if s.select not in (*data.measures, "loss"):
        choices = ", ".join([*data.measures, "loss"])
        raise UserError(f"select={s.select} is not measured of {s.data.set}: choose of {choices}")
    if data.is_number and (s.label_smoothing or s.class_weights != "none"):
        raise UserError(
            f"label_smoothing and class_weights are of classes, and {s.data.set} has numbers: "
            "leave them out"
        )
    if not s.trunk:
        raise UserError(
            "trunk is not set: give a run folder of train.py, smollm2, gpt2, the folder of a Llama "
            "or a GPT-2, a GGUF or a small-gpt .pth"
        )
    trunk = open_trunk(s.trunk)
    config = classifier_config(s, trunk)
    head = head_record(s, data, trunk)
    check_head(s, data, head)
    block_size = head["block_size"]
    read = f"trained on before: {leaks.chain(trunk.sources)}"
    found = search_leaks(s, data, trunk.name, trunk.sources, world)
    notes = [*data.notes, *trunk.notes, read, *found]
    tokenizer = trunk.tokenizer
    width = 0 if s.mask else block_size
    inputs = {}
    for name, examples in data.splits.items():
        encoded = encode(examples, data.labels, tokenizer, block_size, head["prefix"], head["cue"])
        inputs[name] = Inputs(encoded, tokenizer.pad, width, world.device)
        notes.append(
            f"{name}: {encoded.cut} texts have over {block_size} tokens and lose their middle"
        )
    if data.is_number:
        head["scale"] = regression.mean_and_deviation(inputs["train"].data.labels)
    digest = world.by_main(partial(checkpoint.digest, trunk.weights))
    return Task(data, trunk, digest, config, head, inputs, notes)


def classifier_config(s: SentimentSettings, trunk: Trunk) -> GPTConfig:
    """The trunk's lowest blocks, with this fine-tuning's dropout, and with rows for new tokens."""
    config = trunk.config
    if s.block_size > config.block_size:
        raise UserError(f"block_size={s.block_size} is more than the trunk's {config.block_size}")
    if s.trunk_blocks > config.n_layer:
        raise UserError(f"trunk_blocks={s.trunk_blocks} is more than the trunk's {config.n_layer}")
    n_layer = s.trunk_blocks or config.n_layer
    rows = max(trunk.rows, 64 * math.ceil(trunk.tokenizer.vocab_size / 64))
    vocab_size = max(config.vocab_size, rows)
    return replace(config, n_layer=n_layer, dropout=s.dropout, vocab_size=vocab_size)


def head_record(s: SentimentSettings, data: Reviews, trunk: Trunk) -> dict[str, Any]:
    """The head of the classifier, and how the texts that it judges are made into tokens."""
    return {
        "labels": data.labels,
        "pool": s.pool,
        "mask": s.mask,
        "block_size": s.block_size or trunk.config.block_size,
        "prefix": prefix_of(trunk.tokenizer, trunk.rows),
        "cue": trunk.tokenizer.encode(s.cue),
        "marks": s.marks,
        "rows": trunk.rows,
    }


def check_head(s: SentimentSettings, data: Reviews, head: dict[str, Any]) -> None:
    """UserError where a head cannot be made of this set."""
    has_pairs = any(example.pair for example in data.splits["train"])
    if s.marks and not has_pairs:
        raise UserError(
            f"marks={s.marks} compares two texts, and {s.data.set} has no pairs: set "
            "data.pair_column, or leave it out"
        )
    if len(head["cue"]) > head["block_size"] // 2:
        raise UserError(
            f"the cue has {len(head['cue'])} tokens, and a text at most {head['block_size']}: "
            "shorten it"
        )
    if s.label_words and sorted(s.label_words) != sorted(data.labels):
        raise UserError(
            f"label_words has {', '.join(sorted(s.label_words))}, and the labels of "
            f"{s.data.set} are {', '.join(sorted(data.labels))}: give each a word"
        )


def search_leaks(
    s: SentimentSettings, data: Reviews, trunk: str, sources: list[dict], world: World
) -> list[str]:
    """What the leak check found in the sources of a trunk, in words; UserError if that are test
    texts."""
    tests = []
    for split in splits.tests_of(data.splits):
        tests += leaks.texts_of(data.splits[split])
    validation = list(leaks.texts_of(data.splits["validation"]))
    return leaks.check(tests, validation, trunk, sources, cache_of(s), world, s.allow_leaks)


def cache_of(s: SentimentSettings) -> Path:
    """The folder of what is worth computing once for all runs."""
    return Path(s.out_dir) / ".cache"


# --- the model ------------------------------------------------------------------------------------


def make_classifier(s: SentimentSettings, task: Task, birthplace: torch.device) -> GPTClassifier:
    """The classifier that the settings ask for, with the trunk's weights unless it is on the meta
    device, where none are read; what they freeze is frozen."""
    torch.manual_seed(s.seed)  # the same head on every rank
    with birthplace:
        sep = task.trunk.tokenizer.sep
        n_classes = len(task.data.labels)
        model = GPTClassifier(GPT(task.config), n_classes, s.pool, s.mask, sep, s.marks)
    if birthplace.type != "meta":
        load_trunk(model.gpt, task.trunk)
        if s.marks and task.trunk.marks is not None:
            begin_marks(model.marks, task.trunk.marks)
        if s.label_words:
            begin_head(model, task, s.label_words)
    model.gpt.recompute = s.recompute
    tied = task.config.tie_weights
    first_new = task.trunk.rows  # token id
    learns_tokens = s.lm_weight and tied
    if task.inputs["train"].largest < first_new and not learns_tokens:
        first_new = task.config.vocab_size  # no text has a new one: there is nothing to learn
    freeze.freeze(model, s.freeze, first_new, s.lora)
    if not s.lm_weight and not tied:
        model.gpt.lm_head.requires_grad_(False)  # it has no part in the loss
    return model


@torch.no_grad()
def begin_marks(marks: nn.Embedding, learned: Tensor) -> None:
    """Go on with the marks (rows, C) of a task before. Runs longer than those it marked begin as
    its longest."""
    longest = len(learned) - 1
    for length, row in enumerate(marks.weight):
        row.copy_(learned[min(length, longest)])


@torch.no_grad()
def begin_head(model: GPTClassifier, task: Task, words: dict[str, str]) -> None:
    """Let the head of each label be the row of the LM head that foretells its word (the mean of its
    tokens' rows): before any training its scores are those of a cloze (Schick and Schütze 2021;
    Gao et al. 2021)."""
    tokenizer = task.trunk.tokenizer
    for row, label in zip(model.head.weight, task.data.labels, strict=True):
        ids = tokenizer.encode(add_leading_space(words[label], tokenizer))
        row.copy_(model.gpt.lm_head.weight[ids].mean(0))


def perturbation_norm(s: SentimentSettings, model: GPTClassifier, world: World) -> float:
    """Length of the adversarial perturbation, measured on the main process, which has the weights;
    0 = none. A collective."""
    norm = 0.0
    if s.adversarial and world.main:
        norm = s.adversarial * typical_norm(model.gpt.wte)
    (norm,) = world.sum(norm)
    return norm


# --- the loss -------------------------------------------------------------------------------------


@dataclass
class MicroBatch:
    """Some examples of a step."""

    inputs: tuple  # what the model is called with
    labels: Tensor  # (B,)
    weight: float  # 0 for a rank without examples, which takes part in the collectives all the same
    perturbed: bool = False  # the second pass of adversarial training


class Objective:
    """The loss of a fine-tuning: which micro-batches a step has, and the loss of each."""

    def __init__(self, s: SentimentSettings, task: Task, strategy: Single, norm: float):
        """norm: length of the adversarial perturbation, 0 = none."""
        self.s = s
        self.strategy = strategy
        train = task.inputs["train"]
        self.train = train
        self.sep = task.trunk.tokenizer.sep  # the token between the texts of a pair
        self.cue = len(task.head["cue"])  # tokens
        self.buckets = Buckets(train.data.lengths, s.batch_size, s.seed)
        labels = train.data.labels
        self.scale = task.head.get("scale")
        if self.scale:
            mean, deviation = self.scale
            labels = ((labels - mean) / deviation).astype(np.float32)
        self.labels = torch.from_numpy(labels).to(train.device)
        dtype = next(strategy.model.parameters()).dtype
        self.class_weights = class_weights(s, self.labels, len(task.data.labels), dtype)
        self.adversary = Adversary(strategy.model.gpt.wte, norm)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Those of this data rank. Also starts the step's totals, and sets how its loss is
        divided."""
        rows = self.buckets.of(step)
        self.n_examples = len(rows)
        self.per_example = 1 / self.weight_of(rows)  # of all ranks
        n_targets = int((self.buckets.lengths[rows] - 1).sum())
        self.per_target = self.s.lm_weight / max(1, n_targets)
        self.losses: list[Tensor] = []  # scalars, of the plain passes
        self.hits: list[Tensor] = []  # scalars: how many labels were found
        longest = self.train.width or int(self.buckets.lengths[rows].max())
        parts = share_rows(rows, longest, self.strategy, self.s.micro_tokens)
        batches = []
        for part in parts:
            batch = self.collate(part) if len(part) else self.collate(rows[:1], weight=0.0)
            batches.append(batch)
            if self.s.adversarial:
                batches.append(replace(batch, perturbed=True))
        return batches

    def collate(self, rows, weight: float = 1.0) -> MicroBatch:
        x, lengths, reads = self.train.of(rows)
        if self.s.token_dropout:
            share, fill, width = self.s.token_dropout, self.train.fill, self.train.width
            x, lengths = drop_tokens(x, lengths, share, fill, self.sep, width, self.cue)
        targets = self.train.targets(rows) if self.s.lm_weight else None
        return MicroBatch((x, lengths, targets, reads), self.labels[rows], weight)

    def weight_of(self, rows: np.ndarray) -> Tensor | int:
        """How much these examples count together."""
        return len(rows) if self.scale else self.class_weights[self.labels[rows]].sum()

    def summed_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Of scores (B, n_classes) the cross-entropy in nats; where the label is a number, squared
        errors of scores (B, 1), in variances."""
        scores = scores.to(self.class_weights.dtype)
        if self.scale:
            return F.mse_loss(scores[:, 0], labels.to(scores.dtype), reduction="sum")
        smoothing = self.s.label_smoothing
        weights = self.class_weights
        return F.cross_entropy(scores, labels, weights, reduction="sum", label_smoothing=smoothing)

    def loss_of(self, run_model, batch: MicroBatch) -> Tensor:
        """This micro-batch's share of the mean loss over the step's examples, in nats."""
        with self.adversary.perturbing() if batch.perturbed else nullcontext():
            output = run_model(*batch.inputs)
        scores, lm_nats = output if self.s.lm_weight else (output, 0.0)
        loss = batch.weight * self.per_example * self.summed_loss(scores, batch.labels)
        if not batch.perturbed:
            is_hit = scores.argmax(1) == batch.labels
            self.losses.append(loss.detach())
            self.hits.append(batch.weight * is_hit.sum())
        return loss + batch.weight * self.per_target * lm_nats

    def totals(self) -> list[float]:
        """Loss and hits of the plain passes of all data ranks. To be called after the backward
        passes: reading a number waits for the GPU. A collective."""
        return self.strategy.sum(sum(map(float, self.losses)), sum(map(float, self.hits)))


def class_weights(
    s: SentimentSettings, labels: Tensor, n_classes: int, dtype: torch.dtype
) -> Tensor:
    """(n_classes,): 1; or, balanced, so that each class counts the same."""
    weights = torch.ones(n_classes, device=labels.device, dtype=dtype)
    if s.class_weights == "balanced":
        weights = len(labels) / n_classes / labels.bincount().to(weights.dtype)
    return weights


# --- the run --------------------------------------------------------------------------------------


def finetune(s: SentimentSettings, world: World, origin: str = "") -> int:
    """The whole run; returns its exit status. origin: the trunk of the chain that it ends."""
    with Run(s, world, s.select) as run:
        dtype, why_dtype = hardware.choose_dtype(s.dtype, world.device)
        spread = MeshSpread(world, s.mesh)

        task = prepare(s, world)
        run.identify(task.facts(s))
        spread.check(task.config)

        model = make_classifier(s, task, spread.birthplace()).to(hardware.weights_dtype(dtype))
        trainable = freeze.count_trainable(model)
        perturbation = perturbation_norm(s, model, world)
        weights = None
        if run.found:
            weights = checkpoint.read_weights(run.found, shapes_of(model), task.trunk.weights)
        task.trunk.weights = {}  # the model has them, where this process holds a whole one
        strategy = spread.build(model, dtype, weights)
        if s.compile == "true":
            strategy.model.gpt.compile_parts()
        objective = Objective(s, task, strategy, perturbation)
        scale = partial(layer_scale, n_layer=task.config.n_layer, decay=s.layer_decay)
        optimizers = make_optimizers(strategy.names(), s.optim, scale, freeze.undecayed(model))
        run.resume(strategy, optimizers)

        steps_per_epoch = objective.buckets.steps_per_epoch
        max_steps = s.max_steps or max(1, round(s.epochs * steps_per_epoch))
        eval_every = s.eval_every or steps_per_epoch
        computed = f"{world.device.type}, {strategy.name}; {hardware.name_of(dtype)}"
        run.begin(
            max_steps,
            {
                "model": describe_model(s, task, strategy, trainable),
                "data": describe_data(s, task),
                "batch": describe_batch(s, steps_per_epoch, strategy),
                "device": f"{computed}: {why_dtype}",
            },
        )
        cache_states(s, run, strategy, task.inputs)

        for step in run.steps(max_steps, s.save_every or eval_every):
            if run.due(eval_every):
                scores = task.read(strategy, "validation", s.micro_tokens)
                run.evaluated(task.evaluate("validation", scores))
            if step >= max_steps or run.out_of_patience(s.patience):
                break

            factor = lr_factor(step, max_steps, s.optim)
            set_lr(optimizers, factor)
            strategy.seed(s.seed, step)  # of dropout
            batches = objective.micro_batches(step)
            strategy.forward_backward(batches, objective.loss_of, 1.0)
            norm = strategy.clip(optimizers, s.optim.clip)
            loss, hits = objective.totals()
            norm = float(norm)
            check_finite(loss, norm, strategy.scaler, step + 1, run.saved)
            update(optimizers, strategy.scaler, norm)
            run.log(
                objective.n_examples,
                "examples",
                loss=loss,
                **({} if objective.scale else {"accuracy": hits / objective.n_examples}),
                lr=factor * s.optim.lr,  # of the head, which trains on the last stage
                grad_norm=norm,
            )
        if run.status == 0:
            run.load_best()
            facts = {"trainable": trainable, "device": computed}
            if origin:  # the links are made from it, each seed's own
                task.digest = world.by_main(partial(pretrained.digest, origin))
            if s.score_test:
                scores = {}
                for split in splits.tests_of(task.inputs):
                    scores[split] = task.read(strategy, split, s.micro_tokens)
                if world.main:
                    write_report(s, run, task, scores, facts)
            elif world.main:
                report.write_result(run.folder, result_of(s, run, task, facts))
        return run.status


def finetune_chain(s: SentimentSettings, world: World) -> int:
    """The fine-tunings of `before`, each from the one before it (Phang et al. 2018, STILTs), and
    this one from the last; returns the exit status.

    The name of such a run tells trunk, seed and files: runs that begin in the same way share it."""
    links = [settings.load(SentimentSettings, [file]) for file in s.before]
    nested = [file for file, link in zip(s.before, links, strict=True) if link.before]
    if nested:
        raise UserError(f"{nested[0]} has a `before` of its own: name all files in one list")
    origin = s.trunk if links else ""
    name = f"before+{Path(s.trunk).name}+seed-{s.seed}"
    for file, link in zip(s.before, links, strict=True):
        name += f"+{Path(file).stem}"
        status = make_link(like(s, link, name), s, world)
        if status:
            return status
        s = replace(s, trunk=str(Path(s.out_dir) / name))
    return finetune(s, world, origin)


def make_link(link: SentimentSettings, s: SentimentSettings, world: World) -> int:
    """Make a run that comes before s, unless it is there; returns the exit status. Another program
    that makes it now, as those of a sweep do, is waited for.

    UserError, before the time is spent, if it would train on test texts of s."""
    Path(s.out_dir).mkdir(parents=True, exist_ok=True)
    turn = FileLock(Path(s.out_dir) / f".{link.run}.lock", thread_local=False)

    def take_turn() -> bool:
        turn.acquire()
        return is_finished(link)

    try:
        if world.by_main(take_turn):
            return 0
        source = sets.source(link.data, splits.load(link.data).fingerprint)
        search_leaks(s, splits.load(s.data), link.run, [source], world)
        return finetune(link, world)
    finally:
        turn.release()


def like(s: SentimentSettings, link: SentimentSettings, run: str) -> SentimentSettings:
    """A fine-tuning that comes before s: with its trunk, its seed and its use of the machine."""
    shared = ("trunk", "seed", "out_dir", "device", "dtype", "timeout", "compile", "micro_tokens")
    values = {name: getattr(s, name) for name in (*shared, "recompute", "cache_gb", "mesh")}
    return replace(link, run=run, **values)


def is_finished(s: SentimentSettings) -> bool:
    """Has this run been made to its end, with these settings and from this trunk?"""
    folder = Path(s.out_dir) / s.run
    result = read_json(folder / "result.json")
    if not isinstance(result, dict):
        return False
    made = settings.load(SentimentSettings, [str(folder / "config.yaml")])
    is_same = settings.flat(made) == settings.flat(s)
    return is_same and result["hashes"]["trunk"] == pretrained.digest(s.trunk)


def cache_states(
    s: SentimentSettings, run: Run, strategy: Single, inputs: dict[str, Inputs]
) -> None:
    """Let the frozen part read each text once; with token_dropout the training texts are others at
    every step."""
    room = s.cache_gb
    for name in ("validation",) if s.token_dropout else ("train", "validation"):
        why_not = freeze.cache_frozen_states(strategy, inputs[name], s.micro_tokens, room)
        if why_not:
            run.say(f"frozen   {name}: {why_not}")
        room -= sum(state.nbytes for state in inputs[name].states) / 2**30


def write_report(
    s: SentimentSettings,
    run: Run,
    task: Task,
    scores: dict[str, np.ndarray],
    facts: dict[str, Any],
) -> None:
    """The report of the test splits' scores (N, n_classes), in the run's folder and on the
    console. facts: what else it says of the run."""
    data = task.data
    tests = {split: task.evaluate(split, found) for split, found in scores.items()}
    result = {
        **result_of(s, run, task, facts),
        "test": tests.pop("test"),
        "further_tests": tests,
        "baselines": task.report.baselines(data, cache_of(s)),
    }
    labels = task.inputs["test"].data.labels
    examples = data.splits["test"]
    text = task.report.write(run.folder, examples, scores["test"], labels, data.labels, result)
    run.say(f"\n{text}")
    run.say(
        f"the report, its pictures and predictions.csv are in {run.folder}; "
        f"to use it: python scripts/classify.py {console.shell_word(run.folder)} TEXT"
    )


def result_of(s: SentimentSettings, run: Run, task: Task, facts: dict[str, Any]) -> dict[str, Any]:
    """What a finished run has found, without the test. facts: what else is said of it."""
    data = task.data
    return {
        "set": s.data.set,
        "trunk": describe_trunk(s, task),
        "mask": s.mask,
        "freeze": s.freeze,
        "pool": s.pool,
        "seed": s.seed,
        "step": run.best,
        "select": s.select,
        "measures": data.measures,
        "validation": run.history[run.best],
        "examples": {name: len(part) for name, part in data.splits.items()},
        **facts,
        "seconds": round(run.seconds, 1),
        "notes": task.notes,
        "hashes": {"data": data.fingerprint, "trunk": task.digest},
    }


def describe_trunk(s: SentimentSettings, task: Task) -> str:
    """Its name, and what of it is used."""
    parts = [task.trunk.name]
    if s.trunk_blocks:
        parts.append(f"lowest {s.trunk_blocks} of {task.trunk.config.n_layer} blocks")
    if s.lora:
        parts.append(f"adapters of rank {s.lora}")
    return ", ".join(parts)


def describe_model(s: SentimentSettings, task: Task, strategy: Single, trainable: int) -> str:
    parameters = sum(math.prod(shape) for shape in strategy.shapes.values())
    return (
        f"{describe_trunk(s, task)}, {parameters / 1e6:.1f}M parameters, {trainable:,} of them "
        f"trained (freeze={s.freeze})"
    )


def describe_data(s: SentimentSettings, task: Task) -> str:
    data = task.data
    counts = ", ".join(f"{len(data.splits[name]):,} {name}" for name in splits.SPLITS)
    lines = [f"{s.data.set}: {counts}; {', '.join(data.labels)}", *task.notes]
    return "\n         ".join(lines)


def describe_batch(s: SentimentSettings, steps_per_epoch: int, strategy: Single) -> str:
    return f"{s.batch_size} examples, {steps_per_epoch} steps an epoch, {strategy.readers}"


def main() -> int:
    s = settings.load(SentimentSettings, doc=__doc__)
    with start(s.device, s.timeout, settings.flat(s)) as world:
        return finetune_chain(s, world)


if __name__ == "__main__":
    console.run(main)
