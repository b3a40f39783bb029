"""The measurements: what bench/gpu.py would do on a GPU, rehearsed on the CPU; and the profile."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from bench import common, gpu, step_profile
from bench.gpu import Part
from helpers import ENV, ROOT
from model import GPTConfig
from smallgpt import settings
from smallgpt.runs import metrics

# --- bench/gpu.py ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_part_runs_to_its_end(tmp_path):
    """On a machine with a GPU, lent for minutes, an option that a part does not know would cost the
    part, and so would a setting of the speedrun. Without the package transformers."""
    corpus = tmp_path / "letters.txt"
    common.write_chats(corpus)
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "transformers.py").write_text("raise ImportError", encoding="utf-8")
    options = ["--minutes=20", f"--out={tmp_path}", f"--corpus={corpus}"]
    command = [sys.executable, "bench/gpu.py", "--dry", *options]
    env = {**ENV, "PYTHONPATH": str(missing)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    states = {name: part["state"] for name, part in found["parts"].items()}
    parts = ["tests", "training, tiny", "FSDP2", "decoding", "time to quality", "profile"]
    assert list(states) == parts
    assert set(states.values()) == {"done"}
    assert "skipped" in found["parts"]["tests"]["text"]
    for name in ("training, tiny", "decoding"):
        result = found["parts"][name]["result"]
        speeds = [c["tokens_per_second"] for c in result["contenders"].values()]
        assert len(speeds) == 2 and all(speed > 0 for (speed,) in speeds)
        assert list(result["skipped"].values()) == ["the package transformers is not installed"]
    layouts = found["parts"]["FSDP2"]["result"]
    losses = [layout["losses"] for layout in layouts.values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "config/speedrun_gpu.yaml" in text and "| ours |" in text
    assert text.count("| contender |") == 3 and "| matrix products |" in text


def test_without_a_corpus_there_is_no_time_to_quality(tmp_path):
    """The part would fail for a reason that the user cannot see."""
    args = Namespace(corpus=None, nanogpt=None, config="config/speedrun_gpu.yaml")
    part = gpu.time_to_quality(args, gpu.DRY, (), tmp_path)
    assert gpu.run(part, 1000, tmp_path).sentence == "left out: no --corpus was given"


def part(code: str, seconds: int = 1) -> Part:
    return Part("a part", seconds, ("-c", code), writes_json=False)


def test_what_no_time_is_left_for_is_named(tmp_path):
    """A part that is cut off in its middle would leave nothing."""
    outcome = gpu.run(part("print(1)", seconds=60), 59, tmp_path)
    assert outcome.sentence == "left out: 59 s were left of the budget, and it takes about 60"


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path):
    """What it had printed counts; what it had started would go on using the GPU."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    outcome = gpu.run(part(code), 2, tmp_path)
    assert (outcome.state, outcome.why) == ("cut off", "it took more than 2 s")
    assert outcome.seconds < 20
    end = time.monotonic() + 10
    while is_alive(int(outcome.text)):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """A zombie is dead."""
    try:
        return b"\nState:\tZ" not in Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return False


def test_a_part_that_fails_says_why_and_the_others_go_on(tmp_path):
    """One failure must not hide behind the tables of the rest."""
    outcome = gpu.run(part("print('table'); raise SystemExit('error: no')"), 60, tmp_path)
    assert outcome.sentence == "failed: error: no" and outcome.text == "table"
    gpu.write(tmp_path, "a machine", [outcome])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| a part | failed: error: no |" in text and text.endswith("table\n")


def test_without_a_gpu_the_command_says_what_can_be_done(mistake_of, monkeypatch):
    """A traceback of torch would not name --dry."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = mistake_of(gpu.main, [])
    assert message == "there is no CUDA GPU here: --dry rehearses all parts on a CPU"


def test_utilisation_counts_the_operations_that_a_run_counts():
    """The MFU of a table and that of a run's log would not be the same thing."""
    shape = gpu.REAL.training["90M"].model()
    config = GPTConfig(**shape, **common.GPT2_FORM)
    assert common.flops_per_token(Namespace(**shape)) == metrics.flops_per_token(config)


class Measured:
    """What a table reads of a contender on an H100 that has run three rounds."""

    about = {
        "precision": "bfloat16",
        "compiled": True,
        "why": "as asked",
        "machine": {"peak_flops": 989e12},
    }

    def __init__(self, name: str, *speeds: float):
        self.name = name
        self.rounds = list(speeds)
        self.samples = [{"peak_cuda": 2**30, "peak_rss": 0} for _ in speeds]

    def speeds(self) -> list[float]:
        return self.rounds


def test_the_table_of_a_gpu():
    """A ratio is the median of the rounds' ratios; utilisation and memory are the GPU's."""
    args = Namespace(trains=True, unit="tokens", device="cuda", **gpu.REAL.training["90M"].model())
    speed = 0.5 * 989e12 / common.flops_per_token(args)  # half of the peak
    workers = [Measured("ours", speed, speed, speed), Measured("other", speed / 2, speed, speed)]
    ours, other = common.table(workers, args).splitlines()[2:]
    assert ours == (
        f"| ours | bfloat16 | yes | {speed:,.0f} ({speed:,.0f} to {speed:,.0f}) | 1.00x (1.00 to "
        "1.00) | 50.0% | 1,024 MiB | as asked |"
    )
    assert "| 1.00x (1.00 to 2.00) | 50.0% |" in other


# --- bench/step_profile.py ------------------------------------------------------------------------


def test_a_profile_accounts_for_the_whole_step(tmp_path, tiny):
    """Every part of a step is found in the steps of the real loop, and together they are the
    step."""
    arguments = tiny(tmp_path, dtype="bfloat16", model__n_embd=64, model__block_size=64)
    s = settings.load(step_profile.train.TrainSettings, arguments)
    watched = step_profile.run_steps(s, torch.device("cpu"), steps=2)
    found = step_profile.read("eager", watched)
    assert set(found.groups) == {*step_profile.GROUPS, step_profile.OTHER}
    assert sum(found.groups.values()) + found.rest == pytest.approx(found.wall)
    assert 0 < found.rest < found.wall
    assert found.groups[step_profile.OTHER] < 0.3 * found.wall
    table = step_profile.table([found], "rest")
    assert table.splitlines()[-1] == f"| step | {found.wall:.2f} | 100.0% |"


KERNELS = {
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "matrix products",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>": "attention",
    "triton_red_fused__fused_rms_norm__to_copy_add_mul_3": "norm",
    "triton_poi_fused_pow_relu_2": "activation",
    "triton_red_fused_arange_clamp_eq_exp_gather_logsumexp_mul_sub_sum_0": "softmax, loss",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": (
        "optimizer"
    ),
    "Memcpy HtoD (Pinned -> Device)": "casts, copies",
    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>": (
        step_profile.OTHER
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_known_by_its_name(kernel):
    """On a GPU time is that of kernels, whose names are the libraries'."""
    assert step_profile.group_of([kernel, "some region"]) == KERNELS[kernel]
