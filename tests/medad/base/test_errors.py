"""Failures: which parts the user's terminal shows, and which parts reports show."""

from __future__ import annotations

from medad.base.errors import CaseFailure

PATH = "/share/Doe^Jane/scan.nii.gz"


def test_a_failure_shows_its_path_on_the_terminal_alone() -> None:
    failure = CaseFailure("case-1", "prepare", "expected 3 axes, found 2", PATH)

    assert failure.line == f"{PATH}: expected 3 axes, found 2"
    assert failure.file == "scan.nii.gz"
    assert "Doe" not in repr(failure)


def test_a_failure_without_a_path_is_named_by_its_case() -> None:
    failure = CaseFailure("case-1", "prepare", "no time left")

    assert (failure.line, failure.file) == ("case-1: no time left", "")


def test_failures_are_equal_whatever_error_object_they_hold() -> None:
    assert CaseFailure("a", "s", "r", bug=ValueError("x")) == CaseFailure("a", "s", "r", bug=ValueError("x"))
