"""DICOM CT series written with pydicom, with patient data in their tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray


def save_slice(path: Path, number: int, stored: NDArray[np.int16] | NDArray[np.uint16], **tags: Any) -> None:
    """Write slice `number` of a series with these stored values. Tags that are None are left out."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"2.25.77.{number + 1}"
    data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = "2.25.4242", "2.25.4343", "CT"
    data.PatientName, data.PatientID, data.SeriesDescription = "SECRETNAME^X", "SECRETID", "SECRETTEXT"
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = int(stored.dtype == np.int16)
    data.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    for keyword, value in tags.items():
        if value is not None:
            setattr(data, keyword, value)
        elif keyword in data:
            delattr(data, keyword)
    data.save_as(path, enforce_file_format=True)
