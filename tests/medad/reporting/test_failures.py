"""Failed cases in a report."""

from __future__ import annotations

from medad.base.errors import CaseFailure, group_lines
from medad.reporting.failures import failure_rows, group_rows


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


def test_equal_problems_of_a_category_are_one_line_and_one_row_with_their_number() -> None:
    missing = [
        CaseFailure(f"nut/bad/{n:03}", "find", f"no mask: no {n:03}.png in bad/", f"/d/{n:03}.png", "nut")
        for n in range(500)
    ]
    others = [
        CaseFailure("nut/bad/7", "encode", "is empty (0 bytes)", "/d/7.png", "nut"),
        CaseFailure("bolt/bad/7", "find", "no mask: no 7.png in bad/", "/d/bolt.png", "bolt"),
        CaseFailure("nut", "find", "no mask: at all"),
    ]

    lines = group_lines([*missing, *others])
    rows = failure_rows([*missing, *others], hide_files=False, images=True)
    shown = group_rows(rows)

    assert lines == [
        "/d/000.png: no mask: no 000.png in bad/ (and 499 more of this kind in nut)",
        *(one.line for one in others),
    ]
    assert len(rows) == 503
    assert sorted((row["category"], row["id"], row["rule"]) for row in shown) == [
        ("bolt", "bad/7", "no mask: no 7.png in bad/"),
        ("nut", "", "no mask: at all"),
        ("nut", "bad/000, bad/001, bad/002 and 497 more", "no mask: no 000.png in bad/"),
        ("nut", "bad/7", "is empty (0 bytes)"),
    ]


def test_three_equal_problems_are_three_lines() -> None:
    few = [CaseFailure(f"nut/{n}", "find", "is empty", f"/d/{n}.png", "nut") for n in range(3)]
    assert group_lines(few) == [one.line for one in few]
