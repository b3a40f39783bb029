"""checkpoints/base: what a clone brings along."""

import json
import re

import pytest

from helpers import ROOT
from sentiment_train import SentimentSettings
from smallgpt.sampling import SampleSettings, replies
from smallgpt.settings import load
from smallgpt.text import base
from smallgpt.weights.pretrained import OWN, open_model

FOLDER = ROOT / OWN

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="this clone has no checkpoints/base")


def test_it_is_small_enough_for_a_clone():
    """Every clone downloads the state of the optimizers, or float32 weights."""
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert not any("state" in path.parts for path in files)


def test_it_has_read_what_its_card_lists_and_nothing_else():
    """The model was trained on a file whose licence nobody has looked at."""
    found, _, _ = open_model(FOLDER)
    read = {source["path"] for source in found.sources}
    assert read == {f"data/base/{part.name}.txt" for part in base.PARTS}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in base.PARTS:
        assert f"| {part.name} | {part.origin} | {part.licence} |" in card
    for source in found.sources:
        assert source["sha256"] in card


def test_it_names_no_folder_of_the_machine_that_made_it():
    """config.yaml or meta.json hold a path that exists on one machine only."""
    found, _, _ = open_model(FOLDER)
    text = json.dumps(found.meta) + (FOLDER / "config.yaml").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/\w+/", text)


def test_it_answers_in_both_languages():
    """The weights do not fit the tokenizer, or a language was lost."""
    _, model, tokenizer = open_model(FOLDER)
    chinese, english = replies(
        model, tokenizer, ["你好！", "Hello!"], SampleSettings(temperature=0)
    )
    assert re.search("[\u4e00-\u9fff]", chinese)
    assert re.search("[A-Za-z]{2}", english)


def test_the_quickstart_s_classifiers_begin_with_it(monkeypatch):
    """Regression: the config's block was longer than that of the trunk it named, so its own command
    was refused."""
    monkeypatch.chdir(ROOT)
    s = load(SentimentSettings, ["config/quickstart_sentiment.yaml"])
    found, _, _ = open_model(s.trunk)
    assert found.run.resolve() == FOLDER.resolve()
    assert s.block_size <= found.meta["model"]["block_size"]
