"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): every matrix is cut over a few processes,
which compute each block together, on the same rows of the batch.

Attention is cut by heads, the MLP by hidden units, the embedding and the LM head by rows of the
vocabulary. PyTorch's parallel styles do it. Between the parts of a model stand ordinary tensors
that are whole on every rank, and so are their gradients; the parameters are DTensors, so that one
call clips, saves or gathers all of them.

Sequence parallelism (Korthikanti et al. 2022) leaves to each rank a share of the positions where a
block is not cut: in its norms, dropouts and sums. A rank then keeps a share of these activations
for backward instead of all.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from model import GPT, Attention, Block, Context, GPTClassifier, GPTConfig, take_position
from smallgpt.console import UserError


def check_cut(config: GPTConfig, tp: int) -> None:
    """UserError if a model of this shape cannot be cut over tp ranks."""
    reasons = why_uncut(config, tp)
    if not reasons:
        return
    possible = range(1, config.n_head + 1)
    fitting = [str(size) for size in possible if not why_uncut(config, size)]
    raise UserError(
        f"mesh.tp={tp} cannot cut this model: {', '.join(reasons)}; "
        f"what fits is mesh.tp={' or '.join(fitting)}"
    )


def why_uncut(config: GPTConfig, tp: int) -> list[str]:
    """What of a model cannot be cut over tp ranks, in plain words; the vocabulary always can."""
    reasons = []
    if config.n_head % tp:
        reasons.append(f"n_head={config.n_head} is no multiple of it")
    elif config.kv_heads % tp and tp % config.kv_heads:
        reasons.append(f"n_kv_head={config.kv_heads} is neither a multiple nor a divisor of it")
    if config.mlp_size % tp:
        reasons.append(f"the {config.mlp_size} hidden units of its MLP are no multiple of it")
    return reasons


def cut_matrices(model: GPT | GPTClassifier, mesh: DeviceMesh, sequence: bool) -> None:
    """Cut the matrices of a model, in place, over a mesh of one axis. sequence: also the positions,
    between the matrices of a block.

    The model lies on the meta device, or has the same weights on every rank. Its parameters are new
    objects afterwards: weights are set, optimizers made and FSDP applied then."""
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    gpt = model.gpt if isinstance(model, GPTClassifier) else model
    for block in gpt.blocks:
        cut_block(block, gpt.config, mesh, sequence)
    outer: dict[str, ParallelStyle] = {
        "wte": RowwiseParallel(input_layouts=Replicate()),
        "norm": Whole(),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    if gpt.wpe is not None:
        outer["wpe"] = Whole()
    parallelize_module(gpt, mesh, outer, src_data_rank=None)
    gpt.tie()
    if isinstance(model, GPTClassifier):
        whole = {"head": Whole()}
        if model.marks is not None:
            whole["marks"] = Whole()
        parallelize_module(model, mesh, whole)
        model.head.register_forward_hook(own_memory)
    for name, p in model.named_parameters():
        p.requires_grad_(trains[name])
    # gathering what FSDP cuts as well takes two collectives: torch would warn of it on every rank
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    gpt.__class__ = CutGPT  # as fully_shard changes the class of a module
    gpt.mesh = mesh
    gpt.sequence = sequence


class Whole(SequenceParallel):
    """A module whose parameters and input are whole on every rank."""

    def __init__(self):
        super().__init__(use_local_output=True)
        self.sequence_sharding = (Replicate(),)


def own_memory(head: nn.Module, inputs: tuple, scores: Tensor) -> Tensor:
    """A forward hook. A rank's part of a DTensor is a view, and of a model that gives out a view
    FSDP warns."""
    return scores.clone()


def cut_block(block: Block, config: GPTConfig, mesh: DeviceMesh, sequence: bool) -> None:
    """Cut the matrices of a block, in place. Its input and output are plain tensors that are whole
    on every rank; or, with `sequence`, DTensors of which each rank has its positions."""
    stream = Shard(1) if sequence else Replicate()  # of (B, T, C)
    norm = SequenceParallel() if sequence else Whole()
    columns = ColwiseParallel()
    rows = RowwiseParallel(output_layouts=stream, use_local_output=not sequence)
    styles = {
        "norm1": norm,
        "attn": whole_input(stream, 3),
        "attn.q": columns,
        "attn.k": columns,
        "attn.v": columns,
        "attn.proj": rows,
        "norm2": norm,
        "mlp": whole_input(stream, 1),
        "mlp.fc": columns,
        "mlp.proj": rows,
    }
    if block.mlp.gate is not None:
        styles["mlp.gate"] = columns
    if block.attn.q_norm is not None:
        # each rank has its heads: the gradient of the weight is the sum over the ranks
        heads = SequenceParallel(sequence_dim=1, use_local_output=True)
        styles["attn.q_norm"] = styles["attn.k_norm"] = heads
    if config.kv_heads < mesh.size():
        whole_heads = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
        styles["attn.k"] = styles["attn.v"] = whole_heads
    parallelize_module(block, mesh, styles, src_data_rank=None)
    if config.kv_heads < mesh.size():
        choose_head(block.attn, config, mesh)
    rank = mesh.get_local_rank()
    block.attn.attend = with_own_dropout(block.attn.attend, rank)
    if sequence:
        block.drop = OwnDropout(block.drop.p, rank)


def whole_input(stream: Placement, arguments: int) -> PrepareModuleInput:
    """Of a module whose first argument is the stream: it reads all positions. Its matrices' parts
    of the gradient are added up once, not one by one."""
    others = (None,) * (arguments - 1)
    given = (stream, *others)
    wanted = (Replicate(), *others)
    return PrepareModuleInput(input_layouts=given, desired_input_layouts=wanted)


def choose_head(attention: Attention, config: GPTConfig, mesh: DeviceMesh) -> None:
    """With fewer K/V heads than ranks: k and v (B, T, K * D) are gathered, and each rank goes on
    with the one head that its queries look at."""
    ranks_per_head = mesh.size() // config.kv_heads
    head = mesh.get_local_rank() // ranks_per_head
    first = head * config.head_size
    end = first + config.head_size

    def own(linear: nn.Linear, inputs: tuple, heads: DTensor) -> Tensor:
        # the gradient of a rank holds only its head's part
        gathered = heads.to_local(grad_placements=[Partial()])
        return gathered[..., first:end]

    attention.k.register_forward_hook(own)
    attention.v.register_forward_hook(own)


@contextmanager
def own_draws(rank: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside differ from rank to rank; those outside stay the same on all.

    Their seed is drawn from the generator of the CPU, which all ranks of a model have in the same
    state. Activation checkpointing restores that state, so a recomputation draws them again."""
    seed = int(torch.randint(2**48, ()))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank)
        yield


def with_own_dropout(attend: Callable[..., Tensor], rank: int) -> Callable[..., Tensor]:
    """Attention whose dropout differs from rank to rank: each has other heads."""

    def attend_by_rank(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if options["dropout_p"] == 0:
            return attend(q, k, v, **options)
        with own_draws(rank, q.device):
            return attend(q, k, v, **options)

    return attend_by_rank


class OwnDropout(nn.Dropout):
    """Dropout that differs from rank to rank: each has other positions."""

    def __init__(self, p: float, rank: int):
        super().__init__(p)
        self.rank = rank

    def forward(self, x: DTensor) -> DTensor:
        if self.p == 0 or not self.training:
            return x
        with own_draws(self.rank, x.device):
            local = super().forward(x.to_local())
        return DTensor.from_local(
            local,
            x.device_mesh,
            x.placements,
            run_check=False,
            shape=x.shape,  # of all positions, which the ranks may share unevenly
            stride=x.stride(),
        )


class CutGPT(GPT):
    """A GPT whose matrices are cut over `mesh`. What it is given and gives is whole on every rank.

    Dropout: of the embedding, the same on all ranks; of attention weights, different; of the
    sub-layers' outputs the same, but different with `sequence`: just as the ranks have the same
    numbers before them or different ones."""

    mesh: DeviceMesh
    sequence: bool

    def share(self, x: Tensor, dim: int) -> DTensor:
        """This rank's share of the rows of a whole x, along dim; their number may be uneven."""
        whole = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(dim)])

    def run_blocks(
        self,
        x: Tensor,
        context: Context,
        first: int = 0,
        end: int | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        if not self.sequence:
            return super().run_blocks(x, context, first, end, at)
        shares = self.share(x, dim=1)
        x = super().run_blocks(shares, context, first, end).full_tensor()
        return x if at is None else take_position(x, at)

    def compile_parts(self) -> str:
        """Only the loss: torch 2.13 cannot compile blocks that are cut over one axis of a mesh."""
        self.slice_loss = torch.compile(self.slice_loss)
        return "on for the loss only (mesh.tp)"

    def head_weight(self) -> Tensor:
        """The matrix (V, C) of the LM head, gathered for this rank's share of the tokens, of which
        its gradient is then only a part."""
        weight = super().head_weight()
        whole = weight.redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """As of a whole GPT: each rank takes a share of the tokens, and all get the sum."""
        rows = self.share(h.flatten(0, 1), dim=0)
        row_targets = self.share(targets.flatten(), dim=0)
        part = super().loss(rows.to_local()[None], row_targets.to_local()[None])
        parts = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        return parts.full_tensor().clone()  # FSDP warns of views
