"""Published figures: rows for the reports, each with its paper and table. They are not our results.

All figures are in percent, as printed. They are means over the categories of a data set unless they name a category.
The papers' F1max uses the best threshold chosen with the labels, as ours does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from zsad.config.run import Variant

Benchmark = Literal["mvtec", "visa"]

CATEGORIES: dict[Benchmark, tuple[str, ...]] = {
    "mvtec": (
        *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile"),
        *("toothbrush", "transistor", "wood", "zipper"),
    ),
    "visa": (
        *("candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3"),
        *("pcb4", "pipe_fryum"),
    ),
}
"""Categories of each benchmark. A mean over other categories is not comparable with the published mean."""

TEST_IMAGES: dict[Benchmark, int] = {"mvtec": 1725, "visa": 2162}
"""Number of test images in all categories. For VisA, this is the one-class split (962 normal, 1,200 anomalous)."""

TITLES: dict[Benchmark, str] = {"mvtec": "MVTec AD", "visa": "VisA"}

METHOD_MODEL, METHOD_TAG = "ViT-B-16-plus-240", "laion400m_e32"
"""Encoder of the Dual-Image rows, as open_clip names it."""
METHOD_SEEDS = 6
"""Number of seeds of the Dual-Image rows."""

DUAL_IMAGE = "Zhang et al., Dual-Image Enhanced CLIP"
ANOMALY_CLIP = "Zhou et al., AnomalyCLIP"
SEGMENTATION = "Baugh et al., Zero-Shot AD with Pre-trained Segmentation Models"
MUSC = "Li et al., MuSc"


@dataclass(frozen=True)
class Quoted:
    """A printed figure in percent, with its standard deviation if the paper gives one."""

    mean: float
    sd: float | None = None


@dataclass(frozen=True)
class PublishedRow:
    """Row of a system in a paper's table. Figures that the paper does not print are None."""

    system: str
    """Name of the system in the paper. In an ablation: name of the row in our table."""
    variant: Variant | None
    """Our variant that corresponds to the row. None: another system."""
    paper: str
    table: str
    image_auroc: Quoted | None
    image_f1max: Quoted | None
    image_ap: Quoted | None
    pixel_auroc: Quoted | None
    pixel_f1max: Quoted | None
    aupro: Quoted | None
    """PRO in the papers: FPR up to 0.3, mostly from 200 thresholds (our `pro_200`)."""


def published_rows(benchmark: Benchmark) -> tuple[PublishedRow, ...]:
    """Return the rows for a benchmark: the Dual-Image rows first, then the other systems in the papers' order."""
    return _MVTEC if benchmark == "mvtec" else _VISA


def published_row(benchmark: Benchmark, variant: Variant) -> PublishedRow | None:
    """Return the published figures of one of our variants. Return None if no paper prints them."""
    return next((row for row in published_rows(benchmark) if row.variant == variant), None)


@dataclass(frozen=True)
class CategoryFigures:
    """Row of a system in a table with one column per category."""

    system: str
    paper: str
    table: str
    metric: Literal["image_f1max", "pixel_f1max"]
    figures: dict[str, float]
    """Figure of each category, percent."""
    mean: float
    """Mean over the categories, as printed."""


def rows_for_comparison(benchmark: Benchmark) -> tuple[PublishedRow, ...]:
    """Return the rows for a comparison of systems.

    They are `published_rows`, the rest of the AnomalyCLIP paper's table 1, and the segmentation-model paper's means.
    """
    known = published_rows(benchmark)
    others = [row for row in anomaly_clip_rows(TITLES[benchmark]) if row.system != "AnomalyCLIP"]
    if benchmark == "visa":
        others += [_f1max_means(system) for system in ("WinCLIP", "APRIL-GAN")]
    return (*known, *others)


def anomaly_clip_rows(data_set: str) -> tuple[PublishedRow, ...]:
    """Return the six systems of the AnomalyCLIP paper on one of its 17 data sets, in the order of its tables.

    The tables are 1 and 2. Medical data sets have only image figures or only pixel figures. A system without figures is
    left out. Raise KeyError for another data set.
    """
    rows = []
    images, pixels = _ANOMALY_CLIP_IMAGES.get(data_set), _ANOMALY_CLIP_PIXELS.get(data_set)
    if images is None and pixels is None:
        raise KeyError(data_set)
    nothing: tuple[tuple[float, float] | None, ...] = (None,) * len(ANOMALY_CLIP_SYSTEMS)
    for system, image, pixel in zip(ANOMALY_CLIP_SYSTEMS, images or nothing, pixels or nothing, strict=True):
        if image or pixel:
            auroc, ap = image or (None, None)
            pixel_auroc, aupro = pixel or (None, None)
            table = "table 1" if data_set in ANOMALY_CLIP_INDUSTRIAL else "table 2"
            rows.append(_row(system, None, ANOMALY_CLIP, table, auroc, None, ap, pixel_auroc, None, aupro))
    return tuple(rows)


def category_figures() -> tuple[CategoryFigures, ...]:
    """Return F1max of three systems on each category of VisA.

    These are tables 1 (images) and 2 (pixels) of the segmentation-model paper.
    """
    return _BY_CATEGORY


def published_ablation(ablation: str) -> tuple[PublishedRow, ...]:
    """Return the dual-image paper's rows of one ablation on MVTec AD, named like our rows.

    The result is empty if the paper prints no numbers. Figures 5a and 6 print no numbers. But 0 references, 1 reference
    and 2 steps are also rows of table 3.
    """
    return _ABLATIONS.get(ablation, ())


def _f1max_means(system: str) -> PublishedRow:
    image, pixel = (
        next(one.mean for one in _BY_CATEGORY if one.system == system and one.metric == metric)
        for metric in ("image_f1max", "pixel_f1max")
    )
    return _row(system, None, SEGMENTATION, "tables 1 and 2", None, image, None, None, pixel, None)


def _row(system: str, variant: Variant | None, paper: str, table: str, *figures: float | str | None) -> PublishedRow:
    """Return a row from figures in the order of PublishedRow: a number, a text such as "92.8 ± 0.2", or None."""

    def quoted(figure: float | str | None) -> Quoted | None:
        if isinstance(figure, str):
            mean, sd = figure.split(" ± ")
            return Quoted(float(mean), float(sd))
        return None if figure is None else Quoted(figure)

    image_auroc, image_f1max, image_ap, pixel_auroc, pixel_f1max, aupro = map(quoted, figures)
    return PublishedRow(
        system, variant, paper, table, image_auroc, image_f1max, image_ap, pixel_auroc, pixel_f1max, aupro
    )


_ABLATION = (DUAL_IMAGE, "table 3 (6 seeds)")
_MAIN = (DUAL_IMAGE, "table 1")

# columns: image AUROC, F1max, AP; pixel AUROC, F1max, PRO. Rows of table 3: no part, adaptation, reference, both
_MVTEC = (
    _row(
        "text", "text", *_ABLATION, "91.6 ± 0.0", "92.9 ± 0.1", "96.4 ± 0.0", "85.3 ± 0.0", "29.1 ± 0.1", "71.8 ± 0.4"
    ),
    _row(
        *("text + adaptation", "text_tta", *_ABLATION),
        *("92.1 ± 0.3", "93.1 ± 0.2", "96.6 ± 0.1", "88.7 ± 0.2", "35.6 ± 0.2", "80.1 ± 0.4"),
    ),
    _row(
        *("Dual-image", "joint", *_ABLATION),
        *("93.1 ± 0.6", "94.0 ± 0.2", "96.6 ± 0.3", "92.6 ± 0.2", "41.8 ± 0.8", "82.6 ± 0.4"),
    ),
    # table 1 prints 42.5 for the pixel F1max
    _row(
        *("Dual-image + adaptation", "joint_tta", *_ABLATION),
        *("93.2 ± 0.8", "94.1 ± 0.2", "96.7 ± 0.4", "92.8 ± 0.2", "42.4 ± 0.7", "84.0 ± 0.4"),
    ),
    _row("CLIP", None, *_MAIN, 74.0, 88.5, 89.1, 19.5, 6.2, 1.6),
    _row("WinCLIP", None, *_MAIN, 91.8, 91.9, 96.5, 85.1, 31.7, 64.6),
    _row("AnoCLIP", None, *_MAIN, 92.5, 93.2, 96.7, 90.6, 36.5, 77.8),
    _row("MuSc-2 (one reference)", None, *_MAIN, 81.7, 89.1, 90.3, 92.4, 41.2, 76.5),
    _row("AnomalyCLIP", None, ANOMALY_CLIP, "table 1", 91.5, None, 96.2, 91.1, None, 81.4),
    _row("MuSc (whole test set)", None, MUSC, "main results", 97.8, 97.5, 99.1, 97.3, 62.6, 93.8),
)
_VISA = (
    _row("Dual-image", "joint", *_MAIN, 82.6, 81.0, 84.2, 94.8, 23.5, 78.6),
    _row("Dual-image + adaptation", "joint_tta", *_MAIN, 82.9, 80.9, 84.7, 94.2, 24.1, 79.7),
    _row("CLIP", None, *_MAIN, 59.3, 74.4, 67.0, 22.3, 1.4, 0.8),
    _row("WinCLIP", None, *_MAIN, 78.1, 79.0, 81.2, 79.6, 14.8, 59.8),
    _row("AnoCLIP", None, *_MAIN, 79.2, 79.7, 81.7, 91.4, 17.4, 75.0),
    _row("MuSc-2 (one reference)", None, *_MAIN, 69.4, 75.1, 73.3, 92.6, 26.7, 63.2),
    _row("AnomalyCLIP", None, ANOMALY_CLIP, "table 1", 82.1, None, 85.4, 95.5, None, 87.0),
    _row("MuSc (whole test set)", None, MUSC, "main results", 92.8, 89.5, 93.5, 98.8, 48.8, 92.7),
    _row("Segmentation models", None, SEGMENTATION, "tables 1 and 2", None, 81.5, None, None, 24.2, None),
)

ANOMALY_CLIP_SYSTEMS = ("CLIP", "CLIP-AC", "WinCLIP", "VAND", "CoOp", "AnomalyCLIP")
"""Systems in the AnomalyCLIP paper. VAND is APRIL-GAN. Figures of WinCLIP and VAND on MVTec AD and VisA come from their
own papers."""
ANOMALY_CLIP_INDUSTRIAL = ("MVTec AD", "VisA", "MPDD", "BTAD", "SDD", "DAGM", "DTD-Synthetic")
_Pairs = tuple[tuple[float, float] | None, ...]
_ANOMALY_CLIP_IMAGES: dict[str, _Pairs] = {
    "MVTec AD": ((74.1, 87.6), (71.5, 86.4), (91.8, 96.5), (86.1, 93.5), (88.8, 94.8), (91.5, 96.2)),
    "VisA": ((66.4, 71.5), (65.0, 70.1), (78.1, 81.2), (78.0, 81.4), (62.8, 68.1), (82.1, 85.4)),
    "MPDD": ((54.3, 65.4), (56.2, 66.0), (63.6, 69.9), (73.0, 80.2), (55.1, 64.2), (77.0, 82.0)),
    "BTAD": ((34.5, 52.5), (51.0, 62.1), (68.2, 70.9), (73.6, 68.6), (66.8, 77.4), (88.3, 87.3)),
    "SDD": ((65.7, 45.2), (65.2, 45.7), (84.3, 77.4), (79.8, 71.4), (74.9, 65.1), (84.7, 80.0)),
    "DAGM": ((79.6, 59.0), (82.5, 63.7), (91.8, 79.5), (94.4, 83.8), (87.5, 74.6), (97.5, 92.3)),
    "DTD-Synthetic": ((71.6, 85.7), (66.8, 83.2), (93.2, 92.6), (86.4, 95.0), None, (93.5, 97.0)),
    "HeadCT": ((56.5, 58.4), (60.0, 60.7), (81.8, 80.2), (89.1, 89.4), (78.4, 78.8), (93.4, 91.6)),
    "BrainMRI": ((73.9, 81.7), (80.6, 86.4), (86.6, 91.5), (89.3, 90.9), (61.3, 44.9), (90.3, 92.2)),
    "Br35H": ((78.4, 78.8), (82.7, 81.3), (80.5, 82.2), (93.1, 92.9), (86.0, 87.5), (94.6, 94.7)),
    "COVID-19": ((73.7, 42.4), (75.0, 45.9), (66.4, 42.9), (15.5, 8.5), (25.3, 9.2), (80.1, 58.7)),
}
"""Image AUROC and AP by data set, in the order of ANOMALY_CLIP_SYSTEMS."""
_ANOMALY_CLIP_PIXELS: dict[str, _Pairs] = {
    "MVTec AD": ((38.4, 11.3), (38.2, 11.6), (85.1, 64.6), (87.6, 44.0), (33.3, 6.7), (91.1, 81.4)),
    "VisA": ((46.6, 14.8), (47.8, 17.3), (79.6, 56.8), (94.2, 86.8), (24.2, 3.8), (95.5, 87.0)),
    "MPDD": ((62.1, 33.0), (58.7, 29.1), (76.4, 48.9), (94.1, 83.2), (15.4, 2.3), (96.5, 88.7)),
    "BTAD": ((30.6, 4.4), (32.8, 8.3), (72.7, 27.3), (60.8, 25.0), (28.6, 3.8), (94.2, 74.8)),
    "SDD": ((39.0, 8.9), (32.5, 5.8), (68.8, 24.2), (79.8, 65.1), (28.9, 7.1), (90.6, 67.8)),
    "DAGM": ((28.2, 2.9), (32.7, 4.8), (87.6, 65.7), (82.4, 66.2), (17.5, 2.1), (95.6, 91.0)),
    "DTD-Synthetic": ((33.9, 12.5), (23.7, 5.5), (83.9, 57.8), (95.3, 86.9), None, (97.9, 92.3)),
    # the skin data set with masks, which the paper's text calls ISIC
    "ISIC": ((33.1, 5.8), (36.0, 7.7), (83.3, 55.1), (89.4, 77.2), (51.7, 15.9), (89.7, 78.4)),
    "CVC-ColonDB": ((49.5, 15.8), (49.5, 11.5), (70.3, 32.5), (78.4, 64.6), (40.5, 2.6), (81.9, 71.3)),
    "CVC-ClinicDB": ((47.5, 18.9), (48.5, 12.6), (51.2, 13.8), (80.5, 60.7), (34.8, 2.4), (82.9, 67.8)),
    "Kvasir": ((44.6, 17.7), (45.0, 16.8), (69.7, 24.5), (75.0, 36.2), (44.1, 3.5), (78.9, 45.6)),
    "Endo": ((45.2, 15.9), (46.6, 12.6), (68.2, 28.3), (81.9, 54.9), (40.6, 3.9), (84.1, 63.6)),
    "TN3K": ((42.3, 7.3), (35.6, 5.2), (70.7, 39.8), (73.6, 37.8), (34.0, 9.5), (81.5, 50.4)),
}
"""Pixel AUROC and PRO by data set, in the order of ANOMALY_CLIP_SYSTEMS."""
ANOMALY_CLIP_DATA_SETS = (
    *ANOMALY_CLIP_INDUSTRIAL,
    *(name for name in (_ANOMALY_CLIP_IMAGES | _ANOMALY_CLIP_PIXELS) if name not in ANOMALY_CLIP_INDUSTRIAL),
)
"""All 17 data sets of the AnomalyCLIP paper's tables 1 and 2."""

_SEGMENTATION_COLUMNS = (
    *("pcb1", "pcb2", "pcb3", "pcb4", "capsules", "candle", "macaroni1", "macaroni2", "cashew", "chewinggum"),
    *("fryum", "pipe_fryum"),
)


def _segmentation_row(
    metric: Literal["image_f1max", "pixel_f1max"], system: str, mean: float, *figures: float
) -> CategoryFigures:
    table = "table 1" if metric == "image_f1max" else "table 2"
    by_category = dict(zip(_SEGMENTATION_COLUMNS, figures, strict=True))
    return CategoryFigures(system, SEGMENTATION, table, metric, by_category, mean)


_BY_CATEGORY = (
    _segmentation_row(
        "image_f1max", "WinCLIP", 79.0, 71.0, 67.1, 71.0, 74.9, 83.9, 89.4, 74.2, 69.8, 88.4, 94.8, 82.7, 80.7
    ),
    _segmentation_row(
        "image_f1max", "APRIL-GAN", 78.7, 66.9, 70.1, 66.7, 87.3, 77.6, 77.8, 71.1, 69.1, 84.8, 93.7, 91.7, 87.7
    ),
    _segmentation_row(
        *("image_f1max", "Segmentation models", 81.5),
        *(74.3, 67.1, 70.2, 87.3, 84.9, 82.1, 83.3, 76.9, 82.3, 94.4, 84.8, 90.0),
    ),
    _segmentation_row(
        "pixel_f1max", "WinCLIP", 14.8, 2.4, 4.7, 10.3, 32.0, 9.2, 22.5, 7.0, 1.0, 13.2, 41.1, 22.1, 12.3
    ),
    _segmentation_row(
        "pixel_f1max", "APRIL-GAN", 32.3, 12.5, 23.4, 21.7, 31.3, 48.5, 39.4, 35.5, 13.7, 22.9, 78.5, 29.7, 30.4
    ),
    _segmentation_row(
        *("pixel_f1max", "Segmentation models", 24.2),
        *(29.5, 11.0, 4.7, 21.7, 31.9, 20.2, 24.6, 7.2, 24.5, 63.4, 31.3, 19.6),
    ),
)

_TEXT_TTA, _JOINT_TTA = _MVTEC[1], _MVTEC[3]
_DUAL_IMAGE_MAPS, _DUAL_IMAGE_SCORES = (DUAL_IMAGE, "supplement, table 1"), (DUAL_IMAGE, "supplement, table 2")
_ABLATIONS: dict[str, tuple[PublishedRow, ...]] = {
    "references": (replace(_TEXT_TTA, system="0"), replace(_JOINT_TTA, system="1")),
    "steps": (replace(_JOINT_TTA, system="2"),),
    # lambda 1, lambda 2
    "map_weights": (
        _row("1, 0.5", None, *_DUAL_IMAGE_MAPS, None, None, None, "92.5 ± 0.2", "41.7 ± 0.8", "82.2 ± 0.3"),
        _row("1, 1", None, *_DUAL_IMAGE_MAPS, None, None, None, "92.7 ± 0.2", "42.4 ± 0.7", "83.4 ± 0.4"),
        _row("1, 1.5", None, *_DUAL_IMAGE_MAPS, None, None, None, "92.8 ± 0.2", "42.4 ± 0.7", "84.0 ± 0.4"),
        _row("2, 2", None, *_DUAL_IMAGE_MAPS, None, None, None, "92.7 ± 0.2", "42.3 ± 0.6", "84.1 ± 0.3"),
    ),
    # lambda 3, lambda 4, lambda 5
    "image_weights": (
        _row("1, 1, 1", None, *_DUAL_IMAGE_SCORES, "93.2 ± 0.8", "94.1 ± 0.2", "96.7 ± 0.4", None, None, None),
        _row("1, 1, 2", None, *_DUAL_IMAGE_SCORES, "93.1 ± 0.8", "94.0 ± 0.3", "96.8 ± 0.4", None, None, None),
        _row("1, 2, 1", None, *_DUAL_IMAGE_SCORES, "91.9 ± 0.8", "93.2 ± 0.2", "94.8 ± 0.4", None, None, None),
        _row("2, 1, 1", None, *_DUAL_IMAGE_SCORES, "93.1 ± 0.6", "94.0 ± 0.1", "96.7 ± 0.3", None, None, None),
    ),
}
ABLATION_REMARKS = {
    "references": (
        "Figure 5a of the dual-image paper prints no numbers. It shows that image and pixel AUROC rise most from 0 to "
        "1 reference, and more slowly after that. The published points here are rows of its table 3."
    ),
    "steps": (
        "Figure 6 of the dual-image paper prints no numbers. According to the paper, AUROC and PRO are best at 2 steps "
        "and fall with more steps. The published point here is a row of its table 3."
    ),
}
"""Remarks on ablations for which the dual-image paper prints no numbers."""
