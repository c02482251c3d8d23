"""Time and peak memory of a step. They are saved next to the result but are not part of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from medad.base.devices import pick_device

P = ParamSpec("P")
COST_FILE = "cost.json"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StepCost(BaseModel):
    """Content of `cost.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    peak_memory_bytes: int | None
    """Peak memory above the memory in use before the step. On a GPU, this is GPU memory. None: unknown."""


@contextlib.contextmanager
def measure_cost(out: Path, device: str) -> Iterator[None]:
    """Measure the block and write `cost.json` into `out` after it ends without an error.

    Parameters
    ----------
    out
        Folder of the step, created if it does not exist.
    device
        `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    torch_device = pick_device(device)
    before = _reset_peak(torch_device)
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    cost = StepCost(seconds=seconds, peak_memory_bytes=_peak_since(torch_device, before))
    out.mkdir(parents=True, exist_ok=True)
    (out / COST_FILE).write_text(json.dumps(cost.model_dump()) + "\n", encoding="utf-8")


def writes_cost(step: Callable[P, None]) -> Callable[P, None]:
    """Decorate a step with parameters `out` and `device`, so that it writes `cost.json` next to its result."""
    signature = inspect.signature(step)

    @functools.wraps(step)
    def measured_step(*args: P.args, **kwargs: P.kwargs) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        with measure_cost(arguments["out"], arguments["device"]):
            step(*args, **kwargs)

    return measured_step


def read_cost(folder: Path) -> StepCost | None:
    """Read the `cost.json` of a step. Return None if it is missing or cannot be read."""
    try:
        return StepCost.model_validate_json((folder / COST_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def _reset_peak(torch_device: torch.device) -> int | None:
    """Reset the peak and return the memory in use now, bytes."""
    if torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(torch_device)
        return torch.cuda.memory_allocated(torch_device)
    try:
        _CLEAR.write_text("5", encoding="ascii")  # Linux: reset the peak
    except OSError:
        return None
    return _read_status("VmRSS")


def _peak_since(torch_device: torch.device, before: int | None) -> int | None:
    if before is None:
        return None
    after = torch.cuda.max_memory_allocated(torch_device) if torch_device.type == "cuda" else _read_status("VmHWM")
    return None if after is None else max(0, after - before)


def _read_status(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
