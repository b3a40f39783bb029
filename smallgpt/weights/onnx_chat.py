"""Talk to a language model without torch: pip install onnxruntime tokenizers

    echo "How are you?" | python chat.py

Each line is a dialogue of its own. The reply is always the likeliest one, and the whole dialogue is
read again for each of its tokens.
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


def reply(prompt: list[int], most: int = 100) -> list[int]:
    """The ids of a reply to the ids of a dialogue."""
    said: list[int] = []
    room = config["block_size"] - 1 - len(prompt)
    while len(said) < min(most, room):
        tokens = np.array([prompt + said])
        (logits,) = session.run(None, {"tokens": tokens})  # (1, T, V)
        scores = logits[0, -1]
        scores[config["silent"]] = -np.inf
        if not said:
            scores[config["ends"]] = -np.inf  # an empty reply is none
        token = int(scores.argmax())
        if token in config["ends"]:
            break
        said.append(token)
    return said


if __name__ == "__main__":
    for line in sys.stdin:
        asked = tokenizer.encode(line.strip(), add_special_tokens=False).ids
        asked = asked[-config["block_size"] // 2 :]  # of a long text the end
        dialogue = [config["bos"], *asked, config["sep"]]
        said = reply(dialogue)
        print(tokenizer.decode(said))
