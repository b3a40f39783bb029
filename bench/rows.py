"""What an update of a large table costs: by rows (smallgpt.rows) and dense (AdamW, fused).

    OMP_NUM_THREADS=1 python bench/rows.py [--tokens 4096] [--width 128]

In each step random rows of a table (N, D) are looked up, and their gradients computed, clipped and
applied. Prints the median CPU time of a step (other work on the machine disturbs it less than the
clock), its parts, and the bytes of gradient and optimizer state.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smallgpt.adam import AdamW, Optimizer  # noqa: E402
from smallgpt.hardware import keep_freed_memory  # noqa: E402
from smallgpt.rows import RowwiseAdam, clippable  # noqa: E402

SIZES = (10**5, 10**6, 10**7)
DENSE_LIMIT = 10**6  # rows: AdamW's four tables of 10^7 x 128 are 20 GB


class Steps:
    """Steps on a table of its own."""

    def __init__(self, n_rows: int, width: int, tokens: int, sparse: bool):
        self.tokens = tokens
        weights = torch.zeros(n_rows, width)
        self.table = nn.Embedding.from_pretrained(weights, freeze=False, sparse=sparse)
        self.gradient = torch.randn(tokens, width)
        self.optimizer: Optimizer = AdamW([self.table.weight], lr=0.01, fused=True)
        if sparse:
            self.optimizer = RowwiseAdam([{"params": [self.table.weight]}], lr=0.01)
        self.rows = torch.empty(0, dtype=torch.long)

    def read(self) -> None:
        self.rows = torch.randint(self.table.num_embeddings, (self.tokens,))

    def backward(self) -> None:
        self.table(self.rows).backward(self.gradient)

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(clippable([self.table.weight]), 1.0)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, count: int) -> dict[str, float]:
        """Median milliseconds of each part of a step."""
        parts: dict[str, Callable[[], None]] = {
            "lookup, gradient": self.backward,
            "clip": self.clip,
            "update": self.update,
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(count):
            self.read()
            for name, part in parts.items():
                begin = time.process_time()
                part()
                times[name].append(1000 * (time.process_time() - begin))
        return {name: statistics.median(found) for name, found in times.items()}

    def megabytes(self) -> float:
        """Of the gradient and the optimizer's state."""
        self.read()
        self.backward()
        gradient = self.table.weight.grad
        found = [gradient]
        if gradient.is_sparse:
            found = [gradient._indices(), gradient._values()]
        found += self.optimizer.state[self.table.weight].values()
        return sum(tensor.nbytes for tensor in found) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    for n_rows in SIZES:
        for sparse in (True, False):
            if not sparse and n_rows > DENSE_LIMIT:
                continue
            steps = Steps(n_rows, args.width, args.tokens, sparse)
            steps.measure(3)  # warms up
            found = steps.measure(50 if sparse else 5)
            parts = ", ".join(f"{name} {ms:.2f}" for name, ms in found.items())
            way = "by rows" if sparse else "dense"
            total = sum(found.values())
            print(
                f"{n_rows:>10,} rows {way:<8} {total:8.2f} ms ({parts}), "
                f"{steps.megabytes():,.0f} MB beside the table"
            )


if __name__ == "__main__":
    main()
