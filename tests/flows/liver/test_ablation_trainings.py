"""Every combination of the thesis's ablation, table 3.2, trains with the flow; the results of joint training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Iterator[Any]:
    world = new_world(tmp_path_factory.mktemp("world"), train=1, test=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        yield world


def _train(cli: Cli, world: Any, out: Path, *options: str, command: str = "train") -> tuple[Path, dict[str, Any]]:
    sets = [part for option in options for part in ("--set", option)]
    ran = cli("liver", command, world.config, "--out", out, "--json", *sets)
    assert ran.code == 0, ran.err
    folder = Path(ran.answer["run_folder"])
    return folder, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def _stored_net(folder: Path, role: str) -> dict[str, Any]:
    with safe_open(folder / "model" / role / "model.safetensors", framework="np") as file:
        return json.loads(file.metadata()["adflows"])  # type: ignore[no-any-return]


@pytest.mark.parametrize("schedule", ["joint", "two_phase"])
@pytest.mark.parametrize("kind", ["perlin_texture", "blobs"])
@pytest.mark.parametrize("architecture", ["autoencoder", "unet"])
def test_every_combination_trains(
    world: Any, cli: Cli, tmp_path: Path, schedule: str, kind: str, architecture: str
) -> None:
    loss = "l2_ssim" if architecture == "autoencoder" else "l1"
    folder, report = _train(
        cli, world, tmp_path, f"train.schedule={schedule}", f"synthesis.kind={kind}",
        f"restoration.architecture={architecture}", f"train.restoration_loss={loss}",
    )  # fmt: skip
    expected = ["joint"] if schedule == "joint" else ["restoration", "segmentation"]
    assert [curve["phase"] for curve in report["curves"]] == expected
    assert all(np.isfinite(curve["loss"]).all() for curve in report["curves"])
    assert report["curves"][0]["restoration_loss"] == loss
    assert _stored_net(folder, "restoration")["net"]["architecture"] == architecture
    assert _stored_net(folder, "segmentation")["net"]["architecture"] == "unet"


def test_a_joint_run_segments_and_is_found_again(world: Any, cli: Cli, tmp_path: Path) -> None:
    folder, report = _train(cli, world, tmp_path, "train.schedule=joint", command="run")
    assert [case["case_id"] for case in report["cases"]] == ["lits-0"]
    for role in ("restoration", "segmentation"):
        assert {path.name for path in (folder / "model" / role).iterdir()} == {"model.safetensors", "curve.json"}
    assert len(report["curves"]) == 1, "networks trained together have one curve"
    again = cli("liver", "run", world.config, "--out", tmp_path, "--json", "--set", "train.schedule=joint")
    assert (again.code, again.answer["computed"]) == (0, 0)
    planned = cli("liver", "run", world.config, "--out", tmp_path, "--json", "--dry-run", "--seed", 9,
                  "--set", "train.schedule=joint")  # fmt: skip
    rows = {(row["step"], row["status"]) for row in planned.answer["plan"]}
    assert {("joint", "make"), ("model", "follows")} <= rows


def test_snapshots_are_in_the_artifact(world: Any, cli: Cli, tmp_path: Path) -> None:
    _train(cli, world, tmp_path, "train.snapshot_epochs=1", "train.segmentation.epochs=2")
    names = {path.name for path in (world.cache / "segmentation").rglob("snapshot-*.safetensors")}
    assert names == {"snapshot-0001.safetensors", "snapshot-0002.safetensors"}
    assert not list((world.cache / "checkpoints").iterdir())


def test_a_folder_of_textures_is_used_and_never_told(world: Any, prefect_cli: Cli, tmp_path: Path) -> None:
    secret = tmp_path / "Mustermann_textures"
    secret.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(secret / f"weave{number}.png")
    options = ("synthesis.kind=perlin_texture", f"synthesis.texture.folder={secret}")
    folder, report = _train(prefect_cli, world, tmp_path / "runs", *options)
    assert report["settings"]["synthesis"]["texture"]["folder"]
    for name in ("report.json", "report.html", "manifest.json"):
        assert "Mustermann" not in (folder / name).read_text(encoding="utf-8")
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        parameters = [str(run.parameters) for run in client.read_flow_runs()]
    assert any("perlin_texture" in text for text in parameters)
    assert not any("Mustermann" in text for text in parameters)

    (secret / "weave0.png").write_bytes(b"no picture any more")
    sets = [part for option in options for part in ("--set", option)]
    ran = prefect_cli("liver", "train", world.config, "--out", tmp_path / "runs", "--json", *sets)
    assert ran.code == 2
    assert f"{secret / 'weave0.png'}: not a readable picture" in ran.err
    assert [failure["rule"] for failure in ran.answer["failures"]] == [
        "not a readable picture (UnidentifiedImageError)"
    ]
