"""Check the committed model: its size and type, and its accuracy on kinds that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from zsad.clip.encoder import Encoder
from zsad.clip.models import EMBEDDED_FOLDER
from zsad.clip.prompts import ensemble
from zsad.config.run import EncoderSettings, PromptSettings
from zsad.data.images import crop_image, merge_maps, plan_crops, read_image, resize_map
from zsad.data.masks import read_mask
from zsad.embedded.pool import SIZE_PX, write_held_out
from zsad.embedded.scenes.scenes import kinds
from zsad.evaluation.metrics import image_metrics, pixel_metrics
from zsad.scorers.dual.scorer import text_scores, visual_scores

WEIGHTS = EMBEDDED_FOLDER / "open_clip_model.safetensors"
TAU = 0.07
SHOWN_PX = 256
"""Input size, as in configs/zsad/demo_embedded.yaml."""


@dataclass(frozen=True)
class MeanAurocs:
    """Means over the held-out kinds."""

    image_auroc: float
    pixel_auroc: float


@pytest.fixture(scope="module", params=[8, pytest.param(24, marks=pytest.mark.slow)], ids=["third", "whole"])
def held_out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a third of the images of `python -m zsad.embedded.pretrain --held-out`, with its seed.

    The slow tests write all of them. The table of the model card is based on all, so no seed was chosen for this test.
    """
    folder = tmp_path_factory.mktemp("held-out")
    write_held_out(folder, each=request.param)
    return folder


def load(model: str) -> Encoder:
    return Encoder.load(EncoderSettings(model=model, size_px=SHOWN_PX), torch.device("cpu"))


def evaluate_held_out(encoder: Encoder, folder: Path, step: int = 1) -> MeanAurocs:
    """Evaluate every `step`-th image with prompts and one reference image, as variant `joint`.

    The reference of an image is the next one.
    """
    image_aurocs, pixel_aurocs = [], []
    crops = plan_crops(SIZE_PX, SIZE_PX, encoder.size_px, 2)
    for kind, _ in kinds("held_out"):
        text = encoder.encode_ensemble(ensemble(kind, PromptSettings()))
        paths = sorted((folder / kind / "test").rglob("*.png"))[::step]
        tokens = encoder.encode(torch.cat([crop_image(read_image(path), crops) for path in paths]))
        of_text = text_scores(tokens.patches, text, TAU)
        of_class = text_scores(tokens.class_token, text, TAU)
        following = tokens.patches.roll(1, 0)
        of_image = torch.stack([visual_scores(q, [r]) for q, r in zip(tokens.patches, following, strict=True)])
        scores = of_class + of_text.amax(1) + of_image.amax(1)
        anomalous = np.array([path.parent.name != "good" for path in paths])
        maps = (of_text + of_image).reshape(-1, 1, encoder.grid, encoder.grid).numpy()

        def source(
            paths: list[Path] = paths, maps: np.ndarray = maps, kind: str = kind
        ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for path, patch_map in zip(paths, maps, strict=True):
                defect = path.parent.name
                mask = np.zeros((SIZE_PX, SIZE_PX), bool)
                if defect != "good":
                    file = folder / kind / "ground_truth" / defect / f"{path.stem}_mask.png"
                    mask = read_mask(file, (SIZE_PX, SIZE_PX))
                yield resize_map(np.asarray(merge_maps(patch_map, crops)), mask.shape), mask

        image, pixel = image_metrics(scores.double().numpy(), anomalous), pixel_metrics(source)
        assert image.auroc is not None
        assert pixel.auroc is not None
        image_aurocs.append(image.auroc)
        pixel_aurocs.append(pixel.auroc)
    return MeanAurocs(float(np.mean(image_aurocs)), float(np.mean(pixel_aurocs)))


def test_the_weights_are_small_half_precision_and_finite() -> None:
    assert WEIGHTS.stat().st_size <= 10_000_000
    with safe_open(WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float16
            assert tensor.isfinite().all()


def test_it_finds_held_out_defects_on_held_out_kinds(held_out: Path) -> None:
    found = evaluate_held_out(load("embedded"), held_out)
    assert found.image_auroc >= 0.85
    assert found.pixel_auroc >= 0.85


def test_its_training_is_what_finds_them(held_out: Path, tmp_path: Path) -> None:
    """Check that random weights, which can also compare images, do not reach the bounds above."""
    from zsad.embedded.pretrain import build, save

    save(build(0), tmp_path)
    found = evaluate_held_out(load(f"local-dir:{tmp_path}"), held_out, step=2)
    assert found.image_auroc < 0.8
    assert found.pixel_auroc < 0.8


def test_its_card_states_the_training_that_made_it() -> None:
    facts = json.loads((EMBEDDED_FOLDER / "training.json").read_text(encoding="utf-8"))
    card = (EMBEDDED_FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    for leg in facts["plan"]["legs"]:
        assert f"{leg['steps']:,} steps" in card
    assert [row["step"] for row in facts["curve"] if row["leg"] == 2][-1] == facts["plan"]["legs"][1]["steps"]
    assert f"seed {facts['plan']['seed']}" in card
    import hashlib

    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() in card
