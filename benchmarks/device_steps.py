"""Device steps for `orchestration.py`: the idle time between two of one run, and a training beside short steps.

python benchmarks/device_steps.py NUMBER    a run of NUMBER device steps under Prefect; prints their times as JSON
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Python puts the script's folder first, and it has a zsad.py
    sys.path[0] = str(ROOT)

from flows.machine.own_server import prepare_prefect  # noqa: E402

prepare_prefect()

from flows.devices.child import compute_in_child  # noqa: E402
from flows.runs.flow import define_flow  # noqa: E402
from flows.runs.outcome import Outcome  # noqa: E402
from flows.runs.runner import new_runner  # noqa: E402
from flows.store.step import Call, Step  # noqa: E402
from medad.base.settings import ANY_MACHINE, MachineSettings  # noqa: E402

ON_CPU = MachineSettings(gpus="cpu")


SHORT = Step("benchmark-short", 1, "benchmarks.convolve:convolve", (), kind="inference")
TRAINING = Step("benchmark-training", 1, "benchmarks.convolve:convolve", (), kind="training")


@define_flow("benchmark", "benchmark")
def one_after_another(number: int) -> Outcome:
    """Run device steps one after another, as the flows do."""
    runner = new_runner(ANY_MACHINE, refresh=True)
    refs = [runner.run(f"{each}", SHORT(machine=ON_CPU, rounds=40, number=each)) for each in range(number)]
    times = [json.loads((ref.folder() / "times").read_text(encoding="utf-8")) for ref in refs if ref is not None]
    return Outcome.from_runner(runner, details={"times": times})


@dataclass(frozen=True)
class Shared:
    """Times of a training and of short steps, in seconds, and their memory in MB."""

    training: float
    short: float
    both: float
    memory: tuple[float, float]


def run_beside(folder: Path, training_rounds: int, short_rounds: int, shorts: int, *, beside: bool) -> Shared:
    """Run a training and several short steps, each step in a process: beside each other, or one after another."""
    memory = {"training": 0.0, "short": 0.0}
    seconds = dict(memory)

    def compute(kind: str, calls: list[Call]) -> None:
        began = time.monotonic()
        for number, call in enumerate(calls):
            out = folder / f"{kind}-{number}"
            out.mkdir(parents=True, exist_ok=True)
            compute_in_child(call, out, "")
            memory[kind] = max(memory[kind], json.loads((out / "times").read_text(encoding="utf-8"))[2])
        seconds[kind] = time.monotonic() - began

    training = [TRAINING(machine=ON_CPU, rounds=training_rounds, number=0)]
    short = [SHORT(machine=ON_CPU, rounds=short_rounds, number=number) for number in range(shorts)]
    began = time.monotonic()
    work: list[Callable[[], None]] = [lambda: compute("training", training), lambda: compute("short", short)]
    if beside:
        threads = [threading.Thread(target=each) for each in work]
        for thread in threads:
            thread.start()
            time.sleep(0.5)  # the training was there first
        for thread in threads:
            thread.join()
    else:
        for each in work:
            each()
    return Shared(
        seconds["training"], seconds["short"], time.monotonic() - began, (memory["training"], memory["short"])
    )


def main() -> None:
    outcome: Any = one_after_another.run(int(sys.argv[1]))
    print(json.dumps(outcome.details["times"]))


if __name__ == "__main__":
    main()
