"""What each process of a mesh holds and sends in a step of train_fsdp.py, by arithmetic.

docs/scaling.md has the formulas in words, and what they were checked against. simulate.py and
bench/plan.py count the same of a true step.

Sizes are bytes. N tokens of a micro-batch, C width, K width of keys or values, F width of the MLP.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch

from model import GPT, GPTConfig, most_classes
from smallgpt.parallel.layout import Axes, Schedule, cut_in_ranges
from smallgpt.parallel.strategy import shapes_of

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
class Layout(Axes):
    """How a step is cut: `accum` micro-batches of `rows` sequences for each process."""

    rows: int
    accum: int
    recompute: int = 0  # every n-th block computes its activations again
    sequence: bool = False
    schedule: Schedule = "1f1b"
    virtual: int = 1  # stages on each process
    reduce: int = F32  # bytes of a number in the sum of gradients

    @property
    def share(self) -> int:
        """Parts that the positions are cut into, between the matrices of a block."""
        return self.tp if self.sequence else 1

    @property
    def has_fsdp(self) -> bool:
        return not self.is_plain and self.data > 1

    @property
    def all_forward_first(self) -> bool:
        """Do all micro-batches of a step go forward before one goes back?"""
        return self.pp > 1 and self.schedule == "gpipe"

    def group(self, axis: str, per_node: int) -> Group:
        """The processes along an axis, "ends" of the pipeline, or "all". tp's are neighbours."""
        if axis == "all":
            return Group(self.size, min(self.size, per_node))
        of_stage = self.data * self.tp
        distance = {
            "tp": 1,
            "shard": self.tp,
            "replicate": self.tp * self.shard,
            "pp": of_stage,
            "ends": of_stage * (self.pp - 1),
        }
        size = 2 if axis == "ends" else getattr(self, axis)
        on_node = max(1, per_node // distance[axis])
        return Group(size, min(size, on_node))

    def describe(self) -> str:
        """pp 2 (1f1b) x hsdp 4x8 x tp 2, recompute 1, 8 sequences x 4"""
        name = self.name(self.schedule, self.sequence)
        recompute = f", recompute {self.recompute}" if self.recompute else ""
        return f"{name}{recompute}, {self.rows} sequences x {self.accum}"


@dataclass(frozen=True)
class Stage:
    """What one process of a pipeline holds; without one, everything."""

    parts: list[range]  # its blocks; several parts where the schedule is interleaved
    is_first: bool  # it has the embedding
    is_last: bool  # it has the final norm, the LM head and the loss
    in_flight: float  # micro-batches whose activations it holds at a time
    losses: int  # those of them whose loss has been computed

    @property
    def layers(self) -> list[int]:
        return list(itertools.chain(*self.parts))


def stages(n_layer: int, layout: Layout) -> list[Stage]:
    """Those of the processes along the pipeline, in order."""
    pp, virtual, accum = layout.pp, layout.virtual, layout.accum
    ranges = cut_in_ranges(n_layer, pp * virtual)
    # GPipe computes all losses before its first backward, the other schedules one at a time
    losses = accum if layout.all_forward_first else 1
    found = []
    for rank in range(pp):
        behind = pp - 1 - rank
        if pp == 1:
            in_flight = 1.0
        elif layout.all_forward_first:
            in_flight = accum
        elif layout.schedule == "1f1b":
            in_flight = min(accum, behind + 1)
        else:  # parts of a micro-batch before the first backward (Narayanan et al. 2021)
            begun = (virtual - 1) * pp + 2 * behind + 1
            in_flight = min(accum, begun / virtual)
        parts = ranges[rank::pp]
        found.append(Stage(parts, rank == 0, behind == 0, in_flight, losses))
    return found


@dataclass(frozen=True)
class Work:
    """A model and the way it is computed."""

    config: GPTConfig
    product: int = 2  # bytes of a number in matrix products
    kernels: Literal["cpu", "cuda", "compiled"] = "compiled"  # they decide what backward needs
    negatives: int = 0  # classes that the loss samples; memory is planned as if it read all

    @cached_property
    def shapes(self) -> Shapes:
        """Those of block 0 stand for every block."""
        with torch.device("meta"):
            model = GPT(replace(self.config, n_layer=1))
        return shapes_of(model)

    def block(self, tp: int = 1) -> Shapes:
        """A block's parameters on one of tp ranks."""
        names = [name for name in self.shapes if name.startswith("blocks.")]
        return {name: cut_shape(name, self.shapes[name], tp) for name in names}

    def root(self, stage: Stage, tp: int = 1) -> Shapes:
        """What a stage holds that is in no block. A tied matrix is at both ends."""
        held = {}
        for name, shape in self.shapes.items():
            is_embedding = name.startswith("w")  # wte, wpe
            is_tied = name == "wte.weight" and self.config.tie_weights
            at_first = stage.is_first and is_embedding
            at_last = stage.is_last and (is_tied or not is_embedding)
            if not name.startswith("blocks.") and (at_first or at_last):
                held[name] = cut_shape(name, shape, tp)
        return held

    @property
    def parameters(self) -> int:
        """Numbers of the whole model."""
        whole = Stage([], is_first=True, is_last=True, in_flight=0, losses=0)
        of_block = numbers(self.block())
        of_root = numbers(self.root(whole))
        return self.config.n_layer * of_block + of_root

    def classes(self, layout: Layout) -> int:
        """Rows of the LM head that the loss multiplies by."""
        tokens = layout.rows * self.config.block_size // layout.tp
        return most_classes(tokens, self.config.vocab_size, self.negatives)

    def flops_per_token(self, layout: Layout) -> int:
        """As runs.metrics counts them: without recomputation, with all attention scores."""
        c = self.config
        head = self.classes(layout) * c.n_embd
        weights = c.n_layer * matrices(self.block()) + head
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
    share = tp if sequence else 1  # of the positions
    stream = c.n_embd / share
    heads = c.n_head / tp
    kv_heads = max(1, c.kv_heads / tp)
    queries = heads * c.head_size
    keys = kv_heads * c.head_size
    scale = norm_scale(c) / share

    readers = {"attention": 3, "mlp": 2 if c.mlp == "swiglu" else 1}  # matrices
    kept: dict[str, float] = {}
    for half, count in readers.items():
        # compiled, the sum in the middle is computed again, from the projection's output
        in_float32 = is_eager or half == "attention"
        kept[f"{half}: stream"] = (F32 if in_float32 else low) * stream
        kept[f"{half}: norm's scale"] = scale
        if work.kernels == "cpu" and c.norm == "rmsnorm":
            kept[f"{half}: normalised"] = F32 * stream
        inputs = count if copies else 1
        kept[f"{half}: input"] = inputs * low * c.n_embd
    if c.qk_norm:
        # a fused norm keeps its input; the CPU's in float32, and what it made of it, too
        each = 2 * F32 if work.kernels == "cpu" else low
        kept["before qk_norm"] = each * (queries + keys)
        kept["qk_norm's scale"] = F32 * (heads + kv_heads)
    kept["q, k, v"] = low * (queries + 2 * keys)
    kept["attended"] = low * queries
    kept["log of the sums"] = F32 * heads
    if c.qk_norm:  # its output has the heads before the positions
        kept["attended, positions first"] = low * queries
    kept["hidden"] = hidden_bytes(work) * c.mlp_size / tp
    if c.dropout:
        each = low if work.kernels == "cpu" else 1  # noise, or a mask
        kept["dropout"] = 2 * each * stream
    return kept


def hidden_bytes(work: Work) -> int:
    """Bytes for each hidden unit of the MLP: its activation function's inputs and output."""
    low = work.product
    if work.config.mlp == "swiglu":
        return (3 if work.kernels == "compiled" else 4) * low
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
        self.config = work.config
        self.layout = layout
        self.stage = stage
        self.low = work.product  # bytes of a number in matrix products
        self.is_low = self.low < F32
        self.parts = layout.shard if layout.has_fsdp else 1
        self.blocks = len(stage.layers)
        # numbers of a block and of the root, gathered over `shard`
        block = work.block(layout.tp)
        root = work.root(stage, layout.tp)
        self.block = numbers(block, self.parts)
        self.root = numbers(root, self.parts)
        self.tokens = layout.rows * self.config.block_size
        self.stream = F32 * self.config.n_embd * self.tokens  # the residual stream, whole

    @property
    def weight_count(self) -> float:
        """Numbers of the weights that live here."""
        return (self.blocks * self.block + self.root) / self.parts

    def memory(self) -> Memory:
        weights = F32 * self.weight_count
        fullest = max(self.moments(), key=lambda moment: moment.total)
        return Memory(weights, optimizer=2 * weights, moment=fullest)  # AdamW's two means

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
        return self.low * self.block if self.layout.has_fsdp else 0.0

    @cached_property
    def kept(self) -> float:
        """Activations of a block."""
        layout = self.layout
        kept = kept_by_block(self.work, layout.tp, layout.sequence)
        return self.tokens * sum(kept.values())

    @property
    def input(self) -> float:
        """What goes into a block: all that a recomputed one keeps."""
        return self.stream / self.layout.share

    def is_recomputed(self, layer: int) -> bool:
        """Does a block keep its input only?"""
        every = self.layout.recompute
        return bool(every) and layer % every == 0

    @cached_property
    def recomputed(self) -> int:
        return sum(map(self.is_recomputed, self.stage.layers))

    @cached_property
    def activations(self) -> float:
        """Of all blocks and micro-batches in flight."""
        return self.activations_of(self.stage.in_flight, self.stage.losses)

    def activations_of(self, in_flight: float, losses: int) -> float:
        """Of so many micro-batches, of which the loss of so many has been computed."""
        layout = self.layout
        whole = self.blocks - self.recomputed
        of_blocks = whole * self.kept + self.recomputed * self.input
        if self.is_low and not layout.has_fsdp:
            # autocast's copies of the weights, which each micro-batch makes anew
            of_blocks += self.low * self.blocks * self.block
        total = in_flight * of_blocks
        if layout.pp > 1:
            total += self.travelling
        if self.stage.is_last:
            # LinearCrossEntropy computes gradients in its forward: the newest count as temporary
            total += losses * self.final_norm + max(0, losses - 1) * self.gradients_of_loss
        return total

    @property
    def final_norm(self) -> float:
        keeps_two = self.work.kernels == "cpu" and self.config.norm == "rmsnorm"
        tensors = 2 if keeps_two else 1
        return tensors * self.stream + norm_scale(self.config) * self.tokens

    @property
    def gradients_of_loss(self) -> float:
        """Of the hidden states and of the head's matrix, by one micro-batch."""
        hidden = self.tokens / self.layout.tp  # tensor-parallel ranks share them
        return F32 * self.config.n_embd * (self.config.vocab_size + hidden)

    @property
    def travelling(self) -> float:
        """What a pipeline receives into, and the outputs that its stages send: both are there for
        each micro-batch of a step."""
        received = len(self.neighbours)
        sent = self.neighbours.count("behind")
        return self.layout.accum * (received + sent) * self.stream

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
        """Of the last micro-batch; where all go forward first, of the one that goes back first."""
        has_buckets = self.layout.is_plain and self.layout.data > 1  # DDP's, which stay
        has_followed = self.layout.accum > 1 and not self.layout.all_forward_first
        before = self.gradients if has_buckets or has_followed else 0.0
        if self.stage.is_last:
            yield self.at_the_loss(before)
        yield from self.in_the_last_block(before)
        yield self.at_the_embedding()

    def at_the_loss(self, gradients: float) -> Moment:
        """LinearCrossEntropy computes the gradients in its forward, and scales them in backward."""
        c = self.config
        tokens = self.tokens / self.layout.tp  # tensor-parallel ranks share them
        matrix = c.vocab_size * c.n_embd
        results = self.gradients_of_loss
        forward = self.gathered + self.stream + results + self.slice_of_logits(tokens)
        if self.layout.tp > 1:
            forward += F32 * matrix  # gathered
        if self.is_low:
            forward += self.low * (matrix + tokens * c.n_embd)
        backward = self.gathered + 2 * results
        temporary = max(forward, backward)
        return Moment("loss", gradients, self.activations, temporary)

    def slice_of_logits(self, tokens: float) -> float:
        """cross_entropy_slice: logits, and temporary numbers for each of them."""
        vocabulary = self.config.vocab_size
        most = 2**22 if self.work.kernels == "cpu" else 2**25
        rows = max(64, most // vocabulary)
        each = 4 * F32 + 1
        if self.is_low:
            each += self.low
        if self.work.kernels == "compiled":
            each = 2 * self.low
        if rows < tokens:
            each += self.low  # the gradient of the slice before
        return each * min(rows, tokens) * vocabulary

    def in_the_last_block(self, gradients: float) -> Iterator[Moment]:
        """Backward begins it, and has ended it."""
        is_again = self.is_recomputed(self.stage.layers[-1])
        begun = ended = self.activations
        if is_again:
            begun += self.kept - self.input
        else:
            ended -= self.kept
        temporary = self.gathered + self.stream
        if self.layout.pp == 1:
            temporary += 2 * self.gathered_block  # it, and the next one early
        if self.stage.is_last:
            temporary += F32 * self.root  # the head's gradient
        of_mlp = self.backward_of_mlp()
        yield Moment("last block", gradients, begun, temporary + of_mlp)
        each = F32
        if self.layout.has_fsdp and self.layout.pp == 1:  # as computed, and on its way
            each = self.low + self.layout.reduce
        of_block = self.stream + each * self.block
        yield Moment("last block", gradients, ended, temporary + of_block)

    def backward_of_mlp(self) -> float:
        """The largest temporary tensors of a block: those of its activation function, and the
        gradient of the matrix behind it."""
        work = self.work
        c = work.config
        width = c.mlp_size / self.layout.tp
        tensors = {"relu2": 3, "gelu": 1, "swiglu": 2}[c.mlp]
        if work.kernels == "compiled":
            tensors = 1
        return width * work.product * (tensors * self.tokens + c.n_embd)

    def at_the_embedding(self) -> Moment:
        """Backward ends: all gradients are there, the embedding's before they are summed. Others
        may be in flight."""
        others = 0.0
        if self.layout.pp > 1:
            stage = self.stage
            others = self.activations_of(stage.in_flight - 1, stage.losses - 1)
        temporary = self.gathered
        if self.stage.is_first:
            added = 2 if self.stage.is_last else 1  # the head's, too, where it is here
            temporary += added * F32 * self.root
        if self.layout.has_fsdp:
            temporary += self.layout.reduce * self.root
        return Moment("embedding", self.gradients, others, temporary)


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
    shard = partial(Collective, "shard")
    weights = process.low * process.block
    gradients = layout.reduce * process.block
    yield shard("all_gather", "blocks", gathers * process.blocks, weights)
    yield shard("reduce_scatter", "blocks", times * process.blocks, gradients)
    if process.root:
        yield shard("all_gather", "root", times, F32 * process.root)
        yield shard("reduce_scatter", "root", times, layout.reduce * process.root)


def of_replicate(process: Process) -> Iterator[Collective]:
    """Copies: what each has summed is summed once a step."""
    layout = process.layout
    if layout.replicate == 1:
        return
    all_reduce = partial(Collective, "replicate", "all_reduce")
    if layout.is_plain:
        size = F32 * process.weight_count
        buckets = math.ceil(size / BUCKET)
        yield all_reduce("gradients", buckets, size / buckets)
        return
    part = layout.reduce / process.parts
    yield all_reduce("blocks", process.blocks, part * process.block)
    if process.root:
        yield all_reduce("root", 1, part * process.root)


def of_tp(process: Process) -> Iterator[Collective]:
    """Tensor parallel: the sums of both halves of each block, forward in the precision of products,
    backward in float32; with `sequence` a reduce-scatter and an all-gather each."""
    layout = process.layout
    if layout.tp == 1:
        return
    tp = partial(Collective, "tp")
    c = process.config
    accum = layout.accum
    halves = 2 * accum * process.blocks
    again = accum * process.recomputed  # a block is not computed again behind its last product
    stream = process.stream
    low = process.low * c.n_embd * process.tokens
    if layout.sequence:
        yield tp("all_gather", "blocks, forward", halves + 2 * again, stream)
        yield tp("reduce_scatter", "blocks, forward", halves + again, low)
        yield tp("all_gather", "blocks, backward", halves, low)
        yield tp("reduce_scatter", "blocks, backward", halves, stream)
        parts = len(process.stage.parts)
        yield tp("all_gather", "stream", 2 * accum * parts, stream)
    else:
        yield tp("all_reduce", "blocks, forward", halves + again, low)
        yield tp("all_reduce", "blocks, backward", halves, stream)
    if c.kv_heads < layout.tp:
        width = c.kv_heads * c.head_size
        keys = process.low * width * process.tokens
        yield tp("all_gather", "keys, values", halves + 2 * again, keys)
        yield tp("reduce_scatter", "keys, values", halves, keys)
    if process.stage.is_first:
        yield tp("all_reduce", "embedding", accum, stream)
    if process.stage.is_last:
        head = F32 * c.vocab_size * c.n_embd
        yield tp("all_gather", "head", accum, head)
        yield tp("reduce_scatter", "head", accum, head)
        yield tp("all_gather", "gradient of the loss", accum, stream)
        yield tp("all_reduce", "loss", accum, F32)
    yield from of_whole_weights(process)


def of_whole_weights(process: Process) -> Iterator[Collective]:
    """Weights that every tensor-parallel rank holds, but has only a part of the gradient of. FSDP
    takes a sum from each micro-batch, in a pipeline one from each step; without FSDP the norm and
    AdamW take one each."""
    layout = process.layout
    c = process.config
    tp = partial(Collective, "tp")
    sums, size = 2, F32
    if layout.has_fsdp and layout.pp == 1:
        sums, size = layout.accum, process.low
    elif layout.has_fsdp:
        sums, size = 1, layout.reduce
    of_blocks = 2 * process.blocks * sums
    if c.qk_norm:
        yield tp("all_reduce", "qk_norm", of_blocks, size * c.head_size)
    if layout.sequence:
        tensors = 2 if c.norm == "layernorm" and c.bias else 1
        yield tp("all_reduce", "norms", of_blocks * tensors, size * c.n_embd)


def of_pp(process: Process) -> Iterator[Collective]:
    """Pipeline: the stream to the stage behind, its gradient to the one before; the two copies of
    a tied matrix add up their gradients."""
    layout, stage = process.layout, process.stage
    if layout.pp == 1:
        return
    sends = layout.accum * len(process.neighbours)
    yield Collective("pp", "send", "stream, gradients", sends, process.stream)
    is_end = stage.is_first or stage.is_last
    if process.config.tie_weights and is_end:
        root = process.work.root(stage, layout.tp)
        tied = {"wte.weight": root["wte.weight"]}
        part = numbers(tied, process.parts) / process.parts
        yield Collective("ends", "all_reduce", "tied matrix", 1, F32 * part)


def of_step(process: Process) -> Iterator[Collective]:
    """Once a step: the norm of the gradient, from that of each parameter; the loss, with the number
    of targets of the next step."""
    layout, stage = process.layout, process.stage
    of_block = process.work.block()
    of_root = process.work.root(stage)
    tensors = process.blocks * len(of_block) + len(of_root)
    is_other_end = stage.is_last and not stage.is_first
    if is_other_end and process.config.tie_weights:
        tensors -= 1  # the first stage counts the tied matrix
    for axis in ("shard", "tp"):
        if getattr(layout, axis) > 1:
            yield Collective(axis, "all_reduce", "norm", 1, F32 * tensors)
    if layout.pp > 1:
        yield Collective("pp", "all_reduce", "norm", 1, 8)
    if layout.size > 1:
        yield Collective("all", "all_reduce", "loss, targets", 1, 2 * 8)
