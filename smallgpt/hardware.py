"""What this process runs on: device, precision, compilation, memory."""

import ctypes
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from smallgpt.console import UserError

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


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what a tensor frees for the next one. It would give it back to the
    system, which hands it out again zeroed, a page at a time: a tenth of the time of a fine-tuning
    on a CPU (docs/experiments.md)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def memory() -> int:
    """Bytes of memory that this machine, or the container on it, has for programs; 0 = unknown."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return found
    return min(found, int(limit)) if limit.isdecimal() else found


def gpus(device: str) -> int:
    """How many CUDA GPUs programs with this `device` setting may choose from."""
    return torch.cuda.device_count() if device in ("auto", "cuda") else 0


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` = CUDA if there is a GPU, else Apple's MPS, else the CPU, for which malloc is
    prepared. UserError if the named device is not there."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: "
                f"{torch.cuda.device_count()} found; "
                "lower --nproc_per_node or use device=cpu"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps needs a Mac with Apple silicon; use device=cpu")
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def cpu_has_bf16() -> bool:
    """Does this CPU multiply bf16 matrices in hardware (AMX tiles or AVX-512 BF16)? Without, bf16
    is ~10x slower."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    avx = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(amx() or avx())


def has_bf16(device: torch.device) -> bool:
    """Does this device multiply bf16 matrices in hardware?"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_has_bf16()


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The precision of matrix products, and the reason in words. Weights stay in float32 (float64
    for float64)."""
    if name != "auto":
        if name == "float16" and device.type != "cuda":
            raise UserError("dtype=float16 needs a CUDA GPU; use dtype=bfloat16 or dtype=float32")
        if name == "float64" and device.type == "mps":
            raise UserError("dtype=float64 does not exist on mps; use device=cpu")
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        if has_bf16(device):
            return torch.bfloat16, "this GPU has bf16 tensor cores"
        return torch.float16, "this GPU is older than bf16 tensor cores; float16 with loss scaling"
    if device.type == "cpu":
        if has_bf16(device):
            return torch.bfloat16, "this CPU has bf16 matrix instructions"
        return torch.float32, "this CPU has no bf16 matrix instructions (AMX or AVX-512 BF16)"
    return torch.float32, "the safe choice on this device"


def choose_compile(name: str, device: torch.device, steps: int) -> tuple[bool, str]:
    """Whether to run torch.compile, and the reason. `auto`: where it works and the run is long
    enough to pay for it."""
    if name != "auto":
        return name == "true", "as asked"
    if os.name == "nt" or device.type == "mps":
        return False, "not supported here"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return False, "the package triton is missing"
    if device.type == "cpu":
        language = "C++"
        compilers = (os.environ.get("CXX", "g++"), "clang++")
    else:  # triton builds a small C part of each kernel
        language = "C"
        compilers = (os.environ.get("CC", "gcc"), "clang")
    if not any(map(shutil.which, compilers)):
        return False, f"there is no {language} compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return False, "Python's header files are missing (python3-dev)"
    if device.type == "cpu" and steps < 500:
        return False, "a run of under 500 steps ends before compiling (about 20 s) pays"
    return True, "a long run"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in dtype, everything delicate in float32; does nothing for float32 and
    float64."""
    is_low = dtype in (torch.bfloat16, torch.float16)
    if not is_low:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the weights, given that of matrix products."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """torch.float32 -> float32"""
    return str(dtype).removeprefix("torch.")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of a known GPU in half precision, 0.0 otherwise."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    known = [key for key in PEAK_FLOPS if words.issuperset(key.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else 0.0
