"""What the trainings of a sweep have found: a row for each combination, a table, a figure."""

import math
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_rel

from smallgpt import plots
from smallgpt.console import UserError
from smallgpt.files import write_atomic
from smallgpt.runs.metrics import MEASURES, Measure
from smallgpt.sweeps.jobs import Cell, Job, cell_name

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.axes import Axes

SIZE = "data.train_size"  # the x axis of the figure, where the grid has it
# the baselines of report.py and regression.py, in their order
OF_CLASSES = ("largest class", "TF-IDF + linear SVM")
OF_NUMBERS = ("the mean", "TF-IDF + ridge")
ALL_MEASURES = {
    **MEASURES,
    "bits_per_byte": Measure("bits per byte", is_share=False),
    "loss": Measure("loss", is_share=False),
}

Result = dict[str, Any]  # of Job.result


# --- what is compared -----------------------------------------------------------------------------


def scores_of(found: Result) -> dict[str, float]:
    """The scores on the test split; of a pretraining, which has none, on the held-out text."""
    return found.get("test") or found["validation"]


def measures_of(found: Result) -> list[str]:
    """What is compared of these scores, the first one also in the figure."""
    if "bits_per_byte" in scores_of(found):
        return ["bits_per_byte", "loss"]
    return found.get("measures", ["accuracy", "macro_f1"])


def title(key: str, is_test: bool) -> str:
    """test accuracy, %"""
    measure = ALL_MEASURES[key]
    split = "test" if is_test else "held-out"
    unit = ", %" if measure.is_share else ""
    return f"{split} {measure.title}{unit}"


def headline(found: Result) -> str:
    """The first score of a training in words: test accuracy 81.25%"""
    key = measures_of(found)[0]
    measure = ALL_MEASURES[key]
    split = "test" if "test" in found else "held-out"
    value = scores_of(found)[key]
    return f"{split} {measure.title} {measure.show(value)}"


@dataclass
class Row:
    """The finished trainings of a combination, a row of the table."""

    cell: Cell
    scores: dict[str, pd.Series]  # measure -> its values by seed; the first measure is compared
    seconds: float  # a training
    train: int  # examples; 0 of a pretraining
    baselines: dict[str, float] = field(default_factory=dict)  # the first measure of each
    is_test: bool = True  # else scores on held-out text
    difference: float = math.nan  # of the first measure from that of the first row
    ci95: float = math.nan  # half the width of its 95 % confidence interval

    @property
    def key(self) -> str:
        """The measure that is compared."""
        first, *_ = self.scores
        return first

    @property
    def main(self) -> pd.Series:
        """What is compared, by seed."""
        return self.scores[self.key]

    def flat(self) -> dict[str, Any]:
        """The row of table.csv."""
        cells: dict[str, Any] = dict(self.cell)
        cells["n"] = len(self.main)
        for key, values in self.scores.items():
            cells[key] = values.mean()
            cells[f"{key}_sd"] = values.std()
        cells["difference"] = self.difference
        cells["ci95"] = self.ci95
        cells["seconds"] = self.seconds
        if self.train:
            cells["train"] = self.train
        return cells | self.baselines


def rows_of(jobs: list[Job]) -> list[Row]:
    """A row for each combination with a finished training. UserError if data or trunk changed."""
    cells: dict[str, Cell] = {}
    results: dict[str, dict[int, Result]] = {}  # name of a cell -> results by seed
    for job in jobs:
        name = cell_name(job.cell)
        cells[name] = job.cell
        by_seed = results.setdefault(name, {})
        found = job.result()
        if found:
            by_seed[job.seed] = found

    check_data(results, jobs[0].cell)
    rows: list[Row] = []
    for name, by_seed in results.items():
        if not by_seed:
            continue
        row = summarize(cells[name], by_seed)
        if rows:
            first = rows[0]
            row.difference, row.ci95 = compare(row.main, first.main)
        rows.append(row)
    return rows


def check_data(results: dict[str, dict[int, Result]], cell: Cell) -> None:
    """UserError if trainings that are compared have read different data or trunks."""
    data = set()
    for name, by_seed in results.items():
        hashes = [found.get("hashes", {}) for found in by_seed.values()]
        if any(other != hashes[0] for other in hashes):
            raise UserError(
                f"{name}: data or trunk have changed between its runs: choose another name="
            )
        data |= {each["data"] for each in hashes if "data" in each}
    is_compared = any(key.startswith(("data.", "tokenizer.")) for key in cell)
    if len(data) > 1 and not is_compared:
        raise UserError("the data have changed between the runs: choose another name=")


def summarize(cell: Cell, by_seed: dict[int, Result]) -> Row:
    """The row of a combination, from the results of its trainings."""
    one = by_seed[min(by_seed)]
    measures = measures_of(one)
    by_measure = {}
    for key in measures:
        values = {seed: scores_of(found)[key] for seed, found in by_seed.items()}
        by_measure[key] = pd.Series(values)
    seconds = [found["seconds"] for found in by_seed.values()]
    examples = one.get("examples", {})
    row = Row(
        cell,
        by_measure,
        seconds=float(np.mean(seconds)),
        train=examples.get("train", 0),
        is_test="test" in one,
    )
    if "baselines" in one:
        names = OF_NUMBERS if "pearson" in measures else OF_CLASSES
        for name, scores in zip(names, one["baselines"].values(), strict=True):
            row.baselines[name] = scores[row.key]
    return row


def compare(values: pd.Series, reference: pd.Series) -> tuple[float, float]:
    """Mean difference of two series over seeds, and half the width of its 95 % interval.

    The interval is that of the paired t-test: the same seed is the same head and order, so pairs
    tell more than two means. One pair has none, nan."""
    values, reference = values.align(reference, join="inner")
    mean = float((values - reference).mean())
    if len(values) < 2:
        return mean, math.nan
    with warnings.catch_warnings(action="ignore"):  # differences that are all the same
        low, high = ttest_rel(values, reference).confidence_interval(0.95)
    return mean, float(high - low) / 2


# --- the table ------------------------------------------------------------------------------------


def write(rows: list[Row], folder: Path, note: str = "") -> str:
    """table.md, table.csv and figure.png; returns the table. note: a sentence below it."""
    sheet = pd.DataFrame([row.flat() for row in rows])
    # utf-8-sig: the mark is for spreadsheets
    sheet.to_csv(folder / "table.csv", index=False, float_format="%.6g", encoding="utf-8-sig")
    text = markdown(rows, note)
    write_atomic(folder / "table.md", text, shared=True)
    draw(rows, folder / "figure.png")
    return text


def markdown(rows: list[Row], note: str = "") -> str:
    """The table, and what its numbers are."""
    first = rows[0]
    titles = list(first.cell)
    if first.train:
        titles.append("training examples")
    for key in first.scores:
        titles.append(title(key, first.is_test))
    titles.append("difference from the first")
    titles.append("n")
    titles.append("seconds a run")
    titles += first.baselines
    rule = "|---" * len(titles) + "|"
    lines = [table_line(titles), rule]
    for row in rows:
        words = words_of(row)
        lines.append(table_line(words))
    measure = ALL_MEASURES[first.key]
    unit = "points, " if measure.is_share else ""
    explanation = (
        f"± is the standard deviation over seeds; of the differences ({unit}paired by seed) the "
        "95 % interval."
    )
    return "\n".join([*lines, "", f"{explanation} {note}".strip(), ""])


def words_of(row: Row) -> list[str]:
    """The cells of a row."""
    words = [value.replace("|", "\\|") for value in row.cell.values()]
    if row.train:
        words.append(f"{row.train:,}")
    for key, values in row.scores.items():
        words.append(number(key, values.mean(), values.std()))
    words.append(number(row.key, row.difference, row.ci95, sign="+"))
    words.append(str(len(row.main)))
    words.append(f"{row.seconds:.0f}")
    for value in row.baselines.values():
        words.append(number(row.key, value))
    return words


def table_line(words: list[str]) -> str:
    return f"| {' | '.join(words)} |"


def number(key: str, value: float, spread: float = math.nan, sign: str = "") -> str:
    """A value of a measure: 76.67 ± 9.87 of a share, in percent, or 1.2345 ± 0.0123; without a
    spread if that is nan, and empty if the value is."""
    if math.isnan(value):
        return ""
    scale = 1
    digits = 4
    if ALL_MEASURES[key].is_share:
        scale = 100
        digits = 2
    text = f"{scale * value:{sign}.{digits}f}"
    if math.isnan(spread):
        return text
    return f"{text} ± {scale * spread:.{digits}f}"


# --- the figure -----------------------------------------------------------------------------------


def draw(rows: list[Row], file: Path) -> None:
    """The first measure of each combination; over the training size, if the grid has it, as
    curves."""
    first = rows[0]
    if SIZE in first.cell:
        fig, ax = plots.figure(7, 4.6)
        draw_over_size(ax, rows)
        axis = ax.yaxis
    else:
        fig, ax = plots.figure(7, 1.8 + 0.5 * len(rows))
        draw_side_by_side(ax, rows)
        axis = ax.xaxis
    if ALL_MEASURES[first.key].is_share:
        axis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    axis.set_label_text(f"{title(first.key, first.is_test)} (mean ± SD over seeds)")
    if ax.get_legend_handles_labels()[0]:
        fig.legend(loc="outside lower center", ncols=2, frameon=False)
    ax.grid(alpha=0.3)
    plots.save(fig, file)


BASELINE_STYLES = ("D--", "s:")
GREY = {"color": "0.4", "ms": 3, "lw": 1}


def draw_over_size(ax: "Axes", rows: list[Row]) -> None:
    """A curve for each combination of the other settings, and for each baseline."""
    rows = sorted(rows, key=lambda row: row.train)
    curves: dict[str, list[Row]] = {}
    for row in rows:
        others = {key: value for key, value in row.cell.items() if key != SIZE}
        curves.setdefault(cell_name(others), []).append(row)
    for i, (name, curve) in enumerate(curves.items()):
        sizes = [row.train for row in curve]
        means = [row.main.mean() for row in curve]
        spreads = np.nan_to_num([row.main.std() for row in curve])
        label = textwrap.fill(name or "this model", 40)
        ax.errorbar(
            sizes,
            means,
            spreads,
            label=label,
            fmt="o-",
            ms=4,
            capsize=3,
            color=f"C{i}",
        )
    sizes = [row.train for row in rows]
    for name, style in zip(rows[0].baselines, BASELINE_STYLES, strict=True):
        values = [row.baselines[name] for row in rows]
        ax.plot(sizes, values, style, label=name, **GREY)
    ticks = sorted(set(sizes))
    ax.set(xscale="log", xlabel="training examples")
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.minorticks_off()


def draw_side_by_side(ax: "Axes", rows: list[Row]) -> None:
    """A line for each combination: mean and spread, and every seed a dot."""
    bar = {"fmt": "|", "ms": 14, "capsize": 4, "color": "C0"}
    dot = {"ms": 4, "color": "C0", "alpha": 0.5}
    for i, row in enumerate(rows):
        mean = row.main.mean()
        spread = np.nan_to_num(row.main.std())
        ax.errorbar([mean], [i], xerr=[spread], **bar)
        height = [i] * len(row.main)
        ax.plot(row.main, height, "o", **dot)
    if rows[0].baselines:
        draw_baselines(ax, rows)
    labels = [textwrap.fill(cell_name(row.cell), 40) for row in rows]
    ax.set_ylim(len(rows) - 0.5, -0.5)  # from top to bottom
    ax.set_yticks(range(len(rows)), labels)


def draw_baselines(ax: "Axes", rows: list[Row]) -> None:
    """A line down through the rows for each baseline."""
    first = rows[0]
    measure = ALL_MEASURES[first.key]
    _, by_features = first.baselines
    lowest = math.inf
    for row in rows:
        lowest = min(lowest, row.main.min(), row.baselines[by_features])
    for name, style in zip(first.baselines, BASELINE_STYLES, strict=True):
        values = [row.baselines[name] for row in rows]
        is_one_number = len({*values}) == 1
        if is_one_number and values[0] < lowest - 0.05:
            # it would squeeze what is compared into a corner
            note = f"{name}: {measure.show(values[0])}, off the scale"
            ax.plot([], [], " ", label=note)
        else:
            ax.plot(values, range(len(rows)), style, label=name, **GREY)
