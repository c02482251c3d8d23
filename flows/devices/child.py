"""Child processes for device steps. Each sees one device, and ends when its flow ends. Steps have a time limit.

A child is forked from a fork server that has loaded torch but used no device. This takes milliseconds. The child stays
for the next step of the flow on this device, so that a run loads its libraries once. During a step the child has the
lock of the device's slot too. It ends when its flow's process ends, even if that was killed. After an error it is
replaced. So it is after a training on the CPU, which has a lower priority than the short steps beside it.

If memory runs out, the step is retried with half the batch size, again and again, and at last on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver, reduction, resource_tracker, util
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.devices.progress import progress_callback
from flows.devices.slots import Device, Slot
from flows.devices.waiting import call_slot
from flows.devices.worker import IDLE_S, Order, worker_main
from flows.machine.stopping import StoppedError, stopping
from flows.store.artifacts import BuildRecord
from flows.store.step import Call
from medad.base.errors import ConfigError, LimitError
from medad.base.settings import Gpus

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


POLL_S = 0.2
KILLED_FOR_MEMORY = -signal.SIGKILL
"""Exit code of a process that was killed. The kernel does this when the machine is out of memory."""
PRELOADED = ("flows.devices.worker", "flows.liver.steps", "flows.zsad.steps", "torch")
"""Modules that the fork server loads once for all child processes."""
MAIN_PACKAGES = ("prefect", "ray")
"""Packages with main programs that run flows. A child imports its parent's main program, and so these packages."""


def _main_program_is(package: str) -> bool:
    main = sys.modules["__main__"]
    name = getattr(main.__spec__, "name", None) or ""
    return name.partition(".")[0] == package or f"/{package}/" in (getattr(main, "__file__", None) or "")


DAEMON_WORKER_RULE = (
    "this worker cannot start child processes; start Dask's workers with DASK_DISTRIBUTED__WORKER__DAEMON=False"
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOADED, *(name for name in MAIN_PACKAGES if _main_program_is(name))])


def preload_libraries() -> None:
    """Start the fork server unless it runs. Return at once, while the server loads the libraries."""
    if not multiprocessing.current_process().daemon:
        forkserver.ensure_running()
        _collect_helpers()


@functools.cache
def _collect_helpers() -> None:
    """Make this process end and collect multiprocessing's two helper processes when it ends.

    The fork server and the resource tracker would end a moment after this process, as zombies of whoever adopts them.
    """
    helpers = (forkserver._forkserver, resource_tracker._resource_tracker)

    def stop() -> None:
        for helper in helpers:
            with contextlib.suppress(AttributeError, OSError):  # the method is not documented
                helper._stop()  # type: ignore[union-attr]

    # a negative priority: after multiprocessing has ended the steps, which belong to the fork server
    util.Finalize(None, stop, exitpriority=-1)


class ChildTraceback(Exception):  # noqa: N818 - the cause of an error, not one
    """Traceback of an error in the child process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _NotTakenError(Exception):
    """The child ended before it took the step."""


class _OutOfMemoryError(Exception):
    """The child ran out of memory. The message says how this was noticed."""


def compute_in_child(call: Call, out: Path, key: str) -> BuildRecord:
    """Run a device step into the empty folder `out`, on any device that its settings allow.

    Raises
    ------
    LimitError
        The step took longer than its limit, or had too little memory even with batches of one on the CPU.
    StoppedError
        The flow was cancelled or interrupted.
    """
    gpus: Gpus = call.machine.gpus
    batch_size = call.batch_size
    notes: list[str] = []
    while True:
        with call_slot(call, gpus) as slot:
            device = slot.device
            began = time.monotonic()
            try:
                _run_in_child(call, out, key, slot, batch_size)
                return BuildRecord(began, device.name, tuple(notes))
            except _OutOfMemoryError as error:
                notes.append(f"{device.name} {error} {_batch_text(batch_size)}")
        _clear_folder(out)
        if batch_size > 1:
            batch_size //= 2
            notes.append(f"tried {_batch_text(batch_size)}")
        elif device.is_gpu:
            gpus, batch_size = "cpu", call.batch_size
            notes.append(f"tried the CPU with {_batch_text(batch_size)}")
        else:
            raise LimitError(f"this machine has too little memory, even for {_batch_text(1)}")


def _batch_text(size: int) -> str:
    return f"batches of {size}"


def _clear_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


class _Worker:
    """A process that computes steps on one device (`flows.devices.worker`)."""

    def __init__(self, device: Device) -> None:
        self.connection, other = _context.Pipe()
        self.process = _context.Process(target=worker_main, args=(other, device), name=device.name, daemon=True)
        self.steps = 0
        self.step = ""
        self.idle_since = time.monotonic()
        self.process.start()
        other.close()

    @property
    def is_fresh(self) -> bool:
        """Return whether the process still waits for an order."""
        return time.monotonic() - self.idle_since < IDLE_S / 2 and self.process.is_alive()

    def send(self, order: Order, slot: Slot) -> None:
        """Send an order, after the lock of its slot and its ticket."""
        assert self.process.pid is not None
        self.steps += 1
        self.step = order.call.step.name
        slot.ticket.add_process(self.process.pid)
        for descriptor in (slot.descriptor, slot.ticket.descriptor):
            reduction.send_handle(self.connection, descriptor, self.process.pid)
        self.connection.send(order)

    def end(self) -> None:
        """Kill the process and all processes that it started."""
        _kill_group(self.process)
        self.connection.close()


_idle: dict[Device, _Worker] = {}
"""Processes that wait for the next step, at most one for each device."""
_idle_lock = threading.Lock()
os.register_at_fork(after_in_child=_idle.clear)


def _idle_worker(device: Device) -> _Worker | None:
    """Return the process of a device that waits, if there is one."""
    with _idle_lock:
        worker = _idle.pop(device, None)
    if worker is None or worker.is_fresh:
        return worker
    worker.end()
    return None


def _keep_worker(worker: _Worker, device: Device) -> None:
    """Keep a process for the next step on its device."""
    worker.idle_since = time.monotonic()
    with _idle_lock:
        other = _idle.pop(device, None)
        _idle[device] = worker
    if other is not None:
        other.end()


def _run_in_child(call: Call, out: Path, key: str, slot: Slot, batch_size: int) -> None:
    """Run the step once. Return when it is done; raise the error that it raised."""
    if multiprocessing.current_process().daemon:
        raise ConfigError(DAEMON_WORKER_RULE)
    _collect_helpers()
    order = Order(call, out, key, batch_size, dict(os.environ))
    if (worker := _idle_worker(slot.device)) is not None:
        try:
            return _run_in_worker(worker, order, slot)
        except _NotTakenError:
            pass  # the process ended while it waited
    return _run_in_worker(_Worker(slot.device), order, slot)


def _run_in_worker(worker: _Worker, order: Order, slot: Slot) -> None:
    """Run a step in a process. The process is kept if the step is done and left nothing behind."""
    step = order.call.step
    limit_h: float = getattr(order.call.machine.limits, f"{step.kind}_hours")
    is_kept, taken = worker.steps > 0, False
    outcome: tuple[Any, ...] | None = None
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.send(order, slot)
        with progress_callback(order.call) as on_progress:
            for message in _receive_messages(worker, time.monotonic() + limit_h * 3600):
                taken = True
                if message[0] == "progress":
                    on_progress(*message[1])
                elif message[0] != "taken":
                    outcome = message
                    break
    except TimeoutError as error:
        raise LimitError(
            f"stopped at its limit of {limit_h:g} h (limits.{step.kind}_hours)"
            + "; run again to continue from the last checkpoint" * (step.kind == "training")
        ) from error
    finally:
        if outcome == ("done", True):
            _keep_worker(worker, slot.device)
        else:
            worker.end()
    if is_kept and not taken:
        raise _NotTakenError
    _raise_child_error(worker, outcome)


def _receive_messages(worker: _Worker, deadline: float) -> Iterator[tuple[Any, ...]]:
    """Yield the process's messages until it ends. Raise TimeoutError after the deadline, or StoppedError."""
    while True:
        ready = wait([worker.connection, worker.process.sentinel], timeout=POLL_S)
        if stopping.is_set():
            raise StoppedError
        if worker.connection in ready:
            try:
                yield worker.connection.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                return
        elif ready:
            return
        elif time.monotonic() > deadline:
            raise TimeoutError


def _kill_group(process: BaseProcess) -> None:
    """Kill a process and all processes that it started."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode is None:
        process.kill()  # it had not made its process group yet
    process.join()


def _raise_child_error(worker: _Worker, outcome: tuple[Any, ...] | None) -> None:
    """Raise the error of a step that is not done."""
    if outcome is None:
        if worker.process.exitcode == KILLED_FOR_MEMORY:
            raise _OutOfMemoryError("was killed, probably out of memory, at")
        raise RuntimeError(f"the process of step {worker.step} ended with exit code {worker.process.exitcode}")
    what, *rest = outcome
    if what == "memory":
        raise _OutOfMemoryError("had too little memory for")
    if what == "error":
        error, text = rest
        raise error from ChildTraceback(text)
