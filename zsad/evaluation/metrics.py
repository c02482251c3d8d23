"""How well scores and maps agree with the truth: exact, with ties, and streaming over images.

Two passes over the maps. The first keeps the anomalous pixels, each with its region's size; the second sorts all
pixels in chunks of bounded size and counts how many lie at and above each score of an anomalous one. Memory is bounded
by the anomalous pixels. Whole numbers are counted and sums run in an order that the scores alone set, so the order of
images and the chunks change nothing, not even the last bit.
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
"""Pixels sorted at a time by a thread: 32 MiB. Smaller chunks take longer: each is searched for all thresholds."""
THRESHOLDS_PER_SEARCH = 1 << 13
"""Thresholds looked up at a time, in their own part of a chunk: what a thread makes of them stays in its cache."""
COUNTING_THREADS = 2
"""Chunks sorted beside each other; one more is being filled."""
PRO_200_STEPS = 200
PRO_200_MAX_FPR = 0.3

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Maps = Callable[[], Iterable[tuple[Float[np.ndarray, "H W"], Bool[np.ndarray, "H W"]]]]
"""Gives the maps with their masks, image by image, anew at each call and the same each time."""

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImageMetrics(_Record):
    """Does an image's score tell whether it shows an anomaly? Higher is better; see `definitions`."""

    auroc: Unit | None
    ap: Unit | None
    f1max: Unit | None
    f1max_threshold: float | None
    """Oracle threshold: chosen with the labels; images with score >= it are called anomalous."""
    n_normal: Count
    n_anomalous: Count


class PixelMetrics(_Record):
    """Does a map show where the anomaly is? Higher is better; see `definitions`."""

    auroc: Unit | None
    ap: Unit | None
    f1max: Unit | None
    f1max_threshold: float | None
    """Oracle threshold on the map, as in `ImageMetrics`."""
    aupro: Unit | None
    max_fpr: Unit
    """Where AUPRO's integral ends."""
    pro_200: Unit | None
    """None also where it was not asked for."""
    n_images: Count
    n_normal_px: Count
    n_anomalous_px: Count
    n_regions: Count


@dataclass(frozen=True)
class PixelCurves:
    """Pixel metrics with the counts they come from, to draw curves."""

    metrics: PixelMetrics
    counts: Counts


def image_metrics(scores: Float64[np.ndarray, " n"], anomalous: Bool[np.ndarray, " n"]) -> ImageMetrics:
    """Metrics of image scores (higher: more anomalous).

    One class only, or no image: AUROC is None. No anomalous image: AP and F1max are None as well. Raises ValueError
    for a score that is NaN or infinite.
    """
    counts = curves.count(scores, anomalous)
    best = curves.f1_max(counts)
    return ImageMetrics(
        auroc=curves.auroc(counts),
        ap=curves.average_precision(counts),
        f1max=best[0] if best else None,
        f1max_threshold=best[1] if best else None,
        n_normal=counts.negatives,
        n_anomalous=counts.positives,
    )


def pixel_metrics(source: Maps, *, max_fpr: float = 0.3, pro_200: bool = False) -> PixelMetrics:
    """Metrics over all pixels of all images together; see `pixel_curves`."""
    return pixel_curves(source, max_fpr=max_fpr, pro_200=pro_200).metrics


def pixel_curves(
    source: Maps, *, max_fpr: float = 0.3, pro_200: bool = False, chunk_pixels: int = CHUNK_PIXELS
) -> PixelCurves:
    """Metrics over all pixels of all images together, and their counts.

    Parameters
    ----------
    source
        Maps with their masks; called twice. A map's values are finite and of any range; its mask has its shape.
    max_fpr
        Where AUPRO's integral ends.
    pro_200
        Whether to compute it too.
    chunk_pixels
        Pixels sorted at a time; changes no figure.

    Returns
    -------
    No anomalous pixel: all figures are None. No normal pixel: AUROC, AUPRO and pro_200 are None.

    Raises
    ------
    ValueError
        A value that is NaN or infinite, a mask of another shape, or a source that differs at its second call.
    """
    first = _AnomalousPixels.collect(source())
    # the thresholds of pro_200 are looked up with the rest, so that there is one pass for all
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


def definitions(max_fpr: float) -> dict[str, str]:
    """What each figure means, when it is undefined, one text a metric."""
    return {
        "auroc": (
            "Probability that an anomalous image (pixel) scores higher than a normal one, ties counting half. "
            "Undefined unless there are both."
        ),
        "ap": (
            "Average precision: the sum of precision times rise of recall over all distinct scores, not the trapezoid. "
            "Undefined without anomalous images (pixels)."
        ),
        "f1max": (
            "Largest F1 over all thresholds. The oracle threshold that gives it is chosen with the labels, so no "
            "deployed system reaches it but by luck. Undefined without anomalous images (pixels)."
        ),
        "aupro": (
            "Area under the mean share of each defect found against the false positive rate, up to a rate of "
            f"{max_fpr:g} and divided by it. A defect is an 8-connected region of a mask at evaluation size; each "
            "counts the same whatever its area. The curve starts at (0, 0) and is interpolated at its end."
        ),
        "pro_200": (
            "The same from 200 evenly spaced thresholds, false positive rates below 0.3 stretched to 0..1, as many "
            "papers compute it. Comparable with them, but it depends on the range of the scores."
        ),
        "mean": "Means over categories are means of their figures; pixels of several categories are never pooled.",
    }


@dataclass(frozen=True)
class _AnomalousPixels:
    """Result of the first pass."""

    scores: Float[np.ndarray, " p"]
    """Of every anomalous pixel, in order of images."""
    sizes: Int64[np.ndarray, " p"]
    """Pixels of the region that each belongs to."""
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
                # NaN runs through both; infinities are an extreme
                if not (np.isfinite(least) and np.isfinite(most)):
                    raise ValueError("a map holds NaN or infinite values")
                low, high = min(low, least), max(high, most)
                images, pixels = images + 1, pixels + scored.size
                # of an image without anomaly the type alone
                scores.append(scored[mask] if mask.any() else np.empty(0, dtype=scored.dtype))
                if scores[-1].size:
                    running.append(pool.submit(_region_sizes, mask))
                    if len(running) > 2 * COUNTING_THREADS:
                        regions += finish_oldest()
            while running:
                regions += finish_oldest()
        return cls(np.concatenate(scores), np.concatenate(sizes), regions, images, pixels, low, high)

    def by_score(self) -> tuple[Float[np.ndarray, " k"], Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
        """Distinct scores, falling; anomalous pixels at each and above; the regions' mean share at each and above."""
        # equal scores are ordered by size, so that the sum of weights rounds the same whatever the order of images
        if self.dtype == np.float32:
            # one sort of whole numbers: the score's bits, made to rise with it, above the size's
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
        """The literature's linear thresholds, rising, rounded down to the maps' type: x > t is unchanged by that."""
        if not self.high > self.low:
            return np.empty(0, dtype=self.dtype)
        exact = np.arange(self.low, self.high, (self.high - self.low) / PRO_200_STEPS)
        rounded = exact.astype(self.dtype)
        return np.where(rounded > exact, np.nextafter(rounded, np.array(-np.inf, self.dtype)), rounded)


def _region_sizes(mask: Bool[np.ndarray, "H W"]) -> tuple[Int64[np.ndarray, " p"], int]:
    """For each True pixel (one at least), row by row, the area of its 8-connected region; and the number of regions."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    # defects are small: the rest of the image has no label to give
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels, found = ndimage.label(mask, structure=_EIGHT_CONNECTED)
    own = labels[mask]
    return np.bincount(own, minlength=found + 1)[own].astype(np.int64), int(found)


def _count_at_thresholds(
    maps: Iterable[tuple[NDArray[Any], NDArray[np.bool_]]],
    steps: Float[np.ndarray, " t"],
    first: _AnomalousPixels,
    chunk_pixels: int,
) -> tuple[
    tuple[Float[np.ndarray, " k"], Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]],
    tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"], Int64[np.ndarray, " t"]],
]:
    """`first.by_score()`, and of all pixels: how many are >= and how many > each score, how many > each step (rising).

    Chunks are sorted and searched on several threads (NumPy lets go of Python's lock there), each in a buffer that the
    next chunk takes over; the first ones are sorted while the scores are still being put in order. Whole numbers are
    added, so their order changes nothing.
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

    # chunks of one size, so that the threads end together
    size = -(-first.pixels // max(1, -(-first.pixels // chunk_pixels)))
    buffers = [np.empty(size, dtype=first.dtype)]
    running: deque[tuple[Future[None], NDArray[Any]]] = deque()
    filled = seen = 0
    with ThreadPoolExecutor(COUNTING_THREADS) as pool:
        ordered = pool.submit(sort_scores)  # before every chunk, so that none can wait for it in vain

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
        raise ValueError(f"the maps had {first.pixels} pixels at first and {seen} when asked again")
    by_score, _, at, above = ordered.result()
    return by_score, (at[::-1].copy(), above[::-1].copy(), above_steps)


def _count_below(
    ordered: Shaped[np.ndarray, " n"], wanted: Float[np.ndarray, " k"]
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """How many of the rising values are < and how many are <= each one wanted (rising, all different)."""
    left = ordered.searchsorted(wanted, side="left")
    if not ordered.size:
        return left, left
    # few of those wanted equal a value, fewer still more than one: the right end is searched for those
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
    """The literature's AUPRO: 200 linear thresholds, rates below 0.3 only, stretched to 0..1.

    None where that loop has no answer: no region, no normal pixel, a constant map, or one rate alone below 0.3.
    """
    if not counts.positives or not counts.negatives or not steps.size:
        return None
    # how many of the falling distinct scores lie above each step; nothing above: overlap 0
    higher = counts.thresholds.size - np.searchsorted(counts.thresholds[::-1], steps, side="right")
    pro = np.concatenate([[0.0], overlap])[higher]
    fpr = (above_steps - np.concatenate([[0], counts.true_positives])[higher]) / counts.negatives
    inside = fpr < PRO_200_MAX_FPR
    fpr, pro = fpr[inside], pro[inside]
    if not fpr.size or fpr.max() == fpr.min():
        return None
    fpr = (fpr - fpr.min()) / (fpr.max() - fpr.min())
    # the rates fall as the thresholds rise
    return min(1.0, max(0.0, -float(np.trapezoid(pro, fpr))))
