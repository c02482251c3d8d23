"""The parts of a step's key: content of cases and artifacts, but no path and no name."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.liver import steps as liver_steps
from flows.liver import training_steps
from flows.store.step import Call
from medad.base.errors import CaseFailure, InputError
from medad.cohort.datasets import Case
from medad.config.header import HeaderSettings
from medad.config.liver import parse
from medad.steps.trained import Part
from tests.flows.liver_calls import BASE, calls_of, changed_in, key, keys_of, ref, report_of, result_of


@pytest.mark.usefixtures("cache")
def test_where_a_case_lies_and_what_it_is_called_do_not_matter(case: Case, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert case.label is not None
    other = Case(
        "another-name",
        Path(shutil.copy(case.scan, moved / "a.nii.gz")),
        Path(shutil.copy(case.label, moved / "b.nii.gz")),
        (2, 1),
        2,
    )
    settings = parse(BASE, source="test")
    base, renamed = keys_of(settings, case), keys_of(settings, other)
    assert {name for name in base if base[name] != renamed[name]} == {"case-page", "report"}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("what", ["scan", "label", "liver_labels", "tumour_label"])
def test_what_a_case_is_does_matter(case: Case, tmp_path: Path, what: str) -> None:
    new = tmp_path / "new.nii.gz"
    new.write_bytes(b"other content")
    values: dict[str, Any] = {"scan": new, "label": new, "liver_labels": (1,), "tumour_label": None}
    settings = parse(BASE, source="test")
    base, other = keys_of(settings, case), keys_of(settings, replace(case, **{what: values[what]}))
    assert {name for name in base if base[name] != other[name]} == {"insert", "prepare", "evaluate", "case-page"}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("job", "fields"),
    [("segment", ("prepared", "model")), ("evaluate", ("prepared", "segmented"))],
)
def test_every_artifact_that_goes_in_matters(case: Case, job: str, fields: tuple[str, ...]) -> None:
    original = calls_of(parse(BASE, source="test"), case)[job]
    keys = {key(original)} | {key(changed_in(original, **{name: ref("x", "f")})) for name in fields}
    assert len(keys) == len(fields) + 1


def every_call(case: Case, folder: Path) -> list[Call]:
    """Return one call of each step."""
    settings, header, by_hand = parse(BASE, source="test"), HeaderSettings(), liver_steps.hand_step
    more: list[Call] = [
        training_steps.adopt(Part("restoration", folder)),
        *(by_hand(name, case.scan, case.label, (1,), settings.preprocess, header) for name in ("window", "roi")),
        *(by_hand(name, case.scan, None, (1,), settings.preprocess, header) for name in ("slice", "equalise")),
    ]
    return [*calls_of(settings, case).values(), *more]


@pytest.mark.usefixtures("cache")
def test_every_call_has_a_key_of_its_own(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    names = [f"{call.step.name}-{key(call)}" for call in every_call(case, tmp_path)]
    assert all(re.fullmatch(r"[a-z-]+-[0-9a-f]{64}", name) for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.usefixtures("cache")
def test_a_file_that_is_gone_is_one_line(case: Case, tmp_path: Path) -> None:
    calls = [call for call in every_call(case, tmp_path) if "case" in call.arguments]
    case.scan.unlink()
    for call in calls:
        with pytest.raises(InputError, match="no such file"):
            call.parts()


@pytest.mark.usefixtures("cache")
def test_no_part_of_a_key_holds_a_path_or_a_name(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for call in every_call(case, tmp_path):
        text = str(call.parts())
        assert str(tmp_path) not in text
        assert call.step in (liver_steps.REPORT, liver_steps.CASE_PAGE) or case.id not in text


@pytest.mark.usefixtures("cache")
def test_the_report_depends_on_all_that_it_shows(case: Case) -> None:
    settings, result = parse(BASE, source="test"), result_of(case)
    call = report_of(settings, result)
    failed = CaseFailure("lits-2", "prepare", "is 4-D")
    variants = [
        call,
        report_of(settings),
        report_of(settings, result, failures=(failed,)),
        report_of(settings, result, failures=(replace(failed, rule="is 5-D"),)),
        changed_in(call, restoration=None),
        changed_in(call, versions={"python": "4"}),
        changed_in(call, notes=("a note",)),
        report_of(settings, replace(result, case_id="other")),
        report_of(settings, replace(result, evaluated=None)),
    ]
    assert len(set(map(key, variants))) == len(variants)
