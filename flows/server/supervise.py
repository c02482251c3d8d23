"""Supervision of the processes of `adflows serve`, `server` and `worker`.

A process that dies is restarted, after a longer delay each time. On Ctrl-C or SIGTERM all processes are ended.
A worker's runs are ended before the worker, so that each run can still report its end to the server. A flow's process
survives if its worker is killed. Such an orphan becomes a child of this process, which ends it too.
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
"""Time that runs get to end. A training checks between two batches whether it must stop."""
KILL_S = 5.0
POLL_S = 0.25
BACKOFF_S = (1.0, 60.0)
STABLE_S = 60.0
"""Lifetime after which a child counts as stable. If it dies later, it is restarted after the shortest delay."""
NICE = 10

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Child:
    """A process that is restarted when it dies."""

    name: str
    command: list[str]
    stop_s: float
    runs_first: bool = False
    """Whether its children are runs, which end first. A run that loses its worker is killed and stays "running"."""
    nice: bool = False
    """Whether it has a lower priority than others: a server must answer while a run trains on all cores."""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    delay_s: float = 0.0
    due: float | None = field(default=None)
    """Time of the next restart, by `time.monotonic`."""

    def start(self) -> None:
        self.due = None
        self.started = time.monotonic()
        # in a new session: Ctrl-C reaches only this process, which ends the children in order
        self.process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=self._prepare)  # noqa: PLW1509

    def _prepare(self) -> None:
        """Set up the child process before its program starts."""
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if self.nice:
            os.nice(NICE)

    def restart_if_ended(self) -> None:
        """Check whether the process ended, and restart it once its delay has passed."""
        now = time.monotonic()
        if self.process is not None and (code := self.process.poll()) is not None:
            self.process = None
            low, high = BACKOFF_S
            self.delay_s = low if now - self.started >= STABLE_S else min(high, max(low, 2 * self.delay_s))
            self.due = now + self.delay_s
            print_result(f"{self.name}: ended with code {code}; restarting in {self.delay_s:.0f} s")
        if self.due is not None and now >= self.due:
            self.start()
            print_result(f"{self.name}: restarted")

    def stop(self) -> None:
        """Ask the process to end, and kill it if it does not end in `stop_s`."""
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
            print_result(f"{self.name}: did not end within {self.stop_s:.0f} s; killing it")
            self.process.kill()
            # a process that waits for a dead network share cannot even be killed
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_S)
        self.process = None


class _StopRequested(BaseException):
    """Raised by Ctrl-C or SIGTERM."""


def run_until_stopped(children: Sequence[Child], begin: Callable[[], None]) -> None:
    """Call `begin`, restart children that die, and end all in the given order on Ctrl-C or SIGTERM."""
    handlers = {number: signal.signal(number, _raise_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    with _adopt_orphans():
        try:
            begin()
            while True:
                for child in children:
                    child.restart_if_ended()
                _reap_orphans({child.process.pid for child in children if child.process is not None})
                time.sleep(POLL_S)
        except _StopRequested:
            print_result("stopping")
        finally:
            # a second Ctrl-C must not leave a process behind
            for number in handlers:
                signal.signal(number, signal.SIG_IGN)
            for child in children:
                child.stop()
            _end_orphans()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    print_result("stopped")


def _raise_stop(number: int, frame: FrameType | None) -> None:
    raise _StopRequested


def _prctl(option: int, value: int) -> None:
    """Set a process option of Linux. Elsewhere this does nothing: a killed `serve` leaves its children running."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


@contextlib.contextmanager
def _adopt_orphans() -> Iterator[None]:
    """Make processes whose parent dies children of this process instead of children of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _reap_orphans(known: set[int]) -> None:
    """Collect dead orphans. The exit codes of `known` children are left for the code that started them."""
    with contextlib.suppress(ChildProcessError):
        # look through all processes only if a child is dead
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            for pid in _children(os.getpid(), dead=True) - known:
                os.waitpid(pid, os.WNOHANG)


def _children(parent: int, *, dead: bool = False) -> set[int]:
    """Return the process ids of the living children of `parent`, or of the dead ones that it has not collected."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # the second field is the program's name in brackets, which may contain any character
            state, its_parent = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if int(its_parent) == parent and (state == "Z") == dead:
                found.add(int(stat.parent.name))
    return found


def _end_runs(worker: int) -> None:
    """Signal runs to end, and wait until they have reported their end to the server."""
    end = time.monotonic() + STOP_RUNS_S
    signalled: set[int] = set()
    while (left := _children(worker)) and time.monotonic() < end:
        for pid in left - signalled:
            print_result(f"worker: ending the run of process {pid}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        signalled |= left
        time.sleep(POLL_S)


def _end_orphans() -> None:
    """End all remaining children, and the orphans that these leave behind."""
    for number, patience_s in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + patience_s
        signalled: set[int] = set()
        while time.monotonic() < end:
            _reap_orphans(set())
            left = _children(os.getpid())
            if not left:
                return
            for pid in left - signalled:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            signalled |= left
            time.sleep(POLL_S)
