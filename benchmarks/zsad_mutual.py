"""(h) of `benchmarks/zsad.py`: mutual scoring, compared with a loop over all ordered pairs, and its peak memory."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.nn import functional

from benchmarks.zsad_memory import LIMIT, in_new_process, peak_bytes
from benchmarks.zsad_timing import Plan, Row, row_at_least, time_alternately, timer
from zsad.scorers.musc.mutual import mutual_scores

NEAREST_SHARE = 0.3
MIN_SPEEDUP = 2.5


def draw_patches(grid: int, width: int, device: torch.device, number: int) -> Float32[Tensor, "P D"]:
    """Return L2-normalised patches of one image. They are generated at each call, so a set needs no memory."""
    generator = torch.Generator().manual_seed(number)
    return functional.normalize(torch.randn(grid**2, width, generator=generator), dim=-1).to(device)


def score_all_pairs(images: list[Tensor]) -> list[Tensor]:
    """Score each image against each other image, one pair at a time, with distances of `torch.cdist`."""
    count = max(1, int(NEAREST_SHARE * (len(images) - 1)))
    scores = []
    for i, query in enumerate(images):
        least = [torch.cdist(query, other).min(1).values for j, other in enumerate(images) if j != i]
        scores.append(torch.stack(least, 1).topk(count, largest=False).values.mean(1))
    return scores


def peak_of_scoring(count: int, grid: int, width: int, batch: int, threads: int) -> int:
    """Return the peak memory while `count` images score each other. The scores are not stored."""
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    read = partial(draw_patches, grid, width, cpu)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    for _ in mutual_scores(read, [grid**2] * count, NEAREST_SHARE, batch, cpu):
        pass
    return peak_bytes()


def time_mutual(plan: Plan) -> list[Row]:
    """Measure the time from features in memory to scores, and the peak memory with generated features."""
    grid, width, device = plan.mutual_grid, plan.mutual_width, plan.device
    few, many = plan.mutual_memory_images
    # measured first, while no set is in memory
    peaks = {
        count: in_new_process(peak_of_scoring, count, grid, width, plan.batch, plan.threads) for count in (few, many)
    }
    images = [draw_patches(grid, width, device, number) for number in range(plan.mutual_images)]
    sizes = [grid**2] * len(images)

    def ours() -> dict[int, Tensor]:
        return dict(mutual_scores(images.__getitem__, sizes, NEAREST_SHARE, plan.batch, device))

    scores = ours()
    difference = max(float((scores[i] - other).abs().max()) for i, other in enumerate(score_all_pairs(images)))
    assert difference < 1e-4, f"not the same scores: they differ by {difference}"
    loop = partial(score_all_pairs, images)
    compared = time_alternately(timer(loop, device), timer(ours, device), plan.repeats, warm=False)
    theirs, mine = (statistics.median(seconds) for seconds in (compared.first, compared.second))
    size = f"{grid} x {grid} patches x {width}"
    what = f"loop over all ordered pairs / mutual scoring, {device.type}"
    detail = (
        f"{len(images)} images of {size}: ours {mine:.2f} s, {plan.batch} images at a time, loop {theirs:.2f} s; "
        f"scores agree to {difference:.0e}"
    )
    beyond = {count: peak - 4 * count * (count - 1) * grid**2 for count, peak in peaks.items()}
    ratio = beyond[many] / beyond[few]
    memory = (
        f"resident MB, Python and torch included: {peaks[few] / 1e6:.0f} -> {peaks[many] / 1e6:.0f}, of it one cosine "
        f"a patch and other image: {(peaks[few] - beyond[few]) / 1e6:.0f} -> {(peaks[many] - beyond[many]) / 1e6:.0f}; "
        f"{size}, {plan.batch} images at a time"
    )
    return [
        row_at_least("h", what, compared, MIN_SPEEDUP, detail),
        Row(
            "h",
            f"peak memory of {many} images / {few}, mutual scoring, beyond the stored cosines",
            ratio,
            "x",
            f"<= {LIMIT}",
            ratio <= LIMIT,
            memory,
        ),
    ]
