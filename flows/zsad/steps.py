"""The steps of the image flows, and functions that create their calls.

An image is identified by the sha256 of its file. Only the keys of reports contain names, categories and the order of
images. Keys never contain the device or batch sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.store.code import code_digest
from flows.store.digests import path_digest
from flows.store.references import Ref, canonical_json
from flows.store.step import Call, Keyed, Step, content_of, keyed
from flows.zsad.image_files import HEIC_LIBRARIES, mask_digest
from flows.zsad.precision import with_precision
from medad.base.settings import MachineSettings
from zsad.config.encoder_outputs import PATCHES
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
from zsad.config.settings import ZsadSettings
from zsad.config.system_base import LearnedSettings, SystemSettings
from zsad.config.systems import System
from zsad.data.labelled import LabelledImage
from zsad.scorers.anomalyclip.settings import AnomalyClip
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.dual.settings import DualImage
from zsad.scorers.segmentation.settings import SegmentationModels
from zsad.steps.results import Source

_ENCODING = (*HEIC_LIBRARIES, "numpy", "open_clip_torch", "pillow", "safetensors", "timm", "torch", "torchvision")
_COST = frozenset({"cost.json"})
_LAMBDAS: dict[Variant, frozenset[str]] = {
    "text": frozenset(),
    "text_tta": frozenset({"lambda_2", "lambda_3", "lambda_5"}),
    "visual": frozenset(),
    "joint": frozenset({"lambda_1", "lambda_text", "lambda_3", "lambda_4", "lambda_5"}),
    "joint_tta": frozenset({"lambda_1", "lambda_2", "lambda_3", "lambda_4", "lambda_5"}),
}
"""The weights that each variant uses, in its heat map or its score."""
_MODEL_FILES = ("clipseg", "sam", "salient")
"""Settings with local files and folders of the segmentation models. Keys contain digests of their content."""

TEXT = Step("zsad-text", 1, "zsad.steps.encode:encode_category_text", _ENCODING, kind="encoding")
ENCODE = Step(
    "zsad-encode",
    1,
    "zsad.steps.encode:encode_images",
    _ENCODING,
    kind="encoding",
    not_in_key=frozenset({"paths"}),
)
FUSE = Step(
    "zsad-fuse",
    1,
    "zsad.scorers.dual.fuse:fuse_category",
    ("numpy", "safetensors"),
    not_in_key=frozenset({"settings.batch_size"}),
)
EVALUATE = Step(
    "zsad-evaluate", 1, "zsad.steps.evaluate:evaluate_category", ("numpy", "pillow", "scipy", "torch"), reads=True
)
SYSTEM = Step(
    "zsad-system",
    1,
    "zsad.steps.score:score_system",
    (*_ENCODING, "scikit-image", "scipy"),
    kind="inference",
    volatile=_COST,
)
THRESHOLD = Step("zsad-threshold", 1, "zsad.steps.threshold:save_threshold", ("numpy",))
TRAIN = Step(
    "zsad-train",
    1,
    "zsad.steps.train:train_system",
    (*_ENCODING, "scipy"),
    kind="training",
    volatile=frozenset({"training.json"}),
)


def weights_of(settings: EncoderSettings) -> dict[str, str]:
    """Return what identifies an encoder's weights and activation: digests, a tag or a seed. Raises UserError."""
    from zsad.clip.models import activation_source, model_folder, weights_digest, weights_files

    found = {name: path_digest(path) for name, path in weights_files(settings).items()}
    if model_folder(settings) is None:
        found = {"model": settings.model} | (found or {"weights": weights_digest(settings)})
    return found | activation_source(settings)


def _encoder(settings: EncoderSettings, machine: MachineSettings) -> Keyed:
    """Return an encoder with its weights and the settings that affect features as content for a key."""
    settings = with_precision(settings, machine)
    weights = weights_of(settings)
    return keyed(settings, "preset", "model", "weights", "tag", "seed", "batch_size", "quick_gelu", **weights)


def distinct(images: Iterable[LabelledImage]) -> tuple[LabelledImage, ...]:
    """Return one image for each content, sorted by digest, so that names and order have no effect."""
    first: dict[str, LabelledImage] = {}
    for image in images:
        first.setdefault(image.sha256, image)
    return tuple(first[sha256] for sha256 in sorted(first))


def label_content(image: LabelledImage) -> list[str]:
    """Return an image's digest, label, kind of defect and mask as content for a key."""
    mask = "" if image.mask is None else mask_digest(image.mask)
    return [image.sha256, {None: "", True: "anomalous", False: "normal"}[image.anomalous], image.defect, mask]


def text(category: str, encoder: EncoderSettings, prompts: PromptSettings, machine: MachineSettings) -> Call:
    """Return the call that encodes a category's prompts as two text features."""
    from zsad.clip.prompts import ensemble

    made = ensemble(category, prompts)
    texts = canonical_json([made.normal, made.anomalous])
    weights: dict[str, Any] = weights_of(encoder)
    if encoder.seed is not None:  # a tower of another size gets other random weights
        weights["size_px"] = encoder.size_px
    return TEXT(
        category=category,
        encoder=Keyed(encoder, weights),
        prompts=Keyed(prompts, hashlib.sha256(texts.encode()).hexdigest()),
        machine=machine,
    )


def encode(
    images: Iterable[LabelledImage],
    encoder: EncoderSettings,
    machine: MachineSettings,
    outputs: Iterable[str] = (PATCHES,),
    turns: int = 1,
    class_tokens: bool = True,
) -> Call:
    """Return the call that encodes each distinct image: `outputs` (`zsad.config.encoder_outputs`) and class tokens.

    `turns` is the number of turned copies of each image.
    """
    once = distinct(images)
    return ENCODE(
        paths=[image.path for image in once],
        digests=[image.sha256 for image in once],
        settings=_encoder(encoder, machine),
        outputs=tuple(sorted(set(outputs))),
        turns=turns,
        class_tokens=class_tokens,
        machine=machine,
        batch_size=encoder.batch_size,
    )


def _with_lambdas(settings: ScoreSettings, lambdas: Iterable[str]) -> ScoreSettings:
    """Return the settings with these lambdas, defaults for all others, and the variants in a fixed order."""
    fields = ScoreSettings.model_fields
    update = {name: fields[name].default for name in fields if name.startswith("lambda_") and name not in lambdas}
    if WITH_REFERENCES.isdisjoint(settings.variants):
        update["references"] = ReferenceSettings()
    update["variants"] = tuple(variant for variant in _LAMBDAS if variant in settings.variants)
    return settings.model_copy(update=update)


def _adaptation(settings: AdaptSettings) -> Keyed:
    """Return adaptation settings as content for a key, with digests of textures in the order of their names."""
    if settings.textures is None:
        return keyed(settings, "textures", textures=None)
    from medad.base.textures import texture_files

    files = texture_files(Path(settings.textures).expanduser())
    return keyed(settings, "textures", textures=[path_digest(path) for path in files])


def with_used_lambdas(settings: ScoreSettings) -> ScoreSettings:
    """Return the settings with the lambdas that their variants use."""
    return _with_lambdas(settings, frozenset().union(*(_LAMBDAS[variant] for variant in settings.variants)))


def fuse(scores: Ref, settings: ScoreSettings) -> Call | None:
    """Return the call that fuses the same parts with other lambdas. None if all used lambdas are the paper's."""
    settings = with_used_lambdas(settings)
    return None if settings == _with_lambdas(settings, ()) else FUSE(scores=scores, settings=settings)


def evaluate(
    images: Iterable[LabelledImage],
    features: Ref,
    scores: Ref,
    variants: Sequence[str],
    settings: EvaluationSettings,
    threshold: Ref | None = None,
) -> Call:
    """Return the call that evaluates the scores of one seed. Without labels: only the deployable threshold.

    `threshold` is an artifact of `save_threshold`.
    """
    rows = sorted(((label_content(image), image) for image in images), key=lambda row: row[0])
    return EVALUATE(
        items=Keyed([image for _, image in rows], [labels for labels, _ in rows]),
        features=features,
        scores=scores,
        variants=tuple(variants),
        settings=settings,
        threshold=threshold,
    )


@dataclass(frozen=True)
class Judge:
    """System, encoder and normal images that an image is scored with."""

    method: str
    """Name of the system."""
    encoder: str
    """Description of the encoder."""
    digest: str
    """Digest of the system, its weights and lambdas, encoder, prompts, category and normal images."""
    depends_on_others: bool
    """Whether scores also depend on the other scored images, so that a threshold fits only these images."""


def judge_of(settings: ZsadSettings, normal: Iterable[str], category: str) -> Judge:
    """Return what the scores of a run depend on. Raises UserError.

    Parameters
    ----------
    normal
        sha256 of the normal images.
    category
        Words for the object in the images. They count only for systems with prompts.
    """
    from zsad.clip.models import describe_encoder

    system, digests = settings.method, sorted(normal)
    content = [
        content_of(_system(system)),
        content_of(_encoder(settings.encoder, settings.machine)),
        content_of(settings.prompts),
        digests,
    ]
    if system.seeded and (system.loads_encoder or not digests):  # the choice of normal images is known by now
        content.append(settings.seeds[0])
    if system.prompts is not None or system.loads_encoder:
        content.append(category)
    if isinstance(system, DualImage):
        content.append(content_of(with_used_lambdas(system.score), frozenset({"batch_size"})))
    if isinstance(system, LearnedSettings) and system.checkpoint is not None:
        content.append(path_digest(Path(system.checkpoint).expanduser()))
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return Judge(system.display_name, describe_encoder(settings.encoder), digest, system.compares_images)


def save_threshold(
    scores: Ref,
    system: System,
    settings: ZsadSettings,
    source: Literal["normal", "quantile"],
    judged_by: str,
) -> Call:
    """Return the call that finds a threshold from scores of normal images, or from all scores."""
    from zsad.clip.models import describe_encoder

    evaluation = settings.evaluation
    return THRESHOLD(
        scores=scores,
        variant=system.variant_names[-1],
        source=source,
        rate=evaluation.false_alarm_rate if source == "normal" else 1 - evaluation.threshold_quantile,
        method=system.display_name,
        encoder=describe_encoder(settings.encoder),
        judged_by=judged_by,
    )


def _system(system: SystemSettings, **more: Any) -> Keyed:
    """Return a system with all that its scores depend on as content for a key, without its label and file paths."""
    left_out = ["label", "encoder", *(("checkpoint", "training") * isinstance(system, LearnedSettings))]
    if isinstance(system, DualImage):
        return _dual(system, **more)
    if isinstance(system, SegmentationModels):
        from zsad.clip.models import path_digest as model_digest

        left_out += _MODEL_FILES
        given = {name: getattr(system, name) for name in _MODEL_FILES}
        more |= {name: None if path is None else model_digest(Path(path).expanduser()) for name, path in given.items()}
    return keyed(system, *left_out, **more)


def _dual(system: DualImage, **more: Any) -> Keyed:
    """Return the dual-image scorer as content for a key, with default lambdas: `fuse` applies others."""
    settings = _with_lambdas(system.score, ())
    adapts = not WITH_ADAPTATION.isdisjoint(settings.variants)
    plain = system.model_copy(
        update={name: getattr(settings, name) for name in ScoreSettings.model_fields if name.startswith("lambda_")}
        | {"variants": settings.variants}
    )
    content = {
        "system": system.system,
        "shots": system.shot_count,
        "score": content_of(settings, frozenset({"batch_size"})),
        "adapt": content_of(_adaptation(system.adapt)) if adapts else None,
    }
    return Keyed(plain, content | more)


def score_system(
    system: System,
    category: str,
    images: Iterable[LabelledImage],
    features: Ref,
    text: Ref | None,
    shots: Ref | None,
    trained: Ref | None,
    encoder: EncoderSettings,
    seed: int,
    machine: MachineSettings,
) -> Call:
    """Return the call that scores one category with one system and seed. Only systems with random choices use the seed.

    Parameters
    ----------
    category
        Name of the object in words, for prompts that a system makes itself.
    images
        Images with features.
    shots
        Features of normal images.
    trained
        Result of `train`. A checkpoint in the settings is used instead, if there is one.
    """
    given = system.checkpoint if isinstance(system, LearnedSettings) else None
    if given is not None:
        checkpoint: Any = Path(given).expanduser()
    else:
        checkpoint = None if trained is None else Keyed(trained.folder() / "checkpoint.safetensors", trained)
    loads = system.loads_encoder
    used = distinct(images)
    return SYSTEM(
        system=_system(system, scorer=code_digest(system.scorer)),
        category=category if loads else Keyed(category, None),
        features=features,
        text=text,
        shots=shots,
        checkpoint=checkpoint,
        # images whose file is gone by now cannot be scored by a system that reads them again
        paths=Keyed(
            [image.path for image in used], [image.sha256 for image in used if loads and not image.path.is_file()]
        ),
        encoder=_encoder(encoder, machine) if loads else Keyed(encoder, None),
        seed=seed if system.seeded else 0,
        machine=machine,
        batch_size=encoder.batch_size,
    )


def train(
    system: AprilGan | AnomalyClip, sources: Iterable[Source[Ref]], encoder: EncoderSettings, machine: MachineSettings
) -> Call:
    """Return the call that trains a learned system on features of labelled images, in any order of categories."""
    ordered = sorted(sources, key=lambda one: one.name)
    content = [
        {"name": one.name, "features": one.features, "text": one.text, "items": sorted(map(label_content, one.items))}
        for one in ordered
    ]
    return TRAIN(
        system=_system(system, training=content_of(system.training)),
        sources=Keyed(ordered, content),
        encoder=_encoder(encoder, machine),
        machine=machine,
        batch_size=system.training.batch_size,
        phase=system.system.replace("_", "-"),
    )
