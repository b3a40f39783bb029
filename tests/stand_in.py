"""A stand-in for sentiment_train.py, which knows at once how good it was, and a sweep of stand-ins.

    python tests/stand_in.py out_dir=... run=... seed=0 mask=true    what such a sweep starts
    start("stand_in", argv)                                          such a sweep, as a process

Files in the folder data.path change what stand-ins do. `slow`: they run until they are told to end,
and save then, as a run does. `seconds`: how long they take. `broken` names a run that fails, as all
do with lm_weight=13. `worst` names one that is the worst of all; without `seconds` it waits for its
end after an evaluation.
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
    from smallgpt.sweeps import jobs

    jobs.SCRIPTS = dict.fromkeys(jobs.SCRIPTS, Path(__file__))
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
        own = {"pid": os.getpid(), "parent": os.getppid(), "argv": words}
        print(json.dumps({**own, **shared}), file=file)
    data = Path(keys["data.path"])
    if keys.get("lm_weight") == 13 or named(data / "broken") == run.name:
        print("some progress")
        sys.exit("error: lm_weight=13 is no good")
    if (data / "slow").exists():
        wait_for_the_end(run)
    time.sleep(float(named(data / "seconds") or 0))

    seed = keys["seed"]
    accuracy = 0.7 + 0.02 * seed**2 + 0.05 * keys.get("mask", 0) * (1 + 0.1 * seed)
    if "dropout" in keys:  # of a search
        accuracy = 0.9 - (keys["dropout"] - 0.3) ** 2
    is_worst = named(data / "worst") == run.name
    evaluation = {"step": 1, "split": "val", "loss": 1 - accuracy, "accuracy": accuracy}
    if is_worst:
        evaluation["accuracy"] = 0.1
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        print(json.dumps(evaluation), file=file)
    if is_worst and not named(data / "seconds"):
        wait_for_the_end(run)
    result = {
        "validation": evaluation,
        "seconds": 60 + seed,
        "resumed": has_resumed,
        "examples": {"train": keys.get("data.train_size") or 4000},
    }
    if keys.get("score_test", True):
        result |= scores_of_test(accuracy, result["examples"]["train"])
    text = json.dumps(result, ensure_ascii=False)
    (run / "result.json").write_text(text, encoding="utf-8")


def named(file: Path) -> str:
    """What a file of the data holds; "" if there is none."""
    return file.read_text(encoding="utf-8") if file.exists() else ""


def scores_of_test(accuracy: float, size: int) -> dict:
    """What the test split has shown."""
    largest = "always 好" if size > 500 else "always 差"
    return {
        "test": {"accuracy": accuracy, "macro_f1": accuracy - 0.1},
        "baselines": {
            largest: {"accuracy": 0.6},
            "TF-IDF (char) + linear SVM": {"accuracy": 0.65},
        },
    }


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
