"""Checkpoints that are written while training goes on, and by processes of which each holds other
parameters."""

import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from helpers import losses, steps, wait_for
from smallgpt.console import UserError
from smallgpt.parallel.strategy import Single
from smallgpt.parallel.world import World, start
from smallgpt.runs import checkpoint, state
from smallgpt.runs.checkpoint import Saver

ONE = World(0, 1, torch.device("cpu"))


class Half(Single):
    """A layout of two processes: the first holds the weight of nn.Linear, the second the bias."""

    def names(self):
        names = dict(self.model.named_parameters())
        mine = ("weight", "bias")[self.world.rank]
        return {mine: names[mine]}

    def gather_weights(self):
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        for rank, name in enumerate(("weight", "bias")):
            torch.distributed.broadcast(weights[name], src=rank)
        return weights


def trained(strategy_class: type[Single], world: World) -> tuple[Single, torch.optim.AdamW]:
    """A layer after one update."""
    torch.manual_seed(0)
    strategy = strategy_class(nn.Linear(8, 8), world, torch.float32)
    strategy.model(torch.ones(8)).sum().backward()
    optimizer = torch.optim.AdamW(strategy.names().values(), lr=0.1)
    optimizer.step()
    return strategy, optimizer


def go_on(strategy: Single, optimizer: torch.optim.AdamW) -> None:
    """One more update, in place."""
    optimizer.step()
    with torch.no_grad():
        for p in strategy.model.parameters():
            p.add_(1.0)


def tensors_at(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint, read in one process."""
    strategy, optimizer = trained(Single, ONE)
    found = checkpoint.find(run)
    strategy.set_weights(checkpoint.read_weights(found, strategy.shapes))
    optimizer.state.clear()
    checkpoint.load_optimizers(found, strategy, [optimizer])
    state = checkpoint.optimizer_tensors(strategy.names(), [optimizer])
    return {**dict(strategy.model.named_parameters()), **state}


def assert_holds_the_first_update(run: Path) -> None:
    strategy, optimizer = trained(Single, ONE)
    state = checkpoint.optimizer_tensors(strategy.names(), [optimizer])
    expected = {**dict(strategy.model.named_parameters()), **state}
    found = tensors_at(run)
    assert found.keys() == expected.keys() and len(found) == 8
    assert [name for name in found if not found[name].equal(expected[name])] == []


class Brake:
    """Stands in for save_file: weights are written when `release` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, problem: OSError | None = None):
        self.lift = threading.Event()
        self.problem = problem
        self.really = checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", self.save_file)

    def save_file(self, tensors, file, *metadata) -> None:
        if file.name == "model.safetensors":
            assert self.lift.wait(30)
            if self.problem:
                raise self.problem
        self.really(tensors, file, *metadata)

    def release(self, saver: Saver) -> None:
        self.lift.set()
        saver.wait()


def test_training_goes_on_while_the_state_of_the_call_is_written(tmp_path, monkeypatch):
    """The files once could have held what later updates made of the tensors."""
    strategy, optimizer = trained(Single, ONE)
    brake = Brake(monkeypatch)
    saver = Saver(tmp_path, ONE, keep=1, in_background=True)
    saver.save(strategy, [optimizer], {"step": 1})
    go_on(strategy, optimizer)
    assert saver.progress() == (True, False)
    saver.settle(*saver.progress())
    assert checkpoint.find(tmp_path) is None, "published before it was whole"
    brake.release(saver)
    assert saver.progress() == (False, False)
    assert_holds_the_first_update(tmp_path)


def test_best_names_a_checkpoint_when_it_is_there(tmp_path, monkeypatch):
    """It would lead to nothing, and the checkpoint that it named before would be deleted."""
    strategy, optimizer = trained(Single, ONE)
    saver = Saver(tmp_path, ONE, keep=1, in_background=True)
    saver.save(strategy, [optimizer], {"step": 1})
    saver.name_best(1)
    saver.finish()
    brake = Brake(monkeypatch)
    saver.save(strategy, [optimizer], {"step": 2})
    saver.name_best(2)
    assert checkpoint.find(tmp_path, prefer="best").step == 1
    brake.release(saver)
    assert steps(tmp_path) == [1, 2], "what `best` names is not deleted"
    saver.settle(*saver.progress())
    assert checkpoint.find(tmp_path, prefer="best").step == 2 and steps(tmp_path) == [2]


def test_a_full_disk_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    strategy, optimizer = trained(Single, ONE)
    saver = Saver(tmp_path, ONE, keep=1, in_background=True)
    saver.save(strategy, [optimizer], {"step": 1})
    saver.finish()
    brake = Brake(monkeypatch, OSError(28, "No space left on device"))
    saver.save(strategy, [optimizer], {"step": 2})
    brake.release(saver)
    assert saver.progress() == (False, True)
    with pytest.raises(UserError, match="could not save .*step-00000002 .*No space left on device"):
        saver.settle(*saver.progress())
    assert saver.close() == ""  # nothing is said twice
    assert steps(tmp_path) == [1] and not list(tmp_path.glob(".step*"))


def test_a_run_that_ends_by_an_error_still_reports_a_full_disk(tmp_path, monkeypatch):
    """Its message would name a last checkpoint that is not there."""
    strategy, optimizer = trained(Single, ONE)
    brake = Brake(monkeypatch, OSError(28, "No space left on device"))
    saver = Saver(tmp_path, ONE, keep=1, in_background=True)
    saver.save(strategy, [optimizer], {"step": 1})
    brake.lift.set()
    problem = saver.close()
    assert "could not save" in problem and "No space left on device" in problem
    assert not list(tmp_path.iterdir())


# --- two processes --------------------------------------------------------------------------------


def save_and_go_on(run: Path, world: World, in_background: bool) -> None:
    """Save while both processes compute sums, as a training's gradients are."""
    strategy, optimizer = trained(Half, world)
    saver = Saver(run, world, keep=1, in_background=in_background)
    saver.save(strategy, [optimizer], {"step": 1})
    go_on(strategy, optimizer)
    while saver.step:
        gradients = torch.ones(1000)
        torch.distributed.all_reduce(gradients)
        assert gradients.equal(torch.full((1000,), 2.0))
        writing, failed = world.sum(*saver.progress())
        saver.settle(writing, failed)


def fail_on_the_second(run: Path, world: World) -> str:
    """The message of a save for which the second process has no room."""
    strategy, optimizer = trained(Half, world)
    saver = Saver(run, world, keep=1, in_background=True)
    really = state.save_file

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    if world.rank == 1:
        state.save_file = full
    saver.save(strategy, [optimizer], {"step": 2})
    try:
        saver.finish()
    except UserError as error:
        return str(error)
    finally:
        state.save_file = really
    return ""


def load_without_the_bias(run: Path, world: World) -> str:
    """The message for a state that lacks what only the second process holds."""
    strategy, optimizer = trained(Half, world)
    optimizers = [optimizer] if world.rank == 0 else []
    Saver(run, world, keep=1).save(strategy, optimizers, {"step": 1})
    try:
        checkpoint.load_optimizers(checkpoint.find(run), strategy, [optimizer])
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    """What each of two processes does."""
    folder = Path(sys.argv[1])
    with start("cpu") as world:
        save_and_go_on(folder / "sync", world, in_background=False)
        save_and_go_on(folder / "async", world, in_background=True)
        message = fail_on_the_second(folder / "async", world)
        assert "could not save" in message and "No space left on device" in message, message
        message = load_without_the_bias(folder / "lacking", world)
        assert "belongs to another optimizer" in message, message


def test_processes_that_hold_different_parameters(tmp_path, run_ranks):
    """Each writes its own, whatever the other does meanwhile; both learn that one has no room, or
    finds nothing for its parameters; one process reads back everything."""
    for result in run_ranks(2, [tmp_path], script="runs.test_saver"):
        assert result.status == 0, result.err
    assert_holds_the_first_update(tmp_path / "sync")
    assert_holds_the_first_update(tmp_path / "async")
    assert_two_verify(tmp_path / "sync")
    assert_two_verify(tmp_path / "async")


def assert_two_verify(run: Path) -> None:
    """Of two processes the second one finds the damage in what the second one wrote."""
    found = checkpoint.find(run)
    _, second = sorted((found.path / "state").iterdir())
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    first_rank, second_rank = (World(rank, 2, torch.device("cpu")) for rank in range(2))
    checkpoint.verify_state(found, first_rank)
    with pytest.raises(UserError, match=f"{second.name} is damaged"):
        checkpoint.verify_state(found, second_rank)


SHARDED = {"dtype": "float64", "max_steps": 24, "optim__name": "muon", "save_every": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, run) -> Path:
    """The run of one process that is not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert run("train", tiny(out, run="r", **SHARDED)).status == 0
    return out / "r"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_sharded_run_goes_on_in_one_process(tmp_path, tiny, run, start_ranks, whole, end):
    """What was not published when the processes died is not missed; what a signal interrupts is
    published first."""
    args = tiny(tmp_path, run="r", save="async", **SHARDED)
    folder = tmp_path / "r"
    ranks = start_ranks(2, [*args, "mesh.shard=2"], script="train_fsdp")
    wait_for(lambda: len(steps(folder)) and len(losses(folder, "train")) > 7, "some steps")
    for rank in ranks:
        rank.kill(end)
    for rank in ranks:
        assert rank.wait().status == {signal.SIGKILL: -9, signal.SIGTERM: 143}[end]
    if end == signal.SIGTERM:
        assert checkpoint.find(folder).step == max(losses(folder, "train"))
    again = run("train", args)
    assert again.status == 0 and "continuing from step" in again.out, again.err
    for split in ("train", "val"):
        found, expected = losses(folder, split), losses(whole, split)
        assert found == pytest.approx(expected, rel=1e-10, abs=0)
