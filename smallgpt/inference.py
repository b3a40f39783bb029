"""Trained models in use: the replies of a chat model, the labels of a classifier.

chat = load_chat("checkpoints/quickstart", SampleSettings(temperature=0))
print(chat.reply("你好"))
for piece in chat.stream("How are you?"):
    print(piece, end="", flush=True)

classify = load_classifier("checkpoints/sentiment")
for label, probability, _ in classify(["房间很干净", "又脏又吵"]):
    print(f"{label}: {probability:.2f}")
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from smallgpt import hardware, settings
from smallgpt.console import UserError
from smallgpt.runs import checkpoint
from smallgpt.sampling import Conversation, SampleSettings
from smallgpt.sentiment.batches import collate, encode_text, length_batches
from smallgpt.settings import Device
from smallgpt.tokenizer import Tokenizer
from smallgpt.turns import Role
from smallgpt.weights.precision import set_precision
from smallgpt.weights.pretrained import model_of, open_talker

BATCH = 16384  # at most so many tokens per forward pass of a classifier
REMEMBERED = 64  # replies of which a chat knows the tokens

Precision = Literal["auto", "float32", "bfloat16", "float16"]


# --- a chat ---------------------------------------------------------------------------------------


class Turn(NamedTuple):
    role: Role
    text: str


class Chat:
    """A pretrained model in a conversation. `load_chat` opens one; one thread at a time uses it."""

    def __init__(self, talk: Conversation, name: str, description: str):
        self.talk = talk
        self.name = name  # of the run
        self.description = description  # where it lies, its size, what it runs on
        self.tokens_of: dict[str, list[int]] = {}  # of the last replies, by their text

    def reply(self, text: str) -> str:
        """The model's reply to the next turn of the user."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """`reply` piece by piece, as it is generated. Closing the iterator ends the reply there;
        what was said until then stays in the conversation."""
        self.talk.say(self.as_read(text))
        yield from filter(None, self.pieces())

    def reset(self) -> None:
        """Begin a new conversation."""
        self.talk.reset()

    def set_history(self, turns: Sequence[Turn], system: str | None = None) -> None:
        """Let these turns be what was said, oldest first, with a system prompt before them (None:
        the model's own, where it has one). UserError where the model has learned none.

        The beginning that the conversation before had, too, is not read again."""
        talk = self.talk
        read = talk.ids[: talk.cached]
        talk.reset()
        talk.set_system(system)
        for turn in turns:
            talk.turns.append(len(talk.ids))
            talk.ids += self.write(turn)
        talk.make_room()
        same = os.path.commonprefix([read, talk.ids])
        talk.cached = len(same)

    def pieces(self) -> Iterator[str]:
        """The reply to what was said last, a piece for each token ("" where it completes no
        character)."""
        talk = self.talk
        said = ""
        for piece in talk.pieces():
            said += piece
            yield piece
        begin = talk.reply_begin
        end = begin + talk.reply_tokens
        self.tokens_of.pop(said, None)  # it becomes the youngest
        self.tokens_of[said] = talk.ids[begin:end]
        if len(self.tokens_of) > REMEMBERED:
            oldest = next(iter(self.tokens_of))
            del self.tokens_of[oldest]

    def write(self, turn: Turn) -> list[int]:
        """The ids of a turn. A reply that the model gave keeps the tokens that it chose, though the
        tokenizer might spell the same text with others."""
        template = self.talk.template
        chosen = self.tokens_of.get(turn.text)
        if turn.role == "assistant" and chosen is not None:
            before, after = template.around["assistant"]
            return [*before, *chosen, *after]
        text = self.as_read(turn.text)
        return template.write(turn.role, text)

    def as_read(self, text: str) -> str:
        """The text as the model has read such in training: mostly a turn is one line."""
        if not self.talk.template.has_lines:
            text = " ".join(text.splitlines())
        return text.strip()


def load_chat(
    path: str | Path,
    sample: SampleSettings | None = None,
    device: Device = "auto",
    dtype: Precision = "auto",
) -> Chat:
    """A pretrained model to talk to: a run of train.py (its best checkpoint), a step folder, or
    what else chat.py takes.

    sample: how tokens are chosen. device: auto = a GPU if there is one. dtype: of the weights, as
    in chat.py. UserError names what is wrong with the path or with the settings."""
    if sample is None:
        sample = SampleSettings()
    given = asdict(sample)
    words = [f"{key}={value}" for key, value in given.items()]
    checked = settings.load(SampleSettings, words)
    name, talk, description = open_conversation(str(path), checked, device, dtype)
    return Chat(talk, short_name(name), description)


def open_conversation(
    path: str, sample: SampleSettings, device: Device, dtype: Precision
) -> tuple[str, Conversation, str]:
    """Where the model at path lies, a new conversation with it, and the two things one asks first:
    its size, and what it runs on. UserError if there is no model."""
    place = hardware.choose_device(device)
    name, model, tokenizer = open_talker(path)
    sizes = [p.numel() for p in model.parameters()]
    millions = sum(sizes) / 1e6
    precision = set_precision(model, dtype, place)
    talk = Conversation(model.eval(), tokenizer, sample)
    return name, talk, f"{name}: {millions:.1f}M parameters on {place.type}, {precision}"


def short_name(name: str) -> str:
    """checkpoints/quickstart/step-00000420 -> quickstart"""
    path = Path(name).resolve()
    if checkpoint.is_step_name(path.name):
        path = path.parent
    return path.name


# --- labels ---------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What a model finds in a text: a label, or a number. In nothing but spaces it finds none."""

    label: str  # the likeliest one, or ""
    probability: float  # of that label
    probabilities: dict[str, float]  # label -> probability; they add up to 1
    number: float | None = None  # of a model that foretells one (STS-B); it has no labels


class Batch(NamedTuple):
    indices: Sequence[int]  # of its rows among all
    idx: Tensor  # (B, T), padded on the right
    lengths: Tensor  # (B,)


class Scorer:
    """A model that gives labels to texts."""

    labels: list[str]
    is_of_pairs = False
    is_number = False  # is the answer a number, and no label?

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, device: Device, dtype: Precision):
        self.device = hardware.choose_device(device)
        self.dtype, _ = hardware.choose_dtype(dtype, self.device)
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[Prediction]:
        """A prediction for each text, in order. To a model of pairs a text is two, with a tab
        between."""
        places = [i for i, text in enumerate(texts) if text.strip()]
        found = [Prediction("", 0.0, {}) for _ in texts]
        if not places:
            return found
        full = [texts[i] for i in places]
        scores = self.score(full)
        if not self.is_number:
            scores = scores.exp()
        for i, row in zip(places, scores.tolist(), strict=True):
            found[i] = self.predict(row)
        return found

    def predict(self, row: list[float]) -> Prediction:
        """The prediction of a text with these probabilities, one for each label, or this number."""
        if self.is_number:
            (number,) = row
            return Prediction("", 0.0, {}, number)
        probabilities = dict(zip(self.labels, row, strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        return Prediction(label, probabilities[label], probabilities)

    def score(self, texts: Sequence[str]) -> Tensor:
        """Log-probabilities (N, labels), or numbers (N, 1), of texts that are not empty."""
        raise NotImplementedError

    def batches(self, rows: list[list[int]], width: int = 0) -> Iterator[Batch]:
        """All rows of ids, from short to long, padded to the longest of a batch or to `width`."""
        lengths = [len(row) for row in rows]
        for indices in length_batches(lengths, BATCH, width, self.device):
            ids = [rows[i] for i in indices]
            idx, real = collate(ids, self.tokenizer.pad, width)
            idx = idx.to(self.device)
            real = real.to(self.device)
            yield Batch(indices, idx, real)


class Classifier(Scorer):
    """A fine-tuned checkpoint. It scores texts as sentiment_train.py scores the test split."""

    def __init__(self, path: str | Path, device: Device, dtype: Precision):
        found = checkpoint.required(path)
        head = found.meta.get("head")
        if not head:
            raise UserError(
                f"{path} is a language model without a classification head: fine-tune it first "
                f"(python sentiment_train.py trunk={path}), or ask it for words with cloze."
            )
        self.name = short_name(str(found.path))
        self.labels = head["labels"]
        self.description = f"{found.path}: {len(self.labels)} labels"
        self.prefix: list[int] = head["prefix"]
        self.cue: list[int] = head.get("cue", [])  # older versions had none
        self.block_size: int = head["block_size"]
        self.width = 0 if head["mask"] else self.block_size  # without a mask, padding is read
        self.scale = head.get("scale")  # mean and deviation, where the label is a number
        self.is_number = self.scale is not None
        self.is_of_pairs = found.meta.get("pairs", True)  # older versions did not record it
        model, tokenizer = model_of(found)
        super().__init__(model, tokenizer, device, dtype)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, or of two with a tab between."""
        second = ""
        if self.is_of_pairs:
            text, _, second = text.partition("\t")
        text = text.strip()
        second = second.strip()
        ids, _ = encode_text(self.tokenizer, text, second, self.block_size, self.prefix, self.cue)
        return ids

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> Tensor:
        """Log-probabilities (N, labels); numbers (N, 1) of a model that foretells a number."""
        rows = [self.encode(text) for text in texts]
        n_labels = len(self.labels)
        result = torch.empty(len(rows), n_labels)
        for batch in self.batches(rows, self.width):
            with hardware.autocast(self.device, self.dtype):
                scores = self.model(batch.idx, batch.lengths)
            if self.is_number:
                mean, deviation = self.scale
                found = mean + deviation * scores.float()
            else:
                found = scores.float().log_softmax(-1)
            result[batch.indices] = found.cpu()
        return result


def load_classifier(
    path: str | Path, device: Device = "auto", dtype: Precision = "auto"
) -> Classifier:
    """A classifier, to be called with a list of texts: the best checkpoint of a run of
    sentiment_train.py, or a step folder.

    dtype: of the matrix products. UserError names what is wrong with the path."""
    return Classifier(path, device, dtype)
