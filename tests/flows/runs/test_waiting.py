"""A run that waits for the CPU under a Prefect server: terminal, log and the state of its task."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterTaskRunId

from flows.devices import slots as gpu
from flows.machine.terminal import terminal
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome
from flows.runs.runner import new_runner
from medad.base.settings import ANY_MACHINE
from tests.flows.device_jobs import probing
from tests.flows.live_server import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@define_flow("waits", "liver tiny")
def waits() -> Outcome:
    """Run one device step."""
    runner = new_runner(ANY_MACHINE, refresh=False)
    runner.run("case", probing("x"))
    return Outcome.from_runner(runner)


def test_it_says_what_it_waits_for_in_terminal_log_and_ui(
    prefect_server: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del prefect_server, cache
    monkeypatch.setenv("ADFLOWS_SLOTS", str(tmp_path / "slots"))
    monkeypatch.setattr("flows.devices.lock_queue.NOTICE_S", 0.1)
    lines: list[str] = []
    monkeypatch.setattr(terminal, "line", lines.append)
    shown: list[Any] = []

    def let_go() -> None:
        with gpu.device_slot("cpu", training=False, run="night"):
            ready.set()
            with get_client(sync_client=True) as client:
                wait_for(
                    "the task waits", lambda: [r for r in client.read_task_runs() if r.state_name == "Waiting"], 100
                )
                shown.extend(run for run in client.read_task_runs() if run.state_name == "Waiting")

    ready = threading.Event()
    holder = threading.Thread(target=let_go)
    holder.start()
    ready.wait(30)
    assert waits.run().computed == 1
    holder.join(30)
    [line] = [line for line in lines if line.startswith("waiting for the CPU: run night of user")]
    [task] = shown
    assert (task.state.type.value, task.state.message, task.name) == ("RUNNING", line, "probe case")
    with get_client(sync_client=True) as client:
        wait_for("the task's end is known", lambda: client.read_task_run(task.id).state_name == "Completed")
        found: list[str] = []
        for _ in range(100):
            logs = client.read_logs(LogFilter(task_run_id=LogFilterTaskRunId(any_=[task.id])))
            if found := [log.message for log in logs if log.message.startswith("waiting for")]:
                break
            time.sleep(0.2)
        states = client.read_flow_run_states(task.flow_run_id)
    assert found == [line]
    waiting = [state for state in states if state.name == "Waiting"]
    assert [state.message for state in waiting] == [line], "the run waits too"
    assert states[-1].name == "Completed"
