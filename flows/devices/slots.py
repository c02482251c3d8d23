"""One slot a device: an flock that the kernel frees when its holder dies, kill -9 included.

A step that keeps a whole device busy (training, encoding, segmenting) holds its slot, so that neither the tasks of one
run nor two runs of one machine fill a GPU's memory together. On a machine without a GPU the CPU is one slot: such a
step uses all cores by itself. Steps that hold none (hashing, evaluating, reporting) go on beside it.

The step's process inherits the lock's descriptor: should the flow be killed, the device is taken until that process is
gone as well, and not a moment longer.

The lock files are in `$ADFLOWS_SLOTS`, else in a folder that all users of this machine share (below the system's folder
for temporary files). They are empty and stay. `$ADFLOWS_PRETEND_GPUS=N` rehearses a machine of N GPUs on one that has
none: tasks are scheduled onto N slots and computed on the CPU.
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
    """A device, and how the process that uses it finds it."""

    name: str
    """`cpu` or `gpu-N`: the same for one GPU in every process of this machine, also of its lock."""
    visible: str
    """What CUDA_VISIBLE_DEVICES is for the process that uses it."""
    torch_name: str
    """How that process calls it: `cpu` or `cuda:0`."""

    @property
    def is_gpu(self) -> bool:
        return self.name != CPU_NAME


CPU = Device(CPU_NAME, "", "cpu")


@dataclass(frozen=True)
class Slot:
    """A device that is held, and the descriptor of its lock: the lock lives as long as any copy of it is open."""

    device: Device
    descriptor: int


def slot_folder() -> Path:
    """Where the lock files are."""
    if own := os.environ.get("ADFLOWS_SLOTS"):
        return Path(own).expanduser().absolute()
    return Path(tempfile.gettempdir()) / "adflows-slots"


def pretended_gpus() -> int | None:
    """How many GPUs this machine is to pretend to have; None: as many as it has. Raises ConfigError."""
    text = os.environ.get(PRETEND_VARIABLE, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{PRETEND_VARIABLE}={text}: expected a number of GPUs")
    return int(text) if text else None


def gpu_count() -> int:
    """GPUs of this machine, pretended ones where it pretends."""
    if (pretend := pretended_gpus()) is not None:
        return pretend
    from medad.base.devices import gpu_count as usable

    return usable()


def _gpu_device(number: int) -> Device:
    """The GPU that torch counts as `number` here, by the number or name that the driver knows it by."""
    if pretended_gpus() is not None:
        return Device(f"gpu-{number}", "", "cpu")
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    physical = visible[number] if number < len(visible) else str(number)
    name = "".join(character if character.isalnum() else "-" for character in physical)
    return Device(f"gpu-{name}", physical, "cuda:0")


def allowed_devices(gpus: Gpus) -> tuple[Device, ...]:
    """The devices that a setting allows. Raises ConfigError for a GPU that is not there."""
    if gpus == "cpu":
        return (CPU,)
    count = gpu_count()
    if gpus == "auto":
        return tuple(map(_gpu_device, range(count))) or (CPU,)
    if missing := [number for number in gpus if number >= count]:
        raise ConfigError(f"gpus: this machine has {count} usable GPUs, none of number {missing[0]}; use auto or cpu")
    return tuple(map(_gpu_device, gpus))


def device_count() -> int:
    """Device steps this machine can do at a time."""
    return len(allowed_devices("auto"))


def _open_lock_file(name: str) -> int:
    """A descriptor of the lock file; for reading alone, which is enough to lock it and what another user may."""
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
    """Wait for one of the devices that `gpus` allows and hold it.

    Raises
    ------
    ConfigError
        A GPU is asked for that is not there, or the folder of locks cannot be used.
    StoppedError
        The flow is being ended from outside.
    """
    devices = allowed_devices(gpus)
    while True:
        for device in devices:
            try:
                descriptor = _try_lock(device.name)
            except OSError as error:
                raise ConfigError(
                    f"{slot_folder()}: device locks cannot be kept here ({error.strerror}); set ADFLOWS_SLOTS"
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
        time.sleep(POLL_S * random.uniform(0.5, 1.5))  # noqa: S311 - so that nobody who waits is always the later one
