"""Liver masks of scans that have none, and warnings about masks that the user gave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.liver import mask_steps
from flows.liver.stages import Stages
from medad.config.liver import DatasetSettings

if TYPE_CHECKING:
    from medad.cohort.datasets import Case


def find_livers(stages: Stages, cases: list[Case], affine_from: str, model: Path | None) -> list[Case]:
    """Return the cases, each with a liver mask: its own, or one that is found now. A failed case is left out.

    A note in the report says how each mask was found.
    """
    from medad.steps.liver_mask import choose_finder

    missing = {case.id: case for case in cases if case.label is None}
    if not missing:
        return cases
    finder = choose_finder(model)
    tasks = [
        (case, stages.runner.submit(case.id, mask_steps.liver_mask(case.scan, finder, affine_from)))
        for case in missing.values()
    ]
    found = {case.id: case for case in cases if case.label is not None}
    for case, task in tasks:
        if (ref := task.ref()) is not None:
            stages.liver_masks[case.id] = ref
            if (ref.folder() / "case.json").is_file():  # a dry run has no file
                stages.runner.notes.append(mask_note(case.id, ref.folder()))
            found[case.id] = replace(case, label=ref.folder() / "liver.nii.gz", liver_labels=(1,))
    return [found[case.id] for case in cases if case.id in found]


def mask_note(case_id: str, folder: Path) -> str:
    """Return one line about an automatic mask in the folder of its step."""
    facts = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    more = "".join(f"; {note}" for note in facts["notes"])
    return (
        f"{case_id}: the liver mask was made automatically ({facts['method']}, sureness "
        f"{facts['sureness']:.2f}, {facts['liver_ml']:.0f} mL{more}). "
        f"Check liver_masks/{case_id}.nii.gz; give a corrected mask with --liver."
    )


def check_livers(stages: Stages, cases: list[Case], data: DatasetSettings) -> None:
    """Check the given masks of cases and note broken rules. They stop nothing."""
    from medad.cohort.datasets import LabelledScan

    tasks = [
        (case, stages.runner.submit(case.id, mask_steps.check_liver(LabelledScan.of(case, data)))) for case in cases
    ]
    for case, task in tasks:
        if (ref := task.ref()) is None or not (ref.folder() / "case.json").is_file():
            continue  # it failed, or this is a dry run
        facts = json.loads((ref.folder() / "case.json").read_text(encoding="utf-8"))
        if facts["warnings"]:
            stages.runner.notes.append(
                f"{case.id}: the given liver mask looks unusual: {'; '.join(facts['warnings'])}."
            )
