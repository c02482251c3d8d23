"""The steps of the flow zsad; what each depends on and the domain call it makes.

An image is known by the sha256 of its file: neither its name, nor its category, nor the order of images is in the key
of anything but the report. The device and batch sizes are in no key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.store.artifacts import Ref, Step, canonical_json
from flows.store.step import DeviceJob, Job, file_digest, json_values
from medad.base.settings import ANY_MACHINE, MachineSettings
from zsad.config.run import (
    WITH_ADAPTATION,
    WITH_REFERENCES,
    AdaptSettings,
    EncoderSettings,
    EvaluationSettings,
    PromptSettings,
    ReferenceSettings,
    ScoreSettings,
    Variant,
)
from zsad.config.views import PATCHES

if TYPE_CHECKING:
    from flows.devices.child import Place

ENCODING = ("numpy", "open_clip_torch", "pillow", "safetensors", "torch", "torchvision")
_LAMBDAS: dict[Variant, frozenset[str]] = {
    "text": frozenset(),
    "text_tta": frozenset({"lambda_2", "lambda_3", "lambda_5"}),
    "visual": frozenset(),
    "joint": frozenset({"lambda_1", "lambda_text", "lambda_3", "lambda_4", "lambda_5"}),
    "joint_tta": frozenset({"lambda_1", "lambda_2", "lambda_3", "lambda_4", "lambda_5"}),
}
"""The weights that a system uses, in its map or its score."""


@dataclass(frozen=True)
class Image:
    """One image of a category, known by content."""

    sha256: str
    id: str
    path: Path = field(repr=False)
    anomalous: bool | None = None
    defect: str = ""
    mask: Path | None = field(default=None, repr=False)


def weights_of(settings: EncoderSettings) -> dict[str, str]:
    """What identifies an encoder's weights, as digests of its files or as its tag or seed. Raises InputError."""
    from zsad.clip.models import CONFIG_NAME, folder_of, weights_digest, weights_in

    folder = folder_of(settings)
    if folder is not None:
        return {"config": file_digest(folder / CONFIG_NAME), "weights": file_digest(weights_in(folder))}
    if settings.weights is not None:
        return {"model": settings.model, "weights": file_digest(Path(settings.weights).expanduser())}
    return {"model": settings.model, "weights": weights_digest(settings)}


def encoder_inputs(settings: EncoderSettings) -> dict[str, Any]:
    """What images' features depend on; the preset has been filled in by then."""
    values = json_values(settings, "preset", "model", "weights", "tag", "seed", "batch_size")
    return weights_of(settings) | values


@dataclass(frozen=True)
class Text(DeviceJob):
    """A category's prompts -> two text features."""

    category: str
    encoder: EncoderSettings
    prompts: PromptSettings
    machine: MachineSettings = ANY_MACHINE
    kind = "encoding"
    step = Step("zsad-text", 1, ("zsad.steps.encode:encode_category_text",), ENCODING)

    def inputs(self) -> dict[str, Any]:
        from zsad.clip.prompts import ensemble

        prompts = ensemble(self.category, self.prompts)
        texts = canonical_json([prompts.normal, prompts.anomalous])
        inputs: dict[str, Any] = weights_of(self.encoder)
        if self.encoder.seed is not None:  # a tower of another size draws other numbers
            inputs["size_px"] = self.encoder.size_px
        return inputs | {"category": self.category, "prompts": hashlib.sha256(texts.encode()).hexdigest()}

    @property
    def batch_size(self) -> int:
        return 1  # of ensembles: their prompts go in batches of one size

    def run_on(self, out: Path, place: Place) -> None:
        from zsad.steps.encode import encode_category_text

        encode_category_text(self.category, self.encoder, self.prompts, place.device, out)


@dataclass(frozen=True)
class Encode(DeviceJob):
    """Images -> class tokens and views. Each content once, in the order of digests: names and order change nothing."""

    images: tuple[Image, ...]
    encoder: EncoderSettings
    machine: MachineSettings = ANY_MACHINE
    views: tuple[str, ...] = (PATCHES,)
    """What is computed and kept beside class tokens (`zsad.config.views`); without a say, what the dual-image
    scorer reads."""
    kind = "encoding"
    step = Step("zsad-encode", 1, ("zsad.steps.encode:encode_images",), ENCODING)

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", distinct(self.images))
        object.__setattr__(self, "views", tuple(sorted(set(self.views))))

    def inputs(self) -> dict[str, Any]:
        images = [image.sha256 for image in self.images]
        return {"images": images, "encoder": encoder_inputs(self.encoder), "views": list(self.views)}

    @property
    def batch_size(self) -> int:
        return self.encoder.batch_size

    def watch(self) -> AbstractContextManager[Callable[..., None]]:
        from flows.devices.progress import count_images

        return nullcontext(count_images())

    def run_on(self, out: Path, place: Place) -> None:
        from zsad.steps.encode import encode_images

        paths, digests = [image.path for image in self.images], [image.sha256 for image in self.images]
        encoder = self.encoder.model_copy(update={"batch_size": place.batch_size})
        encode_images(paths, digests, encoder, place.device, out, on_progress=place.report, views=self.views)


def distinct(images: Iterable[Image]) -> tuple[Image, ...]:
    """One image for each content, by rising digest."""
    first: dict[str, Image] = {}
    for image in images:
        first.setdefault(image.sha256, image)
    return tuple(first[sha256] for sha256 in sorted(first))


def needs_references(variants: Iterable[Variant]) -> bool:
    return not WITH_REFERENCES.isdisjoint(variants)


def _that_matter(settings: ScoreSettings, lambdas: Iterable[str]) -> ScoreSettings:
    """The settings with these lambdas; others and unused ones as in the paper, the variants in one order."""
    fields = ScoreSettings.model_fields
    update = {name: fields[name].default for name in fields if name.startswith("lambda_") and name not in lambdas}
    if not needs_references(settings.variants):
        update["references"] = ReferenceSettings()
    update["variants"] = tuple(variant for variant in _LAMBDAS if variant in settings.variants)
    return settings.model_copy(update=update)


@dataclass(frozen=True)
class Score(DeviceJob):
    """Features -> the parts of the scores of one seed, fused by the paper's lambdas; `Fuse` puts others on them.

    The seed matters only where references are drawn or anomalies drawn in.
    """

    images: tuple[Image, ...]
    """Those with features: read again where adaptation corrupts them."""
    features: Ref
    text: Ref
    encoder: EncoderSettings
    score: ScoreSettings
    adapt: AdaptSettings
    seed: int
    machine: MachineSettings = ANY_MACHINE
    kind = "inference"
    step = Step(
        "zsad-score",
        1,
        ("zsad.steps.score_dual:score_category",),
        (*ENCODING, "scikit-image", "scipy"),
        volatile=frozenset({"cost.json"}),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", distinct(self.images))
        object.__setattr__(self, "score", _that_matter(self.score, ()))
        if not (needs_references(self.score.variants) or self._adapts):
            object.__setattr__(self, "seed", 0)

    @property
    def _adapts(self) -> bool:
        return not WITH_ADAPTATION.isdisjoint(self.score.variants)

    def inputs(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "features": self.features.digest,
            "text": self.text.digest,
            "score": json_values(self.score, "batch_size"),
            "seed": self.seed,
        }
        if self._adapts:
            inputs["encoder"] = encoder_inputs(self.encoder)
            inputs["adapt"] = json_values(self.adapt, "textures") | {"textures": self._textures()}
        return inputs

    def _textures(self) -> list[str] | None:
        """Contents in the order of names, by which they are drawn."""
        if self.adapt.textures is None:
            return None
        from medad.base.textures import texture_files

        return [file_digest(path) for path in texture_files(Path(self.adapt.textures).expanduser())]

    @property
    def batch_size(self) -> int:
        return max(self.encoder.batch_size, self.score.batch_size) if self._adapts else self.score.batch_size

    def watch(self) -> AbstractContextManager[Callable[..., None]]:
        from flows.devices.progress import count_images

        return nullcontext(count_images())

    def run_on(self, out: Path, place: Place) -> None:
        from zsad.steps.cost import measured
        from zsad.steps.score_dual import score_category

        def at_most(size: int) -> dict[str, int]:
            return {"batch_size": min(size, place.batch_size)}

        with measured(out, place.device):
            score_category(
                self.features.folder(),
                self.text.folder(),
                [image.path for image in self.images] if self._adapts else None,
                self.encoder.model_copy(update=at_most(self.encoder.batch_size)),
                self.score.model_copy(update=at_most(self.score.batch_size)),
                self.adapt,
                self.seed,
                place.device,
                out,
                on_progress=place.report,
            )


@dataclass(frozen=True)
class Fuse(Job):
    """The same parts under other lambdas: nothing is encoded, compared or adapted again."""

    scores: Ref
    settings: ScoreSettings
    step = Step("zsad-fuse", 1, ("zsad.scorers.dual.fuse:fuse_category",), ("numpy", "safetensors"))

    def __post_init__(self) -> None:
        used = frozenset().union(*(_LAMBDAS[variant] for variant in self.settings.variants))
        object.__setattr__(self, "settings", _that_matter(self.settings, used))

    @property
    def needed(self) -> bool:
        """False where the lambdas that matter are the paper's."""
        return self.settings != _that_matter(self.settings, ())

    def inputs(self) -> dict[str, Any]:
        return {"scores": self.scores.digest, "score": json_values(self.settings, "batch_size")}

    def run(self, out: Path, *, key: str) -> None:
        from zsad.scorers.dual.fuse import fuse_category

        fuse_category(self.scores.folder(), self.settings, out)


@dataclass(frozen=True)
class EvaluateCategory(Job):
    """Scores of one seed against the labels; without labels, the deployable threshold alone."""

    images: tuple[Image, ...]
    features: Ref
    scores: Ref
    variants: tuple[str, ...]
    settings: EvaluationSettings
    step = Step("zsad-evaluate", 1, ("zsad.steps.evaluate:evaluate_category",), ("numpy", "pillow", "scipy", "torch"))

    def __post_init__(self) -> None:
        rows = sorted(self.images, key=lambda image: (image.sha256, label_of(image)))
        object.__setattr__(self, "images", tuple(rows))

    def inputs(self) -> dict[str, Any]:
        return {
            "images": [[image.sha256, *label_of(image)] for image in self.images],
            "features": self.features.digest,
            "scores": self.scores.digest,
            "variants": list(self.variants),
            "evaluation": json_values(self.settings),
        }

    def run(self, out: Path, *, key: str) -> None:
        from zsad.steps.evaluate import evaluate_category

        evaluate_category(self.images, self.features.folder(), self.scores.folder(), self.variants, self.settings, out)


def label_of(image: Image) -> tuple[str, str, str]:
    mask = "" if image.mask is None else file_digest(image.mask)
    return {None: "", True: "anomalous", False: "normal"}[image.anomalous], image.defect, mask
