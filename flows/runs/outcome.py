"""The outcome of a flow: counts, failures, figures and the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.runs.headline import Figure
from flows.runs.plan import PlanRunner
from flows.runs.run_folder import RunFolder, publish_run_folder
from flows.runs.runner import Runner
from flows.runs.ui_artifacts import UiLayout, create_run_artifacts
from medad.base.errors import CaseFailure


@dataclass(frozen=True)
class Outcome:
    """The result of a flow."""

    computed: int
    cached: int
    failures: tuple[CaseFailure, ...] = ()
    run_folder: Path | None = field(default=None, repr=False)
    headline: dict[str, Figure] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """Further values that the command prints as JSON."""
    useful: bool = True
    """Whether the flow produced a usable result, in spite of failures."""
    summary: str = ""
    """One line for Prefect's state, without a path. If empty, the counts are shown."""
    seconds: float = 0.0
    """Duration of the run, as the command line measured it."""

    @classmethod
    def from_runner(cls, runner: Runner, **more: Any) -> Outcome:
        """Return the outcome of a runner so far. For a dry run it contains the plan, and `more` is ignored."""
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
        """Return one line for Prefect's state."""
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
    """Write the run folder and show the run in Prefect's UI. For a dry run, only return the plan.

    The path of a `private` folder is not shown in the UI. `details` is called once the run folder exists.
    """
    if not runner.makes_artifacts:
        return Outcome.from_runner(runner)
    headline = publish_run_folder(run, runner)
    runner.show_in_ui(lambda: create_run_artifacts(layout, run.path, runner, private=private))
    return Outcome.from_runner(runner, run_folder=run.path, headline=headline, useful=useful, details=details())
