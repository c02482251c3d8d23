"""Failed cases in a report."""

from __future__ import annotations

from medad.base.errors import CaseFailure
from medad.reporting.failures import failure_rows


def test_a_failure_is_shown_once_in_natural_order_without_its_folder() -> None:
    failures = [
        CaseFailure("lits-10", "prepare", "is 4-D", "/share/lits/volume-10.nii"),
        CaseFailure("lits-2", "prepare", "is 4-D", "/share/lits/volume-2.nii"),
        CaseFailure("lits-10", "prepare", "is 4-D", "/share/lits/volume-10.nii"),
    ]

    assert [dict(one) for one in failure_rows(failures, hide_files=False)] == [
        {"case_id": f"lits-{number}", "stage": "prepare", "file": f"volume-{number}.nii", "rule": "is 4-D"}
        for number in (2, 10)
    ]


def test_files_of_pseudonyms_are_not_named() -> None:
    failures = [
        CaseFailure("case-1", "find", "no label", "/share/Doe.nii", pseudonymous=True),
        CaseFailure("case-2", "find", "no label", "/share/scan-2.nii"),
    ]

    assert [one["file"] for one in failure_rows(failures, hide_files=False)] == ["", "scan-2.nii"]
    assert [one["file"] for one in failure_rows(failures, hide_files=True)] == ["", ""]


def test_images_appear_under_their_category_and_groups_under_their_key() -> None:
    failures = [
        CaseFailure("nut/bad/3", "encode", "is broken", category="nut", group="CLIP"),
        CaseFailure("nut", "text", "no weights"),
    ]

    shown = failure_rows(failures, hide_files=False, group="system", images=True)

    assert [tuple(one.values()) for one in shown] == [
        ("", "nut", "", "text", "", "no weights"),
        ("CLIP", "nut", "bad/3", "encode", "", "is broken"),
    ]
    assert list(shown[0]) == ["system", "category", "id", "stage", "file", "rule"]
