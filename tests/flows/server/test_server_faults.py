"""On a real server, processes are killed, and every run still gets a visible final state."""

from __future__ import annotations

import http.server
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Pending

from flows.server.automations import FAILURE_AUTOMATION
from tests.flows.live_server import HOST, Live, live, postgres, postgres_bin, processes, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Start a server with flows that wait, without a worker."""
    with live(tmp_path_factory.mktemp("faults")) as site:
        site.start_server()
        site.deploy_held()
        yield site


@pytest.fixture
def worker(site: Live) -> Any:
    return site.start_worker()


def of(site: Live, words: str) -> list[int]:
    """Return the process ids of this site whose command contains these words."""
    return [pid for pid, command in processes(site.mark).items() if words in command]


def kill(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def heard_of(site: Live, run: FlowRun) -> None:
    """Wait until the run's first heartbeat has reached the server."""
    wanted = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": [f"prefect.flow-run.{run.id}"]}}
    with site.client() as client:
        wait_for(
            f"run {run.name} gives a sign of life",
            lambda: client.request("POST", "/events/filter", json={"filter": wanted}).json()["events"],
        )


def test_a_run_killed_with_its_worker_is_called_crashed_when_its_heartbeats_stay_away(site: Live, worker: Any) -> None:
    run = site.ask("liver-held/alone", mark="zombie")
    site.began("zombie")
    heard_of(site, run)
    # the worker's supervisor first: it would restart the worker
    kill([worker.pid])
    kill(of(site, "prefect worker start"))
    kill(of(site, "flows.server.run"))
    assert site.state_of(run) == "Running"
    began = time.monotonic()
    ended = site.ended(run, 240)
    assert ended.state is not None
    assert ended.state.name == "Crashed"
    assert ended.state.message == "No heartbeat for 90 s: the process was killed, or its machine stopped"
    assert time.monotonic() - began > 45  # three heartbeat intervals of 30 s, minus the time that had already passed
    # its place under the limit is free: the next run is not skipped
    site.start_worker()
    following = site.ask("liver-held/alone", mark="next")
    site.began("next")
    site.let_go("next")
    assert site.state_of(site.ended(following)) == "Completed"


def test_a_run_that_ended_is_not_called_crashed_afterwards(site: Live, worker: Any) -> None:
    run = site.ask("liver-held/alone", mark="done")
    site.began("done")
    heard_of(site, run)
    site.let_go("done")
    assert site.state_of(site.ended(run)) == "Completed"
    time.sleep(110)  # the automation would have acted 90 s after the last heartbeat
    assert site.state_of(run) == "Completed"
    assert "Action failed" not in site.log("server.log")  # it did not try to act either


def test_a_run_that_a_worker_took_and_never_began_is_called_crashed(site: Live) -> None:
    site.python(
        "from prefect.client.orchestration import get_client\n"
        "from flows.server.automations import LOST_AUTOMATION, lost_automation\n"
        "with get_client(sync_client=True) as client:\n"
        "    [found] = client.read_automations_by_name(LOST_AUTOMATION)\n"
        "    client.update_automation(found.id, lost_automation(20))\n"
    )
    lost, waiting = site.ask("liver-held/queued", mark="lost"), site.ask("liver-held/queued", mark="waiting")
    with site.client() as client:
        client.set_flow_run_state(lost.id, Pending())
    ended = site.ended(lost, 90)
    assert ended.state is not None
    assert ended.state.name == "Crashed"
    assert "not begun" in (ended.state.message or "")
    assert site.state_of(waiting) in {"Scheduled", "Late"}


def test_a_killed_worker_is_started_again_and_its_run_still_ends(site: Live, worker: Any) -> None:
    run = site.ask("liver-held/queued", mark="orphan")
    site.began("orphan")
    kill(of(site, "prefect worker start"))
    wait_for("the worker is restarted", lambda: "worker: restarted" in site.log("worker.log"))
    site.let_go("orphan")
    ended = site.ended(run, 240)
    assert ended.state is not None
    assert ended.state.name == "Completed"
    following = site.ask("liver-quick/cron")
    assert site.state_of(site.ended(following, 240)) == "Completed"


def test_a_run_that_outlives_its_worker_can_still_be_cancelled(site: Live, worker: Any) -> None:
    run = site.ask("liver-held/alone", mark="cancelled")
    site.began("cancelled")
    kill(of(site, "prefect worker start"))
    with site.client() as client:
        client.set_flow_run_state(run.id, Cancelling())
    ended = site.ended(run, 120)
    assert ended.state is not None
    assert ended.state.name == "Cancelled"
    wait_for("its process is gone", lambda: not of(site, "flows.server.run"), 30)


def test_a_deleted_run_ends(site: Live, worker: Any) -> None:
    run = site.ask("liver-held/alone", mark="deleted")
    site.began("deleted")
    with site.client() as client:
        client.delete_flow_run(run.id)
    wait_for("its process is gone", lambda: not of(site, "flows.server.run"), 60)


def test_a_run_that_ends_while_the_server_is_away_reports_later(site: Live, worker: Any) -> None:
    run, long = site.ask("liver-held/alone", mark="away"), site.ask("liver-held/alone", mark="long")
    site.began("away")
    site.began("long")
    heard_of(site, long)
    site.kill_server()
    site.let_go("away")
    # Prefect's client gives up after 62 s, and three heartbeats are missing after 90 s
    time.sleep(120)
    assert len(of(site, "flows.server.run")) == 2
    site.start_server()
    assert site.state_of(site.ended(run, 60)) == "Completed"
    # the automation would act 90 s after the server's start
    time.sleep(110)
    with site.client() as client:
        for each, states in ((run, {"Running", "Completed"}), (long, {"Running"})):
            seen = [state.name for state in client.read_flow_run_states(each.id)]
            assert set(seen) - {"Scheduled", "Late", "Pending", "Submitting"} == states, seen
    with site.client() as client:
        client.set_flow_run_state(long.id, Cancelling())
    assert site.state_of(site.ended(long, 90)) == "Cancelled"


def test_a_killed_flow_is_called_crashed_at_once_by_its_worker(site: Live, worker: Any) -> None:
    run = site.ask("liver-held/alone", mark="shot")
    site.began("shot")
    kill(of(site, "flows.server.run"))
    ended = site.ended(run, 30)
    assert ended.state is not None
    assert ended.state.name == "Crashed"


def test_a_worker_that_is_told_to_stop_lets_its_run_say_so_and_leaves_no_process(site: Live, worker: Any) -> None:
    run = site.ask("liver-held/alone", mark="stopped")
    site.began("stopped")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(300) == 0
    assert site.state_of(run) == "Crashed"
    assert of(site, "prefect worker start") == of(site, "flows.server.run") == []


@pytest.fixture
def sure_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Start the `site` on PostgreSQL. On a busy machine SQLite can lose an event, because the database is locked."""
    if postgres_bin() is None:
        pytest.skip("PostgreSQL is not installed: its server programs (initdb, postgres) were not found")
    with postgres() as database, live(tmp_path_factory.mktemp("faults"), database=database) as site:
        site.start_server()
        site.deploy_held()
        site.start_worker()
        yield site


class Hook(http.server.BaseHTTPRequestHandler):
    """A handler that stores the bodies of POST requests."""

    said: list[str]

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        self.said.append(self.rfile.read(length).decode())
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Suppress log output."""


@pytest.fixture
def hook() -> Iterator[tuple[str, list[str]]]:
    """Run a webhook on this machine; yields its address and the bodies that it received."""
    said: list[str] = []
    handler = type("OneHook", (Hook,), {"said": said})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/", said
        finally:
            server.shutdown()
            thread.join()


def test_failed_runs_are_told_to_a_notification_block(sure_site: Live, hook: tuple[str, list[str]]) -> None:
    site, (url, said) = sure_site, hook
    site.python(
        "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Block\n"
        f"Block(name='oncall', url={url!r}, json_data={{'subject': '{{{{subject}}}}', 'body': '{{{{body}}}}'}})"
        ".save('oncall')"
    )
    refused = site.adflows("deploy", "step", "--host-name", HOST, "--notify", "custom-webhook/nobody", code=2)
    assert "custom-webhook/nobody" in refused
    assert len(refused.strip().splitlines()) == 1
    for _ in range(2):
        rows = site.deploy("step", "--notify", "custom-webhook/oncall")
    assert [row["status"] for row in rows if row["name"] == FAILURE_AUTOMATION] == ["unchanged"]
    of_others, quick = site.ask("others/others"), site.ask("liver-quick/cron")
    ours = site.ended(site.ask("liver-failing/failing"))
    assert ours.state is not None
    assert ours.state.name == "Failed"
    site.ended(of_others)
    site.ended(quick)
    wait_for("the webhook is called", lambda: said, 60)
    time.sleep(10)
    [told] = said
    message = json.loads(told)
    assert message["subject"] == f"adflows: {ours.name} Failed"
    assert "out of coffee" in message["body"]
