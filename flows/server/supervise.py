"""Processes that are kept alive and, when told to stop, all ended: for `adflows serve`, `server` and `worker`.

What dies is started again, later each time. A worker's runs are told to end before it is, so that each still says so.
Whatever is left behind (a flow's process goes on when its worker is killed) becomes a child of this process, which ends
it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from flows.machine.terminal import print_result

STOP_RUNS_S = 60.0
"""A step that trains looks at whether it is to stop between two batches."""
POLL_S = 0.25
BACKOFF_S = (1.0, 60.0)
LIVED_S = 60.0
"""A child that lived this long is started again at once."""
NICE = 10

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Child:
    """A process that is kept alive."""

    name: str
    command: list[str]
    stop_s: float
    runs_first: bool = False
    """Its children are runs, which are told first: one whose worker just goes away is killed and stays "running"."""
    nice: bool = False
    """Behind others when cores are short: a server must answer while a run trains on all of them."""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    delay_s: float = 0.0
    due: float | None = field(default=None)
    """When it is to be started again."""

    def start(self) -> None:
        self.due = None
        self.started = time.monotonic()
        # a session of its own: Ctrl-C in a terminal is for us, and we say who stops when
        self.process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=self._prepare)  # noqa: PLW1509

    def _prepare(self) -> None:
        """In the child, before its program."""
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if self.nice:
            os.nice(NICE)

    def look(self) -> None:
        """Note a death, and start again when it is time."""
        now = time.monotonic()
        if self.process is not None and (code := self.process.poll()) is not None:
            self.process = None
            low, high = BACKOFF_S
            self.delay_s = low if now - self.started >= LIVED_S else min(high, max(low, 2 * self.delay_s))
            self.due = now + self.delay_s
            print_result(f"{self.name}: ended with code {code}; starts again in {self.delay_s:.0f} s")
        if self.due is not None and now >= self.due:
            self.start()
            print_result(f"{self.name}: started again")

    def stop(self) -> None:
        """Ask it to end, and make it end when it does not."""
        self.due = None
        if self.process is None:
            return
        if self.runs_first:
            _end_runs(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(self.stop_s)
        except subprocess.TimeoutExpired:
            print_result(f"{self.name}: did not end in {self.stop_s:.0f} s and is killed")
            self.process.kill()
            self.process.wait()
        self.process = None


class _ToldToStop(BaseException):
    """Ctrl-C or SIGTERM."""


def keep(children: Sequence[Child], begin: Callable[[], None]) -> None:
    """Start, restart what dies, and end all in the order given when told to."""
    handlers = {number: signal.signal(number, _tell) for number in (signal.SIGINT, signal.SIGTERM)}
    with _orphans_are_ours():
        try:
            begin()
            while True:
                for child in children:
                    child.look()
                _bury({child.process.pid for child in children if child.process is not None})
                time.sleep(POLL_S)
        except _ToldToStop:
            print_result("stopping")
        finally:
            # a second Ctrl-C is no reason to leave a process behind; SIGKILL is
            for number in handlers:
                signal.signal(number, signal.SIG_IGN)
            for child in children:
                child.stop()
            _end_orphans()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    print_result("stopped")


def _tell(number: int, frame: FrameType | None) -> None:
    raise _ToldToStop


def _prctl(option: int, value: int) -> None:
    """Linux alone has it; elsewhere a killed `serve` leaves its children, as a killed parent does."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


@contextlib.contextmanager
def _orphans_are_ours() -> Iterator[None]:
    """Processes whose parent dies become this process's children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _bury(known: set[int]) -> None:
    """Collect dead orphans; the known children's ends are read by whoever started them."""
    for pid in _children(os.getpid()) - known:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _children(parent: int) -> set[int]:
    """Process ids of a process's children."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # the second field is a name in brackets and may hold anything
            state, its_parent = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if int(its_parent) == parent and state != "Z":
                found.add(int(stat.parent.name))
    return found


def _end_runs(worker: int) -> None:
    """Tell runs to end, and give them the time to tell the server so."""
    end = time.monotonic() + STOP_RUNS_S
    told: set[int] = set()
    while (left := _children(worker)) and time.monotonic() < end:
        for pid in left - told:
            print_result(f"worker: ending the run of process {pid}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        told |= left
        time.sleep(POLL_S)


def _end_orphans() -> None:
    """End what is left, and what that leaves."""
    for number, patience_s in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + patience_s
        told: set[int] = set()
        while time.monotonic() < end:
            _bury(set())
            left = _children(os.getpid())
            if not left:
                return
            for pid in left - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            told |= left
            time.sleep(POLL_S)
