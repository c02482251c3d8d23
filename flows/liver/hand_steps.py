"""Preprocessing steps by hand: one step, or several in a row, on a file or on a registered scan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel

from flows.liver import mask_steps, steps
from flows.machine.terminal import terminal
from flows.privacy import case_ids
from flows.privacy.log_filter import path_filter
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome
from flows.runs.runner import Runner, new_runner
from flows.store.artifacts import SIDECAR
from flows.store.references import Ref
from medad.base.private import PrivatePath
from medad.base.settings import ANY_MACHINE
from medad.config.header import HeaderSettings
from medad.config.liver import PreprocessSettings
from medad.config.manual_steps import MANUAL_STEPS, ManualStepName

UNNAMED = "input"
"""Label of a file that is not registered."""


class StepRequest(BaseModel):
    """A request for preprocessing steps on one file."""

    names: tuple[ManualStepName, ...]
    """Steps to run, in their order."""
    source: PrivatePath
    """Output of the step before the first one, or a scan."""
    pseudonym: str | None = None
    """Pseudonym of a registered scan. If it has no mask, the liver is found. None: the file is not registered."""
    liver: PrivatePath | None
    liver_labels: tuple[int, ...]
    settings: PreprocessSettings
    header: HeaderSettings = HeaderSettings()

    @property
    def last(self) -> ManualStepName:
        """Return the last step, which names the run."""
        return self.names[-1]


@define_flow("liver-step", "step {request.last}")
def hand_step(request: StepRequest, refresh: bool = False) -> Outcome:
    """Run preprocessing steps, each on the result of the one before."""
    runner = new_runner(ANY_MACHINE, refresh=refresh)
    label = request.pseudonym or UNNAMED
    if request.pseudonym is None and request.source.is_dir():  # a DICOM series is registered in every flow
        [label] = case_ids.identify([request.source])
        terminal.line(f"{label} is {request.source}")
        if runner.makes_artifacts:
            found = case_ids.RegisteredCase(label, request.source, request.liver, request.liver_labels)
            case_ids.register_found([found])
    for path in (request.source, request.liver):
        if path is not None:
            path_filter.learn(path, label)
    liver, labels = request.liver, request.liver_labels
    if request.pseudonym is not None and liver is None and needs_liver(request.names):
        made = _find_liver(runner, label, request.source, request.header)
        if made is None:
            return Outcome.from_runner(runner, useful=False)
        liver, labels = made.folder() / mask_steps.LIVER_FILE, mask_steps.FOUND_LABELS
    ref = run_steps(runner, label, request.names, request.source, liver, labels, request.settings, request.header)
    details = {} if ref is None else {"folder": str(ref.folder())}
    return Outcome.from_runner(runner, details=details, useful=ref is not None)


def _find_liver(runner: Runner, label: str, scan: Path, header: HeaderSettings) -> Ref | None:
    from flows.liver.liver_masks import find_liver

    return find_liver(runner, label, scan, header)


def needs_liver(names: Collection[ManualStepName]) -> bool:
    """Return whether one of these steps needs a liver mask."""
    return any(MANUAL_STEPS[name].needs_liver for name in names)


def steps_between(first: ManualStepName, last: ManualStepName) -> tuple[ManualStepName, ...]:
    """Return the steps from `first` to `last` in their order. It is empty if `last` comes before `first`."""
    names = tuple(MANUAL_STEPS)
    return names[names.index(first) : names.index(last) + 1]


def run_steps(
    runner: Runner,
    label: str,
    names: Sequence[ManualStepName],
    source: Path,
    liver: Path | None,
    liver_labels: Sequence[int],
    settings: PreprocessSettings,
    header: HeaderSettings | None = None,
    *,
    refresh: Collection[ManualStepName] = (),
) -> Ref | None:
    """Run steps, each on the result of the one before. Return the last result, or None if a step failed.

    `refresh` names steps to compute again even if they are cached, besides those that the runner computes again.
    """
    given: Path | Ref = source
    ref: Ref | None = None
    every = runner.refresh
    for name in names:
        runner.refresh = every or name in refresh
        mask = liver if MANUAL_STEPS[name].needs_liver else None
        call = steps.hand_step(name, given, mask, liver_labels, settings, header or HeaderSettings())
        ref = runner.run(label, call)
        if ref is None:
            break
        given = result_file(ref) if ref.made else ref
    runner.refresh = every
    return ref


def result_file(ref: Ref) -> Path:
    """Return the one file that a step wrote."""
    return next(path for path in sorted(ref.folder().iterdir()) if path.name != SIDECAR)
