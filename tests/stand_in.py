"""A stand-in for sentiment_train.py, which knows at once how good it was, and a sweep of stand-ins.

    python tests/stand_in.py out_dir=... run=... seed=0 mask=true    what such a sweep starts
    start("stand_in", argv)                                          such a sweep, as a process

As long as there is a file `slow` in the folder data.path, a stand-in runs until it is told to end;
it saves then, as a run does. With lm_weight=13 it fails.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    """A sweep of stand-ins: what tests/helpers.py runs in a process of its own."""
    from scripts import sweep

    sweep.SCRIPT = Path(__file__)
    return sweep.main()


def value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def train(words: list[str]) -> None:
    keys = {key: value(text) for key, _, text in (word.partition("=") for word in words)}
    run = Path(keys["out_dir"], str(keys["run"]))
    has_resumed = (run / "step-00000001").exists()
    shared = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    with open(run / "starts.jsonl", "a", encoding="utf-8") as file:
        print(json.dumps({"pid": os.getpid(), "argv": words, **shared}), file=file)
    if keys.get("lm_weight") == 13:
        print("some progress")
        sys.exit("error: lm_weight=13 is no good")
    if Path(keys["data.path"], "slow").exists():
        wait_for_the_end(run)

    seed = keys["seed"]
    accuracy = 0.7 + 0.02 * seed**2 + 0.05 * keys.get("mask", 0) * (1 + 0.1 * seed)
    size = keys.get("data.train_size") or 4000
    largest = "always 好" if size > 500 else "always 差"
    result = {
        "test": {"accuracy": accuracy, "macro_f1": accuracy - 0.1},
        "seconds": 60 + seed,
        "resumed": has_resumed,
        "examples": {"train": size},
        "baselines": {
            largest: {"accuracy": 0.6},
            "TF-IDF (char) + linear SVM": {"accuracy": 0.65},
        },
    }
    text = json.dumps(result, ensure_ascii=False)
    (run / "result.json").write_text(text, encoding="utf-8")


def wait_for_the_end(run: Path) -> None:
    def save(number: int, frame: object) -> None:
        time.sleep(0.2)
        (run / "step-00000001").mkdir()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
    (run / "ready").touch()
    time.sleep(30)


if __name__ == "__main__":
    train(sys.argv[1:])
