"""What a fine-tuned classifier is worth: scores, baselines on the same split, errors, pictures.

The scores and the linear model are scikit-learn's. It takes a second to import: only where needed.
"""

import csv
import functools
import json
import math
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smallgpt import plots
from smallgpt.files import read_json, write_atomic, write_cache
from smallgpt.runs.metrics import MEASURES, read
from smallgpt.sentiment.sets import DEFAULT_MEASURES, Example
from smallgpt.sentiment.splits import Reviews

ERRORS_SHOWN = 10
READABLE = 20  # classes: the numbers of more could not be read in a picture

Scores = dict[str, float]  # accuracy, macro_f1, and loss where there is one
Result = dict[str, Any]  # of a run: what result.json holds

# ---- scores


def evaluate(
    scores: np.ndarray, labels: np.ndarray, measures: tuple[str, ...] = DEFAULT_MEASURES
) -> Scores:
    """Mean loss in nats, and the measures of a set, of scores (N, K) against labels (N,)."""
    n, n_classes = scores.shape
    log_probability = log_softmax(scores)[np.arange(n), labels]
    loss = float(-log_probability.mean())
    predicted = scores.argmax(1)
    return {"loss": loss, **summary(predicted, labels, n_classes, measures)}


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, K) of scores (N, K)."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    sums = np.exp(shifted).sum(axis=1, keepdims=True)
    return shifted - np.log(sums)


def summary(
    predicted: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    measures: tuple[str, ...] = DEFAULT_MEASURES,
) -> Scores:
    """The measures of a set.

    Macro F1 is the unweighted mean of the F1 of all classes; that of a class which is neither among
    the labels nor predicted is 0. F1 is that of the second of two classes, which GLUE calls 1."""
    found = {}
    for name in measures:
        found[name] = float(SCORERS[name](labels, predicted, n_classes))
    return found


def accuracy(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predicted)


def macro_f1(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> float:
    from sklearn.metrics import f1_score

    classes = range(n_classes)
    return f1_score(labels, predicted, labels=classes, average="macro", zero_division=0)


def f1(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> float:
    from sklearn.metrics import f1_score

    return f1_score(labels, predicted, zero_division=0)


def matthews(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings(action="ignore"):  # one class alone, of which it is 0
        return matthews_corrcoef(labels, predicted)


SCORERS = {"accuracy": accuracy, "macro_f1": macro_f1, "f1": f1, "matthews": matthews}


def confusion(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts (K, K): row = the label, column = the prediction."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, predicted, labels=range(n_classes))


# ---- baselines


def baselines(reviews: Reviews, cache: Path) -> dict[str, Scores]:
    """Test scores of the largest class and of a linear model, from the same training examples."""
    return kept_baselines(reviews, cache, compute_baselines)


def kept_baselines(
    reviews: Reviews, cache: Path, compute: Callable[[Reviews], dict[str, Scores]]
) -> dict[str, Scores]:
    """The baselines of a set. They are kept in `cache`, and made again where they are damaged."""
    kept_file = cache / f"baselines-{reviews.fingerprint}.json"
    kept = read_json(kept_file)
    if are_scores(kept, reviews.measures):
        return kept
    found = compute(reviews)
    write_cache(kept_file, found)
    return found


def compute_baselines(reviews: Reviews) -> dict[str, Scores]:
    index = {label: i for i, label in enumerate(reviews.labels)}
    train = reviews.splits["train"]
    test = reviews.splits["test"]
    train_labels = np.array([index[e.label] for e in train])
    test_labels = np.array([index[e.label] for e in test])

    frequencies = Counter(e.label for e in train)
    largest = max(frequencies, key=frequencies.__getitem__)
    always_largest = np.full(len(test), index[largest])
    unit, by_features = tfidf(texts_of(train), train_labels, texts_of(test))
    measured = functools.partial(
        summary,
        labels=test_labels,
        n_classes=len(index),
        measures=reviews.measures,
    )
    return {
        f"always {largest}": measured(always_largest),
        f"TF-IDF ({unit}) + linear SVM": measured(by_features),
    }


def are_scores(kept: Any, measures: tuple[str, ...]) -> bool:
    """Whether a file of the cache holds what `baselines` writes."""
    if not isinstance(kept, dict) or not kept:
        return False
    for scores in kept.values():
        if not isinstance(scores, dict) or not scores.keys() >= {*measures}:
            return False
    return True


def texts_of(examples: list[Example]) -> list[str]:
    return [f"{e.text} {e.pair}".strip() for e in examples]


def tfidf(
    train_texts: list[str],
    train_labels: np.ndarray,
    test_texts: list[str],
    model: Any = None,
) -> tuple[str, np.ndarray]:
    """The unit of the TF-IDF features, and what a model on them predicts of the test texts; by
    default a linear SVM.

    Features are runs of 1 and 2 words; where words are not set apart, as in Chinese, runs of 1 to 3
    characters ("char")."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    spaces = sum(text.count(" ") for text in train_texts)
    characters = sum(len(text) for text in train_texts)
    if spaces / characters > 0.08:
        unit = "word"
        vectorizer.set_params(ngram_range=(1, 2), token_pattern=word_pattern())
    else:
        unit = "char"
        vectorizer.set_params(analyzer=unit, ngram_range=(1, 3))
    train_features = vectorizer.fit_transform(train_texts)
    test_features = vectorizer.transform(test_texts)
    model = model or LinearSVC(C=0.5, random_state=0)
    model.fit(train_features, train_labels)
    return unit, model.predict(test_features)


def word_pattern() -> str:
    r"""Words, and what is between them: also "I" and "!", which scikit-learn would leave out.

    \w alone would cut the words of Hindi at their vowel signs, which are marks."""
    marks = ""
    for code in range(0x300, 0xFE00):  # beyond, the variants of emoji are marks, too
        category = unicodedata.category(chr(code))
        if category in ("Mn", "Mc"):
            marks += chr(code)
    return rf"\w[\w{marks}]*|[^\w\s]+"


# ---- the files of a report


@dataclass
class Outcome:
    """What the classifier says of the test examples."""

    examples: list[Example]
    scores: np.ndarray  # (N, K)
    labels: np.ndarray  # (N,)
    names: list[str]  # of the K classes

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """The class of the highest score (N,)."""
        return self.scores.argmax(1)

    @functools.cached_property
    def probability(self) -> np.ndarray:
        """Of each class (N, K)."""
        return np.exp(log_softmax(self.scores))

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """The confusion matrix (K, K)."""
        n_classes = len(self.names)
        return confusion(self.predicted, self.labels, n_classes)


def write(
    run: Path,
    examples: list[Example],
    scores: np.ndarray,
    labels: np.ndarray,
    names: list[str],
    result: Result,
) -> str:
    """Write the report and its pictures, predictions.csv and result.json into the run.

    Returns the report."""
    outcome = Outcome(examples, scores, labels, names)
    write_predictions(run / "predictions.csv", outcome)
    text = markdown(run.name, outcome, result)
    write_atomic(run / "report.md", text)
    draw(run, outcome.counts, names, result)
    write_result(run, result)
    return text


def write_result(run: Path, result: Result) -> None:
    """result.json, the last file of a run: where it is, the run is finished."""
    content = json.dumps(result, indent=1, ensure_ascii=False)
    write_atomic(run / "result.json", content)


def write_predictions(file: Path, outcome: Outcome) -> None:
    """A row for each test example."""
    header = ["text", "pair", "label", "prediction", "probability"]
    header += [f"p_{name}" for name in outcome.names]
    rows = []
    for i, example in enumerate(outcome.examples):
        predicted = outcome.predicted[i]
        probabilities = [f"{p:.4f}" for p in outcome.probability[i]]
        row = [*example, outcome.names[predicted]]  # text, pair, label, prediction
        row.append(probabilities[predicted])
        rows.append(row + probabilities)
    write_sheet(file, header, rows)


def write_sheet(file: Path, header: list[str], rows: list[list[str]]) -> None:
    """A CSV for spreadsheets."""
    # utf-8-sig begins with a mark by which they know the encoding
    with open(file, "w", encoding="utf-8-sig", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(header)
        table.writerows(rows)


# ---- report.md


def markdown(run_name: str, outcome: Outcome, result: Result) -> str:
    """The report for people."""
    n = len(outcome.examples)
    sections = [
        [f"# {run_name}: {result['set']}, {n:,} test examples"],
        score_table(result),
        provenance(result),
        class_table(outcome),
        absent_classes(outcome),
        confusion_table(outcome),
        surest_errors(outcome),
    ]
    return join(sections)


def join(sections: list[list[str]]) -> str:
    """A text of sections, each a list of lines, with an empty line between; empty ones are left
    out."""
    paragraphs = ["\n".join(lines) for lines in sections if lines]
    return "\n\n".join(paragraphs) + "\n"


def score_table(result: Result) -> list[str]:
    """The model's test scores, on further tests too, and those of the baselines."""
    measures = result.get("measures", DEFAULT_MEASURES)
    titles = [MEASURES[name].title for name in measures]
    lines = [f"| | {' | '.join(titles)} | loss |", "|---" * (len(titles) + 2) + "|"]
    further = result.get("further_tests", {})
    for name, scores in {"": result["test"], **further}.items():
        title = f"**this model**, {name}" if name else "**this model**"
        lines.append(f"| {title} | {cells(scores, measures)} | {scores['loss']:.4f} |")
    for name, scores in result["baselines"].items():
        lines.append(f"| {cell(name)} | {cells(scores, measures)} | |")
    return lines


def cells(scores: Scores, measures: Iterable[str]) -> str:
    """The scores as cells of a table."""
    return " | ".join(MEASURES[name].show(scores[name]) for name in measures)


def provenance(result: Result) -> list[str]:
    """How the scores came about: the checkpoint, the settings, what was noted on the way."""
    main = result.get("measures", DEFAULT_MEASURES)[0]
    shown = f"{MEASURES[main].title} {MEASURES[main].show(result['validation'][main])}"
    examples = result["examples"]
    lines = [
        f"Chosen at step {result['step']} by validation {result['select']} "
        f"({shown}, {examples['validation']:,} examples); "
        f"trained on {examples['train']:,} examples in {result['seconds']:.0f} s; "
        "the test split was scored after training, and chose nothing.",
        "",
    ]
    for key in ("trunk", "mask", "freeze", "seed", "trainable", "device"):
        lines.append(f"- {key}: {result[key]}")
    for note in result["notes"]:
        lines.append(f"- {note}")
    return lines


def class_table(outcome: Outcome) -> list[str]:
    """Precision, recall and F1 of each class; a dash where there is nothing to divide by."""
    from sklearn.metrics import precision_recall_fscore_support

    *rates, supports = precision_recall_fscore_support(
        outcome.labels,
        outcome.predicted,
        labels=range(len(outcome.names)),
        zero_division=math.nan,
    )
    lines = ["| class | precision | recall | F1 | support |", "|---|---|---|---|---|"]
    for i, name in enumerate(outcome.names):
        words = [percent(of_classes[i]) for of_classes in rates]
        lines.append(f"| {cell(name)} | {' | '.join(words)} | {supports[i]:,} |")
    return lines


def percent(share: float) -> str:
    if math.isnan(share):
        return "–"
    return f"{share:.2%}"


def absent_classes(outcome: Outcome) -> list[str]:
    """A sentence on macro F1 where the test has no example of a class."""
    from sklearn.metrics import f1_score

    present = np.unique(outcome.labels)
    absent = np.setdiff1d(range(len(outcome.names)), present)
    if not len(absent):
        return []
    names = ", ".join(cell(outcome.names[i]) for i in absent)
    n = len(outcome.names)
    over_all = summary(outcome.predicted, outcome.labels, n)["macro_f1"]
    over_present = f1_score(outcome.labels, outcome.predicted, labels=present, average="macro")
    return [
        f"No test example is of class {names}. Macro F1 is the mean over all {n} classes, with 0 "
        f"for what the test does not have: {over_all:.2%}. Over the {len(present)} classes that it "
        f"has, it is {over_present:.2%}."
    ]


def confusion_table(outcome: Outcome) -> list[str]:
    """How often each class was taken for each."""
    names = [cell(name) for name in outcome.names]
    header = " | ".join(names)
    lines = [f"| label \\ prediction | {header} |", "|---|" + "---|" * len(names)]
    for i, name in enumerate(names):
        counts = " | ".join(map(str, outcome.counts[i]))
        lines.append(f"| {name} | {counts} |")
    return lines


def surest_errors(outcome: Outcome) -> list[str]:
    """The wrong predictions of highest probability: often it is the label that is wrong."""
    highest = outcome.probability.max(1)
    surest_first = np.argsort(-highest, kind="stable")
    is_wrong = outcome.predicted != outcome.labels
    errors = surest_first[is_wrong[surest_first]]
    lines = ["The surest errors:", ""]
    for i in errors[:ERRORS_SHOWN]:
        label = cell(outcome.examples[i].label)
        predicted = cell(outcome.names[outcome.predicted[i]])
        text = excerpt(outcome.examples[i])
        lines.append(f"- {label}, said {predicted} ({highest[i]:.0%}): {text}")
    return lines


def excerpt(example: Example, length: int = 160) -> str:
    """The beginning of a text, in one line."""
    text = f"{example.text} / {example.pair}" if example.pair else example.text
    text = " ".join(text.split())
    if len(text) > length:
        text = text[: length - 3] + "..."
    return cell(text)


def cell(text: str) -> str:
    """A text as a cell of a Markdown table: one line, nothing of which is markup."""
    one_line = " ".join(text.split())
    return one_line.replace("|", "\\|").replace("<", "&lt;")


# ---- pictures


def draw(run: Path, counts: np.ndarray, names: list[str], result: Result) -> None:
    """curves.png, and confusion.png: the test's confusion matrix."""
    draw_curves(run, result)
    accuracy = result["test"]["accuracy"]
    title = f"test accuracy {accuracy:.2%}"
    draw_confusion(run / "confusion.png", counts, names, title)


def draw_curves(run: Path, result: Result) -> None:
    """curves.png: the loss and the first measure of the set over the steps."""
    main = result.get("measures", DEFAULT_MEASURES)[0]
    figure, (left, right) = plots.figure(9, 3.6, columns=2)
    draw_curve(left, run, "loss", result["step"])
    left.set_ylabel("loss, nats per example")
    left.legend(frameon=False)
    draw_curve(right, run, main, result["step"])
    right.set_ylabel(MEASURES[main].title)
    for name, scores in result["baselines"].items():
        height = scores[main]
        right.axhline(height, color="0.3", lw=0.8, ls="--")
        right.annotate(
            f"test: {name}",
            (0.99, height),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
            color="0.3",
        )
    plots.save(figure, run / "curves.png")


def draw_curve(axes: Any, run: Path, key: str, chosen: int) -> None:
    """One number over the steps: of the training batches and of the validation split."""
    styles = {
        "train": dict(label="training", color="C0", lw=0.8, alpha=0.5),
        "val": dict(label="validation", color="C1", marker="o", ms=3),
    }
    for split, style in styles.items():
        records = [record for record in read(run, split) if key in record]
        steps = [record["step"] for record in records]
        values = [record[key] for record in records]
        axes.plot(steps, values, **style)
    axes.axvline(
        chosen,
        label=f"chosen: step {chosen}",
        color="0.6",
        lw=0.8,
        ls=":",
    )
    axes.set_xlabel("optimisation step")
    axes.grid(alpha=0.3)


def draw_confusion(file: Path, counts: np.ndarray, names: list[str], title: str) -> None:
    """Shades are shares of a row, so that a rare class is as dark as a frequent one."""
    size = min(2.4 + 0.8 * len(names), 20)  # inches
    figure, axes = plots.figure(size + 0.6, size)
    row_sums = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(row_sums, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= READABLE:
        for (row, column), share in np.ndenumerate(shares):
            axes.text(
                column,
                row,
                f"{counts[row, column]:,}",
                ha="center",
                va="center",
                color="white" if share > 0.5 else "black",
            )
    longest = max(len(name) for name in names)
    is_narrow = longest > 10 or len(names) > READABLE  # names side by side would overlap
    axes.set_xticks(range(len(names)), names, rotation=90 if is_narrow else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="prediction", ylabel="label", title=title)
    plots.save(figure, file)
