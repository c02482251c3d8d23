"""Progress of long steps: to the terminal at every report; of a training also to Prefect's UI every few seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext

from flows.machine.stopping import StoppedError, stopping
from flows.machine.terminal import terminal

if TYPE_CHECKING:
    from medad.base.progress import Progress

UI_INTERVAL_S = 5.0
"""An update of an artifact costs 16 ms."""


@contextlib.contextmanager
def follow(phase: str) -> Iterator[Callable[[Progress], None]]:
    """Give training a callback. The UI's trouble (a server that went away) never stops a training."""
    in_task = TaskRunContext.get() is not None
    artifact: UUID | None = None
    last = -UI_INTERVAL_S

    def on_progress(progress: Progress) -> None:
        nonlocal artifact, last
        if stopping.is_set():
            raise StoppedError
        terminal.training(progress)
        now = time.monotonic()
        ended = progress.step == progress.steps
        if not in_task or (now - last < UI_INTERVAL_S and not ended):
            return
        last = now
        percent = 100.0 * progress.step / progress.steps
        with contextlib.suppress(Exception):  # whatever a server or the way to it can raise
            if artifact is None:
                made = create_progress_artifact(percent, f"training-{phase}", f"Training, phase {phase}")
                assert isinstance(made, UUID)  # a coroutine only inside an event loop
                artifact = made
            else:
                update_progress_artifact(artifact_id=artifact, progress=percent)

    yield on_progress


def count_images() -> Callable[[int, int], None]:
    """A callback for a step that goes image by image: (done, of how many)."""
    context = TaskRunContext.get()
    name = "" if context is None else context.task_run.name

    def on_progress(done: int, total: int) -> None:
        if stopping.is_set():
            raise StoppedError
        terminal.count(name, done, total)

    return on_progress
