"""The contenders of bench/time_to_quality.py: what each one runs, and what it needs before."""

import json
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

    folder: Path
    command: list[str]

    @property
    def name(self) -> str:
        return self.folder.name


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


# ---- what is made before


def settings_folder(s: TrainSettings, kind: str, out: Path) -> Path:
    """A folder of out for this kind of tokens, with the settings that they are made from."""
    data = replace(s.data, cache="", eval_blocks=0)
    parts = [settings.flat(data)]
    if kind != "characters":
        parts.append(settings.flat(s.tokenizer))
    folder = out / f"{kind}-{files.digest(*parts)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    data.cache = str(folder / "cache")
    preparation = Preparation(data, s.tokenizer, s.model.block_size)
    settings.write(preparation, folder / "preparation.yaml")
    return folder


def our_tokens(s: TrainSettings, out: Path) -> Task:
    """Training the tokenizer and making our token files, in cache/ of the folder."""
    folder = settings_folder(s, "tokens", out)
    return Task(folder, [*WORKER, "tokens", str(folder / "preparation.yaml")])


def nanogpt_tokens(s: TrainSettings, ours: Task, out: Path) -> Task:
    """Writing our tokens as nanoGPT reads them."""
    folder = settings_folder(s, "token_ids", out)
    config = ours.folder / "preparation.yaml"
    return Task(folder, [*WORKER, "token_ids", str(config), str(folder)])


def nanogpt_characters(s: TrainSettings, out: Path) -> Task:
    """Writing the text in characters."""
    folder = settings_folder(s, "characters", out)
    config = folder / "preparation.yaml"
    return Task(folder, [*WORKER, "characters", str(config), str(folder)])


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
        self.task = our_tokens(s, out)
        device = hardware.choose_device(s.device)
        compiled, _ = hardware.choose_compile(s.compile, device, MANY_STEPS)
        cache = str(self.task.folder / "cache")
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
    """The text, shape and steps of these settings with GPT-2's form, loss and optimizer."""
    model = GPTConfig(
        block_size=s.model.block_size,
        n_layer=s.model.n_layer,
        n_head=s.model.n_head,
        n_embd=s.model.n_embd,
        dropout=s.model.dropout,
        **FORM,
    )
    return replace(s, model=model, optim=replace(PLAIN_ADAMW), init="random", negatives=0)


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

    def __init__(
        self,
        name: str,
        checkout: Path,
        device: str,
        options: dict[str, Any],  # of its train.py
        tasks: list[Task],  # the last one makes its data
    ):
        """UserError where the folder is no checkout of nanoGPT."""
        if not (checkout / "train.py").is_file():
            raise UserError(f"--nanogpt {checkout}: there is no train.py of nanoGPT in that folder")
        self.name = name
        self.checkout = checkout
        self.device = device
        self.options = options
        self.all_tasks = tasks
        self.data = tasks[-1].folder

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
        newest = folder / "ckpt.pt"
        if step and newest.exists():
            newest.rename(folder / f"{step[1]}.pt")

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
    ours = SmallGPT("ours", s, out)
    device = hardware.choose_device(s.device).type
    options = shape_options(ours.s)
    tasks = [nanogpt_characters(s, out)]
    if name == "nanogpt-char-readme":
        options = README_OPTIONS
    elif name == "nanogpt-bpe":
        tasks = [*ours.tasks(), nanogpt_tokens(s, ours.task, out)]
    return NanoGPT(name, nanogpt, device, options, tasks)
