"""Parameter groups, optimizers and the learning-rate schedule, a pure function of the step."""

import logging
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from smallgpt.adam import AdamW, Optimizer, is_cut
from smallgpt.console import UserError
from smallgpt.hardware import has_bf16
from smallgpt.settings import Amount, Count, Fraction, Free, PositiveFloat, Rate

# gloo gathers where nccl exchanges, which need not be said on every rank
logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)


@dataclass
class OptimSettings:
    name: Literal["adamw", "muon"] = "adamw"  # muon = for the blocks' matrices; AdamW for the rest
    lr: Free[PositiveFloat] = 1e-3  # peak learning rate, of both optimizers
    embedding_factor: Free[PositiveFloat] = 1.0  # rate of the embeddings, as a multiple of lr
    head_factor: Free[PositiveFloat] = 1.0  # the same of an LM head that is not tied to them
    min_lr: Free[Fraction] = 0.1  # last learning rate, as a fraction of the peak
    schedule: Free[Literal["cosine", "wsd"]] = "cosine"  # wsd = stay at the peak, then go down
    warmup: Free[Count] = 100  # steps of linear warm-up, at most a third of the run
    decay: Free[Fraction] = 0.2  # wsd: last fraction of the steps after the warm-up, going down
    weight_decay: Free[Amount] = 0.1  # of matrices and embeddings, not of norms and biases
    beta1: Free[Rate] = 0.9  # AdamW's decay of the mean gradient
    beta2: Free[Rate] = 0.95  # AdamW's decay of the mean squared gradient
    clip: Free[Amount] = 1.0  # largest norm of the whole gradient; 0 = no clipping


def lr_factor(step: int, max_steps: int, s: OptimSettings) -> float:
    """Learning rate of step (from 0) as a fraction of the peak: linear warm-up, then cosine or
    warmup-stable-decay."""
    warmup = min(s.warmup, max_steps // 3)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    last = max_steps - 1
    steps_down = max(1, last - warmup)
    progress = min(1.0, (step - warmup) / steps_down)
    falling = 1.0
    if s.schedule == "cosine":
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    elif s.decay:  # Hu et al. 2024 (MiniCPM)
        falling = min(1.0, (1 - progress) / s.decay)
    return s.min_lr + (1 - s.min_lr) * falling


def layer_scale(name: str, n_layer: int, decay: float) -> float:
    """Learning rate of a parameter as a fraction of the head's (layer-wise decay, Howard and Ruder
    2018)."""
    block = re.search(r"blocks\.(\d+)\.", name)
    if block:
        return decay ** (n_layer - int(block[1]))
    if re.search(r"wte|wpe", name):
        return decay ** (n_layer + 1)
    return 1.0


def role_factor(name: str, s: OptimSettings) -> float:
    """Learning rate of a parameter as a multiple of s.lr: embeddings and LM head may have rates of
    their own (as in modded-nanogpt and nanochat)."""
    if re.search(r"wte|wpe", name):
        return s.embedding_factor
    if "lm_head" in name:
        return s.head_factor
    return 1.0


# --- Muon -----------------------------------------------------------------------------------------


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal before they are added (Jordan et al. 2024).

    The recipe is that of torch.optim.Muon: Nesterov momentum of 0.95, decoupled weight decay, and
    updates scaled to the size of AdamW's (Liu et al. 2025), so that one learning rate serves both.
    Here the parameters, each (A, B), may also be DTensors of any layout: the momentum lies on the
    shards, and the ranks of the mesh divide the whole matrices among themselves.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient. A collective where any is sharded."""
        for group in self.param_groups:
            lr = group["lr"]
            kept = 1 - lr * group["weight_decay"]
            momentum = group["momentum"]
            trained = [p for p in group["params"] if p.grad is not None]
            for alike in alike_matrices(trained):
                averages = [self.average_gradient(p, momentum) for p in alike]
                directions = orthogonal(averages)
                for p, direction in zip(alike, directions, strict=True):
                    size = 0.2 * math.sqrt(max(p.shape))  # root mean square of an AdamW update
                    p.mul_(kept)
                    p.add_(direction, alpha=-lr * size)

    def average_gradient(self, p: Tensor, momentum: float) -> Tensor:
        """The running mean of the gradients of p, with the newest counted once more (Nesterov)."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = state["momentum_buffer"]
        mean.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)


def alike_matrices(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape and layout, as many at a time as their mesh has ranks; plain tensors
    one by one."""
    alike: dict[tuple, list[Tensor]] = {}
    for p in parameters:
        key = (p.shape,)
        if is_cut(p):
            key = (p.shape, p.device_mesh, p.placements)
        alike.setdefault(key, []).append(p)
    for matrices in alike.values():
        first = matrices[0]
        size = first.device_mesh.size() if is_cut(first) else 1
        for start in range(0, len(matrices), size):
            end = start + size
            yield matrices[start:end]


def orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """newton_schulz of each, in the layout it came in; all have the same shape and layout."""
    first = matrices[0]
    if not is_cut(first):
        return [newton_schulz(matrix) for matrix in matrices]
    from torch.distributed.tensor import DTensor, Shard

    mesh = first.device_mesh
    by_matrix = [Shard(0)] * mesh.ndim
    stacked = torch.stack(matrices)  # (n, A, B), each matrix cut as before
    on_device = stacked.to(mesh.device_type)  # offloaded shards lie on the CPU
    whole = on_device.redistribute(placements=by_matrix)  # each rank has n / mesh.size() of them
    mine = whole.to_local()
    results = [newton_schulz(matrix) for matrix in mine]
    made = DTensor.from_local(
        torch.stack(results) if results else mine,
        mesh,
        by_matrix,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    cut = made.redistribute(placements=stacked.placements)
    return list(cut.to(first.device).unbind())


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five steps of the Newton-Schulz iteration towards U V^T of the matrix's U S V^T, with the
    coefficients of Jordan et al. 2024: the singular values end between 0.7 and 1.2.

    It needs little precision: it runs in bfloat16 where the hardware multiplies it, except for a
    float64 matrix, and in the matrix's own precision elsewhere."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm().clamp(min=1e-7)  # no singular value is above 1
    if matrix.dtype != torch.float64 and has_bf16(matrix.device):
        x = x.bfloat16()
    is_tall = x.size(0) > x.size(1)
    if is_tall:
        x = x.T  # the smaller of the two products x x^T and x^T x
    for _ in range(5):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    if is_tall:
        x = x.T
    return x.to(matrix.dtype)


# --- groups ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """What decides how a parameter is updated; parameters of one role are one group."""

    optimizer: Literal["adamw", "muon"]
    lr: float  # peak learning rate
    decayed: bool


def role_of(
    name: str,
    p: nn.Parameter,
    s: OptimSettings,
    scale: float,
    undecayed: Collection[str],
) -> Role:
    """Muon takes the matrices inside the blocks. Matrices and embeddings are decayed, but not the
    `undecayed`; norms and biases never are."""
    by_muon = s.name == "muon" and p.dim() == 2 and "blocks." in name
    return Role(
        optimizer="muon" if by_muon else "adamw",
        lr=s.lr * role_factor(name, s) * scale,
        decayed=p.dim() >= 2 and name not in undecayed,
    )


def make_optimizers(
    parameters: dict[str, nn.Parameter],
    s: OptimSettings,
    scale: Callable[[str], float] = lambda name: 1.0,
    undecayed: Collection[str] = (),
) -> list[Optimizer]:
    """AdamW for everything, or Muon for the matrices inside the blocks; parameters by their
    canonical names (Strategy.names).

    Every trainable parameter is in exactly one group; frozen ones are in none. Each group keeps
    its peak rate in `peak_lr`, which `set_lr` scales: s.lr times the factor of its role times
    scale(name of the parameter).
    undecayed: names of matrices without weight decay.
    """
    roles: dict[Role, list[nn.Parameter]] = {}
    for name, p in parameters.items():
        if p.requires_grad:
            role = role_of(name, p, s, scale(name), undecayed)
            roles.setdefault(role, []).append(p)
    groups: dict[str, list[dict]] = {"adamw": [], "muon": []}
    for role, members in roles.items():
        group = {
            "params": members,
            "lr": role.lr,
            "peak_lr": role.lr,
            "weight_decay": s.weight_decay if role.decayed else 0.0,
        }
        groups[role.optimizer].append(group)
    optimizers: list[Optimizer] = []
    if groups["adamw"]:
        betas = (s.beta1, s.beta2)
        optimizers.append(AdamW(groups["adamw"], lr=s.lr, betas=betas, fused=True))
    if groups["muon"]:
        optimizers.append(Muon(groups["muon"], lr=s.lr))
    return optimizers


def set_lr(optimizers: list[Optimizer], factor: float) -> float:
    """Set every group to factor times its peak; returns the highest rate, for the log."""
    rates = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["peak_lr"] * factor
            group["lr"] = rate
            rates.append(rate)
    return max(rates, default=0.0)  # a frozen stage has none


def check_finite(
    loss: float, norm: float, scaler: torch.amp.GradScaler, step: int, saved: int
) -> None:
    """UserError, before anything changes, if the loss or the norm of the gradient is not finite.

    With float16 an infinite norm is the scaler's business, as long as it has scales left to try.
    step: the number of the update, from 1; saved: that of the last checkpoint."""
    is_tolerable = math.isfinite(norm) or scaler.is_enabled()
    if not math.isfinite(loss) or not is_tolerable:
        raise UserError(
            f"at step {step} the loss is {loss}, the norm of the gradient {norm}; no update was "
            f"made, the last checkpoint is step {saved}: lower optim.lr or raise optim.warmup, "
            "and continue"
        )
    if not math.isfinite(norm) and scaler.get_scale() < 1e-6:
        raise UserError(
            f"at step {step} no scale gives finite gradients in float16, the last checkpoint is "
            f"step {saved}: use dtype=float32 or bfloat16, or lower optim.lr"
        )


def update(optimizers: list[Optimizer], scaler: torch.amp.GradScaler, norm: float) -> None:
    """One update of the weights from their clipped gradients, which are cleared then.

    float16: where the norm is infinite, clipping has ruined every gradient, and the update is left
    out while the scaler looks for a scale that fits."""
    for optimizer in optimizers:
        if math.isfinite(norm):
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
