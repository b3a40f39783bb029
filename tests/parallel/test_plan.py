"""What footprint.py and plan.py compute is what true processes do: their traffic to the byte, their
memory within a tenth; and what a search finds can be run."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bench import plan as bench
from bench.plan import DDP2, FEW_HEADS, GPT2, HSDP, Case
from model import GPT, GPTConfig
from smallgpt.console import UserError
from smallgpt.hardware import PEAK_FLOPS
from smallgpt.parallel import footprint
from smallgpt.parallel.footprint import Collective, Group, Layout, Work, kept_by_block
from smallgpt.parallel.layout import MeshSettings
from smallgpt.parallel.plan import (
    GPUS,
    Cluster,
    candidates,
    carried,
    layout_of,
    plan,
    ranked,
    search,
    seconds,
    smallest,
)
from smallgpt.runs.metrics import flops_per_token

ONE = [
    Case(1, low=True),
    Case(1, recompute=1),
    Case(1, accum=2, model={"mlp": "swiglu", "tie_weights": False}),
]
TWO = [
    Case(2, DDP2, accum=2),
    Case(2, rows=8, low=True, accum=2),
    Case(2, model={**GPT2, "tie_weights": False}, recompute=2),
    Case(2, {"tp": 2}, low=True, accum=2, recompute=1),
    Case(2, {"tp": 2, "sequence": True}, rows=8),
    Case(2, {"pp": 2}, accum=4),
    Case(2, {"pp": 2, "schedule": "interleaved"}, accum=4, low=True),
    Case(2, {"pp": 2, "schedule": "gpipe"}, rows=1, accum=8, model={"vocab_size": 4096}),
]
FOUR = [
    Case(4, HSDP, rows=8, accum=2),
    Case(4, {"tp": 2, "sequence": True}, rows=8, low=True, model=FEW_HEADS),
    Case(4, {"tp": 4}, rows=8, model=FEW_HEADS, accum=2),
    Case(4, {"pp": 2}, low=True, accum=4),
    Case(4, {"pp": 2, "tp": 2}, low=True, accum=4),
]


@pytest.mark.parametrize("cases", [ONE, TWO, FOUR], ids=["1", "2", "4"])
def test_a_plan_is_what_processes_do(tmp_path, start_ranks, cases):
    """A run would not fit, or would wait for a network that nobody had reckoned with."""
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    size = cases[0].processes
    for process in start_ranks(size, ["--worker", file], script="bench.plan"):
        result = process.wait(180)
        assert result.status == 0, result.err[-3000:]
    texts = [Path(f"{file}.{rank}").read_text(encoding="utf-8") for rank in range(size)]
    ranks = [json.loads(text) for text in texts]
    for number, case in enumerate(cases):
        results = [results_of_rank[number] for results_of_rank in ranks]
        for rank, result in enumerate(results):
            if size > 1:
                assert result["traffic"], "nothing was counted"
            assert bench.same_traffic(case, rank, result), (case, rank, result["traffic"])
        assert bench.memory_ratios(case, results) == pytest.approx([1.0] * case.layout.pp, abs=0.1)


# --- activations ----------------------------------------------------------------------------------

SHAPE = GPTConfig(vocab_size=64, block_size=32, n_layer=1, n_head=4, n_embd=64)
FORMS = {
    "default": {},
    "GPT-2": {key: value for key, value in GPT2.items() if key != "bias"},
    "SwiGLU, few K/V heads": {"mlp": "swiglu", "n_kv_head": 2},
    "GELU, no QK-norm": {"mlp": "gelu", "qk_norm": False},
    "LayerNorm": {"norm": "layernorm"},
}


def bytes_kept(config: GPTConfig, run: Callable, low: bool) -> float:
    """Bytes for a token that autograd keeps of block 0, of its own parameters apart."""
    gpt = GPT(config)
    block = gpt.blocks[0]
    if low:
        block.bfloat16()
    context = gpt.context(torch.zeros(1, config.block_size))
    others = [*block.parameters(), *(context.rotary or ())]
    known = {tensor.untyped_storage().data_ptr() for tensor in others}
    kept = {}  # a tensor that two operations keep is there once

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.dim() > 1:
            kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(2, config.block_size, config.n_embd, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        run(block, x, context, 0)  # compiles
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run(block, x, context, 0)
    return sum(storage.nbytes() for storage in kept.values()) / (2 * config.block_size)


@pytest.mark.parametrize("form", FORMS)
def test_a_block_keeps_what_is_planned(form):
    """Activations are most of a run's memory: one tensor more per block and token is gigabytes."""
    config = replace(SHAPE, **FORMS[form])
    in_float32 = bytes_kept(config, lambda block, *args: block(*args), low=False)
    assert in_float32 == sum(kept_by_block(Work(config, 4, "cpu")).values())
    if config.norm == "rmsnorm":  # the CPU's LayerNorm takes no bfloat16 weights
        low = bytes_kept(config, lambda block, *args: block(*args), low=True)
        assert low == sum(kept_by_block(Work(config, 2, "cpu")).values())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["default", "SwiGLU, few K/V heads"])
def test_a_compiled_block_keeps_what_is_planned(form):
    """The plan of a GPU is that of compiled blocks: the partitioner decides what they keep."""
    config = replace(SHAPE, **FORMS[form])
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda block, *args: block(*args), backend="aot_eager_decomp_partition"
    )
    kept = bytes_kept(config, compiled, low=True)
    assert kept == sum(kept_by_block(Work(config, 2, "compiled")).values())


class FusedNorm(torch.autograd.Function):
    """Keeps what CUDA's kernel keeps, the input and a scale for each row; its output lies row by
    row."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = x.float().square().mean(-1, keepdim=True).rsqrt()
        ctx.save_for_backward(x, scale)
        return (x * scale * weight).to(x.dtype).contiguous()


class AutocastOfCuda(TorchFunctionMode):
    """CUDA's autocast computes norms and powers in float32, unless it is disabled around them; its
    norms are one kernel. (A squared ReLU as a power would be kept in float32, too.)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.rms_norm:
            x, weight = args[0], kwargs["weight"]
            if torch.is_autocast_enabled("cpu"):
                x, weight = x.float(), weight.float()
            return FusedNorm.apply(x, weight)
        if func is torch.Tensor.square:
            return func(args[0].float())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["default", "SwiGLU, few K/V heads", "GELU, no QK-norm"])
def test_a_block_on_a_gpu_keeps_what_is_planned(form):
    """As far as it shows without one: with the operations that CUDA's autocast treats otherwise."""
    config = replace(SHAPE, **FORMS[form])

    def run(block, *args):
        with AutocastOfCuda():
            return block(*args)

    kept = bytes_kept(config, run, low=True)
    assert kept == sum(kept_by_block(Work(config, 2, "cuda")).values())


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_the_model(form, tied):
    """Parameters and FLOPs of the plan are those that train.py prints and takes MFU from."""
    config = replace(SHAPE, n_layer=3, tie_weights=tied, **FORMS[form])
    model = GPT(config)
    work = Work(config)
    assert work.parameters == sum(p.numel() for p in model.parameters())
    layout = Layout(1, 1, 1, tp=2, rows=1, accum=1)
    assert work.flops_per_token(layout) == flops_per_token(config)
    sampled = replace(work, negatives=8)
    assert sampled.classes(layout) == 16 + 8  # each rank has the loss of half the tokens
    assert sampled.flops_per_token(layout) == flops_per_token(config, 16 + 8)


def test_every_gpu_has_a_data_sheet():
    """A GPU whose MFU train.py shows could not be planned for."""
    assert GPUS.keys() == PEAK_FLOPS.keys()


def test_a_ring_through_nodes():
    """Checked by hand: 16 GPUs on two nodes pass half of a gigabyte through 8 network cards, and
    15/16 of it over NVLink, whichever takes longer, after 14 hops inside and one between nodes."""
    cluster = Cluster(GPUS["H100"], size=16, per_node=8, link=50e9)
    gather = Collective("shard", "all_gather", "blocks", 1, 1e9)
    waiting = 14 * 3.4e-6 + 9.6e-6
    assert seconds(cluster, Group(16, 8), gather) == pytest.approx(
        waiting + 15 / 16 * 1e9 / 450e9 / 0.8
    )
    slow = replace(cluster, link=10e9)
    assert seconds(slow, Group(16, 8), gather) == pytest.approx(waiting + 0.5e9 / 8 / 10e9 / 0.8)
    both_ways = replace(gather, operation="all_reduce")
    assert seconds(slow, Group(16, 8), both_ways) == pytest.approx(
        2 * seconds(slow, Group(16, 8), gather)
    )
    assert seconds(cluster, Group(1, 1), gather) == 0


LARGE = Work(GPTConfig(50304, block_size=1024, n_layer=48, n_head=25, n_embd=1600))


def test_more_of_anything_costs_more():
    """A sign or a factor turned round would make the search prefer the wrong layout."""
    cluster = Cluster(GPUS["H100"], size=64, per_node=8, link=50e9)
    layout = Layout(pp=1, replicate=8, shard=8, tp=1, rows=8, accum=2)
    base = plan(LARGE, layout, cluster)
    assert base.time.optimistic <= base.time.expected <= base.time.pessimistic
    assert 0 < base.mfu < cluster.efficiency
    again = plan(LARGE, replace(layout, recompute=1), cluster)
    assert again.memory.total < base.memory.total and again.time.compute > base.time.compute
    wide = plan(LARGE, replace(layout, replicate=1, shard=64), cluster)
    assert wide.memory.weights == pytest.approx(base.memory.weights / 8, rel=0.01)
    assert wide.time.pessimistic > base.time.pessimistic, "it talks through the network"
    slower = plan(LARGE, layout, replace(cluster, link=5e9))
    assert slower.time.expected > base.time.expected
    staged = plan(LARGE, replace(layout, replicate=4, pp=2, accum=4), cluster)
    assert staged.time.bubble == pytest.approx(1 / 5)
    interleaved = replace(staged.layout, schedule="interleaved", virtual=2)
    assert plan(LARGE, interleaved, cluster).time.bubble == pytest.approx(0.5 / 4.5)


@pytest.mark.parametrize("gpu, size, batch_tokens", [("H100", 64, 2**21), ("4090", 16, 2**19)])
def test_what_the_search_finds_can_be_run(gpu, size, batch_tokens):
    """A proposal that train_fsdp.py refuses, or that does not fit, is worth nothing."""
    cluster = Cluster(GPUS[gpu], size, per_node=8, link=50e9)
    found = search(LARGE, cluster, batch_tokens, best=4)
    assert len(found) == 4
    for each, next_best in zip(found, found[1:], strict=False):
        assert next_best.tokens_per_second < 1.02 * each.tokens_per_second
    for each in found:
        layout = each.layout
        assert each.fits and layout.size == size
        mesh = MeshSettings(
            shard=layout.shard,
            replicate=layout.replicate,
            tp=layout.tp,
            sequence=layout.sequence,
            pp=layout.pp,
            schedule=layout.schedule,
        )
        shares = (batch_tokens, layout.rows)
        assert layout_of(mesh, size, LARGE, shares, layout.recompute) == layout


def test_of_equally_fast_layouts_the_one_that_sends_least_is_best():
    """The roofline hides all of FSDP's traffic behind computing: of 64 GPUs it would gather every
    weight through the network, as if that were as safe as over NVLink."""
    cluster = Cluster(GPUS["H100"], size=64, per_node=8, link=50e9)
    found = search(LARGE, cluster, 2**19, best=3)
    meshes = [(each.layout.replicate, each.layout.shard) for each in found]
    assert meshes[0] == (8, 8)
    assert found[0].tokens_per_second < max(each.tokens_per_second for each in found)
    network = [between for between, inside in (each.carried for each in found)]
    assert network == sorted(network)
    half = [replace(each, tokens_per_second=each.tokens_per_second / 2) for each in found]
    assert ranked([*half, *reversed(found)]) == [*found, *half]


def test_what_goes_through_the_network():
    """Checked by hand: of a gigabyte gathered by 16 GPUs on two nodes, each of 8 cards carries a
    sixteenth; a sum among the nodes alone passes half of it twice."""
    gather = Collective("shard", "all_gather", "blocks", 1, 1e9)
    assert carried(Group(16, 8), gather) == (1e9 / 16, 15 / 16 * 1e9)
    copies = replace(gather, operation="all_reduce")
    assert carried(Group(2, 1), copies) == (1e9, 0)
    send = replace(gather, operation="send")
    assert carried(Group(2, 1), send) == (1e9, 0) and carried(Group(2, 2), send) == (0, 1e9)


def test_the_smallest_layout():
    """Where nothing fits, the proposal would need more memory than another layout."""
    deep = Work(replace(LARGE.config, n_layer=192))
    cluster = Cluster(GPUS["4090"], size=4, per_node=4, link=50e9)
    least = smallest(deep, cluster, 2**15)
    assert not least.fits and not search(deep, cluster, 2**15, best=1)
    needs = []
    for candidate in candidates(deep, cluster, 2**15):
        for recompute in (0, 1, 2):
            layout = replace(candidate, recompute=recompute)
            needs.append(footprint.memory(deep, layout).total)
    assert least.memory.total == min(needs)
    assert smallest(deep, cluster, 1000) is None, "no layout can share this batch"


def test_a_small_gpu_recomputes():
    """Recomputation is proposed where it is needed, and only there."""
    long = Work(replace(LARGE.config, block_size=8192))
    tight = Cluster(GPUS["4090"], size=8, per_node=8, link=50e9)
    best, *_ = search(long, tight, 2**19, best=1)
    without = replace(best.layout, recompute=0)
    assert best.layout.recompute > 0
    assert footprint.memory(long, without).total > tight.room
    ample = Cluster(GPUS["H200"], size=8, per_node=8, link=50e9)
    best, *_ = search(long, ample, 2**19, best=1)
    assert best.layout.recompute == 0


@pytest.mark.parametrize(
    "mesh, says",
    [
        ({"shard": 3}, "3 processes, but there are 8"),
        ({"tp": 2}, "n_head=25 is no multiple of it"),
        ({"shard": 8, "pp": 1, "replicate": 2}, "16 processes, but there are 8"),
    ],
)
def test_a_mesh_that_cannot_be(mesh, says):
    with pytest.raises(UserError, match=says):
        layout_of(MeshSettings(**mesh), 8, LARGE, (2**19, 8), 0)
