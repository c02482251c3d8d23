"""The cost of an inbox that is watched and receives nothing, for `benchmarks/orchestration.py`."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from benchmarks.command_cost import ROOT, SMALL, environment_of, free_port, wait_for_server
from benchmarks.zsad_timing import Row

SCANS = 3
WATCH_S = 300.0
QUICK_S = 1.0
"""Time between two looks while the server's part is measured. At one look a minute, it would be lost in its own work.
"""
LOOKS_A_DAY = 24 * 60
HOST = "bench"


def time_idle_inbox(folder: Path) -> list[Row]:
    """Measure the watcher for minutes, and the server with and without it."""
    environment = _inbox(folder)
    port = free_port()
    server = ["-m", "flows", "server", "--port", str(port)]
    with _process(environment, *server) as served:
        wait_for_server(f"http://127.0.0.1:{port}/api/health")
        _adflows(environment, "deploy", "--host-name", HOST)
        _adflows(environment, "watch", "--on", "ward")
        time.sleep(30)  # the server's own services have begun
        before = _cpu_s(served)
        time.sleep(WATCH_S)
        alone = _cpu_s(served) - before
        with _watcher(environment, 60.0) as watcher:
            rows, size, cpu = _rows(folder), _database_bytes(folder), _cpu_s(watcher)
            time.sleep(WATCH_S)
            watching = (_cpu_s(watcher) - cpu) * 86400 / WATCH_S
            more_rows, more_bytes = _rows(folder) - rows, _database_bytes(folder) - size
        with _watcher(environment, QUICK_S) as watcher:
            before, cpu = _cpu_s(served), _cpu_s(watcher)
            time.sleep(WATCH_S)
            answering = (_cpu_s(served) - before - alone) * LOOKS_A_DAY * QUICK_S / WATCH_S
            quick = (_cpu_s(watcher) - cpu) * QUICK_S / WATCH_S
    day = watching + max(0.0, answering)
    detail = (
        f"{SCANS} segmented scans; the watcher {watching:.1f} CPU-s a day, from {WATCH_S:.0f} s at one look a minute; "
        f"its questions cost the server {answering:.1f}, from {WATCH_S:.0f} s at one a second ({1000 * quick:.1f} ms "
        f"of the watcher each), less {WATCH_S:.0f} s without"
    )
    stored = f"{more_bytes / 1000:.0f} kB more database in {WATCH_S:.0f} s"
    return [
        Row("i", "an idle day of a watched inbox", day, "CPU-s", "< 120", day < 120, detail),
        Row("i", "runs, task runs and events of idle minutes", more_rows, "rows", "= 0", more_rows == 0, stored),
    ]


def _inbox(folder: Path) -> dict[str, str]:
    """Create an inbox whose scans are segmented. Return the environment of its server."""
    from medad.cohort.phantom import write_btcv_phantoms

    write_btcv_phantoms(folder / "scans", SCANS, seed=3, **SMALL)
    for number, scan in enumerate(sorted((folder / "scans" / "img").iterdir())):
        case = folder / "inbox" / f"case-{number}"
        case.mkdir(parents=True)
        shutil.copy(scan, case / "scan.nii.gz")
    values = {"name": "ward", "inbox": str(folder / "inbox"), "out": str(folder / "results"), "unchanged_s": 3}
    config = folder / "configs" / "inbox" / "ward.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(values | {"scans": "*/scan.nii.gz"}), encoding="utf-8")
    environment = environment_of(folder) | {"ADFLOWS_CONFIGS": str(folder / "configs"), "PYTHONPATH": str(ROOT)}
    _adflows(environment | {"ADFLOWS_LOCAL": "1"}, "liver", "inbox", "ward")
    return environment


def _adflows(environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "flows", *arguments]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def _process(environment: dict[str, str], *arguments: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, *arguments], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _watcher(environment: dict[str, str], seconds: float) -> Iterator[int]:
    """Run a watcher after its start, which reads the inbox twice."""
    program = (
        "from flows.machine.own_server import prepare_prefect; prepare_prefect()\n"
        "from flows.server.inbox_watch import main; main()"
    )
    own = environment | {"ADFLOWS_WATCH_SECONDS": str(seconds)}
    with _process(own, "-c", program, "adflows", HOST) as pid:
        time.sleep(10 + 2 * seconds)
        yield pid


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its descendants that live."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text(encoding="ascii").split()[0])
        total += sum(int(1e9 * _cpu_s(int(child))) for child in (task / "children").read_text(encoding="ascii").split())
    return total / 1e9


def _rows(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / "prefect" / "prefect.db")) as database:
        tables = ("flow_run", "task_run", "events")
        return sum(database.execute(f"select count(*) from {table}").fetchone()[0] for table in tables)


def _database_bytes(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / "prefect" / "prefect.db")) as database:
        database.execute("pragma wal_checkpoint(passive)")
        pages, size = (database.execute(f"pragma {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return int(pages * size)
