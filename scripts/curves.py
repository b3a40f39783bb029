"""Loss curves of one or several runs, as a picture and in the terminal.

python scripts/curves.py checkpoints/a checkpoints/b [--x tokens] [--out curves.png]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console
from smallgpt.console import UserError
from smallgpt.plots import figure, save
from smallgpt.runs.metrics import read

UNITS = {"step": "optimisation step", "tokens": "training tokens"}


def draw(runs: list[Path], x: str, out: Path) -> None:
    """Write a PNG with training loss (thin) and validation loss (dots) of each run, in nats per token."""
    fig, ax = figure(7, 4.2)
    for i, run in enumerate(runs):
        train, val = read(run, "train"), read(run, "val")
        ax.plot([r[x] for r in train], [r["loss"] for r in train], color=f"C{i}", lw=0.8, alpha=0.5)
        best = min((r["bits_per_byte"] for r in val), default=float("nan"))
        label = f"{run.name}: best validation {best:.3f} bits/byte"
        ax.plot(
            [r[x] for r in val],
            [r["loss"] for r in val],
            color=f"C{i}",
            marker="o",
            ms=3,
            label=label,
        )
    ax.set(xlabel=UNITS[x], ylabel="loss, nats per token")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    save(fig, out)


def show(runs: list[Path], x: str) -> None:
    """The same in the terminal."""
    import plotext

    plotext.clear_figure()
    for run in runs:
        for split, marker in (("train", "braille"), ("val", "dot")):
            if records := read(run, split):  # plotext fails on a line without a point
                name = f"{run.name} {split}"
                plotext.plot(
                    [r[x] for r in records], [r["loss"] for r in records], label=name, marker=marker
                )
    plotext.plotsize(90, 20)
    plotext.theme("clear")
    plotext.xlabel(UNITS[x])
    plotext.title("loss, nats per token")
    chart = plotext.build()
    print(chart if sys.stdout.isatty() else plotext.uncolorize(chart))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--x", choices=list(UNITS), default="step", help="horizontal axis")
    parser.add_argument(
        "--out", type=Path, help="the PNG (default: curve.png in the first run folder)"
    )
    args = parser.parse_args()
    for run in args.runs:
        if not read(run, "train"):
            raise UserError(
                f"{run} has no metrics.jsonl with training records; give a run folder of train.py"
            )
        if any("bits_per_byte" not in r for r in read(run, "val")):
            raise UserError(
                f"{run} is a fine-tuning, whose curves are in its folder; give a run folder of train.py"
            )
    out = args.out or args.runs[0] / "curve.png"
    show(args.runs, args.x)
    draw(args.runs, args.x, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    console.run(main)
