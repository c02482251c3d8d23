"""The steps of the liver flows, and functions that create their calls.

A training's key must depend only on the settings that the training uses. All other fields get a neutral value first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.store.digests import digest_memory
from flows.store.references import Ref, library_versions
from flows.store.step import PAGE, Call, Keyed, Step, keyed, shown
from medad.base.errors import CaseFailure, InputError
from medad.base.settings import MACHINE_FIELDS, MachineSettings
from medad.config.ablation import AblationSettings
from medad.config.anomalies import LesionSettings, SynthesisSettings, TextureSettings
from medad.config.liver import (
    DatasetSettings,
    EvaluationSettings,
    InferenceSettings,
    InsertSettings,
    LiverSettings,
    PostprocessSettings,
    PreprocessSettings,
)
from medad.config.manual_steps import MANUAL_STEPS, ManualStepName
from medad.config.sensitivity import InsertionSettings, MeasureSettings, SensitivitySettings
from medad.steps.results import AblationResults, CaseResult, Segmenter, VolumeResult

if TYPE_CHECKING:
    from medad.cohort.datasets import LabelledScan

_READING = ("nibabel", "numpy", "SimpleITK")
_PREPARING = (*_READING, "safetensors", "scikit-image", "scipy", "torch")
_NETS = ("monai", "numpy", "safetensors", "torch")
_DRAWN_NETS = (*_NETS, "pillow")
_DRAWING = ("jinja2", "matplotlib", "numpy", "pillow", "scipy")
_STYLE = (*PAGE, "medad/reports/report_style.html")
_CURVE = frozenset({"curve.json"})

INSERT = Step("insert", 1, "medad.steps.cases:insert_case", (*_READING, "scipy"))
PREPARE = Step(
    "prepare",
    2,
    "medad.steps.cases:prepare_case",
    _PREPARING,
    before_devices=True,
)
RESTORATION = Step("restoration", 1, "medad.networks.train:train_restoration", _NETS, kind="training", volatile=_CURVE)
SEGMENTATION = Step(
    "segmentation", 1, "medad.networks.train:train_segmentation", _NETS, kind="training", volatile=_CURVE
)
JOINT = Step(
    "joint",
    1,
    "medad.networks.train:train_joint",
    _NETS,
    kind="training",
    volatile=frozenset({"restoration/curve.json", "segmentation/curve.json"}),
)
SEGMENT = Step(
    "segment",
    2,
    "medad.steps.cases:segment_case",
    (*_NETS, "nibabel", "scikit-image", "scipy"),
    kind="inference",
    not_in_key=frozenset({"settings.batch_size"}),
    volatile=frozenset({"case.json"}),
)
EVALUATE = Step("evaluate", 1, "medad.steps.cases:evaluate_case", (*_READING, "safetensors", "scipy"))
EXPORT = Step("slice-images", 1, "medad.steps.export_slices:export_case", (*_READING, "pillow", "safetensors"))
MODEL = Step("model", 1, "medad.steps.adopt:copy_network", (), volatile=_CURVE)
REPORT = Step(
    "report",
    1,
    "medad.reports.run.report:write_report",
    _DRAWING,
    files=(*_STYLE, "medad/reports/run/report_template.html"),
)
EXAMPLES = Step("examples", 1, "medad.steps.examples:write_examples", _DRAWN_NETS, kind="inference")
EMBEDDING = Step("embedding", 1, "medad.steps.embedding:write_features", _DRAWN_NETS, kind="inference")
BASELINE = Step("baseline", 1, "medad.steps.baseline:baseline_case", (*_READING, "safetensors", "scipy"))
ABLATION_REPORT = Step(
    "ablation",
    1,
    "medad.reports.ablation.report:write_ablation_report",
    _DRAWING,
    files=(*_STYLE, "medad/reports/ablation/ablation_template.html"),
)
MEASURE = Step(
    "sensitivity",
    1,
    "medad.steps.inserted:measure_inserted",
    (*_NETS, "nibabel", "scikit-image", "scipy", "SimpleITK"),
    kind="inference",
    not_in_key=frozenset({"segment.inference.batch_size"}),
)
SENSITIVITY_REPORT = Step(
    "sensitivity-report",
    1,
    "medad.reports.sensitivity.report:write_sensitivity_report",
    ("jinja2", "matplotlib", "scipy"),
    files=(*_STYLE, "medad/reports/sensitivity/sensitivity_template.html"),
)
HAND_STEPS = {name: Step(f"step-{name}", 1, f"medad.steps.by_hand:step_{name}", _PREPARING) for name in MANUAL_STEPS}
"""Steps by hand, in order: each reads the result of the one before it."""

Training = Literal["restoration", "segmentation", "joint"]


def by_digest(refs: Iterable[Ref]) -> tuple[Ref, ...]:
    """Return artifacts sorted by digest, so that a renamed case does not change the training."""
    return tuple(sorted(refs, key=lambda ref: ref.digest))


def insert(case: LabelledScan, settings: InsertSettings) -> Call:
    """Return the call that inserts lesions of known shape and contrast, in HU, into a healthy scan."""
    return INSERT(case=case, settings=settings)


def prepare(case: LabelledScan, settings: PreprocessSettings, *, training: bool) -> Call:
    """Return the call that prepares slices from a scan and its liver label."""
    return PREPARE(case=case, settings=settings, training=training)


def train(training: Training, prepared: Iterable[Ref], settings: LiverSettings, restoration: Ref | None = None) -> Call:
    """Return the call that trains one network, or both, on prepared cases. Phase two needs a `restoration` network."""
    neutral = _training_settings(settings, training)
    left_out = {"name", *MACHINE_FIELDS, "train_data", "test_data", "preprocess", "train.checkpoint_minutes"}
    values, textures = _synthesis_content(settings.synthesis)
    content = keyed(neutral, *left_out, "synthesis", **textures, synthesis=values)
    step = {"restoration": RESTORATION, "segmentation": SEGMENTATION, "joint": JOINT}[training]
    phase = settings.train.segmentation if training == "segmentation" else settings.train.restoration
    frozen = {} if restoration is None else {"restoration": restoration}
    return step(
        prepared=by_digest(prepared),
        **frozen,
        settings=content,
        machine=settings.machine,
        batch_size=phase.batch_size,
        phase=training,
    )


def _training_settings(settings: LiverSettings, training: Training) -> LiverSettings:
    """Return the settings of one training, with neutral values in all fields that the training does not use."""
    neutral = DatasetSettings(root="-", layout="btcv")
    plain = LiverSettings(name="model", train_data=neutral, test_data=neutral)
    given = settings.train
    phase = "segmentation" if training == "segmentation" else "restoration"
    train: dict[str, Any] = {
        phase: getattr(given, phase),
        "mixed_precision": given.mixed_precision,
        "checkpoint_minutes": given.checkpoint_minutes,
        "augmentation": given.augmentation,
        "flip": given.flip,
    }
    used: dict[str, Any] = {
        "seed": settings.seed,
        "synthesis": used_synthesis(settings.synthesis),
        "restoration": settings.restoration,
    }
    if training != "segmentation":
        train["restoration_loss"] = given.restoration_loss
    if training != "restoration":
        used["segmentation"] = settings.segmentation
        train["focal"] = given.focal
    if training == "segmentation":
        train["snapshot_epochs"] = given.snapshot_epochs
    return plain.model_copy(update=used | {"train": plain.train.model_copy(update=train)})


def used_synthesis(settings: SynthesisSettings) -> SynthesisSettings:
    """Return the synthesis settings with default values in all fields that its kind does not use."""
    if settings.kind == "perlin_texture":
        return SynthesisSettings(kind=settings.kind, texture=settings.texture)
    if settings.kind == "lesions":
        return SynthesisSettings(kind=settings.kind, lesions=settings.lesions)
    return settings.model_copy(update={"texture": TextureSettings(), "lesions": LesionSettings()})


def _synthesis_content(settings: SynthesisSettings) -> tuple[Any, dict[str, Any]]:
    """Return the used synthesis settings for a key, without folders, and the content of the textures, if any."""
    used = used_synthesis(settings)
    folder = used.texture.folder
    textures = {} if folder is None else {"textures": _textures_content(Path(folder).expanduser())}
    return keyed(used, "texture.folder").content, textures


def _textures_content(folder: Path) -> dict[str, Any]:
    from medad.base.textures import texture_files, textures_digest

    files = texture_files(folder)
    try:
        digest = digest_memory().get(folder, textures_digest, files)
    except OSError as error:
        raise InputError(folder, f"cannot be read ({error.strerror})") from error
    return {"digest": digest, "libraries": library_versions(("pillow",))}


def _used(settings: SynthesisSettings) -> Keyed:
    values, textures = _synthesis_content(settings)
    return Keyed(used_synthesis(settings), {"values": values} | textures)


def segment(
    prepared: Ref,
    restoration: Ref,
    segmentation: Ref,
    settings: InferenceSettings,
    post: PostprocessSettings,
    machine: MachineSettings,
    snapshot: str = "",
) -> Call:
    """Return the call that segments slices: probability and mask on the scan's grid, and the lesion table."""
    return SEGMENT(
        prepared=prepared,
        restoration=restoration,
        segmentation=segmentation,
        settings=settings,
        post=post,
        snapshot=snapshot,
        machine=machine,
        batch_size=settings.batch_size,
    )


def evaluate(case: LabelledScan, prepared: Ref, segmented: Ref, settings: EvaluationSettings) -> Call:
    """Return the call that compares mask and probability with the case's label."""
    return EVALUATE(case=case, prepared=prepared, segmented=segmented, settings=settings)


def export_slices(case: LabelledScan | None, prepared: Ref) -> Call:
    """Return the call that exports prepared slices as images, with tumour masks. `case` is None for a healthy case."""
    return EXPORT(case=case, prepared=prepared)


def adopt(folder: Path) -> Call:
    """Return the call that copies a trained network from a folder into the cache, so that the folder may be deleted."""
    return MODEL(folder=Keyed(folder, folder / "model.safetensors"))


def hand_step(
    name: ManualStepName, source: Path, liver: Path | None, liver_labels: Sequence[int], settings: PreprocessSettings
) -> Call:
    """Return the call of one preprocessing step on a file."""
    return HAND_STEPS[name](source=source, liver=liver, liver_labels=tuple(sorted(liver_labels)), settings=settings)


def report(
    settings: LiverSettings,
    results: Sequence[CaseResult[Ref]],
    failures: Sequence[CaseFailure],
    restoration: Ref | None,
    segmentation: Ref | None,
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> Call:
    """Return the call that writes report.html and report.json. Its key contains all that these show, also case ids."""
    return REPORT(
        settings=shown(settings),
        results=tuple(results),
        failures=tuple(failures),
        restoration=restoration,
        segmentation=segmentation,
        versions=dict(versions),
        notes=tuple(notes),
    )


def examples(
    prepared: Iterable[Ref],
    restoration: Ref,
    synthesis: SynthesisSettings,
    seed: int,
    count: int,
    batch_size: int,
    machine: MachineSettings,
) -> Call:
    """Return the call that synthesises training slices and restores them with a restoration network."""
    return EXAMPLES(
        prepared=by_digest(prepared),
        restoration=restoration,
        synthesis=_used(synthesis),
        seed=seed,
        count=count,
        batch_size=batch_size,
        machine=machine,
    )


def embedding(
    training: Iterable[Ref],
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
    return EMBEDDING(
        training=by_digest(training),
        tested=tuple(sorted(tested, key=lambda pair: pair[0].digest)),
        restoration=restoration,
        synthesis=_used(synthesis),
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
