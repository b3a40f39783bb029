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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

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

from model import GPT, Attention, Block, Context, GPTClassifier, GPTConfig, KVCache


def problems(config: GPTConfig, tp: int, sequence: bool) -> list[str]:
    """Why a model cannot be cut over tp ranks, in plain words; empty when it can."""
    if tp == 1:
        return ["mesh.sequence=true needs mesh.tp of at least 2"] if sequence else []
    found = []
    cut = {"n_head": config.n_head, f"the MLP of mlp={config.mlp}, hidden size": config.mlp_size}
    if config.vocab_size:  # 0: not known yet
        cut["vocab_size"] = config.vocab_size
    for name, size in cut.items():
        if size % tp:
            found.append(f"{name}={size} is not divisible by mesh.tp={tp}")
    if config.kv_heads % tp and tp % config.kv_heads:
        found.append(f"neither of n_kv_head={config.kv_heads} and mesh.tp={tp} divides the other")
    return found


def cut_matrices(model: GPT | GPTClassifier, mesh: DeviceMesh, sequence: bool) -> None:
    """Cut a model that holds its weights, the same on every rank, in place over a mesh (tp).

    Its parameters are new objects then: optimizers, activation checkpointing and fully_shard come
    after it. sequence: also cut the positions, between the matrices of a block."""
    before = dict(model.named_parameters())
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
    if gpt.config.tie_weights:
        gpt.lm_head.weight = gpt.wte.weight
    if isinstance(model, GPTClassifier):
        parallelize_module(model, mesh, {"head": Whole()})
    for name, p in model.named_parameters():
        p.requires_grad_(before[name].requires_grad)
        vars(p).update(vars(before[name]))
    gpt.__class__ = CutGPT
    gpt.mesh = mesh
    gpt.sequence = sequence


class Whole(SequenceParallel):
    """A module whose parameters and input are whole on every rank."""

    def __init__(self):
        super().__init__(use_local_output=True)
        self.sequence_sharding = (Replicate(),)


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
    return PrepareModuleInput(
        input_layouts=(stream, *others), desired_input_layouts=(Replicate(), *others)
    )


def choose_head(attention: Attention, config: GPTConfig, mesh: DeviceMesh) -> None:
    """With fewer K/V heads than ranks: k and v (B, T, K * D) are gathered, and each rank goes on
    with the one head that its queries look at."""
    ranks_per_head = mesh.size() // config.kv_heads
    head = mesh.get_local_rank() // ranks_per_head
    first = head * config.head_size
    end = first + config.head_size

    def own(linear: nn.Linear, inputs: tuple, heads: DTensor) -> Tensor:
        # the gradient of a rank holds only its head's part
        return heads.to_local(grad_placements=[Partial()])[..., first:end]

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

    @torch.compiler.disable
    def attend_with_dropout(q: Tensor, *others: Tensor, **options: object) -> Tensor:
        with own_draws(rank, q.device):
            return attend(q, *others, **options)

    def attend_by_rank(q: Tensor, *others: Tensor, **options: object) -> Tensor:
        with_dropout = options["dropout_p"] > 0
        return (attend_with_dropout if with_dropout else attend)(q, *others, **options)

    return attend_by_rank


class OwnDropout(nn.Dropout):
    """Dropout that differs from rank to rank: each has other positions."""

    def __init__(self, p: float, rank: int):
        super().__init__(p)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x) if self.training and self.p else x

    @torch.compiler.disable
    def dropout(self, x: Tensor) -> Tensor:
        with own_draws(self.rank, x.device):
            return super().forward(x)


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

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache, of the heads of this rank."""
        tp = self.mesh.size()
        c = self.config
        local_heads = replace(
            c,
            n_embd=c.n_embd // tp,
            n_head=c.n_head // tp,
            n_kv_head=max(1, c.kv_heads // tp),
        )
        return KVCache(local_heads, batch, self.wte.weight.dtype, self.wte.weight.device)

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
        shares = super().run_blocks(self.share(x, 1), context, first, end)
        x = shares.full_tensor()
        if at is None:
            return x
        rows = torch.arange(x.size(0), device=x.device)
        return x[rows, at][:, None]

    def head_weight(self) -> Tensor:
        """The matrix (V, C) of the LM head, gathered for this rank's share of the tokens, of which
        its gradient is then only a part."""
        whole = super().head_weight().redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """As of a whole GPT: each rank takes a share of the tokens, and all get the sum."""
        rows = self.share(h.flatten(0, 1), 0).to_local()
        row_targets = self.share(targets.flatten(), 0).to_local()
        part = super().loss(rows[None], row_targets[None])
        return DTensor.from_local(part, self.mesh, [Partial()], run_check=False).full_tensor()
