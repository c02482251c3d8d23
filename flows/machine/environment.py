"""Where things are kept, and the environment Prefect starts in.

Nothing here imports Prefect: its settings are read once, at its import, so they must be in the environment before.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path

from medad.base.errors import ConfigError

PREFECT_DEFAULTS = {
    # an embedded server when no PREFECT_API_URL is set, whatever the user's profile says
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    # the first start migrates a new database: 14 s on two idle cores, more on a busy machine
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # hospital networks: nothing leaves the machine
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    # a run that is silent for three of these is taken for dead (`adflows deploy`); by hand or by a worker alike
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
    # nothing is persisted; were it ever, a pickle could run code when it is read
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
}
"""Applied only where the user's environment is silent."""

LIBRARY_DEFAULTS = {
    # threads that wait for each other sleep: spinning ones bring a shared machine to a crawl
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Read by torch's OpenMP at its import; likewise only where the environment is silent."""

NUMPY_WITHOUT_AVX512 = ("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_ICL")
"""Variable and value for CPUs on which NumPy's AVX-512 sort is slow. Names as of NumPy 2.4; others ignore them."""
MIN_HEARTBEAT_S = 30
"""Prefect's own bound."""

LOCAL_HOSTS = ("127.0.0.1", "localhost")


def cache_root() -> Path:
    """Folder of artifacts, locks and digests: $ADFLOWS_CACHE, else $XDG_CACHE_HOME/adflows, else ~/.cache/adflows."""
    if explicit := os.environ.get("ADFLOWS_CACHE"):
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base).expanduser() / "adflows").absolute()


def runs_root() -> Path:
    """Where deployed flows put their run folders: $ADFLOWS_RUNS, else `runs` in the working directory."""
    return Path(os.environ.get("ADFLOWS_RUNS") or "runs").expanduser().absolute()


def host_name() -> str:
    """This machine's name in a server's queues and limits: $ADFLOWS_HOST, else its host name without the domain."""
    name = os.environ.get("ADFLOWS_HOST") or socket.gethostname().partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "localhost"


def heartbeat_s() -> int:
    """Seconds between the signs of life of a run. Raises ConfigError for what Prefect would not take."""
    name = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
    text = os.environ.get(name, PREFECT_DEFAULTS[name])
    if not text.isdecimal() or int(text) < MIN_HEARTBEAT_S:
        raise ConfigError(f"{name}={text}: expected a whole number of seconds, {MIN_HEARTBEAT_S} or more")
    return int(text)


def package_parent() -> Path:
    """Folder that holds the packages flows, medad and zsad."""
    return Path(__file__).resolve().parents[2]


def _checkout() -> Path | None:
    """The repository that the packages run from; None where they were installed from a wheel."""
    folder = package_parent()
    return folder if (folder / "pyproject.toml").is_file() and (folder / "prefect.yaml").is_file() else None


def product_folder() -> Path:
    """Folder of `configs`, `deploy` and `prefect.yaml`: the repository, or the copy that travels in the wheel."""
    return _checkout() or package_parent() / "flows" / "shipped"


def working_folder() -> Path:
    """Where deployed flows run: the repository; the current folder where the packages came from a wheel."""
    return _checkout() or Path.cwd()


def config_folders() -> tuple[Path, ...]:
    """Folders of configurations: the administrator's own, $ADFLOWS_CONFIGS, before the product's."""
    own = os.environ.get("ADFLOWS_CONFIGS")
    return (*([Path(own).expanduser().absolute()] if own else []), config_folder())


def config_names(flow: str) -> list[str]:
    """Names of the configurations of a flow, in order."""
    return sorted({path.stem for folder in config_folders() for path in (folder / flow).glob("*.yaml")})


def find_config(config: Path, flow: str) -> Path:
    """Return a path as it is, and for a bare name the configuration of this name. Raises ConfigError."""
    if config.exists() or config.suffix or len(config.parts) > 1:
        return config
    return named_config(config.name, flow)


def named_config(name: str, flow: str) -> Path:
    """The configuration of this name in the first of the folders that holds it. Raises ConfigError."""
    for folder in config_folders():
        if (found := folder / flow / f"{name}.yaml").is_file():
            return found
    raise ConfigError(f"{name}: no such file, and none of the configurations {', '.join(config_names(flow))}")


def config_folder() -> Path:
    """The product's own `configs`."""
    return product_folder() / "configs"


def has_slow_avx512_sort(cpuinfo: str) -> bool:
    """Whether NumPy sorts several times slower by AVX-512 than by AVX2 on the CPU that /proc/cpuinfo describes.

    AMD's Zen 4 does in microcode what that sort rests on, storing the chosen lanes of a register: 40 ns a float of
    4 million, 7 ns by AVX2.
    """
    lines = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    first = {name.strip(): value.strip() for name, value in lines.items()}
    is_zen = (first.get("vendor_id"), first.get("cpu family")) == ("AuthenticAMD", "25")
    return is_zen and "avx512f" in first.get("flags", "").split()


def prepare_numpy() -> None:
    """Set what NumPy reads at import. Call before importing it; the user's own setting wins."""
    with contextlib.suppress(OSError):
        if has_slow_avx512_sort(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")):
            os.environ.setdefault(*NUMPY_WITHOUT_AVX512)


def prepare_prefect(*, verbose: bool = False) -> None:
    """Set what Prefect, and the libraries that compute, read at import. Call before it; the user's own settings win."""
    prepare_numpy()
    for name, value in (PREFECT_DEFAULTS | LIBRARY_DEFAULTS).items():
        os.environ.setdefault(name, value)
    # a proxy for the world must not be asked for a server on this machine
    for name in ("no_proxy", "NO_PROXY"):
        if proxied := os.environ.get(name, os.environ.get(name.swapcase(), "")):
            missing = [host for host in LOCAL_HOSTS if host not in proxied.split(",")]
            os.environ[name] = ",".join([proxied, *missing])
        else:
            os.environ[name] = ",".join(LOCAL_HOSTS)
    # the console only: the server still gets every log line
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if verbose else "CRITICAL")


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or its container's; None where neither says."""
    known = []
    with contextlib.suppress(ValueError, OSError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            known.append(int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(known, default=None)


def core_count() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count() -> int:
    """Tasks to run at a time: one a core, as far as memory goes (reading one big scan peaks near 2 GB)."""
    memory = memory_bytes()
    return core_count() if memory is None else max(1, min(core_count(), int(memory / 3e9)))
