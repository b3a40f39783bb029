"""What the processes of test_pipeline.py run: a model cut into stages, beside the same one in one
process. Each case prints a line {"case": ..., what was found}."""

import json
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import GPT, IGNORE, GPTClassifier, GPTConfig
from smallgpt.optim import OptimSettings, make_optimizers, update
from smallgpt.parallel.layout import MeshSettings, MeshSpread
from smallgpt.parallel.mesh import whole_of
from smallgpt.parallel.strategy import Single
from smallgpt.parallel.world import World, start

TINY = {"vocab_size": 250, "block_size": 32, "n_layer": 5, "n_head": 2, "n_embd": 32}
GPT2 = {"pos": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False, "bias": True}
OPTIM = OptimSettings(lr=1e-2, clip=0.05)  # smaller than any norm: clipping acts
STEPS = 4
# rows and length of each micro-batch of a data rank: other shapes at other steps
EVEN = [(2, 16)] * 4
RAGGED = [(3, 9), (1, 14), (2, 5), (3, 11)]


class Batch(NamedTuple):
    inputs: tuple
    labels: Tensor


@dataclass
class Case:
    """A model, how it is cut, and what it is trained on."""

    mesh: MeshSettings
    config: dict = field(default_factory=dict)
    packed: bool = False  # several texts in a row
    recompute: int = 0
    classifier: dict | None = None  # arguments of GPTClassifier: fine-tuning
    lm_weight: float = 0.0  # of the language-model loss beside the classifier's
    frozen: int = 0  # blocks that do not train, nor the embedding

    @property
    def processes(self) -> int:
        return self.mesh.pp * self.mesh.replicate * self.mesh.shard * self.mesh.tp

    @property
    def shapes(self) -> list[tuple[int, int]]:
        masked = self.classifier is not None and self.classifier.get("mask", True)
        return RAGGED if masked else EVEN

    def model(self) -> GPT | GPTClassifier:
        torch.manual_seed(1)
        gpt = GPT(GPTConfig(**{**TINY, **self.config}))
        gpt.recompute = self.recompute
        if self.classifier is None:
            return gpt
        model = GPTClassifier(gpt, n_classes=3, **self.classifier)
        if self.frozen:
            for part in (gpt.wte, gpt.lm_head, *gpt.blocks[: self.frozen]):
                part.requires_grad_(False)
        return model

    def batch(self, rows: int, length: int, draw: torch.Generator) -> Batch:
        x = torch.randint(0, TINY["vocab_size"], (rows, length), generator=draw)
        targets = torch.randint(0, TINY["vocab_size"], (rows, length), generator=draw)
        targets[0, :3] = IGNORE  # unevenly
        labels = torch.randint(0, 3, (rows,), generator=draw)
        if self.classifier is not None:
            lengths = torch.randint(1, length + 1, (rows,), generator=draw)
            return Batch((x, lengths, targets if self.lm_weight else None, "tokens"), labels)
        segments = None
        if self.packed:
            begins = torch.rand(rows, length, generator=draw) < 0.2
            segments = begins.cumsum(1)
        return Batch((x, targets, segments), labels)

    def batches(self, step: int, data_size: int) -> list[Batch]:
        """All micro-batches of a step, data rank after data rank."""
        draw = torch.Generator().manual_seed(step)
        found = []
        for _ in range(data_size):
            for rows, length in self.shapes:
                longer = step if self.shapes is RAGGED else 0
                found.append(self.batch(rows, length + longer, draw))
        return found

    def loss_of(self, run, batch: Batch) -> Tensor:
        output = run(*batch.inputs)
        if self.classifier is None:
            return output
        scores, nats = output if self.lm_weight else (output, 0.0)
        return F.cross_entropy(scores, batch.labels, reduction="sum") + self.lm_weight * nats


MEAN = {"pool": "mean"}
GPIPE = {"schedule": "gpipe"}
INTERLEAVED = {"schedule": "interleaved"}


def mesh(pp: int = 2, shard: int = 1, **others) -> MeshSettings:
    return MeshSettings(pp=pp, shard=shard, **others)


CASES = {
    "1f1b": Case(mesh(), packed=True),
    "gpipe, untied": Case(mesh(**GPIPE), {"tie_weights": False}),
    "interleaved": Case(mesh(**INTERLEAVED), packed=True),
    "gpt2": Case(mesh(), {**GPT2, "n_layer": 3}),
    "interleaved, gpt2": Case(mesh(**INTERLEAVED), {**GPT2, "tie_weights": False}),
    "recompute": Case(mesh(), recompute=1),
    "classifier": Case(mesh(), classifier={}),
    "classifier, both losses": Case(mesh(), classifier=MEAN, lm_weight=0.1),
    "classifier, interleaved": Case(mesh(**INTERLEAVED), classifier={}, lm_weight=0.1),
    "classifier, no mask": Case(mesh(), classifier={**MEAN, "mask": False}),
    "classifier, frozen stage": Case(mesh(), {"tie_weights": False}, classifier={}, frozen=3),
    "classifier, frozen": Case(mesh(**GPIPE), classifier={}, frozen=5),
    "pp 4": Case(mesh(4)),
    "pp 4, untied": Case(mesh(4), {"tie_weights": False}, classifier={}),
    "fsdp": Case(mesh(shard=2), recompute=1),
    "fsdp, interleaved": Case(mesh(shard=2, **INTERLEAVED), classifier={}, lm_weight=0.1),
    "fsdp, frozen": Case(mesh(shard=2), {"tie_weights": False}, classifier={}, frozen=3),
    "replicate, gpt2": Case(mesh(replicate=2, **GPIPE), GPT2),
    "tp": Case(mesh(tp=2)),
}


def train(case: Case, strategy: Single, data_size: int) -> dict:
    """Losses and norms of the gradient, and what a validation batch gives at each step."""
    optimizers = make_optimizers(strategy.names(), OPTIM)
    losses, norms, evaluations = [], [], []
    for step in range(STEPS):
        strategy.seed(0, step)
        everyone = case.batches(step, data_size)
        if strategy.data_size > 1:
            first = strategy.data_rank * len(case.shapes)
            batches = everyone[first : first + len(case.shapes)]
        else:
            batches = everyone
        count = sum(len(batch.labels) for batch in everyone)
        loss = strategy.forward_backward(batches, case.loss_of, 1 / count)
        losses.append(strategy.sum(float(loss))[0] / count)
        norms.append(float(strategy.clip(optimizers, OPTIM.clip)))
        update(optimizers, strategy.scaler, norms[-1])
        seen = case.batch(5, 16, torch.Generator().manual_seed(100 + step))
        found = strategy.evaluate(*seen.inputs)
        strategy.settle()
        parts = found if isinstance(found, tuple) else (found,)
        evaluations += torch.cat([part.flatten() for part in parts]).tolist()
    return {"losses": losses, "norms": norms, "evaluations": evaluations}


def copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that training does not change."""
    return {name: weight.clone() for name, weight in weights.items()}


def everyones(value: object) -> list:
    """The value of each process."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def held(strategy: Single) -> int:
    """How many numbers of the model lie on this process."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in strategy.model.parameters()]
    return sum(part.numel() for part in parts)


def draws(case: Case, strategy: Single) -> list[tuple[int, int]]:
    """Random numbers of this process, drawn before and behind the passes of two steps, and of the
    first again."""
    found = []
    for step in (0, 1, 0):
        strategy.seed(0, step)
        before = int(torch.randint(2**40, ()))
        strategy.forward_backward(case.batches(step, 1), case.loss_of, 1.0)
        found.append((before, int(torch.randint(2**40, ()))))
        strategy.model.zero_grad()
    return found


def embedding(strategy: Single) -> list[float] | None:
    """Of a process that holds a part of it."""
    found = [p for name, p in strategy.names().items() if name.endswith("wte.weight")]
    return whole_of(found[0]).flatten().tolist() if found else None


def compare(case: Case, world: World) -> dict:
    """The cut model beside one process, on the main process."""
    spread = MeshSpread(world, case.mesh)
    spread.check(GPTConfig(**{**TINY, **case.config}))
    with spread.birthplace():
        model = case.model()
    strategy = spread.build(model, torch.float64)
    begun = copies(strategy.gather_weights())
    trained = train(case, strategy, strategy.data_size)
    ended = copies(strategy.gather_weights())
    embeddings = everyones(embedding(strategy))
    weights = [begun]
    dist.broadcast_object_list(weights)
    strategy.set_weights(weights[0])
    put_back = strategy.gather_weights()
    everyone = {
        "held": everyones(held(strategy)),
        "draws": everyones(draws(case, strategy)),
        "copies": [x == embeddings[0] for x in embeddings if x is not None],
    }
    if not world.main:
        return {}
    one = Single(case.model(), World(0, 1, world.device), torch.float64)
    start = copies(one.gather_weights())
    alone = train(case, one, strategy.data_size)
    differences = {}
    for name, weight in one.gather_weights().items():
        if not name.endswith("k.bias"):  # its gradient is 0: Adam makes steps of the rounding
            differences[name] = float((ended[name] - weight).norm() / weight.norm())
    return {
        "same_start": same(begun, start),
        "put_back": same(put_back, start),
        "weights": max(differences.values()),
        "all": held(one),
        **everyone,
        **{key: [trained[key], alone[key]] for key in alone},
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in b)


def main() -> int:
    torch.set_default_dtype(torch.float64)
    with start("cpu") as world:
        for name, case in CASES.items():
            if case.processes == world.size:
                found = compare(case, world)
                if world.main:
                    print(json.dumps({"case": name, **found}), flush=True)
    return 0
