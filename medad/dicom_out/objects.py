"""The DICOM objects of a segmented case: segmentation, structured report, encapsulated PDF.

highdicom is imported when an object is made, because it takes a second to load.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from jaxtyping import UInt8
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from medad.dicom_out.source import SourceSeries, instance_uids, uid_of

MAKER, ALGORITHM = "adflows", "adflows liver"
MOST_LESIONS = 100
"""Number of lesions with a segment of their own. Smaller ones share one more segment."""

LIVER, LESION = Code("10200004", "SCT", "Liver"), Code("52988006", "SCT", "Lesion")
ORGAN = Code("123037004", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
HOUNSFIELD, MILLILITRE = Code("[hnsf'U]", "UCUM", "Hounsfield unit"), Code("mL", "UCUM", "milliliter")
MILLIMETRE = Code("mm", "UCUM", "millimeter")
PDF_STORAGE = "1.2.840.10008.5.1.4.1.1.104.1"
_LIVER_COLOUR, _LESION_COLOUR = (52.0, 40.0, 20.0), (72.0, 15.0, 72.0)  # CIELab


@dataclass(frozen=True)
class Segment:
    """One segment of the segmentation object."""

    number: int
    label: str
    lesion: Mapping[str, Any] | None = None
    """Row of the lesion table. None: the liver, or lesions that share a segment."""
    is_liver: bool = False

    def tracking_uid(self, source: SourceSeries, content: str) -> str:
        """Return the UID by which segmentation and structured report name the same finding."""
        return uid_of("tracking", instance_uids(source.headers), content, str(self.number))


def segments_of(lesions: Sequence[Mapping[str, Any]], *, liver: bool) -> list[Segment]:
    """Return the segments: the liver without its lesions, each of the largest lesions, all further lesions."""
    rows: list[tuple[str, Mapping[str, Any] | None, bool]] = [("Liver without lesions", None, True)] if liver else []
    rows += [(f"Lesion {row['id']}", row, False) for row in lesions[:MOST_LESIONS]]
    if len(lesions) > MOST_LESIONS:
        rows.append((f"Lesions {MOST_LESIONS + 1} to {len(lesions)}", None, False))
    return [Segment(number, *row) for number, row in enumerate(rows, start=1)]


def make_segmentation(
    source: SourceSeries,
    labels: UInt8[np.ndarray, "X Y Z"],
    segments: Sequence[Segment],
    parameters: Mapping[str, str],
    made: datetime,
) -> Dataset:
    """Return a binary DICOM segmentation. Voxels with value n in `labels` (canonical order) belong to segment n."""
    import highdicom
    from highdicom.seg import Segmentation, SegmentDescription

    frames = source.frames(labels)
    shown = json.dumps([MAKER, _version(), dict(parameters), [each.label for each in segments]])
    uid = uid_of("segmentation", instance_uids(source.headers), shown, frames.tobytes())
    algorithm = highdicom.AlgorithmIdentificationSequence(
        ALGORITHM, codes.cid7162.ArtificialIntelligence, _version(), MAKER, dict(parameters)
    )
    descriptions = []
    for each in segments:
        colour = _LIVER_COLOUR if each.is_liver else _LESION_COLOUR
        description = SegmentDescription(
            each.number,
            each.label,
            ORGAN if each.is_liver else ABNORMAL,
            LIVER if each.is_liver else LESION,
            "AUTOMATIC",
            algorithm,
            tracking_uid=each.tracking_uid(source, uid),
            tracking_id=each.label,
            anatomic_regions=None if each.is_liver else [LIVER],
            display_color=highdicom.color.CIELabColor(*colour),
        )
        descriptions.append(description)
    made_from = Segmentation(
        source_images=source.headers,
        pixel_array=frames,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        content_label="LIVER",
        content_description="Liver and its lesions",
        **_identity(source, uid, 5000, "adflows liver segmentation", made),
    )
    organization = uid_of("dimensions", uid)
    for each in (*made_from.DimensionOrganizationSequence, *made_from.DimensionIndexSequence):
        each.DimensionOrganizationUID = organization
    return _dated(made_from, made)


def make_report(
    source: SourceSeries,
    segmentation: Dataset | None,
    segments: Sequence[Segment],
    table: Mapping[str, Any],
    made: datetime,
) -> Dataset:
    """Return a Comprehensive 3D SR (TID 1500) with the measurements of liver and lesions."""
    from highdicom import sr

    segmented = "" if segmentation is None else str(segmentation.SOPInstanceUID)
    uid = uid_of("report", instance_uids(source.headers), segmented, _version(), json.dumps(table, sort_keys=True))
    algorithm = sr.AlgorithmIdentification(
        ALGORITHM, _version(), family=codes.cid7162.ArtificialIntelligence, manufacturer=MAKER
    )
    whole = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid_of("liver", uid), "Liver with lesions"),
        finding_category=ORGAN,
        finding_type=LIVER,
        finding_sites=[sr.FindingSite(LIVER)],
        algorithm_id=algorithm,
        measurements=[sr.Measurement(codes.SCT.Volume, _number(table["liver_ml"]), MILLILITRE)],
    )
    groups: list[Any] = [whole]
    for each in segments:
        if each.is_liver or segmentation is None:
            continue
        reference = sr.ReferencedSegment(
            segmentation.SOPClassUID,
            segmentation.SOPInstanceUID,
            each.number,
            source_series=sr.SourceSeriesForSegmentation(source.first.SeriesInstanceUID),
        )
        group = sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(each.tracking_uid(source, segmented), each.label),
            referenced_segment=reference,
            finding_category=ABNORMAL,
            finding_type=LESION,
            finding_sites=[sr.FindingSite(LIVER)],
            algorithm_id=algorithm,
            measurements=_measurements(each, table["lesions"]),
        )
        groups.append(group)
    observer = sr.ObserverContext(
        codes.DCM.Device,
        sr.DeviceObserverIdentifyingAttributes(
            uid_of("device", MAKER, _version()), name=ALGORITHM, manufacturer_name=MAKER, model_name=ALGORITHM
        ),
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=Code("77477000", "SCT", "Computed tomography"),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    report = sr.Comprehensive3DSR(
        evidence=[*source.headers, *([] if segmentation is None else [segmentation])],
        content=content,
        is_complete=True,
        is_final=False,
        is_verified=False,
        **_identity(source, uid, 6000, "adflows liver measurements", made),
    )
    return _dated(report, made)


def make_document(source: SourceSeries, pdf: bytes, made: datetime) -> Dataset:
    """Return a PDF as a DICOM object of the source's study."""
    from highdicom.base import SOPClass

    first = source.first
    uid = uid_of("document", instance_uids(source.headers), pdf)
    identity = _identity(source, uid, 7000, "adflows liver report", made)
    patient = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
               "StudyDate", "StudyTime", "ReferringPhysicianName")  # fmt: skip
    names = ("patient_id", "patient_name", "patient_birth_date", "patient_sex", "accession_number", "study_id",
             "study_date", "study_time", "referring_physician_name")  # fmt: skip
    copied = {name: first.get(keyword) for name, keyword in zip(names, patient, strict=True)}
    document = SOPClass(
        study_instance_uid=first.StudyInstanceUID,
        sop_class_uid=PDF_STORAGE,
        modality="DOC",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        specific_character_set=first.get("SpecificCharacterSet"),
        **copied,
        **identity,
    )
    document.copy_patient_and_study_information(first)
    document.ConversionType = "WSD"
    document.AcquisitionDateTime = ""
    document.BurnedInAnnotation = "NO"
    document.DocumentTitle = "Liver lesions, computed by adflows"
    title = Dataset()
    title.CodeValue, title.CodingSchemeDesignator = "126000", "DCM"
    title.CodeMeaning = "Imaging Measurement Report"
    document.ConceptNameCodeSequence = [title]
    document.MIMETypeOfEncapsulatedDocument = "application/pdf"
    document.EncapsulatedDocumentLength = len(pdf)
    document.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
    references = []
    for header in source.headers:
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        references.append(reference)
    document.SourceInstanceSequence = references
    return _dated(document, made)


def _measurements(segment: Segment, lesions: Sequence[Mapping[str, Any]]) -> list[Any]:
    from highdicom.sr import Measurement

    row = segment.lesion
    if row is None:
        total = sum(each["volume_mm3"] for each in lesions[MOST_LESIONS:])
        return [Measurement(codes.SCT.Volume, _number(total / 1000), MILLILITRE)]
    found = [
        Measurement(codes.SCT.Volume, _number(row["volume_mm3"] / 1000), MILLILITRE),
        Measurement(
            Code("81827009", "SCT", "Diameter"),
            _number(row["diameter_mm"]),
            MILLIMETRE,
            derivation=Code("56851009", "SCT", "Maximum"),
        ),
    ]
    if row.get("mean_hu") is not None:
        attenuation = Code("112031", "DCM", "Attenuation Coefficient")
        mean = Code("373098007", "SCT", "Mean")
        found.append(Measurement(attenuation, _number(row["mean_hu"]), HOUNSFIELD, derivation=mean))
    return found


def _number(value: float) -> float:
    """Round to what a decimal string of 16 characters holds."""
    return round(float(value), 4)


def _version() -> str:
    try:
        return importlib.metadata.version("adflows")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _identity(source: SourceSeries, uid: str, number: int, description: str, made: datetime) -> dict[str, Any]:
    """Return the attributes of series, equipment and instance. Each result is a series of its own."""
    try:
        of_source = max(0, int(source.first.get("SeriesNumber") or 0))
    except (TypeError, ValueError):
        of_source = 0
    return {
        "series_instance_uid": uid_of("series", uid),
        "series_number": number + of_source % 1000,
        "series_description": description,
        "sop_instance_uid": uid,
        "instance_number": 1,
        "manufacturer": MAKER,
        "manufacturer_model_name": ALGORITHM,
        "software_versions": _version(),
        "device_serial_number": "none",
        "content_date": made.date(),
        "content_time": made.time().replace(microsecond=0),
    }


def _dated(result: Dataset, made: datetime) -> Dataset:
    result.InstanceCreationDate = f"{made:%Y%m%d}"
    result.InstanceCreationTime = f"{made:%H%M%S}"
    for equipment in result.get("ContributingEquipmentSequence", ())[-1:]:  # the last one is highdicom
        equipment.ContributionDateTime = f"{made:%Y%m%d%H%M%S}"
    return result
