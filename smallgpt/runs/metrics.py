"""What a run tells: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

import json
import math
import sys
import time
from pathlib import Path

import torch.nn as nn
from tqdm import tqdm

from smallgpt.parallel.world import World


class Metrics:
    """Writes on the main process only; on the others every method does nothing.

    `metrics.jsonl` is append-only: a resumed run repeats the steps after its checkpoint, and the last line of a step
    counts (`read` gives those). TensorBoard is told to forget them.
    """

    def __init__(self, run: Path, world: World, step: int, max_steps: int):
        self.main, self.max_steps = world.main, max_steps
        if not self.main:
            return
        from torch.utils.tensorboard import SummaryWriter  # 0.4 s to import: only where it is used

        path = run / "metrics.jsonl"
        drop_partial_line(path)
        self.file = open(path, "a", encoding="utf-8")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=True,
        )
        self.began, self.first = time.monotonic(), step

    def step(self, loss: float, count: int, unit: str = "tokens") -> None:
        """One optimisation step of so many tokens (or examples) is done: moves the bar."""
        if self.main:
            speed = (self.bar.format_dict["rate"] or 0) * count
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} {unit}/s", refresh=False)
            self.bar.update()

    def log(self, record: dict) -> None:
        """Add a record with at least `step` and `split` to metrics.jsonl and TensorBoard, and show it."""
        if not self.main:
            return
        record = {**record, "time": time.time()}
        # JSON knows no infinity: the norm of a skipped float16 step is written as null
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "time"):
                self.board.add_scalar(f"{key}/{record['split']}", value, record["step"])
        self.say(self.line(record))

    def line(self, r: dict) -> str:
        """A record as one line for people."""
        parts = [f"step {r['step']}/{self.max_steps}", f"{r['split']} loss {r['loss']:.4f}"]
        if "bits_per_byte" in r:
            parts.append(f"{r['bits_per_byte']:.4f} bits/byte")
        if "accuracy" in r:
            parts.append(f"accuracy {r['accuracy']:.2%}")
        if "macro_f1" in r:
            parts.append(f"macro F1 {r['macro_f1']:.2%}")
        if "lr" in r:
            unit = "examples" if "examples_per_second" in r else "tokens"
            parts += [
                f"lr {r['lr']:.2e}",
                f"norm {r['grad_norm']:.2f}",
                f"{r[f'{unit}_per_second']:,.0f} {unit}/s",
            ]
            if r.get("mfu"):
                parts.append(f"mfu {r['mfu']:.1%}")
            done = r["step"] - self.first
            left = (time.monotonic() - self.began) / max(1, done) * (self.max_steps - r["step"])
            parts.append(f"{tqdm.format_interval(left)} left")
        return " | ".join(parts)

    def say(self, text: str) -> None:
        """A line for people; above the bar where there is one."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """A piece of text, such as sample replies, on the console and in TensorBoard."""
        if self.main:
            self.board.add_text(tag, text.replace("\n", "  \n"), step)
            self.say(text)

    def close(self) -> None:
        """Finish the bar and the files."""
        if self.main:
            self.bar.close()
            self.file.close()
            self.board.close()


def flops_per_token(model: nn.Module) -> int:
    """Floating-point operations of forward and backward per token, without recomputation (PaLM, appendix B)."""
    c = model.config
    matrices = sum(
        p.numel()
        for part in (model.blocks, model.lm_head)
        for p in part.parameters()
        if p.dim() == 2
    )
    return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size


def drop_partial_line(path: Path) -> None:
    """A killed run may have left half a line: cut it off, so that the next one is not glued to it."""
    if path.exists():
        with open(path, "rb+") as f:
            data = f.read()
            f.truncate(data.rfind(b"\n") + 1)


def read(run: Path | str, split: str) -> list[dict]:
    """The records of a split, one per step (the last one written), in order of steps; none before the first line."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [r for _, r in sorted({r["step"]: r for r in records if r["split"] == split}.items())]
