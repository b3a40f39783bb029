"""Parameter groups, optimizers and the learning-rate schedule, a pure function of the step."""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.optim import Optimizer

from smallgpt.console import UserError
from smallgpt.settings import Amount, Count, Fraction, Free, PositiveFloat, Rate


@dataclass
class OptimSettings:
    name: Literal["adamw", "muon"] = "adamw"  # muon = for the blocks' matrices; AdamW for the rest
    lr: Free[PositiveFloat] = 1e-3  # peak learning rate, of both optimizers
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
    progress = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
    if s.schedule == "cosine":
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    else:  # Hu et al. 2024 (MiniCPM)
        falling = min(1.0, (1 - progress) / s.decay) if s.decay else 1.0
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


@dataclass(frozen=True)
class Role:
    """What decides how a parameter is updated; parameters of one role are one group."""

    optimizer: Literal["adamw", "muon"]
    lr: float  # peak learning rate
    decayed: bool


def role_of(name: str, p: nn.Parameter, s: OptimSettings, scale: float, decays: bool) -> Role:
    """Muon takes the matrices inside the blocks. Matrices and embeddings are decayed where this one
    `decays`, norms and biases never."""
    is_matrix = p.dim() >= 2
    by_muon = s.name == "muon" and p.dim() == 2 and "blocks." in name
    decayed = is_matrix and decays
    return Role("muon" if by_muon else "adamw", s.lr * scale, decayed)


def make_optimizers(
    parameters: dict[str, nn.Parameter],
    s: OptimSettings,
    scale: Callable[[str], float] = lambda name: 1.0,
    undecayed: Collection[str] = (),
) -> list[Optimizer]:
    """AdamW for everything, or Muon (Jordan et al. 2024, PyTorch's own) for the matrices inside the
    blocks; parameters by their canonical names (Strategy.names).

    Every trainable parameter is in exactly one group; frozen ones are in none. Each group keeps
    its peak rate in `peak_lr`, which `set_lr` scales: s.lr times scale(name of the parameter).
    undecayed: names of matrices without weight decay.
    """
    roles: dict[Role, list[nn.Parameter]] = {}
    for name, p in parameters.items():
        if p.requires_grad:
            role = role_of(name, p, s, scale(name), name not in undecayed)
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
        optimizers.append(torch.optim.AdamW(groups["adamw"], lr=s.lr, betas=betas, fused=True))
    if groups["muon"]:
        # updates scaled to the size of AdamW's (Liu et al. 2025): one learning rate serves both
        muon = torch.optim.Muon(groups["muon"], lr=s.lr, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def set_lr(optimizers: list[Optimizer], factor: float) -> float:
    """Set every group to factor times its peak; returns the highest rate, for the log."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
    return max(group["lr"] for group in groups)


def check_finite(
    loss: float, norm: float, scaler: torch.amp.GradScaler, step: int, saved: int
) -> None:
    """UserError, before anything changes, if the loss or the norm of the gradient is not finite.

    With float16 an infinite norm is the scaler's business, as long as it has scales left to try.
    step: the number of the update, from 1; saved: that of the last checkpoint."""
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
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
