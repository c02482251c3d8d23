"""The ensemble against the supplement's own counts and examples."""

from __future__ import annotations

import pytest

from medad.errors import ConfigError
from medad.settings import parse_settings
from zsad.config import PromptSettings
from zsad.prompts import ANOMALOUS_STATES, NORMAL_STATES, TEMPLATES, ensemble


def test_lists_are_as_long_as_the_supplement_says() -> None:
    assert (len(TEMPLATES), len(NORMAL_STATES), len(ANOMALOUS_STATES)) == (22, 7, 7)
    assert len(set(TEMPLATES)) == 22
    assert not set(NORMAL_STATES) & set(ANOMALOUS_STATES)
    assert all(template.count("[d]") == template.count("[s]") == 1 for template in TEMPLATES)
    assert all(state.count("[c]") == 1 for state in NORMAL_STATES + ANOMALOUS_STATES)
    # every template comes with "a" and with "the"
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
