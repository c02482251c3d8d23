"""Needs of a run on a cluster that each worker must meet, and the warning about open clusters."""

from __future__ import annotations

import dataclasses
import fcntl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows.devices.cluster import RunNeeds, require_fit, unprotected, worker_problem
from flows.store.artifacts import ArtifactStore
from flows.store.step import load_steps
from medad.base.errors import ConfigError


class Healthy(BaseHTTPRequestHandler):
    """A server that answers everything with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Write no log."""


@pytest.fixture
def needs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunNeeds]:
    """Yield the needs of a run whose server answers."""
    monkeypatch.setenv("ADFLOWS_HOST", "gpu2")
    require_fit.cache_clear()
    load_steps("flows.liver")
    server = HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mark = ArtifactStore().mark_run()
    yield RunNeeds.of_run(mark.path, f"http://127.0.0.1:{server.server_port}")
    mark.end()
    server.shutdown()
    server.server_close()


def test_a_worker_that_shares_all_fits(needs: RunNeeds) -> None:
    assert worker_problem(needs) == ""
    probe = f"from flows.devices.cluster import *; print(repr(worker_problem({needs!r})))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "''\n", "the run's process and others see the same code and libraries"


def test_another_cache_is_named(needs: RunNeeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("ADFLOWS_CACHE", str(other))
    assert worker_problem(needs) == (
        f"worker on gpu2: {other} is not the cache of the run; mount the shared folder, or set ADFLOWS_CACHE"
    )


def test_a_cache_whose_locks_stay_on_their_machine_is_named(needs: RunNeeds, cache: Path) -> None:
    (cache / "runs" / "unseen.lock").touch()  # as on a share whose locks are local
    assert "locks of the run are not seen here" in worker_problem(dataclasses.replace(needs, lock="runs/unseen.lock"))
    with (cache / needs.lock).open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


@pytest.mark.parametrize("name", ["adflows", "Python", "numpy", "never-installed"])
def test_other_versions_are_named(needs: RunNeeds, name: str) -> None:
    versions = tuple((each, "0" if each == name else version) for each, version in needs.versions)
    if name == "never-installed":
        versions = ((name, "0"), *versions)
    found = worker_problem(dataclasses.replace(needs, versions=versions))
    assert found.startswith(f"worker on gpu2: {name} is ")
    assert " here and 0 in the run; " in found


def test_a_server_that_does_not_answer_is_named(needs: RunNeeds) -> None:
    with pytest.raises(ConfigError, match=r"gpu2: the Prefect server at .* does not answer \(Connection refused\)"):
        require_fit(dataclasses.replace(needs, server="http://127.0.0.1:9/api"))


def test_a_run_on_a_cluster_needs_a_server(cache: Path) -> None:
    with pytest.raises(ConfigError, match="set PREFECT_API_URL"):
        RunNeeds.of_run(cache / "runs" / "lock", None)


@pytest.mark.parametrize(
    ("engine", "address", "warned"),
    [
        ("dask", "tcp://10.0.0.5:8786", True),
        ("dask", "gpu1:8786", True),
        ("dask", "tls://10.0.0.5:8786", False),
        ("dask", "tcp://127.0.0.1:8786", False),
        ("ray", "ray://gpu1:10001", True),
        ("ray", "ray://localhost:10001", False),
    ],
)
def test_an_open_cluster_on_another_machine_is_warned_about(
    engine: str, address: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_USE_TLS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    found = unprotected(engine, address)
    assert bool(found) is warned
    assert "\n" not in found


@pytest.mark.parametrize(("name", "value"), [("RAY_USE_TLS", "1"), ("RAY_AUTH_MODE", "token")])
def test_ray_with_tls_or_a_token_is_not_warned_about(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert unprotected("ray", "ray://gpu1:10001") == ""
