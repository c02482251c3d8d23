"""Check the prompts against the lists, counts and examples of the dual-image paper's supplement and of WinCLIP."""

from __future__ import annotations

import pytest

from medad.base.errors import ConfigError
from medad.base.settings import parse_settings
from zsad.clip.prompts import ANOMALOUS_STATES, NORMAL_STATES, TEMPLATES, domain_words, ensemble
from zsad.config.run import PromptSettings

# section 2 of the supplement, verbatim and in its order
PRINTED_TEMPLATES = [
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
]
PRINTED_NORMAL = [
    "normal [c]",
    "unblemished [c]",
    "flawless [c]",
    "perfect [c]",
    "[c] without flaw",
    "[c] without damage",
    "[c] without defect",
]
PRINTED_ABNORMAL = [
    "damaged [c]",
    "abnormal [c]",
    "imperfect [c]",
    "blemished [c]",
    "[c] with flaw",
    "[c] with damage",
    "[c] with defect",
]
PRINTED_SURFACES = ["carpet", "leather", "grid", "tile", "wood"]
PRINTED_DOMAINS = {"all": ["industrial"], "surfaces": ["textural", "surface"], "others": ["manufacturing"]}

# WinCLIP's appendix: 22 templates, each with both articles, 7 normal and 4 anomalous states
WINCLIP_TEMPLATES = [
    "a cropped photo of the [c].",
    "a cropped photo of a [c].",
    "a close-up photo of a [c].",
    "a close-up photo of the [c].",
    "a bright photo of a [c].",
    "a bright photo of the [c].",
    "a dark photo of the [c].",
    "a dark photo of a [c].",
    "a jpeg corrupted photo of a [c].",
    "a jpeg corrupted photo of the [c].",
    "a blurry photo of the [c].",
    "a blurry photo of a [c].",
    "a photo of a [c].",
    "a photo of the [c].",
    "a photo of a small [c].",
    "a photo of the small [c].",
    "a photo of a large [c].",
    "a photo of the large [c].",
    "a photo of the [c] for visual inspection.",
    "a photo of a [c] for visual inspection.",
    "a photo of the [c] for anomaly detection.",
    "a photo of a [c] for anomaly detection.",
]
WINCLIP_NORMAL = ["[o]", "flawless [o]", "perfect [o]", "unblemished [o]"] + [
    f"[o] without {word}" for word in ("flaw", "defect", "damage")
]
WINCLIP_ANOMALOUS = ["damaged [o]", "[o] with flaw", "[o] with defect", "[o] with damage"]


@pytest.mark.parametrize(("category", "words"), [("metal_nut", "metal nut"), ("carpet", "carpet")])
def test_winclips_ensemble_is_every_printed_template_and_state(category: str, words: str) -> None:
    prompts = ensemble(category, PromptSettings(style="winclip"))
    for side, states in ((prompts.normal, WINCLIP_NORMAL), (prompts.anomalous, WINCLIP_ANOMALOUS)):
        expected = [t.replace("[c]", s.replace("[o]", words)) for t in WINCLIP_TEMPLATES for s in states]
        assert len(expected) == len(set(expected)) == 22 * len(states)
        assert sorted(side) == sorted(expected)
    assert (len(prompts.normal), len(prompts.anomalous)) == (154, 88)


def test_plain_clip_has_one_prompt_each_and_no_domains() -> None:
    given = PromptSettings(style="clip", names={"pcb1": "circuit board"}, domains=("medical",))
    prompts = ensemble("pcb1", given)
    assert prompts.normal == ("a photo of a normal circuit board.",)
    assert prompts.anomalous == ("a photo of an anomalous circuit board.",)
    for style in ("clip", "winclip"):
        with pytest.raises(ConfigError, match="has no name"):
            ensemble("_", given.model_copy(update={"style": style}))


def test_lists_are_the_supplements_word_by_word() -> None:
    assert list(TEMPLATES) == PRINTED_TEMPLATES
    assert list(NORMAL_STATES) == PRINTED_NORMAL
    assert list(ANOMALOUS_STATES) == PRINTED_ABNORMAL
    assert list(PromptSettings().surface_categories) == PRINTED_SURFACES
    for category in [*PRINTED_SURFACES, "bottle", "pcb1"]:
        kind = "surfaces" if category in PRINTED_SURFACES else "others"
        assert list(domain_words(category, PromptSettings())) == PRINTED_DOMAINS["all"] + PRINTED_DOMAINS[kind]


@pytest.mark.parametrize("category", ["tile", "metal_nut"])
def test_the_ensemble_is_every_printed_template_state_and_domain(category: str) -> None:
    kind = "surfaces" if category in PRINTED_SURFACES else "others"
    prompts = ensemble(category, PromptSettings())
    for side, states in ((prompts.normal, PRINTED_NORMAL), (prompts.anomalous, PRINTED_ABNORMAL)):
        expected = set()
        for template in PRINTED_TEMPLATES:
            for state in states:
                for domain in PRINTED_DOMAINS["all"] + PRINTED_DOMAINS[kind]:
                    filled = template.replace("[d]", domain).replace("[s]", state)
                    expected.add(filled.replace("[c]", category.replace("_", " ")))
        assert set(side) == expected


def test_lists_are_as_long_as_the_supplement_says() -> None:
    assert (len(TEMPLATES), len(NORMAL_STATES), len(ANOMALOUS_STATES)) == (22, 7, 7)
    assert len(set(TEMPLATES)) == 22
    assert not set(NORMAL_STATES) & set(ANOMALOUS_STATES)
    assert all(template.count("[d]") == template.count("[s]") == 1 for template in TEMPLATES)
    assert all(state.count("[c]") == 1 for state in NORMAL_STATES + ANOMALOUS_STATES)
    # every template occurs with "a" and with "the"
    assert {t.replace(" the ", " a ") for t in TEMPLATES} == {t for t in TEMPLATES if " the " not in t}


@pytest.mark.parametrize(
    ("category", "domains"),
    [(name, 3) for name in ("carpet", "leather", "grid", "tile", "wood", "Carpet")]
    + [(name, 2) for name in ("bottle", "metal_nut", "pcb1", "magnetic_tile")],
)
def test_counts_are_templates_times_states_times_domains(category: str, domains: int) -> None:
    prompts = ensemble(category, PromptSettings())
    for side in (prompts.normal, prompts.anomalous):
        assert len(side) == len(set(side)) == 22 * 7 * domains
        assert not any("[" in prompt or "_" in prompt for prompt in side)


def test_examples_by_hand() -> None:
    tile = ensemble("tile", PromptSettings())
    assert "a bright textural photo of a flawless tile" in tile.normal
    assert "a surface photo of the tile with defect for visual inspection" in tile.anomalous
    nut = ensemble("metal_nut", PromptSettings())
    assert "a jpeg corrupted manufacturing photo of the metal nut without damage" in nut.normal
    assert "a industrial close-up photo of a blemished metal nut" in nut.anomalous
    assert not any("textural" in prompt or "surface" in prompt for prompt in nut.normal + nut.anomalous)
    assert not any("manufacturing" in prompt for prompt in tile.normal + tile.anomalous)


def test_domains_and_names_can_be_given() -> None:
    prompts = ensemble("pcb1", PromptSettings(domains=("medical",), names={"pcb1": "printed circuit board"}))
    assert len(prompts.normal) == 154
    assert prompts.normal[0] == "a medical cropped photo of the normal printed circuit board"
    more = PromptSettings(surface_categories=("magnetic_tile",))
    assert len(ensemble("magnetic_tile", more).normal) == 462
    assert len(ensemble("tile", more).normal) == 308


def test_an_empty_ensemble_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no name"):
        ensemble("_", PromptSettings())
    with pytest.raises(ConfigError, match="domains"):
        parse_settings(PromptSettings, {"domains": []}, source="file")
