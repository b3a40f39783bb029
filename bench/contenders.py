"""The contenders of bench/time_to_quality.py: what each one runs, and what it needs before."""

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from bench.stopwatch import ROOT, Phrases, Point, Program, Stopwatch
from bench.workers import Preparation
from model import GPTConfig
from smallgpt import files, hardware, settings
from smallgpt.console import UserError
from smallgpt.optim import OptimSettings
from smallgpt.parallel.strategy import share_batch
from smallgpt.weights.gpt2 import FORM
from train import TrainSettings

FOREVER = 10**6  # steps of a run that is only timed, and killed
CURVE_POINTS = 14  # evaluations of a run
NANOGPT_POINTS = range(6, 12)  # its evaluations are evenly spaced, the last one ends the run
MANY_STEPS = 10**6  # for which compiling pays

# nanoGPT's AdamW for small models (its config/train_shakespeare_char.py); GPT-2's betas
PLAIN_ADAMW = OptimSettings(
    name="adamw",
    lr=1e-3,
    min_lr=0.1,
    schedule="cosine",
    warmup=100,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    clip=1.0,
)
WORKER = [sys.executable, str(ROOT / "bench" / "workers.py")]

OUR_PHRASES = Phrases(
    ready=r"device ",
    step=r"step \d+/\d+ \| train loss",
    judged=r"step (\d+)/\d+ \| val loss \S+ \| (\S+) bits/byte",
)
NANOGPT_PHRASES = Phrases(
    ready=r"using fused AdamW|compiling the model",  # the later one counts
    step=r"iter \d+: loss",
    judged=r"step (\d+): train loss",  # its value is one of random pieces, and not used
    saving=r"saving checkpoint",
)

# what does not decide the result of a contender
VOLATILE = {"run", "out_dir", "seed", "max_steps", "data.cache", "model.vocab_size"}


@dataclass(frozen=True)
class Task:
    """A preparation that contenders share, made once and timed."""

    name: str
    command: list[str]


@dataclass(frozen=True)
class Launch:
    """How a training is started."""

    command: list[str]
    cwd: Path


class Contender(Protocol):
    """What bench/time_to_quality.py needs of one."""

    name: str
    phrases: Phrases

    def definition(self) -> dict[str, Any]:
        """All that decides its result besides the seed and the number of steps."""

    def tasks(self) -> list[Task]:
        """What must be made before."""

    def fitting(self, steps: int) -> int:
        """The number of steps nearest to this one that it can make."""

    def launch(self, folder: Path, seed: int, steps: int) -> Launch:
        """Write what its run needs into a new folder."""

    def hear(self, folder: Path, line: str) -> None:
        """Called with each line of its run."""

    def curve(self, folder: Path, watch: Stopwatch) -> list[Point]:
        """What it had learnt when, all held-out text read."""


def evaluation_steps(steps: int) -> list[int]:
    """The steps after which a run is evaluated, more at its beginning; the last one is among
    them."""
    marks = set()
    for i in range(1, CURVE_POINTS + 1):
        step = round(steps * (i / CURVE_POINTS) ** 2)
        marks.add(max(1, step))
    return sorted(marks)


def write_preparation(s: TrainSettings, kind: str, out: Path, *parts: Any) -> tuple[str, Path]:
    """(name, settings file) of the preparation of these kinds of tokens, in a folder of out."""
    data = replace(s.data, cache="")
    name = f"{kind}-{files.digest(settings.flat(data), *parts)[:8]}"
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    data = replace(s.data, cache=str(folder / "cache"))
    config = folder / "preparation.yaml"
    settings.write(Preparation(data, s.tokenizer, s.model.block_size), config)
    return name, config


def our_tokens(s: TrainSettings, out: Path) -> tuple[Task, str]:
    """Making our token files for these settings, and their folder."""
    name, config = write_preparation(s, "tokens", out, settings.flat(s.tokenizer))
    cache = str(out / name / "cache")
    return Task(name, [*WORKER, "tokens", str(config)]), cache


# ---- this project, and Hugging Face's GPT-2 with its tokens


class SmallGPT:
    """train.py with these settings; or the small loop of bench/workers.py with them."""

    phrases = OUR_PHRASES

    def __init__(self, name: str, s: TrainSettings, out: Path, job: str = "ours"):
        """UserError where the run would begin with what another one has learnt."""
        if s.init_from:
            raise UserError(f"init_from={s.init_from}: every contender begins with nothing")
        self.name = name
        self.job = job
        self.task, cache = our_tokens(s, out)
        compiled, _ = hardware.choose_compile(
            s.compile, hardware.choose_device(s.device), MANY_STEPS
        )
        self.s = replace(
            s,
            data=replace(s.data, cache=cache, eval_blocks=0),
            compile="true" if compiled else "false",
            save_every=FOREVER,
            log_every=1,
            keep=1,
            resume="never",
            prompts=[],
        )

    def definition(self) -> dict[str, Any]:
        values = settings.flat(self.s)
        kept = {name: value for name, value in values.items() if name not in VOLATILE}
        return {"job": self.job, **kept}

    def tasks(self) -> list[Task]:
        return [self.task]

    def fitting(self, steps: int) -> int:
        return steps

    def launch(self, folder: Path, seed: int, steps: int) -> Launch:
        s = replace(self.s, run="run", out_dir=str(folder), seed=seed, max_steps=steps)
        config = folder / "config.yaml"
        settings.write(s, config)
        marks = evaluation_steps(steps)
        return Launch([*WORKER, self.job, str(config), json.dumps(marks)], Path.cwd())

    def hear(self, folder: Path, line: str) -> None:
        """It says all that there is to know."""

    def curve(self, folder: Path, watch: Stopwatch) -> list[Point]:
        return watch.points


def plain_gpt2(s: TrainSettings) -> TrainSettings:
    """The text, shape and steps of these settings with GPT-2's form and optimizer."""
    model = GPTConfig(
        block_size=s.model.block_size,
        n_layer=s.model.n_layer,
        n_head=s.model.n_head,
        n_embd=s.model.n_embd,
        dropout=s.model.dropout,
        **FORM,
    )
    return replace(s, model=model, optim=replace(PLAIN_ADAMW))


# ---- nanoGPT


# "I only have a macbook" in its README, but for what the bench decides
README_OPTIONS = {
    "compile": False,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "dropout": 0.0,
}


def shape_options(s: TrainSettings) -> dict[str, Any]:
    """The shape and the steps of these settings."""
    shares = share_batch(s.batch_tokens, s.model.block_size, s.micro_batch, 1)
    return {
        "compile": s.compile == "true",
        "block_size": s.model.block_size,
        "batch_size": shares.micro,
        "gradient_accumulation_steps": shares.accum,
        "n_layer": s.model.n_layer,
        "n_head": s.model.n_head,
        "n_embd": s.model.n_embd,
        "dropout": s.model.dropout,
    }


class NanoGPT:
    """nanoGPT's own train.py with its config/train_shakespeare_char.py, in a copy of a checkout.

    It evaluates on random pieces; here its checkpoints are judged, when its run is over."""

    phrases = NANOGPT_PHRASES

    def __init__(self, name: str, our: SmallGPT, checkout: Path, out: Path):
        if not (checkout / "train.py").is_file():
            raise UserError(f"--nanogpt {checkout}: there is no train.py of nanoGPT in that folder")
        self.name = name
        self.checkout = checkout
        self.device = hardware.choose_device(our.s.device).type
        is_readme = name == "nanogpt-char-readme"
        self.options = README_OPTIONS if is_readme else shape_options(our.s)
        reads_tokens = name == "nanogpt-bpe"
        job = "token_ids" if reads_tokens else "characters"
        folder, config = write_preparation(
            our.s, job, out, settings.flat(our.s.tokenizer) if reads_tokens else {}
        )
        self.data = out / folder
        before = []
        if reads_tokens:
            before = our.tasks()
            config = out / our.task.name / "preparation.yaml"
        own = Task(folder, [*WORKER, job, str(config), str(self.data)])
        self.all_tasks = [*before, own]

    def definition(self) -> dict[str, Any]:
        return {"device": self.device, "data": self.data.name, **self.options}

    def tasks(self) -> list[Task]:
        return self.all_tasks

    def fitting(self, steps: int) -> int:
        """A multiple of the steps between its evaluations, of which the last one ends the run."""
        return steps - steps % self.interval(steps)

    def interval(self, steps: int) -> int:
        """Steps between evaluations; the one that wastes fewest steps."""
        candidates = [max(1, steps // points) for points in NANOGPT_POINTS]
        return min(candidates, key=lambda interval: steps % interval)

    def launch(self, folder: Path, seed: int, steps: int) -> Launch:
        for name in ("train.py", "model.py", "configurator.py", "config"):
            source = self.checkout / name
            if source.is_dir():
                shutil.copytree(source, folder / name)
            else:
                shutil.copy(source, folder / name)
        set_seed(folder / "train.py", seed)
        options = {
            **self.options,
            "dataset": str(self.data),
            "device": self.device,
            "max_iters": steps,
            "lr_decay_iters": steps,
            "eval_interval": self.interval(steps),
            "eval_iters": 1,
            "log_interval": 1,
            "always_save_checkpoint": True,
            "out_dir": str(folder),
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        recipe = "config/train_shakespeare_char.py"
        return Launch([sys.executable, "train.py", recipe, *words], folder)

    def hear(self, folder: Path, line: str) -> None:
        """Keep a checkpoint: the next one has the same name."""
        step = re.match(r"iter (\d+): loss", line)
        if step and (folder / "ckpt.pt").exists():
            os.rename(folder / "ckpt.pt", folder / f"{step[1]}.pt")

    def curve(self, folder: Path, watch: Stopwatch) -> list[Point]:
        snapshots = sorted(folder.glob("*.pt"), key=lambda file: int(file.stem))
        names = map(str, snapshots)
        command = [*WORKER, "judge", str(folder), str(self.data), self.device, *names]
        points = []
        with Program(command, folder, folder / "judge.log", "wall") as judge:
            for _, line in judge.lines():
                verdict = re.match(r"judged (\d+): (\S+) bits per byte", line)
                if verdict:
                    step = int(verdict[1])
                    points.append(Point(step, watch.steps[step - 1], float(verdict[2])))
        return points


def set_seed(script: Path, seed: int) -> None:
    """Write a seed into a copy of nanoGPT's train.py, which has no option for it."""
    line = "torch.manual_seed(1337 + seed_offset)"
    text = script.read_text(encoding="utf-8")
    if line not in text:
        raise UserError(f"{script} is not the train.py that this bench knows: it lacks {line}")
    seeded = text.replace(line, f"torch.manual_seed({1337 + seed} + seed_offset)")
    script.write_text(seeded, encoding="utf-8")


# ---- by name


OURS = ("ours", "gpt2", "hf")
NANOGPTS = ("nanogpt-char", "nanogpt-char-readme", "nanogpt-bpe")


def make_contender(name: str, s: TrainSettings, out: Path, nanogpt: Path | None) -> Contender:
    """One of OURS or NANOGPTS, which all get the text of the settings, and most their shape."""
    if name == "ours":
        return SmallGPT(name, s, out)
    if name == "gpt2":
        return SmallGPT(name, plain_gpt2(s), out)
    if name == "hf":
        return SmallGPT(name, plain_gpt2(s), out, job="hf")
    if nanogpt is None:
        raise UserError(f"{name} needs a checkout of nanoGPT: add --nanogpt PATH")
    return NanoGPT(name, SmallGPT("ours", s, out), nanogpt, out)
