"""Weights by name, each tensor read when it is asked for.

A process that keeps a part of each tensor, or hands them out one by one, never holds them all.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still to be read."""

    like: Tensor  # on the meta device: its shape
    read: Callable[[], Tensor]

    def then(self, change: Callable[[Tensor], Tensor]) -> "LazyTensor":
        """What `change` will make of it."""
        like = change(self.like)
        return LazyTensor(like, lambda: change(self.read()))


class Weights(Mapping[str, Tensor]):
    """Tensors by name, on the CPU. Each is read anew whenever it is asked for."""

    def __init__(self, tensors: dict[str, LazyTensor]):
        self.tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, of which none is read."""
        shapes = {}
        for name, tensor in self.tensors.items():
            shapes[name] = tuple(tensor.like.shape)
        return shapes

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.tensors  # Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def in_file(file: Path, verify: Callable[[], None] = lambda: None) -> Weights:
    """The tensors of a safetensors file. SafetensorError if it is none, or cut short.

    verify: is called once, before the first tensor is read."""
    opened = safe_open(file, framework="pt")
    verify_once = functools.cache(verify)

    def read(name: str) -> Tensor:
        verify_once()
        return opened.get_tensor(name)

    tensors = {}
    names = opened.keys()
    for name in names:
        shape = opened.get_slice(name).get_shape()
        tensors[name] = LazyTensor(of_shape(shape), partial(read, name))
    return Weights(tensors)


def of_shape(shape: Sequence[int]) -> Tensor:
    """No numbers, and no memory."""
    return torch.empty(shape, device="meta")


class SkipInit(TorchFunctionMode):
    """A model that is made inside draws no weights: it is to be given others."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def hollow(config: GPTConfig) -> GPT:
    """A model that has shapes only: no numbers, and no memory."""
    # to draw weights on the meta device, torch would import its compiler: more than a second
    with torch.device("meta"), SkipInit():
        return GPT(config)


def in_memory(values: Mapping[str, Any]) -> Weights:
    """Tensors that are read, or mapped into memory, already. Other values are left out."""
    tensors = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors[name] = LazyTensor(of_shape(value.shape), value.detach)
    return Weights(tensors)
