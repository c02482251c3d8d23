"""Liver masks of scans that have none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.liver import mask_steps
from flows.liver.mask_steps import FOUND_LABELS, LIVER_FILE
from flows.liver.stages import Stages
from flows.runs.runner import Runner
from flows.store.references import Ref
from medad.config.header import HeaderSettings

if TYPE_CHECKING:
    from medad.cohort.datasets import Case


def find_livers(
    stages: Stages, cases: list[Case], header: HeaderSettings, model: Path | None, *, trust: bool = False
) -> list[Case]:
    """Return the cases, each with a liver mask: its own, or one that is found now. A failed case is left out.

    `stages.liver_masks` has the found masks, for the run folder and for `mask_notes`.
    """
    missing = {case.id: case for case in cases if case.label is None}
    if not missing:
        return cases
    from medad.steps.liver_mask import choose_finder

    finder = choose_finder(model, trust=trust)
    tasks = [
        (case, stages.runner.submit(case.id, mask_steps.liver_mask(case.scan, finder, header)))
        for case in missing.values()
    ]
    found = {case.id: case for case in cases if case.label is not None}
    for case, task in tasks:
        if (ref := task.ref()) is not None:
            stages.liver_masks[case.id] = ref
            found[case.id] = replace(case, label=ref.folder() / LIVER_FILE, liver_labels=FOUND_LABELS)
    return [found[case.id] for case in cases if case.id in found]


def find_liver(
    runner: Runner, label: str, scan: Path, header: HeaderSettings, model: Path | None = None, *, trust: bool = False
) -> Ref | None:
    """Find the liver of one scan. None: it failed, and the runner recorded why.

    Raises InputError if the path `model` contains no network.
    """
    from medad.steps.liver_mask import choose_finder

    return runner.run(label, mask_steps.liver_mask(scan, choose_finder(model, trust=trust), header))


def mask_facts(mask: Ref) -> dict[str, Any] | None:
    """Return method, sureness, volume in mL and notes of an automatic mask. None in a dry run."""
    file = mask.folder() / "case.json"
    facts: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return facts


def describe_mask(case_id: str, facts: Mapping[str, Any]) -> str:
    """Return one sentence that says how an automatic mask was found."""
    more = "".join(f"; {note}" for note in facts["notes"])
    return (
        f"{case_id}: the liver mask was made automatically ({facts['method']}, sureness "
        f"{facts['sureness']:.2f}, {facts['liver_ml']:.0f} mL{more})."
    )


def mask_notes(masks: Mapping[str, Ref]) -> list[str]:
    """Return one line for the report about each automatic mask, by case."""
    return [
        f"{describe_mask(case_id, facts)} Check liver_masks/{case_id}.nii.gz; "
        "give a corrected mask to `adflows liver segment` with --liver."
        for case_id, mask in masks.items()
        if (facts := mask_facts(mask)) is not None
    ]
