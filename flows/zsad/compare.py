"""The flow zsad-compare: all systems on the same images. Systems with the same encoder share features.

Categories and systems run in parallel on the task runner, within the limits of the device slots. A system that fails on
a category is listed and left out there. The others continue, and the report is always written.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.machine.terminal import terminal
from flows.privacy.log_filter import path_filter
from flows.runs import ui_artifacts
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome
from flows.runs.run_folder import FileCopy, copies_of, installed_versions
from flows.runs.runner import SubmittedCall, new_runner, to_case_failure
from flows.store.artifacts import ArtifactStore
from flows.store.digests import path_digest
from flows.store.references import Ref
from flows.store.step import Call
from flows.zsad import steps
from flows.zsad.image_sets import ImageSet, ImageStages, weights_shown
from medad.base.errors import InputError, UserError
from zsad.clip.models import encoder_info
from zsad.config.compare import CompareSettings, ablation_systems
from zsad.config.learned import AnomalyClip, AprilGan, LearnedSettings
from zsad.config.run import PromptStyle
from zsad.config.systems import DualImage, System, WinClip
from zsad.data.labelled import LabelledImage
from zsad.steps.results import AblationResult, AblationRow, Cost, Evaluated, Source, SystemResult

REPORT_FILES = (
    *("report.html", "report.json", "preview.png", "systems.csv", "summary.csv", "paired.csv", "ablations.csv"),
    *("table_image.tex", "table_pixel.tex"),
)
TRAINED_FILES = ("checkpoint.safetensors", "training.json")


ByCategory = dict[str, dict[int, Evaluated[Ref]]]
"""Category -> seed -> evaluated result."""


@dataclass(frozen=True)
class Prepared:
    """A category with its features from one encoder."""

    images: ImageSet
    """Images with features."""
    features: Ref


@dataclass(frozen=True)
class Scoring:
    """A submitted scoring task: one system on one category with one seed."""

    system: System
    category: ImageSet
    seed: int
    label: str
    features: Ref
    scores: SubmittedCall


class CompareStages(ImageStages):
    """The stages of the flow. Each takes the results of the one before and skips what failed."""

    def __init__(self, settings: CompareSettings, *, refresh: bool) -> None:
        super().__init__(new_runner(settings.machine, refresh=refresh))
        self.settings = settings
        self.features: dict[tuple[str, str], Prepared] = {}
        """Prepared categories, by encoder and category."""
        self.texts: dict[tuple[str, str, PromptStyle], SubmittedCall] = {}
        """Tasks of text features, by encoder, category and prompt style."""
        self._refs: dict[int, Ref | None] = {}

    def ref_of(self, task: SubmittedCall) -> Ref | None:
        """Wait for a task, and return its artifact. A task that several systems share is counted once."""
        if id(task) not in self._refs:
            self._refs[id(task)] = task.ref()
        return self._refs[id(task)]

    def prepare(self) -> list[ImageSet]:
        """Find the images, and encode them once per encoder, with all outputs that its systems need."""
        categories = self.find_in(self.settings.data)
        self._encode(categories)
        return categories

    def _encode(self, categories: Sequence[ImageSet]) -> None:
        self._drop_unfit_systems()
        systems = [*self.settings.systems, *self._ablated()]
        waiting: list[tuple[str, ImageSet, SubmittedCall]] = []
        for name in dict.fromkeys(system.encoder for system in systems):
            encoder = self.settings.encoders[name]
            if not self.has_weights(encoder, f"encoder {name}"):
                continue
            users = [system for system in systems if system.encoder == name]
            outputs = tuple(sorted({output for system in users for output in system.outputs}))
            for category in categories:
                for style in dict.fromkeys(system.prompts for system in users if system.prompts is not None):
                    self._text(name, category, style)
                call = steps.encode(category.images, encoder, self.settings.machine, outputs)
                waiting.append((name, category, self.runner.submit(f"{category.name}, {name}", call)))
        for name, category, task in waiting:
            features = task.ref()
            if features is not None and (usable := self.usable(category, features)).images:
                self.features[name, category.name] = Prepared(usable, features)

    def _drop_unfit_systems(self) -> None:
        """Drop systems that need an output that their encoder does not have, and list them as failures."""
        from zsad.clip.encoder import check_outputs

        fitting = []
        for system in self.settings.systems:
            try:
                check_outputs(self.settings.encoders[system.encoder], system.outputs)
            except UserError as error:
                self.runner.record_failure(
                    to_case_failure(self.runner.set_group(system.display_name, system.display_name, ""), "find", error)
                )
            else:
                fitting.append(system)
        self.settings = self.settings.model_copy(update={"systems": tuple(fitting)})

    def _text(self, encoder: str, category: ImageSet, style: PromptStyle) -> SubmittedCall:
        key = (encoder, category.name, style)
        if key not in self.texts:
            prompts = self.settings.prompts.model_copy(update={"style": style})
            call = steps.text(category.name, self.settings.encoders[encoder], prompts, self.settings.machine)
            self.texts[key] = self.runner.submit(f"{category.name}, {encoder}, {style}", call)
        return self.texts[key]

    def _text_ref(self, system: System, category: ImageSet) -> Ref | None:
        return None if system.prompts is None else self.ref_of(self._text(system.encoder, category, system.prompts))

    def _ablated(self) -> list[DualImage]:
        name = self.settings.ablation_encoder
        return [system for ablation in self.settings.ablations for _, system in ablation_systems(ablation, name)]

    def train(self, categories: Sequence[ImageSet]) -> dict[tuple[str, str], SubmittedCall]:
        """Train the learned systems without a checkpoint, on auxiliary images, or for each category on all others."""
        learned = [s for s in self.settings.systems if isinstance(s, AprilGan | AnomalyClip) and s.checkpoint is None]
        if not learned:
            return {}
        auxiliary: list[ImageSet] | None = None
        if self.settings.auxiliary is not None:
            notes = list(self.notes)  # notes about auxiliary images must not appear in the report
            auxiliary = self.find_in(self.settings.auxiliary, "auxiliary")
            self.notes = notes
        trained: dict[tuple[str, str], SubmittedCall] = {}
        for system in learned:
            for category in categories:
                others = auxiliary if auxiliary is not None else [one for one in categories if one is not category]
                label = self._label(system, category.name)
                if not others:
                    rule = (
                        "is trained on other categories, but there is only one; give a checkpoint or auxiliary images"
                    )
                    self.runner.record_failure(
                        to_case_failure(label, steps.TRAIN.name, InputError("data", f"{system.title} {rule}"))
                    )
                    continue
                sets = tuple(one for other in others if (one := self._training_set(system, other)) is not None)
                if sets:
                    call = steps.train(system, sets, self.settings.encoders[system.encoder], self.settings.machine)
                    trained[system.display_name, category.name] = self.runner.submit(label, call)
        return trained

    def train_one(self, categories: Sequence[ImageSet]) -> Ref | None:
        """Train the only system of the settings on all categories."""
        (system,) = self.settings.systems
        assert isinstance(system, AprilGan | AnomalyClip)
        sets = tuple(one for category in categories if (one := self._training_set(system, category)) is not None)
        if not sets:
            return None
        call = steps.train(system, sets, self.settings.encoders[system.encoder], self.settings.machine)
        return self.runner.run(system.display_name, call)

    def _training_set(self, system: System, category: ImageSet) -> Source[Ref] | None:
        encoder = self.settings.encoders[system.encoder]
        prepared = self.features.get((system.encoder, category.name))
        if prepared is None or not set(category.images) >= set(prepared.images.images):
            outputs = tuple(sorted(system.outputs))
            features = self.runner.run(
                f"{category.name}, {system.encoder}",
                steps.encode(category.images, encoder, self.settings.machine, outputs),
            )
            if features is None:
                return None
            prepared = Prepared(self.usable(category, features), features)
        text = self._text_ref(system, category)
        if text is None and system.prompts is not None:
            return None
        return Source(self._category_words(category), prepared.features, text, prepared.images.images)

    def _category_words(self, category: ImageSet) -> str:
        return self.settings.prompts.names.get(category.name, category.name)

    def _label(self, system: System, category: str, seed: int | None = None) -> str:
        label = f"{category}, {system.display_name}" + (f", seed {seed}" if seed is not None and system.seeded else "")
        return self.runner.set_group(label, system.display_name, category)

    def score(self, categories: Sequence[ImageSet]) -> tuple[list[SystemResult[Ref]], list[AblationResult[Ref]]]:
        """Score and evaluate all systems on all categories and seeds, and the ablations."""
        trained = self.train(categories)
        rows = [(system, self._start_scoring(system, categories, trained)) for system in self.settings.systems]
        ablations = [
            (name, [(label, self._start_scoring(system.model_copy(update={"label": f"{name} {label}"}), categories, {}))
                    for label, system in ablation_systems(name, self.settings.ablation_encoder)])
            for name in self.settings.ablations
        ]  # fmt: skip
        results = [self._result(system, self._evaluate(started)) for system, started in rows]
        shown = [
            AblationResult(name, [AblationRow(label, _folders(self._evaluate(started))) for label, started in one])
            for name, one in ablations
        ]
        return results, shown

    def _result(self, system: System, found: ByCategory) -> SystemResult[Ref]:
        encoder = self.settings.encoders[system.encoder]
        weights = weights_shown(encoder) or {}
        return SystemResult(system, encoder_info(encoder, weights.get("weights", "")), found)

    def _start_scoring(
        self, system: System, categories: Sequence[ImageSet], trained: dict[tuple[str, str], SubmittedCall]
    ) -> list[Scoring]:
        found = []
        for category in categories:
            prepared = self.features.get((system.encoder, category.name))
            if prepared is None:
                continue
            text = self._text_ref(system, category)
            if text is None and system.prompts is not None:
                continue
            for seed in self.settings.seeds if system.seeded else self.settings.seeds[:1]:
                label = self._label(system, category.name, seed)
                call = self._score_call(system, prepared, text, seed, label, trained)
                if call is not None:
                    task = self.runner.submit(label, call)
                    found.append(Scoring(system, prepared.images, seed, label, prepared.features, task))
        return found

    def _score_call(
        self,
        system: System,
        prepared: Prepared,
        text: Ref | None,
        seed: int,
        label: str,
        trained: dict[tuple[str, str], SubmittedCall],
    ) -> Call | None:
        settings, category = self.settings, prepared.images
        encoder = settings.encoders[system.encoder]
        if isinstance(system, DualImage):
            assert text is not None
            return steps.score(
                category.images, prepared.features, text, encoder, system.score, system.adapt, seed, settings.machine
            )
        weights = None
        if isinstance(system, LearnedSettings) and system.checkpoint is None:
            task = trained.get((system.display_name, category.name))
            if task is None or (weights := self.ref_of(task)) is None:
                return None
        shots = None
        if (
            isinstance(system, WinClip)
            and system.shots
            and (shots := self._shots(system, category, seed, label)) is None
        ):
            return None
        return steps.score_system(
            system, self._category_words(category), category.images, prepared.features, text, shots, weights, encoder,
            seed, settings.machine,
        )  # fmt: skip

    def _shots(self, system: WinClip, category: ImageSet, seed: int, label: str) -> Ref | None:
        """Encode normal training images as shots. Their choice depends only on image contents and the seed."""
        from medad.cohort.samples import samples_dir
        from zsad.data.datasets import normal_training_images
        from zsad.data.shots import draw_shots

        try:
            paths = normal_training_images(self.settings.data, category.name, samples_dir())
            images = []
            for path in paths:
                path_filter.learn(path, category.name)
                images.append(LabelledImage("", path_digest(path), path, anomalous=False))
        except UserError as error:
            self.runner.record_failure(to_case_failure(label, "find", error))
            return None
        by_digest = {image.sha256: image for image in images}
        if len(by_digest) < system.shots:
            rule = f"{category.name}: only {len(images)} normal training images for {system.shots} shots"
            self.runner.record_failure(to_case_failure(label, "find", InputError("data", rule)))
            return None
        drawn = tuple(by_digest[digest] for digest in draw_shots(by_digest, seed, system.shots))
        call = steps.encode(drawn, self.settings.encoders[system.encoder], self.settings.machine, system.outputs)
        return self.runner.run(label, call)

    def _evaluate(self, started: Iterable[Scoring]) -> ByCategory:
        tasks = []
        for one in started:
            scores = self.ref_of(one.scores)
            if scores is not None and isinstance(one.system, DualImage):
                fuse = steps.fuse(scores, one.system.score)
                scores = scores if fuse is None else self.runner.run(one.label, fuse)
            if scores is None:
                continue
            variant = one.system.variant if isinstance(one.system, DualImage) else "system"
            images, settings = one.category.images, self.settings.evaluation
            call = steps.evaluate(images, one.features, scores, (variant,), settings)
            tasks.append((one, self.runner.submit(one.label, call)))
        found: ByCategory = {}
        for one, task in tasks:
            evaluated = task.ref()
            if evaluated is not None:
                self.note_masks(one.category, evaluated)
                found.setdefault(one.category.name, {})[one.seed] = Evaluated(evaluated, self._cost(one))
        return found

    def _cost(self, one: Scoring) -> Cost | None:
        from zsad.steps.cost import read_cost

        made = self.ref_of(one.scores)
        if made is None or not made.made:
            return None
        cost = read_cost(made.folder())
        if cost is None:
            return None
        encoding_s = ArtifactStore().sidecar(one.features).seconds
        images = len({image.sha256 for image in one.category.images})
        return Cost(cost.seconds, encoding_s, images, cost.peak_memory_bytes)

    def report(self, systems: Sequence[SystemResult[Ref]], ablations: Sequence[AblationResult[Ref]]) -> Ref | None:
        """Write the report with tables, tests and ablations."""
        failures = self.runner.failures_for_report(pseudonymous=self.settings.data.pseudonyms)
        notes = tuple(dict.fromkeys((*self.notes, *self.runner.notes)))
        call = steps.compare_report(self.settings, systems, ablations, failures, installed_versions(), notes)
        return self.runner.run("report", call)

    def finish_run(self, out: Path, copies: Sequence[FileCopy], started: float, *, useful: bool) -> Outcome:
        """Call `finish` with this flow's entries of the manifest."""
        manifest = {"encoders": {name: weights_shown(one) for name, one in self.settings.encoders.items()}}
        return self.finish(out, self.settings, copies, manifest, started, ui_artifacts.COMPARE, useful=useful)


def _folders(found: ByCategory) -> dict[str, dict[int, Ref]]:
    return {category: {seed: one.folder for seed, one in seeds.items()} for category, seeds in found.items()}


@define_flow("zsad-compare", "compare {settings.name}")
def compare(settings: CompareSettings, out: Path, refresh: bool = False) -> Outcome:
    """Compare all systems of the configuration on its images. Writes the report to the run folder `out`."""
    started = time.monotonic()
    stages = CompareStages(settings, refresh=refresh)
    with terminal.bars():
        systems, ablations = stages.score(stages.prepare())
    report = stages.report(systems, ablations)
    useful = any(row.categories for row in systems)
    return stages.finish_run(out, copies_of(report, *REPORT_FILES), started, useful=useful)


@define_flow("zsad-train", "train {settings.name}")
def train(settings: CompareSettings, out: Path, refresh: bool = False) -> Outcome:
    """Train the only learned system of the settings on all images. Writes its checkpoint to the run folder `out`."""
    started = time.monotonic()
    stages = CompareStages(settings, refresh=refresh)
    with terminal.bars():
        checkpoint = stages.train_one(stages.prepare())
    return stages.finish_run(out, copies_of(checkpoint, *TRAINED_FILES), started, useful=checkpoint is not None)
