"""Loss curves of one or several runs of train.py, in the terminal and as a picture.

    python scripts/curves.py checkpoints/a
    python scripts/curves.py checkpoints/a checkpoints/b x=tokens out=both.png

The picture is curve.png in the folder of the first run, unless out= names another.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, plots, settings
from smallgpt.console import UserError
from smallgpt.runs import metrics

COLUMNS = ["split", "step", "tokens", "loss", "bits_per_byte"]  # of metrics.jsonl
UNITS = {"step": "optimisation step", "tokens": "training tokens"}
ROWS = 12  # of the chart in the terminal
TRAIN, VAL = "-", "o"  # its marks: ASCII is one column wide in every terminal, a Chinese one too


@dataclass
class CurveSettings:
    x: Literal["step", "tokens"] = "step"  # horizontal axis
    out: str = ""  # the PNG; default: curve.png in the first run folder

    def check(self) -> list[str]:
        """Problems with these settings, in plain words."""
        out = Path(self.out)
        if self.out and out.suffix.lower() != ".png":
            return [f"out={self.out} must end with .png"]
        if not out.parent.is_dir():
            return [f"out={self.out}: there is no folder {out.parent}"]
        return []


def main() -> None:
    runs, words = settings.split_words(sys.argv[1:])
    s = settings.load(CurveSettings, words, doc=__doc__)
    if not runs:
        raise UserError("which runs? python scripts/curves.py checkpoints/<run> ...")
    folders = [Path(run) for run in runs]
    curves = {folder: read(folder) for folder in folders}
    losses = pd.concat(curves.values())["loss"]
    low = losses.min()
    high = losses.max()
    print(f"loss in nats per token, {TRAIN} train, {VAL} val\n")
    for run, curve in curves.items():
        chart = text_chart(curve, s.x, low, high)
        print(f"{run}: {best(curve)}\n{chart}")
    out = Path(s.out) if s.out else folders[0] / "curve.png"
    draw(curves, s.x, out)
    print(f"wrote {out}")


def read(run: Path) -> pd.DataFrame:
    """The records of a run. UserError if there are none, or if the run is a fine-tuning."""
    train = metrics.read(run, "train")
    val = metrics.read(run, "val")
    if not train:
        raise UserError(
            f"{run} has no metrics.jsonl with training records; give a run folder of train.py"
        )
    if any("bits_per_byte" not in record for record in val):
        raise UserError(
            f"{run} is a fine-tuning, whose curves are in its folder; give a run folder of train.py"
        )
    return pd.DataFrame(train + val, columns=COLUMNS)


def of_split(curve: pd.DataFrame, split: str) -> pd.DataFrame:
    return curve[curve["split"] == split]


def best(curve: pd.DataFrame) -> str:
    lowest = curve["bits_per_byte"].min()
    if np.isnan(lowest):
        return "no validation yet"
    return f"best validation {lowest:.3f} bits/byte"


def text_chart(curve: pd.DataFrame, x: str, low: float, high: float) -> str:
    """The losses from top to bottom, as numbers and as marks between low and high.

    A row is a part of the run: its mean training loss, and its last validation loss."""
    last = f"{curve[x].max():,}"
    label = max(len(last), len(x))
    head = f"{x:>{label}}  {'train':>6}  {'val':>6}  "
    terminal = shutil.get_terminal_size()
    room = terminal.columns - len(head) - 1
    width = max(12, min(room, 60))
    lines = [f"{head}{low:<6.2f}{high:>{width - 6}.2f}"]
    span = max(high - low, 1e-9)
    parts = pd.cut(curve[x], ROWS)
    for _, part in curve.groupby(parts, observed=True):
        at = f"{part[x].max():,}"
        train = of_split(part, "train")["loss"].mean()
        val = of_split(part, "val")["loss"][-1:].mean()
        row = [" "] * width
        for loss, mark in ((train, TRAIN), (val, VAL)):
            if np.isnan(loss):
                continue
            fraction = (loss - low) / span
            column = round(fraction * (width - 1))
            row[column] = mark
        marks = "".join(row)
        line = f"{at:>{label}}  {train:6.3f}  {val:6.3f}  {marks}"
        lines.append(line.replace("nan", "   ").rstrip())
    return "\n".join(lines) + "\n"


def draw(curves: dict[Path, pd.DataFrame], x: str, out: Path) -> None:
    """Write a PNG with training loss (thin) and validation loss (dots) of each run."""
    fig, ax = plots.figure(7, 4.2)
    for i, (run, curve) in enumerate(curves.items()):
        color = f"C{i}"
        label = f"{run.name}: {best(curve)}"
        train = of_split(curve, "train")
        val = of_split(curve, "val")
        ax.plot(train[x], train["loss"], color=color, lw=0.8, alpha=0.5)
        ax.plot(val[x], val["loss"], color=color, marker="o", ms=3, label=label)
    ax.set(xlabel=UNITS[x], ylabel="loss, nats per token")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    plots.save(fig, out)


if __name__ == "__main__":
    console.run(main)
