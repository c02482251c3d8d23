"""The DICOM node of an inbox: it receives scans, and sends results back."""
