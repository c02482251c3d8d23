"""(g) of `benchmarks/zsad.py`: WinCLIP's encoding compared with its bound, and all of WinCLIP with anomalib's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from benchmarks.anomalib_client import Anomalib, skipped_row
from benchmarks.zsad_images import image_key
from benchmarks.zsad_scorer import Bench, load_anomalib
from benchmarks.zsad_timing import Row, row_at_least, row_at_most, time_alternately, timer
from zsad.clip.attention_paths import embed
from zsad.clip.feature_store import CLASS_TOKENS, TEXT, FeatureStore, output_file
from zsad.clip.windows import window_patches, windows_at_a_time
from zsad.config.encoder_outputs import parse_outputs
from zsad.data.images import merge_maps
from zsad.scorers.scores_file import SystemScores
from zsad.scorers.winclip.settings import WinClip
from zsad.steps.encode import encode_images
from zsad.steps.score import score_system

BATCHES = (1, 4, 16)
SHOTS = 2
TOLERANCE = 1e-4
"""Largest allowed difference of scores."""


@torch.no_grad()
def time_encoding(bench: Bench) -> Row:
    """Compare WinCLIP's encoding with only the transformer blocks on the tokens of its windows, in equal batches.

    There are windows of three scales; the third is the whole image. Its class token gives the image's score, and one
    of the maps in the mean over scales.
    """
    encoder, device, n = bench.encoder, bench.plan.device, len(bench.images)
    visual: Any = encoder.model.visual
    batches, wanted = torch.split(bench.images, bench.plan.batch), parse_outputs(WinClip().outputs)
    tokens = embed(visual, encoder.normalise(batches[0]))
    shapes: list[Tensor] = []
    scales = (*WinClip().windows, encoder.grid)
    for side in scales:
        own = window_patches(encoder.grid, side).to(device) + 1
        windows = tokens[:, torch.cat([torch.zeros_like(own[:, :1]), own], dim=1)].flatten(0, 1)
        shapes += torch.split(windows, windows_at_a_time(side, device))

    def ours() -> None:
        encoder.encode_outputs(batches[0], wanted)

    def blocks() -> None:
        for part in shapes:
            x = part
            for block in visual.transformer.resblocks:
                x = block(x)

    compared = time_alternately(timer(ours, device), timer(blocks, device), bench.plan.repeats)
    size = len(batches[0])
    mine, bound = (statistics.median(seconds) / size * 1e3 for seconds in (compared.first, compared.second))
    sides = ", ".join(f"{side} x {side}" for side in scales)
    detail = (
        f"an image: pixels to class token and windows {mine:.0f} ms; the bound, only open_clip's blocks on the tokens "
        f"of its windows of {sides} patches (the last is the whole image), {bound:.0f} ms; {size} of {n} at a time"
    )
    return row_at_most(
        "g", f"WinCLIP's encoding / its windows through the blocks, {device.type}", compared, 1.15, detail
    )


def compare_with_anomalib(bench: Bench, anomalib: Anomalib | None) -> list[Row]:
    """Compare the time from tensors to scores and maps at pixel size, with equal weights and text features."""
    what = f"anomalib's WinCLIP / ours, {bench.plan.device.type}"
    if anomalib is None:
        same = skipped_row("g", "largest difference of WinCLIP's scores and maps from anomalib's", f"<= {TOLERANCE}")
        return [skipped_row("g", what, ">= 1"), same]
    loaded = load_anomalib(bench, anomalib)
    text = bench.folder / "winclip-text"
    text.mkdir()
    save_file({"text": functional.normalize(torch.tensor(loaded["text"]), dim=-1)}, text / TEXT)
    rows = [_compare_speed(bench, anomalib, text, size, what) for size in BATCHES]
    return [*rows, *(_compare_scores(bench, anomalib, text, shots) for shots in (0, SHOTS))]


def _compare_speed(bench: Bench, anomalib: Anomalib, text: Path, size: int, what: str) -> Row:
    numbers = [number % len(bench.images) for number in range(size)]
    features = bench.folder / f"winclip-{size}"
    _encode_files(bench, numbers, WinClip(), features)
    wanted, batch = parse_outputs(WinClip().outputs), bench.images[numbers]

    def ours() -> None:
        class_tokens, shown = bench.encoder.encode_outputs(batch, wanted)
        np.save(features / CLASS_TOKENS, class_tokens.cpu().numpy())
        for name, values in shown.items():
            np.save(features / output_file(name), values.cpu().numpy())
        _read_maps(features, _score(bench, WinClip(), features, text, None))

    def theirs() -> float:
        return float(anomalib.ask("winclip", batch=size, count=size)["seconds"])

    own = timer(ours, bench.plan.device)
    theirs(), own()
    compared = time_alternately(theirs, own, bench.plan.repeats, warm=False)
    other, mine = (size / statistics.median(seconds) for seconds in (compared.first, compared.second))
    detail = f"ours {mine:.2f} images/s (features and scores on disk), anomalib {other:.2f}"
    return row_at_least("g", f"{what}, {size} at a time", compared, 1, detail)


def _compare_scores(bench: Bench, anomalib: Anomalib, text: Path, shots: int) -> Row:
    """Compare scores and maps of the first two images. The reference images are others."""
    settings, queries = WinClip(shots=shots), range(2)
    others = [number % len(bench.images) for number in range(2, 2 + shots)]
    features, memory = (bench.folder / f"winclip-{shots}-{name}" for name in ("queries", "memory"))
    _encode_files(bench, queries, settings, features)
    _encode_files(bench, others, settings, memory)
    scores = _score(bench, settings, features, text, memory if shots else None)
    made, out = SystemScores(scores), bench.folder / f"anomalib-{shots}.npz"
    anomalib.ask("winclip_scores", count=len(queries), memory=others, out=str(out))
    with np.load(out) as theirs:
        of_images = float(np.abs(made.image_score() - theirs["scores"]).max())
        of_maps = float(np.abs(np.stack(_read_maps(features, scores)) - theirs["maps"]).max())
    largest = max(of_images, of_maps)
    what = f"largest difference of WinCLIP's scores and maps from anomalib's, {shots} shots"
    detail = f"scores {of_images:.0e}, maps {of_maps:.0e}; equal weights and text features"
    return Row("g", what, largest, "", f"<= {TOLERANCE}", largest <= TOLERANCE, detail)


def _encode_files(bench: Bench, numbers: Sequence[int], settings: WinClip, out: Path) -> None:
    """Encode image files as the flow does. An image that is given twice counts as two."""
    paths, names = [bench.paths[number] for number in numbers], [image_key(place) for place in range(len(numbers))]
    encode_images(paths, names, bench.settings, str(bench.plan.device), out, outputs=settings.outputs)


def _score(bench: Bench, settings: WinClip, features: Path, text: Path, shots: Path | None) -> Path:
    out = features.with_name(f"{features.name}-scores")
    paths = [bench.paths[0]] * len(FeatureStore(features))
    device = str(bench.plan.device)
    score_system(settings, "object", features, text, shots, None, paths, bench.settings, 0, device, out)
    return out


def _read_maps(features: Path, scores: Path) -> list[np.ndarray]:
    store, made = FeatureStore(features), SystemScores(scores)
    return [merge_maps(made.patch_map(number), store.crops(number)) for number in range(len(store))]
