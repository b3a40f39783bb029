"""What bench/time_to_quality.py tells of its runs: a table and a picture."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import heading, row
from bench.stopwatch import Timing
from smallgpt import plots


@dataclass
class Trained:
    """One run of a contender, in seconds of the chosen clock."""

    timing: Timing
    steps: int
    uncounted: float  # seconds of evaluating and saving
    curve: list[list[float]]  # [seconds since the preparation began, bits per byte]

    @property
    def end(self) -> float:
        """Seconds, all counted, when the last step was made."""
        return self.curve[-1][0]

    @property
    def last(self) -> float:
        """Bits per byte at the end."""
        return self.curve[-1][1]

    @classmethod
    def read(cls, record: dict[str, Any]) -> "Trained":
        """From the JSON that asdict gave."""
        timing = Timing(**record["timing"])
        return cls(timing, record["steps"], record["uncounted"], record["curve"])


def at(curve: list[list[float]], seconds: float) -> float:
    """Bits per byte at a time, between its neighbours; at the end what was reached there."""
    times, values = zip(*curve, strict=True)
    return float(np.interp(seconds, times, values))


def time_of(curve: list[list[float]], bits_per_byte: float) -> float | None:
    """When a curve first comes down to a value, between its neighbours; None if it does not."""
    before = None
    for seconds, value in curve:
        if value <= bits_per_byte:
            if before is None:
                return seconds
            then, higher = before
            share = (higher - bits_per_byte) / (higher - value)
            return then + share * (seconds - then)
        before = seconds, value
    return None


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation, where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def extent(values: list[float]) -> str:
    """The smallest to the largest, in whole numbers."""
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


@dataclass
class Report:
    """A comparison that is over."""

    runs: dict[str, dict[int, Trained]]  # by the contender's name and the seed
    preparations: dict[str, float]  # seconds that each one's text or tokens took
    budget: float  # seconds; infinite where the number of steps was given
    conditions: dict[str, Any]
    held_out_bytes: int

    def reached(self, name: str) -> dict[int, float]:
        """Bits per byte at the budget, by seed."""
        runs = self.runs[name]
        return {seed: at(run.curve, self.budget) for seed, run in runs.items()}

    def difference(self, name: str) -> str:
        """How much more bits than ours, seed by seed, in percent."""
        if name == "ours" or "ours" not in self.runs:
            return ""
        ours = self.reached("ours")
        differences = []
        for seed, value in self.reached(name).items():
            ratio = value / ours[seed]
            differences.append(100 * (ratio - 1))
        return f"{spread(differences, 2)} %"

    def passed(self, name: str) -> str:
        """When ours comes down to what another one has at the budget, on average."""
        if name == "ours" or "ours" not in self.runs:
            return ""
        value = statistics.mean(self.reached(name).values())
        times = [time_of(run.curve, value) for run in self.runs["ours"].values()]
        if None in times:
            return "not in time"
        return f"{extent(times)} s"

    def cells(self, name: str) -> list[str]:
        runs = list(self.runs[name].values())
        timings = [run.timing for run in runs]
        return [
            name,
            str(len(runs)),
            extent([run.steps for run in runs]),
            f"{self.preparations[name]:.1f}",
            spread([timing.start for timing in timings], 1),
            spread([timing.warm_up for timing in timings], 1),
            extent([run.end for run in runs]),
            extent([run.uncounted for run in runs]),
            spread(list(self.reached(name).values()), 4),
            self.difference(name),
            self.passed(name),
        ]

    def table(self) -> str:
        """In Markdown."""
        when = "at the end" if math.isinf(self.budget) else f"at {self.budget:,.0f} s"
        head = [
            "contender",
            "seeds",
            "steps",
            "tokenising, s",
            "start, s",
            "compiling, s",
            "end, s",
            "not counted, s",
            f"bits per byte {when}",
            "more than ours",
            "ours is there after",
        ]
        rows = [row(self.cells(name)) for name in self.runs]
        return "\n".join([heading(head), *rows])

    def describe(self) -> str:
        """What the numbers were measured with, a line."""
        c = self.conditions
        turns = "one core each, side by side" if c["side by side"] else "one after the other"
        return (
            f"{c['clock']} seconds; {c['device']}: {c['machine']}, {c['cores']} core(s), {turns}; "
            f"torch {c['torch']}; {self.held_out_bytes:,} bytes held out"
        )

    def draw(self, file: Path) -> None:
        """The curves, and beside them where the seconds of each contender went."""
        fig, (left, right) = plots.figure(12, 4.6, columns=2)
        for i, name in enumerate(self.runs):
            self.draw_curves(left, name, f"C{i}")
        left.set_xlabel("seconds, start and tokenising included")
        left.set_ylabel("held-out bits per byte")
        left.set_xlim(left=0)
        left.set_ylim(self.readable_heights())
        left.grid(alpha=0.3)
        left.legend(frameon=False, fontsize=8)
        self.draw_bars(right)
        plots.save(fig, file)

    def draw_curves(self, axes: Any, name: str, colour: str) -> None:
        values = list(self.reached(name).values())
        label = f"{name}: {spread(values, 3)}"
        for run in self.runs[name].values():
            times, values = zip(*run.curve, strict=True)
            axes.plot(times, values, color=colour, marker="o", ms=2, lw=1, label=label)
            label = None  # one line of the legend for all seeds

    def readable_heights(self) -> tuple[float, float]:
        """Bits per byte between which the ends can be told apart: every curve begins near 8."""
        ends = []
        for runs in self.runs.values():
            ends += [run.last for run in runs.values()]
        return 0.97 * min(ends), max(1.6 * min(ends), 1.03 * max(ends))

    def draw_bars(self, axes: Any) -> None:
        """A bar for each contender, from its first second to its last."""
        names = list(self.runs)
        until = [0.0] * len(names)
        colours = {"tokenising": "C0", "start": "C1", "compiling": "C2", "training": "0.85"}
        for label, colour in colours.items():
            widths = [self.seconds_of(name)[label] for name in names]
            axes.barh(names, widths, left=until, label=label, color=colour)
            until = [begin + width for begin, width in zip(until, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))

    def seconds_of(self, name: str) -> dict[str, float]:
        """What a contender spent on what, the mean of its seeds."""
        runs = self.runs[name].values()
        tokenising = self.preparations[name]
        start = statistics.mean(run.timing.start for run in runs)
        compiling = statistics.mean(run.timing.warm_up for run in runs)
        end = statistics.mean(run.end for run in runs)
        return {
            "tokenising": tokenising,
            "start": start,
            "compiling": compiling,
            "training": end - tokenising - start - compiling,
        }
