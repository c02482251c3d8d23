"""The automations: which events end the watch for a run, and what the absence of a server means for it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore
from prefect.server.events.schemas.automations import EventTrigger
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings
from prefect.states import Cancelled, Crashed

from flows.runs.outcome import Outcome
from flows.runs.prefect_flow import final_state
from flows.server.automations import (
    LOST_AUTOMATION,
    MISSED_HEARTBEATS,
    ZOMBIE_AUTOMATION,
    failure_automation,
    lost_automation,
    restart_deadlines,
    zombie_automation,
)
from medad.base.errors import CaseFailure


def as_the_server_sees_it(automation: AutomationCore) -> EventTrigger:
    trigger = EventTrigger.model_validate(automation.trigger.model_dump())
    assert trigger.within == automation.trigger.within  # type: ignore[union-attr]
    return trigger


def heard(trigger: EventTrigger, state: str) -> bool:
    event = f"prefect.flow-run.{state}"
    return trigger.event_pattern.match(event) is not None and trigger.expects(event)


def test_every_way_a_flow_can_end_is_known_to_the_watch_for_zombies() -> None:
    """Every end of a run must be a known event. Otherwise a finished run would be marked as crashed."""
    failure = CaseFailure("case", "find", "a rule")
    states = [
        final_state(Outcome(1, 0)).name,
        final_state(Outcome(1, 0, (failure,))).name,
        final_state(Outcome(0, 0, (failure,), useful=False)).name,
        *(Cancelled().name, Crashed().name, "TimedOut"),
    ]
    zombies, lost = as_the_server_sees_it(zombie_automation(60)), as_the_server_sees_it(lost_automation(600))
    on_failure = as_the_server_sees_it(failure_automation(SendNotification(block_document_id=uuid4(), body="")))
    for state in states:
        assert state is not None
        assert heard(zombies, state), state
        assert heard(on_failure, state) == (state in {"Failed", "Crashed", "TimedOut"}), state
    assert heard(zombies, "heartbeat")
    assert zombies.starts_after("prefect.flow-run.heartbeat")
    assert not heard(zombies, "Running")
    for state in ("Running", "AwaitingConcurrencySlot", "Scheduled"):
        assert heard(lost, state)
    for state in ("Pending", "Submitting"):
        assert lost.starts_after(f"prefect.flow-run.{state}")
        assert not lost.expects(f"prefect.flow-run.{state}")
    assert zombies.within == timedelta(seconds=MISSED_HEARTBEATS * 60)
    assert MISSED_HEARTBEATS >= 3


HOURS_AGO = datetime.now(UTC) - timedelta(hours=3)


async def keep_deadlines(automations: list[UUID]) -> None:
    """Write a deadline that passed hours ago for each automation, as a server does that was then stopped."""
    from prefect.server.database import provide_database_interface

    database: Any = provide_database_interface()
    async with database.session_context(begin_transaction=True) as session:
        for automation in automations:
            times = {"start": HOURS_AGO, "end": HOURS_AGO + timedelta(seconds=90)}
            key = {"automation_id": automation, "trigger_id": uuid4(), "bucketing_key": ["prefect.flow-run.1"]}
            session.add(database.AutomationBucket(**key, **times, count=0))


async def take_deadlines(automations: list[UUID]) -> list[tuple[datetime, datetime]]:
    """Return the deadlines of these automations in their order, and delete them."""
    from prefect.server.database import provide_database_interface

    database: Any = provide_database_interface()
    table = database.AutomationBucket.__table__
    async with database.session_context(begin_transaction=True) as session:
        where = table.c.automation_id.in_(automations)
        # one statement: SQLite refuses to write after a read if the server has written in between
        taken = await session.execute(table.delete().where(where).returning(table))
        found = {row.automation_id: row for row in taken.all()}
    return [(found[automation].start, found[automation].end) for automation in automations]


@pytest.mark.usefixtures("prefect_server")
def test_a_server_that_starts_gives_runs_their_full_time_again() -> None:
    """Otherwise a server that was away marks each run as crashed before the run's next sign of life."""
    zombies, lost = zombie_automation(60), lost_automation(600)
    others = lost.model_copy(update={"name": "of the administrator"})
    with get_client(sync_client=True) as client:
        ids = [client.create_automation(each) for each in (zombies, lost, others)]
        assert [zombies.name, lost.name] == [ZOMBIE_AUTOMATION, LOST_AUTOMATION]
        try:
            asyncio.run(keep_deadlines(ids))
            before = datetime.now(UTC)
            assert asyncio.run(restart_deadlines()) == 2
            *ours, foreign = asyncio.run(take_deadlines(ids))
        finally:
            for each in ids:
                client.delete_automation(each)
    for start, end in ours:
        assert before <= start <= datetime.now(UTC)
        assert end - start == timedelta(seconds=90)
    assert foreign == (HOURS_AGO, HOURS_AGO + timedelta(seconds=90))


def test_a_server_without_a_database_starts(tmp_path: Path) -> None:
    """The first start of a server creates the tables, after this call."""
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{tmp_path}/new.db"}):
        assert asyncio.run(restart_deadlines()) == 0
