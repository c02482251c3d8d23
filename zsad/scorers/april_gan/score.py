"""APRIL-GAN (Chen et al. 2023, VAND challenge): trained linear layers project patches to the space of the text.

Patches of inner blocks have the image tower's width and are not in the joint space of image and text.
One linear layer per block projects them into it. These layers are the only trained part; all else is CLIP.
The training differs from the public code in one point: that code joins four images to one, in a fifth of the cases on
MVTec AD.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureStore
from zsad.scorers.april_gan.settings import AprilGan
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.interface import NO_OTHER_NORMAL, CategoryFeatures, Scored
from zsad.scorers.learned import Batch, Weights, dice_loss, focal_loss, patches_of, upsample
from zsad.scorers.memory import Memory, distances_to, has_others, read_memory
from zsad.scorers.weights_file import trained_weights


def width_of(store: FeatureStore, settings: AprilGan) -> int:
    """Return the image tower's width, read from the features. Raise InputError if they lack one of the blocks."""
    if missing := [output for output in settings.outputs if output not in store.index.outputs]:
        raise InputError(store.folder, f"the features were made without output {missing[0]}")
    return store.index.outputs[settings.outputs[0]][1]


def shapes(settings: AprilGan, width: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights for a tower of `width` and a joint space of `dim`."""
    found: dict[str, tuple[int, ...]] = {}
    for output in settings.outputs:
        found[f"{output}.weight"], found[f"{output}.bias"] = (dim, width), (dim,)
    return found


def patch_logits(
    patches: Float[Tensor, "B N W"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"],
    text: Float[Tensor, "B 2 D"],
    scale: float,
) -> Float[Tensor, "B N"]:
    """Return scale * (cos(v, g_a) - cos(v, g_n)), where v is the projected patch.

    With two classes, the softmax depends on this difference only. Bilinear upsampling is linear.
    So upsampling the difference gives the same as upsampling both logits.
    """
    joint = functional.normalize(functional.linear(patches, weight, bias), dim=-1)
    return scale * torch.einsum("bnd,bd->bn", joint, text[:, 1] - text[:, 0])


def local_loss(logits: Float[Tensor, "B S S"], masks: Tensor) -> Float[Tensor, ""]:
    """Return the loss of one block: focal loss over both shares plus Dice loss of the anomalous share.

    `logits` are already upsampled.
    """
    shares = torch.stack([functional.logsigmoid(-logits), functional.logsigmoid(logits)], dim=1)
    return focal_loss(shares, masks) + dice_loss(torch.sigmoid(logits), masks)


@dataclass(frozen=True, eq=False)
class AprilGanLearner:
    """Training of APRIL-GAN on features; see `zsad.scorers.learned.Learner`. `texts` are the sources' text features."""

    settings: AprilGan
    texts: Float[Tensor, "n 2 D"]
    width: int

    @property
    def reads(self) -> tuple[str, ...]:
        return self.settings.outputs

    def initial(self, generator: torch.Generator) -> Weights:
        """Return weights uniform in +-1 / sqrt(width), as torch initialises linear layers."""
        bound = 1 / math.sqrt(self.width)
        wanted = shapes(self.settings, self.width, self.texts.shape[-1])
        return {
            name: (2 * torch.rand(shape, generator=generator) - 1) * bound for name, shape in sorted(wanted.items())
        }

    def loss(self, weights: Weights, batch: Batch) -> Float[Tensor, ""]:
        """Return focal loss plus Dice loss, summed over the blocks."""
        text = self.texts.to(batch.masks.device)[batch.sources]
        side, aligned = batch.masks.shape[-1], self.settings.align_corners
        losses = [
            local_loss(
                upsample(self._logits(weights, batch.patches, output, text), side, align_corners=aligned), batch.masks
            )
            for output in self.reads
        ]
        return torch.stack(losses).sum()

    def _logits(self, weights: Weights, patches: Mapping[str, Tensor], output: str, text: Tensor) -> Tensor:
        scale = self.settings.scale
        return patch_logits(patches[output], weights[f"{output}.weight"], weights[f"{output}.bias"], text, scale)


def score(category_features: CategoryFeatures, settings: AprilGan) -> Iterator[Scored]:
    """Score all images of a category.

    The map has one value per pixel: the anomalous softmax shares of the upsampled logits, summed over the blocks.
    With normal images, the upsampled distances 1 - cos of each patch to the nearest patch of the memory are added, also
    summed over the blocks. They are those of the blocks' patches before the linear layers.

    The image score is (1 - s) share + s top. `share` is the class token's anomalous share at the same scale, mean over
    crops; s is the setting `map_share`. `top` is the map's maximum, divided by its largest possible value: the number
    of blocks, or three times this number with normal images. With `stretch_map`, it is stretched over the category
    instead, as published. The maps are then computed twice, so that memory does not grow with the category.

    Raises
    ------
    ConfigError, InputError
        The checkpoint is missing, or it belongs to another system, other settings or another encoder. Or the normal
        images are missing.
    """
    store = category_features.store
    weights = trained_weights(category_features, settings, shapes(settings, width_of(store, settings), store.dim))
    assert category_features.text is not None, "this system's settings have prompts"
    text = category_features.text.to(category_features.device)
    shots, device = category_features.shots, category_features.device
    memory = (
        {one: read_memory(shots, one, settings.title, device) for one in settings.outputs} if settings.shots else None
    )
    usable = [
        n for n, digest in enumerate(store.digests) if memory is None or has_others(memory[settings.outputs[0]], digest)
    ]
    weight, low, high = settings.weight_of_map, 0.0, len(settings.outputs) * (1.0 if memory is None else 3.0)

    def map_of(number: int) -> Float[Tensor, "C S S"]:
        return _map(category_features, number, weights, text, memory, settings)

    if settings.stretch_map and weight and usable:
        tops = [float(map_of(number).max()) for number in usable]
        low, high = min(tops), max(tops)
    for number in range(len(store)):
        if number not in usable:
            yield Scored.without_score(number, NO_OTHER_NORMAL)
            continue
        classes = store.class_tokens(number).to(category_features.device)
        share, total = float(text_scores(classes, text, 1 / settings.scale).mean()), map_of(number)
        top = (float(total.max()) - low) / (high - low) if high > low else 0.0
        yield Scored(number, (1 - weight) * share + weight * top, total.cpu())


def _map(
    category_features: CategoryFeatures,
    number: int,
    weights: Weights,
    text: Float[Tensor, "2 D"],
    memory: Mapping[str, Memory] | None,
    settings: AprilGan,
) -> Float[Tensor, "C S S"]:
    store, device, aligned = category_features.store, category_features.device, settings.align_corners
    crops = len(store.rows_of(number))
    total = torch.zeros(crops, store.size_px, store.size_px, device=device)
    for output in settings.outputs:
        patches = patches_of(store, number, output).to(device)
        layer = weights[f"{output}.weight"], weights[f"{output}.bias"]
        logits = patch_logits(patches, *layer, text.expand(crops, 2, -1), settings.scale)
        total += torch.sigmoid(upsample(logits, store.size_px, align_corners=aligned))
        if memory is not None:
            distances = distances_to(memory[output], patches, store.digests[number])
            total += upsample(distances, store.size_px, align_corners=aligned)
    return total
