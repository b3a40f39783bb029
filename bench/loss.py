"""The LM head and its loss, forward and backward: this project's slices against PyTorch's own.

    OMP_NUM_THREADS=1 python bench/loss.py                      float32 and bfloat16

All contenders take turns in one process, and time is that of the processor, so that what else runs
matters little. Memory is the most that tensors take beside hidden states, weights and targets.
Errors are relative, ||a - b|| / ||b||, against float64. F.linear_cross_entropy came with PyTorch
2.13; acc_policy and acc_dtype are its options.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.common import heading, parser, row, spread  # noqa: E402
from bench.plan import peak_memory  # noqa: E402
from model import GPT, IGNORE, GPTConfig  # noqa: E402
from smallgpt.hardware import DTYPES  # noqa: E402

TOKENS, WIDTH, VOCABULARY = 4096, 384, 8000
Three = tuple[Tensor, Tensor, Tensor]  # h, weight, targets; or the loss and two gradients
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # h (N, C), weight (V, C), targets (N,) -> sum


def ours(dtype: torch.dtype, compiled: bool) -> Loss:
    """GPT.loss, its softmax compiled as in a long run or not."""

    def loss_of(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        model.lm_head.weight = weight
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model.loss(h[None], targets[None])

    model = GPT(GPTConfig(64, n_layer=1, n_head=1, n_embd=64, tie_weights=False))
    if compiled:
        model.compile_parts()
    return loss_of


def torchs(dtype: torch.dtype, **options) -> Loss:
    """F.linear_cross_entropy, cut along the batch."""
    chosen = torch.nn.LinearCrossEntropyOptions(**options)

    def loss_of(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            h.to(dtype),
            weight.to(dtype),
            targets,
            reduction="sum",
            ignore_index=IGNORE,
            options=chosen,
        )

    return loss_of


def all_logits(dtype: torch.dtype) -> Loss:
    """Every logit at once, the softmax in float32."""

    def loss_of(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(h.to(dtype), weight.to(dtype)).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

    return loss_of


def contenders(dtype: torch.dtype) -> dict[str, Loss]:
    found = {
        "ours, compiled": ours(dtype, compiled=True),
        "ours": ours(dtype, compiled=False),
        "all logits at once": all_logits(dtype),
    }
    if not hasattr(F, "linear_cross_entropy"):
        return found
    found["F.linear_cross_entropy"] = torchs(dtype)
    if dtype == torch.bfloat16:
        low = torchs(dtype, acc_policy="compact", acc_dtype=torch.bfloat16)
        found["F.linear_cross_entropy, compact, sums in bfloat16"] = low
    return found


def run(loss_of: Loss, inputs: Three) -> Three:
    """Loss and gradients. The mean is what is differentiated, as in training."""
    h, weight, targets = inputs
    loss = loss_of(h, weight, targets)
    gradients = torch.autograd.grad(loss / len(targets), (h, weight))
    return loss.detach(), *gradients


def make_inputs() -> Three:
    """h (N, C) as behind a norm, weight (V, C) as trained a while, targets (N,)."""
    torch.manual_seed(0)
    h = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = 0.1 * torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[::17] = IGNORE
    weight = torch.nn.Parameter(weight)
    return h, weight, targets


def in_float64(inputs: Three) -> Three:
    h, weight, targets = inputs
    h = h.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    logits = h @ weight.T
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss / len(targets), (h, weight))


def measure(losses: dict[str, Loss], inputs: Three, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the processor of each round, by contender."""
    for loss_of in losses.values():
        run(loss_of, inputs)  # compiles
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss_of in losses.items():
            began = time.process_time()
            run(loss_of, inputs)
            seconds = time.process_time() - began
            times[name].append(1e3 * seconds)
    return times


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[str]:
    """Of the loss and the gradients, relative."""
    relative = []
    for mine, reference in zip(found, exact, strict=True):
        error = (mine - reference).norm() / reference.norm()
        relative.append(f"{error.item():.1e}")
    return relative


def report(dtype: torch.dtype, rounds: int) -> None:
    """Measure, and print a table in Markdown."""
    inputs = make_inputs()
    exact = in_float64(inputs)
    losses = contenders(dtype)
    times = measure(losses, inputs, rounds)
    first, *_ = times.values()
    print(f"\n{TOKENS:,} x {WIDTH}, vocabulary {VOCABULARY:,}, {dtype}\n")
    titles = ("", "ms: median (min to max)", "slower than the first", "MiB", "loss", "of h")
    print(heading((*titles, "of weights")))
    for name, loss_of in losses.items():
        mine = times[name]
        ratios = [x / y for x, y in zip(mine, first, strict=True)]
        found = run(loss_of, inputs)
        peak = peak_memory(lambda loss_of=loss_of: run(loss_of, inputs))
        cells = (
            name,
            spread(mine, ".0f"),
            f"{statistics.median(ratios):.2f}x",
            f"{peak / 2**20:.0f}",
            *errors(found, exact),
        )
        print(row(cells), flush=True)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args()
    for name in args.dtype:
        report(DTYPES[name], args.rounds)


if __name__ == "__main__":
    main()
