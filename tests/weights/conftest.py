"""A small GPT-2 in a folder, as transformers saves it, to be opened or to be spoiled."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smallgpt.tokenizer import STAND_INS

MERGES = ["h e", "l l", "he ll", "Ġ w"]
TOKENS = [*STAND_INS, "he", "ll", "hell", "Ġw", "<|endoftext|>"]  # 261
SIZES = dict(vocab_size=len(TOKENS), n_positions=24, n_layer=2, n_head=4, n_embd=32)


def gpt2_tensors() -> dict[str, Tensor]:
    """Random values everywhere: a forgotten or swapped tensor cannot hide."""
    draw = torch.Generator().manual_seed(0)
    C, T = SIZES["n_embd"], SIZES["n_positions"]
    shapes = {"wte.weight": (SIZES["vocab_size"], C), "wpe.weight": (T, C)}
    for i in range(SIZES["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (C,), f"h.{i}.{norm}.bias": (C,)}
        matrices = {
            "attn.c_attn": (C, 3 * C),
            "attn.c_proj": (C, C),
            "mlp.c_fc": (C, 4 * C),
            "mlp.c_proj": (4 * C, C),
        }
        for part, shape in matrices.items():
            shapes |= {f"h.{i}.{part}.weight": shape, f"h.{i}.{part}.bias": shape[1:]}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return {
        f"transformer.{name}": 0.2 * torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
    }


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """config.json, model.safetensors, vocab.json, merges.txt."""
    folder = tmp_path / "mine"
    folder.mkdir()
    config = {"model_type": "gpt2", "activation_function": "gelu_new", **SIZES}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(gpt2_tensors(), folder / "model.safetensors")
    ids = {token: i for i, token in enumerate(TOKENS)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = "\n".join(["#version: 0.2", *MERGES, ""])
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    return folder


class Evil:
    """Unpickled, it makes a folder: the proof that somebody's code was run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def evil(tmp_path: Path) -> Evil:
    return Evil(tmp_path / "ran")
