"""Inserted lesions against the formulae of the ellipsoid, and phantoms that the readers accept as an abdomen."""

from __future__ import annotations

from math import pi
from pathlib import Path
from statistics import NormalDist

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from medad.anomalies.insert import insert_lesions
from medad.base.errors import InputError
from medad.cohort.datasets import find_cases
from medad.cohort.phantom import LIVER, TUMOUR, generate_phantom, write_btcv_phantoms, write_lits_phantoms
from medad.config.liver import DatasetSettings, InsertSettings
from medad.ct import checks, io, scale

FINE = (0.8, 0.7, 1.0)


def block(shape: tuple[int, int, int] = (90, 90, 70)) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a liver of 100 HU that fills a box inside the volume, except for a hole."""
    liver = np.zeros(shape, dtype=np.bool_)
    liver[5:-5, 5:-5, :] = True  # up to the volume's ends in z
    liver[40:45, 40:45] = False
    return np.where(liver, np.float32(100), np.float32(-50)), liver


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("seed", range(4))
def test_volume_and_diameter_are_the_ellipsoids(seed: int) -> None:
    hu, liver = block()
    wanted = InsertSettings(count=3, diameter_mm=(14.0, 22.0))
    _, truth, lesions = insert_lesions(hu, liver, FINE, wanted, rng(seed))
    regions, count = ndimage.label(truth, np.ones((3, 3, 3)))
    assert count == len(lesions) == 3  # no lesion touches another one
    for lesion in lesions:
        assert lesion.volume_mm3 == pytest.approx(pi / 6 * np.prod(lesion.axes_mm))
        assert 14 <= lesion.diameter_mm == max(lesion.axes_mm) <= 22
        voxels = np.argwhere(regions == regions[lesion.centre_voxel]) * FINE
        # counting voxels is inexact at the surface: by far less than a shell of half a voxel
        assert len(voxels) * np.prod(FINE) == pytest.approx(lesion.volume_mm3, rel=0.03)
        widest = pdist(voxels[ConvexHull(voxels).vertices]).max()
        assert lesion.diameter_mm - 2 * max(FINE) < widest <= lesion.diameter_mm
        np.testing.assert_allclose(voxels.mean(axis=0), np.array(lesion.centre_voxel) * FINE, atol=0.1)


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 6),
    edge=st.sampled_from([0.0, 1.0, 2.0]),
    contrast=st.sampled_from([(-60.0, -40.0), (30.0, 50.0)]),
)
def test_laws_of_planting(seed: int, count: int, edge: float, contrast: tuple[float, float]) -> None:
    hu, liver = block((70, 70, 50))
    before = hu.copy()
    wanted = InsertSettings(count=count, diameter_mm=(6.0, 14.0), contrast_hu=contrast, edge_mm=edge)
    inserted, truth, lesions = insert_lesions(hu, liver, (1.0, 1.0, 1.0), wanted, rng(seed))
    np.testing.assert_array_equal(hu, before)  # the input does not change
    assert not truth[~liver].any()
    np.testing.assert_array_equal(inserted[~liver], hu[~liver])
    change = inserted - hu
    assert [lesion.diameter_mm for lesion in lesions] == sorted((le.diameter_mm for le in lesions), reverse=True)
    for lesion in lesions:
        assert contrast[0] <= lesion.contrast_hu <= contrast[1]
        # distance of the centre from the surface, half the shortest axis, in standard deviations of the soft edge
        depth = min(lesion.axes_mm) / 2 / edge if edge else np.inf
        assert change[lesion.centre_voxel] == pytest.approx(lesion.contrast_hu * NormalDist().cdf(depth), abs=0.02)
        assert truth[lesion.centre_voxel]
    # the edge of a neighbour adds less than 0.02 HU
    strongest = max(abs(lesion.contrast_hu) for lesion in lesions)
    assert np.abs(change).max() <= strongest + 0.02
    if edge == 0:
        np.testing.assert_array_equal(change != 0, truth)
    else:  # half the contrast, which is the value on the surface, separates inside and outside
        weakest = min(abs(lesion.contrast_hu) for lesion in lesions)
        assert np.abs(change[truth]).min() >= weakest / 2 - 0.02
        assert np.abs(change[~truth]).max() <= strongest / 2 + 0.02


def test_soft_edge_is_the_blurred_step_of_the_given_width() -> None:
    """Compare with a blurred step: along a large lesion's longest axis the profile is a step blurred by 2 mm."""
    liver = np.ones((101, 101, 101), dtype=np.bool_)
    hu = np.zeros(liver.shape, dtype=np.float32)
    wanted = InsertSettings(count=1, diameter_mm=(60.0, 60.0), contrast_hu=(-100.0, -100.0), edge_mm=2.0)
    inserted, truth, (lesion,) = insert_lesions(hu, liver, (1.0, 1.0, 1.0), wanted, rng(3))
    blurred = ndimage.gaussian_filter(np.where(truth, -100.0, 0.0), 2.0)
    # curvature and the voxel grid cause a small difference; it can only occur at the edge
    assert np.abs(inserted - blurred)[truth ^ ndimage.binary_erosion(truth, iterations=4)].mean() < 4
    assert inserted[lesion.centre_voxel] == pytest.approx(-100, abs=0.01)


def test_one_seed_one_result() -> None:
    hu, liver = block()
    first, second, other = (
        insert_lesions(hu, liver, FINE, InsertSettings(diameter_mm=(8, 14)), rng(s)) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first[0], second[0])
    assert first[2] == second[2] != other[2]


def test_a_liver_without_room_is_an_input_error() -> None:
    hu, liver = block()
    path = Path("liver.nii.gz")
    with pytest.raises(InputError, match=r"liver\.nii\.gz: .*no room for 1 lesion of 90 to 90 mm; the largest"):
        insert_lesions(hu, liver, FINE, InsertSettings(count=1, diameter_mm=(90.0, 90.0)), rng(), path=path)
    with pytest.raises(InputError, match="no room for 50"):
        insert_lesions(hu, liver, FINE, InsertSettings(count=50, diameter_mm=(20.0, 20.0)), rng(), path=path)
    with pytest.raises(InputError, match="the liver mask is empty"):
        insert_lesions(hu, np.zeros_like(liver), FINE, InsertSettings(), rng(), path=path)


def test_the_widest_that_fits_is_told_right() -> None:
    """Insert into a slab of 21 planes of 1 mm: the centre is 11 mm from the next plane, minus the margin of 2 mm."""
    liver = np.zeros((80, 80, 21), dtype=np.bool_)
    liver[2:-2, 2:-2] = True
    hu = np.zeros(liver.shape, dtype=np.float32)
    with pytest.raises(InputError, match="that fits has 18 mm"):
        insert_lesions(hu, liver, (1.0, 1.0, 1.0), InsertSettings(count=1, diameter_mm=(30.0, 30.0)), rng())
    insert_lesions(hu, liver, (1.0, 1.0, 1.0), InsertSettings(count=1, diameter_mm=(17.9, 17.9)), rng())


@pytest.mark.parametrize("seed", range(3))
def test_phantom_is_an_abdomen(seed: int) -> None:
    hu, labels, affine = generate_phantom(rng(seed))
    liver = labels == LIVER
    spacing_mm = np.abs(np.diag(affine)[:3])
    assert 700 < np.count_nonzero(liver) * spacing_mm.prod() / 1000 < 2500  # ml; an adult's liver has about 1500
    assert nibabel.aff2axcodes(affine) == ("L", "P", "S")
    centre = np.argwhere(liver).mean(axis=0) / hu.shape
    assert centre[0] < 0.45  # on the patient's right
    volume = io.Volume(hu, io.Geometry((96, 96, 32), affine))
    assert 80 < scale.check_hu(volume, liver, Path("phantom")) < 130
    assert hu[0, 0].max() < -900  # air around
    assert hu.max() > 300  # bone
    noise = hu[labels == LIVER] - np.median(hu[liver])
    assert 8 < noise.std() < 30
    np.testing.assert_array_equal(hu, np.rint(hu))
    again = generate_phantom(rng(seed))
    np.testing.assert_array_equal(hu, again[0])
    assert not np.array_equal(hu, generate_phantom(rng(seed + 100))[0])


def test_phantom_noise_is_correlated_between_neighbours() -> None:
    hu, labels, _ = generate_phantom(rng(0))
    inside = ndimage.binary_erosion(labels == LIVER, iterations=2)
    pair = inside[1:] & inside[:-1]
    fine = hu - ndimage.gaussian_filter(hu, 3)
    assert np.corrcoef(fine[1:][pair], fine[:-1][pair])[0, 1] > 0.2


def test_phantom_data_sets_are_read_as_real_ones(tmp_path: Path) -> None:
    write_btcv_phantoms(tmp_path / "btcv", 2, 7)
    lesions = InsertSettings(count=2, diameter_mm=(15.0, 30.0))
    write_lits_phantoms(tmp_path / "lits", 2, 7, lesions=lesions)
    for layout, ids in (("btcv", ["btcv-0001", "btcv-0002"]), ("lits", ["lits-0", "lits-1"])):
        cases, problems = find_cases(DatasetSettings(root=str(tmp_path / layout), layout=layout))
        assert not problems
        assert [case.id for case in cases] == ids
        for case in cases:
            assert case.label is not None
            scan = io.read_scan(case.scan)
            labels, warning = io.read_labels_on(scan.geometry, case.label)
            assert warning is None
            scale.check_hu(scan, checks.require_liver(labels, case.liver_labels, case.label), case.scan)
            assert (labels.values == TUMOUR).any()  # in BTCV this value is the right kidney
    first = (tmp_path / "btcv" / "img" / "img0001.nii.gz").read_bytes()
    write_btcv_phantoms(tmp_path / "again", 1, 7)
    assert (tmp_path / "again" / "img" / "img0001.nii.gz").read_bytes() == first
