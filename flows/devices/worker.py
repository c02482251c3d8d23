"""The process that computes device steps, and steps that read files. It stays between the steps of a run.

It sees one device and gets an order at a time: a device step with the lock of its device and its ticket, or a reading
step with neither. It holds both until the step has ended. It ends if the flow's process ends, or if no order comes for
a while.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flows.devices.slots import Device
from flows.machine.environment import collect_rarely
from flows.privacy.log_filter import learn_call
from flows.store.step import Call, Place

collect_rarely()  # in the fork server too, which loads this module first and torch last

TRAINING_NICE = 5
"""Added niceness of a training on the CPU, which takes hours and may share the cores with a step that takes seconds."""
_OOM_SCORE = 500
IDLE_S = 60.0
"""Time after which a process without an order ends."""
KEPT_BYTES = 1 << 30
"""Most memory of its own that a process may have between two steps."""


@dataclass(frozen=True)
class Order:
    """A step to compute into the folder `out`."""

    call: Call
    out: Path
    key: str
    batch_size: int
    environment: dict[str, str]


def worker_main(connection: Connection, device: Device, quiet: bool) -> None:
    """Compute the orders that come over the connection, until it is closed or idle.

    A `quiet` process writes nothing: native code that reads a file may quote its header.
    """
    os.setsid()
    if quiet:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
    _end_with_parent()
    with contextlib.suppress(OSError):  # if memory runs out, the kernel ends this process before the flow's
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while connection.poll(IDLE_S):
            held = [reduction.recv_handle(connection) for _ in range(connection.recv())]
            order: Order = connection.recv()
            connection.send(("taken",))
            answer = _compute(order, device, connection)
            if answer[0] == "done":
                answer = ("done", _give_back_memory() and not _has_children() and not _is_long(order, device))
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for descriptor in held:
                os.close(descriptor)  # before the answer: the flow's process may now be the lock's last holder
            connection.send(answer)


def _is_long(order: Order, device: Device) -> bool:
    """Return whether a step is a training on the CPU, which may share the cores with short steps."""
    return order.call.step.kind == "training" and not device.is_gpu


def _compute(order: Order, device: Device, connection: Connection) -> tuple[Any, ...]:
    """Compute a step. Return `done`, `memory` if memory ran out, or `error` with the error and its traceback."""
    os.environ.clear()
    os.environ.update(order.environment)
    os.environ["CUDA_VISIBLE_DEVICES"] = device.visible
    os.environ["ADFLOWS_DEVICE"] = device.name  # for people who inspect the process
    if _is_long(order, device):
        os.nice(TRAINING_NICE)  # for the rest of this process
    learn_call(order.call.step.name, order.call)  # output of libraries may reach a worker's log

    def report(*progress: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the flow has ended, and this process will end now
            connection.send(("progress", progress))

    try:
        order.call.run(order.out, Place(device.torch_name, order.batch_size, report), key=order.key)
    except Exception as error:
        from medad.base.devices import is_out_of_memory

        text = traceback.format_exc()
        if is_out_of_memory(error):
            return ("memory",)
        if not _survives_pickling(error):
            return ("error", RuntimeError(f"{type(error).__name__}: {error}"), text)
        return ("error", error, text)
    return ("done",)


def _survives_pickling(error: Exception) -> bool:
    try:
        return type(reduction.ForkingPickler.loads(reduction.ForkingPickler.dumps(error))) is type(error)
    except Exception:
        return False


def _give_back_memory() -> bool:
    """Free what the step has left, on the device and here. Return whether little is left."""
    gc.collect()
    gc.freeze()  # a later collection does not visit the libraries again, which takes 0.2 s
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has this function
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _own_bytes() <= KEPT_BYTES


def _own_bytes() -> int:
    """Return the memory of this process without files and libraries. 0: unknown."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def _has_children() -> bool:
    """Return whether the step has left processes behind. They end with this one."""
    try:
        return any(file.read_text(encoding="ascii").strip() for file in Path("/proc/self/task").glob("*/children"))
    except OSError:
        return bool(multiprocessing.active_children())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
