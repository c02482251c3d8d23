"""Write evaluations of several systems to disk, with figures that a test chooses."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zsad.clip.models import EncoderInfo
from zsad.config.settings import ZsadSettings, parse
from zsad.config.system_base import SystemSettings
from zsad.evaluation.metrics import ImageMetrics, PixelMetrics
from zsad.reports.compare.data import variant_of
from zsad.steps.evaluate import METRICS_FILE, CategoryEvaluation, ImageScore, VariantEvaluation
from zsad.steps.results import Cost, Evaluated, SystemResult

CLIP = EncoderInfo(description="ViT-B-16-plus-240, laion400m_e32", random_weights=False, embedded=False)
SECRET = "/srv/factory/secret"


def compare_settings(*systems: Mapping[str, Any], **changes: Any) -> ZsadSettings:
    values: dict[str, Any] = {
        "name": "run_1",
        "seeds": (0, 1),
        "data": {"root": SECRET},
        "encoders": {"main": {"tag": "laion400m_e32"}},
        "systems": list(systems) or [{"system": "clip"}, {"system": "dual"}],
    }
    return parse(values | changes, source="test")


def write_evaluation(
    folder: Path,
    variant: str,
    *,
    seed: int = 0,
    image: Sequence[float | None] = (0.9, 0.8, 0.7),
    pixel: Sequence[float | None] | None = (0.6, 0.5, 0.4, 0.3, 0.2),
    normal: Sequence[float] = (0.1, 0.2),
    anomalous: Sequence[float] = (0.3, 0.4),
    category: str = "",
) -> Path:
    """Write `metrics.json` with these figures, which need not fit the images' scores.

    Parameters
    ----------
    image
        Image AUROC, AP and F1max.
    pixel
        Pixel AUROC, AP, F1max, AUPRO, and AUPRO over 200 thresholds. None: no masks.
    normal, anomalous
        Scores of the images. The n-th image of a class has the same digest in all evaluations of a category.
    """
    auroc, ap, f1max = image
    of_images = ImageMetrics(
        auroc=auroc, ap=ap, f1max=f1max, f1max_threshold=0.5, n_normal=len(normal), n_anomalous=len(anomalous)
    )
    of_pixels = None
    if pixel is not None:
        px_auroc, px_ap, px_f1max, aupro, pro_200 = pixel
        of_pixels = PixelMetrics(
            auroc=px_auroc,
            ap=px_ap,
            f1max=px_f1max,
            f1max_threshold=0.5,
            aupro=aupro,
            max_fpr=0.3,
            pro_200=pro_200,
            n_images=4,
            n_normal_px=10,
            n_anomalous_px=10,
            n_regions=1,
        )
    images = [
        ImageScore(
            sha256=hashlib.sha256(f"{category} {kind} {number}".encode()).hexdigest(),
            anomalous=kind == "bad",
            defect=kind,
            scores={variant: score},
        )
        for kind, scores in (("good", normal), ("bad", anomalous))
        for number, score in enumerate(scores)
    ]
    evaluated = CategoryEvaluation(
        seed=seed,
        size_px=240,
        max_fpr=0.3,
        images=tuple(images),
        variants={variant: VariantEvaluation(image=of_images, pixel=of_pixels, threshold=None)},
        problems=(),
    )
    folder.mkdir(parents=True)
    (folder / METRICS_FILE).write_text(evaluated.model_dump_json(by_alias=True), encoding="utf-8")
    return folder


def write_system(
    root: Path,
    system: SystemSettings,
    figures: Mapping[str, Mapping[int, Mapping[str, Any]]],
    *,
    encoder: EncoderInfo = CLIP,
    cost: Cost | None = None,
) -> SystemResult[Path]:
    """Write a system's evaluations. `figures` are arguments of `write_evaluation` by category and seed."""
    return SystemResult(
        system,
        encoder,
        {
            category: {
                seed: Evaluated(
                    write_evaluation(
                        root / system.display_name / category / str(seed),
                        variant_of(system),
                        seed=seed,
                        category=category,
                        **values,
                    ),
                    cost,
                )
                for seed, values in seeds.items()
            }
            for category, seeds in figures.items()
        },
    )


def seeds_of(*aurocs: float, **values: Any) -> dict[int, dict[str, Any]]:
    """Return figures of a category for the seeds 0, 1, ... with these image AUROCs."""
    return {seed: {"image": (auroc, 0.8, 0.7), **values} for seed, auroc in enumerate(aurocs)}
