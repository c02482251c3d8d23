"""The flow zsad: encode prompts and images, score the features for each seed, compute metrics, write the report.

Categories run in parallel on the task runner, within the limits of the device slots. An image or a category that cannot
be used is left out and listed. The report is always written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel

from flows.machine.terminal import terminal
from flows.runs import ui_artifacts
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome
from flows.runs.run_folder import FileCopy, copies_of, installed_versions
from flows.runs.runner import SubmittedCall, new_runner
from flows.store.references import Ref
from flows.zsad import steps
from flows.zsad.image_sets import ImageSet, ImageStages, weights_shown
from medad.base.private import PrivatePath
from zsad.config.run import NO_REFERENCE_NOTE, ImagesSettings, ZsadSettings
from zsad.steps.results import CategoryResult

REPORT_FILES = ("report.html", "report.json", "preview.png", "results.csv", "scores.csv", "curves.csv")


class ScoreRequest(BaseModel):
    """Images to score. Prefect stores a flow's parameters as JSON, so all paths here are private."""

    images: tuple[PrivatePath, ...]
    """Image files and folders."""
    category: str | None
    """Name of the object in the images, for the prompts. None: the folder's name."""
    out: PrivatePath
    npy: bool = False
    """Whether float heat maps are .npy files instead of TIFF."""


@dataclass(frozen=True)
class Encoded:
    """A category with its text and image features. It contains only images with features."""

    category: ImageSet
    text: Ref
    features: Ref


class Stages(ImageStages):
    """The stages of the flow. Each takes the results of the one before and skips what failed."""

    def __init__(self, settings: ZsadSettings, *, refresh: bool) -> None:
        super().__init__(new_runner(settings.machine, refresh=refresh))
        self.settings = settings

    def find(self) -> list[ImageSet]:
        """Find the categories of the data set. Problems are added to the failures."""
        return self.find_in(self.settings.data)

    def encode(self, categories: Sequence[ImageSet]) -> list[Encoded]:
        """Compute text and image features of all categories. Unusable images are added to the failures."""
        settings = self.settings
        if not self.has_weights(settings.encoder, "encoder"):
            return []
        machine = settings.machine
        tasks: list[tuple[ImageSet, SubmittedCall, SubmittedCall]] = []
        for category in categories:
            text = steps.text(category.name, settings.encoder, settings.prompts, machine)
            images = steps.encode(category.images, settings.encoder, machine)
            label = category.label
            tasks.append((category, self.runner.submit(label, text), self.runner.submit(label, images)))
        found = []
        for category, text_task, images_task in tasks:
            text_ref, features = text_task.ref(), images_task.ref()
            if features is None:
                continue
            usable = self.usable(category, features)
            if usable.images and text_ref is not None:
                found.append(Encoded(usable, text_ref, features))
        return found

    def score(self, encoded: Sequence[Encoded]) -> list[CategoryResult[Ref]]:
        """Score and evaluate each category with each seed. Failed seeds are left out."""
        settings = self.settings
        scores: list[tuple[Encoded, dict[int, SubmittedCall]]] = []
        for each in encoded:
            images, label = each.category.images, each.category.label
            calls = {
                seed: steps.score(
                    images, each.features, each.text, settings.encoder, settings.score, settings.adapt, seed,
                    settings.machine,
                )
                for seed in settings.seeds
            }  # fmt: skip
            tasks = {seed: self.runner.submit(_seed_label(label, seed), call) for seed, call in calls.items()}
            scores.append((each, tasks))
        evaluations: list[tuple[Encoded, dict[int, Ref], dict[int, SubmittedCall]]] = []
        for each, tasks in scores:
            refs = self._fuse(each.category, {seed: ref for seed, task in tasks.items() if (ref := task.ref())})
            evaluations.append((each, refs, self._evaluate(each, refs)))
        found = []
        for each, refs, tasks in evaluations:
            evaluated = {seed: ref for seed, task in tasks.items() if (ref := task.ref())}
            if evaluated:
                self.note_masks(each.category, next(iter(evaluated.values())))
                scored = {seed: refs[seed] for seed in evaluated}
                category = each.category
                found.append(
                    CategoryResult(category.name, category.images, each.text, each.features, scored, evaluated)
                )
        return found

    def _fuse(self, category: ImageSet, scores: dict[int, Ref]) -> dict[int, Ref]:
        """Fuse the scores with the lambdas of the settings, if used ones differ from the paper's."""
        tasks = {
            seed: self.runner.submit(_seed_label(category.label, seed), call)
            for seed, ref in scores.items()
            if (call := steps.fuse(ref, self.settings.score)) is not None
        }
        fused = {seed: task.ref() for seed, task in tasks.items()}
        return {seed: ref for seed in scores if (ref := fused[seed] if seed in fused else scores[seed])}

    def _evaluate(self, each: Encoded, scores: dict[int, Ref]) -> dict[int, SubmittedCall]:
        settings, category = self.settings, each.category
        calls = {
            seed: steps.evaluate(category.images, each.features, ref, settings.score.variants, settings.evaluation)
            for seed, ref in scores.items()
        }
        return {seed: self.runner.submit(_seed_label(category.label, seed), call) for seed, call in calls.items()}

    def use_only_text(self) -> None:
        """Leave out the parts of each variant that compare with another image, and add a note."""
        without = self.settings.score.without_references()
        if without != self.settings.score:
            self.settings = self.settings.model_copy(update={"score": without})
            self.notes.append(NO_REFERENCE_NOTE.format(variant=without.variants[-1]))

    def report(self, categories: Sequence[CategoryResult[Ref]]) -> Ref | None:
        """Write the report of a labelled or unlabelled data set."""
        failures = self.runner.failures_for_report(pseudonymous=self.settings.data.pseudonyms)
        notes = (*self.notes, *self.runner.notes)
        call = steps.report(self.settings, categories, failures, installed_versions(), notes)
        return self.runner.run("report", call)

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
        manifest = {"encoder": weights_shown(self.settings.encoder)}
        return self.finish(out, self.settings, copies, manifest, started, shows, private=private, useful=useful)


def _seed_label(label: str, seed: int) -> str:
    return f"{label}, seed {seed}"


@define_flow("zsad", "zsad {settings.name}")
def zsad(settings: ZsadSettings, out: Path, refresh: bool = False) -> Outcome:
    """Run all stages, from images to a report in the run folder `out`."""
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh)
    with terminal.bars():
        categories = stages.score(stages.encode(stages.find()))
    report = stages.report(categories)
    return stages.finish_run(out, copies_of(report, *REPORT_FILES), started, ui_artifacts.ZSAD, useful=bool(categories))


@define_flow("zsad-score", "score")
def score(request: ScoreRequest, settings: ZsadSettings, refresh: bool = False) -> Outcome:
    """Score unlabelled images of one category with the first seed and the last variant. Ignores `settings.data`."""
    started = time.monotonic()
    score_settings = settings.score.model_copy(update={"variants": settings.score.variants[-1:]})
    settings = settings.model_copy(
        update={
            "name": f"scored-by-{settings.name}"[:64],
            "seeds": settings.seeds[:1],
            "data": ImagesSettings(root="-", layout="folder", category=request.category),
            "score": score_settings,
            "published": None,
        }
    )
    stages = Stages(settings, refresh=refresh)
    encoded: list[Encoded] = []
    found = stages.find_images(request.images)
    if found is not None:
        category = replace(found, name=request.category or found.name)
        with terminal.bars():
            encoded = stages.encode(stages.read_sets([category], label="images"))
    if len({image.sha256 for each in encoded for image in each.category.images}) == 1:
        stages.use_only_text()
    with terminal.bars():
        categories = stages.score(encoded)
    call = steps.score_outputs(
        stages.settings,
        categories[0] if categories else None,
        stages.runner.failures_for_report(pseudonymous=False),
        installed_versions(),
        (*stages.notes, *stages.runner.notes),
        ("png", "npy" if request.npy else "tiff"),
    )
    ref = stages.runner.run("images", call)
    copies = copies_of(ref, *REPORT_FILES, "maps")
    return stages.finish_run(
        request.out, copies, started, ui_artifacts.ZSAD_SCORE, private=True, useful=bool(categories)
    )
