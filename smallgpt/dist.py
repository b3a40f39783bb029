"""Where this process runs: ranks, device, precision, compilation; start-up and teardown of the process group.

Ranks come from torchrun's environment and nowhere else. RANK decides who writes and what is sampled; LOCAL_RANK only
chooses the GPU.
"""

import ctypes
import importlib.util
import os
import shutil
import signal
import sysconfig
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as torch_dist

from smallgpt.settings import UserError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# dense bf16 tensor-core peaks, vendors' data sheets
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "GH200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


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


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what a tensor frees for the next one. It would give it back to the system, which hands it
    out again zeroed, a page at a time: a tenth of the time of a fine-tuning on a CPU (docs/experiments.md)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def gpus(device: str) -> int:
    """How many CUDA GPUs programs with this `device` setting may choose from."""
    return torch.cuda.device_count() if device in ("auto", "cuda") else 0


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` = CUDA if there is a GPU, else Apple's MPS, else the CPU, for which malloc is prepared. UserError if the
    named device is not there."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found; "
                "lower --nproc_per_node or use device=cpu"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps needs a Mac with Apple silicon; use device=cpu")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def cpu_has_bf16() -> bool:
    """Does this CPU multiply bf16 matrices in hardware (AMX tiles or AVX-512 BF16)? Without, bf16 is ~10x slower."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    avx = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(amx() or avx())


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of matrix products, and the reason in words. Weights stay in float32 (float64 for float64)."""
    if name != "auto":
        if name == "float16" and device.type != "cuda":
            raise UserError("dtype=float16 needs a CUDA GPU; use dtype=bfloat16 or dtype=float32")
        if name == "float64" and device.type == "mps":
            raise UserError("dtype=float64 does not exist on mps; use device=cpu")
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU has bf16 tensor cores"
        return torch.float16, "this GPU is older than bf16 tensor cores; float16 with loss scaling"
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16, "this CPU has bf16 matrix instructions"
    if device.type == "cpu":
        return torch.float32, "this CPU has no bf16 matrix instructions (AMX or AVX-512 BF16)"
    return torch.float32, "the safe choice on this device"


def choose_compile(name: str, device: torch.device, steps: int) -> tuple[bool, str]:
    """Whether to run torch.compile, and the reason. `auto`: where it works and the run is long enough to pay for it."""
    if name != "auto":
        return name == "true", "as asked"
    if os.name == "nt" or device.type == "mps":
        return False, "not supported here"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return False, "the package triton is missing"
    cpu = device.type == "cpu"  # for a GPU, triton builds a small C part of each kernel
    compilers = (
        (os.environ.get("CXX", "g++"), "clang++") if cpu else (os.environ.get("CC", "gcc"), "clang")
    )
    if not any(map(shutil.which, compilers)):
        return False, f"there is no C{'++' if cpu else ''} compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return False, "Python's header files are missing (python3-dev)"
    if device.type == "cpu" and steps < 500:
        return False, "a run of under 500 steps ends before compiling (about 20 s) pays"
    return True, "a long run"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in dtype, everything delicate in float32; does nothing for float32 and float64."""
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype if low else torch.bfloat16, enabled=low)


def peak_flops(device: torch.device) -> float:
    """Peak bf16 FLOP/s of a known GPU, 0.0 otherwise."""
    if device.type != "cuda":
        return 0.0
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    known = [key for key in PEAK_FLOPS if words.issuperset(key.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else 0.0


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
