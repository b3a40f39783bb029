"""Pretrain a GPT on chat text, in one process or several (DDP).

    python train.py config/quickstart.yaml                              one process: CPU, GPU or Mac
    torchrun --nproc_per_node=8 train.py config/train90M_ddp.yaml       one machine, 8 GPUs
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 \\
        train.py config/train300M_ddp.yaml                              on each machine, with its own --node_rank

The same command again continues an interrupted run. Any setting can be changed as key=value, e.g. optim.lr=3e-4.
"""

import math
import platform
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from model import GPT, IGNORE, GPTConfig
from smallgpt import console, hardware, settings
from smallgpt.console import UserError
from smallgpt.optim import OptimSettings, lr_factor, make_optimizers, set_lr, update
from smallgpt.parallel.strategy import choose, share_batch
from smallgpt.parallel.world import StopRequest, World, start
from smallgpt.runs import checkpoint
from smallgpt.runs.metrics import Metrics, flops_per_token, read
from smallgpt.sampling import SampleSettings, replies
from smallgpt.settings import Device, Free, Positive, Precision, Switch
from smallgpt.text.batches import Corpus
from smallgpt.text.tokens import DataSettings, prepare
from smallgpt.tokenizer import TokenizerSettings


@dataclass
class TrainSettings:
    run: Free[str] = "pretrain"  # name of the run's folder under out_dir
    out_dir: Free[str] = "checkpoints"  # where run folders live
    seed: int = 0  # of the weights, the order of the batches and dropout
    device: Free[Device] = "auto"  # auto = a GPU if there is one
    dtype: Free[Precision] = "auto"  # precision of matrix products
    compile: Free[Switch] = "auto"  # torch.compile; auto = where it works and pays
    max_steps: Free[Positive] = 1000  # optimisation steps of the whole run
    batch_tokens: Positive = 16384  # tokens per step, over all processes; gives the rest
    micro_batch: Free[Positive] = 16  # most sequences per forward pass and process (memory)
    eval_every: Free[Positive] = 100  # steps between evaluations (and sample replies)
    save_every: Free[Positive] = 100  # steps between checkpoints
    log_every: Free[Positive] = 10  # steps between records of the training loss
    keep: Free[Positive] = 2  # newest checkpoints kept, besides the best
    resume: Free[str] = "auto"  # auto = go on | never | PATH of a run or step folder to go on from
    init_from: Free[str] = ""  # run or step folder: a new run begins with its model and tokenizer
    prompts: Free[list[str]] = field(
        default_factory=lambda: ["你好", "How are you?"]
    )  # answered at evaluation
    data: DataSettings = field(default_factory=DataSettings)  # the corpus
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)  # text <-> tokens
    model: GPTConfig = field(default_factory=GPTConfig)  # the shape of the model
    optim: OptimSettings = field(default_factory=OptimSettings)  # optimizer and learning rate
    sample: Free[SampleSettings] = field(default_factory=SampleSettings)  # sample replies

    def check(self) -> list[str]:
        """Problems that the types do not show, in plain words."""
        return checkpoint.name_problems(self.run)


@torch.no_grad()
def evaluate(
    model: GPT, corpus: Corpus, s: TrainSettings, rows: int, world: World, ctx: torch.autocast
) -> dict:
    """Mean loss per target token in nats, and bits per byte, over the fixed validation blocks, shared by all ranks.

    Every rank makes the same number of forward passes (rows past the end have no target), so that a strategy whose
    forward communicates works here too.
    """
    model.eval()
    nats = tokens = n_bytes = 0.0
    for first in range(
        world.rank * rows, corpus.n_val_blocks + world.rank * rows, rows * world.size
    ):
        x, y = corpus.val_batch(range(first, first + rows))
        with ctx:
            nats += float(forward(model, x, y, corpus, s, world.device))
        tokens += int((y != IGNORE).sum())
        n_bytes += corpus.val_bytes(y)
    model.train()
    nats, tokens, n_bytes = world.sum(nats, tokens, n_bytes)
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / n_bytes}


def forward(
    model: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    corpus: Corpus,
    s: TrainSettings,
    device: torch.device,
) -> torch.Tensor:
    """Summed loss of a micro-batch; with data.isolate each packed dialogue (each bos begins one) sees only itself."""
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    segments = (x == corpus.tokenizer.bos).cumsum(1) if s.data.isolate else None
    return model(x, y, segments)


def train(s: TrainSettings, world: World, strategy_for: Callable = choose) -> int:
    """The whole run. strategy_for(module, world) decides how the model is spread over processes."""
    say = print if world.main else lambda *_: None
    device, run = world.device, Path(s.out_dir) / s.run
    dtype, why_dtype = hardware.choose_dtype(s.dtype, device)
    compiled, why_compiled = hardware.choose_compile(s.compile, device, s.max_steps)

    resumed = checkpoint.starting_point(run, s.resume, say)
    step, tokens = (resumed.step, resumed.meta["tokens"]) if resumed else (0, 0)
    evaluated = {r["step"]: r["loss"] for r in read(run, "val") if r["step"] <= step}
    s.init_from = s.init_from or (
        resumed.meta.get("init_from", "") if resumed else ""
    )  # on record for the leak check
    begun = resumed or (checkpoint.required(s.init_from) if s.init_from else None)
    if s.init_from:  # continued pretraining: another corpus, the same shape
        s.model = replace(
            checkpoint.shape(begun.meta["model"], begun.path, GPTConfig), dropout=s.model.dropout
        )
    shares = share_batch(s.batch_tokens, s.model.block_size, s.micro_batch, world)
    tokenizer = checkpoint.tokenizer_of(begun) if begun else s.tokenizer
    corpus = prepare(s.data, tokenizer, s.model.block_size)
    world.must_agree(
        f"{s.out_dir} and data.path", step, len(evaluated), int(corpus.fingerprint[:8], 16)
    )
    vocab = corpus.tokenizer.vocab_size
    s.model.vocab_size = s.model.vocab_size or 64 * math.ceil(vocab / 64)
    if s.model.vocab_size < vocab:
        raise UserError(
            f"model.vocab_size={s.model.vocab_size} is less than the tokenizer's {vocab}: use 0"
        )
    identity = {
        "model": asdict(s.model),
        "tokenizer": corpus.tokenizer.hash,
        "data": corpus.fingerprint,
        "seed": s.seed,
        "batch_tokens": s.batch_tokens,
        "data.isolate": s.data.isolate,
        "optim.name": s.optim.name,
        **{f"tokenizer.{key}": value for key, value in asdict(s.tokenizer).items()},
    }

    torch.manual_seed(s.seed)  # the same weights on every rank
    module = GPT(s.model).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    optimizers = make_optimizers(module, s.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if resumed:
        checkpoint.check_same(resumed.meta, identity, resumed.path)
    if begun:
        checkpoint.load_weights(begun, module)
    if resumed:
        checkpoint.load_optimizers(resumed, module, optimizers, world)
        scaler.load_state_dict(
            resumed.meta["scaler"] or scaler.state_dict()
        )  # {}: that run needed none
    strategy = strategy_for(module, world)
    checkpoint.forget_lost(run, evaluated, lambda loss: -loss, world.main)
    if compiled:
        module.compile_parts()
    if world.main:
        run.mkdir(parents=True, exist_ok=True)
        settings.write(s, run / "config.yaml")
        corpus.tokenizer.save(run / "tokenizer.json")

    n_params = sum(p.numel() for p in module.parameters())
    say(
        f"run      {run}: "
        + (f"continuing from step {step} of {s.max_steps}" if step else f"{s.max_steps} steps")
    )
    say(
        f"model    {n_params / 1e6:.1f}M parameters, vocabulary {vocab:,} ({corpus.tokenizer.kind})"
    )
    say(
        f"data     {corpus.n_train_tokens:,} training tokens, {corpus.n_val_tokens:,} held out; "
        f"this run reads them {s.max_steps * shares.rows / corpus.blocks_per_epoch:.2f} times"
    )
    say(
        f"batch    {s.batch_tokens:,} tokens = {shares.rows} sequences of {s.model.block_size} = "
        f"{world.size} process(es) x {shares.accum} accumulation x {shares.micro} sequences"
    )
    say(
        f"device   {device.type}, {strategy.name}; {str(dtype)[6:]}: {why_dtype}; "
        f"torch.compile {'on' if compiled else 'off'}: {why_compiled}"
    )

    ctx = hardware.autocast(device, dtype)
    peak = hardware.peak_flops(device) if dtype in (torch.bfloat16, torch.float16) else 0.0
    metrics = Metrics(run, world, step, s.max_steps)

    def save() -> None:
        nonlocal saved
        if saved == step:
            return
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        meta = {
            "step": step,
            "tokens": tokens,
            **identity,
            "scaler": scaler.state_dict(),
            "versions": versions,
            "init_from": s.init_from,
        }
        checkpoint.save(run, module, optimizers, meta, world, s.keep)
        saved = step

    def load(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = [corpus.train_batch(rows, s.seed) for rows in shares.of(step, world.rank)]
        return (
            [(x.pin_memory(), y.pin_memory()) for x, y in batches]
            if device.type == "cuda"
            else batches
        )

    saved = (
        step if resumed and resumed.run == run else 0
    )  # the last step of which this run has a checkpoint
    fresh_tokens, began, batches = 0, time.perf_counter(), load(step)
    with StopRequest() as stop:
        while True:
            last = step >= s.max_steps
            if step % s.save_every == 0 or last:
                save()  # before evaluating: whatever happens there, nothing is lost
                fresh_tokens, began = 0, time.perf_counter()
            if step not in evaluated and step and (step % s.eval_every == 0 or last):
                result = evaluate(module, corpus, s, shares.micro, world, ctx)
                checkpoint.check_loss(run, step, result["loss"])
                if result["loss"] < min(evaluated.values(), default=math.inf):
                    save()
                    if world.main:
                        checkpoint.point(run, "best", step)
                        checkpoint.prune(run, s.keep)
                metrics.log({"step": step, "split": "val", "tokens": tokens, **result})
                evaluated[step] = result["loss"]
                # the cache's growing shapes would compile again and again, and mark the training shapes as dynamic
                with ctx, torch.compiler.set_stance("force_eager"):
                    answers = replies(module, corpus.tokenizer, s.prompts, s.sample)
                pairs = zip(s.prompts, answers, strict=True)
                metrics.text("replies", "\n".join(f"  {q} → {a}" for q, a in pairs), step)
                fresh_tokens, began = 0, time.perf_counter()
            if last:
                break

            lr = set_lr(optimizers, lr_factor(step, s.max_steps, s.optim))
            world.seed(s.seed, step)  # dropout
            targets, stopping = world.sum(
                sum(int((y != IGNORE).sum()) for _, y in batches), stop.signal > 0
            )
            if stopping:  # one rank got a signal: all stop here, together
                break

            total = 0.0
            for i, (x, y) in enumerate(batches):
                with strategy.accumulate(last=i == len(batches) - 1):
                    with ctx:
                        loss = forward(strategy.model, x, y, corpus, s, device)
                    scaler.scale(loss * (strategy.loss_scale / targets)).backward()
                total += loss.detach()
            batches = load(step + 1)  # while a GPU is still computing
            loss = world.sum(float(total))[0] / targets
            norm = update(optimizers, scaler, strategy.clip, s.optim.clip, loss, step, saved)

            step, tokens, fresh_tokens = (
                step + 1,
                tokens + s.batch_tokens,
                fresh_tokens + s.batch_tokens,
            )
            metrics.step(loss, s.batch_tokens)
            if step % s.log_every == 0 or step == s.max_steps:
                speed = fresh_tokens / (time.perf_counter() - began)
                mfu = {"mfu": speed / world.size * flops_per_token(module) / peak} if peak else {}
                metrics.log(
                    {
                        "step": step,
                        "split": "train",
                        "loss": loss,
                        "tokens": tokens,
                        "lr": lr,
                        "grad_norm": norm,
                        "tokens_per_second": speed,
                        **mfu,
                    }
                )
                fresh_tokens, began = 0, time.perf_counter()
        save()
    metrics.close()
    if step < s.max_steps:
        say(f"stopped by a signal after step {step}, saved in {run}; the same command continues")
        return 128 + (stop.signal or signal.SIGTERM)
    say(
        f"finished {step} steps, best validation loss {min(evaluated.values()):.4f}; "
        f"to talk to it: python chat.py {run}"
    )
    return 0


def main() -> int:
    s = settings.load(TrainSettings, doc=__doc__)
    with start(s.device) as world, checkpoint.alone(Path(s.out_dir) / s.run, world.main):
        return train(s, world)


if __name__ == "__main__":
    console.run(main)
