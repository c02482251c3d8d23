"""Metrics of scores and maps against the ground truth: exact with ties, and streaming over images.

There are two passes over the maps. The first stores the anomalous pixels, each with the size of its region. The second
sorts all pixels in chunks of bounded size and counts the pixels at and above each score of an anomalous pixel. Memory
grows only with the anomalous pixels. Counts are whole numbers, and the order of sums depends only on the scores.
So the order of images and the chunk size do not change a single bit of the results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

from zsad.evaluation import curves
from zsad.evaluation.curves import Counts

CHUNK_PIXELS = 1 << 23
"""Number of pixels sorted at a time by a thread: 32 MiB. Smaller chunks are slower, because each
chunk is searched for all scores."""
THRESHOLDS_PER_SEARCH = 1 << 13
"""Number of thresholds searched at a time, in the matching part of a chunk, so that the results fit in the cache."""
COUNTING_THREADS = 2
"""Number of chunks sorted in parallel; one more is being filled."""
PRO_200_STEPS = 200
PRO_200_MAX_FPR = 0.3

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Maps = Callable[[], Iterable[tuple[Float[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]]]
"""Function that yields the maps with their masks, image by image. Each call yields the same."""

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImageMetrics(_Record):
    """Metrics of image scores: how well they detect anomalous images. Higher is better; see `definitions`."""

    auroc: Unit | None
    ap: Unit | None
    f1max: Unit | None
    f1max_threshold: float | None
    """Oracle threshold, chosen with the labels. Images with score >= threshold count as anomalous."""
    n_normal: Count
    n_anomalous: Count


class PixelMetrics(_Record):
    """Metrics of maps: how well they localise anomalies. Higher is better; see `definitions`."""

    auroc: Unit | None
    ap: Unit | None
    f1max: Unit | None
    f1max_threshold: float | None
    """Oracle threshold on the map; see `ImageMetrics`."""
    aupro: Unit | None
    max_fpr: Unit
    """False positive rate where AUPRO's integral ends."""
    pro_200: Unit | None
    """PRO from 200 thresholds. None: undefined or not requested."""
    n_images: Count
    n_normal_px: Count
    n_anomalous_px: Count
    n_regions: Count


@dataclass(frozen=True)
class PixelCurves:
    """Pixel metrics, and the counts to plot curves from."""

    metrics: PixelMetrics
    counts: Counts


def image_metrics(scores: Float64[np.ndarray, " n"], anomalous: Bool[np.ndarray, " n"]) -> ImageMetrics:
    """Return the metrics of image scores (higher: more anomalous).

    AUROC, AP and F1max are None if normal or anomalous images are missing. Without normal images, AP and F1max would
    be 1 for any scores. Raise ValueError for a score that is NaN or infinite.
    """
    counts = curves.count(scores, anomalous)
    best = curves.f1_max(counts) if counts.negatives else None
    return ImageMetrics(
        auroc=curves.auroc(counts),
        ap=curves.average_precision(counts) if counts.negatives else None,
        f1max=best[0] if best else None,
        f1max_threshold=best[1] if best else None,
        n_normal=counts.negatives,
        n_anomalous=counts.positives,
    )


def pixel_metrics(source: Maps, *, max_fpr: float = 0.3, pro_200: bool = False) -> PixelMetrics:
    """Return the metrics over all pixels of all images together; see `pixel_curves`."""
    return pixel_curves(source, max_fpr=max_fpr, pro_200=pro_200).metrics


def pixel_curves(
    source: Maps, *, max_fpr: float = 0.3, pro_200: bool = False, chunk_pixels: int = CHUNK_PIXELS
) -> PixelCurves:
    """Return the metrics over all pixels of all images together, and their counts.

    Parameters
    ----------
    source
        Maps with their masks; called twice. Map values are finite, in any range. A mask has the shape of its map.
    max_fpr
        False positive rate where AUPRO's integral ends.
    pro_200
        Whether to compute `pro_200` too.
    chunk_pixels
        Number of pixels sorted at a time; it does not change the results.

    Returns
    -------
    Metrics and counts. Without anomalous pixels all metrics are None; without normal ones, AUROC, AUPRO and pro_200.

    Raises
    ------
    ValueError
        A value is NaN or infinite, a mask has another shape than its map, or the second call yields other maps.
    """
    first = _AnomalousPixels.collect(source())
    # the thresholds of pro_200 are searched in the same pass as the others
    steps = first.pro_200_thresholds() if pro_200 else np.empty(0, dtype=first.dtype)
    (thresholds, tp, overlap), (at, above, above_steps) = _count_at_thresholds(source(), steps, first, chunk_pixels)
    counts = Counts(
        thresholds,
        true_positives=tp,
        false_positives=at - tp,
        false_positives_above=above - np.concatenate([[0], tp])[:-1],
        negatives=first.pixels - first.scores.size,
    )
    best = curves.f1_max(counts)
    metrics = PixelMetrics(
        auroc=curves.auroc(counts),
        ap=curves.average_precision(counts),
        f1max=best[0] if best else None,
        f1max_threshold=best[1] if best else None,
        aupro=curves.aupro(counts, overlap, max_fpr),
        max_fpr=max_fpr,
        pro_200=_pro_200(counts, overlap, steps, above_steps) if pro_200 else None,
        n_images=first.images,
        n_normal_px=counts.negatives,
        n_anomalous_px=counts.positives,
        n_regions=first.regions,
    )
    return PixelCurves(metrics, counts)


@dataclass(frozen=True)
class _AnomalousPixels:
    """Result of the first pass: the anomalous pixels."""

    scores: Float[np.ndarray, " p"]
    """Score of every anomalous pixel, in the order of the images."""
    sizes: Int64[np.ndarray, " p"]
    """Size of each pixel's region, in pixels."""
    regions: int
    images: int
    pixels: int
    low: float
    high: float

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.scores.dtype

    @classmethod
    def collect(cls, maps: Iterable[tuple[NDArray[Any], NDArray[np.bool_]]]) -> _AnomalousPixels:
        scores: list[NDArray[Any]] = [np.empty(0, dtype=np.float32)]
        sizes: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        regions = images = pixels = 0
        low, high = np.inf, -np.inf
        running: deque[Future[tuple[NDArray[np.int64], int]]] = deque()

        def finish_oldest() -> int:
            size, found = running.popleft().result()
            sizes.append(size)
            return found

        with ThreadPoolExecutor(COUNTING_THREADS) as pool:
            for scored, mask in maps:
                if scored.shape != mask.shape:
                    raise ValueError(f"a map has shape {scored.shape}, its mask {mask.shape}")
                if not scored.size:
                    raise ValueError(f"a map has shape {scored.shape}")
                least, most = float(scored.min()), float(scored.max())
                # if any value is NaN, both are NaN
                if not (np.isfinite(least) and np.isfinite(most)):
                    raise ValueError("a map has NaN or infinite values")
                low, high = min(low, least), max(high, most)
                images, pixels = images + 1, pixels + scored.size
                # an empty array keeps the type of a map without anomaly
                scores.append(scored[mask] if mask.any() else np.empty(0, dtype=scored.dtype))
                if scores[-1].size:
                    running.append(pool.submit(_region_sizes, mask))
                    if len(running) > 2 * COUNTING_THREADS:
                        regions += finish_oldest()
            while running:
                regions += finish_oldest()
        return cls(np.concatenate(scores), np.concatenate(sizes), regions, images, pixels, low, high)

    def by_score(self) -> tuple[Float[np.ndarray, " k"], Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
        """Return the distinct scores, falling, with the pixels and the regions' mean share at or above each score."""
        # equal scores are ordered by size, so the sum of weights rounds the same for any order of images
        if self.dtype == np.float32:
            # one sort of whole numbers: the upper bits rise with the score, the lower bits are the size
            bits = (self.scores + np.float32(0)).view(np.uint32)  # -0 becomes 0
            rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
            keys = rising.astype(np.uint64) << np.uint64(32) | self.sizes.astype(np.uint64)
            keys.sort()
            keys = keys[::-1]
            rising = (keys >> np.uint64(32)).astype(np.uint32)
            scores: NDArray[Any] = np.where(rising >> 31, rising ^ np.uint32(1 << 31), ~rising).view(np.float32)
            sizes = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        else:
            order = np.lexsort((self.sizes, self.scores))[::-1]
            scores, sizes = self.scores[order], self.sizes[order]
        last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if scores.size else np.empty(0, dtype=np.intp)
        share = np.cumsum(1.0 / sizes)[last] / max(self.regions, 1)
        return scores[last], (last + 1).astype(np.int64), np.minimum(share, 1.0)

    def pro_200_thresholds(self) -> Float[np.ndarray, " t"]:
        """Return the literature's linear thresholds, rising. Rounding down to the maps' type does not change x > t."""
        if not self.high > self.low:
            return np.empty(0, dtype=self.dtype)
        exact = np.arange(self.low, self.high, (self.high - self.low) / PRO_200_STEPS)
        rounded = exact.astype(self.dtype)
        return np.where(rounded > exact, np.nextafter(rounded, np.array(-np.inf, self.dtype)), rounded)


def _region_sizes(mask: Bool[np.ndarray, "H W"]) -> tuple[Int64[np.ndarray, " p"], int]:
    """Return the area of each True pixel's 8-connected region, row by row, and the number of regions (at least one)."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    # defects are small, so only their bounding box is labelled
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels, found = ndimage.label(mask, structure=_EIGHT_CONNECTED)
    region = labels[mask]
    return np.bincount(region, minlength=found + 1)[region].astype(np.int64), int(found)


def _count_at_thresholds(
    maps: Iterable[tuple[NDArray[Any], NDArray[np.bool_]]],
    steps: Float[np.ndarray, " t"],
    first: _AnomalousPixels,
    chunk_pixels: int,
) -> tuple[
    tuple[Float[np.ndarray, " k"], Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]],
    tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"], Int64[np.ndarray, " t"]],
]:
    """Return `first.by_score()`, and the numbers of pixels >= each score, > each score, and > each step (rising).

    Several threads sort and search chunks; NumPy releases Python's lock there. Buffers are reused. The first chunks are
    sorted while the scores are still being sorted. Only whole numbers are added, so the order of the threads does not
    change the result.
    """
    lock = Lock()
    above_steps = np.zeros(steps.size, dtype=np.int64)

    def sort_scores() -> tuple[
        tuple[NDArray[Any], NDArray[Any], NDArray[Any]], NDArray[Any], NDArray[np.int64], NDArray[np.int64]
    ]:
        by_score = first.by_score()
        size = by_score[0].size
        return by_score, by_score[0][::-1].copy(), np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)

    def count(chunk: Shaped[np.ndarray, " n"]) -> None:
        chunk.sort()
        _, rising, at, above = ordered.result()
        edges = [*chunk.searchsorted(rising[::THRESHOLDS_PER_SEARCH], side="left").tolist(), chunk.size]
        for number, begin in enumerate(range(0, rising.size, THRESHOLDS_PER_SEARCH)):
            some = slice(begin, begin + THRESHOLDS_PER_SEARCH)
            low, high = edges[number : number + 2]
            left, right = _count_below(chunk[low:high], rising[some])
            with lock:
                at[some] += chunk.size - low - left
                above[some] += chunk.size - low - right
        with lock:
            above_steps[:] += chunk.size - chunk.searchsorted(steps, side="right")

    # all chunks have the same size, so the threads finish together
    size = -(-first.pixels // max(1, -(-first.pixels // chunk_pixels)))
    buffers = [np.empty(size, dtype=first.dtype)]
    running: deque[tuple[Future[None], NDArray[Any]]] = deque()
    filled = seen = 0
    with ThreadPoolExecutor(COUNTING_THREADS) as pool:
        ordered = pool.submit(sort_scores)  # submitted first, because every chunk waits for it

        def flush() -> None:
            buffer = buffers.pop()
            running.append((pool.submit(count, buffer[:filled]), buffer))
            if len(running) > COUNTING_THREADS:
                counted, free = running.popleft()
                counted.result()
                buffers.append(free)
            else:
                buffers.append(np.empty(size, dtype=first.dtype))

        for scored, _ in maps:
            flat: Shaped[np.ndarray, " n"] = scored.ravel()
            seen += flat.size
            start = 0
            while start < flat.size and size:
                taken = min(size - filled, flat.size - start)
                buffers[-1][filled : filled + taken] = flat[start : start + taken]
                filled, start = filled + taken, start + taken
                if filled == size:
                    flush()
                    filled = 0
        if filled:
            flush()
        for counted, _ in running:
            counted.result()
    if seen != first.pixels:
        raise ValueError(f"the maps had {first.pixels} pixels in the first pass and {seen} in the second")
    by_score, _, at, above = ordered.result()
    return by_score, (at[::-1].copy(), above[::-1].copy(), above_steps)


def _count_below(
    ordered: Shaped[np.ndarray, " n"], wanted: Float[np.ndarray, " k"]
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Return the numbers of `ordered` values that are < and <= each wanted value (both rising, `wanted` distinct)."""
    left = ordered.searchsorted(wanted, side="left")
    if not ordered.size:
        return left, left
    # few wanted values equal a value, and very few equal several: only those need a second search
    right = left + (ordered[np.minimum(left, ordered.size - 1)] == wanted)
    tied = np.flatnonzero((right > left) & (ordered[np.minimum(right, ordered.size - 1)] == wanted))
    right[tied] = ordered.searchsorted(wanted[tied], side="right")
    return left, right


def _pro_200(
    counts: Counts,
    overlap: Float64[np.ndarray, " k"],
    steps: Float[np.ndarray, " t"],
    above_steps: Int64[np.ndarray, " t"],
) -> float | None:
    """Return the literature's AUPRO: 200 linear thresholds, only rates below 0.3, stretched to 0..1.

    None: no region, no normal pixel, a constant map, or only one rate below 0.3.
    """
    if not counts.positives or not counts.negatives or not steps.size:
        return None
    # number of distinct scores above each step; with none above, the overlap is 0
    higher = counts.thresholds.size - np.searchsorted(counts.thresholds[::-1], steps, side="right")
    pro = np.concatenate([[0.0], overlap])[higher]
    fpr = (above_steps - np.concatenate([[0], counts.true_positives])[higher]) / counts.negatives
    inside = fpr < PRO_200_MAX_FPR
    fpr, pro = fpr[inside], pro[inside]
    if not fpr.size or fpr.max() == fpr.min():
        return None
    fpr = (fpr - fpr.min()) / (fpr.max() - fpr.min())
    # the rates fall while the thresholds rise
    return min(1.0, max(0.0, -float(np.trapezoid(pro, fpr))))
