"""Prompts: the ensembles of the dual-image paper, of WinCLIP and of CLIP.

The first is in section 2 of the supplement to Zhang et al., Dual-Image Enhanced CLIP, 2024. Its lists are AnoVL's.
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


def category_words(category: str, settings: PromptSettings) -> str:
    """Return a category's name in prompts: the one in the settings, else its own with spaces for underscores."""
    return settings.names.get(category) or " ".join(category.replace("_", " ").split())


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
        normal, anomalous = (prompt.replace("[c]", words) for prompt in CLIP_PROMPTS)
        return Ensemble((normal,), (anomalous,))
    if settings.style == "winclip":
        plain = (_composed(states, words) for states in (WINCLIP_NORMAL_STATES, WINCLIP_ANOMALOUS_STATES))
        return Ensemble(*plain)

    def filled(states: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            template.replace("[d]", domain).replace("[s]", state).replace("[c]", words)
            for domain in domains
            for state in states
            for template in TEMPLATES
        )

    return Ensemble(filled(NORMAL_STATES), filled(ANOMALOUS_STATES))


def _composed(states: tuple[str, ...], words: str) -> tuple[str, ...]:
    return tuple(
        template.replace("[s]", state).replace("[c]", words) for state in states for template in WINCLIP_TEMPLATES
    )
