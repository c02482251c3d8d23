"""Options for headers that are incomplete or that differ, and several masks for one scan."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medad.cohort.phantom import write_btcv_phantoms
from medad.config.inbox import InboxSettings
from medad.config.liver import DatasetSettings

Cli = Callable[..., Any]
SMALL = ("--set", "slice_px=64")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("phantom")
    write_btcv_phantoms(folder, 1, seed=1, shape=(32, 32, 8), spacing_mm=(10.0, 10.0, 15.0))
    (scan,), (label,) = (list((folder / name).iterdir()) for name in ("img", "label"))
    return scan, label


@pytest.fixture(autouse=True)
def alone(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own cache and register, and no server."""
    monkeypatch.setenv("ADFLOWS_PRIVATE", str(tmp_path / "private"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def changed(path: Path, out: Path, sform: Any, qform: Any) -> Path:
    """Write a file again with other forms. None: the code of the form is 0."""
    image = nibabel.load(path)
    new = nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header)
    new.set_sform(sform, 0 if sform is None else 1)
    new.set_qform(qform, 0 if qform is None else 1)
    nibabel.save(new, out)
    return out


def test_the_advice_for_two_forms_that_differ_works(cli: Cli, phantom: tuple[Path, Path], tmp_path: Path) -> None:
    affine = nibabel.load(phantom[0]).affine
    moved = affine.copy()
    moved[:3, 3] += 17
    scan, label = (
        changed(path, tmp_path / f"{name}.nii.gz", affine, moved)
        for path, name in zip(phantom, ("a", "b"), strict=True)
    )
    command = ("liver", "step", "window", scan, "--through", "equalise", "--liver", label, "--liver-label", 6, *SMALL,
               "-o", tmp_path / "out.safetensors")  # fmt: skip
    refused = cli(*command)
    assert refused.code == 2
    assert "sform and qform differ by up to 1.7 voxels; to use one, sform or qform, type" in refused.err
    advice = refused.err.split("type ")[1].split(" (")[0]
    done = cli(*command, *shlex.split(advice))
    assert done.code == 0, done.err
    plain = ("liver", "step", "window", phantom[0], "--through", "equalise", "--liver", phantom[1], *command[8:-1])
    assert cli(*plain, tmp_path / "plain.safetensors").code == 0
    # the phantom's grid has the same spacing, so its slices are the same
    from medad.slices.prepared_file import load_prepared

    made, expected = (load_prepared(tmp_path / f"{name}.safetensors").slices.pixels for name in ("out", "plain"))
    np.testing.assert_array_equal(made, expected)


def test_the_advice_for_a_mask_on_another_grid_works(cli: Cli, phantom: tuple[Path, Path], tmp_path: Path) -> None:
    label = changed(phantom[1], tmp_path / "label.nii.gz", np.eye(4), np.eye(4))
    command = ("liver", "step", "window", phantom[0], "--through", "roi", "--liver", label, "--liver-label", 6,
               "-o", tmp_path / "out.nii.gz")  # fmt: skip
    refused = cli(*command)
    assert refused.code == 2
    assert "affine mismatch" in refused.err
    assert "--affine-mismatch warn" in refused.err
    assert cli(*command, "--affine-mismatch", "warn").code == 0
    found = np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj)
    assert not found[np.asarray(nibabel.load(phantom[1]).dataobj) != 6].any()


def test_a_scan_without_affine_takes_the_given_spacing(cli: Cli, phantom: tuple[Path, Path], tmp_path: Path) -> None:
    scan = changed(phantom[0], tmp_path / "scan.nii.gz", None, None)
    command = ("liver", "step", "window", scan, "-o", tmp_path / "out.nii.gz")
    refused = cli(*command)
    assert refused.code == 2
    assert "no affine" in refused.err
    assert "--spacing-mm X Y Z" in refused.err
    assert cli(*command, "--spacing-mm", 10, 10, 15).code == 0
    assert nibabel.load(tmp_path / "out.nii.gz").header.get_zooms() == (10, 10, 15)
    wrong = cli(*command, "--spacing-mm", 10, 10, 0)
    assert wrong.code == 2
    assert "--spacing-mm: Input should be greater than 0" in wrong.err


def test_settings_of_a_data_set_and_an_inbox_reach_the_reader(tmp_path: Path) -> None:
    values: dict[str, Any] = {"affine_from": "qform", "affine_mismatch": "warn", "spacing_mm": (0.7, 0.7, 5.0)}
    (tmp_path / "in").mkdir()
    inbox = InboxSettings(name="x", inbox=str(tmp_path / "in"), out=str(tmp_path / "out"), scans="*.nii", **values)
    data = DatasetSettings(root="-", layout="lits", **values)
    assert {name: getattr(inbox.data("-"), name) for name in values} == values
    from medad.cohort.datasets import Case, LabelledScan

    scan = LabelledScan.of(Case("a", tmp_path / "a", tmp_path / "b", (1, 2), 2), data)
    assert {name: getattr(scan, name) for name in values} == values


def test_two_masks_for_one_scan_are_two_cases(cli: Cli, phantom: tuple[Path, Path], tmp_path: Path) -> None:
    scan, label = phantom
    values = np.asarray(nibabel.load(label).dataobj)
    nibabel.save(nibabel.Nifti1Image((values == 6).astype(np.uint8), nibabel.load(label).affine), tmp_path / "b.nii.gz")
    masks = ("--liver", label, "--liver", tmp_path / "b.nii.gz", "--liver", label)
    planned = cli("liver", "segment", scan, scan, scan, *masks, "--dry-run", "--json", "-o", tmp_path / "out")
    assert planned.code == 2
    [failure] = planned.answer["failures"]
    assert failure["rule"] == "this scan was given twice"
    cases = [row["case"] for row in planned.answer["plan"] if row["step"] == "prepare"]
    assert cases == [failure["case"], f"{failure['case']}-2"]
    assert json.dumps(planned.answer).count("b.nii.gz") == 0
