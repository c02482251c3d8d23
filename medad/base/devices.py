"""Where tensors live."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medad.base.errors import ConfigError

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
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device. Raises ConfigError when that GPU is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: this machine has {torch.cuda.device_count()} usable GPUs; use auto or cpu")
    return device


def gpu_count() -> int:
    """GPUs that torch can use on this machine. Makes no context on any of them."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, had no memory left for what was asked."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    # other libraries' allocations on the GPU, and torch's own on the CPU, are plain runtime errors
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks, as PyTorch's CUDA allocator does on a GPU.

    By default every activation above 32 MiB is mapped from the kernel and unmapped again, and faulting those pages in
    costs a third of a CPU training step at 256 px. Other threads' arenas are bounded the same way, hence one arena for
    all. Without glibc this does nothing.
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
    """Within it, the CPU takes numbers below 1e-38 for zero, on this thread and on those of torch that begin there.

    Where a network is sure of flat background, gradients and Adam's second moments fall that low, and each operation on
    such a number costs the CPU a hundred times another.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
