"""The command `adflows deploy`: create or update everything that this project needs on a Prefect server.

Running it twice is safe. It sets up:

- a work pool with one queue for this machine,
- the deployments of prefect.yaml, through `prefect deploy`,
- two automations that mark runs as crashed: one if a run's process vanished, one if a run never began,
- one automation that sends a notification of each failed run, if a notification block is given.
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
"""Number of missed heartbeats after which a run counts as dead. A single heartbeat may be late."""

OUR_FLOWS = ["liver", "liver-*", "zsad", "zsad-*"]
"""Names of this project's flows. The automations ignore other flows on the same server."""


def _events(*states: str) -> tuple[str, ...]:
    """Return the events of these states, and of states whose names begin with them, such as CompletedWithFailures.

    In Prefect's patterns `*` matches at least one character, so the plain name is listed too.
    """
    return tuple(f"prefect.flow-run.{state}{more}" for state in states for more in ("", "*"))


ENDED = _events("Completed", "Failed", "Crashed", "TimedOut", "Cancelled", "Suspended", "Paused", "AwaitingRetry")
"""Events after which no heartbeat is expected."""
FAILED = _events("Failed", "Crashed", "TimedOut")
BEGUN = tuple(f"prefect.flow-run.{state}" for state in ("Running", "Scheduled", "AwaitingConcurrencySlot"))
"""Events after which a run that a worker took has begun or waits again.

Other ends of a run need no entry: the server does not accept a crash of a run that has ended. The list is short because
each matched event is a write to the database.
"""
BEGIN_S = 600
"""Time in which a run must begin. A process starts in seconds, or in minutes if memory is short."""

ZOMBIE_AUTOMATION, LOST_AUTOMATION = "adflows: runs whose process vanished", "adflows: runs that never began"
FAILURE_AUTOMATION = "adflows: tell of failed runs"

Status = Literal["created", "updated", "unchanged"]


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


@dataclass(frozen=True)
class Applied:
    """One object on the server, and what `deploy` did with it."""

    kind: str
    name: str
    status: Status

    @property
    def line(self) -> str:
        return f"{self.status:<9} {self.kind} {self.name}"


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
    entries = choose_deployments(values, names)
    with _server_errors_as_config_errors():
        async with get_client() as client:
            block = None if notify is None else await _notification(client, notify)
            applied = [
                await _pool(client, site, dry_run=dry_run),
                await _queue(client, site, dry_run=dry_run),
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
                f"Prefect: the server rejects this client ({status}); set PREFECT_API_AUTH_STRING"
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
        raise ConfigError(f"work pool {site.pool} is of type {pool.type}, not {POOL_TYPE}; give another --pool")
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
    """Return the values for the placeholders `{{ $NAME }}` of prefect.yaml."""
    return {
        "ADFLOWS_POOL": site.pool,
        "ADFLOWS_HOST": site.host,
        "ADFLOWS_TIMEZONE": local_timezone(),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(site.heartbeat_s),
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


def _our_flows() -> dict[str, Any]:
    return {"prefect.resource.role": "flow", "prefect.resource.name": OUR_FLOWS}


def zombie_automation(heartbeat_s: int) -> AutomationCore:
    """Return the automation that marks a run as crashed if its heartbeats stop.

    After each heartbeat, the next one or the end of the run must follow in time. If none does, the run's process was
    killed together with its worker.
    """
    beat = "prefect.flow-run.heartbeat"
    silence_s = MISSED_HEARTBEATS * heartbeat_s
    message = f"No heartbeat for {silence_s} s: the process was killed, or its machine stopped"
    return _crash(ZOMBIE_AUTOMATION, {beat}, {beat, *ENDED}, silence_s, message)


def lost_automation(begin_s: int) -> AutomationCore:
    """Return the automation that marks a run as crashed if a worker took it and was killed before the run began.

    Such a run never sent a heartbeat, so `zombie_automation` does not notice it.
    """
    taken = {"prefect.flow-run.Pending", "prefect.flow-run.Submitting"}
    message = f"Taken by a worker {begin_s} s ago but not begun: the worker was killed, or its machine stopped"
    return _crash(LOST_AUTOMATION, taken, set(BEGUN), begin_s, message)


def _crash(name: str, after: set[str], expect: set[str], within_s: int, message: str) -> AutomationCore:
    """Return an automation that marks our runs as crashed if none of the expected events follows in time."""
    return AutomationCore(
        name=name,
        description="Created by `adflows deploy`, which also restores it.",
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
    """Return the automation that runs `action` immediately for each failed, crashed or timed-out run."""
    return AutomationCore(
        name=FAILURE_AUTOMATION,
        description="Created by `adflows deploy --notify`, which also restores it.",
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
    """Return the action that uses the existing block `name`, TYPE/NAME. Raises ConfigError."""
    kind, slash, block_name = name.partition("/")
    if not slash or not kind or not block_name:
        raise ConfigError(f"--notify {name}: expected TYPE/NAME of a block, such as slack-webhook/oncall")
    try:
        block = await client.read_block_document_by_name(block_name, kind, include_secrets=False)
    except ObjectNotFound as error:
        raise ConfigError(f"--notify {name}: no such block on the server; create it in the UI (Blocks)") from error
    if kind == "webhook":
        return CallWebhook(block_document_id=block.id, payload=f"{SUBJECT}\n{BODY}")
    capabilities = block.block_schema.capabilities if block.block_schema is not None else []
    if "notify" not in capabilities:
        raise ConfigError(f"--notify {name}: blocks of this type cannot send notifications")
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
        # the whole automation: fields that an update leaves out would not be restored
        whole = AutomationCore.model_validate(wanted.model_dump() | {"enabled": found[0].enabled})
        await client.update_automation(found[0].id, whole)
    return Applied("automation", wanted.name, "updated")


def _same(found: Automation, wanted: AutomationCore) -> bool:
    """Return whether two automations are equal, ignoring ids and whether they are enabled, which the user decides."""
    left_out = {"enabled", "owner_resource", "tags"}
    mine, theirs = (
        wanted.model_dump(mode="json"),
        AutomationCore.model_validate(found.model_dump()).model_dump(mode="json"),
    )
    return all(_plain(mine[key]) == _plain(theirs[key]) for key in mine.keys() - left_out)


def _plain(value: Any) -> Any:
    """Return JSON values without ids and with lists sorted: triggers store sets as lists."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if key != "id"}
    if isinstance(value, list):
        return sorted((_plain(each) for each in value), key=repr)
    return value
