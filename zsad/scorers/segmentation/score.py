"""Zero-shot anomaly detection with pre-trained segmentation models (Baugh et al., 2023).

For each image: find the foreground, place tiles on it, compute a score and a map per tile, and combine them.
The models read the images themselves. Of the features, only the positions of the crops are used.

The paper leaves some points open. This is what the code does:

| point | here |
|---|---|
| tau of the softmax | WinCLIP's 0.07; a setting |
| size at which the foreground is found | at most SAM's input size, 1024 px for the longer side; a setting |
| a tile larger than the image | the image is continued by reflection (`zsad.scorers.segmentation.tiles.cut_tile`) |
| no foreground | the whole image is one component (`zsad.scorers.segmentation.foreground.find_components`) |
| pixels outside all tiles | 0, the lowest score |
| resolution of the harmonic mean | taken over probabilities at CLIPSeg's resolution, then resized to the tile |
| top 25 % of few components | rounded down, at least one |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from medad.base.errors import ConfigError
from zsad.clip.encoder import Encoder
from zsad.clip.prompts import category_words
from zsad.config.run import PromptSettings
from zsad.data.images import Crops, read_image, resize_map
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.interface import CategoryFeatures, Scored
from zsad.scorers.segmentation.foreground import Component, find_components, scale_component
from zsad.scorers.segmentation.models import ClipSeg, Salient, Sam
from zsad.scorers.segmentation.prompts import LOCALISING_PROMPTS, tile_ensemble
from zsad.scorers.segmentation.settings import SegmentationModels
from zsad.scorers.segmentation.tiles import Tile, cut_tile, harmonic_mean, mean_of_highest, merge_tiles, place_tiles


@dataclass(frozen=True, eq=False)
class Models:
    """The three models that read pixels. Create them with `Models.load`."""

    clipseg: ClipSeg
    sam: Sam
    salient: Salient

    @classmethod
    def load(cls, settings: SegmentationModels, device: torch.device) -> Models:
        """Read all three models.

        Raise ConfigError if a model is not set or transformers is not installed, InputError if a model is damaged.
        """
        for name in ("clipseg", "sam", "salient"):
            if getattr(settings, name) is None:
                raise ConfigError(f"the system segmentation needs {name}: the local path of a model")
        return cls(
            clipseg=ClipSeg.load(Path(settings.clipseg or "").expanduser(), device),
            sam=Sam.load(
                Path(settings.sam or "").expanduser(),
                device,
                points_per_side=settings.sam_points_per_side,
                min_iou=settings.sam_min_iou,
                min_stability=settings.sam_min_stability,
                max_box_iou=settings.sam_max_box_iou,
            ),
            salient=Salient.load(
                Path(settings.salient or "").expanduser(),
                device,
                size_px=settings.salient_px,
                output=settings.salient_output,
            ),
        )


def score(category_features: CategoryFeatures, settings: SegmentationModels) -> Iterator[Scored]:
    """Score the images of a category one by one. The maps have one value per pixel of the crops, 0..1.

    Raises
    ------
    ConfigError
        A model is not set, transformers is not installed, or a prompt is too long for the encoder.
    InputError
        A model or an image is missing or damaged.
    """
    models = Models.load(settings, category_features.device)
    encoder = Encoder.load(category_features.encoder, category_features.device)
    ensemble = tile_ensemble(category_words(category_features.category, PromptSettings()))
    text = torch.stack([mean_alignment(encoder.encode_text(side)) for side in (ensemble.normal, ensemble.anomalous)])
    localising = models.clipseg.embed(LOCALISING_PROMPTS)
    for number in range(len(category_features.store)):
        image = read_image(category_features.paths[number])
        tiles = [
            place_tiles(
                component,
                image.shape[:2],
                min_side_px=settings.tile_px,
                long_aspect=settings.long_aspect,
                many_parts=settings.many_parts,
            )
            for component in foreground(image, models, settings)
        ]
        flat = [tile for component_tiles in tiles for tile in component_tiles]
        scores = tile_scores(image, flat, encoder, text, settings.tau, category_features.batch_size)
        maps = (
            (tile, tile_score * _anomaly_map(cut_tile(image, tile), models.clipseg, localising))
            for tile, tile_score in zip(flat, scores, strict=True)
        )
        crops = category_features.store.crops(number)
        yield Scored(
            number=number,
            score=image_score(scores, [len(component_tiles) for component_tiles in tiles], settings.top_share),
            map=cut_crops(resize_map(merge_tiles(maps, image.shape[:2]), crops.canvas_hw), crops),
        )


def foreground(image: UInt8[ndarray, "H W 3"], models: Models, settings: SegmentationModels) -> tuple[Component, ...]:
    """Return the instances of the object, in pixels of the image.

    Large images are reduced before the search. SAM reduces images to its input size anyway, so this loses no detail
    and saves memory and time.
    """
    height, width = image.shape[:2]
    longer = max(height, width)
    reduced = image
    if longer > settings.foreground_px:
        new_hw = [max(1, round(side * settings.foreground_px / longer)) for side in (height, width)]
        reduced = np.asarray(Image.fromarray(image).resize((new_hw[1], new_hw[0]), Image.Resampling.BILINEAR))
    found = find_components(models.sam.segments(reduced), models.salient.mask(reduced), settings.covered)
    return tuple(scale_component(component, reduced.shape[:2], (height, width)) for component in found)


def mean_alignment(text: Float[Tensor, "n D"]) -> Float[Tensor, " D"]:
    """Return the vector whose product with an embedding is the mean cosine of the embedding to `n` prompts.

    All embeddings are L2-normalised. The paper averages alignments, not embeddings, because anomalous prompts have many
    different meanings. By linearity, mean_i cos(v, t_i) = v . mean_i t_i. WinCLIP normalises this mean again.
    Then prompts that differ would seem to be aligned as well as prompts that agree. So here the mean is not normalised.
    """
    return text.mean(dim=0)


def tile_scores(
    image: UInt8[ndarray, "H W 3"],
    tiles: Sequence[Tile],
    encoder: Encoder,
    text: Float[Tensor, "2 D"],
    tau: float,
    batch_size: int,
) -> list[float]:
    """Return the score of each tile, 0..1: the softmax share of the mean alignment with the anomalous prompts.

    This is the paper's tile-level predictor.

    Parameters
    ----------
    text
        `mean_alignment` of the normal and of the anomalous prompts, in this order.
    tau
        Temperature of the softmax.
    batch_size
        Number of tiles encoded at a time.
    """
    scores: list[float] = []
    size = (encoder.size_px, encoder.size_px)
    for first in range(0, len(tiles), batch_size):
        cuts = (Image.fromarray(cut_tile(image, tile)) for tile in tiles[first : first + batch_size])
        pixels = np.stack([np.asarray(one.resize(size, Image.Resampling.BILINEAR)) for one in cuts])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div(255)
        scores.extend(text_scores(encoder.encode(batch).class_token, text, tau).tolist())
    return scores


def _anomaly_map(
    tile: UInt8[ndarray, "S S 3"], clipseg: ClipSeg, localising: Float32[Tensor, "P D"]
) -> Float32[ndarray, "S S"]:
    """Return the harmonic mean of CLIPSeg's maps over all localising prompts, 0..1: the pixel-level predictor."""
    return resize_map(harmonic_mean(clipseg.segment(tile, localising)).cpu().numpy(), tile.shape[:2])


def image_score(tile_scores: Sequence[float], counts: Sequence[int], top_share: float) -> float:
    """Return the image score, the paper's sample-level prediction: the mean of the highest component scores.

    The score of a component is the mean over its tiles.

    Parameters
    ----------
    tile_scores
        Scores of all tiles, component after component.
    counts
        Number of tiles of each component, at least one.
    top_share
        Share of the components that is averaged. The paper uses 0.25.
    """
    left = iter(tile_scores)
    components = [sum(next(left) for _ in range(count)) / count for count in counts]
    return mean_of_highest(components, top_share)


def cut_crops(canvas: Float32[ndarray, "H W"], crops: Crops) -> Float32[Tensor, "C S S"]:
    """Cut the crops out of a map on the canvas."""
    s = crops.size_px
    return torch.from_numpy(np.stack([canvas[top : top + s, left : left + s] for top, left in crops.offsets]))
