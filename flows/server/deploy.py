"""`adflows deploy`: what this project needs on a Prefect server, made or brought up to date. Running it twice is safe.

A work pool with one queue for this machine, the global limit that device steps of all its flows share, the deployments
of prefect.yaml (through Prefect's own `prefect deploy`), and two automations: runs whose process vanished are called
crashed, and, where a notification block is named, failed runs are told.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import zoneinfo
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from medad.base.errors import ConfigError

POOL_TYPE = "process"
MISSED_HEARTBEATS = 3
"""Heartbeats that may stay away before a run is taken for dead; one that is late is no death."""

OUR_FLOWS = ["liver", "liver-*", "zsad", "zsad-*"]
"""Names of this project's flows: others on the same server have heartbeats of their own."""


def _events(*states: str) -> tuple[str, ...]:
    """Events of a run's states, and of those whose names begin so (CompletedWithFailures): for Prefect `*` is one
    character or more."""
    return tuple(f"prefect.flow-run.{state}{more}" for state in states for more in ("", "*"))


ENDED = _events("Completed", "Failed", "Crashed", "TimedOut", "Cancelled", "Suspended", "Paused", "AwaitingRetry")
"""After these no heartbeat is due."""
FAILED = _events("Failed", "Crashed", "TimedOut")
BEGUN = tuple(f"prefect.flow-run.{state}" for state in ("Running", "Scheduled", "AwaitingConcurrencySlot"))
"""After these a run that was handed to a worker has begun, or waits again. (One that ended otherwise stays as it is:
the server takes no crash of it.) No more than needed: each event that is heard is a write to the database."""
BEGIN_S = 600
"""A process starts in seconds; on a machine that is out of memory in minutes."""

ZOMBIE_AUTOMATION, LOST_AUTOMATION = "adflows: runs whose process vanished", "adflows: runs that never began"
FAILURE_AUTOMATION = "adflows: tell of failed runs"

Status = Literal["created", "updated", "unchanged"]


@dataclass(frozen=True)
class Site:
    """This machine, as the server is to know it."""

    product: Path
    """Folder that holds prefect.yaml."""
    folder: Path
    """Working directory of the deployed flows."""
    pool: str
    host: str
    devices: int
    heartbeat_s: int


@dataclass(frozen=True)
class Applied:
    """One thing on the server."""

    kind: str
    name: str
    status: Status

    @property
    def line(self) -> str:
        return f"{self.status:<9} {self.kind} {self.name}"


def local_timezone() -> str:
    """This machine's time zone by name, for schedules; UTC where it has none that the tz database knows."""
    candidates = [os.environ.get("TZ", "").removeprefix(":")]
    with contextlib.suppress(OSError):
        candidates.append(Path("/etc/timezone").read_text(encoding="utf-8").strip())
    with contextlib.suppress(OSError):
        candidates.append(str(Path("/etc/localtime").resolve()).partition("zoneinfo/")[2])
    return next((name for name in candidates if name and name in zoneinfo.available_timezones()), "UTC")


def read_deployments(product: Path) -> dict[str, Any]:
    """prefect.yaml. Raises ConfigError."""
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
    """The deployments of these names; of all, where none is named. Raises ConfigError."""
    known = {entry["name"]: entry for entry in values["deployments"]}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{unknown[0]}: no such deployment in prefect.yaml; it has {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


async def deploy(
    site: Site, *, names: Sequence[str] = (), notify: str | None = None, reset: bool = False, dry_run: bool = False
) -> list[Applied]:
    """Apply everything; with `dry_run` only say what would be done.

    Schedules and parameters of prefect.yaml are those a deployment starts with: where it is on the server already, they
    stay as somebody set them there, unless `reset`.

    Raises
    ------
    ConfigError
        The server refuses, or something that must be there already is not.
    """
    values = read_deployments(site.product)
    entries = choose_deployments(values, names)
    with _server_errors_as_config_errors():
        async with get_client() as client:
            block = None if notify is None else await _notification(client, notify)
            applied = [
                await _pool(client, site, dry_run=dry_run),
                await _queue(client, site, dry_run=dry_run),
                await _limit(client, site, dry_run=dry_run),
                *await _deployments(client, site, values, entries, reset=reset, dry_run=dry_run),
                await _automation(client, zombie_automation(site.heartbeat_s), dry_run=dry_run),
                await _automation(client, lost_automation(BEGIN_S), dry_run=dry_run),
            ]
            if block is not None:
                applied.append(await _automation(client, failure_automation(block), dry_run=dry_run))
    return applied


@contextlib.contextmanager
def _server_errors_as_config_errors() -> Iterator[None]:
    try:
        yield
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        if status in {401, 403}:
            raise ConfigError(
                f"Prefect: the server refuses this client ({status}); set PREFECT_API_AUTH_STRING"
            ) from error
        raise ConfigError(f"Prefect: the server answers {status} to {error.request.url.path}") from error


async def _pool(client: PrefectClient, site: Site, *, dry_run: bool) -> Applied:
    try:
        pool = await client.read_work_pool(site.pool)
    except ObjectNotFound:
        if not dry_run:
            await client.create_work_pool(WorkPoolCreate(name=site.pool, type=POOL_TYPE))
        return Applied("work pool", site.pool, "created")
    if pool.type != POOL_TYPE:
        raise ConfigError(f"work pool {site.pool} is of type {pool.type}, not {POOL_TYPE}; name another with --pool")
    return Applied("work pool", site.pool, "unchanged")


async def _queue(client: PrefectClient, site: Site, *, dry_run: bool) -> Applied:
    name = f"{site.pool}/{site.host}"
    try:
        await client.read_work_queue_by_name(site.host, site.pool)
    except ObjectNotFound:
        if not dry_run:
            await client.create_work_queue(site.host, work_pool_name=site.pool)
        return Applied("work queue", name, "created")
    return Applied("work queue", name, "unchanged")


def limit_name(host: str) -> str:
    """The global concurrency limit of a machine's devices."""
    return f"gpu:{host}"


async def _limit(client: PrefectClient, site: Site, *, dry_run: bool) -> Applied:
    name = limit_name(site.host)
    status: Status = "unchanged"
    try:
        known = await client.read_global_concurrency_limit_by_name(name)
        if known.limit != site.devices or not known.active:
            status = "updated"
    except ObjectNotFound:
        status = "created"
    if not dry_run and status != "unchanged":
        await client.upsert_global_concurrency_limit_by_name(name, site.devices)
    return Applied("global limit", f"{name} = {site.devices}", status)


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
            effective.append(kept | {"parameters": entry.get("parameters", {}) | there.parameters})
        else:
            effective.append(entry)
    if not dry_run:
        _prefect_deploy(site, values | {"deployments": effective})
    return rows


def template_values(site: Site) -> dict[str, str]:
    """What the `{{ $NAME }}` of prefect.yaml stand for."""
    return {
        "ADFLOWS_POOL": site.pool,
        "ADFLOWS_HOST": site.host,
        "ADFLOWS_TIMEZONE": local_timezone(),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(site.heartbeat_s),
    }


def _prefect_deploy(site: Site, values: dict[str, Any]) -> None:
    """Prefect's own command. Raises ConfigError with its last word."""
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


def _our_flows() -> dict[str, Any]:
    return {"prefect.resource.role": "flow", "prefect.resource.name": OUR_FLOWS}


def zombie_automation(heartbeat_s: int) -> AutomationCore:
    """After a run's heartbeat, another one or the run's end is due; else its process was killed with its worker."""
    beat = "prefect.flow-run.heartbeat"
    silence_s = MISSED_HEARTBEATS * heartbeat_s
    message = f"No sign of life for {silence_s} s: the process was killed, or its machine went down"
    return _crash(ZOMBIE_AUTOMATION, {beat}, {beat, *ENDED}, silence_s, message)


def lost_automation(begin_s: int) -> AutomationCore:
    """A run that a worker took and never began, because it was killed, has no heartbeat that could stay away."""
    taken = {"prefect.flow-run.Pending", "prefect.flow-run.Submitting"}
    message = f"Taken by a worker {begin_s} s ago and never begun: the worker was killed, or its machine went down"
    return _crash(LOST_AUTOMATION, taken, set(BEGUN), begin_s, message)


def _crash(name: str, after: set[str], expect: set[str], within_s: int, message: str) -> AutomationCore:
    """An automation that calls our runs crashed when nothing expected follows."""
    return AutomationCore(
        name=name,
        description="Made by `adflows deploy`, which puts it right again.",
        trigger=EventTrigger(
            after=after,
            expect=expect,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_our_flows(),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=within_s),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )


def failure_automation(action: SendNotification | CallWebhook) -> AutomationCore:
    """Each failed, crashed or timed-out run at once."""
    return AutomationCore(
        name=FAILURE_AUTOMATION,
        description="Made by `adflows deploy --notify`, which puts it right again.",
        trigger=EventTrigger(
            expect=set(FAILED),
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_our_flows(),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[action],
    )


SUBJECT = "adflows: {{ flow_run.name }} {{ flow_run.state.name }}"
BODY = "{{ flow.name }}, run {{ flow_run.name }}: {{ flow_run.state.name }}. {{ flow_run.state.message }}"


async def _notification(client: PrefectClient, name: str) -> SendNotification | CallWebhook:
    """The action that uses an existing block TYPE/NAME. Raises ConfigError."""
    kind, slash, block_name = name.partition("/")
    if not slash or not kind or not block_name:
        raise ConfigError(f"--notify {name}: expected TYPE/NAME of a block, as in slack-webhook/oncall")
    try:
        block = await client.read_block_document_by_name(block_name, kind, include_secrets=False)
    except ObjectNotFound as error:
        raise ConfigError(f"--notify {name}: no such block on the server; make it in the UI (Blocks) first") from error
    if kind == "webhook":
        return CallWebhook(block_document_id=block.id, payload=f"{SUBJECT}\n{BODY}")
    capabilities = block.block_schema.capabilities if block.block_schema is not None else []
    if "notify" not in capabilities:
        raise ConfigError(f"--notify {name}: a block of this type cannot notify")
    return SendNotification(block_document_id=block.id, subject=SUBJECT, body=BODY)


async def _automation(client: PrefectClient, wanted: AutomationCore, *, dry_run: bool) -> Applied:
    found = await client.read_automations_by_name(wanted.name)
    if not found:
        if not dry_run:
            await client.create_automation(wanted)
        return Applied("automation", wanted.name, "created")
    if _same(found[0], wanted):
        return Applied("automation", wanted.name, "unchanged")
    if not dry_run:
        # as a whole: what an update leaves out would stay as somebody changed it
        whole = AutomationCore.model_validate(wanted.model_dump() | {"enabled": found[0].enabled})
        await client.update_automation(found[0].id, whole)
    return Applied("automation", wanted.name, "updated")


def _same(found: Automation, wanted: AutomationCore) -> bool:
    """Alike but for ids and for whether it is switched on, which is the user's choice."""
    left_out = {"enabled", "owner_resource", "tags"}
    mine, theirs = (
        wanted.model_dump(mode="json"),
        AutomationCore.model_validate(found.model_dump()).model_dump(mode="json"),
    )
    return all(_plain(mine[key]) == _plain(theirs[key]) for key in mine.keys() - left_out)


def _plain(value: Any) -> Any:
    """JSON values with lists that are sets, as in triggers, in one order, and without ids."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if key != "id"}
    if isinstance(value, list):
        return sorted((_plain(each) for each in value), key=repr)
    return value
