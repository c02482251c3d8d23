"""Steps that need no device and fail on request. They are in a module because steps must be importable."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.store.step import Call, Step
from medad.base.errors import InputError

FAKE = Step("fake", 1, "tests.flows.fake_steps:write_text", ("pydantic",), volatile=frozenset({"timing.txt"}))
READ = Step("read", 1, "tests.flows.fake_steps:read", ("pydantic",))
TAKE = Step("take", 1, "tests.flows.fake_steps:take", ("pydantic",))
TRAIN = Step("train", 1, "tests.flows.fake_steps:train", ("pydantic",), kind="training")
RUNS: list[str] = []
"""Texts that the step has really processed."""
TRIES: list[int] = []
"""Error numbers of all tries to read."""
SEEN: dict[str, Any] = {}
"""Arguments that `take` or `train` received."""


def fake(text: str, breaks: str = "") -> Call:
    """Return a call that fails by a `rule`, a `bug` or an `unreadable` input, or does not fail."""
    if breaks == "unreadable":
        return FAKE(text=text, breaks=breaks, scan=Path("/share/scan.nii.gz"))
    return FAKE(text=text, breaks=breaks)


def write_text(text: str, out: Path, breaks: str = "", scan: Path | None = None) -> None:
    """Write the text."""
    assert scan is None, "a file without a digest has no key"
    RUNS.append(text)
    (out / "half").write_text("written before it broke", encoding="utf-8")
    if breaks == "rule":
        raise InputError("/share/MUSTERMANN/scan.nii.gz", "the scan is bad")
    if breaks == "bug":
        raise ZeroDivisionError("a bug")
    (out / "half").rename(out / "result.txt")
    (out / "result.txt").write_text(text, encoding="utf-8")
    (out / "timing.txt").write_text(str(len(RUNS)), encoding="utf-8")


def reading(failures: int, number: int) -> Call:
    """Return a call that fails this number of times with an error number, and then writes."""
    return READ(failures=failures, number=number)


def read(failures: int, number: int, out: Path) -> None:
    """Fail like an unavailable share, or write."""
    TRIES.append(number)
    if len(TRIES) <= failures:
        path = "/share/MUSTERMANN/scan.nii.gz"
        try:
            raise OSError(number, os.strerror(number), path)
        except OSError as error:
            raise InputError(path, f"cannot be read ({error.strerror})") from error
    (out / "read").write_text("read", encoding="utf-8")


def take(out: Path, **given: Any) -> None:
    """Remember all arguments. The step does not request a device."""
    SEEN.update(given, out=out)


def train(
    settings: str,
    out: Path,
    checkpoint: Path,
    device: str,
    largest_batch: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Leave a checkpoint, and remember the arguments unless the settings are `broken`."""
    checkpoint.write_text("half way", encoding="utf-8")
    if settings == "broken":
        raise ZeroDivisionError
    on_progress(1, 2)
    SEEN.update(device=device, largest_batch=largest_batch, checkpoint=checkpoint)


HARD = Step("hard", 1, "tests.flows.fake_steps:read_hard", ("pydantic",), reads=True)


def hard_reading(scan: Path, act: str) -> Call:
    """Return a call that reads a scan and then crashes, hangs, is killed, or writes the id of its process."""
    return HARD(scan=scan, act=act)


def read_hard(scan: Path, act: str, out: Path) -> None:
    """Do what `act` says, as native code may that reads a broken file."""
    if act == "abort":
        os.write(2, f"terminate called: {scan}".encode())
        os.abort()
    if act == "hang":
        time.sleep(3600)
    if act == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "memory":
        raise MemoryError
    (out / "process").write_text(str(os.getpid()), encoding="utf-8")
