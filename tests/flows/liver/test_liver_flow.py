"""The whole flow on phantoms: its results, the steps that it computes again, and the effects of bad cases."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import medad
from flows.privacy.case_ids import identify
from flows.runs.headline import read_notices_text
from flows.store.digests import file_sha256

Cli = Callable[..., Any]
PER_TRAIN_CASE, PER_TEST_CASE, MODEL_AND_REPORT = 1, 3, 3
"""Numbers of tasks: prepare; prepare, segment, evaluate; two trainings and the report."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]) -> Any:
    return new_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: Any, prefect_cli: Cli) -> Iterator[Any]:
    """Run the flow once under Prefect with an empty cache. Other tests use the cached results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(world.cache))
        yield prefect_cli("liver", "run", world.config, "--out", world.runs, "--json")


@pytest.fixture
def again(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs the flow again, with the same cache, other options and a new run folder."""
    del finished

    def run(*options: object) -> Any:
        return cli("liver", "run", world.config, "--out", tmp_path / "runs", "--json", *options)

    return run


ALL = 2 * PER_TRAIN_CASE + 2 * PER_TEST_CASE + MODEL_AND_REPORT


def steps(run_folder: str, *, cached: bool) -> list[str]:
    manifest = json.loads((Path(run_folder) / "manifest.json").read_text(encoding="utf-8"))
    return sorted(task["step"] for task in manifest["tasks"] if task["cached"] == cached)


def test_the_run_folder_holds_everything(world: Any, finished: Any) -> None:
    assert finished.code == 0, finished.err
    answer = finished.answer
    assert (answer["computed"], answer["cached"], answer["failures"]) == (ALL, 0, [])
    assert set(answer["headline"]) == {"micro_dice_2d", "dice_3d_mean", "voxel_auroc_mean"}
    folder = Path(answer["run_folder"])
    assert folder == world.runs / "liver" / "tiny"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "manifest.json",
        "report.html",
        "report.json",
        "preview.png",
        "statistics.csv",
        *(f"lesions/lits-{n}.json" for n in (0, 1)),
        *(f"{kind}/lits-{n}.nii.gz" for kind in ("masks", "probabilities") for n in (0, 1)),
        *(
            f"model/{net}/{name}"
            for net in ("restoration", "segmentation")
            for name in ("model.safetensors", "curve.json")
        ),
    }


def test_the_manifest_says_what_went_in_and_what_came_out(world: Any, finished: Any) -> None:
    folder = Path(finished.answer["run_folder"])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        assert file_sha256(folder / name) == entry["sha256"]
    digests = {row["case"]: row["sha256"] for row in manifest["inputs"]}
    assert digests["btcv-0001"]["scan"] == file_sha256(world.btcv / "img" / "img0001.nii.gz")
    assert digests["lits-1"]["label"] == file_sha256(world.lits / "segmentation-1.nii.gz")
    assert manifest["settings"]["preprocess"]["slice_px"] == 64
    assert manifest["versions"]["torch"]
    assert len(manifest["tasks"]) == manifest["computed"] == ALL
    assert str(world.root) not in json.dumps(manifest), "data folders may be named after patients"


def test_masks_lie_on_the_scans_grid(world: Any, finished: Any) -> None:
    import nibabel
    import numpy as np

    for n in (0, 1):
        scan: Any = nibabel.load(world.lits / f"volume-{n}.nii.gz")
        for kind in ("masks", "probabilities"):
            image: Any = nibabel.load(Path(finished.answer["run_folder"]) / kind / f"lits-{n}.nii.gz")
            assert image.shape == scan.shape
            np.testing.assert_array_equal(image.affine, scan.affine)


def test_a_second_run_computes_nothing_and_says_so(
    again: Callable[..., Any], finished: Any, cli: Cli, world: Any
) -> None:
    second = again()
    assert second.code == 0
    assert (second.answer["computed"], second.answer["cached"]) == (0, ALL)
    assert second.answer["headline"] == finished.answer["headline"]
    plain = cli("liver", "run", world.config, "--out", world.runs)
    assert f"{ALL} tasks: 0 computed, {ALL} cached" in plain.out
    assert f"report: {world.runs / 'liver' / 'tiny' / 'report.html'}" in plain.out


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        (("--set", "postprocess.threshold=0.31"), {"segment", "evaluate", "report"}),
        (("--set", "evaluation.lesion_overlap=0.9"), {"evaluate", "report"}),
        (("--set", "inference.batch_size=3"), {"report"}),
        (("--set", "train.segmentation.epochs=2"), {"segmentation", "segment", "evaluate", "report"}),
        (("--name", "other"), {"report"}),
        (("--seed", "5"), {"restoration", "segmentation", "segment", "evaluate", "report"}),
    ],
)
def test_a_changed_setting_recomputes_what_depends_on_it(
    again: Callable[..., Any], change: tuple[str, ...], computed: set[str]
) -> None:
    ran = again(*change)
    assert ran.code == 0
    assert set(steps(ran.answer["run_folder"], cached=False)) == computed
    assert not computed & set(steps(ran.answer["run_folder"], cached=True))


def test_refresh_computes_everything_with_the_same_result(again: Callable[..., Any], finished: Any) -> None:
    ran = again("--refresh")
    assert (ran.answer["computed"], ran.answer["cached"]) == (ALL, 0)
    name = "model/segmentation/model.safetensors"
    assert file_sha256(Path(ran.answer["run_folder"]) / name) == file_sha256(Path(finished.answer["run_folder"]) / name)


def test_a_deleted_artifact_is_made_again_and_nothing_after_it(again: Callable[..., Any], world: Any) -> None:
    [prepared] = [path for path in (world.cache / "restoration").iterdir() if has_epochs(path, seed=0)]
    shutil.rmtree(prepared)
    ran = again()
    assert steps(ran.answer["run_folder"], cached=False) == ["restoration"]


def has_epochs(artifact: Path, *, seed: int) -> bool:
    sidecar = json.loads((artifact / "artifact.json").read_text(encoding="utf-8"))
    return bool(sidecar["parts"]["inputs"]["settings"]["seed"] == seed)


def test_renamed_and_moved_scans_are_the_same_scans(again: Callable[..., Any], world: Any, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for kind in ("volume", "segmentation"):
        for old, new in ((0, 77), (1, 8)):
            shutil.copy(world.lits / f"{kind}-{old}.nii.gz", moved / f"{kind}-{new}.nii.gz")
    ran = again("--test", moved)
    assert steps(ran.answer["run_folder"], cached=False) == ["report"]
    assert sorted(path.name for path in (Path(ran.answer["run_folder"]) / "masks").iterdir()) == [
        "lits-77.nii.gz",
        "lits-8.nii.gz",
    ]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_bad_cases_are_listed_and_the_others_go_on(again: Callable[..., Any], world: Any, tmp_path: Path) -> None:
    folder = tmp_path / "lits"
    shutil.copytree(world.lits, folder)
    for n in (2, 3, 4):
        shutil.copy(world.lits / "volume-0.nii.gz", folder / f"volume-{n}.nii.gz")
        shutil.copy(world.lits / "segmentation-0.nii.gz", folder / f"segmentation-{n}.nii.gz")
    truncate(folder / "volume-2.nii.gz")
    flip(folder / "segmentation-3.nii.gz")
    (folder / "segmentation-4.nii.gz").unlink()
    (folder / "volume-5.nii").write_bytes(b"")
    (folder / "segmentation-5.nii").write_bytes(b"")
    ran = again("--test", folder)
    assert ran.code == 2
    failures = {failure["case"]: failure for failure in ran.answer["failures"]}
    assert set(failures) == {"lits-2", "lits-3", "lits-4", "lits-5"}
    lines = ran.err.splitlines()
    assert lines.count(f"{folder / 'volume-2.nii.gz'}: {failures['lits-2']['rule']}") == 1
    for failure in failures.values():
        assert sum(line.endswith(f": {failure['rule']}") and line.startswith(str(folder)) for line in lines) == 1
    assert "Traceback" not in ran.err
    report = json.loads((Path(ran.answer["run_folder"]) / "report.json").read_text(encoding="utf-8"))
    assert {row["case_id"] for row in report["failures"]} == set(failures)
    assert {row["case_id"] for row in report["cases"]} == {"lits-0", "lits-1"}
    html = (Path(ran.answer["run_folder"]) / "report.html").read_text(encoding="utf-8")
    assert "lits-2" in html
    # a bad case is checked again, the good ones are not computed again
    again_ran = again("--test", folder)
    assert again_ran.code == 2
    assert again_ran.answer["computed"] == 0
    shutil.copy(world.lits / "volume-0.nii.gz", folder / "volume-2.nii.gz")
    mended = again("--test", folder)
    assert {failure["case"] for failure in mended.answer["failures"]} == {"lits-3", "lits-4", "lits-5"}


def test_a_report_is_written_when_nothing_can_be_trained(again: Callable[..., Any], world: Any, tmp_path: Path) -> None:
    folder = tmp_path / "btcv"
    shutil.copytree(world.btcv, folder)
    for scan in (folder / "img").iterdir():
        scan.write_bytes(gzip.compress(b"no scan"))
    ran = again("--train", folder)
    assert ran.code == 2
    stages = {(failure["case"], failure["stage"]) for failure in ran.answer["failures"]}
    assert stages == {("btcv-0001", "prepare"), ("btcv-0002", "prepare"), ("model", "restoration")}
    report = json.loads((Path(ran.answer["run_folder"]) / "report.json").read_text(encoding="utf-8"))
    assert report["cases"] == []
    assert len(report["failures"]) == 3


def test_a_report_is_written_when_a_data_set_is_missing(again: Callable[..., Any], tmp_path: Path) -> None:
    ran = again("--test", tmp_path / "nowhere")
    assert ran.code == 2
    [failure] = ran.answer["failures"]
    assert f"{tmp_path / 'nowhere'}: {failure['rule']}" in ran.err.splitlines()
    assert (Path(ran.answer["run_folder"]) / "report.html").is_file()


def test_a_run_that_fails_leaves_the_earlier_runs_model_alone(again: Callable[..., Any], tmp_path: Path) -> None:
    good = Path(again().answer["run_folder"])
    before = {path.relative_to(good): path.read_bytes() for path in good.rglob("*") if path.is_file()}
    ran = again("--train", tmp_path / "unmounted")
    assert ran.code == 2
    assert Path(ran.answer["run_folder"]) == good.with_name(f"{good.name}.failed")
    assert (good.with_name(f"{good.name}.failed") / "report.html").is_file()
    assert {path.relative_to(good): path.read_bytes() for path in good.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--set", "postproces.threshold=0.9"), "--set postproces.threshold: no such setting"),
        (("--set", "preprocess.slice_px=32"), "`preprocess` differs"),
        ((), "would be overwritten"),
    ],
)
def test_segment_refuses_what_would_not_mean_what_it_says(
    world: Any, finished: Any, cli: Cli, tmp_path: Path, options: tuple[str, ...], rule: str
) -> None:
    model = finished.answer["run_folder"]
    scan, mask = world.lits / "volume-0.nii.gz", world.lits / "segmentation-0.nii.gz"
    out = tmp_path / "out" if options else model
    ran = cli("liver", "segment", scan, "--liver", mask, "--model", model, "--out", out, *options)
    assert ran.code == 2
    assert rule in ran.err


def test_an_output_folder_that_cannot_be_is_told_before_any_work(world: Any, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    ran = cli("liver", "run", world.config, "--out", tmp_path / "file")
    assert ran.code == 2
    assert f"{tmp_path / 'file' / 'liver'}: cannot be written to" in ran.err
    assert "prepare" not in ran.err


def test_a_label_with_tumour_is_never_trained_on(again: Callable[..., Any], tmp_path: Path) -> None:
    from medad.cohort.phantom import write_lits_phantoms

    write_lits_phantoms(tmp_path / "ill", 1, seed=3, shape=(48, 40, 10), spacing_mm=(7.0, 7.0, 12.0))
    ran = again("--train", tmp_path / "ill", "--set", "train_data.layout=lits")
    assert ran.code == 2
    rules = {failure["case"]: failure["rule"] for failure in ran.answer["failures"]}
    assert "healthy" in rules["lits-0"]
    assert "model" in rules


def test_inserted_lesions_are_found_in_the_run_folder_and_said(
    again: Callable[..., Any], finished: Any, world: Any, cli: Cli, tmp_path: Path
) -> None:
    from medad.cohort.phantom import write_btcv_phantoms

    healthy = tmp_path / "healthy"  # other phantoms than the training cases
    write_btcv_phantoms(healthy, 1, seed=4, shape=(48, 40, 10), spacing_mm=(7.0, 7.0, 12.0))
    insert = '{"count": 1, "diameter_mm": [30, 40], "edge_mm": 3}'
    ran = again("--test", healthy, "--set", "test_data.layout=btcv", "--set", f"test_data.insert={insert}")
    assert ran.code == 0, ran.err
    folder = Path(ran.answer["run_folder"])
    assert sorted(path.name for path in (folder / "inserted" / "btcv-0001").iterdir()) == [
        "label.nii.gz",
        "scan.nii.gz",
    ]
    assert "inserted" in (folder / "report.html").read_text(encoding="utf-8").lower()
    assert read_notices_text(folder)
    assert not read_notices_text(Path(finished.answer["run_folder"]))
    scan, label = world.lits / "volume-0.nii.gz", world.lits / "segmentation-0.nii.gz"
    labels = ("--liver-label", "1", "--liver-label", "2")
    out = tmp_path / "out"
    used = cli("liver", "segment", scan, "--liver", label, *labels, "--model", folder, "--out", out, "--json")
    assert used.code == 0, used.err
    assert not read_notices_text(out), "the scans segmented with its model have no inserted lesions"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    digests = {row["case"]: row["sha256"] for row in manifest["inputs"] if row["use"] == "test"}
    assert digests["btcv-0001"]["scan"] == file_sha256(healthy / "img" / "img0001.nii.gz"), (
        "the digest is of the given scan"
    )


def test_the_stages_run_alone(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> None:
    prepared = cli("liver", "prepare", world.config)
    assert prepared.code == 0
    assert "4 tasks: 0 computed, 4 cached" in prepared.out
    assert "lits-1" in prepared.out
    trained = cli("liver", "train", world.config, "--out", tmp_path, "--json")
    assert trained.code == 0
    assert steps(trained.answer["run_folder"], cached=False) == ["report"]
    model = Path(trained.answer["run_folder"])
    evaluated = cli(
        "liver", "evaluate", world.config, "--model", model, "--name", "external", "--out", tmp_path, "--json"
    )
    assert evaluated.code == 0, evaluated.err
    assert evaluated.answer["headline"] == finished.answer["headline"]
    same_name = cli("liver", "evaluate", world.config, "--model", model, "--out", tmp_path)
    assert same_name.code == 2
    other = cli("liver", "evaluate", world.config, "--model", model, "--set", "preprocess.slice_px=96")
    assert other.code == 2


def test_scans_are_segmented_with_an_earlier_runs_model(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> None:
    import nibabel
    import numpy as np

    model = finished.answer["run_folder"]
    scans = [world.lits / f"volume-{n}.nii.gz" for n in (0, 1)]
    masks = [world.lits / f"segmentation-{n}.nii.gz" for n in (0, 1)]
    ran = cli(
        "liver", "segment", *scans, "--liver", masks[0], "--liver", masks[1], "--liver-label", 1, "--liver-label", 2,
        "--model", model, "--out", tmp_path / "out",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    ids = identify(scans)
    for n, case_id in enumerate(ids):
        ours: Any = nibabel.load(tmp_path / "out" / "masks" / f"{case_id}.nii.gz")
        flows: Any = nibabel.load(Path(model) / "masks" / f"lits-{n}.nii.gz")
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(flows.dataobj))
        assert f"{case_id} is {scans[n]}" in ran.err
        in_python = medad.segment(scans[n], masks[n], model, liver_labels=(1, 2), device="cpu")
        np.testing.assert_array_equal(in_python.mask, np.asarray(ours.dataobj))
    again = cli(
        "liver", "segment", scans[0], "--liver", masks[0], "--liver-label", 1, "--liver-label", 2,
        "--model", tmp_path / "out", "--out", tmp_path / "again", "--json",
    )  # fmt: skip
    assert again.code == 0, "the output folder contains the model, so it can be used as a model"
    assert again.answer["computed"] == 1


def test_prefects_ui_shows_cases_figures_and_a_picture(finished: Any, world: Any) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        keys = ["liver-cases", "liver-report", "liver-preview", "training-restoration", "training-segmentation"]
        artifacts = {
            key: client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
            for key in keys
        }
    assert all(artifacts.values()), {key: len(found) for key, found in artifacts.items()}
    tables = [json.loads(str(found.data)) for found in artifacts["liver-cases"]]
    evaluated = [table for table in tables if {row["case"] for row in table} == {"lits-0", "lits-1"}]
    assert evaluated
    assert any(all(row["3-D Dice"] and row["micro 2-D Dice"] for row in table) for table in evaluated)
    assert any(str(world.runs / "liver" / "tiny" / "report.html") in str(f.data) for f in artifacts["liver-report"])
    assert all(str(found.data).startswith("data:image/png;base64,") for found in artifacts["liver-preview"])
    assert any(found.data == 100.0 for found in artifacts["training-restoration"])


def test_slices_are_exported_as_a_set_of_images(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> None:
    from zsad.config.run import ImagesSettings
    from zsad.data.datasets import find_categories, normal_training_images
    from zsad.data.images import read_image
    from zsad.data.masks import read_mask

    del finished
    out = tmp_path / "slices"
    command = ("liver", "export-slices", world.config, "--out", out, "--with-training", "--json")
    assert cli(*command, "--dry-run").code == 0
    assert not out.exists()
    ran = cli(*command)
    assert ran.code == 0, ran.err
    assert not re.search(r"lits|btcv|img0|volume|/", ran.out)
    assert {step.name for step in out.iterdir()} == {"liver"}
    data = ImagesSettings(root=str(out), layout="mvtec")
    [category], problems, _ = find_categories(data)
    training = normal_training_images(data, "liver")
    assert not problems
    assert len(category.items) + len(training) == sum(each["slices"] for each in ran.answer["exported"])
    assert len(ran.answer["exported"]) == 4
    name = re.compile(r"ct-[0-9a-f]{12}-[0-9]{4}(_mask)?\.png")
    assert all(name.fullmatch(path.name) for path in out.rglob("*.png"))
    ill = [item for item in category.items if item.anomalous]
    assert ill
    assert len(ill) < len(category.items)
    for item in ill:
        assert item.mask is not None
        mask = read_mask(item.mask, (64, 64))
        # tumours are inside the liver, and slices are black outside the liver
        assert mask.any()
        assert (read_image(item.path)[mask] > 0).all()
    again = cli(*command)
    assert again.code == 2
    assert "exists already" in again.err


def test_slices_without_a_tumour_label_are_refused(world: Any, finished: Any, cli: Cli, tmp_path: Path) -> None:
    del finished
    healthy = ("--set", "test_data.layout=btcv", "--test", world.btcv)
    ran = cli("liver", "export-slices", world.config, "--out", tmp_path / "slices", "--json", *healthy)
    assert ran.code == 2
    assert [failure["rule"] for failure in ran.answer["failures"]] == [
        "no tumour label, so slices with tumour cannot be distinguished from normal ones"
    ] * 2
    assert not (tmp_path / "slices" / "liver").exists()
