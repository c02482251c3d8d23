"""One row's view of a tally that several rows share, each going on in a thread of its own."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from flows.runs.runner import Failure, Submitted, Tally
from flows.store.artifacts import Ref
from flows.store.step import Job


class RowTally(Tally):
    """Hands jobs and failures on to the whole run's tally, under labels that name the row.

    All lists are the whole's own, so that everything is counted there once.
    """

    def __init__(
        self, whole: Tally, row: str, part: str, lock: threading.Lock, labels: dict[str, tuple[str, str]]
    ) -> None:
        """A view for one part of a row.

        Parameters
        ----------
        row, part
            As `tp` and `seed 0`.
        lock
            One for all rows of a tally: Prefect numbers a flow's tasks without one of its own.
        labels
            Gets, for each label handed on, the row and what of it.
        """
        # the base's initialiser would begin another run
        self.whole, self.row, self.part, self.lock, self.labels = whole, row, part, lock, labels
        self.machine, self.refresh = whole.machine, whole.refresh
        self.records, self.failures, self.notes = whole.records, whole.failures, whole.notes

    def label(self, case_id: str) -> str:
        """What a task or failure of this row is called."""
        label = f"{self.row}, {self.part}: {case_id}"
        self.labels[label] = (self.row, f"{self.part}: {case_id}")
        return label

    def submit(self, label: str, job: Job) -> Submitted:
        with self.lock:
            return self.whole.submit(self.label(label), job)

    def fail(self, failure: Failure) -> None:
        self.whole.fail(replace(failure, case_id=self.label(failure.case_id)))


@dataclass
class Once(Submitted):
    """A job that several rows wait for: its end is noted once."""

    task: Submitted

    def __post_init__(self) -> None:
        self.label = self.task.label
        self._lock = threading.Lock()
        self._known: tuple[Ref | None] | None = None

    def ref(self) -> Ref | None:
        with self._lock:
            if self._known is None:
                self._known = (self.task.ref(),)
            return self._known[0]
