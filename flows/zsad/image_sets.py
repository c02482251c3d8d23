"""The images of the zsad flows: finding them, computing their digests, and leaving out unusable ones."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.machine.terminal import terminal
from flows.privacy.log_filter import learn_data, path_filter
from flows.runs.outcome import Outcome, finish_run
from flows.runs.run_folder import FileCopy, RunFolder
from flows.runs.runner import Runner, to_case_failure
from flows.runs.ui_artifacts import UiLayout
from flows.store.digests import path_digest
from flows.store.references import Ref
from flows.zsad import steps
from flows.zsad.image_files import mask_digest
from medad.base.errors import CaseFailure, UserError
from medad.base.text import list_names
from zsad.config.run import EncoderSettings, ImagesSettings
from zsad.config.settings import ZsadSettings
from zsad.data.labelled import LabelledImage

if TYPE_CHECKING:
    from zsad.data.datasets import Category
    from zsad.data.listing import LeftOut

_FOREIGN = re.compile(r"\(.*\)")


@dataclass(frozen=True)
class ImageSet:
    """The readable images of one category."""

    name: str
    label: str
    """Name of the category in tasks and on the terminal."""
    images: tuple[LabelledImage, ...]


class ImageStages:
    """The stages that all image flows share."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.notes: list[str] = []
        self.used: list[ImageSet] = []

    def find_in(self, data: ImagesSettings, place: str = "data") -> list[ImageSet]:
        """Find the categories of a data set. Problems are added to the failures. `place` is the label of its folder."""
        from medad.cohort.samples import samples_dir
        from zsad.data.datasets import find_categories

        learn_data(data, place)
        try:
            self._prepare_samples(data, samples_dir())
            categories, problems, left_out = find_categories(data, samples_dir())
        except UserError as error:
            self.runner.record_failure(to_case_failure("data", "find", error))
            return []
        self._record(problems, left_out)
        return self.read_sets(categories)

    def find_images(self, paths: Sequence[Path], label: str = "images") -> Category | None:
        """Find unlabelled images in files and folders. Problems are added to the failures. None: no image was found.

        `label` names the images where their folder must not be shown.
        """
        from zsad.data.datasets import unlabelled_images

        for path in paths:
            if path.is_dir():
                path_filter.learn_root(path, label)
        try:
            category, problems, left_out = unlabelled_images(paths)
        except UserError as error:
            self.runner.record_failure(to_case_failure(label, "find", error))
            return None
        self._record(problems, left_out)
        return category

    def _prepare_samples(self, data: ImagesSettings, folder: Path) -> None:
        if not data.root.startswith("samples:"):
            return
        from zsad.embedded.samples import INSERTED_NOTE, MATERIALS, ensure_samples

        if data.root == f"samples:{MATERIALS}":  # generated from the installed program, in seconds
            ensure_samples(folder, terminal.line)
            self.notes.append(INSERTED_NOTE)

    def _record(self, problems: Sequence[CaseFailure], left_out: LeftOut) -> None:
        """Add problems to the failures, and notes on what was left out and on labels that are not understood."""
        from zsad.data.label_folders import listing_notes

        for problem in problems:
            path_filter.learn(Path(problem.path), problem.case_id)
        self.runner.record_failures(problems)
        for note in listing_notes(left_out):
            self.add_note(note)

    def add_note(self, note: str) -> None:
        """Add a note, unless it is known. The report, --json and the end of the terminal's output show it."""
        if note not in self.notes:
            self.notes.append(note)

    def read_sets(self, categories: Sequence[Category], label: str = "") -> list[ImageSet]:
        """Compute the digest of every file. Unreadable files are left out and added to the failures."""
        found = []
        for category in categories:
            images = tuple(self._images(category))
            if images:
                found.append(ImageSet(category.name, label or category.name, images))
        self.used += found
        return found

    def _images(self, category: Category) -> Iterator[LabelledImage]:
        for item in category.items:
            case_id = f"{category.name}/{item.id}"
            for path in (item.path, item.mask):
                if path is not None:
                    path_filter.learn(path, case_id)
            try:
                if item.mask is not None:
                    mask_digest(item.mask)
                sha256 = path_digest(item.path)
            except UserError as error:
                self.runner.record_failure(replace(to_case_failure(case_id, "find", error), category=category.name))
                continue
            yield LabelledImage(item.id, sha256, item.path, item.anomalous, item.defect, item.mask)

    def usable(self, category: ImageSet, features: Ref) -> ImageSet:
        """Return the images that have features. All others are added to the failures, each with all its names."""
        if not features.made:
            return category
        index = json.loads((features.folder() / "index.json").read_text(encoding="utf-8"))
        for note in index["model_notes"]:
            self.add_note(note)
        self._add_image_notes(category, index["notes"])
        rules = {problem["sha256"]: problem["rule"] for problem in index["problems"]}
        self.record_images(category, steps.ENCODE.name, rules, {image.sha256: image.path for image in category.images})
        return replace(category, images=tuple(image for image in category.images if image.sha256 not in rules))

    def record_images(
        self, category: ImageSet, stage: str, rules: Mapping[str, str], files: Mapping[str, Path]
    ) -> None:
        """Add images to the failures, each with all its names. `rules` and `files` are by sha256."""
        self.runner.record_failures(
            [
                CaseFailure(
                    f"{category.name}/{image.id}",
                    stage,
                    _scrub_foreign(rules[image.sha256]),
                    str(files[image.sha256]),
                    category=category.name,
                )
                for image in category.images
                if image.sha256 in rules and image.sha256 in files
            ]
        )

    def _add_image_notes(self, category: ImageSet, notes: Iterable[Mapping[str, str]]) -> None:
        """Add notes on images to the report, each once with the names of its images, or a few of them and a count."""
        by_text: dict[str, set[str]] = {}
        for note in notes:
            by_text.setdefault(note["text"], set()).add(note["sha256"])
        for text, digests in by_text.items():
            names = [image.id for image in category.images if image.sha256 in digests]
            if names:
                self.add_note(f"{category.name}: {text}: {list_names(names)}.")

    def note_masks(self, category: ImageSet, evaluated: Ref) -> None:
        """Add unusable masks to the failures, once for all seeds. Their images get no pixel metrics."""
        if not evaluated.made:
            return
        metrics = json.loads((evaluated.folder() / "metrics.json").read_text(encoding="utf-8"))
        self._add_image_notes(category, metrics["notes"])
        rules = {problem["sha256"]: problem["rule"] for problem in metrics["problems"]}
        masks = {image.sha256: image.mask for image in category.images if image.mask is not None}
        self.record_images(category, steps.EVALUATE.name, rules, masks)

    def has_weights(self, encoder: EncoderSettings, label: str) -> bool:
        """Return whether an encoder's weights can be read. If not, one failure is added for all categories.

        The weights of a tag are downloaded here, once for all steps, if this machine does not have them.
        """
        try:
            steps.weights_of(encoder)
            if encoder.tag is not None and encoder.weights is None and self.runner.makes_artifacts:
                from zsad.clip.weights_place import weights_file

                weights_file(encoder, encoder.model.replace("/", "-"))
        except UserError as error:
            self.runner.record_failure(to_case_failure(label, "find", error))
            return False
        return True

    def finish(
        self,
        out: Path,
        settings: ZsadSettings,
        copies: Sequence[FileCopy],
        manifest: dict[str, Any],
        started: float,
        layout: UiLayout,
        *,
        private: bool = False,
        useful: bool,
    ) -> Outcome:
        """Publish the results into the run folder and show them in Prefect's UI.

        The UI does not show the path of a `private` folder.
        """
        run = RunFolder(
            path=out,
            settings=settings,
            copies=tuple(copies),
            manifest=lambda: {"inputs": [row for category in self.used for row in _input_rows(category)]} | manifest,
            seconds=time.monotonic() - started,
        )
        return finish_run(self.runner, run, layout, private=private, useful=useful)


def _scrub_foreign(rule: str) -> str:
    """Return a rule without private text. Only text in parentheses comes from a library and may contain some."""
    return _FOREIGN.sub(lambda found: path_filter.scrub(found[0]), rule)


def weights_shown(encoder: EncoderSettings) -> dict[str, str] | None:
    """Return the manifest's entry of an encoder's weights. None if they cannot be read."""
    try:
        return {key: value for key, value in steps.weights_of(encoder).items() if key != "model"}
    except UserError:
        return None


def _input_rows(category: ImageSet) -> Iterator[dict[str, Any]]:
    for image in category.images:
        digests = {"image": image.sha256, "mask": None if image.mask is None else mask_digest(image.mask)}
        yield {"category": category.name, "image": image.id, "sha256": digests}
