"""Tests of the reasons why a run is not comparable with published figures: all settings that affect them, no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zsad.config.run import EncoderSettings, EvaluationSettings, PromptSettings, ReferenceSettings
from zsad.config.settings import ZsadSettings, load
from zsad.reports.comparable import (
    encoder_deviations,
    reasons_not_comparable,
    shared_deviations,
    system_deviations,
)
from zsad.reports.published import CATEGORIES, TEST_IMAGES, Benchmark
from zsad.scorers.anovl.settings import AnoVl
from zsad.scorers.dual.settings import DualImage
from zsad.scorers.musc.settings import MuSc
from zsad.scorers.winclip.settings import WinClip

PAPER = Path(__file__).parents[3] / "configs" / "zsad" / "dual_clip.yaml"
COMPARE = PAPER.parent / "compare.yaml"
DTD = {"method.adapt.textures": "/data/dtd"}


def all_test_images(benchmark: Benchmark) -> dict[str, int]:
    names = CATEGORIES[benchmark]
    first, rest = divmod(TEST_IMAGES[benchmark], len(names))
    return {name: first + (number < rest) for number, name in enumerate(names)}


def reasons(**changes: Any) -> list[str]:
    values = DTD | {key.replace("__", "."): value for key, value in changes.items()}
    settings: ZsadSettings = load(PAPER, values)
    return reasons_not_comparable(settings, "mvtec", all_test_images("mvtec"))


def test_the_papers_configuration_on_the_whole_set_compares() -> None:
    assert reasons() == []
    assert reasons(published="visa") == []
    assert reasons_not_comparable(load(PAPER, DTD), "visa", all_test_images("visa")) == []
    # the same settings in other words
    assert reasons(encoder__vv_blocks=12, encoder__size_px=240, evaluation__size_px=240) == []
    assert reasons(encoder__vv_blocks=list(range(12))) == []
    local = {"encoder.weights": "/models/vit.pt", "encoder.tag": None}
    assert reasons_not_comparable(load(PAPER, DTD | local), "mvtec", all_test_images("mvtec")) == []


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("method__tau", 1, "method.tau 1 (published 0.07)"),
        ("method__lambda_1", 2, "method.lambda_1 2 (published 1)"),
        ("method__lambda_2", 1, "method.lambda_2 1 (published 1.5)"),
        ("method__lambda_3", 0, "method.lambda_3 0 (published 1)"),
        ("method__lambda_4", 0.5, "method.lambda_4 0.5 (published 1)"),
        ("method__lambda_5", 2, "method.lambda_5 2 (published 1)"),
        ("method__lambda_text", 2, "method.lambda_text 2 (published 1)"),
        ("method__references", {"count": 3}, "method.references.count 3 (published 1)"),
        ("method__references", {"aggregate": "mean"}, "method.references.aggregate mean (published min)"),
        ("method__adapt__steps", 5, "method.adapt.steps 5 (published 2)"),
        ("method__adapt__beta", 0, "method.adapt.beta 0 (published 0.5)"),
        ("method__adapt__textures", None, "this run uses generated textures"),
        ("encoder__vv_blocks", 6, "encoder.vv_blocks 6 (published all)"),
        ("encoder__vv_feed_forward", True, "encoder.vv_feed_forward True"),
        ("encoder__size_px", 336, "encoder.size_px 336"),
        ("encoder__fit", "squash", "encoder.fit squash (published crops)"),
        ("encoder__interpolation", "bicubic", "encoder.interpolation bicubic (published bilinear)"),
        ("encoder__positions", "bilinear", "encoder.positions bilinear (published auto)"),
        ("encoder__quick_gelu", True, "encoder.quick_gelu True (published auto)"),
        ("evaluation__size_px", 518, "evaluation.size_px 518"),
        ("evaluation__smoothing_sigma_px", 4, "evaluation.smoothing_sigma_px 4 (published 0)"),
        ("evaluation__align_corners", True, "evaluation.align_corners True"),
        ("evaluation__max_fpr", 0.1, "evaluation.max_fpr 0.1 (published 0.3)"),
        ("prompts__domains", ["medical"], "prompts.domains medical"),
        ("seeds", [0, 1], "means over 6 seeds, this run has 2"),
        ("encoder__tag", "laion400m_e31", "this run uses laion400m_e31"),
    ],
)
def test_each_difference_is_named(key: str, value: Any, expected: str) -> None:
    [reason] = reasons(**{key: value})
    assert expected in reason
    assert "\n" not in reason


@pytest.mark.parametrize("preset", ["musc", "april_gan", "anomalyclip", "winclip", "anovl"])
def test_encoder_of_its_preset_deviates_in_nothing(preset: str) -> None:
    values = {"preset": preset, "model": "ViT-L-14-336", "tag": "openai"}
    if preset == "anovl":
        values["fit"] = "squash"  # the dual-image paper shares the preset, but crops
    assert encoder_deviations("x", preset, EncoderSettings.model_validate(values)) == []


@pytest.mark.parametrize(("benchmark", "neighbours"), [("mvtec", [1, 2, 3]), ("visa", [1, 8, 9])])
def test_the_comparison_of_the_papers_deviates_in_nothing(benchmark: Benchmark, neighbours: list[int]) -> None:
    paper = load(COMPARE)
    found = shared_deviations(paper.prompts, paper.evaluation, paper.systems)
    for given in paper.systems:
        system = given.model_copy(update={"neighbours": tuple(neighbours)}) if isinstance(given, MuSc) else given
        found += system_deviations(system, benchmark)
        found += encoder_deviations(system.display_name, system.system, paper.encoders[system.encoder])
    assert found == []


def test_deviations_of_a_compared_system_are_named() -> None:
    assert system_deviations(MuSc(), "mvtec") == ["MuSc.neighbours 1, 8, 9 (published 1, 2, 3)"]
    assert system_deviations(MuSc(), "visa") == []
    assert system_deviations(AnoVl(mean_patches=1, tau=0.07, align_corners=False), "mvtec") == [
        "AnoCLIP.align_corners False (published True)",
        "AnoCLIP.tau 0.07 (published 1)",
        "AnoCLIP.mean_patches 1 (published 3)",
    ]
    assert system_deviations(DualImage(tau=1.0, references=ReferenceSettings(count=7), label="seven"), "visa") == [
        "seven.tau 1 (published 0.07)",
        "seven.references.count 7 (published 1)",
    ]
    assert system_deviations(WinClip(shots=4), "visa") == []


def test_deviations_that_all_systems_share_are_named() -> None:
    systems = (MuSc(), WinClip())
    aligned = EvaluationSettings(align_corners=True, smoothing_sigma_px=4)
    assert shared_deviations(PromptSettings(domains=("medical",)), aligned, systems) == [
        "evaluation.smoothing_sigma_px 4 (published 0)",
        "evaluation.align_corners True (published otherwise for WinCLIP)",
        "prompts.domains medical",
    ]
    # MuSc reads no prompts, and its corners are aligned anyway
    aligned = EvaluationSettings(align_corners=True)
    assert shared_deviations(PromptSettings(domains=("medical",)), aligned, [MuSc()]) == []


def test_deviations_of_a_compared_encoder_are_named() -> None:
    plain = EncoderSettings(model="ViT-L-14-336", tag="openai")
    assert encoder_deviations("MuSc", "musc", plain) == [
        "MuSc: encoder.size_px None (published 518)",
        "MuSc: encoder.fit crops (published squash)",
        "MuSc: encoder.interpolation bilinear (published bicubic)",
        "MuSc: encoder.positions auto (published bicubic)",
        "MuSc: encoder.quick_gelu auto (published False)",
    ]
    quick = plain.model_copy(update={"quick_gelu": True})
    assert "MuSc: encoder.quick_gelu True (published False)" in encoder_deviations("MuSc", "musc", quick)
    assert encoder_deviations("CLIP", "clip", plain) == []


@pytest.mark.parametrize(
    ("variants", "changes"),
    [
        (["text"], {"method__lambda_1": 3, "method__lambda_2": 3, "method__lambda_4": 3, "method__lambda_5": 3}),
        (["text", "visual"], {"method__adapt__steps": 9, "method__lambda_text": 3}),
        (["joint"], {"method__lambda_2": 3, "method__adapt__textures": None}),
        (["visual"], {"method__tau": 1, "method__lambda_3": 3}),
        (["joint_tta"], {"method__lambda_text": 3, "evaluation__threshold_quantile": 0.5}),
    ],
)
def test_what_has_no_part_in_the_figures_is_no_difference(variants: list[str], changes: dict[str, Any]) -> None:
    assert reasons(method__variants=variants, **changes) == []


def test_other_images_are_another_set() -> None:
    settings = load(PAPER, DTD)
    scored = all_test_images("mvtec")
    less = scored | {"screw": scored["screw"] - 4}
    assert reasons_not_comparable(settings, "mvtec", less) == ["MVTec AD has 1,725 test images, this run scored 1,721"]
    [reason] = reasons_not_comparable(settings, "mvtec", {"screw": 160, "nut": 3})
    assert "15 categories of MVTec AD, this run has 1 of them and other categories" in reason
