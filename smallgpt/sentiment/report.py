"""What a fine-tuned classifier is worth: scores, simple baselines on the same split, errors, pictures."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from smallgpt import plots
from smallgpt.files import write_atomic
from smallgpt.runs.metrics import read
from smallgpt.sentiment.sets import Example
from smallgpt.sentiment.splits import Reviews


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, K) of scores (N, K)."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def confusion(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts (n_classes, n_classes): row = the label, column = the prediction."""
    return np.bincount(labels * n_classes + predicted, minlength=n_classes**2).reshape(
        n_classes, n_classes
    )


def summary(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> dict[str, float]:
    """Accuracy over examples, and the unweighted mean of the classes' F1 (0 for a class never met and never said)."""
    table = confusion(predicted, labels, n_classes)
    hit = table.diagonal()
    f1 = 2 * hit / np.maximum(table.sum(0) + table.sum(1), 1)
    return {"accuracy": float(hit.sum() / len(labels)), "macro_f1": float(f1.mean())}


def evaluate(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean loss in nats, accuracy and macro F1 of scores (N, K) against labels (N,)."""
    loss = -log_softmax(scores)[np.arange(len(labels)), labels].mean()
    return {"loss": float(loss), **summary(scores.argmax(1), labels, scores.shape[1])}


def baselines(reviews: Reviews, cache: Path) -> dict[str, dict[str, float]]:
    """Test scores of the largest class and of a linear model on TF-IDF, trained on the same examples; kept in `cache`.

    TF-IDF of runs of 1 to 3 characters where words are not set apart (Chinese), else of 1 and 2 words."""
    kept = cache / f"baselines-{reviews.fingerprint}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    from sklearn.feature_extraction.text import TfidfVectorizer  # a second to import
    from sklearn.svm import LinearSVC

    train, test = reviews.splits["train"], reviews.splits["test"]
    index = {label: i for i, label in enumerate(reviews.labels)}
    labels = np.array([index[e.label] for e in test])
    largest = Counter(e.label for e in train).most_common(1)[0][0]
    texts = [[f"{e.text} {e.pair}".strip() for e in side] for side in (train, test)]
    spaces = sum(t.count(" ") for t in texts[0]) / sum(map(len, texts[0]))
    # every word counts, also "I" and "!", which scikit-learn leaves out by default
    words = dict(analyzer="word", ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]+")
    kind = words if spaces > 0.08 else dict(analyzer="char", ngram_range=(1, 3))
    vectorizer = TfidfVectorizer(sublinear_tf=True, **kind)
    model = LinearSVC(C=0.5).fit(
        vectorizer.fit_transform(texts[0]), [index[e.label] for e in train]
    )
    found = {
        f"always {largest}": summary(np.full(len(test), index[largest]), labels, len(index)),
        f"TF-IDF ({kind['analyzer']}) + linear SVM": summary(
            model.predict(vectorizer.transform(texts[1])), labels, len(index)
        ),
    }
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, json.dumps(found, ensure_ascii=False), shared=True)
    return found


def write(
    run: Path,
    examples: list[Example],
    scores: np.ndarray,
    labels: np.ndarray,
    names: list[str],
    result: dict[str, Any],
) -> str:
    """Write predictions.csv, result.json, report.md, curves.png and confusion.png into the run; returns the report."""
    predicted, probability = scores.argmax(1), np.exp(log_softmax(scores))
    with open(
        run / "predictions.csv", "w", encoding="utf-8-sig", newline=""
    ) as file:  # the mark is for spreadsheets
        table = csv.writer(file)
        table.writerow(
            ["text", "pair", "label", "prediction", "probability", *(f"p_{name}" for name in names)]
        )
        for e, k, p in zip(examples, predicted, probability, strict=True):
            table.writerow(
                [e.text, e.pair, e.label, names[k], f"{p[k]:.4f}", *(f"{x:.4f}" for x in p)]
            )
    counts = confusion(predicted, labels, len(names))
    text = markdown(run.name, examples, predicted, probability, labels, names, counts, result)
    (run / "report.md").write_text(text, encoding="utf-8")
    draw(run, counts, names, result)
    # last: where it is, the run is finished
    write_atomic(run / "result.json", json.dumps(result, indent=1, ensure_ascii=False))
    return text


def cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|")


def markdown(
    name: str,
    examples: list[Example],
    predicted: np.ndarray,
    probability: np.ndarray,
    labels: np.ndarray,
    names: list[str],
    counts: np.ndarray,
    result: dict[str, Any],
) -> str:
    """The report for people."""
    lines = [
        f"# {name}: {result['set']}, {len(examples):,} test examples",
        "",
        "| | accuracy | macro F1 | loss |",
        "|---|---|---|---|",
    ]
    test = result["test"]
    lines.append(
        f"| **this model** | {test['accuracy']:.2%} | {test['macro_f1']:.2%} | {test['loss']:.4f} |"
    )
    lines += [
        f"| {cell(k)} | {v['accuracy']:.2%} | {v['macro_f1']:.2%} | |"
        for k, v in result["baselines"].items()
    ]
    val = result["validation"]
    lines += [
        "",
        f"Chosen at step {result['step']} by validation {result['select']} (accuracy {val['accuracy']:.2%}, "
        f"{result['examples']['validation']:,} examples); trained on {result['examples']['train']:,} examples in "
        f"{result['seconds']:.0f} s; the test split was read once.",
        "",
    ]
    lines += [f"- {key}: {result[key]}" for key in ("trunk", "mask", "freeze", "seed", "trainable")]
    lines += [f"- {note}" for note in result["notes"]]
    lines += [
        "",
        "| label \\ prediction | " + " | ".join(map(cell, names)) + " |",
        "|---|" + "---|" * len(names),
    ]
    lines += [
        f"| {cell(name)} | {' | '.join(map(str, row))} |"
        for name, row in zip(names, counts, strict=True)
    ]
    wrong = [
        i for i in np.argsort(-probability.max(1), kind="stable") if predicted[i] != labels[i]
    ][:10]
    lines += ["", "The surest errors:", ""]
    for i in wrong:
        text = " ".join(" / ".join(filter(None, examples[i][:2])).split())
        text = cell(text if len(text) <= 160 else text[:157] + "...").replace("<", "&lt;")
        lines.append(
            f"- {names[labels[i]]}, said {names[predicted[i]]} ({probability[i].max():.0%}): {text}"
        )
    return "\n".join(lines) + "\n"


def draw(run: Path, counts: np.ndarray, names: list[str], result: dict[str, Any]) -> None:
    """curves.png: loss and accuracy over the steps; confusion.png: the test's confusion matrix."""
    train, val = read(run, "train"), read(run, "val")
    fig, axes = plots.figure(9, 3.6, columns=2)
    for ax, key in zip(axes, ("loss", "accuracy"), strict=True):
        ax.plot(
            [r["step"] for r in train],
            [r[key] for r in train],
            color="C0",
            lw=0.8,
            alpha=0.5,
            label="training",
        )
        ax.plot(
            [r["step"] for r in val],
            [r[key] for r in val],
            color="C1",
            marker="o",
            ms=3,
            label="validation",
        )
        ax.axvline(
            result["step"], color="0.6", lw=0.8, ls=":", label=f"chosen: step {result['step']}"
        )
        ax.set(
            xlabel="optimisation step", ylabel="loss, nats per example" if key == "loss" else key
        )
        ax.grid(alpha=0.3)
    for name, values in result["baselines"].items():
        axes[1].axhline(values["accuracy"], color="0.3", lw=0.8, ls="--")
        axes[1].annotate(
            f"test: {name}",
            (0.99, values["accuracy"]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
            color="0.3",
        )
    axes[0].legend(frameon=False)
    plots.save(fig, run / "curves.png")

    size = min(2.4 + 0.8 * len(names), 20)  # inches
    fig, ax = plots.figure(size + 0.6, size)
    ax.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 20:  # more numbers could not be read
        for (i, j), n in np.ndenumerate(counts):
            ax.text(
                j,
                i,
                f"{n:,}",
                ha="center",
                va="center",
                color="white" if n > 0.5 * counts[i].sum() else "black",
            )
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set(
        xlabel="prediction", ylabel="label", title=f"test accuracy {result['test']['accuracy']:.2%}"
    )
    plots.save(fig, run / "confusion.png")
