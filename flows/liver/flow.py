"""The liver flows: prepare each case, train in two phases, segment and evaluate each case, report, publish.

Each stage (`flows.liver.stages`) can be run separately; the flow `liver` runs all stages with one runner. A case that
breaks a rule is left out and listed as a failure. The report is written even if cases failed.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.liver import split, steps
from flows.liver.liver_masks import find_liver, find_livers, mask_notes
from flows.liver.stages import ReadyCase, Stages
from flows.machine.terminal import terminal
from flows.privacy import case_ids
from flows.privacy.log_filter import path_filter
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome
from flows.runs.runner import new_runner
from medad.base.errors import CaseFailure
from medad.base.private import PrivatePath
from medad.base.settings import ANY_MACHINE
from medad.config.header import HeaderSettings
from medad.config.liver import LiverSettings

_DATA = ("train_data", "test_data")
UNKNOWN_TRAINING_NOTE = "The model's folder does not list its training cases; they may include cases tested here."
"""Note in the report."""


class SegmentRequest(BaseModel):
    """Scans to segment. Prefect stores a flow's parameters as JSON, so all paths here are private."""

    scans: tuple[PrivatePath, ...]
    liver_masks: tuple[PrivatePath, ...] = ()
    """Liver masks, one for each scan, on its grid. Empty: the livers are found automatically."""
    liver_model: PrivatePath | None = None
    """Network that finds the livers, as TorchScript or MONAI bundle. None: TotalSegmentator or the built-in method."""
    trust: bool = False
    """Whether that network may be a TorchScript file, which runs when it is loaded."""
    model: PrivatePath
    """Folder of an earlier run."""
    out: PrivatePath
    dicom: bool = False
    """Whether DICOM results are written, for scans that are DICOM."""
    original_names: bool = False
    """Whether the files in the run folder are named after the scans. The report and Prefect have pseudonyms."""


class LiverMaskRequest(BaseModel):
    """A scan whose liver is to be found."""

    scan: PrivatePath
    liver_model: PrivatePath | None = None
    """Network that finds the liver. None: TotalSegmentator or the built-in method."""
    trust: bool = False
    """Whether that network may be a TorchScript file, which runs when it is loaded."""
    header: HeaderSettings = HeaderSettings()


@define_flow("liver", "liver {settings.name}")
def liver(settings: LiverSettings, out: Path, refresh: bool = False, notes: tuple[str, ...] = ()) -> Outcome:
    """Run all stages, from scans to a report in the run folder `out`."""
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh)
    training = stages.prepare_training()
    cases = stages.prepare_test()
    model = stages.train(training)
    results = [] if model is None else stages.segment_and_evaluate(cases, model, settings.test_data)
    return stages.finish(out, results, model, notes, started)


@define_flow("liver-prepare", "prepare {settings.name}")
def prepare(settings: LiverSettings, refresh: bool = False) -> Outcome:
    """Prepare all cases of a configuration. This finds problems of a data set before a long training."""
    stages = Stages(settings, refresh=refresh)
    submitted = stages.prepare_training()
    test = stages.prepare_test()
    training = [(task.label, ref) for task in submitted if (ref := task.ref()) is not None]
    stages.passes_leakage_check(training, test)
    pairs = {"train": training, "test": [(each.case.id, each.prepared) for each in test]}
    details: dict[str, Any] = {
        use: [{"case": case_id, "folder": str(ref.folder())} for case_id, ref in found] for use, found in pairs.items()
    }
    return Outcome.from_runner(stages.runner, details=details, useful=any(details.values()))


@define_flow("liver-export-slices", "export slices of {settings.name}")
def export_slices(settings: LiverSettings, with_training: bool = False, refresh: bool = False) -> Outcome:
    """Export slices of the test cases as images, and of the training cases if requested. Cases get pseudonyms."""
    from medad.cohort.datasets import LabelledScan

    hidden = {name: getattr(settings, name).model_copy(update={"pseudonyms": True}) for name in _DATA}
    settings = settings.model_copy(update=hidden)
    stages = Stages(settings, refresh=refresh, uses=split.BOTH if with_training else ("test",))
    submitted = stages.prepare_training() if with_training else []
    test = stages.prepare_test()
    training = [(task.label, ref) for task in submitted if (ref := task.ref()) is not None]
    calls = []
    if stages.passes_leakage_check(training, test):
        data = settings.test_data
        calls += [(each.case.id, steps.export_slices(LabelledScan.of(each.case, data), each.prepared)) for each in test]
        calls += [(case_id, steps.export_slices(None, ref)) for case_id, ref in training]
    tasks = [stages.runner.submit(case_id, call) for case_id, call in calls]
    exported = [(task.label, ref) for task in tasks if (ref := task.ref()) is not None]
    details: dict[str, Any] = {
        "exported": [{"case": case_id, "folder": str(ref.folder())} for case_id, ref in exported]
    }
    return Outcome.from_runner(stages.runner, details=details, useful=bool(exported))


@define_flow("liver-train", "train {settings.name}")
def train(settings: LiverSettings, out: Path, base: Path | None = None, refresh: bool = False) -> Outcome:
    """Prepare the training cases and train the model. Writes the model and a training report into the run folder.

    `base` is the folder of a run whose model the training starts from. None: the initial weights are random.
    """
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh, uses=("train",))
    if base is not None:
        stages.trained = split.training_rows(base)
        stages.base = stages.adopt(base)
        if stages.base is None:
            return stages.finish(out, [], None, (), started)
    model = stages.train(stages.prepare_training())
    return stages.finish(out, [], model, (), started)


@define_flow("liver-evaluate", "evaluate {settings.name}")
def evaluate(
    settings: LiverSettings, model: Path, out: Path, refresh: bool = False, notes: tuple[str, ...] = ()
) -> Outcome:
    """Segment and evaluate a configuration's test cases with the networks of an earlier run.

    A test case must not be of a patient that the run's manifest lists as training data.
    """
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh, uses=("test",))
    stages.trained = split.training_rows(model)
    if not stages.trained:
        stages.runner.notes.append(UNKNOWN_TRAINING_NOTE)
    cases = stages.prepare_test()
    adopted = stages.adopt(model)
    results = [] if adopted is None else stages.segment_and_evaluate(cases, adopted, settings.test_data)
    return stages.finish(out, results, adopted, notes, started)


@define_flow("liver-segment", "segment")
def segment(request: SegmentRequest, settings: LiverSettings, refresh: bool = False) -> Outcome:
    """Segment scans with the networks of an earlier run; `test_data` describes the scans.

    Cases get pseudonyms, because file names may contain names of patients. A scan with several masks is one case per
    mask, numbered from the second one on.
    """
    from medad.cohort.datasets import Case

    started = time.monotonic()
    data = settings.test_data
    stages = Stages(settings, refresh=refresh, uses=())
    stages.pseudonymous = True
    # as the scans' names are hidden, hide those of the training cases too
    stages.trained = [
        row | {"case": f"trained-{number}"} for number, row in enumerate(split.training_rows(request.model), start=1)
    ]
    cases: dict[str, Case] = {}
    given: defaultdict[str, list[Path | None]] = defaultdict(list)
    masks = request.liver_masks or (None,) * len(request.scans)
    for scan, mask, case_id in zip(request.scans, masks, case_ids.identify(request.scans), strict=True):
        path_filter.learn(scan, case_id)
        if mask is not None:
            path_filter.learn(mask, case_id)
        again = given[case_id]  # masks of the same scan
        given[case_id] = [*again, mask]
        if mask in again:
            stages.runner.record_failure(CaseFailure(case_id, "find", "this scan was given twice", str(scan)))
            continue
        name = f"{case_id}-{len(again) + 1}" if again else case_id
        cases[name] = Case(name, scan, mask, data.liver_labels or (), None, pseudonymous=True)
    stages.record_pseudonyms(list(cases.values()))
    if request.original_names:
        stages.names = file_names({case_id: case.scan for case_id, case in cases.items()})
    found = find_livers(stages, list(cases.values()), data, request.liver_model, trust=request.trust)
    stages.runner.notes += mask_notes(stages.liver_masks)
    ready = stages.prepare_cases(found, data)
    if request.dicom:
        stages.dicom_cases = {each.case.id: each.case for each in ready}
    show_warnings(ready)
    model = stages.adopt(request.model)
    results = [] if model is None else stages.segment_and_evaluate(ready, model, data)
    return stages.finish(request.out, results, model, (), started, private=True)


def file_names(scans: Mapping[str, Path]) -> dict[str, str]:
    """Return a unique file name without ending for each case, made of its scan's name. The keys are case ids."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for case_id, scan in scans.items():
        stem = os.fsencode(scan.name).decode("utf-8", "replace")
        stem = re.sub(r"\.(nii(\.gz)?|mhd|mha|nrrd|nhdr|zip|dcm|ima)$", "", stem, flags=re.IGNORECASE)
        stem = re.sub(r"[^\w.+-]+", "_", stem).strip("._")[:80] or "scan"
        name = next(each for each in (stem, f"{stem}_{case_id}") if each.casefold() not in taken)
        taken.add(name.casefold())
        names[case_id] = name
    return names


def show_warnings(cases: Sequence[ReadyCase]) -> None:
    """Show the warnings of prepared cases on the user's terminal."""
    for each in cases:
        if (file := each.prepared.folder() / "case.json").is_file():  # a dry run has none
            for warning in json.loads(file.read_text(encoding="utf-8"))["warnings"]:
                terminal.line(f"{each.case.id}: {warning}")


@define_flow("liver-mask", "liver mask")
def liver_mask(request: LiverMaskRequest, refresh: bool = False) -> Outcome:
    """Find the liver of one scan. The case gets a pseudonym."""
    runner = new_runner(ANY_MACHINE, refresh=refresh)
    [label] = case_ids.identify([request.scan])
    terminal.line(f"{label} is {request.scan}")
    path_filter.learn(request.scan, label)
    if runner.makes_artifacts:
        case_ids.register_found([case_ids.RegisteredCase(label, request.scan, None, (1,))])
    ref = find_liver(runner, label, request.scan, request.header, request.liver_model, trust=request.trust)
    details = {} if ref is None else {"folder": str(ref.folder())}
    return Outcome.from_runner(runner, details=details, useful=ref is not None)
