"""The flows' steps without Prefect: one call after another in this process, with results in the cache."""

from __future__ import annotations

from flows.cli.demo import liver_demo, zsad_demo
from flows.liver.stages import Stages as LiverStages
from flows.runs.runner import LocalRunner, use_runner
from flows.zsad.flow import Stages as ZsadStages


def run_liver() -> None:
    """Do what the flow `liver` does with the demo's settings, including the report."""
    settings, notes = liver_demo(lambda line: None)
    with use_runner(LocalRunner):
        stages = LiverStages(settings, refresh=False)
    training, cases = stages.prepare_training(), stages.prepare_test()
    models = stages.train(training)
    assert models is not None
    assert stages.report(stages.segment_and_evaluate(cases, models, settings.test_data), models, notes)
    assert not stages.runner.failures


def run_zsad() -> None:
    """Do what the flow `zsad` does with the demo's settings, including the report."""
    settings = zsad_demo(lambda line: None)
    with use_runner(LocalRunner):
        stages = ZsadStages(settings, refresh=False)
    assert stages.report(stages.score(stages.encode(stages.find())))
    assert not stages.runner.failures
