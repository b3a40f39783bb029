"""The optimizers of torch.optim that a run uses, without what their start costs."""

from inspect import unwrap

import torch
from torch import Tensor


class Optimizer(torch.optim.Optimizer):
    """torch.optim's, but without the marks on its methods that leave them out of compilation: a
    mark imports torch._dynamo, half a second or more. No optimizer is compiled here."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov and Hutter 2019), its fused kernel."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def is_cut(tensor: Tensor) -> bool:
    """Is it a DTensor? Only these have a mesh. (Importing the class takes half a second.)"""
    return hasattr(tensor, "device_mesh")
