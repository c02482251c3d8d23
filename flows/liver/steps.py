"""The steps of the liver flows, and functions that create their calls.

`flows.liver.training_steps` has the steps that make a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.liver.training_steps import NET_LIBRARIES, TrainingCase, keyed_synthesis, training_data
from flows.store.references import Ref
from flows.store.step import PAGE, Call, Step, shown
from medad.base.errors import CaseFailure
from medad.base.settings import MachineSettings
from medad.config.ablation import AblationSettings
from medad.config.anomalies import SynthesisSettings
from medad.config.header import HeaderSettings
from medad.config.liver import (
    EvaluationSettings,
    InferenceSettings,
    InsertSettings,
    LiverSettings,
    PostprocessSettings,
    PreprocessSettings,
)
from medad.config.manual_steps import MANUAL_STEPS, ManualStepName
from medad.config.sensitivity import InsertionSettings, MeasureSettings, SensitivitySettings
from medad.steps.results import AblationResults, CaseResult, Model, Segmenter, VolumeResult

if TYPE_CHECKING:
    from medad.cohort.datasets import LabelledScan

_READING = ("nibabel", "numpy", "pydicom", "SimpleITK")
_PREPARING = (*_READING, "safetensors", "scikit-image", "scipy", "torch")
_SEGMENTING = (*NET_LIBRARIES, "lightgbm", "nibabel", "scikit-image", "scipy")
_DRAWN_NETS = (*NET_LIBRARIES, "pillow")
_DRAWING = ("jinja2", "matplotlib", "numpy", "pillow", "scipy")

INSERT = Step("insert", 1, "medad.steps.cases:insert_case", (*_READING, "scipy"), reads=True)
PREPARE = Step(
    "prepare",
    2,
    "medad.steps.cases:prepare_case",
    _PREPARING,
    before_devices=True,
    reads=True,
)
SEGMENT = Step(
    "segment",
    2,
    "medad.steps.segment:segment_case",
    _SEGMENTING,
    kind="inference",
    not_in_key=frozenset({"settings.batch_size"}),
    volatile=frozenset({"case.json"}),
)
EVALUATE = Step("evaluate", 1, "medad.steps.cases:evaluate_case", (*_READING, "safetensors", "scipy"), reads=True)
EXPORT = Step(
    "slice-images", 1, "medad.steps.export_slices:export_case", (*_READING, "pillow", "safetensors"), reads=True
)
CASE_PAGE = Step(
    "case-page",
    1,
    "medad.reports.viewer.page:write_result_page",
    (*_READING, *_DRAWING),
    files=(*PAGE, "medad/reports/viewer/case.html", "medad/reports/viewer/viewer.js"),
    reads=True,
)
REPORT = Step(
    "report",
    1,
    "medad.reports.run.report:write_report",
    _DRAWING,
    files=(*PAGE, "medad/reports/run/report_template.html"),
)
EXAMPLES = Step("examples", 1, "medad.steps.examples:write_examples", _DRAWN_NETS, kind="inference")
EMBEDDING = Step("embedding", 1, "medad.steps.embedding:write_features", _DRAWN_NETS, kind="inference")
BASELINE = Step("baseline", 1, "medad.steps.baseline:baseline_case", (*_READING, "safetensors", "scipy"), reads=True)
ABLATION_REPORT = Step(
    "ablation",
    1,
    "medad.reports.ablation.report:write_ablation_report",
    _DRAWING,
    files=(*PAGE, "medad/reports/ablation/ablation_template.html"),
)
MEASURE = Step(
    "sensitivity",
    1,
    "medad.steps.inserted:measure_inserted",
    (*_SEGMENTING, "SimpleITK"),
    kind="inference",
    not_in_key=frozenset({"segment.inference.batch_size"}),
)
SENSITIVITY_REPORT = Step(
    "sensitivity-report",
    1,
    "medad.reports.sensitivity.report:write_sensitivity_report",
    ("jinja2", "matplotlib", "scipy"),
    files=(*PAGE, "medad/reports/sensitivity/sensitivity_template.html"),
)
HAND_STEPS = {
    name: Step(f"step-{name}", 1, f"medad.steps.by_hand:step_{name}", _PREPARING, reads=True) for name in MANUAL_STEPS
}
"""Steps by hand, in order: each reads the result of the one before it."""


def insert(case: LabelledScan, settings: InsertSettings) -> Call:
    """Return the call that inserts lesions of known shape and contrast, in HU, into a healthy scan."""
    return INSERT(case=case, settings=settings)


def prepare(case: LabelledScan, settings: PreprocessSettings, *, training: bool, exclude: tuple[str, ...] = ()) -> Call:
    """Return the call that prepares slices from a scan and its liver label, without some tissue."""
    return PREPARE(case=case, settings=settings, training=training, exclude=exclude)


def segment(
    prepared: Ref, model: Model[Ref], settings: InferenceSettings, post: PostprocessSettings, machine: MachineSettings
) -> Call:
    """Return the call that segments slices: probability and mask on the scan's grid, and the lesion table."""
    return SEGMENT(
        prepared=prepared,
        model=model,
        settings=settings,
        post=post,
        machine=machine,
        batch_size=settings.batch_size,
    )


def evaluate(case: LabelledScan, prepared: Ref, segmented: Ref, settings: EvaluationSettings) -> Call:
    """Return the call that compares mask and probability with the case's label."""
    return EVALUATE(case=case, prepared=prepared, segmented=segmented, settings=settings)


def export_slices(case: LabelledScan | None, prepared: Ref) -> Call:
    """Return the call that exports prepared slices as images, with tumour masks. `case` is None for a healthy case."""
    return EXPORT(case=case, prepared=prepared)


def hand_step(
    name: ManualStepName,
    source: Path | Ref,
    liver: Path | None,
    liver_labels: Sequence[int],
    settings: PreprocessSettings,
    header: HeaderSettings,
) -> Call:
    """Return the call of one preprocessing step on a file, or in a dry run on a result that does not exist yet."""
    labels = () if liver is None else tuple(sorted(liver_labels))
    return HAND_STEPS[name](source=source, liver=liver, liver_labels=labels, settings=settings, header=header)


def case_page(case: LabelledScan, result: CaseResult[Ref]) -> Call:
    """Return the call that writes the page to scroll through a case's scan. Its key contains the case's id."""
    return CASE_PAGE(case=case, result=result)


def report(
    settings: LiverSettings,
    results: Sequence[CaseResult[Ref]],
    failures: Sequence[CaseFailure],
    model: Model[Ref] | None,
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> Call:
    """Return the call that writes report.html and report.json. Its key contains all that these show, also case ids."""
    shown_member = None if model is None else model.members[0]
    count = 0 if model is None else len(model.members)
    several = f"The model has {count} members. The training curves are those of member 1."
    return REPORT(
        settings=shown(settings),
        results=tuple(results),
        failures=tuple(failures),
        restoration=None if shown_member is None else shown_member.restoration,
        segmentation=None if shown_member is None else shown_member.segmentation,
        versions=dict(versions),
        notes=(*notes, several) if count > 1 else tuple(notes),
    )


def examples(
    prepared: Iterable[TrainingCase],
    restoration: Ref,
    synthesis: SynthesisSettings,
    seed: int,
    count: int,
    batch_size: int,
    machine: MachineSettings,
) -> Call:
    """Return the call that synthesises training slices and restores them with a restoration network."""
    return EXAMPLES(
        **training_data(prepared, synthesis),
        restoration=restoration,
        synthesis=keyed_synthesis(synthesis),
        seed=seed,
        count=count,
        batch_size=batch_size,
        machine=machine,
    )


def embedding(
    training: Iterable[TrainingCase],
    tested: Iterable[tuple[Ref, Ref]],
    restoration: Ref,
    synthesis: SynthesisSettings,
    seed: int,
    batch_size: int,
    machine: MachineSettings,
) -> Call:
    """Return the call that computes a restoration network's deepest features.

    The slices are test slices, given as pairs (prepared, evaluated), and synthesised training slices.
    """
    data = training_data(training, synthesis)
    return EMBEDDING(
        training=data.pop("prepared"),
        **data,
        tested=tuple(sorted(tested, key=lambda pair: pair[0].digest)),
        restoration=restoration,
        synthesis=keyed_synthesis(synthesis),
        seed=seed,
        batch_size=batch_size,
        machine=machine,
    )


def baseline(
    case: LabelledScan, prepared: Ref, sigma_mm: float, min_lesion_mm3: float, settings: EvaluationSettings
) -> Call:
    """Return the call that evaluates a test case by only its smoothed HU."""
    return BASELINE(case=case, prepared=prepared, sigma_mm=sigma_mm, min_lesion_mm3=min_lesion_mm3, settings=settings)


def ablation_report(
    settings: AblationSettings, results: AblationResults[Ref], versions: Mapping[str, str], notes: Sequence[str]
) -> Call:
    """Return the call that writes the tables, tests, curves and images of an ablation."""
    return ABLATION_REPORT(settings=shown(settings), results=results, versions=dict(versions), notes=tuple(notes))


def measure(
    case: LabelledScan,
    insertion: InsertionSettings,
    settings: MeasureSettings,
    healthy: Ref,
    segmenter: Segmenter[Ref],
    machine: MachineSettings,
) -> Call:
    """Return the call that inserts lesions into a healthy scan, segments it and measures the result.

    The scan is prepared and segmented like the healthy one. Only the figures are stored.
    """
    return MEASURE(
        case=case,
        insertion=insertion,
        measure=settings,
        healthy=healthy,
        segment=segmenter,
        machine=machine,
        batch_size=segmenter.inference.batch_size,
    )


def sensitivity_report(
    settings: SensitivitySettings,
    results: Sequence[VolumeResult[Ref]],
    trained_on: frozenset[str] | None,
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
    *,
    named: bool,
) -> Call:
    """Return the call that writes the tables and the figure of a study.

    `trained_on` lists the cases that trained the model. None: unknown.
    """
    return SENSITIVITY_REPORT(
        settings=shown(settings),
        results=tuple(results),
        trained_on=trained_on,
        failures=tuple(failures),
        versions=dict(versions),
        notes=tuple(notes),
        show_file_names=named,
    )
