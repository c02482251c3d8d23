"""Without the secret nothing is possible, and with a foreign host name nothing either. No run chooses its command."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.server.api.server import create_app
from prefect.settings import PREFECT_SERVER_API_AUTH_STRING, temporary_settings
from prefect.states import Cancelling, Completed, Crashed, Running
from prefect.workers.process import ProcessJobConfiguration
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from flows.devices.tickets import read_queue
from flows.machine.environment import product_folder
from flows.server import run, watch
from flows.server.app import allowed_hosts, application
from flows.server.deploy import Site, job_template
from flows.server.overlap import one_at_a_time
from flows.server.run import known_entrypoints
from flows.server.watch import GONE, Watch, hold_run, lives
from tests.flows.live_server import wait_for

SECRET = "adflows:right"
OPEN = {"/api/health", "/api/ready"}
"""Paths that say only whether the server lives."""
SOCKETS = (
    "/api/events/in",
    "/api/events/out",
    "/api/logs/out",
    "/api/task_runs/subscriptions/scheduled",
    "/api/work_pools/adflows/workers/connect",
)


@pytest.fixture
def app() -> Iterator[Any]:
    """Yield the application of a server with a secret. Prefect keeps it for equal settings."""
    with temporary_settings({PREFECT_SERVER_API_AUTH_STRING: SECRET}):
        yield application()


def authorization(secret: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}


def statuses(app: Any, headers: dict[str, str]) -> dict[tuple[str, str], int]:
    """Return the status of a request to every operation of the API, by method and path."""
    prefect_app: Any = create_app(final=True)  # the one inside, which Prefect keeps
    operations = [
        (method.upper(), f"/api{path.replace('{', '').replace('}', '')}")
        for path, methods in prefect_app.api_app.openapi()["paths"].items()
        for method in methods
    ]

    async def ask() -> dict[tuple[str, str], int]:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:4200") as client:
            return {
                (method, path): (await client.request(method, path, headers=headers, json={})).status_code
                for method, path in operations
            }

    return asyncio.run(ask())


@pytest.mark.parametrize("headers", [{}, authorization("adflows:wrong"), {"Authorization": "Bearer right"}])
def test_without_the_secret_no_operation_is_possible(app: Any, headers: dict[str, str]) -> None:
    found = statuses(app, headers)
    assert len(found) > 150
    assert {path for (_, path), status in found.items() if status != 401} <= OPEN
    changing = ("create_flow_run", "/deployments", "/work_pools", "/block_documents", "/automations", "/flow_runs")
    for part in changing:
        assert any(part in path for _, path in found), part


def test_a_foreign_host_is_refused_even_with_the_secret(app: Any) -> None:
    found = statuses(app, authorization(SECRET) | {"Host": "evil.example:4200"})
    assert set(found.values()) == {400}


@pytest.mark.parametrize("path", SOCKETS)
def test_no_connection_is_kept_without_the_secret(app: Any, path: str) -> None:
    client = TestClient(app, base_url="http://127.0.0.1:4200")

    def connect(token: str | None) -> None:
        with client.websocket_connect(path, subprotocols=["prefect"]) as socket:
            socket.send_json({"type": "auth", "token": token})
            socket.receive_json()

    for token in ("adflows:wrong", "", None):
        with pytest.raises(WebSocketDisconnect):
            connect(token)
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(path, headers={"Host": "evil.example"}):
        pass


def test_the_hosts_are_those_that_an_administrator_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "PREFECT_UI_URL", "ADFLOWS_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    assert allowed_hosts() == ["127.0.0.1", "localhost"]
    monkeypatch.setenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "http://127.0.0.1:4200,https://Flows.example.org, *")
    monkeypatch.setenv("ADFLOWS_HOSTS", "server, *,gpu1")
    assert allowed_hosts() == ["127.0.0.1", "localhost", "flows.example.org", "server", "gpu1"]


@pytest.mark.usefixtures("prefect_server")
def test_a_run_cannot_choose_its_command(tmp_path: Path) -> None:
    template = job_template(Site(tmp_path, tmp_path, "pool", "box", 60))
    hostile = {"command": "touch owned", "env": {"PATH": "/evil"}, "env.LD_PRELOAD": "evil.so", "working_dir": "/"}
    more = {"labels": {"a": "b"}, "stream_output": False, "name": "mine"}

    async def configuration(values: dict[str, Any]) -> ProcessJobConfiguration:
        async with get_client() as client:
            return await ProcessJobConfiguration.from_template_and_values(template, values, client=client)

    changed, plain = asyncio.run(configuration(hostile | more)), asyncio.run(configuration({}))
    assert changed.model_dump() == plain.model_dump() | {"name": "mine"}
    assert plain.command == "python -m flows.server.run"
    assert plain.env == {}
    assert plain.working_dir == tmp_path


def test_a_worker_runs_the_deployments_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = known_entrypoints()
    assert ours["liver-nightly"] == "flows.server.deployments.liver_nightly"
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"deployments": [{"name": "own", "entrypoint": "own.flow"}]}), encoding="utf-8")
    monkeypatch.setenv("ADFLOWS_DEPLOYMENTS", str(own))
    assert known_entrypoints() == ours | {"own": "own.flow"}


@pytest.mark.usefixtures("prefect_server")
def test_an_unknown_deployment_is_refused_whatever_its_entry_point() -> None:
    with get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("evil")
        for name, entrypoint in (("evil", "os.system"), ("liver-nightly", "os.system")):
            deployment = client.create_deployment(flow, name, entrypoint=entrypoint)
            made = client.create_flow_run_from_deployment(deployment)
            found = run._entrypoint(made.id)
            state = client.read_flow_run(made.id).state
            assert state is not None
            if name == "evil":
                assert found is None
                assert state.type is StateType.FAILED
                assert "evil: not in this machine's prefect.yaml" in str(state.message)
            else:
                assert found == "flows.server.deployments.liver_nightly"


RELAY = """
import subprocess, sys
from flows.server.run import relay_output
flush = relay_output()
print("first", flush=True)
sys.stdin.readline()
for _ in range(2000):
    print("x" * 100, flush=True)
subprocess.run([sys.executable, "-c", "print('y' * 100000, flush=True)"], check=True)
open(sys.argv[1], "w", encoding="utf-8").write("done")
flush()
"""


def start_relay(done: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(product_folder())}
    command = [sys.executable, "-c", RELAY, str(done)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    process = start_relay(tmp_path / "done")
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    process.wait(60)
    assert (tmp_path / "done").read_text(encoding="utf-8") == "done"


def test_a_run_keeps_all_its_output(tmp_path: Path) -> None:
    out, _ = start_relay(tmp_path / "done").communicate(b"\n", timeout=60)
    assert out == b"first\n" + 2000 * (b"x" * 100 + b"\n") + b"y" * 100000 + b"\n"


class FakeServer:
    """A client that gives one run's state and records what is set."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.set: list[Any] = []

    def read_flow_run(self, run_id: Any) -> Any:
        if self.state is None:
            raise ObjectNotFound(http_exc=ValueError("404"))
        return SimpleNamespace(id=run_id, state=self.state)

    def set_flow_run_state(self, run_id: Any, state: Any, *, force: bool) -> None:
        assert force
        self.set.append(state.type)


@pytest.mark.parametrize(
    ("state", "stops", "sets"),
    [
        (Running(), 0, []),
        (Cancelling(), 1, []),
        (None, 1, []),
        (Completed(), 0, []),
        (Crashed(message="No heartbeat for 180 s: the process was killed"), 0, [StateType.RUNNING] * 2),
        (Crashed(message="Flow run encountered an exception"), 0, []),
    ],
    ids=["running", "cancelling", "deleted", "completed", "false alarm", "crashed"],
)
def test_a_run_looks_at_itself(state: Any, stops: int, sets: list[StateType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE_S", 0)
    stopped: list[bool] = []
    one, server = Watch(uuid4(), lambda: stopped.append(True)), FakeServer(state)
    for _ in range(2):
        one.look(server)  # type: ignore[arg-type]
    assert (len(stopped), one.cancelled, server.set) == (stops, bool(stops), sets)


def test_a_cancelled_run_first_gets_prefects_own_signal() -> None:
    one = Watch(uuid4(), lambda: pytest.fail("too early"))
    one.look(FakeServer(Cancelling()))  # type: ignore[arg-type]
    assert not one.cancelled


@pytest.mark.usefixtures("prefect_server")
def test_after_a_power_cut_only_runs_without_a_process_are_called_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="cut", type="process"))
        deployment = client.create_deployment(
            client.create_flow_from_name("cut"), "cut", work_pool_name="cut", work_queue_name="default"
        )
        dead, alive, late = (client.create_flow_run_from_deployment(deployment) for _ in range(3))
        for made in (dead, alive):
            client.set_flow_run_state(made.id, Running(), force=True)
        with hold_run(alive.id):
            assert lives(alive.id)
            assert watch.end_dead_runs("cut", "elsewhere") == []
            assert watch.end_dead_runs("cut", "default") == [dead.name]
        states = [client.read_flow_run(made.id).state for made in (dead, alive, late)]
    assert [state.type for state in states if state is not None] == [
        StateType.CRASHED, StateType.RUNNING, StateType.SCHEDULED
    ]  # fmt: skip
    assert states[0] is not None
    assert states[0].message == GONE
    assert not lives(alive.id)


def test_a_second_run_waits_and_a_scheduled_one_has_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path))
    monkeypatch.setattr("flows.server.overlap.POLL_S", 0.01)
    context = SimpleNamespace(flow_run=SimpleNamespace(id=uuid4(), name="nightly", auto_scheduled=True))
    monkeypatch.setattr("flows.server.overlap.FlowRunContext.get", lambda: context)
    order: list[str] = []

    def second() -> None:
        with one_at_a_time("inbox", "wait") as other:
            assert other is None
            order.append("second")

    with one_at_a_time("inbox", "skip") as other:
        assert other is None
        with one_at_a_time("inbox", "skip") as holder_of_inbox:
            assert str(holder_of_inbox).startswith("run nightly of user ")
        with one_at_a_time("liver", "skip") as holder_of_liver:
            assert holder_of_liver is None
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    # a run by hand waits too: its user asked for it
    context.flow_run.auto_scheduled = False
    holder = threading.Event()

    def hold() -> None:
        with one_at_a_time("inbox", "skip"):
            holder.set()
            time.sleep(0.2)
            order.append("holder")

    thread = threading.Thread(target=hold)
    thread.start()
    assert holder.wait(30)
    with one_at_a_time("inbox", "skip") as other:
        assert other is None
        order.append("by hand")
    thread.join(30)
    assert order[2:] == ["holder", "by hand"]


def test_runs_of_a_deployment_begin_in_the_order_in_which_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADFLOWS_CACHE", str(tmp_path))
    monkeypatch.setattr("flows.server.overlap.POLL_S", 0.01)
    order: list[int] = []

    def run(number: int) -> None:
        with one_at_a_time("liver", "wait"):
            order.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    with one_at_a_time("liver", "wait"), one_at_a_time("zsad", "wait"):
        for thread in threads:
            before = len(read_queue(tmp_path / "locks" / "deployments"))
            thread.start()
            wait_for("it has a ticket", lambda: len(read_queue(tmp_path / "locks" / "deployments")) > before)  # noqa: B023
    for thread in threads:
        thread.join(30)
    assert order == list(range(6))
