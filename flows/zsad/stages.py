"""The stages of all image flows: find, encode, train, score, evaluate, report. Systems with one encoder share features.

Categories and systems run in parallel on the task runner, within the limits of the device slots. A system that fails on
a category is listed and left out there. The others continue, and the report is always written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.privacy.log_filter import path_filter
from flows.runs import ui_artifacts
from flows.runs.outcome import Outcome
from flows.runs.run_folder import FileCopy, installed_versions
from flows.runs.runner import SubmittedCall, new_runner, to_case_failure
from flows.store.artifacts import ArtifactStore
from flows.store.digests import path_digest
from flows.store.references import Ref
from flows.store.step import Call
from flows.zsad import steps
from flows.zsad.image_sets import ImageSet, ImageStages, weights_shown
from medad.base.errors import CaseFailure, InputError, UserError
from zsad.clip.models import encoder_info
from zsad.config.settings import ZsadSettings, ablation_systems
from zsad.config.learned import AnomalyClip, AprilGan, LearnedSettings
from zsad.config.run import PromptStyle
from zsad.config.systems import DualImage, System
from zsad.data.labelled import LabelledImage
from zsad.steps.results import AblationResult, AblationRow, Cost, Evaluated, ScoredInputs, Source, SystemResult

SCORING = "zsad-system"
MAX_SHOTS = 64
"""Largest number of normal images of one category."""
ByCategory = dict[str, dict[int, Evaluated[Ref]]]
"""Category -> seed -> evaluated result."""


@dataclass(frozen=True)
class Prepared:
    """A category with its features from one encoder."""

    images: ImageSet
    """Images with features."""
    features: Ref


@dataclass(frozen=True)
class NormalImages:
    """Normal images with which the images of a category are compared."""

    images: tuple[LabelledImage, ...]
    features: Ref


@dataclass(frozen=True)
class Scoring:
    """A submitted scoring task: one system on one category with one seed."""

    system: System
    category: ImageSet
    seed: int
    label: str
    features: Ref
    text: Ref | None
    normal: NormalImages | None
    scores: SubmittedCall


class Stages(ImageStages):
    """The stages of the flow. Each takes the results of the one before and skips what failed."""

    def __init__(self, settings: ZsadSettings, *, refresh: bool) -> None:
        super().__init__(new_runner(settings.machine, refresh=refresh))
        self.settings = settings
        self.features: dict[tuple[str, str], Prepared] = {}
        """Prepared categories, by encoder and category."""
        self.texts: dict[tuple[str, str, PromptStyle], SubmittedCall] = {}
        """Tasks of text features, by encoder, category and prompt style."""
        self.normal: tuple[LabelledImage, ...] = ()
        """Normal images that the user gave for the only category. Empty: those of the data set."""
        self.thresholds: dict[str, Ref] = {}
        """Thresholds from normal images, by the systems' names."""
        self._masks_noted: set[str] = set()
        self._refs: dict[int, Ref | None] = {}

    def ref_of(self, task: SubmittedCall) -> Ref | None:
        """Wait for a task, and return its artifact. A task that several systems share is counted once."""
        if id(task) not in self._refs:
            self._refs[id(task)] = task.ref()
        return self._refs[id(task)]

    def prepare(self) -> list[ImageSet]:
        """Find the images, and encode them once per encoder, with all outputs that its systems need."""
        categories = self.find_in(self.settings.data)
        self.encode(categories)
        return categories

    def encode(self, categories: Sequence[ImageSet]) -> None:
        """Encode images and prompts. Systems that their encoder cannot serve are left out and listed."""
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
        results = [self._result(system, *self._evaluate(started)) for system, started in rows]
        shown = [
            AblationResult(name, [AblationRow(label, _folders(self._evaluate(started)[0])) for label, started in one])
            for name, one in ablations
        ]
        return results, shown

    def _result(
        self, system: System, found: ByCategory, inputs: dict[str, ScoredInputs[Ref]]
    ) -> SystemResult[Ref]:
        encoder = self.settings.encoders[system.encoder]
        weights = weights_shown(encoder) or {}
        return SystemResult(system, encoder_info(encoder, weights.get("weights", "")), found, inputs)

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
                normal = self._normal(system, category, seed, label) if system.shots else None
                if system.shots and normal is None:
                    continue
                weights = self._weights(system, category, trained)
                if weights is False:
                    continue
                scored = prepared.images
                task = self.runner.submit(
                    label, self._score_call(system, scored, prepared.features, text, normal, weights or None, seed)
                )
                found.append(Scoring(system, scored, seed, label, prepared.features, text, normal, task))
        return found

    def _weights(
        self, system: System, category: ImageSet, trained: dict[tuple[str, str], SubmittedCall]
    ) -> Ref | Literal[False] | None:
        """Return the weights of a trained system. None: it needs none, or has a checkpoint. False: there are none."""
        if not isinstance(system, LearnedSettings) or system.checkpoint is not None:
            return None
        task = trained.get((system.display_name, category.name))
        return (None if task is None else self.ref_of(task)) or False

    def _score_call(
        self,
        system: System,
        category: ImageSet,
        features: Ref,
        text: Ref | None,
        normal: NormalImages | None,
        weights: Ref | None,
        seed: int,
    ) -> Call:
        return steps.score_system(
            system, self._category_words(category), category.images, features, text,
            None if normal is None else normal.features, weights, self.settings.encoders[system.encoder], seed,
            self.settings.machine,
        )  # fmt: skip

    def _normal(self, system: System, category: ImageSet, seed: int, label: str) -> NormalImages | None:
        """Encode normal images. Their choice depends only on image contents and the seed."""
        from zsad.data.shots import draw_shots

        try:
            images = self.normal or self._training_images(category)
        except UserError as error:
            self.runner.record_failure(to_case_failure(label, "find", error))
            return None
        by_digest = {image.sha256: image for image in images}
        if len(by_digest) < system.shots:
            rule = f"{category.name}: only {len(by_digest)} different normal images for {system.shots} shots"
            self.runner.record_failure(to_case_failure(label, "find", InputError("data", rule)))
            return None
        drawn = tuple(by_digest[digest] for digest in draw_shots(by_digest, seed, system.shots))
        encoder = self.settings.encoders[system.encoder]
        features = self.runner.run(label, steps.encode(drawn, encoder, self.settings.machine, system.outputs))
        return None if features is None else NormalImages(drawn, features)

    def use_shots(self, count: int) -> None:
        """Let the only system compare with `count` normal images, or with fewer if it or its settings limit them."""
        system = self.settings.method
        wanted = min(system.shots or MAX_SHOTS, count)
        if wanted < count:
            self.notes.append(f"{wanted} of the {count} normal images are used, chosen at random.")
        system = system.model_copy(update={"shots": wanted})
        self.settings = self.settings.model_copy(update={"systems": (system,)})

    def drawn_normal(self) -> tuple[str, ...]:
        """Return the sha256 of the normal images that the first seed chooses, of those that the user gave."""
        from zsad.data.shots import draw_shots

        digests = {image.sha256 for image in self.normal}
        return tuple(draw_shots(digests, self.settings.seeds[0], self.settings.method.shots)) if digests else ()

    def _training_images(self, category: ImageSet) -> tuple[LabelledImage, ...]:
        """Return the data set's normal training images of a category. Raises UserError."""
        from medad.cohort.samples import samples_dir
        from zsad.data.datasets import normal_training_images

        images = []
        for path in normal_training_images(self.settings.data, category.name, samples_dir()):
            path_filter.learn(path, category.name)
            images.append(LabelledImage("", path_digest(path), path, anomalous=False))
        return tuple(images)

    def find_threshold(self, category: ImageSet, judged_by: str) -> Ref | None:
        """Find the threshold of the only system from its scores of the normal images, each compared with the others."""
        system, seed = self.settings.method, self.settings.seeds[0]
        label = self._label(system, "normal images", seed)
        normal = self._normal(system, category, seed, label)
        text = self._text_ref(system, category)
        if normal is None or (text is None and system.prompts is not None):
            return None
        usable = self.usable(ImageSet("normal images", "", normal.images), normal.features)
        scores = self.runner.run(label, self._score_call(system, usable, normal.features, text, normal, None, seed))
        if scores is None:
            return None
        call = steps.save_threshold(scores, system, self.settings, "normal", judged_by)
        made = self.runner.run(label, call)
        if made is not None:
            self.thresholds[system.display_name] = made
        return made

    def _evaluate(self, started: Iterable[Scoring]) -> tuple[ByCategory, dict[str, ScoredInputs[Ref]]]:
        tasks = []
        for one in started:
            scores = self.ref_of(one.scores)
            if scores is not None and isinstance(one.system, DualImage):
                fuse = steps.fuse(scores, one.system.score)
                scores = scores if fuse is None else self.runner.run(one.label, fuse)
            if scores is None:
                continue
            self._note_unscored(one.category, scores)
            images, settings = one.category.images, self.settings.evaluation
            threshold = self.thresholds.get(one.system.display_name)
            call = steps.evaluate(images, one.features, scores, one.system.variant_names, settings, threshold)
            tasks.append((one, scores, self.runner.submit(one.label, call)))
        found: ByCategory = {}
        inputs: dict[str, ScoredInputs[Ref]] = {}
        for one, scores, task in tasks:
            evaluated = task.ref()
            if evaluated is not None:
                name = one.category.name
                self._note_masks(one.category, evaluated)
                found.setdefault(name, {})[one.seed] = Evaluated(evaluated, self._cost(one), scores)
                normal = () if one.normal is None else one.normal.images
                inputs.setdefault(name, ScoredInputs(one.category.images, one.features, one.text, normal))
        return found, inputs

    def _note_unscored(self, category: ImageSet, scores: Ref) -> None:
        """Add images that could not be scored to the failures."""
        if not scores.made:
            return
        from zsad.scorers.stored_scores import open_scores

        self._note_problems(category, SCORING, {one.sha256: one.rule for one in open_scores(scores.folder()).problems})

    def _note_masks(self, category: ImageSet, evaluated: Ref) -> None:
        """Add unusable masks to the failures, once for all seeds and systems. Their images get no pixel metrics."""
        if not evaluated.made or category.name in self._masks_noted:
            return
        self._masks_noted.add(category.name)
        problems = json.loads((evaluated.folder() / "metrics.json").read_text(encoding="utf-8"))["problems"]
        rules = {problem["sha256"]: problem["rule"] for problem in problems}
        self._note_problems(category, steps.EVALUATE.name, rules, masks=True)

    def _note_problems(self, category: ImageSet, stage: str, rules: dict[str, str], *, masks: bool = False) -> None:
        for image in category.images:
            file = image.mask if masks else image.path
            if image.sha256 in rules and file is not None:
                case_id, rule = f"{category.name}/{image.id}", path_filter.scrub(rules[image.sha256])
                self.runner.record_failure(CaseFailure(case_id, stage, rule, str(file), category=category.name))

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

    def maps(self, systems: Sequence[SystemResult[Ref]]) -> list[FileCopy]:
        """Write the anomaly maps that the settings ask for, and return the copies of their folders."""
        if not self.settings.maps:
            return []
        tasks = [
            (row.system, one.name, self.runner.submit(label, steps.category_maps(self.settings_of(row.system), one)))
            for row in systems
            for one in row.category_results()
            for label in [self._label(row.system, one.name)]
        ]
        copies = []
        for system, name, task in tasks:
            ref = task.ref()
            folder = ["maps", *([_file_name(system.display_name)] if len(systems) > 1 else []), _file_name(name)]
            if ref is not None:
                copies.append(FileCopy(ref, "maps", "/".join(folder)))
        return copies

    def settings_of(self, system: System) -> ZsadSettings:
        """Return the settings of the run with only this system."""
        return self.settings.model_copy(update={"systems": (system,), "ablations": ()})

    def report(self, systems: Sequence[SystemResult[Ref]]) -> Ref | None:
        """Write the report on a single system."""
        categories = systems[0].category_results() if systems else ()
        failures = self.runner.failures_for_report(pseudonymous=self.settings.data.pseudonyms)
        call = steps.report(self.settings, categories, failures, installed_versions(), self.all_notes())
        return self.runner.run("report", call)

    def compare_report(
        self, systems: Sequence[SystemResult[Ref]], ablations: Sequence[AblationResult[Ref]]
    ) -> Ref | None:
        """Write the report with tables, tests and ablations."""
        failures = self.runner.failures_for_report(pseudonymous=self.settings.data.pseudonyms)
        call = steps.compare_report(self.settings, systems, ablations, failures, installed_versions(), self.all_notes())
        return self.runner.run("report", call)

    def all_notes(self) -> tuple[str, ...]:
        """Return the notes of the run, each once."""
        return tuple(dict.fromkeys((*self.notes, *self.runner.notes)))

    def finish_run(
        self,
        out: Path,
        copies: Sequence[FileCopy],
        started: float,
        shows: ui_artifacts.UiLayout,
        *,
        private: bool = False,
        useful: bool,
    ) -> Outcome:
        """Call `finish` with this flow's entries of the manifest."""
        manifest = {"encoders": {name: weights_shown(one) for name, one in self.settings.encoders.items()}}
        return self.finish(out, self.settings, copies, manifest, started, shows, private=private, useful=useful)


def _file_name(name: str) -> str:
    """Return a name for a folder: letters, digits, dots, hyphens and underscores."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"


def _folders(found: ByCategory) -> dict[str, dict[int, Ref]]:
    return {category: {seed: one.folder for seed, one in seeds.items()} for category, seeds in found.items()}
