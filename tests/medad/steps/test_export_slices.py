"""Slices exported as images: pixels and masks are unchanged when read back, and nothing else is written."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from medad.base.errors import InputError
from medad.cohort.datasets import LabelledScan, find_cases
from medad.cohort.phantom import write_lits_phantoms
from medad.config.liver import DatasetSettings, PreprocessSettings
from medad.slices.grid import SliceGrid, Slices
from medad.slices.prepared_file import load_prepared
from medad.steps.cases import prepare_case
from medad.steps.export_slices import export_case, write_test_slices, write_training_slices
from tests.medad.prepared import write_prepared
from zsad.config.run import ImagesSettings
from zsad.data.datasets import find_categories, normal_training_images
from zsad.data.images import read_image
from zsad.data.masks import read_mask


@pytest.fixture
def slices() -> Slices:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 9), dtype=np.uint8)
    return Slices(pixels, pixels > 0, np.array([2, 3, 10, 100]), SliceGrid((9, 9), 120, 9))


def test_what_is_written_is_read_back(slices: Slices, tmp_path: Path) -> None:
    tumour = np.zeros((4, 9, 9), bool)
    tumour[1, 2:4, 5:8] = True
    tumour[3, 8, 8] = True
    write_test_slices(slices, tumour, tmp_path / "liver")
    write_training_slices(slices, tmp_path / "liver")
    data = ImagesSettings(root=str(tmp_path))
    [category], problems, _ = find_categories(data)
    assert not problems
    assert category.name == "liver"
    assert [(item.id, item.anomalous) for item in category.items] == [
        ("good/0002", False),
        ("good/0010", False),
        ("tumour/0003", True),
        ("tumour/0100", True),
    ]
    for item, n in zip(category.items, (0, 2, 1, 3), strict=True):
        image = read_image(item.path)
        np.testing.assert_array_equal(image, np.repeat(slices.pixels[n, :, :, None], 3, axis=2))
        if item.mask is not None:
            np.testing.assert_array_equal(read_mask(item.mask, (9, 9)), tumour[n])
    training = normal_training_images(data, "liver")
    assert [path.name for path in training] == ["0002.png", "0003.png", "0010.png", "0100.png"]
    np.testing.assert_array_equal(read_image(training[3])[:, :, 0], slices.pixels[3])


def test_a_case_is_told_by_its_tumour_label(tmp_path: Path) -> None:
    # as many pixels as voxels, so that a mask equals the label's plane
    write_lits_phantoms(tmp_path / "lits", 1, shape=(48, 48, 10), spacing_mm=(6.0, 6.0, 12.0))
    data = DatasetSettings(root=str(tmp_path / "lits"), layout="lits")
    [found], _ = find_cases(data)
    case = LabelledScan.of(found, data)
    prepared, out = tmp_path / "prepared", tmp_path / "liver"
    prepared.mkdir()
    prepare_case(case, PreprocessSettings(slice_px=48), prepared, training=False)
    export_case(case, prepared, out)

    label = nibabel.as_closest_canonical(nibabel.load(case.label))
    values = np.asarray(label.dataobj)[::-1, ::-1]  # from RAS to LPS
    planes = np.flatnonzero((values > 0).any((0, 1)))
    ill = [z for z in planes if (values[:, :, z] == 2).any()]
    assert 0 < len(ill) < len(planes)
    expected = {f"test/{'tumour' if z in ill else 'good'}/{z:04}.png" for z in planes}
    expected |= {f"ground_truth/tumour/{z:04}_mask.png" for z in ill}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == expected
    for z in ill:
        mask = read_mask(out / f"ground_truth/tumour/{z:04}_mask.png", (48, 48))
        np.testing.assert_array_equal(mask, (values[:, :, z] == 2).T)
    ready = load_prepared(prepared / "prepared.safetensors").slices
    for pixels, z in zip(ready.pixels, ready.z, strict=True):
        with Image.open(out / f"test/{'tumour' if z in ill else 'good'}/{z:04}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), pixels)
            assert image.info == {}


def test_without_a_tumour_label_nobody_knows_which_slices_are_normal(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared", slices=1)
    for case in (
        LabelledScan(tmp_path / "scan", tmp_path / "label", (1,), None),
        LabelledScan(tmp_path / "scan", None, (1,), 2),
    ):
        with pytest.raises(InputError, match="no tumour label"):
            export_case(case, prepared, tmp_path)
