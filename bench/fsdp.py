"""What FSDP2's machinery costs on one GPU: the model cut into a single part, against the whole one.

    torchrun --standalone --nproc_per_node=1 bench/fsdp.py --device cuda

train_fsdp.py leaves the model of a single process whole. Here it is cut all the same, so that
gathering, bf16 blocks, DTensors in the optimizer and nccl are at work. The losses of the first
steps are compared.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.common import arguments, heading, row, shape, spread, training_step  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from smallgpt import console, hardware  # noqa: E402
from smallgpt.console import UserError  # noqa: E402
from smallgpt.optim import OptimSettings, make_optimizers  # noqa: E402
from smallgpt.parallel.layout import MeshSettings, MeshSpread  # noqa: E402
from smallgpt.parallel.mesh import Mesh  # noqa: E402
from smallgpt.parallel.strategy import Single  # noqa: E402
from smallgpt.parallel.world import World, start  # noqa: E402

COMPARED = 5  # first steps, whose losses are compared; they compile, too


class OnePart(Mesh):
    """FSDP2 of a single process, which has nobody to share with."""

    is_sharded = True


def build(args: argparse.Namespace, world: World, layout: str, dtype: torch.dtype) -> Single:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape(args)))
    spread = MeshSpread(world, MeshSettings())
    if layout == "whole":
        return spread.build(model, dtype)
    return OnePart(model, world, dtype, spread.make_mesh(), spread.s)


def memory_of(device: torch.device, peak: bool) -> int:
    """Bytes of tensors on a GPU, now or at most; of a CPU it is not known."""
    if device.type != "cuda":
        return 0
    measure = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
    return measure(device)


def measure(args: argparse.Namespace, world: World, layout: str, dtype: torch.dtype) -> dict:
    """Losses of the first steps, tokens per second of each round, peak memory in bytes."""
    gc.collect()
    before = memory_of(world.device, peak=False)
    strategy = build(args, world, layout, dtype)
    if not args.eager:
        strategy.model.compile_parts()
    s = OptimSettings()
    optimizers = make_optimizers(strategy.names(), s)
    tokens = torch.randint(args.vocab_size, (args.batch, args.block_size)).to(world.device)
    n_targets = tokens.numel()

    def step(at: int) -> float:
        return training_step(strategy, optimizers, s, at, [(tokens, tokens)], n_targets)

    losses = [step(at) for at in range(COMPARED)]
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    speeds = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        for _ in range(args.steps):
            step(COMPARED)  # its loss is read, so that nothing is left to do
        seconds = time.perf_counter() - began
        speeds.append(args.steps * n_targets / seconds)
    peak = memory_of(world.device, peak=True) - before
    return {"losses": losses, "tokens_per_second": speeds, "peak": peak}


def table(found: dict[str, dict]) -> str:
    """In Markdown."""
    titles = ("model", "tokens/s: median (min to max)", "speed", "peak memory", "losses differ by")
    lines = [heading(titles)]
    whole = found["whole"]
    for layout, result in found.items():
        speeds = result["tokens_per_second"]
        share = statistics.median(speeds) / statistics.median(whole["tokens_per_second"])
        pairs = zip(result["losses"], whole["losses"], strict=True)
        difference = max(abs(mine / reference - 1) for mine, reference in pairs)
        cells = (
            layout,
            spread(speeds),
            f"{share:.2f}x",
            f"{result['peak'] / 2**20:,.0f} MiB",
            f"{difference:.1e}",
        )
        lines.append(row(cells))
    return "\n".join(lines)


def main() -> int:
    p = arguments(__doc__)
    p.add_argument("--batch", type=int, default=16, help="sequences per step")
    p.add_argument("--steps", type=int, default=10, help="of a round")
    args = p.parse_args()
    if os.environ.get("WORLD_SIZE") != "1":
        raise UserError("start it with torchrun --standalone --nproc_per_node=1")
    with start(args.device) as world:
        dtype, why = hardware.choose_dtype("auto", world.device)
        found = {
            layout: measure(args, world, layout, dtype) for layout in ("whole", "FSDP2, one part")
        }
    print(f"{world.device.type}, {hardware.name_of(dtype)}: {why}\n\n{table(found)}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    console.run(main)
