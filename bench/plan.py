"""What scripts/plan.py computes, against what true processes do.

    python bench/plan.py                 every case: traffic to the byte, memory, time of a step

Each case is a step of a small model on 1, 2 or 4 processes of this machine (gloo, CPU). Collectives
are counted as PyTorch dispatches them. Memory is what its allocator reports, from the making of the
model on. Time is measured on one process; the machine's speed in matrix products and its memory's
bandwidth, which the plan is given, are measured, too.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch._C._profiler import _EventType  # noqa: E402

from bench.common import heading, parser, row, run_group  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from smallgpt.optim import OptimSettings, make_optimizers  # noqa: E402
from smallgpt.parallel import footprint  # noqa: E402
from smallgpt.parallel.footprint import Layout, Process, Work  # noqa: E402
from smallgpt.parallel.layout import MeshSettings, MeshSpread, axes_of  # noqa: E402
from smallgpt.parallel.plan import Cluster, Gpu, layout_of, plan  # noqa: E402
from smallgpt.parallel.simulate import Batch, Kind, Traffic, planned, step  # noqa: E402
from smallgpt.parallel.world import World, start  # noqa: E402

SHAPE = {"vocab_size": 512, "block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128}
GPT2 = {"pos": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False, "bias": True}


@dataclass(frozen=True)
class Case:
    """A step to measure, and to plan."""

    processes: int
    mesh: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    low: bool = False  # bfloat16
    rows: int = 4
    accum: int = 1
    recompute: int = 0

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**{**SHAPE, **self.model})

    @property
    def settings(self) -> MeshSettings:
        return MeshSettings(**self.mesh)

    @property
    def work(self) -> Work:
        return Work(self.config, product=2 if self.low else 4, kernels="cpu")

    @property
    def layout(self) -> Layout:
        axes = axes_of(self.settings, self.processes)
        sequences = self.rows * self.accum * axes.data
        shares = (sequences * self.config.block_size, self.rows)
        return layout_of(self.settings, self.processes, self.work, shares, self.recompute)

    def process(self, rank: int) -> Process:
        """What the plan says of a process."""
        layout = self.layout
        pp_rank = rank // (layout.size // layout.pp)
        return footprint.processes(self.work, layout)[pp_rank]

    def describe(self) -> str:
        """fsdp 2, 4 sequences x 1, bfloat16, mlp=gelu"""
        changes = [f"{key}={value}" for key, value in self.model.items()]
        precision = "bfloat16" if self.low else "float32"
        return ", ".join([self.layout.describe(), precision, *changes])


HSDP = {"replicate": 2, "shard": 2}
DDP2 = {"replicate": 2, "shard": 1}
FEW_HEADS = {"n_kv_head": 2}
CASES = [
    Case(1, rows=8),
    Case(1, rows=8, low=True),
    Case(1, rows=8, recompute=1),
    Case(1, rows=8, accum=2, model={"mlp": "swiglu", "tie_weights": False}),
    Case(1, rows=8, model=GPT2),
    Case(1, rows=4, model={"vocab_size": 8192}),
    Case(2, DDP2, rows=8),
    Case(2, DDP2, accum=2, low=True),
    Case(2, rows=8),
    Case(2, rows=1),
    Case(2, rows=8, low=True, accum=2),
    Case(2, rows=8, recompute=2),
    Case(2, {"reduce": "bfloat16"}, rows=8, low=True, model={"mlp": "gelu"}),
    Case(2, model={**GPT2, "tie_weights": False}),
    Case(2, {"tp": 2}, rows=8),
    Case(2, {"tp": 2}, low=True, accum=2, recompute=1),
    Case(2, {"tp": 2, "sequence": True}, rows=8),
    Case(2, {"tp": 2}, model=GPT2),
    Case(2, {"pp": 2}, rows=8, accum=4),
    Case(2, {"pp": 2, "schedule": "gpipe"}, accum=4, recompute=1),
    Case(2, {"pp": 2, "schedule": "gpipe"}, rows=1, accum=8, model={"vocab_size": 4096}),
    Case(2, {"pp": 2, "schedule": "gpipe"}, accum=2, low=True),
    Case(2, {"pp": 2}, accum=4, model={"vocab_size": 8192}),
    Case(2, {"pp": 2, "schedule": "interleaved"}, accum=4, model={"vocab_size": 8192}),
    Case(2, {"pp": 2, "schedule": "interleaved"}, accum=4, low=True),
    Case(2, {"pp": 2}, accum=2, model={"tie_weights": False, "pos": "learned"}),
    Case(4, HSDP, rows=8, accum=2),
    Case(4, {"tp": 2}, rows=8, low=True, accum=2),
    Case(4, {"tp": 2, "sequence": True}, rows=8, low=True, model=FEW_HEADS, recompute=1),
    Case(4, {"tp": 4}, rows=8, model=FEW_HEADS, accum=2),
    Case(4, {"tp": 2, **DDP2}, low=True, accum=2),
    Case(4, {"pp": 2}, rows=8, low=True, accum=4),
    Case(4, {"pp": 2, "tp": 2}, low=True, accum=4),
    Case(4, {"pp": 2, **DDP2}, accum=4),
    Case(4, {"pp": 4}, accum=4),
]
LARGE = {"vocab_size": 8192, "block_size": 256, "n_layer": 12, "n_head": 12, "n_embd": 768}
CASES += [Case(1, model=LARGE), Case(2, model=LARGE), Case(2, {"tp": 2}, model=LARGE, recompute=2)]


# --- in each process ------------------------------------------------------------------------------


def run(case: Case, world: World) -> dict:
    """One step, after others: {"traffic": [[axis, operation, size, count]], "peak": bytes}."""
    dtype = torch.bfloat16 if case.low else torch.float32
    traffic = Traffic()

    def work() -> None:
        torch.manual_seed(0)
        strategy = MeshSpread(world, case.settings).build(GPT(case.config), dtype)
        strategy.model.recompute = case.recompute
        optimizers = make_optimizers(strategy.names(), OptimSettings())
        batches = [Batch(case.rows, case.config.block_size) for _ in range(case.accum)]
        for _ in range(2):  # in the second, DDP chooses its buckets anew
            step(strategy, optimizers, batches)
        with traffic:
            step(strategy, optimizers, batches)

    peak = peak_memory(work)
    return {"traffic": [[*kind, count] for kind, count in traffic.calls.items()], "peak": peak}


def peak_memory(work: Callable[[], None]) -> int:
    """Most bytes that tensors took at a time while `work` ran."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        work()
    allocations = []
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            of = event.extra_fields
            allocations.append((event.start_time_ns, of.ptr, of.alloc_size))
    live: dict[int, int] = {}  # by address
    now = peak = 0
    for _, address, size in sorted(allocations):
        # what a thread of gloo has freed is not reported: it shows when its address is used again
        now -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            now += size
            peak = max(peak, now)
    return peak


def worker(file: str) -> None:
    """Run the cases of the file in this process, one of a group, and write what they did."""
    cases = [Case(**case) for case in json.loads(Path(file).read_text(encoding="utf-8"))]
    with start("cpu") as world:
        found = [run(case, world) for case in cases]
    Path(f"{file}.{world.rank}").write_text(json.dumps(found), encoding="utf-8")


# --- what is compared -----------------------------------------------------------------------------


def counted(result: dict) -> Counter[Kind]:
    """The traffic of a process. Of DDP's buckets only the sum is planned."""
    calls: Counter[Kind] = Counter()
    for axis, operation, size, count in result["traffic"]:
        calls[axis, operation, size] += count
    return calls


def total_bytes(calls: Counter[Kind]) -> int:
    return sum(size * count for (_, _, size), count in calls.items())


def same_traffic(case: Case, rank: int, result: dict) -> bool:
    """Is every collective as planned? DDP chooses its buckets as it runs: there, every byte."""
    found, expected = counted(result), planned(case.process(rank))
    if case.layout.is_plain:
        return total_bytes(found) == total_bytes(expected)
    return found == expected


def memory_ratios(case: Case, results: list[dict]) -> list[float]:
    """Planned memory as a fraction of the measured, for each stage. Its processes hold the same; a
    buffer that a thread of gloo frees is seen too late, so the smallest of their peaks counts."""
    each = len(results) // case.layout.pp
    ratios = []
    for first in range(0, len(results), each):
        peak = min(result["peak"] for result in results[first : first + each])
        ratios.append(case.process(first).memory().total / peak)
    return ratios


# --- the time of a step ---------------------------------------------------------------------------


def median_seconds(work: Callable[[], object], rounds: int = 7) -> float:
    """Of the processor: what else runs on this machine is left out."""
    work()
    times = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times)


def this_machine(config: GPTConfig, rows: int) -> Gpu:
    """The speed of this process in a product of the model's MLP, and of passing over memory."""
    x = torch.randn(rows * config.block_size, config.n_embd)
    weight = torch.randn(config.n_embd, config.mlp_size)
    flops = 2 * x.numel() * config.mlp_size / median_seconds(lambda: x @ weight)
    large = torch.ones(2**25)
    out = torch.empty_like(large)
    moved = 2 * large.nbytes / median_seconds(lambda: torch.mul(large, 2.0, out=out))
    return Gpu(memory=0, bandwidth=moved, nvlink=1, flops=flops)


def report_time(rounds: int) -> None:
    """Steps of one thread in float32, measured and planned, in alternating rounds."""
    torch.set_num_threads(1)
    config = GPTConfig(8000, n_layer=6, n_head=6, n_embd=384, block_size=256)
    rows = 8
    world = World(0, 1, torch.device("cpu"))
    strategy = MeshSpread(world, MeshSettings()).build(GPT(config), torch.float32)
    optimizers = make_optimizers(strategy.names(), OptimSettings())
    batches = [Batch(rows, config.block_size)]
    layout = Layout(pp=1, replicate=1, shard=1, tp=1, rows=rows, accum=1)
    work = Work(config, product=4, kernels="cpu")
    titles = ("matrix products, GFLOP/s", "memory, GB/s", "step, s", "planned")
    print(heading((*titles, "planned / measured")))
    for _ in range(rounds):
        gpu = this_machine(config, rows)
        measured = median_seconds(lambda: step(strategy, optimizers, batches), 3)
        cluster = Cluster(gpu, size=1, per_node=1, link=1, efficiency=1, reached=1)
        expected = plan(work, layout, cluster).time.expected
        cells = (
            f"{gpu.flops / 1e9:.0f}",
            f"{gpu.bandwidth / 1e9:.1f}",
            f"{measured:.3f}",
            f"{expected:.3f}",
            f"{expected / measured:.2f}",
        )
        print(row(cells))


# --- the benchmark --------------------------------------------------------------------------------


def measure(cases: list[Case], folder: Path) -> list[list[dict]]:
    """Results of the cases, which have the same number of processes: for each rank a list."""
    (size,) = {case.processes for case in cases}
    file = folder / f"cases{size}.json"
    file.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    run_group(size, [__file__, "--worker", str(file)])
    ranks = [Path(f"{file}.{rank}") for rank in range(size)]
    return [json.loads(rank.read_text(encoding="utf-8")) for rank in ranks]


def report(cases: list[Case], ranks: list[list[dict]]) -> None:
    """A line of a Markdown table for each case; of its processes the one furthest from the plan."""
    for number, case in enumerate(cases):
        results = [of_rank[number] for of_rank in ranks]
        equal = all(same_traffic(case, rank, result) for rank, result in enumerate(results))
        furthest = max(memory_ratios(case, results), key=lambda ratio: abs(ratio - 1))
        first = results[0]
        sent = total_bytes(counted(first))
        peak = first["peak"] / 2**20
        traffic = "equal" if equal else "NOT EQUAL"
        print(row((case.describe(), f"{sent:,}", traffic, f"{peak:.1f}", f"{furthest:.3f}")))


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--worker", help=argparse.SUPPRESS)
    p.add_argument("--rounds", type=int, default=5, help="of measuring time")
    args = p.parse_args()
    if args.worker:
        return worker(args.worker)
    report_time(args.rounds)
    print()
    titles = ("case", "bytes sent by rank 0", "traffic", "peak MiB of rank 0", "planned / measured")
    print(heading(titles))
    with tempfile.TemporaryDirectory() as folder:
        for size in sorted({case.processes for case in CASES}):
            cases = [case for case in CASES if case.processes == size]
            report(cases, measure(cases, Path(folder)))


if __name__ == "__main__":
    main()
