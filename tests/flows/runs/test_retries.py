"""What is tried again, and what is not."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

import flows.runs.runner
from flows.devices.engines import RUNNER
from flows.runs.retries import RETRY_DELAYS_S, is_transient
from flows.runs.runner import Tally
from flows.store.artifacts import Ref, Step
from flows.store.step import Job
from medad.base.errors import InputError

TRIES: list[str] = []


@dataclass(frozen=True)
class Reading(Job):
    """Fails so many times with this error number, then writes."""

    failures: int
    number: int
    step = Step("read", 1, (), ("pydantic",))

    def inputs(self) -> dict[str, Any]:
        return {"failures": self.failures, "number": self.number}

    def run(self, out: Path, *, key: str) -> None:
        TRIES.append(key)
        if len(TRIES) <= self.failures:
            path = "/share/MUSTERMANN/scan.nii.gz"
            try:
                raise OSError(self.number, os.strerror(self.number), path)
            except OSError as error:
                raise InputError(path, f"cannot be read ({error.strerror})") from error
        (out / "read").write_text("read", encoding="utf-8")


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.runs.runner, "RETRY_DELAYS_S", (0.0,) * len(RETRY_DELAYS_S))


def run_job(job: Job) -> tuple[Ref | None, Tally]:
    kept: list[tuple[Ref | None, Tally]] = []

    @flow(task_runner=RUNNER, persist_result=False)
    def reads() -> None:
        tally = Tally()
        kept.append((tally.run("case-1", job), tally))

    TRIES.clear()
    reads()
    return kept[0]


@pytest.mark.usefixtures("prefect_server", "cache", "no_delays")
def test_a_share_that_answers_at_the_third_try_is_no_failure() -> None:
    ref, tally = run_job(Reading(len(RETRY_DELAYS_S), errno.ESTALE))
    assert ref is not None
    assert len(TRIES) == 1 + len(RETRY_DELAYS_S)
    assert not tally.failures
    assert tally.computed == 1
    again, tally = run_job(Reading(len(RETRY_DELAYS_S), errno.ESTALE))
    assert again == ref
    assert TRIES == []


@pytest.mark.usefixtures("prefect_server", "cache", "no_delays")
def test_a_share_that_stays_away_fails_the_case_once(capfd: pytest.CaptureFixture[str]) -> None:
    ref, tally = run_job(Reading(9, errno.EIO))
    assert ref is None
    assert len(TRIES) == 1 + len(RETRY_DELAYS_S)
    [failure] = tally.failures
    assert failure.rule == f"cannot be read ({os.strerror(errno.EIO)})"
    assert "MUSTERMANN" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("prefect_server", "cache", "no_delays")
@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC])
def test_what_stays_wrong_is_tried_once(number: int) -> None:
    ref, tally = run_job(Reading(9, number))
    assert ref is None
    assert len(TRIES) == 1
    assert len(tally.failures) == 1


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
