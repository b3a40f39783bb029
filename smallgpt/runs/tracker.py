"""A run's curves on a page of SwanLab, Weights & Biases or Trackio.

The page has the numbers that TensorBoard has, and the settings of the run. What these packages
would collect by themselves stays at home: the command, the console, the machine, its packages, the
repository; and of a path only the last name leaves. Whether they send anything is their
own setting: WANDB_MODE=offline, SWANLAB_MODE=offline and a plain Trackio need no network.
"""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from smallgpt.console import UserError
from smallgpt.files import read_json, write_atomic
from smallgpt.parallel.world import PATHS
from smallgpt.runs.metrics import read

TrackerKind = Literal["none", "swanlab", "wandb", "trackio"]
PROJECT = "small-gpt"  # the pages of all runs lie together
FIX = {  # what helps most often where a page cannot be opened
    "swanlab": "run `swanlab login`, or set SWANLAB_MODE=offline",
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
    "trackio": "look at TRACKIO_SPACE_ID and TRACKIO_SERVER_URL, or leave both out",
}


class Page(Protocol):
    """What the packages' own runs have in common."""

    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


def tracker_problems(kind: TrackerKind) -> list[str]:
    """Why this tracker cannot be used, in plain words."""
    if kind == "none" or importlib.util.find_spec(kind):
        return []
    return [f"tracker={kind} needs the package {kind}: pip install {kind}"]


class Tracker:
    """The page of a run: one curve, however often the run was stopped and resumed.

    The page's id is kept in the run's folder. A resumed run repeats the steps after its checkpoint:
    those that the page has are passed over."""

    def __init__(self, kind: TrackerKind, run: Path, settings: dict[str, Any]):
        """Open the page. UserError if the package cannot."""
        kept_file = run / "tracker.json"
        kept = read_json(kept_file)
        ids = kept if isinstance(kept, dict) else {}  # of each kind that was used
        self.last: dict[str, int] = {}  # split -> the last step that the page has
        if kind in ids:
            for split in ("train", "val"):
                self.last[split] = max((record["step"] for record in read(run, split)), default=0)
        page_id = ids.setdefault(kind, secrets.token_hex(4))
        try:
            self.page = OPEN[kind](run, page_id, without_folders(settings))
        except Exception as error:  # each package has its own
            first_line = str(error).partition("\n")[0]
            raise UserError(
                f"tracker={kind} could not begin ({first_line}): {FIX[kind]}, or leave tracker out"
            ) from None
        write_atomic(kept_file, json.dumps(ids))

    def log(self, numbers: dict[str, float], step: int, split: str) -> None:
        """Add numbers of a step, named as in TensorBoard: {"loss/train": 2.3}."""
        if step > self.last.get(split, 0):
            self.page.log(numbers, step=step)

    def close(self) -> None:
        """Wait until what was logged is sent, or written."""
        self.page.finish()


def without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, paths without their folders, which may name people and projects:
    /home/ann/reviews.csv is reviews.csv."""
    found = dict(settings)
    for name in settings.keys() & set(PATHS):
        value = settings[name]
        if isinstance(value, list):
            found[name] = [os.path.basename(path.rstrip("/\\")) for path in value]
        else:
            found[name] = os.path.basename(value.rstrip("/\\"))
    return found


# ---- how each package opens a page, and is kept from collecting more than it is given


def open_swanlab(run: Path, page_id: str, settings: dict[str, Any]) -> Page:
    import swanlab

    collects = ("hardware", "runtime", "requirements", "git", "swanlab", "monitor")
    quiet = swanlab.Settings(
        probe=dict.fromkeys(collects, False),
        terminal={"proxy_type": "none"},
    )
    return swanlab.init(
        project=PROJECT,
        name=run.name,
        id=page_id,
        resume="allow",
        config=settings,
        log_dir=str(run / "swanlog"),
        settings=quiet,
    )


def open_wandb(run: Path, page_id: str, settings: dict[str, Any]) -> Page:
    import wandb

    quiet = wandb.Settings(
        console="off",
        host="-",
        disable_git=True,
        save_code=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    return wandb.init(
        project=PROJECT,
        name=run.name,
        id=page_id,
        resume="allow",
        config=settings,
        allow_val_change=True,  # max_steps may be raised
        dir=str(run),
        settings=quiet,
    )


def open_trackio(run: Path, page_id: str, settings: dict[str, Any]) -> Page:
    import trackio

    return trackio.init(
        project=PROJECT,
        name=f"{run.name}-{page_id}",  # a page is found again by its name
        resume="allow",
        config=settings,
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )


OPEN: dict[str, Callable[[Path, str, dict[str, Any]], Page]] = {
    "swanlab": open_swanlab,
    "wandb": open_wandb,
    "trackio": open_trackio,
}
