"""Free text in the headers of scans and masks: names, ids, dates, comments.

This text is never written or shown. It is read only to remove it from messages of other programs: a library's error may
quote a header.
"""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from medad.base.errors import InputError
from medad.ct.dicom_choice import first_header, is_series

_NIFTI_TEXTS = {
    # sizeof_hdr -> (start, length) of each text field: data_type, db_name, descrip, aux_file, intent_name
    348: ((4, 10), (14, 18), (148, 80), (228, 24), (328, 16)),
    540: ((240, 80), (320, 24), (508, 16)),
}
_DICOM_GROUPS = ("0010", "0032", "0038", "0040", "4000", "4008")
"""DICOM groups of patients, requests, admissions, procedures and comments."""
# fmt: off
_DICOM_TAGS = frozenset((
    "0008|0012", "0008|0014", "0008|0018", "0008|0020", "0008|0021", "0008|0022", "0008|0023", "0008|002a",
    "0008|0050", "0008|0080", "0008|0081", "0008|0090", "0008|0092", "0008|0094", "0008|1010", "0008|1030",
    "0008|103e", "0008|1040", "0008|1048", "0008|1050", "0008|1060", "0008|1070", "0008|1080", "0008|2111",
    "0008|4000", "0018|1000", "0018|1002", "0018|1004", "0018|1012", "0018|1030", "0018|1078", "0018|4000",
    "0018|9424", "0020|000d", "0020|000e", "0020|0010", "0020|0052", "0020|0200", "0020|4000", "0028|4000",
))
# fmt: on
"""Tags of other DICOM groups that may contain a person, a place, a date or an id (after PS3.15, table E.1-1)."""
_CHARSETS = {
    "ISO_IR 100": "latin-1",
    "ISO_IR 101": "iso8859-2",
    "ISO_IR 109": "iso8859-3",
    "ISO_IR 110": "iso8859-4",
    "ISO_IR 144": "iso8859-5",
    "ISO_IR 127": "iso8859-6",
    "ISO_IR 126": "iso8859-7",
    "ISO_IR 138": "iso8859-8",
    "ISO_IR 148": "iso8859-9",
    "ISO_IR 166": "iso8859-11",
    "ISO_IR 13": "shift_jis",
    "GB18030": "gb18030",
    "GBK": "gbk",
}
_TEXT_HEADER_BYTES = 1 << 16
_TECHNICAL = re.compile(
    r"(?i)(nrrd\d+|objecttype|ndims|binarydata|compresseddata|transformmatrix|offset|origin|centerofrotation|"
    r"anatomicalorientation|elementspacing|elementsize|dimsize|elementtype|elementdatafile|type|dimension|space|sizes|"
    r"space directions|kinds|endian|encoding|space origin|data ?file|elementbyteordermsb|binarydatabyteordermsb|"
    r"segment\d+_\w+|segmentation_\w+)"
)


def header_texts(path: Path) -> tuple[str, ...]:
    """Return the free text in the header of a scan or mask. For a DICOM series it is that of the first slice.

    A file that cannot be read gives no text. The step that has to read it reports the error.
    """
    with contextlib.suppress(OSError, EOFError, ValueError, RuntimeError, InputError):
        name = path.name.lower()
        if name.endswith((".nii", ".nii.gz")):
            return tuple(dict.fromkeys(_nifti(path)))
        if name.endswith((".mhd", ".mha", ".nrrd", ".nhdr")):
            return tuple(dict.fromkeys(_text_header(path)))
        if is_series(path):
            return tuple(dict.fromkeys(_dicom(path)))
    return ()


def _nifti(path: Path) -> Iterator[str]:
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if compressed else contextlib.nullcontext(raw) as file:
            block = file.read(540)
    size = next((n for n in _NIFTI_TEXTS for order in ("little", "big") if int.from_bytes(block[:4], order) == n), 0)
    for start, length in _NIFTI_TEXTS.get(size, ()):
        text = block[start : start + length].split(b"\0")[0]
        yield from _decoded(text, "latin-1")


def _text_header(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        head = file.read(_TEXT_HEADER_BYTES)
    end = re.search(rb"\r?\n\r?\n|(?m:^ElementDataFile[^\n]*\n)", head)
    for line in head[: end.end() if end else len(head)].splitlines():
        if line.startswith(b"#"):
            yield from _decoded(line[1:].strip(), "latin-1")
            continue
        name, mark, value = line.partition(b":" if b":" in line.split(b"=", maxsplit=1)[0] else b"=")
        if mark and not _TECHNICAL.fullmatch(name.decode("latin-1").strip()):
            yield from _decoded(value.lstrip(b"=").strip(), "latin-1")


def _dicom(path: Path) -> Iterator[str]:
    header = first_header(path)
    if header is None:
        return
    charset = header.text(0x00080005)
    encoding = _CHARSETS.get(charset.split("\\")[-1].replace("ISO 2022 IR", "ISO_IR"), "latin-1")
    for tag in sorted(header.data.keys()):
        key = f"{tag.group:04x}|{tag.element:04x}"
        if key in _DICOM_TAGS or key.partition("|")[0] in _DICOM_GROUPS:
            value = getattr(header.data.get_item(tag), "value", None)
            for part in value.strip(b"\0 ").split(b"\\") if isinstance(value, bytes) else ():
                yield from _decoded(part.strip(b"\0 "), encoding)


def _decoded(value: bytes, encoding: str) -> Iterator[str]:
    """Yield a text decoded as UTF-8 and with the file's encoding if possible, and the parts of a name."""
    for charset in ("utf-8", encoding):
        with contextlib.suppress(UnicodeDecodeError):
            text = value.decode(charset).strip()
            if text:
                yield text
                if "^" in text:
                    yield from (part.strip() for part in re.split(r"[\^= ]+", text) if part.strip())
