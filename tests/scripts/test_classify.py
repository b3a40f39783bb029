"""scripts/classify.py as it is used: texts, files, pipes, a terminal; a classifier, or a cloze."""

import csv
import gzip
import io
import json
import os
import random
import select
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from helpers import mistake, wait_for
from scripts import classify
from smallgpt import console, load_classifier
from smallgpt.console import UserError
from smallgpt.inference import Scorer
from smallgpt.weights.pretrained import open_model

BLOCK = 24
COMMON = ["device=cpu", "dtype=float32"]
EXACT = classify.ClassifySettings(device="cpu", dtype="float32")


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


@dataclass
class Said:
    out: str
    err: str

    @property
    def records(self) -> list[dict]:
        """The answers of json=true."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def classified(monkeypatch, capsys) -> Callable[..., Said]:
    """classified(run, "a text", "key=value", stdin=b"...") -> what the command writes."""

    def classified(run: Path, *words: object, stdin: bytes | None = b"") -> Said:
        monkeypatch.setattr(sys, "argv", ["classify.py", str(run), *COMMON, *map(str, words)])
        piped = None
        if stdin is not None:
            piped = io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin)))
        monkeypatch.setattr(sys, "stdin", piped)
        capsys.readouterr()
        classify.main()
        return Said(*capsys.readouterr())

    return classified


@pytest.fixture
def ask(classified, models) -> Callable[..., Said]:
    """The same, of one of the models."""
    return lambda *words, model="masked", **kw: classified(models[model], *words, **kw)


@pytest.fixture(scope="module")
def masked(models) -> Callable[[list[str]], torch.Tensor]:
    return load_classifier(models["masked"], "cpu", "float32").score


def wired(argv: list[str], stdin: str, stdout: str, stderr: str) -> None:
    """In a process of its own: scripts/classify.py with its streams at these files.

    stdout "" is a closed pipe."""
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


# --- a classifier ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "unmasked", "pairs"])
def test_probabilities_are_those_of_the_report(ask, models, kind):
    """Would score a text in another way than the test of sentiment_train.py, in predictions.csv."""
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
    found = ask("json=true", *texts, model=kind).records
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

    class Numbers(Scorer):
        labels = ["a", "b"]

        def __init__(self):
            pass

        def score(self, texts: list[str]) -> torch.Tensor:
            seen.append(texts)
            return torch.tensor([[float(text), 0.0] for text in texts]).log()

    texts = ["1", "", "  \t ", "2", "\u3000", "", "", "", "3"]
    found = list(classify.answers(texts, Numbers(), chunk=3))
    assert [text for text, _ in found] == texts
    numbers = [round(p.probability) if p.label else None for _, p in found]
    assert numbers == [1, None, None, 2, *[None] * 4, 3]
    assert seen == [["1"], ["2"], ["3"]], "a chunk without a text asks for nothing"


def test_a_pair_is_two_texts_with_a_tab_between(models):
    """For a model of pairs; else a tab is a part of the text, as it was in training."""
    score = load_classifier(models["pairs"], "cpu", "float32").score
    pair, joined, left, lone = score(
        ["red room\tblue", "red room blue", "red room\t ", "red room"]
    ).exp()
    assert torch.equal(left, lone)
    assert (pair - joined).abs().max() > 1e-4


@pytest.mark.parametrize("model, half", [("pairs", 3), ("masked", 0)])
def test_half_a_pair_is_answered_and_counted(ask, model, half):
    """Regression: a line without a tab had an empty second text, and nobody was told."""
    lines = ["red\tblue", "red blue", "\tonly second", "first\t", "\t", ""]
    said = ask("json=true", model=model, stdin="\n".join(lines).encode())
    assert [r["label"] is None for r in said.records] == [False] * 4 + [True]
    assert said.err == (
        f"{half} of the texts are half a pair: this model was trained on two texts with a tab "
        "between\n"
        if half
        else ""
    )


# --- texts from files and pipes -------------------------------------------------------------------


def test_lines_of_standard_input_and_of_a_file(run, ask, models, tmp_path):
    text = (
        "\ufeffthe room was awful\r\n\n 很好\tyes \ncaf\udce9 awful\n"
        + "long " * 5000
        + "\nno newline at the end"
    )
    piped = run("scripts.classify", [models["masked"], *COMMON], stdin=text)
    lines = piped.out.splitlines()
    assert len(lines) == 6 and lines[1] == "\t\t"
    for line, said in zip(
        lines, ["the room was awful", None, " 很好\tyes ", "caf\ufffd awful"], strict=False
    ):
        label, p, echo = line.split("\t", 2)
        assert said is None or (label in ("负面", "good") and 0.5 <= float(p) <= 1 and echo == said)
    assert piped.err.startswith("1 of the texts hold bytes that are not UTF-8, or U+FFFD in their")
    assert len(piped.err.splitlines()) == 1
    (tmp_path / "lines.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert ask(f"file={tmp_path / 'lines.txt'}").out == piped.out
    assert ask(stdin=b"").out == ""


BREAKS = ["\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def test_only_newlines_end_a_text(ask, tmp_path):
    """Regression: file= and standard input gave different numbers of answers.

    Python splits the lines of a file at \\r, too."""
    lines = [f"red{c}blue" for c in BREAKS]
    content = "\r\n".join(lines).encode()
    (tmp_path / "lines.txt").write_bytes(content)
    piped, file = ask("json=true", stdin=content), ask("json=true", f"file={tmp_path}/lines.txt")
    assert piped == file
    found = [json.loads(line)["text"] for line in file.out.removesuffix("\n").split("\n")]
    assert found == lines
    plain = ask(stdin=content)
    assert [line.split("\t")[2] for line in plain.out.splitlines()] == ["red blue"] * len(BREAKS)


@pytest.mark.parametrize(
    "content, texts",
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\n\n", ["a", ""]),
        (b"a\r\n\r\nb", ["a", "", "b"]),
        (b"a\nb\r", ["a", "b"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "b"]),  # two files with a mark, joined
        ("房间\n很好\r\n".encode("utf-16"), ["房间", "很好"]),
        (b"\xfe\xff" + "房间\n很好".encode("utf-16-be"), ["房间", "很好"]),
        (gzip.compress("房间\n很好\n".encode()), ["房间", "很好"]),
        (gzip.compress("房间\n很好\n".encode("utf-16")), ["房间", "很好"]),
        (b"PK is a word\nPAR1\n", ["PK is a word", "PAR1"]),
        (b"oops\x08\n[laughs] good\n", ["oops\x08", "[laughs] good"]),
        (b"a stray \0" + 100 * b"x" + b"\n", ["a stray \0" + 100 * "x"]),
    ],
    ids=lambda value: "",
)
def test_the_lines_of_a_text(content, texts):
    assert list(classify.read_lines(io.BufferedReader(io.BytesIO(content)), "f")) == texts


@pytest.mark.parametrize(
    "content, says",
    [
        (b"PK\x03\x04\x14\0\0\0", "is a zip archive: save its texts in UTF-8"),
        (b"PAR1\x15\x04\x15", "is a Parquet file"),
        (bytes(range(256)), "is no text in UTF-8"),
        (b'{"text": "hi"}\n{"text": "ho"}\n', "is JSON Lines: save its texts in UTF-8"),
        (b'[{"text": "hi"},\n{"text": "ho"}]\n', "is JSON: save its texts in UTF-8"),
        (b"\xfd7zXZ\0\0", "is compressed with xz"),
        (b"BZh91AY&SY\x94", "is compressed with bzip2"),
        (b"\x28\xb5\x2f\xfd\x24", "is compressed with zstd"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
        (b"%PDF-1.7", "is a PDF document"),
        (gzip.compress(b"PK\x03\x04\x14\0\0\0"), "is a zip archive"),
        (gzip.compress(gzip.compress(b"a")), "is compressed twice"),
        (gzip.compress(b"a\n" * 1000)[:-9], "cannot unpack"),
        ("no mark\n".encode("utf-16-le"), "is no text in UTF-8"),
        ("房间\n".encode("utf-32"), "is text in UTF-32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_text_is_named(ask, tmp_path, content, says):
    """Regression: the bytes of an archive were classified as lines of text."""
    (tmp_path / "reviews.txt").write_bytes(content)
    for words, stdin in ((["file=" + str(tmp_path / "reviews.txt")], b""), ([], content)):
        with pytest.raises(UserError) as error:
            ask(*words, stdin=stdin)
        name = "reviews.txt" if words else "standard input"
        assert (
            name in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
        )


def test_closed_standard_input(ask):
    """Regression: `classify.py RUN <&-` ended in a traceback, since sys.stdin is None then."""
    with pytest.raises(UserError, match="standard input is closed"):
        ask(stdin=None)


def test_names_and_texts_that_are_not_utf8(run, ask, models, tmp_path):
    """Regression: a message with the name of such a file could not be printed."""
    odd = "caf\udce9"
    for argv in ([models["masked"], f"file={tmp_path}/{odd}"], [tmp_path / odd, "hi"]):
        assert "caf" in mistake(run("scripts.classify", argv))
    said = ask("json=true", f"{odd} awful")
    assert said.records[0]["text"] == "caf\ufffd awful" and "1 of the texts hold bytes" in said.err


# --- the command line -----------------------------------------------------------------------------


def test_arguments_in_any_order(ask, models, run):
    for words in (["json=true", "red", "blue"], ["red", "json=true", "blue"]):
        assert [r["text"] for r in ask(*words).records] == ["red", "blue"]
    empty = ask("json=true", " ").records
    assert empty == [{"text": " ", "label": None, "probabilities": None}]
    step = next(models["masked"].glob("step-*"))
    found = run("scripts.classify", [step, "red", *COMMON])
    assert (found.status, found.out) == (0, ask("red").out)


def test_a_text_is_what_was_typed(ask):
    """Only a known key before the first = makes a setting, and nothing after -- is one."""
    texts = ["1+1=2", "files=3", "a b: c #d", "{x}", "-red", "[a", "yes", "clozed.a=b", "='"]
    assert [r["text"] for r in ask("json=true", *texts).records] == texts
    after = ["json=false", "file=x", "--help", "-h", "--", "cloze.a=b", "two\nlines", ""]
    assert [r["text"] for r in ask("json=true", "--", *after).records] == after
    assert ask("--", "two\nlines").out.endswith("\ttwo lines\n")


def test_a_file_is_what_was_typed(ask, tmp_path):
    """Regression: a value was cut at ` #`, and 007 read as a number."""
    for name in ("a #2.txt", "007", "yes", "a=b"):
        (tmp_path / name).write_text("red\n", encoding="utf-8")
        assert ask(f"file={tmp_path / name}").out.endswith("\tred\n")


def test_help_tells_how_a_text_may_hold_what_a_setting_would(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["classify.py", "--help"])
    with pytest.raises(SystemExit) as end:
        classify.main()
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "`--` ends the settings" in shown and "cloze.neg=bad" in shown


# --- pipes and terminals --------------------------------------------------------------------------


def test_a_reader_that_leaves(forks, models, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("the room was red\n" * 3000, encoding="utf-8")
    argv = [str(models["masked"]), *COMMON, f"file={lines}"]
    process = forks.Process(target=wired, args=(argv, os.devnull, "", str(tmp_path / "err")))
    process.start()
    process.join(60)
    assert (process.exitcode, (tmp_path / "err").read_text(encoding="utf-8")) == (141, "")


def test_ctrl_c(start, models, tmp_path):
    os.mkfifo(tmp_path / "lines")
    argv = [models["masked"], *COMMON, f"file={tmp_path / 'lines'}"]
    process = start("scripts.classify", argv)
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


# --- a language model asked for words -------------------------------------------------------------


def naive(
    trunk: Path, text: str, words: dict[str, list[str]], before: str, end: str
) -> list[float]:
    """Probabilities of the labels, word by word and token by token, a row at a time."""
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
    listed = {label: ", ".join(each) for label, each in words.items()}
    model = classify.Cloze(str(trunk), replace(EXACT, cloze=listed, template=template))
    assert model.labels == ["warm", "kalt", "x"]
    texts = ["what is red", "a", "黑色 黑色", "blue is fine " * 20, "what is 白色 5?"]
    spaced = {label: [space + w for w in ws] for label, ws in words.items()}
    found = model.score(texts).exp()
    for text, p in zip(texts, found, strict=True):
        assert p.tolist() == pytest.approx(
            naive(trunk, text.strip(), spaced, before, end), abs=1e-4
        )
    assert found.std(0).max() > 0.01, "the text matters"


def test_without_a_text_no_label_is_likelier(trunk):
    """However rare its word is in what the model has read."""
    s = replace(EXACT, cloze={"a": "fine", "b": "zebra crossing"}, template="{text} {word}")
    found = classify.Cloze(str(trunk), s).score([""])
    assert found.exp().tolist()[0] == pytest.approx([0.5, 0.5], abs=1e-5)


def test_cloze_from_the_command_line(classified, trunk):
    words = ["cloze.好=fine, red", "cloze.坏=白色", "template={text} is {word}", "json=true"]
    said = classified(trunk, *words, stdin="what is red 1?\n\n白色\n".encode())
    found = said.records
    assert not said.err
    assert [f["text"] for f in found] == ["what is red 1?", "", "白色"]
    assert found[1]["label"] is None
    assert set(found[0]["probabilities"]) == {"好", "坏"} and found[0]["label"] in ("好", "坏")


def test_a_template_is_what_was_typed(monkeypatch):
    """Regression: `template={text}很{word}。` was refused as YAML that cannot be read."""
    for template in ("{text}很{word}。", "{text} # {word}", "a: {text} {word}", '"{text}" {word}'):
        _, _, s = classify.parse(["run", f"template={template}", "cloze.1=yes, no", "cloze.2=007"])
        assert s.template == template and s.label_words == {"1": ["yes", "no"], "2": ["007"]}


# --- mistakes -------------------------------------------------------------------------------------


def test_the_wrong_kind_of_model(classified, run, models, trunk):
    with pytest.raises(UserError, match="language model without a classification head: fine-tune"):
        classified(trunk, "hi")
    with pytest.raises(
        UserError, match=r"is a classifier: use it with python scripts/classify\.py"
    ):
        classified(models["masked"], "hi", "cloze.a=b", "cloze.c=d")
    assert "is a classifier: use it with python scripts/classify.py" in mistake(
        run("chat", [models["masked"]], stdin="hi\n")
    )


def test_a_damaged_or_missing_checkpoint(classified, models, tmp_path, capsys):
    with pytest.raises(UserError, match="there is no checkpoint"):
        classified(tmp_path / "nothing", "hi")
    damaged = shutil.copytree(models["masked"], tmp_path / "damaged")
    for weights in damaged.glob("step-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="every checkpoint .* is damaged"):
        classified(damaged, "hi")
    assert not capsys.readouterr().out
    step = next(damaged.glob("step-*"))
    with pytest.raises(UserError, match="cannot use the checkpoint"):
        classified(step, "hi")

    garbled = shutil.copytree(models["masked"], tmp_path / "garbled")
    for weights in garbled.glob("step-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(UserError, match="does not hold valid safetensors"):
        classified(garbled, "hi")
    (garbled / "tokenizer.json").unlink()
    with pytest.raises((UserError, OSError), match=r"tokenizer\.json"):
        classified(garbled, "hi")


def test_what_is_said_about_a_checkpoint_is_no_answer(classified, ask, models, tmp_path):
    """Regression: it went to standard output, the first line of labels.jsonl."""
    half = shutil.copytree(models["masked"], tmp_path / "half")
    bad = shutil.copytree(next(half.glob("step-*")), half / "step-00000099")
    (bad / "model.safetensors").unlink()
    for pointer in ("latest", "best"):
        (half / pointer).write_text("step-00000099\n", encoding="utf-8")
    said = classified(half, "red")
    assert "passing over the damaged checkpoint" in said.err
    assert said.out == ask("red").out


TWO = ["cloze.a=b", "cloze.c=d"]


@pytest.mark.parametrize(
    "words, says",
    [
        (["file=/no/such/file"], "cannot read /no/such/file: No such file or directory"),
        (["file=/"], "cannot read /: Is a directory"),
        (["hi", "file=x"], "texts or file=, not both"),
        (["file=x", "--", "hi"], "texts or file=, not both"),
        (["hi", "--json"], "no option --json: settings are written key=value"),
        (["hi", "json=maybe"], "json must be bool, not maybe"),
        (["hi", "device=gpu"], "device must be auto|cpu|cuda|mps, not gpu"),
        (["hi", "cloze.a=b"], "two or more labels"),
        (["hi", "cloze.a=b", "cloze.a=c"], "two or more labels"),
        (["hi", "cloze.a=b", "cloze.b= ,"], "each with its words"),
        (["hi", "cloze.a=b", "cloze.c="], "each with its words"),
        (["hi", *TWO, "template={text}"], "{word} once"),
        (["hi", *TWO, "template={word} {text}"], "behind it {word} once"),
        (["hi", *TWO, "template={text} {word} {word}"], "{word} once"),
        (["hi", *TWO, "template={text} {text} {word}"], "{text} once"),
        (["hi", *TWO, "template={text} {word}" + " x" * BLOCK], "leaves no room"),
    ],
)
def test_mistakes(classified, models, trunk, words, says):
    is_cloze = any(word.startswith("cloze.") for word in words)
    with pytest.raises(UserError) as error:
        classified(trunk if is_cloze else models["masked"], *words)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_no_model(monkeypatch):
    for argv in ([], ["json=true"], ["--", "a text"]):
        monkeypatch.setattr(sys, "argv", ["classify.py", *argv])
        with pytest.raises(UserError, match="which model?"):
            classify.main()
