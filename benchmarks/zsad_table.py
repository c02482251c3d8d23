"""The command line and the table of `benchmarks/zsad.py`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.anomalib_client import Anomalib
from benchmarks.zsad_compare import time_encoding_for_all
from benchmarks.zsad_memory import measure_memory
from benchmarks.zsad_metrics import time_metrics
from benchmarks.zsad_mutual import time_mutual
from benchmarks.zsad_scorer import Bench, compare_with_winclip, time_adaptation, time_attention_paths, time_seeds
from benchmarks.zsad_timing import Plan, Row, describe_machine
from benchmarks.zsad_winclip import compare_with_anomalib as compare_winclip_with_anomalib
from benchmarks.zsad_winclip import time_encoding as time_winclip_encoding
from medad.base.devices import pick_device


def measure(plan: Plan, parts: str, python: Path | None, say: Callable[[str], None]) -> tuple[list[Row], str]:
    """Return all requested rows, and anomalib's versions as text."""
    rows: list[Row] = []
    versions = "anomalib not run"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        anomalib = None
        if python is not None and set(parts) & set("bcg"):
            anomalib = stack.enter_context(Anomalib(python, plan.threads))
            versions = ", ".join(f"{name} {number}" for name, number in anomalib.versions.items())
        # metrics and memory first, before a large model is in memory
        if "c" in parts:
            say("c: metrics")
            rows += time_metrics(plan, anomalib, folder)
        if "f" in parts:
            say("f: memory")
            rows.append(measure_memory(plan))
        if "h" in parts:
            say("h: mutual scoring")
            rows += time_mutual(plan)
        if set(parts) & set("abdegi"):
            say("model, images and features")
            bench = Bench.prepare(plan, folder)
            works: dict[str, Callable[[], list[Row]]] = {
                "a": lambda: [time_attention_paths(bench)],
                "d": lambda: [time_seeds(bench)],
                "e": lambda: [time_adaptation(bench)],
                "b": lambda: [compare_with_winclip(bench, anomalib)],
                "i": lambda: [time_encoding_for_all(bench)],
                "g": lambda: [time_winclip_encoding(bench), *compare_winclip_with_anomalib(bench, anomalib)],
            }
            for part, work in works.items():
                if part in parts:
                    say(part)
                    rows += work()
    return sorted(rows, key=lambda row: row.part), versions


def main(description: str | None) -> None:
    """Run the command line. Exit with 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anomalib-python", type=Path, help="interpreter of an environment with anomalib")
    parser.add_argument("--only", default="a,b,c,d,e,f,g,h,i", help="letters to measure")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--model", default="ViT-B-16-plus-240", help="any plain vision transformer of open_clip")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; c and f always run on the CPU")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="number of threads of each side"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each comparison, after a warm-up")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--maps", type=int, default=100)
    parser.add_argument("--map-px", type=int, default=518)
    parser.add_argument("--memory-images", type=int, nargs=2, default=(200, 2000), metavar=("FEW", "MANY"))
    parser.add_argument("--mutual-images", type=int, default=24)
    parser.add_argument("--mutual-grid", type=int, default=37, help="patches per side")
    parser.add_argument("--mutual-width", type=int, default=1024)
    parser.add_argument("--mutual-memory-images", type=int, nargs=2, default=(16, 64), metavar=("FEW", "MANY"))
    arguments = parser.parse_args()
    parts = arguments.only.replace(",", "")
    if not parts or set(parts) - set("abcdefghi"):
        parser.error(f"--only {arguments.only}: letters are a to i")
    if min(arguments.images, arguments.mutual_images, *arguments.mutual_memory_images) < 2:
        parser.error("--images, --mutual-images: an image needs another one to be compared with")
    plan = Plan(
        model=arguments.model,
        device=pick_device(arguments.device),
        threads=arguments.threads,
        repeats=arguments.repeats,
        images=arguments.images,
        batch=min(arguments.batch, arguments.images),
        maps=arguments.maps,
        map_px=arguments.map_px,
        memory_images=tuple(arguments.memory_images),
        mutual_images=arguments.mutual_images,
        mutual_grid=arguments.mutual_grid,
        mutual_width=arguments.mutual_width,
        mutual_memory_images=tuple(arguments.mutual_memory_images),
    )
    torch.set_num_threads(plan.threads)
    rows, versions = measure(plan, parts, arguments.anomalib_python, lambda line: print(line, file=sys.stderr))
    machine = describe_machine()
    setup = (
        f"{plan.threads} threads; {plan.model}, random weights of seed 0; {plan.images} images, {plan.repeats} turns; "
        f"compared with: {versions}"
    )
    print(f"{machine}; {setup}\n")
    print("| | figure | value | limit | | behind it |\n|---|---|---|---|---|---|")
    for row in rows:
        verdict = "not run" if row.kept is None else "kept" if row.kept else "MISSED"
        value = "-" if row.value is None else f"{row.value:.3g} {row.unit}".strip()
        print(f"| {row.part} | {row.what} | {value} | {row.limit} | {verdict} | {row.detail} |")
    missed = any(row.kept is False for row in rows)
    if missed:
        print("\nA limit was missed.")
    if arguments.json is not None:
        report = {"machine": machine, "setup": setup, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if missed else 0)
