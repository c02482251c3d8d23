"""Runners: artifacts are found by content, and a broken case stops no other case. Prefect's states show this too."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_HOME, PREFECT_LOCAL_STORAGE_PATH

from flows.devices.engines import TASK_RUNNER
from flows.runs import prefect_runner
from flows.runs.prefect_runner import PrefectRunner, RunningCall
from flows.runs.runner import LocalRunner, Runner, to_case_failure
from flows.store.references import Ref
from flows.store.step import Call
from medad.base.errors import DiskFullError, InputError
from tests.flows.fake_steps import fake
from tests.flows.live_server import wait_for

pytestmark = pytest.mark.usefixtures("prefect_server", "cache")


@dataclass
class CallsResult:
    """The results of calls that ran at the same time."""

    refs: list[Ref | None]
    runner: Runner
    states: Sequence[State[Any]] = ()
    """Final states of the tasks. Empty without Prefect."""
    flow_run: Any = None
    """Id of the flow run in Prefect."""

    def says(self, *names: str) -> bool:
        """Return whether the states have these names. Always true without Prefect."""
        return not self.states or [state.name for state in self.states] == list(names)

    @property
    def counts(self) -> tuple[int, int]:
        return self.runner.computed, self.runner.cached


def run_all(kind: type[Runner], calls: list[tuple[str, Call]], *, refresh: bool = False) -> CallsResult:
    """Run calls at the same time."""

    def body() -> CallsResult:
        runner = kind(refresh=refresh)
        tasks = [runner.submit(label, call) for label, call in calls]
        refs = [task.ref() for task in tasks]
        return CallsResult(refs, runner, [task.future.state for task in tasks if isinstance(task, RunningCall)])

    if kind is LocalRunner:
        return body()
    results: list[CallsResult] = []

    @flow(task_runner=TASK_RUNNER, persist_result=False)
    def fakes() -> None:
        results.append(body())
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        results[0].flow_run = context.flow_run.id

    fakes()
    return results[0]


@pytest.fixture(params=[LocalRunner, PrefectRunner])
def kind(request: pytest.FixtureRequest) -> type[Runner]:
    """Yield each runner that makes artifacts."""
    found: type[Runner] = request.param
    return found


def test_a_second_run_computes_nothing_and_says_cached(kind: type[Runner], runs: list[str]) -> None:
    calls = [("one", fake("1")), ("two", fake("2"))]
    first = run_all(kind, calls)
    assert sorted(runs) == ["1", "2"]
    assert first.says("Completed", "Completed")
    assert first.counts == (2, 0)
    second = run_all(kind, calls)
    assert sorted(runs) == ["1", "2"]
    assert second.says("Cached", "Cached")
    assert second.counts == (0, 2)
    assert second.refs == first.refs


def test_one_content_under_two_names_is_computed_once(kind: type[Runner], runs: list[str]) -> None:
    ran = run_all(kind, [("one", fake("same")), ("two", fake("same"))])
    assert runs == ["same"]
    assert ran.counts == (1, 1)
    assert ran.refs[0] is not None
    assert ran.refs[1] is not None
    assert ran.refs[0].key == ran.refs[1].key


def test_a_damaged_artifact_is_computed_again(kind: type[Runner], runs: list[str]) -> None:
    [ref] = run_all(kind, [("one", fake("1"))]).refs
    assert ref is not None
    (ref.folder() / "result.txt").write_text("9", encoding="utf-8")
    ran = run_all(kind, [("one", fake("1"))])
    assert runs == ["1", "1"]
    assert ran.says("Completed")
    [again] = ran.refs
    assert again is not None
    assert again.digest == ref.digest
    assert (again.folder() / "result.txt").read_text(encoding="utf-8") == "1"


def test_refresh_computes_again(kind: type[Runner], runs: list[str]) -> None:
    run_all(kind, [("one", fake("1"))])
    ran = run_all(kind, [("one", fake("1"))], refresh=True)
    assert runs == ["1", "1"]
    assert ran.says("Completed")
    assert ran.counts == (1, 0)
    assert run_all(kind, [("one", fake("1"))]).counts == (0, 1)


@pytest.mark.parametrize("how", ["rule", "bug", "unreadable"])
def test_a_broken_case_ends_alone_and_is_not_cached(kind: type[Runner], runs: list[str], cache: Path, how: str) -> None:
    ran = run_all(kind, [("good", fake("1")), ("bad", fake("2", how))])
    assert ran.refs[0] is not None
    assert ran.refs[1] is None
    assert ran.says("Completed", "Failed")
    [failure] = ran.runner.failures
    assert (failure.case_id, failure.stage) == ("bad", "fake")
    rule = {"rule": "the scan is bad", "bug": "internal error (ZeroDivisionError)", "unreadable": "no such file"}[how]
    assert failure.rule == rule
    assert [state.message for state in ran.states[1:]] in ([], [f"bad: {rule}"])
    assert (failure.bug is not None) == (how == "bug")
    # it left no artifact
    assert len(list((cache / "fake").iterdir())) == 1
    assert not list((cache / "tmp").iterdir())
    before = len(runs)
    run_all(kind, [("bad", fake("2", how))])
    assert len(runs) == before + (how != "unreadable"), "it runs again, because a failure is not cached"


def test_the_terminal_counts_done_cached_and_failed(kind: type[Runner], capfd: pytest.CaptureFixture[str]) -> None:
    from flows.machine.terminal import terminal

    run_all(kind, [("one", fake("1"))])
    terminal.enabled = True
    try:
        with terminal.run():
            run_all(kind, [("one", fake("1")), ("bad", fake("2", "rule")), ("two", fake("3"))])
    finally:
        terminal.enabled = False
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fake")]
    assert line.startswith("fake: 2 done, 1 cached, 1 failed, ")


def test_the_path_is_for_the_terminal_alone(kind: type[Runner], capfd: pytest.CaptureFixture[str]) -> None:
    from flows.machine.terminal import terminal

    terminal.enabled = True
    try:
        ran = run_all(kind, [("bad", fake("2", "rule"))])
    finally:
        terminal.enabled = False
    line = "/share/MUSTERMANN/scan.nii.gz: the scan is bad"
    assert ran.runner.failures[0].line == line
    assert capfd.readouterr().err.splitlines().count(line) == 1
    assert "MUSTERMANN" not in repr(ran.states)
    assert "MUSTERMANN" not in str(ran.runner.failures[0])


def states_on_server(ran: CallsResult) -> list[str]:
    """Return the names of a flow run's task states on the server, sorted."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[ran.flow_run]))
    with get_client(sync_client=True) as client:
        for _ in range(150):  # the server records tasks from events, shortly after they end
            tasks = client.read_task_runs(flow_run_filter=chosen)
            if len(tasks) == len(ran.states) and all(task.end_time is not None for task in tasks):
                break
            time.sleep(0.2)
    return sorted(str(task.state_name) for task in tasks)


def test_prefect_says_cached_and_keeps_nothing_beside_our_store(cache: Path) -> None:
    calls = [("one", fake("1")), ("two", fake("2"))]
    first, second = run_all(PrefectRunner, calls), run_all(PrefectRunner, calls)
    assert states_on_server(first) == ["Completed", "Completed"]
    assert states_on_server(second) == ["Cached", "Cached"]
    folders = [PREFECT_HOME.value() / "storage", PREFECT_LOCAL_STORAGE_PATH.value(), cache / "results"]
    assert [path for folder in folders for path in folder.rglob("*") if path.is_file()] == []


def test_a_run_of_very_many_calls_has_few_tasks_and_one_for_each_failure(
    cache: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefect_runner, "TASKS_PER_STEP", 2)
    monkeypatch.setattr(prefect_runner, "COUNTED_CALLS", 4)
    calls = [(f"case-{number}", fake(str(number), "rule" if number == 5 else "")) for number in range(7)]
    with caplog.at_level("INFO"):
        ran = run_all(PrefectRunner, calls)
    assert sorted(runs) == [str(number) for number in range(7)]
    assert [ref is None for ref in ran.refs] == [number == 5 for number in range(7)]
    assert (ran.counts, len(ran.states)) == ((6, 0), 2)
    [failure] = ran.runner.failures
    assert (failure.case_id, failure.rule) == ("case-5", "the scan is bad")
    assert "fake: 6 ended; only the first 2 are tasks" in caplog.text
    again = run_all(PrefectRunner, calls)
    assert again.counts == (0, 6)
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[ran.flow_run]))
    with get_client(sync_client=True) as client:

        def stored() -> list[tuple[str, str]]:
            tasks = client.read_task_runs(flow_run_filter=chosen)
            return sorted((task.name, str(task.state_name)) for task in tasks)

        wanted = [("fake case-0", "Completed"), ("fake case-1", "Completed"), ("fake case-5", "Failed")]
        wait_for("the server has the tasks", lambda: stored() == wanted)


def test_a_failure_says_whether_a_file_or_the_machine_is_to_blame() -> None:
    file = to_case_failure("case-1", "prepare", InputError("/x/scan.nii", "cut short"))
    disk = to_case_failure("case-1", "prepare", DiskFullError("/cache: no room left on this disk"))
    bug = to_case_failure("case-1", "prepare", ZeroDivisionError())
    assert [each.machine_fault for each in (file, disk, bug)] == [False, True, False]
