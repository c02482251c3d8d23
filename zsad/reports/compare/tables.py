"""Tables of a comparison for programs and papers: CSV rows, and LaTeX in booktabs style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from medad.base.text import escape_bad_bytes, natural_order
from medad.reporting.results_table import booktabs, latex_figure, stat_columns
from medad.reporting.seed_statistics import percent
from medad.reporting.tables import latex_escaped
from zsad.evaluation.metric_rows import METRICS, PRO_200
from zsad.reports.compare.data import LoadedSystem
from zsad.reports.compare.document import CompareDocument, MacroFigures, SystemReport
from zsad.reports.page import published_figure
from zsad.reports.published import PublishedRow

FEWER, ONE_VALUE = r"\dag", r"\ddag"


def system_rows(document: CompareDocument, systems: Sequence[LoadedSystem]) -> Iterator[dict[str, Any]]:
    """Yield systems.csv: one row per system, category and seed, with all metrics (fractions), time and memory."""
    counts = {one.name: one for one in document.categories}
    for report, loaded in zip(document.systems, systems, strict=True):
        for category, figures in report.categories.items():
            for seed, one in figures.seeds.items():
                values = one.model_dump()
                metrics = values.pop("metrics")
                cost = loaded.result.categories[category][seed].cost
                yield {
                    "system": report.name,
                    "category": category,
                    "seed": seed,
                    "seeded": int(report.seeded),
                    **{key: getattr(counts[category], key) for key in ("normal", "anomalous", "unlabelled")},
                    **{key: metrics[key] for key in METRICS},
                    **values,
                    "scoring_s": cost and cost.scoring_s,
                    "encoding_s_shared": cost and cost.encoding_s,
                    "peak_memory_bytes": cost and cost.peak_memory_bytes,
                    "encoder": report.made_by.description,
                }


def score_rows(systems: Sequence[LoadedSystem]) -> Iterator[dict[str, Any]]:
    """Yield scores.csv: one row per image, system and seed."""
    for loaded in systems:
        for category, seeds in loaded.evaluated.items():
            inputs = loaded.result.inputs.get(category)
            ids: dict[str, list[str]] = {}
            for image in inputs.images if inputs else ():
                ids.setdefault(image.sha256, []).append(escape_bad_bytes(image.id))
            for seed, evaluated in seeds.items():
                threshold = evaluated.variants[loaded.variant].threshold
                rows = [(name, one) for one in {i.sha256: i for i in evaluated.images}.values()
                        for name in ids.get(one.sha256, [one.sha256[:12]])]  # fmt: skip
                for name, one in sorted(rows, key=lambda row: natural_order(row[0])):
                    score = one.scores[loaded.variant]
                    yield {
                        "system": loaded.name,
                        "category": category,
                        "id": name,
                        "anomalous": None if one.anomalous is None else int(one.anomalous),
                        "defect": one.defect,
                        "seed": seed,
                        "score": score,
                        "threshold": threshold and threshold.value,
                        "flagged": threshold and int(score >= threshold.value),
                        "encoder": loaded.result.encoder.description,
                    }


def summary_rows(document: CompareDocument) -> Iterator[dict[str, Any]]:
    """Yield summary.csv: one row per system, with mean and sd of its macro means (fractions), and ranks."""
    for one in document.systems:
        yield {
            "system": one.name,
            "seeded": int(one.seeded),
            **_mean_columns(one.mean),
            "scoring_s_an_image": one.cost and one.cost.scoring_s_an_image,
            "peak_memory_bytes": one.cost and one.cost.peak_memory_bytes,
            "encoder": one.made_by.description,
        }


def ablation_rows(document: CompareDocument) -> Iterator[dict[str, Any]]:
    """Yield ablations.csv: one row per row of an ablation, with the figures of summary.csv."""
    for ablation in document.ablations:
        for row in ablation.rows:
            yield {
                "ablation": ablation.ablation,
                "varied": ablation.varied,
                "value": row.label,
                **_mean_columns(row.mean),
                "encoder": ablation.encoder,
            }


def paired_rows(document: CompareDocument) -> Iterator[dict[str, Any]]:
    """Yield paired.csv: one row per test and pair of systems."""
    for table in document.paired:
        for pair in table.pairs:
            yield {"test": table.test, "metric": table.metric, **pair.model_dump()}


def latex_table(document: CompareDocument, of: str) -> str:
    """Return a LaTeX table (package booktabs) with AUROC, F1max and AP of images, or AUROC, F1max and PRO of pixels.

    Each system has the mean and sd over seeds of its macro means, in percent. The best is bold, the second underlined.
    Published rows follow below a rule and have no rank.

    Parameters
    ----------
    of
        `image` or `pixel`.
    """
    pro_200 = PRO_200 in document.metrics
    third = "image_ap" if of == "image" else PRO_200 if pro_200 else "pixel_aupro"
    keys = (f"{of}_auroc", f"{of}_f1max", third)
    heads = ("AUROC", "F1max", "AP" if of == "image" else "PRO")
    ours = [_latex_row(one, keys) for one in document.systems]
    rows = [row for one in document.systems for row in one.published]
    rows += document.published.rows if document.published else ()
    printed = [line for row in rows if (line := _latex_published(row, keys, pro_200_shown=pro_200))]
    benchmark = f" Below the rule: published figures for {document.published.benchmark}." if document.published else ""
    notes = "".join(f" {latex_escaped(notice.text)}" for notice in document.notices)
    caption = (
        f"{latex_escaped(document.name)}: {of} figures in percent, mean $\\pm$ standard deviation over "
        f"{len(document.seeds)} seeds of the mean over {len(document.categories)} categories. F1max uses an oracle "
        f"threshold. ${ONE_VALUE}$: does not depend on the seed. ${FEWER}$: mean over fewer categories, not "
        f"ranked.{benchmark}{notes}"
    )
    return booktabs(caption, ("System", *heads), ours, printed)


def _mean_columns(mean: MacroFigures) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for key in METRICS:
        columns |= stat_columns(mean.metrics, [key], "seeds")
        columns |= {f"{key}_categories": mean.categories[key], f"{key}_rank": mean.ranks[key]}
    return columns


def _latex_row(one: SystemReport, keys: Sequence[str]) -> str:
    cells = []
    for key in keys:
        stat, rank = one.mean.metrics[key], one.mean.ranks[key]
        if stat is None:
            cells.append("--")
            continue
        figure, *sd = percent(stat).split(" ± ")
        figure = {1: rf"\mathbf{{{figure}}}", 2: rf"\underline{{{figure}}}"}.get(rank or 0, figure)
        mark = "" if one.mean.complete[key] else f"^{{{FEWER}}}"
        deviation = "".join(rf" \pm {value}" for value in sd)
        cells.append(f"${figure}{mark}{deviation}$")
    name = latex_escaped(one.name) + ("" if one.seeded else f"$^{{{ONE_VALUE}}}$")
    return f"{name} & {' & '.join(cells)} \\\\"


def _latex_published(row: PublishedRow, keys: Sequence[str], *, pro_200_shown: bool) -> str | None:
    """Return the row of a paper, or None if the paper prints none of these figures."""
    figures = [published_figure(row, key, pro_200_shown=pro_200_shown) for key in keys]
    if not any(figures):
        return None
    cells = [latex_figure(None, None) if one is None else latex_figure(one.mean, one.sd) for one in figures]
    name = f"\\textit{{{latex_escaped(row.system)}}} ({latex_escaped(row.paper)}, {latex_escaped(row.table)})"
    return f"{name} & {' & '.join(cells)} \\\\"
