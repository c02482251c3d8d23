"""A step that needs no device and writes a text, unless told to break. Importable, as a step's function must be."""

from __future__ import annotations

from pathlib import Path

from flows.store.step import Call, Step
from medad.base.errors import InputError

FAKE = Step("fake", 1, "tests.flows.fake_step:write_text", ("pydantic",), volatile=frozenset({"timing.txt"}))
RUNS: list[str] = []
"""Texts that the step has really worked on."""


def fake(text: str, breaks: str = "") -> Call:
    """Return a call that breaks by a `rule`, a `bug`, an `unreadable` input, or not at all."""
    if breaks == "unreadable":
        return FAKE(text=text, breaks=breaks, scan=Path("/share/scan.nii.gz"))
    return FAKE(text=text, breaks=breaks)


def write_text(text: str, out: Path, breaks: str = "", scan: Path | None = None) -> None:
    """Write the text."""
    assert scan is None, "no key without its digest"
    RUNS.append(text)
    (out / "half").write_text("written before it broke", encoding="utf-8")
    if breaks == "rule":
        raise InputError("/share/MUSTERMANN/scan.nii.gz", "the scan is bad")
    if breaks == "bug":
        raise ZeroDivisionError("a bug")
    (out / "half").rename(out / "result.txt")
    (out / "result.txt").write_text(text, encoding="utf-8")
    (out / "timing.txt").write_text(str(len(RUNS)), encoding="utf-8")
