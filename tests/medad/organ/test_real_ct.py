"""The built-in method on real CT. Bounds of Dice and of the tumour's share that lies in the mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medad.ct.io import read_labels_on, read_scan
from medad.organ.finder import Finder, find_liver
from medad.organ.refine import dice

pytestmark = [pytest.mark.data, pytest.mark.slow]

LABELLED = {
    "btcv/img/img0001.nii.gz": ("btcv/label/label0001.nii.gz", 0.9),
    "btcv/img/img0013.nii.gz": ("btcv/label/label0013.nii.gz", 0.9),
    "btcv/img/img0101.nii.gz": ("btcv/label/label0101.nii.gz", 0.9),
    "btcv/img/img0102.nii.gz": ("btcv/label/label0102.nii.gz", 0.9),
    "ircad07/img/img0107.nii.gz": ("ircad07/label/label0107.nii.gz", 0.9),
    "lits/volume-17.nii.gz": ("lits/segmentation-17.nii.gz", 0.9),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_scans(real_data: Path, name: str) -> None:
    label, least = LABELLED[name]
    scan = real_data / "liver" / name
    volume = read_scan(scan)
    values = read_labels_on(volume.geometry, real_data / "liver" / label)[0].values
    found = find_liver(volume, Finder(), scan)
    assert dice(found.mask, values > 0) >= least
    assert found.sureness > 0.8
    if "lits" in name:
        tumour = values == 2
        assert (found.mask & tumour).sum() >= LEAST_TUMOUR * tumour.sum()


LEAST_TUMOUR = 0.85


@pytest.mark.parametrize("name", ["crlm1004_portal", "hcc015_arterial", "hcc015_portal"])
def test_other_scans_have_a_plausible_liver(real_data: Path, name: str) -> None:
    scan = real_data / "liver" / "unlabelled" / f"{name}.nii.gz"
    found = find_liver(read_scan(scan), Finder(), scan)
    assert 500 < found.millilitres < 2500


def test_both_phases_of_a_patient_agree_in_volume(real_data: Path) -> None:
    scans = [real_data / "liver" / "unlabelled" / f"hcc015_{phase}.nii.gz" for phase in ("arterial", "portal")]
    first, second = (find_liver(read_scan(scan), Finder(), scan).millilitres for scan in scans)
    assert np.abs(first - second) < 0.2 * max(first, second)
