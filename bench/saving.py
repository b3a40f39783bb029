"""What a checkpoint costs a training: written at once (save=sync) or beside it (save=async).

    OMP_NUM_THREADS=1 python bench/saving.py [--rounds 9]

A model of 25 million parameters is trained in one process; in each round it is saved both ways, in
turn. Beside the training, what is lost is the time of the call and what the steps take longer
until the checkpoint is published. Prints the median and the range of all rounds, in seconds.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import parser, spread  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from smallgpt.hardware import keep_freed_memory  # noqa: E402
from smallgpt.optim import OptimSettings, make_optimizers  # noqa: E402
from smallgpt.parallel.strategy import Single  # noqa: E402
from smallgpt.parallel.world import World  # noqa: E402
from smallgpt.runs.checkpoint import Saver  # noqa: E402

CONFIG = GPTConfig(vocab_size=8192, block_size=128, n_layer=9, n_head=8, n_embd=448)
TOKENS = 64  # of a step: short, as on a GPU, beside the writing


class Training:
    """Steps on random tokens."""

    def __init__(self) -> None:
        keep_freed_memory()
        torch.manual_seed(0)
        self.world = World(0, 1, torch.device("cpu"))
        self.strategy = Single(GPT(CONFIG), self.world, torch.float32)
        self.optimizers = make_optimizers(self.strategy.names(), OptimSettings())
        self.tokens = torch.randint(CONFIG.vocab_size, (1, TOKENS + 1))

    def step(self) -> float:
        """The seconds of one update."""
        begin = time.perf_counter()
        loss = self.strategy.model(self.tokens[:, :-1], self.tokens[:, 1:])
        (loss / TOKENS).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - begin

    def save(self, saver: Saver, number: int) -> dict[str, float]:
        """Seconds of one save: of the call, of the longest step meanwhile, lost in all, and until
        the checkpoint is published."""
        alone = [self.step() for _ in range(4)]
        begin = time.perf_counter()
        saver.save(self.strategy, self.optimizers, {"step": number})
        call = time.perf_counter() - begin
        steps = []
        while saver.step:
            steps.append(self.step())
            saver.settle(*saver.progress())
        published = time.perf_counter() - begin
        alone += [self.step() for _ in range(4)]  # the machine's speed changes: before and after
        usual = statistics.median(alone)
        return {
            "call": call,
            "longest step": max(steps, default=0.0),
            "lost in all": call + sum(steps) - usual * len(steps),
            "published": published,
            "usual step": usual,
        }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--rounds", type=int, default=9)
    rounds = p.parse_args().rounds
    training = Training()
    millions = sum(p.numel() for p in training.strategy.names().values()) / 1e6
    print(f"{millions:.1f}M parameters, {torch.get_num_threads()} thread(s), {rounds} rounds")
    measured: dict[str, list[dict[str, float]]] = {"sync": [], "async": []}
    with tempfile.TemporaryDirectory() as folder:
        savers = {
            way: Saver(Path(folder), training.world, keep=1, in_background=way == "async")
            for way in measured
        }
        for saver in savers.values():
            training.save(saver, 1)  # warms up
        for number in range(2, rounds + 2):
            for way, saver in savers.items():
                measured[way].append(training.save(saver, number))
    for way, saves in measured.items():
        columns = []
        for name in saves[0]:
            values = [save[name] for save in saves]
            columns.append(f"{name} {spread(values, '.2f')}")
        print(f"{way:<6}{', '.join(columns)}")


if __name__ == "__main__":
    main()
