"""What a run on a mesh takes, before anybody pays for it: memory, traffic, time, by arithmetic.

The step is that of train_fsdp.py. docs/scaling.md has the formulas in words, and what each of them
was checked against; `simulate.py` counts the same step, run without the machines.

Shapes: N tokens of a micro-batch, C width, K width of keys or values, F width of the MLP, V
vocabulary. Sizes are bytes, times are seconds, speeds are per second.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from model import GPT, GPTConfig
from smallgpt.console import UserError
from smallgpt.hardware import PEAK_FLOPS
from smallgpt.parallel import tensor
from smallgpt.parallel.layout import MeshSettings, sizes
from smallgpt.parallel.strategy import share_batch

GB = 1e9
BUCKET = 25 * 2**20  # bytes of gradients that DDP sums at a time, about
F32 = 4  # bytes of a float32, in which weights, gradients and the residual stream are


# --- machines -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A data sheet. A link's speed is that of one direction."""

    memory: float
    bandwidth: float  # of its memory
    nvlink: float  # to the GPUs of its node, all together; PCIe's where it has no NVLink
    flops: float  # dense, bfloat16


# vendors' data sheets: memory, its bandwidth, link inside a node; hardware.PEAK_FLOPS has FLOP/s
SHEETS = {
    "B200": (180 * GB, 8000 * GB, 900 * GB),
    "H200": (141 * GB, 4800 * GB, 450 * GB),
    "H100": (80 * GB, 3350 * GB, 450 * GB),
    "H100 PCIe": (80 * GB, 2000 * GB, 64 * GB),
    "H20": (96 * GB, 4000 * GB, 450 * GB),
    "A100": (80 * GB, 2039 * GB, 300 * GB),
    "A800": (80 * GB, 2039 * GB, 200 * GB),
    "L40S": (48 * GB, 864 * GB, 32 * GB),
    "L4": (24 * GB, 300 * GB, 32 * GB),
    "A10": (24 * GB, 600 * GB, 32 * GB),
    "4090": (24 * GB, 1008 * GB, 32 * GB),
    "3090": (24 * GB, 936 * GB, 32 * GB),
}
GPUS = {name: Gpu(*sheet, PEAK_FLOPS[name]) for name, sheet in SHEETS.items()}


@dataclass(frozen=True)
class Cluster:
    """The machines of a plan, and how much of their data sheets a program reaches."""

    gpu: Gpu
    size: int  # processes, one a GPU
    per_node: int  # GPUs of a node
    link: float  # between nodes, of each GPU, one direction
    efficiency: float = 0.6  # of the FLOP/s, in large matrix products
    usable: float = 0.9  # of the memory; the rest is CUDA's, NCCL's and lost between blocks
    reached: float = 0.8  # of a link or of the memory's bandwidth
    step_inside: float = 3.4e-6  # of a ring, from a GPU to the next (NCCL's tuning.cc, "Simple")
    step_between: float = 9.6e-6  # the same from node to node


@dataclass(frozen=True)
class Group:
    """The processes that talk along an axis of the mesh."""

    size: int
    on_node: int  # of them on one node

    @property
    def nodes(self) -> int:
        return math.ceil(self.size / self.on_node)


# --- the step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a step is cut. `rows` sequences per micro-batch and process, `accum` of these a step."""

    pp: int
    replicate: int
    shard: int
    tp: int
    rows: int
    accum: int
    recompute: int = 0  # every n-th block computes its activations again
    sequence: bool = False
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    virtual: int = 1  # stages on each process
    offload: bool = False
    reduce: int = F32  # bytes of a gradient that is summed

    @property
    def data(self) -> int:
        """Processes that read different rows."""
        return self.replicate * self.shard

    @property
    def size(self) -> int:
        """Processes."""
        return self.pp * self.data * self.tp

    @property
    def is_plain(self) -> bool:
        """Every process holds a whole model: DDP, or a single process."""
        return self.pp * self.shard * self.tp == 1 and not self.offload

    @property
    def is_ddp(self) -> bool:
        return self.is_plain and self.replicate > 1

    @property
    def is_cut(self) -> bool:
        """FSDP2 holds the weights."""
        return not self.is_plain and (self.data > 1 or self.offload)

    def group(self, axis: str, per_node: int) -> Group:
        """The processes along an axis, or all; tp's are neighbours, pp's are far apart."""
        inner = {
            "all": 1,
            "tp": 1,
            "shard": self.tp,
            "replicate": self.tp * self.shard,
            "pp": self.tp * self.data,
        }
        size = self.size if axis == "all" else getattr(self, axis)
        on_node = min(size, max(1, per_node // inner[axis]))
        return Group(size, on_node)

    def describe(self) -> str:
        """pp 2 (1f1b) x hsdp 4x8 x tp 2, recompute 1, 8 sequences x 4"""
        parts = []
        if self.pp > 1:
            stages = f"{self.schedule} x{self.virtual}" if self.virtual > 1 else self.schedule
            parts.append(f"pp {self.pp} ({stages})")
        if self.replicate > 1:
            copies = f"hsdp {self.replicate}x{self.shard}"
            parts.append(f"ddp {self.replicate}" if self.shard == 1 else copies)
        elif self.shard > 1:
            parts.append(f"fsdp {self.shard}")
        if self.tp > 1:
            parts.append(f"tp {self.tp}" + (" (sequence)" if self.sequence else ""))
        name = " x ".join(parts) or "one process"
        recompute = f", recompute {self.recompute}" if self.recompute else ""
        return f"{name}{recompute}, {self.rows} sequences x {self.accum}"


@dataclass(frozen=True)
class Work:
    """A model and the way it is computed."""

    config: GPTConfig
    product: int = 2  # bytes of a number in matrix products
    kernels: Literal["cpu", "cuda", "compiled"] = "compiled"  # who decides what backward needs
    muon: bool = False

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name; those of block 0 stand for every block."""
        with torch.device("meta"):
            model = GPT(replace(self.config, n_layer=1))
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    @property
    def parameters(self) -> int:
        return self.config.n_layer * numbers(self.parts(True)) + numbers(self.parts(False))

    @property
    def flops_per_token(self) -> float:
        """As runs.metrics counts them for MFU: without recomputation, with all of the scores."""
        c = self.config
        weights = c.n_layer * matrices(self.parts(True)) + c.vocab_size * c.n_embd
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    def root_of(self, stage: "Stage", tp: int = 1) -> dict[str, tuple[int, ...]]:
        """What a stage holds that is in no block; both ends of a pipeline hold a tied matrix."""
        mine = {}
        for name, shape in self.parts(False, tp).items():
            is_embedding = name.startswith("w")
            at_both = name == "wte.weight" and self.config.tie_weights
            at_end = stage.is_last and (at_both or not is_embedding)
            if at_end or (stage.is_first and is_embedding):
                mine[name] = shape
        return mine

    def parts(self, of_block: bool, tp: int = 1) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's parameters, or of all that is in no block, on one of tp ranks."""
        mine = {}
        for name, shape in self.shapes.items():
            if name.startswith("blocks.") == of_block:
                mine[name] = cut_shape(name, shape, tp)
        return mine


def cut_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """The part of a parameter that a rank holds: see tensor.cut_matrices."""
    first, *others = shape
    layer, kind = name.split(".")[-2:]
    if layer in ("q", "k", "v", "fc", "gate", "wte", "lm_head"):
        return (first // tp, *others)
    if layer == "proj" and kind == "weight":
        return (first, others[0] // tp)
    return shape


def numbers(shapes: dict[str, tuple[int, ...]], parts: int = 1) -> int:
    """How many numbers these parameters have, each padded to so many equal parts of its rows."""
    total = 0
    for first, *others in shapes.values():
        rows = math.ceil(first / parts) * parts
        total += rows * math.prod(others)
    return total


def kept_by_block(work: Work, tp: int = 1, sequence: bool = False) -> dict[str, float]:
    """What one block keeps for its backward: bytes of each tensor for a token, on one of tp ranks.

    Attention without dropout is a fused kernel (FlashAttention) and keeps no scores. Compiled, the
    partitioner has what is cheap computed again; the list is what it was seen to keep."""
    c = work.config
    eager = work.kernels != "compiled"
    share = tp if sequence else 1  # of the positions, where a block is not cut
    stream = c.n_embd / share
    C, heads = c.n_embd / tp, c.n_head / tp
    kv_heads = max(1, c.kv_heads / tp)
    K, F = kv_heads * c.head_size, c.mlp_size / tp
    b = work.product
    inputs = {"attention": 3, "mlp": 2 if c.mlp == "swiglu" else 1}  # matrices that read one
    kept: dict[str, float] = {}
    for part, readers in inputs.items():
        first = part == "attention"
        kept[f"{part}: stream"] = F32 * stream if eager or first else b * stream
        kept[f"{part}: norm"] = norm_of(work) / share
        if work.kernels == "cpu" and c.norm == "rmsnorm":
            kept[f"{part}: normalised"] = F32 * stream
        # autocast makes a copy for each matrix that reads it
        copies = readers if eager and b < F32 else 1
        kept[f"{part}: input"] = copies * b * c.n_embd
    if c.qk_norm:
        # a fused norm keeps its input in float32, the CPU's also its output
        bytes_kept = {"cpu": 2 * F32, "cuda": F32, "compiled": b}[work.kernels]
        kept["qk_norm"] = bytes_kept * (C + K) + F32 * (heads + kv_heads)
    kept["q, k, v"] = b * (C + 2 * K)
    kept["attended"] = b * C + F32 * heads
    if c.qk_norm:  # whose output has its heads before its positions
        kept["attended, in order of positions"] = b * C
    if c.mlp == "swiglu":
        kept["hidden"] = (4 if eager else 3) * b * F
    elif c.mlp == "relu2" and work.kernels == "cuda" and b < F32:
        kept["hidden"] = (2 * b + F32) * F  # CUDA's autocast squares in float32
    else:
        kept["hidden"] = 2 * b * F
    if c.dropout:
        kept["dropout"] = 2 * stream * (1 if work.kernels != "cpu" else b)
    return kept


def norm_of(work: Work) -> int:
    """What a norm keeps of a token beside its input: the scale, and LayerNorm's mean."""
    return F32 if work.config.norm == "rmsnorm" else 2 * F32


@dataclass(frozen=True)
class Stage:
    """What one process of the pipeline holds; without one, everything."""

    layers: list[int]  # its blocks
    is_first: bool  # it has the embedding
    is_last: bool  # it has the final norm, the LM head and the loss
    in_flight: float  # micro-batches whose activations it holds at once

    @property
    def blocks(self) -> int:
        return len(self.layers)


def stages(work: Work, layout: Layout) -> list[Stage]:
    """The processes along the pipeline, in order."""
    pp, virtual, accum = layout.pp, layout.virtual, layout.accum
    parts = split_layers(work.config.n_layer, pp * virtual)
    found = []
    for rank in range(pp):
        layers = list(itertools.chain(*parts[rank::pp]))
        if layout.schedule == "gpipe" or pp == 1:
            in_flight = accum if pp > 1 else 1
        elif layout.schedule == "1f1b":
            in_flight = min(accum, pp - rank)
        else:  # warm-up of the interleaved schedule (Narayanan et al. 2021), in whole micro-batches
            warm_up = (virtual - 1) * pp + 2 * (pp - rank - 1) + 1
            in_flight = min(accum, warm_up / virtual)
        found.append(Stage(layers, rank == 0, rank == pp - 1, in_flight))
    return found


def split_layers(n_layer: int, parts: int) -> list[range]:
    """Blocks of each stage of a pipeline, as equal as they can be, the first ones larger."""
    whole, rest = divmod(n_layer, parts)
    first = 0
    found = []
    for part in range(parts):
        end = first + whole + (part < rest)
        found.append(range(first, end))
        first = end
    return found


# --- memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What lies in memory at one moment of a step, beside weights and optimizer."""

    name: str
    activations: float  # that backward needs
    gradients: float
    temporary: float  # gathered weights, the loss, gradients on their way


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes, at the fullest moment of a step."""

    weights: float
    optimizer: float
    moment: Moment

    @property
    def total(self) -> float:
        moment = self.moment
        changing = moment.gradients + moment.activations + moment.temporary
        return self.weights + self.optimizer + changing


def memory(work: Work, layout: Layout) -> Memory:
    """Of the process that needs most."""
    needs = []
    for stage in stages(work, layout):
        local = Local(work, layout, stage)
        fullest = max(
            local.moments(),
            key=lambda moment: moment.gradients + moment.activations + moment.temporary,
        )
        needs.append(Memory(local.weights, local.optimizer, fullest))
    return max(needs, key=lambda need: need.total)


class Local:
    """One process's part of a step, in bytes."""

    def __init__(self, work: Work, layout: Layout, stage: Stage):
        self.work = work
        self.layout = layout
        self.stage = stage
        self.parts = layout.shard if layout.is_cut else 1
        self.block = numbers(work.parts(True, layout.tp), self.parts)
        self.root = numbers(work.root_of(stage, layout.tp), self.parts)
        self.tokens = layout.rows * work.config.block_size

    @property
    def of_weights(self) -> float:
        """Numbers of the weights that this process holds."""
        return (self.stage.blocks * self.block + self.root) / self.parts

    @property
    def weights(self) -> float:
        return 0.0 if self.layout.offload else F32 * self.of_weights

    @property
    def optimizer(self) -> float:
        """AdamW has two numbers for each weight, Muon one."""
        if self.layout.offload:
            return 0.0
        of_blocks = self.stage.blocks * self.block / self.parts
        return 2 * self.weights - (F32 * of_blocks if self.work.muon else 0.0)

    @property
    def gathered_root(self) -> float:
        """The root's weights stay gathered from forward to backward."""
        return F32 * self.root if self.layout.is_cut else 0.0

    @property
    def gathered_block(self) -> float:
        return self.work.product * self.block if self.layout.is_cut else 0.0

    @property
    def stream(self) -> float:
        """The residual stream, where it is whole."""
        return F32 * self.work.config.n_embd * self.tokens

    @property
    def kept(self) -> float:
        """A block's activations."""
        each = kept_by_block(self.work, self.layout.tp, self.layout.sequence)
        return self.tokens * sum(each.values())

    def is_recomputed(self, layer: int) -> bool:
        """Does a block keep its input only?"""
        every = self.layout.recompute
        return bool(every) and layer % every == 0

    @property
    def recomputed(self) -> int:
        return sum(map(self.is_recomputed, self.stage.layers))

    @property
    def activations(self) -> float:
        """Of all blocks and micro-batches, when the first backward begins."""
        inputs = self.stream / (self.layout.tp if self.layout.sequence else 1)
        blocks = (self.stage.blocks - self.recomputed) * self.kept + self.recomputed * inputs
        total = self.stage.in_flight * blocks
        if self.work.product < F32 and not self.layout.is_cut:
            # autocast's copies of the weights
            total += self.work.product * self.stage.blocks * self.block
        if self.stage.is_last:
            c = self.work.config
            in_float32 = 2 if self.work.kernels == "cpu" and c.norm == "rmsnorm" else 1
            total += in_float32 * self.stream + norm_of(self.work) * self.tokens
        return total

    @property
    def gradients(self) -> float:
        """That stay from micro-batch to micro-batch."""
        return F32 * self.of_weights

    def moments(self) -> Iterator[Moment]:
        """Those that may be the fullest, of the last micro-batch."""
        before = self.gradients if self.layout.accum > 1 or self.layout.is_ddp else 0.0
        yield from self.at_the_loss(before) if self.stage.is_last else ()
        yield from self.in_the_blocks(before)
        yield self.at_the_embedding()

    def at_the_loss(self, gradients: float) -> Iterator[Moment]:
        c = self.work.config
        low = self.work.product < F32
        head = c.vocab_size * c.n_embd
        mine = self.tokens / self.layout.tp  # tensor-parallel ranks share the tokens
        whole = F32 * head if self.layout.tp > 1 else 0.0  # the gathered matrix
        hidden = self.stream + (self.work.product * c.n_embd * mine if low else 0.0)
        matrix = self.work.product * head if low else 0.0
        results = F32 * (head + c.n_embd * mine)  # the gradients, that forward computes already
        forward = whole + hidden + matrix + results + self.slice_of_logits(mine)
        yield Moment("loss", self.activations, gradients, self.gathered_root + forward)
        yield Moment("loss", self.activations, gradients, self.gathered_root + 2 * results)

    def slice_of_logits(self, tokens: float) -> float:
        """cross_entropy_slice: the logits, and numbers in float32 for each of them."""
        vocabulary = self.work.config.vocab_size
        most = 2**22 if self.work.kernels == "cpu" else 2**25
        rows = min(tokens, max(64, most // vocabulary))
        low = self.work.product < F32
        each = 13 + (F32 + self.work.product if low else F32)
        if self.work.kernels == "compiled":
            each = 2 * self.work.product
        one_of_several = self.work.product if rows < tokens else 0  # that of the slice before
        return rows * vocabulary * (each + one_of_several)

    def in_the_blocks(self, gradients: float) -> Iterator[Moment]:
        """Backward begins the last block, and has ended it."""
        last_again = self.is_recomputed(self.stage.layers[-1])
        again = self.kept if last_again else 0.0
        # two blocks, as the next one is gathered early
        whole = 2 * self.gathered_block + self.gathered_root + self.stream
        if self.stage.is_last:
            whole += F32 * self.root  # the head's gradient
        yield Moment(
            "last block", self.activations + again, gradients, whole + self.backward_of_mlp()
        )
        left = self.activations - (0.0 if last_again else self.kept)
        size = self.work.product + self.layout.reduce if self.layout.is_cut else F32
        yield Moment("last block", left, gradients, whole + self.stream + size * self.block)

    def backward_of_mlp(self) -> float:
        """The largest temporary tensors of a block: its activation function's, and the gradient
        of the matrix behind it."""
        work = self.work
        c = work.config
        width = c.mlp_size / self.layout.tp
        tensors = {"relu2": 3, "gelu": 1, "swiglu": 2}[c.mlp]
        if work.kernels == "compiled":
            tensors = 1
        size = F32 if work.kernels == "cuda" and c.mlp == "relu2" else work.product
        return tensors * size * width * self.tokens + work.product * width * c.n_embd

    def at_the_embedding(self) -> Moment:
        """Backward ends: all gradients, and the embedding's before they are summed."""
        whole = F32 * self.root if self.stage.is_first else 0.0
        on_their_way = 2 * whole
        if self.layout.is_cut:
            on_their_way += self.gathered_root + self.layout.reduce * self.root
        return Moment("embedding", 0.0, self.gradients, on_their_way)


# --- traffic --------------------------------------------------------------------------------------

Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "send"]


@dataclass(frozen=True)
class Collective:
    """What a process does so often in a step. `size` is that of the whole: what an all-gather
    gives, what a reduce-scatter takes."""

    axis: str  # of the mesh, "all" = all processes
    operation: Operation
    what: str
    count: int
    size: float

    @property
    def bytes(self) -> float:
        return self.count * self.size


def traffic(work: Work, layout: Layout) -> list[Collective]:
    """Of the process that has most of it. Each collective once, with its number in a step."""
    busiest: list[Collective] = []
    for stage in stages(work, layout):
        local = Local(work, layout, stage)
        found = [*of_shard(local), *of_replicate(local), *of_tp(local), *of_step(local)]
        found = [collective for collective in found if collective.count]
        if total(found) > total(busiest):
            busiest = found
    return busiest


def total(collectives: list[Collective]) -> float:
    """Bytes of a step."""
    return sum(collective.bytes for collective in collectives)


def of_shard(local: Local) -> Iterator[Collective]:
    """FSDP2: a block's weights are gathered for its forward and again for its backward, the root's
    once; every micro-batch's gradients are summed where their parts live."""
    layout = local.layout
    if not layout.is_cut or layout.shard == 1:
        return
    blocks = layout.accum * local.stage.blocks
    block = local.block
    yield Collective("shard", "all_gather", "blocks", 2 * blocks, local.work.product * block)
    yield Collective("shard", "all_gather", "root", layout.accum, F32 * local.root)
    yield Collective("shard", "reduce_scatter", "blocks", blocks, layout.reduce * block)
    yield Collective("shard", "reduce_scatter", "root", layout.accum, layout.reduce * local.root)


def of_replicate(local: Local) -> Iterator[Collective]:
    """Copies: what each has summed is summed once a step."""
    layout = local.layout
    if layout.replicate == 1:
        return
    if layout.is_ddp:
        size = F32 * local.of_weights
        buckets = math.ceil(size / BUCKET)
        yield Collective("replicate", "all_reduce", "gradients", buckets, size / buckets)
        return
    block = layout.reduce * local.block / local.parts
    root = layout.reduce * local.root / local.parts
    yield Collective("replicate", "all_reduce", "blocks", local.stage.blocks, block)
    yield Collective("replicate", "all_reduce", "root", 1, root)


def of_tp(local: Local) -> Iterator[Collective]:
    """Tensor parallel: partial sums of each half block, forward in the precision of products,
    backward in float32; with `sequence` each is a reduce-scatter and an all-gather."""
    layout = local.layout
    if layout.tp == 1:
        return
    c = local.work.config
    halves = 2 * layout.accum * local.stage.blocks
    # recomputing a block ends before its last product
    again = layout.accum * local.recomputed
    stream = local.stream
    low = stream * local.work.product / F32
    if layout.sequence:
        yield Collective("tp", "all_gather", "blocks, forward", halves + 2 * again, stream)
        yield Collective("tp", "reduce_scatter", "blocks, forward", halves + again, low)
        yield Collective("tp", "all_gather", "blocks, backward", halves, low)
        yield Collective("tp", "reduce_scatter", "blocks, backward", halves, stream)
        yield Collective("tp", "all_gather", "stream", 2 * layout.accum, stream)
    else:
        yield Collective("tp", "all_reduce", "blocks, forward", halves + again, low)
        yield Collective("tp", "all_reduce", "blocks, backward", halves, stream)
    if c.kv_heads < layout.tp:
        keys = local.work.product * c.kv_heads * c.head_size * local.tokens
        yield Collective("tp", "all_gather", "keys, values", halves + 2 * again, keys)
        yield Collective("tp", "reduce_scatter", "keys, values", halves, keys)
    if local.stage.is_first:
        yield Collective("tp", "all_reduce", "embedding", layout.accum, stream)
    if local.stage.is_last:
        head = F32 * c.vocab_size * c.n_embd
        yield Collective("tp", "all_gather", "head", layout.accum, head)
        yield Collective("tp", "reduce_scatter", "head", layout.accum, head)
        yield Collective("tp", "all_gather", "gradient of the loss", layout.accum, stream)
        yield Collective("tp", "all_reduce", "loss", layout.accum, F32)
    # whole weights of which each rank has a partial gradient: FSDP wants it summed each time
    times = layout.accum if layout.is_cut else 1
    size = local.work.product if layout.is_cut else F32
    if c.qk_norm:
        heads = 2 * local.stage.blocks * times
        yield Collective("tp", "all_reduce", "qk_norm", heads, size * c.head_size)
    if layout.sequence:
        tensors = 2 if c.norm == "layernorm" and c.bias else 1
        norms = 2 * local.stage.blocks * tensors * times
        yield Collective("tp", "all_reduce", "norms", norms, size * c.n_embd)


def of_step(local: Local) -> Iterator[Collective]:
    """Once a step: the norm of the gradient, from each parameter's part of it; the number of
    targets, and the loss."""
    layout = local.layout
    parameters = local.stage.blocks * len(local.work.parts(True))
    parameters += len(local.work.root_of(local.stage))
    for axis in ("shard", "tp"):
        if getattr(layout, axis) > 1:
            yield Collective(axis, "all_reduce", "norm", 1, F32 * parameters)
    if layout.size > 1:
        yield Collective("all", "all_reduce", "targets and loss", 2, 8)


# --- time -----------------------------------------------------------------------------------------


def seconds(cluster: Cluster, group: Group, collective: Collective) -> float:
    """Time of one call: a ring through all processes, cut into as many rings as a node has members,
    each with a network card of its own. It takes its steps, and its bytes through the slower link.
    """
    if group.size == 1:
        return 0.0
    if collective.operation == "send":
        speed = cluster.gpu.nvlink if group.nodes == 1 else cluster.link
        step = cluster.step_inside if group.nodes == 1 else cluster.step_between
        return step + collective.size / (cluster.reached * speed)
    passes = 2 if collective.operation == "all_reduce" else 1
    between = group.nodes - 1
    inside = group.size - 1 - between
    steps = inside * cluster.step_inside + between * cluster.step_between
    inside_bytes = collective.size * (group.size - 1) / group.size if group.on_node > 1 else 0.0
    between_bytes = collective.size * between / group.nodes
    slowest = max(inside_bytes / cluster.gpu.nvlink, between_bytes / (group.on_node * cluster.link))
    return passes * (steps + slowest / cluster.reached)


@dataclass(frozen=True)
class Time:
    """Seconds of a step. The bounds: all communication behind computation, and none of it."""

    expected: float
    optimistic: float
    pessimistic: float
    compute: float  # of a process that never waits
    bubble: float  # part of the step in which a process of a pipeline waits for others


class Clock:
    """How long the parts of a step take on one process."""

    def __init__(self, local: Local, cluster: Cluster):
        self.local = local
        self.cluster = cluster
        gpu = cluster.gpu
        self.flops = cluster.efficiency * gpu.flops
        self.bandwidth = cluster.reached * gpu.bandwidth

    @property
    def block_flops(self) -> float:
        """Of a block's forward, for one micro-batch. The fused kernel skips what is masked."""
        work, layout = self.local.work, self.local.layout
        c = work.config
        scores = 2 * c.block_size * c.n_embd / layout.tp
        return self.local.tokens * (2 * matrices(work.parts(True, layout.tp)) + scores)

    @property
    def head_flops(self) -> float:
        """Of the LM head, in forward."""
        local = self.local
        c = local.work.config
        tokens = local.tokens / local.layout.tp
        return 2 * tokens * c.vocab_size * c.n_embd if local.stage.is_last else 0.0

    def forward(self) -> float:
        """Products, and twice the activations to and from memory. The loss computes its gradient,
        too."""
        local = self.local
        blocks = local.stage.blocks
        of_logits = local.tokens / local.layout.tp * local.work.config.vocab_size
        passes = 5 * local.work.product if local.work.kernels == "compiled" else 60
        moved = 2 * blocks * local.kept + (of_logits * passes if local.stage.is_last else 0.0)
        products = blocks * self.block_flops + 3 * self.head_flops
        return products / self.flops + moved / self.bandwidth

    def backward(self) -> float:
        """Twice the products, and thrice the activations: read, their gradients written and
        read."""
        local = self.local
        blocks = 2 * local.stage.blocks + local.recomputed
        moved = (3 * local.stage.blocks + 2 * local.recomputed) * local.kept
        return blocks * self.block_flops / self.flops + moved / self.bandwidth

    def update(self) -> float:
        """Norm, clipping and AdamW pass ten times over float32 numbers."""
        return 10 * F32 * self.local.of_weights / self.bandwidth

    def talk(self, collectives: Iterator[Collective]) -> dict[str, float]:
        """Time of all calls of a step, by what they carry: "all_gather root"."""
        times: dict[str, float] = {}
        for collective in collectives:
            group = self.local.layout.group(collective.axis, self.cluster.per_node)
            time = collective.count * seconds(self.cluster, group, collective)
            name = f"{collective.operation} {collective.what}"
            times[name] = times.get(name, 0.0) + time
        return times

    def time(self) -> Time:
        """Of a step, if every stage were like this one.

        FSDP2 gathers the next block while one computes, and sums gradients behind it; the first
        gather and the last sum have nothing to hide behind. Tensor parallel waits for each sum."""
        local = self.local
        layout = local.layout
        shard = self.talk(of_shard(local))
        gathers = sum(time for name, time in shard.items() if name.startswith("all_gather"))
        scatters = sum(time for name, time in shard.items() if name.startswith("reduce_scatter"))
        gathers, scatters = gathers / layout.accum, scatters / layout.accum  # a micro-batch's
        first_and_last = 0.0
        for name, time in shard.items():
            calls = layout.accum if "root" in name else layout.accum * local.stage.blocks
            first_and_last += 0.0 if name == "reduce_scatter blocks" else time / calls
        tp = sum(self.talk(of_tp(local)).values()) / layout.accum
        send = sum(self.talk(of_pp(local)).values()) / layout.accum
        copies = sum(self.talk(of_replicate(local)).values())
        end = sum(self.talk(of_step(local)).values()) + self.update()

        forward, backward = self.forward(), self.backward()
        compute = forward + backward
        ahead = max(forward + tp / 2, gathers / 2)
        back = max(backward + tp / 2, gathers / 2 + scatters)
        last_back = max(backward + tp / 2, gathers / 2 + scatters + copies)
        times = layout.accum + (layout.pp - 1) / layout.virtual  # of a micro-batch, in a step
        waiting = times - layout.accum
        spoken = tp + gathers + scatters + send
        return Time(
            expected=times * (ahead + back + first_and_last)
            + 2 * waiting * send
            + (last_back - back)
            + end,
            optimistic=times * max(compute, spoken + copies / layout.accum) + self.update(),
            pessimistic=times * (compute + spoken) + copies + end,
            compute=layout.accum * compute + self.update(),
            bubble=waiting / times,
        )


def of_pp(local: Local) -> Iterator[Collective]:
    """Between two stages: the stream forward, its gradient back."""
    layout = local.layout
    if layout.pp == 1:
        return
    times = layout.accum * layout.virtual
    neighbours = (not local.stage.is_first) + (not local.stage.is_last)
    yield Collective("pp", "send", "stream and its gradient", times * neighbours, local.stream)


def matrices(shapes: dict[str, tuple[int, ...]]) -> int:
    """Numbers of the matrices among these."""
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)


# --- the plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a layout takes on a cluster."""

    layout: Layout
    memory: Memory
    traffic: list[Collective]
    time: Time
    tokens_per_second: float
    mfu: float
    fits: bool


def plan(work: Work, layout: Layout, cluster: Cluster) -> Plan:
    """All of it, for one layout."""
    need = memory(work, layout)
    clocks = [Clock(Local(work, layout, stage), cluster) for stage in stages(work, layout)]
    time = max((clock.time() for clock in clocks), key=lambda time: time.expected)
    tokens = layout.data * layout.accum * layout.rows * work.config.block_size
    speed = tokens / time.expected
    peak = cluster.size * cluster.gpu.flops
    return Plan(
        layout=layout,
        memory=need,
        traffic=traffic(work, layout),
        time=time,
        tokens_per_second=speed,
        mfu=work.flops_per_token * speed / peak,
        fits=need.total <= cluster.usable * cluster.gpu.memory,
    )


def layout_of(
    mesh: MeshSettings,
    world_size: int,
    work: Work,
    batch_tokens: int,
    micro_batch: int,
    recompute: int,
) -> Layout:
    """The layout that settings of train_fsdp.py describe. UserError if there is none."""
    axes = sizes(mesh, world_size)
    problems = tensor.problems(work.config, mesh.tp, mesh.sequence)
    if problems:
        raise UserError(problems[0])
    if work.config.n_layer < mesh.stages:
        raise UserError(
            f"{mesh.stages} stages need as many blocks; there are {work.config.n_layer}"
        )
    data = axes["replicate"] * axes["shard"]
    shares = share_batch(batch_tokens, work.config.block_size, micro_batch, data)
    is_interleaved = mesh.schedule == "interleaved" and mesh.pp > 1
    return Layout(
        **axes,
        rows=shares.micro,
        accum=shares.accum,
        recompute=recompute,
        sequence=mesh.sequence,
        schedule=mesh.schedule,
        virtual=mesh.virtual if is_interleaved else 1,
        offload=mesh.offload,
        reduce=2 if mesh.reduce == "bfloat16" and work.product < F32 else F32,
    )


def search(work: Work, cluster: Cluster, batch_tokens: int, reduce: int, best: int) -> list[Plan]:
    """The fastest layouts that fit into memory, at most one for each mesh."""
    fastest: dict[tuple[int, ...], Plan] = {}
    for layout in candidates(work, cluster, batch_tokens, reduce):
        if memory(work, layout).total > cluster.usable * cluster.gpu.memory:
            continue
        found = plan(work, layout, cluster)
        mesh = (layout.pp, layout.replicate, layout.shard, layout.tp)
        if mesh not in fastest or found.tokens_per_second > fastest[mesh].tokens_per_second:
            fastest[mesh] = found
    ranked = sorted(fastest.values(), key=lambda plan: -plan.tokens_per_second)
    return ranked[:best]


def candidates(work: Work, cluster: Cluster, batch_tokens: int, reduce: int) -> Iterator[Layout]:
    """All layouts of a global batch that the model and the machines allow."""
    c = work.config
    for tp in divisors(cluster.per_node):
        if cluster.size % tp or tensor.problems(c, tp, tp > 1):
            continue
        for pp in divisors(cluster.size // tp):
            data = cluster.size // tp // pp
            rows_of_each, rest = divmod(batch_tokens, c.block_size * data)
            if pp > c.n_layer or rest:
                continue
            cuts = itertools.product(
                divisors(data), divisors(rows_of_each), (0, 2, 1), {False, tp > 1}
            )
            for shard, rows, recompute, sequence in cuts:
                layout = Layout(
                    pp=pp,
                    replicate=data // shard,
                    shard=shard,
                    tp=tp,
                    rows=rows,
                    accum=rows_of_each // rows,
                    recompute=recompute,
                    sequence=sequence,
                    reduce=reduce,
                )
                if layout.accum >= pp:
                    yield layout


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
