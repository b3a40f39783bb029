"""What the benchmarks share: contenders, each in a process of its own, timed in alternating rounds.

Every contender is built and warmed up once (compilation included), then sleeps on its pipe until
the parent asks for a timed round; the parent asks one at a time, in turn. So a machine that slows
down slows all of them, and the ratio of two contenders, taken round by round, stays comparable
where their speeds do not.

For a GPU they are warmed up side by side, which is the work of CPU cores; its memory must hold all
of them.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

# No torch here: a child's ru_maxrss begins at the memory of the process that started it, so the
# parent stays small.

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# our settings of GPT-2's architecture, as nanoGPT has it: without biases
GPT2_FORM = {
    "pos": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "qk_norm": False,
    "bias": False,
    "tie_weights": True,
}


class Skip(Exception):
    """A contender that cannot run here; the message says why."""


@dataclass
class Contender:
    """One timed thing. `tokens` (or examples) are those of one call of `round`."""

    round: Callable[[], None]
    tokens: int
    precision: str
    compiled: bool
    why: str  # of the precision and of the compilation


def parser(doc: str) -> argparse.ArgumentParser:
    """Options, with the page of a benchmark as its --help."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_shape(p: argparse.ArgumentParser) -> None:
    """The options of a model."""
    p.add_argument("--n-layer", type=int, default=6)
    p.add_argument("--n-head", type=int, default=6)
    p.add_argument("--n-embd", type=int, default=384)
    p.add_argument("--block-size", type=int, default=256)
    p.add_argument("--vocab-size", type=int, default=8000)


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options of the benchmarks that have contenders."""
    p = parser(doc)
    add_shape(p)
    p.add_argument("--rounds", type=int, default=5, help="timed rounds of each contender")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--eager", action="store_true", help="nobody is compiled")
    p.add_argument("--nanogpt", metavar="PATH", help="a checkout of nanoGPT to measure against")
    p.add_argument("--json", metavar="FILE", help="write every sample and the machine here")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    p.set_defaults(unit="tokens", trains=False)
    return p


def shape(args: argparse.Namespace) -> dict[str, int]:
    """The shape under the names that this project and nanoGPT share."""
    return {
        k: getattr(args, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    }


def flops_per_token(args: argparse.Namespace) -> int:
    """Floating-point operations of forward and backward per token: 6 for each weight of a matrix,
    and the attention scores (PaLM, appendix B). The same for every contender."""
    block = 12 * args.n_embd**2
    matrix_weights = args.n_layer * block + args.vocab_size * args.n_embd
    attention_scores = 12 * args.n_layer * args.n_embd * args.block_size
    return 6 * matrix_weights + attention_scores


def import_nanogpt(path: str):
    """nanoGPT's model.py under another name than ours."""
    file = Path(path) / "model.py"
    if not file.exists():
        raise Skip(f"{file} is not there")
    spec = util.spec_from_file_location("nanogpt_model", file)
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def gpt2_config(args, **options):
    """transformers' GPT-2 of the shape of args (or of a GPTConfig), with fused attention."""
    try:
        from transformers import GPT2Config
    except ImportError:
        raise Skip("the package transformers is not installed") from None

    sizes = shape(args)
    sizes["n_positions"] = sizes.pop("block_size")
    ends = {"bos_token_id": 0, "eos_token_id": None}
    return GPT2Config(attn_implementation="sdpa", **sizes, **ends, **options)


def gpt2_of_hugging_face(args, dropout: float = 0.0):
    """GPT2LMHeadModel of this shape. Its biases cannot be turned off."""
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = gpt2_config(args, **dropouts)
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(config)


def training_step(strategy, optimizers: list, s, at: int, batches: list, targets: int) -> float:
    """Step `at` of train.py on micro-batches with so many targets; s: OptimSettings. Returns the
    loss."""
    from smallgpt.optim import check_finite, lr_factor, set_lr, update

    set_lr(optimizers, lr_factor(at, 1000, s))
    nats = strategy.forward_backward(batches, lambda run, inputs: run(*inputs), 1 / targets)
    norm = strategy.clip(optimizers, s.clip)
    loss = float(nats) / targets
    norm = float(norm)
    check_finite(loss, norm, strategy.scaler, at, 0)
    update(optimizers, strategy.scaler, norm)
    return loss


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor()


def write_chats(file: Path) -> None:
    """Chats of random letters: what they say does not matter."""
    draw = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz "
    chats = ["".join(draw.choices(alphabet, k=200)) for _ in range(10_000)]
    file.write_text("\n\n".join(chats), encoding="utf-8")


def torchrun(processes: int) -> list[str]:
    """The beginning of a command on so many processes of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *launcher]


def run_group(processes: int, words: list[str], threads: int = 1) -> None:
    """Run a script on so many processes with so many threads each, 0 = PyTorch's default. Exits if
    it fails."""
    env = dict(os.environ)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    command = [*torchrun(processes), *words]
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed on {processes} process(es)")


def memory_of_this(name: str) -> float:
    """MiB of this process: VmRSS, which it holds, or VmHWM, at most so far. Linux only."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kibibytes, *_ = status.partition(f"{name}:")[2].split()
    return int(kibibytes) / 1024


def numbers_of(*words: str) -> list[float]:
    """The numbers that a script prints, run in a process of its own."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return list(map(float, done.stdout.split()))


# --- tables in Markdown


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def heading(titles: Sequence[str]) -> str:
    """The first row of a table, and the rule below it."""
    return f"{row(titles)}\n{row(['---'] * len(titles))}"


def spread(values: list[float], form: str = ",.0f", unit: str = "") -> str:
    """1,234 (1,200 to 1,260): the median of the rounds, and their range."""
    middle = statistics.median(values)
    return f"{middle:{form}}{unit} ({min(values):{form}} to {max(values):{form}})"


# --- in the process of a contender


def serve(args: argparse.Namespace, build: Callable[[argparse.Namespace], Contender]) -> None:
    """Build and warm up one contender, then run a timed round for each line on stdin; answers are
    JSON lines."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is not an answer

    def say(**what) -> None:
        print(json.dumps(what), file=answers, flush=True)

    import torch

    from smallgpt import hardware

    cuda = args.device == "cuda"
    torch.manual_seed(0)
    began = time.perf_counter()
    try:
        c = build(args)
        c.round()
    except Skip as e:
        say(skipped=str(e))
        return
    except torch.OutOfMemoryError:
        say(skipped="the GPU's memory does not hold it beside the others")
        return
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    device = torch.device(args.device)
    machine = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "peak_flops": hardware.peak_flops(device, torch.bfloat16),
    }
    say(
        tokens=c.tokens,
        precision=c.precision,
        compiled=c.compiled,
        why=c.why,
        machine=machine,
        warmup_seconds=time.perf_counter() - began,
    )
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        c.round()
        if cuda:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes, and KiB on Linux
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        say(
            seconds=seconds,
            cpu_seconds=cpu,
            peak_rss=rss,
            peak_cuda=torch.cuda.max_memory_allocated() if cuda else 0,
        )


# --- in the parent


class Worker:
    """The parent's end of one contender."""

    def __init__(self, name: str):
        self.name = name
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, *sys.argv, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            encoding="utf-8",
        )
        self.about: dict = {}
        self.samples: list[dict] = []

    def warm_up(self) -> None:
        """Wait until it is warm, or is skipped."""
        print(f"warming up {self.name} ...", file=sys.stderr)
        self.about = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            sys.exit(f"{self.log.read()}\nerror: {self.name} has died")
        return json.loads(line)

    def timed_round(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.samples.append(self.answer())

    def speeds(self) -> list[float]:
        """Tokens per second of each round."""
        return [self.about["tokens"] / s["seconds"] for s in self.samples]


def utilisation(worker: Worker, args: argparse.Namespace) -> float:
    """Share of the hardware's peak that its median speed is (MFU); 0 = the peak is unknown."""
    peak = worker.about["machine"]["peak_flops"]
    speed = statistics.median(worker.speeds())
    return speed * flops_per_token(args) / peak if peak else 0.0


def table(workers: list[Worker], args: argparse.Namespace) -> str:
    """A Markdown table. The ratio is that of the first contender to each, within the same round.
    Training on a GPU whose peak is known has a column of utilisation."""
    ours = workers[0].speeds()
    has_mfu = args.trains and utilisation(workers[0], args) > 0
    heads = [
        "contender",
        "precision",
        "compiled",
        f"{args.unit}/s: median (min to max)",
        f"{workers[0].name} is faster by: median (min to max)",
        *(["MFU"] if has_mfu else []),
        "peak memory",
        "why",
    ]
    lines = [heading(heads)]
    for w in workers:
        speed, about, last = w.speeds(), w.about, w.samples[-1]
        ratio = [x / y for x, y in zip(ours, speed, strict=True)]
        memory = last["peak_cuda"] if args.device == "cuda" else last["peak_rss"]
        cells = [
            w.name,
            about["precision"],
            "yes" if about["compiled"] else "no",
            spread(speed),
            spread(ratio, ".2f", "x"),
            *([f"{utilisation(w, args):.1%}"] if has_mfu else []),
            f"{memory / 2**20:,.0f} MiB",
            about["why"],
        ]
        lines.append(row(cells))
    return "\n".join(lines)


def compete(
    args: argparse.Namespace, *groups: dict[str, Callable[[argparse.Namespace], Contender]]
) -> None:
    """As the parent: start all, alternate, print a table for each group, write the JSON. As a
    worker: serve."""
    contenders = {}
    for group in groups:
        contenders |= group
    if args.worker:
        return serve(args, contenders[args.worker])
    workers, skipped = start(list(contenders), side_by_side=args.device == "cuda")
    load = [os.getloadavg()]
    alternate(workers, args.rounds)
    load.append(os.getloadavg())
    print(f"\n{conditions(workers[0].about['machine'], args.rounds, load)}")
    for group in groups:
        members = [w for w in workers if w.name in group]
        if members:
            print(f"\n{table(members, args)}")
    for name, why in skipped.items():
        print(f"\n{name}: skipped, {why}")
    if args.json:
        result = record(args, workers, skipped, load)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    finish(workers)


def finish(workers: list[Worker]) -> None:
    """End them: the end of its input ends a worker. All at once, as it can take seconds."""
    for worker in workers:
        worker.process.stdin.close()
    for worker in workers:
        worker.process.wait()


def start(names: list[str], side_by_side: bool) -> tuple[list[Worker], dict[str, str]]:
    """The workers that can run, warmed up; and why the others are skipped. Exits if none can."""
    started = []
    for name in names:
        worker = Worker(name)
        started.append(worker)
        if not side_by_side:
            worker.warm_up()
    workers = []
    skipped = {}
    for worker in started:
        if side_by_side:
            worker.warm_up()
        if "skipped" in worker.about:
            skipped[worker.name] = worker.about["skipped"]
        else:
            workers.append(worker)
    if not workers:
        sys.exit("\n".join(f"{name}: skipped, {why}" for name, why in skipped.items()))
    return workers, skipped


def alternate(workers: list[Worker], rounds: int) -> None:
    """Let each worker run its rounds, in turn."""
    for i in range(rounds):
        print(f"round {i + 1} of {rounds}", file=sys.stderr)
        first = i % len(workers)  # nobody always runs after the same neighbour
        for worker in workers[first:] + workers[:first]:
            worker.timed_round()


def conditions(machine: dict, rounds: int, load: list[tuple[float, float, float]]) -> str:
    """The machine and its load, as a line above the tables."""
    before, after = load[0][0], load[1][0]
    return (
        f"{machine['device']}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['cpu_capability']}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}; {rounds} alternating rounds; "
        f"load average {before:.1f} before, {after:.1f} after "
        "(above the threads: others used the machine)"
    )


def record(
    args: argparse.Namespace,
    workers: list[Worker],
    skipped: dict[str, str],
    load: list[tuple[float, float, float]],
) -> dict:
    """What the JSON file holds: every sample, the options and the machine."""
    found = {}
    for worker in workers:
        about = dict(worker.about)
        about.pop("machine")
        found[worker.name] = {
            **about,
            "tokens_per_second": worker.speeds(),
            "samples": worker.samples,
        }
    options = dict(vars(args))
    for name in ("worker", "json", "nanogpt"):  # the path of someone's checkout is left out
        options.pop(name)
    return {
        "benchmark": Path(sys.argv[0]).stem,
        "time": time.time(),
        "options": options,
        "machine": workers[0].about["machine"],
        "load_before_and_after": load,
        "contenders": found,
        "skipped": skipped,
    }
