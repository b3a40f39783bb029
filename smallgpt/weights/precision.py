"""The precision of a model that only replies.

On a CPU: float16 weights in a float32 model. A token of a reply multiplies each matrix by one row.
That takes as long as reading the matrix: half the bytes are read in half the time. PyTorch's kernel
for one row takes float16 on any CPU with AVX2 or NEON, and adds in float32 (docs/experiments.md has
it beside bfloat16 and int8).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from smallgpt import hardware


def set_precision(model: GPT, name: str, device: torch.device) -> str:
    """Put the model on the device, with weights in the precision of this name; returns it in words.

    On a CPU auto is float16 weights, which are read in half the time of float32 ones."""
    model.to(device)
    if device.type == "cpu" and name in ("auto", "float16"):
        halve_linear_layers(model)
        return "float16 weights (scores differ from float32's by a thousandth)"
    dtype, _ = hardware.choose_dtype(name, device)
    model.to(dtype)
    return hardware.name_of(dtype)


# Float16 ends at 65,504, and a squared ReLU may give more. What goes in is divided by this power of
# two and what comes out multiplied, both exactly: either may then be 4 million.
SCALE = 64.0


class HalfLinear(nn.Module):
    """A linear layer with float16 weights (out, in) for float32 inputs and outputs.

    One row is multiplied in float16, several in float32: a CPU has no fast product of float16
    matrices."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        halved = linear.weight.detach().half()
        self.weight = nn.Parameter(halved, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        rows = x.numel() // x.size(-1)
        if rows > 1:
            return F.linear(x, self.weight.float(), self.bias)
        scaled = (x / SCALE).half()
        y = F.linear(scaled, self.weight).float() * SCALE
        if self.bias is not None:
            y = y + self.bias
        return y


def halve_linear_layers(module: nn.Module) -> None:
    """Give every linear layer inside the module float16 weights, in place. All else stays float32:
    the embedding, of which a token reads one row, the norms, the KV cache."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, HalfLinear(child))
        else:
            halve_linear_layers(child)
