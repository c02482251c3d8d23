"""Name what a file is by its first bytes, for messages about files that are not the image that their ending says."""

from __future__ import annotations

import string
from pathlib import Path

_HEAD_BYTES = 4096
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image; fetch the image with: git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer, not the image; fetch the image with: git annex get"),
    (b"GIF8", "a GIF; save it as PNG"),
    (b"%PDF", "a PDF document"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image; save it as PNG"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image; save it as PNG"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image; save it as PNG"),
    (b"\xff\x0a", "a JPEG XL image; save it as PNG"),
    (b"8BPS", "a Photoshop document; save it as PNG"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image; save it as PNG"),
    (b"#?RADIANCE", "a Radiance HDR image; save it as PNG"),
    (b"SIMPLE  =", "a FITS image; save it as PNG"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (b"\x00\x00\x01\xba", "a video (MPEG)"),
    (b"FLV", "a video (Flash)"),
    (b"PK\x03\x04", "a ZIP archive or an Office document"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"FUJIFILMCCD-RAW", "a camera's raw image; save it as PNG"),
    (b"\x00\x05\x16\x07", "a macOS resource file, not the image"),
    (b"MZ", "a Windows program"),
    (b"\x7fELF", "a Linux program"),
    (b"{\\rtf", "an RTF document"),
)
"""First bytes of known kinds of files, with words that follow "is"."""
TEXT_FILE = "a text file"
_TEXT = frozenset(string.printable.encode())


def describe_file(path: Path) -> str | None:
    """Return what a file is, in words that follow "is". None: its first bytes are unknown, or it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    return describe_bytes(head)


def describe_bytes(head: bytes) -> str | None:
    """Return what a file with these first bytes is; see `describe_file`."""
    if not head:
        return "empty (0 bytes)"
    if not any(head):
        return "filled with zero bytes; the copy or download did not finish"
    if head[4:8] == b"ftyp":
        return _describe_container(head)
    if head[:4] == b"RIFF" and head[8:12] in {b"AVI ", b"WAVE"}:
        return "a video (AVI)" if head[8:12] == b"AVI " else "a sound file (WAVE)"
    if head[128:132] == b"DICM":
        return "a DICOM file; save it as PNG"
    known = next((what for start, what in _STARTS if head.startswith(start)), None)
    return known or _describe_text(head)


def _describe_container(head: bytes) -> str:
    """Return what an ISO media file is, by its main brand and its compatible brands."""
    length = int.from_bytes(head[:4], "big")
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(max(length, 16), 256), 4))]
    if brands[0] in {b"avif", b"avis"} or (brands[0] in {b"mif1", b"msf1"} and b"avif" in brands):
        return "an AVIF image; save it as JPEG or PNG, or install pillow 11.3 or newer"
    if brands[0] in _HEIC_BRANDS:
        return "a HEIC photograph; save it as JPEG, or: pip install 'adflows[heic]'"
    if brands[0] == b"crx ":
        return "a camera's raw image; save it as PNG"
    return "a video (MP4 or MOV)"


def _describe_text(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not the image; the download failed or needs a login"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing; save it as PNG"
    if text.startswith(b"<?xml"):
        return "an XML file"
    if text.startswith(b"[internetshortcut]"):
        return "a link to a web page"
    if text.startswith((b'{"', b"{\n", b"{ ", b"[{")):
        return "a JSON file"
    return TEXT_FILE if _TEXT.issuperset(head) else None
