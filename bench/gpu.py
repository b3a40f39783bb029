"""Everything that a machine with one CUDA GPU is asked, within a time budget; nothing is fetched.

    python bench/gpu.py --nanogpt ~/nanoGPT --corpus chats.txt     nine minutes
    python bench/gpu.py --dry                                      a rehearsal on a CPU, tiny

Each part is a command, which can also be given by hand. A part that no time is left for is named.
The folder --out holds report.md, with the tables, and results.json, with all samples, written anew
after each part, and what the parts have made.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from bench.common import ROOT, heading, parser, row, torchrun, write_chats  # noqa: E402
from smallgpt import console  # noqa: E402
from smallgpt.console import UserError  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A model, and the sequences of a step."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    rows: int

    def model(self) -> dict[str, int]:
        sizes = asdict(self)
        del sizes["rows"]
        return sizes

    def options(self) -> list[str]:
        """Those that bench/*.py share."""
        return [f"--{name.replace('_', '-')}={size}" for name, size in self.model().items()]

    def settings(self) -> list[str]:
        """Those of train.py."""
        tokens = self.rows * self.block_size
        model = [f"model.{name}={size}" for name, size in self.model().items()]
        return [*model, f"batch_tokens={tokens}", f"micro_batch={self.rows}"]


@dataclass(frozen=True)
class Plan:
    """How much each part does: its own options."""

    device: str
    training: dict[str, Shape]  # with the sequences that 80 GB hold of every contender
    replying: Shape
    common: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    shard: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()  # changes of the settings that the time to quality trains with
    quality: tuple[str, ...] = ()
    profile: tuple[str, ...] = ()
    patience: int = 2  # a part is ended after so many times the seconds that it takes


TINY = Shape(2, 2, 32, 64, 400, rows=2)
DRY = Plan(
    "cpu",
    {"tiny": TINY},
    TINY,
    common=("--device=cpu", "--eager"),
    train=("--rounds=1", "--steps=1"),
    shard=("--rounds=1", "--steps=1"),
    decode=("--rounds=1", "--prompt=8", "--new=8"),
    recipe=(
        "compile=false",
        "batch_tokens=128",
        "model.n_layer=2",
        "model.n_head=2",
        "model.n_embd=32",
        "model.block_size=64",
        "tokenizer.vocab_size=320",
    ),
    quality=("--device=cpu", "--steps=10"),
    profile=("--mode=eager", "--steps=1"),
    patience=10,  # the CPU may be busy
)
REAL = Plan(
    "cuda",
    {
        "90M": Shape(12, 12, 768, 256, 8000, rows=64),
        "300M": Shape(26, 15, 960, 256, 8000, rows=64),
        "GPT-2 medium": Shape(24, 16, 1024, 1024, 50_304, rows=8),
    },
    Shape(12, 12, 768, 1024, 8000, rows=1),
    common=("--device=cuda",),
    train=("--rounds=5", "--steps=10"),
    shard=("--rounds=5", "--steps=10"),
    decode=("--rounds=3", "--dtype=bfloat16"),
    quality=("--device=cuda", "--minutes=1"),
    profile=("--detail",),
)


@dataclass(frozen=True)
class Part:
    """Something to measure, by a command that prints a table in Markdown."""

    name: str
    seconds: int  # that it takes on a fast GPU, about: with less time left it is not begun
    command: tuple[str, ...]  # what follows `python`
    why_not: str = ""  # it is left out, for this reason
    writes_json: bool = True  # where --json FILE says
    is_plain: bool = False  # prints plain text


@dataclass
class Outcome:
    """What became of a part."""

    part: Part
    state: str  # done, failed, cut off, left out
    seconds: float = 0.0
    why: str = ""
    text: str = ""  # what it printed
    result: object = None  # what it wrote

    @property
    def sentence(self) -> str:
        return f"{self.state}: {self.why}" if self.why else self.state

    def markdown(self) -> str:
        text = f"```\n{self.text}\n```" if self.part.is_plain and self.text else self.text
        command = shlex.join(["python", *self.part.command])
        head = f"## {self.part.name}\n\n```\n{command}\n```"
        return f"{head}\n\n{self.sentence} ({self.seconds:.0f} s)\n\n{text}".rstrip()

    def record(self) -> dict:
        return {
            "command": shlex.join(["python", *self.part.command]),
            "state": self.state,
            "why": self.why,
            "seconds": round(self.seconds, 1),
            "text": self.text,
            "result": self.result,
        }


# --- the parts ------------------------------------------------------------------------------------


def fitting(shape: Shape) -> Shape:
    """The shape with half the sequences, or a quarter, where this GPU has less than 80 GB."""
    if not torch.cuda.is_available():
        return shape
    memory = torch.cuda.get_device_properties(0).total_memory
    rows = shape.rows
    while rows > 1 and rows > shape.rows * memory / 75e9:
        rows //= 2
    return replace(shape, rows=rows)


def training(name: str, shape: Shape, plan: Plan, against: tuple[str, ...]) -> Part:
    """Throughput, MFU and peak memory beside Hugging Face and nanoGPT."""
    fits = fitting(shape)
    options = (*fits.options(), f"--batch={fits.rows}", *plan.train)
    return Part(f"training, {name}", 100, ("bench/pretrain.py", *plan.common, *against, *options))


def decoding(plan: Plan, against: tuple[str, ...]) -> Part:
    """Tokens per second of a reply."""
    options = (*plan.replying.options(), *plan.decode)
    return Part("decoding", 40, ("bench/decode.py", *plan.common, *against, *options))


def sharding(plan: Plan) -> Part:
    """FSDP2 on one GPU, with the first shape."""
    fits = fitting(next(iter(plan.training.values())))
    options = (*fits.options(), f"--batch={fits.rows}", *plan.shard)
    return Part("FSDP2", 45, (*torchrun(1)[1:], "bench/fsdp.py", *plan.common, *options))


def time_to_quality(
    args: argparse.Namespace, plan: Plan, against: tuple[str, ...], folder: Path
) -> Part:
    """Held-out bits per byte against time."""
    script = "bench/time_to_quality.py"
    shutil.rmtree(ROOT / folder / "quality", ignore_errors=True)  # it would go on from there
    why_not = ""
    if not args.corpus:
        why_not = "no --corpus was given"
    elif not (ROOT / script).exists():
        why_not = f"{script} is not there"
    rival = "nanogpt-bpe" if args.nanogpt else "gpt2"
    data = (f"data.path={from_root(args.corpus or 'FILES')}", f"data.cache={folder}/tokens")
    options = (*plan.quality, *against, f"--out={folder}/quality")
    settings = (args.config, *data, *plan.recipe)
    command = (script, *settings, "--contenders", "ours", rival, *options)
    return Part("time to quality", 240, command, why_not, writes_json=False)


def profiling(plan: Plan, folder: Path) -> Part:
    """Where the time of a step of the first shape goes."""
    corpus = folder / "letters.txt"
    write_chats(ROOT / corpus)
    shape = fitting(next(iter(plan.training.values())))
    data = (f"data.path={corpus}", f"data.cache={folder}/tokens", f"device={plan.device}")
    command = ("bench/step_profile.py", *shape.settings(), *data, *plan.profile)
    return Part("profile", 60, command)


def all_parts(args: argparse.Namespace, plan: Plan, folder: Path) -> list[Part]:
    """In order of what they are worth."""
    pytest = ("-m", "pytest", "-q", "-rfEs", "--tb=short", "-m", "gpu", "tests/test_gpu.py")
    against = (f"--nanogpt={from_root(args.nanogpt)}",) if args.nanogpt else ()
    trainings = [training(name, shape, plan, against) for name, shape in plan.training.items()]
    return [
        Part("tests", 90, pytest, writes_json=False, is_plain=True),
        *trainings[:2],
        sharding(plan),
        decoding(plan, against),
        time_to_quality(args, plan, against, folder),
        *trainings[2:],
        profiling(plan, folder),
    ]


# --- running them ---------------------------------------------------------------------------------


def run(part: Part, left: float, folder: Path, patience: int = 2) -> Outcome:
    """Run a part, if there is time."""
    if part.why_not:
        return Outcome(part, "left out", why=part.why_not)
    if left < part.seconds:
        why = f"{left:.0f} s were left of the budget, and it takes about {part.seconds}"
        return Outcome(part, "left out", why=why)
    file = folder / "result.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, *part.command]
    if part.writes_json:
        command += ["--json", str(file)]
    limit = min(left, patience * part.seconds)
    began = time.monotonic()
    with open(folder / "errors", "w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            start_new_session=True,
        )
        text, is_late = wait(process, limit)
        errors.seek(0)
        said = errors.read().strip()
    outcome = Outcome(part, "done", time.monotonic() - began, text=text.strip())
    if is_late:
        outcome.state = "cut off"
        outcome.why = f"it took more than {limit:.0f} s"
    elif process.returncode:
        outcome.state = "failed"
        outcome.why = said.splitlines()[-1] if said else f"exit status {process.returncode}"
    if outcome.state != "done":
        print(said[-3000:], file=sys.stderr)
    if file.exists():
        outcome.result = json.loads(file.read_text(encoding="utf-8"))
    return outcome


def wait(process: subprocess.Popen, limit: float) -> tuple[str, bool]:
    """What a process prints until its end, and whether it had to be ended: after so many seconds,
    or because this one was."""
    try:
        text, _ = process.communicate(timeout=limit)
        return text, False
    except subprocess.TimeoutExpired:
        return stop(process), True
    except BaseException:
        stop(process)
        raise


def stop(process: subprocess.Popen) -> str:
    """End it and its children; torchrun's have a group of their own, and end when they are told."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        text, _ = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    return text


def describe_machine(device: str) -> str:
    name = "CPU"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    python = platform.python_version()
    return f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}, Python {python}"


def write(folder: Path, machine: str, outcomes: list[Outcome]) -> None:
    """What is known so far."""
    date = time.strftime("%Y-%m-%d")
    rows = [row((x.part.name, x.sentence, f"{x.seconds:.0f}")) for x in outcomes]
    table = "\n".join([heading(("part", "outcome", "s")), *rows])
    sections = [f"# {machine}; {date}", table, *(outcome.markdown() for outcome in outcomes)]
    record = {
        "machine": machine,
        "date": date,
        "parts": {outcome.part.name: outcome.record() for outcome in outcomes},
    }
    (folder / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def from_root(path: str) -> str:
    """A path that the user has given, as the parts read it, which run in the repository's root."""
    whole = Path(path).expanduser().absolute()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    p.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT to measure against")
    p.add_argument("--corpus", metavar="FILES", help="chats, for the time to quality")
    p.add_argument("--config", default="config/speedrun_gpu.yaml", help="what is trained on them")
    p.add_argument("--out", metavar="FOLDER", default=f"{ROOT}/checkpoints/gpu")
    p.add_argument("--dry", action="store_true", help="tiny, on a CPU: do all parts run?")
    args = p.parse_args()
    if not args.dry and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here: --dry rehearses all parts on a CPU")
    plan = DRY if args.dry else REAL
    machine = describe_machine(plan.device)
    end = time.monotonic() + 60 * args.minutes
    folder = Path(from_root(args.out))
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for part in all_parts(args, plan, folder):
        print(f"{part.name} ...", file=sys.stderr)
        outcome = run(part, end - time.monotonic(), ROOT / folder, plan.patience)
        outcomes.append(outcome)
        print(f"{outcome.markdown()}\n", flush=True)
        write(ROOT / folder, machine, outcomes)
    print(f"written: {folder}/report.md, {folder}/results.json")
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    console.run(main)
