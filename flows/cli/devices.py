"""`adflows devices`: who has the devices of this machine, and who waits."""

from __future__ import annotations

import json
from dataclasses import asdict

from flows.cli.options import Json
from flows.machine.terminal import print_result


def devices(as_json: Json = False) -> None:
    """List who has the devices of this machine, and who waits for them.

    Prints one line per GPU that was used before, and two for the CPU: `cpu` for trainings, `cpu-short` for all other
    steps. Runs of all users are listed. The order of those who wait is the order in which they asked.
    """
    from flows.devices.slots import slot_states

    states = slot_states()
    if as_json:
        print_result(json.dumps([asdict(state) for state in states], indent=1))
        return
    width = max(len(state.name) for state in states)
    for state in states:
        print_result(f"{state.name:<{width}}  {state.line}")
