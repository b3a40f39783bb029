"""The schedule has the shape it promises; every trainable parameter is optimised once, and by the
right rule."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from model import GPT, GPTClassifier, GPTConfig
from smallgpt import optim, settings
from smallgpt.console import UserError
from smallgpt.optim import OptimSettings, check_finite, lr_factor, make_optimizers, set_lr, update
from smallgpt.parallel.strategy import Single
from smallgpt.parallel.world import World, start

torch.set_num_threads(
    1
)  # tensors this small gain nothing from more, and wait for them on a busy machine

TINY = GPTConfig(
    vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=16, bias=True, pos="learned"
)
both = pytest.mark.parametrize("name", ["adamw", "muon"])


def names_of(params: list, model: torch.nn.Module) -> set[str]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)] for p in params}


def all_params(optimizers: list) -> list:
    return [p for o in optimizers for g in o.param_groups for p in g["params"]]


# --- the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_is_linear_never_zero_and_ends_at_the_peak(schedule):
    s = OptimSettings(warmup=4, schedule=schedule)
    assert [lr_factor(step, 100, s) for step in range(5)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )
    assert lr_factor(0, 100, replace(s, warmup=0)) == 1.0, (
        "without a warm-up the first step is at the peak"
    )


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("min_lr", [0.0, 0.1, 1.0])
def test_the_last_step_is_at_min_lr_and_the_rate_never_rises_on_the_way(schedule, min_lr):
    s = OptimSettings(warmup=10, schedule=schedule, min_lr=min_lr)
    factors = [lr_factor(step, 110, s) for step in range(10, 110)]
    assert factors[0] == 1.0 and factors[-1] == pytest.approx(min_lr)
    assert all(b <= a for a, b in zip(factors, factors[1:], strict=False))
    assert lr_factor(500, 110, s) == pytest.approx(min_lr), "and stays there"


def test_cosine_is_half_way_down_half_way_through():
    s = OptimSettings(warmup=0, min_lr=0.2)
    assert lr_factor(50, 101, s) == pytest.approx(0.6)
    assert lr_factor(25, 101, s) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)


def test_wsd_stays_at_the_peak_and_then_goes_down_in_a_line():
    s = OptimSettings(warmup=0, schedule="wsd", decay=0.2, min_lr=0.0)
    assert all(lr_factor(step, 101, s) == pytest.approx(1.0) for step in range(81))
    assert [lr_factor(step, 101, s) for step in (85, 90, 95)] == pytest.approx([0.75, 0.5, 0.25])
    assert lr_factor(100, 101, replace(s, decay=0.0)) == 1.0, "decay=0: no going down at all"


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(
    ("max_steps", "warmup"), [(1, 0), (1, 1), (2, 0), (5, 100), (100, 99), (100, 100)]
)
def test_short_runs_have_a_rate_at_every_step(schedule, max_steps, warmup):
    s = OptimSettings(warmup=warmup, schedule=schedule)
    assert all(0 < lr_factor(step, max_steps, s) <= 1 for step in range(max_steps))


def test_the_warm_up_is_at_most_a_third_of_the_run():
    """36 steps, as a CSV of 400 rows gives, ended in a warm-up of 50, at 0.7 of the rate."""
    s = OptimSettings(warmup=50, min_lr=0.0)
    factors = [lr_factor(step, 36, s) for step in range(36)]
    assert (
        factors.index(max(factors)) == 12
        and max(factors) == 1.0
        and factors[-1] == pytest.approx(0.0)
    )


def named(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, as a strategy hands them out."""
    return dict(model.named_parameters())


class Scaler:
    """Of float16, whose gradients are never finite."""

    scale = 65536.0

    def is_enabled(self) -> bool:
        return True

    def unscale_(self, optimizer) -> None:
        pass

    def update(self) -> None:
        self.scale /= 2

    def get_scale(self) -> float:
        return self.scale


def test_float16_that_finds_no_scale_ends():
    """Such a run made no update to its end, and ended well."""
    with pytest.raises(UserError, match="no scale gives finite gradients in float16"):
        scaler = Scaler()
        for step in range(100):
            check_finite(2.0, math.nan, scaler, step, 0)
            update([], scaler, math.nan)
    assert 30 < step < 50


def test_set_lr_scales_every_group_and_answers_with_the_rate():
    optimizers = make_optimizers(named(GPT(TINY)), OptimSettings(name="muon", lr=0.02))
    for factor in (0.5, 0.25, 1.0):  # always from the peak, not from the last rate
        assert set_lr(optimizers, factor) == pytest.approx(0.02 * factor)
        assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.02 * factor}


@both
def test_embeddings_and_head_have_rates_of_their_own(name):
    """A factor that reached another parameter would change a recipe silently. A tied head has the
    rate of the embedding that it is."""
    s = OptimSettings(name=name, lr=0.01, embedding_factor=4.0, head_factor=0.5)
    for tied in (True, False):
        model = GPT(replace(TINY, tie_weights=tied, pos="learned"))
        rates = {}
        for optimizer in make_optimizers(named(model), s):
            for group in optimizer.param_groups:
                for n in names_of(group["params"], model):
                    rates[n] = group["peak_lr"]
        assert rates.pop("wte.weight") == rates.pop("wpe.weight") == pytest.approx(0.04)
        assert rates.pop("lm_head.weight", 0.005) == pytest.approx(0.005)
        assert set(rates.values()) == {0.01}


# --- groups ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("tie_weights", [True, False])
def test_every_parameter_is_optimised_once(name, tie_weights):
    """A tied matrix has two names in the model and must still be stepped once."""
    model = GPTClassifier(GPT(replace(TINY, tie_weights=tie_weights)), n_classes=2)
    params = all_params(make_optimizers(named(model), OptimSettings(name=name)))
    assert len(params) == len({id(p) for p in params})
    assert names_of(params, model) == {n for n, _ in model.named_parameters()}


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    """Not the embeddings, the LM head or the classification head: their rows are looked up, or are
    classes."""
    model = GPTClassifier(GPT(replace(TINY, tie_weights=False, mlp="swiglu")), n_classes=2)
    adamw, muon = make_optimizers(named(model), OptimSettings(name="muon"))
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, optim.Muon)
    parts = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc", "mlp.gate", "mlp.proj")
    assert names_of(all_params([muon]), model) == {
        f"gpt.blocks.{i}.{part}.weight" for i in range(2) for part in parts
    }


@both
def test_only_matrices_and_embeddings_decay(name):
    """With gradients of zero all that a step does is decay: matrices shrink by lr * weight_decay,
    norms (QK-norms too) and biases stay."""
    model = GPT(replace(TINY, tie_weights=False))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)  # biases are 0 at first, and 0 does not show decay
            p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for optimizer in make_optimizers(
        named(model), OptimSettings(name=name, lr=0.1, weight_decay=0.5)
    ):
        optimizer.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] * (0.95 if p.dim() == 2 else 1.0), msg=n)


@both
def test_frozen_parameters_are_left_alone(name):
    """Only the last block and the head train: the rest is in no group, gets no gradient, and does
    not even decay."""
    model = GPTClassifier(GPT(TINY), n_classes=2)
    model.requires_grad_(False)
    model.gpt.blocks[-1].requires_grad_(True)
    model.head.requires_grad_(True)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = make_optimizers(named(model), OptimSettings(name=name))
    assert names_of(all_params(optimizers), model) == trainable

    model(torch.randint(64, (3, 8)), torch.tensor([8, 4, 1])).logsumexp(-1).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert (
        changed == trainable - {"gpt.blocks.1.attn.k.bias"} or changed == trainable
    )  # softmax ignores k's bias


def train_only(wanted: str) -> torch.nn.Module:
    """A classifier of which only the matrices of the part `wanted` train."""
    model = GPTClassifier(GPT(TINY), n_classes=2)
    for name, p in model.named_parameters():
        p.requires_grad_(wanted in name and p.dim() == 2)
    return model


@both
def test_a_head_alone_can_be_trained(name):
    """Nothing for Muon, no norms and no biases: no optimizer or group is made of nothing."""
    (adamw,) = make_optimizers(named(train_only("head.")), OptimSettings(name=name))
    assert len(adamw.param_groups) == len(all_params([adamw])) == 1


def test_matrices_of_blocks_alone_can_be_trained_by_muon():
    (muon,) = make_optimizers(named(train_only("blocks.")), OptimSettings(name="muon"))
    assert len(all_params([muon])) == 12


# --- Muon -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_iteration_brings_every_singular_value_near_one(shape):
    """In the precision of the matrix where it has float64; and the singular vectors stay."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64) * 1e-3
    result = optim.newton_schulz(matrix)
    assert result.dtype == torch.float64
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ result @ v.T
    torch.testing.assert_close(inner, inner.diag().diag(), rtol=0, atol=1e-12)


def test_muon_follows_that_of_pytorch(monkeypatch):
    """The recipe is the same, and so are the names of its state: older checkpoints can be read."""
    monkeypatch.setattr(optim, "has_bf16", lambda device: True)  # theirs always runs in bfloat16
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(24, 40), (40, 24)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    s = OptimSettings(name="muon", lr=0.05, weight_decay=0.3)
    (mine,) = make_optimizers({f"blocks.{i}": p for i, p in enumerate(ours)}, s)
    reference = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert mine.state[a].keys() == reference.state[b].keys()
        for key, value in reference.state[b].items():
            torch.testing.assert_close(mine.state[a][key], value)
        torch.testing.assert_close(a, b, rtol=0, atol=0.01)
        assert (a - b).norm() / b.norm() < 0.002


def muon_steps(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Those parameters, whole, after three updates with the same gradients on every layout."""
    torch.manual_seed(1)
    muon = optim.Muon([{"params": parameters, "weight_decay": 0.1}], lr=0.1)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, dtype=p.dtype)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements, src_data_rank=None)
        muon.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]


def main() -> None:
    """What each of the four processes below does."""
    shapes = [(10, 7), (7, 10), (10, 7), (10, 7), (7, 10), (10, 7), (10, 7), (3, 10)]
    with start("cpu"):
        torch.manual_seed(0)
        plain = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        expected = muon_steps([torch.nn.Parameter(tensor.clone()) for tensor in plain])
        line = init_device_mesh("cpu", (4,))
        square = init_device_mesh("cpu", (2, 2))
        layouts = {
            "FSDP": (line, [Shard(0)]),
            "HSDP": (square, [Replicate(), Shard(0)]),
            "TP by rows, FSDP": (square, [Shard(0), Shard(1)]),
            "TP by columns, FSDP": (square, [_StridedShard(0, split_factor=2), Shard(0)]),
        }
        for name, (mesh, placements) in layouts.items():
            cut = [
                torch.nn.Parameter(distribute_tensor(tensor, mesh, placements, src_data_rank=None))
                for tensor in plain
            ]
            for a, b in zip(muon_steps(cut), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)


def test_muon_makes_the_same_update_on_every_layout(run_ranks):
    """Shards orthogonalised one by one would give another update, as would a bfloat16 iteration
    whose sums are taken in another order; some ranks have no row, or no matrix, of their own."""
    for result in run_ranks(4, [], script="test_optim"):
        assert result.status == 0, result.err


# --- training -------------------------------------------------------------------------------------


@both
def test_a_batch_is_learned_by_heart(name):
    torch.manual_seed(0)
    model, idx = GPT(TINY), torch.randint(64, (4, 16))
    optimizers = make_optimizers(named(model), OptimSettings(name=name, lr=0.01, warmup=0))
    losses = []
    for step in range(60):
        set_lr(optimizers, lr_factor(step, 60, OptimSettings(warmup=5)))
        loss = model(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(64)) < 0.1 and losses[-1] < losses[0] / 4


def test_clipping_measures_the_norm_of_the_whole_gradient_before_it_scales():
    model, idx = GPT(TINY), torch.randint(64, (2, 16))
    model(idx, idx).backward()
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    strategy = Single(model, World(0, 1, torch.device("cpu")), torch.float32)
    assert strategy.clip([], 0.0) == pytest.approx(before.norm().item())
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), before), (
        "0 only measures"
    )
    assert strategy.clip([], 0.5) == pytest.approx(before.norm().item())
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(after, before * 0.5 / before.norm())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("lr=0.0", "lr must be float > 0, not 0.0"),
        ("min_lr=1.5", "min_lr must be float >= 0 and <= 1, not 1.5"),
        ("decay=-0.1", "decay must be float >= 0 and <= 1, not -0.1"),
        ("warmup=-1", "warmup must be int >= 0, not -1"),
        ("clip=-1.0", "clip must be float >= 0, not -1.0"),  # it turned the gradient round
        ("weight_decay=-0.1", "weight_decay must be float >= 0, not -0.1"),
        ("beta2=1.0", "beta2 must be float >= 0 and < 1, not 1.0"),
    ],
)
def test_limits_are_in_the_types(change, problem):
    assert settings.load(OptimSettings, []) == OptimSettings()
    with pytest.raises(UserError) as error:
        settings.load(OptimSettings, [change])
    assert str(error.value) == problem
