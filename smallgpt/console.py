"""What every script shares at its edges: a user's mistake, exit statuses, UTF-8, broken pipes."""

import io
import os
import sys
import time
from collections.abc import Callable


class UserError(Exception):
    """A user's mistake: it names the thing and the fix. `run` shows it without a traceback."""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with the status it returns; a UserError is one message and status 2."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # files and pipes are UTF-8 everywhere, a console may have to show ?
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    try:
        status = main()
        sys.stdout.flush()  # a reader that left (`| head`) shows here, not in a traceback at exit
    except KeyboardInterrupt:
        status = 130  # 128 + SIGINT, as a shell reports it; 141, below, is SIGPIPE
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # where what is still buffered goes
        status = 141
    except (UserError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            if (
                type(error).__name__ != "OutOfMemoryError"
            ):  # torch's, which this module does not import
                raise
            error = UserError(
                "the GPU's memory is full: lower micro_batch (fine-tuning: micro_tokens), or the model"
            )
        if (rank := os.environ.get("RANK", "0")) != "0":
            time.sleep(
                2
            )  # mostly all ranks fail alike: then rank 0 says so, and torchrun ends this one meanwhile
        print(f"error: {error}" if rank == "0" else f"(process {rank}: {error})", file=sys.stderr)
        status = 2
    sys.exit(status)
