"""The flow zsad: prompts and images to features, features to scores seed by seed, metrics, report.

Categories go beside each other on the task runner, as far as the device's slot lets them. An image that cannot be used
is left out and listed, and so is a category; the report is written whatever happens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel

from flows.machine.terminal import terminal
from flows.privacy.log_filter import path_filter
from flows.runs import ui_artifacts
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome
from flows.runs.run_folder import FileCopy, copies_of, installed_versions
from flows.runs.runner import SubmittedCall, new_runner, to_case_failure
from flows.store.references import Ref
from flows.zsad import steps
from flows.zsad.image_sets import ImageSet, ImageStages, weights_shown
from medad.base.errors import CaseFailure, UserError
from medad.base.private import PrivatePath
from zsad.config.run import ALONE_NOTE, ImagesSettings, ZsadSettings
from zsad.steps.results import CategoryResult

REPORT_FILES = ("report.html", "report.json", "preview.png", "results.csv", "scores.csv", "curves.csv")


class ScoreRequest(BaseModel):
    """Images to score. As a flow's parameter its JSON is stored, so all its paths are private."""

    images: tuple[PrivatePath, ...]
    """Files and folders."""
    category: str | None
    """What they show, in words. None: the folder's name."""
    out: PrivatePath
    npy: bool = False
    """Float maps as .npy and not as TIFF."""


@dataclass(frozen=True)
class Encoded:
    """A category with its features; `images` are those that have some."""

    category: ImageSet
    text: Ref
    features: Ref


class Stages(ImageStages):
    """The stages over one runner: each takes what the one before gave and leaves out what failed."""

    def __init__(self, settings: ZsadSettings, *, refresh: bool) -> None:
        super().__init__(new_runner(settings.machine, refresh=refresh))
        self.settings = settings

    def find(self) -> list[ImageSet]:
        """The categories of the data set; what is wrong with it is noted."""
        return self.find_in(self.settings.data)

    def encode(self, categories: Sequence[ImageSet]) -> list[Encoded]:
        """Text and image features of every category; images that could not be used are noted."""
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
        """Scores and their evaluation, category by category and seed by seed; seeds that failed are left out."""
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
            tasks = {seed: self.runner.submit(_of_seed(label, seed), call) for seed, call in calls.items()}
            scores.append((each, tasks))
        evaluations: list[tuple[Encoded, dict[int, Ref], dict[int, SubmittedCall]]] = []
        for each, tasks in scores:
            refs = self._fuse(each.category, {seed: ref for seed, task in tasks.items() if (ref := task.ref())})
            evaluations.append((each, refs, self._evaluate(each, refs)))
        found = []
        for each, refs, tasks in evaluations:
            evaluated = {seed: ref for seed, task in tasks.items() if (ref := task.ref())}
            if evaluated:
                self._note_masks(each.category, next(iter(evaluated.values())))
                scored = {seed: refs[seed] for seed in evaluated}
                category = each.category
                found.append(
                    CategoryResult(category.name, category.images, each.text, each.features, scored, evaluated)
                )
        return found

    def _fuse(self, category: ImageSet, scores: dict[int, Ref]) -> dict[int, Ref]:
        """Other lambdas than the paper's, where the settings have some that matter."""
        tasks = {
            seed: self.runner.submit(_of_seed(category.label, seed), call)
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
        return {seed: self.runner.submit(_of_seed(category.label, seed), call) for seed, call in calls.items()}

    def _note_masks(self, category: ImageSet, evaluated: Ref) -> None:
        """Masks that could not be used, the same for every seed: such images have no pixel figures."""
        if not evaluated.made:
            return
        problems = json.loads((evaluated.folder() / "metrics.json").read_text(encoding="utf-8"))["problems"]
        rules = {problem["sha256"]: problem["rule"] for problem in problems}
        for image in category.images:
            if image.sha256 in rules and image.mask is not None:
                case_id, rule = f"{category.name}/{image.id}", path_filter.scrub(rules[image.sha256])
                self.runner.record_failure(
                    CaseFailure(case_id, steps.EVALUATE.name, rule, str(image.mask), category=category.name)
                )

    def use_text_alone(self) -> None:
        """Leave out of each variant what compares with another image, and say so."""
        alone = self.settings.score.alone()
        if alone != self.settings.score:
            self.settings = self.settings.model_copy(update={"score": alone})
            self.notes.append(ALONE_NOTE.format(variant=alone.variants[-1]))

    def report(self, categories: Sequence[CategoryResult[Ref]]) -> Ref | None:
        """The report of a labelled or unlabelled data set."""
        failures = self.runner.failures_for_report(pseudonymous=self.settings.data.pseudonyms)
        notes = (*self.notes, *self.runner.notes)
        call = steps.report(self.settings, categories, failures, installed_versions(), notes)
        return self.runner.run("report", call)

    def end(
        self,
        out: Path,
        copies: Sequence[FileCopy],
        started: float,
        shows: ui_artifacts.UiLayout,
        *,
        private: bool = False,
        useful: bool,
    ) -> Outcome:
        """`finish` with what this flow's manifest says."""
        manifest = {"encoder": weights_shown(self.settings.encoder)}
        return self.finish(out, self.settings, copies, manifest, started, shows, private=private, useful=useful)


def _of_seed(label: str, seed: int) -> str:
    return f"{label}, seed {seed}"


@define_flow("zsad", "zsad {settings.name}")
def zsad(settings: ZsadSettings, out: Path, refresh: bool = False) -> Outcome:
    """From images to a report in the run folder `out`."""
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh)
    with terminal.bars():
        categories = stages.score(stages.encode(stages.find()))
    report = stages.report(categories)
    return stages.end(out, copies_of(report, *REPORT_FILES), started, ui_artifacts.ZSAD, useful=bool(categories))


@define_flow("zsad-score", "score")
def score(request: ScoreRequest, settings: ZsadSettings, refresh: bool = False) -> Outcome:
    """Score unlabelled images of one kind: the first seed, the last variant; of `settings` the data play no part."""
    from zsad.data.datasets import images_of

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
    for path in request.images:
        if path.is_dir():
            path_filter.learn_root(path, "images")
    try:
        found = images_of(request.images)
    except UserError as error:
        stages.runner.record_failure(to_case_failure("images", "find", error))
    else:
        category = replace(found, name=request.category or found.name)
        with terminal.bars():
            encoded = stages.encode(stages.take([category], label="images"))
    if len({image.sha256 for each in encoded for image in each.category.images}) == 1:
        stages.use_text_alone()
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
    return stages.end(request.out, copies, started, ui_artifacts.ZSAD_SCORE, private=True, useful=bool(categories))
