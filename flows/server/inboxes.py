"""The deployments of inboxes: one for each configuration in the folder `inbox`, with a switch for its watcher.

The switch is a schedule that never makes a run, because it begins in the year 2100. Prefect's UI shows it as a switch,
and `adflows watch` sets it. The watcher of the deployment's queue reads it (`flows.server.inbox_watch`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient, SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, WorkPoolFilter, WorkQueueFilter
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from flows.machine.environment import config_names
from flows.server.automations import Applied
from flows.server.run import BY_HAND, inbox_deployment
from medad.base.errors import ConfigError

INBOX_FLOW = "liver-inbox"
"""Name of the flow."""
WATCH_TAG = "watched-inbox"
SWITCH = "watch"
"""Slug of the schedule that is the switch."""
NEVER = "DTSTART:21000101T000000\nRRULE:FREQ=MINUTELY"
FORMER_SLUG = "each-minute"
"""Slug of the schedule with which earlier versions made a run each minute."""


@dataclass(frozen=True)
class WatchedInbox:
    """An inbox with a deployment on the server."""

    config: str
    """Name of its configuration."""
    deployment: UUID
    queue: str
    """Queue of the machine that watches it."""
    switch: UUID | None
    on: bool


def inbox_entries(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the deployments of all inboxes, in the form of prefect.yaml, from its deployment by hand."""
    [by_hand] = [entry for entry in values["deployments"] if entry["name"] == BY_HAND] or [None]
    if by_hand is None:
        return []
    return [
        by_hand
        | {
            "name": inbox_deployment(config),
            "description": f"Segments each new scan of the inbox {config} once. While its schedule is switched on, "
            "the worker's machine looks for new scans, and makes a run only for these.",
            "tags": [*by_hand["tags"], WATCH_TAG],
            "parameters": by_hand.get("parameters", {}) | {"config": config},
            "schedules": [{"slug": SWITCH, "rrule": NEVER, "timezone": "UTC", "active": False}],
        }
        for config in config_names("inbox")
    ]


def _watched(deployment: DeploymentResponse) -> WatchedInbox:
    switch = next((each for each in deployment.schedules if each.slug == SWITCH), None)
    return WatchedInbox(
        str(deployment.parameters.get("config")),
        deployment.id,
        str(deployment.work_queue_name),
        None if switch is None else switch.id,
        switch is not None and bool(switch.active) and not deployment.paused,
    )


def read_watched(client: SyncPrefectClient, pool: str, queue: str | None = None) -> list[WatchedInbox]:
    """Return the inboxes with a deployment in a work pool, or only those of one queue."""
    found = client.read_deployments(
        deployment_filter=DeploymentFilter(tags={"all_": [WATCH_TAG]}),
        work_pool_filter=WorkPoolFilter(name={"any_": [pool]}),
        work_queue_filter=None if queue is None else WorkQueueFilter(name={"any_": [queue]}),
    )
    return sorted(map(_watched, found), key=lambda inbox: inbox.config)


def switch_inbox(client: SyncPrefectClient, pool: str, config: str, *, on: bool) -> None:
    """Switch the watching of an inbox on or off. Raises ConfigError for an inbox without a deployment."""
    inbox = next((each for each in read_watched(client, pool) if each.config == config), None)
    if inbox is None or inbox.switch is None:
        raise ConfigError(f"{config}: no inbox with a deployment that can be switched; run `adflows deploy`")
    client.update_deployment_schedule(inbox.deployment, inbox.switch, active=on)


async def replace_minutely_runs(
    client: PrefectClient, known: Iterable[DeploymentResponse], *, dry_run: bool
) -> list[Applied]:
    """Remove the schedule of earlier versions, and switch on the watcher of an inbox that it was switched on for.

    The schedule stays if it is on and its inbox has no deployment of its own yet.
    """
    rows = []
    for deployment in known:
        if deployment.name != BY_HAND:
            continue
        for schedule in deployment.schedules:
            if schedule.slug != FORMER_SLUG:
                continue
            config = schedule.parameters.get("config") or deployment.parameters.get("config")
            if not dry_run:
                if schedule.active and not deployment.paused and not await _switch_on(client, str(config)):
                    continue
                await client.delete_deployment_schedule(deployment.id, schedule.id)
            rows.append(Applied("switch of inbox", str(config), "updated"))
    return rows


async def _switch_on(client: PrefectClient, config: str) -> bool:
    """Switch the watcher of an inbox on. Return whether it has a switch."""
    try:
        deployment = await client.read_deployment_by_name(f"{INBOX_FLOW}/{inbox_deployment(config)}")
    except ObjectNotFound:
        return False
    if (switch := _watched(deployment).switch) is None:
        return False
    await client.update_deployment_schedule(deployment.id, switch, active=True)
    return True
