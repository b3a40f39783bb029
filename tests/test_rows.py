"""Tables of which a step reads a few rows: the update, the norm, checkpoints, several processes."""

import math

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from model import GPT, GPTConfig
from smallgpt.adam import AdamW, Optimizer
from smallgpt.console import UserError
from smallgpt.parallel.layout import MeshSettings, MeshSpread
from smallgpt.parallel.strategy import Single, Spread
from smallgpt.parallel.world import World, start
from smallgpt.rows import RowwiseAdam, tables
from smallgpt.runs import checkpoint

ONE = World(0, 1, torch.device("cpu"))
ROWS = 1000
READ = [[3, 5, 3, 999], [5, 7, 7, 7], [3, 0, 5, 5], [0, 3, 999, 8]]  # rows of each step


def table_of(rows: int, sparse: bool = True) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(rows, 4, sparse=sparse, dtype=torch.float64)


def backward(table: nn.Embedding, rows: list[int]) -> None:
    """Add a gradient that differs from read to read to that of the rows."""
    read = table(torch.tensor(rows))
    weights = torch.arange(1.0, read.numel() + 1, dtype=torch.float64).view_as(read)
    (read.sin() * weights).sum().backward()


def optimizer_of(table: nn.Embedding, decay: float = 0.0) -> RowwiseAdam:
    return RowwiseAdam([{"params": [table.weight], "weight_decay": decay}], lr=0.1, beta2=0.9)


def update(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


# --- the update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_rows_that_are_read_follow_the_rule_and_others_stay(decay):
    """The rule, row by row and in plain words; what is not read keeps its last bit."""
    table = table_of(ROWS)
    optimizer = optimizer_of(table, decay)
    expected = table.weight.detach().clone()
    moments: dict[int, float] = {}
    for rows in READ:
        dense = nn.Embedding.from_pretrained(expected.clone(), freeze=False)
        backward(dense, rows)
        for row in set(rows):
            gradient = dense.weight.grad[row]
            square = float(gradient.square().mean())
            moments[row] = 0.9 * moments[row] + 0.1 * square if row in moments else square
            expected[row] *= 1 - 0.1 * decay
            expected[row] -= 0.1 * gradient / math.sqrt(moments[row])
        backward(table, rows)
        update(optimizer)
        torch.testing.assert_close(table.weight.detach(), expected, rtol=1e-7, atol=0)
    untouched = [row for row in range(ROWS) if row not in moments]
    assert len(untouched) == ROWS - 6
    assert table.weight[untouched].equal(table_of(ROWS).weight[untouched])
    (moment,) = optimizer.state[table.weight].values()
    assert moment.count_nonzero() == 6, "one number for each row that was read"


def test_accumulated_gradients_are_one_gradient():
    """A row that two micro-batches read would have been updated twice, or by one of them only."""
    apart, together = table_of(ROWS), table_of(ROWS)
    for rows in (READ[0], READ[1]):
        backward(apart, rows)
    read = together(torch.tensor(READ[:2]))
    weights = torch.arange(1.0, 17.0, dtype=torch.float64).view(4, 4)
    (read.sin() * weights).sum().backward()
    for table in (apart, together):
        update(optimizer_of(table))
    torch.testing.assert_close(apart.weight, together.weight, rtol=1e-12, atol=0)
    assert not apart.weight.equal(table_of(ROWS).weight)


def test_a_row_whose_gradient_is_zero_stays():
    """It would become nan: nothing divided by nothing."""
    table = table_of(ROWS)
    (table(torch.tensor([1, 2])) * torch.tensor([[0.0], [1.0]])).sum().backward()
    update(optimizer_of(table))
    assert table.weight[1].equal(table_of(ROWS).weight[1])
    assert table.weight.isfinite().all()


def test_clipping_is_that_of_the_same_dense_gradient():
    """torch cannot clip a sparse gradient; and a row that was read twice must count once."""
    found = {}
    for sparse in (True, False):
        model = nn.ModuleDict({"table": table_of(ROWS, sparse), "head": nn.Linear(4, 1).double()})
        backward(model["table"], READ[0])
        model["head"].weight.grad = torch.ones(1, 4, dtype=torch.float64)
        norm = float(Single(model, ONE, torch.float64).clip([], 0.5))
        found[sparse] = norm, model["table"].weight.grad.to_dense(), model["head"].weight.grad
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-14) and found[True][0] > 0.5
    for sparse_gradient, dense_gradient in zip(found[True][1:], found[False][1:], strict=True):
        torch.testing.assert_close(sparse_gradient, dense_gradient, rtol=1e-14, atol=0)


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """The moments are a number for each row: they were read back as a whole table."""
    never_stopped, stopped = table_of(ROWS), table_of(ROWS)
    optimizer = optimizer_of(never_stopped)
    for rows in READ:
        backward(never_stopped, rows)
        update(optimizer)

    strategy, optimizer = Single(stopped, ONE, torch.float64), optimizer_of(stopped)
    for rows in READ[:2]:
        backward(stopped, rows)
        update(optimizer)
    checkpoint.Saver(tmp_path, ONE, keep=1).save(strategy, [optimizer], {"step": 2})

    resumed = table_of(ROWS)
    strategy, optimizer = Single(resumed, ONE, torch.float64), optimizer_of(resumed)
    found = checkpoint.find(tmp_path)
    strategy.set_weights(checkpoint.read_weights(found, strategy.shapes))
    checkpoint.load_optimizers(found, strategy, [optimizer])
    for rows in READ[2:]:
        backward(resumed, rows)
        update(optimizer)
    assert resumed.weight.equal(never_stopped.weight)
    assert not resumed.weight.equal(stopped.weight)


# --- several processes ----------------------------------------------------------------------------


def model_with_a_table() -> GPT:
    """Its table is the token embedding, which a sentence reads a few rows of, too."""
    torch.manual_seed(0)
    shape = {"vocab_size": ROWS, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**shape, tie_weights=False)).double()
    model.wte.sparse = True
    return model


class Batch:
    def __init__(self, tokens: Tensor):
        self.inputs = (tokens, tokens.roll(-1, 1), None)


def train(strategy: Single, rank: int, size: int) -> list[float]:
    """Norms of four updates, of two micro-batches on each of `size` processes."""
    names = strategy.names()
    table = names.pop("wte.weight")
    optimizers = [RowwiseAdam([{"params": [table]}], lr=0.1)]
    optimizers.append(AdamW(list(names.values()), lr=0.01, fused=True))
    norms = []
    for step in range(4):
        tokens = torch.randint(50, (8, 8), generator=torch.Generator().manual_seed(step))
        batches = [Batch(rows) for rows in tokens.chunk(size)[rank].chunk(2)]
        strategy.forward_backward(batches, lambda run, batch: run(*batch.inputs), 1 / 64)
        norms.append(float(strategy.clip(optimizers, 0.5)))
        for optimizer in optimizers:
            update(optimizer)
    return norms


def main() -> None:
    """What each of two processes does."""
    with start("cpu") as world:
        alone = Single(model_with_a_table(), ONE, torch.float64)
        spread = Spread(world).build(model_with_a_table(), torch.float64)
        expected = train(alone, 0, 1)
        assert train(spread, world.rank, 2) == pytest.approx(expected, rel=1e-12)
        assert min(expected) > 0.5, "clipping acts"
        for name, p in alone.names().items():
            torch.testing.assert_close(spread.names()[name], p, rtol=0, atol=1e-12, msg=name)
        with pytest.raises(UserError, match=r"must hold wte\.weight whole.*mesh\.shard=1"):
            MeshSpread(world, MeshSettings(shard=2)).build(model_with_a_table(), torch.float64)


def test_two_processes_train_a_table_as_one_does(run_ranks):
    """The same rows may be read by both. A layout that would cut the table is refused."""
    for result in run_ranks(2, [], script="test_rows"):
        assert result.status == 0, result.err


def test_several_gpus_are_told_that_they_cannot():
    """NCCL would end the run in its first step, with a traceback."""
    model = model_with_a_table()
    assert tables(model) == ["wte.weight"]
    with pytest.raises(UserError, match=r"NCCL cannot sum the sparse gradient of wte\.weight"):
        Spread(World(0, 2, torch.device("cuda"))).build(model, torch.float32)
