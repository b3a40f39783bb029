"""Pipeline parallelism: the blocks are cut into stages, which different processes hold.

The micro-batches of a step go through the stages one behind the other, so that all are busy (Huang
et al. 2019, GPipe). 1F1B (Narayanan et al. 2019, PipeDream) begins with the backward passes early,
and keeps fewer activations; interleaved (Narayanan et al. 2021, Megatron-LM) gives each process
several stages, and waits less. The schedules are PyTorch's own.

All processes of a pipeline read the same rows: what travels between them is the hidden states, and
their gradients on the way back.
"""

import bisect
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
from torch.utils._pytree import tree_map

from model import GPT, GPTClassifier
from smallgpt.parallel.layout import cut_in_ranges
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
        outer = nn.ModuleList()
        if self.first == 0:
            outer.append(gpt.wte)
            if gpt.wpe is not None:
                outer.append(gpt.wpe)
            if isinstance(model, GPTClassifier) and model.marks is not None:
                outer.append(model.marks)
        if self.is_last:
            outer.append(gpt.norm)
            outer.append(gpt.lm_head)
            if gpt.config.tie_weights:
                outer.append(gpt.wte)  # the head's matrix, under its name
            if isinstance(model, GPTClassifier):
                outer.append(model.head)
        self.outer = outer
        self.blocks = gpt.blocks[self.first : self.end]
        # the model itself is no submodule: it may hold other stages, too
        self.forward_stage = model.forward_stage
        self.autocast = autocast
        # The micro-batches to come, in order. A schedule passes tensors only, and takes the
        # micro-batches through every stage in their order.
        self.queue: Iterator[HasInputs] = iter(())
        self.size = (0, 0)  # rows and positions of the hidden states that travel
        self.finish: Finish | None = None  # what follows the last stage

    def forward(self, x: Tensor | None = None) -> Tensor | None:
        """The next micro-batch's part of the model's forward; of the last stage its loss.

        Hidden states come in and go out padded to `size`, the same for all micro-batches of a
        step."""
        batch = next(self.queue)
        tokens = batch.inputs[0]
        rows, length = tokens.shape
        if x is not None:
            x = x[:rows, :length]
        with self.autocast:
            output = self.forward_stage(x, self.first, self.end, *batch.inputs)
            if self.is_last:
                return self.finish(output, batch)
        if (rows, length) == self.size:
            return output
        all_rows, all_positions = self.size
        padding = (0, 0, 0, all_positions - length, 0, all_rows - rows)
        return F.pad(output, padding)


class Rows(NamedTuple):
    """Some rows that are evaluated."""

    inputs: tuple


class Pipeline(Mesh):
    """A model cut into stages over the axis pp, each of which may be cut over the other axes.

    `model` is a GPT or GPTClassifier that lacks what other processes hold. Of a tied matrix the
    first and the last stage have a copy each, under the name of the embedding; their gradients are
    added up, so the copies stay equal."""

    frees_weights = False  # the micro-batches take turns: each would gather them anew

    def cut_layers(self) -> None:
        pp = self.mesh["pp"]
        self.pp_group = pp.get_group()
        self.pp_rank = pp.get_local_rank()
        self.depth = pp.size()
        self.last_rank = self.depth - 1
        # NCCL: the first communication of a group must be one of all its members
        anything = torch.zeros(1, device=self.world.device)
        dist.all_reduce(anything, group=self.pp_group)
        config = gpt_of(self.model).config
        self.layers = cut_in_ranges(config.n_layer, self.s.stages)
        self.parameter_dtype = next(self.model.parameters()).dtype
        self.first_trained = self.s.stages  # the first stage of which something trains
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                stage = self.stage_of(name)
                self.first_trained = min(self.first_trained, stage)
        self.stages: dict[int, Stage] = {}
        for number in range(self.pp_rank, self.s.stages, self.depth):
            blocks = self.layers[number]
            self.stages[number] = Stage(self.model, blocks, self.autocast)
        keep_only(self.model, self.stages.values())
        for stage in self.stages.values():
            self.shard(stage, stage.blocks)
        keep_two = functools.lru_cache(maxsize=2)  # training, evaluation
        self.schedule = keep_two(self.make_schedule)
        if config.tie_weights:
            # each process of the first stage, and the one of the last that holds the same parts
            first_and_last = self.mesh.mesh[[0, -1]]
            pairs = first_and_last.flatten(1).T
            self.ends, _ = dist.new_subgroups_by_enumeration(pairs.tolist())

    @property
    def is_last(self) -> bool:
        """Does this process have the last stage?"""
        return self.pp_rank == self.last_rank

    @property
    def computes_loss(self) -> bool:
        return self.is_last and super().computes_loss

    # --- weights ----------------------------------------------------------------------------------

    def stage_of(self, name: str) -> int:
        """The stage that a parameter lives in; of a tied matrix that of the embedding."""
        block = re.search(r"blocks\.(\d+)\.", name)
        if block:
            layer = int(block[1])
            ends = [layers.stop for layers in self.layers]
            return bisect.bisect_right(ends, layer)
        is_embedding = re.search(r"wte|wpe|marks", name)
        last = self.s.stages - 1
        return 0 if is_embedding else last

    def gather(self, name: str, parameter: nn.Parameter | None) -> Tensor:
        device = self.world.device
        home = self.stage_of(name) % self.depth
        if self.pp_rank == home:
            whole = whole_of(parameter).to(device)
        else:
            shape = self.shapes[name]
            whole = torch.empty(shape, dtype=self.parameter_dtype, device=device)
        _, *place = self.mesh.get_coordinate()
        is_first_pipeline = not any(place)  # that of the main process
        if home and is_first_pipeline:
            dist.broadcast(whole, group=self.pp_group, group_src=home)
        return whole

    def tied(self) -> nn.Parameter | None:
        """This process's copy of the tied matrix, if it has one."""
        gpt = gpt_of(self.model)
        if gpt.config.tie_weights and gpt.wte is not None:
            return gpt.wte.weight
        return None

    # --- a step -----------------------------------------------------------------------------------

    def forward_backward(
        self, batches: Sequence[HasInputs], loss_of: LossOf, scale: float
    ) -> Tensor | float:
        losses = []

        def finish(output: Any, batch: HasInputs) -> Tensor:
            def run(*inputs: Any) -> Any:
                return output

            loss = loss_of(run, batch)
            losses.append(loss.detach())
            factor = self.gradient_scale * scale
            return loss * factor

        # what was drawn before is the same on all stages; their dropout is not
        seed = int(torch.randint(2**48, ()))
        torch.manual_seed(seed + self.pp_rank)
        self.run(batches, finish, training=True)
        self.sum_tied_gradient()
        return sum(losses)

    def run(self, batches: Sequence[HasInputs], finish: Finish, training: bool) -> None:
        """Take all micro-batches through the pipeline, and in training back."""
        shapes = [batch.inputs[0].shape for batch in batches]
        all_rows, all_lengths = zip(*shapes, strict=True)
        rows = max(all_rows)
        length = max(all_lengths)
        for stage in self.stages.values():
            stage.queue = iter(batches)
            stage.size = (rows, length)
            stage.finish = finish
        schedule = self.schedule(len(batches), rows, length, training)
        go = schedule.step if training else schedule.eval
        targets = torch.zeros(len(batches))  # the stages have their own
        go(target=targets, return_outputs=False)

    def make_schedule(
        self, count: int, rows: int, length: int, training: bool
    ) -> ScheduleGPipe | Schedule1F1B | ScheduleInterleaved1F1B:
        """The order of work for `count` micro-batches, with buffers for their hidden states
        (rows, length, C)."""
        config = gpt_of(self.model).config
        shape = (rows, length, config.n_embd)
        like = torch.empty(shape, dtype=self.parameter_dtype, device="meta")
        stages = []
        for number, module in self.stages.items():
            # gradients travel as far as something trains
            before = like.clone().requires_grad_(number > self.first_trained)
            behind = like.clone().requires_grad_(number >= self.first_trained)
            stage = PipelineStage(
                module,
                number,
                self.s.stages,
                self.world.device,
                input_args=(before,) if number else (),
                output_args=(behind,),
                group=self.pp_group,
            )
            stages.append(stage)
        kind = SCHEDULES[self.s.schedule]
        if not training and kind is Schedule1F1B:
            kind = ScheduleGPipe  # which takes any number of micro-batches
        return kind(
            stages if kind is ScheduleInterleaved1F1B else stages[0],
            count,
            loss_fn=lambda loss, target: loss,  # the last stage has computed it
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
        total = part.to(self.world.device)  # an offloaded one lies elsewhere
        dist.all_reduce(total, group=self.ends)
        part.copy_(total)

    def gradient_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        if self.is_last:
            copy = self.tied()  # the first stage counts it
            parameters = [p for p in parameters if p is not copy]
        norm = super().gradient_norm(parameters)
        square = norm.double().square()
        total = square.to(self.world.device)
        dist.all_reduce(total, group=self.pp_group)
        norm_of_all = total.sqrt()
        return norm_of_all.to(self.parameter_dtype)

    @torch.no_grad()
    def evaluate(self, *inputs: Any) -> Any:
        self.model.eval()
        outputs = []

        def finish(output: Any, batch: HasInputs) -> None:
            on_cpu = tree_map(Tensor.cpu, output)  # what is sent as an object remembers its GPU
            outputs.append(on_cpu)

        batches = cut_rows(inputs, self.depth)
        self.run(batches, finish, training=False)
        found = [join(outputs)]
        dist.broadcast_object_list(found, group=self.pp_group, group_src=self.last_rank)
        return found[0]

    def settle(self) -> None:
        super().settle()
        for stage in self.stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # without a backward, it would stay gathered


def keep_only(model: GPT | GPTClassifier, stages: Iterable[Stage]) -> None:
    """Take out of the model what none of the stages holds. Its blocks keep their numbers."""
    kept: set[nn.Module] = set()
    for stage in stages:
        kept.update(stage.modules())
    gpt = gpt_of(model)
    for name in ("wte", "wpe", "norm", "lm_head"):
        part = getattr(gpt, name)
        if part not in kept:
            setattr(gpt, name, None)
    for number, block in enumerate(gpt.blocks):
        if block not in kept:
            gpt.blocks[number] = nn.Identity()
    if isinstance(model, GPTClassifier):
        for name in ("marks", "head"):
            if getattr(model, name) not in kept:
                setattr(model, name, None)


def cut_rows(inputs: tuple, parts: int) -> list[Rows]:
    """The rows of a batch in so many micro-batches; in fewer where there are fewer rows."""
    columns = []
    for x in inputs:
        if isinstance(x, Tensor):
            columns.append(x.chunk(parts))
        else:
            columns.append(itertools.repeat(x))
    return [Rows(of_part) for of_part in zip(*columns, strict=False)]


def join(outputs: list) -> Any:
    """What the model makes of a batch, from what it made of its parts: rows go one under another,
    losses are added up. None from nothing."""
    if not outputs:
        return None
    if isinstance(outputs[0], tuple):
        kinds = zip(*outputs, strict=True)
        return tuple(join(list(of_kind)) for of_kind in kinds)
    has_rows = outputs[0].dim() > 0
    if has_rows:
        return torch.cat(outputs)
    return torch.stack(outputs).sum()
