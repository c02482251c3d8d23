"""Test-time adaptation with pseudo anomalies: a pure function of one image's features.

It is section 3.3 (eq. 7-11) of the dual-image paper (Zhang et al., Dual-Image Enhanced CLIP, 2024).
Each image has its own adapter and its own optimiser state, so no score depends on another image.
The adapters of a batch are one tensor [B, D, D]. AdamW updates each number independently.
So one optimiser for the tensor is equal to B independent optimisers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from medad.base.errors import ConfigError
from medad.base.noise import perlin_masks
from zsad.config.run import AdaptSettings
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.textures import Textures

MAX_MASK_DRAWS = 100
"""Number of masks tried per crop. With DRAEM's values, about one mask in twenty is empty.

A hundred empty masks in a row mean that the settings allow no mask.
"""


@dataclass(frozen=True)
class Corrupted:
    """Crops with a texture painted over a part of each.

    Attributes
    ----------
    images
        Pixel values, 0..1.
    mask
        M_a of eq. 10: the share of painted pixels in each patch, 0..1. Patches are in the encoder's order.
    """

    images: Float[Tensor, "B 3 S S"]
    mask: Float[Tensor, "B N"]


def crop_generator(seed: int, sha256: str, crop: int) -> torch.Generator:
    """Return the generator of one crop's pseudo anomaly. It depends only on the arguments, not on other images."""
    digest = hashlib.sha256(f"pseudo anomaly {seed} {sha256} {crop}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def corrupt(
    crops: Float[Tensor, "B 3 S S"],
    generators: Sequence[torch.Generator],
    grid: int,
    settings: AdaptSettings,
    textures: Textures,
) -> Corrupted:
    """Paint DRAEM's pseudo anomalies on crops: textures, partly transparent, in the shape of Perlin masks.

    Parameters
    ----------
    crops
        Pixel values, 0..1. All work is done on their device. Each crop of an image gets its own pseudo anomaly.
    generators
        One generator per crop, on the CPU.
    grid
        Number of patches per side of a crop.
    settings
        Range of the opacity, and the smallest mask.
    textures
        Source of the textures.

    Raises
    ------
    ConfigError
        No mask touches `min_mask_patches` patches.
    InputError
        A texture cannot be read.
    """
    size_px, device = crops.shape[-1], crops.device
    texture = textures.draw(generators, size_px, device)
    low, high = settings.opacity
    opacity = torch.stack([torch.rand((), generator=generator) for generator in generators]) * (high - low) + low
    painted = _masks(generators, size_px, grid, settings, device)
    share = painted[:, None] * opacity.to(device)[:, None, None, None]
    return Corrupted(torch.lerp(crops, texture, share), patch_shares(painted, grid))


def patch_shares(painted: Float[Tensor, "B S S"], grid: int) -> Float[Tensor, "B N"]:
    """Return the share of painted pixels in each patch. Pixels right of and below the last patch are ignored."""
    return functional.avg_pool2d(painted[:, None], painted.shape[-1] // grid)[:, 0, :grid, :grid].flatten(1)


def _masks(
    generators: Sequence[torch.Generator], size_px: int, grid: int, settings: AdaptSettings, device: torch.device
) -> Float[Tensor, "B S S"]:
    """Return one mask per generator. A mask that touches too few patches is replaced by the generator's next one."""
    masks = torch.zeros(len(generators), size_px, size_px, device=device)
    open_rows = list(range(len(generators)))
    for _ in range(MAX_MASK_DRAWS):
        drawn = perlin_masks(
            [generators[row] for row in open_rows],
            (size_px, size_px),
            device=device,
        ).to(masks.dtype)
        masks[open_rows] = drawn
        touched = (patch_shares(drawn, grid) > 0).sum(1).tolist()
        open_rows = [row for row, n in zip(open_rows, touched, strict=True) if n < settings.min_mask_patches]
        if not open_rows:
            return masks
    raise ConfigError(
        f"adapt: none of {MAX_MASK_DRAWS} Perlin masks touched min_mask_patches = {settings.min_mask_patches} of "
        f"{grid**2} patches; lower it"
    )


def adapt(
    patches: Float[Tensor, "B N D"],
    corrupted: Float[Tensor, "B N D"],
    mask: Float[Tensor, "B N"],
    target: Float[Tensor, "B N"],
    text: Float[Tensor, "2 D"],
    settings: AdaptSettings,
    tau: float,
) -> Float[Tensor, "B N"]:
    """Train one adapter per image, on that image only (eq. 7, 8, 10, 11), and return A_T (eq. 9).

    The adapter G is a matrix without bias. It starts at the identity, so q_T = q before the first step. Adapted
    tokens are L2-normalised before they are compared with the text, as all tokens are.

    Eq. 10 is taken literally: the mean, over the patches with M_a > 0, of -M_a log(softmax).
    M_a is the painted share of a patch.

    *Erratum:* eq. 11 prints L_sim = sim(A_VL, A_T). Minimising this would make the two maps less similar. But the text
    says that the loss should "ensure consistency". So L_sim = 1 - cos(A_VL, A_T) here, the cosine of the two maps as
    vectors of N numbers.

    Parameters
    ----------
    patches, corrupted
        Tokens of the images and of their corrupted copies, L2-normalised. N counts all patches of an image's crops.
    mask
        M_a, 0..1.
    target
        Map that A_T should stay consistent with: A_VL (eq. 6), or A_L without a reference.
    text
        Normal and anomalous text features, L2-normalised.
    settings
        Settings of AdamW, the number of steps, and beta.
    tau
        Temperature of eq. 1-3.

    Returns
    -------
    A_T of the clean images, 0..1; higher is more anomalous.
    """
    n = patches.shape[1]
    # the caller may be in inference_mode: tensors that autograd saves must be created outside of it
    with torch.inference_mode(mode=False), torch.enable_grad():
        tokens = torch.cat((patches, corrupted), 1)
        weight = mask / (mask > 0).sum(1, keepdim=True).clamp_min(1)
        goal, text_features = target * 1.0, text * 1.0
        adapter = torch.eye(tokens.shape[2], dtype=tokens.dtype, device=tokens.device).repeat(len(tokens), 1, 1)
        adapter.requires_grad_()
        optimiser = torch.optim.AdamW(
            [adapter], lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        for _ in range(settings.steps):
            scores = _adapted_scores(tokens, adapter, text_features, tau)
            clean, pseudo = scores[:, :n], scores[:, n:]
            # -log(exp(A'_T) / (exp(A_T) + exp(A'_T)))
            loss_pseudo = (weight * functional.softplus(clean - pseudo)).sum(1)
            loss_similar = 1 - functional.cosine_similarity(goal, clean, dim=1)
            optimiser.zero_grad()
            # a sum over images: the gradient of each adapter depends on its own image only
            torch.autograd.backward((loss_pseudo + settings.beta * loss_similar).sum())
            optimiser.step()
    with torch.no_grad():
        return _adapted_scores(patches, adapter.detach(), text, tau)


def _adapted_scores(
    tokens: Float[Tensor, "B N D"], adapter: Float[Tensor, "B D D"], text: Float[Tensor, "2 D"], tau: float
) -> Float[Tensor, "B N"]:
    """Return F of the adapted tokens q_T = (G(q) + q) / 2 (eq. 7 and 8)."""
    adapted = (tokens @ adapter.mT + tokens) / 2
    return text_scores(functional.normalize(adapted, dim=-1), text, tau)
