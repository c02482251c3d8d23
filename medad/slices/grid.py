"""The position of axial slices in their volume, and the conversions between volume and slices.

Volumes are in canonical LPS order. In the axial slice `volume[:, :, z].T`, rows run to posterior and columns to the
patient's left. This is the radiologist's view, and it is the same for every data set.

A slice is a plane of the volume, centred in a square and resized. The nearest-neighbour maps between the two grids take
voxel floor((i + 1/2) * from / to), in integers. A mask on the slice grid therefore survives the round trip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from numpy import ndarray

from medad.base.boxes import bounding_box
from medad.config.liver import PreprocessSettings

CHUNK_SLICES = 64


@dataclass(frozen=True)
class SliceGrid:
    """Position of slices in their volume.

    Attributes
    ----------
    plane_xy
        In-plane size of the canonical volume, voxels.
    depth
        Number of axial planes in the volume.
    size_px
        Side of a slice, pixels.
    frame
        Part of each plane that is cut out: corner along x and y, and size. None: the whole plane.
    frame_side
        Side of the square, in voxels, in which the part is centred. 0: the longer side of the part.
    """

    plane_xy: tuple[int, int]
    depth: int
    size_px: int
    frame: tuple[int, int, int, int] | None = None
    frame_side: int = 0

    @property
    def shape_xy(self) -> tuple[int, int]:
        """Return the size of the part that is cut out, in voxels."""
        return self.plane_xy if self.frame is None else self.frame[2:]

    @property
    def part(self) -> tuple[slice, slice]:
        """Return the index along x and y of the part that is cut out."""
        x, y, nx, ny = self.frame or (0, 0, *self.plane_xy)
        return slice(x, x + nx), slice(y, y + ny)

    @property
    def side(self) -> int:
        """Return the side of the square, in voxels, in which the part is centred."""
        return self.frame_side or max(self.shape_xy)

    @property
    def offset_xy(self) -> tuple[int, int]:
        """Return the start of the part in that square, in voxels."""
        return (self.side - self.shape_xy[0]) // 2, (self.side - self.shape_xy[1]) // 2


@dataclass(frozen=True)
class Slices:
    """Axial slices that contain liver.

    Attributes
    ----------
    pixels
        Grey values 0..255. Outside the liver they are the background value.
    organ
        Mask of the liver.
    z
        Plane of each slice in the canonical volume, ascending.
    grid
        Position of the slices in the volume, for the conversion back.
    """

    pixels: UInt8[ndarray, "N S S"]
    organ: Bool[ndarray, "N S S"]
    z: Int64[ndarray, " N"]
    grid: SliceGrid


def slice_grid(
    liver: Bool[ndarray, "X Y Z"], spacing_mm: tuple[float, float, float], settings: PreprocessSettings
) -> SliceGrid:
    """Return the grid of slices that show whole planes or, with `settings.frame_mm`, a square around the liver.

    The square's side is `frame_mm`, or the liver's extent if that is larger.
    """
    plane = SliceGrid((liver.shape[0], liver.shape[1]), liver.shape[2], settings.slice_px)
    box = bounding_box(liver)
    if settings.frame_mm is None or box is None:
        return plane
    sides = [part.stop - part.start for part in box[:2]]
    side = max(round(settings.frame_mm / min(spacing_mm[:2])), *sides)
    starts, sizes = [], []
    for axis in range(2):
        start = box[axis].start + (sides[axis] - side) // 2
        stop = min(start + side, liver.shape[axis])
        starts.append(max(start, 0))
        sizes.append(stop - max(start, 0))
    return replace(plane, frame=(starts[0], starts[1], sizes[0], sizes[1]), frame_side=side)


def slice_volume(
    grey: UInt8[ndarray, "X Y Z"],
    liver: Bool[ndarray, "X Y Z"],
    grid: SliceGrid,
    min_liver_px: int = 1,
    background: int = 0,
) -> Slices:
    """Cut the axial slices that contain liver. Grey values are resized linearly, the mask by nearest neighbour.

    Parameters
    ----------
    grey
        Grey values. Outside the liver they must already be `background`.
    liver
        Liver mask on the same grid.
    grid
        Grid of the slices, from `slice_grid`.
    min_liver_px
        Smallest number of liver pixels in a resized slice. Slices with fewer are left out.
    """
    candidates = np.flatnonzero(liver.any((0, 1)))
    pixels_parts, organ_parts, z_parts = [], [], []
    for start in range(0, len(candidates), CHUNK_SLICES):
        z = candidates[start : start + CHUNK_SLICES]
        organ = _nearest_planes(liver, z, grid)
        enough = organ.sum((1, 2)) >= min_liver_px
        if not enough.any():
            continue
        z, organ = z[enough], organ[enough]
        planes = _padded_planes(grey, z, grid, background).astype(np.float32)
        pixels = np.rint(_resize_linear(planes, grid.size_px)).astype(np.uint8)
        pixels_parts.append(np.where(organ, pixels, np.uint8(background)))
        organ_parts.append(organ)
        z_parts.append(z.astype(np.int64))
    if not z_parts:
        empty = np.zeros((0, grid.size_px, grid.size_px), np.uint8)
        return Slices(empty, empty.astype(bool), np.zeros(0, np.int64), grid)
    return Slices(np.concatenate(pixels_parts), np.concatenate(organ_parts), np.concatenate(z_parts), grid)


def mask_to_slices(mask: Bool[ndarray, "X Y Z"], slices: Slices) -> Bool[ndarray, "N S S"]:
    """Convert a volume's mask to the slice grid, by nearest neighbour."""
    return _nearest_planes(mask, slices.z, slices.grid)


def mask_to_volume(mask: Bool[ndarray, "N S S"], slices: Slices) -> Bool[ndarray, "X Y Z"]:
    """Convert a mask on the slice grid to the volume's grid, by nearest neighbour. Planes without a slice are empty."""
    grid = slices.grid
    (x0, y0), index = grid.offset_xy, _nearest(grid.size_px, grid.side)
    columns = index[x0 : x0 + grid.shape_xy[0]]
    rows = index[y0 : y0 + grid.shape_xy[1]]
    volume = empty_volume(grid, np.bool_)
    for plane, z in zip(mask, slices.z, strict=True):
        volume[*grid.part, z] = plane[rows[:, None], columns[None, :]].T
    return volume


def map_to_volume(values: Float32[ndarray, "N S S"], slices: Slices) -> Float32[ndarray, "X Y Z"]:
    """Convert a map on the slice grid to the volume's grid, linearly in plane. Planes without a slice are 0."""
    grid = slices.grid
    x0, y0 = grid.offset_xy
    volume = empty_volume(grid, np.float32)
    for start in range(0, len(slices.z), CHUNK_SLICES):
        part = slice(start, start + CHUNK_SLICES)
        planes = _resize_linear(values[part], grid.side)
        for plane, z in zip(planes, slices.z[part], strict=True):
            volume[*grid.part, z] = plane[y0 : y0 + grid.shape_xy[1], x0 : x0 + grid.shape_xy[0]].T
    return volume


def empty_volume(grid: SliceGrid, dtype: type[np.generic]) -> ndarray:
    """Return zeros [X, Y, Z] with the planes contiguous, as NIfTI stores them."""
    return np.zeros((grid.depth, grid.plane_xy[1], grid.plane_xy[0]), dtype).transpose(2, 1, 0)


def _nearest(count: int, to: int) -> Int64[ndarray, " I"]:
    """Divide an axis into `to` cells and into `count` cells. Return for each of the `to` cells which of the
    `count` cells contains its centre.
    """
    index: ndarray = (2 * np.arange(to, dtype=np.int64) + 1) * count // (2 * to)
    return index


def _axis_index(count: int, offset: int, grid: SliceGrid) -> tuple[Int64[ndarray, " S"], Bool[ndarray, " S"]]:
    """Return for each slice pixel along one axis its voxel, and whether the pixel contains any voxel of the plane.

    A pixel across the plane's edge may have its centre in the padding. It takes the voxel at the edge.
    """
    pixels = _nearest(grid.size_px, grid.side)[offset : offset + count]
    index = _nearest(grid.side, grid.size_px) - offset
    place = np.arange(grid.size_px)
    return index.clip(0, count - 1), (place >= pixels[0]) & (place <= pixels[-1])


def _nearest_planes(mask: Bool[ndarray, "X Y Z"], z: Int64[ndarray, " N"], grid: SliceGrid) -> Bool[ndarray, "N S S"]:
    (columns, column_holds), (rows, row_holds) = (
        _axis_index(count, offset, grid) for count, offset in zip(grid.shape_xy, grid.offset_xy, strict=True)
    )
    holds = row_holds[:, None] & column_holds[None, :]
    planes = np.empty((len(z), grid.size_px, grid.size_px), bool)
    for target, plane in zip(planes, z, strict=True):
        target[...] = mask[*grid.part, plane].T[rows[:, None], columns[None, :]] & holds
    return planes


def _padded_planes(
    grey: UInt8[ndarray, "X Y Z"], z: Int64[ndarray, " N"], grid: SliceGrid, background: int
) -> UInt8[ndarray, "N A A"]:
    """Return planes as [n, row, column], centred in their square."""
    x0, y0 = grid.offset_xy
    planes = np.full((len(z), grid.side, grid.side), background, np.uint8)
    for target, plane in zip(planes, z, strict=True):
        target[y0 : y0 + grid.shape_xy[1], x0 : x0 + grid.shape_xy[0]] = grey[*grid.part, plane].T
    return planes


def _resize_linear(planes: Float32[ndarray, "N A A"], size: int) -> Float32[ndarray, "N B B"]:
    """Resize square planes linearly, without smoothing. Positions are those of pixel centres.

    The values are those of torch's `interpolate` (bilinear, align_corners=False). Loading torch for it takes a second.
    """
    if planes.shape[-1] == size:
        return planes
    low, high, share = _linear_index(planes.shape[-1], size)
    resized = np.empty((len(planes), size, size), np.float32)
    for target, plane in zip(resized, planes, strict=True):
        rows = plane[:, low] * (1 - share) + plane[:, high] * share
        target[...] = rows[low] * (1 - share)[:, None] + rows[high] * share[:, None]
    return resized


def _linear_index(count: int, to: int) -> tuple[Int64[ndarray, " I"], Int64[ndarray, " I"], Float32[ndarray, " I"]]:
    """Return for each of `to` cells the two of `count` cells around its centre, and the share of the second one."""
    half = np.float32(0.5)
    place = ((np.arange(to, dtype=np.float32) + half) * np.float32(count / to) - half).clip(0)
    low = place.astype(np.int64)
    return low, np.minimum(low + 1, count - 1), place - low.astype(np.float32)
