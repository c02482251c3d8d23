"""Tests of the prompts of the segmentation-model paper against the table in its figure 2."""

from __future__ import annotations

from collections import Counter

from zsad.scorers.segmentation.prompts import (
    ADDITIONAL_ANOMALOUS_STATES,
    ADDITIONAL_NORMAL_STATES,
    LOCALISING_PROMPTS,
    tile_ensemble,
)

FIGURE_2 = """
good [o] | broken [o] | a tear
normal [o] | bad [o] | a rip
amazing [o] | flawed [o] | some damage
pristine [o] | defective [o] | a fault
undamaged [o] | [o] in poor condition | a break
[o] in good condition | worn [o] | an abnormality
unbroken [o] | [o] with scratches | a defect
[o] without any imperfections | [o] with marks | a crack
[o] without any scratches | [o] with imperfections | an anomaly
[o] without any marks | cracked [o] | a missing component
complete [o] | faulty [o] | an error
new [o] | incomplete [o] | a mark
| bent [o] | a cut
| snapped [o] | a dent
| scratched [o] | a scratch
| shattered [o] | an imperfection
| fractured [o] | a blemish
| burst [o] | a mistake
| [o] in pieces | an error
"""
"""Table of figure 2, row by row, as printed."""


def test_lists_are_those_of_figure_2() -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in FIGURE_2.strip().splitlines()]
    normal, anomalous, localising = (tuple(cell for cell in column if cell) for column in zip(*rows, strict=True))
    assert normal == ADDITIONAL_NORMAL_STATES
    assert anomalous == ADDITIONAL_ANOMALOUS_STATES
    assert localising == LOCALISING_PROMPTS


def test_the_printed_repetition_is_kept() -> None:
    assert [prompt for prompt, count in Counter(LOCALISING_PROMPTS).items() if count > 1] == ["an error"]
    assert len(LOCALISING_PROMPTS) == 19


def test_ensemble_joins_winclips_states_and_templates() -> None:
    prompts = tile_ensemble("metal nut")
    # WinCLIP has 7 normal and 4 anomalous states, and 22 templates
    assert len(prompts.normal) == 22 * (7 + 12)
    assert len(prompts.anomalous) == 22 * (4 + 19)
    everything = prompts.normal + prompts.anomalous
    assert len(set(everything)) == len(everything)
    assert not any("[" in prompt for prompt in everything)
    assert all(prompt.endswith(".") and "metal nut" in prompt for prompt in everything)
    for expected in ("a photo of a metal nut.", "a cropped photo of the pristine metal nut."):
        assert expected in prompts.normal
    for expected in ("a photo of the metal nut with flaw.", "a blurry photo of the metal nut in pieces."):
        assert expected in prompts.anomalous
