"""Slots of devices: one lock file per device, locked with flock. The kernel frees a lock when its holder dies.

A step that needs a device (training, encoding, segmenting) holds its slot. So two steps never fill a GPU's memory
together, whether they belong to one run or to two. The CPU has two slots: one for trainings, which take hours, and one
for all other steps, which take seconds to minutes. So a training and one short step share the cores, and no third step
does. A machine with little memory has one slot for both. Steps without a device (hashing, evaluating, reporting) run at
the same time.

The child process of a step inherits the lock. If the flow is killed, the device is taken until the child has ended.
Steps get a slot in the order in which they asked for it (`flows.devices.tickets`).

The lock files are empty and stay. They are in $ADFLOWS_SLOTS, or else in a folder that all users of this machine share,
below the system's folder for temporary files. $ADFLOWS_PRETEND_GPUS=N simulates N GPUs: tasks are scheduled onto N
slots and computed on the CPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.devices.tickets import READ, Entry, Ticket, is_locked, owner_of_lock, read_queue, shared_file, shared_folder
from flows.machine.environment import memory_bytes
from flows.machine.stopping import StoppedError, stopping
from medad.base.errors import ConfigError, LimitError
from medad.base.settings import Gpus

POLL_S = 0.05
NOTICE_S = 5.0
"""Waiting time after which a step says what it waits for."""
REPEAT_S = 600.0
"""Shortest time between two such lines of one step. The second one follows only if the holder has changed."""
PATIENCE_S = 2.0
"""Time for which a step in the queue may leave a free slot unused. A stopped process must not block those behind it."""
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


def lock_path(name: str) -> Path:
    """Return the lock file of a name."""
    return slot_folder() / f"{name}.lock"


def _open_lock_file(name: str) -> int:
    """Open the lock file for reading. That is enough to lock it, and other users are allowed to."""
    path = lock_path(name)
    shared_folder(path.parent)
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, READ)
    with contextlib.suppress(FileExistsError):
        os.close(shared_file(path))
    return os.open(path, READ)


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


def holder_of(name: str, queue: list[Entry]) -> Entry | None:
    """Return who holds a lock, from the tickets or else from the kernel. None: nobody, or it cannot be found out."""
    if not is_locked(lock_path(name)):
        return None
    return next((entry for entry in queue if entry.has == name), None) or owner_of_lock(lock_path(name))


def holder_text(name: str, holder: Entry | None, what: str = "it") -> str:
    """Return in a few words who has a lock. `what` names it in the sentence."""
    if holder is None:
        return f"an unknown program has the lock {lock_path(name)}"
    if not holder.run:
        return f"process {holder.pids[0]} of user {holder.user} has the lock {lock_path(name)}"
    stopped = f"; its process {holder.stopped} is stopped" if holder.stopped is not None else ""
    return f"run {holder.run} of user {holder.user} has {what} since {_clock(holder.since)}{stopped}"


def _clock(seconds: float) -> str:
    """Return a time today as 05:01, and another time with its date."""
    then = time.localtime(seconds)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", then)


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
        text = holder_text(self.name, self.holder) if self.taken else "free"
        runs = ", ".join(f"{entry.run} of user {entry.user} since {_clock(entry.since)}" for entry in self.waiting)
        return f"{text}; waiting: {runs}" if runs else text

    @property
    def needs_attention(self) -> bool:
        """Return whether nobody can say when the slot will be free."""
        return self.taken and (self.holder is None or not self.holder.run or self.holder.stopped is not None)


def slot_states() -> list[SlotState]:
    """Return the state of all slots of this machine that were ever used, and of the CPU's. This changes nothing."""
    queue = read_queue(slot_folder())
    names = {path.stem for path in slot_folder().glob("*.lock")} | {name for entry in queue for name in entry.wants}
    return [
        SlotState(
            name,
            is_locked(lock_path(name)),
            holder_of(name, queue),
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
    try:
        # one entry of the queue per thread: several steps of one run wait like those of several runs
        ticket = Ticket(
            slot_folder(), Entry(run or "without a name", tuple(devices), (os.getpid(),), since=time.time())
        )
    except OSError as error:
        raise _unusable_folder(error) from error
    try:
        name, descriptor = _wait_for_lock(ticket, limit_h, on_wait)
        try:
            ticket.got(name)
            yield Slot(devices[name], descriptor, ticket)
        finally:
            os.close(descriptor)
    finally:
        ticket.close()


def _wait_for_lock(ticket: Ticket, limit_h: float, on_wait: Callable[[str], None]) -> tuple[str, int]:
    """Return the name and the descriptor of the first lock that this ticket gets."""
    began = time.monotonic()
    free_since: dict[str, float] = {}
    said, next_line = "", began + NOTICE_S
    while True:
        now = time.monotonic()
        for name in ticket.entry.wants:
            try:
                if _is_my_turn(ticket, name, free_since, now) and (descriptor := _try_lock(name)) is not None:
                    return name, descriptor
            except OSError as error:
                raise _unusable_folder(error) from error
        if stopping.is_set():
            raise StoppedError
        if now - began > 3600 * limit_h:
            text = _waiting_text(ticket)
            raise LimitError(f"stopped at its limit of {limit_h:g} h (limits.waiting_hours) while {text}")
        if now >= next_line:
            text = _waiting_text(ticket)
            if text != said and not _waits_for_own_run(ticket):
                on_wait(text)
                said, next_line = text, now + REPEAT_S
            else:
                next_line = now + NOTICE_S
        time.sleep(POLL_S * random.uniform(0.5, 1.5))  # noqa: S311 - so that processes do not look at the same time


def _is_my_turn(ticket: Ticket, name: str, free_since: dict[str, float], now: float) -> bool:
    """Return whether no earlier step waits for a lock, or those that do have left it unused for too long."""
    ahead = ticket.waiting_ahead(name)
    if not ahead:
        return True
    if is_locked(lock_path(name)):
        free_since.pop(name, None)
        return False
    return now - free_since.setdefault(name, now) > PATIENCE_S * ahead


def _waiting_text(ticket: Ticket) -> str:
    queue, mine = read_queue(slot_folder()), ticket.entry
    holders = {name: holder_of(name, queue) for name in mine.wants if is_locked(lock_path(name))}
    what = "the CPU" if mine.wants[0] in {CPU_NAME, SHORT_STEPS} else " or ".join(mine.wants)
    parts = [holder_text(name, one, "it" if len(mine.wants) == 1 else name) for name, one in holders.items()]
    return f"waiting for {what}: {'; '.join(parts) or 'other steps have asked for it before'}"


def _waits_for_own_run(ticket: Ticket) -> bool:
    """Return whether steps of the same run have all devices that a step wants. Nobody needs a line about it."""
    queue, mine = read_queue(slot_folder()), ticket.entry
    holders = [holder_of(name, queue) for name in mine.wants]
    return all(one is not None and (one.run, one.pids[:1]) == (mine.run, mine.pids[:1]) for one in holders)


def _unusable_folder(error: OSError) -> ConfigError:
    return ConfigError(f"{slot_folder()}: device locks cannot be created here ({error.strerror}); set ADFLOWS_SLOTS")
