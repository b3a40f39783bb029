"""Exported classifiers answer on real reviews and pairs as they do here: texts that nobody has made
for a test."""

import csv
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch

from exporting import source_of
from helpers import DATA, write_csv
from scripts import export
from smallgpt import load_classifier
from smallgpt import tokenizer as tokenizers
from smallgpt.weights import export_hf
from smallgpt.weights.export import new_folder

torch.set_num_threads(1)

FILES = {  # set -> its file, and the columns of the text, of the second text, and of the label
    "ChnSentiCorp": ("chnsenticorp/ChnSentiCorp_htl_all.csv", "review", "", "label"),
    "SST-2": ("glue/SST-2/train.tsv", "sentence", "", "label"),
    "MRPC": ("glue/MRPC/train.tsv", "#1 String", "#2 String", "Quality"),
}
BLOCK = 512  # tokens

Row = tuple[str, ...]  # text, label, or text, second text, label


def rows_of(name: str) -> list[Row]:
    """500 examples, drawn with a fixed seed. Skips where the set is absent."""
    path, *columns = FILES[name]
    if not (DATA / path).is_file():
        pytest.skip(f"no {DATA / path}: set SMALLGPT_DATA")
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.endswith(".tsv") else {}
    with open(DATA / path, encoding="utf-8-sig", newline="") as file:
        rows = []
        for row in csv.DictReader(file, **form):
            rows.append(tuple(row[column] for column in columns if column))
    whole = [row for row in rows if all(value.strip() for value in row)]
    return random.Random(0).sample(whole, 500)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A trunk whose tokenizer has read these texts; its weights are random."""
    texts = []
    for name in FILES:
        for *parts, _ in rows_of(name):
            texts += parts
    settings = tokenizers.TokenizerSettings(kind="bpe", vocab_size=3000)
    small = {"block_size": BLOCK, "n_layer": 1, "n_head": 2, "n_embd": 32}
    source = source_of(tokenizers.train(settings, texts), **small)
    folder = tmp_path_factory.mktemp("reader") / "trunk"
    with new_folder(folder) as temporary:
        export_hf.write(source, temporary)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_exports_answer_as_classify_does(reader, fit, tmp_path, monkeypatch, name):
    """Something that real texts hold, and no test has thought of, changes what an export reads."""
    hub = pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    rows = rows_of(name)
    _, *columns = FILES[name]
    header = [column for column in columns if column]
    keys = ("data__text_column", "data__pair_column", "data__label_column")
    run = fit(
        trunk=reader,
        max_steps=2,
        eval_every=2,
        data__path=write_csv(tmp_path / "rows.csv", rows[:80], header),
        **dict(zip(keys, columns, strict=True)),
    )
    for to in ("hf", "onnx"):
        words = ["export.py", str(run), f"to={to}", f"out={tmp_path / to}"]
        monkeypatch.setattr(sys, "argv", words)
        export.main()

    classifier = load_classifier(run, "cpu", "float32")
    texts = ["\t".join(parts) for *parts, _ in rows]
    ours = classifier(texts)
    assert len({round(found.probability, 4) for found in ours}) > 100, "they are all alike"

    program = runpy.run_path(str(tmp_path / "onnx" / "classify.py"))
    for text, expected in zip(texts, ours, strict=True):
        assert program["classify"](text) == pytest.approx(expected.probabilities, abs=1e-5), text

    pipeline = hub.pipeline("text-classification", str(tmp_path / "hf"), top_k=None, batch_size=8)
    whole = []
    expected = []
    for (*parts, _), found in zip(rows, ours, strict=True):
        inputs = dict(zip(("text", "text_pair"), parts, strict=False))
        n_tokens = len(pipeline.tokenizer(**inputs).input_ids)
        if n_tokens <= BLOCK:  # a longer one would lose its middle here, and its end there
            whole.append(inputs)
            expected.append(found.probabilities)
    assert len(whole) >= 490
    for inputs, scores, probabilities in zip(whole, pipeline(whole), expected, strict=True):
        by_label = {score["label"]: score["score"] for score in scores}
        assert by_label == pytest.approx(probabilities, abs=1e-5), inputs
