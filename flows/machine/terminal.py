"""Output: results on standard output, and progress on the user's terminal (standard error).

Progress may show paths, and paths may contain names of patients. `terminal` is therefore silent until the command line
turns it on. A worker's output stays free of paths.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from medad.base.progress import Progress

LOG_INTERVAL_S = 30.0
"""Time between lines of progress if standard error is not a terminal."""


def print_result(text: str) -> None:
    """Print a line of the result on standard output."""
    import typer

    typer.echo(text)


class Terminal:
    """The user's terminal. It shows lines, and one progress bar per training phase or step."""

    def __init__(self) -> None:
        self.enabled = False
        self._lock = threading.Lock()
        self._bars: Bars | None = None
        self._bar: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}

    def line(self, text: str) -> None:
        """Print one line."""
        if not self.enabled:
            return
        from rich.console import Console

        with self._lock:
            console = self._bars.console if self._bars is not None else Console(stderr=True)
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def bars(self) -> Iterator[None]:
        """Show progress bars inside the `with` block. A block inside another one does nothing."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        if not self.enabled or not console.is_terminal or self._bars is not None:
            yield
            return
        columns = (
            TextColumn("{task.description:>12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bars:
            self._bars = bars
            try:
                yield
            finally:
                self._bars = None
                self._bar.clear()

    def training(self, progress: Progress) -> None:
        """Show the progress of a training."""
        left = format_seconds(progress.seconds_left)
        loss = f"loss {progress.loss:.4f}"
        long = (
            f"{progress.phase}: step {progress.step} of {progress.steps}, epoch {progress.epoch} of "
            f"{progress.epochs}, {loss}, {left} left"
        )
        self._show(progress.phase, progress.step, progress.steps, f"{loss} left {left}", long)

    def count(self, name: str, done: int, total: int, what: str = "images") -> None:
        """Show how many images a step has processed."""
        self._show(name, done, total, "", f"{name}: {done} of {total} {what}")

    def _show(self, name: str, done: int, total: int, note: str, long: str) -> None:
        if not self.enabled:
            return
        with self._lock:
            if self._bars is not None:
                if name not in self._bar:
                    self._bar[name] = self._bars.add_task(name, total=total, note=note)
                self._bars.update(self._bar[name], completed=done, note=note)
                if done == total:
                    self._bars.remove_task(self._bar.pop(name))
                return
            now = time.monotonic()
            if now - self._last_line.setdefault(name, now) < LOG_INTERVAL_S:
                return
            self._last_line[name] = now
        self.line(long)


def format_seconds(seconds: float) -> str:
    """Format a time, for example `1 h 02 min`, `2 min 03 s` or `4.5 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


terminal = Terminal()
