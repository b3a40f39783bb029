"""A run: what makes two commands the same run, and which checkpoint it goes on from."""

from pathlib import Path

import pytest

from smallgpt.console import UserError
from smallgpt.runs.checkpoint import Checkpoint
from smallgpt.runs.run import check_same, merge_sources


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
