"""Dry runs: the flows' own stages over a tally that makes nothing and says what would be made, and why.

What follows from an artefact that is yet to be made has no key yet: should the artefact come out as it was, its
successors may well be found. So they are called neither cached nor stale but told what they wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from flows.machine.environment import cache_root
from flows.privacy.log_filter import install
from flows.runs.runner import Submitted, Tally, describe
from flows.store.artifacts import ArtefactStore, Ref, content_key
from flows.store.upkeep import Change, nearest
from medad.base.errors import InputError
from medad.base.settings import MachineSettings

if TYPE_CHECKING:
    from flows.runs.outcome import Outcome
    from flows.store.step import Job

PLANNED = "planned"
"""First part of the path of a reference to what is not made; no step has this name."""
SHOWN_CHANGES = 4

_planning: ContextVar[bool] = ContextVar("planning", default=False)

Status = Literal["cached", "make", "follows"]


@dataclass(frozen=True)
class Row:
    """One task of a dry run."""

    step: str
    label: str
    status: Status
    reason: str = ""

    @property
    def line(self) -> str:
        said = {"cached": "cached", "make": f"to make: {self.reason}", "follows": f"waits for {self.reason}"}
        return f"{self.step} {self.label}: {said[self.status]}"


@dataclass(frozen=True)
class Looked(Submitted):
    """A job that was looked up; `found` is a stand-in where it is yet to be made, None where its input is bad."""

    label: str
    found: Ref | None

    def ref(self) -> Ref | None:
        return self.found


class Plan(Tally):
    """Looks jobs up and makes none."""

    def __init__(self, machine: MachineSettings, *, refresh: bool = False) -> None:
        super().__init__(machine, refresh=refresh)
        self.rows: list[Row] = []

    def _begin(self) -> None:
        install()

    def submit(self, label: str, job: Job) -> Submitted:
        """Look a job up; what it says is noted once."""
        try:
            row, found = self._look(label, job)
        except InputError as error:
            waits = cache_root() / PLANNED
            if waits not in error.path.parents:
                self.fail(describe(label, job.step.name, error))
                return Looked(label, None)
            row, found = Row(job.step.name, label, "follows", error.path.relative_to(waits).parts[0]), None
        self.rows.append(row)
        return Looked(label, found or Ref(step=job.step.name, key="", digest="", path=f"{PLANNED}/{job.step.name}"))

    def _look(self, label: str, job: Job) -> tuple[Row, Ref | None]:
        name = job.step.name
        waits_for = sorted({ref.step for ref in refs_in(job) if not ref.made})
        if waits_for:
            return Row(name, label, "follows", ", ".join(waits_for)), None
        store, parts = ArtefactStore(), job.parts()
        if self.refresh:
            return Row(name, label, "make", "--refresh"), None
        found = store.find(job.step, content_key(parts))
        if found is not None:
            return Row(name, label, "cached"), found
        return Row(name, label, "make", _why(nearest(store, job.step, parts))), None


def _why(changes: list[Change] | None) -> str:
    if changes is None:
        return "nothing of this step is cached"
    if not changes:
        return "the cached artefact is damaged"
    more = f" and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
    return ", ".join(change.line for change in changes[:SHOWN_CHANGES]) + more


def refs_in(value: Any) -> Iterator[Ref]:
    """All references in a job's fields, however deep."""
    if isinstance(value, Ref):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from refs_in(getattr(value, each.name))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from refs_in(each)


def new_tally(machine: MachineSettings, *, refresh: bool) -> Tally:
    """The tally of a flow: one that runs its jobs, or in a dry run one that looks them up."""
    return Plan(machine, refresh=refresh) if _planning.get() else Tally(machine, refresh=refresh)


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """Within, flows called as plain functions make nothing."""
    token = _planning.set(True)
    try:
        yield
    finally:
        _planning.reset(token)


def plan_flow(flow: Callable[..., Any], **parameters: Any) -> Outcome:
    """What a flow would do, without Prefect and without writing a run folder; `details["plan"]` holds the rows."""
    from flows.runs.outcome import Outcome

    with planning():
        outcome = flow.fn(**parameters).result(raise_on_failure=False)  # type: ignore[attr-defined]
    if isinstance(outcome, BaseException):
        raise outcome
    assert isinstance(outcome, Outcome)
    return outcome


def planned(tally: Tally, **more: Any) -> Outcome | None:
    """How a flow ends in a dry run; None where this is none."""
    from flows.runs.outcome import Outcome

    if not isinstance(tally, Plan):
        return None
    rows = [{"step": row.step, "case": row.label, "status": row.status, "reason": row.reason} for row in tally.rows]
    lines = [row.line for row in tally.rows]
    return Outcome.of(tally, details={"plan": rows, "lines": lines} | more)
