"""Models in the package: they predict like the run that was packed, and tell nothing about its data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medad.base.errors import ConfigError, InputError
from medad.base.manifest import MANIFEST
from medad.config import packaged
from medad.config.liver import LiverSettings
from medad.config.packaged import model_folder
from medad.models.pack import main, pack
from medad.networks import nets
from medad.networks.infer import load_networks, predict
from medad.steps.trained import CALIBRATION, TrainedModel, model_of, parts_of
from tests.medad.trained_runs import NET, SETTINGS, write_run

ROWS: list[dict[str, Any]] = [
    {"use": "train", "case": "doe_jane", "sha256": {"scan": "1", "label": "2", "liver": "3"}, "patient": "secret"},
    {"use": "test", "case": "roe_richard", "sha256": {"scan": "4", "label": "5", "liver": "6"}, "patient": None},
]


def change_manifest(run: Path, **values: Any) -> None:
    manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    (run / MANIFEST).write_text(json.dumps(manifest | values), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "doe_jane")
    values = SETTINGS.model_copy(update={"gpus": "cpu"}).model_dump(mode="json")
    values["train_data"]["root"] = "/share/doe_jane"
    change_manifest(folder, settings=values, inputs=ROWS, versions={"torch": "2"}, git={"commit": "c"}, created="2026")
    return folder


def with_members(run: Path, count: int) -> Path:
    """Turn a run of one member into one of `count` equal members with classifiers and a calibration."""
    settings = json.loads((run / MANIFEST).read_text(encoding="utf-8"))["settings"]
    settings["preprocess"]["equalise"] = False
    settings["classifier"] = {}
    change_manifest(run, settings=settings)
    model = run / "model"
    for number in range(1, count + 1):
        for role in nets.PHASES:
            folder = model / f"member-{number}" / role
            folder.mkdir(parents=True)
            (folder / nets.MODEL).write_bytes((model / role / nets.MODEL).read_bytes())
        (model / f"member-{number}" / "classifier").mkdir()
        (model / f"member-{number}" / "classifier" / "classifier.txt").write_text(f"trees {number}", encoding="utf-8")
    for role in nets.PHASES:
        (model / role / nets.MODEL).unlink()
        (model / role).rmdir()
    (model / "calibration.json").write_text("{}", encoding="utf-8")
    return run


def test_a_packed_model_predicts_like_its_run(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "default")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    predictions = []
    for folder in (run, tmp_path / "default"):
        [member] = TrainedModel.of_run(folder).model.members
        networks = load_networks(member.restoration, member.segmentation, "cpu")
        assert {weight.dtype for weight in networks.segmentation.parameters()} == {torch.float32}
        predictions.append(predict(pixels, networks, 3))
    np.testing.assert_allclose(predictions[0].probability, predictions[1].probability, atol=1e-2)
    assert (predictions[0].probability != predictions[1].probability).any(), "half precision rounds"
    stored = load_file(tmp_path / "default" / "model" / "restoration" / nets.MODEL)
    assert {value.dtype for value in stored.values()} == {torch.float16}


def test_a_packed_model_says_what_it_is_and_nothing_about_its_data(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "default")
    text = (tmp_path / "default" / MANIFEST).read_text(encoding="utf-8")
    for private in ("doe_jane", "roe_richard", "secret", "/share", str(tmp_path), "2026", "commit"):
        assert private not in text
    manifest = json.loads(text)
    assert manifest["inputs"] == [
        {"use": "train", "case": "trained-1", "sha256": ROWS[0]["sha256"], "patient": None},
    ]
    assert manifest["versions"] == {"torch": "2"}
    settings = LiverSettings.model_validate(manifest["settings"])
    assert settings.name == "default"
    assert settings.gpus == "auto", "settings of the machine are not the model's"
    for name in ("preprocess", "restoration", "segmentation", "inference", "postprocess", "train", "synthesis"):
        assert getattr(settings, name) == getattr(SETTINGS, name)
    files = {path.relative_to(tmp_path / "default").as_posix() for path in (tmp_path / "default").rglob("*.*")}
    assert (
        files
        == {MANIFEST, *(f"model/{role}/model.safetensors" for role in nets.PHASES)}
        == {MANIFEST, *manifest["files"]}
    )


def test_members_classifiers_and_calibration_are_packed(run: Path, tmp_path: Path) -> None:
    pack(with_members(run, 2), tmp_path / "default")
    model = TrainedModel.of_run(tmp_path / "default").model
    names = [part.name for part in parts_of(model)]
    each = ("restoration", "segmentation", "classifier")
    assert names == [*(f"member-{n}/{part}" for n in (1, 2) for part in each), CALIBRATION]
    assert model_of({part.name: part.folder for part in parts_of(model)}) == model
    second = model.members[1].classifier
    assert second is not None
    assert (second / "classifier.txt").read_text(encoding="utf-8") == "trees 2"
    (tmp_path / "default" / "model" / "member-1").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="lacks member-1"):
        TrainedModel.of_run(tmp_path / "default")


def test_a_missing_classifier_is_named(run: Path) -> None:
    (with_members(run, 2) / "model" / "member-2" / "classifier" / "classifier.txt").unlink()
    with pytest.raises(ConfigError, match="no trained classifier in model/member-2"):
        TrainedModel.of_run(run)


def test_what_cannot_be_packed_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        pack(run, tmp_path)
    net = nets.build("restoration", NET, torch.Generator().manual_seed(1))
    with torch.no_grad():
        next(net.parameters()).fill_(1e6)
    nets.save(run / "model" / "restoration" / nets.MODEL, net, "restoration", NET)
    with pytest.raises(InputError, match="too large for half precision"):
        pack(run, tmp_path / "default")
    change_manifest(run, inputs=[])
    with pytest.raises(SystemExit) as ended:
        main([str(run), str(tmp_path / "other")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_name_is_a_packaged_model_unless_a_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    monkeypatch.setattr(packaged, "MODELS", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    for name in (None, "default", Path("default")):
        with pytest.raises(ConfigError, match="contains no model `default`"):
            model_folder(name)
    assert model_folder("nowhere") == Path("nowhere")
    assert model_folder(run) == run
    pack(run, tmp_path / "models" / "default")
    for name in (None, "default", Path("default")):
        assert model_folder(name) == tmp_path / "models" / "default"
    (tmp_path / "default").mkdir()
    assert model_folder("default") == Path("default"), "a folder of the user comes first"
    assert model_folder() == tmp_path / "models" / "default"


def test_the_packing_program_runs(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medad.models.pack", str(run), str(tmp_path / "default")]
    subprocess.run(command, check=True, timeout=120)
    assert TrainedModel.of_run(tmp_path / "default").settings.name == "default"


def test_a_run_folder_from_before_members_is_a_model_of_one(run: Path) -> None:
    """Earlier manifests lack the settings of members, classifier and calibration."""
    settings = json.loads((run / MANIFEST).read_text(encoding="utf-8"))["settings"]
    del settings["classifier"], settings["train"]["members"], settings["postprocess"]["false_positive_ml"]
    del settings["train"]["restoration"]["steps"], settings["synthesis"]["solid"], settings["inference"]["exclude"]
    change_manifest(run, settings=settings)
    trained = TrainedModel.of_run(run)
    assert trained.settings.train.members == 1
    [member] = trained.model.members
    assert (member.restoration, member.segmentation) == (run / "model" / "restoration", run / "model" / "segmentation")
    assert (member.classifier, member.snapshot, trained.model.calibration) == (None, "", None)
