"""The named segments of a mask file, and the choice of those that are liver."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medad.base.errors import InputError

NAMED_LIVER = 1
"""Value of the segment that is named liver, if the user gives no value."""
_LIVER_NAMES = frozenset({"liver", "leber", "foie", "higado", "fegato", "lever", "hepar", "whole liver", "liver whole"})
_WORD = re.compile(
    # a name of a segment is free text and can contain a person's name, so only these words of it are shown
    r"abdomen|adrenal|aorta|artery|background|bladder|body|bone|bowel|brain|cava|colon|cord|couch|ctv|cyst|"
    r"duodenum|esophagus|external|femur|gallbladder|gland|gtv|heart|hepatic|iliac|inferior|intestine|"
    r"kidney|large|left|lesion|liver|lobe|lung|lungs|mass|muscle|organ|other|pancreas|portal|prostate|ptv|"
    r"rectum|rib|ribs|right|sacrum|segment|skin|small|spinal|spleen|stomach|superior|table|tissue|tumor|"
    r"tumour|vein|vena|vertebra|vertebrae|vessel|vessels"
)
_SHOWN = 12


@dataclass(frozen=True)
class Segment:
    """A segment of a mask file: its number or value, its name, and whether a code says that it is the liver."""

    number: int
    name: str
    coded_liver: bool = False

    @property
    def is_liver(self) -> bool:
        """Return whether the segment is the whole liver."""
        return " ".join(re.findall(r"[^\W\d_]+", self.name.casefold())) in _LIVER_NAMES or self.coded_liver

    @property
    def shown(self) -> str:
        """Return number and name. Words that are not anatomy are shown as `?`."""
        words = re.findall(r"[^\W_]+", self.name.casefold())
        return " ".join(
            [str(self.number), *(word if word.isdigit() or _WORD.fullmatch(word) else "?" for word in words)]
        )


def choose_segments(segments: Sequence[Segment], liver_labels: Sequence[int], path: Path) -> dict[int, int]:
    """Return the label value of each segment to read, by its number, in the order in which they are written.

    Without a value of liver it is the segment named liver, or the only one. It gets the value 1. With values all
    segments keep their numbers, and a liver is written before what overlaps it.

    Raises
    ------
    InputError
        Not exactly one segment is named liver. The message lists the segments.
    """
    if not segments:
        raise InputError(path, "contains no segment")
    if liver_labels:
        return {each.number: each.number for each in sorted(segments, key=lambda s: (not s.is_liver, s.number))}
    livers = [each for each in segments if each.is_liver] or (list(segments) if len(segments) == 1 else [])
    if len(livers) == 1:
        return {livers[0].number: NAMED_LIVER}
    shown = ", ".join(each.shown for each in segments[:_SHOWN]) + (", ..." if len(segments) > _SHOWN else "")
    total = f"of its {len(segments)} segments"
    count = f"{len(livers)} {total} are" if livers else f"none {total} is"
    raise InputError(path, f"{count} named liver: {shown}; choose by number with --liver-label")
