"""Parquet files, read row by row; and the folders in which data sets of Hugging Face lie.

    open_parquet    a file -> its ParquetTable
    splits_of       a folder -> {"train": its files, "test": ...}
    class_names     the names that Hugging Face's ClassLabel gives to numbers

pyarrow is imported when a file needs it.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from smallgpt.console import UserError

BATCH_ROWS = 1 << 10  # that are in memory at once
# train-00000-of-00002-0123456789abcdef: the split, which part of it, a hash
SHARD = re.compile(r"(?P<split>.+?)(-\d{5}-of-\d{5})?(-[0-9a-f]{16})?")

ClassNames = dict[str, list[str]]  # column -> the name of each of its numbers, from 0


@dataclass(frozen=True)
class ParquetTable:
    """An open file."""

    path: Path
    file: Any  # a pyarrow.parquet.ParquetFile

    @property
    def columns(self) -> list[str]:
        return self.file.schema_arrow.names

    @property
    def text_columns(self) -> list[str]:
        """Those that hold strings."""
        from pyarrow import types

        texts = []
        for column in self.file.schema_arrow:
            if types.is_string(column.type) or types.is_large_string(column.type):
                texts.append(column.name)
        return texts

    @property
    def n_rows(self) -> int:
        return self.file.metadata.num_rows

    def rows(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """Each row as {column: its value}, of all columns or of these.

        UserError: the file is damaged."""
        with _reading(self.path):
            for batch in self.file.iter_batches(BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()


@contextlib.contextmanager
def open_parquet(path: Path, content: BinaryIO | None = None) -> Iterator[ParquetTable]:
    """The table of a file, or of its content where it was unpacked.

    UserError: pyarrow is missing, or the file is damaged."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path} is a Parquet file, which pyarrow reads: pip install pyarrow"
        ) from None
    with _reading(path):
        file = parquet.ParquetFile(path if content is None else content)
    with file:
        yield ParquetTable(path, file)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as problem:
        reason = str(problem).partition("\n")[0].rstrip(".")
        raise UserError(
            f"{path} is a damaged Parquet file ({reason}): download or write it again"
        ) from None


# -- what Hugging Face writes about a data set -----------------------------------------------------


def class_names(table: ParquetTable) -> ClassNames:
    """The names of the numbers in its columns of ClassLabels.

    The library `datasets` writes them into each file. Where it did not, the README.md of the data
    set may have them, which lies in the folder of the file or, beside `data`, in the one above."""
    described = (table.file.schema_arrow.metadata or {}).get(b"huggingface")
    if described is not None:
        return _names_in_file(described)
    folder = table.path.parent
    top = folder.parent if folder.name == "data" else folder
    return _names_in_card(top / "README.md")


def _names_in_file(described: bytes) -> ClassNames:
    """{"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}"""
    try:
        features = json.loads(described)["info"]["features"]
        columns = features.items()
        return {name: f["names"] for name, f in columns if f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # of another shape: the numbers stay numbers


def _names_in_card(card: Path) -> ClassNames:
    """Those of the header of a README.md:

    dataset_info: {features: [{name: label, dtype: {class_label: {names: {'0': neg, '1': pos}}}}]}
    """
    found: ClassNames = {}
    try:
        _, header, _ = card.read_text(encoding="utf-8").split("---\n", 2)
        for feature in yaml.safe_load(header)["dataset_info"]["features"]:
            kind = feature["dtype"]
            if isinstance(kind, dict) and "class_label" in kind:
                names = kind["class_label"]["names"]
                found[feature["name"]] = [names[number] for number in sorted(names, key=int)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}  # no such file, or no such header
    return found


def splits_of(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of a data set, by the split that their names begin with: those in `data`,
    where Hugging Face keeps them, or else those in the folder itself; {} if there are none."""
    files = sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet"))
    splits: dict[str, list[Path]] = {}
    for file in files:
        split = SHARD.fullmatch(file.stem)["split"]
        splits.setdefault(split, []).append(file)
    return splits
