"""The metrics of the liver flow, one row each: every table, definition and headline takes them from here."""

from __future__ import annotations

from operator import attrgetter

from medad.base.metric import Metric
from medad.config.liver import EvaluationSettings
from medad.evaluation.metrics import HISTOGRAM_BINS, LOGIT_LIMIT

_ROWS = (
    Metric(
        "micro_dice_2d",
        "micro 2-D Dice",
        "slice",
        (
            "Overlap of prediction and truth: Dice = 2 TP / (2 TP + FP + FN) (Dice 1945), from 0 to 1. TP, FP and FN "
            "are true-positive, false-positive and false-negative pixels. Higher is better. The pixels of all slices "
            "and cases are counted together on the slice grid, as in the thesis. False positives in slices without "
            "tumour count too. Undefined if truth and prediction are both empty."
        ),
        attrgetter("micro_dice_2d"),
        headline=True,
    ),
    Metric(
        "dice_3d_mean",
        "3-D Dice, mean over cases",
        "case",
        (
            "Dice of the whole mask of a case on the scan's own voxel grid, averaged over cases. Higher is better. "
            "If truth and prediction are both empty, the case counts as 1. If exactly one is empty, it counts as 0."
        ),
        attrgetter("dice_3d_mean"),
        headline=True,
    ),
    Metric(
        "dice_3d_sd",
        "3-D Dice, standard deviation over cases",
        "case",
        "Sample standard deviation (ddof = 1) of the 3-D Dice over cases. Undefined below two cases.",
        attrgetter("dice_3d_sd"),
        higher_is_better=False,
        column=False,
    ),
    Metric(
        "voxel_auroc_mean",
        "voxel AUROC in the liver",
        "voxel",
        (
            "Area under the ROC curve for tumour voxels against healthy voxels inside the liver, on the scan's grid. "
            "It is P(tumour voxel has the higher probability) + P(tie) / 2. 0.5 is chance, 1 is best; higher is "
            "better. No threshold is used. The mean is over the cases that have both kinds of voxel."
        ),
        attrgetter("voxel_auroc_mean"),
        headline=True,
    ),
    Metric(
        "voxel_auroc_pooled",
        "voxel AUROC in the liver, pooled",
        "voxel",
        (
            "Voxel AUROC over the voxels of all cases together. Higher is better. It is high only if probabilities "
            "have the same scale in all cases. It is computed from histograms of the logit "
            "({bins:,} bins from -{limit:g} to {limit:g}). Voxels in one bin count as ties."
        ),
        attrgetter("voxel_auroc_pooled"),
        column=False,
    ),
    Metric(
        "voxel_auroc_pooled_resolution",
        "resolution of the pooled voxel AUROC",
        "voxel",
        "Largest error of the pooled voxel AUROC due to these ties. Lower is better.",
        attrgetter("voxel_auroc_pooled_resolution"),
        higher_is_better=False,
        column=False,
    ),
    Metric(
        "slice_auroc",
        "slice AUROC",
        "slice",
        (
            "Area under the ROC curve for the question: does a slice contain tumour? It is P(slice with tumour scores "
            "higher than slice without) + P(tie) / 2 (Hanley and McNeil 1982). 0.5 is chance, 1 is best; higher is "
            "better. The score of a slice is its largest probability inside the liver. All slices with liver of all "
            "cases are pooled. Undefined if all slices contain tumour, or none does."
        ),
        attrgetter("slice_auroc"),
    ),
    Metric(
        "lesion_sensitivity",
        "lesion sensitivity",
        "lesion",
        (
            "Share of true lesions that are found: found / all true lesions. Higher is better. A lesion is a "
            "26-connected component. It is found if at least {overlap:.0%} of its voxels are in the "
            "predicted mask. Undefined without true lesions."
        ),
        attrgetter("lesion_sensitivity"),
    ),
    Metric(
        "false_positives_per_case",
        "false positives per case",
        "lesion",
        (
            "Number of false-positive lesions divided by the number of cases. Lower is better. A predicted lesion is "
            "a false positive if it shares no voxel with a true lesion."
        ),
        attrgetter("false_positives_per_case"),
        higher_is_better=False,
        fraction=False,
    ),
)
METRICS = {metric.key: metric for metric in _ROWS}
"""Metrics by their keys in `medad.evaluation.metrics.Summary`, in the order of tables. `value` reads a Summary."""
COLUMNS = {key: metric for key, metric in METRICS.items() if metric.column}
"""Metrics with a column in tables."""


def definitions(settings: EvaluationSettings) -> dict[str, str]:
    """Return one text per metric: its meaning, formula, direction and rule for empty masks. Keys are of `Summary`."""
    values = {"bins": HISTOGRAM_BINS, "limit": LOGIT_LIMIT, "overlap": settings.lesion_overlap}
    return {key: metric.meaning.format(**values) for key, metric in METRICS.items()}
