"""A step of train_fsdp.py without its machines, to count what footprint.py computes.

The processes are PyTorch's fake group, whose collectives return at once. The tensors are fake, too:
they have shapes, but no memory. So the code of the true step runs at full width on any computer.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT
from smallgpt.optim import OptimSettings, make_optimizers, update
from smallgpt.parallel import footprint
from smallgpt.parallel.footprint import F32, Layout, Process, Work
from smallgpt.parallel.layout import AXES, MeshSettings, MeshSpread
from smallgpt.parallel.strategy import Single
from smallgpt.parallel.world import World

Kind = tuple[str, str, int]  # axis, operation, bytes of the whole
OPERATIONS = {  # of c10d and of its functional form -> ours; others keep their names
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
}
UNCOUNTED = {
    "wait_tensor",
    "_wrap_tensor_autograd",
    "recv_",  # another process sends it
}


class Traffic(TorchDispatchMode):
    """Counts the collectives inside it, by axis of the mesh, operation and size of the whole."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[Kind] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it comes again, as collectives of plain tensors
        if "c10d" in func.namespace:
            self.count(func, args)
        return func(*args, **(kwargs or {}))

    def count(self, func, args: tuple) -> None:
        name, _, _ = func.__name__.partition(".")
        if name in UNCOUNTED:
            return
        operation = OPERATIONS.get(name, name)
        leaves = tree_leaves(args)
        sizes = [leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)]
        group = group_of(leaves)
        size = max(sizes, default=0)
        if func.namespace == "_c10d_functional" and operation == "all_gather":
            size *= group.size()  # it is given a part, and makes the whole
        self.calls[axis_of(group), operation, size] += 1


def group_of(leaves: list) -> dist.ProcessGroup:
    """The group among the arguments of an operation."""
    for leaf in leaves:
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in leaf._type().name():
            return dist.ProcessGroup.unbox(leaf)
    names = [leaf for leaf in leaves if isinstance(leaf, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1])


def axis_of(group: dist.ProcessGroup) -> str:
    """mesh_tp -> tp"""
    if group.size() == dist.get_world_size():
        return "all"
    axis = group.group_desc.removeprefix("mesh_")
    return axis if axis in AXES else "ends"  # of a pipeline: a group that no axis has


class Batch:
    """A micro-batch of nothing in particular."""

    def __init__(self, rows: int, length: int):
        tokens = torch.zeros(rows, length, dtype=torch.long)
        self.inputs = (tokens, tokens, None)


def step(
    strategy: Single, optimizers: Sequence[torch.optim.Optimizer], batches: list[Batch]
) -> None:
    """One step of train.py's loop. A fake tensor has no value: whoever asks ends early."""
    strategy.forward_backward(batches, lambda run, batch: run(*batch.inputs), 1.0)
    with suppress(DataDependentOutputException):
        strategy.sum(1.0, 1.0)
    with suppress(DataDependentOutputException):
        strategy.clip(optimizers, 1.0)
    update(optimizers, strategy.scaler, 1.0)


def planned(process: Process) -> Counter[Kind]:
    """What Traffic should count in a step, by footprint.py. All processes are one group, whatever
    the axis."""
    layout = process.layout
    calls: Counter[Kind] = Counter()
    for collective in footprint.traffic(process):
        group = layout.group(collective.axis, layout.size)
        axis = "all" if group.size == layout.size else collective.axis
        calls[axis, collective.operation, round(collective.size)] += collective.count
    return calls


@dataclass(frozen=True)
class Simulated:
    """What one step of a process did."""

    traffic: Counter[Kind]
    peak: int  # bytes of tensors at a time


def shrunk(work: Work, layout: Layout) -> tuple[Work, Layout]:
    """The same with a few blocks on up to eight processes: one stage, one micro-batch. What CPUs
    keep for backward, since they run it."""
    config = replace(work.config, n_layer=2)
    small = replace(
        layout,
        pp=1,
        virtual=1,
        replicate=min(2, layout.replicate),
        shard=min(2, layout.shard),
        tp=min(2, layout.tp),
        accum=1,
    )
    return replace(work, config=config, kernels="cpu"), small


class FakeWorld(World):
    """Where nobody has weights to hand out: the model is made without memory."""

    main = False


def simulate(work: Work, layout: Layout) -> Simulated:
    """A step of the first process of a layout without pipeline, with one micro-batch, on CPUs. Only
    this process's part of the weights is real. Once in a process of its own: torch remembers the
    groups of a mesh."""
    mesh = MeshSettings(
        shard=layout.shard,
        replicate=layout.replicate,
        tp=layout.tp,
        sequence=layout.sequence,
        reduce="float32" if layout.reduce == F32 else "bfloat16",
    )
    dtype = torch.float32 if work.product == F32 else torch.bfloat16
    world = FakeWorld(0, layout.size, torch.device("cpu"))
    dist.init_process_group("fake", rank=0, world_size=layout.size, store=FakeStore())
    with torch.device("meta"):
        model = GPT(work.config)
    strategy = MeshSpread(world, mesh).build(model, dtype)
    strategy.model.recompute = layout.recompute
    optimizers = make_optimizers(strategy.names(), OptimSettings())
    with FakeTensorMode(allow_non_fake_inputs=True):
        batches = [Batch(layout.rows, work.config.block_size)]
        # fills the caches of shapes, whose tensors would be counted, and makes Adam's state
        step(strategy, optimizers, batches)
        tracker = memory_tracker(strategy, optimizers, batches)
        with tracker, Traffic() as traffic:
            step(strategy, optimizers, batches)
    dist.destroy_process_group()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return Simulated(traffic.calls, peak["Total"])


def memory_tracker(
    strategy: Single, optimizers: list[torch.optim.Optimizer], batches: list[Batch]
) -> MemTracker:
    """PyTorch's count of the memory of tensors."""
    inputs = tuple(batch.inputs[0] for batch in batches)
    if isinstance(strategy.model, FSDPModule):
        (optimizer,) = optimizers
        tracker = FSDPMemTracker(strategy.model, optimizer)
        tracker.track_inputs(inputs)
        return tracker
    tracker = MemTracker()
    tracker.track_external(strategy.model, *optimizers, *inputs)
    return tracker
