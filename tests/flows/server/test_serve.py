"""`adflows serve`: it can only be reached from this machine, leaves nothing running, and needs no network."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.machine.environment import product_folder
from flows.server.ui_policy import POLICY
from medad.cohort.samples import PHANTOM_NOTE
from tests.flows.live_server import HOST, POOL, Live, kill_marked, listening, live, processes, wait_for
from zsad.embedded.samples import INSERTED_NOTE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def serve(site: Live, *options: str) -> subprocess.Popen[bytes]:
    """Start `adflows serve` with its output in serve.log."""
    (site.root / "serve.log").unlink(missing_ok=True)
    arguments = ("--port", str(site.port), "--pool", POOL, "--host-name", HOST, *options)
    return site.start("-m", "flows", "serve", *arguments, log="serve.log")


def ready(site: Live, process: subprocess.Popen[bytes]) -> None:
    wait_for(
        "serve is ready",
        lambda: process.poll() is not None or f"Worker '{HOST}' started" in site.log("serve.log"),
        240,
    )
    assert process.poll() is None, site.log("serve.log")


def stop(site: Live, process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    process.send_signal(number)
    assert process.wait(300) == 0, site.log("serve.log")
    assert processes(site.mark) == {}


def test_serve_runs_everything_and_leaves_nothing(tmp_path: Path) -> None:
    with live(tmp_path) as site:
        process = serve(site)
        ready(site, process)
        log = site.log("serve.log")
        assert f"server: http://127.0.0.1:{site.port}" in log
        assert "created   deployment liver-nightly" in log
        addresses = listening(set(processes(site.mark)))
        assert ("127.0.0.1", site.port) in addresses
        assert {host for host, _ in addresses} == {"127.0.0.1"}
        # a page of another site, open in a browser here, can post, but it cannot get the token
        request = urllib.request.Request(f"{site.url}/work_pools/filter", data=b"{}", method="POST")
        request.add_header("Content-Type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 403
        refused.value.close()
        assert "another adflows server" in site.adflows("serve", "--port", "1", code=2)
        # a dead server is restarted, and the worker continues
        [server] = [pid for pid, command in processes(site.mark).items() if "flows.server.app" in command]
        os.kill(server, signal.SIGKILL)
        wait_for("the server is restarted", lambda: "server: restarted" in site.log("serve.log"))
        wait_for("the server answers again", site.healthy, 120)
        site.deploy_held()
        assert site.state_of(site.ended(site.ask("liver-quick/cron"), 180)) == "Completed"
        run = site.ask("liver-held/alone", mark="going")
        site.began("going")
        stop(site, process)
        assert "worker: ending the run" in site.log("serve.log")
        again = serve(site)
        ready(site, again)
        assert site.state_of(run) == "Crashed"
        assert "unchanged automation" in site.log("serve.log")
        stop(site, again, signal.SIGINT)


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with live(tmp_path) as site, socket.socket() as taken:
        taken.bind(("127.0.0.1", site.port))
        taken.listen()
        said = site.adflows("serve", "--port", str(site.port), code=2)
        assert str(site.port) in said
        assert len(said.strip().splitlines()) == 1


def test_with_a_secret_nobody_else_is_served(tmp_path: Path) -> None:
    with live(tmp_path, more={"PREFECT_SERVER_API_AUTH_STRING": "adflows:s3cret"}) as site:
        process = serve(site)
        ready(site, process)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{site.url}/admin/version", timeout=10)
        assert refused.value.code == 401
        refused.value.close()
        said = site.adflows("deploy", "--dry-run", code=2)
        assert "PREFECT_API_AUTH_STRING" in said
        assert len(said.strip().splitlines()) == 1
        site.more["PREFECT_API_AUTH_STRING"] = "adflows:s3cret"
        assert "nothing was changed" in site.adflows("deploy", "--dry-run", "--pool", POOL)
        stop(site, process)


ALONE = """
import json, sys
from pathlib import Path
from tests.flows.live_server import Live
from tests.flows.server.test_serve import PAGES, loaded, log_in, ready, render, serve, stop

root = Path(sys.argv[1])
site = Live(root, port=4299, mark=sys.argv[2])
answer = {}
try:
    process = serve(site)
    ready(site, process)
    log_in(site)
    {do}
    stop(site, process)
finally:
    site.close()
print(json.dumps(answer))
"""
"""Script for a separate process: a server, its worker, and the actions of one test."""

RUN_AND_LOOK = """
    answer["page"], answer["files"] = loaded("http://127.0.0.1:4299/")
    answer["state"] = site.state_of(site.ended(site.ask("liver/liver-nightly", config="tiny"), 300))
    answer["browser"] = {page: render(f"http://127.0.0.1:4299/{page}", root) for page in PAGES}
"""

DEMO = """
    answer["demo"] = json.loads(site.adflows("demo", "--out", str(root / "runs"), "--json", seconds=2400))
    answer["browser"] = {"v2/runs": render("http://127.0.0.1:4299/v2/runs", root)}
"""

PAGES = {
    "dashboard": "Flow Runs",
    "v2/dashboard": "Flow Runs",
    "v2/deployments": "liver-nightly",
    "v2/blocks/catalog": "Slack",
    "blocks/catalog": "Slack",
}
"""Pages of both UIs, each with a text that it shows once it is rendered."""


def log_in(site: Live) -> None:
    """Let the pages of both UIs store the server's secret in the browser, as their login does."""
    secret = base64.b64encode(str(site.secret).encode()).decode()
    for page in (site.root / "home" / "ui").glob("*/index.html"):
        script = f"<head><script>localStorage.setItem('prefect-password', '{secret}')</script>"
        page.write_text(page.read_text(encoding="utf-8").replace("<head>", script), encoding="utf-8")


def loaded(page: str) -> tuple[str, dict[str, int]]:
    """Return the UI's first page, and the sizes of the scripts and styles that it loads."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(page, timeout=30) as answer:
        text = answer.read().decode()
        base = answer.url
    sizes = {}
    for link in re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"([^\"]+\.(?:js|css))\"", text):
        with opener.open(urllib.parse.urljoin(base, link), timeout=30) as answer:
            sizes[link] = len(answer.read())
    return text, sizes


def render(page: str, folder: Path) -> dict[str, Any] | None:
    """Render a page in headless Chromium. Returns its text and the contacted hosts, or None without Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    log, profile = folder / "netlog.json", folder / "profile"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={profile}",
        f"--log-net-log={log}",
        "--virtual-time-budget=30000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [chromium, *options, page], capture_output=True, text=True, check=False, timeout=600, encoding="utf-8"
    )
    events = json.loads(log.read_text(encoding="utf-8", errors="replace"))["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    # the browser also looks for updates; only requests of the page have the page as their initiator
    hosts = {urllib.parse.urlsplit(each["url"]).hostname for each in asked if each["initiator"] in page}
    hosts.discard(None)
    text = re.sub(r"<(script|style)[^>]*>.*?</\1>|<[^>]+>", " ", done.stdout, flags=re.DOTALL)
    return {"text": " ".join(text.split()), "hosts": sorted(str(host) for host in hosts)}


def without_network(tmp_path: Path, do: str, seconds: float) -> dict[str, Any]:
    """Run a server and its worker in a network namespace with only a loopback device, and return the results."""
    alone = ["unshare", "-rn", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "ip link set lo up"], check=False).returncode:
        pytest.skip("network namespaces are not permitted here")
    script = tmp_path / "alone.py"
    script.write_text(ALONE.replace("    {do}\n", do.lstrip("\n")), encoding="utf-8")
    mark = uuid.uuid4().hex
    command = f"ip link set lo up && exec {sys.executable} {script} {tmp_path} {mark}"
    # pip must not find packages in a local folder either
    environment = os.environ | {
        "PYTHONPATH": str(product_folder()),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
    }
    try:
        done = subprocess.run(
            [*alone, command], env=environment, capture_output=True, text=True, check=False, timeout=seconds,
            encoding="utf-8",
        )  # fmt: skip
    finally:
        kill_marked(mark)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_serve_and_its_ui_without_network(tmp_path: Path, new_world: Callable[..., Any]) -> None:
    world = new_world(tmp_path / "world")
    (tmp_path / "configs" / "liver").mkdir(parents=True)
    shutil.copy(world.config, tmp_path / "configs" / "liver" / "tiny.yaml")
    answer = without_network(tmp_path, RUN_AND_LOOK, 2000)
    assert answer["state"] == "Completed"
    assert POLICY in answer["page"]
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//[^\"]+", answer["page"])
    assert any(name.endswith(".js") for name in answer["files"])
    assert any(name.endswith(".css") for name in answer["files"])
    assert all(size > 0 for size in answer["files"].values())
    if shutil.which("chromium") is None:
        pytest.skip("all but the browser's part: Chromium is not installed")
    for page, seen in answer["browser"].items():
        # without the policy both UIs contact other hosts: the second for analytics settings, both for logos
        assert seen["hosts"] == ["127.0.0.1"], page
        assert PAGES[page] in seen["text"], page


@pytest.mark.timeout(3600)
def test_the_demo_without_network(tmp_path: Path) -> None:
    """The demo needs only the installation: no samples, no cache, no weights."""
    answer = without_network(tmp_path, DEMO, 3000)
    flows = answer["demo"]
    assert [flow["failures"] for flow in flows.values()] == [[], [], []]
    assert all(flow["computed"] > 0 for flow in flows.values())
    packaged, trained, zsad = (
        html.unescape((Path(flow["run_folder"]) / "report.html").read_text(encoding="utf-8")) for flow in flows.values()
    )
    for liver in (packaged, trained):
        assert PHANTOM_NOTE in liver, "the report says that no CT was available"
    assert INSERTED_NOTE in zsad
    [(page, seen)] = answer["browser"].items()
    if seen is None:
        pytest.skip("all but the browser's part: Chromium is not installed")
    assert seen["hosts"] == ["127.0.0.1"], page
    assert all(name in seen["text"] for name in ("liver demo_train", "evaluate demo", "zsad demo", "Completed")), seen[
        "text"
    ]
