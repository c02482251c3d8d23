"""The CSV tables of a report."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medad.storage import atomic_path
from zsad.report_document import METRICS, ReportDocument


def result_rows(document: ReportDocument) -> Iterator[dict[str, Any]]:
    """results.csv: a row a category, variant and seed."""
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
                }


def score_rows(document: ReportDocument) -> Iterator[dict[str, Any]]:
    """scores.csv: a row an image, variant and seed."""
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
                    }


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows of the same keys as UTF-8 CSV with a heading; None is left empty. No row: an empty file."""
    buffer = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(buffer, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    with atomic_path(path) as temporary:
        temporary.write_text(buffer.getvalue(), encoding="utf-8")
