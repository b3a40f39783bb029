"""One loss curve: every parallel layout against one process, through the real training loops.

    python bench/parity.py                    all layouts, forms and precisions: takes long
    python bench/parity.py --reshard          save on each layout, go on on each other
    python bench/parity.py --only "PP 2" --columns tied --dtypes float64

Runs on the CPU with gloo. A cell holds the largest relative difference to one process over the
losses of all steps, and over the weights (worst tensor, ||a - b|| / ||b||). `attn.k.bias` of the
GPT-2 form is left out: softmax ignores a constant, so its gradient is zero but for rounding noise,
which Adam turns into steps of full size. Exits with 1 where a bound is passed.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import heading, parser, row, run_group  # noqa: E402

STEPS = 20
SAVED_AT = 10  # step of the checkpoints that --reshard resumes
RESUMED = 5  # steps behind it that are compared
TRAININGS = 8  # one after the other in one group of processes: each leaves gloo's threads behind


@dataclass(frozen=True)
class Layout:
    name: str
    processes: int
    settings: tuple[str, ...] = ()


ONE = Layout("one process", 1)
ACCUMULATION = Layout("accumulation", 1, ("micro_batch=1",))
DDP2 = Layout("DDP 2", 2, ("mesh.shard=1", "mesh.replicate=2"))
DDP4 = Layout("DDP 4", 4, ("mesh.shard=1", "mesh.replicate=4"))
FSDP2 = Layout("FSDP 2", 2, ("mesh.shard=2",))
FSDP4 = Layout("FSDP 4", 4, ("mesh.shard=4",))
HSDP = Layout("HSDP 2x2", 4, ("mesh.replicate=2", "mesh.shard=2"))
TP2 = Layout("TP 2", 2, ("mesh.tp=2",))
TP2_SEQUENCE = Layout("TP 2, sequence", 2, ("mesh.tp=2", "mesh.sequence=true"))
TP2_FSDP2 = Layout("TP 2 x FSDP 2", 4, ("mesh.tp=2", "mesh.shard=2"))
GPIPE = Layout("PP 2, GPipe", 2, ("mesh.pp=2", "mesh.schedule=gpipe"))
PP2 = Layout("PP 2, 1F1B", 2, ("mesh.pp=2",))
INTERLEAVED = Layout("PP 2, interleaved", 2, ("mesh.pp=2", "mesh.schedule=interleaved"))
PP2_TP2 = Layout("PP 2 x TP 2", 4, ("mesh.pp=2", "mesh.tp=2"))
PP2_FSDP2 = Layout("PP 2 x FSDP 2", 4, ("mesh.pp=2", "mesh.shard=2"))

LAYOUTS = [
    ACCUMULATION,
    DDP2,
    FSDP2,
    HSDP,
    TP2,
    TP2_SEQUENCE,
    TP2_FSDP2,
    GPIPE,
    PP2,
    INTERLEAVED,
    PP2_TP2,
    PP2_FSDP2,
]
RESHARDED = [ONE, DDP2, FSDP4, HSDP, TP2, TP2_FSDP2, PP2, PP2_TP2]
# dropout draws per data rank: layouts with the same data ranks have the same masks
WITH_DROPOUT = [(FSDP2, DDP2), (HSDP, DDP4), (FSDP4, DDP4)]

SHAPE = ("model.n_layer=4", "model.n_head=4", "model.n_embd=32", "model.block_size=32")
FORMS = {
    "tied": ("model.n_kv_head=2",),
    "untied": (
        "model.n_kv_head=2",
        "model.tie_weights=false",
        "init=bigrams",
        "negatives=1000000",  # none is left out: sampling draws nothing that could differ
    ),
    "GPT-2 form": (
        "model.pos=learned",
        "model.norm=layernorm",
        "model.mlp=gelu",
        "model.qk_norm=false",
        "model.bias=true",
    ),
    "1 K/V head": ("model.n_kv_head=1",),
}
HEADS = {
    "classifier": ("pool=last",),
    "classifier, mean, LM loss": ("pool=mean", "lm_weight=0.5"),
}
# largest relative differences of losses and of weights; None = not compared: float32 noise grows
BOUNDS = {"float64": (1e-12, 1e-9), "float32": (1e-4, None)}


@dataclass(frozen=True)
class Job:
    """One training."""

    script: str  # train_fsdp or sentiment_train
    layout: Layout
    settings: tuple[str, ...]
    folder: str

    @property
    def arguments(self) -> list[str]:
        return [*self.settings, *self.layout.settings, f"run={self.folder}"]


def name_of(*words: str) -> str:
    """The folder of a run."""
    return re.sub(r"[^a-z0-9]+", "_", " ".join(words).lower())


# --- what is trained ------------------------------------------------------------------------------


def write_corpus(folder: Path) -> None:
    """Chats and labelled texts, made up: what they say does not matter."""
    draw = random.Random(0)
    words = "the a red blue green cat dog runs sleeps eats here there and not very good bad".split()
    chats, rows = [], ["Text,Sentiment"]
    for _ in range(600):
        turns = [" ".join(draw.choices(words, k=draw.randint(2, 9))) for _ in range(2)]
        chats.append("\n".join(turns))
    for number in range(200):
        text = " ".join(draw.choices(words, k=draw.randint(2, 7)))
        rows.append(f"{text} {number},{draw.choice(['good', 'bad'])}")
    (folder / "chat.txt").write_text("\n\n".join(chats), encoding="utf-8")
    (folder / "reviews.csv").write_text("\n".join(rows), encoding="utf-8")


def pretraining(folder: Path, dtype: str) -> tuple[str, ...]:
    """20 steps of 16 sequences, with clipping that acts."""
    return (
        "device=cpu",
        f"dtype={dtype}",
        "compile=false",
        f"max_steps={STEPS}",
        "batch_tokens=512",
        "micro_batch=4",
        "eval_every=10",
        f"save_every={SAVED_AT}",
        "log_every=1",
        "keep=100",
        "prompts=[hi]",
        f"data.path={folder / 'chat.txt'}",
        f"data.cache={folder / 'tokens'}",
        "data.eval_blocks=8",
        "data.val_fraction=0.1",
        f"out_dir={folder / 'runs'}",
        *SHAPE,
        "optim.lr=0.01",
        "optim.warmup=2",
        "optim.clip=0.5",
        "sample.max_tokens=2",
    )


def finetuning(folder: Path, dtype: str, trunk: str) -> tuple[str, ...]:
    return (
        "device=cpu",
        f"dtype={dtype}",
        f"max_steps={STEPS}",
        "batch_size=16",
        "micro_tokens=128",
        "eval_every=10",
        "log_every=1",
        f"trunk={folder / 'runs' / trunk}",
        f"data.path={folder / 'reviews.csv'}",
        f"out_dir={folder / 'runs'}",
        "dropout=0",
        "optim.lr=0.003",
        "optim.warmup=2",
        "optim.clip=0.5",
    )


# --- training -------------------------------------------------------------------------------------


def work(jobs_file: str) -> int:
    """In each process of a group: one training after the other."""
    import sentiment_train
    import train
    import train_fsdp
    from smallgpt import settings
    from smallgpt.parallel.layout import MeshSpread
    from smallgpt.parallel.world import start

    status = 0
    with start("cpu") as world:
        for script, arguments in json.loads(Path(jobs_file).read_text(encoding="utf-8")):
            if script == "sentiment_train":
                s = settings.load(sentiment_train.SentimentSettings, arguments)
                status |= sentiment_train.finetune(s, world)
            else:
                s = settings.load(train_fsdp.MeshTrainSettings, arguments)
                status |= train.train(s, world, MeshSpread(world, s.mesh))
    return status


def run(jobs: list[Job], folder: Path) -> None:
    """All trainings, a few on as many processes in one group. Stops at one that fails."""
    groups: dict[int, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.layout.processes, []).append(job)
    with tqdm(total=len(jobs), unit=" trainings", mininterval=1) as progress:
        for processes, members in sorted(groups.items()):
            for first in range(0, len(members), TRAININGS):
                together = members[first : first + TRAININGS]
                run_together(processes, together, folder)
                progress.update(len(together))


def run_together(processes: int, jobs: list[Job], folder: Path) -> None:
    """These trainings, one after the other, in one group of processes."""
    jobs_file = folder / f"jobs{processes}.json"
    mine = [(job.script, job.arguments) for job in jobs]
    jobs_file.write_text(json.dumps(mine), encoding="utf-8")
    run_group(processes, [__file__, "--worker", str(jobs_file)])


# --- comparing ------------------------------------------------------------------------------------


def losses(run_folder: Path) -> dict[tuple[str, int], float]:
    """(split, step) -> loss."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {(r["split"], r["step"]): r["loss"] for r in map(json.loads, lines)}


def loss_difference(a: Path, b: Path) -> float:
    """The largest relative difference of any loss of a from that of b."""
    x, y = losses(a), losses(b)
    if x.keys() != y.keys():
        sys.exit(f"{a.name} has other steps than {b.name}")
    return max(abs(x[key] - y[key]) / abs(y[key]) for key in y)


def last_step(run_folder: Path) -> Path:
    """Its newest step folder."""
    return run_folder / (run_folder / "latest").read_text(encoding="utf-8").strip()


def weight_difference(a: Path, b: Path) -> float:
    """||a - b|| / ||b|| of the tensor where it is largest."""
    from safetensors.torch import load_file

    x, y = (load_file(last_step(run) / "model.safetensors") for run in (a, b))
    if x.keys() != y.keys():
        sys.exit(f"{a.name} has other weights than {b.name}")
    kept = [name for name in y if not name.endswith("attn.k.bias")]
    return max(float((x[name] - y[name]).norm() / y[name].norm()) for name in kept)


class Table:
    """A table in Markdown, whose cells are compared with bounds."""

    def __init__(self, corner: str, columns: list[str]):
        self.lines = [heading([corner, *columns])]
        self.passed = 0  # bounds that were

    def row(self, name: str, cells: list[str]) -> None:
        self.lines.append(row([name, *cells]))

    def cell(self, value: float, bound: float) -> str:
        self.passed += not value <= bound
        return f"{value:.0e}" if value <= bound else f"**{value:.0e} > {bound:.0e}**"

    def __str__(self) -> str:
        return "\n".join(self.lines)


def difference(table: Table, a: Path, b: Path, dtype: str) -> str:
    """A cell: losses, and weights where they have a bound."""
    loss_bound, weight_bound = BOUNDS[dtype]
    found = table.cell(loss_difference(a, b), loss_bound)
    if weight_bound:
        found += " / " + table.cell(weight_difference(a, b), weight_bound)
    return found


# --- the three tables -----------------------------------------------------------------------------


def job_of(folder: Path, layout: Layout, column: str, dtype: str) -> Job:
    """The training of a cell."""
    name = name_of(layout.name, column, dtype)
    if column in FORMS:
        return Job("train_fsdp", layout, pretraining(folder, dtype) + FORMS[column], name)
    trunk = name_of(ONE.name, "tied", dtype)
    return Job("sentiment_train", layout, finetuning(folder, dtype, trunk) + HEADS[column], name)


def compare_layouts(
    folder: Path, layouts: list[Layout], columns: list[str], dtypes: list[str]
) -> list[Table]:
    """Every layout against one process, pretraining and classifier."""
    jobs = []
    for dtype in dtypes:
        for column in dict.fromkeys(["tied", *columns]):  # the classifiers' trunk comes first
            jobs.append(job_of(folder, ONE, column, dtype))
        for layout in layouts:
            for column in columns:
                if layout != ACCUMULATION or column in FORMS:  # micro_tokens cuts a classifier's
                    jobs.append(job_of(folder, layout, column, dtype))
    run(jobs, folder)
    tables = []
    for dtype in dtypes:
        table = Table(f"{dtype}: losses / weights", columns)
        for layout in layouts:
            cells = []
            for column in columns:
                if layout == ACCUMULATION and column in HEADS:
                    cells.append("")
                    continue
                found, one = (name_of(x.name, column, dtype) for x in (layout, ONE))
                runs = folder / "runs"
                cells.append(difference(table, runs / found, runs / one, dtype))
            table.row(layout.name, cells)
        tables.append(table)
    return tables


def compare_dropout(folder: Path) -> Table:
    """Layouts with the same data ranks draw the same masks of dropout."""
    jobs = {}
    for pair in WITH_DROPOUT:
        for layout in pair:
            settings = (*pretraining(folder, "float64"), *FORMS["tied"], "model.dropout=0.2")
            name = name_of(layout.name, "dropout")
            jobs[name] = Job("train_fsdp", layout, settings, name)
    run(list(jobs.values()), folder)
    table = Table("dropout 0.2, float64", ["against", "losses / weights"])
    for layout, other in WITH_DROPOUT:
        found, reference = (folder / "runs" / name_of(x.name, "dropout") for x in (layout, other))
        cell = difference(table, found, reference, "float64")
        table.row(layout.name, [other.name, cell])
    return table


def compare_resharding(folder: Path, layouts: list[Layout]) -> Table:
    """Save on each layout (rows), go on on each other (columns), as one process would have."""
    settings = pretraining(folder, "float64") + FORMS["tied"]
    jobs = [Job("train_fsdp", layout, settings, name_of(layout.name)) for layout in layouts]
    run(jobs, folder)
    jobs = []
    for before in layouts:
        saved = folder / "runs" / name_of(before.name) / f"step-{SAVED_AT:08d}"
        for after in layouts:
            arguments = (*settings, f"resume={saved}", "save_every=100")
            name = name_of(before.name, "to", after.name)
            jobs.append(Job("train_fsdp", after, arguments, name))
    run(jobs, folder)
    truth = losses(folder / "runs" / name_of(ONE.name))
    compared = [("train", SAVED_AT + 1 + number) for number in range(RESUMED)]
    table = Table("saved on \\ resumed on", [layout.name for layout in layouts])
    for before in layouts:
        cells = []
        for after in layouts:
            found = losses(folder / "runs" / name_of(before.name, "to", after.name))
            worst = max(abs(found[key] - truth[key]) / truth[key] for key in compared)
            cells.append(table.cell(worst, 1e-12))
        table.row(before.name, cells)
    return table


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--only", nargs="*", metavar="LAYOUT", help="begin of a layout's name")
    columns = [*FORMS, *HEADS]
    p.add_argument("--columns", nargs="*", metavar="COLUMN", choices=columns, default=columns)
    p.add_argument("--dtypes", nargs="*", metavar="DTYPE", choices=BOUNDS, default=list(BOUNDS))
    p.add_argument("--reshard", action="store_true", help="save on each layout, resume on each")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        return work(args.worker)
    layouts = RESHARDED if args.reshard else LAYOUTS
    if args.only:
        layouts = [x for x in layouts if x.name.startswith(tuple(args.only))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        if args.reshard:
            tables = [compare_resharding(folder, layouts)]
        else:
            tables = compare_layouts(folder, layouts, args.columns, args.dtypes)
            if not args.only:
                tables.append(compare_dropout(folder))
    print("\n\n".join(map(str, tables)))
    return min(1, sum(table.passed for table in tables))


if __name__ == "__main__":
    sys.exit(main())
