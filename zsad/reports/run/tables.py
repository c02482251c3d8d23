"""CSV tables of a report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zsad.evaluation.metric_rows import METRICS
from zsad.reports.run.document import ReportDocument, SeedFigures
from zsad.steps.evaluate import Curve, CurvePair

MEAN = "mean over categories"
"""Value of the column `category` of results.csv in rows of means. Their column `seed` is `mean` or `sd`."""
CURVE_COLUMNS = {"roc": ("false_positive_rate", "recall"), "pr": ("recall", "precision")}
"""Axes of each curve."""


def result_rows(document: ReportDocument) -> Iterator[dict[str, Any]]:
    """Yield results.csv: one row per category, variant and seed, then the means over categories and their sd."""
    for category in document.categories:
        for figures in category.variants:
            for seed, one in figures.seeds.items():
                values = one.model_dump()
                metrics = values.pop("metrics")
                counts = {key: getattr(category, key) for key in ("normal", "anomalous", "unlabelled")}
                yield {
                    "category": category.name,
                    "variant": figures.variant,
                    "seed": seed,
                    **counts,
                    **{key: metrics[key] for key in METRICS},
                    **values,
                    "encoder": category.encoder,
                }
    for macro in document.macro:
        for part in ("mean", "sd"):
            found = {key: getattr(stat, part) for key in METRICS if (stat := macro.metrics[key])}
            f1 = getattr(macro.deployable_f1, part, None)
            if part == "mean" or any(value is not None for value in (*found.values(), f1)):
                yield {
                    "category": MEAN,
                    "variant": macro.variant,
                    "seed": part,
                    **dict.fromkeys(("normal", "anomalous", "unlabelled")),
                    **{key: found.get(key) for key in METRICS},
                    **dict.fromkeys(key for key in SeedFigures.model_fields if key != "metrics"),
                    "deployable_f1": f1,
                    "encoder": "; ".join(one.description for one in document.encoders),
                }


def score_rows(document: ReportDocument) -> Iterator[dict[str, Any]]:
    """Yield scores.csv: one row per image, variant and seed."""
    for category in document.categories:
        thresholds = {
            (figures.variant, seed): one.deployable_threshold
            for figures in category.variants
            for seed, one in figures.seeds.items()
        }
        for image in category.images:
            for variant, seeds in image.scores.items():
                for seed, score in seeds.items():
                    threshold = thresholds[variant, seed]
                    yield {
                        "category": category.name,
                        "id": image.id,
                        "anomalous": None if image.anomalous is None else int(image.anomalous),
                        "defect": image.defect,
                        "variant": variant,
                        "seed": seed,
                        "score": score,
                        "threshold": threshold,
                        "flagged": None if threshold is None else int(score >= threshold),
                        "encoder": category.encoder,
                    }


def curve_rows(document: ReportDocument) -> Iterator[dict[str, Any]]:
    """Yield curves.csv: one row per point of each curve in the report."""
    for category in document.categories:
        curves = category.curves
        for level in ("image", "pixel"):
            pair: CurvePair | None = getattr(curves, level)
            for kind, columns in CURVE_COLUMNS.items():
                curve: Curve | None = getattr(pair, kind, None)
                for point in zip(curve.x, curve.y, strict=True) if curve else ():
                    yield {
                        "category": category.name,
                        "variant": curves.variant,
                        "seed": category.shown_seed,
                        "of": level,
                        "curve": kind,
                        **dict.fromkeys(("false_positive_rate", "recall", "precision")),
                        **dict(zip(columns, point, strict=True)),
                        "encoder": category.encoder,
                    }
