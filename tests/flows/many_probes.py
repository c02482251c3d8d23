"""A flow of many device steps, for a new process: `python many_probes.py ENGINE COUNT SEED FOLDER`."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from flows.machine.own_server import prepare_prefect


def many(engine: str, count: int, seed: int, folder: str) -> str:
    # not at the top, because every child process imports this program
    from flows.runs.prefect_runner import PrefectRunner
    from medad.base.settings import MachineSettings
    from tests.flows.device_jobs import probing

    machine = MachineSettings.model_validate({"engine": engine, "engine_workers": 2})
    runner = PrefectRunner(machine)
    draw = random.Random(seed)
    calls = [
        probing(f"{number}", "alone", machine, 1 << 20, Path(folder), draw.uniform(0, 0.15)) for number in range(count)
    ]
    draw.shuffle(calls)
    refs = [task.ref() for task in [runner.submit(call.arguments["text"], call) for call in calls]]
    return json.dumps(
        {
            "done": sum(ref is not None for ref in refs),
            "computed": runner.computed,
            "cached": runner.cached,
            "failures": [failure.rule for failure in runner.failures],
        }
    )


if __name__ == "__main__":
    prepare_prefect()
    from prefect import flow

    from flows.devices.engines import TASK_RUNNER

    run = flow(task_runner=TASK_RUNNER, persist_result=False)(many)
    print(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))  # noqa: T201
