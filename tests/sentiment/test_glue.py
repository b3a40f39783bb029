"""GLUE's sets: their files are read as they are, and their scores are those of run_glue."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from labelled import read, refused
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.metrics import f1_score, matthews_corrcoef, mean_squared_error
from sklearn.pipeline import make_pipeline

import sentiment_train
from fine_tuning import ALONE, predictions, result_of
from sentiment_train import SentimentSettings, finetune
from smallgpt import settings
from smallgpt.runs.metrics import MEASURES
from smallgpt.sentiment import regression, report, sets, splits
from smallgpt.sentiment.sets import Example, ReviewSettings

MNLI_TITLES = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2"
).split()
PARSES = ["( a )", "( b )", "(ROOT a)", "(ROOT b)"]


def write(folder: Path, name: str, *rows: list[str]) -> None:
    text = "".join("\t".join(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")


def test_cola_has_no_header_and_quotes_are_text(tmp_path):
    """Its first sentence would become the header, and a quote would swallow the lines below it."""
    rows = [
        ["gj04", "1", "", 'They said "hello.'],
        ["gj04", "0", "*", "They drank the pub."],
        ["cj99", "0", "??", 'I can "well imagine.'],
    ]
    write(tmp_path, "train.tsv", *rows)
    write(tmp_path, "dev.tsv", ["gj04", "1", "", "The sailors rode the breeze."])
    found = read(set="cola", path=str(tmp_path))
    assert found["train"] == [
        Example('They said "hello.', "", "acceptable"),
        Example("They drank the pub.", "", "unacceptable"),
        Example('I can "well imagine.', "", "unacceptable"),
    ]
    assert found["test"] == [Example("The sailors rode the breeze.", "", "acceptable")]


def test_rte_and_qnli_are_pairs(tmp_path):
    for name, titles in (
        ("rte", ["index", "sentence1", "sentence2", "label"]),
        ("qnli", ["index", "question", "sentence", "label"]),
    ):
        write(tmp_path, "train.tsv", titles, ["0", 'a "b', "c", "not_entailment"])
        write(tmp_path, "dev.tsv", titles, ["0", "d", "e", "entailment"])
        found = read(set=name, path=str(tmp_path))
        assert found["train"] == [Example('a "b', "c", "not_entailment")]
        assert found["test"] == [Example("d", "e", "entailment")]
    write(tmp_path, "dev.tsv", titles, ["0", "d", "e", "maybe"])
    with pytest.raises(sets.UserError, match="the label 'maybe': it must be one of entailment"):
        read(set="qnli", path=str(tmp_path))


def test_qqp_leaves_out_rows_that_are_cut_short(tmp_path):
    titles = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    rows = [
        ["0", "1", "2", "How old is it?", "What is its age?", "1"],
        ["1", "3", "4", "a question that has lost"],
        ["2", "5", "6", "Why?", "Who?", "0"],
    ]
    write(tmp_path, "train.tsv", titles, *rows)
    write(tmp_path, "dev.tsv", titles, rows[2])
    files = sets.SetFiles(ReviewSettings(set="qqp", path=str(tmp_path)))
    found = sets.qqp(files)
    assert files.notes == ["train.tsv: dropped 1 rows that are cut short"]
    assert found["train"] == [
        Example("How old is it?", "What is its age?", "duplicate"),
        Example("Why?", "Who?", "different"),
    ]


@pytest.fixture
def mnli(tmp_path) -> Path:
    """MNLI's files with 60 training pairs; a pair of each test is among them."""
    names = ("entailment", "neutral", "contradiction")

    def row(i: int, of: str, voters: int) -> list[str]:
        label = names[i % 3]
        start = [str(i), "1", "1e", "slate", *PARSES, f"premise {of} {i}", f"hypothesis {i}"]
        return [*start, *[label] * voters, label]

    one = [*MNLI_TITLES, "label1", "gold_label"]
    five = [*MNLI_TITLES, *(f"label{i}" for i in range(1, 6)), "gold_label"]
    train = [row(i, "train", 1) for i in range(60)]
    tests = {
        "dev_matched.tsv": [row(i, "matched", 5) for i in range(6)] + [row(7, "train", 5)],
        "dev_mismatched.tsv": [row(i, "other", 5) for i in range(9)] + [row(8, "train", 5)],
    }
    write(tmp_path, "train.tsv", one, *train)
    for name, rows in tests.items():
        write(tmp_path, name, five, *rows)
    return tmp_path


def test_mnli_has_two_tests_and_training_holds_nothing_of_either(mnli):
    """A copy of a mismatched test pair in training would make that score worth nothing."""
    found = splits.load(ReviewSettings(set="mnli", path=str(mnli)))
    assert found.labels == ["contradiction", "entailment", "neutral"]
    assert splits.tests_of(found.splits) == ["test", "test_mismatched"]
    sizes = {name: len(examples) for name, examples in found.splits.items()}
    assert (sizes["test"], sizes["test_mismatched"]) == (7, 10)
    assert sizes["train"] + sizes["validation"] == 58
    texts = {e.text for name in ("train", "validation") for e in found.splits[name]}
    assert not texts & {"premise train 7", "premise train 8"}
    assert found.splits["test"][0] == Example("premise matched 0", "hypothesis 0", "entailment")


def test_a_set_without_an_address_says_where_it_is():
    assert "https://gluebenchmark.com/tasks" in refused("", set="cola")
    assert "https://gluebenchmark.com/tasks" in refused("nowhere", set="mnli")


def test_every_set_has_measures_that_are_known():
    for name, measures in sets.MEASURES.items():
        assert name in sets.READERS and {*measures} <= MEASURES.keys()


def test_stsb_foretells_a_number(tmp_path):
    titles = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    start = ["0", "news", "MSR", "2012", "1", "none", "none"]
    rows = [[*start, f"a {i}", f"b {i}", f"{i % 26 / 5:.3f}"] for i in range(60)]
    write(tmp_path, "train.tsv", titles.split(), *rows[:50])
    write(tmp_path, "dev.tsv", titles.split(), *rows[50:])
    found = splits.load(ReviewSettings(set="stsb", path=str(tmp_path), train_size=20))
    assert (found.labels, found.is_number) == (["score"], True)
    assert found.splits["test"][0] == Example("a 50", "b 50", "4.800")
    assert len(found.splits["train"]) == 20
    write(tmp_path, "dev.tsv", titles.split(), [*start, "a", "b", "high"])
    message = refused(tmp_path, set="stsb")
    assert message == "the test split has the label 'high': it must be a number"


def test_correlations_are_those_of_scipy():
    draw = np.random.default_rng(0)
    for n in (3, 50, 1500):
        numbers = draw.integers(0, 26, n) / 5
        predicted = numbers + draw.normal(size=n)
        found = regression.evaluate(predicted[:, None], numbers)
        assert found["pearson"] == pytest.approx(np.corrcoef(predicted, numbers)[0, 1])
        ranks = [rankdata(values) for values in (predicted, numbers)]
        assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
        assert found["loss"] == pytest.approx(mean_squared_error(numbers, predicted))
    with warnings.catch_warnings(action="error"):
        same = regression.evaluate(np.ones((3, 1)), np.arange(3.0))
    assert (same["pearson"], same["spearman"]) == (0, 0), "nan would not be compared with anything"


def test_the_baselines_of_a_number(tmp_path):
    """The mean foretells nothing, and ridge regression finds a word that decides."""
    draw = np.random.default_rng(0)
    made = {}
    for split, n in (("train", 300), ("validation", 5), ("test", 100)):
        examples = []
        for i in range(n):
            number = int(draw.integers(0, 2))
            word = ["different", "alike"][number]
            examples.append(Example(f"the two are {word} {i}", "a pair", str(number)))
        made[split] = examples
    reviews = splits.Reviews(made, ["score"], ("pearson", "spearman"))
    found = regression.baselines(reviews, tmp_path)
    assert list(found) == ["always the mean", "TF-IDF (word) + ridge"]
    mean, ridge = found.values()
    assert mean["pearson"] == 0 and ridge["pearson"] > 0.9
    train = [e.text + " a pair" for e in made["train"]]
    features = TfidfVectorizer(
        sublinear_tf=True, ngram_range=(1, 2), token_pattern=report.word_pattern()
    )
    model = make_pipeline(features, Ridge()).fit(train, [float(e.label) for e in made["train"]])
    predicted = model.predict([e.text + " a pair" for e in made["test"]])
    numbers = [float(e.label) for e in made["test"]]
    assert ridge["pearson"] == pytest.approx(np.corrcoef(predicted, numbers)[0, 1])


def test_a_number_is_learnt_reported_and_given_by_classify(fine, tmp_path, run):
    """The scores of a head without bias are those of a number less its mean: what people read must
    be a number of the set again, in the report and from classify alike."""
    words = {"4.5": "lovely", "3": "middling", "0.5": "dirty"}
    titles = "sentence1 sentence2 score".split()
    rows = []
    for i in range(240):
        number = list(words)[i % 3]
        rows.append([f"room {i} was {words[number]}", f"it was {words[number]}", number])
    write(tmp_path, "train.tsv", titles, *rows[:180])
    write(tmp_path, "dev.tsv", titles, *rows[180:])
    changes = dict(data__set="stsb", data__path=tmp_path, select="pearson", max_steps=40)
    s = settings.load(SentimentSettings, fine(tmp_path, run="n", eval_every=10, **changes))
    assert finetune(s, ALONE) == 0
    folder = tmp_path / "n"
    result = result_of(folder)
    assert result["test"]["pearson"] > 0.9 and result["test"]["loss"] < 1
    assert list(result["baselines"]) == ["always the mean", "TF-IDF (word) + ridge"]
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| | Pearson | Spearman | loss |" in text and "The largest errors:" in text
    for name in ("curves.png", "predictions.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    predicted = predictions(folder)
    assert [float(p["label"]) for p in predicted[:3]] == [4.5, 3, 0.5]

    file = tmp_path / "pairs.txt"
    lines = [f"{p['text']}\t{p['pair']}" for p in predicted]
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")
    ended = run("scripts.classify", [folder, f"file={file}", "device=cpu", "dtype=float32"])
    given = [float(line.split("\t")[0]) for line in ended.out.splitlines()]
    assert given == pytest.approx([float(p["prediction"]) for p in predicted], abs=2e-4)
    ended = run("scripts.classify", [folder, lines[0], "json=true", "device=cpu"])
    assert json.loads(ended.out)["score"] == pytest.approx(given[0], abs=1e-2)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, "select=accuracy is not measured of stsb: choose of pearson, spearman, loss"),
        ({"select": "pearson", "label_smoothing": 0.1}, "label_smoothing and class_weights are of"),
    ],
)
def test_what_is_of_classes_is_refused_of_numbers(fine, tmp_path, mistake_of, changes, says):
    titles = "sentence1 sentence2 score".split()
    rows = [[f"a {i}", f"b {i}", f"{i % 5}"] for i in range(50)]
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path, name, titles, *(rows[:40] if name == "train.tsv" else rows[40:]))
    argv = fine(tmp_path, data__set="stsb", data__path=tmp_path, **changes)
    assert says in mistake_of(sentiment_train.main, argv)


def test_matthews_and_f1_are_those_of_scikit_learn():
    """run_glue reports them for CoLA, and for MRPC and QQP: F1 is of the class that GLUE calls 1,
    which is the second of our names."""
    draw = np.random.default_rng(0)
    with warnings.catch_warnings(action="error"):
        for n in (1, 2, 50, 1000):
            labels = draw.integers(0, 2, n)
            scores = draw.normal(size=(n, 2)) + np.eye(2)[labels]
            guess = scores.argmax(1)
            found = report.evaluate(scores, labels, sets.MEASURES["mrpc"])
            assert list(found) == ["loss", "accuracy", "f1", "macro_f1"]
            assert found["f1"] == f1_score(labels, guess, pos_label=1, zero_division=0)
            found = report.evaluate(scores, labels, sets.MEASURES["cola"])
            if n > 2:  # of one class alone scikit-learn warns
                assert found["matthews"] == matthews_corrcoef(labels, guess)
    for name, positive in (("mrpc", "paraphrase"), ("qqp", "duplicate")):
        names = {"mrpc": sets.PARAPHRASE, "qqp": sets.DUPLICATE}[name]
        assert names["1"] == positive and sorted(names.values())[1] == positive
