"""Fine-tuning with a model that is cut over processes: the numbers of one process, the same folder.

A group of four processes makes the runs of all layouts, one after the other; this process makes
each feature's run alone."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import fine_tuning
from fine_tuning import assert_same_predictions, predictions, result_of
from helpers import last_weights, losses
from sentiment_train import SentimentSettings
from smallgpt import load_classifier
from smallgpt.runs import lazy
from smallgpt.runs.metrics import read

# 33 examples in batches of 16: one batch of an epoch has a single example, so that of several data
# ranks some have none
COMMON = dict(dtype="float64", data__train_size=33, max_steps=3, eval_every=3, dropout=0.0)
FEATURES = {
    "losses": dict(
        pool="mean",
        class_weights="balanced",
        label_smoothing=0.1,
        layer_decay=0.7,
        lm_weight=0.3,
        micro_tokens=200,
        save_every=2,
        keep=9,
    ),
    "adversarial": dict(adversarial=0.2, micro_tokens=200),
    "no_mask": dict(mask=False, patience=1, eval_every=1),
    "frozen_trunk": dict(freeze="trunk"),
    "last_block": dict(freeze="all_but_last:1"),
    "new_tokens": dict(freeze="all_but_last:1", mask=False, trunk="gpt2", lm_weight=0.3),
    "adapters": dict(lora=2, micro_tokens=200, save_every=2, keep=9),
    "last_adapters": dict(lora=2, freeze="all_but_last:1"),
    "marked_pairs": dict(marks=3, data__path="pairs", data__pair_column="Second"),
    # eight examples a micro-batch, with a pipeline and without: the draws are the same
    "token_dropout": dict(token_dropout=0.3, mask=False, micro_tokens=8 * 48),
}
LAYOUTS = {
    "fsdp": (
        dict(mesh__shard=4),
        [
            "losses",
            "adversarial",
            "no_mask",
            "frozen_trunk",
            "last_block",
            "new_tokens",
            "adapters",
            "last_adapters",
            "marked_pairs",
        ],
    ),
    "ddp": ({}, ["adapters", "marked_pairs"]),
    "hsdp": (dict(mesh__shard=2, mesh__offload=True), ["losses"]),
    "tp": (dict(mesh__tp=2), ["losses", "adversarial", "last_block", "new_tokens", "marked_pairs"]),
    "tp_fsdp": (dict(mesh__tp=2, mesh__shard=2), ["losses"]),
    "sequence": (dict(mesh__tp=2, mesh__sequence=True), ["losses"]),
    "pp": (
        dict(mesh__pp=2, mesh__schedule="gpipe"),
        ["losses", "frozen_trunk", "new_tokens", "marked_pairs"],
    ),
    "pp_fsdp": (dict(mesh__pp=2, mesh__shard=2), ["losses", "last_block", "adapters"]),
    "pp_tp": (dict(mesh__pp=2, mesh__tp=2), ["losses", "token_dropout"]),
}
# saved by the run of a feature on the first, resumed on the second
MOVES = [
    ("losses", "fsdp", "pp_tp"),
    ("losses", "pp_tp", "tp_fsdp"),
    ("adapters", "fsdp", "pp_fsdp"),
    ("adapters", "pp_fsdp", "ddp"),
]
CASES = [(layout, feature) for layout, (_, features) in LAYOUTS.items() for feature in features]


@pytest.fixture(scope="module")
def case(gpt2, pairs) -> Callable[[str], dict]:
    """case(feature) -> its settings."""

    def case(feature: str) -> dict:
        changes = COMMON | FEATURES[feature]
        of_pairs = {"data__path": pairs} if "data__path" in changes else {}
        of_gpt2 = {"trunk": gpt2} if "trunk" in changes else {}
        return changes | of_pairs | of_gpt2

    return case


@pytest.fixture(scope="module")
def cut(tmp_path_factory, fine, case, start_ranks) -> Path:
    """The folder with the runs of all layouts, made by one group of processes."""
    out = tmp_path_factory.mktemp("cut")
    jobs = []
    for layout, feature in CASES:
        mesh, _ = LAYOUTS[layout]
        jobs.append(fine(out, run=f"{feature}-{layout}", **case(feature), **mesh))
    for feature, before, after in MOVES:
        mesh, _ = LAYOUTS[after]
        saved = out / f"{feature}-{before}" / "step-00000002"
        name = f"{feature}-{before}-{after}"
        jobs.append(fine(out, run=name, resume=saved, **case(feature), **mesh))
    (out / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    processes = start_ranks(4, [out / "jobs.json"], script="fine_tuning")
    results = [process.wait(timeout=400) for process in processes]
    failed = [result.err[-2000:] for result in results if result.status]
    assert not failed, "\n".join(failed)
    (out / "console.txt").write_text(results[0].out, encoding="utf-8")
    return out


def numbers(folder: Path) -> Iterator[tuple[str, float]]:
    """All losses and measures of a run, in order."""
    for split in ("train", "val"):
        for record in read(folder, split):
            for key in ("loss", "accuracy", "grad_norm", "macro_f1", "lr"):
                if key in record:
                    yield f"{split} {record['step']} {key}", record[key]


def assert_same_run(found: Path, one: Path) -> None:
    """The same numbers, report and weights, up to rounding."""
    ours, theirs = dict(numbers(found)), dict(numbers(one))
    assert ours.keys() == theirs.keys() and len(losses(one, "train")) >= 2
    for key, value in theirs.items():
        assert math.isclose(ours[key], value, rel_tol=1e-12, abs_tol=1e-15), (found, key)
    x, y = result_of(found), result_of(one)
    for key in ("step", "trainable", "notes", "hashes", "examples"):
        assert x[key] == y[key], (found, key)
    assert x["test"] == pytest.approx(y["test"], rel=1e-12)
    assert_same_predictions(found, one, 1e-9)
    a, b = last_weights(found), last_weights(one)
    assert a.keys() == b.keys()
    for name in b:
        if not name.endswith("attn.k.bias"):  # its gradient is rounding noise around 0
            assert (a[name] - b[name]).norm() <= 1e-9 * b[name].norm(), (found, name)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_cut_model_is_fine_tuned_as_a_whole_one(cut, case, fit, feature):
    """Losses, norms, accuracies, report and weights of every layout are those of one process."""
    one = fit(**case(feature))
    for layout, other in CASES:
        if other == feature:
            assert_same_run(cut / f"{feature}-{layout}", one)


def test_a_run_goes_on_on_another_layout(cut, case, fit):
    """Weights or optimizer state that were saved in parts would come back in the wrong places, or
    the order of the examples would depend on who reads them."""
    truth = {}
    for feature, before in (("losses", "pp"), ("adapters", "fsdp")):
        truth[feature] = losses(fit(run=feature, **case(feature)), "train")[3]
        saved = cut / f"{feature}-{before}" / "step-00000002"
        alone = fit(run=f"{feature}-alone", resume=saved, **case(feature))
        assert losses(alone, "train") == {3: pytest.approx(truth[feature], rel=1e-12)}
    for feature, before, after in MOVES:
        found = losses(cut / f"{feature}-{before}-{after}", "train")
        assert found == {3: pytest.approx(truth[feature], rel=1e-12)}


@pytest.mark.parametrize("layout", [layout for layout, feature in CASES if feature == "losses"])
def test_the_run_folder_is_like_any_other(cut, layout):
    """One process classifies texts with it at once, as its own report says."""
    folder = cut / f"losses-{layout}"
    model = load_classifier(folder, "cpu", "float32")
    rows = predictions(folder)
    found = model.score([row["text"] for row in rows]).exp()[:, model.labels.index("good")]
    assert len(rows) > 20
    # the file rounds to 1e-4
    assert found.tolist() == pytest.approx([float(row["p_good"]) for row in rows], abs=2e-4)


def test_a_classifier_of_a_cut_model_is_a_trunk(cut, fit):
    """It would lack weights, or have them under the names of a wrapped model."""
    folder = fit(trunk=cut / "losses-fsdp", max_steps=1)
    assert result_of(folder)["trunk"].startswith(str(cut / "losses-fsdp"))


def test_the_console_says_how_the_batch_and_the_model_are_cut(cut):
    """A user sees which layout runs, and how many replicas share a batch; a reader of the report
    sees the layout and the precision."""
    said = (cut / "console.txt").read_text(encoding="utf-8")
    assert "steps an epoch, 4 process(es)" in said and "cpu, fsdp 4; float64" in said
    assert "steps an epoch, 2 replica(s)" in said and "cpu, ddp 2 x tp 2; float64" in said
    assert "steps an epoch, 1 replica(s)" in said and "cpu, pp 2 (1f1b) x tp 2; float64" in said
    assert "frozen   train: the stages of a pipeline read tokens: it runs every time" in said
    assert result_of(cut / "losses-fsdp")["device"] == "cpu, fsdp 4; float64"


# --- who reads ------------------------------------------------------------------------------------


class CountingFile:
    """A safetensors file that counts how often each tensor is read in this process."""

    reads: Counter[str] = Counter()  # by "folder/name of the tensor", of all files

    def __init__(self, file: Path, framework: str):
        self.folder = file.parent.name
        self.opened = safe_open(file, framework)
        self.keys = self.opened.keys
        self.get_slice = self.opened.get_slice

    def get_tensor(self, name: str) -> Tensor:
        self.reads[f"{self.folder}/{name}"] += 1
        return self.opened.get_tensor(name)


def main() -> int:
    """In each process of a group: the fine-tunings that a JSON file lists, and what each has read
    for them."""
    lazy.safe_open = CountingFile

    def tell(s: SentimentSettings) -> None:
        print(json.dumps({"run": s.run, "reads": CountingFile.reads}), flush=True)
        CountingFile.reads.clear()

    return fine_tuning.main(tell)


def test_who_reads_the_trunk(tmp_path, fine, trunk, gpt2, start_ranks):
    """Regression: a trunk of 1.5B parameters lay whole in the memory of every process before it was
    cut. Now the main process reads for all: a tensor for its hash, and again to hand it out."""
    meshes = {"ddp": {}, "fsdp": {"mesh__shard": 2}, "pp": {"mesh__pp": 2}, "tp": {"mesh__tp": 2}}
    jobs = []
    for name, mesh in meshes.items():
        of_gpt2 = {"trunk": gpt2} if name == "tp" else {}
        jobs.append(fine(tmp_path, run=name, max_steps=1, **mesh, **of_gpt2))
    jobs.append(fine(tmp_path, run="fsdp", max_steps=2, **meshes["fsdp"]))  # which goes on
    (tmp_path / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    processes = start_ranks(2, [tmp_path / "jobs.json"], script="sentiment.test_parallel")
    reads = []  # by process: run -> counts
    resumed = []
    for process in processes:
        result = process.wait()
        assert result.status == 0, result.err
        lines = [json.loads(line) for line in result.out.splitlines() if line.startswith("{")]
        resumed.append(lines.pop()["reads"])
        reads.append({line["run"]: line["reads"] for line in lines})
    names = load_file(trunk / "step-00000004" / "model.safetensors").keys()
    once = {f"step-00000004/{name}": 1 for name in names}
    best = {f"step-00000001/{name}" for name in last_weights(tmp_path / "ddp")}
    for layout in ("fsdp", "pp"):
        twice = dict.fromkeys(once, 2)
        assert reads[0][layout] == twice | dict.fromkeys(best, 1)
        assert reads[1][layout] == {}
    assert best <= resumed[0].keys() and resumed[1] == {}
    assert reads[0]["tp"] and reads[1]["tp"] == {}
    assert reads[1]["ddp"] == once | dict.fromkeys(best, 1)  # it holds the whole model
