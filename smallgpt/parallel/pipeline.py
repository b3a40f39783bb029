"""Pipeline parallelism: the blocks are cut into stages, which different processes hold.

The micro-batches of a step go through the stages one behind the other, so that all are busy (Huang
et al. 2019, GPipe). 1F1B (Narayanan et al. 2019, PipeDream) begins with the backward passes early,
and keeps fewer activations; interleaved (Narayanan et al. 2021, Megatron-LM) gives each process
several stages, and waits less. The schedules are PyTorch's own.

All processes of a pipeline read the same rows: what travels between them is the hidden states, and
their gradients on the way back.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.tensor import DTensor

from model import GPT, GPTClassifier
from smallgpt.parallel.mesh import Mesh, gpt_of, whole_of
from smallgpt.parallel.strategy import HasInputs, LossOf

SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}


Finish = Callable[[Any, Any], Tensor | None]  # (what the model made of a batch, the batch) -> loss


class Stage(nn.Module):
    """Some neighbouring blocks of a model, with what comes before the first or after the last one:
    FSDP gathers its parameters, and a schedule runs it."""

    def __init__(self, model: GPT | GPTClassifier, blocks: range, autocast: AbstractContextManager):
        super().__init__()
        gpt = gpt_of(model)
        self.first = blocks.start
        self.end = blocks.stop
        self.is_last = self.end == gpt.config.n_layer
        outer = []
        if self.first == 0:
            outer += [gpt.wte, gpt.wpe]
        if self.is_last:
            outer += [gpt.norm, gpt.lm_head]
            if gpt.config.tie_weights:
                outer.append(gpt.wte)  # the head's matrix, under its name
            if isinstance(model, GPTClassifier):
                outer.append(model.head)
        self.outer = nn.ModuleList(module for module in outer if module is not None)
        self.blocks = gpt.blocks[blocks.start : blocks.stop]
        # the model itself is no submodule: it may hold other stages, too
        self.forward_stage = model.forward_stage
        self.autocast = autocast
        self.queue: Iterator[HasInputs] = iter(())  # the micro-batches to come, in order
        self.size = (0, 0)  # rows and positions of the hidden states that travel
        self.finish: Finish | None = None  # what follows the last stage

    def forward(self, x: Tensor | None = None) -> Tensor | None:
        """The next micro-batch's part of the model's forward; of the last stage its loss.

        Hidden states come in and go out padded to `size`, the same for all micro-batches of a
        step."""
        batch = next(self.queue)
        rows, length = batch.inputs[0].shape[:2]
        if x is not None:
            x = x[:rows, :length]
        with self.autocast:
            output = self.forward_stage(x, self.first, self.end, *batch.inputs)
            if self.is_last:
                return self.finish(output, batch)
        if (rows, length) == self.size:
            return output
        more_rows = self.size[0] - rows
        more_positions = self.size[1] - length
        return F.pad(output, (0, 0, 0, more_positions, 0, more_rows))


class Rows(NamedTuple):
    """Some rows that are evaluated."""

    inputs: tuple


class Pipeline(Mesh):
    """A model cut into stages over the axis pp, each of which may be cut over the other axes.

    `model` is a GPT or GPTClassifier that lacks what other processes hold. Of a tied matrix the
    first and the last stage have a copy each, under the name of the embedding; their gradients are
    added up, so the copies stay equal."""

    def cut_layers(self) -> None:
        pp = self.mesh["pp"]
        self.depth = pp.size()
        self.pp_rank = pp.get_local_rank()
        self.pp_group = pp.get_group()
        self.has_last = self.pp_rank == self.depth - 1
        gpt = gpt_of(self.model)
        self.layers = cut_in_ranges(gpt.config.n_layer, self.s.stages)
        # whether the hidden states that go into a stage have a gradient
        self.in_graph = [trains_below(gpt, blocks.start) for blocks in self.layers]
        self.stages: dict[int, Stage] = {}
        for number in range(self.pp_rank, self.s.stages, self.depth):
            self.stages[number] = Stage(self.model, self.layers[number], self.autocast)
        keep_only(self.model, self.stages.values())
        for stage in self.stages.values():
            self.shard(stage, stage.blocks)
        self.schedule = functools.lru_cache(maxsize=2)(self.make_schedule)  # training, evaluation
        if gpt.config.tie_weights:
            # each process of the first stage, and the one of the last that holds the same parts
            ends = self.mesh.mesh[[0, -1]].flatten(1).T.tolist()
            self.ends, _ = dist.new_subgroups_by_enumeration(ends)

    @property
    def computes_loss(self) -> bool:
        return self.has_last and super().computes_loss

    # --- weights ----------------------------------------------------------------------------------

    def home(self, name: str) -> int:
        """The pp rank that a parameter lives on; of a tied matrix that of the embedding."""
        block = re.search(r"blocks\.(\d+)\.", name)
        if block is None:
            return 0 if re.search(r"wte|wpe", name) else self.depth - 1
        layer = int(block[1])
        (stage,) = (number for number, layers in enumerate(self.layers) if layer in layers)
        return stage % self.depth

    def gather(self, name: str, parameter: nn.Parameter | None) -> Tensor:
        home = self.home(name)
        if self.pp_rank == home:
            whole = whole_of(parameter).to(self.world.device)
        else:
            dtype = next(self.model.parameters()).dtype
            whole = torch.empty(self.shapes[name], dtype=dtype, device=self.world.device)
        if home:
            dist.broadcast(whole, group=self.pp_group, group_src=home)
        return whole

    def tied(self) -> nn.Parameter | None:
        """This process's copy of the tied matrix, if it has one."""
        if not gpt_of(self.model).config.tie_weights:
            return None
        copies = (p for name, p in self.names().items() if name.endswith("wte.weight"))
        return next(copies, None)

    # --- a step -----------------------------------------------------------------------------------

    def forward_backward(
        self, batches: Sequence[HasInputs], loss_of: LossOf, scale: float
    ) -> Tensor | float:
        losses = []

        def finish(output: Any, batch: HasInputs) -> Tensor:
            loss = loss_of(lambda *inputs: output, batch)
            losses.append(loss.detach())
            return loss * (self.gradient_scale * scale)

        # what was drawn before is the same on all stages; their dropout is not
        torch.manual_seed(int(torch.randint(2**48, ())) + self.pp_rank)
        self.run(batches, finish, training=True)
        self.sum_tied_gradient()
        return sum(losses)

    def run(self, batches: Sequence[HasInputs], finish: Finish, training: bool) -> None:
        """Take all micro-batches through the pipeline, and in training back."""
        shapes = [batch.inputs[0].shape[:2] for batch in batches]
        rows = max(rows for rows, _ in shapes)
        length = max(length for _, length in shapes)
        for stage in self.stages.values():
            stage.queue = iter(batches)
            stage.size = (rows, length)
            stage.finish = finish
        schedule = self.schedule(len(batches), rows, length, training)
        go = schedule.step if training else schedule.eval
        go(target=torch.zeros(len(batches)), return_outputs=False)

    def make_schedule(
        self, count: int, rows: int, length: int, training: bool
    ) -> ScheduleGPipe | Schedule1F1B | ScheduleInterleaved1F1B:
        """The order of work for `count` micro-batches, with buffers for their hidden states
        (rows, length, C)."""
        shape = (rows, length, gpt_of(self.model).config.n_embd)
        dtype = next(self.model.parameters()).dtype
        needs_grad = [*self.in_graph, True]  # behind the last stage is the loss
        hidden = [
            torch.empty(shape, dtype=dtype, device="meta", requires_grad=needed)
            for needed in needs_grad
        ]
        stages = []
        for number, module in self.stages.items():
            stage = PipelineStage(
                module,
                number,
                self.s.stages,
                self.world.device,
                input_args=(hidden[number],) if number else (),
                output_args=(hidden[number + 1],),
                group=self.pp_group,
            )
            stages.append(stage)
        make = SCHEDULES[self.s.schedule]
        if not training and make is Schedule1F1B:
            make = ScheduleGPipe  # takes any number of micro-batches
        return make(
            stages if make is ScheduleInterleaved1F1B else stages[0],
            count,
            loss_fn=lambda loss, target: loss,  # which the last stage has computed
            scale_grads=False,
        )

    def sum_tied_gradient(self) -> None:
        """Add the gradients of the two copies of a tied matrix. A collective of both."""
        copy = self.tied()
        if copy is None or not copy.requires_grad:
            return
        if copy.grad is None:
            copy.grad = torch.zeros_like(copy)
        part = copy.grad
        if isinstance(copy, DTensor):
            # as a sum over tensor-parallel ranks it is cut in other ways than the matrix
            copy.grad = copy.grad.redistribute(placements=copy.placements)
            part = copy.grad.to_local()
        dist.all_reduce(part, group=self.ends)

    def gradient_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        copy = self.tied() if self.has_last else None  # the first stage counts it
        norm = super().gradient_norm([p for p in parameters if p is not copy])
        square = norm.to(self.world.device).double().square()
        dist.all_reduce(square, group=self.pp_group)
        return square.sqrt().to(next(self.model.parameters()).dtype)

    @torch.no_grad()
    def evaluate(self, *inputs: Any) -> Any:
        self.model.eval()
        parts = []  # of each input, one for a micro-batch
        for x in inputs:
            is_cut = isinstance(x, Tensor)
            parts.append(x.chunk(self.depth) if is_cut else itertools.repeat(x))
        batches = [Rows(inputs) for inputs in zip(*parts, strict=False)]
        outputs = []
        self.run(batches, lambda output, _: outputs.append(output), training=False)
        found = [join(outputs) if self.has_last else None]
        dist.broadcast_object_list(found, group=self.pp_group, group_src=self.depth - 1)
        return found[0]

    def settle(self) -> None:
        super().settle()
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def cut_in_ranges(n_layer: int, stages: int) -> list[range]:
    """The blocks of each stage. What is left over goes to the first ones: the last one has the LM
    head, too."""
    size, rest = divmod(n_layer, stages)
    ranges = []
    first = 0
    for number in range(stages):
        end = first + size + (number < rest)
        ranges.append(range(first, end))
        first = end
    return ranges


def trains_below(gpt: GPT, layer: int) -> bool:
    """Does anything train that comes before this block?"""
    below = [gpt.wte, gpt.wpe, *gpt.blocks[:layer]]
    return layer > 0 and any(
        p.requires_grad for part in below if part is not None for p in part.parameters()
    )


def keep_only(model: GPT | GPTClassifier, stages: Iterable[Stage]) -> None:
    """Take out of the model what none of the stages holds. Its blocks keep their numbers."""
    kept = {module for stage in stages for module in stage.modules()}
    gpt = gpt_of(model)
    for name in ("wte", "wpe", "norm", "lm_head"):
        if getattr(gpt, name) not in kept:
            setattr(gpt, name, None)
    for number, block in enumerate(gpt.blocks):
        if block not in kept:
            gpt.blocks[number] = nn.Identity()
    if isinstance(model, GPTClassifier) and model.head not in kept:
        model.head = None


def join(outputs: list) -> Any:
    """What the model makes of a batch, from what it made of parts of it: rows go one under another,
    losses are added up."""
    if isinstance(outputs[0], tuple):
        return tuple(join(list(of_parts)) for of_parts in zip(*outputs, strict=True))
    return torch.cat(outputs) if outputs[0].dim() else torch.stack(outputs).sum()
