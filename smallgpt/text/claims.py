"""Files that several processes make together: those of a run, and of every machine that shares the
folder.

Who holds the lock beside a file makes it. The lock of a killed process is free at once, so another
one takes over. Waiting for the others is a look at the folder now and then: unlike a collective, it
may last for hours."""

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm

T = TypeVar("T")

HEAD_START = 0.2  # seconds, of rank 0: the work on a single file is then its own, and its bar moves
LONGEST_NAP = 5.0  # seconds between two looks at what the others do
PATIENCE = 1.0  # seconds of waiting that need no words


def is_first() -> bool:
    """The one process of a run that tells the user how far it is."""
    return os.environ.get("RANK", "0") == "0"


def make_together(
    paths: Iterable[Path],
    find: Callable[[Path], T | None],
    make: Callable[[Path, int], T],
    work: str,
    quiet: bool = False,
) -> dict[Path, T]:
    """What is at each of the paths, made by this process or by another.

    `find` gives what is there, None where it must be made. `make` gets the path and the number of
    paths that are not there yet, its own included. `work` says to the user what is waited for."""
    found = {}
    missing = []
    for path in paths:
        there = find(path)
        if there is None:
            missing.append(path)
        else:
            found[path] = there
    if missing and not is_first():
        time.sleep(HEAD_START)
    idle_since = time.monotonic()
    told = quiet or not is_first()
    while missing:
        for path in missing.copy():
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            there = find(path)
            try:
                if there is None:
                    lock.acquire(blocking=False)
                    there = find(path)  # it may have come since
                    if there is None:
                        there = make(path, len(missing))
                        idle_since = time.monotonic()
                found[path] = there
                missing.remove(path)
            except Timeout:
                pass  # another process makes it
            finally:
                lock.release()
        waited = time.monotonic() - idle_since
        if missing and waited > PATIENCE and not told:
            told = True
            line = f"waiting for other processes to {work}: {len(missing)} file(s) left"
            tqdm.write(line, file=sys.stderr)
        if missing:
            time.sleep(min(0.05 + waited / 10, LONGEST_NAP))
    return found
