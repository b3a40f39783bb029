"""What every script shares at its edges: a user's mistake, exit statuses, UTF-8, broken pipes."""

import errno
import gc
import io
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A user's mistake: it names the thing and the fix. `run` shows it without a traceback."""


class PeerError(Exception):
    """This process had to stop because of another one. told: that one has said why."""

    def __init__(self, sentence: str, told: bool = False):
        super().__init__(sentence)
        self.told = told


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with the status it returns.

    A user's mistake is one sentence and status 2; a bug of ours shows its traceback."""
    gc.freeze()  # what is imported stays: to search it for garbage costs a quarter second at exit
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # files and pipes are UTF-8 everywhere; a terminal has its own encoding, and may show ?
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")
    try:
        status = main()
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that left (`| head`) shows here, not at exit
    except KeyboardInterrupt:
        status = 130  # 128 + SIGINT, as a shell reports it; 141, below, is SIGPIPE
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is still buffered
        os.dup2(nowhere, sys.stdout.fileno())
        status = 141
    except PeerError as error:
        report(str(error), told=error.told)
        status = 1
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        report(sentence)
        status = 2
    sys.exit(status)


def explain(error: Exception) -> str | None:
    """What a user can do about the error, in one sentence; None if it is a bug of ours."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error}): make room, and give the same command again"
    if isinstance(error, UserError | OSError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
        lower = "lower micro_batch (fine-tuning: micro_tokens), or the model"
        return f"the GPU's memory is full: {lower}"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        # how Python spells the bytes of a file name that are not UTF-8
        return f"{error.object!r} is not UTF-8: rename the file, or give the text as UTF-8"
    return None


def report(sentence: str, told: bool = False) -> None:
    """Print the sentence to stderr, under torchrun once for all ranks. told: one has printed it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" and not told:
        print(f"error: {sentence}", file=sys.stderr)
        return
    time.sleep(2)  # mostly all ranks fail alike: rank 0 says so, and torchrun ends this one
    print(f"(process {rank}: {sentence})", file=sys.stderr)


def shell_word(path: str | Path) -> str:
    """A path as it is typed into a shell: in quotes if it holds a space or a sign of the shell."""
    text = str(path)
    if os.name == "nt":
        return f'"{text}"' if " " in text else text
    return shlex.quote(text)


def open_stdin() -> io.TextIOBase:
    """Standard input. UserError where it is closed, as by `<&-`."""
    if sys.stdin is None:
        raise UserError("standard input is closed: start this in a terminal, or pipe text into it")
    return sys.stdin
