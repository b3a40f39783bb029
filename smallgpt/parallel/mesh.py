"""A model whose weights are cut over a mesh of processes: FSDP2, HSDP and tensor parallel.

FSDP2 (Zhao et al. 2023; ZeRO-3, Rajbhandari et al. 2020) keeps a part of each weight, its gradient
and its optimizer state on each process. A block's weights are gathered before it runs and dropped
behind it; gradients are summed where their part lives. All of it is PyTorch's own: `fully_shard`
on a DeviceMesh, parameters that are DTensors.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from model import GPT, GPTClassifier
from smallgpt.hardware import DTYPES
from smallgpt.parallel.layout import Axes, MeshSettings
from smallgpt.parallel.strategy import Single
from smallgpt.parallel.tensor import cut_matrices
from smallgpt.parallel.world import World


class Mesh(Single):
    """A model cut over the axes shard, replicate and tp of a mesh.

    Only the main process has weights at first, those of its model or those given; the models of the
    others lie on the meta device. The main one hands them out tensor by tensor, so that no other
    ever holds the whole."""

    frees_weights = True  # of a block, as soon as its forward has run

    def __init__(
        self,
        model: nn.Module,
        world: World,
        dtype: torch.dtype,
        mesh: DeviceMesh,
        s: MeshSettings,
        weights: Mapping[str, Tensor] | None = None,
    ):
        if weights is None:
            weights = {name: p.detach() for name, p in model.named_parameters()}
        model.to("meta")
        gpt_of(model).tie()
        super().__init__(model, world, dtype)
        self.mesh = mesh
        self.s = s
        self.name = Axes(*mesh.shape).name(s.schedule, s.sequence)
        if s.offload:
            self.name += ", offloaded"
        data = mesh["replicate", "shard"]
        replicate, shard = data.get_coordinate()
        self.data_rank = replicate * data.size(1) + shard
        self.data_size = data.size()
        self.loss_parts = mesh["tp"].size()
        self.gradient_scale = float(self.data_size)  # FSDP averages, the step wants the sum
        self.dtype = dtype
        self.cut()
        home = "cpu" if s.offload else world.device
        self.model.to_empty(device=home)
        gpt = gpt_of(self.model)
        if gpt.lm_head is not None:  # a stage of a pipeline may have none
            gpt.tie()
        self.set_weights(weights)

    def cut(self) -> None:
        """Cut the model, which lies on the meta device, in place."""
        tp = self.mesh["tp"]
        if tp.size() > 1:
            cut_matrices(self.model, tp, self.s.sequence)
        self.cut_layers()

    def cut_layers(self) -> None:
        """Cut what every process of a replica has alike, block by block."""
        blocks = gpt_of(self.model).blocks
        self.shard(self.model, blocks)

    def shard(self, root: nn.Module, blocks: nn.ModuleList) -> None:
        """FSDP2: each block is gathered by itself; embeddings, norm and heads with the root, whose
        whole they are needed for."""
        if not self.is_sharded:
            return
        mesh = self.mesh["shard"]
        if self.mesh["replicate"].size() > 1:
            mesh = self.mesh["replicate", "shard"]
        offload = OffloadPolicy()
        if self.s.offload:
            offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")
        reduce = DTYPES[self.s.reduce] if self.dtype == torch.bfloat16 else None
        # Blocks are gathered in bf16, in half the bytes. What autocast cast itself, backward would
        # keep: the whole model, on each process.
        low = self.dtype if self.dtype == torch.bfloat16 else None
        policy = MixedPrecisionPolicy(low, reduce, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=self.frees_weights,
                mp_policy=policy,
                offload_policy=offload,
            )
        # the residual stream begins in the precision of the embedding, which stays float32
        policy = MixedPrecisionPolicy(None, reduce, cast_forward_inputs=False)
        fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=offload)
        if isinstance(root, GPTClassifier):
            register_fsdp_forward_method(root, "run_frozen")

    @property
    def is_sharded(self) -> bool:
        """Are there others to share the weights with, or the CPU's memory to put them in?"""
        return self.data_size > 1 or self.s.offload

    @property
    def computes_loss(self) -> bool:
        """Does this process add its loss to the sum over all? Its tensor-parallel peers have the
        same."""
        return self.mesh.get_local_rank("tp") == 0

    # --- weights ----------------------------------------------------------------------------------

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Give each process its part of the weights, which the main process alone reads. A
        collective."""
        mine = self.names()
        dtype = next(self.model.parameters()).dtype
        for name, shape in self.shapes.items():
            whole = torch.empty(shape, dtype=dtype, device=self.world.device)
            if self.world.main:
                whole.copy_(weights[name])
            dist.broadcast(whole, src=0)
            if name in mine:
                set_parameter(mine[name], whole)

    def gather_weights(self) -> dict[str, Tensor]:
        mine = self.names()
        weights = {}
        for name in self.shapes:
            whole = self.gather(name, mine.get(name))
            if self.world.main:
                weights[name] = whole.cpu()
        return weights

    def gather(self, name: str, parameter: nn.Parameter | None) -> Tensor:
        """A parameter, of which this process has this part, whole: at least on the main process. A
        collective."""
        return whole_of(parameter)

    def whole(self) -> GPT | None:
        weights = self.gather_weights()
        if not self.world.main:
            return None
        with torch.device("meta"):
            model = GPT(self.model.config)
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie()
        return model  # in CPU memory: a GPU that holds a part of it need not have room for it

    # --- a step -----------------------------------------------------------------------------------

    def sum(self, *values: float) -> list[float]:
        if not self.computes_loss:
            values = (0.0,) * len(values)
        return self.world.sum(*values)

    def synchronising(self, last: bool) -> AbstractContextManager:
        # Every micro-batch's gradient is summed into its part: unsummed, it would lie whole on each
        # process. Copies are summed once a step.
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(last)
        return nullcontext()

    def settle(self) -> None:
        super().settle()
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # without a backward, the root would stay gathered

    def gradient_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        norm_of_parts = super().gradient_norm(parameters)
        return whole_of(norm_of_parts)


def gpt_of(model: nn.Module) -> GPT:
    return model.gpt if isinstance(model, GPTClassifier) else model


def whole_of(tensor: Tensor) -> Tensor:
    """A tensor, whole. A collective where it is cut."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def set_parameter(parameter: nn.Parameter, whole: Tensor) -> None:
    """Give a parameter, of which this process may hold a part, its value, given whole."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    mesh = parameter.device_mesh
    part = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
    local = parameter.to_local()
    local.copy_(part.to_local())
