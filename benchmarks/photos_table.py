"""The command line and the table of `benchmarks/zsad_photos.py`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.photos_flow import PhotoPlan, compare_precisions, time_photos
from benchmarks.photos_mutual import time_all_partners, time_partners
from benchmarks.zsad_timing import Row, describe_machine


def main(description: str | None) -> None:
    """Run the command line. Exit with 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="a,b,c,d", help="letters to measure")
    parser.add_argument("--data", type=Path, help="folder of labelled photographs in the layout of MVTec AD")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="number of threads of each side"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each comparison, after a warm-up")
    parser.add_argument("--photos", type=int, default=24)
    parser.add_argument("--size-px", type=int, default=448)
    parser.add_argument("--mutual-photos", type=int, default=2000)
    parser.add_argument("--all-partners-photos", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=2000, help="pairs to time in (c)")
    parser.add_argument(
        "--cosines", help="number format of the products of patches: fp32 or bf16. Default: as in the product"
    )
    parser.add_argument("--precisions", default="fp32,bf16", help="number formats, fp32 first")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = PhotoPlan(
        data=arguments.data,
        photos=arguments.photos,
        repeats=arguments.repeats,
        threads=arguments.threads,
        size_px=arguments.size_px,
        mutual_photos=arguments.mutual_photos,
        all_partners_photos=arguments.all_partners_photos,
        pairs=arguments.pairs,
        cosines=arguments.cosines,
    )
    works: dict[str, Callable[[], list[Row]]] = {
        "a": partial(time_photos, plan),
        "b": partial(time_partners, plan),
        "c": partial(time_all_partners, plan),
        "d": partial(compare_precisions, plan, arguments.precisions.split(",")),
    }
    wanted = arguments.only.split(",")
    if not set(wanted) <= set(works):
        parser.error(f"--only {arguments.only}: letters are a to d")
    rows: list[Row] = []
    for letter in wanted:
        print(letter, file=sys.stderr)
        rows += works[letter]()
    machine = describe_machine()
    print(f"{machine}; {plan.threads} threads\n")
    print("| | what | value | limit | met | measurements |\n|---|---|---|---|---|---|")
    for row in rows:
        met = "-" if row.limit == "-" else "yes" if row.kept else "**no**"
        print(f"| {row.part} | {row.what} | {row.value:.3g} {row.unit} | {row.limit} | {met} | {row.detail} |")
    if arguments.json is not None:
        report = {"machine": machine, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(row.kept for row in rows) else 1)
