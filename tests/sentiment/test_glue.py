"""GLUE's sets: their files are read as they are, and their scores are those of run_glue."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from labelled import read, refused
from sklearn.metrics import f1_score, matthews_corrcoef

from smallgpt.runs.metrics import MEASURES
from smallgpt.sentiment import report, sets, splits
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
