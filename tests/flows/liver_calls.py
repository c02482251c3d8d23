"""The calls of the liver flow's steps with fixed artifacts as inputs, and their keys."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from flows.liver import steps as liver_steps
from flows.liver import training_steps
from flows.liver.training_steps import TrainingCase
from flows.store.references import Ref
from flows.store.step import Call, content_key
from medad.base.errors import CaseFailure
from medad.cohort.datasets import Case, LabelledScan
from medad.config.liver import InsertSettings, LiverSettings, parse
from medad.steps.results import CaseResult, Member, Model

BASE: dict[str, Any] = {
    "name": "base",
    "train_data": {"root": "/data/btcv", "layout": "btcv"},
    "test_data": {"root": "/data/lits", "layout": "lits", "insert": {"count": 2}},
}


def ref(step: str, content: str = "a") -> Ref:
    return Ref(step=step, key=content * 64, digest=content * 64, path=f"{step}/{content * 64}")


MODEL = Model((Member(ref("restoration"), ref("segmentation")),))
HEALTHY = (TrainingCase(ref("prepare")),)


def report_of(settings: LiverSettings, *results: CaseResult[Ref], failures: tuple[CaseFailure, ...] = ()) -> Call:
    return liver_steps.report(settings, results, failures, MODEL, {"python": "3"}, ())


def result_of(case: Case) -> CaseResult[Ref]:
    return CaseResult(case.id, ref("prepare"), ref("segment"), ref("evaluate"))


def calls_of(settings: LiverSettings, case: Case) -> dict[str, Call]:
    """Return the calls of all steps of the flow, with fixed artifacts as inputs."""
    data = settings.test_data
    scan = LabelledScan.of(case, data)
    prepared, restoration = ref("prepare"), ref("restoration")
    return {
        "insert": liver_steps.insert(scan, data.insert or InsertSettings()),
        "prepare": liver_steps.prepare(scan, settings.preprocess, training=False, exclude=settings.inference.exclude),
        "restoration": training_steps.train("restoration", HEALTHY, settings),
        "segmentation": training_steps.train("segmentation", HEALTHY, settings, restoration),
        "segment": liver_steps.segment(prepared, MODEL, settings.inference, settings.postprocess, settings.machine),
        "evaluate": liver_steps.evaluate(scan, prepared, ref("segment"), settings.evaluation),
        "case-page": liver_steps.case_page(scan, result_of(case)),
        "report": report_of(settings, result_of(case)),
    }


def key(call: Call) -> str:
    return content_key(call.parts())


def changed_in(call: Call, **arguments: Any) -> Call:
    """Return the call with other arguments."""
    return replace(call, arguments={**call.arguments, **arguments})


def keys_of(settings: LiverSettings, case: Case) -> dict[str, str]:
    return {name: key(call) for name, call in calls_of(settings, case).items()}


def changed(key: str, value: object) -> LiverSettings:
    values = copy.deepcopy(BASE)
    *parents, leaf = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
    place[leaf] = value
    return parse(values, source="test")
