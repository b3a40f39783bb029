"""scripts/publish.py: what is handed on of a run."""

import json
import shutil

import pytest
import torch

import train
from chat import ChatSettings
from helpers import json_lines, last_weights, mistake
from scripts import publish
from sentiment_train import SentimentSettings
from smallgpt import settings
from smallgpt.sampling import SampleSettings, replies
from smallgpt.weights.pretrained import open_model, open_trunk


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny, run):
    """The folder that holds a run, and the folder `base` that was made of it."""
    folder = tmp_path_factory.mktemp("published")
    assert run("train", tiny(folder, run="made")).status == 0
    (folder / "page.md").write_text("## Limits\n\nIt knows colours.\n", encoding="utf-8")
    args = [folder / "made", f"to={folder / 'base'}", f"card={folder / 'page.md'}"]
    result = run("scripts.publish", args)
    assert result.status == 0, result.err
    assert result.out.startswith(f"{folder / 'base'}: step 12 of {folder / 'made'}, ")
    return folder


def test_it_answers_as_the_run_does(folder):
    """The weights of another step were published, or a tensor was lost on the way."""
    found, model, tokenizer = open_model(folder / "base")
    _, whole, _ = open_model(folder / "made")
    assert found.step == 12
    for p in whole.parameters():
        p.data = p.data.bfloat16().float()
    prompts = ["what is red 3?", "hi"]
    greedy = SampleSettings(temperature=0, max_tokens=8)
    assert replies(model, tokenizer, prompts, greedy) == replies(whole, tokenizer, prompts, greedy)
    weights = open_trunk(str(folder / "base")).weights
    for name, weight in last_weights(folder / "made").items():
        assert torch.equal(weights[name], weight.bfloat16().float())


def test_it_is_small_and_names_no_folder_of_this_machine(folder, chat_file):
    """The state of the optimizers is published, or somebody's home folder."""
    base = folder / "base"
    files = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    step = "step-00000012"
    own = {"README.md", "best", "config.yaml", "tokenizer.json"}
    assert files == own | {f"{step}/meta.json", f"{step}/model.safetensors"}
    meta = json.loads((folder / "base" / step / "meta.json").read_text(encoding="utf-8"))
    (source,) = meta["sources"]
    assert source["path"] == chat_file.name and len(source["sha256"]) == 64
    assert str(chat_file.parent) not in json.dumps(meta)


def test_the_card_tells_what_the_run_recorded(folder):
    """A reader of the card cannot tell what the model has read, or how good it is."""
    card = (folder / "base" / "README.md").read_text(encoding="utf-8")
    *_, last = json_lines(folder / "made" / "metrics.jsonl")
    assert last["split"] == "val" and last["step"] == 12
    assert f"| held-out bits per byte | {last['bits_per_byte']:.4f} |" in card
    assert "| tokens read | 3,072 |" in card and "| chat.txt | 1.0 | " in card
    assert card.startswith("## Limits\n\nIt knows colours.\n")


def test_chats_and_fine_tunings_begin_with_the_model_of_the_repository(folder, monkeypatch):
    """In a clone `python chat.py` asks which model, or a model that is not there is opened."""
    (folder / "clone" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(folder / "clone")
    assert ChatSettings().checkpoint == SentimentSettings().trunk == ""
    shutil.copytree(folder / "base", "checkpoints/base")
    assert ChatSettings().checkpoint == SentimentSettings().trunk == "checkpoints/base"
    found, _, _ = open_model(ChatSettings().checkpoint)
    assert found.step == 12


def test_a_new_run_begins_with_it(folder, tiny, run):
    """Nobody can go on from what is published."""
    args = tiny(folder, run="more", max_steps=2, init_from=folder / "base")
    assert run("train", args).status == 0


def test_the_run_itself_cannot_go_on(folder, tiny, run):
    """Without the state of the optimizers a resumed run would begin again unnoticed, or crash."""
    result = run("train", tiny(folder, run="base", max_steps=20))
    assert "init_from=" in mistake(result)


@pytest.mark.parametrize(
    "args, says",
    [
        ("", "give one run and to=FOLDER"),
        ("{made}", "give one run and to=FOLDER"),
        ("{made} to={base}", "is there already: delete it"),
        ("{made} to={new} card=/none.md", "cannot read card=/none.md: No such file"),
        ("/none to={new}", "there is no checkpoint"),
        ("{made} to={new} crad=x", "unknown key crad"),
    ],
)
def test_mistakes(folder, mistake_of, args, says):
    """A mistake leaves a half-made folder, or a traceback."""
    paths = {name: folder / name for name in ("made", "base", "new")}
    assert says in mistake_of(publish.main, args.format(**paths).split())
    assert not (folder / "new").exists()


def test_the_settings_of_a_run_are_those_of_train(folder):
    """config.yaml of the published folder is not what train.py reads."""
    s = settings.load(train.TrainSettings, [str(folder / "base" / "config.yaml")])
    assert s.run == "made"
