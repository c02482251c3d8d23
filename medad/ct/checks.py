"""The liver of a label map: which value it is, values inside it, and its cavities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

from medad.base.boxes import bounding_box, memory_order
from medad.base.errors import InputError
from medad.ct.io import Labels

SHOWN_VALUES = 12
_MANY_ORGANS, _TOTALSEGMENTATOR_LIVER = 20, 5
"""Number of values from which a map is TotalSegmentator's, with 104 or 117 organs, and its value of liver."""
_SOME_ORGANS, _SOME_LAST, _SOME_LIVER = 8, 15, 6
"""Numbers of values of BTCV's and AMOS's maps, with 13 and 15 organs, and their value of liver."""


def require_liver(labels: Labels, liver_labels: Sequence[int], path: Path) -> Bool[np.ndarray, "X Y Z"]:
    """Return the liver ROI in canonical order: voxels with one of the values `liver_labels`.

    If none is given, the map must have one value besides 0, which must be 1.

    Raises
    ------
    InputError
        No voxel has such a value, or the value is not clear. The message lists the values of the label map.
    """
    if not liver_labels:
        _require_one_value(labels, path)
        liver_labels = (1,)
    liver = np.zeros_like(labels.values, dtype=np.bool_)
    for value in liver_labels:
        liver |= labels.values == value
    if not liver.any():
        present = np.unique(labels.values).tolist()
        shown = ", ".join(str(value) for value in present[:SHOWN_VALUES]) + (", ..." * (len(present) > SHOWN_VALUES))
        wanted = " or ".join(str(value) for value in liver_labels)
        raise InputError(path, f"label without liver: no voxel has value {wanted}; values present: {shown}")
    return liver


def _require_one_value(labels: Labels, path: Path) -> None:
    values, counts = np.unique(labels.values, return_counts=True)
    millilitres = {
        int(value): float(count) * labels.geometry.voxel_mm3 / 1000
        for value, count in zip(values, counts, strict=True)
        if value != 0
    }
    if not millilitres or set(millilitres) == {1}:
        return
    if len(millilitres) == 1:
        [value] = millilitres
        raise InputError(path, f"label without liver: its only value is {value}; if it is liver, --liver-label {value}")
    largest = sorted(millilitres, key=lambda value: -millilitres[value])
    shown = ", ".join(f"{value}: {millilitres[value]:.0f} mL" for value in largest[:SHOWN_VALUES])
    more = f" and {len(largest) - SHOWN_VALUES} more" * (len(largest) > SHOWN_VALUES)
    raise InputError(path, f"several values ({shown}{more}); say which is liver: {_offer(labels, millilitres)}")


def _offer(labels: Labels, millilitres: Mapping[int, float]) -> str:
    """Return the option that is probably right, and why."""
    count, last = len(millilitres), max(millilitres)
    if count >= _MANY_ORGANS and _TOTALSEGMENTATOR_LIVER in millilitres:
        return f"this looks like TotalSegmentator's map, --liver-label {_TOTALSEGMENTATOR_LIVER}"
    if count >= _SOME_ORGANS and last <= _SOME_LAST and _SOME_LIVER in millilitres:
        return f"this looks like the map of BTCV or AMOS, --liver-label {_SOME_LIVER}"
    largest = max(millilitres, key=lambda value: millilitres[value])
    inside = sorted(_inside(labels.values, labels.values == largest, {largest}))
    options = " ".join(f"--liver-label {value}" for value in sorted({largest, *inside}))
    lies = f"; {' and '.join(map(str, inside))} inside it" * bool(inside)
    return f"{options} is the largest{lies}"


def _inside(values: Integer[np.ndarray, "X Y Z"], liver: Bool[np.ndarray, "X Y Z"], known: set[int]) -> set[int]:
    """Return the values of which more than half of the surface touches liver."""
    values, liver = memory_order(values, liver)
    box = bounding_box(liver)
    if box is None:
        return set()
    around = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in box)
    values, liver = np.ascontiguousarray(values[around]), np.ascontiguousarray(liver[around])
    found = set()
    for value in set(np.unique(values[(values != 0) & ~liver]).tolist()) - known:
        there = values == value
        touching = faces = 0
        for axis in range(3):
            near, far = (slice(None, -1),), (slice(1, None),)
            before, after = ((slice(None),) * axis + part for part in (near, far))
            edge = there[before] != there[after]
            faces += int(np.count_nonzero(edge))
            touching += int(np.count_nonzero(edge & (liver[before] | liver[after])))
        if faces and touching > 0.5 * faces:
            found.add(int(value))
    return found


def left_out_values(labels: Labels, liver: Bool[np.ndarray, "X Y Z"], liver_labels: Sequence[int]) -> list[str]:
    """Return a warning if values inside the liver, such as tumours, are not taken as liver."""
    given = tuple(liver_labels) or (1,)
    inside = sorted(_inside(labels.values, liver, set(given)))
    if not inside:
        return []
    amounts = [float(np.count_nonzero(labels.values == value)) * labels.geometry.voxel_mm3 / 1000 for value in inside]
    shown = ", ".join(f"{value}: {ml:.1f} mL" for value, ml in zip(inside, amounts, strict=True))
    options = " ".join(f"--liver-label {value}" for value in sorted({*given, *inside}))
    return [f"the mask has values inside the liver that are not liver ({shown}); {options} takes them in"]


def fill_cavities(liver: Bool[np.ndarray, "X Y Z"], voxel_mm3: float) -> tuple[Bool[np.ndarray, "X Y Z"], list[str]]:
    """Return the mask with its closed cavities filled, and a warning if there are any. A tumour may be left out so."""
    [ordered] = memory_order(liver)
    box = bounding_box(ordered)
    if box is None:
        return liver, []
    cavities = _cavities(np.ascontiguousarray(ordered[box]))
    added = float(np.count_nonzero(cavities)) * voxel_mm3 / 1000
    if not added:
        return liver, []
    filled = liver.copy(order="K")
    memory_order(liver, filled)[1][box] |= cavities
    return filled, [f"cavities of the liver mask were filled: {added:.1f} mL"]


def _cavities(liver: Bool[np.ndarray, "A B C"]) -> Bool[np.ndarray, "A B C"]:
    """Return the pieces of background, connected by faces, that do not reach the side of a liver's box."""
    pieces, count = ndimage.label(~liver)
    open_pieces = np.zeros(count + 1, np.bool_)
    open_pieces[0] = True
    for axis in range(3):
        for end in (0, -1):
            open_pieces[np.take(pieces, end, axis)] = True
    closed: np.ndarray = ~open_pieces[pieces]
    return closed
