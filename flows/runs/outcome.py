"""How a flow ends, for whoever called it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.runs.plan import PlanRunner
from flows.runs.run_folder import RunFolder, publish_run_folder
from flows.runs.runner import Runner
from flows.runs.ui_artifacts import UiLayout, create_run_artifacts
from medad.base.errors import CaseFailure


@dataclass(frozen=True)
class Outcome:
    """What a flow did."""

    computed: int
    cached: int
    failures: tuple[CaseFailure, ...] = ()
    run_folder: Path | None = field(default=None, repr=False)
    headline: dict[str, float | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """What else a command prints as JSON."""
    useful: bool = True
    """Whether something came out that somebody can use, in spite of the failures."""
    summary: str = ""
    """What was done, in one line without a path. Empty: the counts."""

    @classmethod
    def from_runner(cls, runner: Runner, **more: Any) -> Outcome:
        """Return what was done so far; of a dry run its plan, whatever `more` says of results."""
        if isinstance(runner, PlanRunner):
            rows = [
                {"step": row.step, "case": row.label, "status": row.status, "reason": row.reason} for row in runner.rows
            ]
            plan = {"plan": rows, "lines": [row.line for row in runner.rows]}
            return cls(runner.computed, runner.cached, tuple(runner.failures), details=plan)
        return cls(runner.computed, runner.cached, tuple(runner.failures), **more)

    @property
    def bug(self) -> Exception | None:
        return next((failure.bug for failure in self.failures if failure.bug is not None), None)

    @property
    def message(self) -> str:
        """One line for Prefect's state."""
        counts = f"{self.computed} computed, {self.cached} cached, {len(self.failures)} failed"
        return self.summary or counts


def finish_run(
    runner: Runner,
    run: RunFolder,
    layout: UiLayout,
    *,
    private: bool = False,
    useful: bool,
    details: Callable[[], dict[str, Any]] = dict,
) -> Outcome:
    """Publish into the run folder and show in Prefect's UI, there without a `private` folder's path; plan a dry run.

    `details` are asked for once the run folder is there.
    """
    if not runner.makes_artifacts:
        return Outcome.from_runner(runner)
    headline = publish_run_folder(run, runner)
    runner.show_in_ui(lambda: create_run_artifacts(layout, run.path, runner, private=private))
    return Outcome.from_runner(runner, run_folder=run.path, headline=headline, useful=useful, details=details())
