"""A run: what makes two commands the same run, and which checkpoint it goes on from."""

import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from smallgpt.console import UserError
from smallgpt.parallel.world import World
from smallgpt.runs import run
from smallgpt.runs.checkpoint import Checkpoint
from smallgpt.runs.run import Run, check_same, lock, merge_sources

ONE = World(0, 1, torch.device("cpu"))


def settings_of(out_dir: Path) -> SimpleNamespace:
    return SimpleNamespace(
        run="r",
        out_dir=str(out_dir),
        resume="auto",
        save="sync",
        log_every=1,
        tracker="none",
        keep=1,
    )


def test_a_setting_that_an_older_version_lacked_was_off():
    now = {"model.n_layer": 2, "freeze": "none", "adversarial": 0.0}
    older = Checkpoint(Path("r"), {"settings": {"model.n_layer": 2, "freeze": "none"}})
    defaults = {"adversarial": 0.0, "freeze": "none"}
    check_same(older, now, defaults)
    for changed in ({"adversarial": 0.1}, {"freeze": "trunk"}, {"model.n_layer": 3}):
        with pytest.raises(UserError, match="cannot continue from r"):
            check_same(older, now | changed, defaults)


def test_a_checkpoint_of_an_older_version_can_be_used_but_not_continued():
    """Its meta.json has no settings to compare with: the message names what works instead."""
    older = Checkpoint(Path("r/step-00000001"), {"model": {"n_layer": 2}})
    with pytest.raises(UserError, match="init_from=r/step-00000001"):
        check_same(older, {"seed": 0}, {"seed": 0})
    assert older.sources == [{"kind": "unknown", "name": "the text of r/step-00000001"}]


def test_a_corpus_that_has_moved_is_one_source():
    """A run that is continued elsewhere recorded its corpus twice, once as gone."""
    here = {"kind": "text", "path": "/new/a.txt", "weight": 1.0, "sha256": "1"}
    there = {"kind": "text", "path": "/old/a.txt", "weight": 1.0, "sha256": "1"}
    other = {"kind": "unknown", "name": "the text of gpt2"}
    assert merge_sources([here], [there, other, other]) == [here, other]


def test_after_the_loop_the_bar_is_closed_and_signals_are_as_before(tmp_path, monkeypatch):
    """Regression: what was said after the loop used to stand on the line of the progress bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    before = signal.getsignal(signal.SIGTERM)
    with Run(settings_of(tmp_path), ONE) as run:
        for _ in run.steps(max_steps=4, save_every=4):
            assert signal.getsignal(signal.SIGTERM) != before
            assert not run.metrics.bar.disable
            break
        assert run.metrics.bar.disable  # tqdm's word for closed
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_restart_waits_for_what_it_replaces(tmp_path, monkeypatch):
    """torchrun starts a lost machine's processes elsewhere while the old ones may still be ending;
    any other second job is refused at once."""
    with lock(tmp_path / "r", main=True):
        with pytest.raises(UserError, match="another process trains"), lock(tmp_path / "r", True):
            pass
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setattr(run, "RESTART_WAIT", 0.3)
        began = time.monotonic()
        with pytest.raises(UserError, match="another process trains"), lock(tmp_path / "r", True):
            pass
        assert time.monotonic() - began >= 0.3


def test_patience_counts_the_evaluations_since_the_best(tmp_path, capsys):
    """Equally good is not better; and 0 never ends."""
    run = Run(settings_of(tmp_path), ONE)
    losses = {10: 2.0, 20: 1.0, 30: 1.0, 40: 3.0}
    run.history = {step: {"loss": loss} for step, loss in losses.items()}
    assert run.best == 20
    assert [run.out_of_patience(n) for n in (0, 1, 2, 3)] == [False, True, True, False]
    assert "no better validation loss in 2 evaluations" in capsys.readouterr().out
