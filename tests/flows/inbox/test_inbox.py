"""The inbox: each scan is segmented once or fails visibly once, with any names, clocks, files and passes."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.inbox import arrivals
from flows.inbox.arrivals import ARRIVING, NO_MASK
from flows.inbox.config import Inbox, InboxRequest
from flows.inbox.flow import liver_inbox
from flows.inbox.results import OutFolder
from flows.runs.prefect_flow import final_state
from flows.store import digests
from medad.base.errors import ConfigError
from tests.flows.inbox_box import Box, read
from tests.flows.privacy.test_privacy import SECRETS, database, dump, holds, search

Cli = Callable[..., Any]
CASE_FILES = {
    "mask.nii.gz", "probability.nii.gz", "lesions.json", "report.html", "report.json", "preview.png", "manifest.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any], cli: Cli) -> Iterator[Any]:
    """Create a trained model, phantoms, and a cache that most tests share."""
    made = new_world(tmp_path_factory.mktemp("world"), train=1, test=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADFLOWS_CACHE", str(made.cache))
        ran = cli("liver", "train", made.config, "--out", made.runs, "--json")
        assert ran.code == 0, ran.err
        yield made


@pytest.fixture
def served(world: Any, tmp_path: Path, prefect_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Box:
    """Create an inbox whose passes are flow runs of Prefect."""
    monkeypatch.setenv("ADFLOWS_CACHE", str(world.cache))
    return Box(tmp_path / "box", world.lits, world.runs / "liver" / "tiny", prefect_cli)


@pytest.fixture
def box(served: Box, cli: Cli) -> Box:
    """Create an inbox whose passes run without Prefect, which does not affect their decisions."""
    return dataclasses.replace(served, cli=cli)


def state_of(box: Box, **more: Any) -> Any:
    """Return the final state of the flow in Prefect."""
    return liver_inbox.prefect(InboxRequest(config=str(box.config), **more), return_state=True)


def seen(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return everything in a folder that a program could change."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def tasks_of(run_id: Any) -> int:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        return len(client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))))


# results of a pass


def test_each_new_scan_is_segmented_once_and_the_inbox_is_left_alone(served: Box, cache: Path) -> None:
    import nibabel
    import numpy as np

    scans = [served.drop("a", 0), served.drop("b", 1)]
    before = seen(served.inbox)
    first = served.run()
    assert first.code == 0, first.err
    assert first.answer["computed"] == 2 + 2 * 3, "two copied networks; prepare, segment and report of each scan"
    assert sorted(first.answer["segmented"]) == served.results()
    assert len(served.results()) == 2
    for case_id in served.results():
        assert {path.name for path in (served.out / case_id).iterdir()} == CASE_FILES
        assert case_id in (served.out / case_id / "report.html").read_text(encoding="utf-8")
        manifest = read(served.out / case_id / "manifest.json")
        assert {task["case_id"] for task in manifest["tasks"]} == {case_id, "restoration", "segmentation"}
        assert len(manifest["inputs"]) == 1
    shapes = {nibabel.load(served.out / case_id / "mask.nii.gz").shape for case_id in served.results()}
    assert shapes == {np.asanyarray(nibabel.load(scans[0]).dataobj).shape}
    second = served.run()
    assert second.code == 0
    assert (second.answer["segmented"], second.answer["computed"], second.answer["cached"]) == ([], 0, 0)
    assert seen(served.inbox) == before
    served.drop("c", 2)
    assert len(served.segmented()) == 1, "the next pass finds a scan that arrived later"
    assert len(served.results()) == 3


def test_the_result_is_what_segment_gives(box: Box, cli: Cli, tmp_path: Path) -> None:
    scan = box.drop("a", 0)
    [case_id] = box.segmented()
    ran = cli(
        "liver", "segment", scan, "--liver", scan.with_name("liver.nii.gz"), "--liver-label", 1, "--liver-label", 2,
        "--model", box.model, "--out", tmp_path / "by-hand", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    [mask] = (tmp_path / "by-hand" / "masks").iterdir()
    assert mask.read_bytes() == (box.out / case_id / "mask.nii.gz").read_bytes()


def test_the_overview_lists_what_is_done_failed_and_waiting(box: Box) -> None:
    box.drop("a", 0)
    box.drop_broken("b", 1)
    box.drop("c", 2, liver=False)
    ran = box.run()
    assert ran.code == 2
    overview = box.overview()
    assert (overview["done"], overview["failed"], overview["waiting"]) == (1, 1, [{"rule": NO_MASK, "count": 1}])
    with (box.out / "inbox.csv").open(encoding="utf-8") as table:
        rows = {row["status"]: row for row in csv.DictReader(table)}
    [done], [failed] = box.results(), box.failures()
    assert (rows["done"]["case"], rows["failed"]["case"]) == (done, failed)
    lesions = read(box.out / done / "lesions.json")
    assert int(rows["done"]["lesions"]) == lesions["lesion_count"]
    assert float(rows["done"]["lesion_ml"]) == pytest.approx(lesions["lesion_ml"], abs=1e-3)
    assert rows["done"]["report"] == f"{done}/report.html"
    assert "cut short" in rows["failed"]["rule"]


def test_states_say_what_happened(served: Box) -> None:
    served.drop("a", 0)
    first = state_of(served)
    assert (first.name, first.message) == ("Completed", "1 segmented")
    assert tasks_of(first.state_details.flow_run_id) > 0
    nothing = state_of(served)
    assert (nothing.name, nothing.message) == ("Completed", "nothing new")
    assert tasks_of(nothing.state_details.flow_run_id) == 0
    served.drop_broken("b", 1)
    served.drop("c", 2, liver=False)
    failed = state_of(served)
    assert failed.is_completed()
    assert failed.name == "CompletedWithFailures"
    assert failed.message == f"1 failed: see failed/; waiting: 1 {NO_MASK}"
    assert state_of(served).message == f"nothing new; waiting: 1 {NO_MASK}"


def test_prefects_ui_shows_a_table_of_opaque_ids_and_names_a_person_reads(served: Box) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

    served.drop("MUSTERMANN", 0)
    served.drop_broken("PID4711", 1)
    # as a deployment passes it: plain JSON
    state: Any = liver_inbox.prefect({"config": str(served.config)}, return_state=True)
    run_id = state.state_details.flow_run_id
    assert run_id is not None
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
        [table] = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                key=ArtifactFilterKey(any_=["liver-inbox"]), flow_run_id=ArtifactFilterFlowRunId(any_=[run_id])
            )
        )
    assert run.name == "inbox box"
    rows = json.loads(str(table.data))
    assert {row["case"]: row["status"] for row in rows} == {
        **dict.fromkeys(served.results(), "done"),
        **dict.fromkeys(served.failures(), "failed: prepare"),
    }


def test_values_put_over_a_configuration_are_not_stored(served: Box) -> None:
    """Overrides may be paths, so they are not stored, and forms of the UI do not have them."""
    from prefect.client.orchestration import get_client
    from prefect.utilities.callables import parameter_schema

    run_id = state_of(served, overrides={"inbox": str(served.inbox)}).state_details.flow_run_id
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run_id).parameters["request"] == {"config": str(served.config), "retry": []}
    schema = parameter_schema(liver_inbox.prefect.fn)
    assert set(schema.definitions["InboxRequest"]["properties"]) == {"config", "retry"}


def test_nothing_of_a_patient_leaves_the_inbox(
    served: Box, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names in folders and headers do not leak: of a good scan, a broken one and a waiting one."""
    import nibabel
    from prefect.logging.handlers import APILogWorker

    caplog.set_level(logging.DEBUG, "prefect")
    for path in (
        served.drop("MUSTERMANN_Erikadorothea_19640229", 0),
        served.drop_broken("PID4711-MUSTERMANN", 1),
        served.drop("PID4711-Erikadorothea", 2, liver=False),
    ):
        if path.parent.name == "MUSTERMANN_Erikadorothea_19640229":
            image: Any = nibabel.load(path)
            image.header["descrip"] = b"MUSTERMANN Erikadorothea PID4711"
            image.header["aux_file"] = b"Glasgow Str"
            nibabel.save(nibabel.Nifti1Image(image.dataobj, image.affine, image.header), path)
    assert set().union(*search(served.inbox).values()) == set(SECRETS), "the search itself works"
    assert len(served.segmented(code=2)) == 1
    with monkeypatch.context() as patch:  # the traceback of a bug is logged
        patch.setattr("medad.steps.cases.prepare_case", lambda case, *_, **__: case.scan.read_text(encoding="ascii"))
        with pytest.raises(UnicodeDecodeError):
            served.run("--retry", "--refresh", *served.failures())
    APILogWorker.drain_all(timeout=10)
    failed = next(iter(served.failures())).encode()
    deadline = time.monotonic() + 30
    while not all(text in dump(database()) for text in (b"prepare " + failed, b"internal error", b"1 failed: see")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert search(served.out) == {}
    assert search(cache) == {}
    assert holds(dump(database())) == set()
    assert holds(caplog.text.encode()) == set()


# the same content has one result


def test_one_scan_under_two_names_is_one_case_and_a_renamed_one_is_not_new(box: Box) -> None:
    box.drop("a", 0)
    box.drop("b", 0)
    assert len(box.segmented()) == 1
    (box.inbox / "a").rename(box.inbox / "z")
    shutil.rmtree(box.inbox / "b")
    assert box.segmented() == []
    assert len(box.results()) == 1


def test_another_mask_makes_another_case(box: Box) -> None:
    box.drop("a", 0)
    [first] = box.segmented()
    folder = box.drop("b", 0).parent
    (folder / "liver.nii.gz").unlink()
    import nibabel
    import numpy as np

    mask: Any = nibabel.load(box.phantoms / "segmentation-0.nii.gz")
    values = np.asarray(mask.dataobj).copy()
    values[values > 0] = 1
    nibabel.save(nibabel.Nifti1Image(values, mask.affine), folder / "liver.nii.gz")
    [second] = box.segmented()
    assert {first, second} == set(box.results())


def test_a_cleared_inbox_keeps_its_results_and_what_comes_back_is_known(box: Box) -> None:
    box.drop("a", 0)
    assert len(box.segmented()) == 1
    shutil.rmtree(box.inbox / "a")
    assert box.segmented() == []
    assert (len(box.results()), box.overview()["done"]) == (1, 1)
    box.drop("again", 0)
    assert box.segmented() == []


def test_another_model_does_not_make_done_cases_new(box: Box, tmp_path: Path) -> None:
    box.drop("a", 0)
    [case_id] = box.segmented()
    box.configure(settings={"postprocess": {"threshold": 0.31}})
    assert box.segmented() == []
    before = read(box.out / case_id / "lesions.json")
    assert box.segmented("--retry", case_id) == [case_id], "but a user may request it"
    assert (before["threshold"], read(box.out / case_id / "lesions.json")["threshold"]) == (0.5, 0.31)


def test_a_removed_result_is_made_again_out_of_the_cache(box: Box) -> None:
    box.drop("a", 0)
    [case_id] = box.segmented()
    shutil.rmtree(box.out / case_id)
    ran = box.run()
    assert (ran.answer["segmented"], ran.answer["computed"]) == ([case_id], 0)


# failures


def test_a_failure_is_visible_once_and_not_tried_again(box: Box) -> None:
    scan = box.drop_broken("MUSTERMANN", 0)
    first = box.run()
    assert first.code == 2
    assert str(scan) in first.err, "the terminal names the file"
    [(case_id, record)] = box.failures().items()
    assert (record["case"], record["stage"], record["rule"]) == (case_id, "prepare", "the gzip stream is cut short")
    assert "MUSTERMANN" not in json.dumps(record)
    again = box.run()
    assert (again.code, again.answer["failures"]) == (0, [])
    assert box.failures() == {case_id: record}


def test_a_failed_case_is_tried_again_when_asked_or_when_its_record_is_removed(box: Box) -> None:
    box.drop_broken("a", 0)
    box.drop_broken("b", 1)
    assert box.segmented(code=2) == []
    first, second = box.failures()
    for options, tried in (
        (("--retry",), {first, second}),
        (("--retry", second), {second}),
        ((), set()),
    ):
        assert {failure["case"] for failure in box.run(*options).answer["failures"]} == tried
    (box.out / "failed" / f"{first}.json").unlink()
    assert {failure["case"] for failure in box.run().answer["failures"]} == {first}
    unknown = box.run("--retry", "scan-0")
    assert unknown.code == 2
    assert "scan-0: no such case" in unknown.err
    shutil.rmtree(box.inbox / "a")
    shutil.rmtree(box.inbox / "b")
    gone = box.run("--retry", first)
    assert gone.code == 2
    assert "no longer in the inbox" in gone.err


@pytest.mark.parametrize("what", ["settings", "model", "program"])
def test_a_failed_case_is_tried_again_when_what_it_failed_with_changes(
    box: Box, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.drop_broken("a", 0)
    assert box.segmented(code=2) == []
    [before] = box.failures().values()
    assert box.segmented() == []
    if what == "settings":
        box.configure(affine_mismatch="warn")
    elif what == "model":
        other = shutil.copytree(box.model, tmp_path / "other")
        from safetensors import safe_open
        from safetensors.torch import save_file

        weights = other / "model" / "segmentation" / "model.safetensors"
        with safe_open(weights, "pt") as file:
            tensors = {name: file.get_tensor(name) * 1.01 for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        save_file(tensors, weights, metadata)
        box.configure(model=str(other))
    else:
        monkeypatch.setattr("flows.store.step.code_digest", lambda *functions: "another program")
    assert box.segmented(code=2) == []
    [after] = box.failures().values()
    assert before["tried_with"] != after["tried_with"]
    assert box.segmented() == []


def test_a_mended_scan_is_new_and_one_that_succeeds_at_last_is_failed_no_longer(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = box.drop_broken("a", 0)
    assert box.segmented(code=2) == []
    shutil.copy(box.phantoms / "volume-0.nii.gz", scan)
    assert len(box.segmented()) == 1
    assert len(box.failures()) == 1, "the failure of the broken content is still listed"
    box.drop("b", 1)
    with monkeypatch.context() as patch:
        patch.setattr("medad.reports.run.report.write_report", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            box.run()
    assert "internal error (ZeroDivisionError)" in {record["rule"] for record in box.failures().values()}
    assert box.segmented() == [], "a case that failed by a bug is not tried again either"
    assert len(box.segmented("--retry")) == 1
    assert {record["rule"] for record in box.failures().values()} == {"the gzip stream is cut short"}


def test_a_done_case_that_fails_when_asked_for_keeps_its_result(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    from medad.base.errors import InputError

    box.drop("a", 0)
    [case_id] = box.segmented()
    box.configure(settings={"postprocess": {"threshold": 0.77}})

    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("/x", "a rule")

    monkeypatch.setattr("medad.reports.run.report.write_report", refuse)
    assert box.run("--retry", case_id).code == 2
    assert (box.results(), box.failures()) == ([case_id], {})


def test_one_bad_case_stops_no_other(box: Box) -> None:
    box.drop_broken("a", 0)
    box.drop("b", 1)
    (box.inbox / "c").mkdir()
    (box.inbox / "c" / "scan.nii.gz").write_bytes(b"")
    box.drop_liver("c", 2)
    assert len(box.segmented(code=2)) == 1
    assert len(box.failures()) == 2


def test_a_full_disk_is_no_scans_fault(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    box.drop("a", 0)
    box.configure(settings={"postprocess": {"threshold": 0.66}})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place in ("medad.reports.run.report.write_report", "flows.runs.run_folder._write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            state = final_state(liver_inbox.local(InboxRequest(config=str(box.config))))
        assert state.is_failed()
        assert "no room left" in str(state.message)
        assert (box.results(), box.failures()) == ([], {})
    assert len(box.segmented()) == 1, "the next pass tries again"


def test_a_scan_that_cannot_be_read_for_a_moment_is_not_failed_for_ever(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a network share disappears while scans are read, their content is not the cause."""
    scan = box.drop("a", 0)

    def gone(case: Any, *_: Any, **__: Any) -> None:
        from medad.base.errors import InputError

        scan.rename(scan.with_name("elsewhere"))
        raise InputError(case.scan, "cannot be read (Stale file handle)")

    with monkeypatch.context() as patch:
        patch.setattr("medad.steps.cases.prepare_case", gone)
        patch.setenv("ADFLOWS_CACHE", str(box.root / "cache"))
        ran = box.run()
    assert (ran.answer["segmented"], box.failures()) == ([], {})
    assert ran.answer["waiting"] == [{"rule": "changed or disappeared while it was read", "count": 1}]
    scan.with_name("elsewhere").rename(scan)
    assert len(box.segmented()) == 1


# still arriving


def test_a_scan_is_taken_only_when_it_is_whole(box: Box) -> None:
    """A scan is written in pieces while passes run: no pass may read a part, and one reads the whole scan."""
    box.configure(unchanged_s=0.6)
    whole = (box.phantoms / "volume-0.nii.gz").read_bytes()
    scan = box.drop("a", 0)
    scan.write_bytes(b"")

    def arrive() -> None:
        for start in range(0, len(whole), len(whole) // 8 + 1):
            with scan.open("ab") as file:
                file.write(whole[start : start + len(whole) // 8 + 1])
            time.sleep(0.25)

    copying = threading.Thread(target=arrive)
    copying.start()
    first = box.run()
    assert (first.answer["segmented"], first.answer["waiting"]) == ([], [{"rule": ARRIVING, "count": 1}])
    assert copying.is_alive(), "it was not complete yet"
    copying.join()
    [case_id] = box.segmented()
    assert read(box.out / case_id / "manifest.json")["inputs"][0]["sha256"]["scan"] == digests.file_sha256(
        box.phantoms / "volume-0.nii.gz"
    )
    assert box.failures() == {}


def test_time_stamps_and_clocks_say_nothing_of_what_is_whole(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stamps of another machine are years off, and this machine's clock is set back during the test."""
    monkeypatch.setattr(arrivals, "MIN_UNCHANGED_S", 0.01)
    box.configure(unchanged_s=0.05)
    year = 365 * 86400
    for name, phantom, shift in (("a", 0, year), ("b", 1, -year)):
        scan = box.drop(name, phantom)
        os.utime(scan, (time.time() + shift, time.time() + shift))
    assert len(box.segmented()) == 2
    real = time.time
    monkeypatch.setattr(digests, "time", SimpleNamespace(time_ns=lambda: int((real() - year) * 1e9)))
    reads: list[Path] = []

    def read_anew(path: Path) -> str:
        reads.append(path)
        return digests.file_sha256(path)

    monkeypatch.setattr("medad.ct.io.file_digest", read_anew)
    assert box.segmented() == []
    assert not reads, "remembered, although their time stamps are in the future"
    box.drop("c", 2)
    assert len(box.segmented()) == 1
    assert len(box.results()) == 3


def test_what_another_command_read_still_counts_as_arriving(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run or `segment` may have read and remembered a half-copied scan."""
    monkeypatch.setattr(digests, "MIN_UNCHANGED_S", -1.0)
    monkeypatch.setattr(arrivals, "MIN_UNCHANGED_S", 0.01)
    box.configure(unchanged_s=0.05)
    box.drop("a", 0)
    [planned] = {row["case"] for row in box.run("--dry-run").answer["plan"] if row["step"] == "prepare"}
    watched: list[float] = []

    def sleep(seconds: float) -> None:
        watched.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(arrivals, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    assert box.segmented() == [planned]
    assert watched
    watched.clear()
    assert box.segmented() == []
    assert not watched, "a pass without new scans does not wait"


@pytest.mark.parametrize(
    ("scan", "liver"),
    [
        ("a/scan.nii.gz.partial", "a/liver.nii.gz"),
        ("a.partial/scan.nii.gz", "a.partial/liver.nii.gz"),
        ("a/scan.nii.gz", "a/liver.nii.gz.part"),
        (".a/scan.nii.gz", ".a/liver.nii.gz"),
    ],
)
def test_names_of_copies_under_way_are_left_alone(box: Box, scan: str, liver: str) -> None:
    for name, source in ((scan, "volume-0"), (liver, "segmentation-0")):
        (box.inbox / name).parent.mkdir(exist_ok=True)
        shutil.copy(box.phantoms / f"{source}.nii.gz", box.inbox / name)
    assert box.segmented() == []
    (box.inbox / scan).rename((box.inbox / scan).with_name("scan.nii.gz"))
    (box.inbox / liver).rename((box.inbox / liver).with_name("liver.nii.gz"))
    (box.inbox / scan).parent.rename(box.inbox / "whole")
    assert len(box.segmented()) == 1


def test_all_files_of_a_dicom_folder_count(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with slices, notes, and a file with a temporary name."""
    box.configure(scans="*/dicom")
    folder = box.inbox / "a" / "dicom"
    folder.mkdir(parents=True)
    shutil.copy(box.phantoms / "segmentation-0.nii.gz", box.inbox / "a" / "liver.nii.gz")
    settings = Inbox.open(InboxRequest(config=str(box.config))).settings
    rules = [each.rule for each in arrivals.list_arrivals(settings).waiting]
    assert rules == ["no DICOM file in this folder or its sub-folders"]
    (folder / "IM1").write_bytes(b"slice")
    (folder / "IM2.dcm.part").write_bytes(b"sli")
    assert [each.rule for each in arrivals.list_arrivals(settings).waiting] == [ARRIVING]
    (folder / "IM2.dcm.part").rename(folder / "IM2.dcm")
    [arrival] = arrivals.list_arrivals(settings).arrivals
    assert arrivals.unchanged(arrival)
    (folder / "series").mkdir()
    (folder / "series" / "note.txt").write_text("more to come", encoding="utf-8")
    assert not arrivals.unchanged(arrival)

    def another(seconds: float) -> None:
        (folder / "IM3.dcm").write_bytes(b"slice")
        time.sleep(seconds)

    [arrival] = arrivals.list_arrivals(settings).arrivals
    monkeypatch.setattr(arrivals, "time", SimpleNamespace(monotonic=time.monotonic, sleep=another))
    assert [each.rule for each in arrivals.wait_until_unchanged([arrival], 1e-3)[1]] == [ARRIVING]


def test_a_scan_waits_for_its_mask(box: Box) -> None:
    box.drop("a", 0, liver=False)
    assert box.segmented() == []
    assert box.overview()["waiting"] == [{"rule": NO_MASK, "count": 1}]
    box.drop_liver("a", 0)
    assert len(box.segmented()) == 1
    assert box.overview()["waiting"] == []


def test_a_scan_that_changes_while_it_is_read_is_not_published(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    from medad.steps import cases

    scan, prepare = box.drop("a", 0), cases.prepare_case

    @functools.wraps(prepare)
    def change(*arguments: Any, **more: Any) -> None:
        prepare(*arguments, **more)
        os.utime(scan)

    with monkeypatch.context() as patch:
        patch.setattr(cases, "prepare_case", change)
        patch.setenv("ADFLOWS_CACHE", str(box.root / "cache"))
        ran = box.run()
    assert ran.code == 0
    assert (ran.answer["segmented"], ran.answer["waiting"]) == ([], [{"rule": ARRIVING, "count": 1}])
    assert (box.results(), box.failures()) == ([], {})
    assert len(box.segmented()) == 1


# killed passes, and parallel passes


class Killed(BaseException):
    """Like kill -9 for the files on disk: no further code runs, except that locks are freed."""


@pytest.mark.parametrize(
    "place",
    ["medad.reports.run.report.write_report", "flows.runs.run_folder._write_manifest", "flows.inbox.results._csv"],
)
def test_a_killed_pass_is_made_good_and_computes_nothing_again(
    box: Box, cache: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    box.drop("a", 0)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        with pytest.raises(Killed):
            box.run()
    made = 4 if place == "medad.reports.run.report.write_report" else 5
    ran = box.run()
    assert ran.code == 0, ran.err
    assert ran.answer["computed"] == 5 - made
    assert len(box.results()) == 1
    assert box.overview()["done"] == 1
    assert not list((box.out / ".inbox" / "locks").iterdir())
    assert not list(box.out.glob(".[!i]*"))


def test_what_killed_passes_left_is_cleared_and_the_overview_is_made_from_the_records(box: Box) -> None:
    box.drop("a", 0)
    box.drop_broken("b", 1)
    assert len(box.segmented(code=2)) == 1
    table = (box.out / "inbox.csv").read_bytes()
    (box.out / "inbox.csv").unlink()
    (box.out / "inbox.json").write_text("{half", encoding="utf-8")
    (box.out / ".tmp-0123-inbox.json").write_text("{half", encoding="utf-8")
    (box.out / ".inbox" / "locks").mkdir(exist_ok=True)
    (box.out / ".inbox" / "locks" / f"{'0' * 64}.lock").touch()
    [result] = box.results()
    content = read(box.out / result / "manifest.json")["inbox"]["content"]
    stale = next(iter(box.failures().values())) | {"case": result, "content": content}
    (box.out / "failed" / f"{result}.json").write_text(json.dumps(stale), encoding="utf-8")
    assert box.segmented() == []
    assert (box.out / "inbox.csv").read_bytes() == table
    assert result not in box.failures()
    assert not list(box.out.rglob(".tmp-*"))
    assert not list(box.out.rglob("*.lock"))


def test_nothing_is_written_where_nothing_changed(box: Box) -> None:
    box.drop("a", 0)
    assert len(box.segmented()) == 1
    before = {path: path.stat().st_mtime_ns for path in box.out.rglob("*") if path.is_file()}
    assert box.segmented() == []
    assert {path: path.stat().st_mtime_ns for path in box.out.rglob("*") if path.is_file()} == before


def test_a_scan_that_another_pass_is_at_work_on_is_skipped(box: Box) -> None:
    box.drop("a", 0)
    [case_id] = box.segmented()
    content = box.overview()["cases"][0]["content"]
    shutil.rmtree(box.out / case_id)
    with OutFolder(box.out).lock(content) as held:
        assert held
        ran = box.run()
        assert (ran.code, ran.answer["busy"]) == (0, 1)
        assert (ran.answer["segmented"], ran.answer["computed"], box.results()) == ([], 0, [])
    assert box.segmented() == [case_id]


@pytest.mark.parametrize("ends", ["done", "failed"])
def test_what_another_pass_did_meanwhile_is_not_done_again(
    box: Box, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """The other pass ends after this one has listed the inbox and before it takes the lock."""
    if ends == "done":
        box.drop("a", 0)
    else:
        box.drop_broken("a", 0)
    lock = OutFolder.lock
    others: list[Any] = []

    def later(self: OutFolder, content: str) -> Any:
        if not others:
            others.append(None)
            others.append(box.run())
        return lock(self, content)

    monkeypatch.setattr(OutFolder, "lock", later)
    mine = box.run()
    assert mine.answer["segmented"] == []
    assert mine.answer["failures"] == []
    assert (len(box.results()), len(box.failures())) == ((1, 0) if ends == "done" else (0, 1))


def test_a_folder_that_is_in_the_way_is_not_written_over(box: Box) -> None:
    box.drop("a", 0)
    [case_id] = box.segmented()
    shutil.rmtree(box.out / case_id)
    (box.out / case_id).mkdir()
    (box.out / case_id / "manifest.json").write_text('{"schema": "adflows run 1"}', encoding="utf-8")
    box.drop("b", 1)
    assert len(box.segmented(code=2)) == 1, "the other scan is still processed"
    assert read(box.out / case_id / "manifest.json") == {"schema": "adflows run 1"}


# commands of the user


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(box: Box, cache: Path) -> None:
    box.drop("a", 0)
    box.drop("b", 1, liver=False)
    ran = box.run("--dry-run")
    assert ran.code == 0, ran.err
    assert {row["step"] for row in ran.answer["plan"]} == {"model", "prepare", "segment", "report"}
    assert ran.answer["waiting"] == [{"rule": NO_MASK, "count": 1}]
    assert not box.out.exists()
    assert {path.name for path in cache.iterdir()} <= {"digests.sqlite"}
    assert len(box.segmented()) == 1
    assert box.run("--dry-run").answer["plan"] == []


def test_the_list_tells_an_administrator_what_may_be_cleared(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "MIN_UNCHANGED_S", 0.01)
    box.configure(unchanged_s=0.05)
    done, broken = box.drop("a", 0), box.drop_broken("b", 1)
    assert len(box.segmented(code=2)) == 1
    waiting, new = box.drop("c", 2, liver=False), box.drop("d", 2)
    ran = box.run("--list")
    assert ran.code == 0, ran.err
    rows = {row["scan"]: (row["status"], row["case"]) for row in ran.answer["scans"]}
    assert rows == {
        str(done): ("done", box.results()[0]),
        str(broken): ("failed", next(iter(box.failures()))),
        str(waiting): ("waiting", ""),
        str(new): ("new", ""),
    }
    assert box.cli is not None
    plain = box.cli("liver", "inbox", box.config, "--list").out
    assert "1 done, 1 failed, 1 new, 1 waiting" in plain
    for row in ran.answer["scans"]:
        if row["status"] == "done":
            shutil.rmtree(Path(row["scan"]).parent)
    assert len(box.segmented()) == 1


def test_a_watch_runs_the_flow_only_where_there_is_news(served: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import inbox as cli_inbox
    from flows.cli.options import run_flow

    box = served

    monkeypatch.setattr(arrivals, "MIN_UNCHANGED_S", 0.01)
    box.configure(unchanged_s=0.05)
    box.drop("a", 0)
    passes: list[str] = []

    def count(*arguments: Any, **more: Any) -> Any:
        passes.append("pass")
        return run_flow(*arguments, **more)

    def sleep(seconds: float) -> None:
        assert seconds == 7
        passes.append("sleep")
        if len(passes) == 3:
            box.drop_broken("b", 1)
            box.inbox.rename(box.inbox.with_name("unmounted"))
        if len(passes) == 4:
            box.inbox.with_name("unmounted").rename(box.inbox)
        if len(passes) >= 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_inbox, "run_flow", count)
    monkeypatch.setattr(cli_inbox, "time", SimpleNamespace(sleep=sleep))
    ran = box.run("--watch", 7)
    assert passes == ["pass", "sleep", "sleep", "sleep", "pass", "sleep", "sleep"]
    assert ran.code == 2
    assert [len(json.loads(line)["segmented"]) for line in ran.out.splitlines()] == [1, 0]
    assert "no such folder" in ran.err


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--set", "livers=liver"), "livers"),
        (("--set", "scans=../*/scan.nii.gz"), "below the inbox"),
        (("--set", "settings.postprocess.threshold=7"), "postprocess.threshold"),
        (("--set", "settings.preprocess.slice_px=32"), "`preprocess` differs"),
        (("--set", "settings.test_data.root=x"), "not a setting for the segmentation"),
        (("--set", "model=nowhere"), "not a run folder"),
        (("--set", "inbox=nowhere"), "no such folder"),
        (("scan-0",), "only with --retry"),
        (("--list", "--dry-run"), "exclude each other"),
    ],
)
def test_what_is_wrong_is_one_line(box: Box, options: tuple[str, ...], rule: str) -> None:
    ran = box.run(*options)
    assert ran.code == 2
    assert rule in ran.err
    assert "Traceback" not in ran.err


def test_results_may_not_lie_in_the_inbox(box: Box) -> None:
    for out in (box.inbox, box.inbox / "out", box.root):
        box.configure(out=str(out))
        with pytest.raises(ConfigError, match="neither inside the other"):
            Inbox.open(InboxRequest(config=str(box.config)))


@pytest.mark.parametrize("broken", ["no configuration", "no model", "weights gone", "no inbox"])
def test_a_broken_set_up_is_a_failed_run_with_one_line(served: Box, broken: str, tmp_path: Path) -> None:
    served.drop("a", 0)
    request = InboxRequest(config=str(served.config))
    if broken == "no configuration":
        request = InboxRequest(config=str(tmp_path / "nowhere.yaml"))
    elif broken == "no model":
        served.configure(model=str(tmp_path / "nowhere"))
    elif broken == "weights gone":
        other = shutil.copytree(served.model, tmp_path / "other")
        (other / "model" / "segmentation" / "model.safetensors").write_bytes(b"no weights")
        (other / "model" / "restoration" / "model.safetensors").unlink()
        served.configure(model=str(other))
    else:
        served.configure(inbox=str(tmp_path / "nowhere"))
    state: Any = liver_inbox.prefect(request, return_state=True)
    assert state.is_failed()
    assert state.message
    assert "\n" not in state.message
    assert "Traceback" not in state.message
    assert str(tmp_path) not in state.message
    assert (served.results(), served.failures()) == ([], {})
