"""Pretrain a GPT on chat text, in one process or several (DDP).

    python train.py config/quickstart.yaml                          one process: CPU, GPU or Mac
    torchrun --nproc_per_node=8 train.py config/train90M_ddp.yaml   one machine, 8 GPUs
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 \\
        --master_addr=10.0.0.1 --master_port=29500 \\
        train.py config/train300M_ddp.yaml          on each machine, with its own --node_rank

The same command again continues an interrupted run. Any setting can be changed as key=value, e.g.
optim.lr=3e-4.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model import GPT, IGNORE, GPTConfig, most_classes
from smallgpt import console, hardware, settings
from smallgpt.console import UserError
from smallgpt.optim import (
    OptimSettings,
    check_finite,
    lr_factor,
    make_optimizers,
    set_lr,
    update,
)
from smallgpt.parallel.strategy import Shares, Single, Spread, shapes_of, share_batch
from smallgpt.parallel.world import World, start
from smallgpt.runs import checkpoint
from smallgpt.runs.checkpoint import Checkpoint
from smallgpt.runs.metrics import flops_per_token
from smallgpt.runs.run import Facts, Run, merge_sources
from smallgpt.runs.tracker import TrackerKind, tracker_problems
from smallgpt.sampling import SampleSettings, replies
from smallgpt.settings import Count, Device, Free, Positive, Precision, Switch
from smallgpt.text.batches import Corpus
from smallgpt.text.bigrams import begin_with_bigrams
from smallgpt.text.tokens import DataSettings, prepare
from smallgpt.tokenizer import TokenizerSettings

PROMPTS = ["你好", "How are you?"]


@dataclass
class TrainSettings:
    run: Free[str] = "pretrain"  # name of the run's folder under out_dir
    out_dir: Free[str] = "checkpoints"  # where run folders live
    seed: int = 0  # of the weights, the order of the batches and dropout
    device: Free[Device] = "auto"  # auto = a GPU if there is one
    dtype: Free[Precision] = "auto"  # precision of matrix products
    timeout: Free[Positive] = 600  # seconds that other processes may be waited for
    compile: Free[Switch] = "auto"  # torch.compile; auto = where it works and pays
    max_steps: Free[Positive] = 1000  # optimisation steps of the whole run
    batch_tokens: Positive = 16384  # tokens per step, over all processes; gives the rest
    micro_batch: Free[Positive] = 16  # most sequences per forward pass and process (memory)
    negatives: Count = 0  # tokens that the training loss samples beside the targets; 0 = exact loss
    recompute: Free[Count] = 0  # every n-th block computes its activations again (memory); 0 = none
    eval_every: Free[Positive] = 100  # steps between evaluations (and sample replies)
    save_every: Free[Positive] = 100  # steps between checkpoints
    save: Free[Literal["sync", "async"]] = "sync"  # async = written while training goes on
    log_every: Free[Positive] = 10  # steps between records of the training loss
    tracker: Free[TrackerKind] = "none"  # a page for the curves, too (docs/usage.md)
    keep: Free[Positive] = 2  # newest checkpoints kept, besides the best
    resume: Free[str] = "auto"  # auto = go on | never | PATH of a run or step folder to go on from
    init: Literal["random", "bigrams"] = "random"  # bigrams = knows which token follows which
    init_from: Free[str] = ""  # run or step folder: a new run begins with its model and tokenizer
    prompts: Free[list[str]] = field(default_factory=lambda: [*PROMPTS])  # answered at evaluation
    data: DataSettings = field(default_factory=DataSettings)  # the corpus
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)  # text <-> tokens
    model: GPTConfig = field(default_factory=GPTConfig)  # the shape of the model
    optim: OptimSettings = field(default_factory=OptimSettings)  # optimizer and learning rate
    sample: Free[SampleSettings] = field(default_factory=SampleSettings)  # sample replies

    def check(self) -> list[str]:
        """Problems that the types do not show, in plain words."""
        problems = checkpoint.name_problems(self.run) + tracker_problems(self.tracker)
        if self.init == "bigrams" and self.init_from:
            problems.append("init=bigrams and init_from exclude each other: leave one of them out")
        if self.init == "bigrams" and self.model.tie_weights:
            problems.append("init=bigrams needs an LM head of its own: add model.tie_weights=false")
        return problems


class Batch(NamedTuple):
    """A micro-batch on the device."""

    # what the model is called with: tokens (B, T); targets (B, T), IGNORE where there is nothing
    # to predict; segments (B, T), numbers of the dialogues, None = packed ones see each other
    inputs: tuple[Tensor, Tensor, Tensor | None]
    n_targets: int  # that are not IGNORE


def to_batch(x: Tensor, y: Tensor, corpus: Corpus, isolate: bool, device: torch.device) -> Batch:
    """Tokens x and targets y (B, T) on the device; isolate: each dialogue sees only itself."""
    n_targets = int((y != IGNORE).sum())
    if device.type == "cuda":
        x, y = x.pin_memory(), y.pin_memory()  # so that the copy does not wait for the GPU
    x = x.to(device, non_blocking=True)
    y = y.to(device, non_blocking=True)
    segments = None
    if isolate:
        begins = x == corpus.tokenizer.bos
        segments = begins.cumsum(1)
    return Batch((x, y, segments), n_targets)


def count_targets(batches: list[Batch]) -> int:
    return sum(batch.n_targets for batch in batches)


def evaluate(strategy: Single, corpus: Corpus, isolate: bool, rows: int) -> dict[str, float]:
    """Mean loss per target token in nats, and bits per byte, over the fixed validation blocks.

    All data ranks share the work, `rows` blocks a pass. Each makes the same number of passes (rows
    past the end have no target), so that a layout whose forward communicates works here, too.
    """
    device = strategy.world.device
    offset = strategy.data_rank * rows
    stride = strategy.data_size * rows
    nats = tokens = n_bytes = 0.0
    for first in range(offset, offset + corpus.n_val_blocks, stride):
        x, y = corpus.val_batch(range(first, first + rows))
        batch = to_batch(x, y, corpus, isolate, device)
        nats += float(strategy.evaluate(*batch.inputs))
        tokens += batch.n_targets
        n_bytes += corpus.val_bytes(y)
    strategy.settle()
    nats, tokens, n_bytes = strategy.sum(nats, tokens, n_bytes)
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / n_bytes}


def sample_replies(strategy: Single, corpus: Corpus, s: TrainSettings, compiled: bool) -> str:
    """The answer to each of s.prompts, a line each; from the main process. A collective."""
    model = strategy.whole() if s.prompts else None
    if model is None:
        return ""
    # the cache's growing shapes would compile again and again, and mark the training's as dynamic
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with strategy.autocast, eager:
        answers = replies(model, corpus.tokenizer, s.prompts, s.sample)
    pairs = zip(s.prompts, answers, strict=True)
    return "\n".join(f"  {prompt} → {answer}" for prompt, answer in pairs)


def parent_of(s: TrainSettings, run: Run) -> Checkpoint | None:
    """The checkpoint whose weights and tokenizer the run begins with: the one it continues from, or
    that of init_from. Continued pretraining has its parent's shape, too."""
    parent = run.found
    if run.found and not s.init_from:
        s.init_from = run.found.meta.get("init_from", "")
    elif s.init_from and not run.found:
        parent = checkpoint.required(s.init_from)
    if s.init_from:
        shape = checkpoint.model_config(parent.meta["model"], parent.path)
        s.model = replace(shape, dropout=s.model.dropout)
    return parent


def round_vocabulary(config: GPTConfig, vocab_size: int) -> None:
    """Give the model a row for each token; by default a multiple of 64, which GPUs like."""
    if config.vocab_size == 0:
        config.vocab_size = 64 * math.ceil(vocab_size / 64)
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={config.vocab_size} is less than the tokenizer's {vocab_size}: use 0"
        )


def new_model(s: TrainSettings, dtype: torch.dtype) -> GPT:
    """The GPT of these settings, its weights drawn from the seed: the same on every rank."""
    torch.manual_seed(s.seed)
    model = GPT(s.model).to(hardware.weights_dtype(dtype))
    model.recompute = s.recompute
    model.negatives = s.negatives
    return model


def full_speed(s: TrainSettings, shares: Shares, strategy: Single, dtype: torch.dtype) -> float:
    """Tokens per second at the hardware's peak, which MFU is a share of; 0 = unknown."""
    tokens = shares.micro * s.model.block_size // strategy.loss_parts
    classes = most_classes(tokens, s.model.vocab_size, s.negatives)
    peak = hardware.peak_flops(strategy.world.device, dtype)
    return strategy.world.size * peak / flops_per_token(s.model, classes)


def train(s: TrainSettings, world: World, spread: Spread) -> int:
    """The whole run, its model spread over the processes like this; returns its exit status."""
    with Run(s, world) as run:
        device = world.device
        dtype, why_dtype = hardware.choose_dtype(s.dtype, device)
        compiled, why_compiled = hardware.choose_compile(s.compile, device, s.max_steps)

        parent = parent_of(s, run)
        tokenizer = checkpoint.tokenizer_of(parent) if parent else s.tokenizer
        corpus = prepare(s.data, tokenizer, s.model.block_size)
        round_vocabulary(s.model, corpus.tokenizer.vocab_size)
        sources = merge_sources(corpus.sources, parent.sources if parent else [])
        facts = Facts(
            s.model,
            corpus.tokenizer,
            corpus.fingerprint,
            sources,
            tokens_per_step=s.batch_tokens,
            init_from=s.init_from,
        )
        run.identify(facts)
        spread.check(s.model)

        with spread.birthplace(drawn=parent is None):
            model = new_model(s, dtype)
        model_line = describe_model(model, corpus)  # a layout may leave parts of it to others
        if s.init == "bigrams" and not parent:
            begun = world.by_main(partial(begin_with_bigrams, model, corpus, s.seed))
            model_line += f"; {begun}"
        weights = checkpoint.read_weights(parent, shapes_of(model)) if parent else None
        strategy = spread.build(model, dtype, weights)
        parts_compiled = strategy.model.compile_parts() if compiled else "off"
        shares = share_batch(
            s.batch_tokens,
            s.model.block_size,
            s.micro_batch,
            strategy.data_size,
            strategy.depth,
        )
        optimizers = make_optimizers(strategy.names(), s.optim)
        run.resume(strategy, optimizers)
        device_line = (
            f"{device.type}, {strategy.name}; {hardware.name_of(dtype)}: {why_dtype}; "
            f"torch.compile {parts_compiled}: {why_compiled}"
        )
        run.begin(
            s.max_steps,
            {
                "model": model_line,
                "data": describe_data(corpus, s.max_steps * shares.rows),
                "batch": describe_batch(s, shares, strategy),
                "device": device_line,
            },
        )
        run.full_speed = full_speed(s, shares, strategy, dtype)

        def load(step: int) -> list[Batch]:
            """The micro-batches of this data rank."""
            batches = []
            for rows in shares.of(step, strategy.data_rank):
                x, y = corpus.train_batch(rows, s.seed)
                batches.append(to_batch(x, y, corpus, s.data.isolate, device))
            return batches

        def loss_of(run_model, batch: Batch) -> Tensor:
            """Summed loss of a micro-batch, in nats."""
            return run_model(*batch.inputs)

        batches = load(run.step)
        (targets,) = strategy.sum(count_targets(batches))
        for step in run.steps(s.max_steps, s.save_every):
            if run.due(s.eval_every):
                result = evaluate(strategy, corpus, s.data.isolate, shares.micro)
                run.evaluated({"tokens": step * s.batch_tokens, **result})
                run.text("replies", sample_replies(strategy, corpus, s, compiled))
            if step >= s.max_steps:
                break

            lr = set_lr(optimizers, lr_factor(step, s.max_steps, s.optim))
            strategy.seed(s.seed, step)  # of dropout
            targets = max(1, targets)  # a step may have read the turns of others only
            nats = strategy.forward_backward(batches, loss_of, 1 / targets)
            norm = strategy.clip(optimizers, s.optim.clip)
            batches = load(step + 1)  # while a GPU is still computing
            # in one sum: here the CPU waits for the GPU, once a step
            nats, next_targets = strategy.sum(float(nats), count_targets(batches))
            loss = nats / targets
            targets = next_targets
            norm = float(norm)
            check_finite(loss, norm, strategy.scaler, step + 1, run.saved)
            update(optimizers, strategy.scaler, norm)
            run.log(
                s.batch_tokens,
                "tokens",
                loss=loss,
                tokens=(step + 1) * s.batch_tokens,
                lr=lr,
                grad_norm=norm,
            )
        if run.status == 0:
            run.say(
                f"finished {run.step} steps, best validation loss {run.best_loss:.4f}; "
                f"to talk to it: python chat.py {console.shell_word(run.folder)}"
            )
        return run.status


def describe_model(model: GPT, corpus: Corpus) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    tokenizer = corpus.tokenizer
    return f"{millions:.1f}M parameters, vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind})"


def describe_data(corpus: Corpus, rows: int) -> str:
    """rows: sequences that the run reads in all."""
    passes = rows / corpus.blocks_per_epoch
    return (
        f"{corpus.n_train_tokens:,} training tokens, {corpus.n_val_tokens:,} held out; "
        f"this run reads them {passes:.2f} times"
    )


def describe_batch(s: TrainSettings, shares: Shares, strategy: Single) -> str:
    return (
        f"{s.batch_tokens:,} tokens = {shares.rows} sequences of {s.model.block_size} = "
        f"{strategy.readers} x {shares.accum} accumulation x {shares.micro} sequences"
    )


def main() -> int:
    s = settings.load(TrainSettings, doc=__doc__)
    with start(s.device, s.timeout, settings.flat(s)) as world:
        return train(s, world, Spread(world))


if __name__ == "__main__":
    console.run(main)
