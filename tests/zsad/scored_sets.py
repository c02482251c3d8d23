"""Write scored categories to disk, as the steps before the report do, with scores known by construction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from zsad.clip.feature_store import CLASS_TOKENS, INDEX, FeatureIndex, ImageRows
from zsad.config.run import AdaptSettings, EncoderSettings, ImagesSettings, ScoreSettings, Variant
from zsad.config.settings import ZsadSettings
from zsad.data.images import plan_crops
from zsad.data.labelled import LabelledImage
from zsad.scorers.dual.scorer import Evidence, Part, fuse_image
from zsad.scorers.dual.scores_file import INDEX_FILE, SCORES_FILE, ScoredImage, ScoresIndex
from zsad.scorers.dual.settings import DualImage
from zsad.steps.evaluate import evaluate_category
from zsad.steps.results import CategoryResult

SIZE_PX, GRID = 32, 4
MAX_CROPS = 64
BACKGROUND = 0.125
"""Value of A_L, A_V and A_T without a defect. It is exact in binary, so that sums are exact."""


@dataclass(frozen=True)
class ExampleImage:
    """Example image: its content and its scores."""

    id: str
    anomalous: bool | None
    score: float
    """Score of the class token, which is the image's score of variant `text`."""
    peak: float = 0.5
    """Value of all maps in patches that the defect touches."""
    defect: tuple[int, int, int, int] | None = None
    """Top, bottom, left and right of the defect, px."""
    size_hw: tuple[int, int] = (64, 64)
    has_mask: bool = True


def zsad_settings(**changes: Any) -> ZsadSettings:
    """Return settings of a run with the dual-image scorer. `score` is its `ScoreSettings`."""
    score = changes.pop("score", ScoreSettings(variants=("text", "joint")))
    encoder = changes.pop("encoder", EncoderSettings(tag="laion400m_e32"))
    adapt = changes.pop("adapt", AdaptSettings())
    system = DualImage(**score.model_dump(exclude={"batch_size"}), adapt=adapt)
    values: dict[str, Any] = {
        "name": "run-1",
        "seeds": (0, 1),
        "data": ImagesSettings(root="/srv/factory/secret"),
        "encoders": {"main": encoder},
        "systems": (system,),
    }
    return ZsadSettings(**(values | changes))


def dual_of(settings: ZsadSettings) -> DualImage:
    system = settings.method
    assert isinstance(system, DualImage)
    return system


def usual(n_normal: int = 6, n_anomalous: int = 4) -> list[ExampleImage]:
    """Return normal images with scores 0.1, 0.2, ... and anomalous ones with 0.51, 0.61, ...; the classes overlap."""
    normal = [ExampleImage(f"good/{i}", False, (i + 1) / 10) for i in range(n_normal)]
    anomalous = [
        ExampleImage(f"scratch/{i}", True, (i + 5) / 10 + 0.01, defect=(16, 32, 16, 48), peak=0.5 + i / 8)
        for i in range(n_anomalous)
    ]
    return normal + anomalous


def write_category(
    root: Path,
    name: str,
    images: Sequence[ExampleImage],
    settings: ZsadSettings,
    *,
    random_weights: bool = False,
    model: str = "open_clip ViT-B-16-plus-240",
    weights: str = "tag:laion400m_e32",
    shift: Callable[[int], float] = lambda seed: 0.0,
) -> CategoryResult[Path]:
    """Write images, features' index, scores and evaluation of a category. `shift(seed)` is added to class scores."""
    folder = root / name
    listed = [_write_image(folder / "images", example, number) for number, example in enumerate(images)]
    rows, first_row = [], 0
    for example, image in zip(images, listed, strict=True):
        crops = plan_crops(*example.size_hw, SIZE_PX, MAX_CROPS)
        count = len(crops.offsets)
        height, width = example.size_hw
        rows.append(
            ImageRows(
                sha256=image.sha256,
                height=height,
                width=width,
                canvas=crops.canvas_hw,
                offsets=crops.offsets,
                first_row=first_row,
                rows=count,
            )
        )
        first_row += count
    index = FeatureIndex(
        size_px=SIZE_PX,
        grid=GRID,
        dim=8,
        model=model,
        random_weights=random_weights,
        identity={"weights": weights},
        images=tuple(rows),
        problems=(),
        outputs={},
    )
    for part in ("features", "text"):
        (folder / part).mkdir(parents=True)
    (folder / "features" / INDEX).write_text(index.model_dump_json(by_alias=True), encoding="utf-8")
    np.save(folder / "features" / CLASS_TOKENS, np.zeros((first_row, 8), np.float32))
    prompts = {"normal": [f"a perfect {name}"], "anomalous": [f"a broken {name}", f"a torn {name}"]}
    write_json(folder / "text" / "text.json", {"prompts": prompts, "words": name, "category": name})
    scores, evaluated = {}, {}
    for seed in settings.seeds:
        scores[seed], evaluated[seed] = folder / f"scores-{seed}", folder / f"evaluated-{seed}"
        scores[seed].mkdir()
        evaluated[seed].mkdir()
        _write_scores(scores[seed], images, rows, dual_of(settings).score, seed, shift(seed))
        evaluate_category(
            listed,
            features=folder / "features",
            scores=scores[seed],
            variants=settings.method.variant_names,
            settings=settings.evaluation,
            out=evaluated[seed],
        )
    return CategoryResult(name, tuple(listed), folder / "text", folder / "features", scores, evaluated)


def defect_patches(example: ExampleImage) -> np.ndarray[Any, Any]:
    """Return the scores of each crop's patches, f32 [C, GRID^2]: the peak in touched patches, else the background."""
    crops = plan_crops(*example.size_hw, SIZE_PX, MAX_CROPS)
    maps = np.full((len(crops.offsets), GRID, GRID), BACKGROUND, dtype=np.float32)
    if example.defect is not None:
        step, scale = SIZE_PX // GRID, min(example.size_hw) / SIZE_PX
        top, bottom, left, right = (edge / scale for edge in example.defect)
        for crop, (y, x) in enumerate(crops.offsets):
            for row in range(GRID):
                for column in range(GRID):
                    r, c = y + row * step, x + column * step
                    if r < bottom and r + step > top and c < right and c + step > left:
                        maps[crop, row, column] = example.peak
    return maps.reshape(len(maps), -1)


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def without_labels(images: Sequence[ExampleImage]) -> list[ExampleImage]:
    return [replace(image, anomalous=None, has_mask=False) for image in images]


def _write_image(folder: Path, example: ExampleImage, number: int) -> LabelledImage:
    """Write a grey image, darker with each number. A defect is bright red."""
    pixels = np.full((*example.size_hw, 3), 200 - number % 150, dtype=np.uint8)
    pixels[0, 0] = number % 256, number // 256, sum(example.id.encode()) % 256
    path = folder / f"{example.id}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    mask_path = None
    if example.defect is not None:
        top, bottom, left, right = example.defect
        pixels[top:bottom, left:right] = (255, 30, 30)
        if example.has_mask:
            mask = np.zeros(example.size_hw, dtype=np.uint8)
            mask[top:bottom, left:right] = 255
            mask_path = folder / f"{example.id}_mask.png"
            Image.fromarray(mask).save(mask_path)
    Image.fromarray(pixels).save(path)
    defect = "" if example.anomalous is None else example.id.split("/")[0]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LabelledImage(example.id, digest, path, example.anomalous, defect, mask_path)


def _write_scores(
    folder: Path,
    images: Sequence[ExampleImage],
    rows: Sequence[ImageRows],
    settings: ScoreSettings,
    seed: int,
    shift: float,
) -> None:
    """Write scores. All parts have the same map, and the reference of an image is the next one.

    The class score is that of the example plus `shift`.
    """
    table: dict[Part, list[np.ndarray[Any, Any]]] = {"class": [], "a_l": [], "a_v": [], "a_t": [], "a_t_text": []}
    scored = []
    for number, (example, row) in enumerate(zip(images, rows, strict=True)):
        maps = defect_patches(example)
        own: dict[Part, np.ndarray[Any, Any]] = dict.fromkeys(table, maps)
        own["class"] = np.full(row.rows, example.score + shift, dtype=np.float32)
        for part, values in own.items():
            table[part].append(values)
        evidence = Evidence(own["class"], own["a_l"], own["a_v"], own["a_t"], own["a_t_text"])
        others = () if len(rows) < 2 else (rows[(number + 1) % len(rows)].sha256,)
        image_score: dict[Variant, float] = {v: fuse_image(evidence, v, settings) for v in settings.variants}
        scored.append(
            ScoredImage(
                sha256=row.sha256,
                first_row=row.first_row,
                rows=row.rows,
                references=others,
                image_score=image_score,
            )
        )
    save_file({str(part): np.concatenate(values) for part, values in table.items()}, folder / SCORES_FILE)
    index = ScoresIndex(seed=seed, tau=settings.tau, settings=settings, images=tuple(scored))
    (folder / INDEX_FILE).write_text(index.model_dump_json(by_alias=True), encoding="utf-8")
