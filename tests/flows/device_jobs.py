"""Device steps that need no device: each does what its name says. Importable, since a step's process must find them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.devices.child import Place
from flows.store.artifacts import Step
from flows.store.step import DeviceJob
from medad.base.errors import InputError
from medad.base.settings import ANY_MACHINE, MachineSettings


def is_alive(pid: int) -> bool:
    """Running: not a zombie that nobody has asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@dataclass(frozen=True)
class Probe(DeviceJob):
    """Writes down where it ran, and does with it what `act` says."""

    text: str
    act: str = ""
    machine: MachineSettings = ANY_MACHINE
    batch_size: int = 8
    folder: Path | None = None
    """Where steps that are to be alone on their device tell of one another."""
    seconds: float = 0.0
    kind = "inference"
    step = Step("probe", 1, (), ("pydantic",))

    def inputs(self) -> dict[str, Any]:
        return {"text": self.text, "act": self.act}

    def alone(self) -> None:
        """Stay a while on the device; write down when, and whether anybody else was there."""
        assert self.folder is not None
        device = os.environ["ADFLOWS_DEVICE"]
        mark, log = self.folder / f"{device}.pid", self.folder / "log"

        def note(what: str) -> None:
            with log.open("a", encoding="utf-8") as stream:
                stream.write(f"{time.monotonic()} {what} {device} {self.text}\n")

        try:
            other = int(mark.read_text(encoding="ascii"))
        except FileNotFoundError:
            other = 0
        if other and is_alive(other):
            note("VIOLATION")
        fresh = self.folder / f"{device}.{os.getpid()}"
        fresh.write_text(str(os.getpid()), encoding="ascii")
        fresh.replace(mark)
        note("begin")
        time.sleep(self.seconds)
        note("end")
        mark.unlink()

    def run_on(self, out: Path, place: Place) -> None:
        facts = {
            "device": place.device,
            "visible": os.environ["CUDA_VISIBLE_DEVICES"],
            "batch_size": place.batch_size,
            "pid": os.getpid(),
            "group": os.getpgid(0),
            "marker": os.environ.get("MARKER", ""),
        }
        (out / "what").write_text(json.dumps(facts), encoding="utf-8")
        act, _, argument = self.act.partition(" ")
        place.report(1, 2)
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
        elif act == "memory":  # as from a GPU that holds batches of so many
            import torch

            if place.batch_size > int(argument):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        elif act == "killed-for-memory":
            if place.batch_size > int(argument):
                os.kill(os.getpid(), signal.SIGKILL)
        elif act == "no-gpu-memory":
            import torch

            if os.environ.get("ADFLOWS_DEVICE", "").startswith("gpu"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        elif act == "alone":
            self.alone()
        place.report(2, 2)
