"""A run for ONNX Runtime, which computes it without torch.

    write        model.onnx, the tokenizer, config.json, an example that runs them, README.md
    to_onnx      the graph of a model, for any number of texts of any length

Every form of a model, and both ways to pool, are exact: the graph is traced from model.py.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from smallgpt.weights.export import Source, require, write_json, write_tokenizer
from smallgpt.weights.export_card import card

HERE = Path(__file__).parent


def write(source: Source, folder: Path) -> None:
    """Write all files of the export. UserError where a package is missing."""
    to_onnx(source, folder / "model.onnx")
    write_tokenizer(source, folder)
    write_json(folder / "config.json", config_of(source))
    example = "classify" if source.head else "chat"
    shutil.copyfile(HERE / f"onnx_{example}.py", folder / f"{example}.py")
    use = f"`{example}.py` is a whole program:\n\n```\npip install onnxruntime tokenizers\n"
    use += 'python classify.py "a text"\n```' if source.head else "python chat.py\n```"
    text = card(source, "onnx", use, limits(source))
    (folder / "README.md").write_text(text, encoding="utf-8")


def limits(source: Source) -> list[str]:
    """What this export does otherwise than chat.py and scripts/classify.py."""
    if source.head:
        return []
    return [
        "model.onnx has no cache of keys and values: each token reads the whole dialogue again."
    ]


def config_of(source: Source) -> dict[str, Any]:
    """How texts are made into tokens, and what is made of the scores."""
    tokenizer = source.tokenizer
    found = {
        "inputs": "tokens int64 (batch, length), padded on the right",
        "block_size": source.longest,
        "bos": tokenizer.bos,
        "sep": tokenizer.sep,
        "pad": tokenizer.pad,
    }
    if source.head:
        head = {key: source.head[key] for key in ("labels", "prefix", "mask", "pool")}
        is_of_pairs = source.found.meta.get("pairs", True)  # older versions did not record it
        return found | head | {"pairs": is_of_pairs}
    return found | {"ends": source.ends, "silent": source.silent}


def to_onnx(source: Source, file: Path) -> None:
    """Write the graph: tokens (B, T) to logits (B, T, V), or of a classifier tokens and lengths
    (B,) to scores (B, n_classes). UserError where a package is missing."""
    require("onnx", "onnxscript")
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", min=2, max=source.config.block_size)
    inputs: dict[str, torch.Tensor] = {"tokens": torch.zeros(2, 3, dtype=torch.long)}
    dynamic: dict[str, Any] = {"tokens": {0: batch, 1: length}}
    if source.head:
        inputs["lengths"] = torch.tensor([3, 2])
        dynamic["lengths"] = {0: batch}
    with quiet():
        program = torch.onnx.export(
            source.model,
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=tuple(dynamic.values()),
            input_names=list(inputs),
            output_names=["scores" if source.head else "logits"],
            verbose=False,
        )
        forget_origins(program.model)
        program.save(file)


def forget_origins(model: Any) -> None:
    """Take out where in the source each node came from: paths of this machine, half of the file."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter says of its own matters, such as that torchvision is missing."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
