"""The first stages of the image flows: find and encode images, prompts and normal images, each once per encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flows.machine.terminal import terminal
from flows.privacy.log_filter import path_filter
from flows.runs.runner import SubmittedCall, new_runner, to_case_failure
from flows.store.digests import path_digest
from flows.store.references import Ref
from flows.store.step import Call
from flows.zsad import steps
from flows.zsad.image_sets import ImageSet, ImageStages
from medad.base.errors import InputError, UserError
from zsad.config.run import PromptStyle
from zsad.config.settings import ZsadSettings, ablation_systems
from zsad.config.system_base import SystemSettings
from zsad.config.systems import System
from zsad.data.labelled import LabelledImage
from zsad.scorers.dual.settings import DualImage
from zsad.steps.methods import MAX_SHOTS


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


class FeatureStages(ImageStages):
    """The first stages: they find and encode images, prompts and normal images."""

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
        with terminal.stages():
            self._encode(categories, systems)

    def _encode(self, categories: Sequence[ImageSet], systems: Sequence[System]) -> None:
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
                classes = any(system.reads_class_tokens for system in users)
                call = steps.encode(category.images, encoder, self.settings.machine, outputs, class_tokens=classes)
                waiting.append((name, category, self.runner.submit(f"{category.name}, {name}", call)))
        for name, category, task in waiting:
            features = task.ref()
            if features is not None and (usable := self.usable(category, features)).images:
                self.features[name, category.name] = Prepared(usable, features)

    def _drop_unfit_systems(self) -> None:
        """Drop systems that need an output or prompts that their encoder does not have, and list them as failures.

        Raises UserError if there is only one system, because nothing would be left to do.
        """
        from zsad.clip.architecture import check_outputs
        from zsad.config.vision_models import require_text

        fitting = []
        for system in self.settings.systems:
            try:
                encoder = self.settings.encoders[system.encoder]
                if system.prompts is not None:
                    require_text(encoder.model, f"the prompts of {system.title}")
                check_outputs(encoder, system.outputs)
            except UserError as error:
                if len(self.settings.systems) == 1:
                    raise
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

    def words_of(self, category: ImageSet) -> str:
        """Return the words for a category's object in prompts."""
        return self.settings.prompts.names.get(category.name, category.name)

    def _label(self, system: SystemSettings, category: str, seed: int | None = None) -> str:
        label = f"{category}, {system.display_name}" + (f", seed {seed}" if seed is not None and system.seeded else "")
        return self.runner.set_group(label, system.display_name, category)

    def _normal(self, system: System, category: ImageSet, seed: int, label: str) -> NormalImages | None:
        """Encode normal images. Their choice depends only on image contents and the seed."""
        from zsad.data.shots import draw_shots

        try:
            images = self.normal or self._training_images(category)
        except UserError as error:
            self.runner.record_failure(to_case_failure(label, "find", error))
            return None
        by_digest = {image.sha256: image for image in images}
        if len(by_digest) < system.shot_count:
            rule = f"{category.name}: only {len(by_digest)} different normal images for {system.shot_count} shots"
            self.runner.record_failure(to_case_failure(label, "find", InputError("data", rule)))
            return None
        drawn = tuple(by_digest[digest] for digest in draw_shots(by_digest, seed, system.shot_count))
        features = self.runner.run(label, self._normal_call(system, drawn, system.turn_count))
        return None if features is None else NormalImages(drawn, features)

    def _normal_call(self, system: System, images: tuple[LabelledImage, ...], turns: int) -> Call:
        encoder = self.settings.encoders[system.encoder]
        classes = system.reads_class_tokens
        return steps.encode(images, encoder, self.settings.machine, system.outputs, turns, class_tokens=classes)

    def use_shots(self, count: int) -> None:
        """Let the only system compare with `count` normal images, or with fewer if it or its settings limit them."""
        system = self.settings.method
        wanted = min(system.shot_count or MAX_SHOTS, count)
        if wanted < count:
            self.notes.append(f"{wanted} of the {count} normal images are used, chosen at random.")
        system = system.model_copy(update={"shots": wanted})
        self.settings = self.settings.model_copy(update={"systems": (system,)})

    def drawn_normal(self) -> tuple[str, ...]:
        """Return the sha256 of the normal images that the first seed chooses, of those that the user gave."""
        from zsad.data.shots import draw_shots

        digests = {image.sha256 for image in self.normal}
        return tuple(draw_shots(digests, self.settings.seeds[0], self.settings.method.shot_count)) if digests else ()

    def _training_images(self, category: ImageSet) -> tuple[LabelledImage, ...]:
        """Return the data set's normal training images of a category. Raises UserError."""
        from medad.cohort.samples import samples_dir
        from zsad.data.datasets import normal_training_images

        images = []
        for path in normal_training_images(self.settings.data, category.name, samples_dir()):
            path_filter.learn(path, category.name)
            images.append(LabelledImage("", path_digest(path), path, anomalous=False))
        return tuple(images)
