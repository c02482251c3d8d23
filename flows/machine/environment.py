"""Folders of this machine, and the environment variables that Prefect and other libraries read.

This module does not import Prefect: Prefect reads its settings when it is imported, so they must be set before.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pwd
import re
import socket
from pathlib import Path

from medad.base.errors import ConfigError

PREFECT_DEFAULTS = {
    # an embedded server if PREFECT_API_URL is not set, even if the user's profile says otherwise
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    # the first start creates the database: 14 s on two idle cores, more on a busy machine
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # hospital networks: nothing leaves the machine
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    # seconds; a run that is silent for three of these counts as dead (`adflows deploy`)
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
    # results are not persisted; if they were, a pickle could run code when it is read
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
}
"""Environment variables for Prefect. Variables that the user has set take precedence."""

LIBRARY_DEFAULTS = {
    # waiting threads sleep; spinning threads make a shared machine very slow
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment variables that torch's OpenMP reads at its import. The user's values take precedence."""

NUMPY_WITHOUT_AVX512 = ("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_ICL")
"""Variable and value for CPUs on which NumPy's AVX-512 sort is slow. Names as of NumPy 2.4; others ignore them."""
MIN_HEARTBEAT_S = 30
"""Lowest value that Prefect accepts."""

LOCAL_HOSTS = ("127.0.0.1", "localhost")


def prefect_home() -> Path:
    """Return Prefect's folder, with the database and the secret: $PREFECT_HOME, else ~/.prefect."""
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()


def cache_root() -> Path:
    """Return the folder of artifacts, locks and digests.

    It is $ADFLOWS_CACHE, else $XDG_CACHE_HOME/adflows, else ~/.cache/adflows.
    """
    if explicit := os.environ.get("ADFLOWS_CACHE"):
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base).expanduser() / "adflows").absolute()


def runs_root() -> Path:
    """Return the folder of deployed flows' run folders: $ADFLOWS_RUNS, else `runs` in the working directory."""
    return Path(os.environ.get("ADFLOWS_RUNS") or "runs").expanduser().absolute()


def host_name() -> str:
    """Return this machine's name in queues and limits: $ADFLOWS_HOST, else its host name without the domain."""
    name = os.environ.get("ADFLOWS_HOST") or socket.gethostname().partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "localhost"


def heartbeat_s() -> int:
    """Return the seconds between a run's heartbeats. Raise ConfigError for a value that Prefect does not accept."""
    name = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    text = os.environ.get(name, PREFECT_DEFAULTS[name])
    if not text.isdecimal() or int(text) < MIN_HEARTBEAT_S:
        raise ConfigError(f"{name}={text}: expected a whole number of seconds, {MIN_HEARTBEAT_S} or more")
    return int(text)


def package_parent() -> Path:
    """Return the folder that contains the packages flows, medad and zsad."""
    return Path(__file__).resolve().parents[2]


def _checkout() -> Path | None:
    """Return the repository that the packages run from. None: they were installed from a wheel."""
    folder = package_parent()
    return folder if (folder / "pyproject.toml").is_file() and (folder / "prefect.yaml").is_file() else None


def product_folder() -> Path:
    """Return the folder of `configs`, `deploy` and `prefect.yaml`: the repository, or the copy in the wheel."""
    return _checkout() or package_parent() / "flows" / "shipped"


def working_folder() -> Path:
    """Return the folder that deployed flows run in: the repository, or for a wheel the current folder."""
    return _checkout() or Path.cwd()


def config_folders() -> tuple[Path, ...]:
    """Return the folders of configurations: $ADFLOWS_CONFIGS if set, then the product's."""
    own = os.environ.get("ADFLOWS_CONFIGS")
    return (*([Path(own).expanduser().absolute()] if own else []), config_folder())


def config_names(flow: str) -> list[str]:
    """Return the names of a flow's configurations, sorted."""
    return sorted({path.stem for folder in config_folders() for path in (folder / flow).glob("*.yaml")})


def find_config(config: Path, flow: str) -> Path:
    """Return a path unchanged, and for a bare name the configuration of that name. Raise ConfigError for none."""
    if config.exists() or config.suffix or len(config.parts) > 1:
        return config
    return named_config(config.name, flow)


def named_config(name: str, flow: str) -> Path:
    """Return the configuration of a name, from the first folder that contains it. Raise ConfigError if none does."""
    for folder in config_folders():
        if (found := folder / flow / f"{name}.yaml").is_file():
            return found
    raise ConfigError(f"{name}: neither a file nor one of the configurations {', '.join(config_names(flow))}")


def config_folder() -> Path:
    """Return the product's folder `configs`."""
    return product_folder() / "configs"


def has_slow_avx512_sort(cpuinfo: str) -> bool:
    """Return whether NumPy sorts several times slower with AVX-512 than with AVX2 on a CPU. Takes /proc/cpuinfo.

    The sort stores selected lanes of a register, and AMD's Zen 4 does this in microcode. For 4 million floats, one
    takes 40 ns with AVX-512 and 7 ns with AVX2.
    """
    lines = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    first = {name.strip(): value.strip() for name, value in lines.items()}
    is_zen = (first.get("vendor_id"), first.get("cpu family")) == ("AuthenticAMD", "25")
    return is_zen and "avx512f" in first.get("flags", "").split()


def collect_rarely() -> None:
    """Let Python look for garbage less often. Otherwise this is a quarter of the time of loading large libraries."""
    gc.set_threshold(50_000, 20, 20)


def prepare_numpy() -> None:
    """Set the environment that NumPy reads at its import. Call this before. The user's value takes precedence."""
    with contextlib.suppress(OSError):
        if has_slow_avx512_sort(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")):
            os.environ.setdefault(*NUMPY_WITHOUT_AVX512)


def memory_bytes() -> int | None:
    """Return the memory that this process may use: the machine's or its container's. None: unknown."""
    known = []
    with contextlib.suppress(ValueError, OSError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            known.append(int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(known, default=None)


def user_name(number: int) -> str:
    """Return the name of a user, or the number as text if only that is known, as in a container."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def core_count() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count() -> int:
    """Return how many tasks to run at a time: one per core, with 3 GB of memory each. A big scan needs 2 GB."""
    memory = memory_bytes()
    return core_count() if memory is None else max(1, min(core_count(), int(memory / 3e9)))
