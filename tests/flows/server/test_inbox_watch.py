"""The watcher of inboxes: one run for new scans, none for nothing, and few for what cannot be segmented."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import construct_schedule
from prefect.states import Completed, Running

from flows.inbox.arrivals import Arrival
from flows.server.deploy import read_deployments
from flows.server.inbox_watch import HANGS_S, LOOK_VARIABLE, RETRY_S, InboxWatch, Notice, ServerRuns, Watcher, look_s
from flows.server.inboxes import (
    INBOX_FLOW,
    NEVER,
    SWITCH,
    WATCH_TAG,
    WatchedInbox,
    inbox_entries,
    read_watched,
    replace_minutely_runs,
    switch_inbox,
)
from flows.server.run import BY_HAND, entrypoint_of, inbox_deployment
from medad.base.errors import ConfigError, InputError
from medad.cohort.phantom import write_btcv_phantoms
from tests.flows.live_server import Live, live, processes, wait_for

ROOT = Path(__file__).parents[3]
DAY_S = 24 * 3600.0
INBOX = WatchedInbox("ward", uuid4(), "here", uuid4(), on=True)


@dataclass
class FakeNews:
    """An inbox whose news the test sets."""

    scans: set[str] = field(default_factory=set)
    error: Exception | None = None

    def look(self, *, read: bool = False) -> frozenset[Arrival]:
        del read
        if self.error is not None:
            raise self.error
        return frozenset(Arrival(Path(name), None, ()) for name in self.scans)

    def next_look_s(self, longest: float) -> float:
        return longest


@dataclass
class FakeRuns:
    """A server that remembers when runs were created."""

    clock: Callable[[], float]
    busy: bool = False
    made: list[float] = field(default_factory=list)
    asked: int = 0

    def is_busy(self, inbox: WatchedInbox) -> bool:
        self.asked += 1
        return self.busy

    def create(self, inbox: WatchedInbox) -> None:
        self.made.append(self.clock())


class Site:
    """A watch of one inbox, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.news, self.runs = FakeNews(), FakeRuns(lambda: self.now)
        self.watch = self.restarted()

    def restarted(self) -> InboxWatch:
        """Return the watch of a new process."""
        notice = Notice("inbox ward", self.lines.append)
        return InboxWatch(INBOX, self.news, self.runs, notice, clock=lambda: self.now)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += self.watch.step()


@pytest.fixture
def site() -> Site:
    return Site()


def test_nothing_new_asks_the_server_nothing(site: Site) -> None:
    site.pass_time(DAY_S)
    assert (site.runs.made, site.runs.asked, site.lines) == ([], 0, [])


def test_new_scans_get_one_run_even_if_the_watcher_is_killed(site: Site) -> None:
    site.news.scans = {"a", "b"}
    site.pass_time(60)
    assert len(site.runs.made) == 1
    site.runs.busy = True
    site.pass_time(3600)
    site.watch = site.restarted()
    site.pass_time(3600)
    assert len(site.runs.made) == 1
    site.runs.busy, site.news.scans = False, set()
    site.pass_time(DAY_S)
    assert len(site.runs.made) == 1


def test_a_scan_that_arrives_during_a_run_gets_the_next_one(site: Site) -> None:
    site.news.scans = {"a"}
    site.pass_time(60)
    site.runs.busy, site.news.scans = True, {"a", "b"}
    site.pass_time(600)
    assert len(site.runs.made) == 1
    site.runs.busy, site.news.scans = False, {"b"}
    site.pass_time(60)
    assert len(site.runs.made) == 2


def test_what_a_run_leaves_behind_gets_fewer_and_fewer_runs(site: Site) -> None:
    site.news.scans = {"broken"}
    site.pass_time(DAY_S)
    gaps = [later - earlier for earlier, later in zip(site.runs.made, site.runs.made[1:], strict=False)]
    assert gaps[0] == RETRY_S[0]
    assert gaps == sorted(gaps)
    assert gaps[-1] == RETRY_S[1]
    assert len(gaps) < 30
    # a new scan need not wait for that, and one that comes back is new
    site.news.scans = {"broken", "new"}
    site.pass_time(60)
    assert len(site.runs.made) == len(gaps) + 2
    site.news.scans = {"broken"}
    site.pass_time(60)
    site.news.scans = {"broken", "new"}
    site.pass_time(60)
    assert len(site.runs.made) == len(gaps) + 3


def test_a_problem_is_told_when_it_begins_and_when_it_ends(site: Site) -> None:
    site.news.error = InputError("/share/MUSTERMANN", "the inbox: no such folder")
    site.pass_time(DAY_S)
    site.news.error = OSError(116, "Stale file handle", "/share/MUSTERMANN")
    site.pass_time(DAY_S)
    site.news.error, site.news.scans = None, {"a"}
    site.pass_time(60)
    assert site.lines == [
        "inbox ward: the inbox: no such folder",
        "inbox ward: no answer (OSError)",
        "inbox ward: works again",
    ]
    assert len(site.runs.made) == 1


def test_switching_off_and_on_tries_again(site: Site) -> None:
    site.news.scans = {"broken"}
    site.pass_time(60)
    for on in (True, False, True):
        site.watch.switch(on)
    site.pass_time(60)
    assert len(site.runs.made) == 2


def test_a_look_that_hangs_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.server.inbox_watch.read_watched", lambda *_: [])
    watcher = Watcher("pool", "here", 60.0, watches={"ward": site.watch})
    runs = ServerRuns(None)  # type: ignore[arg-type]
    watcher.follow(runs)
    site.watch.looking_since = time.monotonic() - HANGS_S - 1
    for _ in range(3):
        watcher.follow(runs)
    assert site.lines == ["inbox ward: the folder or the server does not answer"]
    assert not site.watch.on


def test_the_time_between_two_looks_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_s() == 60.0
    monkeypatch.setenv(LOOK_VARIABLE, "5")
    assert look_s() == 5.0
    for wrong in ("0", "soon", "nan"):
        monkeypatch.setenv(LOOK_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=LOOK_VARIABLE):
            look_s()


def test_every_inbox_has_a_deployment_with_a_switch_that_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "inbox" / "ward.yaml").touch()
    monkeypatch.setenv("ADFLOWS_CONFIGS", str(tmp_path))
    entries = {entry["name"]: entry for entry in inbox_entries(read_deployments(ROOT))}
    assert set(entries) == {"inbox-example", "inbox-ward"}
    ward = entries["inbox-ward"]
    assert ward["parameters"]["config"] == "ward"
    assert [(each["slug"], each["active"]) for each in ward["schedules"]] == [(SWITCH, False)]
    assert entrypoint_of("inbox-ward") == ward["entrypoint"] == entrypoint_of(BY_HAND)
    assert entrypoint_of("ward") is None
    assert inbox_entries({"deployments": []}) == []


@pytest.fixture
def server(prefect_server: str) -> Iterator[SyncPrefectClient]:
    del prefect_server
    with get_client(sync_client=True) as client:
        yield client


def deployed(client: SyncPrefectClient, name: str, config: str, pool: str, queue: str, **more: Any) -> Any:
    flow = client.create_flow_from_name(INBOX_FLOW)
    made = client.create_deployment(
        flow, name, parameters={"config": config}, work_pool_name=pool, work_queue_name=queue, **more
    )
    return client.read_deployment(made)


def switch() -> DeploymentScheduleCreate:
    return DeploymentScheduleCreate(schedule=construct_schedule(rrule=NEVER, timezone="UTC"), active=False, slug=SWITCH)


def test_the_watcher_and_the_server(server: SyncPrefectClient) -> None:
    pool = f"pool-{uuid4().hex[:8]}"
    server.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    here, there = (f"{queue}-{pool}" for queue in ("here", "there"))
    for queue in (here, there):
        deployed(server, inbox_deployment(queue), queue, pool, queue, tags=[WATCH_TAG], schedules=[switch()])
    assert [each.on for each in read_watched(server, pool)] == [False, False]
    switch_inbox(server, pool, here, on=True)
    [inbox] = read_watched(server, pool, here)
    assert (inbox.config, inbox.queue, inbox.on) == (here, here, True)
    with pytest.raises(ConfigError, match="nowhere"):
        switch_inbox(server, pool, "nowhere", on=True)
    runs = ServerRuns(server)
    assert not runs.is_busy(inbox)
    runs.create(inbox)
    [run] = [each for each in server.read_flow_runs() if each.deployment_id == inbox.deployment]
    assert (run.parameters, run.work_queue_name) == ({"config": here}, here)
    assert runs.is_busy(inbox)
    assert not runs.is_busy(read_watched(server, pool, there)[0])
    server.set_flow_run_state(run.id, Running(name="Waiting"), force=True)
    assert runs.is_busy(inbox)
    server.set_flow_run_state(run.id, Completed(), force=True)
    assert not runs.is_busy(inbox)
    # a run by hand of the form for all inboxes counts too
    by_hand = deployed(server, "any", "example", pool, there)
    server.create_flow_run_from_deployment(by_hand.id, parameters={"config": here})
    assert runs.is_busy(inbox)
    switch_inbox(server, pool, here, on=False)
    assert not read_watched(server, pool, here)[0].on


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.usefixtures("prefect_server")
def test_the_schedule_of_earlier_versions_becomes_the_switch(on: bool) -> None:
    asyncio.run(_replace(on))


async def _replace(on: bool) -> None:
    config = f"ward-{uuid4().hex[:8]}"
    async with get_client() as client:
        pool = f"pool-{config}"
        await client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        flow = await client.create_flow_from_name(INBOX_FLOW)
        minutely = DeploymentScheduleCreate(
            schedule=construct_schedule(interval=60), active=on, slug="each-minute", parameters={"config": config}
        )
        nightly = DeploymentScheduleCreate(schedule=construct_schedule(cron="0 1 * * *"), active=on, slug="nightly")
        old = await client.create_deployment(flow, BY_HAND, work_pool_name=pool, schedules=[minutely, nightly])
        if on:  # nothing would watch its inbox
            assert await replace_minutely_runs(client, [await client.read_deployment(old)], dry_run=False) == []
            assert len((await client.read_deployment(old)).schedules) == 2
        new = await client.create_deployment(
            flow, inbox_deployment(config), work_pool_name=pool, schedules=[switch()], tags=[WATCH_TAG]
        )
        known = [await client.read_deployment(old)]
        planned = await replace_minutely_runs(client, known, dry_run=True)
        assert await client.read_deployment(old) == known[0]
        assert await replace_minutely_runs(client, known, dry_run=False) == planned
        assert [row.name for row in planned] == [config]
        assert [each.slug for each in (await client.read_deployment(old)).schedules] == ["nightly"]
        assert [each.active for each in (await client.read_deployment(new)).schedules] == [on]
        assert await replace_minutely_runs(client, [await client.read_deployment(old)], dry_run=False) == []


def runs_of(site: Live) -> list[Any]:
    with site.client() as client:
        return [run for run in client.read_flow_runs() if run.name.startswith("inbox ")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_watched_inbox_on_a_real_server(tmp_path: Path) -> None:
    inbox, results = tmp_path / "inbox", tmp_path / "results"
    inbox.mkdir()
    write_btcv_phantoms(tmp_path / "scans", 2, seed=3, shape=(32, 32, 8), spacing_mm=(10.0, 10.0, 15.0))
    scans = sorted((tmp_path / "scans" / "img").iterdir())
    values = {"name": "ward", "inbox": str(inbox), "out": str(results), "scans": "*/scan.nii.gz", "unchanged_s": 3}
    config = tmp_path / "configs" / "inbox" / "ward.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(values), encoding="utf-8")

    def drop(case: str, scan: Path) -> None:
        (inbox / case).mkdir()
        shutil.copy(scan, inbox / case / "scan.nii.gz")

    def segmented(count: int) -> None:
        wait_for(f"{count} scans are segmented", lambda: len(list(results.glob("*/manifest.json"))) == count, 300)
        wait_for("the run ended", lambda: all(run.state.is_final() for run in runs_of(running)), 60)

    def watcher() -> int | None:
        found = [pid for pid, command in processes(running.mark).items() if "flows.server.inbox_watch" in command]
        return found[0] if found else None

    with live(tmp_path, more={LOOK_VARIABLE: "2", "ADFLOWS_DEPLOYMENTS": ""}) as running:
        running.start_server()
        running.deploy()
        running.start_worker()
        assert "off ward" in running.adflows("watch", "--pool", "testpool")
        drop("MUSTERMANN", scans[0])
        time.sleep(10)
        assert runs_of(running) == []
        assert "on  ward" in running.adflows("watch", "--on", "ward", "--pool", "testpool")
        segmented(1)
        assert [run.state.message for run in runs_of(running)] == ["1 segmented"]
        # many looks without news; the watcher is killed in between and when a scan has arrived
        for _ in range(2):
            time.sleep(15)
            os.kill(wait_for("the watcher runs", watcher), signal.SIGKILL)
        drop("MUELLER", scans[1])
        time.sleep(3)
        os.kill(wait_for("the watcher runs again", watcher), signal.SIGKILL)
        segmented(2)
        time.sleep(15)
        assert len(runs_of(running)) == 2
        assert all(not run.auto_scheduled for run in runs_of(running))
        inbox.rename(tmp_path / "away")
        wait_for("the missing folder is told", lambda: "no such folder" in running.log("worker.log"))
        time.sleep(10)
        (tmp_path / "away").rename(inbox)
        wait_for("its return is told", lambda: "works again" in running.log("worker.log"))
        log = running.log("worker.log")
        assert (log.count("no such folder"), log.count("works again")) == (1, 1)
        assert "MUSTERMANN" not in log
