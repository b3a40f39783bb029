"""Parameter groups, optimizers and the learning-rate schedule, a pure function of the step."""

import math
import re
from collections.abc import Callable
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
    """Learning rate of step (from 0) as a fraction of the peak: linear warm-up, then cosine or warmup-stable-decay."""
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
    """Learning rate of a parameter as a fraction of the head's (layer-wise decay, Howard and Ruder 2018)."""
    if block := re.search(r"blocks\.(\d+)\.", name):
        return decay ** (n_layer - int(block[1]))
    return decay ** (n_layer + 1) if re.search(r"wte|wpe", name) else 1.0


def make_optimizers(
    model: nn.Module, s: OptimSettings, scale: Callable[[str], float] = lambda name: 1.0
) -> list[Optimizer]:
    """AdamW for everything, or Muon (Jordan et al. 2024, PyTorch's own) for the matrices inside the blocks.

    Every trainable parameter is in exactly one group; frozen ones are in none. Each group keeps its peak rate in
    `peak_lr`, which `set_lr` scales: s.lr times scale(name of the parameter). A parameter with the attribute `no_decay`
    is not decayed.
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            muon = s.name == "muon" and p.dim() == 2 and "blocks." in name
            decayed = p.dim() >= 2 and not hasattr(p, "no_decay")
            groups.setdefault((muon, s.lr * scale(name), decayed), []).append(p)
    adamw, muon = (
        [
            {
                "params": params,
                "lr": lr,
                "peak_lr": lr,
                "weight_decay": s.weight_decay if decayed else 0.0,
            }
            for (is_muon, lr, decayed), params in groups.items()
            if is_muon == wanted
        ]
        for wanted in (False, True)
    )
    optimizers: list[Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, lr=s.lr, betas=(s.beta1, s.beta2), fused=True))
    if muon:
        # updates scaled to the size of AdamW's (Liu et al. 2025), so that one learning rate serves both
        optimizers.append(torch.optim.Muon(muon, lr=s.lr, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def set_lr(optimizers: list[Optimizer], factor: float) -> float:
    """Set every group to factor times its peak; returns the highest rate, for the log."""
    for o in optimizers:
        for g in o.param_groups:
            g["lr"] = g["peak_lr"] * factor
    return max(g["lr"] for o in optimizers for g in o.param_groups)


def update(
    optimizers: list[Optimizer],
    scaler: torch.amp.GradScaler,
    clip: Callable[[float], torch.Tensor],
    max_norm: float,
    loss: float,
    step: int,
    saved: int,
) -> float:
    """One update of the weights from their gradients, clipped to max_norm and then cleared; returns the norm before.

    A loss or norm that is not finite raises UserError, which names the step (from 0) and the last one saved, before
    anything changes. Only float16 goes on, without that update, while its scaler looks for a scale that fits."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = float(clip(max_norm))
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise UserError(
            f"at step {step + 1} the loss is {loss}, the norm of the gradient {norm}; no update was made, the last "
            f"checkpoint is step {saved}: lower optim.lr or raise optim.warmup, and continue"
        )
    for optimizer in optimizers:
        if math.isfinite(norm):  # float16: clipping by an infinite norm has ruined every gradient
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    if not math.isfinite(norm) and scaler.get_scale() < 1e-6:
        raise UserError(
            f"after step {step} no scale gives finite gradients in float16, the last checkpoint is step "
            f"{saved}: use dtype=float32 or bfloat16, or lower optim.lr"
        )
    return norm
