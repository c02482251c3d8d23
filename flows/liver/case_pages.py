"""The pages to scroll through the scans of segmented cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flows.liver import steps
from flows.machine.terminal import terminal
from flows.runs.runner import Runner
from flows.store.references import Ref
from medad.config.liver import LiverSettings
from medad.steps.results import CaseResult

if TYPE_CHECKING:
    from medad.cohort.datasets import LabelledScan


def add_pages(
    runner: Runner, settings: LiverSettings, scans: Mapping[str, LabelledScan], results: Sequence[CaseResult[Ref]]
) -> list[CaseResult[Ref]]:
    """Write the pages of cases unless the settings say no. Return the cases with their pages.

    A case whose page cannot be written is listed as a failure, and keeps its other results.
    """
    if not settings.viewer or not results:
        return list(results)
    with terminal.stages({steps.CASE_PAGE.name: len(results)}):
        calls = [(each.case_id, steps.case_page(scans[each.case_id], each)) for each in results]
        tasks = [runner.submit(case_id, call) for case_id, call in calls]
        return [replace(each, page=task.ref()) for each, task in zip(results, tasks, strict=True)]
