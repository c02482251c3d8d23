"""Dry runs: the flow runs with a runner that makes no artifacts and records which it would make, and why.

A call that depends on an artifact not yet made has no key yet. Whether it is cached depends on that artifact's content.
The plan therefore calls it neither cached nor to be made, and names the step that it waits for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flows.machine.environment import cache_root
from flows.privacy.log_filter import install
from flows.runs.runner import FinishedCall, Runner, SubmittedCall, to_case_failure
from flows.store.access import require_cache
from flows.store.artifacts import ArtifactStore
from flows.store.references import Ref
from flows.store.step import Call, content_key
from flows.store.upkeep import Change, nearest
from medad.base.errors import InputError

NOT_MADE = "planned"
"""First part of the path of a reference to an artifact that does not exist yet. No step has this name."""
MAX_CHANGES = 4

Status = Literal["cached", "make", "follows"]


@dataclass(frozen=True)
class PlannedCall:
    """One call of a dry run, and what a real run would do with it."""

    step: str
    label: str
    status: Status
    reason: str = ""

    @property
    def line(self) -> str:
        texts = {"cached": "cached", "make": f"to make: {self.reason}", "follows": f"waits for {self.reason}"}
        return f"{self.step} {self.label}: {texts[self.status]}"


class PlanRunner(Runner):
    """A runner that looks calls up in the cache and makes no artifacts."""

    makes_artifacts = False

    def begin(self) -> None:
        install()
        require_cache(writable=False)
        self.rows: list[PlannedCall] = []

    @property
    def max_device_calls(self) -> int:
        return 1

    def submit(self, label: str, call: Call) -> SubmittedCall:
        """Look a call up. Return a placeholder reference if its artifact does not exist yet."""
        step = call.step.name
        try:
            row, found = self._plan(label, call)
        except InputError as error:
            waits = cache_root() / NOT_MADE
            if waits not in error.path.parents:
                self.record_failure(to_case_failure(label, step, error))
                return FinishedCall(label, None)
            row, found = PlannedCall(step, label, "follows", error.path.relative_to(waits).parts[0]), None
        self.rows.append(row)
        return FinishedCall(label, found or Ref(step=step, key="", digest="", path=f"{NOT_MADE}/{step}"))

    def _plan(self, label: str, call: Call) -> tuple[PlannedCall, Ref | None]:
        name = call.step.name
        waits_for = sorted({ref.step for ref in call.refs() if not ref.made})
        if waits_for:
            return PlannedCall(name, label, "follows", ", ".join(waits_for)), None
        store, parts = ArtifactStore(), call.parts()
        if self.refresh:
            return PlannedCall(name, label, "make", "--refresh"), None
        found = store.find(call.step, content_key(parts))
        if found is not None:
            return PlannedCall(name, label, "cached"), found
        return PlannedCall(name, label, "make", _reason(nearest(store, call.step, parts))), None


def _reason(changes: list[Change] | None) -> str:
    if changes is None:
        return "nothing of this step is cached"
    if not changes:
        return "the cached artifact is damaged"
    more = f" and {len(changes) - MAX_CHANGES} more" if len(changes) > MAX_CHANGES else ""
    return ", ".join(change.line for change in changes[:MAX_CHANGES]) + more
