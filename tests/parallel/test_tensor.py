"""Tensor parallelism: the numbers are those of one process, in every form of the model."""

import pytest
from parallel.tensor_cases import CASES

from helpers import run_cases
from model import GPTConfig
from smallgpt.console import UserError
from smallgpt.parallel.tensor import check_cut


@pytest.fixture(scope="module")
def found(start_ranks) -> dict[str, dict]:
    return run_cases(start_ranks, "parallel.tensor_cases", timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_cut_model_learns_as_one_process_does(found, case):
    """A wrong layout, or a gradient that is not summed, shows in the first losses or in the weights
    they lead to."""
    result = found[case]
    for kind in ("losses", "norms"):
        cut, alone = result[kind]
        assert len(cut) == 5
        assert cut == pytest.approx(alone, rel=1e-12 if kind == "losses" else 1e-10, abs=0)
    assert min(result["norms"][1]) > 0.05  # clipping acted
    assert result["weights"] < 1e-9
    assert result["peers_agree"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_weights_of_a_cut_model_are_gathered_and_put_back_by_name(found, case):
    """Checkpoints know a parameter by its name alone, and what was frozen stays frozen."""
    result = found[case]
    assert result["same_names"] and result["same_start"] and result["put_back"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_its_part(found, case):
    """A matrix that stays whole makes a model too large for the memory that was planned."""
    ranks = CASES[case].tp * CASES[case].shard
    norms_and_biases = 0.04
    assert found[case]["held"] < (1 / ranks + norms_and_biases) * found[case]["all"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dropout", "dropout, sequence"])
def test_dropout_is_alike_where_the_ranks_hold_the_same(found, case):
    """Ranks of one model that drop different numbers of the same state compute different models;
    those that drop the same ones of different heads or positions repeat one mask."""
    result = found[case]
    assert result["repeats"] and result["one_model"]
    assert not result["heads_alike"]
    assert result["outputs_alike"] is (case == "dropout")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dropout", "dropout, sequence"])
def test_recomputed_blocks_drop_the_same(found, case):
    """A block that runs twice and drops other numbers then gives a wrong gradient, silently."""
    assert found[case]["recomputes"]


@pytest.mark.parametrize(
    "config, tp, message",
    [
        ({"n_head": 6}, 4, "n_head=6 is no multiple of it; what fits is mesh.tp=1 or 2 or 3 or 6"),
        ({"n_head": 4}, 8, "n_head=4 is no multiple of it; what fits is mesh.tp=1 or 2 or 4"),
        (
            {"n_head": 12, "n_kv_head": 4},
            6,
            "n_kv_head=4 is neither a multiple nor a divisor of it; what fits is mesh.tp=1 or 2 or "
            "4 or 12",
        ),
        (
            {"n_head": 3, "n_embd": 48, "mlp": "swiglu"},
            3,
            "the 128 hidden units of its MLP are no multiple of it; what fits is mesh.tp=1",
        ),
    ],
)
def test_a_size_that_cannot_be_cut_is_named_with_what_fits(config, tp, message):
    config = GPTConfig(**{"n_embd": 96, "vocab_size": 256, **config})
    with pytest.raises(UserError) as error:
        check_cut(config, tp)
    assert str(error.value) == f"mesh.tp={tp} cannot cut this model: {message}"


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 12])
def test_a_size_that_can_be_cut_is_accepted(tp):
    """A rule that is too strict refuses a layout that works."""
    check_cut(GPTConfig(n_kv_head=3 if tp == 6 else 12, vocab_size=251), tp)
