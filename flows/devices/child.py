"""Child processes for device steps. Each sees one device, has a time limit, and ends when its flow ends.

The child is forked from a fork server that has loaded the libraries but used no device. This takes milliseconds. The
child inherits the lock of its device's slot, so the device's memory and slot are free as soon as the child ends. The
child ends when its flow's process ends, even if that was killed. A training on the CPU has a lower priority than the
short steps that share the cores with it.

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
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, reduction, resource_tracker, util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.devices.progress import progress_callback
from flows.devices.slots import Device, Slot
from flows.devices.waiting import call_slot
from flows.machine.stopping import StoppedError, stopping
from flows.privacy.log_filter import learn_call
from flows.store.artifacts import BuildRecord
from flows.store.step import Call, Place
from medad.base.errors import ConfigError, LimitError
from medad.base.settings import Gpus

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


POLL_S = 0.2
TRAINING_NICE = 5
"""Added niceness of a training on the CPU, which takes hours and may share the cores with a step that takes seconds."""
KILLED_FOR_MEMORY = -signal.SIGKILL
"""Exit code of a process that was killed. The kernel does this when the machine is out of memory."""
PRELOADED = (
    "flows.devices.child",
    "flows.liver.steps",
    "flows.zsad.steps",
    "medad.steps.cases",
    "medad.networks.train",
    "zsad.scorers.dual.score",
)
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


class _OutOfMemoryError(Exception):
    """The child ran out of memory. The message says how this was noticed."""


@dataclass(frozen=True)
class _InheritedDescriptor:
    """A file descriptor that a child process gets a copy of."""

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


def _run_in_child(call: Call, out: Path, key: str, slot: Slot, batch_size: int) -> None:
    """Run the step once. Return when it is done; raise the error that it raised."""
    if multiprocessing.current_process().daemon:
        raise ConfigError(DAEMON_WORKER_RULE)
    _collect_helpers()
    receiver, sender = _context.Pipe(duplex=False)
    order = _ChildTask(call, out, key, slot.device, batch_size, dict(os.environ))
    process = _context.Process(
        target=_child_main,
        args=(order, sender, _InheritedDescriptor(slot.descriptor), _InheritedDescriptor(slot.ticket.descriptor)),
        name=call.step.name,
        daemon=True,
    )
    limit_h: float = getattr(call.machine.limits, f"{call.step.kind}_hours")
    try:
        process.start()
        sender.close()
        assert process.pid is not None
        slot.ticket.add_process(process.pid)
        with progress_callback(call) as on_progress:
            outcome: tuple[Any, ...] | None = None
            for message in _receive_messages(process, receiver, time.monotonic() + limit_h * 3600):
                if message[0] == "progress":
                    on_progress(*message[1])
                else:
                    outcome = message
                    break  # the artifact is complete, so Python need not end in order
    except TimeoutError as error:
        raise LimitError(
            f"stopped at its limit of {limit_h:g} h (limits.{call.step.kind}_hours)"
            + "; run again to continue from the last checkpoint" * (call.step.kind == "training")
        ) from error
    finally:
        _kill_group(process)
        receiver.close()
    _raise_child_error(outcome, process)
    process.close()


def _receive_messages(process: BaseProcess, receiver: Connection, deadline: float) -> Iterator[tuple[Any, ...]]:
    """Yield the child's messages until it ends. Raise TimeoutError after the deadline, or StoppedError."""
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
    """Kill the child and all processes that it started."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode is None:
        process.kill()  # it had not made its process group yet
    process.join()


def _raise_child_error(outcome: tuple[Any, ...] | None, process: BaseProcess) -> None:
    """Raise the error of a child that has ended."""
    if outcome is None:
        if process.exitcode == KILLED_FOR_MEMORY:
            raise _OutOfMemoryError("was killed, probably out of memory, at")
        raise RuntimeError(f"the process of step {process.name} ended with exit code {process.exitcode}")
    what, *rest = outcome
    if what == "memory":
        raise _OutOfMemoryError("had too little memory for")
    if what == "error":
        error, text = rest
        raise error from ChildTraceback(text)


def _child_main(order: _ChildTask, connection: Connection, *held: _InheritedDescriptor) -> None:
    """Run the step in the child process. The open descriptors `held` hold the slot and the step's ticket."""
    assert all(one.descriptor >= 0 for one in held)
    os.setsid()
    os.environ.clear()
    os.environ.update(order.environment)
    os.environ["CUDA_VISIBLE_DEVICES"] = order.device.visible
    os.environ["ADFLOWS_DEVICE"] = order.device.name  # for people who inspect the process
    if order.call.step.kind == "training" and not order.device.is_gpu:
        os.nice(TRAINING_NICE)
    _end_with_parent()
    learn_call(order.call.step.name, order.call)  # output of libraries may reach a worker's log

    def report(*progress: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the flow has ended, and this process will end now
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
    sys.stdout.flush()
    sys.stderr.flush()
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
