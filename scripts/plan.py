"""What a run of train_fsdp.py takes, before anybody pays for it: memory, traffic, time and cost.

    python scripts/plan.py config/train1.5B_fsdp.yaml world_size=64 gpu=H100
    python scripts/plan.py config/train1.5B_fsdp.yaml world_size=1024 gpu=H100 gpus_per_node=8 \\
        link=400Gb batch_tokens=4194304 tokens=1e12 price=2.5

It reads the settings of train_fsdp.py and shows, for their layout and for the fastest ones it
finds, what each GPU holds, what it sends and how long a step lasts. It is arithmetic and needs no
GPU. docs/scaling.md has the formulas, and what they were checked against.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, plots, settings
from smallgpt.console import UserError
from smallgpt.parallel.footprint import Layout, Work
from smallgpt.parallel.plan import GPUS, Cluster, Plan, layout_of, plan, search
from smallgpt.settings import Amount, Count, Positive, PositiveFraction
from train import round_vocabulary
from train_fsdp import MeshTrainSettings

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes

GB = 1e9
LINK = re.compile(r"(\d+(?:\.\d+)?) ?(Gb|GB)(?:/s)?")
# tokens of the published encodings, with the six that this project adds
VOCABULARIES = {"gpt2": 50263, "r50k_base": 50263, "p50k_base": 50287, "cl100k_base": 100283}


@dataclass
class PlanSettings(MeshTrainSettings):
    world_size: Positive = 8  # processes, one for each GPU
    gpu: str = "H100"  # H100, H200, B200, A100, ...: its data sheet
    gpus_per_node: Positive = 8  # GPUs of one machine
    link: str = "400Gb"  # network between machines, for EACH GPU and direction: 400Gb or 50GB a s
    efficiency: PositiveFraction = 0.6  # of the data sheet's FLOP/s, in large matrix products
    tokens: Amount = 0  # budget of the whole run; 0 = max_steps x batch_tokens
    price: Amount = 0  # of one GPU for one hour; 0 = no cost is shown
    best: Count = 3  # layouts to look for, beside that of the settings
    out: str = ""  # the picture; default: plan_<run>.png in out_dir

    def check(self) -> list[str]:
        problems = super().check()
        if self.gpu not in GPUS:
            known = ", ".join(GPUS)
            problems.append(f"gpu={self.gpu} is not known: choose one of {known}")
        if not LINK.fullmatch(self.link):
            problems.append(f"link={self.link} is no speed: write it as 400Gb (bits) or 50GB")
        if self.world_size > self.gpus_per_node and self.world_size % self.gpus_per_node:
            problems.append(
                f"world_size={self.world_size} is not a multiple of "
                f"gpus_per_node={self.gpus_per_node}"
            )
        if self.dtype not in ("auto", "bfloat16"):
            problems.append(
                f"dtype={self.dtype}: speeds are known in bfloat16 only; use dtype=auto"
            )
        if self.out and Path(self.out).suffix.lower() != ".png":
            problems.append(f"out={self.out} must end with .png")
        return problems


def main() -> None:
    s = settings.load(PlanSettings, doc=__doc__)
    if s.init_from:
        raise UserError("init_from: give the model's shape as settings (model.n_layer=...)")
    round_vocabulary(s.model, vocabulary(s))
    work = Work(
        s.model,
        kernels="cuda" if s.compile == "false" else "compiled",
        muon=s.optim.name == "muon",
    )
    cluster = cluster_of(s)
    plans = plans_of(s, work, cluster)
    print(headline(s, work))
    for name, found in plans.items():
        print(f"{name:8}  {found.layout.describe()}")
    print()
    print(table(s, work, cluster, plans))
    out = Path(s.out) if s.out else Path(s.out_dir) / f"plan_{s.run}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(plans, cluster, out)
    print(f"\nwrote {out}")


def vocabulary(s: PlanSettings) -> int:
    """Rows of the embedding, as far as they can be known without the corpus."""
    kind = s.tokenizer.kind
    if s.model.vocab_size:
        return s.model.vocab_size
    if kind in ("char", "bpe"):
        return s.tokenizer.vocab_size
    if kind not in VOCABULARIES:
        raise UserError(f"the size of tokenizer.kind={kind} is not known: set model.vocab_size")
    return VOCABULARIES[kind]


def cluster_of(s: PlanSettings) -> Cluster:
    number, unit = LINK.fullmatch(s.link).groups()
    per_second = float(number) * GB / (8 if unit == "Gb" else 1)
    per_node = min(s.world_size, s.gpus_per_node)
    return Cluster(GPUS[s.gpu], s.world_size, per_node, per_second, s.efficiency)


def plans_of(s: PlanSettings, work: Work, cluster: Cluster) -> dict[str, Plan]:
    """The layout of the settings, where there is one, and the fastest that fit."""
    plans: dict[str, Plan] = {}
    mistake = None
    try:
        shares = (s.batch_tokens, s.micro_batch)
        own = layout_of(s.mesh, cluster.size, work, shares, s.recompute)
        plans["settings"] = plan(work, own, cluster)
    except UserError as error:
        mistake = error
    layouts = [found.layout for found in plans.values()]
    fastest = search(work, cluster, s.batch_tokens, s.best + 1)
    others = [found for found in fastest if found.layout not in layouts]
    for number, found in enumerate(others[: s.best], 1):
        plans[f"best {number}"] = found
    if not plans:
        raise mistake
    if mistake:
        print(f"the layout of the settings cannot run: {mistake}\n")
    return plans


# --- the table ------------------------------------------------------------------------------------


def headline(s: PlanSettings, work: Work) -> str:
    network = f", {s.link}/s for each GPU between nodes" if s.world_size > s.gpus_per_node else ""
    c = s.model
    return (
        f"model     {work.parameters / 1e6:,.0f}M parameters: {c.n_layer} blocks, {c.n_embd} wide, "
        f"vocabulary {c.vocab_size:,}\n"
        f"machines  {s.world_size:,} x {s.gpu}, "
        f"{min(s.world_size, s.gpus_per_node)} in a node{network}\n"
        f"step      {s.batch_tokens:,} tokens in sequences of {c.block_size:,}\n"
    )


def table(s: PlanSettings, work: Work, cluster: Cluster, plans: dict[str, Plan]) -> str:
    """A column for each plan."""
    rows: list[tuple[str, list[str]]] = [("", list(plans))]
    found = list(plans.values())

    def row(name: str, of: Callable[[Plan], str]) -> None:
        rows.append((name, [of(each) for each in found]))

    def title(name: str) -> None:
        rows.append((name, [""] * len(found)))

    title("memory of a GPU")
    for part in PARTS:
        row(f"  {part}", lambda each, part=part: size(memory_parts(each)[part]))
    row("  fullest", lambda each: each.memory.moment.name)
    row(f"  all, of {size(cluster.gpu.memory)}", in_all)
    title("sent in a step, by each GPU")
    for key in traffic_keys(found, cluster):
        row(f"  {key}", lambda each, key=key: size(sent(each, cluster).get(key, 0.0)))
    title("a step")
    flops = work.flops_per_token * s.batch_tokens / cluster.size
    row("  FLOPs of a GPU", lambda each: f"{flops / 1e12:,.1f}e12")
    row("  seconds", lambda each: f"{each.time.expected:.3f}")
    row("  of these computing", lambda each: f"{each.time.compute:.3f}")
    row("  all overlapped", lambda each: f"{each.time.optimistic:.3f}")
    row("  none overlapped", lambda each: f"{each.time.pessimistic:.3f}")
    row("  pipeline bubble", lambda each: f"{each.time.bubble:.1%}")
    title("the run")
    row("  tokens/s", lambda each: f"{each.tokens_per_second:,.0f}")
    row("  MFU", lambda each: f"{each.mfu:.1%}")
    row("  MFU, bounds", mfu_bounds)
    tokens = s.tokens or s.max_steps * s.batch_tokens
    row(f"  days for {tokens:.3g} tokens", lambda each: f"{days(each, tokens):,.2f}")
    if s.price:
        hour = cluster.size * s.price
        row("  cost", lambda each: f"{24 * hour * days(each, tokens):,.0f}")
    return aligned(rows)


PARTS = ("weights", "gradients", "optimizer", "activations", "temporary")


def memory_parts(found: Plan) -> dict[str, float]:
    memory, moment = found.memory, found.memory.moment
    values = (
        memory.weights,
        moment.gradients,
        memory.optimizer,
        moment.activations,
        moment.temporary,
    )
    return dict(zip(PARTS, values, strict=True))


def in_all(found: Plan) -> str:
    return size(found.memory.total) + ("" if found.fits else " (!)")


def sent(found: Plan, cluster: Cluster) -> dict[str, float]:
    """Bytes by what is done, along which axis and over which link."""
    by_kind: dict[str, float] = {}
    for collective in found.traffic:
        group = found.layout.group(collective.axis, cluster.per_node)
        link = "NVLink" if group.nodes == 1 else "network"
        name = f"{collective.axis} {collective.operation}, {link}"
        by_kind[name] = by_kind.get(name, 0.0) + collective.bytes
    return by_kind


def traffic_keys(plans: list[Plan], cluster: Cluster) -> list[str]:
    keys: dict[str, None] = {}
    for found in plans:
        keys |= dict.fromkeys(sent(found, cluster))
    return list(keys)


def mfu_bounds(found: Plan) -> str:
    low = found.mfu * found.time.expected / found.time.pessimistic
    high = found.mfu * found.time.expected / found.time.optimistic
    return f"{low:.1%} to {high:.1%}"


def days(found: Plan, tokens: float) -> float:
    return tokens / found.tokens_per_second / 86400


def size(n_bytes: float) -> str:
    """1.2 GB, 340 MB, 16 B; a dash for nothing."""
    if not n_bytes:
        return "-"
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= of:
            return f"{n_bytes / of:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def aligned(rows: list[tuple[str, list[str]]]) -> str:
    """Names on the left, numbers on the right."""
    label = max(len(name) for name, _ in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    lines = []
    for name, cells in rows:
        padded = [f"{cell:>{width}}" for cell in cells]
        lines.append("  ".join([f"{name:<{label}}", *padded]).rstrip())
    return "\n".join(lines)


# --- the picture ----------------------------------------------------------------------------------


def draw(plans: dict[str, Plan], cluster: Cluster, out: Path) -> None:
    """Memory of a GPU, part by part, and tokens/s with its bounds, a bar for each layout."""
    fig, (memory, speed) = plots.figure(11, 1.6 + 0.6 * len(plans), columns=2)
    names = [name_of(name, found.layout) for name, found in plans.items()]
    names.reverse()
    found = list(plans.values())
    found.reverse()
    draw_memory(memory, names, found, cluster)
    draw_speed(speed, names, found)
    plots.save(fig, out)


def name_of(name: str, layout: Layout) -> str:
    return f"{name}\n{layout.describe()}"


def draw_memory(ax: "Axes", names: list[str], plans: list[Plan], cluster: Cluster) -> None:
    left = [0.0] * len(plans)
    for part in PARTS:
        widths = [memory_parts(found)[part] / GB for found in plans]
        ax.barh(names, widths, left=left, label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.axvline(cluster.gpu.memory / GB, color="black", lw=1, label="the GPU's")
    ax.set(xlabel="memory of a GPU, GB")
    ax.tick_params(axis="y", labelsize=8)
    ax.legend(frameon=False, fontsize=8)


def draw_speed(ax: "Axes", names: list[str], plans: list[Plan]) -> None:
    speeds = [found.tokens_per_second / 1e6 for found in plans]
    below, above = [], []
    for found, speed in zip(plans, speeds, strict=True):
        time = found.time
        below.append(speed * (1 - time.expected / time.pessimistic))
        above.append(speed * (time.expected / time.optimistic - 1))
    ax.barh(names, speeds, xerr=[below, above], height=0.6, color="C0", capsize=3)
    ax.set(xlabel="million tokens/s (none to all of the communication hidden)")
    ax.set_yticks([])


if __name__ == "__main__":
    console.run(main)
