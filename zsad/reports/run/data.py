"""Reading of a scored category from disk, for a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float32
from pydantic import BaseModel, ConfigDict, Field

from medad.base.errors import InputError
from medad.base.storage import read_record
from medad.base.text import escape_bad_bytes, hide_paths, natural_order
from zsad.clip.feature_store import INDEX, FeatureIndex
from zsad.clip.models import EncoderInfo, is_embedded
from zsad.config.run import EncoderSettings, EvaluationSettings
from zsad.data.images import Crops, merge_maps
from zsad.data.labelled import LabelledImage
from zsad.evaluation.metric_rows import METRICS
from zsad.reports.run.document import (
    CategoryReport,
    ImageScores,
    MaskProblem,
    SeedFigures,
    ShownImage,
    UsedPrompts,
)
from zsad.reports.run.figures import variant_figures
from zsad.scorers.stored_scores import StoredScores, open_scores
from zsad.steps.evaluate import METRICS_FILE, CategoryCurves, CategoryEvaluation, VariantEvaluation
from zsad.steps.results import CategoryResult

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class LoadedCategory:
    """Results of a category, read and checked. Patch maps are read only when they are needed."""

    result: CategoryResult[Path]
    images: tuple[LabelledImage, ...]
    """Images with scores, in natural order of their ids."""
    evaluated: Mapping[int, CategoryEvaluation]
    """Evaluations by seed, rising."""
    image_scores: Mapping[int, Mapping[str, Mapping[str, float]]]
    """Image scores by seed, digest and variant."""
    index: FeatureIndex
    curves: CategoryCurves
    """Curves of the shown seed."""
    scores: StoredScores
    """Scores of the shown seed."""
    prompts: UsedPrompts | None

    @property
    def shown_seed(self) -> int:
        """Return the lowest seed. The report shows its maps, curves and histogram."""
        return min(self.evaluated)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {image.sha256: number for number, image in enumerate(self.index.images)}

    @cached_property
    def _scored(self) -> dict[str, int]:
        return {digest: number for number, digest in enumerate(self.scores.digests)}

    def size_hw(self, image: LabelledImage) -> tuple[int, int]:
        """Return height and width of the image file, px."""
        row = self.index.images[self._rows[image.sha256]]
        return row.height, row.width

    def patch_map(self, image: LabelledImage, variant: str) -> Float32[np.ndarray, "C g g"]:
        """Return the scores of the image's patches with the shown seed."""
        return self.scores.patch_map(self._scored[image.sha256], variant)

    def score_map(self, image: LabelledImage, variant: str, settings: EvaluationSettings) -> Float32[np.ndarray, "h w"]:
        """Return the map that is compared with masks, at evaluation size, with the shown seed."""
        row = self.index.images[self._rows[image.sha256]]
        crops = Crops(row.canvas, row.offsets, self.index.size_px)
        aligned = settings.corners_aligned(self.scores.align_corners)
        patches = self.patch_map(image, variant)
        return merge_maps(patches, crops, settings.size_px, settings.smoothing_sigma_px, align_corners=aligned)

    def reference(self, image: LabelledImage) -> LabelledImage | None:
        """Return the first reference image of an image, or None."""
        named = self.scores.references(self._scored[image.sha256])
        known = (*self.images, *self.result.normal)
        return next((other for digest in named[:1] for other in known if other.sha256 == digest), None)

    def encoder(self, settings: EncoderSettings) -> EncoderInfo:
        """Return the encoder that made the features. A copy of the embedded model is recognised by its weights."""
        embedded = is_embedded(settings, self.index.identity.get("weights"))
        description = self.index.model
        if embedded and settings.model != "embedded":
            description += " (the embedded model)"
        return EncoderInfo(description=description, random_weights=self.index.random_weights, embedded=embedded)

    def report(self, variants: Sequence[str], encoder: EncoderInfo, shown: Sequence[ShownImage]) -> CategoryReport:
        """Return the part of the report about this category, with the images to show."""
        ids = {image.sha256: image.id for image in self.images}
        first = self.evaluated[self.shown_seed]
        return CategoryReport(
            name=self.result.name,
            encoder=encoder.description,
            images=tuple(
                ImageScores(
                    id=image.id,
                    anomalous=image.anomalous,
                    defect=image.defect,
                    scores={v: {seed: of[image.sha256][v] for seed, of in self.image_scores.items()} for v in variants},
                )
                for image in self.images
            ),
            normal=sum(image.anomalous is False for image in self.images),
            anomalous=sum(image.anomalous is True for image in self.images),
            unlabelled=sum(image.anomalous is None for image in self.images),
            masks=sum(image.mask is not None for image in self.images),
            mask_problems=tuple(
                MaskProblem(id=ids[one.sha256], rule=hide_paths(one.rule))
                for one in first.problems
                if one.sha256 in ids
            ),
            prompts=self.prompts,
            variants=tuple(
                variant_figures(v, {seed: seed_figures(one.variants[v]) for seed, one in self.evaluated.items()})
                for v in variants
            ),
            shown_seed=self.shown_seed,
            curves=self.curves,
            shown=tuple(shown),
        )


def load_category(result: CategoryResult[Path], variants: Sequence[str]) -> LoadedCategory:
    """Read everything except the maps. Raise InputError for a file that is missing, damaged, or lacks a variant."""
    evaluated = {seed: CategoryEvaluation.load(result.evaluated[seed]) for seed in sorted(result.evaluated)}
    for seed, one in evaluated.items():
        if lacking := set(variants) - set(one.variants):
            raise InputError(result.evaluated[seed] / METRICS_FILE, f"contains no variant {min(lacking)}")
    index = read_record(FeatureIndex, result.features / INDEX)
    scored = {seed: {one.sha256: one.scores for one in of.images} for seed, of in evaluated.items()}
    seed = min(evaluated)
    # only images scored with all seeds: otherwise the seeds' means would be over different images
    common = set.intersection(*(set(of) for of in scored.values()))
    images = [replace(one, id=escape_bad_bytes(one.id)) for one in result.images if one.sha256 in common]
    return LoadedCategory(
        result=result,
        images=tuple(sorted(images, key=lambda one: natural_order(one.id))),
        evaluated=evaluated,
        image_scores=scored,
        index=index,
        curves=CategoryCurves.load(result.evaluated[seed]),
        scores=open_scores(result.scores[seed]),
        prompts=None if result.text is None else read_record(_TextFile, result.text / "text.json").used(),
    )


def seed_figures(one: VariantEvaluation) -> SeedFigures:
    """Convert an evaluation to the figures of a report."""
    image, pixel, threshold = one.image, one.pixel, one.threshold
    return SeedFigures(
        metrics={
            key: None if part is None else metric.value(part)
            for key, metric in METRICS.items()
            for part in [image if metric.level == "image" else pixel]
        },
        image_oracle_threshold=image and image.f1max_threshold,
        pixel_oracle_threshold=pixel and pixel.f1max_threshold,
        deployable_threshold=threshold and threshold.value,
        flagged=threshold and threshold.flagged,
        found=threshold and threshold.found,
        false_alarms=threshold and threshold.false_alarms,
        deployable_f1=threshold and threshold.f1,
    )


class _IgnoresOtherFields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _TextFile(_IgnoresOtherFields):
    words: str = ""
    domains: tuple[str, ...] = ()
    prompts: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    def used(self) -> UsedPrompts | None:
        if not self.prompts:
            return None
        return UsedPrompts(
            words=self.words,
            domains=self.domains,
            normal=self.prompts.get("normal", ()),
            anomalous=self.prompts.get("anomalous", ()),
        )
