"""Liver reports in a browser: none, one and many cases, only failures, hostile names, all at the width of a phone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from medad.base.errors import CaseFailure
from tests.browser import assert_sound, needs_browser, opened
from tests.medad.report_cases import Report, write_case

HOSTILE = "<script>alert('x')<!--& \"quoted\""
SHOWN = "return [...document.querySelectorAll('table.sort')[0].tBodies[0].rows].filter((row) => !row.hidden).length;"


@needs_browser
def test_reports_of_none_one_and_many_cases(report: Report, tmp_path: Path) -> None:
    case = write_case(tmp_path / "in", "lits-1")
    failures = [CaseFailure(f"ct-{number}", "prepare", f"{HOSTILE} {number}", "x.nii") for number in range(3)]
    empty, failed = report(), report(failures=failures)
    one = report([replace(case, case_id=HOSTILE, page=tmp_path)])
    many = report([replace(case, case_id=f"ct-{number}", page=tmp_path) for number in range(130)])
    assert len(many.html) < 5_000_000
    with opened(empty.folder / "report.html", tmp_path, width=360) as page:
        assert_sound(page)
        assert page.ask("return document.body.textContent.includes('No case was segmented.');")
        page.go(failed.folder / "report.html")
        assert_sound(page)
        assert page.ask("return document.querySelectorAll('#failed tbody tr').length;") == 3
        page.go(one.folder / "report.html")
        assert_sound(page)
        assert page.ask("return document.querySelector('h3').textContent.trim();") == HOSTILE
        link = page.ask("return document.querySelector('p.scan a').getAttribute('href');")
        assert link == "cases/%3Cscript%3Ealert%28%27x%27%29%3C%21--%26%20%22quoted%22.html"
        page.go(many.folder / "report.html")
        assert_sound(page)
        assert page.ask(SHOWN) == 131, "with the row of all cases"
        page.ask("document.querySelector('.filter input').focus();")
        for letter in "ct-12":
            page.press(letter)
        assert page.ask(SHOWN) == 1 + 11, "ct-12 and ct-120 to ct-129"


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_a_heading_sorts_by_the_keyboard_alone(report: Report, tmp_path: Path, width: int) -> None:
    cases = [write_case(tmp_path / "in", f"lits-{number}", seed=number, lesions=number > 0) for number in range(2)]
    done = report(cases)
    first = "return document.querySelector('table.sort tbody tr:not(.all) a').textContent;"
    with opened(done.folder / "report.html", tmp_path, width=width) as page:
        page.ask("document.querySelectorAll('table.sort th button')[0].focus();")
        page.press("Enter")
        assert page.ask(first) == "lits-0"
        page.press("Enter")
        assert page.ask(first) == "lits-1"
        assert page.ask("return document.activeElement.closest('th').ariaSort;") == "descending"
        assert page.problems == []
