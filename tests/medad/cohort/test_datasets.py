"""Search for cases by layout: order, ids, labels. The files are empty, because the search opens none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medad.base.errors import CaseFailure, ConfigError, InputError
from medad.cohort.datasets import Case, case_with_lesions, find_cases
from medad.config.liver import DatasetSettings


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def search(root: Path, layout: str, **more: Any) -> tuple[list[Case], list[CaseFailure]]:
    return find_cases(DatasetSettings(root=str(root), layout=layout, **more))


def test_btcv(tmp_path: Path) -> None:
    touch(tmp_path, "img/img0010.nii.gz", "img/img0002.nii.gz", "label/label0002.nii.gz", "label/label0010.nii.gz")
    touch(tmp_path, "img/.img0003.nii.gz", "img/notes.txt", "label/label0099.nii.gz")
    cases, problems = search(tmp_path, "btcv")
    assert cases == [
        Case(f"btcv-{n}", tmp_path / f"img/img{n}.nii.gz", tmp_path / f"label/label{n}.nii.gz", (6,), None)
        for n in ("0002", "0010")
    ]
    assert problems == []


def test_lits_in_natural_order_gzipped_or_not(tmp_path: Path) -> None:
    touch(tmp_path, "volume-10.nii", "segmentation-10.nii.gz", "volume-9.nii.gz", "segmentation-9.nii", "volume-1.nii")
    cases, problems = search(tmp_path, "lits")
    assert [(case.id, case.scan.name, case.label and case.label.name) for case in cases] == [
        ("lits-9", "volume-9.nii.gz", "segmentation-9.nii"),
        ("lits-10", "volume-10.nii", "segmentation-10.nii.gz"),
    ]
    assert all((case.liver_labels, case.tumour_label) == ((1, 2), 2) for case in cases)
    assert problems == [
        CaseFailure(
            "lits-1", "find", "no label for this scan; expected segmentation-1.nii.gz", str(tmp_path / "volume-1.nii")
        )
    ]


def test_one_scan_twice_is_a_problem_and_the_others_go_on(tmp_path: Path) -> None:
    touch(tmp_path, "volume-1.nii", "volume-1.nii.gz", "segmentation-1.nii", "volume-2.nii", "segmentation-2.nii")
    touch(tmp_path, "volume-3.nii", "segmentation-3.nii", "segmentation-3.nii.gz")
    cases, problems = search(tmp_path, "lits")
    assert [case.id for case in cases] == ["lits-2"]
    assert [(problem.case_id, problem.rule.split(":")[0]) for problem in problems] == [
        ("lits-1", "2 scans for one case"),
        ("lits-3", "2 labels for one scan"),
    ]


def test_numbers_that_differ_in_zeros_are_two_cases(tmp_path: Path) -> None:
    touch(tmp_path, "volume-1.nii", "segmentation-1.nii", "volume-01.nii", "segmentation-01.nii")
    cases, _ = search(tmp_path, "lits")
    assert sorted((case.id, case.label.name) for case in cases if case.label) == [
        ("lits-01", "segmentation-01.nii"),
        ("lits-1", "segmentation-1.nii"),
    ]


def test_folder_of_pairs(tmp_path: Path) -> None:
    touch(
        tmp_path, "scans/p2_ct.nii.gz", "scans/p10_ct.nii.gz", "masks/p2.nrrd", "masks/p10.nrrd", "scans/p3_ct.nii.gz"
    )
    cases, problems = search(
        tmp_path, "folder", images="scans/*_ct.nii.gz", labels="masks/*.nrrd", liver_labels=(1, 3), tumour_label=3
    )
    assert cases == [
        Case(p, tmp_path / f"scans/{p}_ct.nii.gz", tmp_path / f"masks/{p}.nrrd", (1, 3), 3) for p in ("p2", "p10")
    ]
    assert [(problem.case_id, problem.rule) for problem in problems] == [
        ("p3", "no label for this scan; expected masks/p3.nrrd")
    ]


def test_folder_of_dicom_series(tmp_path: Path) -> None:
    touch(tmp_path, "a/scan/1.dcm", "a/liver.nii.gz", "b/scan/1.dcm", "b/liver.nii.gz", "c/notes.txt")
    cases, problems = search(tmp_path, "folder", images="*/scan", labels="*/liver.nii.gz", liver_labels=(1,))
    assert [case.scan for case in cases] == [tmp_path / "a/scan", tmp_path / "b/scan"]
    assert problems == []


def test_folder_without_labels_and_with_mixed_formats(tmp_path: Path) -> None:
    touch(tmp_path, "a.mhd", "a.raw", "b.nii.gz", "series/1.dcm", ".hidden.nii.gz", "readme.txt")
    cases, problems = search(tmp_path, "folder", images="*")
    assert [(case.scan.name, case.label, case.liver_labels) for case in cases] == [
        ("a.mhd", None, ()),
        ("b.nii.gz", None, ()),
        ("series", None, ()),
    ]
    assert [case.id for case in cases[:2]] == ["a", "b"]
    assert problems == []


def test_brackets_and_regular_expressions_in_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "set1/x+y.nii.gz", "set2/z.nii.gz", "set3/w.nii.gz", "setx/v.nii.gz")
    cases, _ = search(tmp_path, "folder", images="set[12]/*.nii.gz")
    assert sorted(case.scan.name for case in cases) == ["x+y.nii.gz", "z.nii.gz"]
    with pytest.raises(ConfigError, match="relative"):
        search(tmp_path, "folder", images="/*.nii.gz")


NAMES_MAY_HOLD = "abAB01-_. +~" + ("äé" if sys.getfilesystemencoding() == "utf-8" else "")
ODD_NAMES = st.text(st.sampled_from(NAMES_MAY_HOLD), min_size=1, max_size=8).filter(lambda name: name[0] != ".")


@given(names=st.sets(ODD_NAMES, min_size=1, max_size=8), pseudonymous=st.booleans())
def test_ids_are_unique_and_safe_whatever_the_files_are_called(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], pseudonymous: bool
) -> None:
    root = tmp_path_factory.mktemp("odd")
    touch(root, *(f"{name}.nii.gz" for name in names))
    cases, problems = search(root, "folder", images="*.nii.gz", pseudonyms=pseudonymous)
    ids = [case.id for case in cases]
    assert (
        len({case_id.casefold() for case_id in ids}) == len(names) == len(ids)
    )  # even if upper and lower case are ignored
    assert {case.scan.name for case in cases} == {f"{name}.nii.gz" for name in names}
    for case_id in ids:
        assert case_id.isascii()
        assert not set(case_id) & set("/\\ ~+")
        assert 0 < len(case_id) <= 64
        assert case_id[0] not in ".-"
    assert problems == []


def test_opaque_ids_hide_the_name_and_do_not_hang_on_the_other_cases(tmp_path: Path) -> None:
    touch(tmp_path, "Doe_Jane.nii.gz", "Roe.nii.gz")
    both = {case.scan.name: case.id for case in search(tmp_path, "folder", images="*.nii.gz", pseudonyms=True)[0]}
    assert not any("doe" in case_id.lower() or "roe" in case_id.lower() for case_id in both.values())
    (tmp_path / "Roe.nii.gz").unlink()
    alone = search(tmp_path, "folder", images="*.nii.gz", pseudonyms=True)[0]
    assert [case.id for case in alone] == [both["Doe_Jane.nii.gz"]]


def test_opaque_ids_keep_names_out_of_the_rules(tmp_path: Path) -> None:
    touch(tmp_path, "img/Doe_Jane.nii.gz", "img/Roe.nii", "img/Roe.nii.gz", "lab/Roe.nii.gz")
    patterns = {"images": "img/*", "labels": "lab/*", "liver_labels": (1,)}
    hidden, shown = (
        search(tmp_path, "folder", **patterns, pseudonyms=pseudonymous)[1] for pseudonymous in (True, False)
    )
    assert sorted(problem.rule for problem in hidden) == ["2 scans for one case", "no label for this scan"]
    assert any("Doe_Jane" in problem.rule for problem in shown)


def dicom_sets(tmp_path: Path) -> None:
    for name in ("Doe_Jane", "Roe"):
        (tmp_path / name / "CT").mkdir(parents=True)
        touch(tmp_path, f"{name}/CT/1.dcm", f"{name}/liver.nii.gz")


def test_dicom_has_opaque_ids_whatever_the_settings_say(tmp_path: Path) -> None:
    dicom_sets(tmp_path)
    patterns: dict[str, Any] = {"images": "*/CT", "labels": "*/liver.nii.gz", "liver_labels": (1,)}
    (tmp_path / "Roe" / "liver.nii.gz").unlink()
    cases, problems = search(tmp_path, "folder", **patterns, pseudonyms=False)
    assert [(case.pseudonymous, problem.pseudonymous) for case, problem in zip(cases, problems, strict=True)] == [
        (True, True)
    ]
    shown = f"{cases[0].id} {problems[0].case_id} {problems[0].rule}"
    assert "Doe" not in shown
    assert "Roe" not in shown
    touch(tmp_path, "scans/a.nii.gz")
    [plain], _ = search(tmp_path / "scans", "folder", images="*.nii.gz")
    assert (plain.id, plain.pseudonymous) == ("a", False)


def test_whoever_keeps_a_secret_gives_the_ids(tmp_path: Path) -> None:
    """Check that all scans are given at once, in order. Two scans with one id get a number, not a digest of a name."""
    dicom_sets(tmp_path)
    calls: list[list[Path]] = []

    def same(scans: Sequence[Path]) -> list[str]:
        calls.append(list(scans))
        return ["ct-0123456789ab"] * len(scans)

    settings = DatasetSettings(root=str(tmp_path), layout="folder", images="*/CT")
    cases, _ = find_cases(settings, pseudonyms=same)
    assert [case.id for case in cases] == ["ct-0123456789ab", "ct-0123456789ab-2"]
    assert calls == [[case.scan for case in cases]]


def test_an_opaque_case_is_chosen_by_its_name_as_well_and_a_missing_one_is_not_named(tmp_path: Path) -> None:
    dicom_sets(tmp_path)
    patterns: dict[str, Any] = {"images": "*/CT"}
    cases, problems = search(tmp_path, "folder", **patterns, cases=("Doe_Jane", "Smith_John"))
    assert [case.scan.parent.name for case in cases] == ["Doe_Jane"]
    assert [problem.case_id for problem in problems] == ["asked-2"]
    assert [case.scan for case in search(tmp_path, "folder", **patterns, cases=(cases[0].id,))[0]] == [cases[0].scan]


def test_chosen_cases_and_one_that_is_not_there(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{kind}-{n}.nii" for n in (1, 2, 3) for kind in ("volume", "segmentation")))
    cases, problems = search(tmp_path, "lits", cases=("lits-3", "lits-1", "lits-7"))
    assert [case.id for case in cases] == ["lits-1", "lits-3"]
    assert [(problem.case_id, problem.path) for problem in problems] == [("lits-7", str(tmp_path))]


def test_settings_override_the_layouts_labels(tmp_path: Path) -> None:
    touch(tmp_path, "img/img1.nii.gz", "label/label1.nii.gz")
    cases, _ = search(tmp_path, "btcv", liver_labels=(5, 6, 9), tumour_label=9)
    assert (cases[0].liver_labels, cases[0].tumour_label) == ((5, 6, 9), 9)


def test_nothing_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        search(tmp_path / "absent", "btcv")
    touch(tmp_path, "label/label0001.nii.gz")
    with pytest.raises(InputError, match=r"no case of layout btcv .* img/img0001\.nii\.gz"):
        search(tmp_path, "btcv")
    with pytest.raises(InputError, match=r"expected volume-N"):
        search(tmp_path, "lits")
    with pytest.raises(InputError, match=r"files that match \*\.mha"):
        search(tmp_path, "folder", images="*.mha")


def test_samples_root(tmp_path: Path) -> None:
    touch(tmp_path, "nifti/img/img0001.nii.gz", "nifti/label/label0001.nii.gz")
    data = DatasetSettings(root="samples:nifti", layout="btcv")
    assert [case.id for case in find_cases(data, tmp_path)[0]] == ["btcv-0001"]
    with pytest.raises(InputError, match="sample data are missing"):
        find_cases(data)
    for name in ("samples:", "samples:../other", "samples:..", "samples:a/b"):
        with pytest.raises(InputError, match="name of one folder"):
            find_cases(DatasetSettings(root=name, layout="btcv"), tmp_path)


@pytest.mark.data
def test_real_folders(real_data: Path) -> None:
    cases, problems = search(real_data / "liver" / "btcv", "btcv")
    assert [case.id for case in cases] == ["btcv-0001", "btcv-0013", "btcv-0101", "btcv-0102"]
    assert [case.id for case in search(real_data / "liver" / "lits", "lits")[0]] == ["lits-17"]
    assert problems == []


def test_a_folder_may_be_empty_where_cases_are_yet_to_come(tmp_path: Path) -> None:
    data = DatasetSettings(
        root=str(tmp_path), layout="folder", images="*/scan", labels="*/liver.nii", liver_labels=(1,)
    )
    assert find_cases(data, may_be_empty=True) == ([], [])
    with pytest.raises(InputError, match="no such folder"):
        find_cases(data.model_copy(update={"root": str(tmp_path / "nowhere")}), may_be_empty=True)


def test_patients_are_told_by_the_layouts_names(tmp_path: Path) -> None:
    """Find patients by name, also with pseudonyms. A name without a patient is a problem, not a new patient."""
    touch(tmp_path, *(f"{name}/ct.nii.gz" for name in ("P 1-a", "P 1-b", "P 2-a", "other")))
    for pseudonymous in (False, True):
        cases, problems = search(
            tmp_path, "folder", images="*/ct.nii.gz", patients=r"^(P \d+)-", pseudonyms=pseudonymous
        )
        assert [case.patient for case in cases] == ["P 1", "P 1", "P 2"]
        assert [problem.rule for problem in problems] == ["the setting `patients` finds no patient in its name"]
    cases, _ = search(tmp_path, "folder", images="*/ct.nii.gz")
    assert {case.patient for case in cases} == {None}


def test_the_patient_is_never_shown() -> None:
    case = Case("ct-1", Path("a"), None, (1,), None, pseudonymous=True, patient="Mustermann")
    assert "Mustermann" not in repr(case)
    assert case_with_lesions(case, Path("b")).patient == "Mustermann"
