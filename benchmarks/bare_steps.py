"""The flows' steps without the flows: each domain call after the other, in this process, nothing kept or looked up."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import flows.liver.flow
import flows.zsad.flow
from flows.cli.demo import liver_demo, zsad_demo
from flows.devices.child import Place
from flows.machine.environment import cache_root
from flows.runs.runner import Submitted, Tally
from flows.store.artifacts import Ref
from flows.store.step import DeviceJob, Job
from medad.base.settings import MachineSettings


class Here(Place):
    """This process; nobody watches."""

    def report(self, *progress: Any) -> None:
        pass


@dataclass(frozen=True)
class Done(Submitted):
    label: str
    found: Ref

    def ref(self) -> Ref | None:
        return self.found


class Bare(Tally):
    """Runs each job when it is handed in."""

    def __init__(self, machine: MachineSettings, *, refresh: bool = False) -> None:
        super().__init__(machine, refresh=refresh)
        self.count = 0

    def _begin(self) -> None:
        pass

    def submit(self, label: str, job: Job) -> Submitted:
        self.count += 1
        key = hashlib.sha256(f"{self.count}".encode()).hexdigest()
        out = cache_root() / job.step.name / key
        out.mkdir(parents=True)
        if isinstance(job, DeviceJob):
            job.run_on(out, Here("cpu", job.batch_size, key, None))  # type: ignore[arg-type]
        else:
            job.run(out, key=key)
        return Done(label, Ref(step=job.step.name, key=key, digest=key, path=f"{job.step.name}/{key}"))


def _bare(machine: MachineSettings, *, refresh: bool) -> Tally:
    return Bare(machine, refresh=refresh)


def run_liver() -> None:
    """What the flow `liver` does with the demo's settings, report included."""
    flows.liver.flow.new_tally = _bare  # type: ignore[attr-defined]
    settings, notes = liver_demo(lambda line: None)
    stages = flows.liver.flow.Stages(settings, refresh=False)
    training, cases = stages.prepare_training(), stages.prepare_test()
    models = stages.train(training)
    assert models is not None
    assert stages.report(stages.segment_and_evaluate(cases, models, settings.test_data), models, notes)
    assert not stages.tally.failures


def run_zsad() -> None:
    """What the flow `zsad` does with the demo's settings, report included."""
    flows.zsad.flow.new_tally = _bare  # type: ignore[attr-defined]
    stages = flows.zsad.flow.Stages(zsad_demo(lambda line: None), refresh=False)
    assert stages.report(stages.score(stages.encode(stages.find())))
    assert not stages.tally.failures
