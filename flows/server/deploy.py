"""The command `adflows deploy`: create or update everything that this project needs on a Prefect server.

Running it twice is safe. It sets up:

- a work pool with one queue for this machine. Its template has the command of all runs, which no run can change,
- the deployments of prefect.yaml, and one for each inbox (`flows.server.inboxes`), through `prefect deploy`,
- two automations that mark runs as crashed: one if a run's process vanished, one if a run never began,
- one automation that sends a notification of each failed run, if a notification block is given.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import subprocess
import sys
import tempfile
import zoneinfo
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from flows.server.automations import (
    BEGIN_S,
    Applied,
    apply_automation,
    failure_automation,
    lost_automation,
    notification,
    zombie_automation,
)
from flows.server.inboxes import inbox_entries, replace_minutely_runs
from medad.base.errors import ConfigError

POOL_TYPE = "process"


@dataclass(frozen=True)
class Site:
    """The values of this machine that its deployments use."""

    product: Path
    """Folder that contains prefect.yaml."""
    folder: Path
    """Working directory of the deployed flows."""
    pool: str
    host: str
    heartbeat_s: int


def local_timezone() -> str:
    """Return the name of this machine's time zone, for schedules. UTC if the tz database does not have it."""
    candidates = [os.environ.get("TZ", "").removeprefix(":")]
    with contextlib.suppress(OSError):
        candidates.append(Path("/etc/timezone").read_text(encoding="utf-8").strip())
    with contextlib.suppress(OSError):
        candidates.append(str(Path("/etc/localtime").resolve()).partition("zoneinfo/")[2])
    return next((name for name in candidates if name and name in zoneinfo.available_timezones()), "UTC")


def read_deployments(product: Path) -> dict[str, Any]:
    """Read prefect.yaml. Raises ConfigError."""
    path = product / "prefect.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not isinstance(values.get("deployments"), list):
        raise ConfigError(f"{path}: expected a list of `deployments`")
    return values


def choose_deployments(values: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the deployments with these names, or all if no name is given. Raises ConfigError."""
    known = {entry["name"]: entry for entry in values["deployments"]}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{unknown[0]}: no such deployment in prefect.yaml, which has {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


async def deploy(
    site: Site, *, names: Sequence[str] = (), notify: str | None = None, reset: bool = False, dry_run: bool = False
) -> list[Applied]:
    """Create or update everything on the server. With `dry_run`, only report what would be done.

    prefect.yaml contains the initial schedules and parameters of a deployment. If the deployment exists, those on the
    server are used, unless `reset` is set.

    Raises
    ------
    ConfigError
        The server rejects a request, or a required object is missing.
    """
    values = read_deployments(site.product)
    values["deployments"] += inbox_entries(values)
    entries = choose_deployments(values, names)
    with _server_errors_as_config_errors():
        async with get_client() as client:
            block = None if notify is None else await notification(client, notify)
            applied = [
                await _pool(client, site, dry_run=dry_run),
                await _queue(client, site, dry_run=dry_run),
                *await _deployments(client, site, values, entries, reset=reset, dry_run=dry_run),
                await apply_automation(client, zombie_automation(site.heartbeat_s), dry_run=dry_run),
                await apply_automation(client, lost_automation(BEGIN_S), dry_run=dry_run),
            ]
            if block is not None:
                applied.append(await apply_automation(client, failure_automation(block), dry_run=dry_run))
    return applied


@contextlib.contextmanager
def _server_errors_as_config_errors() -> Iterator[None]:
    try:
        yield
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        if status in {401, 403}:
            raise ConfigError(
                f"Prefect: the server rejects this client ({status}); set PREFECT_API_AUTH_STRING to its secret"
            ) from error
        raise ConfigError(f"Prefect: the server answers {status} to {error.request.url.path}") from error


def job_template(site: Site) -> dict[str, Any]:
    """Return the work pool's template of a run's process.

    Command, environment and working directory are fixed: a run or a deployment may set variables, and none of these is
    one. Prefect's own template lets whoever creates a run choose all three. There is no `env` either, because Prefect
    adds a run's variables to it. `adflows worker` has the environment of its runs (`flows.server.serve`).
    """
    return {
        "job_configuration": {
            "name": "{{ name }}",
            # `adflows worker` puts its Python first into the path
            "command": "python -m flows.server.run",
            "working_dir": str(site.folder),
            "stream_output": True,
            "labels": {},
        },
        "variables": {
            "type": "object",
            "properties": {"name": {"type": "string", "title": "Name", "description": "Name of the process."}},
        },
    }


async def _pool(client: PrefectClient, site: Site, *, dry_run: bool) -> Applied:
    template = job_template(site)
    try:
        pool = await client.read_work_pool(site.pool)
    except ObjectNotFound:
        if not dry_run:
            await client.create_work_pool(WorkPoolCreate(name=site.pool, type=POOL_TYPE, base_job_template=template))
        return Applied("work pool", site.pool, "created")
    if pool.type != POOL_TYPE:
        raise ConfigError(f"work pool {site.pool} is of type {pool.type}, not {POOL_TYPE}; give another --pool")
    if pool.base_job_template == template:
        return Applied("work pool", site.pool, "unchanged")
    if not dry_run:
        await client.update_work_pool(site.pool, WorkPoolUpdate(base_job_template=template))
    return Applied("work pool", site.pool, "updated")


async def _queue(client: PrefectClient, site: Site, *, dry_run: bool) -> Applied:
    name = f"{site.pool}/{site.host}"
    try:
        await client.read_work_queue_by_name(site.host, site.pool)
    except ObjectNotFound:
        if not dry_run:
            await client.create_work_queue(site.host, work_pool_name=site.pool)
        return Applied("work queue", name, "created")
    return Applied("work queue", name, "unchanged")


async def _deployments(
    client: PrefectClient,
    site: Site,
    values: dict[str, Any],
    entries: list[dict[str, Any]],
    *,
    reset: bool,
    dry_run: bool,
) -> list[Applied]:
    rows, effective = [], []
    known = {deployment.name: deployment for deployment in await client.read_deployments()}
    for entry in entries:
        there = known.get(entry["name"])
        rows.append(Applied("deployment", entry["name"], "created" if there is None else "updated"))
        if there is not None and not reset:
            kept = {key: value for key, value in entry.items() if key != "schedules" or not there.schedules}
            asked = {key: value for key, value in there.parameters.items() if key in _parameters(site, entry)}
            effective.append(kept | {"parameters": entry.get("parameters", {}) | asked})
        else:
            effective.append(entry)
    if not dry_run:
        _prefect_deploy(site, values | {"deployments": effective})
    chosen = [there for entry in entries if (there := known.get(entry["name"])) is not None]
    return rows + await replace_minutely_runs(client, chosen, dry_run=dry_run)


def _parameters(site: Site, entry: dict[str, Any]) -> set[str]:
    """Return the names of a deployment's parameters. A version may have dropped one that the server still has."""
    module, _, name = entry["entrypoint"].rpartition(".")
    with _import_from(site.folder):
        return set(inspect.signature(getattr(importlib.import_module(module), name).fn).parameters)


@contextlib.contextmanager
def _import_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def template_values(site: Site) -> dict[str, str]:
    """Return the values for the placeholders `{{ $NAME }}` of prefect.yaml."""
    return {
        "ADFLOWS_POOL": site.pool,
        "ADFLOWS_HOST": site.host,
        "ADFLOWS_TIMEZONE": local_timezone(),
    }


def _prefect_deploy(site: Site, values: dict[str, Any]) -> None:
    """Run `prefect deploy`. Raises ConfigError with the last line of its output."""
    with tempfile.TemporaryDirectory(prefix="adflows-deploy-") as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
            cwd=site.folder,
            env=os.environ | template_values(site) | {"COLUMNS": "1000", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip(" ╭╮╰╯─│")]
        raise ConfigError(f"prefect deploy: {lines[-1] if lines else f'exit code {done.returncode}'}")
