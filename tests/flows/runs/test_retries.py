"""Retries: which failures are tried again, and which are not."""

from __future__ import annotations

import errno
import os

import pytest
from prefect import flow

from flows.devices.engines import TASK_RUNNER
from flows.runs import prefect_runner
from flows.runs.prefect_runner import PrefectRunner
from flows.runs.retries import RETRY_DELAYS_S, is_transient
from flows.runs.runner import Runner
from flows.store.references import Ref
from tests.flows.fake_steps import TRIES, reading


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect_runner, "RETRY_DELAYS_S", (0.0,) * len(RETRY_DELAYS_S))


def run_it(failures: int, number: int) -> tuple[Ref | None, Runner]:
    """Run a call that fails this number of times."""
    kept: list[tuple[Ref | None, Runner]] = []

    @flow(task_runner=TASK_RUNNER, persist_result=False)
    def reads() -> None:
        runner = PrefectRunner()
        kept.append((runner.run("case-1", reading(failures, number)), runner))

    TRIES.clear()
    reads()
    return kept[0]


@pytest.mark.usefixtures("prefect_server", "cache", "no_delays")
def test_a_share_that_answers_at_the_third_try_is_no_failure() -> None:
    ref, runner = run_it(len(RETRY_DELAYS_S), errno.ESTALE)
    assert ref is not None
    assert len(TRIES) == 1 + len(RETRY_DELAYS_S)
    assert not runner.failures
    assert runner.computed == 1
    again, runner = run_it(len(RETRY_DELAYS_S), errno.ESTALE)
    assert again == ref
    assert TRIES == []


@pytest.mark.usefixtures("prefect_server", "cache", "no_delays")
def test_a_share_that_stays_away_fails_the_case_once(capfd: pytest.CaptureFixture[str]) -> None:
    ref, runner = run_it(9, errno.EIO)
    assert ref is None
    assert len(TRIES) == 1 + len(RETRY_DELAYS_S)
    [failure] = runner.failures
    assert failure.rule == f"cannot be read ({os.strerror(errno.EIO)})"
    assert "MUSTERMANN" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("prefect_server", "cache", "no_delays")
@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC])
def test_what_stays_wrong_is_tried_once(number: int) -> None:
    ref, runner = run_it(9, number)
    assert ref is None
    assert len(TRIES) == 1
    assert len(runner.failures) == 1


def test_the_cause_of_an_error_counts_and_a_circle_of_causes_ends() -> None:
    stale, other = OSError(errno.ESTALE, "stale"), ValueError("x")
    other.__cause__ = stale
    assert is_transient(other)
    stale.__context__ = other
    assert is_transient(other)
    first, second = ValueError("1"), ValueError("2")
    first.__context__, second.__context__ = second, first
    assert not is_transient(first)
    assert not is_transient(None)
    assert not is_transient(OSError("no number"))
