"""Speed and memory of every parallel layout, through the real training loop.

    python bench/parallel.py                     one process with 2 threads against 2 with 1 each
    python bench/parallel.py --device cuda       1, 2, 4, ... GPUs: scaling efficiency

On a CPU all contenders have the same cores and the same global batch, so a layout shows what its
communication costs. On GPUs the batch grows with them (weak scaling): efficiency is the speed per
GPU as a fraction of one GPU's. Rounds alternate; a speed is the median over the rounds of the
median over the records of a run's metrics.jsonl, its first third left out. Memory is the largest
peak of any process.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import (  # noqa: E402
    add_shape,
    cpu_name,
    heading,
    parser,
    row,
    run_group,
    spread,
    write_chats,
)
from smallgpt.runs import metrics  # noqa: E402


@dataclass(frozen=True)
class Contender:
    name: str
    processes: int
    threads: int
    settings: tuple[str, ...]


def on_cpu(cores: int) -> list[Contender]:
    """All with the same cores."""
    each = max(1, cores // 2)
    layouts = {
        "DDP 2": ("mesh.shard=1", "mesh.replicate=2"),
        "FSDP 2": ("mesh.shard=2",),
        "TP 2": ("mesh.tp=2",),
        "TP 2, sequence": ("mesh.tp=2", "mesh.sequence=true"),
        "PP 2, GPipe": ("mesh.pp=2", "mesh.schedule=gpipe"),
        "PP 2, 1F1B": ("mesh.pp=2",),
    }
    two = [Contender(name, 2, each, settings) for name, settings in layouts.items()]
    return [Contender("one process", 1, 2 * each, ()), *two]


def on_gpus(gpus: int) -> list[Contender]:
    """Weak scaling: a GPU's share of the batch stays the same."""
    found = [Contender("one GPU", 1, 0, ())]
    count = 2
    while count <= gpus:
        replicas = (f"mesh.replicate={count}", "mesh.shard=1")
        found.append(Contender(f"DDP {count}", count, 0, replicas))
        found.append(Contender(f"FSDP {count}", count, 0, (f"mesh.shard={count}",)))
        found.append(Contender(f"TP 2, {count} GPUs", count, 0, ("mesh.tp=2", "mesh.shard=0")))
        found.append(Contender(f"PP 2, {count} GPUs", count, 0, ("mesh.pp=2", "mesh.shard=0")))
        count *= 2
    return found


def settings_of(args: argparse.Namespace, c: Contender, folder: Path, number: int) -> list[str]:
    """The settings of a contender's training."""
    sequences = args.batch * (c.processes if args.device == "cuda" else 1)
    return [
        f"run={number}",
        f"out_dir={folder / 'runs'}",
        f"device={args.device}",
        f"dtype={args.dtype}",
        f"compile={args.compile}",
        f"max_steps={args.steps}",
        f"batch_tokens={sequences * args.block_size}",
        f"micro_batch={args.micro_batch}",
        f"eval_every={2 * args.steps}",
        f"save_every={2 * args.steps}",
        "log_every=1",
        "prompts=[]",
        f"data.path={folder / 'chat.txt'}",
        f"data.cache={folder / 'tokens'}",
        "data.eval_blocks=1",
        f"model.n_layer={args.n_layer}",
        f"model.n_head={args.n_head}",
        f"model.n_embd={args.n_embd}",
        f"model.block_size={args.block_size}",
        f"model.vocab_size={args.vocab_size}",
        *c.settings,
    ]


def work(arguments: list[str], peaks: str) -> int:
    """In each process: one training; then write down this process's peak of memory, in bytes."""
    import torch

    import train_fsdp
    from smallgpt import settings
    from smallgpt.parallel.layout import MeshSpread
    from smallgpt.parallel.world import start
    from train import train

    s = settings.load(train_fsdp.MeshTrainSettings, arguments)
    with start(s.device) as world:
        status = train(s, world, MeshSpread(world, s.mesh))
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if world.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        Path(peaks, str(world.rank)).write_text(str(peak), encoding="utf-8")
    return status


def measure(args: argparse.Namespace, c: Contender, folder: Path, number: int) -> dict[str, float]:
    """Tokens per second, and the largest peak of any process in bytes."""
    peaks = folder / f"peaks{number}"
    peaks.mkdir()
    words = [__file__, "--worker", str(peaks), *settings_of(args, c, folder, number)]
    run_group(c.processes, words, c.threads)
    records = metrics.read(folder / "runs" / str(number), "train")
    speeds = [record["tokens_per_second"] for record in records]
    return {
        "tokens_per_second": statistics.median(speeds[len(speeds) // 3 :]),
        "peak": max(float(file.read_text(encoding="utf-8")) for file in peaks.iterdir()),
    }


def report(contenders: list[Contender], samples: dict[str, list[dict]], weak: bool) -> str:
    """A table in Markdown."""
    last = "efficiency" if weak else "of one process's speed"
    lines = [heading(("layout", "tokens/s: median (min to max)", last, "peak MiB a process"))]
    first = samples[contenders[0].name]
    for c in contenders:
        speeds = [sample["tokens_per_second"] for sample in samples[c.name]]
        share = c.processes if weak else 1
        pairs = zip(samples[c.name], first, strict=True)
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] / share for a, b in pairs]
        peak = max(sample["peak"] for sample in samples[c.name]) / 2**20
        cells = (c.name, spread(speeds), f"{statistics.median(ratios):.2f}", f"{peak:,.0f}")
        lines.append(row(cells))
    return "\n".join(lines)


def main() -> int:
    if "--worker" in sys.argv:
        peaks, *arguments = sys.argv[sys.argv.index("--worker") + 1 :]
        return work(arguments, peaks)
    p = parser(__doc__)
    add_shape(p)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--compile", default="false")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=12, help="of each run")
    p.add_argument("--batch", type=int, default=16, help="sequences a step; on GPUs of each")
    p.add_argument("--micro-batch", type=int, default=4)
    p.add_argument("--json", metavar="FILE", help="write every sample here")
    args = p.parse_args()
    if args.device == "cuda":
        import torch

        contenders = on_gpus(torch.cuda.device_count())
    else:
        contenders = on_cpu(os.cpu_count() or 2)
    samples: dict[str, list[dict]] = {c.name: [] for c in contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_chats(folder / "chat.txt")
        for number in range(args.rounds * len(contenders)):
            c = contenders[number % len(contenders)]
            samples[c.name].append(measure(args, c, folder, number))
            print(c.name, samples[c.name][-1], file=sys.stderr, flush=True)
    print(f"{cpu_name()}, {os.cpu_count()} cores\n")
    print(report(contenders, samples, weak=args.device == "cuda"))
    if args.json:
        Path(args.json).write_text(json.dumps(samples, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
