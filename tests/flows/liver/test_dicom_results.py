"""`adflows liver segment` on DICOM: results for the archive, names, tables and series."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medad.ct.dicom_write import write_dicom
from medad.ct.io import read_labels, write_hu, write_mask
from tests.medad.organ.torso import Torso
from tests.medad.trained_runs import trained

Cli = Callable[..., Any]


def write_series(folder: Path, torso: Torso, *, number: int = 1, phase: str = "portal", shift: float = 0) -> Path:
    folder.mkdir(parents=True)
    write_dicom(folder, torso.geometry.to_source(torso.hu + shift), torso.geometry.affine)
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data.PatientName, data.PatientID, data.StudyDescription = "Mustermann^Max", "4711", "Abdomen"
        data.SeriesNumber, data.SeriesDescription = number, phase
        data.save_as(file)
    return folder


@pytest.mark.usefixtures("cache", "no_totalsegmentator")
def test_dicom_results_have_the_patient_and_nothing_else_has(cli: Cli, torso: Torso, tmp_path: Path) -> None:
    series = write_series(tmp_path / "cd" / "a", torso)
    write_hu(tmp_path / "scan.nii.gz", torso.hu + 1, torso.geometry)
    write_mask(tmp_path / "liver.nii.gz", torso.liver, torso.geometry)
    masks = ("--liver", tmp_path / "liver.nii.gz") * 2
    model, out = trained(tmp_path / "tiny"), tmp_path / "out"
    more = ("--set", "postprocess.threshold=0.01", "--names", "original", "--dicom", "--json")
    ran = cli("liver", "segment", series, tmp_path / "scan.nii.gz", *masks, "--model", model, "--out", out, *more)
    assert ran.code == 0, ran.err
    assert sorted(path.relative_to(out).as_posix() for path in out.glob("dicom/*/*")) == [
        "dicom/a/report.dcm",
        "dicom/a/seg.dcm",
        "dicom/a/sr.dcm",
    ]
    source = pydicom.dcmread(next(series.iterdir()))
    for path in out.glob("dicom/a/*.dcm"):
        data = pydicom.dcmread(path)
        assert (data.PatientName, data.PatientID) == ("Mustermann^Max", "4711")
        assert data.StudyInstanceUID == source.StudyInstanceUID
    for path in out.rglob("*"):
        if path.is_file() and "dicom" not in path.relative_to(out).parts:
            assert b"Mustermann" not in path.read_bytes(), path
    assert "Mustermann" not in ran.err + ran.out
    # the segmentation is the mask
    segmentation = pydicom.dcmread(out / "dicom/a/seg.dcm")
    lesions = sum(
        int(frame.sum())
        for frame, group in zip(segmentation.pixel_array, segmentation.PerFrameFunctionalGroupsSequence, strict=True)
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber > 1
    )
    assert lesions == np.count_nonzero(read_labels(out / "masks" / "a.nii.gz").values)
    with (out / "statistics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "scan"]
    liver_ml = torso.liver.sum() * torso.geometry.voxel_mm3 / 1000
    assert [float(row["liver_ml"]) for row in rows] == pytest.approx([liver_ml] * 2, abs=0.01)
    assert [case["name"] for case in ran.answer["cases"]] == ["a", "scan"]
    assert all(Path(case["mask"]).is_file() for case in ran.answer["cases"])


@pytest.mark.usefixtures("cache", "no_totalsegmentator")
def test_a_series_is_chosen_by_number_or_by_the_mask(cli: Cli, torso: Torso, tmp_path: Path) -> None:
    folder = tmp_path / "cd"
    write_series(folder / "a", torso, number=3, phase="arterial")
    part = torso.planes(20, 50)
    write_series(folder / "b", part, number=4)
    listed = cli("liver", "series", folder)
    assert "3       arterial" in listed.out
    assert "4       portal" in listed.out
    grey = tmp_path / "grey.nii.gz"
    refused = cli("liver", "step", "window", folder, "--out", grey)
    assert refused.code == 2
    assert "2 CT series" in refused.err
    assert "arterial" in refused.err, "the table is printed"
    assert cli("liver", "step", "window", folder, "--series", "4", "--out", grey).code == 0
    assert read_labels(grey).values.shape == part.hu.shape
    write_mask(tmp_path / "liver.nii.gz", part.liver, part.geometry)
    by_mask = cli(
        "liver", "step", "window", folder, "--liver", tmp_path / "liver.nii.gz", "--out", tmp_path / "g2.nii.gz"
    )
    assert by_mask.code == 0, by_mask.err
    assert read_labels(tmp_path / "g2.nii.gz").values.shape == part.hu.shape
