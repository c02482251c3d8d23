"""Child processes for device steps. Each sees one device, and ends when its flow ends. Steps have a time limit.

A child is forked from a fork server that has loaded torch but used no device. This takes milliseconds. The child stays
for the next step of the flow on this device, so that a run loads its libraries once. During a step the child has the
lock of the device's slot too. It ends when its flow's process ends, even if that was killed. After an error it is
replaced. So it is after a training on the CPU, which has a lower priority than the short steps beside it.

If memory runs out, the step is retried with half the batch size, again and again, and at last on the CPU.

Steps that read files of others run in such children too, without a device. If native code crashes on a file, hangs or
takes all memory, only this case fails.
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
from flows.devices.slots import CPU, Device, Slot
from flows.devices.waiting import call_slot
from flows.devices.worker import IDLE_S, Order, worker_main
from flows.machine.stopping import StoppedError, stopping
from flows.store.artifacts import BuildRecord
from flows.store.step import Call
from medad.base.errors import ConfigError, InputError, LimitError
from medad.base.settings import Gpus

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


POLL_S = 0.2
READING_HOURS = 0.25
"""Time limit of a step that only reads and prepares files."""
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
_preloaded_main = [name for name in MAIN_PACKAGES if _main_program_is(name)]
_context.set_forkserver_preload(_preloaded_main)


def preload_libraries() -> None:
    """Start the fork server unless it runs. Return at once, while the server loads the libraries."""
    if not multiprocessing.current_process().daemon:
        _context.set_forkserver_preload([*PRELOADED, *_preloaded_main])
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
    """A process that computes steps on one device (`flows.devices.worker`). None: it reads files, on the CPU."""

    def __init__(self, device: Device | None) -> None:
        self.connection, other = _context.Pipe()
        used, quiet = device or CPU, device is None
        self.process = _context.Process(target=worker_main, args=(other, used, quiet), name=used.name, daemon=True)
        self.steps = 0
        self.idle_since = time.monotonic()
        self.process.start()
        other.close()

    @property
    def is_fresh(self) -> bool:
        """Return whether the process still waits for an order."""
        return time.monotonic() - self.idle_since < IDLE_S / 2 and self.process.is_alive()

    def send(self, order: Order, slot: Slot | None) -> None:
        """Send an order, after the lock of its slot and its ticket if it has a slot."""
        assert self.process.pid is not None
        self.steps += 1
        handles = () if slot is None else (slot.descriptor, slot.ticket.descriptor)
        if slot is not None:
            slot.ticket.add_process(self.process.pid)
        self.connection.send(len(handles))
        for descriptor in handles:
            reduction.send_handle(self.connection, descriptor, self.process.pid)
        self.connection.send(order)

    def end(self) -> None:
        """Kill the process and all processes that it started."""
        _kill_group(self.process)
        self.connection.close()


_idle: dict[Device | None, list[_Worker]] = {}
"""Processes that wait for the next step, by device. None: processes that read, as many as have read at a time."""
_idle_lock = threading.Lock()
os.register_at_fork(after_in_child=_idle.clear)


def _idle_worker(device: Device | None) -> _Worker | None:
    """Return a process that waits for a step on a device, if there is one."""
    while True:
        with _idle_lock:
            waiting = _idle.get(device)
            if not waiting:
                return None
            worker = waiting.pop()
        if worker.is_fresh:
            return worker
        worker.end()


def _keep_worker(worker: _Worker, device: Device | None) -> None:
    """Keep a process for the next step on its device."""
    worker.idle_since = time.monotonic()
    with _idle_lock:
        waiting = _idle.setdefault(device, [])
        others = waiting[:] if device is not None else []
        waiting[:] = [each for each in waiting if each not in others] + [worker]
    for other in others:
        other.end()


reads_apart = True
"""Whether reading steps run in child processes. Tests that replace parts of a step turn this off."""


def can_read_apart(call: Call) -> bool:
    """Return whether a step reads files of others and this process can start a child for it."""
    apart = reads_apart and call.step.reads and call.step.kind is None
    return apart and not multiprocessing.current_process().daemon


def read_in_child(call: Call, out: Path, key: str) -> None:
    """Run a step that reads files of others into the empty folder `out`.

    Raises
    ------
    InputError
        The process that read the files crashed, took more memory than there is, or did not end in time.
    StoppedError
        The flow was cancelled or interrupted.
    """
    _run_in_child(call, out, key, None, call.batch_size)


def _run_in_child(call: Call, out: Path, key: str, slot: Slot | None, batch_size: int) -> None:
    """Run the step once. Return when it is done; raise the error that it raised."""
    if multiprocessing.current_process().daemon:
        raise ConfigError(DAEMON_WORKER_RULE)
    _collect_helpers()
    order = Order(call, out, key, batch_size, dict(os.environ))
    device = None if slot is None else slot.device
    if (worker := _idle_worker(device)) is not None:
        try:
            return _run_in_worker(worker, order, slot)
        except _NotTakenError:
            pass  # the process ended while it waited
    return _run_in_worker(_Worker(device), order, slot)


def _run_in_worker(worker: _Worker, order: Order, slot: Slot | None) -> None:
    """Run a step in a process. The process is kept if the step is done and left nothing behind."""
    call, step = order.call, order.call.step
    limit_h: float = READING_HOURS if slot is None else getattr(call.machine.limits, f"{step.kind}_hours")
    is_kept, taken = worker.steps > 0, False
    outcome: tuple[Any, ...] | None = None
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.send(order, slot)
        with progress_callback(call) as on_progress:
            for message in _receive_messages(worker, time.monotonic() + limit_h * 3600):
                taken = True
                if message[0] == "progress":
                    on_progress(*message[1])
                elif message[0] != "taken":
                    outcome = message
                    break
    except TimeoutError as error:
        if slot is None:
            raise _unreadable(call, f"reading it took longer than {60 * limit_h:g} minutes") from error
        raise LimitError(
            f"stopped at its limit of {limit_h:g} h (limits.{step.kind}_hours)"
            + "; run again to continue from the last checkpoint" * (step.kind == "training")
        ) from error
    finally:
        if outcome == ("done", True):
            _keep_worker(worker, None if slot is None else slot.device)
        else:
            worker.end()
    if is_kept and not taken:
        raise _NotTakenError
    _raise_child_error(worker, call, outcome)


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


def _signal_name(code: int | None) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-(code or 0)).name
    return f"exit code {code}"


def _kill_group(process: BaseProcess) -> None:
    """Kill a process and all processes that it started."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode is None:
        process.kill()  # it had not made its process group yet
    process.join()


def _unreadable(call: Call, rule: str) -> InputError:
    """Return the error of a case whose files could not be read, with the first of the step's paths."""
    paths = [path for value in call.arguments.values() for path in (value, getattr(value, "scan", None))]
    return InputError(next((path for path in paths if isinstance(path, Path)), Path(call.step.name)), rule)


def _raise_child_error(worker: _Worker, call: Call, outcome: tuple[Any, ...] | None) -> None:
    """Raise the error of a step that is not done."""
    code = worker.process.exitcode
    if call.step.reads and (outcome == ("memory",) or (outcome is None and code == KILLED_FOR_MEMORY)):
        raise _unreadable(call, "reading it needs more memory than this machine has")
    if outcome is None:
        if code == KILLED_FOR_MEMORY:
            raise _OutOfMemoryError("was killed, probably out of memory, at")
        if call.step.reads:
            raise _unreadable(call, f"the program that read it crashed ({_signal_name(code)}); is the file damaged?")
        raise RuntimeError(f"the process of step {call.step.name} ended with exit code {code}")
    what, *rest = outcome
    if what == "memory":
        raise _OutOfMemoryError("had too little memory for")
    if what == "error":
        error, text = rest
        raise error from ChildTraceback(text)
