"""Fine-tuning with a model that is cut over processes: the numbers of one process, the same folder.

A group of four processes makes the runs of all layouts, one after the other; this process makes
each feature's run alone."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fine_tuning import assert_same_predictions, result_of
from helpers import last_weights, losses
from smallgpt.runs.metrics import read

# 33 examples in batches of 16: one batch of an epoch has a single example, so that of several data
# ranks some have none
COMMON = dict(dtype="float64", data__train_size=33, max_steps=4, eval_every=3, dropout=0.0)
FEATURES = {
    "losses": dict(
        pool="mean",
        class_weights="balanced",
        label_smoothing=0.1,
        layer_decay=0.7,
        lm_weight=0.3,
        micro_tokens=200,
    ),
    "adversarial": dict(adversarial=0.2, micro_tokens=200),
    "no_mask": dict(mask=False, patience=1, eval_every=1),
    "frozen_trunk": dict(freeze="trunk"),
    "last_block": dict(freeze="all_but_last:1"),
    "new_tokens": dict(freeze="all_but_last:1", mask=False, trunk="gpt2", lm_weight=0.3),
}
LAYOUTS = {
    "fsdp": (dict(mesh__shard=4), FEATURES),
    "hsdp": (dict(mesh__shard=2, mesh__offload=True), ["losses"]),
    "tp": (dict(mesh__tp=2), FEATURES),
    "tp_fsdp": (dict(mesh__tp=2, mesh__shard=2), ["losses", "new_tokens"]),
    "sequence": (dict(mesh__tp=2, mesh__sequence=True), ["losses", "adversarial"]),
}
CASES = [(layout, feature) for layout, (_, features) in LAYOUTS.items() for feature in features]


@pytest.fixture(scope="module")
def case(gpt2) -> Callable[[str], dict]:
    """case(feature) -> its settings."""

    def case(feature: str) -> dict:
        changes = COMMON | FEATURES[feature]
        return changes | ({"trunk": gpt2} if "trunk" in changes else {})

    return case


@pytest.fixture(scope="module")
def cut(tmp_path_factory, fine, case, start_ranks) -> Path:
    """The folder with the runs of all layouts, made by one group of processes."""
    out = tmp_path_factory.mktemp("cut")
    jobs = []
    for layout, feature in CASES:
        mesh, _ = LAYOUTS[layout]
        jobs.append(fine(out, run=f"{feature}-{layout}", **case(feature), **mesh))
    (out / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    for process in start_ranks(4, [out / "jobs.json"], script="fine_tuning"):
        result = process.wait(timeout=170)
        assert result.status == 0, result.err[-3000:]
    return out


def numbers(folder: Path) -> Iterator[tuple[str, float]]:
    """All losses and measures of a run, in order."""
    for split in ("train", "val"):
        for record in read(folder, split):
            for key in ("loss", "accuracy", "grad_norm", "macro_f1"):
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
