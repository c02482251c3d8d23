"""(b) and (c) of `benchmarks/zsad_photos.py`: mutual scoring of large sets of photographs."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.lib import format as npy

from benchmarks.photos_flow import CPU, PhotoPlan, photo_settings, run_bare
from benchmarks.zsad_images import image_key
from benchmarks.zsad_memory import in_new_process, peak_bytes
from benchmarks.zsad_timing import Row, fresh_folder, timer
from zsad.clip.encoder import Encoder
from zsad.clip.feature_store import CLASS_TOKENS, INDEX, FeatureIndex, FeatureStore, ImageRows, output_file
from zsad.config.encoder_outputs import parse_outputs
from zsad.config.settings import ZsadSettings
from zsad.scorers.musc.mutual import COSINES_BYTES, mutual_scores
from zsad.scorers.musc.score import read_patches
from zsad.scorers.musc.settings import MuSc
from zsad.steps.score import score_system

LIMIT = 2
MOST_BYTES = 2 * COSINES_BYTES
"""Limit of (c): twice the memory that the scorer allows for cosines alone."""
IMAGES_FORWARD = 16


def write_features(folder: Path, count: int, settings: ZsadSettings) -> float:
    """Write features of `count` images, random unit vectors. Return the seconds of the model's forward per image."""
    encoder = Encoder.load(settings.encoder, CPU)
    images = torch.rand(IMAGES_FORWARD, 3, encoder.size_px, encoder.size_px)
    forward = timer(partial(run_bare, encoder, torch.split(images, settings.encoder.batch_size)), CPU)
    forward()
    seconds = statistics.median(forward() for _ in range(3)) / IMAGES_FORWARD
    folder.mkdir()
    shapes = {output.name: encoder.output_shape(output) for output in parse_outputs(settings.method.outputs)}
    rng = np.random.default_rng(0)
    for name, shape in {
        CLASS_TOKENS: (encoder.dim,),
        **{output_file(name): shape for name, shape in shapes.items()},
    }.items():
        with (folder / name).open("wb") as file:
            npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)})
            for _ in range(count):
                values = rng.standard_normal(shape, dtype=np.float32)
                file.write((values / np.linalg.norm(values, axis=-1, keepdims=True)).data)
    side = encoder.size_px
    index = FeatureIndex(
        size_px=side,
        grid=encoder.grid,
        dim=encoder.dim,
        model=encoder.description,
        random_weights=True,
        identity=dict(encoder.identity),
        images=tuple(
            ImageRows(
                sha256=image_key(number), height=side, width=side, canvas=(side, side), offsets=((0, 0),),
                first_row=number, rows=1,
            )
            for number in range(count)
        ),
        problems=(),
        outputs=shapes,
    )  # fmt: skip
    (folder / INDEX).write_text(index.model_dump_json(by_alias=True), encoding="utf-8")
    return seconds


def time_partners(plan: PhotoPlan) -> list[Row]:
    """Score a whole set with the partners of the method's settings. Reading the features counts."""
    method = _musc(plan)
    with fresh_folder() as folder:
        forward = in_new_process(
            _write, folder / "features", plan.mutual_photos, plan.size_px, plan.cosines, plan.threads
        )
        seconds, peak = in_new_process(_score_all, folder, plan.mutual_photos, plan.size_px, plan.cosines, plan.threads)
    ratio = seconds / (forward * plan.mutual_photos)
    detail = (
        f"{method.partners} partners: scoring {seconds:.0f} s ({1e3 * seconds / plan.mutual_photos:.0f} ms a "
        f"photograph, features read from disk), forward {1e3 * forward:.0f} ms a photograph, from {IMAGES_FORWARD}; "
        f"peak memory {peak / 1e9:.2f} GB, Python and torch included; products in {method.cosines}"
    )
    what = f"mutual scoring of {plan.mutual_photos:,} photographs / forward, cpu"
    return [Row("b", what, ratio, "x", f"<= {LIMIT}", ratio <= LIMIT, detail)]


def time_all_partners(plan: PhotoPlan) -> list[Row]:
    """Score pairs of a set in which every image has all others as partners, and extrapolate."""
    count = plan.all_partners_photos
    with fresh_folder() as folder:
        in_new_process(_write, folder / "features", count, plan.size_px, plan.cosines, plan.threads)
        a_pair, peak, pairs = in_new_process(
            _score_some, folder, count, plan.size_px, plan.cosines, plan.threads, plan.pairs
        )
    detail = (
        f"{pairs:,} products of pairs in {_musc(plan).cosines}, {1e3 * a_pair:.1f} ms each over the first "
        f"{plan.pairs:,}: {pairs * a_pair / 60:.0f} minutes in all; cosines of at most {COSINES_BYTES / 1e9:.2f} GB "
        "are in memory"
    )
    what = f"peak memory of mutual scoring of {count:,} photographs with all partners, cpu"
    return [Row("c", what, peak / 1e9, "GB", f"<= {MOST_BYTES / 1e9:.1f}", peak <= MOST_BYTES, detail)]


def _musc(plan: PhotoPlan) -> MuSc:
    method = photo_settings(plan.size_px, plan.cosines).method
    assert isinstance(method, MuSc)
    return method


def _write(folder: Path, count: int, size_px: int, cosines: str | None, threads: int) -> float:
    torch.set_num_threads(threads)
    return write_features(folder, count, photo_settings(size_px, cosines))


def _score_all(folder: Path, count: int, size_px: int, cosines: str | None, threads: int) -> tuple[float, int]:
    torch.set_num_threads(threads)
    settings = photo_settings(size_px, cosines)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    arguments: Any = (settings.method, "part", folder / "features", None, None, None, paths, settings.encoder, 0, "cpu")
    started = time.perf_counter()
    score: Any = score_system
    score(*arguments, folder / "scores")
    return time.perf_counter() - started, peak_bytes()


class _EnoughError(Exception):
    """Enough pairs were timed."""


def _score_some(
    folder: Path, count: int, size_px: int, cosines: str | None, threads: int, pairs: int
) -> tuple[float, int, int]:
    """Return the seconds of a pair, the peak memory and the number of all pairs. All cosines take memory at once."""
    torch.set_num_threads(threads)
    settings = photo_settings(size_px, cosines)
    method, store = settings.method, FeatureStore(folder / "features")
    assert isinstance(method, MuSc)
    read = partial(read_patches, store, CPU, method.outputs[0], method.degrees[0])
    sizes = [store.grid**2] * count
    done, started = 0, 0.0

    def on_pair() -> None:
        nonlocal done, started
        if not done:
            started = time.perf_counter()
        done += 1
        if done > pairs:
            raise _EnoughError

    def filled(*shape: int, **more: Any) -> torch.Tensor:
        return torch.full(shape, 0.0, **more)

    # memory of torch.empty is only taken when it is written, which the extrapolated run would do later
    with mock.patch.object(torch, "empty", filled):
        scored = mutual_scores(
            read, sizes, method.share, settings.encoder.batch_size, CPU, bf16=method.cosines == "bf16", on_pair=on_pair
        )
        try:
            for _ in scored:
                pass
        except _EnoughError:
            pass
    seconds = time.perf_counter() - started
    passes = len(method.outputs) * len(method.degrees)
    return seconds / max(1, done - 1), peak_bytes(), passes * _all_pairs(sizes, settings.encoder.batch_size)


def _all_pairs(sizes: list[int], batch_size: int) -> int:
    """Return the number of products: a pair whose images are not scored at the same time is multiplied twice."""
    from zsad.scorers.musc.mutual import _batches_in_memory

    count = len(sizes)
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    held = [sum(len(batches[b]) for b in scored) for scored in _batches_in_memory(batches, sizes)]
    return sum(scored * (scored - 1) // 2 + scored * (count - scored) for scored in held)
