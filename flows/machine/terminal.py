"""Output: results on standard output, and progress on the user's terminal (standard error).

A run shows one live bar per stage on a terminal. In a log it prints one line per stage at its end, and one per failure.

Progress may show paths, and paths may contain names of patients. `terminal` is therefore silent until the command line
turns it on. A worker's output stays free of paths.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from flows.machine.stage import Stage, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    from medad.base.progress import Progress

Verbosity = Literal["quiet", "normal", "verbose", "log"]
"""How much is printed besides results and failures.

`quiet`: nothing. `normal`: stages and notes. `verbose`: also each task. `log`: the same beside Prefect's log, without
bars.
"""
LOG_INTERVAL_S = 30.0
"""Time between lines of one task's progress in a verbose log."""
SHOWN_AFTER_S = 5.0
"""Time after which a wait is shown."""
BAR_COLUMNS = 24


def print_result(text: str) -> None:
    """Print a line of the result on standard output."""
    import typer

    typer.echo(text)


class Terminal:
    """The user's terminal. It shows lines, and the stages and waits of the run in progress."""

    def __init__(self) -> None:
        self.enabled = False
        self.verbosity: Verbosity = "normal"
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._running = False
        self._stages: dict[str, Stage] = {}
        self._latest = ""
        """Stage of the latest submitted call."""
        self._open = 0
        """Number of open blocks of `stages`."""
        self._waits: dict[object, tuple[float, str]] = {}
        self._last_line: dict[object, float] = {}

    def line(self, text: str) -> None:
        """Print one line that the user should see: a note, or a warning."""
        if self.verbosity != "quiet":
            self._print(text)

    def detail(self, text: str) -> None:
        """Print one line if each task is to be shown."""
        if self.verbosity in ("verbose", "log"):
            self._print(text)

    def failure(self, text: str) -> None:
        """Print the line of a failure, however little else is printed."""
        self._print(text)

    def _print(self, text: str) -> None:
        # without the lock: the bars' thread takes the console's lock first, then this object's
        if self.enabled:
            live = self._live
            console = _console() if live is None else live.console
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            if live is not None:
                live.refresh()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Show the stages of a run inside the `with` block."""
        if not self.enabled or self._running or self.verbosity == "quiet":
            yield
            return
        self._running = True
        console = _console()
        try:
            with self._bars(console) if console.is_terminal and self.verbosity != "log" else contextlib.nullcontext():
                try:
                    yield
                finally:
                    self._end_stages(lambda stage: True)
        finally:
            self._running, self._latest, self._open = False, "", 0
            self._stages.clear()
            self._last_line.clear()

    @contextlib.contextmanager
    def _bars(self, console: Console) -> Iterator[None]:
        from rich.live import Live

        with Live(get_renderable=self._table, console=console, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def _table(self) -> Table:
        """Return the bars of all stages that have not ended, and what the run waits for."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        with self._lock:
            for stage in self._stages.values():
                bar = ProgressBar(total=stage.total, completed=stage.completed, width=BAR_COLUMNS)
                table.add_row(stage.name, bar, stage.note)
            waits = dict.fromkeys(self._shown_waits())
            if not self._latest:
                table.add_row("starting")
        frame = Table.grid()
        frame.add_row(table)
        for text in waits:
            frame.add_row(text)
        return frame

    @contextlib.contextmanager
    def stages(self, calls: Mapping[str, int] | None = None) -> Iterator[None]:
        """Keep stages side by side inside the `with` block, for calls whose steps take turns.

        `calls` announces numbers of calls to come, by step. A stage ends with its last announced call, or at the end of
        the outermost block. Without a block, it ends when its calls are done and a call of another step begins.
        """
        if not self._open:
            self._end_stages(lambda stage: stage.idle)
        self.announce(calls or {})
        with self._lock:
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
            if not self._open:
                self._end_stages(lambda stage: stage.idle)

    def announce(self, calls: Mapping[str, int]) -> None:
        """Announce numbers of calls to come, by step."""
        with self._lock:
            for name, number in calls.items() if self._running else ():
                if number:
                    stage = self._stages.setdefault(name, Stage(name))
                    stage.expected = stage.total + number

    def submitted(self, name: str) -> None:
        """Count a call of a step that will run."""
        if not self._running:
            return
        with self._lock:
            self._stages.setdefault(name, Stage(name)).submitted += 1
            self._latest = name
        self._end_stages(self._is_over)

    def ended(self, name: str, *, cached: bool = False, failed: bool = False) -> None:
        """Count the end of a call."""
        with self._lock:
            if (stage := self._stages.get(name)) is not None:
                stage.count(cached=cached, failed=failed)
        self._end_stages(self._is_over)

    def _is_over(self, stage: Stage) -> bool:
        """Return whether a stage has ended, as far as is known."""
        if not stage.idle or stage.ended < stage.expected:
            return False
        return self._open < 2 if stage.expected else not self._open and stage.name != self._latest

    def _end_stages(self, over: Callable[[Stage], bool]) -> None:
        """Print the lines of stages that have ended, and forget them."""
        with self._lock:
            ended = [each for each in self._stages.values() if each.ended and over(each)]
            for stage in ended:
                del self._stages[stage.name]
        for stage in ended:
            self.line(stage.line)

    def training(self, name: str, key: object, progress: Progress) -> None:
        """Show the progress of a training. `key` identifies the call."""
        note = f"epoch {progress.epoch} of {progress.epochs}, loss {progress.loss:.4f}"
        if progress.phase != name:
            note = f"{progress.phase}: {note}"
        line = f"{name}: {note}, {format_seconds(progress.seconds_left)} left"
        self._progress(name, key, progress.step, progress.steps, note, line)

    def count(self, name: str, key: object, done: int, total: int) -> None:
        """Show how many images a call has processed. `key` identifies the call."""
        text = f"{done} of {total} images"
        self._progress(name, key, done, total, text, f"{name}: {text}")

    def _progress(self, name: str, key: object, done: int, total: int, note: str, line: str) -> None:
        if not self.enabled:
            return
        with self._lock:
            if (stage := self._stages.get(name)) is not None:
                stage.parts[key] = (done / total if total else 0.0, note)
            now = time.monotonic()
            due = self._live is None and now - self._last_line.setdefault(key, now) >= LOG_INTERVAL_S
            if due:
                self._last_line[key] = now
        if due:
            self.detail(line)

    def end_progress(self, name: str, key: object) -> None:
        """Forget the progress of a call that has ended or stopped."""
        with self._lock:
            self._last_line.pop(key, None)
            if (stage := self._stages.get(name)) is not None:
                stage.parts.pop(key, None)

    @contextlib.contextmanager
    def waiting(self, text: str = "", *, waited_s: float = 0.0) -> Iterator[Callable[[str], None]]:
        """Show what this thread waits for, if it waits for more than `SHOWN_AFTER_S` inside the `with` block.

        The text is one line, such as `waiting for the CPU: run X of user Y has it since 05:01`. The yielded function
        replaces the text, and a loop that polls may call it each time. A terminal shows the text below the bars until
        the block ends. A log gets one line, and another one if the text changes. Equal texts of several threads are
        shown once. Nothing is shown if the terminal is off, quiet or silent. `waited_s` is the time that the thread has
        waited before.

            with terminal.waiting() as say:
                while not (found := look()):
                    say(f"waiting for the CPU: {holder()}")
                    time.sleep(POLL_S)
        """
        key = object()
        began = time.monotonic() - waited_s
        timer = threading.Timer(max(0.0, SHOWN_AFTER_S - waited_s), self._print_waits)
        timer.daemon = True

        def say(new: str) -> None:
            with self._lock:
                changed = self._waits.get(key, (began, ""))[1] != new
                self._waits[key] = (began, new)
            if changed and time.monotonic() - began >= SHOWN_AFTER_S:
                self._print_waits()

        if self.enabled:
            timer.start()
        say(text)
        try:
            yield say
        finally:
            timer.cancel()
            with self._lock:
                _, last = self._waits.pop(key)
                if all(other != last for _, other in self._waits.values()):
                    self._last_line.pop(last, None)

    def _shown_waits(self) -> list[str]:
        now = time.monotonic()
        return [text for began, text in self._waits.values() if text and now - began >= SHOWN_AFTER_S]

    def _print_waits(self) -> None:
        """Print the lines of waits in a log, each once. A terminal shows them below the bars."""
        if self._live is not None:
            return
        with self._lock:
            new = [text for text in dict.fromkeys(self._shown_waits()) if text not in self._last_line]
            self._last_line |= dict.fromkeys(new, time.monotonic())
        for text in new:
            self.line(text)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


terminal = Terminal()
