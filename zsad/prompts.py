"""The prompt ensemble of 002's supplement, section 2 (AnoVL's lists)."""

from __future__ import annotations

from dataclasses import dataclass

from medad.errors import ConfigError
from zsad.config import PromptSettings

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
"""[d] is a domain word, [s] a state; as printed, articles included."""

NORMAL_STATES: tuple[str, ...] = (
    "normal [c]",
    "unblemished [c]",
    "flawless [c]",
    "perfect [c]",
    "[c] without flaw",
    "[c] without damage",
    "[c] without defect",
)
"""[c] is the category."""

ANOMALOUS_STATES: tuple[str, ...] = (
    "damaged [c]",
    "abnormal [c]",
    "imperfect [c]",
    "blemished [c]",
    "[c] with flaw",
    "[c] with damage",
    "[c] with defect",
)

SURFACE_DOMAINS: tuple[str, ...] = ("industrial", "textural", "surface")
OBJECT_DOMAINS: tuple[str, ...] = ("industrial", "manufacturing")


@dataclass(frozen=True)
class Ensemble:
    """The prompts of one category, all different: 22 templates x 7 states x domains on either side."""

    normal: tuple[str, ...]
    anomalous: tuple[str, ...]


def category_words(category: str, settings: PromptSettings) -> str:
    """How prompts call a category: the name given for it, else its own with underscores as spaces."""
    return settings.names.get(category) or " ".join(category.replace("_", " ").split())


def domain_words(category: str, settings: PromptSettings) -> tuple[str, ...]:
    """The domain words of a category: those given, else the supplement's for surfaces or for all others."""
    if settings.domains is not None:
        return settings.domains
    return SURFACE_DOMAINS if category.lower() in settings.surface_categories else OBJECT_DOMAINS


def ensemble(category: str, settings: PromptSettings) -> Ensemble:
    """Fill the supplement's templates for one category.

    Raises
    ------
    ConfigError
        A category without a name.

    Examples
    --------
    >>> prompts = ensemble("metal_nut", PromptSettings())
    >>> prompts.normal[0], len(prompts.normal)
    ('a industrial cropped photo of the normal metal nut', 308)
    """
    words, domains = category_words(category, settings), domain_words(category, settings)
    if not words:
        raise ConfigError(f"prompts: category {category!r} has no name to put into them")

    def filled(states: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            template.replace("[d]", domain).replace("[s]", state).replace("[c]", words)
            for domain in domains
            for state in states
            for template in TEMPLATES
        )

    return Ensemble(filled(NORMAL_STATES), filled(ANOMALOUS_STATES))
