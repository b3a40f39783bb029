"""What the head of a classifier reads: two texts, marks, a cue, label words, the lowest blocks."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import sentiment_train
from fine_tuning import ALONE, BLOCK, CPU, made, predictions
from helpers import last_weights, losses, write_csv
from model import GPT, GPTClassifier, GPTConfig
from sentiment_train import SentimentSettings, make_classifier, prepare
from smallgpt import load_classifier, settings
from smallgpt.inference import Classifier
from smallgpt.weights.pretrained import digest, open_model, open_trunk

torch.set_num_threads(1)
SMALL = GPTConfig(vocab_size=20, block_size=12, n_layer=2, n_head=2, n_embd=8)
SEP = 19


@pytest.fixture
def asked(fine, tmp_path) -> Callable[..., SentimentSettings]:
    return lambda **changes: settings.load(SentimentSettings, fine(tmp_path, **changes))


def lively(model: GPTClassifier) -> GPTClassifier:
    """In float64, with weights that make everything matter."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.double().eval()


def of_run(folder: Path) -> Classifier:
    return load_classifier(folder, "cpu", "float32")


def assert_classified_as_reported(folder: Path) -> None:
    """scripts/classify.py reads the texts as the test split was read."""
    model, rows = of_run(folder), predictions(folder)
    texts = [f"{row['text']}\t{row['pair']}" if row["pair"] else row["text"] for row in rows]
    found = model.score(texts).exp()
    wanted = [[float(row[f"p_{label}"]) for label in model.labels] for row in rows]
    assert len(rows) > 20 and np.abs(found.numpy() - wanted).max() < 2e-4


# --- pairs ----------------------------------------------------------------------------------------

ROWS = [
    [1, 3, 4, SEP, 4, 5, 6, 7],
    [2, 2, 2, 8, 8, SEP, 2],
    [9, SEP, 9],
    [1, 3, 4, 5, 8, SEP, 4, 5, 1, 3, 4],  # runs of 3 and of 2 that overlap
    [7, 2, 7, 2, 7, SEP, 2, 7, 2],
]


def longest_run(text: list[int], at: int, other: list[int]) -> int:
    """Length of the longest part of a text with position `at` in it that the other text has."""
    longest = 0
    for first in range(at + 1):
        for end in range(at + 1, len(text) + 1):
            part = text[first:end]
            size = end - first
            if any(other[i : i + size] == part for i in range(len(other))):
                longest = max(longest, size)
    return longest


def by_hand(model: GPTClassifier, ids: list[int]) -> torch.Tensor:
    """Scores of one pair, from the definition of the mark."""
    at = ids.index(SEP)
    first, second = ids[:at], ids[at:]
    x = model.gpt.wte(torch.tensor([ids]))
    runs = [longest_run(first, i, second) for i in range(len(first))]
    runs += [longest_run(second, i, first) for i in range(len(second))]
    most = len(model.marks.weight) - 1
    for i, run in enumerate(runs):
        x[0, i] += model.marks.weight[min(run, most)]
    context = model.gpt.context(x)
    h = model.gpt.norm(model.gpt.run_blocks(x, context))[0]
    return model.head(h.mean(0) if model.pool == "mean" else h[-1])


@torch.no_grad()
@pytest.mark.parametrize("pool, marks", [("last", 1), ("mean", 1), ("mean", 2), ("mean", 6)])
def test_what_both_texts_hold_is_marked(pool, marks):
    """A mark on the wrong token would still train a little."""
    model = lively(GPTClassifier(GPT(SMALL), 3, pool, True, SEP, marks))
    wanted = torch.stack([by_hand(model, ids) for ids in ROWS])
    for width in (11, 12):  # padding changes nothing, also where it is a token that a text has
        for fill in (0, 2):
            padded = torch.tensor([ids + [fill] * (width - len(ids)) for ids in ROWS])
            found = model(padded, torch.tensor([len(ids) for ids in ROWS]))
            assert torch.allclose(found, wanted, atol=1e-12)


def test_a_run_with_marks(fit, pairs):
    """Its marks would not be saved or not be read by classify.py, or a trunk would have them."""
    case = dict(data__path=pairs, data__pair_column="Second", marks=3)
    folder = fit(**case)
    assert_classified_as_reported(folder)
    assert last_weights(folder)["marks.weight"].any()
    again = fit(run="again", trunk=folder, max_steps=1)
    assert "marks.weight" not in last_weights(again)


@torch.no_grad()
@pytest.mark.parametrize("marks, rows", [(1, [0, 1]), (3, [0, 1, 2, 2])])
def test_marks_of_a_task_before_are_gone_on_with(fit, asked, pairs, marks, rows):
    """The blocks have learned to read them: a chain would unlearn at each link."""
    case = dict(data__path=pairs, data__pair_column="Second")
    folder = fit(**case, marks=2)
    learned = last_weights(folder)["marks.weight"]
    s = asked(**case, trunk=folder, marks=marks)
    model = make_classifier(s, prepare(s, ALONE), CPU)
    assert torch.equal(model.marks.weight, learned[rows])


# --- cue and label words --------------------------------------------------------------------------


def test_every_text_ends_with_the_cue(fit, asked):
    """A long text would push it out, token_dropout leave it out, or classify.py not add it."""
    case = dict(cue="\n==>", token_dropout=0.5, mask=False)
    task = prepare(asked(**case), ALONE)
    cue = task.trunk.tokenizer.encode("\n==>")
    longest = max(task.inputs["test"].data.lengths)
    assert len(cue) == 4 and longest == BLOCK
    for inputs in task.inputs.values():
        assert all(ids[-4:].tolist() == cue for ids in inputs.data.ids)
    folder = fit(**case)
    assert_classified_as_reported(folder)
    meta = json.loads((folder / "step-00000008" / "meta.json").read_text(encoding="utf-8"))
    assert meta["head"]["cue"] == cue


@torch.no_grad()
def test_a_head_begins_with_the_scores_of_a_cloze(asked, trunk):
    """Those of the language model for each label's word behind the cue."""
    words = {"bad": "a", "good": "red"}
    task = prepare(asked(cue=" is", label_words__bad="a", label_words__good="red"), ALONE)
    model = make_classifier(asked(label_words__bad="a", label_words__good="red"), task, CPU).eval()
    _, gpt, tokenizer = open_model(trunk)
    gpt.eval()
    for ids in task.inputs["test"].data.ids[:5]:
        tokens = torch.from_numpy(ids)[None]
        scores = model(tokens, torch.tensor([len(ids)]))[0]
        logits = gpt(tokens)[0, -1]
        for score, label in zip(scores, task.data.labels, strict=True):
            wanted = logits[tokenizer.encode(words[label])].mean()
            assert float(score) == pytest.approx(float(wanted), abs=1e-5)


# --- the lowest blocks ----------------------------------------------------------------------------


@torch.no_grad()
def test_the_lowest_blocks_are_the_trunks(fit, asked, trunk):
    """A trunk of one block of two: what is above is neither read nor saved."""
    task = prepare(asked(trunk_blocks=1), ALONE)
    model = make_classifier(asked(trunk_blocks=1), task, CPU).eval()
    _, gpt, _ = open_model(trunk)
    ids = torch.from_numpy(task.inputs["test"].data.ids[0])[None]
    context = gpt.context(ids)
    lowest = gpt.blocks[0](gpt.wte(ids), context, 0)
    wanted = model.head(gpt.norm(lowest)[:, -1])
    assert torch.allclose(model(ids, torch.tensor([ids.size(1)])), wanted, atol=1e-6)
    with torch.enable_grad():
        folder = fit(trunk_blocks=1)
    assert not any("blocks.1." in name for name in last_weights(folder))
    assert_classified_as_reported(folder)
    assert "lowest 1 of 2 blocks" in (folder / "report.md").read_text(encoding="utf-8")


def test_activations_that_are_computed_again_change_nothing(fit):
    """In frozen, adapted and whole blocks."""
    for case in ({}, {"lora": 2}, {"freeze": "all_but_last:1", "cache_gb": 0}):
        case |= {"max_steps": 2, "dropout": 0.2}
        name = str(len(str(case)))
        kept = losses(fit(run=f"kept{name}", **case), "train")
        again = losses(fit(run=f"again{name}", recompute=1, **case), "train")
        assert again == pytest.approx(kept, rel=1e-6) and len(kept) == 2


# --- users' mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, says",
    [
        ("trunk_blocks=3", "trunk_blocks=3 is more than the trunk's 2"),
        ("marks=2", "marks=2 compares two texts, and csv has no pairs: set data.pair_column"),
        ("marks=2 freeze=trunk", "marks=2 needs freeze=none"),
        ("cue=x pool=mean", "cue needs pool=last: with pool=mean the head reads the text"),
        (f"cue={'x' * 30}", "the cue has 30 tokens, and a text at most 48: shorten it"),
        ("label_words.good=x", "label_words has good, and the labels of csv are bad, good"),
        ("label_words.good=", "label_words.good must be a word, such as good"),
    ],
    ids=lambda v: v.partition(" ")[0],
)
def test_mistakes(fine, tmp_path, mistake_of, argument, says):
    message = mistake_of(sentiment_train.main, [*fine(tmp_path), *argument.split(" ")])
    assert says in message and "\n" not in message


# --- the chain of tasks before --------------------------------------------------------------------


def test_a_chain_is_made_link_by_link_and_the_report_names_each(
    fine, tmp_path, start, run, trunk, mistake_of
):
    """A link that is finished is not made again; what chose the last run may have been read; a
    sweep over chains compares no two seeds, since each has a link of its own as its trunk."""
    for name, seed in (("a", 3), ("b", 4)):
        path = write_csv(tmp_path / f"{name}.csv", made(200, seed))
        text = f"max_steps: 2\noptim: {{lr: 0.01}}\ndata: {{path: {path}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    args = fine(tmp_path, max_steps=2, before=f"[{', '.join(files)}]")
    first, beside = (start("sentiment_train", [*args, f"run={name}"]) for name in ("r", "beside"))
    beside = beside.wait()  # one of the two makes the links, the other waits for them
    first = first.wait()
    assert first.status == beside.status == 0, first.err + beside.err
    assert (first.out + beside.out).count("run      ") == 4
    names = ["before+trunk+seed-0+a", "before+trunk+seed-0+a+b", "r"]
    (corpus,) = open_trunk(str(trunk)).sources
    links = [corpus["path"], f"csv in {tmp_path / 'a.csv'}", f"csv in {tmp_path / 'b.csv'}"]
    for count, name in enumerate(names, 1):
        said = (tmp_path / name / "report.md").read_text(encoding="utf-8")
        assert f"- trained on before: {' -> '.join(links[:count])}\n" in said
        assert "validation texts are" not in said
    result = json.loads((tmp_path / "r" / "result.json").read_text(encoding="utf-8"))
    assert result["hashes"]["trunk"] == digest(str(trunk))
    again = run("sentiment_train", args)
    assert again.status == 0, again.err
    assert again.out.count("run      ") == 1

    # the texts of a link, in another split: its training has read those of validation and test
    split = ["data.split_seed=1", f"data.path={tmp_path / 'b.csv'}", "run=s"]
    other = run("sentiment_train", [*args, *split, "allow_leaks=true"])
    assert "validation texts are in what" in other.out and other.status == 0, other.err
    message = mistake_of(sentiment_train.main, [*args, *split, "seed=1", "run=t"])
    assert "test texts are in what before+trunk+seed-1+a+b was trained on" in message
    assert not (tmp_path / "before+trunk+seed-1+a+b").exists()  # no time was spent on it

    (tmp_path / "a.yaml").write_text(f"before: [{files[1]}]\n", encoding="utf-8")
    message = mistake_of(sentiment_train.main, args)
    assert message == f"{files[0]} has a `before` of its own: name all files in one list"
    message = mistake_of(sentiment_train.main, fine(tmp_path, before="[none.yaml]"))
    assert message.startswith("there is no file none.yaml")


def test_a_classifier_of_an_older_version_is_read_as_it_was(fit):
    """Its record has neither a cue nor marks."""
    folder = fit(max_steps=2)
    file = folder / "step-00000002" / "meta.json"
    meta = json.loads(file.read_text(encoding="utf-8"))
    del meta["head"]["cue"], meta["head"]["marks"]
    file.write_text(json.dumps(meta), encoding="utf-8")
    assert_classified_as_reported(folder)


def test_marks_of_an_older_version_are_read_as_they_were(fit, pairs):
    """There they were true or false: the tokens that both texts hold had one mark."""
    case = dict(data__path=pairs, data__pair_column="Second", marks=1, max_steps=2)
    folder = fit(**case)
    file = folder / "step-00000002" / "meta.json"
    meta = json.loads(file.read_text(encoding="utf-8"))
    meta["head"]["marks"] = True
    file.write_text(json.dumps(meta), encoding="utf-8")
    assert_classified_as_reported(folder)
