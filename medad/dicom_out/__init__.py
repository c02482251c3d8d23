"""Results for the archive: DICOM segmentation, structured report and document of a segmented DICOM series."""
