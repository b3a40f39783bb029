"""How a model is spread over processes: the seam between the loops and every parallel layout.

A strategy owns what differs between one process, DDP and other layouts, and nothing else. The
loops call it in this order:

    with spread.birthplace():
        model = GPT(config)                    # weights from the seed, the same on every rank
    strategy = spread.build(model, dtype)      # moves it to the device and wraps it in place
    optimizers = make_optimizers(strategy.names(), ...)   # after wrapping: it sees the shards
    ...
    strategy.seed(seed, step)
    nats = strategy.forward_backward(batches, loss_of, scale)
    norm = strategy.clip(optimizers, max_norm)

`Single` is the strategy of one process and the interface of the others: a new layout is one more
class, which overrides what is different there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig
from smallgpt.adam import Optimizer
from smallgpt.console import UserError
from smallgpt.hardware import autocast
from smallgpt.parallel.world import World


class HasInputs(Protocol):
    """A micro-batch. A pipeline reads its inputs, any other layout leaves them to loss_of."""

    @property
    def inputs(self) -> tuple:
        """What the model is called with."""


LossOf = Callable[[Callable[..., Any], Any], Tensor]  # (what runs the model, a batch) -> loss


@dataclass(frozen=True)
class Shares:
    """How the global batch of a step is cut: rows = data ranks * accum * micro."""

    rows: int  # sequences per step, over all processes
    accum: int  # forward passes per step and process
    micro: int  # sequences per forward pass

    def of(self, step: int, data_rank: int) -> list[range]:
        """The global sample indices of each micro-batch of this data rank at this step."""
        mine = self.accum * self.micro
        first = step * self.rows + data_rank * mine
        return [range(row, row + self.micro) for row in range(first, first + mine, self.micro)]


def share_batch(
    batch_tokens: int, block_size: int, micro_batch: int, data_size: int, depth: int = 1
) -> Shares:
    """Derive accumulation and micro-batch (at most micro_batch sequences) from the global batch.

    depth: the accumulation is a multiple of it, so that a pipeline of that depth is filled.
    UserError if batch_tokens is not a multiple of block_size times the data ranks times depth."""
    unit = block_size * data_size * depth
    if batch_tokens % unit:
        nearest = max(1, round(batch_tokens / unit)) * unit
        parts = f"{data_size} data-parallel reader(s)"
        if depth > 1:
            parts += f" x {depth} micro-batches (mesh.pp)"
        raise UserError(
            f"batch_tokens={batch_tokens} cannot be shared equally: it must be a multiple of "
            f"model.block_size={block_size} x {parts} = {unit}, for example {nearest}"
        )
    turns = batch_tokens // unit  # sequences of each of `depth` equal parts
    micro = min(micro_batch, turns)
    while turns % micro:
        micro -= 1
    mine = turns * depth
    return Shares(rows=mine * data_size, accum=mine // micro, micro=micro)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name, a tied matrix once."""
    shapes = {}
    for name, p in model.named_parameters():
        shapes[name] = tuple(p.shape)
    return shapes


class Single:
    """One process. The model is on its device.

    `model` is the plain model with clean parameter names, `shapes` those of its parameters before
    any was cut or left to another process. `data_rank` of `data_size`: which share of every global
    batch this process reads; processes that hold parts of one replica have the same one.
    """

    name = "one process"
    depth = 1  # processes in a pipeline: a step's micro-batches must be a multiple of it
    loss_parts = 1  # processes that share the tokens of a micro-batch's loss

    def __init__(self, model: nn.Module, world: World, dtype: torch.dtype):
        self.shapes = shapes_of(model)
        self.model = model
        self.world = world
        self.data_rank = world.rank
        self.data_size = world.size
        self.autocast = autocast(world.device, dtype)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self.wrapped: Callable[..., Any] = model  # what runs forward in training
        self.gradient_scale = 1.0  # makes the synchronised gradient that of the summed loss

    @property
    def readers(self) -> str:
        """Those that read different rows, in words: each process, or each replica of several."""
        is_each = self.data_size == self.world.size
        noun = "process(es)" if is_each else "replica(s)"
        return f"{self.data_size} {noun}"

    def names(self) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter, a tied matrix once. Checkpoints and optimizers use these."""
        return dict(self.model.named_parameters())

    def gather_weights(self) -> dict[str, Tensor]:
        """All weights, whole, on the CPU, by canonical name, on the main process; nothing on the
        others. They may share the parameters' memory. A collective."""
        weights = {}
        if self.world.main:
            for name, p in self.names().items():
                weights[name] = p.detach().cpu()
        return weights

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put all weights, whole, by canonical name, into the model. A collective; each process
        reads those that it needs, but where the model is cut the main process reads for all."""
        for name, p in self.names().items():
            p.copy_(weights[name])

    def whole(self) -> GPT | None:
        """The whole GPT for what only the main process does, such as replies; None elsewhere. A
        collective."""
        return self.model if self.world.main else None

    def seed(self, seed: int, step: int) -> None:
        """Seed torch for one step of this data rank. All randomness of a run is a function of
        (seed, step, data rank): there is nothing to save, and resuming is exact."""
        of_step = seed * 1_000_003 + step
        key = of_step * 1_000_003 + self.data_rank
        torch.manual_seed(key % 2**63)

    def sum(self, *values: float) -> list[float]:
        """Sums over the processes that read different data, in float64. A collective."""
        return self.world.sum(*values)

    def synchronising(self, last: bool) -> AbstractContextManager:
        """Around forward AND backward of a micro-batch: gradients are synchronised in the last."""
        return nullcontext()

    def forward_backward(
        self, batches: Sequence[HasInputs], loss_of: LossOf, scale: float
    ) -> Tensor | float:
        """Add the gradient of scale * (the sum of all losses, of all processes) to the parameters.

        loss_of(run, batch) -> scalar: it calls `run` once, like the model, with batch.inputs. (The
        `run` of a pipeline's last stage may give what its schedule has computed of them.) Returns
        the sum of this process's losses, not scaled."""
        total: Tensor | float = 0.0
        for number, batch in enumerate(batches, 1):
            with self.synchronising(last=number == len(batches)):
                with self.autocast:
                    loss = loss_of(self.wrapped, batch)
                scaled = loss * (self.gradient_scale * scale)
                self.scaler.scale(scaled).backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, *inputs: Any) -> Any:
        """What the model makes of inputs, without dropout; `settle` comes after the last call."""
        self.model.eval()
        with self.autocast:
            return self.model(*inputs)

    def settle(self) -> None:
        """Back to training, after evaluations."""
        self.model.train()

    def clip(self, optimizers: list[Optimizer], max_norm: float) -> Tensor:
        """Norm of the whole gradient before clipping it to max_norm (0 = only measure), a scalar on
        the device: a GPU may still be computing it."""
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = self.gradient_norm(parameters)
        most = max_norm or math.inf
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return norm

    def gradient_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Norm of the whole gradient, of which these parameters may have a part. A collective."""
        gradients = [p.grad for p in parameters]
        return nn.utils.get_total_norm(gradients)


class DDP(Single):
    """Every process holds the whole model and a share of each batch; gradients are averaged while
    backward runs (Li et al. 2020)."""

    def __init__(self, model: nn.Module, world: World, dtype: torch.dtype):
        super().__init__(model, world, dtype)
        self.name = f"ddp {world.size}"
        self.gradient_scale = float(world.size)  # DDP averages, the step wants the sum
        # it would cut each compiled block in two at the edge of a bucket
        torch._dynamo.config.optimize_ddp = False
        ids = [world.device.index] if world.device.type == "cuda" else None
        self.wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def synchronising(self, last: bool) -> AbstractContextManager:
        # around the forward, too: DDP decides there whether the coming backward synchronises
        return nullcontext() if last else self.wrapped.no_sync()


class Spread:
    """How a model is spread over the processes of a world: here each holds a whole one. Other
    layouts override what is different there."""

    def __init__(self, world: World):
        self.world = world

    def check(self, config: GPTConfig) -> None:
        """UserError if a model of this shape cannot be spread like this."""

    def birthplace(self, drawn: bool = True) -> torch.device:
        """Where this process makes the model: on the CPU, or, of one that it never holds whole, on
        the meta device, which has no memory. drawn: are its weights drawn, and not read?"""
        return torch.device("cpu")

    def build(
        self, model: nn.Module, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None
    ) -> Single:
        """Move the model to the device, wrap it in place, and give its strategy: DDP for several
        processes, Single for one.

        dtype: precision of matrix products. weights: whole, by canonical name, those to begin with
        instead of the model's own. Optimizers are made from `names()` afterwards."""
        kind = DDP if self.world.size > 1 else Single
        strategy = kind(model.to(self.world.device), self.world, dtype)
        if weights is not None:
            strategy.set_weights(weights)
        return strategy
