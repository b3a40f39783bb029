"""What each process of a mesh holds and sends in a step of train_fsdp.py, by arithmetic.

docs/scaling.md has the formulas in words, and what they were checked against. simulate.py and
bench/plan.py count the same of a true step.

Sizes are bytes. N tokens of a micro-batch, C width, K width of keys or values, F width of the MLP.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from model import GPT, GPTConfig
from smallgpt.parallel.pipeline import cut_in_ranges

F32 = 4  # bytes of weights, gradients and the residual stream, for each number
BUCKET = 25 * 2**20  # of gradients that DDP sums at a time

Shapes = dict[str, tuple[int, ...]]  # of parameters, by their names


# --- what is computed, and how it is cut ----------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The processes that talk along an axis of the mesh."""

    size: int
    on_node: int  # of them on one node

    @property
    def nodes(self) -> int:
        return math.ceil(self.size / self.on_node)


@dataclass(frozen=True)
class Layout:
    """How a step is cut: `accum` micro-batches of `rows` sequences for each process."""

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
    reduce: int = F32  # bytes of a number in the sum of gradients

    @property
    def data(self) -> int:
        """Processes that read different rows."""
        return self.replicate * self.shard

    @property
    def size(self) -> int:
        """All processes."""
        return self.pp * self.data * self.tp

    @property
    def is_plain(self) -> bool:
        """Does every process hold a whole model? Then it is DDP, or a single process."""
        return self.pp * self.shard * self.tp == 1 and not self.offload

    @property
    def has_fsdp(self) -> bool:
        return not self.is_plain and (self.data > 1 or self.offload)

    def group(self, axis: str, per_node: int) -> Group:
        """The processes along an axis, "ends" of the pipeline, or "all". tp's are neighbours."""
        if axis == "all":
            return Group(self.size, min(self.size, per_node))
        distance = {"tp": 1, "shard": self.tp, "replicate": self.tp * self.shard}
        between = distance.get(axis, self.tp * self.data)
        size = 2 if axis == "ends" else getattr(self, axis)
        if axis == "ends":
            between *= self.pp - 1
        on_node = min(size, max(1, per_node // between))
        return Group(size, on_node)

    def describe(self) -> str:
        """pp 2 (1f1b) x hsdp 4x8 x tp 2, recompute 1, 8 sequences x 4"""
        parts = []
        if self.pp > 1:
            parts.append(f"pp {self.pp} ({self.schedule})")
        if self.shard > 1 and self.replicate > 1:
            parts.append(f"hsdp {self.replicate}x{self.shard}")
        elif self.shard > 1:
            parts.append(f"fsdp {self.shard}")
        elif self.replicate > 1:
            parts.append(f"ddp {self.replicate}")
        if self.tp > 1:
            parts.append(f"tp {self.tp} (sequence)" if self.sequence else f"tp {self.tp}")
        name = " x ".join(parts) or "one process"
        recompute = f", recompute {self.recompute}" if self.recompute else ""
        return f"{name}{recompute}, {self.rows} sequences x {self.accum}"


@dataclass(frozen=True)
class Stage:
    """What one process of a pipeline holds; without one, everything."""

    parts: list[range]  # its blocks; several parts where the schedule is interleaved
    is_first: bool  # it has the embedding
    is_last: bool  # it has the final norm, the LM head and the loss
    in_flight: float  # micro-batches whose activations it holds at a time

    @property
    def layers(self) -> list[int]:
        return list(itertools.chain(*self.parts))


def stages(n_layer: int, layout: Layout) -> list[Stage]:
    """Those of the processes along the pipeline, in order."""
    pp, virtual, accum = layout.pp, layout.virtual, layout.accum
    ranges = cut_in_ranges(n_layer, pp * virtual)
    found = []
    for rank in range(pp):
        behind = pp - 1 - rank
        if pp == 1:
            in_flight = 1.0
        elif layout.schedule == "gpipe":
            in_flight = accum
        elif layout.schedule == "1f1b":
            in_flight = min(accum, behind + 1)
        else:  # parts of a micro-batch before the first backward (Narayanan et al. 2021)
            parts = (virtual - 1) * pp + 2 * behind + 1
            in_flight = min(accum, parts / virtual)
        found.append(Stage(ranges[rank::pp], rank == 0, rank == pp - 1, in_flight))
    return found


@dataclass(frozen=True)
class Work:
    """A model and the way it is computed."""

    config: GPTConfig
    product: int = 2  # bytes of a number in matrix products
    kernels: Literal["cpu", "cuda", "compiled"] = "compiled"  # they decide what backward needs
    muon: bool = False

    @cached_property
    def shapes(self) -> Shapes:
        """Those of block 0 stand for every block."""
        with torch.device("meta"):
            model = GPT(replace(self.config, n_layer=1))
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    def block(self, tp: int = 1) -> Shapes:
        """A block's parameters on one of tp ranks."""
        names = [name for name in self.shapes if name.startswith("blocks.")]
        return {name: cut_shape(name, self.shapes[name], tp) for name in names}

    def root(self, stage: Stage, tp: int = 1) -> Shapes:
        """What a stage holds that is in no block. A tied matrix is at both ends."""
        held = {}
        for name, shape in self.shapes.items():
            is_embedding = name.startswith("w")
            is_tied = name == "wte.weight" and self.config.tie_weights
            at_first = stage.is_first and is_embedding
            at_last = stage.is_last and (is_tied or not is_embedding)
            if not name.startswith("blocks.") and (at_first or at_last):
                held[name] = cut_shape(name, shape, tp)
        return held

    @property
    def parameters(self) -> int:
        """Numbers of the whole model."""
        whole = Stage([], is_first=True, is_last=True, in_flight=0)
        return self.config.n_layer * numbers(self.block()) + numbers(self.root(whole))

    @property
    def flops_per_token(self) -> int:
        """As runs.metrics counts them: without recomputation, with all attention scores."""
        c = self.config
        weights = c.n_layer * matrices(self.block()) + c.vocab_size * c.n_embd
        scores = 12 * c.n_layer * c.n_embd * c.block_size
        return 6 * weights + scores


def cut_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """The part of a parameter that a tensor-parallel rank holds, as tensor.cut_matrices cuts it."""
    first, *others = shape
    layer, kind = name.split(".")[-2:]
    if layer in ("q", "k", "v", "fc", "gate", "wte", "lm_head"):
        return (math.ceil(first / tp), *others)
    if layer == "proj" and kind == "weight":
        return (first, others[0] // tp)
    return shape


def numbers(shapes: Shapes, parts: int = 1) -> int:
    """How many numbers they have, each padded to so many equal parts of its rows."""
    total = 0
    for first, *others in shapes.values():
        rows = math.ceil(first / parts) * parts
        total += rows * math.prod(others)
    return total


def matrices(shapes: Shapes) -> int:
    """Numbers of the matrices among them."""
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)


# --- activations ----------------------------------------------------------------------------------


def kept_by_block(work: Work, tp: int = 1, sequence: bool = False) -> dict[str, float]:
    """What a block keeps for its backward: bytes of each tensor for a token, on one of tp ranks.

    Attention is a fused kernel (FlashAttention, Dao et al. 2022) and keeps no scores. Compiled,
    the partitioner has what is cheap computed again; the list is what it was seen to keep."""
    c = work.config
    low = work.product  # bytes of a number in matrix products
    is_eager = work.kernels != "compiled"
    copies = is_eager and low < F32  # autocast makes one for each matrix that reads a tensor
    stream = c.n_embd / (tp if sequence else 1)
    heads = c.n_head / tp
    kv_heads = max(1, c.kv_heads / tp)
    queries = heads * c.head_size
    keys = kv_heads * c.head_size
    scale = norm_scale(c) / (tp if sequence else 1)

    readers = {"attention": 3, "mlp": 2 if c.mlp == "swiglu" else 1}
    kept: dict[str, float] = {}
    for half, matrices_reading in readers.items():
        # compiled, the sum in the middle is computed again, from the projection's output
        in_float32 = is_eager or half == "attention"
        kept[f"{half}: stream"] = (F32 if in_float32 else low) * stream
        kept[f"{half}: norm's scale"] = scale
        if work.kernels == "cpu" and c.norm == "rmsnorm":
            kept[f"{half}: normalised"] = F32 * stream
        kept[f"{half}: input"] = (matrices_reading if copies else 1) * low * c.n_embd
    if c.qk_norm:
        # a fused norm keeps its input in float32, the CPU's also what it made of it
        each = {"cpu": 2 * F32, "cuda": F32, "compiled": low}[work.kernels]
        kept["before qk_norm"] = each * (queries + keys)
        kept["qk_norm's scale"] = F32 * (heads + kv_heads)
    kept["q, k, v"] = low * (queries + 2 * keys)
    kept["attended"] = low * queries
    kept["log of the sums"] = F32 * heads
    if c.qk_norm:  # its output has the heads before the positions
        kept["attended, positions first"] = low * queries
    kept["hidden"] = hidden_bytes(work) * c.mlp_size / tp
    if c.dropout:
        kept["dropout"] = 2 * stream * (low if work.kernels == "cpu" else 1)
    return kept


def hidden_bytes(work: Work) -> int:
    """Bytes for each hidden unit of the MLP: its activation function's inputs and output."""
    low = work.product
    if work.config.mlp == "swiglu":
        return (3 if work.kernels == "compiled" else 4) * low
    if work.config.mlp == "relu2" and work.kernels == "cuda" and low < F32:
        return 2 * low + F32  # CUDA's autocast squares in float32
    return 2 * low


def norm_scale(config: GPTConfig) -> int:
    """What a norm keeps of a token beside its input: the scale, and LayerNorm's mean."""
    return F32 if config.norm == "rmsnorm" else 2 * F32


# --- memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What lies in memory at one moment of a step, beside weights and optimizer."""

    name: str
    gradients: float
    activations: float  # that backward needs
    temporary: float  # gathered weights, the loss, gradients on their way

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.temporary


@dataclass(frozen=True)
class Memory:
    """Of one process, at the fullest moment of a step."""

    weights: float
    optimizer: float
    moment: Moment

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.moment.total


class Process:
    """One process's part of a step."""

    def __init__(self, work: Work, layout: Layout, stage: Stage):
        self.work = work
        self.layout = layout
        self.stage = stage
        self.parts = layout.shard if layout.has_fsdp else 1
        self.blocks = len(stage.layers)
        # numbers of a block and of the root, gathered over `shard`
        self.block = numbers(work.block(layout.tp), self.parts)
        self.root = numbers(work.root(stage, layout.tp), self.parts)
        self.tokens = layout.rows * work.config.block_size
        self.stream = F32 * work.config.n_embd * self.tokens  # the residual stream, whole

    @property
    def is_low(self) -> bool:
        """Are products computed in less than float32?"""
        return self.work.product < F32

    @property
    def weight_count(self) -> float:
        """Numbers of the weights that live here."""
        return (self.blocks * self.block + self.root) / self.parts

    def memory(self) -> Memory:
        weights = F32 * self.weight_count
        optimizer = 2 * weights  # AdamW's two means
        if self.work.muon:  # which has one for a matrix of a block
            optimizer -= F32 * self.blocks * self.block / self.parts
        fullest = max(self.moments(), key=lambda moment: moment.total)
        if self.layout.offload:
            weights = optimizer = 0.0
        return Memory(weights, optimizer, fullest)

    # what is there for a while

    @property
    def gradients(self) -> float:
        """Between micro-batches. In a pipeline FSDP sums them once a step, and they lie whole."""
        count = self.weight_count
        if self.layout.pp > 1 and self.layout.has_fsdp:
            count *= self.parts
        return F32 * count

    @property
    def gathered(self) -> float:
        """FSDP: the root's weights, from forward to backward; in a pipeline those of all blocks."""
        if not self.layout.has_fsdp:
            return 0.0
        blocks = self.blocks if self.layout.pp > 1 else 0
        return F32 * self.root + blocks * self.gathered_block

    @property
    def gathered_block(self) -> float:
        return self.work.product * self.block if self.layout.has_fsdp else 0.0

    @cached_property
    def kept(self) -> float:
        """Activations of a block."""
        kept = kept_by_block(self.work, self.layout.tp, self.layout.sequence)
        return self.tokens * sum(kept.values())

    def is_recomputed(self, layer: int) -> bool:
        """Does a block keep its input only?"""
        every = self.layout.recompute
        return bool(every) and layer % every == 0

    @cached_property
    def recomputed(self) -> int:
        return sum(map(self.is_recomputed, self.stage.layers))

    @cached_property
    def activations(self) -> float:
        """Of all blocks and micro-batches, where the first backward begins."""
        c = self.work.config
        whole = self.blocks - self.recomputed
        inputs = self.stream / (self.layout.tp if self.layout.sequence else 1)
        total = self.stage.in_flight * (whole * self.kept + self.recomputed * inputs)
        if self.is_low and not self.layout.has_fsdp:
            # autocast's copies of the weights
            total += self.work.product * self.blocks * self.block
        if self.layout.pp > 1:
            total += self.travelling
        if self.stage.is_last:
            tensors = 2 if self.work.kernels == "cpu" and c.norm == "rmsnorm" else 1
            total += tensors * self.stream + norm_scale(c) * self.tokens
        return total

    @property
    def travelling(self) -> float:
        """A pipeline's buffers to receive into, for each micro-batch of a step, and the outputs of
        the stages, which wait for their gradients."""
        received = len(self.neighbours) * self.layout.accum
        ends = len(self.stage.parts) - self.stage.is_last
        return (received + ends * self.stage.in_flight / len(self.stage.parts)) * self.stream

    @property
    def neighbours(self) -> list[str]:
        """Those that each part of the stage talks to: "before" and "behind"."""
        last = len(self.stage.parts) - 1
        found = []
        for number in range(len(self.stage.parts)):
            if number > 0 or not self.stage.is_first:
                found.append("before")
            if number < last or not self.stage.is_last:
                found.append("behind")
        return found

    # the moments that may be the fullest

    def moments(self) -> Iterator[Moment]:
        """Of the last micro-batch."""
        stays = self.layout.accum > 1 or (self.layout.is_plain and self.layout.data > 1)
        before = self.gradients if stays else 0.0
        if self.stage.is_last:
            yield from self.at_the_loss(before)
        yield from self.in_the_last_block(before)
        yield self.at_the_embedding()

    def at_the_loss(self, gradients: float) -> Iterator[Moment]:
        """LinearCrossEntropy computes the gradients in its forward, and scales them in backward."""
        c = self.work.config
        tokens = self.tokens / self.layout.tp  # tensor-parallel ranks share them
        matrix = c.vocab_size * c.n_embd
        results = F32 * (matrix + tokens * c.n_embd)
        forward = self.gathered + self.stream + results + self.slice_of_logits(tokens)
        if self.layout.tp > 1:
            forward += F32 * matrix  # gathered
        if self.is_low:
            forward += self.work.product * (matrix + tokens * c.n_embd)
        yield Moment("loss", gradients, self.activations, forward)
        yield Moment("loss", gradients, self.activations, self.gathered + 2 * results)

    def slice_of_logits(self, tokens: float) -> float:
        """cross_entropy_slice: logits, and temporary numbers for each of them."""
        low = self.work.product
        most = 2**22 if self.work.kernels == "cpu" else 2**25
        rows = min(tokens, max(64, most // self.work.config.vocab_size))
        each = 3 * F32 + 1 + F32 + (low if self.is_low else 0)
        if self.work.kernels == "compiled":
            each = 2 * low
        if rows < tokens:
            each += low  # the gradient of the slice before
        return each * rows * self.work.config.vocab_size

    def in_the_last_block(self, gradients: float) -> Iterator[Moment]:
        """Backward begins it, and has ended it."""
        is_again = self.is_recomputed(self.stage.layers[-1])
        begun = self.activations + (self.kept if is_again else 0.0)
        ended = self.activations - (0.0 if is_again else self.kept)
        temporary = self.gathered + self.stream
        if self.layout.pp == 1:
            temporary += 2 * self.gathered_block  # it, and the next one early
        if self.stage.is_last:
            temporary += F32 * self.root  # the head's gradient
        yield Moment("last block", gradients, begun, temporary + self.backward_of_mlp())
        each = F32
        if self.layout.has_fsdp and self.layout.pp == 1:  # as computed, and on its way
            each = self.work.product + self.layout.reduce
        yield Moment("last block", gradients, ended, temporary + self.stream + each * self.block)

    def backward_of_mlp(self) -> float:
        """The largest temporary tensors of a block: those of its activation function, and the
        gradient of the matrix behind it."""
        work = self.work
        c = work.config
        width = c.mlp_size / self.layout.tp
        tensors = {"relu2": 3, "gelu": 1, "swiglu": 2}[c.mlp]
        if work.kernels == "compiled":
            tensors = 1
        squares_in_float32 = work.kernels == "cuda" and c.mlp == "relu2"
        size = F32 if squares_in_float32 else work.product
        return width * (tensors * size * self.tokens + work.product * c.n_embd)

    def at_the_embedding(self) -> Moment:
        """Backward ends: all gradients are there, the embedding's before they are summed."""
        temporary = self.gathered
        if self.stage.is_first:
            temporary += 2 * F32 * self.root
        if self.layout.has_fsdp:
            temporary += self.layout.reduce * self.root
        return Moment("embedding", self.gradients, 0.0, temporary)


def processes(work: Work, layout: Layout) -> list[Process]:
    """One for each stage of the pipeline: all others are like one of these."""
    found = stages(work.config.n_layer, layout)
    return [Process(work, layout, stage) for stage in found]


def memory(work: Work, layout: Layout) -> Memory:
    """Of the process that needs most."""
    needs = [process.memory() for process in processes(work, layout)]
    return max(needs, key=lambda need: need.total)


# --- traffic --------------------------------------------------------------------------------------

Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "send"]


@dataclass(frozen=True)
class Collective:
    """What a process does `count` times in a step. `size` is that of the whole: what an all-gather
    gives, what a reduce-scatter takes."""

    axis: str  # of the mesh; "ends" of the pipeline; "all" processes
    operation: Operation
    what: str
    count: int
    size: float

    @property
    def bytes(self) -> float:
        return self.count * self.size


def traffic(process: Process) -> list[Collective]:
    """All that a process sends in a step."""
    found = [
        *of_shard(process),
        *of_replicate(process),
        *of_tp(process),
        *of_pp(process),
        *of_step(process),
    ]
    return [collective for collective in found if collective.count]


def of_shard(process: Process) -> Iterator[Collective]:
    """FSDP2: a block's weights are gathered for its forward and again for its backward, the root's
    once; every micro-batch's gradients are summed where their parts live. In a pipeline all of it
    is done once a step."""
    layout = process.layout
    if not layout.has_fsdp or layout.shard == 1:
        return
    times = layout.accum if layout.pp == 1 else 1
    gathers = 2 * times if layout.pp == 1 else 1
    blocks, low, reduce = process.blocks, process.work.product, layout.reduce
    yield Collective("shard", "all_gather", "blocks", gathers * blocks, low * process.block)
    yield Collective("shard", "reduce_scatter", "blocks", times * blocks, reduce * process.block)
    if process.root:
        yield Collective("shard", "all_gather", "root", times, F32 * process.root)
        yield Collective("shard", "reduce_scatter", "root", times, reduce * process.root)


def of_replicate(process: Process) -> Iterator[Collective]:
    """Copies: what each has summed is summed once a step."""
    layout = process.layout
    if layout.replicate == 1:
        return
    if layout.is_plain:
        size = F32 * process.weight_count
        buckets = math.ceil(size / BUCKET)
        yield Collective("replicate", "all_reduce", "gradients", buckets, size / buckets)
        return
    part = layout.reduce / process.parts
    yield Collective("replicate", "all_reduce", "blocks", process.blocks, part * process.block)
    if process.root:
        yield Collective("replicate", "all_reduce", "root", 1, part * process.root)


def of_tp(process: Process) -> Iterator[Collective]:
    """Tensor parallel: the sums of both halves of each block, forward in the precision of products,
    backward in float32; with `sequence` a reduce-scatter and an all-gather each."""
    layout = process.layout
    if layout.tp == 1:
        return
    c = process.work.config
    accum = layout.accum
    halves = 2 * accum * process.blocks
    again = accum * process.recomputed  # a block is not computed again behind its last product
    stream = process.stream
    low = stream * process.work.product / F32
    if layout.sequence:
        yield Collective("tp", "all_gather", "blocks, forward", halves + 2 * again, stream)
        yield Collective("tp", "reduce_scatter", "blocks, forward", halves + again, low)
        yield Collective("tp", "all_gather", "blocks, backward", halves, low)
        yield Collective("tp", "reduce_scatter", "blocks, backward", halves, stream)
        parts = len(process.stage.parts)
        yield Collective("tp", "all_gather", "stream", 2 * accum * parts, stream)
    else:
        yield Collective("tp", "all_reduce", "blocks, forward", halves + again, low)
        yield Collective("tp", "all_reduce", "blocks, backward", halves, stream)
    if c.kv_heads < layout.tp:
        keys = process.work.product * c.kv_heads * c.head_size * process.tokens
        yield Collective("tp", "all_gather", "keys, values", halves + 2 * again, keys)
        yield Collective("tp", "reduce_scatter", "keys, values", halves, keys)
    if process.stage.is_first:
        yield Collective("tp", "all_reduce", "embedding", accum, stream)
    if process.stage.is_last:
        head = F32 * c.vocab_size * c.n_embd
        yield Collective("tp", "all_gather", "head", accum, head)
        yield Collective("tp", "reduce_scatter", "head", accum, head)
        yield Collective("tp", "all_gather", "gradient of the loss", accum, stream)
        yield Collective("tp", "all_reduce", "loss", accum, F32)
    yield from of_whole_weights(process)


def of_whole_weights(process: Process) -> Iterator[Collective]:
    """Weights that every tensor-parallel rank holds, but has only a part of the gradient of. FSDP
    takes a sum from each micro-batch, AdamW one from each step."""
    layout = process.layout
    c = process.work.config
    summed_often = layout.has_fsdp and layout.pp == 1
    times = 2 * process.blocks * (layout.accum if summed_often else 1)
    size = process.work.product if layout.has_fsdp else F32
    if c.qk_norm:
        yield Collective("tp", "all_reduce", "qk_norm", times, size * c.head_size)
    if layout.sequence:
        tensors = 2 if c.norm == "layernorm" and c.bias else 1
        yield Collective("tp", "all_reduce", "norms", times * tensors, size * c.n_embd)


def of_pp(process: Process) -> Iterator[Collective]:
    """Pipeline: the stream to the stage behind, its gradient to the one before; the two copies of
    a tied matrix add up their gradients."""
    layout, stage = process.layout, process.stage
    if layout.pp == 1:
        return
    sends = layout.accum * len(process.neighbours)
    yield Collective("pp", "send", "stream, gradients", sends, process.stream)
    if process.work.config.tie_weights and (stage.is_first or stage.is_last):
        tied = {"wte.weight": process.work.root(stage, layout.tp)["wte.weight"]}
        part = numbers(tied) / process.parts
        yield Collective("ends", "all_reduce", "tied matrix", 1, F32 * part)


def of_step(process: Process) -> Iterator[Collective]:
    """Once a step: the norm of the gradient, from that of each parameter; the number of targets,
    and the loss."""
    layout, stage = process.layout, process.stage
    tensors = process.blocks * len(process.work.block())
    tensors += len(process.work.root(stage))
    if stage.is_last and not stage.is_first and process.work.config.tie_weights:
        tensors -= 1  # the first stage counts the tied matrix
    for axis in ("shard", "tp"):
        if getattr(layout, axis) > 1:
            yield Collective(axis, "all_reduce", "norm", 1, F32 * tensors)
    if layout.pp > 1:
        yield Collective("pp", "all_reduce", "norm", 1, 8)
    if layout.size > 1:
        yield Collective("all", "all_reduce", "targets, loss", 2, 8)
