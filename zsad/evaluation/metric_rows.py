"""The metrics of image scores and maps, one row each: every table, definition and headline takes them from here."""

from __future__ import annotations

from operator import attrgetter

from medad.base.metric import Metric

PRO_200 = "pixel_pro_200"
_AUROC = (
    "Probability that an anomalous image (pixel) scores higher than a normal one; ties count half (Hanley and "
    "McNeil 1982). Higher is better; 50 % is chance. Undefined if normal or anomalous ones are missing."
)
_AP = (
    "Average precision: the precision at each distinct score, weighted by the rise in recall (as in "
    "scikit-learn). Higher is better. Undefined without anomalous images (pixels), and without normal images."
)
_F1MAX = (
    "Largest F1, the harmonic mean of precision and recall, over all thresholds (Jeong et al. 2023, WinCLIP). "
    "Higher is better. The labels select the threshold, so a real system rarely reaches this value. Undefined "
    "without anomalous images (pixels), and without normal images."
)
_AUPRO = (
    "Area under per-region overlap against the false positive rate, up to a rate of {max_fpr:g} and divided "
    "by it (Bergmann et al. 2021, MVTec AD). Higher is better. The overlap is the share of a defect's pixels "
    "found, mean over defects. A defect is an 8-connected region of a mask at evaluation size. The curve "
    "starts at (0, 0) and is interpolated at its end. Undefined without defects or without normal pixels."
)
_PRO_200 = (
    "AUPRO from 200 evenly spaced thresholds, with false positive rates below 0.3 stretched to 0..1, as in the "
    "code of many papers. Higher is better. Use it to compare with papers. It depends on the scores' range."
)

METRICS = {
    metric.key: metric
    for metric in (
        Metric("image_auroc", "image AUROC", "image", _AUROC, attrgetter("auroc"), headline=True),
        Metric("image_ap", "image AP", "image", _AP, attrgetter("ap")),
        Metric("image_f1max", "image F1max at oracle threshold", "image", _F1MAX, attrgetter("f1max")),
        Metric("pixel_auroc", "pixel AUROC", "pixel", _AUROC, attrgetter("auroc"), headline=True),
        Metric("pixel_ap", "pixel AP", "pixel", _AP, attrgetter("ap")),
        Metric("pixel_f1max", "pixel F1max at oracle threshold", "pixel", _F1MAX, attrgetter("f1max")),
        Metric("pixel_aupro", "pixel AUPRO", "pixel", _AUPRO, attrgetter("aupro"), headline=True),
        Metric("pixel_pro_200", "pixel PRO, 200 thresholds", "pixel", _PRO_200, attrgetter("pro_200")),
    )
}
"""Metrics by key, in the order of tables. `value` reads the ImageMetrics or the PixelMetrics of an evaluation.

Metrics are fractions. Undefined metrics are None and are left out of means.
"""
MEAN = "The mean of the categories' figures. Pixels of different categories are never pooled."
"""Meaning of a mean over categories."""


def shown_metrics(*, pro_200: bool) -> dict[str, str]:
    """Return the titles of a report's metrics. PRO of 200 thresholds is computed only if the settings ask for it."""
    return {key: metric.title for key, metric in METRICS.items() if pro_200 or key != PRO_200}


def definitions(max_fpr: float) -> dict[str, str]:
    """Return the definition of each metric by its title without `image` or `pixel`."""
    texts = {metric.short_title: metric.meaning.format(max_fpr=max_fpr) for metric in METRICS.values()}
    return texts | {"Mean over categories": MEAN}
