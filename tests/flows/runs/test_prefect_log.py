"""Prefect's log: a task's end names the task, and a user's error has no traceback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow
from prefect.engine import handle_engine_signals

from flows.runs.prefect_runner import PrefectRunner
from medad.base.errors import ConfigError, InputError
from tests.flows.fake_steps import fake


@pytest.mark.usefixtures("cache", "runs", "prefect_server")
def test_the_end_of_a_task_names_the_task(caplog: pytest.LogCaptureFixture) -> None:
    @flow
    def run() -> None:
        PrefectRunner().submit("case-1", fake("1")).ref()

    caplog.set_level(logging.INFO, "prefect")
    run()
    ends: list[Any] = [record for record in caplog.records if "inished in state" in record.getMessage()]
    assert [(record.name, record.getMessage()) for record in ends] == [
        ("prefect.task_runs", "Task 'fake case-1' finished in state Completed('case-1')"),
        ("prefect.flow_runs", "Finished in state Completed()"),
    ]


@pytest.fixture
def engine_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """Return the log of the engine of a process in which no flow has ended yet."""
    monkeypatch.setattr("prefect.engine.engine_outcome_is_handled", lambda: False)
    logger = logging.getLogger("prefect.engine")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("error", "rule"),
    [(ConfigError("nosuch: neither a file nor a configuration"), "nosuch: neither a file nor a configuration"),
     (InputError("/share/MUSTERMANN/scan.nii", "cut short"), "cut short")],
)  # fmt: skip
def test_a_users_error_in_a_deployed_flow_is_one_line(
    engine_log: pytest.LogCaptureFixture, error: Exception, rule: str
) -> None:
    with pytest.raises(SystemExit), handle_engine_signals():
        raise error
    record = engine_log.records[-1]
    assert record.getMessage() == f"Execution exited with unexpected exception: {rule}"
    assert record.exc_info is None
    assert "Traceback" not in engine_log.text
    assert "MUSTERMANN" not in engine_log.text


def test_a_bug_keeps_its_traceback(engine_log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit), handle_engine_signals():
        raise ZeroDivisionError
    assert "Traceback" in engine_log.text
