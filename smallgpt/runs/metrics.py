"""What a run tells: a progress bar or plain lines, metrics.jsonl, TensorBoard, a tracker."""

import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from model import Block, GPTConfig
from smallgpt.parallel.world import World

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from smallgpt.runs.tracker import Tracker


@dataclass(frozen=True)
class Measure:
    """How people read a number of an evaluation."""

    title: str
    is_share: bool = True  # in percent

    def show(self, value: float) -> str:
        return f"{value:.2%}" if self.is_share else f"{value:.4f}"


MEASURES = {  # of a fine-tuning, as they stand in its records
    "accuracy": Measure("accuracy"),
    "macro_f1": Measure("macro F1"),
    "f1": Measure("F1"),
    "matthews": Measure("Matthews", is_share=False),
    "pearson": Measure("Pearson", is_share=False),
    "spearman": Measure("Spearman", is_share=False),
}


class Metrics:
    """Writes on the main process only; on the others every method does nothing.

    `metrics.jsonl` is append-only: a resumed run repeats the steps after its checkpoint, and the
    last line of a step counts (`read` gives those). TensorBoard is told to forget them."""

    def __init__(
        self,
        run: Path,
        world: World,
        step: int,
        max_steps: int,
        tracker: "Tracker | None" = None,
    ):
        self.main = world.main
        self.max_steps = max_steps
        self.tracker = tracker
        if not self.main:
            return
        self.run = run
        path = run / "metrics.jsonl"
        drop_partial_line(path)
        self.file = open(path, "a", encoding="utf-8")
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=True,
        )
        self.began = time.monotonic()
        self.first = step

    @functools.cached_property
    def board(self) -> "SummaryWriter":
        """TensorBoard's file."""
        from torch.utils.tensorboard import SummaryWriter  # 0.4 s: behind the first step

        forgotten_from = self.first + 1 if self.first else None
        return SummaryWriter(str(self.run / "tensorboard"), purge_step=forgotten_from)

    def step(self, loss: float, count: int, unit: str = "tokens") -> None:
        """One optimisation step of so many tokens (or examples) is done: moves the bar."""
        if not self.main:
            return
        steps_per_second = self.bar.format_dict["rate"] or 0
        speed = steps_per_second * count
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} {unit}/s", refresh=False)
        self.bar.update()

    def log(self, record: dict) -> None:
        """Add a record, which has a step and a split, to metrics.jsonl, TensorBoard and the
        tracker; show it."""
        if not self.main:
            return
        record = {**record, "time": time.time()}
        self.file.write(json_line(record))
        self.file.flush()
        say(self.line(record))
        step, split = record["step"], record["split"]
        numbers = {}
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "time"):
                numbers[f"{key}/{split}"] = value
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(numbers, step, split)

    def line(self, record: dict) -> str:
        """A record as one line for people."""
        parts = [
            f"step {record['step']}/{self.max_steps}",
            f"{record['split']} loss {record['loss']:.4f}",
        ]
        if "bits_per_byte" in record:
            parts.append(f"{record['bits_per_byte']:.4f} bits/byte")
        for key, measure in MEASURES.items():
            if key in record:
                parts.append(f"{measure.title} {measure.show(record[key])}")
        if "lr" in record:
            parts += self._progress(record)
        return " | ".join(parts)

    def _progress(self, record: dict) -> list[str]:
        """What only a training record has: the optimizer's numbers, the speed, the time left."""
        unit = "examples" if "examples_per_second" in record else "tokens"
        speed = record[f"{unit}_per_second"]
        parts = [
            f"lr {record['lr']:.2e}",
            f"norm {record['grad_norm']:.2f}",
            f"{speed:,.0f} {unit}/s",
        ]
        if record.get("mfu"):
            parts.append(f"mfu {record['mfu']:.1%}")
        parts.append(f"{tqdm.format_interval(self._seconds_left(record['step']))} left")
        return parts

    def _seconds_left(self, step: int) -> float:
        """An estimate from the steps since this process began."""
        done = max(1, step - self.first)
        seconds_per_step = (time.monotonic() - self.began) / done
        return seconds_per_step * (self.max_steps - step)

    def text(self, tag: str, text: str, step: int) -> None:
        """A piece of text, such as sample replies, on the console and in TensorBoard."""
        if self.main:
            say(text)
            line_breaks = text.replace("\n", "  \n")  # as Markdown has them
            self.board.add_text(tag, line_breaks, step)

    @contextmanager
    def bar_shown(self) -> Iterator[None]:
        """Around the steps: the bar is finished behind them, and what is said then stands below."""
        try:
            yield
        finally:
            if self.main:
                self.bar.close()

    def close(self) -> None:
        """Finish the bar, where an error has left it, and the files."""
        if self.main:
            self.bar.close()
            self.file.close()
            if "board" in vars(self):
                self.board.close()
            if self.tracker:
                self.tracker.close()


def say(text: str) -> None:
    """A line for people; above the bar where there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def flops_per_token(config: GPTConfig, classes: int = 0) -> int:
    """Floating-point operations of forward and backward per token, without recomputation.

    PaLM, appendix B: 6 for each weight of a matrix, and the attention scores. classes: rows of the
    LM head that a sampled loss reads; 0 = all."""
    with torch.device("meta"):
        block = Block(config)
    of_block = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    of_head = (classes or config.vocab_size) * config.n_embd
    attention_scores = 12 * config.n_layer * config.n_embd * config.block_size
    return 6 * (config.n_layer * of_block + of_head) + attention_scores


# ---- metrics.jsonl


def json_line(record: dict) -> str:
    """A record as a line of metrics.jsonl."""
    finite = dict(record)
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            finite[key] = None  # the norm of a skipped float16 step; JSON knows no infinity
    return json.dumps(finite) + "\n"


def drop_partial_line(path: Path) -> None:
    """A killed run may have left half a line: cut it off, so that the next is not glued to it."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        whole_lines = file.read().rfind(b"\n") + 1
        file.truncate(whole_lines)


def read(run: Path | str, split: str) -> list[dict]:
    """The records of a split, one per step, in order of steps; none before the first line.

    Of several records of a step the last one counts. A line that is damaged, or not yet whole, is
    passed over."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        return []
    *whole_lines, _ = path.read_bytes().split(b"\n")
    records = {}
    for line in whole_lines:
        record = parse(line)
        if record is not None and record["split"] == split:
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def parse(line: bytes) -> dict | None:
    """The record of a line; None if the line is damaged, as a crash of the machine leaves NULs."""
    try:
        record = json.loads(line)
    except ValueError:  # also of bytes that are not UTF-8
        return None
    if not isinstance(record, dict):
        return None
    is_whole = isinstance(record.get("step"), int) and isinstance(record.get("split"), str)
    return record if is_whole else None
