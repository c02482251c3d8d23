"""The promises of prefect.yaml are true on a real server, with SQLite and with PostgreSQL."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelling

from flows.server.automations import FAILURE_AUTOMATION, LOST_AUTOMATION, ZOMBIE_AUTOMATION
from tests.flows.live_server import HOST, POOL, Live, live, postgres, postgres_bin, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, new_world: Callable[..., Any]
) -> Iterator[Live]:
    """Start a server with a worker, our deployments on tiny data sets, and flows that wait."""
    with ExitStack() as stack:
        database = None
        if request.param == "postgresql":
            if postgres_bin() is None:
                pytest.skip("PostgreSQL is not installed: its server programs (initdb, postgres) were not found")
            database = stack.enter_context(postgres())
        root = tmp_path_factory.mktemp(request.param)
        world = new_world(root / "world")
        configs = root / "configs" / "liver"
        configs.mkdir(parents=True)
        (configs / "tiny.yaml").write_text(world.config.read_text(encoding="utf-8"), encoding="utf-8")
        lost = world.config.read_text(encoding="utf-8").replace(str(world.btcv), "/share/MUSTERMANN/btcv")
        (configs / "lost.yaml").write_text(lost.replace(str(world.lits), "/share/MUSTERMANN/lits"), encoding="utf-8")
        endless = yaml.safe_load(world.config.read_text(encoding="utf-8")) | {"name": "endless"}
        endless["train"] = {"restoration": {"epochs": 1_000_000}, "checkpoint_minutes": 0.002}
        (configs / "endless.yaml").write_text(yaml.safe_dump(endless), encoding="utf-8")
        site = stack.enter_context(live(root, database=database))
        site.start_server()
        site.deploy()
        site.deploy_held()
        site.start_worker()
        yield site


def test_deploy_makes_what_is_needed_and_says_so(site: Live) -> None:
    first = {(row["kind"], row["name"]): row["status"] for row in site.answers[0]}
    assert set(first.values()) == {"created"}
    names = {name for kind, name in first if kind == "deployment"}
    assert names == {"liver-nightly", "zsad-weekly", "step", "segment-inbox", "inbox-example"}
    with site.client() as client:
        assert client.read_work_pool(POOL).type == "process"
        for deployment in client.read_deployments():
            if deployment.name in names:
                assert deployment.work_queue_name == HOST
                assert deployment.enforce_parameter_schema
                assert not any(schedule.active for schedule in deployment.schedules)
        for name in (ZOMBIE_AUTOMATION, LOST_AUTOMATION):
            assert [found.name for found in client.read_automations_by_name(name)] == [name]


def test_deploy_again_changes_nothing_and_doubles_nothing(site: Live) -> None:
    site.deploy()  # the deployments of tests have another working folder
    planned = site.deploy("--dry-run")
    again = site.deploy()
    assert planned == again
    assert {row["status"] for row in again if row["kind"] != "deployment"} == {"unchanged"}
    assert {row["status"] for row in again if row["kind"] == "deployment"} == {"updated"}
    with site.client() as client:
        assert len(client.read_automations_by_name(ZOMBIE_AUTOMATION)) == 1
        assert not client.read_automations_by_name(FAILURE_AUTOMATION)
        assert sum(deployment.name == "liver-nightly" for deployment in client.read_deployments()) == 1


def test_what_was_set_on_the_server_outlives_a_deploy_and_reset_puts_it_back(site: Live) -> None:
    def nightly() -> Any:
        with site.client() as client:
            return client.read_deployment_by_name("liver/liver-nightly")

    before = nightly()
    with site.client() as client:
        where = {"id": before.id, "schedule_id": before.schedules[0].id}
        for change in ({"schedule": {"cron": "30 5 * * *", "timezone": "UTC"}}, {"active": True}):
            client.request(
                "PATCH", "/deployments/{id}/schedules/{schedule_id}", path_params=where, json=change
            ).raise_for_status()
        given = {"parameters": {"config": "tiny", "seed": 3}}
        client.request("PATCH", "/deployments/{id}", path_params={"id": before.id}, json=given).raise_for_status()
    site.deploy("liver-nightly")
    kept = nightly()
    assert kept.parameters == {"config": "tiny", "seed": 3}
    assert [(each.schedule.cron, each.active) for each in kept.schedules] == [("30 5 * * *", True)]
    site.deploy("liver-nightly", "--reset")
    reset = nightly()
    assert reset.parameters == before.parameters
    assert [(each.schedule.cron, each.active) for each in reset.schedules] == [
        (before.schedules[0].schedule.cron, False)
    ]


@pytest.mark.parametrize(
    ("deployment", "parameters", "field"),
    [
        ("liver/liver-nightly", {"config": "nowhere"}, "config"),
        ("liver/liver-nightly", {"config": "../../etc/passwd"}, "config"),
        ("liver/liver-nightly", {"config": "tiny", "seed": -1}, "seed"),
        ("liver/liver-nightly", {"config": "tiny", "seed": "many"}, "seed"),
        ("liver/liver-nightly", {"config": "tiny", "name": "a/b"}, "name"),
        ("zsad/zsad-weekly", {"config": "demo", "seeds": []}, "seeds"),
        ("liver-step/step", {"case_id": "/share/MUSTERMANN/scan.nii.gz"}, "case_id"),
        ("liver-step/step", {"case_id": "case-1", "step": "segment"}, "step"),
        ("liver-step/step", {"case_id": "case-1", "settings": {"slice_px": 100}}, "settings"),
        ("liver-step/step", {}, "case_id"),
    ],
)
def test_the_form_rejects_a_bad_value(site: Live, deployment: str, parameters: dict[str, Any], field: str) -> None:
    with pytest.raises(PrefectHTTPStatusError) as refused:
        site.ask(deployment, **parameters)
    assert refused.value.response.status_code == 409
    assert field in refused.value.response.json()["detail"]
    with site.client() as client:
        assert not [run for run in client.read_flow_runs() if run.parameters == parameters and parameters]


def test_a_deployment_runs_through_the_worker(site: Live) -> None:
    ended = site.ended(site.ask("liver/liver-nightly", config="tiny"), 300)
    assert ended.state is not None
    assert ended.state.name == "Completed", ended.state.message
    assert ended.name == "liver tiny"
    folder = site.root / "runs" / "liver" / "tiny"
    assert (folder / "report.html").is_file()
    assert len(list((folder / "masks").iterdir())) == 2
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["name"] == "tiny"
    # the inbox uses the networks of that run, and segments one scan once
    case = site.root / "inbox" / "MUSTERMANN"
    case.mkdir(parents=True)
    for source, target in (("volume", "scan"), ("segmentation", "liver")):
        shutil.copy(site.root / "world" / "lits" / f"{source}-0.nii.gz", case / f"{target}.nii.gz")
    values = {
        "name": "ward",
        "inbox": str(site.root / "inbox"),
        "out": str(site.root / "results"),
        "model": str(folder),
        "scans": "*/scan.nii.gz",
        "livers": "*/liver.nii.gz",
        "liver_labels": [1, 2],
        "unchanged_s": 0,
    }
    config = site.root / "configs" / "inbox" / "ward.yaml"
    config.parent.mkdir()
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    site.deploy()  # the form lists the new inbox
    for _ in range(2):
        ended = site.ended(site.ask("liver-inbox/segment-inbox", config="ward"), 300)
        assert ended.state is not None
        assert ended.state.name == "Completed", ended.state.message
        assert ended.name == "inbox ward"
        results = [path for path in (site.root / "results").iterdir() if (path / "manifest.json").is_file()]
        assert len(results) == 1
    assert "MUSTERMANN" not in site.log("worker.log")


def test_a_step_of_a_registered_scan_is_made_on_demand(site: Live) -> None:
    scan, label = (site.root / "world" / "lits" / f"{name}-0.nii.gz" for name in ("volume", "segmentation"))
    private = site.root / "MUSTERMANN_Erika.nii.gz"
    private.write_bytes(scan.read_bytes())
    case_id = site.python(
        "from pathlib import Path; from flows.privacy.case_ids import register\n"
        f"print(register(Path({str(private)!r}), Path({str(label)!r}), (1, 2)).id)"
    ).strip()
    ended = site.ended(site.ask("liver-step/step", case_id=case_id, step="slice", settings={"slice_px": 64}))
    assert ended.state is not None
    assert ended.state.name == "Completed", ended.state.message
    assert ended.name == f"slice of {case_id}"
    folder = site.root / "runs" / "steps" / case_id / "slice"
    assert [path.name for path in folder.iterdir()] == ["slices.safetensors"]
    again = site.ended(site.ask("liver-step/step", case_id=case_id, step="slice", settings={"slice_px": 64}))
    assert again.state is not None
    assert again.state.message == "0 computed, 3 cached, 0 failed"
    refreshed = site.ended(
        site.ask("liver-step/step", case_id=case_id, step="slice", settings={"slice_px": 64}, refresh=True)
    )
    assert refreshed.state is not None
    assert refreshed.state.message == "1 computed, 2 cached, 0 failed"
    assert "MUSTERMANN" not in site.log("worker.log")


def test_a_run_that_cannot_begin_says_why_in_one_line_and_without_a_path(site: Live) -> None:
    ended = site.ended(site.ask("liver/liver-nightly", config="lost"))
    assert ended.state is not None
    assert ended.state.name == "Failed"
    assert "no such folder" in (ended.state.message or "")
    assert "\n" not in (ended.state.message or "")
    assert "MUSTERMANN" not in (ended.state.message or "")
    assert "MUSTERMANN" not in site.log("worker.log")
    unknown = site.ended(site.ask("liver-step/step", case_id="never-registered"))
    assert unknown.state is not None
    assert unknown.state.name == "Failed"
    assert "never-registered" in (unknown.state.message or "")


def test_a_second_run_waits_where_it_is_to_be_queued(site: Live) -> None:
    first = site.ask("liver-held/queued", mark="queued-1")
    site.began("queued-1")
    second = site.ask("liver-held/queued", mark="queued-2")
    wait_for("the second waits", lambda: site.state_of(second) == "Waiting")
    assert not (site.held / "queued-2.began").exists()
    site.let_go("queued-1")
    assert site.state_of(site.ended(first)) == "Completed"
    wait_for("the second began", (site.held / "queued-2.began").exists, 90)
    site.let_go("queued-2")
    assert site.state_of(site.ended(second)) == "Completed"


def test_a_training_that_is_cancelled_in_the_ui_ends_and_frees_its_device(site: Live) -> None:
    cache = Path(site.environment["ADFLOWS_CACHE"])
    models = sorted(cache.glob("restoration/*"))  # results of other runs
    assert not list(cache.glob("checkpoints/restoration-*"))
    run = site.ask("liver/liver-nightly", config="endless")
    wait_for("it trains", lambda: list(cache.glob("checkpoints/restoration-*")), 120)
    lock = Path(site.environment["ADFLOWS_SLOTS"]) / "cpu.lock"
    assert not is_free(lock)
    with site.client() as client:
        client.set_flow_run_state(run.id, Cancelling())
    ended = site.ended(run)
    assert ended.state is not None
    assert ended.state.name == "Cancelled"
    wait_for("its process is gone, and the device free", lambda: is_free(lock), 30)
    assert sorted(cache.glob("restoration/*")) == models
    assert list(cache.glob("checkpoints/restoration-*")), "the point from which a run continues"


def is_free(lock: Path) -> bool:
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_a_cron_fires(site: Live) -> None:
    def switch(on: bool) -> None:
        with site.client() as client:
            client.update_deployment_schedule(cron.id, cron.schedules[0].id, active=on)

    def fired() -> bool:
        with site.client() as client:
            runs = [run for run in client.read_flow_runs() if run.deployment_id == cron.id and run.auto_scheduled]
        return any(run.state is not None and run.state.name == "Completed" for run in runs)

    with site.client() as client:
        cron = client.read_deployment_by_name("liver-quick/cron")
    switch(True)
    wait_for("a run of the schedule completed", fired, 150)
    switch(False)
