"""A convolution that was not pretrained, on a labelled set: what a trunk has to beat.

    python bench/convolution.py set=sst2 path=data        about a minute a seed on one core
    python bench/convolution.py set=chnsenticorp path=data batch_size=32 train_size=1000

Kim (2014), CNN-rand: word vectors, filters over 3, 4 and 5 tokens, the maximum of each over the
text, dropout, a linear layer. Its tokens are a BPE of the training texts. The split, the texts and
the measures are those of sentiment_train.py; validation chooses the epoch, whose test is read.
"""

import copy
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from smallgpt import console, settings  # noqa: E402
from smallgpt.sentiment import report, splits  # noqa: E402
from smallgpt.sentiment.batches import Buckets, Encoded, encode  # noqa: E402
from smallgpt.sentiment.sets import ReviewSettings  # noqa: E402
from smallgpt.settings import Positive, PositiveFloat, Rate  # noqa: E402
from smallgpt.tokenizer import Tokenizer, TokenizerSettings, train  # noqa: E402

WIDTHS = (3, 4, 5)  # tokens under a filter
BLOCK_SIZE = 256  # longest text in tokens, longer lose their middle
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
        filters = [nn.Conv1d(s.n_embd, s.filters, width) for width in WIDTHS]
        self.filters = nn.ModuleList(filters)
        self.dropout = nn.Dropout(s.dropout)
        self.head = nn.Linear(s.filters * len(WIDTHS), n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        vectors = self.embedding(tokens).transpose(1, 2)  # (B, C, T)
        found = [convolve(vectors).amax(2) for convolve in self.filters]  # (B, filters) each
        return self.head(self.dropout(torch.cat(found, 1).relu()))


def collate(encoded: Encoded, rows, pad: int) -> Tensor:
    """Tokens (B, T) of some texts, at least as many as the widest filter reads."""
    texts = [torch.from_numpy(encoded.ids[row]) for row in rows]
    tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)
    missing = max(0, max(WIDTHS) - tokens.size(1))
    return F.pad(tokens, (0, missing), value=pad)


@torch.inference_mode()
def measure(model: Convolution, encoded: Encoded, data: splits.Reviews, pad: int) -> dict:
    """The set's measures of a split."""
    model.eval()
    scores = []
    for first in range(0, len(encoded.ids), 256):
        rows = range(first, min(first + 256, len(encoded.ids)))
        scores.append(model(collate(encoded, rows, pad)))
    return report.evaluate(torch.cat(scores).numpy(), encoded.labels, data.measures)


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
    model = Convolution(s, tokenizer.vocab_size, len(data.labels), tokenizer.pad)
    optimizer = torch.optim.Adam(model.parameters(), s.lr)
    texts = encoded["train"]
    labels = torch.from_numpy(texts.labels)
    buckets = Buckets(texts.lengths, s.batch_size, seed)
    history: list[float] = []
    test: dict[str, float] = {}
    for epoch in range(s.epochs):
        model.train()
        for step in range(buckets.steps_per_epoch):
            rows = buckets.of(epoch * buckets.steps_per_epoch + step)
            loss = F.cross_entropy(model(collate(texts, rows, tokenizer.pad)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = measure(model, encoded["validation"], data, tokenizer.pad)[data.measures[0]]
        if found > max(history, default=-1.0):
            test = measure(model, encoded["test"], data, tokenizer.pad)
        history.append(found)
    return history, test


def main() -> None:
    s = settings.load(ConvolutionSettings, doc=__doc__)
    data = splits.load(s)
    tokenizer = train(s.tokenizer, [e.text for e in data.splits["train"]])
    encoded = {}
    for name, examples in data.splits.items():
        prefix = [tokenizer.bos]
        encoded[name] = encode(examples, data.labels, tokenizer, BLOCK_SIZE, prefix)
    measures = ", ".join(data.measures)
    print(f"| seed | validation after each epoch | test: {measures} | CPU seconds |")
    print("|---|---|---|---|")
    first = []
    for seed in s.seeds:
        began = time.process_time()
        history, test = run(s, seed, data, encoded, tokenizer)
        seconds = time.process_time() - began
        after = ", ".join(f"{100 * value:.2f}" for value in history)
        values = ", ".join(f"{100 * test[name]:.2f}" for name in data.measures)
        print(f"| {seed} | {after} | {values} | {seconds:.0f} |", flush=True)
        first.append(100 * test[data.measures[0]])
    if len(first) > 1:
        mean, deviation = statistics.mean(first), statistics.stdev(first)
        print(f"\n{s.set}, {data.measures[0]} on test: {mean:.2f} ± {deviation:.2f}")


if __name__ == "__main__":
    console.run(main)
