"""Volume -> slices -> volume: comparison with literal code, and a round trip that loses nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy import ndarray
from scipy import ndimage
from torch.nn import functional

from medad.base.errors import InputError
from medad.config.liver import PreprocessSettings
from medad.ct.io import Geometry, read_labels, write_mask
from medad.slices.grid import (
    SliceGrid,
    Slices,
    _resize_linear,
    map_to_volume,
    mask_to_slices,
    mask_to_volume,
    slice_volume,
)
from medad.slices.prepared_file import load_prepared, save_prepared
from medad.slices.preprocess import equalise, grey_per_hu, liver_roi, prepare, smooth_inside, window


def _grid_only(shape: tuple[int, int, int], size_px: int) -> Slices:
    """Return slices of every plane of a volume, all empty."""
    blank = np.zeros((shape[2], size_px, size_px), np.uint8)
    grid = SliceGrid(shape[:2], shape[2], size_px)
    return Slices(blank, blank.astype(bool), np.arange(shape[2]), grid)


def grid_of(liver: ndarray, size_px: int) -> SliceGrid:
    """Return a grid of slices that show whole planes."""
    return SliceGrid(liver.shape[:2], liver.shape[2], size_px)


def _volume(shape: tuple[int, int, int], seed: int = 0) -> tuple[ndarray, ndarray]:
    """Return HU and a liver-like ellipsoid in all planes except the first and the last."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(80, 40, shape).astype(np.float32)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    scaled = np.stack([axis / reach for axis, reach in zip(axes, (0.7, 0.6, 0.7), strict=True)])
    return hu, (scaled**2).sum(0) < 1


def test_window_by_hand() -> None:
    hu = np.array([-1000, -200, -199.1, 25, 250, 3000], np.float32).reshape(6, 1, 1)
    assert window(hu, (-200.0, 250.0)).ravel().tolist() == [0, 0, 1, 128, 255, 255]


def test_window_is_monotone_and_keeps_the_memory_order() -> None:
    hu = np.asfortranarray(np.sort(_volume((20, 9, 7))[0], axis=0))
    grey = window(hu, (-200.0, 250.0))
    assert (np.diff(grey.astype(int), axis=0) >= 0).all()
    assert grey.flags.f_contiguous


def test_roi_zeroes_outside_alone() -> None:
    hu, liver = _volume((16, 12, 5))
    grey = window(hu, (-200.0, 250.0))
    cut = liver_roi(grey, liver)
    assert (cut[~liver] == 0).all()
    assert (cut[liver] == grey[liver]).all()


def _equalise_literally(image: ndarray, organ: ndarray) -> ndarray:
    """Equalise in plain loops: count, accumulate, map, then lift."""
    values = [int(image[place]) for place in zip(*np.nonzero(organ), strict=True)]
    below = [sum(1 for value in values if value <= grey) for grey in range(256)]
    lowest = below[min(values)]
    out = np.zeros_like(image)
    for place in zip(*np.nonzero(organ), strict=True):
        if len(values) > lowest:
            grey = round(255 * (below[int(image[place])] - lowest) / (len(values) - lowest))
        else:
            grey = int(image[place])
        out[place] = round(30 + (max(grey, 1) - 1) * 120 / 148) if grey <= 149 else grey
    return out


@given(seed=st.integers(0, 2**31), levels=st.sampled_from([1, 2, 5, 256]))
def test_equalise_equals_the_literal_loop(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = (rng.integers(0, levels, (3, 9, 9)) * (255 // max(levels - 1, 1)) % 256).astype(np.uint8)
    organ = rng.random((3, 9, 9)) < 0.6
    organ[:, 4, 4] = True
    expected = [_equalise_literally(image, mask) for image, mask in zip(pixels, organ, strict=True)]
    np.testing.assert_array_equal(equalise(pixels, organ, lift_dark=True), expected)


def test_equalised_liver_is_flat_and_keeps_apart_from_the_background() -> None:
    rng = np.random.default_rng(0)
    pixels = np.clip(rng.normal(140, 12, (2, 96, 96)), 0, 255).astype(np.uint8)
    organ = np.ones_like(pixels, bool)
    organ[:, :20] = False
    plain = equalise(pixels, organ, lift_dark=False)
    quartiles = np.percentile(plain[organ], [25, 50, 75])
    np.testing.assert_allclose(quartiles, [63.75, 127.5, 191.25], atol=8)
    lifted = equalise(pixels, organ, lift_dark=True)
    assert lifted[organ].min() == 30
    assert (lifted[~organ] == 0).all()


def test_equalise_ignores_a_monotone_map() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 120, (2, 32, 32)).astype(np.uint8)
    organ = rng.random(pixels.shape) < 0.5
    np.testing.assert_array_equal(equalise(pixels, organ, True), equalise(pixels * 2 + 10, organ, True))


def test_slicing_at_the_volumes_own_size_copies_planes() -> None:
    hu, liver = _volume((32, 32, 9))
    grey = liver_roi(window(hu, (-200.0, 250.0)), liver)
    slices = slice_volume(grey, liver, grid_of(liver, 32))
    assert slices.z.tolist() == np.flatnonzero(liver.any((0, 1))).tolist()
    for pixels, organ, z in zip(slices.pixels, slices.organ, slices.z, strict=True):
        np.testing.assert_array_equal(pixels, grey[:, :, z].T)
        np.testing.assert_array_equal(organ, liver[:, :, z].T)


def test_linear_resize_equals_scipy() -> None:
    hu, liver = _volume((80, 80, 4))
    liver[:] = True
    grey = window(hu, (-200.0, 250.0))
    slices = slice_volume(grey, liver, grid_of(liver, 48))
    place = (np.arange(48) + 0.5) * 80 / 48 - 0.5
    rows, columns = np.meshgrid(place, place, indexing="ij")
    for pixels, z in zip(slices.pixels, slices.z, strict=True):
        expected = ndimage.map_coordinates(grey[:, :, z].T.astype(float), [rows, columns], order=1)
        assert np.abs(pixels - expected).max() <= 0.5 + 1e-3


def test_small_livers_are_left_out() -> None:
    grey, liver = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3), bool)
    liver[4:8, 4:8, 0] = liver[4:6, 4:6, 1] = True
    assert slice_volume(grey, liver, grid_of(liver, 32), min_liver_px=5).z.tolist() == [0]
    assert slice_volume(grey, liver, grid_of(liver, 32), min_liver_px=17).z.tolist() == []


def test_prepare_equals_the_four_steps() -> None:
    hu, liver = _volume((40, 56, 12))
    chosen = PreprocessSettings(slice_px=32)
    whole = prepare(hu, liver, chosen)
    cut = slice_volume(liver_roi(window(hu, chosen.window_hu), liver), liver, grid_of(liver, 32))
    np.testing.assert_array_equal(whole.pixels, equalise(cut.pixels, cut.organ, True))
    np.testing.assert_array_equal(whole.z, cut.z)
    assert whole.grid == cut.grid


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3)),
    size_px=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_masks_on_the_slice_grid_survive_the_round_trip(shape: tuple[int, int, int], size_px: int, seed: int) -> None:
    slices = _grid_only(shape, size_px)
    drawn = np.random.default_rng(seed).random((shape[2], size_px, size_px)) < 0.4
    lives_there = mask_to_volume(drawn, slices)
    np.testing.assert_array_equal(mask_to_volume(mask_to_slices(lives_there, slices), slices), lives_there)
    if shape[0] == shape[1] >= size_px:
        np.testing.assert_array_equal(mask_to_slices(lives_there, slices), drawn)


ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_way_back_from_all_48_orientations(
    tmp_path: Path, order: tuple[int, int, int], signs: tuple[int, int, int]
) -> None:
    """Write a mask of the slice grid on the scan's grid and read it: mask and affine are the same."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * np.array(signs) * (0.7, 0.8, 2.5)
    affine[:3, 3] = (-31.4, 15.9, 26.5)
    source = nibabel.Nifti1Image(np.zeros((40, 30, 20), np.int16), affine)
    source.set_sform(affine, code=1)
    source.set_qform(affine, code=1)
    nibabel.save(source, tmp_path / "scan.nii.gz")
    geometry = read_labels(tmp_path / "scan.nii.gz").geometry
    slices = _grid_only(geometry.canonical_shape, 24)
    drawn = np.random.default_rng(0).random(slices.organ.shape) < 0.3
    volume = mask_to_volume(drawn, slices)
    write_mask(tmp_path / "mask.nii.gz", volume, geometry)
    again = read_labels(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(again.values.astype(bool), volume)
    np.testing.assert_array_equal(mask_to_volume(mask_to_slices(volume, slices), slices), volume)
    written, original = nibabel.load(tmp_path / "mask.nii.gz"), nibabel.load(tmp_path / "scan.nii.gz")
    assert written.shape == original.shape
    for field in ("srow_x", "srow_y", "srow_z", "qoffset_x", "quatern_b", "quatern_c", "quatern_d", "pixdim"):
        assert written.header[field].tobytes() == original.header[field].tobytes()
    assert written.affine.tobytes() == original.affine.tobytes()


def test_slices_look_as_a_radiologist_looks(tmp_path: Path) -> None:
    """Check for every file order: a voxel at the patient's right, front, head end is at the left, top of the last
    slice."""
    for order, signs in ORIENTATIONS:
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, order] * np.array(signs)
        geometry = Geometry((5, 5, 5), affine)
        ras = np.array([1, 1, 1]) * 10.0
        corners = np.array(list(itertools.product((0, 4), repeat=3)))
        nearest = corners[np.argmax((corners @ affine[:3, :3].T) @ ras)]
        array = np.zeros((5, 5, 5), bool)
        array[tuple(nearest)] = True
        planes = mask_to_slices(geometry.to_canonical(array), _grid_only((5, 5, 5), 5))
        assert np.argwhere(planes).tolist() == [[4, 0, 0]]


def test_map_to_volume_is_linear_and_zero_elsewhere() -> None:
    slices = _grid_only((50, 40, 6), 32)
    part = Slices(slices.pixels[:2], slices.organ[:2], np.array([1, 4]), slices.grid)
    ramp = np.broadcast_to(np.linspace(0, 1, 32, dtype=np.float32), (2, 32, 32)).copy()
    volume = map_to_volume(ramp, part)
    assert volume.shape == (50, 40, 6)
    assert (volume[:, :, [0, 2, 3, 5]] == 0).all()
    place = np.clip((np.arange(50) + 0.5) * 32 / 50 - 0.5, 0, 31) / 31
    np.testing.assert_allclose(volume[:, 20, 4], place, atol=1e-5)


@pytest.mark.parametrize("side", [20, 32, 50, 64])
def test_planes_are_resized_as_torch_does_it(side: int) -> None:
    planes = np.random.default_rng(side).integers(0, 256, (3, side, side)).astype(np.float32)
    expected = functional.interpolate(torch.from_numpy(planes)[:, None], size=(32, 32), mode="bilinear")[:, 0].numpy()
    np.testing.assert_allclose(_resize_linear(planes, 32), expected, atol=1e-4)


HU_SLICES = PreprocessSettings(
    slice_px=32, equalise=False, standardise="median", window_hu=(-150, 150), background="median"
)


def test_standardised_slices_do_not_change_with_the_scanners_offset() -> None:
    hu, liver = _volume((40, 56, 12))
    first, moved = (prepare(np.rint(hu) + shift, liver, HU_SLICES) for shift in (np.float32(0), np.float32(37)))
    np.testing.assert_array_equal(first.pixels, moved.pixels)
    assert abs(int(np.median(first.pixels[first.organ])) - 128) <= 2
    assert (first.pixels[~first.organ] == 128).all()


def test_the_background_has_no_part_in_the_rim() -> None:
    """Prepare a flat liver in air: every pixel of the standardised slices has the liver's grey value."""
    _, liver = _volume((40, 56, 12))
    hu = np.where(liver, np.float32(100), np.float32(-1000))
    assert (prepare(hu, liver, HU_SLICES).pixels == 128).all()
    plain = HU_SLICES.model_copy(update={"background": "zero"})
    cut = prepare(hu, liver, plain)
    assert (cut.pixels[cut.organ] < 128).any(), "with zeros outside, interpolation darkens the rim"


def test_smoothing_keeps_a_flat_liver_and_lowers_noise_to_the_same_resolution() -> None:
    rng = np.random.default_rng(0)
    liver = np.zeros((64, 64, 40), bool)
    liver[4:60, 4:60, 2:38] = True
    flat = np.where(liver, np.float32(50), np.float32(-1000))
    np.testing.assert_allclose(smooth_inside(flat, liver, (1.0, 1.0, 2.0), 2.5)[liver], 50, atol=1e-3)
    noise = rng.normal(0, 20, liver.shape).astype(np.float32)
    inner = np.zeros_like(liver)
    inner[12:52, 12:52, 8:32] = True
    got = smooth_inside(noise, liver, (1.0, 1.0, 2.0), 1.5)
    # the continuous limit of sum(weight^2), 1 / (2 sqrt(pi) sigma), is wrong by less than a tenth at 0.7 voxels
    sigma = [np.sqrt(1.5**2 - d**2 / 12) / d for d in (1.0, 1.0, 2.0)]
    expected = 20 * np.sqrt(np.prod([1 / (2 * np.sqrt(np.pi) * s) for s in sigma]))
    assert abs(got[inner].std() / expected - 1) < 0.15
    assert (got[~liver] == noise[~liver]).all()
    assert smooth_inside(noise, liver, (9.0, 9.0, 9.0), 2.0) is noise, "voxels that are coarser already"


@pytest.mark.parametrize("where", [(0, 0), (14, 20), (30, 38)])
def test_the_livers_frame_shows_the_same_at_any_place_and_leads_back(where: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    liver = np.zeros((50, 60, 9), bool)
    part = rng.random((16, 18, 5)) < 0.8
    part[[0, -1]], part[:, [0, -1]] = True, True
    liver[where[0] : where[0] + 16, where[1] : where[1] + 18, 2:7] = part
    hu = np.where(liver, rng.normal(80, 10, liver.shape), -1000).astype(np.float32)
    chosen = PreprocessSettings(slice_px=64, equalise=False, frame_mm=64)
    slices = prepare(hu, liver, chosen, (2.0, 2.0, 3.0))
    assert slices.grid.side == 32
    assert slices.grid.side * 2.0 / slices.grid.size_px == 1.0, "mm a pixel"
    np.testing.assert_array_equal(mask_to_volume(slices.organ, slices), liver)
    np.testing.assert_array_equal(mask_to_slices(liver, slices), slices.organ)
    rows, columns = np.flatnonzero(slices.organ.any((0, 2))), np.flatnonzero(slices.organ.any((0, 1)))
    middle = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    if where == (14, 20):
        assert all(abs(each - 32) <= 2 for each in middle), "the liver is in the middle"
    volume = map_to_volume(slices.organ.astype(np.float32), slices)
    assert volume.shape == liver.shape
    assert volume[liver].mean() > 0.8


def test_a_liver_wider_than_its_frame_is_shown_whole() -> None:
    hu, liver = _volume((60, 60, 9))
    slices = prepare(hu, liver, PreprocessSettings(slice_px=64, frame_mm=50), (2.0, 2.0, 3.0))
    x = np.flatnonzero(liver.any((1, 2)))
    assert slices.grid.side == x[-1] - x[0] + 1
    np.testing.assert_array_equal(mask_to_volume(slices.organ, slices), liver)


def test_framed_slices_survive_their_file(tmp_path: Path) -> None:
    hu, liver = _volume((41, 30, 12))
    chosen = HU_SLICES.model_copy(update={"frame_mm": 60.0})
    slices = prepare(hu, liver, chosen, (1.5, 1.5, 2.5))
    geometry = Geometry(hu.shape, np.diag([-1.5, -1.5, 2.5, 1.0]))
    save_prepared(tmp_path / "p.safetensors", slices, geometry, liver, grey_per_hu(chosen))
    back = load_prepared(tmp_path / "p.safetensors")
    assert back.slices.grid == slices.grid
    assert back.grey_per_hu == 255 / 300
    assert back.spacing_mm == pytest.approx((60 / 32, 60 / 32, 2.5))
    assert grey_per_hu(PreprocessSettings()) is None, "equalised grey values have no scale"


def test_prepared_file_round_trip(tmp_path: Path) -> None:
    hu, liver = _volume((41, 30, 12))
    slices = prepare(hu, liver, PreprocessSettings(slice_px=32))
    geometry = Geometry(hu.shape, np.diag([-0.7, -0.7, 2.5, 1.0]))
    save_prepared(tmp_path / "p.safetensors", slices, geometry, liver)
    back = load_prepared(tmp_path / "p.safetensors", with_liver=True)
    np.testing.assert_array_equal(back.slices.pixels, slices.pixels)
    np.testing.assert_array_equal(back.slices.organ, slices.organ)
    np.testing.assert_array_equal(back.slices.z, slices.z)
    assert back.liver is not None
    np.testing.assert_array_equal(back.liver, liver)
    assert back.slices.grid == slices.grid
    assert back.geometry == geometry


def test_damaged_prepared_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(InputError, match=r"p\.safetensors: prepared slices cannot be read"):
        load_prepared(path)
