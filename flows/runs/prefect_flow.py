"""A flow's body as a flow of Prefect."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.devices.engines import TASK_RUNNER
from flows.privacy.log_filter import confined
from flows.runs.outcome import Outcome
from flows.runs.prefect_runner import PrefectRunner
from flows.runs.runner import use_runner


def final_state(outcome: Outcome) -> State[Outcome]:
    """Return Completed, with another name where a case failed; Failed for a bug, or when nothing useful came out."""
    if outcome.bug is not None or (outcome.failures and not outcome.useful):
        return Failed(message=outcome.message, data=outcome)
    name = "CompletedWithFailures" if outcome.failures else "Completed"
    return Completed(name=name, message=outcome.message, data=outcome)


def prefect_flow(body: Callable[..., Outcome], name: str, run_name: str) -> Flow[..., Any]:
    """Return the flow: its tasks run on the engine that the settings name, its states hold no private text.

    No flow is tried again by Prefect: a night of training that failed would fail again. What was done is cached, and
    the next run goes on from there.
    """

    @functools.wraps(body)
    def within(*args: Any, **kwargs: Any) -> State[Outcome]:
        with use_runner(PrefectRunner):
            return final_state(body(*args, **kwargs))

    signature = inspect.signature(body, eval_str=True)
    within.__signature__ = signature  # type: ignore[attr-defined]
    return Flow(
        confined(within),
        name=name,
        flow_run_name=run_name,
        task_runner=TASK_RUNNER,
        persist_result=False,
        retries=0,
        log_prints=True,
    )
