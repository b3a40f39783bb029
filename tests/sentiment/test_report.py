"""The report: its numbers are those published so far, and it is whole whatever texts hold."""

import csv
import json
import random
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from smallgpt.sentiment import report
from smallgpt.sentiment.sets import Example, ReviewSettings
from smallgpt.sentiment.splits import Reviews, load

WORDS = "the room was clean and quiet but breakfast cost too much we would not stay here".split()
NAMES = ["$", "$$", "a|b", "好评"]
KINDS = {
    "word": dict(token_pattern=r"\w+|[^\w\s]+", ngram_range=(1, 2)),
    "char": dict(analyzer="char", ngram_range=(1, 3)),
}


# ---- scores


def by_hand(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> dict[str, float]:
    """Accuracy and macro F1 by the formulas with which published numbers were made."""
    table = np.bincount(labels * n_classes + predicted, minlength=n_classes**2)
    table = table.reshape(n_classes, n_classes)
    hits = table.diagonal()
    f1 = 2 * hits / np.maximum(table.sum(0) + table.sum(1), 1)
    return {"accuracy": float(hits.sum() / len(labels)), "macro_f1": float(f1.mean())}


@pytest.mark.parametrize("k", [2, 3, 7, 151])
def test_the_numbers_are_those_of_before(k):
    """A change of library must not move a published number, also not where a class is absent from
    the test, or from the predictions, or from both."""
    draw = np.random.default_rng(k)
    with warnings.catch_warnings(action="error"):
        for n in (1, 2, 5, 40, 3000):
            for n_labels in {1, 2, max(2, k - 1), k}:
                labels = draw.integers(0, n_labels, n)
                scores = draw.normal(size=(n, k)) * 5
                scores[:, draw.integers(0, k, 1)] -= 100  # never predicted
                found = report.evaluate(scores, labels)
                guess = scores.argmax(1)
                expected = by_hand(guess, labels, k)
                assert found["accuracy"] == expected["accuracy"]
                assert found["macro_f1"] == pytest.approx(expected["macro_f1"], rel=1e-14)
                table = np.bincount(labels * k + guess, minlength=k * k).reshape(k, k)
                assert (report.confusion(guess, labels, k) == table).all()


@pytest.mark.parametrize("k", [2, 3, 7])
def test_scores_are_those_of_scikit_learn(k):
    draw = np.random.default_rng(k)
    for n in (1, 5, 200):
        scores = draw.normal(size=(n, k)) * 5
        labels = draw.integers(0, max(2, k - 1), n)  # the last class is never met
        found = report.evaluate(scores, labels)
        guess = scores.argmax(1)
        assert found["accuracy"] == pytest.approx(accuracy_score(labels, guess))
        f1 = f1_score(labels, guess, average="macro", labels=range(k), zero_division=0)
        assert found["macro_f1"] == pytest.approx(f1)
        p = torch.from_numpy(scores).softmax(1).numpy()
        assert found["loss"] == pytest.approx(log_loss(labels, p, labels=range(k)), rel=1e-6)
        counts = confusion_matrix(labels, guess, labels=range(k))
        assert report.confusion(guess, labels, k).tolist() == counts.tolist()
    assert all(type(value) is float for value in found.values())  # JSON knows no numpy
    assert report.evaluate(np.array([[1e4, -1e4]]), np.array([1]))["loss"] == 2e4  # no overflow


# ---- baselines


def made(language: str, tmp_path: Path) -> Reviews:
    """600 reviews, a third of the labels wrong: each detail of a pipeline moves its numbers."""
    draw = random.Random(3)
    rows = []
    for i in range(600):
        text = " ".join(draw.choices(WORDS, k=8)) + f" {i}!"
        label = draw.choice(["bad", "good"]) if i % 3 else "good"
        if language == "chinese":
            text = "".join(chr(0x4E00 + WORDS.index(word)) for word in text.split()[:-1]) + str(i)
        rows.append((text, label))
    path = tmp_path / f"{language}.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("Text", "Sentiment"), *rows])
    return load(ReviewSettings(path=str(path)))


@pytest.mark.parametrize("language, unit", [("english", "word"), ("chinese", "char")])
def test_baselines_are_scikit_learns_own(language, unit, tmp_path):
    data = made(language, tmp_path)
    with warnings.catch_warnings(action="error"):
        found = report.baselines(data, tmp_path / "cache")
    assert list(found) == ["always good", f"TF-IDF ({unit}) + linear SVM"]
    x, y = zip(*((e.text, e.label) for e in data.splits["train"]), strict=True)
    x_test, y_test = zip(*((e.text, e.label) for e in data.splits["test"]), strict=True)
    features = TfidfVectorizer(sublinear_tf=True, **KINDS[unit])
    majority = DummyClassifier(strategy="most_frequent")
    linear = make_pipeline(features, LinearSVC(C=0.5))
    for values, model in zip(found.values(), (majority, linear), strict=True):
        guess = model.fit(x, y).predict(x_test)
        f1 = f1_score(y_test, guess, average="macro", zero_division=0)
        assert values == pytest.approx({"accuracy": accuracy_score(y_test, guess), "macro_f1": f1})


def test_baselines_draw_nothing_at_random(tmp_path):
    """Regression: the SVM took the examples in an order of chance, so TF-IDF's score in the README
    was another one in some clones."""
    before = np.random.get_state()[1:3]
    report.compute_baselines(made("english", tmp_path))
    after = np.random.get_state()[1:3]
    assert np.array_equal(after[0], before[0]) and after[1] == before[1]


def test_baselines_are_computed_once_for_all_runs_on_the_same_examples(tmp_path):
    data = made("english", tmp_path)
    cache = tmp_path / "cache"
    found = report.baselines(data, cache)
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text(encoding="utf-8")) == found
    scores = {"kept": {"accuracy": 0.5, "macro_f1": 0.5}}
    kept.write_text(json.dumps(scores), encoding="utf-8")
    assert report.baselines(data, cache) == scores
    other = load(ReviewSettings(path=str(tmp_path / "english.csv"), split_seed=1))
    assert list(report.baselines(other, cache)) == list(found)


@pytest.mark.parametrize(
    "content", ["", '{"always good": {"accu', "\0" * 100, "[]", "7", "{}", '{"a": 1}']
)
def test_damaged_baselines_are_made_again(content, tmp_path):
    """Regression: an emptied file in .cache/ was a JSONDecodeError after all the training."""
    data = made("english", tmp_path)
    found = report.baselines(data, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(content, encoding="utf-8")
    assert report.baselines(data, tmp_path / "cache") == found
    assert json.loads(kept.read_text(encoding="utf-8")) == found


def test_words_of_all_scripts_are_whole():
    """Regression: words of Hindi were cut at their vowel signs. Others stay as they were."""
    pattern = re.compile(report.word_pattern())
    assert pattern.findall("यह हिन्दी है। ok") == ["यह", "हिन्दी", "है", "।", "ok"]
    assert pattern.findall("வணக்கம் ภาษาไทยดี") == ["வணக்கம்", "ภาษาไทยดี"]
    plain = "I'm 5/5 -- wow!!! \u2764\ufe0f\u2764\ufe0f naïve_2, 很好。 👍🏽 :-) # @x"
    assert pattern.findall(plain) == re.findall(r"\w+|[^\w\s]+", plain)


# ---- the files


def write_report(
    folder: Path, examples: list[Example], scores: np.ndarray, names: list[str], **changes
) -> tuple[str, dict]:
    """Write the report of a run of two steps; what it says, and result.json."""
    labels = np.array([names.index(e.label) for e in examples])
    records = []
    for step in (1, 2):
        for split in ("train", "val"):
            records.append({"step": step, "split": split, "loss": 1 / step, "accuracy": 0.5})
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    test = report.evaluate(scores, labels)
    result = {
        "set": "csv",
        "trunk": "t",
        "mask": True,
        "freeze": "none",
        "seed": 0,
        "trainable": 5,
        "device": "cuda, fsdp 4; bfloat16",
        "step": 2,
        "select": "accuracy",
        "validation": test,
        "test": test,
        "notes": ["a note"],
        "seconds": 1.0,
        "baselines": {"always $$": test, "TF-IDF (word) + linear SVM": test},
        "examples": {"train": 9, "validation": 9, "test": len(examples)},
        **changes,
    }
    text = report.write(folder, examples, scores, labels, names, result)
    assert text == (folder / "report.md").read_text(encoding="utf-8")
    assert json.loads((folder / "result.json").read_text(encoding="utf-8")) == result
    return text, result


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, list[Example], np.ndarray, str]:
    """The files of a report on awkward texts with awkward labels."""
    folder = tmp_path_factory.mktemp("report")
    draw = np.random.default_rng(0)
    texts = ['a, b; "c"\nand\r\n\nd', '"', ",", "'", "=1+1", "a\ttab", "<b>|bold|</b>"]
    texts += ["好，\u2028“很好”", "NA", "#"]
    labels = draw.integers(0, 4, 60)
    examples = []
    for i, label in enumerate(labels):
        examples.append(Example(texts[i % 10], ["", "x\ny"][i % 3 == 0], NAMES[label]))
    scores = draw.normal(size=(60, 4)) * 3
    text, _ = write_report(folder, examples, scores, NAMES)
    return folder, examples, scores, text


def table_of(text: str, first: str) -> list[list[str]]:
    """The cells of the Markdown table whose header begins with this cell."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [rows[0], *rows[2:]]


def test_the_report_names_model_and_baselines(written):
    _, examples, scores, text = written
    labels = np.array([NAMES.index(e.label) for e in examples])
    test = report.evaluate(scores, labels)
    line = f"{test['accuracy']:.2%} | {test['macro_f1']:.2%} |"
    assert f"| **this model** | {line} {test['loss']:.4f} |" in text
    assert f"| always $$ | {line} |" in text and f"| TF-IDF (word) + linear SVM | {line} |" in text
    assert "Chosen at step 2 by validation accuracy" in text
    assert "- trunk: t\n" in text and "- a note\n" in text
    assert "- device: cuda, fsdp 4; bfloat16\n" in text
    assert "No test example" not in text


def test_the_report_is_whole_whatever_texts_and_labels_hold(written):
    folder, _, _, text = written
    table = table_of(text, "label \\ prediction")
    assert [len(row) for row in table] == [5] * 5  # label, four predictions
    lines = text.splitlines()
    errors = lines[lines.index("The surest errors:") + 2 :]
    assert len(errors) == 10 and all(line.startswith("- ") for line in errors)
    sure = [int(re.search(r"\((\d+)%\)", line)[1]) for line in errors]
    assert sure == sorted(sure, reverse=True) and not any("<b>" in line for line in errors)
    for name in ("curves", "confusion"):
        assert (folder / f"{name}.png").stat().st_size > 10_000


def test_a_label_of_two_lines_stays_in_its_cell(tmp_path):
    """Regression: a label of a CSV may have a line end in it, and broke the report's tables."""
    names = ["two\nlines", "<i>|x"]
    examples = [Example(f"text {i}", "", names[i % 2]) for i in range(6)]
    text, _ = write_report(tmp_path, examples, np.eye(2)[[0, 0, 0, 1, 1, 1]], names)
    for first in ("class", "label \\ prediction"):
        _, *rows = table_of(text, first)
        assert [row[0] for row in rows] == ["two lines", r"&lt;i>\|x"]
    assert "- two lines, said &lt;i>\\|x (73%): text 4\n" in text


def test_precision_and_recall_of_each_class(tmp_path):
    names = ["bad", "good", "never said", "never met"]
    labels = [0, 0, 0, 1, 1, 2]
    said = [0, 0, 1, 1, 3, 0]
    examples = [Example("x", "", names[label]) for label in labels]
    text, _ = write_report(tmp_path, examples, 9.0 * np.eye(4)[said], names)
    assert table_of(text, "class") == [
        ["class", "precision", "recall", "F1", "support"],
        ["bad", "66.67%", "66.67%", "66.67%", "3"],
        ["good", "50.00%", "50.00%", "50.00%", "2"],
        ["never said", "–", "0.00%", "0.00%", "1"],
        ["never met", "0.00%", "–", "0.00%", "0"],
    ]


@pytest.mark.parametrize("said", [[0, 1, 0, 0], [0, 1, 2, 3]], ids=["never said", "said"])
def test_macro_f1_over_classes_that_the_test_does_not_have(said, tmp_path):
    """Regression: macro F1 counts 0 for a class without a test example, and no word said so."""
    names = ["0", "1", "2", "3"]
    examples = [Example("x", "", name) for name in "0101"]
    text, result = write_report(tmp_path, examples, 9.0 * np.eye(4)[said], names)
    (sentence,) = [line for line in text.splitlines() if line.startswith("No test example")]
    macro_f1 = result["test"]["macro_f1"]
    assert macro_f1 == by_hand(np.array(said), np.array([0, 1, 0, 1]), 4)["macro_f1"]
    assert sentence == (
        "No test example is of class 2, 3. Macro F1 is the mean over all 4 classes, with 0 for "
        f"what the test does not have: {macro_f1:.2%}. Over the 2 classes that it has, it is "
        f"{2 * macro_f1:.2%}."
    )


@pytest.mark.slow
def test_many_classes_are_drawn_in_a_picture_of_bounded_size(written, tmp_path):
    """Regression: 151 intents took 18,500 x 18,500 pixels; with 545 the run failed at its end."""
    folder, *_ = written
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    (tmp_path / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    names = [f"intent {i}" for i in range(600)]
    report.draw(tmp_path, np.eye(600, dtype=int), names, result)
    header = (tmp_path / "confusion.png").read_bytes()[16:24]
    width, height = struct.unpack(">II", header)
    assert max(width, height) <= 4000


def test_predictions_are_a_table_that_pandas_reads(written):
    pandas = pytest.importorskip("pandas")
    folder, examples, scores, _ = written
    found = pandas.read_csv(folder / "predictions.csv", keep_default_na=False)
    p_names = [f"p_{name}" for name in NAMES]
    assert list(found.columns) == ["text", "pair", "label", "prediction", "probability", *p_names]
    for column in ("text", "pair", "label"):
        assert found[column].tolist() == [getattr(e, column) for e in examples]
    assert found["prediction"].tolist() == [NAMES[i] for i in scores.argmax(1)]
    p = torch.from_numpy(scores).softmax(1).numpy()
    assert np.abs(found[p_names].to_numpy() - p).max() < 1e-4
    assert np.abs(found["probability"] - p.max(1)).max() < 1e-4
