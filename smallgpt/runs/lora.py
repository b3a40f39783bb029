"""Low-rank adapters (LoRA, Hu et al. 2021): a matrix W of the trunk stays what it is, and a product
of two thin matrices, which train, is added to it: W + B A.

Their gradients and moments take little memory, and the gradient of W is not computed. All linear
layers of a block are adapted, as in Dettmers et al. 2023. The product is not scaled: with Adam a
factor would be another learning rate (Hu et al., 4.1).

Saved weights are merged, W + B A under the name of W: a classifier like any other. To go on with
the training exactly, A and B lie in the checkpoint's state, and W is read from the trunk again.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from smallgpt.runs.lazy import LazyTensor, Weights, of_shape

A, B = "lora_a", "lora_b"  # names of the factors in their layer


class AdaptedLinear(nn.Linear):
    """A linear layer with a frozen weight W (out, in), and A (rank, in) and B (out, rank)."""

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.lora_a)  # (..., rank)
        return super().forward(x) + F.linear(thin, self.lora_b)


def adapt(blocks: Iterable[nn.Module], rank: int) -> None:
    """Freeze blocks, and adapt every linear layer in them, in place. B begins at 0: the model gives
    what it gave."""
    for block in blocks:
        block.requires_grad_(False)
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = AdaptedLinear  # its weight keeps its name
                a = layer.weight.new_empty(rank, layer.in_features)
                b = layer.weight.new_zeros(layer.out_features, rank)
                nn.init.normal_(a, std=1 / math.sqrt(layer.in_features))
                layer.lora_a = nn.Parameter(a)
                layer.lora_b = nn.Parameter(b)


def is_factor(name: str) -> bool:
    """Is it the name of an A or a B?"""
    return name.endswith((f".{A}", f".{B}"))


def is_adapted(name: str, names: Collection[str]) -> bool:
    """Is it the name of a W whose factors are among the names?"""
    return name.removesuffix("weight") + A in names


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name as they are saved: W + B A in place of W, A and B."""
    found = {}
    for name, weight in weights.items():
        if is_factor(name):
            continue
        found[name] = weight
        if is_adapted(name, weights):
            layer = name.removesuffix("weight")
            a = weights[layer + A]
            b = weights[layer + B]
            found[name] = weight + b @ a
    return found


def unmerged(
    saved: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    trunk: Mapping[str, Tensor] | None = None,
) -> Weights:
    """Saved weights for a model whose parameters have these shapes: its factors are 0, and a W that
    has some is that of the trunk; or, without a trunk, the merged one."""
    tensors = dict(saved.tensors)
    for name, shape in shapes.items():
        like = of_shape(shape)
        if is_factor(name):
            zeros = partial(torch.zeros, shape)
            tensors[name] = LazyTensor(like, zeros)
        elif trunk is not None and is_adapted(name, shapes):
            in_trunk = name.removeprefix("gpt.")
            read = partial(trunk.__getitem__, in_trunk)
            tensors[name] = LazyTensor(like, read)
    return Weights(tensors)
