"""Progress of long steps, shown on the terminal. A training's progress also goes to Prefect's UI."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.machine.stopping import StoppedError, stopping
from flows.machine.terminal import terminal

if TYPE_CHECKING:
    from prefect.context import TaskRunContext

    from flows.store.step import Call
    from medad.base.progress import Progress

UI_INTERVAL_S = 5.0
"""Shortest time between two updates in the UI. An update takes 16 ms."""


def current_task() -> TaskRunContext | None:
    """Return the Prefect task that this thread runs. None: it runs none. Prefect is not imported for this."""
    if "prefect" not in sys.modules:
        return None
    from prefect.context import TaskRunContext

    return TaskRunContext.get()


@contextlib.contextmanager
def progress_callback(call: Call) -> Iterator[Callable[..., None]]:
    """Yield the callback for a call's progress. It takes a training's `Progress`, or two counts of images."""
    name, key = call.step.name, object()
    show = _training_callback(call, key) if call.step.kind == "training" else _image_callback(name, key)

    def report(*progress: Any) -> None:
        if stopping.is_set():
            raise StoppedError
        show(*progress)

    try:
        yield report
    finally:
        terminal.end_progress(name, key)


def _image_callback(name: str, key: object) -> Callable[[int, int], None]:
    return lambda done, total: terminal.count(name, key, done, total)


def _training_callback(call: Call, key: object) -> Callable[[Progress], None]:
    """Return the callback of a training. An error of the UI, such as a lost server, never stops the training."""
    in_task, phase = current_task() is not None, call.phase
    artifact: UUID | None = None
    last = -UI_INTERVAL_S

    def show(progress: Progress) -> None:
        nonlocal artifact, last
        terminal.training(call.step.name, key, progress)
        now = time.monotonic()
        ended = progress.step == progress.steps
        if not in_task or (now - last < UI_INTERVAL_S and not ended):
            return
        last = now
        percent = 100.0 * progress.step / progress.steps
        with contextlib.suppress(Exception):  # a server or the network can raise anything
            from prefect.artifacts import create_progress_artifact, update_progress_artifact

            if artifact is None:
                made = create_progress_artifact(percent, f"training-{phase}", f"Training, phase {phase}")
                assert isinstance(made, UUID)  # it is a coroutine only inside an event loop
                artifact = made
            else:
                update_progress_artifact(artifact_id=artifact, progress=percent)

    return show
