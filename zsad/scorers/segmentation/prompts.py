"""Prompts: additional states for WinCLIP's ensemble, and nouns that localise an anomaly.

They are those of Baugh et al., Zero-Shot Anomaly Detection with Pre-trained Segmentation Models, 2023; figure 2.
"""

from __future__ import annotations

from zsad.clip.prompts import WINCLIP_ANOMALOUS_STATES, WINCLIP_NORMAL_STATES, WINCLIP_TEMPLATES, Ensemble

ADDITIONAL_NORMAL_STATES: tuple[str, ...] = (
    "good [o]",
    "normal [o]",
    "amazing [o]",
    "pristine [o]",
    "undamaged [o]",
    "[o] in good condition",
    "unbroken [o]",
    "[o] without any imperfections",
    "[o] without any scratches",
    "[o] without any marks",
    "complete [o]",
    "new [o]",
)
"""Normal states of figure 2 (a); [o] is the object."""

ADDITIONAL_ANOMALOUS_STATES: tuple[str, ...] = (
    "broken [o]",
    "bad [o]",
    "flawed [o]",
    "defective [o]",
    "[o] in poor condition",
    "worn [o]",
    "[o] with scratches",
    "[o] with marks",
    "[o] with imperfections",
    "cracked [o]",
    "faulty [o]",
    "incomplete [o]",
    "bent [o]",
    "snapped [o]",
    "scratched [o]",
    "shattered [o]",
    "fractured [o]",
    "burst [o]",
    "[o] in pieces",
)
"""Anomalous states of figure 2 (b)."""

LOCALISING_PROMPTS: tuple[str, ...] = (
    "a tear",
    "a rip",
    "some damage",
    "a fault",
    "a break",
    "an abnormality",
    "a defect",
    "a crack",
    "an anomaly",
    "a missing component",
    "an error",
    "a mark",
    "a cut",
    "a dent",
    "a scratch",
    "an imperfection",
    "a blemish",
    "a mistake",
    "an error",
)
"""Prompts of figure 2 (c, printed as a second b), the same for every category.

Erratum: the figure lists "an error" twice. The list here is as printed, so this prompt counts twice in the harmonic
mean.
"""


def tile_ensemble(words: str) -> Ensemble:
    """Return WinCLIP's templates filled with WinCLIP's states and those of figure 2, for an object called `words`.

    Examples
    --------
    >>> prompts = tile_ensemble("cashew")
    >>> len(prompts.normal), len(prompts.anomalous), prompts.anomalous[-1]
    (418, 506, 'a photo of a cashew in pieces for anomaly detection.')
    """

    def filled(states: tuple[str, ...]) -> tuple[str, ...]:
        named = [state.replace("[c]", words).replace("[o]", words) for state in states]
        return tuple(template.replace("[s]", state) for state in named for template in WINCLIP_TEMPLATES)

    return Ensemble(
        filled(WINCLIP_NORMAL_STATES + ADDITIONAL_NORMAL_STATES),
        filled(WINCLIP_ANOMALOUS_STATES + ADDITIONAL_ANOMALOUS_STATES),
    )
