"""CPU time, memory and database of whole commands, for `benchmarks/orchestration.py`.

A command's CPU time contains that of all its processes, also of those that outlive it, such as fork servers. So this
process adopts and waits for them.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.zsad_timing import Row

ROOT = Path(__file__).resolve().parents[1]
PR_SET_CHILD_SUBREAPER = 36
SMALL: dict[str, Any] = {"shape": (32, 32, 8), "spacing_mm": (10.0, 10.0, 15.0)}
"""Size of the scans. The cost beside the networks hardly depends on it."""
LABELS = ("--liver-label", "6")
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


def cost_of(environment: dict[str, str], *arguments: str) -> Cost:
    """Run the command line and wait for all its processes."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reader, writer = os.pipe()
    started = time.perf_counter()
    spawned = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "flows", *arguments, "--json"],
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
    while True:
        try:
            pid, status, used = os.wait4(-1, 0)
        except ChildProcessError:
            break
        if pid == spawned:
            wall_s = time.perf_counter() - started
            if status:
                raise RuntimeError(f"adflows {' '.join(arguments[:3])} ended with status {status}")
        cpu_s += used.ru_utime + used.ru_stime
    return Cost(json.loads(text), wall_s, cpu_s, peak[0])


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
    networks = _network_seconds(folder / "cache-2") - _network_seconds(folder / "cache-1")
    more = scans - FEW
    cpu = (costs[2].cpu_s - costs[1].cpu_s - networks) / more
    growth = (costs[2].peak_mb - costs[1].peak_mb) / more
    stored = (sizes[2] - sizes[1]) / more / 1000
    times = (
        f"{scans} scans: {costs[2].cpu_s:.0f} CPU-s, {costs[2].wall_s:.0f} s; networks {networks / more:.2f} s a scan"
    )
    peaks = f"{costs[1].peak_mb:.0f} MB with {FEW} scans, {costs[2].peak_mb:.0f} MB with {scans}"
    return [
        Row("f", "segment, one more small scan", cpu, "CPU-s", "< 0.6", cpu < 0.6, times),
        Row("f", "memory for one more scan", growth, "MB", "< 0.1", growth < 0.1, peaks),
        Row("f", "database for one more scan", stored, "kB", "< 20", stored < 20, f"{sizes[2] / 1000:.0f} kB in all"),
    ]


def _database_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "prefect").glob("prefect.db*"))


def _network_seconds(cache: Path) -> float:
    """Return the time in networks: all of the step that checks a liver, and a part of the one that segments."""
    checks = [json.loads(file.read_bytes())["seconds"] for file in (cache / "liver-check").glob("*/artifact.json")]
    segmented = [json.loads(file.read_bytes())["network_seconds"] for file in (cache / "segment").glob("*/case.json")]
    return float(sum(checks) + sum(segmented))


def time_second_command(folder: Path) -> list[Row]:
    """Measure a cached command with its own server, and beside a server that runs."""
    from medad.cohort.phantom import write_btcv_phantoms

    write_btcv_phantoms(folder / "scans", 1, seed=1, **SMALL)
    scan, liver = (str(next((folder / "scans" / name).iterdir())) for name in ("img", "label"))
    command = ("liver", "segment", scan, "--liver", liver, *LABELS, "-o", str(folder / "out"), "--set", "gpus=cpu")
    environment = environment_of(folder)
    cost_of(environment, *command)
    alone = cost_of(environment, *command)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}/api"
        _wait_for_server(f"{url}/health")
        beside = _cost_beside(environment | {"PREFECT_API_URL": url}, *command)
    finally:
        server.terminate()
        server.wait()
    detail = f"one cached scan; with its own server {alone.wall_s:.1f} s and {alone.cpu_s:.1f} CPU-s"
    return [Row("e", "a command beside a running server", beside, "s", "< 3", beside < 3, detail)]


def _cost_beside(environment: dict[str, str], *command: str) -> float:
    """Return the seconds of a command. The server is a child too, so its processes are not waited for."""
    started = time.perf_counter()
    arguments = [sys.executable, "-m", "flows", *command, "--json"]
    subprocess.run(arguments, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def _wait_for_server(address: str) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
