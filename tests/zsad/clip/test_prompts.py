"""Check the prompts against the lists, counts and examples of the dual-image paper's supplement and of WinCLIP."""

from __future__ import annotations

import pytest

from medad.base.errors import ConfigError
from medad.base.settings import parse_settings
from zsad.clip.prompts import ANOMALOUS_STATES, NORMAL_STATES, TEMPLATES, domain_words, ensemble
from zsad.config.run import PromptSettings, PromptStyle

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


# the public code of APRIL-GAN: 35 templates, 7 normal and 5 anomalous states
APRIL_GAN_TEMPLATES = """
a bad photo of a {}. | a low resolution photo of the {}. | a bad photo of the {}. | a cropped photo of the {}.
a bright photo of a {}. | a dark photo of the {}. | a photo of my {}. | a photo of the cool {}.
a close-up photo of a {}. | a black and white photo of the {}. | a bright photo of the {}. | a cropped photo of a {}.
a jpeg corrupted photo of a {}. | a blurry photo of the {}. | a photo of the {}. | a good photo of the {}.
a photo of one {}. | a close-up photo of the {}. | a photo of a {}. | a low resolution photo of a {}.
a photo of a large {}. | a blurry photo of a {}. | a jpeg corrupted photo of the {}. | a good photo of a {}.
a photo of the small {}. | a photo of the large {}. | a black and white photo of a {}. | a dark photo of a {}.
a photo of a cool {}. | a photo of a small {}. | there is a {} in the scene. | there is the {} in the scene.
this is a {} in the scene. | this is the {} in the scene. | this is one {} in the scene.
"""
APRIL_GAN_NORMAL = ["{}", "flawless {}", "perfect {}", "unblemished {}"] + [
    f"{{}} without {word}" for word in ("flaw", "defect", "damage")
]
APRIL_GAN_ANOMALOUS = ["damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage"]

# AnoVL's public code has three lists of 22 templates for a category: its word for a picture is what differs
ANOVL_TEMPLATES = """
a cropped PHOTO of the {} | a cropped PHOTO of a {} | a close-up PHOTO of a {} | a close-up PHOTO of the {}
a bright PHOTO of a {} | a bright PHOTO of the {} | a dark PHOTO of the {} | a dark PHOTO of a {}
a jpeg corrupted PHOTO of a {} | a jpeg corrupted PHOTO of the {} | a blurry PHOTO of the {} | a blurry PHOTO of a {}
A PHOTO of a {} | A PHOTO of the {} | A PHOTO of a small {} | A PHOTO of the small {} | A PHOTO of a large {}
A PHOTO of the large {} | A PHOTO of the {} for visual inspection | A PHOTO of a {} for visual inspection
A PHOTO of the {} for anomaly detection | A PHOTO of a {} for anomaly detection
"""
ANOVL_NORMAL = ["normal {}", "flawless {}", "perfect {}", "unblemished {}"] + [
    f"{{}} without {word}" for word in ("flaw", "defect", "damage")
]
ANOVL_ANOMALOUS = ["damaged {}", "abnormal {}", "imperfect {}", "blemished {}"] + [
    f"{{}} with {word}" for word in ("flaw", "defect", "damage")
]


def lines_of(text: str) -> list[str]:
    return [part.strip() for line in text.strip().splitlines() for part in line.split("|")]


@pytest.mark.parametrize("category", ["metal_nut", "carpet"])
def test_april_gans_ensemble_has_35_templates_and_raw_names(category: str) -> None:
    prompts = ensemble(category, PromptSettings(style="april_gan"))
    for side, states in ((prompts.normal, APRIL_GAN_NORMAL), (prompts.anomalous, APRIL_GAN_ANOMALOUS)):
        expected = [t.format(s.format(category)) for t in lines_of(APRIL_GAN_TEMPLATES) for s in states]
        assert len(expected) == len(set(expected)) == 35 * len(states)
        assert sorted(side) == sorted(expected)


@pytest.mark.parametrize(
    ("category", "name", "kinds"),
    [
        ("metal_nut", "metal_nut", ["an industrial photo", "an industrial image", "a manufacturing image"]),
        ("macaroni2", "macaroni", ["an industrial photo", "an industrial image", "a manufacturing image"]),
        ("carpet", "carpet", ["an industrial photo", "a textural photo", "a surface picture"]),
    ],
)
def test_anovls_ensemble_has_462_prompts_a_side(category: str, name: str, kinds: list[str]) -> None:
    prompts = ensemble(category, PromptSettings(style="anovl"))
    templates = [
        template.replace("A PHOTO", kind).replace("PHOTO", kind.split(" ", 1)[1])
        for kind in kinds
        for template in lines_of(ANOVL_TEMPLATES)
    ]
    for side, states in ((prompts.normal, ANOVL_NORMAL), (prompts.anomalous, ANOVL_ANOMALOUS)):
        expected = [template.format(state.format(name)) for template in templates for state in states]
        assert len(side) == len(expected) == 462
        assert sorted(side) == sorted(expected)
    assert not prompts.unit_length


@pytest.mark.parametrize("style", ["april_gan", "anovl"])
def test_a_name_in_the_settings_replaces_a_raw_name(style: PromptStyle) -> None:
    prompts = ensemble("pcb_1", PromptSettings(style=style, names={"pcb_1": "circuit board"}))
    assert all("circuit board" in prompt for prompt in prompts.normal + prompts.anomalous)


def test_plain_clip_has_one_prompt_each_and_no_domains() -> None:
    given = PromptSettings(style="clip", names={"pcb1": "circuit board"}, domains=("medical",))
    prompts = ensemble("pcb1", given)
    assert prompts.normal == ("a photo of a normal circuit board.",)
    assert prompts.anomalous == ("a photo of an anomalous circuit board.",)
    for style in ("clip", "winclip", "april_gan", "anovl"):
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
