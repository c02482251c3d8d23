"""Runs commands' flows without Prefect, whose second a flow adds up where it is not what is tested."""

from __future__ import annotations

from typing import Any

import pytest

from flows.runs.flow import OurFlow
from flows.runs.outcome import Outcome

COMMANDS = ("flows.cli.app", "flows.cli.inbox", "flows.cli.liver", "flows.cli.studies", "flows.cli.zsad")


def run_flow(flow: OurFlow[...], *, dry_run: bool = False, **parameters: Any) -> Outcome:
    """Stand in for `flows.cli.options.run_flow`."""
    return flow.plan(**parameters) if dry_run else flow.local(**parameters)


def without_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all commands run their flows so."""
    for module in COMMANDS:
        monkeypatch.setattr(f"{module}.run_flow", run_flow)
