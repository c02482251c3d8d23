"""How a flow ends, for Prefect and for whoever called it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.runs.runner import Failure, Tally
from flows.store.step import FailedStep


@dataclass(frozen=True)
class Outcome:
    """What a flow did, for whoever called it."""

    computed: int
    cached: int
    failures: tuple[Failure, ...] = ()
    run_folder: Path | None = field(default=None, repr=False)
    headline: dict[str, float | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """What else a command prints as JSON."""

    @classmethod
    def of(cls, tally: Tally, **more: Any) -> Outcome:
        """What was done so far."""
        return cls(tally.computed, tally.cached, tuple(tally.failures), **more)

    @property
    def bug(self) -> Exception | None:
        return next((failure.bug for failure in self.failures if failure.bug is not None), None)


def final_state(outcome: Outcome, *, useful: bool) -> State[Outcome]:
    """Completed, with another name where a case failed; Failed for a bug, or when nothing useful came out."""
    message = f"{outcome.computed} computed, {outcome.cached} cached, {len(outcome.failures)} failed"
    if outcome.bug is not None or (outcome.failures and not useful):
        return Failed(message=message, data=outcome)
    name = "CompletedWithFailures" if outcome.failures else "Completed"
    return Completed(name=name, message=message, data=outcome)


def failed_steps(tally: Tally, *, opaque: bool) -> tuple[FailedStep, ...]:
    """What a report says of the failures; names of files only where cases are not to be named by content."""
    return tuple(
        FailedStep(f.case_id, f.stage, f.rule, "" if opaque or not f.path else Path(f.path).name, f.category)
        for f in tally.failures
    )
