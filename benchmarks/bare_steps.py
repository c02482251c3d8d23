"""The flows' steps without Prefect: one call after another in this process, with results in the cache."""

from __future__ import annotations

from flows.cli.demo import liver_demo, zsad_demo
from flows.liver.stages import ReadyCase
from flows.liver.stages import Stages as LiverStages
from flows.runs.runner import LocalRunner, use_runner
from flows.store.references import Ref
from flows.zsad.stages import Stages as ZsadStages
from medad.steps.results import Model


def run_liver() -> None:
    """Do what both liver flows of the demo do, including the reports."""
    demo = liver_demo(lambda line: None)
    with use_runner(LocalRunner):
        packaged, trained = (LiverStages(settings, refresh=False) for settings in (demo.packaged, demo.trained))
    packaged.uses = ("test",)
    cases, model = packaged.prepare_test(), packaged.adopt(demo.model)
    _segment_and_report(packaged, cases, model, demo.packaged_notes)
    training, cases = trained.prepare_training(), trained.prepare_test()
    _segment_and_report(trained, cases, trained.train(training), demo.trained_notes)


def _segment_and_report(
    stages: LiverStages, cases: list[ReadyCase], model: Model[Ref] | None, notes: tuple[str, ...]
) -> None:
    assert model is not None
    assert stages.report(stages.segment_and_evaluate(cases, model, stages.settings.test_data), model, notes)
    assert not stages.runner.failures


def run_zsad() -> None:
    """Do what the flow `zsad` does with the demo's settings, including the report."""
    settings = zsad_demo(lambda line: None)
    with use_runner(LocalRunner):
        stages = ZsadStages(settings, refresh=False)
    systems, _ = stages.score(stages.prepare())
    assert stages.report(systems)
    assert not stages.runner.failures
