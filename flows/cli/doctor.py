"""`adflows doctor`: check this machine and say what to fix."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.machine.environment import cache_root, core_count, memory_bytes
from flows.machine.own_server import prepare_prefect
from flows.privacy.case_ids import private_folder, registered_count
from medad.base.errors import ConfigError

Status = Literal["ok", "warn", "fail"]

PINS: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "prefect": ((3, 8, 8), (3, 8, 9), "what this release was tested with"),
    "fastapi": ((0, 139), (0, 151), "Prefect's server fails at import with a newer one"),
    "sqlalchemy": ((2, 0), (2, 1), "with 2.1 no schedule ever fires"),
}
"""Library -> lowest version, first version that is too new, reason."""

_TORCH_PROBE = (
    "import torch; print(torch.__version__); "
    "print('|'.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) "
    "if torch.cuda.is_available() else '')"
)
GB = 1e9


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    status: Status
    found: str
    advice: str = ""


def _version(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.partition("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def check_python() -> Check:
    # the installation refuses a Python that is too old
    return Check("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def check_torch() -> Check:
    """Import torch in a new process, because a broken driver can hang or crash it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_PROBE],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return Check("torch", "fail", "import did not end in 120 s", "check the GPU driver: does nvidia-smi answer?")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("torch", "fail", last, "reinstall with: pip install --force-reinstall -c constraints.txt torch")
    version, gpus = (*done.stdout.splitlines(), "", "")[:2]
    if gpus:
        return Check("torch", "ok", f"{version}, GPU: {gpus.replace('|', ', ')}")
    if shutil.which("nvidia-smi"):
        return Check(
            "torch",
            "warn",
            f"{version}, GPU not usable",
            "torch needs another GPU driver; until then the CPU is used",
        )
    return Check("torch", "ok", f"{version}, no GPU: training uses the CPU")


_OPEN_CLIP_PROBE = "import open_clip, torchvision; print(open_clip.__version__, torchvision.__version__)"


def check_open_clip() -> Check:
    """Import open_clip in a new process. It fails if torchvision and torch are of different builds."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _OPEN_CLIP_PROBE],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return Check("open_clip", "fail", "import did not end in 120 s", "see torch above")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        install = "pip install -c constraints.txt torch torchvision open_clip_torch"
        advice = f"install torch and torchvision of the same build: {install}"
        return Check("open_clip", "fail", last, advice)
    open_clip, torchvision = done.stdout.split()[-2:]
    return Check("open_clip", "ok", f"{open_clip}, torchvision {torchvision}")


def check_hub() -> Check:
    """Look into the local cache of CLIP weights. The network is not used."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    try:
        models = sorted(path.name.removeprefix("models--") for path in folder.glob("models--*"))
    except OSError as error:
        return Check("CLIP weights", "warn", f"{folder}: {error.strerror}", "set HF_HUB_CACHE to a readable folder")
    found = f"{len(models)} models in {folder}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        advice = "" if models else "only the embedded model works; for others set encoder.weights to a local file"
        return Check("CLIP weights", "ok" if models else "warn", f"{found}; offline (HF_HUB_OFFLINE)", advice)
    if problem := _write_problem(_nearest_existing(folder)):
        advice = "weights cannot be stored there: set HF_HUB_CACHE, or set encoder.weights to a local file"
        return Check("CLIP weights", "warn", f"{found}: {problem}", advice)
    return Check("CLIP weights", "ok", f"{found}; other weights are downloaded when a run needs them")


def check_pins() -> list[Check]:
    checks = []
    for name, (lowest, too_new, why) in PINS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "fail", "not installed", "pip install -c constraints.txt adflows"))
            continue
        good = lowest <= _version(found) < too_new
        wanted = f">={'.'.join(map(str, lowest))},<{'.'.join(map(str, too_new))}"
        advice = "" if good else f"pip install '{name}{wanted}': {why}"
        checks.append(Check(name, "ok" if good else "fail", found, advice))
    return checks


def check_prefect() -> Check:
    """Check the Prefect server that runs would use."""
    prepare_prefect()
    try:
        from prefect.settings import PREFECT_API_URL, PREFECT_HOME

        url, home = PREFECT_API_URL.value(), Path(PREFECT_HOME.value())
    except Exception as error:
        return Check("Prefect", "fail", f"does not start ({type(error).__name__}: {error})", "see the pins above")
    if url:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - the user's own setting
                return Check("Prefect", "ok", f"server at {url}")
        except (urllib.error.URLError, OSError, ValueError) as error:
            return Check(
                "Prefect", "fail", f"{url} does not answer ({error})", "start the server, or unset PREFECT_API_URL"
            )
    problem = _write_problem(home)
    if problem:
        return Check("Prefect", "fail", f"{home}: {problem}", "set PREFECT_HOME to a writable folder")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            return Check("Prefect", "fail", f"no local port ({error})", "the embedded server needs a port on 127.0.0.1")
    return Check("Prefect", "ok", f"embedded server, database in {home}")


def _nearest_existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _write_problem(folder: Path) -> str:
    """Return why files in a folder cannot be written and locked. Returns an empty text if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_cache() -> Check:
    root = cache_root()
    problem = _write_problem(root)
    if problem:
        return Check("cache", "fail", f"{root}: {problem}", "set ADFLOWS_CACHE to a folder on a writable disk")
    return Check("cache", "ok", f"{root}, writable, locks work")


def check_register() -> Check:
    """Check the register of pseudonyms: complete, readable by its owner only, and with its key."""
    folder = private_folder()
    try:
        count = registered_count()
    except ConfigError as error:
        return Check("pseudonyms", "fail", str(error), "until this is fixed, flows that take pseudonyms fail")
    return Check(
        "pseudonyms",
        "ok",
        f"none yet; {folder}" if count is None else f"{count} in {folder}, readable by its owner only",
    )


def check_devices() -> Check:
    """Check that each device in use has a holder that works."""
    from flows.devices.slots import slot_folder, slot_states

    try:
        used = [state for state in slot_states() if state.taken or state.waiting]
    except OSError as error:
        return Check("devices", "fail", f"{slot_folder()}: {error.strerror}", "set ADFLOWS_SLOTS")
    found = "; ".join(f"{state.name}: {state.line}" for state in used) or "all free"
    if any(state.needs_attention for state in used):
        return Check("devices", "warn", found, "continue or end that process; until then other runs wait")
    return Check("devices", "ok", found)


def _disk(name: str, folder: Path) -> Check:
    free_gb = shutil.disk_usage(_nearest_existing(folder)).free / GB
    found = f"{free_gb:.0f} GB free at {folder}"
    if free_gb < 2:
        return Check(name, "fail", found, "free some space; a run would fail halfway")
    if free_gb < 20:
        return Check(name, "warn", found, "the artifacts of the LiTS data set need about 20 GB")
    return Check(name, "ok", found)


def check_disk(runs: Path) -> list[Check]:
    return [_disk("disk of the cache", cache_root()), _disk("disk of the runs", runs.absolute())]


def check_memory() -> Check:
    memory = memory_bytes()
    if memory is None:
        return Check("memory", "warn", "unknown", "a 512 x 512 x 1000 scan needs 3 GB")
    gb = memory / GB
    found = f"{gb:.0f} GB, {core_count()} cores"
    if gb < 3:
        return Check("memory", "fail", found, "a 512 x 512 x 1000 scan needs 3 GB")
    if gb < 8:
        return Check(
            "memory", "warn", found, "enough for demo and small scans; training at the thesis's size needs 8 GB"
        )
    return Check("memory", "ok", found)


def run_checks(runs: Path) -> list[Check]:
    """Run all checks. None raises: a check that cannot find something out reports that."""
    checks: list[Callable[[], Check | list[Check]]] = [
        check_python,
        check_torch,
        check_open_clip,
        check_hub,
        check_pins,
        check_prefect,
        check_cache,
        check_register,
        check_devices,
        lambda: check_disk(runs),
        check_memory,
    ]
    found: list[Check] = []
    for check in checks:
        result = check()
        found += result if isinstance(result, list) else [result]
    return found
