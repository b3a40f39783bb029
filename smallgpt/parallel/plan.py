"""How fast a step of train_fsdp.py is on machines that nobody has paid for yet, and which layout is
the fastest: a roofline, by arithmetic.

docs/scaling.md has the formulas in words, and what they were checked against. footprint.py has
what a step holds and sends. Sizes are bytes, times are seconds, speeds are per second.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from smallgpt.hardware import PEAK_FLOPS
from smallgpt.parallel import footprint, tensor
from smallgpt.parallel.footprint import (
    F32,
    Collective,
    Group,
    Layout,
    Memory,
    Process,
    Work,
    matrices,
    processes,
)
from smallgpt.parallel.layout import MeshSettings, MeshSpread
from smallgpt.parallel.strategy import share_batch
from smallgpt.parallel.world import World

# --- machines -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A data sheet. The speed of a link is that of one direction."""

    memory: float
    bandwidth: float  # of its memory
    nvlink: float  # to the other GPUs of its node, all together; PCIe's where it has no NVLink
    flops: float  # dense, in bfloat16


# vendors' data sheets, in GB and GB/s: memory, its bandwidth, the link inside a node
SHEETS = {
    "B200": (180, 8000, 900),
    "H200": (141, 4800, 450),
    "H100": (80, 3350, 450),
    "H100 PCIe": (80, 2000, 64),
    "GH200": (96, 4000, 450),
    "H20": (96, 4000, 450),
    "A100": (80, 2039, 300),
    "A800": (80, 2039, 200),
    "L40S": (48, 864, 32),
    "L4": (24, 300, 32),
    "A10": (24, 600, 32),
    "4090": (24, 1008, 32),
    "3090": (24, 936, 32),
}
GPUS = {
    name: Gpu(1e9 * memory, 1e9 * bandwidth, 1e9 * link, PEAK_FLOPS[name])
    for name, (memory, bandwidth, link) in SHEETS.items()
}


@dataclass(frozen=True)
class Cluster:
    """The machines of a plan, and how much of their data sheets a program reaches: these shares are
    assumptions, which a measurement replaces."""

    gpu: Gpu
    size: int  # processes, one a GPU
    per_node: int  # GPUs of a node
    link: float  # between nodes, of each GPU, one direction
    efficiency: float = 0.6  # of the FLOP/s, in large matrix products
    reached: float = 0.8  # of a link and of the memory's bandwidth
    usable: float = 0.9  # of the memory; the rest is CUDA's, NCCL's, and lost between tensors
    # a ring from a GPU to the next, in its node and in another (NCCL's tuning.cc, "Simple")
    hop_inside: float = 3.4e-6
    hop_between: float = 9.6e-6

    @property
    def room(self) -> float:
        """Memory of a GPU that a plan may fill."""
        return self.usable * self.gpu.memory


def carried(group: Group, collective: Collective) -> tuple[float, float]:
    """Bytes of one call that each GPU passes on: over its network card, and inside its node.

    They go round a ring through all processes, or round as many rings as a node has members."""
    size = collective.size
    if collective.operation == "send":
        return (size, 0.0) if group.nodes > 1 else (0.0, size)
    rounds = 2 if collective.operation == "all_reduce" else 1
    between = size * (group.nodes - 1) / group.nodes / group.on_node
    inside = size * (group.size - 1) / group.size if group.on_node > 1 else 0.0
    return rounds * between, rounds * inside


def seconds(cluster: Cluster, group: Group, collective: Collective) -> float:
    """Time of one call. The hops of a ring follow one another; the slower link sets the pace."""
    if group.size == 1:
        return 0.0
    hops_between = group.nodes - 1
    hops_inside = group.size - 1 - hops_between
    rounds = 1
    if collective.operation == "send":
        hops_between = min(1, hops_between)
        hops_inside = 1 - hops_between
    elif collective.operation == "all_reduce":
        rounds = 2
    waiting = rounds * (hops_inside * cluster.hop_inside + hops_between * cluster.hop_between)
    between, inside = carried(group, collective)
    moving = max(inside / cluster.gpu.nvlink, between / cluster.link) / cluster.reached
    return waiting + moving


# --- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """Seconds of a step. The bounds: all communication behind computation, and none of it."""

    expected: float
    optimistic: float
    pessimistic: float
    compute: float  # of a process that never waits
    bubble: float  # part of a step in which a process of a pipeline waits for others


class Clock:
    """How long the parts of a step take on one process; `forward`, `backward` and `tp` are those of
    a micro-batch."""

    def __init__(self, process: Process, cluster: Cluster):
        self.process = process
        self.cluster = cluster
        self.layout = process.layout
        self.flops = cluster.efficiency * cluster.gpu.flops
        self.bandwidth = cluster.reached * cluster.gpu.bandwidth
        self.tp = self.talk(footprint.of_tp(process)) / self.layout.accum

    def talk(self, collectives: Iterable[Collective]) -> float:
        """Time of all their calls."""
        total = 0.0
        for collective in collectives:
            group = self.layout.group(collective.axis, self.cluster.per_node)
            total += collective.count * seconds(self.cluster, group, collective)
        return total

    @property
    def block(self) -> float:
        """Products of a block, forward. The fused kernel of attention skips what is masked."""
        work = self.process.work
        c = work.config
        weights = 2 * matrices(work.block(self.layout.tp))
        scores = 2 * c.block_size * c.n_embd / self.layout.tp
        return self.process.tokens * (weights + scores) / self.flops

    @property
    def forward(self) -> float:
        """Products, and activations that are written and read. The loss computes its gradients,
        too."""
        process = self.process
        products = process.blocks * self.block
        moved = 2 * process.blocks * process.kept
        if process.stage.is_last:
            c = process.work.config
            logits = process.tokens / self.layout.tp * process.work.classes(self.layout)
            products += 3 * 2 * logits * c.n_embd / self.flops
            # of each logit: as products are, five times; or in float32, for each operation
            compiled = process.work.kernels == "compiled"
            moved += logits * (5 * process.work.product if compiled else 60)
        return products + moved / self.bandwidth

    @property
    def backward(self) -> float:
        """Two products for each of forward; activations are read, their gradients written and
        read."""
        process = self.process
        products = (2 * process.blocks + process.recomputed) * self.block
        moved = (3 * process.blocks + 2 * process.recomputed) * process.kept
        return products + moved / self.bandwidth

    @property
    def update(self) -> float:
        """Norm, clipping and AdamW pass ten times over the weights' part that lives here."""
        return 10 * F32 * self.process.weight_count / self.bandwidth

    def time(self) -> Time:
        """Of a step in which every stage is like this one.

        FSDP2 gathers the next block while one computes, and sums gradients behind it; the first
        gather and the last sum have nothing to hide behind. Tensor parallel waits for each sum."""
        layout = self.layout
        turns = layout.accum + (layout.pp - 1) / layout.virtual  # micro-batches, one after another
        waiting = turns - layout.accum
        rounds = layout.accum if layout.pp == 1 else 1  # of gathering all weights
        gathers, sums = self.talk_of_shard()
        copies = self.talk(footprint.of_replicate(self.process))
        sends = self.talk(footprint.of_pp(self.process))
        end = self.talk(footprint.of_step(self.process)) + self.update

        compute = self.forward + self.backward
        ahead = gathers / rounds / (2 if layout.pp == 1 else 1)
        back = (gathers - rounds * ahead + sums) / rounds
        late = max(0.0, ahead - self.forward - self.tp / 2)
        later = max(0.0, back - self.backward - self.tp / 2)
        last = max(0.0, back + copies - self.backward - self.tp / 2)
        exposed = rounds * (late + self.first_and_last) + (rounds - 1) * later + last
        first_sends = 2 * waiting * sends / layout.accum
        spoken = turns * self.tp + gathers + sums + copies + sends
        none_hidden = turns * compute + spoken + end
        expected = turns * (compute + self.tp) + exposed + first_sends + end
        return Time(
            expected=min(expected, none_hidden),  # a first gather that is late counts twice
            optimistic=max(turns * compute, spoken) + self.update,
            pessimistic=none_hidden,
            compute=layout.accum * compute + self.update,
            bubble=waiting / turns,
        )

    def talk_of_shard(self) -> tuple[float, float]:
        """FSDP's times of a step: to gather weights, and to sum gradients."""
        gathers: list[Collective] = []
        sums: list[Collective] = []
        for collective in footprint.of_shard(self.process):
            (gathers if collective.operation == "all_gather" else sums).append(collective)
        return self.talk(gathers), self.talk(sums)

    @property
    def first_and_last(self) -> float:
        """FSDP's first gather of root and block, and its last sum, which is the root's."""
        total = 0.0
        group = self.layout.group("shard", self.cluster.per_node)
        for collective in footprint.of_shard(self.process):
            if (collective.operation, collective.what) != ("reduce_scatter", "blocks"):
                total += seconds(self.cluster, group, collective)
        return total


# --- the plan -------------------------------------------------------------------------------------


SAME_SPEED = 0.02  # speeds that differ by a smaller share count as equal


@dataclass(frozen=True)
class Plan:
    """What a layout takes on a cluster."""

    layout: Layout
    memory: Memory  # of the process that needs most
    traffic: list[Collective]  # of the process that sends most
    carried: tuple[float, float]  # bytes that each GPU passes on: between nodes, inside one
    time: Time  # of the slowest stage
    tokens_per_second: float
    mfu: float
    fits: bool


def plan(work: Work, layout: Layout, cluster: Cluster) -> Plan:
    """All of it, for one layout."""
    found = processes(work, layout)
    need = max((process.memory() for process in found), key=lambda need: need.total)
    time = max((Clock(process, cluster).time() for process in found), key=lambda t: t.expected)
    sent = max(map(footprint.traffic, found), key=lambda sent: sum(each.bytes for each in sent))
    network = in_node = 0.0
    for collective in sent:
        between, inside = carried(layout.group(collective.axis, cluster.per_node), collective)
        in_node += collective.count * inside
        network += collective.count * between
    tokens = layout.data * layout.accum * layout.rows * work.config.block_size
    speed = tokens / time.expected
    return Plan(
        layout=layout,
        memory=need,
        traffic=sent,
        carried=(network, in_node),
        time=time,
        tokens_per_second=speed,
        mfu=work.flops_per_token(layout) * speed / (cluster.size * cluster.gpu.flops),
        fits=need.total <= cluster.room,
    )


def layout_of(
    mesh: MeshSettings, size: int, work: Work, shares: tuple[int, int], recompute: int
) -> Layout:
    """The layout that settings of train_fsdp.py describe; (batch_tokens, micro_batch) = shares.
    UserError if there is none."""
    batch_tokens, micro_batch = shares
    spread = MeshSpread(World(0, size, torch.device("cpu")), mesh)
    spread.check(work.config)
    axes = spread.axes
    cut = share_batch(batch_tokens, work.config.block_size, micro_batch, axes.data, axes.pp)
    is_low = mesh.reduce == "bfloat16" and work.product < F32
    return Layout(
        **asdict(axes),
        rows=cut.micro,
        accum=cut.accum,
        recompute=recompute,
        sequence=mesh.sequence,
        schedule=mesh.schedule,
        virtual=mesh.stages // mesh.pp,
        reduce=work.product if is_low else F32,
    )


def search(work: Work, cluster: Cluster, batch_tokens: int, best: int) -> list[Plan]:
    """The best layouts that fit into memory, one for each mesh."""
    plans = []
    for candidate in candidates(work, cluster, batch_tokens):
        layout = made_to_fit(work, candidate, cluster)
        if layout is not None:
            plans.append(plan(work, layout, cluster))
    best_of: dict[tuple[int, ...], Plan] = {}
    for found in ranked(plans):
        layout = found.layout
        mesh = (layout.pp, layout.replicate, layout.shard, layout.tp)
        best_of.setdefault(mesh, found)
    return list(best_of.values())[:best]


def ranked(plans: list[Plan]) -> list[Plan]:
    """The fastest first. Those within 2 % of the fastest count as equal, as a roofline is not more
    exact: of these the one that sends least is first, least between nodes before all. So on."""
    left = sorted(plans, key=lambda found: -found.tokens_per_second)
    in_order = []
    while left:
        slowest = (1 - SAME_SPEED) * left[0].tokens_per_second
        equal = [found for found in left if found.tokens_per_second >= slowest]
        in_order += sorted(equal, key=lambda found: found.carried)
        left = left[len(equal) :]
    return in_order


def smallest(work: Work, cluster: Cluster, batch_tokens: int) -> Plan | None:
    """The layout that needs least memory; None where none can share the batch."""
    recomputed = [
        replace(layout, recompute=1) for layout in candidates(work, cluster, batch_tokens)
    ]
    if not recomputed:
        return None
    least = min(recomputed, key=lambda layout: footprint.memory(work, layout).total)
    return plan(work, least, cluster)


def made_to_fit(work: Work, layout: Layout, cluster: Cluster) -> Layout | None:
    """The layout, with as little recomputation as it needs to fit; None where none is enough."""
    for recompute in (0, 2, 1):
        tried = replace(layout, recompute=recompute)
        if footprint.memory(work, tried).total <= cluster.room:
            return tried
    return None


def candidates(work: Work, cluster: Cluster, batch_tokens: int) -> Iterator[Layout]:
    """All layouts of a global batch that the model and the machines allow. Tensor parallel stays
    inside a node."""
    c = work.config
    for tp in divisors(cluster.per_node):
        if tensor.why_uncut(c, tp):
            continue
        for pp in divisors(cluster.size // tp):
            data = cluster.size // tp // pp
            turns, rest = divmod(batch_tokens, c.block_size * data * pp)
            if pp > c.n_layer or rest:
                continue
            sequences = {False, tp > 1 and c.block_size % tp == 0}
            virtuals = {1, 2 if 1 < pp <= c.n_layer // 2 else 1}
            # of equally fast ones the largest micro-batch, as large products are faster
            of_rows = reversed(divisors(turns))
            cuts = itertools.product(divisors(data), of_rows, sequences, virtuals)
            for shard, rows, sequence, virtual in cuts:
                yield Layout(
                    pp=pp,
                    replicate=data // shard,
                    shard=shard,
                    tp=tp,
                    rows=rows,
                    accum=turns * pp // rows,
                    sequence=sequence,
                    schedule="interleaved" if virtual > 1 else "1f1b",
                    virtual=virtual,
                )


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
