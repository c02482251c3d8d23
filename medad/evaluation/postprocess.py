"""Post-processing: from a probability volume to a lesion mask and a lesion table.

All functions work within bounding boxes. A CT of 512 x 512 x 1000 voxels never needs a label array of full size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float16, Float32, Int
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist
from skimage.filters import threshold_triangle

from medad.base.boxes import Box, bounding_box
from medad.config.liver import PostprocessSettings

CONNECT_26 = np.ones((3, 3, 3), dtype=bool)
"""Neighbourhood of a voxel: voxels that share a face, an edge or a corner belong to one lesion."""

_HULL_ABOVE_POINTS = 256
"""Number of points up to which comparing all pairs is faster than building a convex hull."""


@dataclass(frozen=True)
class Lesion:
    """One 26-connected component of a predicted mask."""

    id: int
    """Rank by volume; 1 is the largest lesion."""
    volume_mm3: float
    """Number of voxels times the volume of one voxel."""
    diameter_mm: float
    """Largest distance between the centres of two of its voxels. It is 0 for a single voxel. A caliper at the outer
    edges of the voxels measures up to one voxel diagonal more."""
    centroid_ras_mm: tuple[float, float, float]
    """Mean of its voxel centres. x increases to the patient's right, y to the front, z to the head."""
    mean_probability: float
    max_probability: float
    mean_hu: float | None = None
    """Mean HU of its voxels in the scan as it was read, without window or smoothing. None: the HU are not known."""


def label_components(mask: Bool[np.ndarray, "X Y Z"]) -> tuple[Int[np.ndarray, "X Y Z"], int]:
    """Label the 26-connected components of a cropped mask: 1..count, 0 elsewhere. Return labels and count."""
    labels = np.empty(mask.shape, dtype=np.int32)
    return labels, int(ndimage.label(mask, structure=CONNECT_26, output=labels))


def resolve_threshold(
    probability: Float32[np.ndarray, "X Y Z"],
    liver: Bool[np.ndarray, "X Y Z"],
    settings: PostprocessSettings,
    calibrated: float | None = None,
) -> float:
    """Return the threshold for this scan: the fixed one, the calibrated one, or with `auto` one chosen for the scan.

    `calibrated` is the threshold of the model's calibration. If it is None, `calibrated` in the settings means `auto`.

    `auto` uses the triangle method (Zack et al., 1977) on the voxels inside the liver. It takes the point where the
    histogram is farthest below the line from its peak (healthy tissue) to the end of its tail. Tumour is a small part
    of most livers. Otsu's method (1979) assumes two classes of similar size and would split the healthy voxels. The
    threshold is limited to `settings.auto_range`; otherwise it would split the noise of a healthy liver. No labels and
    no other scans are used.
    """
    if isinstance(settings.threshold, float):
        return settings.threshold
    if settings.threshold == "calibrated" and calibrated is not None:
        return calibrated
    low, high = settings.auto_range
    inside = probability[liver]
    inside = inside[np.isfinite(inside)]
    if inside.size == 0 or inside.min() == inside.max():
        return high
    return min(max(float(threshold_triangle(inside)), low), high)


def postprocess(
    probability: Float32[np.ndarray, "X Y Z"],
    liver: Bool[np.ndarray, "X Y Z"],
    voxel_mm3: float,
    settings: PostprocessSettings,
) -> Bool[np.ndarray, "X Y Z"]:
    """Return the lesion mask: thresholded, restricted to the liver, without small lesions.

    Parameters
    ----------
    probability
        P(tumour), 0..1. NaN counts as below every threshold.
    liver
        Liver mask. No voxel outside it is marked as tumour.
    voxel_mm3
        Volume of one voxel.
    settings
        A voxel is marked if its probability is at least `resolve_threshold` of this scan, or `outline_share` of it in
        a component that reaches the threshold somewhere (hysteresis; Canny, 1986). A 26-connected component
        below `min_lesion_mm3` is dropped; one of exactly that volume stays.

    Returns
    -------
    The mask. Additional memory grows with the bounding box of the marked voxels, not with the volume.
    """
    if probability.shape != liver.shape:
        raise ValueError(f"probability has shape {probability.shape}, liver {liver.shape}")
    if not (math.isfinite(voxel_mm3) and voxel_mm3 > 0):
        raise ValueError(f"voxel_mm3 must be above 0, got {voxel_mm3}")
    mask = np.zeros(probability.shape, dtype=bool)
    box = bounding_box(liver)
    if box is None:
        return mask
    candidates = mask[box]
    threshold = resolve_threshold(probability, liver, settings)
    np.greater_equal(probability[box], threshold * settings.outline_share, out=candidates)
    candidates &= liver[box]
    # tolerance: affines have single precision, and a lesion of exactly the limit must not be dropped by rounding
    min_voxels = math.ceil(settings.min_lesion_mm3 / voxel_mm3 * (1 - 1e-6))
    inner = bounding_box(candidates)
    if inner is None or (min_voxels <= 1 and settings.outline_share == 1):
        return mask
    candidates = candidates[inner]
    labels, count = label_components(candidates)
    of_foreground = labels[candidates]
    keep = np.bincount(of_foreground, minlength=count + 1) >= min_voxels
    if settings.outline_share < 1:
        found = np.zeros(count + 1, bool)
        found[of_foreground[probability[box][inner][candidates] >= threshold]] = True
        keep &= found
    candidates[candidates] = keep[of_foreground]
    return mask


def lesion_table(
    mask: Bool[np.ndarray, "X Y Z"],
    probability: Float32[np.ndarray, "X Y Z"],
    canonical_affine: Float[np.ndarray, "4 4"],
    mask_hu: Float16[np.ndarray, " M"] | None = None,
) -> list[Lesion]:
    """Measure each 26-connected lesion of a mask.

    Parameters
    ----------
    mask
        The post-processed prediction.
    probability
        P(tumour) on the same grid.
    canonical_affine
        Matrix from voxel index to RAS+ mm. It may be oblique, sheared or anisotropic.
    mask_hu
        HU of the mask's voxels in index order. None: no lesion gets a mean HU.

    Returns
    -------
    The lesions, largest volume first. Equal volumes are in the grid's index order.
    """
    if mask.shape != probability.shape:
        raise ValueError(f"mask has shape {mask.shape}, probability {probability.shape}")
    found = label_lesions(mask)
    if found is None:
        return []
    box, labels = found
    affine = canonical_affine.astype(np.float64)
    voxel_mm3 = abs(float(np.linalg.det(affine[:3, :3])))
    origin = np.array([part.start for part in box])
    scores = probability[box]
    hu_sums = None if mask_hu is None else np.bincount(labels[labels > 0], mask_hu.astype(np.float64))
    lesions = []
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        component = labels[place] == number
        corner = origin + [part.start for part in place]
        voxels = int(np.count_nonzero(component))
        inside = scores[place][component]
        centre = affine[:3, :3] @ (corner + _mean_index(component, voxels)) + affine[:3, 3]
        lesion = Lesion(
            id=number,
            volume_mm3=voxels * voxel_mm3,
            diameter_mm=_largest_distance(component, affine[:3, :3]),
            centroid_ras_mm=(float(centre[0]), float(centre[1]), float(centre[2])),
            mean_probability=float(inside.mean(dtype=np.float64)),
            max_probability=float(inside.max()),
            mean_hu=None if hu_sums is None else float(hu_sums[number] / voxels),
        )
        lesions.append(lesion)
    return lesions


def label_lesions(mask: Bool[np.ndarray, "X Y Z"]) -> tuple[Box, Int[np.ndarray, "A B C"]] | None:
    """Label the lesions of a mask by their ids: 1 is the largest, and equal volumes are in the grid's index order.

    Returns the mask's bounding box and the labels within it, or None if the mask is empty.
    """
    box = bounding_box(mask)
    if box is None:
        return None
    labels, count = label_components(mask[box])
    voxels = np.bincount(labels.reshape(-1), minlength=count + 1)
    rank = np.zeros(count + 1, dtype=labels.dtype)
    rank[1 + np.argsort(-voxels[1:], kind="stable")] = np.arange(1, count + 1)
    return box, rank[labels]


def _mean_index(component: Bool[np.ndarray, "X Y Z"], voxels: int) -> Float[np.ndarray, " 3"]:
    # use profiles along each axis: coordinates of all voxels of a liver-sized lesion would need gigabytes
    profiles = [component.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    return np.array([float(profile @ np.arange(len(profile))) / voxels for profile in profiles])


def _largest_distance(component: Bool[np.ndarray, "X Y Z"], to_mm: Float[np.ndarray, "3 3"]) -> float:
    """Return the largest distance in mm between two voxel centres of `component`."""
    corners = _hull_points(_column_ends(component)) @ to_mm.T
    farthest = 0.0
    for start in range(0, len(corners), 512):
        farthest = max(farthest, float(cdist(corners[start : start + 512], corners[start:]).max()))
    return farthest


def _column_ends(component: Bool[np.ndarray, "X Y Z"]) -> Float[np.ndarray, "P 3"]:
    # the farthest two voxels are corners of the convex hull, and a corner is the first or last voxel of its column
    x, y = np.nonzero(component.any(axis=2))
    columns = component[x, y]
    first = columns.argmax(axis=1)
    last = columns.shape[1] - 1 - columns[:, ::-1].argmax(axis=1)
    ends = np.concatenate([np.stack([x, y, first], axis=1), np.stack([x, y, last], axis=1)])
    return np.unique(ends, axis=0).astype(np.float64)


def _hull_points(points: Float[np.ndarray, "P 3"]) -> Float[np.ndarray, "Q 3"]:
    """Return the corners of the convex hull of integer points that span a line, a plane or a volume.

    The hull is computed in voxel indices, where points on a line or plane lie on it exactly. The linear map to mm does
    not change which points are corners.
    """
    if len(points) <= _HULL_ABOVE_POINTS:
        return points
    from_first = points - points[0]
    rank = int(np.linalg.matrix_rank(from_first))
    if rank == 3:
        return np.asarray(points[ConvexHull(points).vertices])
    if rank == 2:
        # drop an axis so that the projected points still span a plane
        for axes in ([0, 1], [0, 2], [1, 2]):
            if np.linalg.matrix_rank(from_first[:, axes]) == 2:
                return np.asarray(points[ConvexHull(points[:, axes]).vertices])
    # a straight line: np.unique sorted the points, so the ends are the first and the last
    return points[[0, -1]]
