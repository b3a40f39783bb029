"""Which block of a trunk knows the labels: a linear head on the states of each, from one pass.

    python bench/depths.py config/sentiment_sst2_smollm2.yaml data.train_size=3500

It reads the settings of a fine-tuning. The states (after the final norm) are those of the last
token, and with `cue` also those of the last token before it: one pass gives both. A head is a
logistic regression on states of mean 0 and deviation 1, trained on the training split to its
optimum and scored on the validation split; the test is not read. The last row joins several depths.
With label_words the last line is what the words score before any training.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sentiment_train  # noqa: E402
from model import GPT  # noqa: E402
from sentiment_train import SentimentSettings, Task  # noqa: E402
from smallgpt import console, hardware, settings  # noqa: E402
from smallgpt.parallel.world import World, start  # noqa: E402
from smallgpt.sentiment.batches import Inputs, length_batches  # noqa: E402

STRIDE = 3  # of every third block the states are looked at
DECAY = 1e-2  # of the heads' weights, in the mean loss
ITERATIONS = 200  # of L-BFGS
SPLITS = ("train", "validation")


def read_states(gpt: GPT, inputs: Inputs, back: int, max_tokens: int) -> Tensor:
    """States (2, depths, N, C): of the token so many before the last one, and of the last one."""
    config = gpt.config
    depths = config.n_layer // STRIDE
    states = torch.empty(2, depths, len(inputs.data.ids), config.n_embd)
    batches = length_batches(inputs.data.lengths, max_tokens, 0, inputs.device)
    for rows in tqdm(batches, disable=None, leave=False):
        tokens, lengths = inputs.tokens(rows)
        context = gpt.context(tokens)
        texts = torch.arange(len(rows))
        last = lengths - 1
        x = gpt.embed(tokens, context)
        for depth in range(depths):
            first = depth * STRIDE
            x = gpt.run_blocks(x, context, first, first + STRIDE)
            h = gpt.norm(x).float()
            states[0, depth, rows] = h[texts, last - back].cpu()
            states[1, depth, rows] = h[texts, last].cpu()
    return states


def fit_head(x: Tensor, labels: Tensor) -> Tensor:
    """Weights (classes, C) of a logistic regression on x (N, C)."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, x.size(1), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        nats = F.cross_entropy(x @ weight.T, labels)
        loss = nats + DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def accuracy(scores: Tensor, labels: Tensor) -> str:
    """In percent."""
    hits = scores.argmax(1) == labels
    share = hits.double().mean()
    return f"{100 * float(share):.1f}"


def head_accuracy(train: Tensor, validation: Tensor, labels: dict[str, Tensor]) -> str:
    """Of a head on states (depths, N, C), joined, on the validation split."""
    x = train.transpose(0, 1).flatten(1)
    held_out = validation.transpose(0, 1).flatten(1)
    mean = x.mean(0)
    deviation = x.std(0)
    weight = fit_head((x - mean) / deviation, labels["train"])
    scores = (held_out - mean) / deviation @ weight.T
    return accuracy(scores, labels["validation"])


def print_table(states: dict[str, Tensor], labels: dict[str, Tensor], has_cue: bool) -> None:
    """A row for each depth, a column for the text alone and one for the text with its cue."""
    depths = states["train"].size(1)
    half = depths // 2
    three_quarters = depths - depths // 4
    rows = [[depth] for depth in range(depths)]
    rows.append([half - 1, three_quarters - 1, depths - 1])
    places = [0, 1] if has_cue else [1]
    print("| blocks | text | text and cue |" if has_cue else "| blocks | text |")
    print("|---" * (1 + len(places)) + "|")
    for row in rows:
        cells = [", ".join(str((depth + 1) * STRIDE) for depth in row)]
        for place in places:
            train = states["train"][place, row]
            validation = states["validation"][place, row]
            cells.append(head_accuracy(train, validation, labels))
        print("|", " | ".join(cells), "|", flush=True)


def compare(s: SentimentSettings, task: Task, world: World) -> None:
    dtype, _ = hardware.choose_dtype(s.dtype, world.device)
    model = sentiment_train.make_classifier(s, task, torch.device("cpu"))
    model = model.to(world.device).eval()
    cue = len(task.head["cue"])
    states = {}
    labels = {}
    tokens = 0
    begin = time.process_time()
    with torch.no_grad(), hardware.autocast(world.device, dtype):
        for split in SPLITS:
            inputs = task.inputs[split]
            states[split] = read_states(model.gpt, inputs, cue, s.micro_tokens)
            labels[split] = torch.from_numpy(inputs.data.labels)
            tokens += int(inputs.data.lengths.sum())
    seconds = time.process_time() - begin
    print(f"{tokens:,} tokens in {seconds:.0f} CPU seconds, {hardware.name_of(dtype)}\n")
    print_table(states, labels, bool(cue))
    if s.label_words:
        last = states["validation"][1, -1]
        scores = last @ model.head.weight.detach().cpu().T
        print(f"\nlabel words, untrained: {accuracy(scores, labels['validation'])}")


def main() -> int:
    s = settings.load(SentimentSettings, doc=__doc__)
    with start(s.device, s.timeout, settings.flat(s)) as world:
        compare(s, sentiment_train.prepare(s, world), world)
    return 0


if __name__ == "__main__":
    console.run(main)
