"""AnomalyCLIP: two learned prompts, deep tokens in the frozen text tower, and DPAM patches.

Equations and sections are those of the AnomalyCLIP paper (Zhou et al., ICLR 2024).
Only the text tower has learned parts. The image tower is the frozen encoder (preset `anomalyclip`).
Its class tokens and V-V patches are features on disk. The encoder's setting `vv_attention` selects q-q, k-k or v-v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from jaxtyping import Bool, Float, Int64
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from medad.base.errors import ConfigError
from zsad.clip.encoder import Encoder
from zsad.clip.prompts import category_words
from zsad.clip.text_tower import encode_embeddings, end_of_text, layers, tower_of, unsupported_reason, width
from zsad.config.run import PromptSettings
from zsad.scorers.anomalyclip.settings import AnomalyClip
from zsad.scorers.dual.scorer import text_scores
from zsad.scorers.interface import CategoryFeatures, Scored
from zsad.scorers.learned import Batch, Weights, dice_loss, focal_loss, patches_of, upsample
from zsad.scorers.weights_file import trained_weights, with_trained_values

INITIAL_STD = 0.02
"""Standard deviation of the learned embeddings before training, as CLIP uses for its word embeddings."""


def object_words(category: str, settings: AnomalyClip) -> str:
    """Return the word that prompts use: `object`, or the category's words if prompts are object-aware."""
    return "object" if settings.prompt == "object_agnostic" else category_words(category, PromptSettings())


def shapes(settings: AnomalyClip, width: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights: V, W, and q_2..q_M'. The q are left out if Q is 0 or M' is 1."""
    found: dict[str, tuple[int, ...]] = dict.fromkeys(("normal", "anomalous"), (settings.context_tokens, width))
    if settings.deep_tokens and settings.depth > 1:
        found["deep"] = (settings.depth - 1, settings.deep_tokens, width)
    return found


def check_tower(encoder: Encoder, settings: AnomalyClip) -> None:
    """Raise ConfigError if the encoder's text tower cannot do what the settings say."""
    reason = unsupported_reason(encoder.model)
    if reason is None and not isinstance(encoder.tokenizer, open_clip.SimpleTokenizer):
        reason = "its tokenizer is not CLIP's"
    if reason is not None:
        raise ConfigError(f"{settings.title} cannot learn prompts for {encoder.description}: {reason}")
    depth = layers(encoder.model)
    if settings.deep_tokens and settings.depth > depth:
        raise ConfigError(
            f"depth {settings.depth} is too large: the text tower of {encoder.description} has {depth} layers"
        )


def prompt_ids(encoder: Encoder, words: Sequence[str], settings: AnomalyClip) -> Int64[Tensor, "U 2 T"]:
    """Return the tokens of `[V_1]..[V_E][words]` and `[W_1]..[W_E][damaged][words]`.

    Each row begins with the start token. All rows are cut after the end of the longest prompt.
    Positions of learned words have the placeholder 0. Raise ConfigError if a prompt is too long.
    """
    stop = "." if settings.full_stop else ""
    prompts = [f"{state}{each}{stop}" for each in words for state in ("", "damaged ")]
    room = encoder.context_length - settings.context_tokens
    fixed = encoder.tokenizer(prompts, context_length=encoder.context_length + 1)
    length = int(fixed.argmax(dim=1).max()) + 1
    if length > room:
        longest = prompts[int(fixed.argmax(dim=1).argmax())]
        raise ConfigError(
            f"{settings.title}: {settings.context_tokens} learned words leave no room for {longest!r} in the "
            f"{encoder.context_length} tokens that {encoder.description} reads"
        )
    learned = torch.zeros(len(prompts), settings.context_tokens, dtype=torch.long)
    ids = torch.cat([fixed[:, :1], learned, fixed[:, 1:length]], dim=1)
    return ids.reshape(len(words), 2, -1).to(encoder.device)


def text_features(encoder: Encoder, ids: Int64[Tensor, "U 2 T"], weights: Weights) -> Float[Tensor, "U 2 D"]:
    """Return g_n and g_a, L2-normalised (section 3.2, eq. 3). The result is differentiable in the weights."""
    flat = ids.flatten(0, 1)
    words = tower_of(encoder.model).token_embedding(flat)
    learned = torch.stack([weights["normal"], weights["anomalous"]]).repeat(len(ids), 1, 1)
    embedded = torch.cat([words[:, :1], learned, words[:, 1 + learned.shape[1] :]], dim=1)
    features = encode_embeddings(encoder.model, embedded, end_of_text(encoder.model, flat), weights.get("deep"))
    return functional.normalize(features, dim=-1).reshape(len(ids), 2, -1)


def global_loss(
    class_tokens: Float[Tensor, "B D"], text: Float[Tensor, "B 2 D"], anomalous: Bool[Tensor, " B"], tau: float
) -> Float[Tensor, ""]:
    """Return L_global of eq. 2: the cross-entropy of the softmax of eq. 1."""
    return functional.cross_entropy(torch.einsum("bd,bcd->bc", class_tokens, text) / tau, anomalous.long())


def local_loss(shares: Float[Tensor, "B 2 S S"], masks: Bool[Tensor, "B S S"]) -> Float[Tensor, ""]:
    """Return L_local = Focal(Up([S_n, S_a]), S) + Dice(Up(S_n), I - S) + Dice(Up(S_a), S).

    `shares` are already upsampled.
    """
    logarithms = shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
    return focal_loss(logarithms, masks) + dice_loss(shares[:, 0], ~masks) + dice_loss(shares[:, 1], masks)


@dataclass(frozen=True, eq=False)
class AnomalyClipLearner:
    """Training of AnomalyCLIP on features; see `zsad.scorers.learned.Learner`.

    `ids` are the prompts of each source, from `prompt_ids`.
    """

    settings: AnomalyClip
    encoder: Encoder
    ids: Int64[Tensor, "n 2 T"]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.settings.outputs

    def initial(self, generator: torch.Generator) -> Weights:
        """Return weights from a normal distribution with standard deviation 0.02."""
        wanted = shapes(self.settings, width(self.encoder.model))
        return {name: INITIAL_STD * torch.randn(shape, generator=generator) for name, shape in sorted(wanted.items())}

    def loss(self, weights: Weights, batch: Batch) -> Float[Tensor, ""]:
        """Return L_total of eq. 2, with the terms that the settings name."""
        settings = self.settings
        ids, which = self.ids[:1], torch.zeros_like(batch.sources)
        if settings.prompt == "object_aware":
            there, which = torch.unique(batch.sources, return_inverse=True)
            ids = self.ids[there]
        text = text_features(self.encoder, ids, weights)[which]
        total = torch.zeros((), device=text.device)
        if "global" in settings.losses:
            total = total + global_loss(batch.class_tokens, text, batch.anomalous, settings.tau)
        if "local" in settings.losses:
            for name in self.reads:
                logits = torch.einsum("bnd,bcd->bcn", batch.patches[name], text) / settings.tau
                shares = upsample(logits.softmax(dim=1), batch.masks.shape[-1])
                total = total + settings.lambda_local * local_loss(shares, batch.masks)
        return total


def score(category_features: CategoryFeatures, settings: AnomalyClip) -> Iterator[Scored]:
    """Score all images of a category.

    The map is G_sigma(sum over M of (1/2 (I - Up(S_n)) + 1/2 Up(S_a))), one value per pixel.
    The image score is P(g_a, f), the mean over crops.
    The two shares add up to one, also after upsampling. So each term of the sum equals Up(S_a).

    Raises
    ------
    ConfigError, InputError
        The checkpoint is missing, or it belongs to another system, other settings or another encoder.
        Or the text tower cannot use the learned weights.
    """
    settings = with_trained_values(settings, category_features.checkpoint)
    encoder = Encoder.load(category_features.encoder, category_features.device)
    check_tower(encoder, settings)
    weights = trained_weights(category_features, settings, shapes(settings, width(encoder.model)))
    ids = prompt_ids(encoder, [object_words(category_features.category, settings)], settings)
    text = text_features(encoder, ids, weights)[0]
    store = category_features.store
    for number in range(len(store)):
        share = text_scores(store.class_tokens(number).to(category_features.device), text, settings.tau).mean()
        parts = [
            upsample(
                text_scores(patches_of(store, number, name).to(category_features.device), text, settings.tau),
                store.size_px,
            )
            for name in settings.outputs
        ]
        summed = torch.stack(parts).sum(dim=0).cpu()
        yield Scored(number, float(share), _smoothed(summed, settings.sigma_px))


def _smoothed(maps: Float[Tensor, "C S S"], sigma_px: float) -> Float[Tensor, "C S S"]:
    """Smooth each map with a Gaussian of `sigma_px`; edges are reflected."""
    if not sigma_px:
        return maps
    smoothed: np.ndarray = ndimage.gaussian_filter(maps.numpy(), (0, sigma_px, sigma_px))
    return torch.from_numpy(smoothed)
