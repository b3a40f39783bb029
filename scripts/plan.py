"""What a run of train_fsdp.py takes, before anybody pays for it: memory, traffic, time and cost.

    python scripts/plan.py config/train1.5B_fsdp.yaml world_size=64 gpu=H100
    python scripts/plan.py config/train1.5B_fsdp.yaml world_size=1024 gpu=H100 gpus_per_node=8 \\
        link=400Gb batch_tokens=4194304 tokens=1e12 price=2.5

It reads the settings of train_fsdp.py and shows, for their layout and for the best ones it
finds, what each GPU holds, what it sends and how long a step lasts. It is arithmetic and needs no
GPU. docs/scaling.md has the formulas, and what they were checked against. The exit status is 0 if
one of the layouts fits, 1 if none does; with best=0 there is only that of the settings.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, plots, settings
from smallgpt.console import UserError
from smallgpt.parallel.footprint import Layout, Work, processes
from smallgpt.parallel.plan import GPUS, Cluster, Plan, layout_of, plan, search, smallest
from smallgpt.settings import Amount, Count, Positive, PositiveFraction
from train import round_vocabulary
from train_fsdp import MeshTrainSettings

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes

GB = 1e9
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
LINK = re.compile(r"(\d+(?:\.\d+)?) ?(Gb|GB)(?:/s)?")
# tokens of the published encodings, with the six that this project adds
VOCABULARIES = {
    "gpt2": 50263,
    "r50k_base": 50263,
    "p50k_base": 50287,
    "cl100k_base": 100283,
}
Sections = dict[str, dict[str, str]]  # title -> rows of a column: name -> value
COLOURS = {  # of the parts of a GPU's memory
    "weights": "#4c72b0",
    "gradients": "#8172b3",
    "optimizer": "#64b5cd",
    "activations": "#dd8452",
    "temporary": "#ccb974",
}


@dataclass
class Machines:
    world_size: Positive = 8  # processes, one for each GPU
    gpu: str = "H100"  # H100, H200, B200, A100, ...: its data sheet
    gpus_per_node: Positive = 8  # GPUs of one machine
    link: str = "400Gb"  # network between machines, for EACH GPU and direction: 400Gb or 50GB a s
    efficiency: PositiveFraction = 0.6  # of the data sheet's FLOP/s, in large matrix products
    tokens: Amount = 0  # budget of the whole run; 0 = max_steps x batch_tokens
    price: Amount = 0  # of one GPU for one hour; 0 = no cost is shown
    best: Count = 3  # layouts to look for, beside that of the settings
    simulate: bool = True  # check the plan against a simulated step of a small part of it
    out: str = ""  # the picture; default: plan_<run>.png in out_dir


@dataclass
class PlanSettings(MeshTrainSettings, Machines):  # --help shows those of Machines first
    def check(self) -> list[str]:
        problems = super().check()
        if self.gpu not in GPUS:
            problems.append(f"gpu={self.gpu} is not known: choose one of {', '.join(GPUS)}")
        if not bytes_per_second(self.link):
            problems.append(f"link={self.link} is no speed: write it as 400Gb (bits) or 50GB")
        has_nodes = self.world_size > self.gpus_per_node
        if has_nodes and self.world_size % self.gpus_per_node:
            problems.append(
                f"world_size={self.world_size} is not a multiple of "
                f"gpus_per_node={self.gpus_per_node}: change one of them"
            )
        out = Path(self.out)
        if self.out and out.suffix.lower() != ".png":
            problems.append(f"out={self.out} must end with .png")
        elif not out.parent.is_dir():
            problems.append(f"out={self.out}: there is no folder {out.parent}")
        return [*problems, *self.not_known()]

    def not_known(self) -> list[str]:
        """Settings of train_fsdp.py of which there are no formulas."""
        problems = []
        if self.init_from:
            problems.append("init_from: give the model's shape as settings (model.n_layer=...)")
        if self.optim.name != "adamw":
            problems.append(f"optim.name={self.optim.name}: the plan knows AdamW only")
        if self.mesh.offload:
            problems.append("mesh.offload=true: the plan knows nothing of the CPUs' memory")
        if self.dtype not in ("auto", "bfloat16"):
            problems.append(f"dtype={self.dtype}: speeds are known in bfloat16; use auto")
        return problems

    @property
    def budget(self) -> float:
        """Tokens of the run."""
        return self.tokens or self.max_steps * self.batch_tokens


def main() -> int:
    s = settings.load(PlanSettings, doc=__doc__)
    round_vocabulary(s.model, vocabulary(s))
    kernels = "cuda" if s.compile == "false" else "compiled"
    work = Work(s.model, kernels=kernels, negatives=s.negatives)
    cluster = cluster_of(s)
    plans = plans_of(s, work, cluster)
    print(headline(s, work, cluster))
    for name, found in plans.items():
        layout = found.layout
        print(f"{name:8}  {layout.describe()}: {words(layout)}")
    columns = {name: column(s, work, cluster, found) for name, found in plans.items()}
    print(f"\n{table(columns)}")
    if s.simulate:
        first, *_ = plans.values()
        print(f"\n{checked(work, first.layout)}")
    out = Path(s.out)
    if not s.out:
        folder = Path(s.out_dir)
        folder.mkdir(parents=True, exist_ok=True)  # as train.py does
        out = folder / f"plan_{s.run}.png"
    draw(s, work, cluster, plans, out)
    print(f"\nwrote {out}")
    if not any(found.fits for found in plans.values()):
        console.report(why_none_fits(s, cluster, plans))
        return 1
    return 0


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
    link = bytes_per_second(s.link)
    per_node = min(s.world_size, s.gpus_per_node)
    return Cluster(GPUS[s.gpu], s.world_size, per_node, link, s.efficiency)


def bytes_per_second(link: str) -> float:
    """Of 400Gb (bits) or 50GB, with or without /s; 0 where it is no speed."""
    found = LINK.fullmatch(link)
    if found is None:
        return 0.0
    number, unit = found.groups()
    return float(number) * (GB / 8 if unit == "Gb" else GB)


def plans_of(s: PlanSettings, work: Work, cluster: Cluster) -> dict[str, Plan]:
    """The layout of the settings, where there is one, and the best others that fit; where none
    does, the smallest. UserError if there is none at all."""
    plans: dict[str, Plan] = {}
    mistake = None
    try:
        shares = (s.batch_tokens, s.micro_batch)
        own = layout_of(s.mesh, cluster.size, work, shares, s.recompute)
        plans["settings"] = plan(work, own, cluster)
    except UserError as error:
        mistake = error
    layouts = [found.layout for found in plans.values()]
    found_best = search(work, cluster, s.batch_tokens, s.best + 1) if s.best else []
    others = [found for found in found_best if found.layout not in layouts]
    for number, found in enumerate(others[: s.best], 1):
        plans[f"best {number}"] = found
    if s.best and not any(found.fits for found in plans.values()):
        least = smallest(work, cluster, s.batch_tokens)
        if least is not None and least.layout not in layouts:
            plans["smallest"] = least
    if not plans:
        raise mistake
    if mistake:
        print(f"the layout of the settings cannot run: {mistake}\n")
    return plans


def why_none_fits(s: PlanSettings, cluster: Cluster, plans: dict[str, Plan]) -> str:
    """What the smallest of the layouts needs, and what would help."""
    least = min(plans.values(), key=lambda found: found.memory.total)
    need = least.memory.total
    whole = size(cluster.gpu.memory)
    excess = f"needs {size(need)}, and {size(cluster.room)} of a GPU's {whole} may be filled"
    if not s.best:  # no other was looked for
        return f"the layout of the settings {excess}: set best=3 to look for one that fits"
    parts = memory_parts(least)
    largest = max(parts, key=parts.__getitem__)
    if largest == "activations":
        change = f"a shorter model.block_size than {s.model.block_size}"
    elif largest == "temporary":
        change = "a smaller vocabulary"
    else:
        change = (
            f"more GPUs than world_size={s.world_size}, or mesh.offload=true in the run, "
            "of which there is no plan"
        )
    changes = [change]
    larger = {name: gpu.memory for name, gpu in GPUS.items() if need <= cluster.usable * gpu.memory}
    if larger:
        changes.append(f"GPUs with more memory (gpu={min(larger, key=larger.__getitem__)})")
    return (
        f"no layout fits: the smallest, {least.layout.describe()}, {excess}; most of it is "
        f"{largest}, {size(parts[largest])}: what helps is {'; or '.join(changes)}"
    )


def words(layout: Layout) -> str:
    """The settings that give this layout: mesh.shard=4 mesh.tp=2 micro_batch=8 recompute=0"""
    chosen = [f"mesh.shard={layout.shard}"]
    for axis in ("pp", "replicate", "tp"):
        size = getattr(layout, axis)
        if size > 1:
            chosen.append(f"mesh.{axis}={size}")
    if layout.sequence:
        chosen.append("mesh.sequence=true")
    if layout.pp > 1 and layout.schedule != "1f1b":
        chosen.append(f"mesh.schedule={layout.schedule}")
    if layout.virtual > 1:
        chosen.append(f"mesh.virtual={layout.virtual}")
    return " ".join([*chosen, f"micro_batch={layout.rows}", f"recompute={layout.recompute}"])


def checked(work: Work, layout: Layout) -> str:
    """How a step of the layout, shrunk and simulated, compares with its plan."""
    from smallgpt.parallel.simulate import planned, shrunk, simulate  # a second of imports

    if layout.is_plain:
        return "simulated: nothing, as every process holds a whole model"
    small_work, small = shrunk(work, layout)
    (process,) = processes(small_work, small)
    found = simulate(small_work, small)
    expected = planned(process)
    traffic = "the traffic is equal to the byte"
    if found.traffic != expected:
        differences = (found.traffic - expected) + (expected - found.traffic)
        traffic = f"the traffic DIFFERS in {sorted(differences)}"
    need = process.memory().total
    return (
        f"simulated: 2 blocks on CPUs, {small.describe()}: {traffic}; "
        f"memory {size(found.peak)}, by the plan {size(need)}"
    )


# --- the table ------------------------------------------------------------------------------------


def headline(s: PlanSettings, work: Work, cluster: Cluster) -> str:
    c = s.model
    millions = work.parameters / 1e6
    network = ""
    if cluster.size > cluster.per_node:
        network = f", {s.link}/s for each GPU between nodes"
    return (
        f"model     {millions:,.0f}M parameters: {c.n_layer} blocks, {c.n_embd} wide, "
        f"vocabulary {c.vocab_size:,}\n"
        f"machines  {cluster.size:,} x {s.gpu}, {cluster.per_node} in a node{network}\n"
        f"step      {s.batch_tokens:,} tokens in sequences of {c.block_size:,}\n"
    )


def column(s: PlanSettings, work: Work, cluster: Cluster, found: Plan) -> Sections:
    """All that the table says of one plan."""
    return {
        "memory of a GPU": memory_rows(found, cluster),
        "sent in a step, by each GPU": traffic_rows(found, cluster),
        "a step": time_rows(s, work, found),
        "the run": run_rows(s, cluster, found),
    }


def memory_rows(found: Plan, cluster: Cluster) -> dict[str, str]:
    rows = {part: size(n_bytes) for part, n_bytes in memory_parts(found).items()}
    too_much = "" if found.fits else " (too much)"
    rows["fullest"] = found.memory.moment.name
    rows[f"all, of {size(cluster.gpu.memory)}"] = size(found.memory.total) + too_much
    return rows


def memory_parts(found: Plan) -> dict[str, float]:
    memory = found.memory
    moment = memory.moment
    return {
        "weights": memory.weights,
        "gradients": moment.gradients,
        "optimizer": memory.optimizer,
        "activations": moment.activations,
        "temporary": moment.temporary,
    }


def traffic_rows(found: Plan, cluster: Cluster) -> dict[str, str]:
    """Bytes by axis, operation and link; the sums of a few numbers are left out."""
    sent: dict[str, float] = {}
    for collective in found.traffic:
        group = found.layout.group(collective.axis, cluster.per_node)
        link = "in a node" if group.nodes == 1 else "network"
        name = f"{collective.axis} {collective.operation}, {link}"
        sent[name] = sent.get(name, 0.0) + collective.bytes
    return {name: size(n_bytes) for name, n_bytes in sent.items() if n_bytes > 10_000}


def time_rows(s: PlanSettings, work: Work, found: Plan) -> dict[str, str]:
    flops = work.flops_per_token(found.layout) * s.batch_tokens / found.layout.size
    time = found.time
    return {
        "TFLOPs of a GPU": f"{flops / 1e12:,.1f}",
        "seconds": f"{time.expected:.3f}",
        "of these computing": f"{time.compute:.3f}",
        "all overlapped": f"{time.optimistic:.3f}",
        "none overlapped": f"{time.pessimistic:.3f}",
        "pipeline bubble": f"{time.bubble:.1%}",
    }


def run_rows(s: PlanSettings, cluster: Cluster, found: Plan) -> dict[str, str]:
    slow, fast = bounds(found)
    hours = s.budget / found.tokens_per_second / 3600
    rows = {
        "tokens/s": f"{found.tokens_per_second:,.0f}",
        "MFU": f"{found.mfu:.1%}",
        "MFU, bounds": f"{slow * found.mfu:.1%} to {fast * found.mfu:.1%}",
        f"days for {s.budget:.3g} tokens": f"{hours / 24:,.2f}",
    }
    if s.price:
        rows["cost"] = f"{hours * cluster.size * s.price:,.0f}"
    return rows


def bounds(found: Plan) -> tuple[float, float]:
    """Lowest and highest speed, as multiples of the expected one."""
    time = found.time
    return time.expected / time.pessimistic, time.expected / time.optimistic


def size(n_bytes: float) -> str:
    """1.2 GB, 340 MB, 16 B; a dash for nothing."""
    if not n_bytes:
        return "-"
    for unit, of_bytes in UNITS.items():
        if n_bytes >= of_bytes:
            return f"{n_bytes / of_bytes:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def table(columns: dict[str, Sections]) -> str:
    """Names on the left, a column for each plan. A dash where a plan has no such row."""
    lines = [("", list(columns))]
    first, *_ = columns.values()
    for title in first:
        parts = [sections[title] for sections in columns.values()]
        lines.append((title, []))
        names: dict[str, None] = {}
        for part in parts:
            names |= dict.fromkeys(part)
        for name in names:
            cells = [part.get(name, "-") for part in parts]
            lines.append((f"  {name}", cells))
    label = max(len(name) for name, _ in lines)
    width = 2 + max(len(cell) for _, cells in lines for cell in cells)
    texts = []
    for name, cells in lines:
        padded = [cell.rjust(width) for cell in cells]
        texts.append(name.ljust(label) + "".join(padded))
    return "\n".join(text.rstrip() for text in texts)


# --- the picture ----------------------------------------------------------------------------------


def draw(s: PlanSettings, work: Work, cluster: Cluster, plans: dict[str, Plan], out: Path) -> None:
    """Memory of a GPU, part by part, and tokens/s with its bounds, a bar for each layout."""
    fig, (memory, speed) = plots.figure(12, 2.0 + 0.62 * len(plans), columns=2)
    names = []
    found = []
    for name, each in reversed(plans.items()):  # the first bar is the lowest
        names.append(f"{name}\n{each.layout.describe()}")
        found.append(each)
    draw_memory(memory, names, found, cluster)
    draw_speed(speed, names, found)
    fig.suptitle(
        f"A plan: {work.parameters / 1e6:,.0f}M parameters on {cluster.size:,} x {s.gpu}, "
        f"steps of {s.batch_tokens:,} tokens"
    )
    plots.save(fig, out)


def draw_memory(ax: "Axes", names: list[str], plans: list[Plan], cluster: Cluster) -> None:
    parts = [memory_parts(found) for found in plans]
    left = [0.0] * len(plans)
    shown = []
    for part, colour in COLOURS.items():
        widths = [of_plan[part] / GB for of_plan in parts]
        bars = ax.barh(names, widths, left=left, label=part, height=0.6, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
        shown.append(bars)
    whole = cluster.gpu.memory / GB
    room = cluster.room / GB
    shown.append(ax.axvspan(room, whole, color="0.88", zorder=0, label="to be left free"))
    shown.append(ax.axvline(whole, color="black", lw=1, zorder=0, label="all of the GPU"))
    totals = []
    for found, total in zip(plans, left, strict=True):
        totals.append(f"{total:.3g}" if found.fits else f"{total:.3g}: too much")
    ax.bar_label(bars, totals, padding=4, fontsize=9)
    ax.set_xlim(0, 1.4 * max(whole, *left))  # the totals stand right of the bars
    ax.set(title="memory of a GPU", xlabel="GB")
    ax.figure.legend(
        handles=shown, loc="outside lower left", ncols=len(shown), frameon=False, fontsize=9
    )
    ax.tick_params(axis="y", labelsize=9)


def draw_speed(ax: "Axes", names: list[str], plans: list[Plan]) -> None:
    speeds = []
    below = []
    above = []
    for found in plans:
        speed = found.tokens_per_second / 1e3
        slow, fast = bounds(found)
        speeds.append(speed)
        below.append(speed * (1 - slow))
        above.append(speed * max(0.0, fast - 1))
    errors = [below, above]
    ax.barh(names, speeds, xerr=errors, height=0.6, capsize=3, color="#bcd2e8")
    ends = [speed + more for speed, more in zip(speeds, above, strict=True)]
    for name, end, found in zip(names, ends, plans, strict=True):
        ax.text(end, name, f"  MFU {found.mfu:.1%}", va="center", fontsize=9)
    ax.set_xlim(0, 1.3 * max(ends))
    ax.set(title="speed", xlabel="thousand tokens/s; line: none to all communication hidden")
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.set_yticks([])


if __name__ == "__main__":
    console.run(main)
