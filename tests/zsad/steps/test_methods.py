"""Settings of methods by name: published for a CLIP, measured for encoders without text."""

from __future__ import annotations

import pytest

from medad.base.errors import ConfigError
from zsad.config.run import EncoderSettings
from zsad.config.systems import METHODS
from zsad.scorers.anomalydino.settings import AnomalyDino
from zsad.scorers.dual.settings import DualImage
from zsad.scorers.musc.settings import MuSc
from zsad.steps import methods
from zsad.steps.methods import WORK_REFERENCES, default_method, default_settings, method_settings

DINO = EncoderSettings(model="dinov2_vits14", seed=0)
LARGE = EncoderSettings(model="ViT-L-14-336", seed=0)
BASE = EncoderSettings(model="ViT-B-16-plus-240", seed=0)


@pytest.mark.parametrize("able", [False, True])
def test_products_are_in_bf16_where_the_processor_has_them(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "cpu_multiplies_bf16", lambda: able)
    for name in ("musc", "musc_2", "anomalydino"):
        assert method_settings(name, DINO).model_dump()["cosines"] == ("bf16" if able else "fp32")
        assert method_settings(name, LARGE).model_dump()["cosines"] == "fp32", "as published"


@pytest.mark.parametrize("name", METHODS)
def test_with_vit_l_every_method_has_its_published_settings(name: str) -> None:
    kind = METHODS[name]
    published = {"blocks": (6, 12, 18, 24)} if name == "musc_2" else {}
    assert method_settings(name, LARGE) == kind(**published)


def test_other_depths_use_the_blocks_at_the_quarters() -> None:
    for name in ("musc", "musc_2", "april_gan"):
        assert method_settings(name, BASE).outputs == ("block-3", "block-6", "block-9", "block-12")


def test_without_text_the_measured_settings_are_used() -> None:
    musc, dino, dual = (method_settings(name, DINO) for name in ("musc", "anomalydino", "dual"))
    assert isinstance(musc, MuSc)
    assert (musc.blocks, musc.degrees, musc.partners, musc.neighbours) == ((6, 8), (1,), 64, ())
    assert isinstance(dino, AnomalyDino)
    assert (dino.blocks, dino.turns) == ((6, 8, 9), 8)
    assert dual.prompts is None
    assert dual.variant_names == ("visual",)


def test_the_default_method_fits_the_encoder() -> None:
    assert default_method(BASE, few_shot=False) == default_method(BASE, few_shot=True) == "dual"
    assert default_method(DINO, few_shot=False) == "musc"
    assert default_method(DINO, few_shot=True) == "anomalydino"
    chosen = default_settings(BASE, few_shot=False)
    assert isinstance(chosen, DualImage)
    assert chosen.references.count == WORK_REFERENCES


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="padim: no such method; expected one of clip,"):
        method_settings("padim", DINO)
