"""The automations of `adflows deploy`: runs that died are marked as crashed, and failed runs are told."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from medad.base.errors import ConfigError

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
class Applied:
    """One object on the server, and what `deploy` did with it."""

    kind: str
    name: str
    status: Status

    @property
    def line(self) -> str:
        return f"{self.status:<9} {self.kind} {self.name}"


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


async def restart_deadlines() -> int:
    """Give each run its full time again to send a sign of life. Returns the number of deadlines.

    Call this before a server starts. No sign of life could arrive while it was away, so a deadline that passed then
    says nothing. A run that lives sends the next one in time, and a run that died is still marked as crashed. Prefect
    ignores signs of life from before the new beginning, so late ones change nothing.
    """
    from prefect.server.database import provide_database_interface

    database: Any = provide_database_interface()
    deadlines, automations = database.AutomationBucket.__table__, database.Automation.__table__
    ours = automations.select().where(automations.c.name.in_([ZOMBIE_AUTOMATION, LOST_AUTOMATION]))
    engine = await database.engine()
    async with engine.begin() as connection:
        # the first start of a server creates the tables
        if not await connection.run_sync(lambda sync: sync.dialect.has_table(sync, deadlines.name)):
            return 0
        now = datetime.now(UTC)
        ids = [row.id for row in await connection.execute(ours)]
        found = (await connection.execute(deadlines.select().where(deadlines.c.automation_id.in_(ids)))).all()
        for row in found:
            times = {"start": now, "end": now + (row.end - row.start)}
            await connection.execute(deadlines.update().where(deadlines.c.id == row.id).values(times))
    await engine.dispose()
    return len(found)


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


async def notification(client: PrefectClient, name: str) -> SendNotification | CallWebhook:
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


async def apply_automation(client: PrefectClient, wanted: AutomationCore, *, dry_run: bool) -> Applied:
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
