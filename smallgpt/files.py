"""Files: our own, written at once; what the first bytes of one say; hashes of what they hold."""

import codecs
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple


def write_atomic(path: Path, content: str | bytes, shared: bool = False) -> None:
    """Write a small file at once: a reader, in another process or after a crash, finds the old
    content or the new.

    shared: other processes may be writing the same file, and one of them wins."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    writer = f".{os.getpid()}" if shared else ""
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def expand_user(path: str) -> Path:
    """The path with ~ or ~name replaced by that user's folder; ~$book.csv, no user, stays."""
    return Path(os.path.expanduser(path))


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """What a JSON file of our own holds; None where it is missing or damaged: the caller makes it
    again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_cache(path: Path, content: Any) -> None:
    """Write a file that `read_json` reads; several processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1), shared=True)


# ---- what the first bytes of a file say


class Kind(NamedTuple):
    """What a file is that is no plain text."""

    family: Literal["archive", "binary", ""]  # an archive is to be unpacked
    name: str  # as in "x.txt is ...": a zip archive, a PDF document


HEAD = 512  # bytes that decide it
GZIP = Kind("archive", "compressed with gzip")
TWICE = Kind("archive", "compressed twice")
ZIP = Kind("archive", "a zip archive")
BZIP2 = Kind("archive", "compressed with bzip2")
TAR = Kind("archive", "a tar archive")
PARQUET = Kind("binary", "a Parquet file")
UNKNOWN = Kind("", "")  # perhaps text

KINDS = {
    b"\x1f\x8b": GZIP,
    b"PK\x03\x04": ZIP,
    b"PK\x05\x06": ZIP,  # an empty one
    b"7z\xbc\xaf": Kind("archive", "a 7z archive"),
    b"Rar!\x1a": Kind("archive", "a rar archive"),
    b"\xfd7zXZ": Kind("archive", "compressed with xz"),
    b"\x28\xb5\x2f\xfd": Kind("archive", "compressed with zstd"),
    b"PAR1\x15": PARQUET,  # PAR1 alone may be a word
    b"\x93NUMPY": Kind("binary", "a NumPy array"),
    b"\x80\x02": Kind("binary", "a pickle"),
    b"\x80\x03": Kind("binary", "a pickle"),
    b"\x80\x04": Kind("binary", "a pickle"),
    b"\x80\x05": Kind("binary", "a pickle"),
    b"ARROW1\0\0": Kind("binary", "an Arrow file"),
    b"\x89HDF": Kind("binary", "an HDF5 file"),
    b"SQLite format 3\0": Kind("binary", "an SQLite database"),
    b"\x89PNG": Kind("binary", "a PNG image"),
    b"\xff\xd8\xff": Kind("binary", "a JPEG image"),
    b"GIF87a": Kind("binary", "a GIF image"),
    b"GIF89a": Kind("binary", "a GIF image"),
    b"%PDF-": Kind("binary", "a PDF document"),
    b"\xd0\xcf\x11\xe0": Kind("binary", "an Office document"),
    b"\x7fELF": Kind("binary", "a program"),
}
BYTE_ORDER_MARKS = {  # the longer mark first: the one of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def kind_of(head: bytes) -> Kind:
    """What a file with these first HEAD bytes is; UNKNOWN may be text."""
    for mark, kind in KINDS.items():
        if head.startswith(mark):
            return kind
    if head.startswith(b"BZh") and head[4:7] == b"1AY":  # between them its level, 1 to 9
        return BZIP2
    if head[257:262] == b"ustar":
        return TAR
    return UNKNOWN


def kind_inside(head: bytes) -> Kind:
    """As kind_of, of what was packed in a .gz or .zip."""
    kind = kind_of(head)
    return TWICE if kind == GZIP else kind


def marked_encoding(head: bytes) -> str:
    """The encoding that the byte-order mark of a text names, "" without one."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    return ""


# ---- hashes


def hash_file(path: Path) -> str:
    """The sha256 of a file, read to its end."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path], index_file: Path) -> dict[Path, str]:
    """The sha256 of each file that is there, "" of one that cannot be read.

    A file is not read again while its size and time are those in the index."""
    index = read_json(index_file)  # path -> [size, time, sha256]
    if not isinstance(index, dict):
        index = {}
    known = dict(index)
    hashes = {}
    for path in paths:
        try:
            if not path.is_file():
                continue
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            entry = index.get(str(path))
            if not isinstance(entry, list) or len(entry) != 3 or entry[:2] != stamp:
                entry = [*stamp, hash_file(path)]
            index[str(path)] = entry
            hashes[path] = entry[2]
        except OSError:
            hashes[path] = ""
    if index != known:
        write_cache(index_file, index)
    return hashes


def digest(*parts: Any) -> str:
    """A short hash of values that JSON can write: the name of what was made from them."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def unit_hash(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone; what is below a fraction is
    in its split."""
    key = str(seed).encode()
    found = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, key=key)
    return int.from_bytes(found.digest(), "big") / 2**64


def checksum(file: Path) -> int:
    """The CRC-32 of a file. It finds damage, not forgery, at more than the speed of a disk."""
    found = 0
    with open(file, "rb") as content:
        for chunk in iter(partial(content.read, 1 << 20), b""):
            found = zlib.crc32(chunk, found)
    return found
