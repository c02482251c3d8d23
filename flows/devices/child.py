"""A device step in a process of its own: one device in its sight, a time limit, an end whenever its flow ends.

Such a process is forked from a server that has loaded the libraries and touched no device, which takes milliseconds; it
inherits the lock of its device's slot. When it is gone all it held on the device is free: memory, the slot, the step.
It ends with its flow's process, however that ends. Out of memory, it is tried again with ever smaller batches, then on
the CPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, reduction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.devices.progress import progress_callback
from flows.devices.slots import Device, Slot, device_slot
from flows.machine.stopping import StoppedError, stopping
from flows.privacy.log_filter import learn_call
from flows.store.artifacts import Made
from flows.store.step import Call, Place
from medad.base.errors import ConfigError, LimitError
from medad.base.settings import Gpus

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


POLL_S = 0.2
KILLED_FOR_MEMORY = -signal.SIGKILL
"""The exit code of a process that somebody else killed: on a machine out of memory, the kernel."""
PRELOADED = (
    "flows.devices.child",
    "flows.liver.steps",
    "flows.zsad.steps",
    "medad.steps.cases",
    "medad.networks.train",
    "zsad.steps.score_dual",
)
"""What the server of processes loads, once for all of them."""
MAIN_PACKAGES = ("prefect", "ray")
"""Packages whose main programs run flows. A new process imports its parent's main program, and with it these."""


def _main_program_is(package: str) -> bool:
    main = sys.modules["__main__"]
    name = getattr(main.__spec__, "name", None) or ""
    return name.partition(".")[0] == package or f"/{package}/" in (getattr(main, "__file__", None) or "")


DAEMON_WORKER_RULE = (
    "this worker may start no process of its own; start Dask's workers with DASK_DISTRIBUTED__WORKER__DAEMON=False"
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOADED, *(name for name in MAIN_PACKAGES if _main_program_is(name))])


def preload_libraries() -> None:
    """Start the server of processes where none runs yet; returns at once, while it loads the libraries."""
    if not multiprocessing.current_process().daemon:
        forkserver.ensure_running()


class ChildTraceback(Exception):  # noqa: N818 - the cause of an error, not one
    """Where in the step's process an error came from."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _OutOfMemoryError(Exception):
    """The step's process had no memory left; says how that was seen."""


@dataclass(frozen=True)
class _InheritedDescriptor:
    """A descriptor that a new process gets a copy of."""

    descriptor: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_descriptor, (reduction.DupFd(self.descriptor),)


def _unpickle_descriptor(duplicate: Any) -> _InheritedDescriptor:
    return _InheritedDescriptor(duplicate.detach())


@dataclass(frozen=True)
class _ChildTask:
    call: Call
    out: Path
    key: str
    device: Device
    batch_size: int
    environment: dict[str, str]


def compute_in_child(call: Call, out: Path, key: str) -> Made:
    """Run a device step into the empty folder `out`, on whatever device its settings allow.

    Raises
    ------
    LimitError
        It took longer than its limit, or neither a batch of one nor the CPU had memory enough.
    StoppedError
        The flow is being ended from outside.
    """
    gpus: Gpus = call.machine.gpus
    batch_size = call.batch_size
    notes: list[str] = []
    while True:
        with device_slot(gpus) as slot:
            device = slot.device
            began = time.monotonic()
            try:
                _run_in_child(call, out, key, slot, batch_size)
                return Made(began, device.name, tuple(notes))
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
            raise LimitError(f"this machine has not memory enough, even for {_batch_text(1)}")


def _batch_text(size: int) -> str:
    return f"batches of {size}"


def _clear_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _run_in_child(call: Call, out: Path, key: str, slot: Slot, batch_size: int) -> None:
    """One attempt; returns when it is done, raises what it raised."""
    if multiprocessing.current_process().daemon:
        raise ConfigError(DAEMON_WORKER_RULE)
    receiver, sender = _context.Pipe(duplex=False)
    order = _ChildTask(call, out, key, slot.device, batch_size, dict(os.environ))
    process = _context.Process(
        target=_child_main,
        args=(order, sender, _InheritedDescriptor(slot.descriptor)),
        name=call.step.name,
        daemon=True,
    )
    limit_h: float = getattr(call.machine.limits, f"{call.step.kind}_hours")
    try:
        process.start()
        sender.close()
        with progress_callback(call) as on_progress:
            outcome: tuple[Any, ...] | None = None
            for message in _receive_messages(process, receiver, time.monotonic() + limit_h * 3600):
                if message[0] == "progress":
                    on_progress(*message[1])
                else:
                    outcome = message
    except TimeoutError as error:
        raise LimitError(
            f"stopped at its limit of {limit_h:g} h (limits.{call.step.kind}_hours)"
            + "; run again, it goes on from its last checkpoint" * (call.step.kind == "training")
        ) from error
    finally:
        _kill_group(process)
        receiver.close()
    _raise_child_error(outcome, process)
    process.close()


def _receive_messages(process: BaseProcess, receiver: Connection, deadline: float) -> Iterator[tuple[Any, ...]]:
    """What the process says until it is gone. Raises TimeoutError past the deadline, and StoppedError."""
    while True:
        ready = wait([receiver, process.sentinel], timeout=POLL_S)
        if stopping.is_set():
            raise StoppedError
        if receiver in ready:
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                return
        elif ready:
            return
        elif time.monotonic() > deadline:
            raise TimeoutError


def _kill_group(process: BaseProcess) -> None:
    """Leave nothing of the process, nor of what it may have started."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode is None:
        process.kill()  # before it had a group of its own
    process.join()


def _raise_child_error(outcome: tuple[Any, ...] | None, process: BaseProcess) -> None:
    """Raise what went wrong in a process that is gone."""
    if outcome is None:
        if process.exitcode == KILLED_FOR_MEMORY:
            raise _OutOfMemoryError("was killed, as happens for want of memory, at")
        raise RuntimeError(f"the process of step {process.name} ended with exit code {process.exitcode}")
    what, *rest = outcome
    if what == "memory":
        raise _OutOfMemoryError("had no memory for")
    if what == "error":
        error, text = rest
        raise error from ChildTraceback(text)


def _child_main(order: _ChildTask, connection: Connection, lock: _InheritedDescriptor) -> None:
    """The step's process, from beginning to end; `lock` is held by being open."""
    assert lock.descriptor >= 0
    os.setsid()
    os.environ.clear()
    os.environ.update(order.environment)
    os.environ["CUDA_VISIBLE_DEVICES"] = order.device.visible
    os.environ["ADFLOWS_DEVICE"] = order.device.name  # for whoever looks at the process
    _end_with_parent()
    learn_call(order.call.step.name, order.call)  # what a library prints or logs here may reach a worker's log

    def report(*progress: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the flow is gone, and this process is about to follow
            connection.send(("progress", progress))

    try:
        order.call.run(order.out, Place(order.device.torch_name, order.batch_size, report), key=order.key)
        answer: tuple[Any, ...] = ("done",)
    except Exception as error:
        from medad.base.devices import is_out_of_memory

        text = traceback.format_exc()
        answer = ("memory",) if is_out_of_memory(error) else ("error", error, text)
        if answer[0] == "error" and not _survives_pickling(error):
            answer = ("error", RuntimeError(f"{type(error).__name__}: {error}"), text)
    with contextlib.suppress(BrokenPipeError):
        connection.send(answer)


def _survives_pickling(error: Exception) -> bool:
    try:
        return type(reduction.ForkingPickler.loads(reduction.ForkingPickler.dumps(error))) is type(error)
    except Exception:
        return False


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
