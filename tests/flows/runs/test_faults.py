"""Faults that only whole processes show: kill -9, real servers, and the embedded server."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.store.digests import file_sha256
from tests.flows.live_server import HANGS_S, free_port, wait_for

pytestmark = pytest.mark.slow


def start(arguments: list[object], **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows", *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=os.environ | environment, **pipes)


def finish(process: subprocess.Popen[str], code: int = 0) -> Any:
    out, err = process.communicate(timeout=HANGS_S)
    assert process.returncode == code, err
    return json.loads(out)


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(
    new_world: Callable[..., Any], prefect_server: str, tmp_path: Path
) -> None:
    world = new_world(tmp_path, train=1, test=0)
    options = ["liver", "train", world.config, "--json", "--set", "train.restoration.epochs=60"]
    options += ["--set", "train.checkpoint_minutes=0.002"]

    def go(cache: str, runs: str) -> subprocess.Popen[str]:
        where = {"ADFLOWS_CACHE": str(tmp_path / cache), "PREFECT_API_URL": prefect_server}
        return start([*options, "--out", tmp_path / runs], **where)

    killed = go("cache", "runs")
    checkpoints = tmp_path / "cache" / "checkpoints"
    wait_for("it trains", lambda: list(checkpoints.glob("restoration-*")), 120, 0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list((tmp_path / "cache" / "tmp").iterdir()), "it was killed while it worked"

    resumed = Path(finish(go("cache", "runs"))["run_folder"])
    curve = json.loads((resumed / "model" / "restoration" / "curve.json").read_text(encoding="utf-8"))
    assert curve["resumed_at_step"] > 0
    assert not list((tmp_path / "cache" / "tmp").iterdir())
    assert not list(checkpoints.iterdir())

    straight = Path(finish(go("other-cache", "other-runs"))["run_folder"])
    for net in ("restoration", "segmentation"):
        name = f"model/{net}/model.safetensors"
        assert file_sha256(resumed / name) == file_sha256(straight / name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_ends_soon_and_leaves_no_half(
    new_world: Callable[..., Any], prefect_server: str, tmp_path: Path, number: signal.Signals
) -> None:
    world = new_world(tmp_path, train=1, test=0)
    where = {"ADFLOWS_CACHE": str(tmp_path / "cache"), "PREFECT_API_URL": prefect_server}
    options = ["liver", "train", world.config, "--set", "train.restoration.epochs=1000000"]
    options += ["--set", "train.checkpoint_minutes=0.002", "--out", tmp_path / "runs"]
    process = start(options, **where)
    checkpoints = tmp_path / "cache" / "checkpoints"
    wait_for("it trains", lambda: list(checkpoints.glob("restoration-*")), 120, 0.02)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode not in {0, 2}
    assert not list((tmp_path / "cache" / "tmp").iterdir())
    assert not list((tmp_path / "cache" / "locks").iterdir())
    assert list(checkpoints.iterdir()), "the checkpoint to continue from"
    assert not (tmp_path / "cache" / "restoration").exists()


def test_two_runs_at_once_compute_each_task_once(
    new_world: Callable[..., Any], prefect_server: str, tmp_path: Path
) -> None:
    world = new_world(tmp_path, train=2, test=1)
    where = {"ADFLOWS_CACHE": str(tmp_path / "cache"), "PREFECT_API_URL": prefect_server}
    both = [start(["liver", "run", world.config, "--json", "--out", tmp_path / name], **where) for name in ("a", "b")]
    answers = [finish(process) for process in both]
    tasks = 2 + 3 + 3
    assert sum(answer["computed"] for answer in answers) == tasks
    assert sum(answer["cached"] for answer in answers) == tasks


@pytest.fixture
def real_server(tmp_path: Path) -> Iterator[str]:
    """Run `prefect server start` with a new database."""
    from flows.machine.environment import PREFECT_DEFAULTS

    port = free_port()
    home = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1"}
    with (tmp_path / "server.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | PREFECT_DEFAULTS | home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}/api"

    def healthy() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, (tmp_path / "server.log").read_text(encoding="utf-8")
            return False

    try:
        wait_for("the server answers", healthy, 120)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def test_a_real_server_holds_the_run_and_fires_schedules(
    real_server: str, new_world: Callable[..., Any], tmp_path: Path
) -> None:
    """Check that schedules fire. With SQLAlchemy 2.1 the server looks healthy, but no schedule ever fires."""
    world = new_world(tmp_path, train=1, test=1)
    where = {"ADFLOWS_CACHE": str(tmp_path / "cache"), "PREFECT_API_URL": real_server}
    options = ["liver", "run", world.config, "--json", "--out", tmp_path / "runs"]
    assert finish(start(options, **where))["computed"] == 7
    assert finish(start(options, **where))["cached"] == 7

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    async def look() -> tuple[list[str], list[str | None], int]:
        async with PrefectClient(real_server) as client:
            runs = await client.read_flow_runs()
            # the server records tasks from events, shortly after they end
            for _ in range(100):
                tasks = await client.read_task_runs()
                if sum(task.state_name == "Cached" for task in tasks) >= 7:
                    break
                await asyncio.sleep(0.2)
            flow_id = await client.create_flow_from_name("liver")
            deployment = await client.create_deployment(
                flow_id=flow_id,
                name="nightly",
                schedules=[DeploymentScheduleCreate(schedule=CronSchedule(cron="* * * * *"))],
            )
            scheduled = 0
            for _ in range(150):
                found = await client.read_flow_runs()
                scheduled = sum(run.deployment_id == deployment for run in found)
                if scheduled:
                    break
                await asyncio.sleep(0.2)
            return [run.name for run in runs], [task.state_name for task in tasks], scheduled

    names, states, scheduled = asyncio.run(look())
    assert names == ["liver tiny", "liver tiny"]
    assert (states.count("Completed"), states.count("Cached")) == (7, 7)
    assert scheduled > 0


def test_the_embedded_server_needs_no_set_up(new_world: Callable[..., Any], tmp_path: Path) -> None:
    world = new_world(tmp_path, train=1, test=0)
    scan = world.btcv / "img" / "img0001.nii.gz"
    where = {"ADFLOWS_CACHE": str(tmp_path / "cache"), "PREFECT_HOME": str(tmp_path / "home")}
    answer = finish(start(["liver", "step", "window", scan, "-o", tmp_path / "grey.nii.gz", "--json"], **where))
    assert answer["computed"] == 1
    assert (tmp_path / "grey.nii.gz").is_file()
    assert (tmp_path / "home" / "prefect.db").is_file()


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(
    new_world: Callable[..., Any], prefect_server: str, tmp_path: Path
) -> None:
    """Use a real file system of 256 KB. The test is skipped if none can be mounted."""
    world = new_world(tmp_path, train=1, test=0)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        where = {"ADFLOWS_CACHE": str(small / "cache"), "PREFECT_API_URL": prefect_server}
        process = start(["liver", "train", world.config, "--out", tmp_path / "runs"], **where)
        _, err = process.communicate(timeout=HANGS_S)
        assert process.returncode == 2, err
        assert "no room left" in err
        assert "Traceback" not in err
        assert not list((small / "cache" / "tmp").iterdir())
        for sidecar in (small / "cache").glob("*/*/artifact.json"):
            names = json.loads(sidecar.read_text(encoding="utf-8"))["files"]
            assert all((sidecar.parent / name).is_file() for name in names)
    finally:
        subprocess.run(["umount", str(small)], check=True)
