"""Free text in headers: the log filter must know it, and no output may contain it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medad.ct.dicom_write import write_dicom
from medad.ct.headers import header_texts

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def volume() -> Any:
    return np.arange(4 * 4 * 3, dtype=np.int16).reshape(4, 4, 3)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_texts_of_nifti(tmp_path: Path, version: int, ending: str, order: str) -> None:
    import nibabel

    kind, image_kind = (
        (nibabel.Nifti1Header, nibabel.Nifti1Image) if version == 1 else (nibabel.Nifti2Header, nibabel.Nifti2Image)
    )
    header = kind(endianness=order)
    header["descrip"] = "Müller Erika".encode("latin-1")
    header["aux_file"] = b"Glasgow Str"
    header["intent_name"] = b"for Dr. Who"
    path = tmp_path / f"scan{ending}"
    image_kind(volume(), AFFINE, header).to_filename(path)
    assert set(header_texts(path)) == {"Müller Erika", "Glasgow Str", "for Dr. Who"}


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "Müller^Jörg"),
        ("ISO_IR 101", "Łukasz^Żółć"),
        ("ISO_IR 126", "Σίσυφος^Ν"),
        ("GB18030", "王小明^先生"),
        ("", "Miller^George"),
    ],
)
def test_texts_of_dicom_in_the_files_own_charset(tmp_path: Path, charset: str, name: str) -> None:
    import pydicom

    write_dicom(tmp_path, volume().astype(np.float32), AFFINE)
    for path in tmp_path.iterdir():
        data = pydicom.dcmread(path)
        if charset:
            data.SpecificCharacterSet = charset
        data.PatientName, data.PatientID, data.PatientBirthDate = name, "PID4711", "19640229"
        data.OtherPatientIDs = ["A-4712", "B-4713"]
        data.StudyInstanceUID = "1.2.3.4.5.6.7.8"
        data.InstitutionName, data.ImageComments = "General Hospital", "wears a brace"
        data.Manufacturer = "Scanner Works"
        data.save_as(path)
    texts = header_texts(tmp_path)
    wanted = {name, *name.split("^"), "PID4711", "19640229", "A-4712", "B-4713", "1.2.3.4.5.6.7.8"}
    assert wanted | {"General Hospital", "wears a brace"} <= set(texts)
    assert not {"CT", "Scanner Works"} & set(texts), "the machine's own words say nothing of a patient"


@pytest.mark.parametrize(
    ("name", "head", "texts"),
    [
        (
            "scan.mhd",
            "ObjectType = Image\nComment = Miller George\nNDims = 3\nDimSize = 4 4 3\nPatient=PID4711\n"
            "ElementSpacing = 1 1 1\nElementType = MET_SHORT\nElementDataFile = scan.raw\n",
            {"Miller George", "PID4711"},
        ),
        (
            "scan.nrrd",
            "NRRD0004\n# Miller George\ntype: short\ndimension: 3\nsizes: 4 4 3\ncontent: liver of Erika\n"
            "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: raw\n"
            "endian: little\npatient:=PID4711\n\n# no comment",
            {"Miller George", "PID4711", "liver of Erika"},
        ),
    ],
)
def test_texts_of_text_headers(tmp_path: Path, name: str, head: str, texts: set[str]) -> None:
    (tmp_path / name).write_bytes(head.encode())
    assert set(header_texts(tmp_path / name)) == texts


@pytest.mark.parametrize("name", ["none.nii", "cut.nii.gz", "cut.nrrd", "folder", "text.nii", "other.png"])
def test_what_cannot_be_read_has_none(tmp_path: Path, name: str) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.dcm").write_bytes(b"no DICOM")
    elif name != "none.nii":
        (tmp_path / name).write_bytes(b"\x1f\x8b\x08 cut" if name == "cut.nii.gz" else b"text")
    assert header_texts(tmp_path / name) == ()
