"""Checkpoints: whole or not there, read without unpickling, never outside the run folder."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from filelock import FileLock

from helpers import json_lines, losses, mistake, same_weights, steps
from smallgpt.console import UserError
from smallgpt.parallel.strategy import Single
from smallgpt.parallel.world import World
from smallgpt.runs import checkpoint
from smallgpt.runs.run import starting_point
from smallgpt.weights.pretrained import open_model

ONE = World(0, 1, torch.device("cpu"))


def strategy_of(module: nn.Module) -> Single:
    return Single(module, ONE, torch.float32)


def tiny_module(width: int = 8) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    module = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(width)).sum().backward()
    optimizer.step()
    return module, [optimizer]


def save(run: Path, step: int, keep: int = 2) -> None:
    module, optimizers = tiny_module()
    checkpoint.Saver(run, ONE, keep).save(strategy_of(module), optimizers, {"step": step})


@pytest.fixture
def saved(tmp_path) -> Path:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    return tmp_path


def test_round_trip(saved):
    module, optimizers = tiny_module()
    other = nn.Linear(8, 8)
    fresh = [torch.optim.AdamW(other.parameters(), lr=0.1)]
    found = checkpoint.find(saved)
    assert found.step == 3 and found.run == saved
    checkpoint.load_weights(found, other)
    checkpoint.load_optimizers(found, strategy_of(other), fresh)
    assert all(a.equal(b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    wanted, got = (
        checkpoint.optimizer_tensors(dict(m.named_parameters()), o)
        for m, o in ((module, optimizers), (other, fresh))
    )
    assert set(wanted) == {
        f"{n}/{k}" for n in ("weight", "bias") for k in ("exp_avg", "exp_avg_sq", "step")
    }
    assert wanted.keys() == got.keys() and all(wanted[k].equal(got[k]) for k in wanted)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
        if step == 2:
            checkpoint.point(tmp_path, "best", 2)
    assert steps(tmp_path) == [2, 5, 6]
    assert (
        checkpoint.find(tmp_path).step == 6 and checkpoint.find(tmp_path, prefer="best").step == 2
    )


def test_a_copy_of_a_checkpoint_is_left_alone(tmp_path):
    """It was deleted with the old ones, or counted as the newest."""
    save(tmp_path, 1)
    for name in ("step-00000001-mine", "step-best-backup"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    for step in (2, 3, 4):
        save(tmp_path, step)
    names = sorted(p.name for p in tmp_path.glob("step-*"))
    assert names == ["step-00000001-mine", "step-00000003", "step-00000004", "step-best-backup"]
    assert checkpoint.find(tmp_path).step == 4
    alone = tmp_path / "other"
    shutil.copytree(tmp_path / "step-00000004", alone / "step-mine")
    assert starting_point(alone, "never", print) is None


def test_the_hash_of_weights():
    w = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    same = {
        "b": torch.ones(2),
        "a": torch.arange(6.0).view(3, 2).t().contiguous().t().reshape(2, 3),
    }
    assert checkpoint.digest(w) == checkpoint.digest(same)
    others = {"a": w["a"], "b": torch.tensor([1.0, 1.0001])}, {"a": w["a"], "c": w["b"]}
    assert checkpoint.digest(w) not in map(checkpoint.digest, others)
    assert (
        len(checkpoint.digest({"a": w["a"].bfloat16(), "b": torch.tensor(1.0)})) == 24
    )  # types that NumPy lacks


def damage_model(step: Path) -> None:
    data = (step / "model.safetensors").read_bytes()
    (step / "model.safetensors").write_bytes(data[: len(data) // 2])


def lose_model(step: Path) -> None:
    """As two programs that saved the same step at the same time once left it."""
    (step / "model.safetensors").unlink()
    meta = json.loads((step / "meta.json").read_text(encoding="utf-8"))
    del meta["files"]["model.safetensors"]
    (step / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def damage_meta(step: Path) -> None:
    text = (step / "meta.json").read_text(encoding="utf-8")
    (step / "meta.json").write_text(text[: len(text) // 2], encoding="utf-8")


DAMAGES = {
    "model cut": (damage_model, "model.safetensors has"),
    "no model": (lose_model, "it has no weights"),
    "meta cut": (damage_meta, "meta.json is unreadable"),
    "meta a list": (
        lambda p: (p / "meta.json").write_text("[1]", encoding="utf-8"),
        "meta.json is unreadable",
    ),
    "meta missing": (lambda p: (p / "meta.json").unlink(), "no meta.json"),
    "state missing": (lambda p: shutil.rmtree(p / "state"), "has 0 bytes instead of"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(saved, kind):
    spoil, says = DAMAGES[kind]
    spoil(saved / "step-00000003")
    said = []
    assert checkpoint.find(saved, said.append).step == 2
    assert len(said) == 1 and "step-00000003" in said[0] and says in said[0]
    with pytest.raises(UserError, match="cannot use the checkpoint .*step-00000003"):
        checkpoint.find(saved / "step-00000003")
    for step in (1, 2):
        spoil(saved / f"step-0000000{step}")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        checkpoint.find(saved, said.append)


def flip_a_byte(file: Path) -> None:
    """In the middle of its tensors."""
    data = bytearray(file.read_bytes())
    data[-60] ^= 1
    file.write_bytes(data)


def test_a_flipped_byte_is_found_when_it_is_read(saved):
    """Regression: only sizes were compared, and a model with wrong numbers was used."""
    step = saved / "step-00000003"
    found = checkpoint.find(saved)
    module, optimizers = tiny_module()
    (state,) = (step / "state").iterdir()
    advice = f"delete {step}, and {saved / 'step-00000002'} takes its place"
    flip_a_byte(state)
    checkpoint.load_weights(found, module)  # which are whole
    with pytest.raises(UserError, match=f"{state} is damaged, .*: {advice}$"):
        checkpoint.load_optimizers(found, strategy_of(module), optimizers)
    flip_a_byte(step / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors is damaged, .*: {advice}$"):
        checkpoint.load_weights(found, module)
    shutil.rmtree(step)
    assert checkpoint.find(saved).path == saved / "step-00000002"
    for other in (1, 3):
        shutil.rmtree(saved / f"step-0000000{other}", ignore_errors=True)
    flip_a_byte(saved / "step-00000002" / "model.safetensors")
    with pytest.raises(UserError, match=f"there is no other checkpoint in {saved}, start again"):
        checkpoint.load_weights(checkpoint.find(saved), module)


def test_a_checkpoint_without_checksums_is_read(saved):
    """Those of older versions are used as before."""
    meta = saved / "step-00000003" / "meta.json"
    older = json.loads(meta.read_text(encoding="utf-8"))
    assert older.pop("crc32").keys() == older["files"].keys()
    meta.write_text(json.dumps(older), encoding="utf-8")
    module, optimizers = tiny_module()
    checkpoint.load_weights(checkpoint.find(saved), module)
    checkpoint.load_optimizers(checkpoint.find(saved), strategy_of(module), optimizers)


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_crash_while_a_step_folder_is_replaced_loses_nothing(tmp_path, monkeypatch, number):
    """Regression: the old folder was deleted before the new one had its name. The crash comes after
    so many changes of names: none, the old one's, both."""
    save(tmp_path, 1)
    changes = []

    def crashing(change):
        def crash(*args, **kwargs):
            changes.append(args)
            if len(changes) == number:
                raise Crash
            return change(*args, **kwargs)

        return crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush", lambda _: None)
        patch.setattr(checkpoint.os, "replace", crashing(os.replace))
        patch.setattr(checkpoint, "point", crashing(checkpoint.point))
        with pytest.raises(Crash):
            save(tmp_path, 1)
    checkpoint.put_back(tmp_path)
    module, _ = tiny_module()
    checkpoint.load_weights(checkpoint.find(tmp_path), module)
    save(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "latest"}


@pytest.mark.parametrize(
    "text", ["../../etc", "step-00000001/../..", "/etc", "step-1\n../x", "", "\x00", "step-"]
)
def test_a_pointer_does_not_leave_the_run(saved, text):
    (saved / "latest").write_text(text, encoding="utf-8")
    assert checkpoint.read_pointer(saved, "latest") is None
    assert checkpoint.find(saved).step == 3  # the newest


def test_pointers_that_are_no_text(saved):
    (saved / "best").write_bytes(b"\xff\xfe")
    assert checkpoint.find(saved, prefer="best").step == 3
    (saved / "latest").unlink()
    (saved / "latest").mkdir()
    assert checkpoint.find(saved).step == 3


def test_nothing_there(tmp_path):
    assert checkpoint.find(tmp_path) is None and checkpoint.find(tmp_path / "none") is None


def test_weights_of_another_shape_are_refused(saved):
    with pytest.raises(
        UserError, match=r"2 tensors differ, for example bias is \(8,\) in the file and \(9,\)"
    ):
        checkpoint.load_weights(checkpoint.find(saved), tiny_module(9)[0])


def test_every_file_can_be_read_by_those_who_can_read_the_settings(trained):
    """Regression: safetensors makes files that only their owner can read, so that a colleague could
    not chat with a run on a shared disk."""
    run, _ = trained
    usual = (run / "config.yaml").stat().st_mode
    for file in checkpoint.find(run).path.rglob("*"):
        assert file.is_dir() or file.stat().st_mode == usual, file


def test_state_of_other_parameters_is_refused(saved):
    other = nn.Linear(8, 8, bias=False)
    with pytest.raises(UserError, match="belongs to another optimizer or other parameters"):
        fresh = [torch.optim.AdamW(other.parameters())]
        checkpoint.load_optimizers(checkpoint.find(saved), strategy_of(other), fresh)


def test_a_state_that_lacks_a_parameter_is_refused(tmp_path):
    """Its moments would begin again at 0, and nobody would know."""
    module, optimizers = tiny_module()
    (fewer,) = optimizers
    del fewer.state[module.bias]
    checkpoint.Saver(tmp_path, ONE, 1).save(strategy_of(module), optimizers, {"step": 1})
    other, fresh = tiny_module()
    with pytest.raises(UserError, match="belongs to another optimizer or other parameters"):
        checkpoint.load_optimizers(checkpoint.find(tmp_path), strategy_of(other), fresh)


class Stage(Single):
    """A layout of which this process holds the bias only, as a stage of a pipeline would."""

    def names(self):
        return {"bias": self.model.bias}


def test_a_process_that_holds_a_part_of_the_model_loads_its_part(saved, monkeypatch):
    """The state of parameters that others hold is not missed, and their weights are not read; all
    are checked, against the shapes before the model was cut."""
    other = nn.Linear(8, 8)
    stage = Stage(other, ONE, torch.float32)
    fresh = [torch.optim.AdamW([other.bias], lr=0.1)]
    found = checkpoint.find(saved)
    weights = checkpoint.read_weights(found, stage.shapes)
    assert weights.keys() == {"weight", "bias"}
    really, read = checkpoint.Weights.__getitem__, []
    monkeypatch.setattr(
        checkpoint.Weights,
        "__getitem__",
        lambda self, name: read.append(name) or really(self, name),
    )
    stage.set_weights(weights)
    assert read == ["bias"]
    checkpoint.load_optimizers(found, stage, fresh)
    module, optimizers = tiny_module()
    assert other.bias.equal(module.bias)
    loaded = fresh[0].state[other.bias]
    assert loaded["exp_avg"].equal(optimizers[0].state[module.bias]["exp_avg"])
    with pytest.raises(UserError, match="belongs to another optimizer"):  # its own is missed
        checkpoint.load_optimizers(found, stage, [])


def test_a_full_disk_leaves_the_older_ones(saved, monkeypatch):
    for name in ("publish", "save_file"):

        def full(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            with pytest.raises(
                UserError, match="could not save .*step-00000004 .*No space left on device"
            ):
                save(saved, 4, keep=1)
        assert steps(saved) == [1, 2, 3] and not list(saved.glob(".step*"))
        assert checkpoint.find(saved).step == 3


# --- through train.py -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, run) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("trained")
    args = tiny(out, run="r", keep=3)
    assert run("train", args).status == 0
    return out / "r", args


@pytest.fixture
def copy(trained, tmp_path) -> tuple[Path, list[str]]:
    """A copy of the finished run (checkpoints of steps 4, 8, 12), to spoil."""
    folder, args = trained
    shutil.copytree(folder, tmp_path / "r")
    return tmp_path / "r", [*args, f"out_dir={tmp_path}"]


@pytest.mark.parametrize("spoil", [damage_model, damage_meta])
def test_train_falls_back_and_says_so(copy, trained, run, spoil):
    folder, args = copy
    spoil(folder / "step-00000012")
    result = run("train", args)
    assert result.status == 0, result.err
    assert (
        "passing over the damaged checkpoint" in result.out
        and "continuing from step 8 of 12" in result.out
    )
    assert losses(folder, "train") == losses(trained[0], "train") and same_weights(
        folder, trained[0]
    )
    for step in (4, 8, 12):
        spoil(folder / f"step-{step:08d}")
    assert "every checkpoint" in mistake(run("train", args)) and "Traceback" not in result.err


@pytest.mark.parametrize("part", ["model.safetensors", "state"])
def test_a_flipped_byte_stops_a_resume_until_its_advice_is_followed(copy, trained, run, part):
    """A disk that changes bytes is for a person to look at, so every restart ends alike, and its
    one sentence must cure: what it names is deleted, and the run goes on to the same end."""
    folder, args = copy
    newest, older = folder / "step-00000012", folder / "step-00000008"
    damaged = newest / part
    if damaged.is_dir():
        (damaged,) = damaged.iterdir()
    flip_a_byte(damaged)
    for _ in range(2):
        assert mistake(run("train", [*args, "max_steps=13"])) == (
            f"{damaged} is damaged, some of its bytes have changed since they were written: "
            f"delete {newest}, and {older} takes its place"
        )
    shutil.rmtree(newest)
    result = run("train", args)
    assert result.status == 0 and "continuing from step 8 of 12" in result.out, result.err
    assert losses(folder, "train") == losses(trained[0], "train")
    assert same_weights(folder, trained[0])


def test_when_the_best_checkpoint_is_lost_the_best_of_the_others_is_named(copy, run, trained):
    """The newest step was the best one and damaged: the run went on, and `best` named what the step
    had become."""
    folder, args = copy
    records = json_lines(folder / "metrics.jsonl")
    for record in records:
        if record["split"] == "val":  # as if the losses had been these
            record["loss"] = {4: 9.0, 8: 0.2, 12: 0.1}.get(record["step"], 8.0)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records), encoding="utf-8"
    )
    checkpoint.point(folder, "best", 12)
    damage_model(folder / "step-00000012")
    assert run("train", [*args, "max_steps=9", "save_every=1"]).status == 0
    assert checkpoint.read_pointer(folder, "best").name == "step-00000008"


def test_two_programs_do_not_train_one_run(copy, run):
    folder, args = copy
    lock = FileLock(folder / ".lock")
    with lock:
        assert f"another process trains {folder} now" in mistake(
            run("train", [*args, "max_steps=13"])
        )
    assert run("train", [*args, "max_steps=13"]).status == 0


def test_a_mistake_leaves_no_run_behind(copy, run, tmp_path):
    assert "no file" in mistake(
        run("train", [*copy[1], "run=other", "data.path=/no/such/file.txt"])
    )
    assert not (tmp_path / "other").exists()


def test_going_back_in_the_same_run_is_refused(copy, run):
    """resume=PATH of an older step was ignored, and the run went on from its newest."""
    folder, args = copy
    message = mistake(run("train", [*args, "max_steps=13", f"resume={folder / 'step-00000008'}"]))
    assert "has gone on from" in message and "choose another run=name" in message
    assert run("train", [*args, "max_steps=13", f"resume={folder / 'step-00000012'}"]).status == 0


@pytest.mark.parametrize("save", ["sync", "async"])
def test_a_full_disk_while_training(copy, run, save):
    """No file may grow beyond 40 kB: the first checkpoint that does not fit ends the run, the older
    ones stay."""
    folder, args = copy
    message = mistake(run("train", [*args, "max_steps=20", f"save={save}"], file_size=40_000))
    assert "could not save" in message and "step-00000016" in message
    assert steps(folder) == [4, 8, 12] and not list(folder.glob(".step*"))
    assert run("train", [*args, "max_steps=14"]).status == 0  # there is room again


def test_a_full_disk_when_a_line_of_metrics_is_due(copy, run):
    folder, args = copy
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    result = run(
        "train", [*args, "max_steps=40", "save_every=40", "eval_every=40"], file_size=4_000
    )
    assert result.status == 2 and "error: " in result.err
    assert steps(folder) == [4, 8, 12]


class Payload:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("which", ["model.safetensors", "state"])
@pytest.mark.parametrize("script", ["chat", "train"])
def test_a_pickle_is_refused_and_never_run(copy, run, tmp_path, script, which):
    """Someone else's run folder, a pickle in place of the weights, and a meta.json that agrees with
    it."""
    folder, args = copy
    for step in folder.glob("step-*"):
        name = (
            which
            if which != "state"
            else next((step / "state").iterdir()).relative_to(step).as_posix()
        )
        (step / name).write_bytes(pickle.dumps(Payload(tmp_path / "witness")))
        meta = json.loads((step / "meta.json").read_text(encoding="utf-8"))
        meta["files"][name] = (step / name).stat().st_size
        (step / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if script == "chat":
        result = run("chat", [folder], stdin="hi\n")
        assert which == "state" or "model.safetensors" in mistake(
            result
        )  # chat does not read the state
    else:
        assert "step-00000012" in mistake(run("train", args))
    assert not (tmp_path / "witness").exists()


def test_another_tokenizer_is_refused(copy, run):
    folder, args = copy
    text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    from smallgpt.tokenizer import TokenizerSettings, train

    train(TokenizerSettings("char"), ["另一个另一个"]).save(folder / "tokenizer.json")
    assert "is not the tokenizer that" in mistake(run("chat", [folder], stdin="hi\n"))
    assert "tokenizer" in mistake(run("train", args))
    # continued pretraining used the other ids with these embeddings
    assert "is not the tokenizer that" in mistake(
        run("train", [*args, "run=more", f"init_from={folder}"])
    )
    text["ranks"] = text["ranks"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    assert "tokenizer.json" in mistake(run("chat", [folder], stdin="hi\n"))
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in mistake(run("chat", [folder], stdin="hi\n"))


@pytest.mark.parametrize(
    "target", ["../elsewhere/step-00000099", "step-00000099/../../elsewhere/step-00000099"]
)
def test_a_pointer_to_elsewhere_through_chat(copy, run, target):
    """A pointer in a stranger's run folder could name a checkpoint outside of it. The one outside
    is whole by its meta.json, but its weights are garbage: chat would fail if it opened them."""
    folder, _ = copy
    outside = folder.parent / "elsewhere" / "step-00000099"
    shutil.copytree(folder / "step-00000012", outside)
    weights = outside / "model.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    assert checkpoint.required(outside).path == outside
    (folder / "best").write_text(target, encoding="utf-8")
    result = run("chat", [folder], stdin="hi\n")
    assert result.status == 0 and result.out.strip(), result.err


def test_open_model_gives_the_trained_weights(trained):
    found, module, tokenizer = open_model(trained[0])
    assert found.step == 12 and tokenizer.hash == found.meta["tokenizer"]
    assert module.lm_head.weight is module.wte.weight
    assert module.config.n_embd == 32
