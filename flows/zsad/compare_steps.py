"""The steps of the flow that compares systems, beside those of the flow zsad that it shares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.liver.steps import checkpoint_file
from flows.store.artifacts import Ref, Step
from flows.store.code import code_digest
from flows.store.step import PAGE, DeviceJob, FailedStep, Job, digest_of, file_digest, folder_of, json_values
from flows.zsad.report_steps import failed_shown
from flows.zsad.steps import ENCODING, Image, distinct, encoder_inputs, label_of, weights_of
from medad.base.settings import ANY_MACHINE, MACHINE_FIELDS, MachineSettings
from zsad.config.compare import Ablation, CompareSettings
from zsad.config.run import EncoderSettings
from zsad.config.systems import AnomalyClip, AprilGan, LearnedSettings, SegmentationModels, System, SystemSettings

if TYPE_CHECKING:
    from flows.devices.child import Place

MODEL_FILES = ("clipseg", "sam", "salient")
"""Of the segmentation models: local files and folders, in a key by what they hold."""


def system_inputs(system: SystemSettings) -> dict[str, Any]:
    """What a system's scores depend on of its settings: not its name in tables, nor where its files lie."""
    values = json_values(
        system, "label", "encoder", *(("checkpoint", "training") * isinstance(system, LearnedSettings))
    )
    if isinstance(system, SegmentationModels):
        from zsad.clip.models import path_digest

        for name in MODEL_FILES:
            path = getattr(system, name)
            values[name] = None if path is None else path_digest(Path(path).expanduser())
    return values


@dataclass(frozen=True)
class ScoreSystem(DeviceJob):
    """Features -> one system's scores of one category and seed; the seed matters to systems that draw."""

    system: System
    category: str
    """In words, for prompts that a system makes itself."""
    images: tuple[Image, ...]
    """Those with features."""
    features: Ref
    text: Ref | None
    shots: Ref | None
    """Features of normal images."""
    trained: Ref | None
    """Of `TrainSystem`."""
    encoder: EncoderSettings
    seed: int
    machine: MachineSettings = ANY_MACHINE
    kind = "inference"
    step = Step(
        "zsad-system",
        1,
        ("zsad.steps.score:score_system",),
        (*ENCODING, "scipy"),
        volatile=frozenset({"cost.json"}),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", distinct(self.images))
        if not self.system.seeded:
            object.__setattr__(self, "seed", 0)

    @property
    def _given(self) -> Path | None:
        """The checkpoint that the settings name."""
        path = self.system.checkpoint if isinstance(self.system, LearnedSettings) else None
        return None if path is None else Path(path).expanduser()

    @property
    def _checkpoint(self) -> Path | None:
        if self._given is not None or self.trained is None:
            return self._given
        return self.trained.folder() / "checkpoint.safetensors"

    def inputs(self) -> dict[str, Any]:
        from zsad.steps.score import SCORERS

        inputs: dict[str, Any] = {
            "system": system_inputs(self.system),
            "scorer": code_digest(f"{SCORERS[self.system.system]}:score"),
            "features": self.features.digest,
            "text": digest_of(self.text),
            "shots": digest_of(self.shots),
            "checkpoint": digest_of(self.trained) if self._given is None else file_digest(self._given),
            "seed": self.seed,
        }
        if self.system.loads_encoder:
            inputs |= {"encoder": encoder_inputs(self.encoder), "category": self.category}
        return inputs

    @property
    def batch_size(self) -> int:
        return self.encoder.batch_size

    def watch(self) -> AbstractContextManager[Callable[..., None]]:
        from flows.devices.progress import count_images

        return nullcontext(count_images())

    def run_on(self, out: Path, place: Place) -> None:
        from zsad.steps.cost import measured
        from zsad.steps.score import score_system

        with measured(out, place.device):
            score_system(
                self.system,
                self.category,
                self.features.folder(),
                folder_of(self.text),
                folder_of(self.shots),
                self._checkpoint,
                [image.path for image in self.images],
                self.encoder.model_copy(update={"batch_size": min(self.encoder.batch_size, place.batch_size)}),
                self.seed,
                place.device,
                out,
                batch_size=place.batch_size,
                on_progress=place.report,
            )


@dataclass(frozen=True)
class TrainingSet:
    """One category of auxiliary images."""

    name: str
    """In words."""
    images: tuple[Image, ...]
    features: Ref
    text: Ref | None

    def inputs(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "images": sorted([image.sha256, *label_of(image)] for image in self.images),
            "features": self.features.digest,
            "text": digest_of(self.text),
        }


@dataclass(frozen=True)
class TrainSystem(DeviceJob):
    """Labelled images' features -> a learned system's checkpoint. The order of categories changes nothing."""

    system: AprilGan | AnomalyClip
    sets: tuple[TrainingSet, ...]
    encoder: EncoderSettings
    machine: MachineSettings = ANY_MACHINE
    kind = "training"
    step = Step(
        "zsad-train",
        1,
        ("zsad.steps.train:train_system",),
        (*ENCODING, "scipy"),
        volatile=frozenset({"training.json"}),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", tuple(sorted(self.sets, key=lambda one: one.name)))

    def inputs(self) -> dict[str, Any]:
        return {
            "system": system_inputs(self.system) | {"training": json_values(self.system.training)},
            "sets": [one.inputs() for one in self.sets],
            "encoder": encoder_inputs(self.encoder),
        }

    @property
    def batch_size(self) -> int:
        return self.system.training.batch_size

    def watch(self) -> AbstractContextManager[Callable[..., None]]:
        from flows.devices.progress import follow

        return follow(self.system.system.replace("_", "-"))

    def run_on(self, out: Path, place: Place) -> None:
        from zsad.steps.train import Source, train_system

        sources = [Source(one.name, one.features.folder(), folder_of(one.text), one.images) for one in self.sets]
        with checkpoint_file(self.step, place.key) as checkpoint:
            train_system(
                self.system,
                sources,
                self.encoder,
                place.device,
                out,
                checkpoint=checkpoint,
                largest_batch=place.batch_size,
                on_progress=place.report,
            )


@dataclass(frozen=True)
class Result:
    """One category and seed of a system, judged."""

    category: str
    seed: int
    evaluated: Ref
    cost: tuple[float, float, int, int | None] | None = None
    """Seconds of scoring and of encoding, images, peak memory in bytes."""

    def inputs(self) -> list[Any]:
        return [self.category, self.seed, self.evaluated.digest, self.cost]


@dataclass(frozen=True)
class SystemRow:
    """A system with what came of it."""

    system: SystemSettings
    encoder: EncoderSettings
    results: tuple[Result, ...]

    def inputs(self) -> dict[str, Any]:
        return {"system": self.system.shown, "results": [result.inputs() for result in self.results]}


@dataclass(frozen=True)
class AblationRows:
    """One ablation: its rows by label."""

    ablation: Ablation
    rows: tuple[tuple[str, tuple[Result, ...]], ...]

    def inputs(self) -> dict[str, Any]:
        rows = [[label, [result.inputs() for result in results]] for label, results in self.rows]
        return {"ablation": self.ablation, "rows": rows}


@dataclass(frozen=True)
class CompareReport(Job):
    """Tables of all systems, the tests between them, the ablations. What it shows is what it depends on."""

    settings: CompareSettings
    systems: tuple[SystemRow, ...]
    ablations: tuple[AblationRows, ...]
    failures: tuple[tuple[str, FailedStep], ...]
    """Each with the system it belongs to; an empty name where all share it."""
    versions: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    step = Step(
        "zsad-compare",
        1,
        ("zsad.reports.compare.report:write_compare_report",),
        ("jinja2", "matplotlib", "numpy", "pillow", "scipy"),
        files=(
            *PAGE,
            "zsad/reports/report_style.html",
            "zsad/reports/report_end.html",
            "zsad/reports/compare/compare_template.html",
        ),
    )

    def inputs(self) -> dict[str, Any]:
        return {
            "settings": self.settings.public(*MACHINE_FIELDS),
            "systems": [row.inputs() for row in self.systems],
            "ablations": [rows.inputs() for rows in self.ablations],
            "failures": [[of, f.category, f.case_id, f.stage, f.rule, f.file] for of, f in self.failures],
            "versions": list(map(list, self.versions)),
            "notes": list(self.notes),
        }

    def run(self, out: Path, *, key: str) -> None:
        from zsad.reports.compare.report import AblationResult, AblationRow, SystemResult, write_compare_report

        write_compare_report(
            out,
            settings=self.settings,
            systems=[
                SystemResult(row.system, _encoder(row.encoder), _by_category(row.results, _evaluated))
                for row in self.systems
            ],
            ablations=[
                AblationResult(
                    one.ablation, [AblationRow(label, _by_category(results, _folder)) for label, results in one.rows]
                )
                for one in self.ablations
            ],
            failures=[_failed(system, failure) for system, failure in self.failures],
            versions=dict(self.versions),
            notes=self.notes,
        )


def _encoder(settings: EncoderSettings) -> Any:
    from zsad.clip.models import describe, is_embedded
    from zsad.reports.compare.report import Encoder

    weights = weights_of(settings)["weights"]
    return Encoder(
        description=describe(settings),
        random_weights=settings.seed is not None,
        embedded=is_embedded(settings, f"sha256:{weights}"),
    )


def _folder(result: Result) -> Path:
    return result.evaluated.folder()


def _evaluated(result: Result) -> Any:
    from zsad.reports.compare.report import Cost, Evaluated

    return Evaluated(result.evaluated.folder(), None if result.cost is None else Cost(*result.cost))


def _by_category(results: tuple[Result, ...], shown: Callable[[Result], Any]) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for result in results:
        found.setdefault(result.category, {})[result.seed] = shown(result)
    return found


def _failed(system: str, failure: FailedStep) -> Any:
    from zsad.reports.compare.report import FailedSystem

    shared = failed_shown(failure)
    return FailedSystem(**vars(shared), system=system) if system else shared
