"""A training that is killed: what a test raises out of the report of its progress."""

from __future__ import annotations

from collections.abc import Callable

from medad.base.progress import Progress


class TrainingKilled(BaseException):
    """Ends a training in the middle."""


def kill_at(step: int) -> Callable[[Progress], None]:
    """Let training end in this step: the checkpoint of the step before is on disk."""

    def kill(progress: Progress) -> None:
        if progress.step == step:
            raise TrainingKilled

    return kill
