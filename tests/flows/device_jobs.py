"""Device steps that need no device. They are in a module because a child process must import them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from flows.devices import worker
from flows.devices.slots import Device
from flows.store.step import Call, Step
from medad.base.errors import InputError
from medad.base.settings import ANY_MACHINE, MachineSettings


def is_alive(pid: int) -> bool:
    """Return whether a process runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


PROBE = Step(
    "probe",
    1,
    "tests.flows.device_jobs:probe",
    ("pydantic",),
    kind="inference",
    not_in_key=frozenset({"folder", "seconds"}),
)


HOARD: list[bytes] = []
"""Memory that a step does not give back."""


def idle_worker(connection: Connection, device: Device, quiet: bool) -> None:
    """Be a worker that waits for an order only shortly."""
    worker.IDLE_S = 0.2
    worker.worker_main(connection, device, quiet)


def probing(
    text: str,
    act: str = "",
    machine: MachineSettings = ANY_MACHINE,
    batch_size: int = 8,
    folder: Path | None = None,
    seconds: float = 0.0,
) -> Call:
    """Return a call that records where it ran and then does what `act` says.

    Steps with the act `alone` write into `folder` to notice each other on one device.
    """
    return PROBE(text=text, act=act, folder=folder, seconds=seconds, machine=machine, batch_size=batch_size)


def alone(text: str, folder: Path, seconds: float) -> None:
    """Stay on the device for a while. Log the times, and whether another step was on it."""
    device = os.environ["ADFLOWS_DEVICE"]
    mark, log = folder / f"{device}.pid", folder / "log"

    def note(what: str) -> None:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.monotonic()} {what} {device} {text}\n")

    try:
        other = int(mark.read_text(encoding="ascii"))
    except FileNotFoundError:
        other = 0
    if other and is_alive(other):
        note("VIOLATION")
    fresh = folder / f"{device}.{os.getpid()}"
    fresh.write_text(str(os.getpid()), encoding="ascii")
    fresh.replace(mark)
    note("begin")
    time.sleep(seconds)
    note("end")
    mark.unlink()


def probe(
    text: str,
    act: str,
    folder: Path | None,
    seconds: float,
    out: Path,
    *,
    device: str,
    largest_batch: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Record where this runs, then do what `act` says."""
    facts = {
        "device": device,
        "visible": os.environ["CUDA_VISIBLE_DEVICES"],
        "batch_size": largest_batch,
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "marker": os.environ.get("MARKER", ""),
    }
    (out / "what").write_text(json.dumps(facts), encoding="utf-8")
    act, _, argument = act.partition(" ")
    on_progress(1, 2)
    if act == "hang" or act == "grandchild":
        if act == "grandchild":
            child = os.fork()
            if not child:
                time.sleep(3600)
            Path(argument).write_text(str(child), encoding="utf-8")
        threading.Event().wait(3600)
    elif act == "spin":
        while True:
            sum(range(1000))
    elif act == "rule":
        raise InputError("/share/scan.nii.gz", "the scan is bad")
    elif act == "bug":
        raise ZeroDivisionError("a bug")
    elif act == "unpicklable":
        raise type("LocalError", (Exception,), {})("no other process knows this class")
    elif act == "die":
        os.kill(os.getpid(), signal.Signals(int(argument)))
    elif act == "exit":
        os._exit(int(argument))
    elif act == "memory":  # as on a GPU that has memory for batches of this size
        import torch

        if largest_batch > int(argument):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    elif act == "killed-for-memory":
        if largest_batch > int(argument):
            os.kill(os.getpid(), signal.SIGKILL)
    elif act == "no-gpu-memory":
        import torch

        if os.environ.get("ADFLOWS_DEVICE", "").startswith("gpu"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    elif act == "leave":
        child = os.fork()
        if not child:
            time.sleep(3600)
        Path(argument).write_text(str(child), encoding="utf-8")
    elif act == "hoard":
        HOARD.append(b"1" * (int(argument) << 20))
    elif act == "alone":
        assert folder is not None
        alone(text, folder, seconds)
    on_progress(2, 2)
