"""Where this process runs: ranks, device, precision, compilation; start-up and teardown of the process group.

Ranks come from torchrun's environment and nowhere else. RANK decides who writes and what is sampled; LOCAL_RANK only
chooses the GPU.
"""

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from smallgpt.console import UserError
from smallgpt.hardware import choose_device


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums of each value over all processes, in float64. A collective: every rank must call it."""
        if self.size == 1:
            return [float(v) for v in values]
        device = self.device if self.device.type == "cuda" else "cpu"
        t = torch.tensor(values, dtype=torch.float64, device=device)
        torch_dist.all_reduce(t)
        return t.tolist()

    def seed(self, seed: int, step: int) -> None:
        """Seed torch for one step of this process. All randomness of a run is a function of (seed, step, rank): there
        is nothing to save, and resuming is exact."""
        torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + self.rank) % 2**63)

    def must_agree(self, files: str, *values: float) -> None:
        """UserError unless all processes hold the same values, which they read from these files. A collective."""
        if self.sum(*values) != [value * self.size for value in values]:
            raise UserError(f"the processes see different files: all machines must share {files}")


@contextmanager
def start(device: str) -> Iterator[World]:
    """Join the process group torchrun describes (gloo on CPU, nccl on CUDA), or run alone without one.

    On an error the group is not torn down politely: the other ranks may be inside a collective this one will never
    enter, and torchrun ends them all when this process exits.
    """
    env = os.environ
    missing = [
        k
        for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if k not in env
    ]
    if "RANK" not in env:
        yield World(0, 1, choose_device(device))
        return
    if missing:
        raise UserError(
            f"RANK is set but {', '.join(missing)} is not: start the script with torchrun"
        )
    local_rank = int(env["LOCAL_RANK"])
    if device == "mps":
        raise UserError(
            "device=mps works in one process only: start without torchrun, or use device=cpu"
        )
    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    where = choose_device(device, local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "nccl" if where.type == "cuda" else "gloo"
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the group warns about a device id that we set on the line above
        torch_dist.init_process_group(
            backend, timeout=timedelta(minutes=30), device_id=where if backend == "nccl" else None
        )
    world = World(int(env["RANK"]), int(env["WORLD_SIZE"]), where)
    if world.sum(1.0) != [
        world.size
    ]:  # a self-test: a wrong network set-up shows here, not in the middle
        raise UserError(
            "not all processes answer: check the master address, the firewall and NCCL_SOCKET_IFNAME"
        )
    yield world
    torch_dist.destroy_process_group()


class StopRequest:
    """SIGTERM and SIGINT ask the loop to finish its step, save and leave; a later one ends at once.

    Not one that follows within two seconds: a scheduler and torchrun may each pass on the same request.
    """

    def __enter__(self) -> "StopRequest":
        self.signal, self.time = 0, 0.0
        self.before = {
            sig: signal.signal(sig, self.request) for sig in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def request(self, number: int, frame: object) -> None:
        if not self.signal:
            self.signal, self.time = number, time.monotonic()
        elif time.monotonic() - self.time > 2:
            self.__exit__()
            signal.raise_signal(number)

    def __exit__(self, *exc: object) -> None:
        for sig, handler in self.before.items():
            signal.signal(sig, handler)
