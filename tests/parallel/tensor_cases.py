"""What the processes of test_tensor.py run: a model that is cut, beside the same one in one
process. Each case prints a line {"case": ..., what was found}."""

import json
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from model import GPT, IGNORE, GPTClassifier, GPTConfig, Reads
from smallgpt.optim import OptimSettings, make_optimizers
from smallgpt.parallel.tensor import cut_matrices

TINY = {"vocab_size": 250, "block_size": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2}
GPT2 = {
    "pos": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "qk_norm": False,
    "bias": True,
    "n_kv_head": 4,
}
OPTIM = OptimSettings(lr=1e-2, clip=0.05)  # smaller than any norm: clipping acts
STEPS = 5
ROWS = 4


@dataclass
class Case:
    """A model, what it is trained on, and over how many processes it is cut."""

    tp: int = 2
    shard: int = 1
    sequence: bool = False
    config: dict = field(default_factory=dict)
    packed: bool = False  # several texts in a row
    classifier: dict | None = None  # arguments of GPTClassifier: fine-tuning
    lm_weight: float = 0.0  # of the language-model loss beside the classifier's
    frozen: int = 0  # blocks that do not train
    reads: Reads = "tokens"

    def model(self) -> GPT | GPTClassifier:
        torch.manual_seed(1)
        gpt = GPT(GPTConfig(**{**TINY, "n_embd": 32, **self.config}))
        if self.classifier is None:
            return gpt
        model = GPTClassifier(gpt, n_classes=3, **self.classifier)
        model.first_block = self.frozen
        if self.frozen:
            for part in (gpt.wte, gpt.lm_head, *gpt.blocks[: self.frozen]):
                part.requires_grad_(False)
        return model

    def loss(self, model: GPT | GPTClassifier, step: int, rows: slice) -> Tensor:
        """The share that these rows have in the mean loss of a step's batch."""
        draw = torch.Generator().manual_seed(step)
        # texts of an odd length cannot be shared evenly
        masked = self.classifier is not None and self.classifier.get("mask", True)
        length = 11 + 2 * step if masked else TINY["block_size"]
        x = torch.randint(0, 250, (ROWS, length), generator=draw)
        if self.classifier is not None:
            return self.classifier_loss(model, x, rows)
        targets = torch.randint(0, 250, (ROWS, length), generator=draw)
        targets[0, :5] = targets[2, 3:] = IGNORE  # unevenly
        segments = None
        if self.packed:
            begins = torch.rand(ROWS, length, generator=draw) < 0.2
            segments = begins.cumsum(1)[rows]
        return model(x[rows], targets[rows], segments) / (targets != IGNORE).sum()

    def classifier_loss(self, model: GPTClassifier, x: Tensor, rows: slice) -> Tensor:
        lengths = torch.tensor([x.size(1), 3, 7, 1])[rows]
        labels = torch.tensor([0, 1, 2, 1])[rows]
        targets = x[rows].roll(-1, 1) if self.lm_weight else None
        x = x[rows]
        if self.reads != "tokens":
            with torch.no_grad():
                x = model.run_frozen(x, lengths)
        output = model(x, lengths, targets, self.reads)
        scores, nats = output if self.lm_weight else (output, 0.0)
        loss = F.cross_entropy(scores, labels, reduction="sum") / ROWS
        return loss + self.lm_weight * nats


MEAN = {"pool": "mean"}
CASES = {
    "tied": Case(),
    "untied, any vocabulary": Case(config={"tie_weights": False, "vocab_size": 251}),
    "GPT-2 form": Case(config=GPT2),
    "swiglu": Case(config={"mlp": "swiglu", "n_kv_head": 4}, packed=True),
    "one K/V head": Case(config={"n_kv_head": 1}),
    "sequence, GPT-2 form": Case(sequence=True, config=GPT2),
    "sequence, packed": Case(sequence=True, config={"tie_weights": False}, packed=True),
    "classifier": Case(classifier={}),
    "classifier, both losses": Case(classifier={}, lm_weight=0.01),
    "classifier, mean": Case(classifier={**MEAN, "mask": False}),
    "classifier, states": Case(classifier={}, frozen=1, reads="states"),
    "sequence, classifier": Case(sequence=True, classifier={}),
    "sequence, states": Case(sequence=True, classifier={}, frozen=1, reads="states"),
    "two K/V heads": Case(tp=4),
    "sequence, two K/V heads": Case(tp=4, sequence=True, classifier=MEAN, lm_weight=0.01),
    "fsdp": Case(shard=2),
    "fsdp, GPT-2 form": Case(
        shard=2, sequence=True, config={**GPT2, "tie_weights": False, "vocab_size": 251}
    ),
    "fsdp, states": Case(shard=2, sequence=True, classifier={}, frozen=1, reads="states"),
}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(case: Case, model: nn.Module, data_rank: int = 0, data_size: int = 1) -> dict:
    """Losses and norms of the gradient."""
    optimizers = make_optimizers(dict(model.named_parameters()), OPTIM)
    losses, norms = [], []
    own = ROWS // data_size
    rows = slice(data_rank * own, (data_rank + 1) * own)
    for step in range(STEPS):
        loss = case.loss(model, step, rows)
        (loss * data_size).backward()  # FSDP averages
        parameters = [p for p in model.parameters() if p.grad is not None]
        norms.append(whole(nn.utils.clip_grad_norm_(parameters, OPTIM.clip)).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return {"losses": losses, "norms": norms}


def cut(case: Case, mesh: DeviceMesh) -> nn.Module:
    model = case.model()
    cut_matrices(model, mesh["tp"], case.sequence)
    if case.shard > 1:
        blocks = model.blocks if isinstance(model, GPT) else model.gpt.blocks
        for block in blocks:
            fully_shard(block, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        if isinstance(model, GPTClassifier):
            register_fsdp_forward_method(model, "run_frozen")
    return model


def compare(case: Case, mesh: DeviceMesh) -> dict:
    """The cut model beside one process."""
    one = case.model()
    model = cut(case, mesh)
    expected = [(name, p.requires_grad) for name, p in one.named_parameters()]
    found = [(name, p.requires_grad) for name, p in model.named_parameters()]
    begun = {name: whole(p) for name, p in model.named_parameters()}
    same_start = all(begun[name].equal(p) for name, p in one.named_parameters())
    trained = train(case, model, mesh["shard"].get_local_rank(), case.shard)
    alone = train(case, one)
    sums = torch.tensor(trained["losses"])
    peers = gather(sums, mesh["tp"])
    dist.all_reduce(sums, group=mesh["shard"].get_group())
    ends = {name: whole(p) for name, p in model.named_parameters()}
    differences = {}
    for name, p in one.named_parameters():
        if not name.endswith("k.bias"):  # its gradient is 0: Adam makes steps of the rounding
            differences[name] = ((ends[name] - p).norm() / p.norm()).item()
    return {
        "same_names": expected == found,
        "same_start": same_start,
        "peers_agree": all(losses.equal(peers[0]) for losses in peers),
        "losses": [sums.tolist(), alone["losses"]],
        "norms": [trained["norms"], alone["norms"]],
        "weights": max(differences.values()),
        "put_back": put_back(model, begun),
        "held": sum(p.to_local().numel() for p in model.parameters()),
        "all": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def put_back(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Give each parameter its whole value, and gather it again."""
    for name, p in model.named_parameters():
        p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements, src_data_rank=None))
    return all(whole(p).equal(weights[name]) for name, p in model.named_parameters())


def gather(x: Tensor, mesh: DeviceMesh) -> list[Tensor]:
    """x of each rank."""
    everyone = [torch.empty_like(x) for _ in range(mesh.size())]
    dist.all_gather(everyone, x.contiguous(), group=mesh.get_group())
    return everyone


def dropout(sequence: bool, mesh: DeviceMesh) -> dict:
    """A model of two alike heads, one on each rank: which of its draws are alike?"""
    case = Case(sequence=sequence, config={"n_head": 2, "n_kv_head": 1, "dropout": 0.5})
    model = case.model()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight[16:] = block.attn.q.weight[:16]
    cut_matrices(model, mesh, sequence)
    heads, outputs = [], []
    block = model.blocks[0]
    block.attn.proj.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    block.drop.register_forward_hook(lambda module, args, y: outputs.append((args[0], y)))
    runs = []
    for recompute in (0, 0, 1):
        model.recompute = recompute
        torch.manual_seed(3)
        loss = case.loss(model, 0, slice(0, ROWS))
        loss.backward()
        gradients = [whole(p.grad) for p in model.parameters()]
        runs.append([loss.detach(), torch.rand(()), *gradients])
        model.zero_grad()
    local = [x.to_local() if isinstance(x, DTensor) else x for x in (heads[0], *outputs[0])]
    attention, before, after = (gather(x, mesh) for x in local)
    present = before[0].ne(0) & before[1].ne(0)
    dropped = [x[present] == 0 for x in after]
    return {
        "repeats": all(a.equal(b) for a, b in zip(runs[0], runs[1], strict=True)),
        "recomputes": all(a.equal(b) for a, b in zip(runs[0], runs[2], strict=True)),
        "one_model": all(a.equal(b) for x in runs[0] for a, b in [gather(x, mesh)]),
        "heads_alike": attention[0].equal(attention[1]),
        "outputs_alike": dropped[0].equal(dropped[1]),
    }


def report(case: str, found: dict) -> None:
    if dist.get_rank() == 0:
        print(json.dumps({"case": case, **found}), flush=True)


def main() -> None:
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    for name, case in CASES.items():
        if case.tp * case.shard == size:
            shape = (case.shard, case.tp)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("shard", "tp"))
            found = compare(case, mesh)
            report(name, found)
    if size == 2:
        for sequence in (False, True):
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
            found = dropout(sequence, mesh)
            name = "dropout, sequence" if sequence else "dropout"
            report(name, found)
    dist.destroy_process_group()
