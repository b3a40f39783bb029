"""train.py through its command: a whole run, kill and resume, signals, users' mistakes."""

import json
import math
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from helpers import (
    ENV,
    RUN_FILES,
    Result,
    command,
    drawn_seed,
    json_lines,
    losses,
    mistake,
    run_train,
    same_weights,
    steps,
    wait_for,
)
from model import GPTConfig
from smallgpt import settings
from smallgpt.parallel.strategy import Shares, Single, Spread
from smallgpt.parallel.world import World
from smallgpt.runs import metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny) -> tuple[Path, Result, list[str]]:
    """A run of 60 steps started as a user would, in a folder that did not exist."""
    out = tmp_path_factory.mktemp("finished") / "new"
    args = tiny(out, run="first", max_steps=60, eval_every=20, save_every=10)
    result = run_train(args)
    assert result.status == 0, result.err
    return out / "first", result, args


def test_the_loss_falls_and_the_console_says_what_ran(finished):
    folder, result, _ = finished
    train_loss, val_loss = losses(folder, "train"), losses(folder, "val")
    assert list(train_loss) == list(range(1, 61)) and list(val_loss) == [20, 40, 60]
    assert train_loss[1] == pytest.approx(
        math.log(320), rel=0.05
    )  # an untrained model knows nothing
    assert train_loss[60] < 0.5 * train_loss[1] and val_loss[60] < 0.5 * train_loss[1]
    assert (
        "256 tokens = 8 sequences of 32 = 1 process(es) x 1 accumulation x 8 sequences"
        in result.out
    )
    assert f"python chat.py {folder}" in result.out and "hi → " in result.out


def test_run_folder(finished):
    folder, _, args = finished
    assert {p.name for p in folder.iterdir()} == RUN_FILES | {"step-00000050", "step-00000060"}
    assert (folder / "latest").read_text(encoding="utf-8") == "step-00000060\n"
    assert list((folder / "tensorboard").iterdir())
    step = folder / "step-00000060"
    assert {p.name for p in step.iterdir()} == {"model.safetensors", "state", "meta.json"}
    meta = json.loads((step / "meta.json").read_text(encoding="utf-8"))
    assert meta["step"] == 60 and meta["tokens"] == 60 * 256 and meta["model"]["n_embd"] == 32
    assert len(meta["tokenizer"]) == 64 and meta["data"] and meta["versions"]["torch"]

    records = json_lines(folder / "metrics.jsonl")
    fields = {"step", "split", "loss", "tokens", "tokens_per_second", "lr", "grad_norm", "time"}
    assert {frozenset(r) for r in records if r["split"] == "train"} == {frozenset(fields)}
    fields = {"step", "split", "loss", "tokens", "bits_per_byte", "time"}
    assert {frozenset(r) for r in records if r["split"] == "val"} == {frozenset(fields)}
    assert all(r["tokens"] == r["step"] * 256 for r in records)
    assert abs(records[-1]["time"] - time.time()) < 3600

    wanted = settings.load(train.TrainSettings, args)
    wanted.model.vocab_size = (
        320  # resolved: 256 bytes, 4 characters and 6 special tokens, rounded up
    )
    assert settings.load(train.TrainSettings, [str(folder / "config.yaml")]) == wanted


def test_a_date_is_a_seed(tmp_path, tiny, run):
    """seed=20251121 made the seed of a step overflow 64 bits."""
    assert run("train", tiny(tmp_path, run="r", max_steps=1, seed=20251121)).status == 0
    assert run("train", tiny(tmp_path, run="s", max_steps=1, seed=-1)).status == 0


def test_a_finished_run_says_so_and_a_longer_one_goes_on(finished, run):
    folder, _, args = finished
    before = (folder / "metrics.jsonl").read_bytes()
    again = run("train", args)
    assert again.status == 0 and "finished 60 steps" in again.out
    assert (folder / "metrics.jsonl").read_bytes() == before
    elsewhere = [*args, "max_steps=62", "run=second", f"resume={folder / 'step-00000060'}"]
    longer = run("train", elsewhere)
    assert longer.status == 0 and "continuing from step 60 of 62" in longer.out
    assert list(losses(folder.parent / "second", "train")) == [61, 62]
    # step 60 is evaluated here too and may be the best: its weights have to be in this run, not
    # only in the first
    assert list(losses(folder.parent / "second", "val")) == [60, 62] and steps(
        folder.parent / "second"
    ) == [60, 62]
    # the same command again continues what it began, not what it began from
    assert "continuing from step 62 of 64" in run("train", [*elsewhere, "max_steps=64"]).out


def test_the_settings_of_a_finished_run_stay(tmp_path, tiny, run):
    """Regression: the same command with another learning rate trained nothing, and config.yaml
    then named a rate that the weights never saw."""
    args = tiny(tmp_path, run="r", max_steps=2)
    assert run("train", args).status == 0
    config = (tmp_path / "r" / "config.yaml").read_bytes()
    again = run("train", [*args, "optim.lr=0.5"])
    assert again.status == 0 and "finished: nothing is left to train" in again.out
    assert (tmp_path / "r" / "config.yaml").read_bytes() == config


def test_fewer_steps_than_a_run_has(tmp_path, tiny, start):
    """max_steps=2 for a run at step 3 went on training for ever."""
    args = tiny(tmp_path, run="r", save_every=1)
    assert start("train", [*args, "max_steps=3"]).wait().status == 0
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    again = start("train", [*args, "max_steps=2"]).wait(timeout=20)
    assert again.status == 0 and "finished 3 steps" in again.out, again.err
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


def test_a_run_that_begins_with_the_weights_of_another(finished, tmp_path, tiny, run):
    """Continued pretraining: another corpus, the shape and the tokenizer of the first run, steps
    from 0, and its own resume. The first loss tells whether the weights are there: an untrained
    model's is log(320)."""
    folder, _, _ = finished
    other = tmp_path / "other.txt"
    other.write_text(
        "\n".join(f"what is new {i}?\nred is new {i}\n" for i in range(300)), encoding="utf-8"
    )
    shape = {"model__n_embd": 64, "model__block_size": 16}  # not this run's to say
    args = tiny(
        tmp_path, run="second", init_from=folder, data__path=other, data__cache=tmp_path, **shape
    )
    result = run("train", args)
    assert result.status == 0, result.err
    assert (
        "256 tokens = 8 sequences of 32" in result.out
    )  # once shared by the block size of the settings: 16 of them
    loss = losses(tmp_path / "second", "train")
    assert list(loss) == list(range(1, 13)) and loss[1] < 0.8 * math.log(320)
    meta = json.loads(
        (tmp_path / "second" / "step-00000012" / "meta.json").read_text(encoding="utf-8")
    )
    first = json.loads((folder / "step-00000060" / "meta.json").read_text(encoding="utf-8"))
    assert meta["model"] == first["model"] and meta["tokenizer"] == first["tokenizer"]
    result = run("train", [*args, "max_steps=16"])
    assert result.status == 0 and "continuing from step 12 of 16" in result.out
    # on resume it need not be said again, and stays on record: the search for test texts follows it
    assert run("train", [a for a in args if not a.startswith("init_from=")]).status == 0
    assert f"init_from: {folder}" in (tmp_path / "second" / "config.yaml").read_text(
        encoding="utf-8"
    )
    assert "there is no checkpoint" in mistake(
        run("train", tiny(tmp_path, run="third", init_from=tmp_path / "none"))
    )


def test_the_best_checkpoint_outlives_the_newest(tmp_path, tiny, run):
    # a learning rate that goes wild after step 4: the best stays, beside the `keep` newest
    args = tiny(
        tmp_path, run="r", max_steps=12, eval_every=2, save_every=2, optim__clip=0, optim__warmup=0
    )
    assert run("train", [*args, "max_steps=4", "optim.min_lr=1"]).status == 0
    assert run("train", [*args, "optim.lr=3"]).status == 0
    val = losses(tmp_path / "r", "val")
    best = min(val, key=val.get)
    assert (
        best <= 6 and (tmp_path / "r" / "best").read_text(encoding="utf-8") == f"step-{best:08d}\n"
    )
    assert steps(tmp_path / "r") == [best, 10, 12]


# --- exact resume ---------------------------------------------------------------------------------


def killable(tiny, out: Path, name: str) -> list[str]:
    return tiny(
        out,
        run=name,
        max_steps=16,
        eval_every=4,
        save_every=3,
        keep=1,
        micro_batch=2,
        model__dropout=0.1,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny, run) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert run("train", killable(tiny, out, "r")).status == 0
    return out / "r"


def assert_same(folder: Path, reference: Path) -> None:
    assert losses(folder, "train") == losses(reference, "train")
    assert losses(folder, "val") == losses(reference, "val")
    assert same_weights(folder, reference)
    for pointer in ("latest", "best"):
        assert (folder / pointer).read_text(encoding="utf-8") == (reference / pointer).read_text(
            encoding="utf-8"
        )
    assert steps(folder) == steps(reference)
    assert [p.name for p in folder.glob(".*")] in ([], [".lock"]), "something temporary was left"


def test_kill_9_before_any_file_operation_then_resume_is_exact(
    tmp_path, tiny, start, uninterrupted
):
    """Killed before its 1st, 2nd, 3rd ... change to the run folder, always in the same run."""
    args, deaths = killable(tiny, tmp_path, "r"), 0
    for count in [*range(1, 60, 2), 10**6]:
        ended = start("train", args, die_at=(count, str(tmp_path / "r"))).wait()
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.err
        deaths += 1
    assert ended.status == 0 and deaths >= 8
    assert_same(tmp_path / "r", uninterrupted)


def test_utilisation_counts_what_a_sampled_loss_multiplies(monkeypatch):
    """As of the whole vocabulary it would count products that nobody made; tensor-parallel ranks
    have the loss of a part of the tokens each."""
    monkeypatch.setattr("smallgpt.hardware.peak_flops", lambda device, dtype: 1e12)
    config = GPTConfig(vocab_size=4096, block_size=32, n_layer=2, n_head=2, n_embd=32)
    shares = Shares(rows=8, accum=2, micro=4)
    for negatives, parts, classes in [(0, 1, 4096), (16, 1, 128 + 16), (16, 2, 64 + 16)]:
        s = train.TrainSettings(model=config, negatives=negatives)
        strategy = SimpleNamespace(world=World(0, 2, torch.device("cpu")), loss_parts=parts)
        speed = train.full_speed(s, shares, strategy, torch.bfloat16)
        assert speed == 2 * 1e12 / metrics.flops_per_token(config, classes)


MOMENTS = {
    "writing the first checkpoint": (2, "step-00000003.tmp"),
    "giving it its name": (1, ".step-00000003.tmp/meta.json"),
    "before latest names the second": (2, ".latest.tmp"),
    "deleting the first": (2, "/step-00000003"),
    "evaluated and saved, before best names it": (1, ".best.tmp"),
    "the last time best moves": (7, ".best.tmp"),
    "before what is no longer kept is deleted": (1, "/step-00000015"),
}


@pytest.mark.parametrize("save", ["sync", "async"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_delicate_moment_then_resume_is_exact(
    tmp_path, tiny, start, uninterrupted, moment, save
):
    args = [*killable(tiny, tmp_path, "r"), f"save={save}"]
    assert start("train", args, die_at=MOMENTS[moment]).wait().status == -signal.SIGKILL
    assert start("train", args).wait().status == 0
    assert_same(tmp_path / "r", uninterrupted)


@pytest.mark.parametrize("save", ["sync", "async"])
def test_kill_9_at_random_moments_then_resume_is_exact(tmp_path, tiny, start, uninterrupted, save):
    draw, args, kills = drawn_seed(), [*killable(tiny, tmp_path, "r"), f"save={save}"], 0
    for i in range(40):
        process = start("train", args)
        wait_for(
            lambda p=process: (tmp_path / "r" / "metrics.jsonl").exists() or not p.alive(),
            "the run to begin",
        )
        process.process.join(
            draw.uniform(0.01, 0.15) * 1.15**i
        )  # on a busy machine the start alone takes longer
        if not process.alive():
            break
        process.kill()
        kills += process.wait().status == -signal.SIGKILL
    assert process.wait().status == 0 and kills
    assert_same(tmp_path / "r", uninterrupted)


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_finishes_the_step_and_saves(
    tmp_path, tiny, start, run, uninterrupted, number, status
):
    args = killable(tiny, tmp_path, "r")
    process = start("train", args)
    folder = tmp_path / "r"
    wait_for(
        lambda: (folder / "metrics.jsonl").exists() and len(losses(folder, "train")) >= 4,
        "four steps",
    )
    process.kill(number)
    stopped = process.wait()
    assert (
        stopped.status == status and "the same command continues" in stopped.out and not stopped.err
    )
    done = max(losses(folder, "train"))
    assert (
        4 <= done < 16 and (folder / "latest").read_text(encoding="utf-8") == f"step-{done:08d}\n"
    )
    assert run("train", args).status == 0
    assert losses(folder, "train") == losses(uninterrupted, "train")
    assert same_weights(folder, uninterrupted)


def test_the_same_signal_twice_in_a_moment_still_saves(tmp_path, tiny, start):
    """Slurm signals every process of a job, and torchrun passes the signal on: a worker gets it
    twice."""
    process = start(
        "train", tiny(tmp_path, run="r", max_steps=5000, eval_every=5000, save_every=5000)
    )
    folder = tmp_path / "r"
    wait_for(
        lambda: (folder / "metrics.jsonl").exists() and len(losses(folder, "train")) >= 2,
        "two steps",
    )
    process.kill(signal.SIGTERM)
    time.sleep(0.01)
    process.kill(signal.SIGTERM)
    assert process.wait().status == 143
    assert (folder / "latest").exists()


# --- a loss that is no number ---------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path, tiny, run):
    args = tiny(tmp_path, run="r")
    assert run("train", [*args, "max_steps=2"]).status == 0  # the good checkpoint
    wild = [*args, "optim.lr=1e30", "optim.clip=0", "save_every=100"]
    message = mistake(run("train", [*wild, "eval_every=100"]))
    # a finite loss may have a gradient that is not: the update would ruin the weights
    assert re.search(
        r"at step \d+ the loss is .*(nan|inf); no update was made, the last checkpoint is step 2",
        message,
    )
    assert len(losses(tmp_path / "r", "train")) == 3
    # an evaluation may be the first to meet it: sampling from such a model ended in a traceback
    wild = [*wild, "optim.lr=1e38", "eval_every=3"]
    assert re.search("loss is (nan|inf) at step 3", mistake(run("train", wild)))
    assert steps(tmp_path / "r") == [2]
    assert "NaN" not in (tmp_path / "r" / "metrics.jsonl").read_text(encoding="utf-8")
    assert run("train", args).status == 0  # and the run goes on from there
    assert all(map(math.isfinite, losses(tmp_path / "r", "train").values()))


# --- users' mistakes: one sentence, status 2, no traceback ----------------------------------------

MISTAKES = [
    ("model.n_layr=2", "model.n_layer"),
    ("max_steps=many", "max_steps must be int >= 1, not many"),
    ("none.yaml", "none.yaml"),
    ("data.path=/no/such/file.txt", "/no/such/file.txt"),
    ("data.path={empty}", "the corpus is empty"),
    ("data.path={short}", "shorter than one block of block_size=32"),
    ("data.path={latin}", "latin.txt, line 3: not UTF-8"),
    ("batch_tokens=250", "model.block_size=32 x 1 data-parallel reader(s) = 32, for example 256"),
    ("run=../x", "run='../x' must be a plain folder name"),
    ("run=step-2", "run='step-2'"),
    ("resume={empty}", "there is no checkpoint"),
    ("resume=/no/such/folder", "there is no checkpoint"),
    ("dtype=float16", "float16 needs a CUDA GPU"),
    ("device=cuda", "GPU"),
    ("out_dir={empty}", "empty.txt"),
    ("data.cache={empty}", "empty.txt"),
    ("model.vocab_size=100", "model.vocab_size=100 is less than the tokenizer's"),
    ("init=bigrams", "init=bigrams needs an LM head of its own: add model.tie_weights=false"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    latin = b"a\nb\ncaf\xe9\n\n" + b"".join(b"so it goes %d\n\n" % i for i in range(200))
    contents = {"empty": b"", "short": b"h\n\ni\n\nj\n", "latin": latin}
    for name, content in contents.items():
        (folder / f"{name}.txt").write_bytes(content)
    return {name: folder / f"{name}.txt" for name in contents}


def test_bfloat16_trains_and_talks(tmp_path, tiny, run):
    """Autocast: weights and optimizer in float32, matrix products in bf16, a float32 cache under
    bf16 attention."""
    for dtype in ("float32", "bfloat16"):
        assert run("train", tiny(tmp_path, run=dtype, dtype=dtype)).status == 0
    exact, low = (losses(tmp_path / dtype, "train") for dtype in ("float32", "bfloat16"))
    assert low != exact and all(low[step] == pytest.approx(exact[step], rel=0.02) for step in exact)


def test_a_run_begins_with_what_its_text_tells_of_pairs(tmp_path, tiny, run):
    """And says so; and what it was begun with stays when it goes on."""
    args = tiny(tmp_path, run="r", init="bigrams", model__tie_weights="false")
    result = run("train", args)
    assert result.status == 0, result.err
    assert "begins with " in result.out and "pairs of tokens" in result.out
    assert losses(tmp_path / "r", "train")[1] < 0.7 * math.log(320)
    changed = run("train", [*args, "init=random"])
    assert "init was bigrams and is now random" in mistake(changed)


def test_a_run_cannot_begin_with_weights_and_with_counts(tmp_path, tiny, mistake_of):
    """One of the two would be lost silently."""
    args = tiny(tmp_path, init="bigrams", init_from="x", model__tie_weights="false")
    assert "init=bigrams and init_from exclude each other" in mistake_of(train.main, args)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, tiny):
    """The slowest test: torch.compile takes half a minute even here. Evaluations and replies come
    in between."""
    for mode in ("true", "false"):
        args = tiny(tmp_path, run=mode, compile=mode, max_steps=4, eval_every=2, model__n_layer=2)
        done = subprocess.run(command(args), env=ENV, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()
    for split in ("train", "val"):
        compiled, eager = (losses(tmp_path / mode, split) for mode in ("true", "false"))
        assert compiled == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize("argument, says", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistakes(tmp_path, tiny, mistake_of, bad_files, argument, says):
    args = [*tiny(tmp_path / "out", run="r"), argument.format(**bad_files)]
    message = mistake_of(train.main, args)
    assert says in message and "\n" not in message
    assert not (tmp_path / "out").exists(), "nothing is to be left behind"


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path, tiny, run, bad_files):
    args = tiny(
        tmp_path, run="r", max_steps=1, data__path=bad_files["latin"], data__errors="replace"
    )
    assert run("train", args).status == 0


@pytest.mark.slow
def test_a_console_that_cannot_show_chinese_does_not_end_the_run(tmp_path, tiny):
    """Windows consoles and LANG=C print replies in an encoding without Chinese."""
    env = {**ENV, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    args = tiny(tmp_path, run="r", max_steps=1, prompts="[你好]")
    done = subprocess.run(command(args), env=env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    "argument, says",
    [
        ("data.path={other}", "the corpus"),
        ("data.split_seed=7", "data.split_seed was 0 and is now 7"),
        ("data.loss_on=assistant", "data.loss_on=assistant needs roles"),
        ("model.n_layer=2", "model.n_layer was 1 and is now 2"),
        ("model.dropout=0.5", "model.dropout was 0.0 and is now 0.5"),
        ("batch_tokens=512", "batch_tokens was 256 and is now 512"),
        ("seed=1", "seed was 0 and is now 1"),
        ("optim.name=muon", "optim"),
        ("tokenizer.min_count=3", "tokenizer.min_count was 2 and is now 3"),
        ("resume=never", "already holds checkpoints"),
    ],
)
def test_what_may_not_change_on_resume(finished, mistake_of, tmp_path, argument, says):
    folder, _, args = finished
    (tmp_path / "other.txt").write_text(
        "\n\n".join(f"one\ntwo {i}" for i in range(400)), encoding="utf-8"
    )
    config = (folder / "config.yaml").read_bytes()
    message = mistake_of(train.main, [*args, argument.format(other=tmp_path / "other.txt")])
    assert says in message and (folder / "config.yaml").read_bytes() == config


def answers(path: Path, prompt: str = "") -> Path:
    """A chat set whose user is unpredictable, and whose assistant always says the same."""
    draw = random.Random(0)
    lines = []
    for _ in range(300):
        asked = "".join(draw.choices("abcdefgh", k=12))
        turns = [("system", prompt), ("user", asked), ("assistant", "yes yes yes")]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_the_loss_of_the_assistant_alone(tmp_path, tiny, run):
    """What nobody can predict is read and not learned, in training and in validation; and what is
    learned belongs to the run."""
    path = answers(tmp_path / "chat.jsonl")
    args = tiny(tmp_path, max_steps=80, eval_every=80, save_every=80, data__path=path)
    learned = {}
    for loss_on in ("all", "assistant"):
        result = run("train", [*args, f"run={loss_on}", f"data.loss_on={loss_on}"])
        assert result.status == 0, result.err
        folder = tmp_path / loss_on
        learned[loss_on] = losses(folder, "train")[80], losses(folder, "val")[80]
    assert max(learned["assistant"]) < 0.1  # with log(8) / 2 for what the user says
    assert min(learned["all"]) > 0.8
    assert "data.loss_on=assistant learns 3,600 of its 7,800 tokens" in result.err
    other = run("train", [*args, "run=assistant", "data.loss_on=all"])
    assert "data.loss_on was assistant and is now all" in mistake(other)


def test_a_step_without_a_target(tmp_path, tiny, run):
    """Regression: a step that read nothing but a long prompt divided by no target."""
    path = answers(tmp_path / "chat.jsonl", prompt="be kind " * 40)
    args = tiny(tmp_path, run="r", data__path=path, data__loss_on="assistant", batch_tokens=32)
    result = run("train", [*args, "data.eval_blocks=0"])
    assert result.status == 0, result.err
    assert 0.0 in losses(tmp_path / "r", "train").values()


def test_help_names_every_key(run):
    result = run("train", ["--help"])
    assert result.status == 0 and result.out.startswith("Pretrain a GPT on chat text")
    assert all(
        key in result.out
        for key in ("batch_tokens", "model.n_layer", "optim.lr", "data.path", "sample.top_p")
    )


class Recording(Single):
    """A layout that notes what the loop asks of it, in order."""

    def __init__(self, model, world, dtype):
        self.calls = []
        super().__init__(model, world, dtype)

    def set_weights(self, weights):
        self.calls.append("set_weights")
        super().set_weights(weights)

    def gather_weights(self):
        self.calls.append("gather_weights")
        return super().gather_weights()

    def forward_backward(self, batches, loss_of, scale):
        self.calls.append("forward_backward")
        assert all(len(batch.inputs) == 3 for batch in batches)
        return super().forward_backward(batches, loss_of, scale)

    def settle(self):
        self.calls.append("settle")
        super().settle()

    def whole(self):
        self.calls.append("whole")
        return super().whole()


def test_another_layout_is_a_class_and_the_loop_stays(tmp_path, tiny):
    """train_fsdp.py hands its layout to the same loop. The layout gets the plain model, takes and
    gives weights, owns all micro-batches of a step, gives the model that replies, and settles
    after an evaluation, which ran without gradients."""
    layouts = []

    class Recorded(Spread):
        def build(self, model, dtype, weights=None):
            layouts.append(Recording(model, self.world, dtype))
            if weights is not None:
                layouts[-1].set_weights(weights)
            return layouts[-1]

    one = World(0, 1, torch.device("cpu"))
    for max_steps in (2, 4):
        args = tiny(tmp_path, run="r", max_steps=max_steps, eval_every=2, save_every=2)
        assert train.train(settings.load(train.TrainSettings, args), one, Recorded(one)) == 0
    first, second = (layout.calls for layout in layouts)
    rest = ["forward_backward", "forward_backward", "gather_weights", "settle", "whole"]
    assert first == rest
    assert second == ["set_weights", *rest]
