"""The image flows: a run with one system or a comparison of several, the scoring of own images, and training.

All of them consist of the same stages (`flows.zsad.stages`). An image or a category that cannot be used is left out and
listed. The report is always written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel

from flows.runs import ui_artifacts
from flows.runs.flow import define_flow
from flows.runs.outcome import Outcome
from flows.runs.run_folder import copies_of, installed_versions
from flows.runs.runner import to_case_failure
from flows.store.references import Ref
from flows.zsad import report_steps, steps
from flows.zsad.image_sets import ImageSet
from flows.zsad.stages import Stages
from medad.base.errors import CaseFailure, UserError
from medad.base.private import PrivatePath
from zsad.config.run import NO_REFERENCE_NOTE, ImagesSettings
from zsad.config.settings import ZsadSettings
from zsad.scorers.dual.settings import DualImage
from zsad.steps.results import AblationResult, SystemResult

RUN_FILES = ("report.html", "report.json", "preview.png", "results.csv", "scores.csv", "curves.csv", "gallery")
COMPARE_FILES = (
    *("report.html", "report.json", "preview.png", "systems.csv", "scores.csv", "summary.csv", "paired.csv"),
    *("ablations.csv", "table_image.tex", "table_pixel.tex"),
)
SCORE_FILES = ("report.html", "report.json", "preview.png", "scores.csv", "maps", "flagged", "gallery")
TRAINED_FILES = ("checkpoint.safetensors", "training.json")
THRESHOLD_FILES = ("threshold.json",)


class ScoreRequest(BaseModel):
    """Images to score. Prefect stores a flow's parameters as JSON, so all paths here are private."""

    images: tuple[PrivatePath, ...]
    """Image files and folders."""
    normal: tuple[PrivatePath, ...] = ()
    """Files and folders of normal images, with which the images are compared."""
    category: str | None
    """Name of the object in the images, for the prompts. None: the folder's name."""
    out: PrivatePath
    threshold: PrivatePath | None = None
    """File of a saved threshold. None: the threshold comes from the normal images, or from all scores."""
    npy: bool = False
    """Whether float heat maps are .npy files instead of TIFF."""


@define_flow("zsad", "zsad {settings.name}")
def zsad(settings: ZsadSettings, out: Path, refresh: bool = False) -> Outcome:
    """Score and evaluate a data set with one system. Writes the report to the run folder `out`."""
    stages = Stages(settings, refresh=refresh)
    return _evaluate(stages, out, lambda systems, _: stages.report(systems), RUN_FILES, ui_artifacts.ZSAD)


@define_flow("zsad-compare", "compare {settings.name}")
def compare(settings: ZsadSettings, out: Path, refresh: bool = False) -> Outcome:
    """Compare all systems of the configuration on its images. Writes the report to the run folder `out`."""
    stages = Stages(settings, refresh=refresh)
    return _evaluate(stages, out, stages.compare_report, COMPARE_FILES, ui_artifacts.COMPARE)


def _evaluate(
    stages: Stages,
    out: Path,
    report: Callable[[Sequence[SystemResult[Ref]], Sequence[AblationResult[Ref]]], Ref | None],
    files: Sequence[str],
    layout: ui_artifacts.UiLayout,
) -> Outcome:
    """Score and evaluate a data set, and publish the report and the maps. Some systems may have no result."""
    started = time.monotonic()
    systems, ablations = stages.score(stages.prepare())
    copies = [*copies_of(report(systems, ablations), *files), *stages.maps(systems)]
    return stages.finish_run(out, copies, started, layout, useful=any(row.categories for row in systems))


@define_flow("zsad-train", "train {settings.name}")
def train(settings: ZsadSettings, out: Path, refresh: bool = False) -> Outcome:
    """Train the only learned system of the settings on all images. Writes its checkpoint to the run folder `out`."""
    started = time.monotonic()
    stages = Stages(settings, refresh=refresh)
    checkpoint = stages.train_one(stages.prepare())
    copies = copies_of(checkpoint, *TRAINED_FILES)
    return stages.finish_run(out, copies, started, ui_artifacts.COMPARE, useful=checkpoint is not None)


@define_flow("zsad-score", "score")
def score(request: ScoreRequest, settings: ZsadSettings, refresh: bool = False) -> Outcome:
    """Score unlabelled images of one category by one system, with the first seed. Ignores `settings.data`."""
    started = time.monotonic()
    settings = settings.model_copy(
        update={
            "name": f"scored-by-{settings.name}"[:64],
            "seeds": settings.seeds[:1],
            "data": ImagesSettings(root="-", layout="folder", category=request.category),
            "published": None,
            "ablations": (),
            "maps": ("png", "npy" if request.npy else "tiff"),
        }
    )
    if isinstance(settings.method, DualImage):  # only the last variant is shown
        last = settings.method.model_copy(update={"variants": settings.method.variant_names[-1:]})
        settings = settings.model_copy(update={"systems": (last,)})
    work = _ScoreRun(request, Stages(settings, refresh=refresh))
    ref = work.run()
    copies = copies_of(ref, *SCORE_FILES) + copies_of(work.threshold, *THRESHOLD_FILES)
    return work.stages.finish_run(
        request.out, copies, started, ui_artifacts.ZSAD_SCORE, private=True, useful=work.useful
    )


class _ScoreRun:
    """One call of the flow `score`."""

    def __init__(self, request: ScoreRequest, stages: Stages) -> None:
        self.request, self.stages = request, stages
        self.threshold: Ref | None = None
        self.useful = False

    def run(self) -> Ref | None:
        """Run all stages. Return the artifact with the outputs."""
        stages = self.stages
        systems: list[SystemResult[Ref]] = []
        category = self._find(self.request.images, "images")
        if category is not None and self._find_normal():
            stages.encode([category])
            self._use_what_there_is(category)
            if self._find_threshold(category):
                systems, _ = stages.score([category])
        results = [one for row in systems for one in row.category_results()]
        self.useful = bool(results)
        if not self.request.normal and results:
            assert category is not None, "results are of its images"
            self._save_quantile(category, results[0].scores[stages.settings.seeds[0]])
        call = report_steps.score_outputs(
            stages.settings,
            results[0] if results else None,
            stages.runner.failures_for_report(pseudonymous=False),
            installed_versions(),
            stages.all_notes(),
            stages.settings.maps,
        )
        ref = stages.runner.run("images", call)
        if ref is not None and category is not None:
            self._note_problems(ref, category)
        return ref

    def _find(self, paths: tuple[PrivatePath, ...], label: str) -> ImageSet | None:
        found = self.stages.find_images(paths, label)
        if found is None:
            return None
        sets = self.stages.read_sets([replace(found, name=self.request.category or found.name)], label=label)
        return sets[0] if sets else None

    def _find_normal(self) -> bool:
        """Find the normal images, if there are any, and set their number. Return whether the run can go on."""
        stages = self.stages
        if not self.request.normal:
            return True
        found = self._find(self.request.normal, "normal images")
        if found is None:
            return False
        stages.used.pop()  # the manifest lists the scored images
        stages.normal = found.images
        stages.use_shots(len({image.sha256 for image in found.images}))
        return True

    def _use_what_there_is(self, category: ImageSet) -> None:
        """Leave out the parts that compare with another image if there is none, and add a note."""
        stages, system = self.stages, self.stages.settings.method
        alone = len({image.sha256 for image in category.images}) == 1 and not stages.normal
        if alone and isinstance(system, DualImage) and system.without_references() != system:
            without = system.without_references()
            stages.settings = stages.settings.model_copy(update={"systems": (without,)})
            stages.notes.append(NO_REFERENCE_NOTE.format(variant=without.variant_names[-1]))

    def _find_threshold(self, category: ImageSet) -> bool:
        """Find or read the decision threshold. Return whether the run can go on."""
        from zsad.steps.threshold import read_threshold, require_same_judge

        stages, request = self.stages, self.request
        try:
            judge = steps.judge_of(stages.settings, stages.drawn_normal(), stages.words_of(category))
            if request.normal and len(stages.normal) > 1 and not judge.depends_on_others:
                self.threshold = stages.find_threshold(category, judge.digest)
            if request.threshold is None:
                return True
            saved = read_threshold(request.threshold)
            require_same_judge(saved, request.threshold, judge.method, judge.encoder, judge.digest)
        except UserError as error:
            stages.runner.record_failure(to_case_failure("threshold", "find", error))
            return False
        evaluation = stages.settings.evaluation.model_copy(update={"threshold": saved.threshold})
        stages.settings = stages.settings.model_copy(update={"evaluation": evaluation})
        return True

    def _save_quantile(self, category: ImageSet, scores: Ref) -> None:
        """Make the file of the threshold that is a quantile of all scores."""
        stages = self.stages
        judge = steps.judge_of(stages.settings, (), stages.words_of(category))
        if judge.depends_on_others:
            return
        call = steps.save_threshold(scores, stages.settings.method, stages.settings, "quantile", judge.digest)
        self.threshold = stages.runner.run("threshold", call)

    def _note_problems(self, ref: Ref, category: ImageSet) -> None:
        """Add images whose map or picture could not be written to the failures."""
        if not ref.made:
            return
        problems = json.loads((ref.folder() / "problems.json").read_text(encoding="utf-8"))
        files = {image.id: str(image.path) for image in category.images}
        for name, rule in problems.items():
            failure = CaseFailure(f"{category.name}/{name}", report_steps.MAPS.name, rule, files.get(name, ""))
            self.stages.runner.record_failure(failure)
