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
    if len(ids) <= room:
        return ids
    tail = room // 2
    return ids[: room - tail] + ids[len(ids) - tail :]


def encode(text: str) -> list[int]:
    """Ids of a text, or of two with a tab between, at most block_size of them."""
    second = ""
    if config["pairs"]:
        text, _, second = text.partition("\t")
    first_ids = tokenizer.encode(text, add_special_tokens=False).ids
    second_ids = tokenizer.encode(second, add_special_tokens=False).ids
    prefix = config["prefix"]
    cue = config["cue"]
    separator = []
    if second_ids:
        separator = [config["sep"]]
    room = config["block_size"] - len(prefix + separator + cue)
    left = room - len(first_ids)
    most = max(room // 2, left)
    for_second = min(len(second_ids), most)
    first_ids = shorten(first_ids, room - for_second)
    second_ids = shorten(second_ids, for_second)
    return prefix + first_ids + separator + second_ids + cue


def classify(text: str) -> dict[str, float]:
    """The probability of each label."""
    ids = encode(text)
    lengths = np.array([len(ids)])
    if not config["mask"]:  # padding is read like text
        missing = config["block_size"] - len(ids)
        ids += missing * [config["pad"]]
    tokens = np.array([ids])
    inputs = {"tokens": tokens, "lengths": lengths}
    (batch,) = session.run(None, inputs)
    scores = batch[0]
    odds = np.exp(scores - scores.max())
    probabilities = odds / odds.sum()
    return dict(zip(config["labels"], probabilities.tolist(), strict=True))


if __name__ == "__main__":
    for text in sys.argv[1:]:
        probabilities = classify(text)
        label = max(probabilities, key=probabilities.get)
        print(f"{label}\t{probabilities[label]:.4f}\t{text}")
