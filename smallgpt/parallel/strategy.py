"""How a model is spread over processes. One loop serves all: a strategy owns the wrapping, the gradient
synchronisation and the clipping; `single` is the strategy of one process and the interface of the others.

`loss_scale`: what the local loss sum must be multiplied by, besides 1 / (valid targets of the whole step), for the
synchronised gradient to be that of the global mean. A later strategy (FSDP, tensor, pipeline) is one more class.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from smallgpt.console import UserError
from smallgpt.parallel.world import World


@dataclass(frozen=True)
class Shares:
    """How the global batch of a step is cut: rows = processes * accum * micro."""

    rows: int  # sequences per step, over all processes
    accum: int  # forward passes per step and process
    micro: int  # sequences per forward pass

    def of(self, step: int, rank: int) -> list[range]:
        """The global sample indices of each micro-batch of this rank at this step."""
        first = step * self.rows + rank * self.accum * self.micro
        return [
            range(i, i + self.micro)
            for i in range(first, first + self.accum * self.micro, self.micro)
        ]


def share_batch(batch_tokens: int, block_size: int, micro_batch: int, world: World) -> Shares:
    """Derive accumulation and micro-batch (at most micro_batch sequences) from the global batch.

    UserError if batch_tokens is not a multiple of block_size times the number of processes.
    """
    unit = block_size * world.size
    if batch_tokens % unit:
        raise UserError(
            f"batch_tokens={batch_tokens} cannot be shared equally: it must be a multiple of model.block_size="
            f"{block_size} x {world.size} process(es) = {unit}, for example {max(1, round(batch_tokens / unit)) * unit}"
        )
    mine = batch_tokens // unit
    micro = next(m for m in range(min(micro_batch, mine), 0, -1) if mine % m == 0)
    return Shares(mine * world.size, mine // micro, micro)


class Single:
    """One process. `module` is the plain model (clean parameter names); `model` is what the loop calls."""

    name = "single"
    loss_scale = 1.0

    def __init__(self, module: nn.Module, world: World):
        self.module = self.model = module

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Around forward AND backward of a micro-batch; gradients are synchronised in the last one of a step."""
        return nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        """Norm of the whole gradient before clipping it to max_norm (0 = only measure)."""
        params = [p for p in self.module.parameters() if p.grad is not None]
        return nn.utils.clip_grad_norm_(params, max_norm or float("inf"))


class DDP(Single):
    """Every process holds the whole model and a share of each batch; gradients are averaged while backward runs."""

    name = "ddp"

    def __init__(self, module: nn.Module, world: World):
        super().__init__(module, world)
        self.loss_scale = float(world.size)  # DDP averages over processes, the step wants the sum
        torch._dynamo.config.optimize_ddp = (
            False  # it would cut each compiled block in two at the edge of a bucket
        )
        ids = [world.device.index] if world.device.type == "cuda" else None
        self.model = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def accumulate(self, last: bool) -> AbstractContextManager:
        # around the forward too: DDP decides there whether the coming backward synchronises (build-nanogpt issue 30)
        return nullcontext() if last else self.model.no_sync()


def choose(module: nn.Module, world: World) -> Single:
    """DDP when there are several processes, otherwise Single."""
    return (DDP if world.size > 1 else Single)(module, world)
