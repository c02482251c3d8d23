"""The steps of the image flows, and functions that create their calls.

An image is identified by the sha256 of its file. Only the keys of reports contain names, categories and the order of
images. Keys never contain the device or batch sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flows.store.code import code_digest
from flows.store.digests import path_digest
from flows.store.references import Ref, canonical_json
from flows.store.step import PAGE, Call, Keyed, Step, content_of, keyed, shown
from flows.zsad.precision import with_precision
from medad.base.errors import CaseFailure
from medad.base.settings import MachineSettings
from zsad.config.compare import CompareSettings
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
    ZsadSettings,
)
from zsad.config.system_base import LearnedSettings, SystemSettings
from zsad.config.systems import System
from zsad.data.labelled import LabelledImage
from zsad.scorers.anomalyclip.settings import AnomalyClip
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.segmentation.settings import SegmentationModels
from zsad.steps.results import AblationResult, CategoryResult, Source, SystemResult

_ENCODING = ("numpy", "open_clip_torch", "pillow", "safetensors", "timm", "torch", "torchvision")
_DRAWING = ("jinja2", "matplotlib", "numpy", "pillow", "scipy")
_STYLE = (*PAGE, "zsad/reports/report_style.html", "zsad/reports/report_end.html")
_RUN_PAGE = (*_STYLE, "zsad/reports/run/report_template.html")
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
SCORE = Step(
    "zsad-score",
    1,
    "zsad.steps.score_dual:score_category",
    (*_ENCODING, "scikit-image", "scipy"),
    kind="inference",
    not_in_key=frozenset({"paths", "score.batch_size"}),
    volatile=_COST,
)
FUSE = Step(
    "zsad-fuse",
    1,
    "zsad.scorers.dual.fuse:fuse_category",
    ("numpy", "safetensors"),
    not_in_key=frozenset({"settings.batch_size"}),
)
EVALUATE = Step("zsad-evaluate", 1, "zsad.steps.evaluate:evaluate_category", ("numpy", "pillow", "scipy", "torch"))
SYSTEM = Step(
    "zsad-system",
    1,
    "zsad.steps.score:score_system",
    (*_ENCODING, "scipy"),
    kind="inference",
    not_in_key=frozenset({"paths"}),
    volatile=_COST,
)
TRAIN = Step(
    "zsad-train",
    1,
    "zsad.steps.train:train_system",
    (*_ENCODING, "scipy"),
    kind="training",
    volatile=frozenset({"training.json"}),
)
REPORT = Step("zsad-report", 1, "zsad.reports.run.report:write_report", _DRAWING, files=_RUN_PAGE)
MAPS = Step("zsad-maps", 1, "zsad.reports.run.outputs:write_score_outputs", (*_DRAWING, "torch"), files=_RUN_PAGE)
COMPARE_REPORT = Step(
    "zsad-compare",
    1,
    "zsad.reports.compare.report:write_compare_report",
    _DRAWING,
    files=(*_STYLE, "zsad/reports/compare/compare_template.html"),
)


def weights_of(settings: EncoderSettings) -> dict[str, str]:
    """Return what identifies an encoder's weights and activation: digests of files, tag or seed. Raises UserError."""
    from zsad.clip.models import activation_source, model_folder, weights_digest, weights_files

    found = {name: path_digest(path) for name, path in weights_files(settings).items()}
    if model_folder(settings) is None:
        found = {"model": settings.model} | (found or {"weights": weights_digest(settings)})
    return found | activation_source(settings)


def _encoder(settings: EncoderSettings, machine: MachineSettings) -> Keyed:
    """Return an encoder with its weights and the settings that affect features as content for a key."""
    settings = with_precision(settings, machine)
    left_out = ("preset", "model", "weights", "tag", "seed", "batch_size", "quick_gelu")
    return keyed(settings, *left_out, **weights_of(settings))


def distinct(images: Iterable[LabelledImage]) -> tuple[LabelledImage, ...]:
    """Return one image for each content, sorted by digest, so that names and order have no effect."""
    first: dict[str, LabelledImage] = {}
    for image in images:
        first.setdefault(image.sha256, image)
    return tuple(first[sha256] for sha256 in sorted(first))


def _labelled(image: LabelledImage) -> list[str]:
    mask = "" if image.mask is None else path_digest(image.mask)
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
) -> Call:
    """Return the call that encodes each distinct image: class tokens and `outputs` (`zsad.config.encoder_outputs`)."""
    once = distinct(images)
    return ENCODE(
        paths=[image.path for image in once],
        digests=[image.sha256 for image in once],
        settings=_encoder(encoder, machine),
        outputs=tuple(sorted(set(outputs))),
        machine=machine,
        batch_size=encoder.batch_size,
    )


def needs_references(variants: Iterable[Variant]) -> bool:
    return not WITH_REFERENCES.isdisjoint(variants)


def _with_lambdas(settings: ScoreSettings, lambdas: Iterable[str]) -> ScoreSettings:
    """Return the settings with these lambdas, defaults for all others, and the variants in a fixed order."""
    fields = ScoreSettings.model_fields
    update = {name: fields[name].default for name in fields if name.startswith("lambda_") and name not in lambdas}
    if not needs_references(settings.variants):
        update["references"] = ReferenceSettings()
    update["variants"] = tuple(variant for variant in _LAMBDAS if variant in settings.variants)
    return settings.model_copy(update=update)


def score(
    images: Iterable[LabelledImage],
    features: Ref,
    text: Ref,
    encoder: EncoderSettings,
    settings: ScoreSettings,
    adapt: AdaptSettings,
    seed: int,
    machine: MachineSettings,
) -> Call:
    """Return the call that scores features with one seed. The parts are fused with the paper's lambdas; see `fuse`.

    `images` are the images with features, since adaptation reads them again. The seed only matters for variants with
    reference images or pseudo anomalies.
    """
    settings = _with_lambdas(settings, ())
    adapts = not WITH_ADAPTATION.isdisjoint(settings.variants)
    batch = max(encoder.batch_size, settings.batch_size) if adapts else settings.batch_size
    return SCORE(
        features=features,
        text=text,
        paths=[image.path for image in distinct(images)] if adapts else None,
        encoder=_encoder(encoder, machine) if adapts else Keyed(encoder, None),
        score=settings,
        adapt=_adaptation(adapt) if adapts else Keyed(adapt, None),
        seed=seed if adapts or needs_references(settings.variants) else 0,
        machine=machine,
        batch_size=batch,
    )


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
) -> Call:
    """Return the call that evaluates the scores of one seed. Without labels: only the deployable threshold."""
    rows = sorted(((_labelled(image), image) for image in images), key=lambda row: row[0])
    return EVALUATE(
        items=Keyed([image for _, image in rows], [labels for labels, _ in rows]),
        features=features,
        scores=scores,
        variants=tuple(variants),
        settings=settings,
    )


def _system(system: SystemSettings, **more: Any) -> Keyed:
    """Return a system with all that its scores depend on as content for a key, without its label and file paths."""
    left_out = ["label", "encoder", *(("checkpoint", "training") * isinstance(system, LearnedSettings))]
    if isinstance(system, SegmentationModels):
        from zsad.clip.models import path_digest as model_digest

        left_out += _MODEL_FILES
        given = {name: getattr(system, name) for name in _MODEL_FILES}
        more |= {name: None if path is None else model_digest(Path(path).expanduser()) for name, path in given.items()}
    return keyed(system, *left_out, **more)


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
    return SYSTEM(
        system=_system(system, scorer=code_digest(f"{system.scorer_module}:score")),
        category=category if loads else Keyed(category, None),
        features=features,
        text=text,
        shots=shots,
        checkpoint=checkpoint,
        paths=[image.path for image in distinct(images)],
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
        {"name": one.name, "features": one.features, "text": one.text, "items": sorted(map(_labelled, one.items))}
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


def _category(result: CategoryResult[Ref]) -> Keyed:
    """Return a category with all that a report shows as content for a key: ids, digests, labels, results."""
    images = [[image.id, *_labelled(image)] for image in result.images]
    rest = {name: getattr(result, name) for name in ("name", "text", "features", "scores", "evaluated")}
    return Keyed(result, rest | {"images": images})


def report(
    settings: ZsadSettings,
    categories: Iterable[CategoryResult[Ref]],
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> Call:
    """Return the call that writes the report and its tables. Its key contains all that these show, also ids."""
    return REPORT(
        settings=shown(settings),
        categories=tuple(map(_category, categories)),
        failures=tuple(failures),
        versions=dict(versions),
        notes=tuple(notes),
    )


def score_outputs(
    settings: ZsadSettings,
    category: CategoryResult[Ref] | None,
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
    formats: Sequence[Literal["png", "tiff", "npy"]],
) -> Call:
    """Return the call that writes scores.csv, heat maps and a report of unlabelled images."""
    return MAPS(
        settings=shown(settings),
        category=None if category is None else _category(category),
        failures=tuple(failures),
        versions=dict(versions),
        notes=tuple(notes),
        formats=tuple(formats),
    )


def compare_report(
    settings: CompareSettings,
    systems: Iterable[SystemResult[Ref]],
    ablations: Iterable[AblationResult[Ref]],
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> Call:
    """Return the call that writes the tables of all systems, their tests and the ablations."""
    rows = tuple(systems)
    return COMPARE_REPORT(
        settings=shown(settings),
        systems=Keyed(rows, [{"system": row.system.display_name, "categories": row.categories} for row in rows]),
        ablations=tuple(ablations),
        failures=tuple(failures),
        versions=dict(versions),
        notes=tuple(notes),
    )
