"""transformers' GPT-2 in a small loop, with our tokens, batches and AdamW: a contender of
bench/time_to_quality.py. It prints the lines of train.py."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import gpt2_of_hugging_face
from model import IGNORE
from smallgpt import hardware, settings
from smallgpt.optim import lr_factor, make_optimizers, set_lr
from smallgpt.parallel.strategy import share_batch
from smallgpt.text.tokens import prepare
from train import Batch, TrainSettings, round_vocabulary, to_batch


class HuggingFace:
    """A training of these settings."""

    def __init__(self, s: TrainSettings):
        self.s = s
        self.device = hardware.choose_device(s.device)
        dtype, why = hardware.choose_dtype(s.dtype, self.device)
        self.autocast = hardware.autocast(self.device, dtype)
        self.corpus = prepare(s.data, s.tokenizer, s.model.block_size)
        self.shares = share_batch(
            s.batch_tokens,
            s.model.block_size,
            s.micro_batch,
            data_size=1,
        )
        round_vocabulary(s.model, self.corpus.tokenizer.vocab_size)
        torch.manual_seed(s.seed)
        self.model = gpt2_of_hugging_face(s.model, s.model.dropout)
        self.model.to(self.device).train()
        self.forward = self.model
        if s.compile == "true":
            self.forward = torch.compile(self.model)
        parameters = dict(self.model.named_parameters())
        self.optimizers = make_optimizers(parameters, s.optim)
        precision = hardware.name_of(dtype)
        print(f"device   {self.device.type}; {precision}: {why}; compile={s.compile}")

    def to_batch(self, x: Tensor, y: Tensor) -> Batch:
        """train.py's micro-batch of tokens x and targets y (B, T)."""
        return to_batch(x, y, self.corpus, isolate=False, device=self.device)

    def nats(self, batch: Batch) -> Tensor:
        """The summed loss of a micro-batch."""
        x, y, _ = batch.inputs
        with self.autocast:
            logits = self.forward(input_ids=x, use_cache=False).logits  # (B, T, V)
        flat = logits.float().flatten(0, 1)
        return F.cross_entropy(flat, y.flatten(), ignore_index=IGNORE, reduction="sum")

    def step(self, step: int) -> float:
        """One update; the mean loss before it."""
        factor = lr_factor(step, self.s.max_steps, self.s.optim)
        set_lr(self.optimizers, factor)
        batches = []
        for rows in self.shares.of(step, 0):
            x, y = self.corpus.train_batch(rows, self.s.seed)
            batches.append(self.to_batch(x, y))
        targets = sum(batch.n_targets for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.nats(batch) / targets
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s.optim.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    def evaluate(self) -> tuple[float, float]:
        """(loss per token, bits per byte) of all held-out text."""
        self.model.eval()
        nats = 0.0
        n_tokens = n_bytes = 0
        rows = self.shares.micro
        for first in range(0, self.corpus.n_val_blocks, rows):
            blocks = range(first, first + rows)
            x, y = self.corpus.val_batch(blocks)
            batch = self.to_batch(x, y)
            with torch.no_grad():
                nats += float(self.nats(batch))
            n_tokens += batch.n_targets
            n_bytes += self.corpus.val_bytes(y)
        self.model.train()
        return nats / n_tokens, nats / math.log(2) / n_bytes


def main(config: str, marks: set[int]) -> None:
    """Train with the settings of this file, and evaluate after these steps."""
    s = settings.load(TrainSettings, [config])
    training = HuggingFace(s)
    for step in range(s.max_steps):
        loss = training.step(step)
        done = step + 1
        begin = f"step {done}/{s.max_steps}"
        print(f"{begin} | train loss {loss:.4f}")
        if done in marks:
            loss, bits_per_byte = training.evaluate()
            print(f"{begin} | val loss {loss:.4f} | {bits_per_byte:.4f} bits/byte")
