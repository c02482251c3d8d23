"""Patients: identification, folds, and detection of patients in both training and testing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medad.cohort.folds import Leak, MarkedCase, PatientMark, assign_folds, find_leaks, patient_mark, patients_of
from medad.config.liver import FoldSettings
from medad.ct.dicom_choice import patient_id
from medad.ct.dicom_write import write_dicom
from medad.ct.fingerprint import liver_fingerprint
from medad.ct.geometry import Geometry
from medad.ct.io import read_scan, write_hu

KEYS = st.sets(st.text("abcdef0123456789", min_size=1, max_size=6), max_size=30)
FOLDS = st.builds(
    lambda count, index, seed: FoldSettings(count=count, index=index % count, seed=seed),
    st.integers(2, 7),
    st.integers(0, 100),
    st.integers(0, 3),
)
MARKS = st.builds(PatientMark, st.sampled_from(["patient", "scan", "liver"]), st.sampled_from("abcde"))
MEMBERS = st.lists(st.frozensets(MARKS, max_size=3), max_size=8).map(
    lambda found: [MarkedCase(f"case-{number}", marks) for number, marks in enumerate(found)]
)


def member(case_id: str, *marks: str) -> MarkedCase:
    """Return a case with marks given as `scan:a`."""
    pairs = [mark.split(":") for mark in marks]
    return MarkedCase(case_id, frozenset(PatientMark(kind, digest) for kind, digest in pairs))  # type: ignore[arg-type]


@given(KEYS, KEYS, FOLDS)
def test_folds_are_a_partition_and_even_within_each_data_set(
    train: set[str], test: set[str], folds: FoldSettings
) -> None:
    assigned = assign_folds(train, test, folds)
    assert set(assigned) == train | test
    assert set(assigned.values()) <= set(range(folds.count))
    for patients in (train, test):
        sizes = Counter(assigned[key] for key in patients)
        counts = [sizes[number] for number in range(folds.count)]
        assert max(counts) - min(counts) <= 1


@given(KEYS, KEYS, FOLDS, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_the_index_deals_nothing(
    train: set[str], test: set[str], folds: FoldSettings, random: object
) -> None:
    lists = [sorted(train), sorted(test)]
    for keys in lists:
        random.shuffle(keys)  # type: ignore[attr-defined]
    other = folds.model_copy(update={"index": (folds.index + 1) % folds.count})
    assert assign_folds(lists[0], lists[1], other) == assign_folds(train, test, folds)


def test_the_seed_deals_anew_and_every_patient_meets_every_fold() -> None:
    patients = {f"patient {number}" for number in range(20)}
    dealt = [assign_folds(patients, patients, FoldSettings(count=5, index=0, seed=seed)) for seed in range(100)]
    assert dealt[0] != dealt[1]
    for patient in patients:  # a patient misses one fold by chance with probability 0.8**100
        assert {each[patient] for each in dealt} == set(range(5))


def partners(members: Sequence[MarkedCase]) -> list[set[int]]:
    """Return for each case all cases that are reached along shared marks, by the literal definition."""
    reached = []
    for start in range(len(members)):
        found, fresh = {start}, [start]
        while fresh:
            here = fresh.pop()
            for other, each in enumerate(members):
                if other not in found and each.marks & members[here].marks:
                    found.add(other)
                    fresh.append(other)
        reached.append(found)
    return reached


@given(MEMBERS)
def test_a_patient_is_whoever_is_reached_along_shared_marks(members: list[MarkedCase]) -> None:
    keys = patients_of(members)
    for here, reached in enumerate(partners(members)):
        assert bool(keys[here]) == bool(members[here].marks)
        if members[here].marks:
            assert {other for other, key in enumerate(keys) if key == keys[here]} == reached


@given(MEMBERS, st.randoms(use_true_random=False))
def test_keys_depend_on_marks_alone(members: list[MarkedCase], random: object) -> None:
    renamed = [MarkedCase(f"other-{place}", each.marks) for place, each in enumerate(members)]
    pairs = list(zip(renamed, patients_of(members), strict=True))
    random.shuffle(pairs)  # type: ignore[attr-defined]
    assert patients_of([each for each, _ in pairs]) == [key for _, key in pairs]


@given(MEMBERS, MEMBERS)
def test_a_leak_is_found_if_and_only_if_there_is_one(train: list[MarkedCase], test: list[MarkedCase]) -> None:
    together = partners([*train, *test])
    crossing = {
        frozenset(reached)
        for reached in together
        if any(place < len(train) for place in reached) and any(place >= len(train) for place in reached)
    }
    leaks = find_leaks(train, test)
    assert len(leaks) == len(crossing)
    by_id = [{each.case_id: each for each in side} for side in (train, test)]
    for leak in leaks:
        shared = by_id[0][leak.train].marks & by_id[1][leak.test].marks
        assert leak.kind in {mark.kind for mark in shared}


def test_a_leak_names_the_first_cases_and_the_surest_reason() -> None:
    train = [member("btcv-10", "scan:a", "patient:p"), member("btcv-2", "scan:b", "patient:p"), member("btcv-3")]
    assert find_leaks(train, [member("lits-1", "scan:c")]) == []
    assert find_leaks(train, [member("lits-4", "patient:p"), member("lits-1", "patient:p")]) == [
        Leak("btcv-2", "lits-1", "patient")
    ]
    [leak] = find_leaks(train, [member("lits-1", "scan:a", "patient:p")])
    assert leak.rule == "btcv-10 in training and lits-1 in testing are the same scan"
    assert find_leaks(train, [member("btcv-3")]) == []  # a file that cannot be read has no patient


def test_a_copy_of_a_patients_second_scan_is_that_patients() -> None:
    first, second, copy = member("a", "scan:1", "patient:p"), member("b", "scan:2", "patient:p"), member("c", "scan:2")
    assert len(set(patients_of([first, second, copy]))) == 1
    assert len(set(patients_of([first, copy]))) == 2


def test_patients_are_told_by_their_text_alone() -> None:
    assert patient_mark("17") == patient_mark("17")
    assert patient_mark("17") != patient_mark("18")
    assert patient_mark("no UTF-8: \udce4").kind == "patient"


@pytest.fixture(scope="module")
def scan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return noisy HU in whole numbers, a liver in the middle, and an affine."""
    rng = np.random.default_rng(7)
    hu = np.rint(rng.normal(60, 20, (20, 18, 12))).astype(np.float32)
    liver = np.zeros(hu.shape, dtype=np.bool_)
    liver[5:14, 4:12, 3:9] = True
    return hu, liver, np.diag([-1.5, -1.5, 3.0, 1.0])


@pytest.mark.parametrize("way", ["gzipped", "bare", "mhd", "dicom", "mirrored", "cropped", "rounded"])
def test_a_liver_is_known_again_however_its_scan_is_stored(
    scan: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path: Path, way: str
) -> None:
    hu, liver, affine = scan
    geometry = Geometry(hu.shape, affine)
    known = liver_fingerprint(geometry.to_canonical(hu), geometry.to_canonical(liver))
    if way == "mirrored":
        assert liver_fingerprint(hu[:, ::-1], liver[:, ::-1]) == known
        return
    if way == "cropped":
        assert liver_fingerprint(hu[4:16, 3:15, 2:10], liver[4:16, 3:15, 2:10]) == known
        return
    if way == "rounded":  # a slope and an intercept leave errors in the last bits
        assert liver_fingerprint(hu + np.float32(1e-3), liver) == known
        return
    path = tmp_path / {"gzipped": "a.nii.gz", "bare": "a.nii", "mhd": "a.mhd", "dicom": "series"}[way]
    if way == "dicom":
        path.mkdir()
        write_dicom(path, hu, affine)
    elif way == "mhd":
        import SimpleITK as sitk

        image = sitk.GetImageFromArray(hu.astype(np.int16).T)
        image.SetSpacing((1.5, 1.5, 3.0))
        sitk.WriteImage(image, str(path))
    elif way == "gzipped":
        write_hu(path, geometry.to_canonical(hu), geometry)
    else:
        nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), affine), path)
    read = read_scan(path)
    assert liver_fingerprint(read.hu, read.geometry.to_canonical(liver)) == known


def test_one_voxel_makes_another_liver(scan: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    hu, liver, _ = scan
    known = liver_fingerprint(hu, liver)
    outside, inside = hu.copy(), hu.copy()
    outside[0, 0, 0] += 300
    inside[6, 6, 6] += 1
    assert liver_fingerprint(outside, liver) == known
    assert liver_fingerprint(inside, liver) != known
    less = liver.copy()
    less[5, 4, 3] = False
    assert liver_fingerprint(hu, less) != known


def series(folder: Path, identity: str | None) -> Path:
    """Write three slices, with or without a PatientID."""
    import pydicom

    folder.mkdir()
    rng = np.random.default_rng(0)
    write_dicom(folder, rng.normal(0, 100, (8, 8, 3)).astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0]))
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        if identity is None:
            data.pop("PatientID", None)
        else:
            data.PatientID = identity
        data.save_as(path)
    return folder


@pytest.mark.parametrize(
    ("identity", "known"),
    [
        ("PID4711-0815", "PID4711-0815"),
        ("  00017 ", "00017"),
        (None, None),
        ("", None),
        ("Anonymous", None),
        ("DE-IDENTIFIED", None),
        ("0", None),
    ],
)
def test_a_series_tells_its_patient_unless_it_is_everyones(
    tmp_path: Path, identity: str | None, known: str | None
) -> None:
    assert patient_id(series(tmp_path / "series", identity)) == known


def test_a_series_that_cannot_be_read_tells_no_patient(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"no DICOM")
    assert patient_id(tmp_path) is None
    assert patient_id(tmp_path / "nowhere") is None
