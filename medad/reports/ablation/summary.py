"""Document of an ablation from its results: statistics over seeds, paired tests, baseline, curve, embedding."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medad.base.settings import MACHINE_FIELDS
from medad.base.text import hide_paths, natural_order
from medad.cohort.samples import PHANTOM_NOTE
from medad.config.ablation import ROWS, AblationSettings, PublishedFigures, Variant
from medad.evaluation.metric_rows import definitions
from medad.reporting.failures import failure_rows
from medad.reporting.paired_tests import PairedOutcome, paired_t
from medad.reporting.results_table import corrected
from medad.reports.ablation.data import mean_over_seeds, read_seeds, results_of
from medad.reports.ablation.document import (
    CASE_FIGURES,
    FIGURES,
    KIND,
    SCHEMA_VERSION,
    AblationDocument,
    BaselineReport,
    CurvePoint,
    CurveReport,
    EmbeddedSlices,
    EmbeddingReport,
    PairedTable,
    PairedTest,
    RowReport,
    SweepReport,
)
from medad.reports.run.document import (
    INSERTED_GENERATED,
    INSERTED_REAL,
    INSERTED_STATEMENT,
    STATEMENT,
    Inserted,
)
from medad.steps import baseline as baseline_step
from medad.steps.embedding import KINDS, principal_components, read_features
from medad.steps.results import AblationResults, VariantResult

BEST_BY = "micro_dice_2d"


def make_document(
    settings: AblationSettings,
    results: AblationResults[Path],
    *,
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> AblationDocument:
    """Return the content of the report. Raises InputError if a result's file is missing or damaged."""
    by_name = {(one.group, one.name): one for one in results.variants}
    reports = {
        (variant.group, variant.name): _row_report(variant, settings, by_name.get((variant.group, variant.name)))
        for variant in settings.variants()
    }
    rows = tuple(reports[ROWS, row.name] for row in settings.selected_rows)
    sweeps = tuple(
        SweepReport(
            name=sweep.name,
            label=sweep.label,
            key=sweep.key,
            rows=tuple(reports[sweep.name, str(value)] for value in sweep.values),
        )
        for sweep in settings.selected_sweeps
    )
    base = settings.base_settings()
    return AblationDocument(
        schema_version=SCHEMA_VERSION,
        kind=KIND,
        name=settings.name,
        statement=STATEMENT,
        inserted=_inserted(settings, results, notes),
        notes=tuple(hide_paths(note) for note in notes),
        seeds=settings.seeds,
        figures=FIGURES,
        rows=rows,
        baseline=_baseline(settings, results),
        published_rows=settings.published_rows,
        paired=paired_tables(rows, settings.reference),
        sweeps=sweeps,
        curve=_curve(settings, results),
        embedding=_embedding(results),
        failures=failure_rows(
            results.failures, hide_files=base.test_data.pseudonyms or base.train_data.pseudonyms, group="row"
        ),
        definitions=definitions(base.evaluation) | _definitions(settings),
        settings=shown_settings(settings),
        versions={name: hide_paths(versions[name]) for name in sorted(versions)},
    )


def paired_tables(rows: Sequence[RowReport], reference: str | None) -> tuple[PairedTable, ...]:
    """Return paired t-tests between consecutive rows, and of each row against the reference.

    Without a reference, the row with the best micro Dice is used. Pairing by seed uses each seed's metric over its
    cases. Pairing by case uses each case's mean over the seeds that both rows have. A case thus counts once for any
    number of seeds. Holm's correction covers the pairs of one table.
    """
    with_figures = [row for row in rows if row.seeds]
    best = max(with_figures, key=_mean_dice, default=None)
    chosen = next((row for row in with_figures if row.name == reference), best)
    if chosen is None:
        return ()
    pairs = list(zip(with_figures[1:], with_figures, strict=False))
    compared = {frozenset((a.name, b.name)) for a, b in pairs}
    pairs += [(row, chosen) for row in with_figures if row is not chosen and {row.name, chosen.name} not in compared]
    results = results_of({row.name: row.seeds for row in with_figures})
    tables = []
    for figure in CASE_FIGURES:
        by_seed = [(a, b, paired_t(results.by_seed(a.name, figure), results.by_seed(b.name, figure))) for a, b in pairs]
        tables.append(PairedTable(figure=figure, paired_by="seed", reference=chosen.name, pairs=_tests(by_seed)))
        by_case = [(a, b, paired_t(*_by_case(a, b, figure))) for a, b in pairs]
        if any(outcome.n > 1 for *_, outcome in by_case):
            tables.append(PairedTable(figure=figure, paired_by="case", reference=chosen.name, pairs=_tests(by_case)))
    return tuple(tables)


def shown_settings(settings: AblationSettings) -> dict[str, Any]:
    """Return the settings that determine results as JSON values, without private values."""
    return settings.public(*MACHINE_FIELDS) | {"base": settings.base.public(*MACHINE_FIELDS)}


def _row_report(variant: Variant, settings: AblationSettings, result: VariantResult[Path] | None) -> RowReport:
    seeds = () if result is None else read_seeds(result.seeds)
    present = {one.seed for one in seeds}
    return RowReport(
        name=variant.name,
        label=variant.label,
        changes=_changes(variant, settings),
        seeded=True,
        seeds=seeds,
        missing_seeds=tuple(seed for seed in settings.seeds if seed not in present),
        stats=mean_over_seeds(seeds),
        published=_published(variant, settings),
    )


def _changes(variant: Variant, settings: AblationSettings) -> dict[str, Any]:
    row = variant.name
    for sweep in settings.sweeps:
        if variant.group == sweep.name:
            return {sweep.key: variant.name}
    return next((one.public()["set"] for one in settings.rows if one.name == row), {})


def _published(variant: Variant, settings: AblationSettings) -> PublishedFigures | None:
    if variant.group == ROWS:
        return next((row.published for row in settings.rows if row.name == variant.name), None)
    for sweep in settings.sweeps:
        if sweep.name == variant.group and sweep.published:
            return dict(zip(map(str, sweep.values), sweep.published, strict=True))[variant.name]
    return None


def _mean_dice(row: RowReport) -> float:
    stat = row.stats[BEST_BY]
    return -1.0 if stat is None else stat.mean


def _by_case(a: RowReport, b: RowReport, figure: str) -> tuple[dict[str, float | None], dict[str, float | None]]:
    seeds = {one.seed for one in a.seeds} & {one.seed for one in b.seeds}

    def case_means(row: RowReport) -> dict[str, float | None]:
        values: dict[str, list[float | None]] = {}
        for one in row.seeds:
            for case in one.cases if one.seed in seeds else ():
                values.setdefault(case.case_id, []).append(getattr(case, CASE_FIGURES[figure]))
        defined = {case: [value for value in found if value is not None] for case, found in values.items()}
        return {case: statistics.fmean(found) if len(found) == len(seeds) else None for case, found in defined.items()}

    return case_means(a), case_means(b)


def _tests(outcomes: Sequence[tuple[RowReport, RowReport, PairedOutcome]]) -> tuple[PairedTest, ...]:
    return tuple(
        PairedTest(
            a=a.name,
            b=b.name,
            difference=outcome.difference,
            sd=outcome.sd,
            t=outcome.t,
            p=outcome.p,
            p_holm=p_holm,
            n=outcome.n,
            reason=outcome.reason,
        )
        for a, b, outcome, p_holm in corrected(outcomes)
    )


def _inserted(settings: AblationSettings, results: AblationResults[Path], notes: Sequence[str]) -> Inserted:
    inserted = bool(results.inserted) or settings.base_settings().test_data.insert is not None
    tag = INSERTED_GENERATED if PHANTOM_NOTE in notes else INSERTED_REAL
    return Inserted(
        any=inserted,
        tag=tag if inserted else None,
        statement=f"{tag[0].upper()}{tag[1:]}. {INSERTED_STATEMENT}" if inserted else None,
        cases=tuple(sorted(set(results.inserted), key=natural_order)),
    )


def _baseline(settings: AblationSettings, results: AblationResults[Path]) -> BaselineReport | None:
    if not results.baseline:
        return None
    seeds = read_seeds({0: results.baseline})
    row = RowReport(
        name="baseline",
        label=f"HU baseline, {settings.baseline_sigma_mm:g} mm",
        changes={},
        seeded=False,
        seeds=seeds,
        missing_seeds=(),
        stats=mean_over_seeds(seeds),
        published=None,
    )
    return BaselineReport(sigma_mm=settings.baseline_sigma_mm, row=row)


def _curve(settings: AblationSettings, results: AblationResults[Path]) -> CurveReport | None:
    if settings.curve is None or not results.snapshots:
        return None
    points = []
    present: set[int] = set()
    for snapshot in sorted(results.snapshots, key=lambda one: one.epochs):
        seeds = read_seeds(snapshot.seeds)
        present |= {one.seed for one in seeds}
        points.append(CurvePoint(epochs=snapshot.epochs, stats=mean_over_seeds(seeds)))
    missing = tuple(seed for seed in settings.seeds if seed not in present)
    return CurveReport(row=settings.curve.row or "", points=tuple(points), missing_seeds=missing)


def _embedding(results: AblationResults[Path]) -> EmbeddingReport | None:
    if results.embedding is None:
        return None
    features = read_features(results.embedding.folder)
    plane, explained = principal_components(np.concatenate([features[kind] for kind in KINDS]).astype(np.float64))
    ends = np.cumsum([len(features[kind]) for kind in KINDS])[:-1]
    parts = np.split(np.round(plane, 6), ends)
    return EmbeddingReport(
        row=results.embedding.row,
        seed=results.embedding.seed,
        explained=explained,
        slices=tuple(
            EmbeddedSlices(kind=kind, x=tuple(part[:, 0].tolist()), y=tuple(part[:, 1].tolist()))
            for kind, part in zip(KINDS, parts, strict=True)
        ),
    )


def _definitions(settings: AblationSettings) -> dict[str, str]:
    found = {
        "mean_and_sd": (
            "Mean and sample standard deviation (ddof = 1) over seeds, of each seed's result over all test cases. A "
            "single seed has no standard deviation."
        ),
        "paired_t_test": (
            "Two-sided paired t-test (Student 1908): t = mean of the differences / (their sd / sqrt(n)), where n is "
            "the number of pairs. Pairing by seed asks if other trainings would show the difference too. Pairing by "
            "case uses each case's mean over seeds and asks if other patients would. A small p speaks against equal "
            "rows. p Holm is corrected over the pairs of its table (Holm 1979). Undefined below two pairs."
        ),
        "published": "Value printed in the named source, on its own data. It is not used in any test or mean.",
    }
    if settings.baseline:
        found["hu_baseline"] = baseline_step.DEFINITION.format(sigma=settings.baseline_sigma_mm)
    return found
