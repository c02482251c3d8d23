"""A killed training: tests raise an exception from its progress callback."""

from __future__ import annotations

from collections.abc import Callable

from medad.base.progress import Progress


class TrainingKilled(BaseException):
    """The end of a training that is killed."""


def kill_at(step: int) -> Callable[[Progress], None]:
    """Return a progress callback that ends training in this step. The checkpoint of the step before is on disk."""

    def kill(progress: Progress) -> None:
        if progress.step == step:
            raise TrainingKilled

    return kill
