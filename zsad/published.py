"""What papers print for MVTec AD and VisA: rows for the report, each with its paper and table. None is our result.

All figures are means over the benchmark's categories (15 and 12), in percent, as printed. The papers' F1max is taken at
the best threshold in hindsight, as ours is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zsad.config import Variant

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
"""The benchmark's categories; a mean over others does not compare with the published one."""

TEST_IMAGES: dict[Benchmark, int] = {"mvtec": 1725, "visa": 2162}
"""In all categories together; VisA's by its one-class split (962 normal, 1,200 anomalous)."""

TITLES: dict[Benchmark, str] = {"mvtec": "MVTec AD", "visa": "VisA"}

METHOD_MODEL, METHOD_TAG = "ViT-B-16-plus-240", "laion400m_e32"
"""open_clip's name of the encoder behind the Dual-Image rows."""
METHOD_SEEDS = 6
"""Of the Dual-Image rows."""

DUAL_IMAGE = "Zhang et al., Dual-Image Enhanced CLIP"
ANOMALY_CLIP = "Zhou et al., AnomalyCLIP"
SEGMENTATION = "Baugh et al., Zero-Shot AD with Pre-trained Segmentation Models"
MUSC = "Li et al., MuSc"


@dataclass(frozen=True)
class Quoted:
    """A printed figure in percent, with its standard deviation where the paper gives one."""

    mean: float
    sd: float | None = None


@dataclass(frozen=True)
class PublishedRow:
    """A system's row in a paper's table. None: the paper prints no such figure."""

    system: str
    variant: Variant | None
    """Our variant that the row is the published figure of; None for other systems."""
    paper: str
    table: str
    image_auroc: Quoted | None
    image_f1max: Quoted | None
    image_ap: Quoted | None
    pixel_auroc: Quoted | None
    pixel_f1max: Quoted | None
    aupro: Quoted | None
    """The papers' PRO: FPR up to 0.3, mostly by the loop over 200 thresholds (our `pro_200`)."""


def published_rows(benchmark: Benchmark) -> tuple[PublishedRow, ...]:
    """The rows for a benchmark: the Dual-Image rows first, then the other systems in the order of their papers."""
    return _MVTEC if benchmark == "mvtec" else _VISA


def published_row(benchmark: Benchmark, variant: Variant) -> PublishedRow | None:
    """The published figures of one of our variants, or None: no paper printed them."""
    return next((row for row in published_rows(benchmark) if row.variant == variant), None)


def _row(system: str, variant: Variant | None, paper: str, table: str, *figures: float | str | None) -> PublishedRow:
    """Figures in the order of PublishedRow: a number, text as "92.8 ± 0.2", or None."""

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

# columns: image AUROC, F1max, AP; pixel AUROC, F1max, PRO. Table 3's ticks read: none, adaptation, reference, both
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
