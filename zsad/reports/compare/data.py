"""Reading of a comparison's results from disk, for its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medad.base.errors import InputError
from medad.base.text import natural_order
from medad.reporting.paired_tests import SharedImages
from zsad.config.settings import ablation_systems
from zsad.config.system_base import SystemSettings
from zsad.reports.run.data import seed_figures
from zsad.reports.run.document import SeedFigures
from zsad.scorers.dual.settings import DualImage
from zsad.steps.evaluate import METRICS_FILE, CategoryEvaluation
from zsad.steps.results import AblationResult, AblationRow, SystemResult


@dataclass(frozen=True)
class LoadedSystem:
    """Evaluations of a system, read from disk."""

    result: SystemResult[Path]
    evaluated: Mapping[str, Mapping[int, CategoryEvaluation]]
    """Evaluation by category and seed. Categories are in natural order, seeds rise. Each category has a seed."""

    @property
    def name(self) -> str:
        return self.result.system.display_name

    @property
    def variant(self) -> str:
        return variant_of(self.result.system)

    def figures(self, category: str) -> dict[int, SeedFigures]:
        """Return the figures of a category by seed."""
        seeds = self.evaluated.get(category, {})
        return {seed: seed_figures(one.variants[self.variant]) for seed, one in seeds.items()}

    def image_scores(self, category: str) -> dict[str, list[float]]:
        """Return scores by digest, one per seed, for labelled images that all seeds have. Equal images count once."""
        seeds = [
            {image.sha256: image.scores[self.variant] for image in one.images if image.anomalous is not None}
            for one in self.evaluated.get(category, {}).values()
        ]
        common = set.intersection(*map(set, seeds)) if seeds else set()
        return {digest: [scores[digest] for scores in seeds] for digest in sorted(common)}

    def labels(self, category: str) -> dict[str, bool]:
        """Return for each digest whether the image is anomalous."""
        first = next(iter(self.evaluated.get(category, {}).values()), None)
        images = first.images if first else ()
        return {image.sha256: image.anomalous for image in images if image.anomalous is not None}


def variant_of(system: SystemSettings) -> str:
    """Return the variant under which a system's figures are in its evaluations."""
    return system.variant_names[-1]


def load_system(result: SystemResult[Path]) -> LoadedSystem:
    """Read a system's evaluations. Raise InputError for a file that is missing, damaged, or of another system."""
    variant = variant_of(result.system)
    read = {}
    for name in sorted(result.categories, key=natural_order):
        seeds = sorted(result.categories[name])
        if not result.system.seeded:
            seeds = seeds[:1]
        if seeds:
            read[name] = {seed: _load(result.categories[name][seed].folder, variant) for seed in seeds}
    return LoadedSystem(result, read)


def load_ablation(
    result: AblationResult[Path], encoder: str
) -> list[tuple[AblationRow[Path], DualImage, dict[str, dict[int, SeedFigures]]]]:
    """Read each row with its settings and figures by category and seed.

    Raise InputError for a file that cannot be used, and KeyError for an unknown label.
    """
    systems = dict(ablation_systems(result.ablation, encoder))
    loaded = []
    for row in result.rows:
        system = systems[row.label]
        figures = {
            name: {
                seed: seed_figures(_load(row.categories[name][seed], variant_of(system)).variants[variant_of(system)])
                for seed in sorted(row.categories[name])
            }
            for name in sorted(row.categories, key=natural_order)
        }
        loaded.append((row, system, figures))
    return loaded


def shared_images(a: LoadedSystem, b: LoadedSystem) -> list[SharedImages]:
    """Return by category the labelled images that both systems scored."""
    shared = []
    for category in a.evaluated:
        ours, theirs, labels = a.image_scores(category), b.image_scores(category), a.labels(category)
        digests = [digest for digest in ours if digest in theirs]
        if digests:
            shared.append(
                SharedImages(
                    a=np.array([ours[digest] for digest in digests], dtype=np.float64).T,
                    b=np.array([theirs[digest] for digest in digests], dtype=np.float64).T,
                    anomalous=np.array([labels[digest] for digest in digests], dtype=bool),
                )
            )
    return shared


def _load(folder: Path, variant: str) -> CategoryEvaluation:
    evaluated = CategoryEvaluation.load(folder)
    if variant not in evaluated.variants:
        raise InputError(folder / METRICS_FILE, f"contains no variant {variant}")
    return evaluated
