"""Labels and probabilities of texts, from a fine-tuned checkpoint or from a language model.

    python scripts/classify.py checkpoints/sentiment 房间很干净 又脏又吵
    python scripts/classify.py checkpoints/sentiment file=reviews.txt json=true > labels.jsonl
    cat reviews.txt | python scripts/classify.py checkpoints/sentiment
    python scripts/classify.py checkpoints/chat_zh cloze.neg=差 cloze.pos=好 \\
        "template={text}很{word}。" 又脏又吵

The first word is the run, the others are texts. A text may hold =, unless a setting's name stands
before it; `--` ends the settings, and everything after it is text. Without texts, those of file= or
of standard input are read, one a line: UTF-8, or UTF-16 with its mark, gzipped or not.

Answers come in the order of the texts: label, probability, text, with tabs between. An empty line
is answered by an empty label. A model that foretells a number (STS-B) gives it in the place of the
label. A model of pairs reads two texts with a tab between; how many texts
were half a pair is said at the end.
"""

import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, files, hardware, load_classifier, settings
from smallgpt.console import UserError
from smallgpt.inference import Precision, Prediction, Scorer
from smallgpt.settings import Device
from smallgpt.text import formats
from smallgpt.weights.pretrained import open_talker

CHUNK = 2048  # texts read, sorted by length and answered together


@dataclass
class ClassifySettings:
    file: str = ""  # a file of texts, one a line
    json: bool = False  # answers as JSON Lines, with the probability of each label
    cloze: dict[str, str] = field(default_factory=dict)  # label -> its words: cloze.neg=bad,awful
    template: str = "{text} {word}"  # of a cloze: where the text and the word go
    device: Device = "auto"  # auto = a GPU if there is one
    dtype: Precision = "auto"  # of matrix products

    @property
    def label_words(self) -> dict[str, list[str]]:
        """cloze.neg=bad,awful -> {"neg": ["bad", "awful"]}"""
        words = {}
        for label, text in self.cloze.items():
            stripped = map(str.strip, text.split(","))
            words[label] = [word for word in stripped if word]
        return words

    def check(self) -> list[str]:
        """Problems with these settings, in plain words."""
        problems = []
        words = self.label_words
        lacks_one = "" in words or [] in words.values()
        if len(words) == 1 or lacks_one:
            example = "cloze.neg=bad,awful cloze.pos=good"
            problems.append(f"give two or more labels, each with its words: {example}")
        places = re.findall(r"\{text\}|\{word\}", self.template)
        if places != ["{text}", "{word}"]:
            once = "must hold {text} once and behind it {word} once"
            problems.append(f'template {once}: "template={{text}} It was {{word}}."')
        return problems


class Answer(NamedTuple):
    text: str
    found: Prediction


# --- the command ----------------------------------------------------------------------------------


def main() -> None:
    path, texts, s = parse(sys.argv[1:])
    is_typed = False
    if not texts:
        texts, is_typed = open_texts(s.file)
    with redirect_stdout(sys.stderr):  # what opening a checkpoint says is no answer
        model = Cloze(path, s) if s.cloze else load_classifier(path, s.device, s.dtype)
    if is_typed:
        print("one text a line, a tab between the two of a pair; Ctrl-D ends", file=sys.stderr)

    n_broken = 0
    n_half = 0
    chunk = 1 if is_typed else CHUNK
    for answer in answers(texts, model, chunk):
        print(to_json(answer, model) if s.json else to_line(answer))
        n_broken += "\ufffd" in answer.text
        n_half += model.is_of_pairs and is_half_a_pair(answer.text)
    broken = "hold bytes that are not UTF-8, or U+FFFD in their place: save the texts in UTF-8"
    half = "are half a pair: this model was trained on two texts with a tab between"
    note(n_broken, broken)
    note(n_half, half)


def note(count: int, what: str) -> None:
    if count:
        print(f"{count} of the texts {what}", file=sys.stderr)


def parse(argv: list[str]) -> tuple[str, list[str], ClassifySettings]:
    """The command line as the run, the texts, and the settings."""
    after: list[str] = []
    if "--" in argv:
        end = argv.index("--")
        after = argv[end + 1 :]
        argv = argv[:end]
    plain = []
    given = []
    for word in argv:
        if is_setting(word) or word in ("-h", "--help"):
            given.append(word)
        elif word.startswith("--"):
            raise UserError(
                f"there is no option {word}: settings are written key=value, such as json=true, "
                "and a text that begins with -- comes after a lone --"
            )
        else:
            plain.append(word)
    s = settings.load(ClassifySettings, given, doc=__doc__)
    if not plain:
        raise UserError("which model? python scripts/classify.py checkpoints/<run> TEXT ...")
    path, *texts = plain
    texts += after
    if s.file and texts:
        raise UserError("give texts or file=, not both")
    texts = [decode_argument(text) for text in texts]
    return path, texts, s


def is_setting(word: str) -> bool:
    key, equals, _ = word.partition("=")
    if not equals:
        return False
    names = [f.name for f in fields(ClassifySettings)]
    return key in names or key.startswith("cloze.")


def decode_argument(argument: str) -> str:
    """A text of the command line with U+FFFD for bytes that are not UTF-8, as in a file."""
    typed = argument.encode("utf-8", "surrogateescape")
    return typed.decode("utf-8", "replace")


def is_half_a_pair(text: str) -> bool:
    first, _, second = text.partition("\t")
    is_first = bool(first.strip())
    is_second = bool(second.strip())
    return is_first != is_second


def to_line(answer: Answer) -> str:
    """Label, probability and text in one line; a number stands in the place of the label."""
    found = answer.found
    text = " ".join(answer.text.splitlines())
    if found.number is not None:
        return f"{found.number:.4f}\t\t{text}"
    if found.label:
        return f"{found.label}\t{found.probability:.4f}\t{text}"
    return "\t\t"


def to_json(answer: Answer, model: Scorer) -> str:
    """An object with the text, the label, and the probabilities by label, or with the text and the
    number under its name; null for no text."""
    found = answer.found
    record: dict[str, Any] = {"text": answer.text}
    if model.is_number:
        record[model.labels[0]] = rounded(found.number)
    else:
        probabilities = {label: rounded(value) for label, value in found.probabilities.items()}
        record["label"] = found.label or None
        record["probabilities"] = probabilities or None
    return json.dumps(record, ensure_ascii=False)


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


# --- reading texts --------------------------------------------------------------------------------


def open_texts(file: str) -> tuple[Iterator[str], bool]:
    """The lines of a file, or of standard input if file is ""; and whether a person types them."""
    if file:
        try:
            raw = open(file, "rb")
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        return read_lines(raw, file), False
    stdin = console.open_stdin()
    if stdin.isatty():
        return (line.removesuffix("\n") for line in stdin), True
    return read_lines(stdin.buffer, "standard input"), False


def read_lines(raw: io.BufferedReader, name: str) -> Iterator[str]:
    """The lines of a text. \\n or \\r\\n ends a line, and no other character does.

    Python's text files also split at \\r, and splitlines() at U+2028 and others."""
    try:
        with decode(raw, name) as stream:
            for line in stream:
                line = line.removesuffix("\n").removesuffix("\r")
                yield line.lstrip("\ufeff")  # also where files with a mark were joined
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise UserError(f"cannot unpack {name}: {problem}") from None


def decode(raw: io.BufferedReader, name: str) -> io.TextIOWrapper:
    """The text in a file, known by its first bytes. UserError names what is no text."""
    head = raw.peek()
    kind = files.kind_of(head)
    if kind == files.GZIP:
        raw = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        head = raw.peek()
        kind = files.kind_inside(head)
    fix = "save its texts in UTF-8, one a line"
    if kind.family:
        raise UserError(f"{name} is {kind.name}: {fix}")
    encoding = files.marked_encoding(head)
    if encoding == "utf-32":
        raise UserError(f"{name} is text in UTF-32: {fix}")
    if encoding == "utf-16":
        return io.TextIOWrapper(raw, "utf-16", errors="replace", newline="\n")
    n_control = len(head) - len(head.translate(None, formats.CONTROL))
    most = len(head) / 50
    if head.count(0) > most or n_control > max(20, most):  # a short text may hold a few
        raise UserError(f"{name} is no text in UTF-8, it has control characters: {fix}")
    form = formats.text_format(head.decode("utf-8-sig", "replace"))
    if form != formats.TEXT:
        raise UserError(f"{name} is {form}: {fix}")
    return io.TextIOWrapper(raw, "utf-8", errors="replace", newline="\n")  # its mark goes later


# --- scoring texts --------------------------------------------------------------------------------


class Cloze(Scorer):
    """A language model. It scores texts by how likely it finds each label's words in the template.

    Of a word counts the log-likelihood given the text less that given no text: a frequent word is
    not a frequent label (Holtzman et al. 2021, Surface form competition). Of a label its best word
    counts."""

    def __init__(self, path: str, s: ClassifySettings):
        _, model, tokenizer = open_talker(path)
        super().__init__(model, tokenizer, s.device, s.dtype)
        self.words = s.label_words
        self.labels = list(self.words)

        before, self.after = s.template.split("{word}")
        context = before.rstrip()
        self.space = before[len(context) :]  # it belongs to the word, as the tokens have it
        first, second = context.split("{text}")
        first = tokenizer.encode(first)
        self.first = [tokenizer.bos, *first]
        self.second = tokenizer.encode(second)
        self.prior = {}
        for words in self.words.values():
            for word in words:
                self.prior[word] = self.likelihood([""], word)

    def score(self, texts: Sequence[str]) -> Tensor:
        """Log-probabilities (N, labels)."""
        scores = []
        for words in self.words.values():
            gains = [self.gain(texts, word) for word in words]
            best = torch.stack(gains).amax(0)
            scores.append(best)
        return torch.stack(scores, 1).log_softmax(-1)

    def gain(self, texts: Sequence[str], word: str) -> Tensor:
        """How much likelier each text (N,) makes the word."""
        return self.likelihood(texts, word) - self.prior[word]

    @torch.inference_mode()
    def likelihood(self, texts: Sequence[str], word: str) -> Tensor:
        """Log-likelihood (N,) of the word and what follows it, given what comes before it."""
        end = self.tokenizer.encode(self.space + word + self.after)
        rows = [self.fill_in(text, end) for text in texts]
        result = torch.empty(len(rows))
        for batch in self.batches(rows):
            log_probs = self.last_tokens(batch.idx, batch.lengths, len(end))
            result[batch.indices] = log_probs.sum(1).cpu()
        return result

    def fill_in(self, text: str, end: list[int]) -> list[int]:
        """The ids of the template with the text; of a long one the end, which is near the word."""
        block_size = self.model.config.block_size
        taken = len(self.first) + len(self.second) + len(end)
        room = block_size - taken
        if room < 1:
            raise UserError(
                f"the template leaves no room for a text in {block_size} tokens: make it shorter"
            )
        ids = self.tokenizer.encode(text.strip())
        ids = ids[-room:]
        return self.first + ids + self.second + end

    def last_tokens(self, idx: Tensor, lengths: Tensor, n: int) -> Tensor:
        """Log-probabilities (B, n) of the last n real tokens in each row of idx (B, T)."""
        with hardware.autocast(self.device, self.dtype):
            h = self.model.trunk(idx)  # (B, T, C)
        first = lengths[:, None] - n
        at = first + torch.arange(n, device=self.device)  # (B, n)
        tokens = idx.gather(1, at)
        before = at[..., None] - 1  # the position before a token predicts it
        before = before.expand(-1, -1, h.size(-1))
        h = h.gather(1, before)  # (B, n, C)
        logits = self.model.lm_head(h.float())
        log_probs = logits.log_softmax(-1)  # (B, n, V)
        found = log_probs.gather(2, tokens[..., None])
        return found.squeeze(2)


def answers(texts: Iterable[str], model: Scorer, chunk: int) -> Iterator[Answer]:
    """An answer to each text, in order; so many texts are read and answered together."""
    texts = iter(texts)
    for some in iter(lambda: list(islice(texts, chunk)), []):
        yield from map(Answer, some, model(some))


if __name__ == "__main__":
    console.run(main)
