"""Slots of devices: one lock file per device, locked with flock. The kernel frees a lock when its holder dies.

A step that needs a device (training, encoding, segmenting) holds its slot. So two steps never fill a GPU's memory
together, whether they belong to one run or to two. The CPU has two slots: one for trainings, which take hours, and one
for all other steps, which take seconds to minutes. So a training and one short step share the cores, and no third step
does. A machine with little memory has one slot for both. Steps without a device (hashing, evaluating, reporting) run at
the same time.

The child process of a step inherits the lock. If the flow is killed, the device is taken until the child has ended.
Steps get a slot in the order in which they asked for it (`flows.devices.lock_queue`).

The lock files are in $ADFLOWS_SLOTS, or else in a folder that all users of this machine share, below the system's
folder for temporary files. $ADFLOWS_PRETEND_GPUS=N simulates N GPUs: tasks are scheduled onto N
slots and computed on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.devices.lock_queue import LockQueue, clock_text
from flows.devices.tickets import Entry, Ticket, read_queue
from flows.machine.environment import memory_bytes
from medad.base.errors import ConfigError
from medad.base.settings import Gpus

SHARED_CPU_BYTES = 6e9
"""Memory from which a training and a short step share the CPU: 3 GB for each."""
SHORT_STEPS = "cpu-short"
"""Name of the lock of the CPU's slot for short steps."""
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
    """A device in use, the descriptor of its lock, and the step's ticket.

    The lock is held while any copy of the descriptor is open. The ticket says who holds it while any copy of its
    descriptor is open.
    """

    device: Device
    descriptor: int
    ticket: Ticket


def slot_folder() -> Path:
    """Return the folder of the lock files."""
    if own := os.environ.get("ADFLOWS_SLOTS"):
        return Path(own).expanduser().absolute()
    return Path(tempfile.gettempdir()) / "adflows-slots"


def slot_queue() -> LockQueue:
    """Return the locks of this machine's devices."""
    return LockQueue(slot_folder(), "ADFLOWS_SLOTS")


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


def lock_name(device: Device, *, training: bool) -> str:
    """Return the name of the lock that a step needs for a device."""
    if device.is_gpu or training or (memory_bytes() or math.inf) < SHARED_CPU_BYTES:
        return device.name
    return SHORT_STEPS


@dataclass(frozen=True)
class SlotState:
    """Who has a slot and who waits for it."""

    name: str
    taken: bool
    holder: Entry | None
    """Who has it. None: nobody, or a program that cannot be found out."""
    waiting: tuple[Entry, ...]

    @property
    def line(self) -> str:
        """Return the state in one line."""
        text = slot_queue().holder_text(self.name, self.holder) if self.taken else "free"
        runs = ", ".join(f"{entry.run} of user {entry.user} since {clock_text(entry.since)}" for entry in self.waiting)
        return f"{text}; waiting: {runs}" if runs else text

    @property
    def needs_attention(self) -> bool:
        """Return whether nobody can say when the slot will be free."""
        return self.taken and (self.holder is None or not self.holder.run or self.holder.stopped is not None)


def slot_states() -> list[SlotState]:
    """Return the state of all slots of this machine that were ever used, and of the CPU's. This changes nothing."""
    locks = slot_queue()
    queue = read_queue(locks.folder)
    names = {path.stem for path in locks.folder.glob("*.lock")} | {name for entry in queue for name in entry.wants}
    return [
        SlotState(
            name,
            locks.is_taken(name),
            locks.holder(name, queue),
            tuple(entry for entry in queue if not entry.has and name in entry.wants),
        )
        for name in sorted(names | {CPU_NAME, SHORT_STEPS})
    ]


@contextlib.contextmanager
def device_slot(
    gpus: Gpus,
    *,
    training: bool = True,
    run: str = "",
    limit_h: float = math.inf,
    on_wait: Callable[[str], None] = lambda line: None,
) -> Iterator[Slot]:
    """Wait for one of the devices that `gpus` allows, and use it inside the `with` block.

    Parameters
    ----------
    training
        Whether the step may take hours. On the CPU, other steps have a slot of their own.
    run
        Name of the run, which all users of this machine can read.
    limit_h
        Limit of the waiting time in hours.
    on_wait
        Function that shows one line about what the step waits for, if it waits long.

    Raises
    ------
    ConfigError
        A requested GPU does not exist, or the folder of locks cannot be used.
    LimitError
        The step waited longer than its limit.
    StoppedError
        The flow was cancelled or interrupted.
    """
    devices = {lock_name(device, training=training): device for device in allowed_devices(gpus)}
    first = next(iter(devices))
    what = "the CPU" if first in {CPU_NAME, SHORT_STEPS} else " or ".join(devices)
    with slot_queue().lock(tuple(devices), run=run, what=what, limit_h=limit_h, on_wait=on_wait) as held:
        yield Slot(devices[held.name], held.descriptor, held.ticket)
