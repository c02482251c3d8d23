"""Timers for two functions that alternate, and the rows of the table of `benchmarks/zsad.py`."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
TimedWork = Callable[[], float]
"""A function that does something once and returns its seconds."""


@dataclass(frozen=True)
class Row:
    """One claim: a value and its limit. `detail` gives the measured times.

    `kept` says whether the limit is kept. None: it was not measured.
    """

    part: str
    what: str
    value: float | None
    unit: str
    limit: str
    kept: bool | None
    detail: str


@dataclass(frozen=True)
class Plan:
    """The measurements to make, and their sizes."""

    model: str
    device: torch.device
    threads: int
    repeats: int
    images: int
    batch: int
    maps: int
    map_px: int
    memory_images: tuple[int, int]
    mutual_images: int
    mutual_grid: int
    mutual_width: int
    mutual_memory_images: tuple[int, int]


def timer(work: Callable[[], object], device: torch.device) -> TimedWork:
    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return once


@dataclass(frozen=True)
class Comparison:
    """Seconds of two functions that were called alternately."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Return the ratio of first to second: the median over turns, so that a slow minute affects both."""
        return statistics.median(a / b for a, b in zip(self.first, self.second, strict=True))

    @property
    def spread(self) -> str:
        ratios = [a / b for a, b in zip(self.first, self.second, strict=True)]
        return f"turns {min(ratios):.2f} to {max(ratios):.2f}"


def time_alternately(first: TimedWork, second: TimedWork, repeats: int, *, warm: bool = True) -> Comparison:
    """Time two functions alternately, after a warm-up. Each of them begins every second turn."""
    if warm:
        first(), second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[which].append((first, second)[which]())
    return Comparison(tuple(seconds[0]), tuple(seconds[1]))


def row_at_most(part: str, what: str, compared: Comparison, limit: float, detail: str) -> Row:
    kept = compared.ratio <= limit
    return Row(part, what, compared.ratio, "x", f"<= {limit}", kept, f"{detail}; {compared.spread}")


def row_at_least(part: str, what: str, compared: Comparison, limit: float, detail: str) -> Row:
    kept = compared.ratio >= limit
    return Row(part, what, compared.ratio, "x", f">= {limit}", kept, f"{detail}; {compared.spread}")


def describe_machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {platform.machine()}, {gpu}, torch {torch.__version__}"


@contextmanager
def fresh_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@dataclass
class Laps:
    """Seconds of the parts of a computation, summed by name."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        result: list[T] = []
        seconds = timer(lambda: result.append(work()), self.device)()
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return result[0]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())
