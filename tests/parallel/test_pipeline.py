"""Pipelines: the numbers are those of one process, in every schedule and form of the model."""

import pytest
import torch
from parallel.pipeline_cases import CASES, STEPS

from helpers import losses, run_cases
from model import GPTConfig
from smallgpt.console import UserError
from smallgpt.parallel.layout import MeshSettings, MeshSpread, cut_in_ranges
from smallgpt.parallel.strategy import share_batch
from smallgpt.parallel.world import World

TIED = [name for name, case in CASES.items() if case.config.get("tie_weights", True)]


@pytest.fixture(scope="module")
def found(start_ranks) -> dict[str, dict]:
    return run_cases(start_ranks, "parallel.pipeline_cases", timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_learns_as_one_process_does(found, case):
    """A gradient that is lost or counted twice at a stage's edge shows in the first losses, or in
    the weights they lead to."""
    result = found[case]
    for kind in ("losses", "norms"):
        cut, alone = result[kind]
        assert len(cut) == STEPS
        assert cut == pytest.approx(alone, rel=1e-12 if kind == "losses" else 1e-10, abs=0)
    assert min(result["norms"][1]) > 0.05  # clipping acted
    assert result["weights"] < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_between_steps_gives_what_one_process_finds(found, case):
    """The first stage's process must get what the last one computed, for batches of any size, and
    the next step must not notice."""
    cut, alone = found[case]["evaluations"]
    assert len(cut) >= STEPS
    assert cut == pytest.approx(alone, rel=1e-11, abs=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_main_process_gathers_all_weights_and_can_put_them_back(found, case):
    """A checkpoint that lacks a stage, or holds the stale copy of another, could not be used."""
    assert found[case]["same_start"] and found[case]["put_back"]


@pytest.mark.slow
@pytest.mark.parametrize("case", TIED)
def test_the_copies_of_a_tied_matrix_stay_equal(found, case):
    """The first and the last stage update their own copy: a bit that differs would drift away."""
    copies = found[case]["copies"]
    assert len(copies) >= 2 and all(copies)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name != "tp"])
def test_each_process_holds_its_stages_only(found, case):
    """A block that stays on other processes makes a model too large for the memory planned."""
    result = found[case]
    config = GPTConfig(**{**CASES[case].config})
    mesh = CASES[case].mesh
    extra = 250 * 32 if config.tie_weights else 0
    assert sum(result["held"]) == (result["all"] + extra) * mesh.replicate
    assert max(result["held"]) < result["all"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pp 4", "fsdp", "tp"])
def test_stages_draw_different_dropout(found, case):
    """With one seed for all, the first block of every stage would drop the same numbers; those who
    compute one block together, and whatever chooses a batch, must draw the same."""
    mesh = CASES[case].mesh
    data_ranks = mesh.shard * mesh.replicate
    of_ranks = found[case]["draws"]
    for step_0, step_1, again in of_ranks:
        assert step_0 == again and step_0 != step_1
    before = {of_rank[0][0] for of_rank in of_ranks}
    behind = {of_rank[0][1] for of_rank in of_ranks}
    assert len(before) == data_ranks
    assert len(behind) == data_ranks * mesh.pp


def test_what_is_left_over_goes_to_the_first_stages():
    """The last stage has the LM head beside its blocks."""
    assert cut_in_ranges(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    assert cut_in_ranges(4, 4) == [range(n, n + 1) for n in range(4)]


def test_a_batch_fills_the_pipeline():
    """Fewer micro-batches than stages cannot keep all of them busy, and 1F1B refuses them."""
    shares = share_batch(32 * 24, 32, 16, data_size=2, depth=4)
    assert (shares.rows, shares.accum, shares.micro) == (24, 4, 3)
    shares = share_batch(32 * 24, 32, 2, data_size=1, depth=4)
    assert (shares.accum, shares.micro) == (12, 2)
    with pytest.raises(UserError) as error:
        share_batch(32 * 4, 32, 16, data_size=2, depth=4)
    assert str(error.value).endswith(
        "a multiple of model.block_size=32 x 2 data-parallel reader(s) x 4 micro-batches "
        "(mesh.pp) = 256, for example 256"
    )


@pytest.mark.parametrize("schedule, stages", [("1f1b", 4), ("interleaved", 8)])
def test_more_stages_than_blocks_are_refused(schedule, stages):
    """A stage without blocks would only pass on what it gets."""
    world = World(0, 4, torch.device("cpu"))
    spread = MeshSpread(world, MeshSettings(pp=4, schedule=schedule))
    spread.check(GPTConfig(n_layer=stages, vocab_size=64))
    with pytest.raises(UserError, match=f"mesh.pp makes {stages} stages, .* only {stages - 1}"):
        spread.check(GPTConfig(n_layer=stages - 1, vocab_size=64))


@pytest.mark.slow
def test_a_run_goes_on_with_and_without_a_pipeline(tmp_path, tiny, run, run_ranks):
    """Optimizer state that a stage does not find, or finds twice, would change the next losses."""
    common = dict(dtype="float64", model__n_layer=2, micro_batch=2, keep=9)

    def args(name: str, **changes) -> list[str]:
        return tiny(tmp_path, run=name, **common, **changes)

    def saved(name: str):
        return tmp_path / name / "step-00000004"

    piped = dict(mesh__pp=2)
    assert run("train", args("one")).status == 0
    main, _ = run_ranks(2, args("pp", **piped), script="train_fsdp")
    assert main.status == 0, main.err
    assert "1 replica(s) x 4 accumulation x 2 sequences" in main.out and "pp 2 (1f1b)" in main.out
    assert run("train", args("pp-one", resume=saved("pp"))).status == 0
    main, _ = run_ranks(2, args("one-pp", resume=saved("one"), **piped), script="train_fsdp")
    assert main.status == 0, main.err
    truth = losses(tmp_path / "one", "train")
    assert losses(tmp_path / "pp", "train") == pytest.approx(truth, rel=1e-12, abs=0)
    rest = {step: loss for step, loss in truth.items() if step > 4}
    for moved in ("pp-one", "one-pp"):
        assert losses(tmp_path / moved, "train") == pytest.approx(rest, rel=1e-12, abs=0)
