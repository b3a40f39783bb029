"""Get data, and look at it.

    python scripts/data.py embedded to=data                    small Chinese and English chats, no network
    python scripts/data.py fetch name=lccc to=data             a public chat corpus from the Hugging Face hub
    python scripts/data.py fetch name=sst2 to=data             a public labelled set, checksummed
    python scripts/data.py stats path=data/chatterbot.txt      dialogues, utterances, bytes
    python scripts/data.py stats set=csv path=my.csv           splits and labels, and what was dropped and why
    python scripts/data.py text sst2=data mrpc=data to=data/reviews.txt
                                                               training texts of sets, to pretrain on

`text` takes each set as SET=PATH, its further settings behind it as SET.KEY=VALUE (csv=my.csv csv.text_column=review),
and leaves out what the held-out splits hold.
"""

import glob
import importlib.util
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, settings
from smallgpt.console import UserError
from smallgpt.sentiment import leaks, sets, splits
from smallgpt.sentiment.sets import READERS, SOURCES, ReviewSettings
from smallgpt.text.formats import read_dialogues

CHATS = {  # name -> (dataset, file) on the Hugging Face hub
    "lccc": ("silver/lccc", "lccc_base_train.jsonl.gz"),
    "lccc_large": ("silver/lccc", "lccc_large.jsonl.gz"),
    "minimind": ("jingyaogong/minimind_dataset", "sft_mini_512.jsonl"),
    "slimorca": ("Open-Orca/SlimOrca", "oo-labeled_correct.gpt4.sharegpt.jsonl"),
}


def fetch_chat(name: str, to: Path) -> Path:
    """Download one of CHATS into the folder `to`."""
    dataset, file = CHATS[name]
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(dataset, file, repo_type="dataset", local_dir=to))
    except Exception as problem:  # whatever the network or the hub throws, the way out is the same
        raise UserError(
            f"could not download {name} ({type(problem).__name__}): get the file {file} of "
            f"https://huggingface.co/datasets/{dataset} by other means and put it at {to / file}"
        ) from problem


def embedded(to: Path) -> Path:
    """Write the Chinese and English conversations of the package chatterbot-corpus as one chat text file."""
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or package.origin is None:
        raise UserError("the package chatterbot-corpus is missing: pip install chatterbot-corpus")
    to.mkdir(parents=True, exist_ok=True)
    with open(to / "chatterbot.txt", "w", encoding="utf-8", newline="\n") as out:
        for language in ("chinese", "english"):
            for file in sorted((Path(package.origin).parent / "data" / language).glob("*.yml")):
                for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
                    if isinstance(turns, list):  # one entry of 1.3.3 is a stray string
                        out.writelines(" ".join(str(turn).split()) + "\n" for turn in turns)
                        out.write("\n")
    return to / "chatterbot.txt"


@dataclass
class EmbeddedSettings:
    to: str = "data"  # folder to write into


@dataclass
class FetchSettings:
    name: str = ""  # a chat corpus or a labelled set
    to: str = "data"  # folder to write into

    def check(self) -> list[str]:
        """Problems with these settings, in plain words."""
        known = (*CHATS, *SOURCES)
        if self.name not in known:
            return [f"name={self.name} is not known: choose one of {', '.join(known)}"]
        return []


@dataclass
class ChatStatsSettings:
    path: str = ""  # a chat file, or a glob


def embedded_command(argv: list[str]) -> None:
    s = settings.load(EmbeddedSettings, argv, doc=__doc__)
    print(embedded(Path(s.to)))


def fetch_command(argv: list[str]) -> None:
    s = settings.load(FetchSettings, argv, doc=__doc__)
    if s.name in CHATS:
        print(fetch_chat(s.name, Path(s.to)))
    else:
        print(*sets.fetch(s.name, Path(s.to)), sep="\n")


def stats_command(argv: list[str]) -> None:
    if any(word.startswith("set=") for word in argv):
        print_set(settings.load(ReviewSettings, argv, doc=__doc__))
        return
    s = settings.load(ChatStatsSettings, argv, doc=__doc__)
    if not s.path:
        raise UserError("give path=FILE of a chat, or set=SET path=PATH of a labelled set")
    print(f"{'dialogues':>12} {'utterances':>12} {'bytes':>14}  file")
    for path in sorted(glob.glob(s.path)) or [s.path]:
        dialogues = utterances = size = 0
        for turns in read_dialogues(path):
            dialogues += 1
            utterances += len(turns)
            size += (
                sum(len(turn.encode()) + 1 for turn in turns) + 1
            )  # newlines, and the blank line
        print(f"{dialogues:>12,} {utterances:>12,} {size:>14,}  {path}", flush=True)


def print_set(s: ReviewSettings) -> splits.Reviews:
    """Read a labelled set, and print its splits, labels and what was dropped."""
    reviews = splits.load(s)
    for split in splits.SPLITS:
        counts = Counter(e.label for e in reviews.splits[split])
        shares = ", ".join(f"{label} {counts[label]:,}" for label in reviews.labels)
        print(f"{s.set:<16} {split:<11} {len(reviews.splits[split]):>7,}  {shares}")
    for note in reviews.notes:
        print(f"  {note}")
    return reviews


def text_command(argv: list[str]) -> None:
    to = ""
    wanted: list[list[str]] = []  # the settings of each set, as typed
    for word in argv:
        key, _, value = word.partition("=")
        name, _, setting = key.partition(".")
        if key == "to":
            to = value
        elif name not in READERS:
            known = ", ".join(READERS)
            raise UserError(f"{word} is neither to=FILE nor SET=PATH; the sets are {known}")
        elif not setting:
            wanted.append([f"set={name}", f"path={value}"])
        elif wanted and wanted[-1][0] == f"set={name}":
            wanted[-1].append(f"{setting}={value}")
        else:
            raise UserError(f"{word} must follow {name}=PATH")
    if not to or not wanted:
        raise UserError("give one or more SET=PATH, such as sst2=data, and to=FILE")
    found = [print_set(settings.load(ReviewSettings, words)) for words in wanted]
    written, left = leaks.training_texts(found, Path(to))
    print(
        f"wrote {written:,} texts to {to}; left out {left:,} that are parts of others "
        "or share text with a held-out example"
    )


COMMANDS = {
    "embedded": embedded_command,
    "fetch": fetch_command,
    "stats": stats_command,
    "text": text_command,
}


def main() -> None:
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
    elif command in COMMANDS:
        COMMANDS[command](argv)
    else:
        raise UserError(f"there is no command {command}: use {', '.join(COMMANDS)}")


if __name__ == "__main__":
    console.run(main)
