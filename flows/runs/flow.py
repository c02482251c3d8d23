"""Flows: functions that run under Prefect, in this process without Prefect, or as a dry run.

The function of a flow takes its settings, gets its runner from `new_runner` and returns an `Outcome`. It does not use
Prefect.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec

from flows.runs.outcome import Outcome
from flows.runs.plan import PlanRunner
from flows.runs.runner import LocalRunner, use_runner
from flows.runs.temporary_server import use_temporary_server

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import State

P = ParamSpec("P")


class RunnableFlow(Generic[P]):
    """A flow's function and the ways to run it.

    Each way returns the outcome, or raises the error that made the flow as a whole fail.
    """

    def __init__(self, body: Callable[P, Outcome], name: str, run_name: str) -> None:
        self.body, self.name, self.run_name = body, name, run_name

    def local(self, *args: P.args, **kwargs: P.kwargs) -> Outcome:
        """Run in this process, without Prefect."""
        with use_runner(LocalRunner):
            return self.body(*args, **kwargs)

    def plan(self, *args: P.args, **kwargs: P.kwargs) -> Outcome:
        """Return what would be done, without doing it. The outcome's `details["plan"]` contains one row per call."""
        with use_runner(PlanRunner):
            return self.body(*args, **kwargs)

    def run(self, *args: P.args, **kwargs: P.kwargs) -> Outcome:
        """Run as a Prefect flow."""
        use_temporary_server()
        bound = inspect.signature(self.body).bind(*args, **kwargs).arguments
        flow: Callable[..., State[Any]] = self.prefect
        outcome = flow(**bound, return_state=True).result(raise_on_failure=False)
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, Outcome)
        return outcome

    @functools.cached_property
    def prefect(self) -> Flow[..., Any]:
        """Return the Prefect flow of this function."""
        from flows.runs.prefect_flow import prefect_flow

        return prefect_flow(self.body, self.name, self.run_name)


def define_flow(name: str, run_name: str) -> Callable[[Callable[P, Outcome]], RunnableFlow[P]]:
    """Turn a function into a flow. `run_name` may use the function's parameters, as in `liver {settings.name}`."""
    return lambda body: RunnableFlow(body, name, run_name)
