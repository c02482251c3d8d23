"""(f) of `benchmarks/zsad.py`: peak memory for few and for many images, from files to metrics."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.zsad_images import draw_image, image_key
from benchmarks.zsad_timing import Plan, Row, fresh_folder
from zsad.clip.models import CONFIG_NAME, WEIGHTS_NAMES
from zsad.config.run import AdaptSettings, EncoderSettings, EvaluationSettings, PromptSettings, ScoreSettings
from zsad.data.labelled import LabelledImage
from zsad.scorers.dual.score import score_category
from zsad.steps.encode import encode_category_text, encode_images
from zsad.steps.evaluate import evaluate_category

P = ParamSpec("P")
T = TypeVar("T")
SIDE_PX = 256
LIMIT = 1.05
"""Highest ratio of the peaks that counts as "does not grow". The scores and indexes themselves do grow."""
MODEL: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 240, "layers": 2, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
"""A model so small that 2,000 images take a minute.

It has as many patches as ViT-B-16-plus-240, and 230 kB of features per image.
"""


def write_image_set(folder: Path, count: int) -> None:
    """Write `count` image files, every second one with a defect and its mask, and the small model."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX]
    for number in range(count):
        image = draw_image(rng, SIDE_PX)
        if number % 2:
            y, x = rng.integers(20, SIDE_PX - 20, 2)
            mask = np.hypot(rows - y, columns - x) < rng.integers(8, 32)
            image[mask] = 255 - image[mask]
            Image.fromarray(mask).save(folder / f"{number}_mask.png")
        Image.fromarray(image).save(folder / f"{number}.png", compress_level=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state: dict[str, Tensor] = open_clip.CLIP(**MODEL).state_dict()
    model = folder / "model"
    model.mkdir()
    save_file(state, model / WEIGHTS_NAMES[0])
    (model / CONFIG_NAME).write_text(json.dumps({"model_cfg": MODEL}), encoding="utf-8")


def peak_bytes() -> int:
    """Return the largest resident size so far. It is not ru_maxrss, because a child inherits that from its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def pipeline_peaks(folder: Path, count: int, threads: int) -> dict[str, int]:
    """Encode, score with and without adaptation, and evaluate. Return the peak of each step."""
    torch.set_num_threads(threads)
    encoder = EncoderSettings(model=f"local-dir:{folder / 'model'}")
    paths = [folder / f"{number}.png" for number in range(count)]
    digests = [image_key(number) for number in range(count)]
    score = ScoreSettings(variants=("joint", "joint_tta"))
    known = [
        LabelledImage(
            str(number),
            digest,
            path,
            bool(number % 2),
            "disc",
            path.with_name(f"{number}_mask.png") if number % 2 else None,
        )
        for number, (digest, path) in enumerate(zip(digests, paths, strict=True))
    ]
    peaks: dict[str, int] = {}
    with fresh_folder() as out:
        features, text, scores, evaluated = (out / name for name in ("features", "text", "scores", "evaluated"))
        evaluated.mkdir()
        steps: dict[str, Callable[[], None]] = {
            "text": lambda: encode_category_text("object", encoder, PromptSettings(), "cpu", text),
            "encode": lambda: encode_images(paths, digests, encoder, "cpu", features),
            "score": lambda: score_category(features, text, paths, encoder, score, AdaptSettings(), 0, "cpu", scores),
            "evaluate": lambda: evaluate_category(
                known, features, scores, score.variants, EvaluationSettings(), evaluated
            ),
        }
        for name, step in steps.items():
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
            step()
            peaks[name] = peak_bytes()
    return peaks


def in_new_process(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a new process, so that only its own memory counts."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()


def measure_memory(plan: Plan) -> Row:
    few, many = plan.memory_images
    start = time.perf_counter()
    with fresh_folder() as folder:
        in_new_process(write_image_set, folder, many)
        peaks = [in_new_process(pipeline_peaks, folder, count, plan.threads) for count in (few, many)]
    small, large = (max(each.values()) for each in peaks)
    parts = ", ".join(f"{name} {peaks[0][name] / 1e6:.0f} -> {peaks[1][name] / 1e6:.0f}" for name in peaks[0])
    detail = (
        f"peak resident MB, Python and torch included: {parts}; generated images of {SIDE_PX} px, a small random "
        f"model with the large one's 225 patches, {time.perf_counter() - start:.0f} s"
    )
    ratio = large / small
    what = f"peak memory of {many:,} images / {few:,}, files to metrics"
    return Row("f", what, ratio, "x", f"<= {LIMIT}", ratio <= LIMIT, detail)
