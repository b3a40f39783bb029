"""GGUF, the file of llama.cpp: facts about a model, then its tensors, which may be quantised.

The package `gguf` reads it, too, in 2.6 seconds where this takes 0.2: it makes three arrays of each
of the hundred thousand tokens and merges. The format is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; all numbers are little-endian.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smallgpt.console import UserError
from smallgpt.runs import lazy
from smallgpt.runs.lazy import LazyTensor, Weights

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of each tensor, unless the facts name another

# the types of a fact; of numbers NumPy's code
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING = 8
ARRAY = 9

# the types of a tensor, by ggml's numbers
TYPE_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}


@dataclass(frozen=True)
class GGUF:
    """An opened file."""

    facts: dict[str, Any]  # {"general.architecture": "llama", "llama.block_count": 30, ...}
    tensors: Weights  # float32, by the names of the file


def is_gguf(file: Path) -> bool:
    """What the first bytes say."""
    with open(file, "rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read(file: Path) -> GGUF:
    """The facts of a file, and its tensors, each of which is read when it is asked for. UserError
    where the file is damaged or cut short, or holds a type that cannot be read here."""
    if not is_gguf(file):
        raise UserError(f"{file} is no GGUF file, its first bytes are others: download it again")
    content = np.memmap(file, np.uint8, mode="r")
    try:
        cursor = Cursor(content)
        return read_from(cursor, file)
    except (struct.error, ValueError, KeyError, OverflowError) as problem:
        raise UserError(f"{file} is damaged or cut short ({problem}): download it again") from None


def read_from(cursor: "Cursor", file: Path) -> GGUF:
    cursor.skip(len(MAGIC))
    version = cursor.number("<I")
    if version not in VERSIONS:
        raise UserError(
            f"{file} is of version {version} of GGUF: take one of version {VERSIONS[-1]}, "
            "as llama.cpp writes today"
        )
    n_tensors = cursor.number("<Q")
    n_facts = cursor.number("<Q")
    facts = {}
    for _ in range(n_facts):
        key = cursor.string()
        facts[key] = cursor.value(cursor.number("<I"))
    headers = [cursor.header() for _ in range(n_tensors)]

    alignment = facts.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its general.alignment is {alignment!r}")
    begin = alignment * math.ceil(cursor.at / alignment)
    tensors = {}
    for header in headers:
        if header.type not in BLOCKS:
            kind = TYPE_NAMES.get(header.type, f"number {header.type}")
            known = ", ".join(TYPE_NAMES[number] for number in BLOCKS)
            raise UserError(
                f"{file}: {header.name} is of type {kind}, and can be read here as {known}: take "
                "the same model in one of these"
            )
        tensors[header.name] = header.open(cursor.content, begin)
    if len(tensors) != n_tensors:
        raise ValueError("two tensors share a name")
    return GGUF(facts, Weights(tensors))


class Cursor:
    """A place in a file, from which values are read one after the other."""

    def __init__(self, content: np.ndarray):
        """content: uint8 (bytes of the file,)"""
        self.content = content
        self.view = memoryview(content)
        self.at = 0

    def skip(self, size: int) -> None:
        self.at += size

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from(code, self.view, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        size = self.number("<Q")
        end = self.at + size
        if end > len(self.view):
            raise ValueError(f"a text of {size} bytes does not fit into the file")
        text = str(self.view[self.at : end], "utf-8")
        self.at = end
        return text

    def numbers(self, code: str, count: int) -> list:
        found = np.frombuffer(self.view, code, count, self.at)
        self.at += found.nbytes
        return found.tolist()

    def value(self, kind: int) -> Any:
        """A fact of this type: a number, a text or a list of either."""
        if kind == STRING:
            return self.string()
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind], 1)[0]
        if kind != ARRAY:
            raise ValueError(f"there is no type {kind}")
        kind = self.number("<I")
        count = self.number("<Q")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        return self.numbers(NUMBERS[kind], count)

    def header(self) -> "Header":
        name = self.string()
        n_dims = self.number("<I")
        shape = self.numbers("<u8", n_dims)[::-1]  # the fastest comes first there
        kind = self.number("<I")
        offset = self.number("<Q")
        return Header(name, tuple(shape), kind, offset)


@dataclass(frozen=True)
class Header:
    """Where a tensor lies, and how it is written."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # in bytes, from the begin of the data

    def open(self, content: np.ndarray, begin: int) -> LazyTensor:
        """The tensor. ValueError if the file ends before it does."""
        size, n_values, unpack = BLOCKS[self.type]
        count = math.prod(self.shape)
        if count % n_values or (self.shape and self.shape[-1] % n_values):
            raise ValueError(f"{self.name} is no multiple of {n_values} wide")
        start = begin + self.offset
        end = start + size * count // n_values
        if end > len(content):
            missing = end - len(content)
            raise ValueError(f"{self.name} ends {missing:,} bytes behind the end of the file")
        blocks = content[start:end].reshape(-1, size)
        return LazyTensor(
            lazy.of_shape(self.shape), partial(read_blocks, blocks, unpack, self.shape)
        )


def read_blocks(
    blocks: np.ndarray, unpack: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]
) -> Tensor:
    """The float32 tensor of these blocks, uint8 (n_blocks, bytes of a block)."""
    values = unpack(blocks).astype(np.float32, copy=False)
    return torch.from_numpy(values.reshape(shape))


# --- quantised numbers ----------------------------------------------------------------------------
# A block is a scale, perhaps a least value, and 32 small whole numbers (ggml-quants.c).


def unpack_f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4").copy()  # the file is mapped read-only


def unpack_f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2")


def unpack_bf16(blocks: np.ndarray) -> np.ndarray:
    """The upper half of a float32."""
    wide = blocks.view("<u2").astype(np.uint32) << 16
    return wide.view(np.float32)


def unpack_q8_0(blocks: np.ndarray) -> np.ndarray:
    scale = halves(blocks[:, :2])
    return blocks[:, 2:].view(np.int8) * scale


def unpack_q4_0(blocks: np.ndarray) -> np.ndarray:
    scale = halves(blocks[:, :2])
    return (nibbles(blocks[:, 2:]) - 8) * scale


def unpack_q4_1(blocks: np.ndarray) -> np.ndarray:
    scale = halves(blocks[:, :2])
    least = halves(blocks[:, 2:4])
    return nibbles(blocks[:, 4:]) * scale + least


def halves(columns: np.ndarray) -> np.ndarray:
    """A float16 from two bytes (n_blocks, 2), as float32 (n_blocks, 1)."""
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)


def nibbles(columns: np.ndarray) -> np.ndarray:
    """int8 (n_blocks, 32): of bytes (n_blocks, 16) all lower halves, then all upper ones."""
    return np.concatenate((columns & 15, columns >> 4), axis=1).view(np.int8)


# of a type of tensor: the bytes of a block, the values in it, and who unpacks it
BLOCKS: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (4, 1, unpack_f32),
    1: (2, 1, unpack_f16),
    30: (2, 1, unpack_bf16),
    2: (18, 32, unpack_q4_0),
    3: (20, 32, unpack_q4_1),
    8: (34, 32, unpack_q8_0),
}
