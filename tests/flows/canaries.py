"""Scans with a patient's data in every place that can contain it. Each canary is a word that occurs nowhere else."""

from __future__ import annotations

import shutil
import unicodedata
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

NAME, GIVEN = "Müstermännle", "Jörg-Beate"
PATIENT_ID, BIRTH, STREET = "PID4711-0815", "19640229", "Glasgower Straße 17"
STUDY_UID = "1.2.276.0.7230010.3.1.2.4711.19640229"
DICOM_TEXTS = {
    "PatientName": f"{NAME}^{GIVEN}",
    "PatientID": PATIENT_ID,
    "PatientBirthDate": BIRTH,
    "PatientAddress": STREET,
    "OtherPatientNames": "Quorvath^Ilse",
    "PatientComments": "Zwinglmoser bemerkt",
    "AdditionalPatientHistory": "Vorgeschichte Krummbein",
    "StudyInstanceUID": STUDY_UID,
    "FrameOfReferenceUID": "1.2.276.0.7230010.3.1.4.4712",
    "StudyDescription": "Leber Ohlsdorfer",
    "SeriesDescription": "portal Wentorfer",
    "InstitutionName": "Klinikum Bramfelde",
    "InstitutionAddress": "Allee Fuhlsbüttl",
    "ReferringPhysicianName": "Hausarztmann^Uwe",
    "OperatorsName": "Assistentin^Gudrunhild",
    "AccessionNumber": "ACC990077",
    "StationName": "KONSOLE-HH-33",
    "RequestedProcedureDescription": "Staging Pinneberger",
    "ImageComments": "Artefakt Norderstedtler",
    "StudyDate": "20190317",
    "DeviceSerialNumber": "SN-7654321-X",
}
DICOM_SECRETS = (
    NAME, GIVEN, PATIENT_ID, BIRTH, STREET, "Quorvath", "Zwinglmoser", "Krummbein", STUDY_UID,
    "1.2.276.0.7230010.3.1.4.4712", "Ohlsdorfer", "Wentorfer", "Bramfelde", "Fuhlsbüttl", "Hausarztmann",
    "Gudrunhild", "ACC990077", "KONSOLE-HH-33", "Pinneberger", "Norderstedtler", "20190317", "SN-7654321-X",
)  # fmt: skip
NIFTI_SECRETS = ("Descriptowski", "DBNameberg", "Auxfilenko", "Intentmüller", "Extensionsky", "Datatypov")
ITK_SECRETS = ("Commentarius", "Keyvaluesson", "Hashlinedottir")
FOLDER, BROKEN_FOLDER, MASK = "Ordnernam_Ägidius_19551224", "Kaputtski Olga", "Maskenmann_Egon"
NAME_SECRETS = (
    "Ordnernam",
    "Ägidius",
    "19551224",
    "Kaputtski",
    "Maskenmann",
    "Dateinamski",
    "Wurzelmann",
    "Rawdateiler",
)
ROOT = "studie Wurzelmann"
SECRETS = (*DICOM_SECRETS, *NIFTI_SECRETS, *ITK_SECRETS, *NAME_SECRETS)


@dataclass(frozen=True)
class Canaries:
    """A folder of marked data, and the places of the secrets."""

    root: Path
    where: dict[str, Path] = field(default_factory=dict)
    """Secret -> a file or folder that contains it, in its name or content."""

    @property
    def dicom(self) -> Path:
        """Return a data set of layout `folder` with `*/CT` and `*/leber.nii.gz`. One of two series is broken."""
        return self.root / ROOT

    @property
    def good(self) -> Path:
        return self.dicom / FOLDER / "CT"

    @property
    def good_mask(self) -> Path:
        return self.dicom / FOLDER / "leber.nii.gz"

    @property
    def broken(self) -> Path:
        return self.dicom / BROKEN_FOLDER / "CT"

    @property
    def loose(self) -> Path:
        return self.root / "einzeln"


def mark_nifti(path: Path) -> None:
    """Write free text into every field of a NIfTI-1 header, and into an extension."""
    import nibabel

    image: Any = nibabel.load(path)
    header = image.header.copy()
    header["descrip"] = f"{NIFTI_SECRETS[0]} {NAME}".encode("latin-1")
    header["db_name"] = NIFTI_SECRETS[1].encode()
    header["aux_file"] = NIFTI_SECRETS[2].encode()
    header["intent_name"] = NIFTI_SECRETS[3].encode("latin-1")
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", f"{NIFTI_SECRETS[4]} {NAME}".encode()))
    marked = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, header)
    marked.to_filename(path)
    # nibabel clears data_type, because the standard calls it unused
    content = bytearray(zlib.decompress(path.read_bytes(), 47))
    content[4:14] = NIFTI_SECRETS[5].encode().ljust(10, b"\0")[:10]
    deflate = zlib.compressobj(1, zlib.DEFLATED, 31)
    path.write_bytes(deflate.compress(bytes(content)) + deflate.flush())


def mark_dicom(folder: Path, scan: Path) -> None:
    """Write a NIfTI scan as a DICOM series, with free text in every tag and the patient in the file names."""
    import pydicom

    from medad.ct.dicom_write import write_dicom
    from medad.ct.io import read_scan

    volume = read_scan(scan)
    folder.mkdir(parents=True)
    write_dicom(folder, volume.geometry.to_source(volume.hu), volume.geometry.affine)
    for number, path in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(path)
        data.SpecificCharacterSet = "ISO_IR 100"
        for tag, value in DICOM_TEXTS.items():
            setattr(data, tag, value)
        block = data.private_block(0x0029, "CANARY", create=True)
        block.add_new(0x10, "LO", f"private {NAME}")
        data.save_as(folder / f"Dateinamski {number:04d}.dcm")
        path.unlink()


def mark_itk(folder: Path, scan: Path, label: Path) -> dict[str, tuple[Path, Path]]:
    """Write the scan as .mhd with .raw and as .nrrd, both with comments. Return each with the mask."""
    import SimpleITK as sitk

    folder.mkdir(parents=True, exist_ok=True)
    image = sitk.ReadImage(str(scan))
    mhd, nrrd = folder / "Rawdateiler.mhd", folder / "Rawdateiler.nrrd"
    sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32), str(mhd))
    head = mhd.read_text(encoding="utf-8")
    mhd.write_text(f"Comment = {ITK_SECRETS[0]} {GIVEN}\n{head}", encoding="utf-8")
    sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32), str(nrrd))
    content = nrrd.read_bytes()
    first, _, rest = content.partition(b"\n")
    texts = f"\n# {ITK_SECRETS[2]} {BIRTH}\npatient:={ITK_SECRETS[1]} {PATIENT_ID}\n"
    nrrd.write_bytes(first + texts.encode() + rest)
    mask = folder / f"{MASK}.nii.gz"
    shutil.copyfile(label, mask)
    return {"mhd": (mhd, mask), "nrrd": (nrrd, mask)}


def write_marked(root: Path, world: Any) -> Canaries:
    """Write marked copies of a world's test scans. The training scans are marked in place."""
    canaries = Canaries(root)
    for number, folder in enumerate((FOLDER, unicodedata.normalize("NFD", BROKEN_FOLDER))):
        mark_dicom(canaries.dicom / folder / "CT", world.lits / f"volume-{number}.nii.gz")
        shutil.copyfile(world.lits / f"segmentation-{number}.nii.gz", canaries.dicom / folder / "leber.nii.gz")
        mark_nifti(canaries.dicom / folder / "leber.nii.gz")
    sorted(canaries.broken.iterdir())[4].unlink()  # a slice is missing
    for path in (*(world.btcv / "img").iterdir(), *(world.btcv / "label").iterdir()):
        mark_nifti(path)
    mark_itk(canaries.loose, world.lits / "volume-0.nii.gz", world.lits / "segmentation-0.nii.gz")
    mark_nifti(canaries.loose / f"{MASK}.nii.gz")
    where: dict[str, Path] = {}
    where |= dict.fromkeys(DICOM_SECRETS, canaries.good)
    where |= dict.fromkeys(NIFTI_SECRETS, world.btcv)
    where |= dict.fromkeys(ITK_SECRETS, canaries.loose)
    where |= dict.fromkeys(NAME_SECRETS, root)
    canaries.where.update(where)
    return canaries
