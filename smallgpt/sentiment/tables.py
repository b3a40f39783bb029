"""Tables of strangers: CSV, TSV, JSON Lines and Parquet files, also in a .gz or alone in a .zip.

The first bytes of a file decide what it is, not its name. Encoding, separator, quoting and escapes
are found out, or named in the settings. What was guessed stands in the table's notes.
"""

import csv
import functools
import gzip
import io
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from smallgpt import files
from smallgpt.console import UserError
from smallgpt.parquet import ClassNames, class_names, open_parquet

SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|"}
EAST_ASIAN = ("big5", "shift_jis", "euc-kr", "euc-jp", "gb18030")
NO_TEXT = {list: "a list", dict: "an object", bytes: "bytes"}  # in JSON and Parquet
# The limit of one unpacked file: a small .gz or .zip can hold more than a machine's memory.
MAX_BYTES = 4 << 30
csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 131,072 characters


class Columns(NamedTuple):
    """Titles of columns."""

    text: str
    pair: str = ""  # a second text, "" = there is none
    label: str = ""


@dataclass
class Table:
    """All cells of a file as text, as they are written. Every row is as long as the header."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)  # what was guessed about the file
    # column -> where it first holds something that is no text, and what
    nested: dict[str, tuple[str, str]] = field(default_factory=dict)
    header_is_a_line: bool = False  # of the file, and perhaps one that was meant as a row
    guess: Columns | None = None  # which columns are what, where the file lets one guess

    def column(self, name: str, fix: str) -> list[str]:
        """The cells of a column, whatever spaces or capitals its header has.

        UserError names the columns that there are, and the fix."""
        exact = [i for i, title in enumerate(self.header) if title == name]
        wanted = name.strip().lower()
        alike = [i for i, title in enumerate(self.header) if title.strip().lower() == wanted]
        found = exact or alike
        if not found:
            raise UserError(
                f"{self.path} has no column {name!r}; it has: {show(self.header)}. {fix}"
            )
        if len(found) > 1:
            titles = " and ".join(repr(self.header[i]) for i in found)
            raise UserError(
                f"{self.path} has {len(found)} columns for the name {name!r}, {titles}: "
                "rename or remove one"
            )
        title = self.header[found[0]]
        if title in self.nested:
            place, kind = self.nested[title]
            raise UserError(
                f"{self.path}, {place}: the column {title!r} holds {kind}; write a text instead"
            )
        return [row[found[0]] for row in self.rows]


def show(names: list[str]) -> str:
    """At most ten names, a long one cut: the header of a file without a header is a review."""
    shown = []
    for name in names[:10]:
        short = name if len(name) <= 40 else name[:37] + "..."
        shown.append(repr(short) if "," in short else short)
    if len(names) > 10:
        shown.append("...")
    return ", ".join(shown)


def read_table(
    path: Path,
    encoding: str = "auto",
    separator: str = "auto",
    quoting: str = "auto",
    escape: str = "auto",
    header: bool = True,
) -> Table:
    """All rows of a file, in its order; blank ones do not count.

    encoding: auto = by the byte-order mark, else UTF-8, UTF-16 or GB18030 (of which GBK is a part).
    separator: auto = what a line `sep=;` names, else the header's most frequent.
    quoting: auto = quotes enclose cells; between tabs only if they evidently do.
    escape: auto = backslashes are text; before quotes they escape where nothing else can be read.
    header: False = the first line is a row, and the columns are named 1, 2, ...

    UserError names the file, the line, what is wrong and the fix."""
    if files.kind_of(first_bytes(path)) == files.PARQUET:
        refuse_no_header(path, header)
        return parquet_table(path)
    name, content = unpack(path)
    kind = files.kind_inside(content)
    if kind == files.PARQUET:
        refuse_no_header(path, header)
        return parquet_table(path, io.BytesIO(content))
    if kind.family == "archive":  # in a .gz or .zip, or of a kind that is not read here
        raise UserError(f"{path} is {kind.name}: unpack it")
    if kind.family == "binary":
        raise UserError(f"{path} is {kind.name}: save its table as CSV")
    notes: list[str] = []
    if encoding == "auto":
        encoding, guessed = find_encoding(path, content)
        if guessed:
            notes.append(f"{path.name}: guessed data.encoding={encoding}")
    text = decode(path, content, encoding)
    if not text.strip():
        raise UserError(f"{path} is empty")
    if is_json(name, text):
        refuse_no_header(path, header)
        return json_table(path, text, notes)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = line_of(text, text.index("\0"))
        notes.append(f"{path.name}, line {line}: a NUL character, kept as part of the text")
    return delimited_table(path, text, Options(separator, quoting, escape, header), notes)


def refuse_no_header(path: Path, header: bool) -> None:
    """UserError for data.header=false where each value has a name of its own."""
    if not header:
        raise UserError(f"{path} names its columns: leave out data.header=false")


def line_of(text: str | bytes, position: int) -> int:
    """The number of the line, from 1, that a position is in."""
    newline = "\n" if isinstance(text, str) else b"\n"
    return text.count(newline, 0, position) + 1


# ---- bytes


def first_bytes(path: Path) -> bytes:
    """Those that tell what a file is."""
    try:
        with open(path, "rb") as file:
            return file.read(files.HEAD)
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem.strerror}") from None


def unpack(path: Path) -> tuple[str, bytes]:
    """The name and bytes of a file, of what a .gz holds, or of the only file in a .zip.

    Packed files are known by their first bytes."""
    kind = files.kind_of(first_bytes(path))
    try:
        if kind == files.ZIP:
            return unzip(path)
        with gzip.open(path) if kind == files.GZIP else open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as problem:
        # RuntimeError: the zip is encrypted
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"cannot read {path}: {reason}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} holds more than {MAX_BYTES >> 30} GiB")
    return path.stem if path.suffix.lower() == ".gz" else path.name, content


def unzip(path: Path) -> tuple[str, bytes]:
    """The name and bytes of the only file in a .zip."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        members = [each for each in members if not each.filename.startswith("__MACOSX")]
        names = [member.filename for member in members]
        if "xl/workbook.xml" in names or "content.xml" in names:
            raise UserError(f"{path} is a spreadsheet: save the sheet as CSV")
        if len(members) != 1:
            raise UserError(
                f"{path} holds {len(members)} files ({show(names)}): unpack it, and name the file "
                "to read"
            )
        if members[0].file_size > MAX_BYTES:
            raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 30} GiB")
        return names[0], archive.read(members[0])


# ---- bytes -> text


def decode(path: Path, content: bytes, encoding: str) -> str:
    """The text of the bytes, without a byte-order mark."""
    try:
        return content.decode(encoding).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode(encoding, "replace")
        line = line_of(before, len(before))
        raise UserError(
            f"{path}, line {line}: not {encoding}; name its encoding in data.encoding"
        ) from None
    except (LookupError, UnicodeError):
        raise UserError(
            f"there is no encoding {encoding!r}: use e.g. utf-8, gb18030, big5, utf-16 or latin-1"
        ) from None


def find_encoding(path: Path, content: bytes) -> tuple[str, bool]:
    """The encoding of the bytes, and whether it is a guess that can be wrong."""
    marked = files.marked_encoding(content)
    if marked:
        return marked, False
    utf16 = find_utf16(content)
    if utf16:
        return utf16, True
    try:
        content.decode("utf-8")
        return "utf-8", False
    except UnicodeDecodeError as error:
        line = line_of(content, error.start)
    if fits(content, "gb18030") and reads_like_chinese(content.decode("gb18030")):
        return "gb18030", True
    if mostly_utf8(content):
        raise UserError(
            f"{path}, line {line}: broken UTF-8; correct it, or name its encoding in data.encoding"
        )
    if b"\0" in content:
        line = line_of(content, content.index(b"\0"))
        raise UserError(
            f"{path}, line {line}: a NUL byte; the file is neither UTF-8 nor UTF-16 text"
        )
    proposed = [encoding for encoding in EAST_ASIAN if fits(content, encoding)]
    if mostly_lone_bytes(content):
        proposed.append("cp1252")
    raise UserError(
        f"{path}, line {line}: neither UTF-8 nor GB18030; name its encoding in "
        f"data.encoding, such as {' or '.join(proposed or EAST_ASIAN)}"
    )


def fits(content: bytes, encoding: str) -> bool:
    """Whether all bytes mean something in this encoding."""
    try:
        content.decode(encoding)
        return True
    except UnicodeDecodeError:
        return False


def find_utf16(content: bytes) -> str:
    """The name of UTF-16 without a byte-order mark, "" for anything else."""
    zeros = content.count(0)  # each ASCII character in UTF-16, such as a separator, has one
    is_ascii_with_zeros = zeros < 0.4 * len(content) and fits(content, "utf-8")
    if not zeros or is_ascii_with_zeros:
        return ""
    for encoding in ("utf-16-le", "utf-16-be"):
        # in the wrong byte order, a newline is another character
        if fits(content, encoding) and "\n" in content.decode(encoding):
            return encoding
    return ""


def mostly_utf8(content: bytes) -> bool:
    """Whether most bytes beyond ASCII are part of UTF-8 characters, and a few are broken."""
    beyond_ascii = len(re.findall(rb"[\x80-\xff]", content))
    broken = len(content) - len(content.decode("utf-8", "ignore").encode())
    return 2 * broken < beyond_ascii


def mostly_lone_bytes(content: bytes) -> bool:
    """Whether bytes beyond ASCII mostly stand alone, as the accented letters of latin-1 do.

    Chinese, Japanese and Korean characters have two bytes, mostly both beyond ASCII."""
    lone = len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", content))
    runs = len(re.findall(rb"[\x80-\xff]{2,}", content))
    return lone >= runs


def reads_like_chinese(text: str) -> bool:
    """Whether what GB18030 makes of some bytes is Chinese, and not nonsense.

    GB2312, its oldest part, has the 3,755 most common characters at the first bytes B0 to D7, in
    the order of their sound. Bytes of other encodings have a meaning in it, too: Big5 and Shift-JIS
    become rare characters, EUC-JP keeps its kana, and EUC-KR becomes common characters of the first
    half of that order only."""
    rare = common = kana = 0
    first_bytes = []  # of different common characters
    for character, count in Counter(text).items():
        if "\u3041" <= character <= "\u30ff":
            kana += count
        elif "\u3400" <= character <= "\u9fff" or "\ue000" <= character <= "\uf8ff":
            first_byte = character.encode("gb2312", "replace")[0]
            if 0xB0 <= first_byte <= 0xD7:
                common += count
                first_bytes.append(first_byte)
            else:
                rare += count
    second_half = sum(first_byte > 0xC8 for first_byte in first_bytes)
    is_korean = len(first_bytes) >= 20 and second_half < 0.05 * len(first_bytes)
    return common > 1.5 * rare and common > 4 * kana and not is_korean


# ---- text -> rows


class Options(NamedTuple):
    """How a delimited file is to be read, as the settings have it; see `read_table`."""

    separator: str
    quoting: str
    escape: str
    header: bool


class Reading(NamedTuple):
    """One way to read a delimited file."""

    separator: str
    quoted: bool  # quotes enclose cells
    escape: str | None
    skip_spaces: bool = False  # those between a separator and a quote
    notes: list[str] = []  # what is guessed in it


class Irregular(Exception):
    """A reading does not fit the file; says where and why."""


def delimited_table(path: Path, text: str, options: Options, notes: list[str]) -> Table:
    """The table in the text of a CSV or TSV file."""
    named, first_line = separator_line(text)
    text = text if first_line == 1 else text.partition("\n")[2]
    if options.separator != "auto":
        separator = SEPARATORS[options.separator]
    elif named:
        separator = named
    else:
        separator = find_separator(text)
        usual = "\t" if ".tsv" in path.suffixes else ","
        if separator != usual and separator in text:
            name = next(name for name, sign in SEPARATORS.items() if sign == separator)
            notes.append(f"{path.name}: guessed data.separator={name}")
    first_problem = ""
    for reading in possible_readings(text, separator, options):
        try:
            rows = list(regular_rows(text, reading, first_line))
        except Irregular as problem:
            first_problem = first_problem or str(problem)
            continue
        notes += [f"{path.name}: {note}" for note in reading.notes]
        return titled(path, rows, options.header, notes)
    raise UserError(f"{path}, {first_problem}")


def separator_line(text: str) -> tuple[str, int]:
    """The separator that a first line `sep=;` names, as Excel writes it, "" without such a line;
    and the number of the line that the table begins in."""
    found = re.match(r'"?sep=([^\w\s"\\]|\t)"?\n', text, re.IGNORECASE)
    return (found[1], 2) if found else ("", 1)


def find_separator(text: str) -> str:
    """The separator that most lines hold as often as the header does, not counting within quotes.

    Of several such, it is the header's most frequent."""
    lines = text.strip("\n ")[:100_000].split("\n")[:100]
    header = unquoted(first_record(lines))
    lines = [unquoted(line) for line in lines if line.strip()]

    def evidence(separator: str) -> tuple[bool, int, int]:
        in_header = header.count(separator)
        agreeing = sum(line.count(separator) == in_header for line in lines)
        return in_header > 0, agreeing, in_header

    return max(SEPARATORS.values(), key=evidence)


def first_record(lines: list[str]) -> str:
    """The first line, with those that follow it inside quotes."""
    for end in range(1, 10):
        record = "\n".join(lines[:end])
        if record.count('"') % 2 == 0:
            return record
    return lines[0]


def unquoted(line: str) -> str:
    """The line without what stands between quotes."""
    return re.sub(r'"(?:[^"]|"")*"', "", line)


def possible_readings(text: str, separator: str, options: Options) -> list[Reading]:
    """The ways to read the text that the options leave open, the most likely first."""
    escape = "\\" if options.escape == "backslash" else None
    quoted = options.quoting == "true"
    notes: list[str] = []
    if options.quoting == "auto":
        quoted = separator != "\t" or quotes_enclose_cells(text, separator)
        if quoted and separator == "\t":
            notes = ["guessed data.quoting=true"]
    if not quoted:
        return [Reading(separator, False, escape)]
    spaces = "left out the spaces before quotes"
    backslash = "guessed data.escape=backslash"
    readings = [
        Reading(separator, True, escape, False, notes),
        Reading(separator, True, escape, True, [*notes, spaces]),
    ]
    if options.escape == "auto" and '\\"' in text:
        readings += [
            Reading(separator, True, "\\", False, [*notes, backslash]),
            Reading(separator, True, "\\", True, [*notes, backslash, spaces]),
        ]
    return readings


def quotes_enclose_cells(text: str, separator: str) -> bool:
    """Whether quotes between tabs are evidently no part of the text.

    They are if each encloses a whole cell, and either some quotes inside are doubled or all rows
    have such cells."""
    rows = [line for line in text.split("\n") if line.strip()][1:]
    quoted_rows = [row for row in rows if '"' in row]
    doubled = False
    for row in quoted_rows:
        for cell in row.split(separator):
            if '"' in cell and not re.fullmatch(r'\s*"(?:[^"]|"")*"\s*', cell):
                return False
            doubled = doubled or '""' in cell.strip()[1:-1]
    return bool(quoted_rows) and (doubled or len(quoted_rows) == len(rows))


def regular_rows(text: str, reading: Reading, first_line: int) -> Iterator[list[str]]:
    """The rows that are not blank. Irregular if the reading does not fit them."""
    # strict: a quote that is never closed is an error, not one cell with the rest of the file in it
    reader = csv.reader(
        io.StringIO(text, newline="\n"),
        delimiter=reading.separator,
        quoting=csv.QUOTE_MINIMAL if reading.quoted else csv.QUOTE_NONE,
        escapechar=reading.escape,
        skipinitialspace=reading.skip_spaces,
        strict=True,
    )
    width = 0
    start = first_line  # the line that the row begins in
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                width = width or len(row)
                check_row(row, width, reading, start)
                yield row
            start = first_line + reader.line_num
    except csv.Error as error:
        fix = "set data.separator"
        if reading.quoted:
            fix = "set data.quoting=false if quotes mean nothing here"
        raise Irregular(f"line {start}: {error}; correct its quotes, or {fix}") from None


def check_row(row: list[str], width: int, reading: Reading, line: int) -> None:
    """Irregular if a row is not as long as the first, or if it has enclosing quotes as text."""
    if len(row) != width:
        raise Irregular(
            f"line {line}: {len(row)} cells, the first line has {width}; correct it, name its "
            "data.separator, or set data.quoting to true or false"
        )
    if not reading.quoted:
        return
    for cell in row:
        if re.fullmatch(r'\s+"(?:[^"]|"")*"\s*', cell):
            raise Irregular(
                f"line {line}: a space stands before the quote of {show([cell.strip()])}; remove "
                "it, or set data.quoting=false if quotes mean nothing here"
            )


def titled(path: Path, rows: list[list[str]], header: bool, notes: list[str]) -> Table:
    """The table of the rows. The first is the header or, without one, a row like the others."""
    if header:
        if len(rows) < 2:
            raise UserError(f"{path} has no rows below its header")
        return Table(path, rows[0], rows[1:], notes, header_is_a_line=True)
    if not rows:
        raise UserError(f"{path} has no rows")
    numbers = [str(i) for i in range(1, len(rows[0]) + 1)]
    return Table(path, numbers, rows, notes, guess=columns_without_header(rows))


def columns_without_header(rows: list[list[str]]) -> Columns | None:
    """One or two texts and a label, which comes first or last: labels repeat, and texts do not."""
    if len(rows[0]) not in (2, 3):
        return None
    n_first = len({row[0] for row in rows})
    n_last = len({row[-1] for row in rows})
    numbers = [str(i) for i in range(1, len(rows[0]) + 1)]
    if n_first <= n_last:
        label, *texts = numbers
    else:
        *texts, label = numbers
    return Columns(*texts, label=label)


# ---- JSON Lines and Parquet


def is_json(name: str, text: str) -> bool:
    """Whether a text begins with an object or a list of them; or has the name of such a file, whose
    mistakes are to be named."""
    begins_like_json = re.match(r'\s*(\{\s*"|\[\s*\{)', text) is not None
    return begins_like_json or name.lower().endswith((".jsonl", ".ndjson", ".json"))


def json_table(path: Path, text: str, notes: list[str]) -> Table:
    """One JSON object a line, or one list of objects; numbers and true as they are written."""
    objects = []
    for place, value in json_values(path, text):
        if not isinstance(value, dict):
            raise UserError(
                f"{path}, {place}: not an object with named columns; write one object a line"
            )
        objects.append((place, value))
    return objects_table(path, objects, notes)


def json_values(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """The place and value of each line, or of each item of a list that the whole file is."""
    parse = functools.partial(json.loads, parse_float=str, parse_int=str)
    if re.match(r"\s*\[\s*\{", text):
        try:
            values = parse(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        for number, value in enumerate(values, 1):
            yield f"item {number}", value
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); write one object a line"
            ) from None
        yield f"line {number}", value


def parquet_table(path: Path, content: BinaryIO | None = None) -> Table:
    """The table of a Parquet file, or of its content where it was packed.

    Numbers that have names, as Hugging Face's ClassLabels do, are read as these. Such a column, or
    else one called label, is that of the texts beside it."""
    with open_parquet(path, content) as parquet:
        names = class_names(parquet)
        labels = list(names) or [name for name in parquet.columns if name == "label"]
        texts = [name for name in parquet.text_columns if name not in labels]
        records = ((f"row {i}", named(row, names)) for i, row in enumerate(parquet.rows(), 1))
        table = objects_table(path, records, [])
    if not table.rows:
        raise UserError(f"{path} has no rows")
    if len(labels) == 1 and len(texts) in (1, 2):
        table.guess = Columns(*texts, label=labels[0])
    return table


def named(row: dict[str, Any], names: ClassNames) -> dict[str, Any]:
    """The row with its numbers replaced by their names; -1 is no label."""
    found = dict(row)
    for column, known in names.items():
        number = row.get(column)
        if isinstance(number, int) and number < len(known):
            found[column] = known[number] if number >= 0 else None
    return found


def objects_table(path: Path, objects: Iterable[tuple[str, dict]], notes: list[str]) -> Table:
    """The table of objects with named values: what one lacks is "", as null is."""
    columns: dict[str, None] = {}  # in the order in which they are met
    nested: dict[str, tuple[str, str]] = {}
    cells: list[dict[str, str]] = []
    for place, record in objects:
        for name, value in record.items():
            columns.setdefault(name)
            if type(value) in NO_TEXT:
                nested.setdefault(name, (place, NO_TEXT[type(value)]))
        cells.append({name: cell_text(value) for name, value in record.items()})
    rows = []
    for record in cells:
        row = [record.get(name, "") for name in columns]
        rows.append(row)
    return Table(path, list(columns), rows, notes, nested)


def cell_text(value: object) -> str:
    if value is None or type(value) in NO_TEXT:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    # JSON can spell half a character, which no file can hold
    return str(value).encode("utf-8", "replace").decode("utf-8")
