"""The cost of the orchestration: a fully cached run, the demo, and the digest of a scan.

    python benchmarks/orchestration.py [--only a,b,c,d,e,f,g,h,i] [--scans 500] [--json FILE]

a  the command `adflows liver run` with 130 cached volumes.
b  the command `adflows demo` with an empty cache, compared with its steps in one process without Prefect, in CPU time
   of all processes. The difference is due to Prefect, its server, child processes and the run folder.
c  the digest of a compressed scan of 46 MB.
d  steps by hand on a small scan, in CPU time of all processes.
e  a cached command beside a running server.
f  `adflows liver segment` with many small scans (`--scans`): CPU time beside the networks, memory and database.
g  the idle time of the CPU's slot between two device steps of one run, with a running server.
h  a training beside short steps, compared with the same work one after another.
i  a watched inbox without new scans: CPU time of a day, and rows in the database. It takes 17 minutes.

All data is generated and removed again. The demo's samples and weights are downloaded or generated first; this is not
timed. The command's database exists before, as in every use except the first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VOLUMES = 130
DEVICE_STEPS = 16
SCAN_BYTES = 46_000_000
TINY: dict[str, Any] = {
    "name": "many",
    "gpus": "cpu",
    "train_data": {"root": "", "layout": "btcv"},
    "test_data": {"root": "", "layout": "lits"},
    "preprocess": {"slice_px": 64},
    "synthesis": {"blur_sigma_px": 4.0, "ellipse_px": 3},
    "restoration": {"widths": [8, 16, 32], "groups": 4},
    "segmentation": {"widths": [8, 16, 32], "groups": 4},
    "train": {"restoration": {"epochs": 1}, "segmentation": {"epochs": 1}},
}
"""Settings with tiny networks. Their size does not matter, because the timed run finds all results cached."""


def run_command(folder: Path, *arguments: str) -> tuple[dict[str, Any], float]:
    """Run the command line with a new cache and database. Return its answer and its seconds, with Python's start."""
    environment = os.environ | {
        "ADFLOWS_CACHE": str(folder / "cache"),
        "ADFLOWS_SLOTS": str(folder / "slots"),
        "PREFECT_HOME": str(folder / "prefect"),
    }
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "flows", *arguments, "--json"],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    seconds = time.perf_counter() - started
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer, seconds


def time_cached_run(folder: Path) -> Any:
    import yaml

    from benchmarks.zsad_timing import Row
    from medad.cohort.phantom import write_btcv_phantoms, write_lits_phantoms

    size: dict[str, Any] = {"shape": (48, 40, 10), "spacing_mm": (7.0, 7.0, 12.0)}
    write_btcv_phantoms(folder / "btcv", 1, seed=1, **size)
    write_lits_phantoms(folder / "lits", VOLUMES, seed=2, **size)
    values = json.loads(json.dumps(TINY))
    values["train_data"]["root"], values["test_data"]["root"] = str(folder / "btcv"), str(folder / "lits")
    (folder / "many.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    run = ("liver", "run", str(folder / "many.yaml"), "--out", str(folder / "runs"))
    first, filling = run_command(folder, *run)
    again, seconds = run_command(folder, *run)
    assert (again["computed"], again["cached"]) == (0, first["computed"])
    tasks = again["cached"]
    detail = f"{tasks} tasks, {1000 * seconds / tasks:.0f} ms a task; computing them took {filling:.0f} s"
    return Row("a", f"liver run of {VOLUMES} volumes, all cached", seconds, "s", "< 30", seconds < 30, detail)


def run_bare_steps() -> None:
    """Run both demos' steps, one after another, without Prefect."""
    from flows.machine.own_server import prepare_prefect

    prepare_prefect()
    from benchmarks.bare_steps import run_liver, run_zsad

    run_liver()
    run_zsad()


def time_digest(folder: Path) -> Any:
    import gzip

    import numpy as np

    from benchmarks.zsad_timing import Row
    from medad.ct.io import source_digest

    scan = folder / "scan.nii.gz"
    rng = np.random.default_rng(0)
    with scan.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1) as stream:
        while raw.tell() < SCAN_BYTES:  # noise as in CT, int16; it hardly compresses
            stream.write((rng.normal(0, 30, 1 << 20) + 100).astype("<i2").tobytes())
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        source_digest(scan)
        seconds.append(time.perf_counter() - started)
    size, best = scan.stat().st_size / 1e6, sorted(seconds)[2]
    rate = size / best
    detail = f"{size:.1f} MB in {best:.3f} s, the median of 5; the file was in memory"
    return Row("c", "digest of a compressed scan", rate, "MB/s", ">= 80", rate >= 80, detail)


def time_idle_device(folder: Path) -> Any:
    from benchmarks.command_cost import free_port
    from benchmarks.zsad_timing import Row

    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {
        "ADFLOWS_CACHE": str(folder / "cache"),
        "ADFLOWS_SLOTS": str(folder / "slots"),
        "PREFECT_HOME": str(folder / "prefect"),
        "PYTHONPATH": str(ROOT),
        "PREFECT_API_URL": url,
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "flows", "server", "--port", str(port)],
        env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.5)
        command = [sys.executable, "-m", "benchmarks.device_steps", str(DEVICE_STEPS)]
        done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    finally:
        server.terminate()
        server.wait()
    times = json.loads(done.stdout)
    # a cold fork server loads libraries before the second step
    gaps = sorted(later[0] - earlier[1] for earlier, later in itertools.pairwise(times[1:]))
    median = gaps[len(gaps) // 2]
    work = sum(end - began for began, end, _ in times) / len(times)
    detail = f"median of {len(gaps)} gaps, longest {gaps[-1]:.2f} s, between steps of {work:.2f} s"
    return Row("g", "idle device between two steps of a run", median, "s", "<= 0.2", median <= 0.2, detail)


def time_shared_cpu(folder: Path) -> Any:
    os.environ |= {"ADFLOWS_CACHE": str(folder / "cache"), "ADFLOWS_SLOTS": str(folder / "slots")}
    from benchmarks.device_steps import run_beside
    from benchmarks.zsad_timing import Row

    run_beside(folder, 1, 1, 1, beside=False)  # the fork server loads its libraries
    work = (600, 40, 8)
    before = run_beside(folder, *work, beside=False)
    shared = run_beside(folder, *work, beside=True)
    after = run_beside(folder, *work, beside=False)
    ratio = (before.both + after.both) / 2 / shared.both
    short = 2 * shared.short / (before.short + after.short)
    alone, beside = ([f"{value:.0f}" for value in one.memory] for one in (before, shared))
    detail = (
        f"one after another {before.both:.1f} and {after.both:.1f} s, beside each other {shared.both:.1f} s; the short"
        f" steps take {short:.2f} times their time alone instead of waiting {before.training:.1f} s; memory"
        f" of the steps {' and '.join(beside)} MB, alone {' and '.join(alone)} MB"
    )
    return Row(
        "h", "throughput of a training and short steps that share the CPU", ratio, "x", ">= 0.9", ratio >= 0.9, detail
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="a,b,c,d,e,f,g,h,i", help="letters to measure")
    parser.add_argument("--scans", type=int, default=100, help="number of scans of part f")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        run_bare_steps()
        return
    from benchmarks.command_cost import time_demo, time_hand_steps, time_many_scans, time_second_command
    from benchmarks.idle_inbox import time_idle_inbox
    from benchmarks.zsad_timing import fresh_folder

    parts: dict[str, Callable[[Path], Any]] = {
        "a": time_cached_run,
        "b": time_demo,
        "c": time_digest,
        "d": time_hand_steps,
        "e": time_second_command,
        "f": functools.partial(time_many_scans, scans=arguments.scans),
        "g": time_idle_device,
        "h": time_shared_cpu,
        "i": time_idle_inbox,
    }
    rows = []
    for letter, measure in parts.items():
        if letter in arguments.only:
            print(letter, file=sys.stderr)
            with fresh_folder() as folder:
                measured = measure(folder)
                rows += measured if isinstance(measured, list) else [measured]
    print(f"{os.cpu_count()} cores, {platform.machine()}\n")
    print("| | figure | value | limit | | behind it |\n|---|---|---|---|---|---|")
    for row in rows:
        verdict = "kept" if row.kept else "MISSED"
        print(f"| {row.part} | {row.what} | {row.value:.3g} {row.unit} | {row.limit} | {verdict} | {row.detail} |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(row.kept for row in rows) else 1)


if __name__ == "__main__":
    # Python puts the script's folder first, and it has a zsad.py
    sys.path[0] = str(ROOT)
    main()
