"""The scans of `adflows liver segment`: folders of them, the names of their results, and the device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from flows.cli.liver_options import _gpus
from flows.cli.scan_folders import expand_folders, volumes_in
from flows.liver.flow import file_names
from medad.base.errors import ConfigError


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return [folder / name for name in names]


def test_a_folder_of_scans_and_one_of_masks_are_paired_by_name(tmp_path: Path) -> None:
    scans = touch(tmp_path / "scans", "a 2_0000.nii.gz", "a 10_0000.nii.gz", "b.nrrd")
    masks = touch(tmp_path / "masks", "b_liver.seg.nrrd", "a 10.nii.gz", "a 2-label.nii")
    touch(tmp_path / "masks", "notes.txt", ".hidden.nii")
    assert expand_folders([tmp_path / "scans"], [tmp_path / "masks"]) == (scans, [masks[2], masks[1], masks[0]])
    assert expand_folders([tmp_path / "scans"], []) == (scans, [])
    touch(tmp_path / "masks", "b.nii.gz")
    with pytest.raises(ConfigError, match=r"b\.nrrd: 2 masks of this name"):
        expand_folders([tmp_path / "scans"], [tmp_path / "masks"])
    for path in (tmp_path / "masks").glob("b*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"b\.nrrd: no mask of this name"):
        expand_folders([tmp_path / "scans"], [tmp_path / "masks"])


def test_files_and_dicom_folders_are_scans_themselves(tmp_path: Path) -> None:
    [one] = touch(tmp_path, "one.nii.gz")
    assert expand_folders([one], [one]) == ([one], [one])
    touch(tmp_path / "dicom", "IM0001", "2_Abdomen.nii.gz")
    assert expand_folders([tmp_path / "dicom"], []) == ([tmp_path / "dicom"], [])
    touch(tmp_path / "nifti", "scan.nii.gz")
    # with a mask that is a file, the folder is refused where it is read
    assert expand_folders([tmp_path / "nifti"], [one]) == ([tmp_path / "nifti"], [one])
    assert volumes_in(one) == []


def test_results_are_named_after_scans_uniquely_and_safely() -> None:
    scans = {
        "ct-1": Path("/a/Pat 1.nii.gz"),
        "ct-2": Path("/b/PAT 1.nii"),
        "ct-3": Path("/b/../..zip"),
        "ct-4": Path(os.fsdecode(b"/c/M\xfcller.nrrd")),
        "ct-5": Path("/d/Müller"),
    }
    names = file_names(scans)
    assert names == {
        "ct-1": "Pat_1",
        "ct-2": "PAT_1_ct-2",
        "ct-3": "scan",
        "ct-4": "M_ller",
        "ct-5": "Müller",
    }
    assert not any("/" in name or name.startswith(".") for name in names.values())


def test_devices_by_name() -> None:
    assert [_gpus(text) for text in ("cpu", "auto", "gpu", "gpu:1", "cuda:0,2")] == ["cpu", "auto", (0,), (1,), (0, 2)]
    for wrong in ("gpu:", "gpu:x", "tpu", "GPU 1", ""):
        with pytest.raises(typer.BadParameter, match="expected cpu, gpu"):
            _gpus(wrong)
