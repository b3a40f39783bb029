"""Where the time of a training step goes: matrix products, attention, the loss, the optimizer, ...

    python bench/step_profile.py config/quickstart.yaml
    python bench/step_profile.py config/train90M.yaml data.path=chats.txt device=cuda --detail

It profiles steps of train.py's own loop, with the settings of a run. On a CPU a row holds the time
of the thread that trains, on a GPU that of the kernels. What is left of the wall clock is the last
row: Python and waiting on a CPU, idle time on a GPU. The profiler itself makes Python slower.

It is not called profile.py: the folder of a script comes first on Python's path, and cProfile,
which PyTorch imports, imports `profile`.
"""

import functools
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch._inductor import config as inductor  # noqa: E402
from torch.autograd.profiler_util import FunctionEvent  # noqa: E402
from torch.profiler import ProfilerActivity, record_function  # noqa: E402

import train  # noqa: E402
from bench.common import heading, parser, row  # noqa: E402
from smallgpt import console, hardware, settings  # noqa: E402
from smallgpt.parallel.strategy import Single, Spread  # noqa: E402
from smallgpt.parallel.world import World  # noqa: E402
from smallgpt.text.batches import Corpus  # noqa: E402

# What an operation belongs to: the first row with a pattern that is found in its own name, in that
# of its kernel, or in the name of one that called it. So a product inside the optimizer is the
# optimizer's, and a product inside the loss a matrix product. What backward does belongs to the row
# of the operation whose gradient it is. A kernel that torch.compile has fused bears the names of
# its operations, and belongs whole to the first row that knows one of them.
GROUPS = {
    "data": r"^data$",
    "optimizer": r"^Optimizer\.|_foreach_|multi_tensor_apply|linalg_vector_norm|clip_grad",
    "attention": r"scaled_dot_product|ScaledDotProduct|flash|fmha|attention",
    "norm": r"rms_?norm|layer_?norm|RmsNorm|LayerNorm|rsqrt",
    "activation": r"gelu|silu|relu|threshold|square|pow|Gelu|Silu|Relu|Threshold|Pow|tanh",
    "matrix products": r"::(mm|addmm|bmm|baddbmm|mkldnn_\w*linear\w*)$|gemm|cutlass|nvjet|cublas",
    "softmax, loss": r"LinearCrossEntropy|logsumexp|softmax|nll_loss|cross_entropy",
    "embedding": r"embedding|Embedding|index_select|index_add|gather|scatter",
    "casts, copies": r"_to_copy|copy_|contiguous|clone|::cat$|Memcpy|CatArray",
}
OTHER = "other operations"
BACKWARD = "autograd::engine::evaluate_function"  # begins the name of what runs a node
SKIPPED = 4  # first steps, which allocate memory and compile


@dataclass
class Profile:
    """Where the milliseconds of one step went."""

    name: str
    wall: float = 0.0  # of one step
    groups: Counter[str] = field(default_factory=Counter)  # by the names of GROUPS, and OTHER
    others: Counter[str] = field(default_factory=Counter)  # OTHER, by the name of the operation

    @property
    def rest(self) -> float:
        """What no operation took."""
        return self.wall - sum(self.groups.values())

    def add(self, group: str, name: str, milliseconds: float) -> None:
        self.groups[group] += milliseconds
        if group == OTHER:
            self.others[name] += milliseconds


class EnoughSteps(Exception):
    """Those that are wanted have been profiled; the run ends here, and saves nothing."""


class Watched(Spread):
    """One process, whose steps are profiled. The loop seeds each step as its first deed."""

    def __init__(self, world: World, steps: int):
        super().__init__(world)
        self.steps = steps
        activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        self.milliseconds = 0.0

    def build(self, *arguments: Any) -> Single:
        strategy = super().build(*arguments)
        seed = strategy.seed

        def begin_step(seed_of_run: int, step: int) -> None:
            if step == SKIPPED:
                self.begin()
            if step == SKIPPED + self.steps:
                self.end()
                raise EnoughSteps
            seed(seed_of_run, step)

        strategy.seed = begin_step
        return strategy

    def wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def begin(self) -> None:
        self.wait()
        self.profiler.start()
        self.began = time.perf_counter()

    def end(self) -> None:
        self.wait()
        self.milliseconds = 1e3 * (time.perf_counter() - self.began) / self.steps
        self.profiler.stop()


def recorded(name: str, function: Callable) -> Callable:
    """The function, as an operation of this name."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return call


def run_steps(s: train.TrainSettings, device: torch.device, steps: int) -> Watched:
    """Train for so many steps beyond the first ones, and profile them."""
    s.run = "profile"
    s.eval_every = s.save_every = s.max_steps = max(s.max_steps, SKIPPED + steps + 1)
    world = World(0, 1, device)
    watched = Watched(world, steps)
    with (
        tempfile.TemporaryDirectory() as s.out_dir,
        patch.object(train, "to_batch", recorded("data", train.to_batch)),
        patch.object(Corpus, "train_batch", recorded("data", Corpus.train_batch)),
        redirect_stdout(sys.stderr),
        suppress(EnoughSteps),
    ):
        train.train(s, world, watched)
    return watched


def made_nodes(events: list[FunctionEvent]) -> dict[int, FunctionEvent]:
    """Number of a node of autograd's graph -> the operation that made it.

    Until an operation makes the next node, all bear its number: the last of them has made it."""
    makers = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            if event.scope == 0:  # else it is the node itself, which runs
                makers[event.sequence_nr] = event
    return makers


def callers(event: FunctionEvent, makers: dict[int, FunctionEvent]) -> Iterator[FunctionEvent]:
    """The operation and those that called it, inmost first; behind one of backward also those of
    the operation whose gradient it is."""
    while event is not None:
        yield event
        outer = event.cpu_parent
        if event.name.startswith(BACKWARD):
            outer = makers.get(event.sequence_nr)
        event = outer


def group_of(names: list[str]) -> str:
    """The row of an operation, given its name, that of its kernel and those of its callers."""
    for group, pattern in GROUPS.items():
        if any(re.search(pattern, name) for name in names):
            return group
    return OTHER


def read(name: str, watched: Watched) -> Profile:
    """What the profiler has found, for one step."""
    found = Profile(name, watched.milliseconds)
    on_gpu = watched.world.device.type == "cuda"
    scale = 1e-3 / watched.steps  # microseconds of all steps -> milliseconds of one
    events = watched.profiler.events()
    makers = made_nodes(events)
    for event in events:
        names = [caller.name for caller in callers(event, makers)]
        if on_gpu:
            for kernel in event.kernels:
                if kernel.name != event.name:  # else it is an annotation, which spans kernels
                    group = group_of([kernel.name, *names])
                    found.add(group, kernel.name, scale * kernel.duration)
        elif event.self_cpu_time_total > 0:
            found.add(group_of(names), event.name, scale * event.self_cpu_time_total)
    return found


def table(profiles: list[Profile], rest: str) -> str:
    """A Markdown table: a row for each group, two columns for each profile."""
    titles = ["part of a step"]
    for profile in profiles:
        titles += [f"{profile.name}: ms", "share"]
    lines = [heading(titles)]
    for part in [*GROUPS, OTHER, rest, "step"]:
        cells = [part]
        for profile in profiles:
            milliseconds = profile.groups[part]
            if part == rest:
                milliseconds = profile.rest
            if part == "step":
                milliseconds = profile.wall
            cells += [f"{milliseconds:.2f}", f"{milliseconds / profile.wall:.1%}"]
        lines.append(row(cells))
    return "\n".join(lines)


def detail(profile: Profile) -> str:
    """The operations that no row knows, the longest first."""
    lines = [f"{profile.name}, {OTHER}:"]
    for name, milliseconds in profile.others.most_common(20):
        lines.append(f"  {milliseconds:8.3f} ms  {name[:100]}")
    return "\n".join(lines)


def main() -> int:
    p = parser(__doc__)
    p.add_argument("settings", nargs="*", help="a YAML and key=value, as for train.py")
    p.add_argument("--steps", type=int, default=3, help="steps that are profiled")
    p.add_argument("--mode", choices=("both", "eager", "compiled"), default="both")
    p.add_argument("--detail", action="store_true", help=f"list the {OTHER}")
    p.add_argument("--json", metavar="FILE", help="write the milliseconds here")
    args = p.parse_intermixed_args()
    modes = ["eager", "compiled"] if args.mode == "both" else [args.mode]
    inductor.cpp.enable_kernel_profile = True  # fused kernels of a CPU are recorded by their names
    profiles = []
    for mode in modes:
        s = settings.load(train.TrainSettings, args.settings)
        s.compile = "true" if mode == "compiled" else "false"
        device = hardware.choose_device(s.device)
        profiles.append(read(mode, run_steps(s, device, args.steps)))
    rest = "idle" if device.type == "cuda" else "Python, waiting"
    dtype, _ = hardware.choose_dtype(s.dtype, device)
    print(
        f"{device.type}, {hardware.name_of(dtype)}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}: {args.steps} steps of {s.batch_tokens:,} tokens\n"
    )
    print(table(profiles, rest))
    if args.detail:
        for profile in profiles:
            print(f"\n{detail(profile)}")
    if args.json:
        found = {
            profile.name: {"step": profile.wall, **profile.groups, rest: profile.rest}
            for profile in profiles
        }
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    console.run(main)
