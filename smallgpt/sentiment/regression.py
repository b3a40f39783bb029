"""A set whose label is a number, such as STS-B: scores, baselines and report, as report.py has them
for classes.

The head gives one score a text, trained to foretell the number less the mean of all, in standard
deviations; here predictions are numbers of the set again.
"""

from pathlib import Path

import numpy as np

from smallgpt import plots
from smallgpt.files import write_atomic
from smallgpt.sentiment.report import (
    ERRORS_SHOWN,
    Result,
    Scores,
    draw_curves,
    excerpt,
    join,
    kept_baselines,
    provenance,
    score_table,
    texts_of,
    tfidf,
    write_result,
    write_sheet,
)
from smallgpt.sentiment.sets import Example
from smallgpt.sentiment.splits import Reviews


def evaluate(predicted: np.ndarray, numbers: np.ndarray, measures: tuple[str, ...] = ()) -> Scores:
    """Mean squared error, and Pearson's and Spearman's correlation, of predictions (N, 1) with
    numbers (N,). A correlation with what is all the same is 0."""
    from scipy.stats import pearsonr, spearmanr

    predicted = predicted[:, 0]
    errors = predicted - numbers
    loss = np.mean(errors**2)
    pearson = spearman = 0.0
    if np.ptp(predicted) > 0 and np.ptp(numbers) > 0:
        pearson = pearsonr(predicted, numbers).statistic
        spearman = spearmanr(predicted, numbers).statistic
    return {
        "loss": float(loss),
        "pearson": float(pearson),
        "spearman": float(spearman),
    }


def mean_and_deviation(numbers: np.ndarray) -> list[float]:
    """Of the training numbers; the deviation of what is all the same is taken as 1."""
    return [float(numbers.mean()), float(numbers.std()) or 1.0]


# ---- baselines


def baselines(reviews: Reviews, cache: Path) -> dict[str, Scores]:
    """Test scores of the mean, and of ridge regression on TF-IDF, from the training examples."""
    return kept_baselines(reviews, cache, compute_baselines)


def compute_baselines(reviews: Reviews) -> dict[str, Scores]:
    from sklearn.linear_model import Ridge

    train = reviews.splits["train"]
    test = reviews.splits["test"]
    train_numbers = numbers_of(train)
    numbers = numbers_of(test)
    mean = np.full((len(test), 1), train_numbers.mean())
    unit, by_features = tfidf(texts_of(train), train_numbers, texts_of(test), Ridge())
    by_features = by_features[:, None]
    return {
        "always the mean": evaluate(mean, numbers),
        f"TF-IDF ({unit}) + ridge": evaluate(by_features, numbers),
    }


def numbers_of(examples: list[Example]) -> np.ndarray:
    return np.array([float(example.label) for example in examples])


# ---- the files of a report


def write(
    run: Path,
    examples: list[Example],
    predicted: np.ndarray,
    numbers: np.ndarray,
    names: list[str],
    result: Result,
) -> str:
    """Write the report and its pictures, predictions.csv and result.json into the run. Returns the
    report."""
    predicted = predicted[:, 0]
    write_predictions(run / "predictions.csv", examples, predicted)
    sections = [
        [f"# {run.name}: {result['set']}, {len(examples):,} test examples"],
        score_table(result),
        provenance(result),
        largest_errors(examples, predicted, numbers),
    ]
    text = join(sections)
    write_atomic(run / "report.md", text)
    draw(run, predicted, numbers, result)
    write_result(run, result)
    return text


def write_predictions(file: Path, examples: list[Example], predicted: np.ndarray) -> None:
    """A row for each test example."""
    rows = []
    for example, number in zip(examples, predicted, strict=True):
        rows.append([*example, f"{number:.4f}"])
    write_sheet(file, ["text", "pair", "label", "prediction"], rows)


def largest_errors(
    examples: list[Example], predicted: np.ndarray, numbers: np.ndarray
) -> list[str]:
    """The predictions that are farthest off."""
    errors = np.abs(predicted - numbers)
    lines = ["The largest errors:", ""]
    for i in np.argsort(-errors, kind="stable")[:ERRORS_SHOWN]:
        lines.append(f"- {numbers[i]:g}, said {predicted[i]:.2f}: {excerpt(examples[i])}")
    return lines


def draw(run: Path, predicted: np.ndarray, numbers: np.ndarray, result: Result) -> None:
    """curves.png, and predictions.png: each test example a dot."""
    draw_curves(run, result)
    figure, axes = plots.figure(4.6, 4.2)
    axes.plot(numbers, predicted, "o", ms=3, alpha=0.4)
    ends = [numbers.min(), numbers.max()]
    axes.plot(ends, ends, ":", color="0.6", lw=0.8)
    pearson = result["test"]["pearson"]
    axes.set(xlabel="label", ylabel="prediction", title=f"test Pearson {pearson:.4f}")
    axes.grid(alpha=0.3)
    plots.save(figure, run / "predictions.png")
