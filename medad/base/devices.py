"""Devices and memory for torch. The functions that need torch import it, because it takes a second to load."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from medad.base.errors import ConfigError

if TYPE_CHECKING:
    import torch

DRIVER_FILES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
"""Device files of GPU drivers: NVIDIA, its embedded boards, AMD, and Windows. Without one, torch finds no GPU."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEEP_BYTES = 2**31 - 1
OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def pick_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device. Raises ConfigError if the GPU does not exist."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: this machine has {torch.cuda.device_count()} usable GPUs; use auto or cpu")
    return device


def gpu_count() -> int:
    """Return the number of GPUs that torch can use on this machine. No CUDA context is created."""
    if "torch" not in sys.modules and not any(Path(name).exists() for name in DRIVER_FILES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@functools.cache
def gpu_capability() -> float | None:
    """Return the lowest compute capability of this machine's NVIDIA GPUs, such as 8.6. No CUDA context is created.

    None: this machine has none, or the driver's program does not answer.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, encoding="utf-8")
        return min(float(line) for line in done.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU or this machine ran out of memory."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error)
    # a failed allocation by another library on the GPU, or by torch on the CPU, raises a plain RuntimeError
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks, as PyTorch's CUDA allocator does on a GPU.

    By default glibc maps every activation above 32 MiB from the kernel and unmaps it again. The page faults cost a
    third of a CPU training step at 256 px. The arenas of other threads have such a limit too, so all threads share one.
    Without glibc this function does nothing.
    """
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)
            libc.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
            libc.mallopt(M_ARENA_MAX, 1)
        except (OSError, AttributeError):
            return


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Treat numbers below 1e-38 as zero on the CPU, in this thread and in torch threads started inside the block.

    On flat background, gradients and Adam's second moments become that small. An operation on such a number takes the
    CPU a hundred times as long as a normal one.
    """
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def cpu_multiplies_bf16() -> bool:
    """Return whether the CPU has instructions for products in bf16. False where this is not known."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - not a user's file
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())
