"""Needs of a run that all workers of a running cluster must meet: code, cache with its locks, and Prefect server.

The run checks all workers before its first task. Each task checks its own worker too, since one may join later. Both
end in one line that names the worker's host and the rule.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import ipaddress
import os
import platform
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flows.machine.environment import LOCAL_HOSTS, cache_root, host_name, package_parent
from flows.store.references import library_versions
from flows.store.step import STEPS
from medad.base.errors import ConfigError

if TYPE_CHECKING:
    from distributed import Client

CODE, PYTHON = "adflows", "Python"
PACKAGES = ("flows", "medad", "zsad")
ANSWER_S = 10.0
"""Time within which the Prefect server must answer a worker."""
NODE_S = 120.0
"""Time within which a node of Ray must answer. It starts a process and loads this code."""
GPU_RESOURCE = "GPU"
"""Resource that a Dask worker offers for each device it may use. Ray has a resource of this name."""


@dataclass(frozen=True)
class RunNeeds:
    """Needs of a run, which each worker must meet."""

    lock: str
    """File in the cache that the run has locked, relative to the cache."""
    server: str
    """Address of the API of the run's Prefect server."""
    versions: tuple[tuple[str, str], ...]
    """Name and version of this code, of Python and of the libraries of all steps."""

    @classmethod
    def of_run(cls, lock: Path, server: str | None) -> RunNeeds:
        """Return the needs of a run. Raises ConfigError if it has no server, whose address a worker could use."""
        if not server:
            raise ConfigError("engine_address: the cluster's workers need a Prefect server; set PREFECT_API_URL")
        libraries = {name for step in STEPS.values() for name in step.libraries}
        versions = tuple((name, version_of(name)) for name in (CODE, PYTHON, *sorted(libraries)))
        return cls(str(lock.relative_to(cache_root())), server, versions)


@functools.cache
def code_version() -> str:
    """Return a digest over all code of this project, as it was when this process first asked."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((package_parent() / package).rglob("*.py")):
            digest.update(path.relative_to(package_parent()).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def version_of(name: str) -> str:
    """Return the version of this code, of Python or of a library here."""
    if name == CODE:
        return code_version()
    if name == PYTHON:
        return platform.python_version()
    try:
        return library_versions((name,))[name]
    except ModuleNotFoundError:
        return "not installed"


@functools.lru_cache(maxsize=8)
def require_fit(needs: RunNeeds) -> None:
    """Raise ConfigError unless this worker has what a run needs: one line with the worker's host and the rule."""
    for problem in (_version_problem(needs), _cache_problem(needs), _server_problem(needs)):
        if problem:
            raise ConfigError(f"worker on {host_name()}: {problem}")


def worker_problem(needs: RunNeeds) -> str:
    """Return why this worker cannot work for a run. Returns an empty text if it can."""
    try:
        require_fit(needs)
    except ConfigError as error:
        return str(error)
    return ""


def _version_problem(needs: RunNeeds) -> str:
    for name, wanted in needs.versions:
        if (found := version_of(name)) != wanted:
            return f"{name} is {found} here and {wanted} in the run; install the same versions on all machines"
    return ""


def _cache_problem(needs: RunNeeds) -> str:
    root = cache_root()
    try:
        descriptor = os.open(root / needs.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"{root} is not the cache of the run; mount the shared folder, or set ADFLOWS_CACHE"
    except OSError as error:
        return f"{root}: the cache cannot be used ({error.strerror})"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""  # the run's lock is seen here
    except OSError as error:
        return f"{root}: files of the cache cannot be locked ({error.strerror})"
    finally:
        os.close(descriptor)
    return f"{root}: locks of the run are not seen here; use a file system with flock between machines, such as NFS 4"


def _server_problem(needs: RunNeeds) -> str:
    try:
        with urllib.request.urlopen(f"{needs.server}/health", timeout=ANSWER_S):  # noqa: S310 - the user's own setting
            return ""
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return f"the Prefect server at {needs.server} does not answer ({getattr(reason, 'strerror', None) or reason})"


def check_dask(client: Client, needs: RunNeeds) -> None:
    """Raise ConfigError unless all workers of a Dask cluster fit a run, and one may run device steps."""
    workers: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    found = client.run(worker_problem, needs, on_error="return") if workers else {}
    _raise_problem(found)
    devices = any(worker["resources"].get(GPU_RESOURCE) for worker in workers.values())
    _require_devices(bool(workers), devices, f"start one with --resources {GPU_RESOURCE}=1")


def check_ray(needs: RunNeeds) -> None:
    """Raise ConfigError unless all nodes of a Ray cluster fit a run, and one may run device steps."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    probe = ray.remote(num_cpus=0, max_retries=0)(worker_problem)
    answers = {
        node["NodeManagerAddress"]: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(needs)
        for node in nodes
    }
    found: dict[str, object] = {}
    for address, answer in answers.items():
        try:
            found[address] = ray.get(answer, timeout=NODE_S)
        except Exception as error:  # Ray raises the errors of all its parts
            found[address] = error
    _raise_problem(found)
    devices = bool(ray.cluster_resources().get(GPU_RESOURCE))  # type: ignore[no-untyped-call]
    _require_devices(bool(nodes), devices, "start one with --num-gpus 1")


def _raise_problem(found: Mapping[str, object]) -> None:
    """Raise ConfigError for the first worker with a problem."""
    for address, answer in sorted(found.items()):
        if isinstance(answer, Exception):
            host = urlsplit(address if "://" in address else f"//{address}").hostname
            raise ConfigError(f"worker on {host}: cannot load this version of adflows ({type(answer).__name__})")
        if answer:
            raise ConfigError(str(answer))


def _require_devices(workers: bool, devices: bool, advice: str) -> None:
    if not workers:
        raise ConfigError("engine_address: the cluster has no worker yet; start one and run again")
    if not devices:
        raise ConfigError(f"engine_address: no worker may run device steps; {advice}")


def unprotected(engine: str, address: str) -> str:
    """Return a warning if strangers may use a cluster on another machine. Otherwise an empty text."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    host = parts.hostname or ""
    with contextlib.suppress(ValueError):
        if host in LOCAL_HOSTS or ipaddress.ip_address(host).is_loopback:
            return ""
    if engine == "dask":
        protected, advice = parts.scheme in {"tls", "wss"}, "use TLS (tls://)"
    else:
        protected = os.environ.get("RAY_USE_TLS") == "1" or os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
        advice = "set RAY_AUTH_MODE=token or RAY_USE_TLS=1"
    text = f"warning: {address} is not protected; whoever reaches this port can run programs as its user; {advice}"
    return "" if protected else text
