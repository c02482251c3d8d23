"""Jobs as Prefect tasks: cached by content, a broken case ends alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.schemas.objects import State

from flows.devices.engines import RUNNER
from flows.runs.runner import Tally, UnderWay, describe
from flows.store.artifacts import ArtefactStore, DamagedArtefactError, Ref
from flows.store.serializer import VerifiedSerializer
from flows.store.step import Job
from medad.base.errors import DiskFullError, InputError

pytestmark = pytest.mark.usefixtures("prefect_server", "cache")


def run_all(jobs: list[tuple[str, Job]], *, refresh: bool = False) -> tuple[list[Ref | None], list[str], Tally]:
    """References, names of the tasks' final states, and the tally of a flow that runs these jobs beside each other."""
    kept: list[tuple[list[Ref | None], list[State[Any]], Tally]] = []

    @flow(task_runner=RUNNER, persist_result=False)
    def fakes() -> None:
        tally = Tally(refresh=refresh)
        tasks = [tally.submit(label, job) for label, job in jobs]
        refs = [task.ref() for task in tasks]
        STATES[:] = [task.future.state for task in tasks if isinstance(task, UnderWay)]
        kept.append((refs, STATES, tally))

    fakes()
    refs, finals, tally = kept[0]
    return refs, [str(state.name) for state in finals], tally


STATES: list[State[Any]] = []
"""Of the last `run_all`."""


def test_a_second_run_computes_nothing_and_says_cached(fake_job: type[Any], runs: list[str]) -> None:
    jobs = [("one", fake_job("1")), ("two", fake_job("2"))]
    first, states, tally = run_all(jobs)
    assert sorted(runs) == ["1", "2"]
    assert states == ["Completed", "Completed"]
    assert (tally.computed, tally.cached) == (2, 0)
    second, states, tally = run_all(jobs)
    assert sorted(runs) == ["1", "2"]
    assert states == ["Cached", "Cached"]
    assert (tally.computed, tally.cached) == (0, 2)
    assert second == first


def test_one_content_under_two_names_is_computed_once(fake_job: type[Any], runs: list[str]) -> None:
    refs, _, tally = run_all([("one", fake_job("same")), ("two", fake_job("same"))])
    assert runs == ["same"]
    assert (tally.computed, tally.cached) == (1, 1)
    assert refs[0] is not None
    assert refs[1] is not None
    assert refs[0].key == refs[1].key


def test_a_damaged_artefact_is_computed_again(fake_job: type[Any], runs: list[str]) -> None:
    refs, _, _ = run_all([("one", fake_job("1"))])
    assert refs[0] is not None
    (refs[0].folder() / "result.txt").write_text("9", encoding="utf-8")
    again, states, _ = run_all([("one", fake_job("1"))])
    assert runs == ["1", "1"]
    assert states == ["Completed"]
    assert again[0] is not None
    assert again[0].digest == refs[0].digest
    assert (again[0].folder() / "result.txt").read_text(encoding="utf-8") == "1"


@pytest.mark.parametrize("damage", ["truncated", "deleted", "nonsense"])
def test_prefects_own_record_may_be_damaged(fake_job: type[Any], runs: list[str], cache: Path, damage: str) -> None:
    run_all([("one", fake_job("1"))])
    record = next((cache / "results").iterdir())
    if damage == "truncated":
        record.write_bytes(record.read_bytes()[:50])
    elif damage == "nonsense":
        record.write_bytes(b"\x80\x04nonsense")
    else:
        record.unlink()
    _, _, tally = run_all([("one", fake_job("1"))])
    assert runs == ["1"], "the artefact is whole: only the record is written again"
    assert (tally.computed, tally.cached) == (0, 1)


def test_refresh_computes_again(fake_job: type[Any], runs: list[str]) -> None:
    run_all([("one", fake_job("1"))])
    _, states, tally = run_all([("one", fake_job("1"))], refresh=True)
    assert runs == ["1", "1"]
    assert states == ["Completed"]
    assert (tally.computed, tally.cached) == (1, 0)
    _, _, tally = run_all([("one", fake_job("1"))])
    assert (tally.computed, tally.cached) == (0, 1)


@pytest.mark.parametrize("how", ["rule", "bug", "unreadable"])
def test_a_broken_case_ends_alone_and_is_not_cached(
    fake_job: type[Any], runs: list[str], cache: Path, how: str
) -> None:
    refs, states, tally = run_all([("good", fake_job("1")), ("bad", fake_job("2", how))])
    assert refs[0] is not None
    assert refs[1] is None
    assert states == ["Completed", "Failed"]
    [failure] = tally.failures
    assert (failure.case_id, failure.stage) == ("bad", "fake")
    rule = {"rule": "the scan is bad", "bug": "internal error (ZeroDivisionError)", "unreadable": "no such file"}[how]
    assert failure.rule == rule
    assert STATES[1].message == f"bad: {rule}"
    assert (failure.bug is not None) == (how == "bug")
    # nothing of it is left, neither an artefact nor a record
    assert len(list((cache / "results").iterdir())) == 1
    assert len(list((cache / "fake").iterdir())) == 1
    assert not list((cache / "tmp").iterdir())
    before = len(runs)
    run_all([("bad", fake_job("2", how))])
    assert len(runs) == before + (how != "unreadable"), "tried again: a failure is no result"


def test_the_path_is_for_the_terminal_alone(fake_job: type[Any], capfd: pytest.CaptureFixture[str]) -> None:
    from flows.machine.terminal import terminal

    terminal.enabled = True
    try:
        _, _, tally = run_all([("bad", fake_job("2", "rule"))])
    finally:
        terminal.enabled = False
    line = "/share/MUSTERMANN/scan.nii.gz: the scan is bad"
    assert tally.failures[0].line == line
    assert capfd.readouterr().err.splitlines().count(line) == 1
    assert "MUSTERMANN" not in repr(STATES[0])
    assert "MUSTERMANN" not in str(tally.failures[0])


def test_a_record_is_json_and_loads_only_while_its_artefact_is_whole(fake_job: type[Any]) -> None:
    job = fake_job("1")
    ref = ArtefactStore().build(job.step, job.inputs(), lambda out: job.run(out, key=""))
    blob = VerifiedSerializer().dumps(ref)
    assert VerifiedSerializer().loads(blob) == ref
    (ref.folder() / "timing.txt").unlink()
    with pytest.raises(DamagedArtefactError):
        VerifiedSerializer().loads(blob)


def test_an_exception_as_a_result_never_loads() -> None:
    with pytest.raises(DamagedArtefactError):
        VerifiedSerializer().loads(VerifiedSerializer().dumps(ValueError("x")))
    with pytest.raises(TypeError):
        VerifiedSerializer().dumps({"a": 1})


def test_a_failure_says_whether_a_file_or_the_machine_is_to_blame() -> None:
    file = describe("case-1", "prepare", InputError("/x/scan.nii", "cut short"))
    disk = describe("case-1", "prepare", DiskFullError("/cache: no room left on this disk"))
    bug = describe("case-1", "prepare", ZeroDivisionError())
    assert [each.of_machine for each in (file, disk, bug)] == [False, True, False]
