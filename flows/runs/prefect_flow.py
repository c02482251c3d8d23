"""The Prefect flow of a flow's function."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.devices.engines import TASK_RUNNER
from flows.machine.stopping import stopping
from flows.privacy.log_filter import without_private_text
from flows.runs.outcome import Outcome
from flows.runs.prefect_runner import PrefectRunner
from flows.runs.runner import use_runner
from flows.runs.server_answer import wait_for_server


def final_state(outcome: Outcome) -> State[Outcome]:
    """Return the state of a flow: Completed, CompletedWithFailures or Failed.

    CompletedWithFailures is a Completed state: some cases failed. Failed: there was a bug, or no usable result.
    """
    if outcome.bug is not None or (outcome.failures and not outcome.useful):
        return Failed(message=outcome.message, data=outcome)
    name = "CompletedWithFailures" if outcome.failures else "Completed"
    return Completed(name=name, message=outcome.message, data=outcome)


class NamedFlow(Flow[..., Any]):
    """A flow that is pickled by the name of its function.

    Prefect sends the flow to a cluster's worker with each task. Its body refers to locks, which cannot be pickled.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return flow_of, (self.fn.__module__, self.fn.__qualname__)


def flow_of(module: str, name: str) -> Flow[..., Any]:
    """Return the Prefect flow of a function that `define_flow` decorates."""
    flow: Flow[..., Any] = getattr(importlib.import_module(module), name).prefect
    return flow


def prefect_flow(body: Callable[..., Outcome], name: str, run_name: str) -> Flow[..., Any]:
    """Return the Prefect flow. Its tasks run on the engine that the settings name; its states have no private text.

    Prefect does not retry flows: a long training that failed would fail again. Finished steps are cached, so the next
    run continues from there.
    """

    @functools.wraps(body)
    def within(*args: Any, **kwargs: Any) -> State[Outcome]:
        try:
            with use_runner(PrefectRunner):
                outcome = body(*args, **kwargs)
            wait_for_server()
        except Exception:
            wait_for_server()  # a failure must be told too
            raise
        except BaseException:  # Ctrl-C or a cancellation, which Prefect's threads do not notice
            stopping.set()
            raise
        return final_state(outcome)

    signature = inspect.signature(body, eval_str=True)
    within.__signature__ = signature  # type: ignore[attr-defined]
    return NamedFlow(
        without_private_text(within),
        name=name,
        flow_run_name=run_name,
        task_runner=TASK_RUNNER,
        persist_result=False,
        retries=0,
        log_prints=True,
    )
