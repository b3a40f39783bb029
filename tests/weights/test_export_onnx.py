"""ONNX Runtime computes what model.py computes, for any number of texts of any length, and the
examples that come with an export run without torch."""

import runpy
from pathlib import Path

import pytest
import torch

from exporting import assert_close, classifier_of, run_example, source_of, vocabulary
from smallgpt.console import UserError
from smallgpt.sampling import Conversation, SampleSettings
from smallgpt.sentiment.batches import encode_text
from smallgpt.weights import export, export_onnx
from smallgpt.weights.export import Source

torch.set_num_threads(1)

ONE_LAYER = {"n_layer": 1}
CLASSIFIERS = {  # tests/scripts/test_export.py has a GPT-2 that pools the mean without a mask
    "mean": ("mean", True, ONE_LAYER),
    "last": (
        "last",
        True,
        ONE_LAYER | {"mlp": "swiglu", "n_kv_head": 2, "marks": 3, "cue": [5, 6]},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def onnxruntime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def written(source: Source, folder: Path) -> Path:
    with export.new_folder(folder) as temporary:
        export_onnx.write(source, temporary)
    return folder


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_any_number_of_texts_of_any_length_gets_the_same_scores(onnxruntime, tmp_path, name):
    """A batch size or length of the tracing would be fixed, or padding would be read."""
    pool, mask, shape = CLASSIFIERS[name]
    source = classifier_of(vocabulary("bpe"), pool, mask, **shape)
    folder = written(source, tmp_path / "out")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for batch, length in [(1, 1), (1, 7), (4, 48), (3, 2)]:
        tokens = torch.randint(source.tokenizer.vocab_size, (batch, length))
        lengths = torch.randint(1, length + 1, (batch,))
        inputs = {"tokens": tokens.numpy(), "lengths": lengths.numpy()}
        (scores,) = session.run(None, inputs)
        expected = source.model(tokens, lengths)
        torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-5, rtol=1e-5)
    program = runpy.run_path(str(folder / "classify.py"))
    cue = source.head["cue"]
    for text, pair in [("the cat", ""), ("é", "你好"), ("the " * 60, "cat " * 60), ("a " * 99, "")]:
        ids, _ = encode_text(
            source.tokenizer, text.strip(), pair.strip(), 48, source.head["prefix"], cue
        )
        assert program["encode"](f"{text}\t{pair}") == ids
    assert "/smallgpt" not in (folder / "model.onnx").read_bytes().decode("latin-1")


@pytest.mark.slow
@torch.no_grad()
def test_a_language_model_gives_the_same_logits_and_talks_without_torch(onnxruntime, tmp_path):
    source = source_of(vocabulary("char"), qk_norm=False, tie_weights=False, **ONE_LAYER)
    folder = written(source, tmp_path / "out")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for batch, length in [(1, 1), (3, 40)]:
        tokens = torch.randint(source.tokenizer.vocab_size, (batch, length))
        (logits,) = session.run(None, {"tokens": tokens.numpy()})
        assert_close(torch.tensor(logits), source.model(tokens))

    program = runpy.run_path(str(folder / "chat.py"))
    greedy = SampleSettings(temperature=0, repetition_penalty=1)
    for line in ("the cat", "<|sep|>你好"):
        talk = Conversation(source.model, source.tokenizer, greedy)
        talk.say(line)
        asked = list(talk.ids)
        list(talk.reply())
        said = talk.ids[len(asked) : -1]
        assert program["reply"](asked) == said != []
    shown = run_example(folder / "chat.py", stdin="the cat\n你好\n")
    assert len(shown) >= 2


def test_a_missing_package_is_named_with_its_cure(monkeypatch, tmp_path):
    find = export.importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util,
        "find_spec",
        lambda name: None if name == "onnxscript" else find(name),
    )
    with pytest.raises(UserError, match="onnxscript is missing: pip install onnxscript"):
        written(source_of(vocabulary("char")), tmp_path / "out")
    assert not list(tmp_path.iterdir())
