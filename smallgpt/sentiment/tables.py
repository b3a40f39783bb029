"""CSV, TSV and JSON Lines files of strangers: their encoding, separator and quoting, found out or named."""

import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from smallgpt.console import UserError

SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|"}
BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
MAX_BYTES = (
    4 << 30
)  # of one unpacked file: a small .gz or .zip can hold more than a machine's memory
csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 131,072 characters


class Table(NamedTuple):
    """All cells of a file as text, as they are written. Every row is as long as the header."""

    header: list[str]
    rows: list[list[str]]


def read_table(
    path: Path, encoding: str = "auto", separator: str = "auto", quoting: str = "auto"
) -> Table:
    """All rows of a file, in its order; blank ones do not count.

    path: .csv, .tsv, .txt or, one object a line, .jsonl, .ndjson or .json; also as .gz or as the only file in a .zip.
    encoding `auto`: by its byte-order mark, else UTF-8, UTF-16 without a mark, or GB18030 (of which GBK is a part).
    separator `auto`: the one most frequent in the header. quoting `auto`: on, but off in tab-separated files, where a
    quote is mostly just a quote. UserError names the file, the line, what is wrong and the fix."""
    name, content = unpack(path)
    text = decode(path, content, encoding)
    if not text.strip():
        raise UserError(f"{path} is empty")
    if name.lower().endswith((".jsonl", ".ndjson", ".json")):
        return json_rows(path, text)
    header = text.lstrip().partition("\n")[0]
    sep = (
        max(SEPARATORS.values(), key=header.count) if separator == "auto" else SEPARATORS[separator]
    )
    quoted = quoting == "true" or (quoting == "auto" and sep != "\t")
    # newlines as Python reads them: a CRLF file read with quoting off would keep \r in its last column.
    # strict: a quote that is never closed is an error, and not one cell with the rest of the file in it
    reader = csv.reader(
        io.StringIO(text, newline=None),
        delimiter=sep,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    rows: list[list[str]] = []
    line = 1  # where the row begins
    try:
        for row in reader:
            if any(map(str.strip, row)):
                if rows and len(row) != len(rows[0]):
                    raise UserError(
                        f"{path}, line {line}: {len(row)} cells, the header has {len(rows[0])}; correct "
                        "it, name its data.separator, or set data.quoting to true or false"
                    )
                rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        fix = (
            "set data.quoting=false if quotes mean nothing here" if quoted else "set data.separator"
        )
        raise UserError(f"{path}, line {line}: {error}; correct its quotes, or {fix}") from None
    if len(rows) < 2:
        raise UserError(f"{path} has no rows below its header")
    return Table(rows[0], rows[1:])


def unpack(path: Path) -> tuple[str, bytes]:
    """The name and bytes of a file, of what a .gz holds, or of the only file in a .zip (known by their first bytes)."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic in (b"PK\3\4", b"PK\5\6"):
            with zipfile.ZipFile(path) as archive:
                files = [
                    f
                    for f in archive.infolist()
                    if not f.is_dir() and not f.filename.startswith("__MACOSX")
                ]
                if len(files) != 1:
                    names = show([f.filename for f in files])
                    raise UserError(
                        f"{path} holds {len(files)} files ({names}): unpack it, or save it as CSV if it is "
                        "a spreadsheet, and name the file to read"
                    )
                if files[0].file_size > MAX_BYTES:
                    raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 30} GiB")
                return files[0].filename, archive.read(files[0])
        with gzip.open(path) if magic[:2] == b"\x1f\x8b" else open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (
        OSError,
        EOFError,
        zlib.error,
        zipfile.BadZipFile,
        RuntimeError,
    ) as problem:  # RuntimeError: encrypted
        raise UserError(
            f"cannot read {path}: {getattr(problem, 'strerror', None) or problem}"
        ) from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} holds more than {MAX_BYTES >> 30} GiB")
    return path.stem if path.suffix.lower() == ".gz" else path.name, content


def decode(path: Path, content: bytes, encoding: str = "auto") -> str:
    """The text of the bytes, without a byte-order mark."""
    if encoding == "auto":
        encoding = next((e for bom, e in BOMS.items() if content.startswith(bom)), "") or guess(
            path, content
        )
    try:
        return content.decode(encoding).lstrip("\ufeff")
    except LookupError:
        raise UserError(
            f"there is no encoding {encoding!r}: use e.g. utf-8, gb18030, utf-16 or latin-1"
        ) from None
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "replace").count("\n") + 1
        raise UserError(
            f"{path}, line {line}: not {encoding}; name its encoding in data.encoding"
        ) from None


def guess(path: Path, content: bytes) -> str:
    """The encoding of bytes without a byte-order mark."""
    # ASCII characters in UTF-16, such as separators, have a zero byte: the second (little endian) or the first
    first, second = content[:1000:2].count(0), content[1:1000:2].count(0)
    if max(first, second) > 1 + 2 * min(first, second):
        return "utf-16-le" if second > first else "utf-16-be"
    try:
        content.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    high = len(re.findall(rb"[\x80-\xff]", content))
    if (
        2 * (len(content) - len(content.decode("utf-8", "ignore").encode())) < high
    ):  # most of it is UTF-8
        raise UserError(
            f"{path}, line {line}: broken UTF-8; correct it, or name its encoding in data.encoding"
        )
    # GB18030 writes a Chinese character as two bytes, the first above 0x80: an accented letter of latin-1 stands alone
    alone = len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", content))
    runs = len(re.findall(rb"[\x80-\xff]{2,}", content))
    try:
        if alone < runs:
            content.decode("gb18030")
            return "gb18030"
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    raise UserError(
        f"{path}, line {line}: neither UTF-8 nor GB18030; name its encoding in data.encoding, e.g. latin-1"
    )


def json_rows(path: Path, text: str) -> Table:
    """One JSON object a line; numbers and true as they are written, null and what an object lacks as ""."""
    objects = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_float=str, parse_int=str)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); write one object a line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: not an object with named columns; write one object a line"
            )
        objects.append({key: _cell(value) for key, value in row.items()})
    header = list(dict.fromkeys(key for row in objects for key in row))
    return Table(header, [[row.get(key, "") for key in header] for row in objects])


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode(
        "utf-8"
    )  # JSON can spell half a character, which no file can hold


def column(table: Table, path: Path, name: str, fix: str) -> list[str]:
    """The cells of a column, whatever spaces or capitals its header has. UserError names the columns, and the fix."""
    exact = [i for i, title in enumerate(table.header) if title == name]
    alike = [
        i for i, title in enumerate(table.header) if title.strip().lower() == name.strip().lower()
    ]
    found = exact or alike
    if not found:
        raise UserError(f"{path} has no column {name!r}; it has: {show(table.header)}. {fix}")
    if len(found) > 1:
        titles = " and ".join(repr(table.header[i]) for i in found)
        raise UserError(
            f"{path} has {len(found)} columns for the name {name!r}, {titles}: rename or remove one"
        )
    return [row[found[0]] for row in table.rows]


def show(names: list[str]) -> str:
    """At most ten names, a long one cut: the header of a file without a header is a review."""
    short = [name if len(name) <= 40 else name[:37] + "..." for name in names[:10]]
    return ", ".join(short + ["..."] * (len(names) > 10))
