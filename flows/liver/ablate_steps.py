"""The steps of the ablation beside those of the liver flow: what a row learned, the yardstick, the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.liver.steps import label_inputs, synthesis_inputs, used_synthesis
from flows.store.artifacts import Ref, Step
from flows.store.step import PAGE, DeviceJob, FailedStep, Job, digest_of, folder_of, json_values
from medad.base.settings import ANY_MACHINE, MACHINE_FIELDS, MachineSettings
from medad.config.ablation import AblationSettings
from medad.config.liver import DatasetSettings, EvaluationSettings, SynthesisSettings

if TYPE_CHECKING:
    from flows.devices.child import Place
    from medad.cohort.datasets import Case
    from medad.reports.ablation.data import EvaluatedCase

_NETS = ("monai", "numpy", "pillow", "safetensors", "torch")


@dataclass(frozen=True)
class Examples(DeviceJob):
    """Synthesised training slices and what a restoration makes of them."""

    prepared: tuple[Ref, ...]
    restoration: Ref
    synthesis: SynthesisSettings
    seed: int
    count: int
    batch: int
    machine: MachineSettings = ANY_MACHINE
    kind = "inference"
    step = Step("examples", 1, ("medad.steps.examples:write_examples",), _NETS)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prepared", tuple(sorted(self.prepared, key=lambda ref: ref.digest)))
        object.__setattr__(self, "synthesis", used_synthesis(self.synthesis))

    @property
    def batch_size(self) -> int:
        return self.batch

    def inputs(self) -> dict[str, Any]:
        synthesis, textures = synthesis_inputs(self.synthesis)
        return textures | {
            "prepared": [ref.digest for ref in self.prepared],
            "restoration": self.restoration.digest,
            "synthesis": synthesis,
            "seed": self.seed,
            "count": self.count,
        }

    def run_on(self, out: Path, place: Place) -> None:
        from medad.steps.examples import write_examples

        write_examples(
            [ref.folder() for ref in self.prepared],
            self.restoration.folder(),
            self.synthesis,
            self.seed,
            self.count,
            out,
            device=place.device,
            batch_size=place.batch_size,
        )


@dataclass(frozen=True)
class Embed(DeviceJob):
    """Test slices and synthesised ones by a restoration's deepest features."""

    training: tuple[Ref, ...]
    tested: tuple[tuple[Ref, Ref], ...]
    """Prepared and evaluated case."""
    restoration: Ref
    synthesis: SynthesisSettings
    seed: int
    batch: int
    machine: MachineSettings = ANY_MACHINE
    kind = "inference"
    step = Step("embedding", 1, ("medad.steps.embedding:write_features",), _NETS)

    def __post_init__(self) -> None:
        object.__setattr__(self, "training", tuple(sorted(self.training, key=lambda ref: ref.digest)))
        object.__setattr__(self, "tested", tuple(sorted(self.tested, key=lambda pair: pair[0].digest)))
        object.__setattr__(self, "synthesis", used_synthesis(self.synthesis))

    @property
    def batch_size(self) -> int:
        return self.batch

    def inputs(self) -> dict[str, Any]:
        synthesis, textures = synthesis_inputs(self.synthesis)
        return textures | {
            "training": [ref.digest for ref in self.training],
            "tested": [[prepared.digest, evaluated.digest] for prepared, evaluated in self.tested],
            "restoration": self.restoration.digest,
            "synthesis": synthesis,
            "seed": self.seed,
        }

    def run_on(self, out: Path, place: Place) -> None:
        from medad.steps.embedding import write_features

        write_features(
            [ref.folder() for ref in self.training],
            [(prepared.folder(), evaluated.folder()) for prepared, evaluated in self.tested],
            self.restoration.folder(),
            self.synthesis,
            self.seed,
            out,
            device=place.device,
            batch_size=place.batch_size,
        )


@dataclass(frozen=True)
class Yardstick(Job):
    """A test case judged by its smoothed HU alone."""

    case: Case
    data: DatasetSettings
    prepared: Ref
    sigma_mm: float
    min_lesion_mm3: float
    settings: EvaluationSettings
    step = Step(
        "yardstick",
        1,
        ("medad.steps.baseline:yardstick_case",),
        ("nibabel", "numpy", "SimpleITK", "safetensors", "scipy"),
    )

    def inputs(self) -> dict[str, Any]:
        return label_inputs(self.case, self.data) | {
            "prepared": self.prepared.digest,
            "sigma_mm": self.sigma_mm,
            "min_lesion_mm3": self.min_lesion_mm3,
            "evaluation": json_values(self.settings),
        }

    def run(self, out: Path, *, key: str) -> None:
        from medad.steps.baseline import yardstick_case

        # the figures carry an id, the artefact must not: one scan under two names is judged once
        case = replace(self.case, id="case")
        folder = self.prepared.folder()
        yardstick_case(case, self.data, folder, self.sigma_mm, self.min_lesion_mm3, self.settings, out)


@dataclass(frozen=True)
class Judged:
    """One evaluated test case."""

    case_id: str
    prepared: Ref
    segmented: Ref | None
    """None of the yardstick."""
    evaluated: Ref

    def inputs(self) -> list[str | None]:
        return [self.case_id, self.prepared.digest, digest_of(self.segmented), self.evaluated.digest]

    def shown(self) -> EvaluatedCase:
        from medad.reports.ablation.data import EvaluatedCase

        return EvaluatedCase(self.case_id, self.prepared.folder(), folder_of(self.segmented), self.evaluated.folder())


@dataclass(frozen=True)
class VariantRow:
    """One variant with what came of it."""

    group: str
    name: str
    seeds: tuple[tuple[int, tuple[Judged, ...]], ...]
    examples: Ref | None = None

    def inputs(self) -> dict[str, Any]:
        return {
            "variant": [self.group, self.name],
            "seeds": [[seed, [case.inputs() for case in cases]] for seed, cases in self.seeds],
            "examples": digest_of(self.examples),
        }


@dataclass(frozen=True)
class SnapshotRow:
    """One length of phase two."""

    epochs: int
    seeds: tuple[tuple[int, tuple[Judged, ...]], ...]

    def inputs(self) -> list[Any]:
        return [self.epochs, [[seed, [case.inputs() for case in cases]] for seed, cases in self.seeds]]


@dataclass(frozen=True)
class AblationReport(Job):
    """Tables, tests, curves and pictures. What it shows is what it depends on."""

    settings: AblationSettings
    variants: tuple[VariantRow, ...]
    snapshots: tuple[SnapshotRow, ...]
    yardstick: tuple[Judged, ...]
    embedding: tuple[str, int, Ref] | None
    """Row, seed and features."""
    planted: tuple[str, ...]
    failures: tuple[tuple[str, FailedStep], ...]
    """Each with the row it belongs to; an empty name where it concerns all."""
    versions: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    step = Step(
        "ablation",
        1,
        ("medad.reports.ablation.report:write_ablation_report",),
        ("jinja2", "matplotlib", "numpy", "pillow", "scipy"),
        files=(*PAGE, "medad/reports/report_style.html", "medad/reports/ablation/ablation_template.html"),
    )

    def inputs(self) -> dict[str, Any]:
        features = None if self.embedding is None else [*self.embedding[:2], self.embedding[2].digest]
        return {
            "settings": self.settings.public(*MACHINE_FIELDS),
            "variants": [variant.inputs() for variant in self.variants],
            "snapshots": [snapshot.inputs() for snapshot in self.snapshots],
            "yardstick": [case.inputs() for case in self.yardstick],
            "embedding": features,
            "planted": list(self.planted),
            "failures": [[row, f.case_id, f.stage, f.rule, f.file] for row, f in self.failures],
            "versions": list(map(list, self.versions)),
            "notes": list(self.notes),
        }

    def run(self, out: Path, *, key: str) -> None:
        from medad.reports.ablation.data import (
            AblationResults,
            EmbeddingResult,
            FailedRow,
            SnapshotResult,
            VariantResult,
        )
        from medad.reports.ablation.report import write_ablation_report

        embedding = self.embedding
        results = AblationResults(
            variants=[
                VariantResult(one.group, one.name, _shown(one.seeds), folder_of(one.examples)) for one in self.variants
            ],
            snapshots=[SnapshotResult(one.epochs, _shown(one.seeds)) for one in self.snapshots],
            yardstick=[case.shown() for case in self.yardstick],
            embedding=None if embedding is None else EmbeddingResult(*embedding[:2], embedding[2].folder()),
            planted=self.planted,
            failures=[FailedRow(f.case_id, f.stage, f.rule, f.file, row) for row, f in self.failures],
        )
        write_ablation_report(
            out, settings=self.settings, results=results, versions=dict(self.versions), notes=self.notes
        )


def _shown(seeds: tuple[tuple[int, tuple[Judged, ...]], ...]) -> Mapping[int, list[EvaluatedCase]]:
    return {seed: [case.shown() for case in cases] for seed, cases in seeds}
