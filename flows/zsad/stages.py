"""The stages of all image flows: find, encode, train, score, evaluate, report. Systems with one encoder share features.

Categories and systems run in parallel on the task runner, within the limits of the device slots. A system that fails on
a category is listed and left out there. The others continue, and the report is always written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.machine.terminal import terminal
from flows.runs import ui_artifacts
from flows.runs.outcome import Outcome
from flows.runs.run_folder import FileCopy, installed_versions
from flows.runs.runner import SubmittedCall, to_case_failure
from flows.store.artifacts import ArtifactStore
from flows.store.references import Ref
from flows.store.step import Call
from flows.zsad import report_steps, steps
from flows.zsad.features import FeatureStages, NormalImages, Prepared
from flows.zsad.image_sets import ImageSet, weights_shown
from medad.base.errors import InputError
from zsad.clip.models import encoder_info
from zsad.config.settings import ZsadSettings, ablation_systems
from zsad.config.system_base import LearnedSettings, SystemSettings
from zsad.config.systems import System
from zsad.data.map_names import MAPS, folder_name
from zsad.scorers.anomalyclip.settings import AnomalyClip
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.dual.settings import DualImage
from zsad.steps.results import AblationResult, AblationRow, Cost, Evaluated, ScoredInputs, Source, SystemResult

ByCategory = dict[str, dict[int, Evaluated[Ref]]]
"""Category -> seed -> evaluated result."""


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


class Stages(FeatureStages):
    """The stages of the flow. Each takes the results of the one before and skips what failed."""

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
        return Source(self.words_of(category), prepared.features, text, prepared.images.images)

    def score(self, categories: Sequence[ImageSet]) -> tuple[list[SystemResult[Ref]], list[AblationResult[Ref]]]:
        """Score and evaluate all systems on all categories and seeds, and the ablations."""
        trained = self.train(categories)
        with terminal.stages(self._announced(len(categories))):
            return self._score(categories, trained)

    def _announced(self, categories: int) -> dict[str, int]:
        """Return the numbers of scorings and evaluations, by step."""
        seeds = len(self.settings.seeds)
        calls = categories * sum(seeds if one.seeded else 1 for one in [*self.settings.systems, *self._ablated()])
        return {steps.SYSTEM.name: calls, steps.EVALUATE.name: calls}

    def _score(
        self, categories: Sequence[ImageSet], trained: dict[tuple[str, str], SubmittedCall]
    ) -> tuple[list[SystemResult[Ref]], list[AblationResult[Ref]]]:
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

    def _result(self, system: System, found: ByCategory, inputs: dict[str, ScoredInputs[Ref]]) -> SystemResult[Ref]:
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
                normal = self._normal(system, category, seed, label) if system.shot_count else None
                if system.shot_count and normal is None:
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
            system, self.words_of(category), category.images, features, text,
            None if normal is None else normal.features, weights, self.settings.encoders[system.encoder], seed,
            self.settings.machine,
        )  # fmt: skip

    def find_threshold(self, category: ImageSet, judged_by: str) -> Ref | None:
        """Find the threshold of the only system from its scores of the normal images, each compared with the others."""
        system, seed = self.settings.method, self.settings.seeds[0]
        label = self._label(system, "normal images", seed)
        normal = self._normal(system, category, seed, label)
        text = self._text_ref(system, category)
        if normal is None or (text is None and system.prompts is not None):
            return None
        # each normal image is compared with the others as it is, without turned copies of itself
        own = normal.features
        if system.turn_count > 1:
            alone = self.runner.run(label, self._normal_call(system, normal.images, 1))
            if alone is None:
                return None
            own = alone
        usable = self.usable(ImageSet("normal images", "", normal.images), own)
        scores = self.runner.run(label, self._score_call(system, usable, own, text, normal, None, seed))
        scores = self._fused(system, label, scores)
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
            scores = self._fused(one.system, one.label, self.ref_of(one.scores))
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
                if name not in self._masks_noted:  # once for all seeds and systems
                    self._masks_noted.add(name)
                    self.note_masks(one.category, evaluated)
                found.setdefault(name, {})[one.seed] = Evaluated(evaluated, self._cost(one), scores)
                normal = () if one.normal is None else one.normal.images
                inputs.setdefault(name, ScoredInputs(one.category.images, one.features, one.text, normal))
        return found, inputs

    def _fused(self, system: System, label: str, scores: Ref | None) -> Ref | None:
        """Return scores with the lambdas of the system's settings."""
        fuse = steps.fuse(scores, system.score) if scores is not None and isinstance(system, DualImage) else None
        return scores if fuse is None else self.runner.run(label, fuse)

    def _note_unscored(self, category: ImageSet, scores: Ref) -> None:
        """Add images that could not be scored to the failures."""
        if not scores.made:
            return
        from zsad.steps.score import unscored_images

        files = {image.sha256: image.path for image in category.images}
        self.record_images(category, steps.SYSTEM.name, unscored_images(scores.folder()), files)

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
            (
                row.system,
                one.name,
                self.runner.submit(label, report_steps.category_maps(self.settings_of(row.system), one)),
            )
            for row in systems
            for one in row.category_results()
            for label in [self._label(row.system, one.name)]
        ]
        copies = []
        for system, name, task in tasks:
            ref = task.ref()
            folder = [MAPS, *([folder_name(system.display_name)] if len(systems) > 1 else []), folder_name(name)]
            if ref is not None:
                copies.append(FileCopy(ref, MAPS, "/".join(folder)))
        return copies

    def settings_of(self, system: SystemSettings) -> ZsadSettings:
        """Return the settings of the run with only this system."""
        return self.settings.model_copy(update={"systems": (system,), "ablations": ()})

    def report(self, systems: Sequence[SystemResult[Ref]]) -> Ref | None:
        """Write the report on a single system."""
        categories = systems[0].category_results() if systems else ()
        failures = self.runner.failures_for_report(pseudonymous=self.settings.data.pseudonyms)
        call = report_steps.report(self.settings, categories, failures, installed_versions(), self.all_notes())
        return self.runner.run("report", call)

    def compare_report(
        self, systems: Sequence[SystemResult[Ref]], ablations: Sequence[AblationResult[Ref]]
    ) -> Ref | None:
        """Write the report with tables, tests and ablations."""
        failures = self.runner.failures_for_report(pseudonymous=self.settings.data.pseudonyms)
        call = report_steps.compare_report(
            self.settings, systems, ablations, failures, installed_versions(), self.all_notes()
        )
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


def _folders(found: ByCategory) -> dict[str, dict[int, Ref]]:
    return {category: {seed: one.folder for seed, one in seeds.items()} for category, seeds in found.items()}
