"""CT volume -> equalised liver slices (000, section 3.4.1), and the exact way back to the scan's grid.

Volumes are in canonical LPS order, so the axial slice `volume[:, :, z].T` has rows running to posterior and columns
to the patient's left: one in-plane orientation, the radiologist's, for every data set.

A slice is the volume's plane, centred in a square and resized. The nearest-neighbour maps between the two grids take
voxel floor((i + 1/2) * from / to), in integers; hence a mask that lives on the slice grid survives the round trip.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import ndimage
from torch.nn import functional

from medad.base.errors import InputError
from medad.config.liver import PreprocessSettings
from medad.ct.io import Geometry

CHUNK_SLICES = 64
FORMAT, METADATA = "adflows-prepared-2", "adflows"
LIFT_FROM, LIFT_TO = (1, 149), (30, 150)


@dataclass(frozen=True)
class SliceGrid:
    """How slices lie in their volume.

    Attributes
    ----------
    plane_xy
        In-plane size of the canonical volume, voxels.
    depth
        Number of axial planes in the volume.
    size_px
        Side of a slice, pixels.
    frame
        The part of each plane that is cut out: corner along x and y, and size. None: all of it.
    frame_side
        Side of the square, in voxels, that the part is centred in. 0: the longer of its sides.
    """

    plane_xy: tuple[int, int]
    depth: int
    size_px: int
    frame: tuple[int, int, int, int] | None = None
    frame_side: int = 0

    @property
    def shape_xy(self) -> tuple[int, int]:
        """Size of the part that is cut out."""
        return self.plane_xy if self.frame is None else self.frame[2:]

    @property
    def part(self) -> tuple[slice, slice]:
        """The part that is cut out."""
        x, y, nx, ny = self.frame or (0, 0, *self.plane_xy)
        return slice(x, x + nx), slice(y, y + ny)

    @property
    def side(self) -> int:
        """Side of the square, in voxels, that the part is centred in."""
        return self.frame_side or max(self.shape_xy)

    @property
    def offset_xy(self) -> tuple[int, int]:
        """Where the part begins in that square."""
        return (self.side - self.shape_xy[0]) // 2, (self.side - self.shape_xy[1]) // 2


@dataclass(frozen=True)
class Slices:
    """Axial slices that contain liver.

    Attributes
    ----------
    pixels
        Grey values 0..255; 0 outside the liver.
    organ
        Liver.
    z
        Plane of each slice in the canonical volume, ascending.
    grid
        The way back.
    """

    pixels: UInt8[ndarray, "N S S"]
    organ: Bool[ndarray, "N S S"]
    z: Int64[ndarray, " N"]
    grid: SliceGrid


def window(hu: Float32[ndarray, "X Y Z"], window_hu: tuple[float, float]) -> UInt8[ndarray, "X Y Z"]:
    """Map HU linearly so that `window_hu` becomes 0..255, clipped, rounded to the nearest grey value."""
    low, high = window_hu
    grey = np.empty_like(hu, dtype=np.uint8)  # keeps the memory order of the scan
    scale = np.float32(255.0 / (high - low))
    for z in range(hu.shape[2]):
        plane = (hu[:, :, z] - np.float32(low)) * scale
        np.clip(plane, 0.0, 255.0, out=plane)
        grey[:, :, z] = np.rint(plane, out=plane)
    return grey


def liver_roi(grey: UInt8[ndarray, "X Y Z"], liver: Bool[ndarray, "X Y Z"]) -> UInt8[ndarray, "X Y Z"]:
    """Zero everything outside the liver."""
    inside: ndarray = grey * liver
    return inside


def _nearest(count: int, to: int) -> Int64[ndarray, " I"]:
    """For each of `to` cells the cell of `count` that its centre falls into."""
    index: ndarray = (2 * np.arange(to, dtype=np.int64) + 1) * count // (2 * to)
    return index


def _axis_index(count: int, offset: int, grid: SliceGrid) -> tuple[Int64[ndarray, " S"], Bool[ndarray, " S"]]:
    """For each slice pixel along one axis its voxel, and whether any voxel of the plane lies in that pixel.

    A pixel that straddles the plane's edge may have its centre in the padding; it takes the voxel at the edge.
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
    """Planes as [n, row, column], centred in their square."""
    x0, y0 = grid.offset_xy
    planes = np.full((len(z), grid.side, grid.side), background, np.uint8)
    for target, plane in zip(planes, z, strict=True):
        target[y0 : y0 + grid.shape_xy[1], x0 : x0 + grid.shape_xy[0]] = grey[*grid.part, plane].T
    return planes


def _resize_linear(planes: Float32[torch.Tensor, "N A A"], size: int) -> Float32[torch.Tensor, "N B B"]:
    if planes.shape[-1] == size:
        return planes
    return functional.interpolate(planes[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def slice_volume(
    grey: UInt8[ndarray, "X Y Z"],
    liver: Bool[ndarray, "X Y Z"],
    grid: SliceGrid,
    min_liver_px: int = 1,
    background: int = 0,
) -> Slices:
    """Cut the axial slices that contain liver; linear for grey values, nearest for the mask.

    Parameters
    ----------
    grey
        Grey values, outside the liver already `background`.
    liver
        Liver mask on the same grid.
    grid
        From `slice_grid`.
    min_liver_px
        Slices with fewer liver pixels after resizing are left out.
    """
    candidates = np.flatnonzero(liver.any((0, 1)))
    kept_pixels, kept_organ, kept_z = [], [], []
    for start in range(0, len(candidates), CHUNK_SLICES):
        z = candidates[start : start + CHUNK_SLICES]
        organ = _nearest_planes(liver, z, grid)
        enough = organ.sum((1, 2)) >= min_liver_px
        if not enough.any():
            continue
        z, organ = z[enough], organ[enough]
        planes = torch.from_numpy(_padded_planes(grey, z, grid, background)).float()
        pixels = _resize_linear(planes, grid.size_px).round_().to(torch.uint8).numpy()
        kept_pixels.append(np.where(organ, pixels, np.uint8(background)))
        kept_organ.append(organ)
        kept_z.append(z.astype(np.int64))
    if not kept_z:
        empty = np.zeros((0, grid.size_px, grid.size_px), np.uint8)
        return Slices(empty, empty.astype(bool), np.zeros(0, np.int64), grid)
    return Slices(np.concatenate(kept_pixels), np.concatenate(kept_organ), np.concatenate(kept_z), grid)


def slice_grid(
    liver: Bool[ndarray, "X Y Z"], spacing_mm: tuple[float, float, float], settings: PreprocessSettings
) -> SliceGrid:
    """Slices that show whole planes; with `settings.frame_mm` a square about the liver, of that side or of the liver's
    extent if that is more."""
    plane = SliceGrid((liver.shape[0], liver.shape[1]), liver.shape[2], settings.slice_px)
    if settings.frame_mm is None or not liver.any():
        return plane
    corner, box = _bounding_box(liver)
    side = max(round(settings.frame_mm / min(spacing_mm[:2])), *box.shape[:2])
    starts, sizes = [], []
    for axis in range(2):
        start = corner[axis] + (box.shape[axis] - side) // 2
        stop = min(start + side, liver.shape[axis])
        starts.append(max(start, 0))
        sizes.append(stop - max(start, 0))
    return replace(plane, frame=(starts[0], starts[1], sizes[0], sizes[1]), frame_side=side)


def equalise(
    pixels: UInt8[ndarray, "N S S"], organ: Bool[ndarray, "N S S"], lift_dark: bool
) -> UInt8[ndarray, "N S S"]:
    """Equalise each slice's histogram over its liver pixels; background stays 0.

    Grey value g becomes round(255 * (cdf(g) - cdf_min) / (n - cdf_min)), cdf counting liver pixels; a slice of one
    grey value is left as it is. With `lift_dark`, results below 150 move to 30..150, so that dark liver keeps apart
    from the background (as in the method's public code, where value 0 is the background's alone).
    """
    count = len(pixels)
    slot = (np.arange(count, dtype=np.int64) * 256)[:, None, None] + pixels
    histogram = np.bincount(slot[organ], minlength=256 * count).reshape(count, 256)
    cdf = histogram.cumsum(1)
    total = cdf[:, -1:]
    first = np.take_along_axis(cdf, (histogram > 0).argmax(1)[:, None], 1)
    span = total - first
    table = np.rint((cdf - first).clip(0) * 255 / np.maximum(span, 1))
    table = np.where(span > 0, table, np.arange(256.0))
    if lift_dark:
        table = np.where(table <= LIFT_FROM[1], _lift(table), table)
    return np.where(organ, table.astype(np.uint8).reshape(-1)[slot], np.uint8(0))


def _lift(grey: ndarray) -> ndarray:
    above = (np.maximum(grey, LIFT_FROM[0]) - LIFT_FROM[0]) * (LIFT_TO[1] - LIFT_TO[0])
    lifted: ndarray = np.rint(LIFT_TO[0] + above / (LIFT_FROM[1] - LIFT_FROM[0]))
    return lifted


def smooth_inside(
    hu: Float32[ndarray, "X Y Z"],
    liver: Bool[ndarray, "X Y Z"],
    spacing_mm: tuple[float, float, float],
    resolution_mm: float,
) -> Float32[ndarray, "X Y Z"]:
    """Smooth HU within the liver to a common resolution; elsewhere they stay.

    A voxel of size d averages over a box of variance d^2 / 12. Along each axis a Gaussian adds what is missing to
    `resolution_mm` squared. Normalised convolution: the mean is over liver voxels alone.
    """
    sigma = [sqrt(max(resolution_mm**2 - size**2 / 12, 0)) / size for size in spacing_mm]
    if not any(sigma):
        return hu
    weight = ndimage.gaussian_filter(liver.astype(np.float32), sigma, mode="constant")
    total = ndimage.gaussian_filter(np.where(liver, hu, np.float32(0)), sigma, mode="constant")
    return np.where(liver, total / np.maximum(weight, np.float32(1e-6)), hu)


def prepare(
    hu: Float32[ndarray, "X Y Z"],
    liver: Bool[ndarray, "X Y Z"],
    settings: PreprocessSettings,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Slices:
    """Smooth and standardise where asked for; window, liver ROI, slice and resize, equalise in the thesis's order.

    Only the planes and the box that hold liver are windowed; the result is that of the whole volume.

    Parameters
    ----------
    spacing_mm
        Voxel size, for `settings.resolution_mm`.
    """
    grid = slice_grid(liver, spacing_mm, settings)
    zs = np.flatnonzero(liver.any((0, 1)))
    if len(zs) == 0:
        return slice_volume(np.zeros(hu.shape, np.uint8), liver, grid, settings.min_liver_px)
    low, high = int(zs[0]), int(zs[-1]) + 1
    slab, scan = liver[:, :, low:high], hu[:, :, low:high]
    if settings.resolution_mm > 0:
        scan = scan.copy()
        x, y = (np.flatnonzero(slab.any(axes)) for axes in ((1, 2), (0, 2)))
        box = (slice(int(x[0]), int(x[-1]) + 1), slice(int(y[0]), int(y[-1]) + 1))
        scan[box] = smooth_inside(scan[box], slab[box], spacing_mm, settings.resolution_mm)
    window_hu = settings.window_hu
    if settings.standardise == "median":
        middle = float(np.median(hu[liver]))
        window_hu = (window_hu[0] + middle, window_hu[1] + middle)
    background = median_grey(settings) if settings.background == "median" else 0
    grey = liver_roi(window(scan, window_hu), slab)
    if background:
        grey = np.where(slab, grey, np.uint8(background))
    part = slice_volume(grey, slab, replace(grid, depth=high - low), settings.min_liver_px, background)
    pixels = equalise(part.pixels, part.organ, settings.lift_dark) if settings.equalise else part.pixels
    return Slices(pixels, part.organ, part.z + low, grid)


def median_grey(settings: PreprocessSettings) -> int:
    """Grey value of the liver's median HU under `standardise: median`."""
    low, high = settings.window_hu
    return int(np.clip(np.rint(-low * 255 / (high - low)), 0, 255))


def mask_to_slices(mask: Bool[ndarray, "X Y Z"], slices: Slices) -> Bool[ndarray, "N S S"]:
    """A volume's mask on the slice grid, nearest neighbour."""
    return _nearest_planes(mask, slices.z, slices.grid)


def _empty_volume(grid: SliceGrid, dtype: type[np.generic]) -> ndarray:
    """[X, Y, Z] with the planes contiguous, as NIfTI stores them."""
    return np.zeros((grid.depth, grid.plane_xy[1], grid.plane_xy[0]), dtype).transpose(2, 1, 0)


def mask_to_volume(mask: Bool[ndarray, "N S S"], slices: Slices) -> Bool[ndarray, "X Y Z"]:
    """A mask on the slice grid back on the volume's grid, nearest neighbour; planes without slice are empty."""
    grid = slices.grid
    (x0, y0), index = grid.offset_xy, _nearest(grid.size_px, grid.side)
    columns = index[x0 : x0 + grid.shape_xy[0]]
    rows = index[y0 : y0 + grid.shape_xy[1]]
    volume = _empty_volume(grid, np.bool_)
    for plane, z in zip(mask, slices.z, strict=True):
        volume[*grid.part, z] = plane[rows[:, None], columns[None, :]].T
    return volume


def map_to_volume(values: Float32[ndarray, "N S S"], slices: Slices) -> Float32[ndarray, "X Y Z"]:
    """A map on the slice grid back on the volume's grid, linear in plane; planes without slice are 0."""
    grid = slices.grid
    x0, y0 = grid.offset_xy
    volume = _empty_volume(grid, np.float32)
    for start in range(0, len(slices.z), CHUNK_SLICES):
        part = slice(start, start + CHUNK_SLICES)
        planes = _resize_linear(torch.from_numpy(values[part]), grid.side).numpy()
        for plane, z in zip(planes, slices.z[part], strict=True):
            volume[*grid.part, z] = plane[y0 : y0 + grid.shape_xy[1], x0 : x0 + grid.shape_xy[0]].T
    return volume


@dataclass(frozen=True)
class Prepared:
    """A case after preprocessing.

    Attributes
    ----------
    slices
        What the networks see.
    geometry
        The scan's grid.
    liver
        On that grid; None if it was not asked for.
    grey_per_hu
        Grey values a HU; None where they are not linear in HU.
    """

    slices: Slices
    geometry: Geometry
    liver: Bool[ndarray, "X Y Z"] | None
    grey_per_hu: float | None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """What a pixel measures along columns and rows, and how far planes are apart."""
        x, y, z = self.geometry.canonical_spacing_mm
        grid = self.slices.grid
        return x * grid.side / grid.size_px, y * grid.side / grid.size_px, z


def grey_per_hu(settings: PreprocessSettings) -> float | None:
    """Grey values a HU; None after equalisation, which keeps no scale."""
    low, high = settings.window_hu
    return None if settings.equalise else 255 / (high - low)


def save_prepared(
    path: Path,
    slices: Slices,
    geometry: Geometry,
    liver: Bool[ndarray, "X Y Z"],
    grey_per_hu: float | None = None,
) -> None:
    """Write slices, geometry and the liver mask (its bounding box, one bit a voxel) as safetensors."""
    corner, box = _bounding_box(liver)
    metadata = {
        "format": FORMAT,
        "grid": asdict(slices.grid),
        "geometry": geometry.to_json(),
        "grey_per_hu": grey_per_hu,
        "liver_box": [*corner, *box.shape],
    }
    arrays = {
        "pixels": np.ascontiguousarray(slices.pixels),
        "organ": slices.organ.astype(np.uint8),
        "z": slices.z,
        "liver_bits": np.packbits(box, axis=None),
    }
    # one entry: safetensors writes several in any order, and equal slices must give equal bytes
    save_file(arrays, path, {METADATA: json.dumps(metadata)})


def load_prepared(path: Path, *, with_liver: bool = False) -> Prepared:
    """Read what `save_prepared` wrote.

    Raises
    ------
    InputError
        Missing, damaged, or some other file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            if metadata.get("format") != FORMAT:
                raise InputError(path, f"expected prepared slices ({FORMAT})")
            slices = Slices(
                file.get_tensor("pixels"),
                file.get_tensor("organ").astype(bool),
                file.get_tensor("z"),
                _grid_from(metadata["grid"]),
            )
            liver = _unpack(file.get_tensor("liver_bits"), metadata["liver_box"], slices.grid) if with_liver else None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(path, f"prepared slices cannot be read ({error})") from error
    return Prepared(slices, Geometry.from_json(metadata["geometry"]), liver, metadata["grey_per_hu"])


def _grid_from(values: dict[str, Any]) -> SliceGrid:
    frame = values["frame"]
    return SliceGrid(
        (values["plane_xy"][0], values["plane_xy"][1]),
        values["depth"],
        values["size_px"],
        None if frame is None else (frame[0], frame[1], frame[2], frame[3]),
        values["frame_side"],
    )


def _bounding_box(mask: Bool[ndarray, "X Y Z"]) -> tuple[tuple[int, int, int], Bool[ndarray, "A B C"]]:
    spans = [np.flatnonzero(mask.any(axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    if len(spans[0]) == 0:
        return (0, 0, 0), mask[:0, :0, :0]
    low = (int(spans[0][0]), int(spans[1][0]), int(spans[2][0]))
    box = mask[low[0] : spans[0][-1] + 1, low[1] : spans[1][-1] + 1, low[2] : spans[2][-1] + 1]
    return low, box


def _unpack(bits: UInt8[ndarray, " K"], place: list[int], grid: SliceGrid) -> Bool[ndarray, "X Y Z"]:
    x, y, z, nx, ny, nz = place
    liver = _empty_volume(grid, np.bool_)
    box = np.unpackbits(bits, count=nx * ny * nz).astype(bool).reshape(nx, ny, nz)
    liver[x : x + nx, y : y + ny, z : z + nz] = box
    return liver
