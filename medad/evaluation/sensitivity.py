"""Sensitivity to inserted lesions at a fixed false-positive volume: thresholds, lesions, counts. Pure computation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int16
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage
from scipy.stats import binomtest

from medad.anomalies.insert import InsertedLesion
from medad.config.sensitivity import ContrastSettings, LesionPlace, MeasureSettings
from medad.evaluation.metrics import auroc, dice_of_counts

Unit = Annotated[float, Field(ge=0, le=1)]
CONFIDENCE = 0.95


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold, and what it marks in the scan it was taken from.

    Attributes
    ----------
    threshold
        A voxel is marked from here on (>=). Above every probability where nothing may be marked.
    marked_ml
        Volume marked, at most what was asked for.
    """

    threshold: float
    marked_ml: float


class LesionRecord(_Record):
    """One inserted lesion and what became of it."""

    diameter_mm: float
    contrast_hu: float
    volume_mm3: float
    """Of its voxels inside the liver."""
    voxels: Annotated[int, Field(ge=1)]
    found: bool
    by_chance: bool
    """Whether the same voxels would have counted as found in the scan without lesions."""
    marked_share: Unit
    """Of its voxels."""
    voxel_auroc: Unit | None
    """Its voxels against all voxels of that liver outside lesions. None where there are none of these."""
    dice: Unit
    """At the threshold, in its surroundings alone: see `measure_lesions`."""


class VolumeRecord(_Record):
    """One inserted volume: a scan with lesions of one contrast and place."""

    contrast: ContrastSettings
    place: LesionPlace
    repeat: int
    bins_mm: tuple[tuple[float, float], ...]
    """Sizes asked for: one lesion each."""
    threshold: float
    healthy_false_positive_ml: float
    """Marked in the scan without lesions: what was asked for, or less where probabilities tie."""
    inserted_false_positive_ml: float
    """Marked outside all lesions in the scan with them."""
    lesions: tuple[LesionRecord, ...]
    """Those that found room."""


class LesionFigures(_Record):
    """Lesions of one cell, or of many."""

    planned: int
    inserted: int
    """Those that found room in the liver; all else is of these."""
    found: int
    by_chance: int
    sensitivity: Unit | None
    """found / inserted; None without lesions. Higher is better."""
    low: Unit | None
    """Wilson's 95 % interval of it."""
    high: Unit | None
    chance: Unit | None
    """by_chance / inserted: the sensitivity of what is marked anyway."""
    voxel_auroc: Unit | None
    """Mean over lesions."""
    dice: Unit | None
    """Mean over lesions."""


class Row(_Record):
    """A row of a table: a cell, or its margins, where what is pooled is None."""

    size_mm: tuple[float, float] | None
    contrast: str | None
    place: LesionPlace | None
    figures: LesionFigures


def operating_point(
    probability: Float32[np.ndarray, " voxels"], voxel_mm3: float, false_positive_ml: float
) -> OperatingPoint:
    """The lowest threshold at which a healthy liver has no more than a given volume marked.

    Exact: thresholds are taken among the probabilities that occur, and a voxel is marked from the threshold on. Voxels
    of one probability are marked together or not at all, so ties can leave the marked volume below the wanted one, and
    never above it.

    Parameters
    ----------
    probability
        P(tumour) of the voxels of one healthy liver, in 0..1; at least one.
    voxel_mm3
        Volume of a voxel.
    false_positive_ml
        Volume that may be marked.
    """
    if not probability.size or np.isnan(probability).any():
        raise ValueError("probabilities of a liver's voxels are needed, and none may be NaN")
    allowed = int(false_positive_ml * 1000 / voxel_mm3 * (1 + 1e-9))
    falling = np.sort(probability)[::-1]
    if allowed >= falling.size:
        return OperatingPoint(float(falling[-1]), falling.size * voxel_mm3 / 1000)
    too_much = falling[allowed]  # marking this value would mark one voxel more than allowed
    above = int(np.searchsorted(-falling, -too_much, side="left"))
    # in the probabilities' own precision: a finer step would be rounded away where they are compared
    threshold = falling[above - 1] if above else np.nextafter(too_much, np.float32(2))
    return OperatingPoint(float(threshold), above * voxel_mm3 / 1000)


def measure_lesions(
    probability: Float32[np.ndarray, "X Y Z"],
    healthy_probability: Float32[np.ndarray, "X Y Z"],
    liver: Bool[np.ndarray, "X Y Z"],
    number: Int16[np.ndarray, "X Y Z"],
    lesions: Sequence[InsertedLesion],
    spacing_mm: tuple[float, float, float],
    settings: MeasureSettings,
) -> tuple[OperatingPoint, float, list[LesionRecord]]:
    """What became of each inserted lesion at the threshold of the scan without lesions.

    The threshold is that of `operating_point` over the liver of the original scan. A lesion is found when at least
    `settings.overlap` of its voxels, and one at least, is marked. Its Dice counts the marked voxels of the liver no
    farther from it than `settings.surroundings_mm` that are in no other lesion: the fixed false-positive volume would
    otherwise decide the Dice of every small lesion.

    Parameters
    ----------
    probability, healthy_probability
        P(tumour) of the scan with and without lesions, on the scan's grid.
    number, lesions
        As `medad.anomalies.insert.insert_sizes` gives them: lesion n has n in `number`.

    Returns
    -------
    The operating point, the volume marked outside all lesions (mL), and the lesions in their order.
    """
    voxel_mm3 = float(np.prod(spacing_mm))
    point = operating_point(healthy_probability[liver], voxel_mm3, settings.false_positive_ml)
    marked = (probability >= point.threshold) & liver
    before = healthy_probability >= point.threshold
    outside = probability[liver & (number == 0)]
    places = ndimage.find_objects(number)
    records = []
    for count, (lesion, place) in enumerate(zip(lesions, places, strict=True), start=1):
        own = number[place] == count
        voxels = int(np.count_nonzero(own))
        hit = int(np.count_nonzero(marked[place][own]))
        scores = np.concatenate([probability[place][own], outside])
        records.append(
            LesionRecord(
                diameter_mm=lesion.diameter_mm,
                contrast_hu=lesion.contrast_hu,
                volume_mm3=voxels * voxel_mm3,
                voxels=voxels,
                found=_counts_as_found(hit, voxels, settings.overlap),
                by_chance=_counts_as_found(int(np.count_nonzero(before[place][own])), voxels, settings.overlap),
                marked_share=hit / voxels,
                voxel_auroc=auroc(scores, np.arange(scores.size) < voxels),
                dice=_local_dice(count, place, number, marked, spacing_mm, settings.surroundings_mm),
            )
        )
    return point, int(np.count_nonzero(marked & (number == 0))) * voxel_mm3 / 1000, records


def _counts_as_found(hit: int, voxels: int, overlap: float) -> bool:
    # 3 of 10 voxels are 30 %, whatever 0.3 * 10 rounds to
    return hit > 0 and hit >= voxels * overlap * (1 - 1e-12)


def _local_dice(
    count: int,
    place: tuple[slice, slice, slice],
    number: Int16[np.ndarray, "X Y Z"],
    marked: Bool[np.ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    reach_mm: float,
) -> float:
    around = tuple(
        slice(max(0, part.start - int(reach_mm / s) - 1), part.stop + int(reach_mm / s) + 1)
        for part, s in zip(place, spacing_mm, strict=True)
    )
    own = number[around] == count
    near = ndimage.distance_transform_edt(~own, sampling=spacing_mm) <= reach_mm
    near &= own | (number[around] == 0)
    both = int(np.count_nonzero(marked[around] & own))
    value = dice_of_counts(both, int(np.count_nonzero(marked[around] & near)) - both, int(np.count_nonzero(own)) - both)
    assert value is not None
    return value


def wilson_interval(found: int, inserted: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, JASA 22, 1927), by SciPy; `inserted` is at least 1."""
    interval = binomtest(found, inserted).proportion_ci(CONFIDENCE, method="wilson")
    # rounding leaves 0 and 1 by an ulp
    return min(max(float(interval.low), 0.0), 1.0), min(max(float(interval.high), 0.0), 1.0)


@dataclass(frozen=True)
class _PlannedLesion:
    """A lesion that was asked for; None where it found no room."""

    size_mm: tuple[float, float]
    contrast: str
    place: LesionPlace
    lesion: LesionRecord | None


def summarise_lesions(seen: Iterable[LesionRecord | None]) -> LesionFigures:
    """Counts and means over lesions, None standing for one that found no room. Their order changes nothing."""
    asked = list(seen)
    lesions = [lesion for lesion in asked if lesion is not None]
    found, by_chance = sum(lesion.found for lesion in lesions), sum(lesion.by_chance for lesion in lesions)
    aurocs = [lesion.voxel_auroc for lesion in lesions if lesion.voxel_auroc is not None]
    low, high = wilson_interval(found, len(lesions)) if lesions else (None, None)
    return LesionFigures(
        planned=len(asked),
        inserted=len(lesions),
        found=found,
        by_chance=by_chance,
        sensitivity=found / len(lesions) if lesions else None,
        low=low,
        high=high,
        chance=by_chance / len(lesions) if lesions else None,
        voxel_auroc=statistics.fmean(aurocs) if aurocs else None,
        dice=statistics.fmean(lesion.dice for lesion in lesions) if lesions else None,
    )


GroupBy = Literal["size", "contrast", "place"]


def sensitivity_table(
    volumes: Sequence[VolumeRecord],
    bins_mm: Sequence[tuple[float, float]],
    contrasts: Sequence[str],
    places: Sequence[LesionPlace],
    by: Sequence[GroupBy],
) -> list[Row]:
    """Figures by any of size, contrast and place, pooled over the others and over scans and repeats.

    Rows come in the order of `bins_mm`, `contrasts` and `places`; one without any lesion asked for is there too.
    """
    seen = [each for volume in volumes for each in _planned_lesions(volume)]
    rows = []
    for size in bins_mm if "size" in by else [None]:
        for contrast in contrasts if "contrast" in by else [None]:
            for place in places if "place" in by else [None]:
                own = (
                    each.lesion
                    for each in seen
                    if size in (None, each.size_mm)
                    and contrast in (None, each.contrast)
                    and place in (None, each.place)
                )
                rows.append(Row(size_mm=size, contrast=contrast, place=place, figures=summarise_lesions(own)))
    return rows


def find_bin(diameter_mm: float, bins_mm: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The bin that holds a diameter; an edge that two share belongs to the upper one. Raises ValueError."""
    for low, high in reversed(bins_mm):
        if low <= diameter_mm <= high:
            return low, high
    raise ValueError(f"{diameter_mm} mm lies in none of the bins {list(bins_mm)}")


def _planned_lesions(volume: VolumeRecord) -> list[_PlannedLesion]:
    by_bin = {find_bin(lesion.diameter_mm, volume.bins_mm): lesion for lesion in volume.lesions}
    return [_PlannedLesion(size, volume.contrast.label, volume.place, by_bin.get(size)) for size in volume.bins_mm]
