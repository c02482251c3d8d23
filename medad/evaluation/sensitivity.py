"""Sensitivity to inserted lesions at a fixed false-positive volume. Pure computation, without files."""

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
    """A threshold, and the volume it marks in the healthy scan it was chosen on.

    Attributes
    ----------
    threshold
        A voxel is marked if its probability is at least this. It lies above all probabilities if no voxel is allowed.
    marked_ml
        Marked volume in mL, at most the allowed volume.
    """

    threshold: float
    marked_ml: float


class LesionRecord(_Record):
    """One inserted lesion and its measurements."""

    diameter_mm: float
    contrast_hu: float
    volume_mm3: float
    """Volume of its voxels inside the liver."""
    voxels: Annotated[int, Field(ge=1)]
    found: bool
    by_chance: bool
    """True if the same voxels would count as found in the scan without lesions."""
    marked_share: Unit
    """Share of its voxels that are marked."""
    voxel_auroc: Unit | None
    """AUROC of its voxels against all liver voxels outside lesions. None: no such voxel exists."""
    dice: Unit
    """Dice at the threshold, in the lesion's surroundings only: see `measure_lesions`."""


class VolumeRecord(_Record):
    """One inserted volume: a scan with inserted lesions of one contrast range and place."""

    contrast: ContrastSettings
    place: LesionPlace
    repeat: int
    bins_mm: tuple[tuple[float, float], ...]
    """Size bins, one planned lesion each."""
    threshold: float
    healthy_false_positive_ml: float
    """Volume marked in the scan without lesions: the requested volume, or less if probabilities are equal."""
    inserted_false_positive_ml: float
    """Volume marked outside all lesions in the scan with lesions."""
    lesions: tuple[LesionRecord, ...]
    """Lesions that were inserted. A lesion without enough room in the liver is left out."""


class LesionFigures(_Record):
    """Counts and means over the lesions of one or several table cells."""

    planned: int
    inserted: int
    """Lesions that were inserted. All values below are over these."""
    found: int
    by_chance: int
    sensitivity: Unit | None
    """Sensitivity: found / inserted. Higher is better. None: no lesion."""
    low: Unit | None
    """Lower end of Wilson's 95 % interval of the sensitivity."""
    high: Unit | None
    """Upper end of that interval."""
    chance: Unit | None
    """Chance rate: by_chance / inserted, the sensitivity without any lesion."""
    voxel_auroc: Unit | None
    """Mean voxel AUROC over lesions."""
    dice: Unit | None
    """Mean Dice over lesions."""


class Row(_Record):
    """A table row. None for size, contrast or place: pooled over it."""

    size_mm: tuple[float, float] | None
    contrast: str | None
    place: LesionPlace | None
    figures: LesionFigures


def operating_point(
    probability: Float32[np.ndarray, " voxels"], voxel_mm3: float, false_positive_ml: float
) -> OperatingPoint:
    """Return the lowest threshold that marks at most a given volume of a healthy liver.

    The result is exact: the threshold is a probability that occurs in the liver, and a voxel is marked if its
    probability is at least the threshold. Voxels of equal probability are marked together or not at all. Ties can
    therefore leave the marked volume below the allowed one, but never above.

    Parameters
    ----------
    probability
        P(tumour) of the voxels of one healthy liver, in 0..1. At least one voxel.
    voxel_mm3
        Volume of a voxel.
    false_positive_ml
        Allowed volume in mL.
    """
    if not probability.size or np.isnan(probability).any():
        raise ValueError("needs the probability of at least one liver voxel, without NaN")
    allowed = int(false_positive_ml * 1000 / voxel_mm3 * (1 + 1e-9))
    falling = np.sort(probability)[::-1]
    if allowed >= falling.size:
        return OperatingPoint(float(falling[-1]), falling.size * voxel_mm3 / 1000)
    too_much = falling[allowed]  # a threshold at this value marks too many voxels
    above = int(np.searchsorted(-falling, -too_much, side="left"))
    # step in the probabilities' own precision, since a finer one would be lost in the comparison
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
    """Measure each inserted lesion at the threshold of the scan without lesions.

    The threshold comes from `operating_point` over the liver of the original scan. A lesion is found if at least
    `settings.overlap` of its voxels, and at least one voxel, are marked. Its Dice counts marked liver voxels within
    `settings.surroundings_mm` of the lesion, except voxels of other lesions. Over the whole liver, the fixed
    false-positive volume would dominate the Dice of every small lesion.

    Parameters
    ----------
    probability, healthy_probability
        P(tumour) of the scan with and without lesions, on the scan's grid.
    number, lesions
        Results of `medad.anomalies.insert.insert_sizes`: the voxels of lesion n have the value n in `number`.

    Returns
    -------
    The operating point, the volume marked outside all lesions (mL), and one record per lesion in the same order.
    """
    voxel_mm3 = float(np.prod(spacing_mm))
    point = operating_point(healthy_probability[liver], voxel_mm3, settings.false_positive_ml)
    marked = (probability >= point.threshold) & liver
    healthy_marked = healthy_probability >= point.threshold
    outside = probability[liver & (number == 0)]
    places = ndimage.find_objects(number)
    records = []
    for count, (lesion, place) in enumerate(zip(lesions, places, strict=True), start=1):
        in_lesion = number[place] == count
        voxels = int(np.count_nonzero(in_lesion))
        hit = int(np.count_nonzero(marked[place][in_lesion]))
        scores = np.concatenate([probability[place][in_lesion], outside])
        records.append(
            LesionRecord(
                diameter_mm=lesion.diameter_mm,
                contrast_hu=lesion.contrast_hu,
                volume_mm3=voxels * voxel_mm3,
                voxels=voxels,
                found=_counts_as_found(hit, voxels, settings.overlap),
                by_chance=_counts_as_found(
                    int(np.count_nonzero(healthy_marked[place][in_lesion])), voxels, settings.overlap
                ),
                marked_share=hit / voxels,
                voxel_auroc=auroc(scores, np.arange(scores.size) < voxels),
                dice=_local_dice(count, place, number, marked, spacing_mm, settings.surroundings_mm),
            )
        )
    return point, int(np.count_nonzero(marked & (number == 0))) * voxel_mm3 / 1000, records


def _counts_as_found(hit: int, voxels: int, overlap: float) -> bool:
    # tolerance: 3 of 10 voxels are 30 %, even if 0.3 * 10 is rounded up
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
    in_lesion = number[around] == count
    near = ndimage.distance_transform_edt(~in_lesion, sampling=spacing_mm) <= reach_mm
    near &= in_lesion | (number[around] == 0)
    both = int(np.count_nonzero(marked[around] & in_lesion))
    value = dice_of_counts(
        both, int(np.count_nonzero(marked[around] & near)) - both, int(np.count_nonzero(in_lesion)) - both
    )
    assert value is not None
    return value


def wilson_interval(found: int, inserted: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of found / inserted (Wilson, JASA 22, 1927). `inserted` must be at least 1."""
    interval = binomtest(found, inserted).proportion_ci(CONFIDENCE, method="wilson")
    # rounding can exceed 0 and 1 slightly
    return min(max(float(interval.low), 0.0), 1.0), min(max(float(interval.high), 0.0), 1.0)


@dataclass(frozen=True)
class _PlannedLesion:
    """A planned lesion. `lesion` is None if it was not inserted for lack of room."""

    size_mm: tuple[float, float]
    contrast: str
    place: LesionPlace
    lesion: LesionRecord | None


def summarise_lesions(lesions_or_none: Iterable[LesionRecord | None]) -> LesionFigures:
    """Return counts and means over planned lesions. None means a lesion that was not inserted.

    The order of the lesions does not matter.
    """
    planned = list(lesions_or_none)
    lesions = [lesion for lesion in planned if lesion is not None]
    found, by_chance = sum(lesion.found for lesion in lesions), sum(lesion.by_chance for lesion in lesions)
    aurocs = [lesion.voxel_auroc for lesion in lesions if lesion.voxel_auroc is not None]
    low, high = wilson_interval(found, len(lesions)) if lesions else (None, None)
    return LesionFigures(
        planned=len(planned),
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
    """Return table rows by any of size, contrast and place, pooled over the others, scans and repeats.

    Rows have the order of `bins_mm`, `contrasts` and `places`. Rows without a planned lesion are included.
    """
    planned = [each for volume in volumes for each in _planned_lesions(volume)]
    rows = []
    for size in bins_mm if "size" in by else [None]:
        for contrast in contrasts if "contrast" in by else [None]:
            for place in places if "place" in by else [None]:
                cell = (
                    each.lesion
                    for each in planned
                    if size in (None, each.size_mm)
                    and contrast in (None, each.contrast)
                    and place in (None, each.place)
                )
                rows.append(Row(size_mm=size, contrast=contrast, place=place, figures=summarise_lesions(cell)))
    return rows


def find_bin(diameter_mm: float, bins_mm: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the size bin of a diameter. A shared edge belongs to the upper bin. Raises ValueError if none fits."""
    for low, high in reversed(bins_mm):
        if low <= diameter_mm <= high:
            return low, high
    raise ValueError(f"{diameter_mm} mm is in none of the bins {list(bins_mm)}")


def _planned_lesions(volume: VolumeRecord) -> list[_PlannedLesion]:
    by_bin = {find_bin(lesion.diameter_mm, volume.bins_mm): lesion for lesion in volume.lesions}
    return [_PlannedLesion(size, volume.contrast.label, volume.place, by_bin.get(size)) for size in volume.bins_mm]
