"""Creation of a comparison's document from evaluations: means, ranks, tests, cost, ablations and notices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

from medad.base.errors import CaseFailure
from medad.base.settings import MACHINE_FIELDS
from medad.base.text import hide_paths, natural_order
from medad.reporting.failures import failure_rows
from medad.reporting.paired_tests import MIN_CATEGORIES, MIN_IMAGES, PairedOutcome, delong, wilcoxon
from medad.reporting.results_table import corrected
from medad.reporting.seed_statistics import mean_and_sd
from zsad.clip.models import describe_encoder
from zsad.config.settings import Ablation, ZsadSettings
from zsad.config.system_base import SystemSettings
from zsad.evaluation.metric_rows import shown_metrics
from zsad.reports.comparable import encoder_deviations, reasons_other_images, shared_deviations, system_deviations
from zsad.reports.compare.data import LoadedSystem, load_ablation, shared_images
from zsad.reports.compare.document import (
    AblationReport,
    AblationRowReport,
    CategoryCounts,
    CompareDocument,
    EncoderCost,
    PairedResult,
    PairedTable,
    SystemCost,
    SystemReport,
)
from zsad.reports.compare.means import figures_by_category, macro_figures
from zsad.reports.published import (
    ABLATION_REMARKS,
    ANOMALY_CLIP,
    DUAL_IMAGE,
    SEGMENTATION,
    TITLES,
    PublishedRow,
    category_figures,
    published_ablation,
    rows_for_comparison,
)
from zsad.reports.run.document import (
    EMBEDDED_NOTICE,
    RANDOM_NOTICE,
    Notice,
    PublishedTable,
    definitions_shown,
)
from zsad.scorers.dual.settings import DualImage
from zsad.steps.results import AblationResult, Evaluated

SCHEMA_VERSION = 1
TESTED_BY_CATEGORY = ("image_auroc", "image_f1max", "pixel_auroc", "pixel_f1max", "pixel_aupro")
"""Metrics for Wilcoxon's test. Each metric has its own correction."""
PUBLISHED_AS: dict[str, tuple[str, ...]] = {
    "clip": ("CLIP",),
    "clip_ac": ("CLIP-AC",),
    "winclip": ("WinCLIP",),
    "anovl": ("AnoCLIP",),
    "musc": ("MuSc (whole test set)",),
    "musc_2": ("MuSc-2 (one reference)",),
    "april_gan": ("VAND", "APRIL-GAN"),
    "anomalyclip": ("AnomalyCLIP",),
    "segmentation": ("Segmentation models",),
}
"""Names of each system in published rows."""
ABLATIONS: dict[Ablation, tuple[str, str]] = {
    "references": ("Reference images", "references"),
    "map_weights": ("Weights of the map (eq. 12)", "lambda 1, lambda 2"),
    "image_weights": ("Weights of the image score (eq. 13)", "lambda 3, lambda 4, lambda 5"),
    "steps": ("Steps of adaptation", "steps"),
}
"""Title of each ablation, and the parameters that its rows vary."""


def make_document(
    settings: ZsadSettings,
    systems: Sequence[LoadedSystem],
    ablations: Sequence[AblationResult[Path]],
    failures: Sequence[CaseFailure],
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> CompareDocument:
    """Return the document. Raise InputError for an evaluation of an ablation that is missing or damaged."""
    categories = _categories(systems)
    rows = rows_for_comparison(settings.published) if settings.published else ()
    figures = [{category.name: one.figures(category.name) for category in categories} for one in systems]
    means = macro_figures(figures)
    by_category = figures_by_category([category.name for category in categories], figures)
    reports = tuple(
        SystemReport(
            name=one.name,
            system=_system_name(one.result.system),
            source=one.result.system.source,
            published_setting=one.result.system.published,
            encoder=one.result.system.encoder,
            made_by=one.result.encoder,
            seeded=one.result.system.seeded,
            trained=one.result.system.trained,
            mean=mean,
            categories=figures_of_system,
            published=tuple(row for row in rows if is_published_row_of(one.result.system, row)),
            cost=_cost(one),
        )
        for one, mean, figures_of_system in zip(systems, means, by_category, strict=True)
    )
    notices = _notices(settings, systems)
    published = None
    if settings.published is not None:
        scored = {one.name: one.normal + one.anomalous + one.unlabelled for one in categories}
        reasons = [*reasons_other_images(settings.published, scored)]
        if notices:
            reasons.insert(0, "not all encoders here are CLIP")
        for one in systems:
            system = one.result.system
            reasons += encoder_deviations(one.name, _system_name(system), settings.encoders[system.encoder])
            reasons += system_deviations(system, settings.published)
        reasons += shared_deviations(settings.prompts, settings.evaluation, settings.systems)
        taken = [row for one in reports for row in one.published]
        published = PublishedTable(
            benchmark=TITLES[settings.published],
            comparable=not reasons,
            rows=tuple(row for row in rows if row not in taken),
        )
        if reasons:
            text = f"The published rows are not comparable with this run for these reasons: {'; '.join(reasons)}."
            notices.append(Notice(kind="published", text=text))
    names = {one.name for one in categories}
    return CompareDocument(
        schema_version=SCHEMA_VERSION,
        kind="adflows zsad comparison",
        name=settings.name,
        notices=tuple(notices),
        notes=tuple(hide_paths(note) for note in notes),
        seeds=tuple(sorted(settings.seeds)),
        categories=categories,
        systems=reports,
        published=published,
        published_by_category=tuple(one for one in category_figures() if names & one.figures.keys())
        if settings.published == "visa"
        else (),
        encoders=_encoders(systems),
        paired=_paired(systems, [category.name for category in categories]),
        ablations=tuple(_ablation(one, settings) for one in ablations),
        failures=failure_rows(failures, hide_files=settings.data.pseudonyms, group="system", images=True),
        metrics=shown_metrics(pro_200=settings.evaluation.pro_200),
        definitions=_definitions(settings),
        settings=settings.public(*MACHINE_FIELDS),
        versions={name: hide_paths(versions[name]) for name in sorted(versions)},
    )


def is_published_row_of(system: SystemSettings, row: PublishedRow) -> bool:
    """Return whether a published row belongs to this system, in its configured variant. Few-shot systems have none."""
    if system.shot_count:
        return False
    if isinstance(system, DualImage):
        return row.variant == system.variant_names[-1] and row.paper == DUAL_IMAGE and system.references.count in {0, 1}
    return row.variant is None and row.system in PUBLISHED_AS.get(_system_name(system), ())


def _system_name(system: SystemSettings) -> str:
    return str(system.model_dump(include={"system"})["system"])


def _categories(systems: Sequence[LoadedSystem]) -> tuple[CategoryCounts, ...]:
    """Count the images of each category. All systems get the same images, so the first one with results is used."""
    names = sorted({name for one in systems for name in one.evaluated}, key=natural_order)
    shown = []
    for name in names:
        evaluated = next(iter(next(one.evaluated[name] for one in systems if name in one.evaluated).values()))
        labels = [image.anomalous for image in evaluated.images]
        shown.append(
            CategoryCounts(
                name=name,
                normal=labels.count(False),
                anomalous=labels.count(True),
                unlabelled=labels.count(None),
                mask_problems=len(evaluated.problems),
            )
        )
    return tuple(shown)


def _evaluated_results(one: LoadedSystem) -> Iterable[tuple[str, Evaluated[Path]]]:
    for category, seeds in one.evaluated.items():
        for seed in seeds:
            yield category, one.result.categories[category][seed]


def _cost(one: LoadedSystem) -> SystemCost | None:
    costs = [result.cost for _, result in _evaluated_results(one) if result.cost is not None]
    images = sum(cost.images for cost in costs)
    if not images:
        return None
    measured = [
        (cost.peak_memory_bytes, cost.images) for cost in costs if cost.peak_memory_bytes is not None and cost.images
    ]
    return SystemCost(
        scoring_s_an_image=sum(cost.scoring_s for cost in costs) / images,
        images=images,
        peak_memory_bytes=max((peak for peak, _ in measured), default=None),
        memory_bytes_an_image=max((peak / count for peak, count in measured), default=None),
    )


def _encoders(systems: Sequence[LoadedSystem]) -> tuple[EncoderCost, ...]:
    """Sum up each encoder's time. Its pass over a category counts once."""
    costs = []
    for name in dict.fromkeys(one.result.system.encoder for one in systems):
        sharing = [one for one in systems if one.result.system.encoder == name]
        passes: dict[str, tuple[float, int]] = {}
        for one in sharing:
            for category, result in _evaluated_results(one):
                if result.cost is not None:
                    taken = (result.cost.encoding_s, result.cost.images)
                    passes[category] = max(taken, passes.get(category, taken))
        images = sum(count for _, count in passes.values())
        if images:
            seconds = sum(taken for taken, _ in passes.values())
            costs.append(
                EncoderCost(
                    name=name,
                    description=sharing[0].result.encoder.description,
                    shared_by=tuple(one.name for one in sharing),
                    encoding_s=seconds,
                    images=images,
                    encoding_s_an_image=seconds / images,
                )
            )
    return tuple(costs)


def _paired(systems: Sequence[LoadedSystem], categories: Sequence[str]) -> tuple[PairedTable, ...]:
    pairs = list(combinations(systems, 2))
    if not pairs:
        return ()
    means = {
        one.name: {
            key: {
                name: stat.mean
                for name in categories
                if (stat := mean_and_sd(seed.metrics.get(key) for seed in one.figures(name).values()))
            }
            for key in TESTED_BY_CATEGORY
        }
        for one in systems
    }
    return (
        _table("DeLong", "image_auroc", pairs, [delong(shared_images(a, b)) for a, b in pairs]),
        *(
            _table("Wilcoxon", key, pairs, [wilcoxon(means[a.name][key], means[b.name][key]) for a, b in pairs])
            for key in TESTED_BY_CATEGORY
        ),
    )


def _table(
    test: Literal["DeLong", "Wilcoxon"],
    metric: str,
    pairs: Sequence[tuple[LoadedSystem, LoadedSystem]],
    outcomes: Sequence[PairedOutcome],
) -> PairedTable:
    tests = [(a, b, outcome) for (a, b), outcome in zip(pairs, outcomes, strict=True)]
    return PairedTable(
        test=test,
        metric=metric,
        pairs=tuple(
            PairedResult(
                a=a.name,
                b=b.name,
                difference=one.difference,
                low=one.low,
                high=one.high,
                p=one.p,
                p_holm=p_holm,
                categories=one.n,
                images=one.images,
                reason=one.reason,
            )
            for a, b, one, p_holm in corrected(tests)
        ),
    )


def _ablation(result: AblationResult[Path], settings: ZsadSettings) -> AblationReport:
    loaded = load_ablation(result, settings.ablation_encoder)
    printed = published_ablation(result.ablation) if settings.published else ()
    title, varied = ABLATIONS[result.ablation]
    means = macro_figures([figures for _, _, figures in loaded])
    rows = tuple(
        AblationRowReport(
            label=row.label,
            seeded=system.seeded,
            mean=mean,
            published=tuple(one for one in printed if one.system == row.label),
        )
        for (row, system, _), mean in zip(loaded, means, strict=True)
    )
    labels = {row.label for row in rows}
    return AblationReport(
        ablation=result.ablation,
        title=title,
        varied=varied,
        encoder=describe_encoder(settings.encoders[settings.ablation_encoder]),
        rows=rows,
        published=tuple(one for one in printed if one.system not in labels),
        remark=ABLATION_REMARKS.get(result.ablation, "") if settings.published else "",
    )


def _notices(settings: ZsadSettings, systems: Sequence[LoadedSystem]) -> list[Notice]:
    """Return notices on encoders that are not CLIP. They name the systems concerned unless all are.

    Systems without results are included.
    """
    used = {system.display_name: settings.encoders[system.encoder] for system in settings.systems}
    if settings.ablations:
        used["the ablations"] = settings.encoders[settings.ablation_encoder]
    made_by = {one.name: one.result.encoder for one in systems}
    kinds: list[tuple[Literal["random weights", "embedded model"], str, list[str]]] = [
        (
            "random weights",
            RANDOM_NOTICE,
            [n for n, one in used.items() if one.seed is not None or (n in made_by and made_by[n].random_weights)],
        ),
        (
            "embedded model",
            EMBEDDED_NOTICE,
            [n for n, one in used.items() if one.model == "embedded" or (n in made_by and made_by[n].embedded)],
        ),
    ]
    return [
        Notice(
            kind=kind,
            text=text
            + ("" if len(systems_concerned) == len(used) else f" This concerns only {', '.join(systems_concerned)}."),
        )
        for kind, text, systems_concerned in kinds
        if systems_concerned
    ]


def _definitions(settings: ZsadSettings) -> dict[str, str]:
    return definitions_shown(settings.evaluation) | {
        "Papers": f"{ANOMALY_CLIP} (ICLR 2024). {DUAL_IMAGE} (2024). {SEGMENTATION} (VAND challenge 2023).",
        "Rank": (
            "The best figure of a column is bold, the second is underlined. Figures that are printed the same have "
            "the same rank. A mean over fewer categories than others is marked and has no rank. Published rows have "
            "no rank."
        ),
        "DeLong's test": (
            "Test of the difference of two systems' image AUROC, mean over seeds and categories, on images that both "
            "scored (DeLong et al. 1988). It tests whether the difference would also appear on other images of these "
            f"categories, with the same seeds. It needs at least {MIN_IMAGES} images of each class."
        ),
        "Wilcoxon's test": (
            "Signed-rank test of two systems' figures by category, means over seeds (Wilcoxon 1945). It tests whether "
            f"the difference would also appear on other categories. It needs at least {MIN_CATEGORIES} categories."
        ),
        "Holm's correction": (
            "Correction of the p-values for the number of pairs in a table (Holm 1979). If pairs with p below 0.05 "
            "count as different, the chance of one or more false findings in the table is at most 5 %."
        ),
    }
