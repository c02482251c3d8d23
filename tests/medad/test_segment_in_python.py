"""Comparison of `medad.segment` with the steps of `adflows liver segment`, on phantoms with a tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

import medad
from medad.base.errors import ConfigError, InputError
from medad.cohort.datasets import LabelledScan
from medad.cohort.phantom import write_lits_phantoms
from medad.config.liver import PostprocessSettings
from medad.ct.io import write_hu
from medad.organ.refine import dice
from medad.steps.cases import prepare_case
from medad.steps.segment import segment_case
from medad.steps.trained import TrainedModel
from tests.medad.organ.torso import make_torso
from tests.medad.trained_runs import SETTINGS, write_run

LIVER = (1, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a scan and its label with a voxel order that is neither LPS nor RAS."""
    root = tmp_path_factory.mktemp("lits")
    write_lits_phantoms(root, 1)
    found = []
    for name in ("volume-0.nii.gz", "segmentation-0.nii.gz"):
        image = nibabel.load(root / name)
        turned = image.as_reoriented(nibabel.orientations.axcodes2ornt("SAR"))
        nibabel.save(turned, root / f"turned-{name}")
        found.append(root / f"turned-{name}")
    return found[0], found[1]


@pytest.fixture(scope="module")
def steps(pair: tuple[Path, Path], run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the steps of the command and return the folder of their outputs."""
    root = tmp_path_factory.mktemp("steps")
    prepared, out = root / "prepared", root / "out"
    prepared.mkdir()
    out.mkdir()
    prepare_case(LabelledScan(*pair, LIVER, None), SETTINGS.preprocess, prepared, training=False)
    model = TrainedModel.of_run(run).model
    segment_case(prepared, model, SETTINGS.inference, SETTINGS.postprocess, "cpu", out)
    return out


@pytest.mark.parametrize("place", [".", "model"])
def test_it_is_what_the_steps_write(
    pair: tuple[Path, Path], run: Path, steps: Path, tmp_path: Path, place: str
) -> None:
    found = medad.segment(str(pair[0]), str(pair[1]), run / place, liver_labels=LIVER, device="cpu")
    scan = nibabel.load(pair[0])
    for array, name in ((found.mask, "mask.nii.gz"), (found.probability, "probability.nii.gz")):
        written = nibabel.load(steps / name)
        np.testing.assert_array_equal(array, np.asarray(written.dataobj))
        assert array.shape == scan.shape
    assert (found.mask.dtype, found.probability.dtype) == (np.dtype(bool), np.dtype(np.float32))
    assert found.mask.any(), "a test of equality needs something found"
    np.testing.assert_array_equal(found.affine, scan.affine)
    table = json.loads((steps / "lesions.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps([asdict(lesion) for lesion in found.lesions])) == table["lesions"]
    assert found.threshold == 0.5
    assert all("cut by the field of view" in warning for warning in found.warnings)
    found.save(tmp_path / "new" / "folder")
    for name in ("mask.nii.gz", "probability.nii.gz"):
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (steps / name).read_bytes()


def test_settings_take_the_place_of_the_models(pair: tuple[Path, Path], run: Path) -> None:
    strict = PostprocessSettings(threshold=0.999)
    found = medad.segment(*pair, run, liver_labels=LIVER, postprocess=strict, device="cpu")
    assert found.threshold == 0.999
    np.testing.assert_array_equal(found.mask, found.probability >= 0.999)


def test_other_formats_keep_their_own_voxel_order(pair: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    """Segment the same voxels as MetaImage: SimpleITK's first axis is the array's first axis."""
    scan, label = tmp_path / "scan.mhd", tmp_path / "label.mhd"
    for source, target in zip(pair, (scan, label), strict=True):
        sitk.WriteImage(sitk.ReadImage(source), target)
    found = medad.segment(scan, label, run, liver_labels=LIVER, device="cpu")
    assert found.mask.shape == sitk.ReadImage(scan).GetSize()
    nifti = medad.segment(*pair, run, liver_labels=LIVER, device="cpu")
    np.testing.assert_array_equal(found.mask, nifti.mask)
    np.testing.assert_allclose(found.affine, nifti.affine, atol=1e-4)


def test_the_packages_model_is_the_default(
    pair: tuple[Path, Path], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medad.config.packaged.MODELS", tmp_path)
    shutil.copytree(run, tmp_path / "default")
    wanted = medad.segment(*pair, run, liver_labels=LIVER, device="cpu")
    for model in (None, "default"):
        found = medad.segment(*pair, model, liver_labels=LIVER, device="cpu")
        np.testing.assert_array_equal(found.probability, wanted.probability)


def test_what_is_missing_is_one_line(
    pair: tuple[Path, Path], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medad.config.packaged.MODELS", tmp_path)

    def said(*arguments: Any, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            medad.segment(*arguments, device="cpu", **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "trained model" in said(pair[0])
    assert "trained model" in said(*pair)
    assert "manifest.json" in said(*pair, tmp_path)
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half" / "model" / "restoration" / "model.safetensors").unlink()
    assert "no trained restoration network" in said(*pair, tmp_path / "half")


def test_a_file_that_cannot_be_used_is_named(pair: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    scan, label = pair
    with pytest.raises(InputError, match=r"none\.nii\.gz: no such file or folder"):
        medad.segment(tmp_path / "none.nii.gz", label, run)
    (tmp_path / "short.nii.gz").write_bytes(scan.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"short\.nii\.gz: .*cut short"):
        medad.segment(tmp_path / "short.nii.gz", label, run)
    with pytest.raises(InputError, match="no voxel has value 7"):
        medad.segment(scan, label, run, liver_labels=[7])


def test_without_a_mask_the_liver_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "weights"))
    torso = make_torso().planes(30, 55)
    write_hu(tmp_path / "scan.nii.gz", torso.hu, torso.geometry)
    found = medad.segment(tmp_path / "scan.nii.gz", model=run, device="cpu")
    assert found.liver is not None
    assert dice(found.liver, torso.liver) > 0.9
    assert not found.mask[~found.liver].any()
    assert any("the liver mask was made automatically (built-in, sureness 0.9" in line for line in found.warnings)
    found.save(tmp_path / "out")
    given = medad.segment(tmp_path / "scan.nii.gz", tmp_path / "out" / "liver.nii.gz", run, device="cpu")
    np.testing.assert_array_equal(given.mask, found.mask)
    assert given.liver is None
