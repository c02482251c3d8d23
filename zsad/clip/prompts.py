"""Prompts: the ensembles of the dual-image paper, AnoVL, WinCLIP, APRIL-GAN and CLIP.

The first is in section 2 of the supplement to Zhang et al., Dual-Image Enhanced CLIP, 2024. It is made after AnoVL's
(Deng et al., 2023) but differs from it. AnoVL's public code has three kinds of picture for each category, such as
industrial image, beside the word photo. Both have the same states and, without domain words, the same 22 templates.
"""

from __future__ import annotations

from dataclasses import dataclass

from medad.base.errors import ConfigError
from zsad.config.run import PromptSettings

TEMPLATES: tuple[str, ...] = (
    "a [d] cropped photo of the [s]",
    "a [d] cropped photo of a [s]",
    "a [d] close-up photo of a [s]",
    "a [d] close-up photo of the [s]",
    "a bright [d] photo of a [s]",
    "a bright [d] photo of the [s]",
    "a dark [d] photo of the [s]",
    "a dark [d] photo of a [s]",
    "a jpeg corrupted [d] photo of a [s]",
    "a jpeg corrupted [d] photo of the [s]",
    "a blurry [d] photo of the [s]",
    "a blurry [d] photo of a [s]",
    "a [d] photo of a [s]",
    "a [d] photo of the [s]",
    "a [d] photo of a small [s]",
    "a [d] photo of the small [s]",
    "a [d] photo of a large [s]",
    "a [d] photo of the large [s]",
    "a [d] photo of the [s] for visual inspection",
    "a [d] photo of a [s] for visual inspection",
    "a [d] photo of the [s] for anomaly detection",
    "a [d] photo of a [s] for anomaly detection",
)
"""Templates with a domain word [d] and a state [s], as printed in the supplement, including wrong articles."""

NORMAL_STATES: tuple[str, ...] = (
    "normal [c]",
    "unblemished [c]",
    "flawless [c]",
    "perfect [c]",
    "[c] without flaw",
    "[c] without damage",
    "[c] without defect",
)
"""States of a normal category [c]."""

ANOMALOUS_STATES: tuple[str, ...] = (
    "damaged [c]",
    "abnormal [c]",
    "imperfect [c]",
    "blemished [c]",
    "[c] with flaw",
    "[c] with damage",
    "[c] with defect",
)
"""States of an anomalous category [c]."""

WINCLIP_TEMPLATES: tuple[str, ...] = tuple(template.replace("[d] ", "") + "." for template in TEMPLATES)
"""Templates of WinCLIP's compositional ensemble: the same 22 without a domain word and with a full stop."""

WINCLIP_NORMAL_STATES: tuple[str, ...] = (
    "[c]",
    "flawless [c]",
    "perfect [c]",
    "unblemished [c]",
    "[c] without flaw",
    "[c] without defect",
    "[c] without damage",
)
WINCLIP_ANOMALOUS_STATES: tuple[str, ...] = ("damaged [c]", "[c] with flaw", "[c] with defect", "[c] with damage")

ANOVL_SURFACES: tuple[str, ...] = ("industrial photo", "textural photo", "surface picture")
ANOVL_OBJECTS: tuple[str, ...] = ("industrial photo", "industrial image", "manufacturing image")
"""Words that replace `photo` in the 22 templates of AnoVL's code, for surfaces and for objects."""
ANOVL_NAMES = {"macaroni1": "macaroni", "macaroni2": "macaroni"}
"""Categories of VisA that have another name in AnoVL's prompts."""

APRIL_GAN_TEMPLATES: tuple[str, ...] = (
    *(
        f"a {kind} photo of {article} [s]."
        for kind in ("bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white")
        for article in ("a", "the")
    ),
    *(f"a {kind} photo of {article} [s]." for kind in ("jpeg corrupted", "blurry", "good") for article in ("a", "the")),
    *(f"a photo of {article} {size}[s]." for size in ("", "cool ", "small ", "large ") for article in ("a", "the")),
    "a photo of my [s].",
    "a photo of one [s].",
    *(f"{begin} {article} [s] in the scene." for begin in ("there is", "this is") for article in ("a", "the")),
    "this is one [s] in the scene.",
)
"""The 35 templates of APRIL-GAN (Chen et al., 2023)."""
APRIL_GAN_ANOMALOUS_STATES: tuple[str, ...] = ("damaged [c]", "broken [c]", *WINCLIP_ANOMALOUS_STATES[1:])
"""APRIL-GAN's anomalous states. Its normal states are WinCLIP's."""

CLIP_PROMPTS = ("a photo of a normal [c].", "a photo of an anomalous [c].")
"""Normal and anomalous prompt of plain CLIP."""

SURFACE_DOMAINS: tuple[str, ...] = ("industrial", "textural", "surface")
OBJECT_DOMAINS: tuple[str, ...] = ("industrial", "manufacturing")


@dataclass(frozen=True)
class Ensemble:
    """Normal and anomalous prompts of one category, all different.

    The supplement's ensemble has 22 templates x 7 states x domain words for each of the two.
    """

    normal: tuple[str, ...]
    anomalous: tuple[str, ...]
    unit_length: bool = True
    """Whether the features of the prompts are L2-normalised before their mean is taken."""


def category_words(category: str, settings: PromptSettings) -> str:
    """Return a category's name in prompts: the one in the settings, else its own with spaces for underscores.

    The styles `april_gan` and `anovl` keep the underscores, as their authors' code does.
    """
    if given := settings.names.get(category):
        return given
    words = " ".join(category.replace("_", " ").split())
    if not words or settings.style not in {"april_gan", "anovl"}:
        return words
    return ANOVL_NAMES.get(category, category) if settings.style == "anovl" else category


def domain_words(category: str, settings: PromptSettings) -> tuple[str, ...]:
    """Return a category's domain words: those of the settings, else the supplement's for surfaces or for objects."""
    if settings.domains is not None:
        return settings.domains
    return SURFACE_DOMAINS if category.lower() in settings.surface_categories else OBJECT_DOMAINS


def ensemble(category: str, settings: PromptSettings) -> Ensemble:
    """Return the prompts of a category in the style of the settings.

    Raises
    ------
    ConfigError
        The category's name consists of underscores only.

    Examples
    --------
    >>> prompts = ensemble("metal_nut", PromptSettings())
    >>> prompts.normal[0], len(prompts.normal)
    ('a industrial cropped photo of the normal metal nut', 308)
    """
    words, domains = category_words(category, settings), domain_words(category, settings)
    if not words:
        raise ConfigError(f"prompts: category {category!r} has no name for prompts; set it in prompts.names")

    if settings.style == "clip":
        plain = [prompt.replace("[c]", words) for prompt in CLIP_PROMPTS]
        return Ensemble((plain[0],), (plain[1],))
    templates, normal, anomalous = WINCLIP_TEMPLATES, WINCLIP_NORMAL_STATES, WINCLIP_ANOMALOUS_STATES
    if settings.style == "april_gan":
        templates, anomalous = APRIL_GAN_TEMPLATES, APRIL_GAN_ANOMALOUS_STATES
    elif settings.style == "anovl":
        templates, normal, anomalous = _anovl_templates(category, settings), NORMAL_STATES, ANOMALOUS_STATES
    elif settings.style == "supplement":
        templates = tuple(template.replace("[d]", domain) for domain in domains for template in TEMPLATES)
        normal, anomalous = NORMAL_STATES, ANOMALOUS_STATES

    def filled(states: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(template.replace("[s]", state).replace("[c]", words) for state in states for template in templates)

    return Ensemble(filled(normal), filled(anomalous), unit_length=settings.style != "anovl")


def _anovl_templates(category: str, settings: PromptSettings) -> tuple[str, ...]:
    """Return AnoVL's 66 templates: 22 without a domain word, with the word photo replaced by each of three kinds."""
    kinds = ANOVL_SURFACES if category.lower() in settings.surface_categories else ANOVL_OBJECTS
    plain = [template.replace("[d] ", "") for template in TEMPLATES]
    filled = (template.replace("photo", kind) for kind in kinds for template in plain)
    return tuple(template.replace("a industrial", "an industrial") for template in filled)
