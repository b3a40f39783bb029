"""Classify texts without torch: pip install onnxruntime tokenizers

python classify.py "a text" "one of two texts, a tab, and the other"
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

folder = Path(__file__).parent
config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # what spells a special token is text
session = InferenceSession(folder / "model.onnx")


def shorten(ids: list[int], room: int) -> list[int]:
    """A long text loses its middle."""
    tail = room // 2
    return ids if len(ids) <= room else ids[: room - tail] + ids[len(ids) - tail :]


def encode(text: str) -> list[int]:
    first, _, second = text.partition("\t") if config["pairs"] else (text, "", "")
    first = tokenizer.encode(first, add_special_tokens=False).ids
    second = tokenizer.encode(second, add_special_tokens=False).ids
    room = config["block_size"] - len(config["prefix"]) - bool(second)
    for_second = min(len(second), max(room // 2, room - len(first)))
    separator = [config["sep"]] if second else []
    first = shorten(first, room - for_second)
    return [*config["prefix"], *first, *separator, *shorten(second, for_second)]


def classify(text: str) -> dict[str, float]:
    """The probability of each label."""
    ids = encode(text)
    padding = 0 if config["mask"] else config["block_size"] - len(ids)  # it is read like text
    tokens = np.array([ids + [config["pad"]] * padding])
    (scores,) = session.run(None, {"tokens": tokens, "lengths": np.array([len(ids)])})
    odds = np.exp(scores[0] - scores[0].max())
    return dict(zip(config["labels"], (odds / odds.sum()).tolist(), strict=True))


if __name__ == "__main__":
    for text in sys.argv[1:]:
        probabilities = classify(text)
        label = max(probabilities, key=probabilities.get)
        print(f"{label}\t{probabilities[label]:.4f}\t{text}")
