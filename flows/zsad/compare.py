"""The flow zsad-compare: every system on the same images, features shared by those of one encoder.

Categories and systems go beside each other on the task runner, as far as the device's slot lets them. A system that
fails on a category is listed and left out there; the others go on, and the report is written whatever happens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State

from flows.devices.engines import RUNNER
from flows.machine.terminal import terminal
from flows.privacy.log_filter import confined, path_filter
from flows.runs import artifacts as ui
from flows.runs.outcome import Outcome, failed_steps, final_state
from flows.runs.plan import new_tally
from flows.runs.run_folder import Copied, copied, installed_versions
from flows.runs.runner import Submitted, describe
from flows.store.artifacts import ArtefactStore, Ref
from flows.store.step import FailedStep, file_digest
from flows.zsad.compare_steps import (
    AblationRows,
    CompareReport,
    Result,
    ScoreSystem,
    SystemRow,
    TrainingSet,
    TrainSystem,
)
from flows.zsad.image_sets import ImageSet, ImageStages, weights_shown
from flows.zsad.steps import Encode, EvaluateCategory, Fuse, Image, Score, Text
from medad.base.errors import InputError, UserError
from zsad.config.compare import CompareSettings, ablation_systems
from zsad.config.run import PromptStyle
from zsad.config.systems import AnomalyClip, AprilGan, DualImage, LearnedSettings, System, WinClip

REPORT_FILES = (
    *("report.html", "report.json", "preview.png", "systems.csv", "summary.csv", "paired.csv", "ablations.csv"),
    *("table_image.tex", "table_pixel.tex"),
)
TRAINED_FILES = ("checkpoint.safetensors", "training.json")
NO_OTHERS = (
    "a learned system is trained on other categories, and there are none: give it a checkpoint or auxiliary images"
)


@dataclass(frozen=True)
class Prepared:
    """A category with the features of one encoder."""

    images: ImageSet
    """Those with features."""
    features: Ref


@dataclass(frozen=True)
class Scoring:
    """A system at work on one category and seed."""

    system: System
    category: ImageSet
    seed: int
    label: str
    features: Ref
    scores: Submitted


class CompareStages(ImageStages):
    """The stages over one tally: each takes what the one before gave and leaves out what failed."""

    def __init__(self, settings: CompareSettings, *, refresh: bool) -> None:
        super().__init__(new_tally(settings.machine, refresh=refresh))
        self.settings = settings
        self.of_system: dict[str, tuple[str, str]] = {}
        """Label of a task -> the system and the category it belongs to."""
        self.features: dict[tuple[str, str], Prepared] = {}
        """By encoder and category."""
        self.texts: dict[tuple[str, str, PromptStyle], Submitted] = {}
        """By encoder, category and style."""
        self._refs: dict[int, Ref | None] = {}

    def ref_of(self, task: Submitted) -> Ref | None:
        """A task's artefact, waited for and counted once however many systems ask."""
        if id(task) not in self._refs:
            self._refs[id(task)] = task.ref()
        return self._refs[id(task)]

    def prepare(self) -> list[ImageSet]:
        """Find the images, and encode them once by each encoder with all views that its systems read."""
        categories = self.find_in(self.settings.data)
        self._encode(categories)
        return categories

    def _encode(self, categories: Sequence[ImageSet]) -> None:
        self._leave_out_misfits()
        systems = [*self.settings.systems, *self._ablated()]
        waiting: list[tuple[str, ImageSet, Submitted]] = []
        for name in dict.fromkeys(system.encoder for system in systems):
            encoder = self.settings.encoders[name]
            if not self.has_weights(encoder, f"encoder {name}"):
                continue
            own = [system for system in systems if system.encoder == name]
            views = tuple(sorted({view for system in own for view in system.views}))
            for category in categories:
                for style in dict.fromkeys(system.prompts for system in own if system.prompts is not None):
                    self._text(name, category, style)
                job = Encode(category.images, encoder, self.settings.machine, views)
                waiting.append((name, category, self.tally.submit(f"{category.name}, {name}", job)))
        for name, category, task in waiting:
            features = task.ref()
            if features is not None and (usable := self.usable(category, features)).images:
                self.features[name, category.name] = Prepared(usable, features)

    def _leave_out_misfits(self) -> None:
        """A system that asks for what its encoder does not have is listed; the others of that encoder go on."""
        from zsad.clip.encoder import check_views

        fitting = []
        for system in self.settings.systems:
            try:
                check_views(self.settings.encoders[system.encoder], system.views)
            except UserError as error:
                self.of_system[system.shown] = (system.shown, "")
                self.tally.fail(describe(system.shown, "find", error))
            else:
                fitting.append(system)
        self.settings = self.settings.model_copy(update={"systems": tuple(fitting)})

    def _text(self, encoder: str, category: ImageSet, style: PromptStyle) -> Submitted:
        key = (encoder, category.name, style)
        if key not in self.texts:
            prompts = self.settings.prompts.model_copy(update={"style": style})
            job = Text(category.name, self.settings.encoders[encoder], prompts, self.settings.machine)
            self.texts[key] = self.tally.submit(f"{category.name}, {encoder}, {style}", job)
        return self.texts[key]

    def _text_ref(self, system: System, category: ImageSet) -> Ref | None:
        return None if system.prompts is None else self.ref_of(self._text(system.encoder, category, system.prompts))

    def _ablated(self) -> list[DualImage]:
        name = self.settings.ablation_encoder
        return [system for ablation in self.settings.ablations for _, system in ablation_systems(ablation, name)]

    def train(self, categories: Sequence[ImageSet]) -> dict[tuple[str, str], Submitted]:
        """Learned systems without a checkpoint: on auxiliary images, or for each category on the others."""
        learned = [s for s in self.settings.systems if isinstance(s, AprilGan | AnomalyClip) and s.checkpoint is None]
        if not learned:
            return {}
        auxiliary: list[ImageSet] | None = None
        if self.settings.auxiliary is not None:
            notes = list(self.notes)  # what is said of these images is not said of those that are judged
            auxiliary = self.find_in(self.settings.auxiliary, "auxiliary")
            self.notes = notes
        trained: dict[tuple[str, str], Submitted] = {}
        for system in learned:
            for category in categories:
                others = auxiliary if auxiliary is not None else [one for one in categories if one is not category]
                label = self._label(system, category.name)
                if not others:
                    rule = (
                        "is trained on other categories, and there are none; give it a checkpoint or auxiliary images"
                    )
                    self.tally.fail(
                        describe(label, TrainSystem.step.name, InputError("data", f"{system.title} {rule}"))
                    )
                    continue
                sets = tuple(one for other in others if (one := self._training_set(system, other)) is not None)
                if sets:
                    job = TrainSystem(system, sets, self.settings.encoders[system.encoder], self.settings.machine)
                    trained[system.shown, category.name] = self.tally.submit(label, job)
        return trained

    def train_one(self, categories: Sequence[ImageSet]) -> Ref | None:
        """The one system of the settings, on all categories."""
        (system,) = self.settings.systems
        assert isinstance(system, AprilGan | AnomalyClip)
        sets = tuple(one for category in categories if (one := self._training_set(system, category)) is not None)
        if not sets:
            return None
        job = TrainSystem(system, sets, self.settings.encoders[system.encoder], self.settings.machine)
        return self.tally.run(system.shown, job)

    def _training_set(self, system: System, category: ImageSet) -> TrainingSet | None:
        encoder = self.settings.encoders[system.encoder]
        prepared = self.features.get((system.encoder, category.name))
        if prepared is None or not set(category.images) >= set(prepared.images.images):
            views = tuple(sorted(system.views))
            features = self.tally.run(
                f"{category.name}, {system.encoder}", Encode(category.images, encoder, self.settings.machine, views)
            )
            if features is None:
                return None
            prepared = Prepared(self.usable(category, features), features)
        text = self._text_ref(system, category)
        if text is None and system.prompts is not None:
            return None
        return TrainingSet(self._words(category), prepared.images.images, prepared.features, text)

    def _words(self, category: ImageSet) -> str:
        return self.settings.prompts.names.get(category.name, category.name)

    def _label(self, system: System, category: str, seed: int | None = None) -> str:
        label = f"{category}, {system.shown}" + (f", seed {seed}" if seed is not None and system.seeded else "")
        self.of_system[label] = (system.shown, category)
        return label

    def score(self, categories: Sequence[ImageSet]) -> tuple[list[SystemRow], list[AblationRows]]:
        """All systems on all categories and seeds, judged; then the ablations."""
        trained = self.train(categories)
        rows = [(system, self._begin(system, categories, trained)) for system in self.settings.systems]
        ablations = [
            (name, [(label, self._begin(system.model_copy(update={"label": f"{name} {label}"}), categories, {}))
                    for label, system in ablation_systems(name, self.settings.ablation_encoder)])
            for name in self.settings.ablations
        ]  # fmt: skip
        judged = [
            SystemRow(system, self.settings.encoders[system.encoder], self._judge(begun)) for system, begun in rows
        ]
        shown = [
            AblationRows(name, tuple((label, self._judge(begun)) for label, begun in one)) for name, one in ablations
        ]
        return judged, shown

    def _begin(
        self, system: System, categories: Sequence[ImageSet], trained: dict[tuple[str, str], Submitted]
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
                job = self._job(system, prepared, text, seed, label, trained)
                if job is not None:
                    task = self.tally.submit(label, job)
                    found.append(Scoring(system, prepared.images, seed, label, prepared.features, task))
        return found

    def _job(
        self,
        system: System,
        prepared: Prepared,
        text: Ref | None,
        seed: int,
        label: str,
        trained: dict[tuple[str, str], Submitted],
    ) -> Score | ScoreSystem | None:
        settings, category = self.settings, prepared.images
        encoder = settings.encoders[system.encoder]
        if isinstance(system, DualImage):
            assert text is not None
            return Score(
                category.images, prepared.features, text, encoder, system.score, system.adapt, seed, settings.machine
            )
        weights = None
        if isinstance(system, LearnedSettings) and system.checkpoint is None:
            task = trained.get((system.shown, category.name))
            if task is None or (weights := self.ref_of(task)) is None:
                return None
        shots = None
        if (
            isinstance(system, WinClip)
            and system.shots
            and (shots := self._shots(system, category, seed, label)) is None
        ):
            return None
        return ScoreSystem(
            system, self._words(category), category.images, prepared.features, text, shots, weights, encoder, seed,
            settings.machine,
        )  # fmt: skip

    def _shots(self, system: WinClip, category: ImageSet, seed: int, label: str) -> Ref | None:
        """Features of normal training images, drawn by their contents and the seed."""
        from medad.cohort.samples import samples_dir
        from zsad.data.datasets import normal_training_images

        try:
            paths = normal_training_images(self.settings.data, category.name, samples_dir())
            images = []
            for path in paths:
                path_filter.learn(path, category.name)
                images.append(Image(file_digest(path), "", path, anomalous=False))
        except UserError as error:
            self.tally.fail(describe(label, "find", error))
            return None
        if len({image.sha256 for image in images}) < system.shots:
            rule = f"{category.name}: {len(images)} normal training images, fewer than {system.shots} shots"
            self.tally.fail(describe(label, "find", InputError("data", rule)))
            return None
        ordered = sorted(images, key=lambda image: hashlib.sha256(f"shots {seed} {image.sha256}".encode()).digest())
        distinct = tuple({image.sha256: image for image in ordered}.values())[: system.shots]
        job = Encode(distinct, self.settings.encoders[system.encoder], self.settings.machine, system.views)
        return self.tally.run(label, job)

    def _judge(self, begun: Iterable[Scoring]) -> tuple[Result, ...]:
        tasks = []
        for one in begun:
            scores = self.ref_of(one.scores)
            if scores is not None and isinstance(one.system, DualImage):
                fuse = Fuse(scores, one.system.score)
                scores = self.tally.run(one.label, fuse) if fuse.needed else scores
            if scores is None:
                continue
            variant = one.system.variant if isinstance(one.system, DualImage) else "system"
            job = EvaluateCategory(one.category.images, one.features, scores, (variant,), self.settings.evaluation)
            tasks.append((one, self.tally.submit(one.label, job)))
        found = []
        for one, task in tasks:
            evaluated = task.ref()
            if evaluated is not None:
                found.append(Result(one.category.name, one.seed, evaluated, self._cost(one)))
        return tuple(found)

    def _cost(self, one: Scoring) -> tuple[float, float, int, int | None] | None:
        from zsad.steps.cost import read_cost

        made = self.ref_of(one.scores)
        if made is None or not made.made:
            return None
        cost = read_cost(made.folder())
        if cost is None:
            return None
        encoding_s = ArtefactStore().sidecar(one.features).seconds
        return cost.seconds, encoding_s, len({image.sha256 for image in one.category.images}), cost.peak_memory_bytes

    def report(self, systems: Sequence[SystemRow], ablations: Sequence[AblationRows]) -> Ref | None:
        """The tables, tests and ablations."""
        failures = []
        for failure in failed_steps(self.tally, opaque=self.settings.data.opaque_ids):
            system, category = self.of_system.get(failure.case_id, ("", ""))
            own = FailedStep(category, failure.stage, failure.rule, failure.file) if system else failure
            failures.append((system, own))
        job = CompareReport(
            settings=self.settings,
            systems=tuple(systems),
            ablations=tuple(ablations),
            failures=tuple(failures),
            versions=tuple(sorted(installed_versions().items())),
            notes=tuple(dict.fromkeys((*self.notes, *self.tally.notes))),
        )
        return self.tally.run("report", job)

    def end(self, out: Path, copies: Sequence[Copied], started: float) -> Outcome:
        """`finish` with what this flow's manifest says."""
        manifest = {"encoders": {name: weights_shown(one) for name, one in self.settings.encoders.items()}}
        return self.finish(out, self.settings, copies, manifest, started, ui.COMPARE, private=False)


@flow(
    name="zsad-compare",
    flow_run_name="compare {settings.name}",
    task_runner=RUNNER,
    persist_result=False,
    log_prints=True,
)
@confined
def compare(settings: CompareSettings, out: Path, refresh: bool = False) -> State[Outcome]:
    """Every system of the configuration on its images, side by side, in the run folder `out`."""
    started = time.monotonic()
    stages = CompareStages(settings, refresh=refresh)
    with terminal.bars():
        systems, ablations = stages.score(stages.prepare())
    report = stages.report(systems, ablations)
    outcome = stages.end(out, copied(report, *REPORT_FILES), started)
    return final_state(outcome, useful=any(row.results for row in systems))


@flow(
    name="zsad-train", flow_run_name="train {settings.name}", task_runner=RUNNER, persist_result=False, log_prints=True
)
@confined
def train(settings: CompareSettings, out: Path, refresh: bool = False) -> State[Outcome]:
    """Train the one learned system of the settings on all their images; its checkpoint lies in the run folder `out`."""
    started = time.monotonic()
    stages = CompareStages(settings, refresh=refresh)
    with terminal.bars():
        checkpoint = stages.train_one(stages.prepare())
    outcome = stages.end(out, copied(checkpoint, *TRAINED_FILES), started)
    return final_state(outcome, useful=checkpoint is not None)
