"""The watcher of a machine's inboxes: it creates a run for new scans, and none while there is nothing to do.

    python -m flows.server.inbox_watch POOL QUEUE

`adflows serve` and `adflows worker` run it beside the worker. An inbox is watched while the switch of its deployment
in this machine's queue is on (`flows.server.inboxes`). Each inbox has a thread, so that a share that hangs does not
stop the others. The watcher stores nothing: it may be killed at any time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import StateType

from flows.inbox.arrivals import Arrival
from flows.inbox.news import InboxNews
from flows.machine.terminal import print_result
from flows.runs.runner import to_case_failure
from flows.server.inboxes import INBOX_FLOW, WatchedInbox, read_watched
from medad.base.errors import ConfigError, UserError

LOOK_VARIABLE = "ADFLOWS_WATCH_SECONDS"
"""Variable with the time between two looks into an inbox, s."""
LOOK_S = 60.0
RETRY_S = (300.0, 3600.0)
"""Shortest and longest time until another run for scans that a run left behind. It doubles with each run."""
HANGS_S = 300.0
"""Time after which a look counts as hanging."""
_ACTIVE = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)


def look_s() -> float:
    """Return the time between two looks: $ADFLOWS_WATCH_SECONDS, else a minute. Raise ConfigError for a bad value."""
    text = os.environ.get(LOOK_VARIABLE, str(LOOK_S))
    with contextlib.suppress(ValueError):
        if 1 <= (value := float(text)) <= 86400:
            return value
    raise ConfigError(f"{LOOK_VARIABLE}={text}: expected a number of seconds from 1 to 86400")


class News(Protocol):
    """The news of an inbox, as `flows.inbox.news.InboxNews` has it."""

    def look(self, *, read: bool = False) -> frozenset[Arrival]: ...
    def next_look_s(self, longest: float) -> float: ...


class Runs(Protocol):
    """The runs of inboxes, as a server has them."""

    def is_busy(self, inbox: WatchedInbox) -> bool: ...
    def create(self, inbox: WatchedInbox) -> None: ...


class ServerRuns:
    """The runs of inboxes on the server. One connection serves all threads."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client
        self.lock = threading.Lock()

    def is_busy(self, inbox: WatchedInbox) -> bool:
        """Return whether a run of this inbox exists that has not ended. Later runs of a schedule do not count."""
        flow, active = FlowFilter(name={"any_": [INBOX_FLOW]}), FlowRunFilter(state={"type": {"any_": [*_ACTIVE]}})
        with self.lock:
            runs = self.client.read_flow_runs(flow_filter=flow, flow_run_filter=active)
        return any(
            run.parameters.get("config") == inbox.config
            for run in runs
            if not (run.auto_scheduled and run.state_type is StateType.SCHEDULED)
        )

    def create(self, inbox: WatchedInbox) -> None:
        """Create a run, once even if the request has to be repeated."""
        with self.lock:
            self.client.create_flow_run_from_deployment(
                inbox.deployment, name=f"inbox {inbox.config}", idempotency_key=uuid.uuid4().hex
            )


class Notice:
    """A problem that is printed when it begins and when it ends, and not in between."""

    def __init__(self, label: str, tell: Callable[[str], None] = print_result) -> None:
        self.label, self.tell, self.text = label, tell, ""

    def set(self, text: str) -> None:
        """Tell a problem, or with an empty text its end."""
        if text != self.text:
            self.tell(f"{self.label}: {text or 'works again'}")
        self.text = text


@dataclass
class InboxWatch:
    """The watch of one inbox."""

    inbox: WatchedInbox
    news: News
    runs: Runs
    notice: Notice
    longest: float = LOOK_S
    clock: Callable[[], float] = time.monotonic
    on: bool = True
    looking_since: float | None = None
    """Begin of the look in progress."""
    _tried: frozenset[Arrival] = frozenset()
    """Scans that a run was created for."""
    _delay: float = RETRY_S[0]
    _retry_at: float = 0.0

    def step(self) -> float:
        """Look once, and create a run if there is news. Return the time until the next look."""
        self.looking_since = self.clock()
        try:
            self._act(self.news.look())
            self.notice.set("")
        except Exception as error:  # a share or a server can raise anything, and the watch goes on
            known = isinstance(error, UserError)
            self.notice.set(to_case_failure("", "find", error).rule if known else f"no answer ({type(error).__name__})")
            return self.longest
        finally:
            self.looking_since = None
        return self.news.next_look_s(self.longest)

    def _act(self, found: frozenset[Arrival]) -> None:
        fresh = bool(found - self._tried)
        if not fresh:
            self._tried = found  # one that leaves the news and comes back is fresh
            if not found or self.clock() < self._retry_at:
                return
            found = self.news.look(read=True)
            if not found:
                return
        if self.runs.is_busy(self.inbox):
            self._retry_at = self.clock() + self._delay
            return
        self.runs.create(self.inbox)
        low, high = RETRY_S
        self._delay = low if fresh else min(high, 2 * self._delay)
        self._tried, self._retry_at = found, self.clock() + self._delay

    def switch(self, on: bool) -> None:
        """Switch the watch on or off. Scans that were tried before count as new when it is switched on."""
        if on and not self.on:
            self._tried = frozenset()
        self.on = on

    def loop(self) -> None:
        """Look until the process ends."""
        while True:
            time.sleep(self.step() if self.on else self.longest)


@dataclass
class Watcher:
    """The watcher of all inboxes of a machine's queue."""

    pool: str
    queue: str
    longest: float
    notice: Notice = field(default_factory=lambda: Notice("inbox watcher"))
    watches: dict[str, InboxWatch] = field(default_factory=dict)

    def run(self) -> None:
        """Follow the switches on the server until the process ends."""
        with get_client(sync_client=True) as client:
            runs = ServerRuns(client)
            while True:
                try:
                    self.follow(runs)
                    self.notice.set("")
                except Exception as error:  # a server that is away raises many things; no run can be created meanwhile
                    self.notice.set(f"the server cannot be asked ({type(error).__name__})")
                time.sleep(self.longest)

    def follow(self, runs: ServerRuns) -> None:
        """Read the switches, and start a thread for each inbox that is switched on for the first time."""
        with runs.lock:
            watched = {each.config: each for each in read_watched(runs.client, self.pool, self.queue) if each.on}
            if watched and not self.watches:
                template = runs.client.read_work_pool(self.pool).base_job_template
                os.chdir(template["job_configuration"]["working_dir"])  # paths of configurations begin there
        for config, inbox in watched.items():
            if config not in self.watches:
                self._start(inbox, runs)
            self.watches[config].inbox = inbox
        for config, watch in self.watches.items():
            watch.switch(config in watched)
            since = watch.looking_since
            if since is not None and time.monotonic() - since > HANGS_S:
                watch.notice.set("the folder or the server does not answer")

    def _start(self, inbox: WatchedInbox, runs: ServerRuns) -> None:
        news, notice = InboxNews(inbox.config), Notice(f"inbox {inbox.config}")
        watch = self.watches[inbox.config] = InboxWatch(inbox, news, runs, notice, self.longest)
        print_result(f"inbox {inbox.config}: watched every {self.longest:g} s")
        threading.Thread(target=watch.loop, name=f"inbox {inbox.config}", daemon=True).start()


def main() -> None:
    """Watch the inboxes of the queue that the arguments name."""
    pool, queue = sys.argv[1:]
    Watcher(pool, queue, look_s()).run()


if __name__ == "__main__":
    main()
