"""Slots of devices: one lock file per device, locked with flock. The kernel frees a lock when its holder dies.

A step that needs a device (training, encoding, segmenting) holds its slot. So two steps never fill a GPU's memory
together, whether they belong to one run or to two. On a machine without a GPU, the CPU is the only slot, because such a
step uses all cores. Other steps (hashing, evaluating, reporting) run at the same time.

The child process of a step inherits the lock. If the flow is killed, the device is taken until the child has ended.

The lock files are empty and stay. They are in $ADFLOWS_SLOTS, or else in a folder that all users of this machine share,
below the system's folder for temporary files. $ADFLOWS_PRETEND_GPUS=N simulates N GPUs: tasks are scheduled onto N
slots and computed on the CPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.machine.stopping import StoppedError, stopping
from medad.base.errors import ConfigError
from medad.base.settings import Gpus

POLL_S = 0.05
CPU_NAME = "cpu"
PRETEND_VARIABLE = "ADFLOWS_PRETEND_GPUS"


@dataclass(frozen=True)
class Device:
    """A device, and the values with which a process finds it."""

    name: str
    """Name of the device and its lock, `cpu` or `gpu-N`. It is the same in all processes of this machine."""
    visible: str
    """Value of CUDA_VISIBLE_DEVICES for the process that uses it."""
    torch_name: str
    """Name of the device for torch in that process: `cpu` or `cuda:0`."""

    @property
    def is_gpu(self) -> bool:
        return self.name != CPU_NAME


CPU = Device(CPU_NAME, "", "cpu")


@dataclass(frozen=True)
class Slot:
    """A device in use, and the descriptor of its lock. The lock is held while any copy of the descriptor is open."""

    device: Device
    descriptor: int


def slot_folder() -> Path:
    """Return the folder of the lock files."""
    if own := os.environ.get("ADFLOWS_SLOTS"):
        return Path(own).expanduser().absolute()
    return Path(tempfile.gettempdir()) / "adflows-slots"


def pretended_gpus() -> int | None:
    """Return how many GPUs to simulate, or None for the real ones. Raise ConfigError for a bad value."""
    text = os.environ.get(PRETEND_VARIABLE, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{PRETEND_VARIABLE}={text}: expected a number of GPUs")
    return int(text) if text else None


def gpu_count() -> int:
    """Return the number of usable GPUs, or of simulated ones."""
    if (pretend := pretended_gpus()) is not None:
        return pretend
    from medad.base.devices import gpu_count as usable

    return usable()


def _gpu_device(number: int) -> Device:
    """Return the device of torch's GPU `number`, named by its number or name in the driver."""
    if pretended_gpus() is not None:
        return Device(f"gpu-{number}", "", "cpu")
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    physical = visible[number] if number < len(visible) else str(number)
    name = "".join(character if character.isalnum() else "-" for character in physical)
    return Device(f"gpu-{name}", physical, "cuda:0")


def allowed_devices(gpus: Gpus) -> tuple[Device, ...]:
    """Return the devices that a setting allows. Raise ConfigError for a GPU that does not exist."""
    if gpus == "cpu":
        return (CPU,)
    count = gpu_count()
    if gpus == "auto":
        return tuple(map(_gpu_device, range(count))) or (CPU,)
    if missing := [number for number in gpus if number >= count]:
        raise ConfigError(
            f"gpus: this machine has {count} usable GPUs, so GPU {missing[0]} does not exist; use auto or cpu"
        )
    return tuple(map(_gpu_device, gpus))


def device_count() -> int:
    """Return how many device steps this machine can run at a time."""
    return len(allowed_devices("auto"))


def _open_lock_file(name: str) -> int:
    """Open the lock file for reading. That is enough to lock it, and other users are allowed to."""
    folder = slot_folder()
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            folder.chmod(0o1777)
    path = folder / f"{name}.lock"
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o644)


def _try_lock(name: str) -> int | None:
    descriptor = _open_lock_file(name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def device_slot(gpus: Gpus) -> Iterator[Slot]:
    """Wait for one of the devices that `gpus` allows, and use it inside the `with` block.

    Raises
    ------
    ConfigError
        A requested GPU does not exist, or the folder of locks cannot be used.
    StoppedError
        The flow was cancelled or interrupted.
    """
    devices = allowed_devices(gpus)
    while True:
        for device in devices:
            try:
                descriptor = _try_lock(device.name)
            except OSError as error:
                raise ConfigError(
                    f"{slot_folder()}: device locks cannot be created here ({error.strerror}); set ADFLOWS_SLOTS"
                ) from error
            if descriptor is None:
                continue
            try:
                yield Slot(device, descriptor)
            finally:
                os.close(descriptor)
            return
        if stopping.is_set():
            raise StoppedError
        time.sleep(POLL_S * random.uniform(0.5, 1.5))  # noqa: S311 - so that no process always comes last
