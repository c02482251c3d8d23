"""(c) of `benchmarks/zsad.py`: all metrics, compared with only anomalib's AUPRO."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32
from scipy import ndimage
from torch.nn import functional

from benchmarks.anomalib_client import Anomalib, skipped_row
from benchmarks.zsad_timing import Plan, Row, row_at_least, time_alternately, timer
from zsad.evaluation.metrics import ImageMetrics, PixelMetrics, image_metrics, pixel_metrics


@dataclass(frozen=True)
class LabelledMaps:
    maps: Float32[np.ndarray, "n H W"]
    masks: Bool[np.ndarray, "n H W"]

    @classmethod
    def generate(cls, count: int, side_px: int) -> LabelledMaps:
        """Generate maps of upsampled patches. Three of five have one to three defects."""
        rng = np.random.default_rng(0)
        grid = max(4, side_px // 14)
        rows, columns = np.mgrid[:side_px, :side_px] / side_px
        masks = np.zeros((count, side_px, side_px), bool)
        for number in range(count * 3 // 5):
            for _ in range(rng.integers(1, 4)):
                (y, x), (a, b) = rng.uniform(0.1, 0.9, 2), rng.uniform(0.03, 0.15, 2)
                masks[number] |= ((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 < 1
        shown = functional.interpolate(torch.from_numpy(masks)[:, None].float(), size=(grid, grid), mode="area")
        noise = ndimage.gaussian_filter(rng.normal(0, 1, (count, grid, grid)), (0, 1, 1))
        patches = torch.sigmoid(torch.from_numpy(2 * noise).float() + 1.5 * shown[:, 0] - 1)
        maps = functional.interpolate(patches[:, None], size=(side_px, side_px), mode="bilinear")[:, 0]
        return cls(np.ascontiguousarray(maps.numpy()), masks)


def all_metrics(made: LabelledMaps) -> tuple[ImageMetrics, PixelMetrics]:
    """Compute all metrics of the product."""
    scores = made.maps.max(axis=(1, 2)).astype(np.float64)
    image = image_metrics(scores, np.asarray(made.masks.any(axis=(1, 2))))
    return image, pixel_metrics(lambda: zip(made.maps, made.masks, strict=True), pro_200=True)


def time_metrics(plan: Plan, anomalib: Anomalib | None, folder: Path) -> list[Row]:
    made = LabelledMaps.generate(plan.maps, plan.map_px)
    size = f"{plan.maps} maps of {plan.map_px} px, {100 * made.masks.mean():.1f} % of pixels anomalous"
    what = "only anomalib's AUPRO / all our metrics"
    cpu = torch.device("cpu")
    ours = timer(lambda: all_metrics(made), cpu)
    if anomalib is None:
        ours()
        seconds = statistics.median(ours() for _ in range(plan.repeats))
        row = skipped_row("c", what, ">= 20")
        return [replace(row, detail=f"{row.detail}; {size}: ours {seconds:.3f} s with pro_200")]
    np.save(folder / "maps.npy", made.maps)
    np.save(folder / "masks.npy", made.masks)
    anomalib.ask("load_maps", maps=str(folder / "maps.npy"), masks=str(folder / "masks.npy"))
    found: list[float] = []

    def theirs() -> float:
        reply = anomalib.ask("aupro")
        found.append(reply["value"])
        return float(reply["seconds"])

    compared = time_alternately(theirs, ours, plan.repeats)
    aupro = all_metrics(made)[1].aupro
    assert aupro is not None
    other, mine = (statistics.median(seconds) for seconds in (compared.first, compared.second))
    difference = max(abs(value - aupro) for value in found)
    return [
        row_at_least("c", what, compared, 20, f"{size}: ours {mine:.3f} s with pro_200, anomalib {other:.2f} s"),
        Row(
            "c",
            "AUPRO, ours - anomalib's",
            difference,
            "",
            "<= 1e-5",
            difference <= 1e-5,
            f"ours {aupro:.7f}, anomalib {found[-1]:.7f}",
        ),
    ]
