"""One slot a device: an flock that the kernel frees when its holder dies, kill -9 included.

A step that keeps a whole device busy (encoding, adapting) holds its slot, so that neither the tasks of one run nor two
runs of one machine fill a GPU's memory together. On a machine without a GPU the CPU is one slot: such a step uses all
cores by itself. Steps that hold none (hashing, evaluating, reporting) go on beside it.

The lock files are in `$ADFLOWS_SLOTS`, else in a folder that all users of this machine share (below the system's folder
for temporary files). They are empty and stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flows.progress import StoppedError, stopping
from medad.errors import ConfigError

POLL_S = 0.05
CPU = "cpu"


def slot_folder() -> Path:
    """Where the lock files are."""
    if own := os.environ.get("ADFLOWS_SLOTS"):
        return Path(own).expanduser().absolute()
    return Path(tempfile.gettempdir()) / "adflows-slots"


def devices_of(name: str) -> tuple[str, ...]:
    """The devices that a setting allows: `auto` and `cuda` any GPU, `auto` the CPU where there is none.

    Raises
    ------
    ConfigError
        A GPU is asked for that is not there.
    """
    from medad.devices import pick_device

    if name == CPU:
        return (CPU,)
    if name.startswith("cuda:"):
        return (str(pick_device(name)),)
    found: list[str] = []
    with contextlib.suppress(ConfigError):  # the first number that is no GPU ends the list
        while True:
            found.append(str(pick_device(f"cuda:{len(found)}")))
    if not found and name != "auto":
        pick_device("cuda:0")  # says what is missing
    return tuple(found) or (CPU,)


def _lock_name(device: str) -> str:
    """The same GPU has the same name in every process, also where CUDA_VISIBLE_DEVICES numbers it anew."""
    if device == CPU:
        return CPU
    number = int(device.partition(":")[2])
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    physical = visible[number] if number < len(visible) else str(number)
    return "gpu-" + "".join(character if character.isalnum() else "-" for character in physical)


def _open(name: str) -> int:
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


def _try(name: str) -> int | None:
    descriptor = _open(name)
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
def device_slot(name: str) -> Iterator[str]:
    """Wait for one of the devices that `name` allows and hold it; yields which: `cpu` or `cuda:N`.

    Raises
    ------
    ConfigError
        A GPU is asked for that is not there, or the folder of locks cannot be used.
    StoppedError
        The flow is being ended from outside.
    """
    devices = devices_of(name)
    while True:
        for device in devices:
            try:
                descriptor = _try(_lock_name(device))
            except OSError as error:
                raise ConfigError(
                    f"{slot_folder()}: device locks cannot be kept here ({error.strerror}); set ADFLOWS_SLOTS"
                ) from error
            if descriptor is None:
                continue
            try:
                yield device
            finally:
                os.close(descriptor)
            return
        if stopping.is_set():
            raise StoppedError
        time.sleep(POLL_S)
