"""Large tables, of which a step reads a few rows: their gradients are sparse, and nothing touches
the other rows.

A table is an nn.Embedding(N, D, sparse=True). A step that reads n rows costs the same whatever N.
"""

import torch
import torch.nn as nn
from torch import Tensor

from smallgpt.adam import Optimizer


class RowwiseAdam(Optimizer):
    """Adam (Kingma and Ba 2015) for tables (N, D) with sparse gradients: it touches only the rows
    that were read.

    The second moment of a row is one number, the mean square of its gradient, as in the row-wise
    Adagrad of DLRM (Naumov et al. 2019) and FBGEMM; it begins with the first gradient, and moves
    when the row is read. There is no first moment. Weight decay is decoupled, of the rows read.
    """

    def __init__(self, groups: list[dict], lr: float, beta2: float = 0.95, eps: float = 1e-8):
        defaults = {"lr": lr, "beta2": beta2, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of the rows of which there is a gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self.update(table, group)

    def update(self, table: Tensor, group: dict) -> None:
        """One update of the rows (n,) of a table, each once, which have gradients (n, D)."""
        sparse = table.grad.coalesce()
        rows = sparse.indices()[0]
        gradient = sparse.values()
        state = self.state[table]
        if not state:
            state["exp_avg_sq"] = table.new_zeros(len(table))

        square = gradient.square().mean(1)
        old = state["exp_avg_sq"][rows]
        moved = old.lerp(square, 1 - group["beta2"])
        moment = torch.where(old > 0, moved, square)
        state["exp_avg_sq"][rows] = moment

        size = moment.sqrt() + group["eps"]
        direction = gradient / size[:, None]
        if group["weight_decay"]:
            direction += group["weight_decay"] * table[rows]
        table.index_add_(0, rows, direction, alpha=-group["lr"])


def tables(model: nn.Module) -> list[str]:
    """The names of the parameters of a model that have sparse gradients."""
    found = []
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding) and part.sparse:
            found.append(f"{name}.weight")
    return found


def clippable(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The parameters that have a gradient, for torch's clipping, which takes dense ones only: for
    one whose gradient is sparse a tensor whose gradient is its values, in the same memory."""
    tensors = []
    for p in parameters:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            p.grad = p.grad.coalesce()  # a row that was read twice has one gradient
            values = p.grad.values()
            stand_in = values.detach()
            stand_in.grad = values
            tensors.append(stand_in)
        else:
            tensors.append(p)
    return tensors
