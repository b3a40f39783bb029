"""How the cost of training grows with model, context, vocabulary, batch and corpus.

    OMP_NUM_THREADS=1 python bench/growth.py --json growth.json --out growth.png

It takes about seven minutes on one core, and up to 10 GiB. One thing at a time is changed around
the shape of bench/pretrain.py, by the calls of train.py, in alternating rounds. A step keeps its
tokens where the context grows, and heads keep their size where the width does. Beside each speed
stands the one that the floating-point operations predict from the base. The tokens are those of a
sparse file of the size named, as in bench/large.py. Peak memory is that of the whole process,
compiling included.
"""

import argparse
import atexit
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.common import (  # noqa: E402
    Contender,
    Worker,
    alternate,
    arguments,
    conditions,
    finish,
    heading,
    record,
    row,
    serve,
    shape,
    spread,
    start,
    training_step,
)
from smallgpt import plots  # noqa: E402

if TYPE_CHECKING:  # the parent has no torch: see bench/common.py
    from matplotlib.axes import Axes

BASE = "base"
# axis -> the option that it changes, and multiples of the base's value
AXES = {
    "layers": ("n_layer", (1 / 2, 2)),
    "width": ("n_embd", (1 / 2, 2)),
    "context": ("block_size", (4, 16)),
    "vocabulary": ("vocab_size", (1 / 4, 4)),
    "sequences in a step": ("batch", (1 / 16, 2)),
    "tokens in the corpus": ("corpus", (1 / 1000, 1000)),
}
AT_ONCE = 3  # axes: the processes of all would take 17 GiB
QUICK = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 2048, "rounds": 1}


@dataclass(frozen=True)
class Point:
    """A training to measure."""

    name: str
    axis: str
    value: int  # on the axis
    args: argparse.Namespace


def groups(args: argparse.Namespace) -> list[list[Point]]:
    """What is measured in the same rounds: the base, and the points of a few axes."""
    axes = list(AXES)
    found = []
    for first in range(0, len(axes), AT_ONCE):
        found.append(points(args, axes[first : first + AT_ONCE]))
    return found


def points(args: argparse.Namespace, axes: list[str]) -> list[Point]:
    """The base, which is on every axis, and what differs from it in one thing."""
    base = argparse.Namespace(**vars(args), micro_batch=args.batch, steps=1)
    found = [Point(BASE, "", 0, base)]
    for axis in axes:
        option, multiples = AXES[axis]
        for multiple in multiples:
            value = int(multiple * getattr(base, option))
            changed = argparse.Namespace(**vars(base))
            setattr(changed, option, value)
            if option == "n_embd":
                changed.n_head = value * base.n_head // base.n_embd
            elif option == "block_size":
                changed.batch = base.batch * base.block_size // value
            elif option == "batch":
                changed.steps = max(1, base.batch // value)  # a round is as long as the others'
            found.append(Point(f"{axis}: {short(value)}", axis, value, changed))
    return found


def build(args: argparse.Namespace) -> Contender:
    """In a process of its own: the loop of train.py, without its evaluations and checkpoints."""

    from bench.large import TOKENIZER, make
    from model import GPT, GPTConfig
    from smallgpt import hardware
    from smallgpt.optim import OptimSettings, make_optimizers
    from smallgpt.parallel.strategy import Spread, share_batch
    from smallgpt.parallel.world import World
    from smallgpt.text.tokens import prepare
    from train import to_batch

    device = hardware.choose_device(args.device)
    dtype, why = hardware.choose_dtype("auto", device)
    s = OptimSettings()
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)  # every step reads from it
    data = make(Path(folder.name), 1, args.corpus)
    corpus = prepare(data, TOKENIZER, args.block_size, quiet=True)
    model = GPT(GPTConfig(**shape(args)))
    if not args.quick:
        model.compile_parts()
    strategy = Spread(World(0, 1, device)).build(model, dtype)
    optimizers = make_optimizers(strategy.names(), s)
    tokens = args.batch * args.block_size
    shares = share_batch(tokens, args.block_size, args.micro_batch, data_size=1)
    at = 0

    def step() -> None:
        nonlocal at
        batches = []
        for rows in shares.of(at, 0):
            x, y = corpus.train_batch(rows, seed=0)
            batches.append(to_batch(x, y, corpus, isolate=False, device=device))
        strategy.seed(0, at)
        targets = sum(batch.n_targets for batch in batches)
        inputs = [batch.inputs for batch in batches]
        training_step(strategy, optimizers, s, at, inputs, targets)
        at += 1

    def steps() -> None:
        for _ in range(args.steps):
            step()

    return Contender(
        round=steps,
        tokens=args.steps * tokens,
        precision=hardware.name_of(dtype),
        compiled=not args.quick,
        why=why,
    )


# --- in the parent --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a point came to."""

    point: Point
    parameters: int
    flops: int  # for a token, forward and backward
    speeds: list[float]  # tokens/s of each round
    memory: int  # bytes, at most
    predicted: float  # tokens/s: the base's median, by the operations of both
    of_predicted: float  # measured by predicted, of the same rounds; a median

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)


def size_and_flops(args: argparse.Namespace) -> tuple[int, int]:
    """Parameters, and floating-point operations for a token. The fused kernel of attention leaves
    out the half of the scores that is masked; runs/metrics.py, for MFU, counts it."""
    import torch

    from model import GPT, GPTConfig
    from smallgpt.runs.metrics import flops_per_token

    config = GPTConfig(**shape(args))
    with torch.device("meta"):
        model = GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    masked_scores = 6 * args.n_layer * args.n_embd * args.block_size
    return parameters, flops_per_token(config) - masked_scores


def measured(found: list[Point], workers: list[Worker]) -> list[Measured]:
    """Of a group, whose first one is the base."""
    base_speeds = workers[0].speeds()
    _, base_flops = size_and_flops(found[0].args)
    results = []
    for point, worker in zip(found, workers, strict=True):
        parameters, flops = size_and_flops(point.args)
        speeds = worker.speeds()
        fewer = base_flops / flops
        ratios = [mine / base / fewer for mine, base in zip(speeds, base_speeds, strict=True)]
        last = worker.samples[-1]
        results.append(
            Measured(
                point,
                parameters,
                flops,
                speeds,
                memory=last["peak_cuda"] or last["peak_rss"],
                predicted=fewer * statistics.median(base_speeds),
                of_predicted=statistics.median(ratios),
            )
        )
    return results


def table(results: list[Measured]) -> str:
    """A Markdown table."""
    titles = ["changed", "parameters", "MFLOPs a token", "tokens/s: median (min to max)"]
    lines = [heading([*titles, "by the operations", "measured / predicted", "peak memory"])]
    for result in results:
        cells = (
            result.point.name,
            f"{result.parameters / 1e6:.1f}M",
            f"{result.flops / 1e6:,.0f}",
            spread(result.speeds),
            f"{result.predicted:,.0f}",
            f"{result.of_predicted:.2f}",
            f"{result.memory / 2**20:,.0f} MiB",
        )
        lines.append(row(cells))
    return "\n".join(lines)


def draw(measured_groups: list[list[Measured]], out: Path) -> None:
    """A panel for each axis: tokens/s, measured and predicted, and memory."""
    fig, panels = plots.figure(11, 6.6, columns=3, rows=2)
    left = iter(panels.flat)
    for base, *others in measured_groups:
        axes = dict.fromkeys(result.point.axis for result in others)
        for axis in axes:
            option, _ = AXES[axis]
            of_axis = {getattr(base.point.args, option): base}
            for result in others:
                if result.point.axis == axis:
                    of_axis[result.point.value] = result
            panel = next(left)
            panel.set_title(axis)
            handles = draw_axis(panel, dict(sorted(of_axis.items())))
    at = base.point.args
    fig.suptitle(
        f"One thing changed at a time: {at.n_layer} layers, {at.n_embd} wide, context "
        f"{at.block_size:,}, vocabulary {at.vocab_size:,}, {at.batch} sequences in a step"
    )
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    plots.save(fig, out)


def draw_axis(panel: "Axes", of_axis: dict[int, Measured]) -> list:
    """The lines of a panel, for a legend."""
    values = list(of_axis)
    results = list(of_axis.values())
    speeds = [result.speed for result in results]
    slower = [result.speed - min(result.speeds) for result in results]
    faster = [max(result.speeds) - result.speed for result in results]
    predicted = [result.predicted for result in results]
    memory = [result.memory / 2**30 for result in results]
    by_operations = panel.plot(
        values, predicted, "--", color="C0", label="tokens/s by the operations"
    )
    speed = panel.errorbar(
        values,
        speeds,
        [slower, faster],
        fmt="o-",
        color="C0",
        capsize=3,
        label="tokens/s, measured",
    )
    right = panel.twinx()
    peak = right.plot(values, memory, "s:", color="0.5", ms=4, label="peak memory, GiB (right)")
    right.tick_params(axis="y", colors="0.5")
    panel.set_xscale("log")
    panel.set_xticks(values, [short(value) for value in values])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.set_ylim(0, 1.1 * max(*speeds, *predicted))
    right.set_ylim(0, 1.1 * max(memory))
    return [speed, *by_operations, *peak]


def short(number: int) -> str:
    """256, 8,000, 1e+09"""
    return f"{number:,}" if number < 1e6 else f"{number:.0e}"


def parse() -> argparse.Namespace:
    p = arguments(__doc__)
    p.set_defaults(rounds=3)
    p.add_argument("--batch", type=int, default=16, help="sequences in a step")
    p.add_argument("--corpus", type=int, default=10**9, help="tokens in the corpus")
    p.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    p.add_argument("--out", metavar="FILE", help="draw the picture here, a PNG")
    args = p.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


def main() -> None:
    args = parse()
    if args.worker:
        every = [point for group in groups(args) for point in group]
        point = next(point for point in every if point.name == args.worker)
        serve(point.args, build)
        return
    measured_groups = []
    records = []
    for group in groups(args):
        results, content = compare(group, args)
        measured_groups.append(results)
        records.append(content)
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if args.out:
        draw(measured_groups, Path(args.out))


def compare(group: list[Point], args: argparse.Namespace) -> tuple[list[Measured], dict]:
    """Measure a group, print its table, and give its part of the JSON file, too."""
    names = [point.name for point in group]
    workers, skipped = start(names, side_by_side=args.device == "cuda")
    load = [os.getloadavg()]
    alternate(workers, args.rounds)
    load.append(os.getloadavg())
    results = measured(group, workers)
    print(f"\n{conditions(workers[0].about['machine'], args.rounds, load)}")
    print(f"\n{table(results)}", flush=True)
    finish(workers)
    content = record(args, workers, skipped, load)
    for result in results:
        content["contenders"][result.point.name] |= {
            "parameters": result.parameters,
            "flops_per_token": result.flops,
            "predicted": result.predicted,
            "measured_by_predicted": result.of_predicted,
        }
    return results, content


if __name__ == "__main__":
    main()
