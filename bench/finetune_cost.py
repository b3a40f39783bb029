"""What a fine-tuning costs, variant by variant: tokens/s of one process, and its memory.

    python bench/finetune_cost.py config/sentiment_sst2_smollm2.yaml -- "" freeze=trunk lora=8 \\
        "trunk_blocks=22 freeze=all_but_last:8"

The words before `--` are settings of sentiment_train.py that all variants share. Each word behind
it is a variant, its own settings between spaces. A variant has a process of its own. It scores one
batch of texts, lets the frozen part read all of them once, and trains for a few steps as
sentiment_train.py does; with a frozen part these read its states. Time is the CPU time of the
process; padding is not counted among the tokens. Memory is the peak, loading included.
"""

import functools
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import sentiment_train  # noqa: E402
from sentiment_train import Objective, SentimentSettings  # noqa: E402
from smallgpt import console, hardware, settings  # noqa: E402
from smallgpt.console import UserError  # noqa: E402
from smallgpt.optim import make_optimizers, update  # noqa: E402
from smallgpt.parallel.strategy import Single, Spread  # noqa: E402
from smallgpt.parallel.world import World  # noqa: E402
from smallgpt.sentiment import freeze  # noqa: E402
from smallgpt.sentiment.batches import Inputs, length_batches  # noqa: E402

EXAMPLES = 256  # so few are read that no variant takes long
STEPS = 3  # of training, behind one that is not timed: it allocates memory
PASSES = 2  # forward, behind one that is not timed
HEADER = "| variant | trained, M | forward | frozen part, once | training | peak GiB |"


def cpu_seconds(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def forward_speed(strategy: Single, inputs: Inputs, max_tokens: int) -> float:
    """Tokens/s of scoring a batch of middle length; the better of PASSES."""
    lengths = inputs.data.lengths
    batches = length_batches(lengths, max_tokens, inputs.width, inputs.device)
    rows = batches[len(batches) // 2]
    batch = inputs.of(rows)
    run = functools.partial(strategy.evaluate, batch.x, batch.lengths, None, batch.reads)
    run()
    best = min(cpu_seconds(run) for _ in range(PASSES))
    strategy.settle()
    return lengths[rows].sum() / best


def frozen_speed(strategy: Single, inputs: Inputs, s: SentimentSettings) -> float:
    """Tokens/s of what `inputs` gives the states of from now on."""
    run = functools.partial(
        freeze.cache_frozen_states, strategy, inputs, s.micro_tokens, s.cache_gb
    )
    return inputs.data.lengths.sum() / cpu_seconds(run)


def training_speed(s: SentimentSettings, strategy: Single, objective: Objective) -> float:
    """Tokens/s of STEPS steps."""
    undecayed = freeze.undecayed(strategy.model)
    optimizers = make_optimizers(strategy.names(), s.optim, undecayed=undecayed)

    def train(step: int) -> None:
        batches = objective.micro_batches(step)
        strategy.forward_backward(batches, objective.loss_of, 1.0)
        norm = float(strategy.clip(optimizers, s.optim.clip))
        update(optimizers, strategy.scaler, norm)

    train(0)
    seconds = 0.0
    tokens = 0
    for step in range(1, STEPS + 1):
        seconds += cpu_seconds(functools.partial(train, step))
        rows = objective.buckets.of(step)
        tokens += objective.buckets.lengths[rows].sum()
    return tokens / seconds


def measure(words: list[str]) -> list[str]:
    """The cells of a variant's row."""
    s = settings.load(SentimentSettings, [*words, f"data.train_size={EXAMPLES}"])
    device = hardware.choose_device(s.device)
    dtype, _ = hardware.choose_dtype(s.dtype, device)
    world = World(0, 1, device)
    task = sentiment_train.prepare(s, world)
    model = sentiment_train.make_classifier(s, task, torch.device("cpu"))
    task.trunk.weights = {}
    strategy = Spread(world).build(model, dtype)
    objective = Objective(s, task, strategy, 0.0)
    train = task.inputs["train"]

    trained = freeze.count_trainable(model) / 1e6
    forward = forward_speed(strategy, train, s.micro_tokens)
    once = "-"
    if model.first_block:
        once = f"{frozen_speed(strategy, train, s):,.0f}"
    training = training_speed(s, strategy, objective)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
    return [f"{trained:.2f}", f"{forward:,.0f}", once, f"{training:,.0f}", f"{peak:.1f}"]


def main() -> int:
    words = sys.argv[1:]
    if "--" not in words:
        raise UserError("give settings, then `--`, then variants, such as lora=8 or freeze=trunk")
    border = words.index("--")
    variants = words[border + 1 :]
    settings_of = {variant: [*words[:border], *variant.split()] for variant in variants}
    for listed in settings_of.values():
        settings.load(SentimentSettings, listed)  # a mistake is found before time is spent
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    for variant, listed in settings_of.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cells = pool.apply(measure, [listed])
        print("|", " | ".join([f"`{variant}`", *cells]), "|", flush=True)
    return 0


if __name__ == "__main__":
    console.run(main)
