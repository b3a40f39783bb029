"""bench/time_to_quality.py: does every contender get the same time and the same text, and is what
the table says what was measured?"""

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import time_to_quality as bench
from bench.contenders import (
    NANOGPT_PHRASES,
    OUR_PHRASES,
    Launch,
    NanoGPT,
    evaluation_steps,
    plain_gpt2,
)
from bench.quality_report import at, time_of
from bench.stopwatch import Program, Stopwatch, Timing
from helpers import ROOT, TINY
from smallgpt import settings
from smallgpt.console import UserError
from train import TrainSettings

# what a program prints, and when, as train.py with compilation does
OUR_LINES = [
    (3.0, "device   cpu; float32"),
    (13.5, "step 1/4 | train loss 9.0000 | lr 1e-3"),
    (14.0, "step 2/4 | train loss 8.0000 | lr 1e-3"),
    (21.0, "step 2/4 | val loss 8.0000 | 4.0000 bits/byte"),
    (21.5, "step 3/4 | train loss 7.0000 | lr 1e-3"),
    (22.0, "step 4/4 | train loss 6.0000 | lr 1e-3"),
    (30.0, "step 4/4 | val loss 6.0000 | 3.0000 bits/byte"),
]
# nanoGPT evaluates before the first step, and saves without a line at the end of it
NANOGPT_LINES = [
    (2.0, "using fused AdamW: False"),
    (3.0, "compiling the model... (takes a ~minute)"),
    (7.0, "step 0: train loss 9.0000, val loss 9.0000"),
    (17.0, "iter 0: loss 9.0000, time 10000.00ms, mfu -100.00%"),
    (18.0, "iter 1: loss 9.0000, time 1000.00ms, mfu -100.00%"),
    (19.0, "iter 2: loss 9.0000, time 1000.00ms, mfu -100.00%"),
    (20.0, "iter 3: loss 9.0000, time 1000.00ms, mfu -100.00%"),
    (25.0, "step 4: train loss 8.0000, val loss 8.0000"),
    (25.0, "saving checkpoint to out"),
    (28.0, "iter 4: loss 8.0000, time 8000.00ms, mfu -100.00%"),
]


def watch(phrases, lines) -> Stopwatch:
    stopwatch = Stopwatch(phrases)
    for clock, line in lines:
        stopwatch.hear(clock, line)
    return stopwatch


def test_evaluating_does_not_count_and_compiling_does():
    """A contender that evaluates more often is charged for it, or one that compiles is not."""
    ours = watch(OUR_PHRASES, OUR_LINES)
    assert ours.steps == [13.5, 14.0, 14.5, 15.0] and ours.paused == 15.0
    assert ours.timing() == Timing(start=3.0, warm_up=10.0, step=0.5)
    assert ours.points == [(2, 14.0, 4.0), (4, 15.0, 3.0)]
    assert ours.timing().steps_within(15.0) == 4
    assert ours.timing().steps_within(12.0) == 0


def test_nanogpt_is_not_charged_for_what_it_cannot_leave_out():
    """Its evaluation before the first step, or its saving, is counted as training."""
    theirs = watch(NANOGPT_PHRASES, NANOGPT_LINES)
    assert theirs.paused == 4.0 + 5.0 + 2.0
    assert theirs.steps == [13.0, 14.0, 15.0, 16.0, 17.0]
    assert theirs.timing() == Timing(start=3.0, warm_up=9.0, step=1.0)


def test_a_value_between_two_evaluations():
    """The table names a time or a value that lies beside the curve."""
    curve = [[10.0, 4.0], [20.0, 3.0], [40.0, 2.0]]
    assert at(curve, 30.0) == 2.5 and at(curve, 99.0) == 2.0
    assert time_of(curve, 2.5) == 30.0
    assert time_of(curve, 5.0) == 10.0 and time_of(curve, 1.9) is None


def test_evaluations_are_denser_at_the_beginning():
    """The moment at which ours passes another one is known to no better than the last gap."""
    marks = evaluation_steps(1000)
    gaps = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    assert marks[-1] == 1000 and gaps == sorted(gaps) and evaluation_steps(1) == [1]


def test_nanogpts_last_evaluation_ends_its_run():
    """Its curve ends before its run does, or many steps are lost to rounding."""
    nanogpt = NanoGPT.__new__(NanoGPT)
    for steps in range(1, 3000):
        fitting = nanogpt.fitting(steps)
        assert fitting % nanogpt.interval(fitting) == 0
        assert steps - 5 <= fitting <= steps


# ---- how runs are started, with programs that only print

STAND_IN = """
import sys, time
steps, slow, fails = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
time.sleep(0.1)
print("device   none", flush=True)
for step in range(1, steps + 1):
    time.sleep(slow)
    if step == fails:
        sys.exit("no memory")
    print(f"step {step}/{steps} | train loss 1.0", flush=True)
    if step in (steps // 2, steps):
        time.sleep(0.3)
        print(f"step {step}/{steps} | val loss 1.0 | {1 + 1 / step:.4f} bits/byte", flush=True)
"""


class StandIn:
    phrases = OUR_PHRASES

    def __init__(self, name: str, slow: float, fails: int = 0, **settings: int):
        self.name, self.slow, self.fails = name, slow, fails
        self.settings = settings
        self.starts: list[int] = []

    def definition(self) -> dict:
        return {"slow": self.slow, **self.settings}

    def tasks(self) -> list:
        return []

    def fitting(self, steps: int) -> int:
        return steps

    def launch(self, folder: Path, seed: int, steps: int) -> Launch:
        self.starts.append(steps)
        words = map(str, (steps, self.slow, self.fails))
        return Launch([sys.executable, "-c", STAND_IN, *words], folder)

    def hear(self, folder: Path, line: str) -> None:
        pass

    def curve(self, folder: Path, stopwatch: Stopwatch) -> list:
        return stopwatch.points


def comparison(out: Path, *contenders: StandIn, seeds: list[int], side_by_side: bool = True):
    return bench.Comparison(
        list(contenders),
        seeds,
        budget=1.5,
        steps=0,
        clock="wall",
        out=out,
        results=bench.Results(out / "results.json", {"minutes": 0.025}),
        slots=bench.Slots(side_by_side),
    )


def test_everyone_gets_the_same_time(tmp_path, capsys):
    """A slow contender gets more time than a quick one, or an interrupted comparison begins
    anew."""
    quick, slow = StandIn("quick", 0.01), StandIn("slow", 0.05)
    first = comparison(tmp_path, quick, slow, seeds=[0])
    first.run()
    for contender in (quick, slow):
        run = first.results.runs(contender)[0]
        assert 1.0 < run.end < 2.5 and run.uncounted > 0.5
        assert len(contender.starts) == 2  # a timing and a run
    assert quick.starts[1] > 2 * slow.starts[1]

    again = comparison(tmp_path, quick, slow, seeds=[0, 1])
    again.run()
    assert [len(contender.starts) for contender in (quick, slow)] == [3, 3]
    assert again.results.runs(quick).keys() == {0, 1}
    with_newer_code = StandIn("quick", 0.01, log_every=10)  # a setting at its default
    assert again.results.runs(with_newer_code).keys() == {0, 1}
    with pytest.raises(UserError, match="other settings .log_every.: give it another name"):
        again.results.runs(StandIn("quick", 0.01, log_every=11))
    with pytest.raises(UserError, match="other settings .slow.: give it another name"):
        comparison(tmp_path, StandIn("quick", 0.02), seeds=[0]).run()
    with pytest.raises(UserError, match="minutes=0.025, and now it is 3"):
        bench.Results(tmp_path / "results.json", {"minutes": 3})


def test_a_failure_ends_the_comparison_and_leaves_no_process(tmp_path, capsys):
    """The others go on for hours, or stay behind, when one contender cannot run."""
    began = time.perf_counter()
    broken, endless = StandIn("broken", 0.01, fails=2), StandIn("endless", 100.0)
    with pytest.raises(UserError, match="failed: .*broken-timing.log has its messages"):
        comparison(tmp_path, broken, endless, seeds=[0]).run()
    assert time.perf_counter() - began < 20 and not Program.running
    assert "no memory" in (tmp_path / "logs" / "broken-timing.log").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="raise --minutes"):
        comparison(tmp_path / "late", StandIn("late", 0.4), seeds=[0]).run()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="/proc is Linux's")
def test_the_cpu_clock_counts_what_a_program_starts(tmp_path):
    """Work that a contender leaves to other processes, as compiling is, costs it nothing."""
    child = "import time; [0 for _ in iter(lambda: time.process_time() < 0.5, False)]"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    wait = "import time; time.sleep(0.5)"
    seconds = []
    for what in (script, wait):
        command = [sys.executable, "-c", f"{what}; print('done')"]
        with Program(command, tmp_path, tmp_path / "log", "cpu") as program:
            ((clock, line),) = program.lines()
        seconds.append(clock)
    assert seconds[0] - seconds[1] > 0.4  # ticks of a hundredth


# ---- the real ones, tiny


@pytest.mark.parametrize("name", ["speedrun_cpu", "speedrun_gpu"])
def test_plain_gpt2_has_no_idea_of_a_speedrun(name):
    """Regression: it kept init=bigrams, which a tied head refuses, and its sampled loss."""
    s = settings.load(TrainSettings, [str(ROOT / f"config/{name}.yaml")])
    plain = plain_gpt2(s)
    assert plain.check() == [] and plain.max_steps == s.max_steps
    assert (plain.init, plain.negatives) == ("random", 0)


def test_real_contenders(chat_file, tmp_path, capsys, monkeypatch):
    """A contender cannot be started any more, or is judged on other text than the others."""
    monkeypatch.setattr(bench.signal, "signal", lambda *handler: None)  # pytest keeps its own
    nanogpt = os.environ.get("SMALLGPT_NANOGPT")
    config = tmp_path / "config.yaml"
    config.write_text("tokenizer: {kind: bpe, vocab_size: 300}\n", encoding="utf-8")
    keys = {**TINY, "data.path": chat_file}
    command = [str(config), *(f"{name}={value}" for name, value in keys.items())]
    options = ["--side-by-side", "--steps", "12", "--out", str(tmp_path / "out")]
    names = ["ours", "gpt2"]
    if find_spec("transformers"):
        names.append("hf")
    if nanogpt:
        names += ["nanogpt-char", "nanogpt-bpe"]
        options += ["--nanogpt", nanogpt]
    ablation = ["--ablate", "no-decay: optim.weight_decay=0"]

    bench.main([*command, *options, *ablation, "--contenders", *names])
    table = capsys.readouterr().out
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    for name in (*names, "no-decay"):
        assert f"| {name} | 1 | 12 |" in table
        run = results["contenders"][name]["runs"]["0"]
        times, values = zip(*run["curve"], strict=True)
        assert list(times) == sorted(times) and 0 < values[-1] < values[0]
    plain = results["contenders"]["gpt2"]["definition"]
    assert plain["model.pos"] == "learned" and plain["optim.name"] == "adamw"

    bench.main([*command, *options, *ablation, "--contenders", *names])
    assert "seed 0: 12 steps" not in capsys.readouterr().out, "everything is known already"
    for wrong in ("no colon", "ours: optim.lr=1"):
        with pytest.raises(UserError, match="write 'NAME: key=value ...'"):
            bench.main([*command, *options, "--ablate", wrong])
    with pytest.raises(UserError, match="nanogpt-char needs a checkout"):
        bench.main([*command, *options[:5], "--contenders", "nanogpt-char"])
