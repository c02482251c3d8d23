"""Engines with two simulated GPUs and 200 tasks that are killed at random.

Never two tasks share a device, and no device is idle.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.devices.engines import EngineTaskRunner, _start_engine
from medad.base.errors import ConfigError
from medad.base.settings import MachineSettings
from tests.flows.device_jobs import is_alive
from tests.flows.live_server import HANGS_S, family, listening, wait_for

TASKS = 200
KILLS = 12
ROOT = Path(__file__).parents[3]
STARTED: list[subprocess.Popen[str]] = []


def begin(engine: str, seed: int, folder: Path, server: str, **environment: str) -> subprocess.Popen[str]:
    environment = {
        "PREFECT_API_URL": server,
        "ADFLOWS_CACHE": str(folder / "cache"),
        "ADFLOWS_SLOTS": str(folder / "slots"),
        "ADFLOWS_PRETEND_GPUS": "2",
        "PYTHONPATH": str(ROOT),
    } | environment
    (folder / "marks").mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "tests" / "flows" / "many_probes.py"), engine, str(TASKS), str(seed)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "cwd": ROOT}
    started = subprocess.Popen([*command, str(folder / "marks")], env=os.environ | environment, **pipes)
    STARTED.append(started)
    return started


@pytest.fixture(autouse=True)
def _leave_no_process() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=120)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=HANGS_S)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def log_of(folder: Path) -> list[tuple[float, str, str, str]]:
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / "marks" / "log").read_text(encoding="utf-8").splitlines()
        return [(float(at), what, device, text) for at, what, device, text in map(str.split, lines)]
    return []


def kill_steps(folder: Path, draw: random.Random, count: int, process: subprocess.Popen[str]) -> int:
    """Kill the processes of `count` steps at random moments. Return how many were killed while they worked."""
    killed = 0
    while killed < count and process.poll() is None:
        time.sleep(draw.uniform(0.0, 0.1))
        device = draw.choice(["gpu-0", "gpu-1"])
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int((folder / "marks" / f"{device}.pid").read_text(encoding="ascii")), signal.SIGKILL)
            killed += 1
    return killed


def check(folder: Path) -> None:
    """Check the log: no two tasks shared a device, every task ran once, and both devices were busy."""
    log = log_of(folder)
    assert [row for row in log if row[1] == "VIOLATION"] == []
    ended = Counter(text for _, what, _, text in log if what == "end")
    assert len(ended) == TASKS
    per_device: dict[str, list[float]] = defaultdict(list)
    for at, what, device, _ in log:
        if what == "begin":
            per_device[device].append(at)
    assert set(per_device) == {"gpu-0", "gpu-1"}
    assert min(map(len, per_device.values())) > TASKS / 4, "both devices were used"
    spans = list(per_device.values())
    overlap = min(max(times) for times in spans) - max(min(times) for times in spans)
    assert overlap > 0.8 * (max(map(max, spans)) - min(map(min, spans))), "both were busy at the same time"


@pytest.mark.parametrize("engine", ["dask", "ray"])
@pytest.mark.parametrize(
    ("address", "words"),
    [("tcp://127.0.0.1:9", "does not answer (Connection refused)"), ("nonsense", "is not an address")],
)
def test_a_cluster_that_does_not_answer_is_one_line(engine: Any, address: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        EngineTaskRunner().use(MachineSettings(engine=engine, engine_address=address))
    assert str(raised.value).startswith(f"engine_address: {address} ")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_cluster_of_this_machine_listens_on_it_alone() -> None:
    runner: Any = _start_engine(MachineSettings(engine="dask", engine_workers=1, gpus="cpu"))
    workers = runner.cluster_kwargs["workers"].values()
    for options in [runner.cluster_kwargs["scheduler"]["options"], *(worker["options"] for worker in workers)]:
        assert (options["host"], options["dashboard_address"]) == ("127.0.0.1", "127.0.0.1:0")


def test_a_flow_reaches_a_worker_by_its_name() -> None:
    from flows.liver.flow import liver

    assert pickle.loads(pickle.dumps(liver.prefect)) is liver.prefect


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("engine", ["threads", "dask", "ray"])
def test_never_two_on_one_device_and_none_idle(engine: str, prefect_server: str, tmp_path: Path) -> None:
    process = begin(engine, 1, tmp_path, prefect_server)
    wait_for("the first step begins", lambda: log_of(tmp_path), 240)
    killed = kill_steps(tmp_path, random.Random(2), KILLS, process)
    members = family(process.pid)
    addresses = {address for address, _ in listening(members)}
    assert addresses == ({"127.0.0.1"} if engine in {"dask", "ray"} else set()), "it listens on this machine only"
    found = answer(process)
    assert killed == KILLS
    wait_for("nothing of it is left", lambda: not any(map(is_alive, members)))
    assert found == {"done": TASKS, "computed": TASKS, "cached": 0, "failures": []}
    check(tmp_path)
    again = answer(begin(engine, 3, tmp_path, prefect_server))
    assert (again["computed"], again["cached"]) == (0, TASKS), "every engine finds the artifacts of the others"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_flows_share_the_devices_though_one_is_killed_again_and_again(prefect_server: str, tmp_path: Path) -> None:
    steady = begin("threads", 1, tmp_path, prefect_server)
    wait_for("steps are done", lambda: len(log_of(tmp_path)) > 10, 240)
    for seed in (2, 3):
        unlucky = begin("threads", seed, tmp_path, prefect_server)
        before = len(log_of(tmp_path))
        wait_for("more are done", lambda before=before: len(log_of(tmp_path)) > before + 30, 240)  # type: ignore[misc]
        time.sleep(2)
        unlucky.kill()
        unlucky.communicate()
    last = begin("threads", 4, tmp_path, prefect_server)
    assert answer(steady)["done"] == answer(last)["done"] == TASKS
    check(tmp_path)
    ended = Counter(text for _, what, _, text in log_of(tmp_path) if what == "end")
    assert max(ended.values()) <= 2, "only results that were not stored when the flow was killed are computed again"
    assert sum(ended.values()) <= TASKS + 4
    assert not list((tmp_path / "cache" / "locks").iterdir())
    assert not list((tmp_path / "cache" / "tmp").iterdir())


def test_an_engine_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("dask", "ray"):
        monkeypatch.setitem(sys.modules, f"prefect_{engine}", None)
        with pytest.raises(ConfigError, match=rf"pip install 'adflows\[{engine}\]'"), EngineTaskRunner() as runner:
            runner.use(MachineSettings.model_validate({"engine": engine}))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_a_flow_gives_the_same_on_any_engine(
    engine: str, new_world: Callable[..., Any], prefect_server: str, tmp_path: Path
) -> None:
    world = new_world(tmp_path, train=1, test=2)
    broken = world.lits / "volume-1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-200])
    environment = {"PREFECT_API_URL": prefect_server, "ADFLOWS_SLOTS": str(tmp_path / "slots")}

    def go(engine: str, cache: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "flows", "liver", "run", str(world.config), "--json"]
        command += ["--set", f"engine={engine}", "--set", "engine_workers=2", "--out", str(tmp_path / engine)]
        done = subprocess.run(
            command, env=os.environ | environment | {"ADFLOWS_CACHE": str(tmp_path / cache)}, capture_output=True,
            encoding="utf-8", cwd=ROOT, timeout=HANGS_S, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert f"{broken}: " in done.stderr, "the terminal names the file"
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    first, other, again = go("threads", "cache"), go(engine, "other-cache"), go(engine, "cache")
    assert first["computed"] == other["computed"] == again["cached"]
    assert [failure["case"] for failure in other["failures"]] == ["lits-1"]
    files = [
        {name: entry["sha256"] for name, entry in json.loads(
            (Path(found["run_folder"]) / "manifest.json").read_text(encoding="utf-8"))["files"].items()
         if not name.endswith("curve.json")}
        for found in (first, other)
    ]  # fmt: skip
    assert files[0].keys() == files[1].keys()
    weights = [name for name in files[0] if name.endswith((".safetensors", ".nii.gz"))]
    assert len(weights) >= 4
    assert {name: files[0][name] for name in weights} == {name: files[1][name] for name in weights}
