"""A convolution that was not pretrained, on a labelled set: what a trunk has to beat.

    python bench/convolution.py set=sst2 path=data
    python bench/convolution.py set=chnsenticorp path=data batch_size=32 train_size=1000

Kim (2014), CNN-rand: word vectors, filters over 3, 4 and 5 tokens, the maximum of each over the
text, dropout, a linear layer. Its tokens are a BPE of the training texts. The split, the texts and
the measures are those of sentiment_train.py; validation chooses the epoch, whose test is read.
"""

import copy
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

from smallgpt import console, settings  # noqa: E402
from smallgpt.sentiment import report, splits  # noqa: E402
from smallgpt.sentiment.batches import Buckets, Encoded, encode  # noqa: E402
from smallgpt.sentiment.sets import ReviewSettings  # noqa: E402
from smallgpt.settings import Positive, PositiveFloat, Rate  # noqa: E402
from smallgpt.tokenizer import Tokenizer, TokenizerSettings, train  # noqa: E402

WIDTHS = (3, 4, 5)  # tokens under a filter
BLOCK_SIZE = 256  # longest text in tokens, longer lose their middle
AT_ONCE = 256  # texts of an evaluation's batch
TOKENIZER = TokenizerSettings(kind="bpe", vocab_size=16384, lowercase=True)


@dataclass
class ConvolutionSettings(ReviewSettings):
    """The labelled set, as under `data.` of sentiment_train.py, and the network."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of weights, batches and dropout
    epochs: Positive = 3  # passes over the training examples; the best on validation is tested
    batch_size: Positive = 64  # examples per step
    lr: PositiveFloat = 1e-3  # of Adam
    dropout: Rate = 0.5  # of what the linear layer reads
    n_embd: Positive = 300  # length of a word vector
    filters: Positive = 100  # of each width
    tokenizer: TokenizerSettings = field(default_factory=lambda: copy.copy(TOKENIZER))


class Convolution(nn.Module):
    """Tokens (B, T) -> scores (B, n_classes)."""

    def __init__(self, s: ConvolutionSettings, vocab_size: int, n_classes: int, pad: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, s.n_embd, padding_idx=pad)
        self.filters = nn.ModuleList()
        for width in WIDTHS:
            self.filters.append(nn.Conv1d(s.n_embd, s.filters, width))
        self.dropout = nn.Dropout(s.dropout)
        n_features = s.filters * len(WIDTHS)
        self.head = nn.Linear(n_features, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        vectors = self.embedding(tokens)
        by_channel = vectors.transpose(1, 2)  # (B, C, T)
        found = []
        for convolve in self.filters:
            answers = convolve(by_channel)
            found.append(answers.amax(2))  # (B, filters)
        features = torch.cat(found, 1).relu()
        return self.head(self.dropout(features))


def collate(encoded: Encoded, rows, pad: int) -> Tensor:
    """Tokens (B, T) of some texts, at least as many as the widest filter reads."""
    texts = []
    for row in rows:
        ids = encoded.ids[row]
        texts.append(torch.from_numpy(ids))
    tokens = pad_sequence(texts, batch_first=True, padding_value=pad)
    length = tokens.size(1)
    missing = max(0, max(WIDTHS) - length)
    return F.pad(tokens, (0, missing), value=pad)


@torch.inference_mode()
def measure(model: Convolution, encoded: Encoded, data: splits.Reviews, pad: int) -> dict:
    """The set's measures of a split."""
    model.eval()
    scores = []
    n_texts = len(encoded.ids)
    for first in range(0, n_texts, AT_ONCE):
        end = min(first + AT_ONCE, n_texts)
        tokens = collate(encoded, range(first, end), pad)
        scores.append(model(tokens))
    found = torch.cat(scores).numpy()
    return report.evaluate(found, encoded.labels, data.measures)


def run(
    s: ConvolutionSettings,
    seed: int,
    data: splits.Reviews,
    encoded: dict[str, Encoded],
    tokenizer: Tokenizer,
) -> tuple[list[float], dict[str, float]]:
    """Train with one seed. Returns the first measure on validation after each epoch, and the
    test's measures after the best of them."""
    torch.manual_seed(seed)
    pad = tokenizer.pad
    n_classes = len(data.labels)
    model = Convolution(s, tokenizer.vocab_size, n_classes, pad)
    optimizer = torch.optim.Adam(model.parameters(), s.lr)
    texts = encoded["train"]
    labels = torch.from_numpy(texts.labels)
    buckets = Buckets(texts.lengths, s.batch_size, seed)
    history: list[float] = []
    test: dict[str, float] = {}
    n_steps = buckets.steps_per_epoch
    for epoch in range(s.epochs):
        model.train()
        for step in range(n_steps):
            rows = buckets.of(epoch * n_steps + step)
            tokens = collate(texts, rows, pad)
            scores = model(tokens)
            loss = F.cross_entropy(scores, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = measure(model, encoded["validation"], data, pad)
        score = found[data.measures[0]]
        best = max(history, default=-1.0)
        if score > best:
            test = measure(model, encoded["test"], data, pad)
        history.append(score)
    return history, test


def main() -> None:
    s = settings.load(ConvolutionSettings, doc=__doc__)
    data = splits.load(s)
    tokenizer = train(s.tokenizer, [e.text for e in data.splits["train"]])
    encoded = {}
    prefix = [tokenizer.bos]
    for name, examples in data.splits.items():
        encoded[name] = encode(examples, data.labels, tokenizer, BLOCK_SIZE, prefix)
    main_measure = data.measures[0]
    measures = ", ".join(data.measures)
    print(f"| seed | validation after each epoch | test: {measures} | CPU seconds |")
    print("|---|---|---|---|")
    scores = []
    for seed in s.seeds:
        began = time.process_time()
        history, test = run(s, seed, data, encoded, tokenizer)
        seconds = time.process_time() - began
        after = in_percent(history)
        values = in_percent(test[name] for name in data.measures)
        print(f"| {seed} | {after} | {values} | {seconds:.0f} |", flush=True)
        scores.append(100 * test[main_measure])
    if len(scores) > 1:
        mean = statistics.mean(scores)
        deviation = statistics.stdev(scores)
        print(f"\n{s.set}, {main_measure} on test: {mean:.2f} ± {deviation:.2f}")


def in_percent(values: Iterable[float]) -> str:
    return ", ".join(f"{100 * value:.2f}" for value in values)


if __name__ == "__main__":
    console.run(main)
