"""scripts/classify.py as its users use it: texts, files, pipes, a terminal; a classifier, or a language model."""

import csv
import json
import os
import random
import select
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from helpers import Result, mistake, wait_for
from scripts import classify
from smallgpt import console
from smallgpt.console import UserError
from smallgpt.weights.pretrained import open_model

CPU, EXACT = torch.device("cpu"), torch.float32
BLOCK = 24
COMMON = ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, run, tiny) -> Path:
    out = tmp_path_factory.mktemp("classify")
    sizes = dict(
        tokenizer__kind="bpe",
        tokenizer__vocab_size=400,
        model__block_size=BLOCK,
        batch_tokens=4 * BLOCK,
    )
    result = run(
        "train",
        tiny(out, run="trunk", max_steps=30, eval_every=30, save_every=30, prompts="[]", **sizes),
    )
    assert result.status == 0, result.err
    return out / "trunk"


@pytest.fixture(scope="module")
def reviews(trunk) -> Path:
    """120 texts of 1 to 80 words; some have quotes, two lines, a tab, spaces around them."""
    draw = random.Random(0)
    path = trunk.parent / "reviews.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(["Text", "Second", "Sentiment"])
        for i in range(120):
            label = ["负面", "good"][i % 2]
            words = draw.choices(
                "the room was red blue near 房间 离车站 不远".split(), k=draw.choice([1, 3, 9, 80])
            )
            words.insert(draw.randrange(len(words) + 1), {"负面": "awful", "good": "很好"}[label])
            text = f"{' '.join(words)} {i}"
            text = {
                0: f'"{text}", he said',
                1: f"{text}\nand left",
                2: f"  {text} ",
                3: f"a\t{text}",
            }.get(i % 7, text)
            sheet.writerow([text, f"{draw.choice(['yes', 'no'])} {i}", label])
    return path


@pytest.fixture(scope="module")
def models(trunk, reviews, run) -> dict[str, Path]:
    """Fine-tuned runs: read with the mask, without it, and of pairs."""
    kinds = {
        "masked": ["pool=last"],
        "unmasked": ["mask=false", "pool=mean"],
        "pairs": ["data.pair_column=Second"],
    }
    for name, args in kinds.items():
        common = [
            "max_steps=6",
            "optim.lr=0.01",
            "optim.warmup=1",
            "batch_size=16",
            "device=cpu",
            "dtype=float32",
        ]
        where = [f"trunk={trunk}", f"data.path={reviews}", f"out_dir={trunk.parent}", f"run={name}"]
        result = run("sentiment_train", [*where, *common, *args])
        assert result.status == 0, result.err
    return {name: trunk.parent / name for name in kinds}


@pytest.fixture(scope="module")
def ask(run, models):
    def ask(*args: str, model: str = "masked", **kw) -> Result:
        result = run("scripts.classify", [models[model], *COMMON, *args], **kw)
        assert result.status == 0, result.err
        return result

    return ask


@pytest.fixture(scope="module")
def masked(models) -> classify.Scorer:
    return classify.classifier(str(models["masked"]), CPU, EXACT)[1]


def wired(argv: list[str], stdin: str, stdout: str, stderr: str) -> None:
    """In a process of its own: scripts/classify.py with its streams at these files, stdout "" being a closed pipe."""
    reader, closed = os.pipe()
    os.close(reader)
    for fd, name in enumerate((stdin, stdout, stderr)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOCTTY) if name else closed, fd)
    sys.stdin, sys.stdout = (
        open(0, encoding="utf-8", closefd=False),
        open(1, "w", encoding="utf-8", closefd=False),
    )
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.argv = ["scripts/classify.py", *argv]
    console.run(classify.main)


# --- a classifier -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "unmasked", "pairs"])
def test_probabilities_are_those_of_the_report(ask, models, kind):
    """The texts of predictions.csv get the probabilities that stand there: they were read in the same way."""
    with open(models[kind] / "predictions.csv", encoding="utf-8-sig", newline="") as file:
        rows = [
            r for r in csv.DictReader(file) if not (r["pair"] and "\t" in r["text"])
        ]  # there a tab ends the text
    assert (
        len(rows) > 10
        and any("\n" in r["text"] for r in rows)
        and any(len(r["text"]) > 200 for r in rows)
    )
    texts = [f"{r['text']}\t{r['pair']}" if r["pair"] else f" {r['text']} " for r in rows]
    found = [json.loads(line) for line in ask("--json", *texts, model=kind).out.splitlines()]
    assert [f["text"] for f in found] == texts
    assert [f["label"] for f in found] == [r["prediction"] for r in rows]
    for f, r in zip(found, rows, strict=True):
        assert f["probabilities"].keys() == {"负面", "good"}
        assert all(
            p == pytest.approx(float(r[f"p_{k}"]), abs=6e-5) for k, p in f["probabilities"].items()
        )
    assert len({r["p_good"] for r in rows}) > len(rows) / 2, "or else nothing is compared"


def test_answers_do_not_depend_on_the_company(masked):
    """Sorted by length, batched and put back in order: as if each text had come alone."""
    draw = random.Random(1)
    texts = [
        " ".join(draw.choices(["red", "房间", "awful", "."], k=draw.choice([1, 2, 5, 30])))
        for _ in range(300)
    ]
    together = masked(texts)
    assert together.exp().sum(1) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(together, torch.cat([masked([text]) for text in texts]), atol=1e-5)
    assert len({*together[:, 0].tolist()}) > 50


def test_the_order_is_kept_over_chunks_and_empty_lines():
    seen = []

    def score(texts: list[str]) -> torch.Tensor:
        seen.append(texts)
        return torch.tensor([[float(text), 0.0] for text in texts]).log()

    lines = ["\ufeff1\n", "\n", "  \t \r\n", "2\r\n", "\u3000\n", "\n", "\n", "\n", "3"]
    found = list(classify.answers(lines, score, chunk=3))
    assert [text for text, _ in found] == ["1", "", "  \t ", "2", "\u3000", "", "", "", "3"]
    assert [None if p is None else round(float(p[0])) for _, p in found] == [
        1,
        None,
        None,
        2,
        *[None] * 4,
        3,
    ]
    assert seen == [["1"], ["2"], ["3"]], "a chunk without a text asks for nothing"


def test_a_pair_is_two_texts_with_a_tab_between(models):
    """For a model of pairs; else a tab is a part of the text, as it was in training (the report's test has some)."""
    score = classify.classifier(str(models["pairs"]), CPU, EXACT)[1]
    pair, joined, left, lone = score(
        ["red room\tblue", "red room blue", "red room\t ", "red room"]
    ).exp()
    assert torch.equal(left, lone)
    assert (pair - joined).abs().max() > 1e-4


def test_lines_of_standard_input_and_of_a_file(ask, tmp_path):
    text = (
        "\ufeffthe room was awful\r\n\n 很好\tyes \ncaf\udce9 awful\n"
        + "long " * 5000
        + "\nno newline at the end"
    )
    piped = ask(stdin=text)
    lines = piped.out.splitlines()
    assert len(lines) == 6 and lines[1] == "\t\t"
    for line, said in zip(
        lines, ["the room was awful", None, " 很好\tyes ", "caf\ufffd awful"], strict=False
    ):
        label, p, echo = line.split("\t", 2)
        assert said is None or (label in ("负面", "good") and 0.5 <= float(p) <= 1 and echo == said)
    assert piped.err == "1 of the texts hold bytes that are not UTF-8, or U+FFFD in their place\n"
    (tmp_path / "lines.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert ask("--file", str(tmp_path / "lines.txt")).out == piped.out
    assert ask(stdin="").out == ""


def test_arguments_in_any_order(ask, models, run):
    """`scripts/classify.py RUN --json TEXT` was refused: TEXT was no recognised argument."""
    for argv in (["--json", "red", "blue"], ["red", "--json", "blue"], ["red", "blue", "--json"]):
        found = [json.loads(line) for line in ask(*argv).out.splitlines()]
        assert [f["text"] for f in found] == ["red", "blue"]
    assert ask("--", "-red", "two\nlines", "").out.splitlines()[1].endswith("\ttwo lines")
    empty = json.loads(ask("--json", " ").out)
    assert empty == {"text": " ", "label": None, "probabilities": None}
    step = next(models["masked"].glob("step-*"))
    assert run("scripts.classify", [step, "red", *COMMON]).out == ask("red").out


def test_a_reader_that_leaves(forks, models, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("the room was red\n" * 3000, encoding="utf-8")
    argv = [str(models["masked"]), *COMMON, "--file", str(lines)]
    process = forks.Process(target=wired, args=(argv, os.devnull, "", str(tmp_path / "err")))
    process.start()
    process.join(60)
    assert (process.exitcode, (tmp_path / "err").read_text(encoding="utf-8")) == (141, "")


def test_ctrl_c(start, models, tmp_path):
    os.mkfifo(tmp_path / "lines")
    process = start("scripts.classify", [models["masked"], *COMMON, "--file", tmp_path / "lines"])
    with open(
        tmp_path / "lines", "w", encoding="utf-8"
    ) as file:  # opens when scripts/classify.py does
        file.write("red\n")
        file.flush()
        process.kill(signal.SIGINT)
        result = process.wait()
    assert (result.status, result.err) == (130, "")


def test_a_terminal_is_told_what_it_waits_for_and_answered_line_by_line(forks, models, tmp_path):
    ours, theirs = os.openpty()
    name, seen = os.ttyname(theirs), ""
    argv = [str(models["masked"]), *COMMON]
    process = forks.Process(target=wired, args=(argv, name, name, str(tmp_path / "err")))
    process.start()
    try:
        wait_for(
            lambda: (tmp_path / "err").exists() and (tmp_path / "err").read_text(encoding="utf-8"),
            "a word",
        )
        assert (tmp_path / "err").read_text(encoding="utf-8").startswith("one text a line")
        for text in ("red", "房间"):
            os.write(ours, f"{text}\n".encode())
            while f"\t{text}\r\n" not in seen:
                assert select.select([ours], [], [], 20)[0], f"no answer to {text} in {seen!r}"
                seen += os.read(ours, 1000).decode()
        os.write(ours, b"\x04")
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)


# --- a language model asked for words ---------------------------------------------------------------------------------


def naive(
    trunk: Path, text: str, words: dict[str, list[str]], before: str, end: str
) -> list[float]:
    """Probabilities of the labels, word by word and token by token, from all logits of one row at a time."""
    _, model, tokenizer = open_model(trunk)
    model.eval()
    first, second = (tokenizer.encode(part) for part in before.split("{text}"))

    def likelihood(text: str, word: str) -> float:
        tail = tokenizer.encode(f"{word}{end}")
        body = tokenizer.encode(text)
        while 1 + len(first) + len(body) + len(second) + len(tail) > BLOCK:
            body = body[1:]
        ids = [tokenizer.bos, *first, *body, *second, *tail]
        with torch.no_grad():
            log_p = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        return sum(float(log_p[i - 1, ids[i]]) for i in range(len(ids) - len(tail), len(ids)))

    gains = [max(likelihood(text, w) - likelihood("", w) for w in ws) for ws in words.values()]
    return torch.tensor(gains).softmax(0).tolist()


@pytest.mark.parametrize(
    "template, space, before, end",
    [
        (
            "{text} it is {word}.",
            " ",
            "{text} it is",
            ".",
        ),  # a token begins with the space before its word
        ("what is {text}?\n{word}", "\n", "what is {text}?", ""),
        ("{text}很{word}。", "", "{text}很", "。"),
    ],
)
def test_cloze_is_the_likelihood_of_the_words_less_that_without_a_text(
    trunk, template, space, before, end
):
    words = {
        "warm": ["red", "fine indeed"],
        "kalt": ["blue", "白色", "green is fine"],
        "x": ["黑色"],
    }
    labels, score = classify.cloze(str(trunk), words, template, CPU, EXACT)
    assert labels == ["warm", "kalt", "x"]
    texts = ["what is red", "a", "黑色 黑色", "blue is fine " * 20, "what is 白色 5?"]
    spaced = {label: [space + w for w in ws] for label, ws in words.items()}
    found = score(texts).exp()
    for text, p in zip(texts, found, strict=True):
        assert p.tolist() == pytest.approx(
            naive(trunk, text.strip(), spaced, before, end), abs=1e-4
        )
    assert found.std(0).max() > 0.01, "the text matters"


def test_without_a_text_no_label_is_likelier(trunk):
    """However rare its word is in what the model has read."""
    _, score = classify.cloze(
        str(trunk), {"a": ["fine"], "b": ["zebra crossing"]}, "{text} {word}", CPU, EXACT
    )
    assert score([""]).exp().tolist()[0] == pytest.approx([0.5, 0.5], abs=1e-5)


def test_cloze_from_the_command_line(run, trunk):
    argv = [
        trunk,
        "--cloze",
        "好=fine, red",
        "--cloze",
        "坏=白色",
        "--template",
        "{text} is {word}",
        "--json",
        *COMMON,
    ]
    result = run("scripts.classify", argv, stdin="what is red 1?\n\n白色\n")
    assert result.status == 0 and not result.err
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [f["text"] for f in found] == ["what is red 1?", "", "白色"] and found[1][
        "label"
    ] is None
    assert set(found[0]["probabilities"]) == {"好", "坏"} and found[0]["label"] in ("好", "坏")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_the_wrong_kind_of_model(run, models, trunk):
    assert "language model without a classification head: fine-tune it" in mistake(
        run("scripts.classify", [trunk, "hi"])
    )
    argv = [models["masked"], "hi", "--cloze", "a=b", "--cloze", "c=d"]
    assert "is a classifier: use it with python scripts/classify.py" in mistake(
        run("scripts.classify", argv)
    )
    assert "is a classifier: use it with python scripts/classify.py" in mistake(
        run("chat", [models["masked"]], stdin="hi\n")
    )


def test_a_damaged_or_missing_checkpoint(run, models, tmp_path):
    assert "there is no checkpoint" in mistake(
        run("scripts.classify", [tmp_path / "nothing", "hi"])
    )
    damaged = shutil.copytree(models["masked"], tmp_path / "damaged")
    for weights in damaged.glob("step-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    result = run("scripts.classify", [damaged, "hi"])
    assert (
        "every checkpoint" in mistake(result) and "is damaged" in mistake(result) and not result.out
    )
    step = next(damaged.glob("step-*"))
    assert "cannot use the checkpoint" in mistake(run("scripts.classify", [step, "hi"]))

    garbled = shutil.copytree(models["masked"], tmp_path / "garbled")
    for weights in garbled.glob("step-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[::-1])
    assert "does not hold valid safetensors" in mistake(run("scripts.classify", [garbled, "hi"]))
    (garbled / "tokenizer.json").unlink()
    assert "tokenizer.json" in mistake(run("scripts.classify", [garbled, "hi"]))


def test_what_is_said_about_a_checkpoint_is_no_answer(run, ask, models, tmp_path):
    """It went to standard output, the first line of labels.jsonl."""
    half = shutil.copytree(models["masked"], tmp_path / "half")
    bad = shutil.copytree(next(half.glob("step-*")), half / "step-00000099")
    (bad / "model.safetensors").unlink()
    for pointer in ("latest", "best"):
        (half / pointer).write_text("step-00000099\n", encoding="utf-8")
    result = run("scripts.classify", [half, "red", *COMMON])
    assert result.status == 0 and result.out == ask("red").out
    assert "passing over the damaged checkpoint" in result.err


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--file", "/no/such/file"], "/no/such/file"),
        (["hi", "--file", "x"], "texts or --file, not both"),
        (["hi", "--cloze", "a=b"], "two or more labels"),
        (["hi", "--cloze", "a=b", "--cloze", "a=c"], "two or more labels, each once"),
        (["hi", "--cloze", "a=b", "--cloze", "b= ,"], "with its words"),
        (["hi", "--cloze", "a=b", "--cloze", "c"], "with its words"),
        (["hi", "--cloze", "a=b", "--cloze", "=c"], "two or more labels"),
        (["hi", "--cloze", "a=b", "--cloze", "c=d", "--template", "{text}"], "{word} once"),
        (
            ["hi", "--cloze", "a=b", "--cloze", "c=d", "--template", "{word} {text}"],
            "behind it {word} once",
        ),
        (
            ["hi", "--cloze", "a=b", "--cloze", "c=d", "--template", "{text} {word} {word}"],
            "{word} once",
        ),
        (
            [
                "hi",
                "--cloze",
                "a=b",
                "--cloze",
                "c=d",
                "--template",
                "{text} {word}" + " x" * BLOCK,
            ],
            "leaves no room",
        ),
    ],
)
def test_mistakes(models, trunk, monkeypatch, argv, says):
    model = trunk if "--cloze" in argv else models["masked"]
    monkeypatch.setattr(sys, "argv", ["scripts/classify.py", str(model), *COMMON, *argv])
    with pytest.raises((UserError, OSError)) as error:
        classify.main()
    assert says in str(error.value) and "\n" not in str(error.value)
