"""The choice of a method, and other tools: a program in TotalSegmentator's place, TorchScript and a MONAI bundle."""

from __future__ import annotations

import json
import pickle
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from medad.base.errors import InputError
from medad.ct.io import Volume, write_mask
from medad.organ.finder import Finder, choose_finder, find_liver
from medad.organ.refine import dice
from tests.medad.organ.torso import Torso, make_torso

PROGRAM = """#!{python}
import os, shutil, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert given["--roi_subset"] == "liver" and "scan.nii.gz" in given["-i"], sys.argv
assert os.environ["https_proxy"].endswith(":9")
with open(os.path.join(os.environ["TOTALSEG_HOME_DIR"], "config.json")) as file:
    assert '"send_usage_stats": false' in file.read()
os.makedirs(given["-o"])
shutil.copyfile({mask!r}, os.path.join(given["-o"], "liver.nii.gz"))
sys.exit({code})
"""


@pytest.fixture(scope="module")
def torso() -> Torso:
    return make_torso()


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide a TotalSegmentator of this machine."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "weights"))


def install(folder: Path, mask: Path, *datasets: str, code: int = 0) -> None:
    """Install a program that copies a mask, and weights of the given names."""
    program = folder / "bin" / "TotalSegmentator"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, mask=str(mask), code=code), encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for dataset in datasets:
        weights = folder / "weights" / dataset / "fold_0" / "checkpoint_final.pth"
        weights.parent.mkdir(parents=True)
        weights.touch()


def volume_of(torso: Torso) -> Volume:
    return Volume(torso.hu, torso.geometry)


def test_the_built_in_method_is_the_default() -> None:
    assert choose_finder() == Finder("built-in")


def test_a_program_without_weights_is_not_used(tmp_path: Path) -> None:
    install(tmp_path, tmp_path / "none")
    assert choose_finder().method == "built-in"


@pytest.mark.parametrize("datasets", [("Dataset297_x",), ("Dataset291_x", "Dataset298_x")])
def test_totalsegmentator_with_weights_is_used(tmp_path: Path, torso: Torso, datasets: tuple[str, ...]) -> None:
    write_mask(tmp_path / "liver.nii.gz", torso.liver, torso.geometry)
    install(tmp_path, tmp_path / "liver.nii.gz", *datasets)
    finder = choose_finder()
    assert finder.method == "TotalSegmentator"
    assert finder.weights == datasets
    found = find_liver(volume_of(torso), finder, tmp_path / "scan.nii.gz", "cpu")
    assert dice(found.mask, torso.liver) == 1
    assert 0.9 < found.sureness < 1


def test_a_wrong_mask_is_refused(tmp_path: Path, torso: Torso) -> None:
    write_mask(tmp_path / "liver.nii.gz", torso.organs["spleen"], torso.geometry)
    install(tmp_path, tmp_path / "liver.nii.gz", "Dataset297_x")
    with pytest.raises(InputError, match=r"not plausible: .*left") as caught:
        find_liver(volume_of(torso), choose_finder(), tmp_path / "scan.nii.gz", "cpu")
    assert "\n" not in str(caught.value)


def test_a_failed_program_is_reported(tmp_path: Path, torso: Torso) -> None:
    write_mask(tmp_path / "liver.nii.gz", torso.liver, torso.geometry)
    install(tmp_path, tmp_path / "liver.nii.gz", "Dataset297_x", code=3)
    with pytest.raises(InputError, match="exit code 3"):
        find_liver(volume_of(torso), choose_finder(), tmp_path / "scan.nii.gz", "cpu")


class Threshold(nn.Module):
    """Background and liver as two channels. A voxel of 84 to 126 HU on the patient's right is liver."""

    def forward(self, x: Tensor) -> Tensor:
        liver = 0.0525 - (x - 0.6625).abs()
        return torch.cat([torch.zeros_like(liver), liver], 1)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_model_is_used(tmp_path: Path, torso: Torso) -> None:
    blank = np.where(torso.liver, np.float32(105), np.float32(-100))
    torch.jit.script(Threshold()).save(str(tmp_path / "model.ts"))  # type: ignore[no-untyped-call]
    with pytest.raises(InputError, match=r"is a program, which runs when it is loaded; .* --trust"):
        choose_finder(tmp_path)
    finder = choose_finder(tmp_path, trust=True)
    assert finder.method == "model"
    found = find_liver(Volume(blank, torso.geometry), finder, tmp_path / "scan.nii.gz", "cpu")
    assert dice(found.mask, torso.liver) > 0.95


def test_a_bundle_is_read(tmp_path: Path, torso: Torso) -> None:
    declared = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}
    (tmp_path / "models").mkdir()
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "inference.json"
    config.write_text(json.dumps({"network_def": {"_target_": "UNet", **declared}}), encoding="utf-8")
    torch.manual_seed(0)
    torch.save(UNet(**declared).state_dict(), tmp_path / "models" / "model.pt")
    # random weights mark anything, which the checks refuse
    with pytest.raises(InputError, match="not plausible"):
        find_liver(volume_of(torso), choose_finder(tmp_path), tmp_path / "scan.nii.gz", "cpu")


@pytest.mark.parametrize("name", ["model.ts", "models/model.pt"])
def test_a_broken_model_is_refused(tmp_path: Path, torso: Torso, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pickle.dumps({"state_dict": print}))
    with pytest.raises(InputError, match="cannot be loaded as a network"):
        find_liver(volume_of(torso), choose_finder(tmp_path, trust=True), tmp_path / "scan.nii.gz", "cpu")


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        choose_finder(tmp_path / "none.ts")
    with pytest.raises(InputError, match="contains no network"):
        choose_finder(tmp_path)
