"""What only a CUDA GPU can show: `pytest -m gpu` where there is one. bench/gpu.py runs it, too."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import train
from fine_tuning import assert_same_predictions
from helpers import ROOT, last_weights, losses
from model import GPT, IGNORE, GPTConfig, RMSNorm, sample_classes
from sentiment_train import SentimentSettings, finetune
from smallgpt import settings
from smallgpt.parallel.strategy import Single, Spread
from smallgpt.parallel.world import World
from smallgpt.sentiment import report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


def pretrain(arguments: list[str], device: torch.device = GPU) -> None:
    """A run of train.py in this process."""
    world = World(0, 1, device)
    s = settings.load(train.TrainSettings, [*arguments, f"device={device.type}"])
    assert train.train(s, world, Spread(world)) == 0


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, tiny) -> Path:
    """A run in float32 on the CPU, evaluations and replies included."""
    out = tmp_path_factory.mktemp("cpu")
    pretrain(tiny(out, run="r", model__n_layer=2), CPU)
    return out / "r"


def assert_like(found: Path, expected: Path, tolerance: float) -> None:
    """The same losses, of training and validation."""
    for split in ("train", "val"):
        assert losses(found, split) == pytest.approx(losses(expected, split), rel=tolerance)


# what is changed, and how far a loss may be from that of the CPU
CASES = {
    "float32": ({"dtype": "float32"}, 1e-3),
    "bfloat16": ({"dtype": "bfloat16"}, 0.02),
    "float16": ({"dtype": "float16"}, 0.02),
    "recompute": ({"micro_batch": 2, "recompute": 1}, 1e-3),
}


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_trains_to_the_losses_of_a_cpu(tmp_path, tiny, on_cpu, case):
    """In each precision; float16 scales its loss, and must unscale the gradient before clipping."""
    changes, tolerance = CASES[case]
    pretrain(tiny(tmp_path, run="r", model__n_layer=2, **changes))
    assert_like(tmp_path / "r", on_cpu, tolerance)


def test_muon_and_isolated_dialogues(tmp_path, tiny):
    """Muon's iteration runs in bf16 on a GPU; a mask takes attention to another kernel."""
    changes = {"optim__name": "muon", "data__isolate": "true", "model__n_layer": 2}
    for device in (GPU, CPU):
        pretrain(tiny(tmp_path, run=device.type, **changes), device)
    assert_like(tmp_path / "cuda", tmp_path / "cpu", 0.03)


def test_float16_leaves_out_what_overflows(tmp_path, tiny):
    """An infinite gradient must halve the scale and leave the weights alone, not end the run."""
    args = tiny(tmp_path, run="r", dtype="float16", optim__lr=1e-4)
    pretrain([*args, "max_steps=2"])
    meta = next(tmp_path.glob("r/step-*/meta.json"))
    content = json.loads(meta.read_text(encoding="utf-8"))
    content["scaler"]["scale"] = 2.0**40
    meta.write_text(json.dumps(content), encoding="utf-8")
    before = last_weights(tmp_path / "r")
    pretrain([*args, "max_steps=3"])
    after = last_weights(tmp_path / "r")
    assert all(after[name].equal(weight) for name, weight in before.items())
    pretrain([*args, "max_steps=60", "eval_every=60", "save_every=60"])
    trained = last_weights(tmp_path / "r")
    assert not all(trained[name].equal(weight) for name, weight in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["default", "gpt2"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, tiny, form):
    """Triton's kernels must compute what PyTorch's do, in both forms of the model."""
    changes = {"model__n_layer": 2, "max_steps": 4, "eval_every": 2}
    if form == "gpt2":
        changes |= {"model__pos": "learned", "model__norm": "layernorm", "model__mlp": "gelu"}
    for mode in ("true", "false"):
        pretrain(tiny(tmp_path, run=mode, compile=mode, **changes))
    assert_like(tmp_path / "true", tmp_path / "false", 1e-3)


def test_a_run_goes_on_on_another_device(tmp_path, tiny):
    """A checkpoint that a GPU has saved, beside its training, must serve a CPU, and the reverse."""
    for run, devices in (("both", (GPU, CPU, GPU)), ("cpu", (CPU, CPU, CPU))):
        args = tiny(tmp_path, run=run, model__n_layer=2, save="async")
        for max_steps, device in zip((4, 8, 12), devices, strict=True):
            pretrain([*args, f"max_steps={max_steps}"], device)
    assert_like(tmp_path / "both", tmp_path / "cpu", 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_keeps_the_precision_of_its_input(dtype):
    """Autocast computes a norm in float32, and queries and keys would then be twice as wide."""
    x = torch.randn(2, 64, dtype=dtype, device=GPU)
    with torch.autocast("cuda", torch.bfloat16):
        y = RMSNorm(64).to(GPU)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), F.rms_norm(x.float(), (64,), eps=1e-6), rtol=0, atol=0.02)


def test_classes_are_sampled_without_waiting():
    """The CPU would wait for the GPU in each micro-batch, and the GPU then for the CPU."""
    targets = torch.randint(-1, 8192, (2048,), device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        classes, places, bias = sample_classes(targets, 8192, 512, fixed=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(classes) == 2560 and bias.isfinite().sum() == len(targets.unique()) - 1 + 512
    assert classes[places[targets >= 0]].equal(targets[targets >= 0])


def test_batches_reach_a_busy_gpu_whole_and_without_waiting():
    """A pinned buffer that is filled again before its copy is done would train on other rows; a
    copy that waits would leave the GPU idle."""
    corpus = SimpleNamespace(tokenizer=SimpleNamespace(bos=0))
    matrix = torch.randn(4096, 4096, device=GPU)
    pairs = [(torch.randint(512, (16, 256)), torch.randint(-1, 512, (16, 256))) for _ in range(64)]
    batches = []
    for x, y in pairs:
        torch.mm(matrix, matrix)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches.append(train.to_batch(x, y, corpus, isolate=True, device=GPU))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for (x, y), batch in zip(pairs, batches, strict=True):
        tokens, targets, segments = batch.inputs
        assert tokens.cpu().equal(x) and targets.cpu().equal(y)
        assert segments.cpu().equal((x == 0).cumsum(1))
        assert batch.n_targets == int((y != IGNORE).sum())


class SyncsCounted(Spread):
    """One process, which warns of each wait for the GPU in steps 2, 3 and 4."""

    def build(self, *arguments: Any) -> Single:
        strategy = super().build(*arguments)
        seed = strategy.seed

        def begin_step(seed_of_run: int, step: int) -> None:
            torch.cuda.set_sync_debug_mode("warn" if 2 <= step < 5 else "default")
            seed(seed_of_run, step)

        strategy.seed = begin_step
        return strategy


def test_a_step_waits_for_the_gpu_only_to_read_its_loss_and_norm(tmp_path, tiny):
    """Any other wait would leave the GPU idle until Python has caught up."""
    arguments = tiny(tmp_path, run="r", device="cuda", max_steps=6, eval_every=6, save_every=6)
    s = settings.load(train.TrainSettings, arguments)
    world = World(0, 1, GPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train.train(s, world, SyncsCounted(world)) == 0
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 3 * 2, [f"{w.filename}:{w.lineno}" for w in waits]


# --- parts of the model ---------------------------------------------------------------------------

FORMS = {
    "default": {},
    "GPT-2": {"pos": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False, "bias": True},
    "grouped": {"n_kv_head": 2, "mlp": "swiglu"},
}


def make_gpt(form: dict, vocab_size: int = 512) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 128}
    return GPT(GPTConfig(vocab_size, **{**shape, **form})).to(GPU)


def test_the_loss_of_many_slices_is_that_of_all_logits():
    """A slice that is overwritten before it is read, or summed in bf16, gives another loss."""
    model = make_gpt(FORMS["GPT-2"], vocab_size=50_304)
    h = torch.randn(32, 64, 128, device=GPU, requires_grad=True)  # four slices
    targets = torch.randint(50_304, (32, 64), device=GPU)
    targets[0, :40] = IGNORE
    weight = model.lm_head.weight
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model.loss(h, targets)
        logits = (h @ weight.T).flatten(0, 1)
        expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 10)
        found = torch.autograd.grad(loss, (h, weight))
        wanted = torch.autograd.grad(expected, (h, weight))
        for mine, reference in zip(found, wanted, strict=True):
            assert (mine - reference).norm() < tolerance * reference.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_reading_in_pieces_is_reading_at_once(form, dtype, tolerance):
    """Replies are generated token by token from the cache: with other kernels than the text at once
    is read."""
    model = make_gpt(FORMS[form]).to(dtype).eval()
    tokens = torch.randint(512, (1, 40), device=GPU)
    with torch.inference_mode():
        at_once = model.trunk(tokens)
        cache = model.new_cache()
        pieces = []
        start = 0
        for length in (17, 1, 1, 8, 13):
            piece = tokens[:, start : start + length]
            pieces.append(model.trunk(piece, cache=cache, start=start))
            start += length
    difference = torch.cat(pieces, dim=1) - at_once
    assert difference.norm() < tolerance * at_once.norm()


def test_the_gpu_computes_what_the_cpu_does():
    """Each form's forward and backward, in float32."""
    for form in FORMS.values():
        model = make_gpt(form)
        tokens = torch.randint(512, (4, 64), device=GPU)
        model(tokens, tokens).backward()
        found = {name: p.grad.cpu() for name, p in model.named_parameters()}
        model = make_gpt(form).to(CPU)
        model.tie()
        model(tokens.cpu(), tokens.cpu()).backward()
        for name, p in model.named_parameters():
            if not name.endswith("attn.k.bias"):  # its gradient is zero but for rounding
                assert (found[name] - p.grad).norm() < 1e-3 * p.grad.norm(), name


# --- other scripts --------------------------------------------------------------------------------


def test_fine_tuning_on_a_gpu(tmp_path, fine, monkeypatch):
    """The other training loop: its scores must be those of the CPU."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    monkeypatch.setattr(report, "baselines", lambda *_: {})
    for device in (GPU, CPU):
        arguments = fine(tmp_path, run=device.type, lm_weight=0.5)
        s = settings.load(SentimentSettings, [*arguments, f"device={device.type}"])
        assert finetune(s, World(0, 1, device)) == 0
    assert_same_predictions(tmp_path / "cuda", tmp_path / "cpu", 0.02)


def run_torchrun(script: str, arguments: list[str]) -> None:
    """One process of a script, in a group of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command = [sys.executable, *torchrun, script, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_torchrun_starts_nccl(tmp_path, tiny, on_cpu):
    """One process under torchrun joins a group of nccl, trains, saves and leaves it."""
    arguments = tiny(tmp_path, run="r", model__n_layer=2, device="cuda")
    run_torchrun("train_fsdp.py", arguments)
    assert_like(tmp_path / "r", on_cpu, 1e-3)


@pytest.mark.slow
def test_fsdp2_has_the_losses_of_the_whole_model(tmp_path):
    """Gathering over nccl, and bf16 blocks, in a group of one."""
    shape = ["--n-layer=2", "--n-head=2", "--n-embd=64", "--block-size=64", "--vocab-size=512"]
    short = ["--batch=4", "--rounds=1", "--steps=1", "--eager"]
    file = tmp_path / "found.json"
    run_torchrun("bench/fsdp.py", ["--device=cuda", *shape, *short, f"--json={file}"])
    whole, cut = json.loads(file.read_text(encoding="utf-8")).values()
    assert cut["losses"] == pytest.approx(whole["losses"], rel=0.01)
