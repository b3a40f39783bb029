"""Files: our own, written at once; what the first bytes of one say; hashes of what they hold."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


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


def digest(*parts: Any) -> str:
    """A short hash of values that JSON can write: the name of what was made from them."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def unit_hash(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone; what is below a fraction is
    in its split."""
    key = str(seed).encode()
    found = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, key=key)
    return int.from_bytes(found.digest(), "big") / 2**64
