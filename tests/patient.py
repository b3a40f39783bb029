"""train.py whose steps take their time, so that much can happen between the first and the last.

SLOW=file torchrun ... tests/patient.py key=value     as long as there is that file
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from smallgpt import console  # noqa: E402
from smallgpt.runs.run import Run  # noqa: E402

log = Run.log


def log_slowly(run: Run, *args: object, **record: float) -> None:
    if Path(os.environ["SLOW"]).exists():
        time.sleep(0.3)
    log(run, *args, **record)


if __name__ == "__main__":
    Run.log = log_slowly
    console.run(train.main)
