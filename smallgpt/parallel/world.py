"""The processes of a run: ranks, sums over them, start-up and teardown, and stopping by a signal.

Ranks come from torchrun's environment and nowhere else. RANK decides who writes and what is
sampled; LOCAL_RANK only chooses the GPU.
"""

import hashlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed
from torch.distributed import distributed_c10d

from smallgpt.console import UserError
from smallgpt.hardware import choose_device
from smallgpt.parallel.peers import Peers
from smallgpt.parallel.roll_call import choose_interface, meet

PULSE = 0.5  # seconds after which the others hear that the main process still works
T = TypeVar("T")
# machines may see the same files in different places
PATHS = ("out_dir", "data.path", "data.test_path", "data.cache", "trunk", "resume", "init_from")


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device
    timeout: int = 600  # seconds that another process may be waited for

    @property
    def main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums of each value over all processes, in float64. A collective: every rank calls it."""
        if self.size == 1:
            return [float(value) for value in values]
        device = self.device if self.device.type == "cuda" else "cpu"
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def by_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main process, for every process. A collective.

        The work may take longer than `timeout`: it has a thread, and meanwhile the processes go on
        to exchange that they are there. It must not communicate itself."""
        if self.size == 1:
            return work()
        future = in_thread(work) if self.main else None
        working = True
        while working:
            if future:
                wait([future], timeout=PULSE)
            is_working = future is not None and not future.done()
            working = self.sum(is_working)[0] > 0
        result = [future.result() if future else None]
        torch.distributed.broadcast_object_list(result)
        return result[0]

    def must_agree(self, files: str, *values: float) -> None:
        """UserError unless all processes hold the same values, which they read from these files.
        A collective."""
        if self.sum(*values) != [value * self.size for value in values]:
            raise UserError(f"the processes see different files: all machines must share {files}")


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Begin the work in a thread that does not hold up the end of the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised again by future.result()
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextmanager
def start(
    device: str, timeout: int = 600, settings: dict[str, Any] | None = None
) -> Iterator[World]:
    """Join the process group torchrun describes (gloo on CPU, nccl on CUDA), or run alone.

    timeout: seconds that another process may be waited for. settings: must be the same in all
    processes, except for PATHS. UserError where a process is missing or started differently.

    An error in the body is raised on; where it is only the consequence of another process's end,
    UserError or PeerError names that one. On an error the group is not torn down politely: the
    other ranks may be inside a collective this one will never enter, and torchrun ends them all
    when this process exits.
    """
    if "RANK" not in os.environ:
        yield World(0, 1, choose_device(device))
        return
    wanted = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set but {', '.join(missing)} is not: start it with torchrun")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise UserError(f"{name}={os.environ[name]} is no number: start it with torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = World(rank, size, device_of_rank(device), timeout)
    settings = settings or {}
    peers = meet(rank, size, timeout, facts_of(settings))
    try:
        said = choose_interface(peers.me, peers.everyone)
        if said and world.main:
            print(f"network  {said}", flush=True)
        join_group(world, peers, offload=settings.get("mesh.offload", False))
        yield world
        peers.leave()
    except Exception as error:
        cause = peers.explain(error)
        if cause is error:
            raise
        raise cause from error
    torch.distributed.destroy_process_group()


def facts_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What must be alike in all processes: they would train something else, or wait for ever."""
    program = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name.partition(".")[0] in ("smallgpt", "model", "train", "__main__"):
            program.update(Path(file).read_bytes())
    facts = {"torch": torch.__version__, "the program": program.hexdigest()[:8]}
    return facts | {name: value for name, value in settings.items() if name not in PATHS}


def device_of_rank(device: str) -> torch.device:
    """The device of this one of several processes."""
    if device == "mps":
        raise UserError(
            "device=mps works in one process only: start without torchrun, or use device=cpu"
        )
    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    return choose_device(device, int(os.environ["LOCAL_RANK"]))


def join_group(world: World, peers: Peers, offload: bool) -> None:
    """Connect this process with the others that answered, and try the connection.

    offload: will weights lie in CPU memory beside GPUs?"""
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
        peers.gpu = world.device
    backend = "nccl" if on_gpu else "gloo"
    if on_gpu and offload:
        backend = "cpu:gloo,cuda:nccl"  # what lies in CPU memory goes by gloo
    limit = timedelta(seconds=world.timeout)
    # of the groups that a mesh or an asynchronous save makes later: torch's own is 30 minutes
    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a device id was set on the line above
        torch.distributed.init_process_group(
            backend,
            store=peers.store,
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
            device_id=world.device if on_gpu else None,
        )
    world.sum(1.0)  # a wrong network set-up shows here, not in the middle


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop. SIGHUP, of an SSH session that drops, is one unless it
    was ignored from the start: under nohup a run outlives its session."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    return numbers


class StopRequest:
    """SIGTERM, SIGINT and SIGHUP ask the loop to finish its step, save and leave; a later one ends
    the process at once. A SIGHUP that nohup ignores stays ignored.

    Not one that follows within two seconds: a scheduler and torchrun may each pass on the same
    request. `signal` is the number of the first one, 0 before it.
    """

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        self.time = 0.0
        self.handlers = {number: signal.signal(number, self.request) for number in stop_signals()}
        return self

    def request(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            self.time = time.monotonic()
        elif time.monotonic() - self.time > 2:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
