"""Which layout a run has: its settings, what can be wrong with them, and the mesh of processes.

The processes of a run are a mesh with four axes. From the outside in, so that the axis that
communicates most has neighbours:

    pp           stages of a pipeline: each holds some of the blocks
    replicate    copies of what follows, which read different rows of a batch
    shard        each holds a part of every weight, gathers the whole where it is needed (FSDP2),
                 and reads rows of its own
    tp           each multiplies by a part of every matrix (tensor parallel), for the same rows
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed import DeviceMesh, init_device_mesh

from model import GPTConfig
from smallgpt.console import UserError
from smallgpt.parallel.strategy import Single, Spread
from smallgpt.parallel.world import World
from smallgpt.settings import Count, Positive

AXES = ("pp", "replicate", "shard", "tp")
Schedule = Literal["gpipe", "1f1b", "interleaved"]


@dataclass
class MeshSettings:
    shard: Count = 0  # parts that each weight is cut into (FSDP2); 0 = all processes left over
    replicate: Count = 1  # copies of these parts (HSDP; DDP with shard=1); 0 = all left over
    tp: Positive = 1  # parts that each matrix product is cut into (tensor parallel)
    sequence: bool = False  # with tp: norms and residual stream are cut, too, along the sequence
    pp: Positive = 1  # stages that the blocks are cut into (pipeline parallel)
    schedule: Schedule = "1f1b"  # order of a pipeline's work
    virtual: Positive = 2  # with interleaved: stages on each process
    offload: bool = False  # weights, gradients and optimizer live in CPU memory (slow)
    reduce: Literal["float32", "bfloat16"] = "float32"  # precision of the sum of gradients

    def check(self) -> list[str]:
        """Problems that the types do not show, in plain words."""
        problems = []
        if not self.shard and not self.replicate:
            problems.append(
                "shard=0 and replicate=0 both take all processes left over: set one to 1"
            )
        if self.sequence and self.tp == 1:
            problems.append("sequence=true needs tp of 2 or more")
        return problems

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all its processes."""
        is_interleaved = self.schedule == "interleaved" and self.pp > 1
        return self.pp * self.virtual if is_interleaved else self.pp


@dataclass(frozen=True)
class Axes:
    """A mesh: the number of processes along each of its axes."""

    pp: int
    replicate: int
    shard: int
    tp: int

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
        return self.pp * self.shard * self.tp == 1

    def name(self, schedule: Schedule, sequence: bool) -> str:
        """pp 2 (1f1b) x hsdp 4x8 x tp 2"""
        parts = []
        if self.pp > 1:
            parts.append(f"pp {self.pp} ({schedule})")
        if self.shard > 1 and self.replicate > 1:
            parts.append(f"hsdp {self.replicate}x{self.shard}")
        elif self.shard > 1:
            parts.append(f"fsdp {self.shard}")
        elif self.replicate > 1:
            parts.append(f"ddp {self.replicate}")
        if self.tp > 1:
            parts.append(f"tp {self.tp} (sequence)" if sequence else f"tp {self.tp}")
        return " x ".join(parts) or "one process"


def axes_of(s: MeshSettings, world_size: int) -> Axes:
    """The mesh of the settings. UserError unless it has as many processes as there are."""
    found = {axis: getattr(s, axis) for axis in AXES}
    stated = math.prod(size for size in found.values() if size)
    for axis, size in found.items():
        if not size:
            found[axis] = max(1, world_size // stated)
    if math.prod(found.values()) != world_size:
        wanted = " x ".join(f"mesh.{axis}={size}" for axis, size in found.items())
        raise UserError(
            f"{wanted} is {math.prod(found.values())} processes, but there are {world_size}: "
            "start as many (torchrun --nproc_per_node times --nnodes), or change the mesh"
        )
    return Axes(**found)


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


class MeshSpread(Spread):
    """A model spread over a mesh of processes."""

    def __init__(self, world: World, s: MeshSettings):
        super().__init__(world)
        self.s = s
        self.axes = axes_of(s, world.size)

    @property
    def is_plain(self) -> bool:
        """Is it DDP, or a single process? DDP offloads nothing."""
        return self.axes.is_plain and not self.s.offload

    def check(self, config: GPTConfig) -> None:
        if config.n_layer < self.s.stages:
            raise UserError(
                f"mesh.pp makes {self.s.stages} stages, and the model has only {config.n_layer} "
                "blocks: lower mesh.pp (or mesh.virtual)"
            )
        if self.s.offload and self.world.size == 1:
            raise UserError("mesh.offload needs several processes: start with torchrun")
        if self.s.tp > 1:
            from smallgpt.parallel.tensor import check_cut  # half a second of imports

            check_cut(config, self.s.tp)

    def birthplace(self, drawn: bool = True) -> torch.device:
        hands_out = self.world.main and drawn
        is_whole = self.is_plain or hands_out
        return torch.device("cpu" if is_whole else "meta")

    def build(
        self, model: nn.Module, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None
    ) -> Single:
        if self.is_plain:
            return super().build(model, dtype, weights)
        if dtype == torch.float16:
            raise UserError(
                "dtype=float16 needs a whole model on each process (mesh.shard=1, tp=1, pp=1): "
                "use dtype=bfloat16 or float32"
            )
        # half a second of imports, for those who need it
        if self.axes.pp > 1:
            from smallgpt.parallel.pipeline import Pipeline as Strategy
        else:
            from smallgpt.parallel.mesh import Mesh as Strategy
        return Strategy(model, self.world, dtype, self.make_mesh(), self.s, weights)

    def make_mesh(self) -> DeviceMesh:
        """The processes as a mesh. A collective."""
        shape = astuple(self.axes)
        return init_device_mesh(self.world.device.type, shape, mesh_dim_names=AXES)
