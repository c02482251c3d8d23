"""Tests that scores fused with new weights equal scores computed with these weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medad.base.errors import InputError
from medad.base.storage import file_digest
from tests.zsad.tiny_clip import noise_images, tiny_encoder
from zsad.config.run import AdaptSettings, PromptSettings, ScoreSettings, Variant
from zsad.scorers.dual.fuse import LAMBDAS, fuse_category, with_default_weights
from zsad.scorers.dual.score import score_category
from zsad.scorers.dual.scores_file import Scores
from zsad.steps.encode import encode_category_text, encode_images

VARIANTS: tuple[Variant, ...] = ("text", "text_tta", "visual", "joint", "joint_tta")
PAPER = ScoreSettings(variants=VARIANTS, tau=0.1)
OTHER = ScoreSettings(
    variants=VARIANTS, tau=0.1, lambda_1=0.7, lambda_2=1.3, lambda_3=0.9, lambda_4=1.7, lambda_5=0.4, lambda_text=2.1
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Score the same images with the paper's weights and with other weights."""
    root = tmp_path_factory.mktemp("category")
    encoder = tiny_encoder(root / "model")
    paths = noise_images(root, [(40, 40), (40, 40), (40, 70)])
    encode_category_text("cloth", encoder, PromptSettings(domains=("plain",)), "cpu", root / "text")
    encode_images(paths, [file_digest(path) for path in paths], encoder, "cpu", root / "features")
    folders = (root / "paper", root / "other")
    for settings, out in zip((PAPER, OTHER), folders, strict=True):
        score_category(
            root / "features", root / "text", paths, encoder, settings, AdaptSettings(), seed=3, device="cpu", out=out
        )
    return folders


def test_other_weights_give_what_scoring_with_them_gives(scored: tuple[Path, Path], tmp_path: Path) -> None:
    paper, other = scored
    fuse_category(paper, OTHER, tmp_path / "fused")
    fused, wanted = Scores(tmp_path / "fused"), Scores(other)
    assert fused.index == wanted.index
    for variant in VARIANTS:
        for number in range(len(wanted)):
            np.testing.assert_array_equal(fused.patch_map(number, variant), wanted.patch_map(number, variant))


def test_the_way_back_gives_the_same_file(scored: tuple[Path, Path], tmp_path: Path) -> None:
    paper, other = scored
    fuse_category(other, PAPER, tmp_path / "fused")
    assert (tmp_path / "fused" / "scores.json").read_bytes() == (paper / "scores.json").read_bytes()


@pytest.mark.parametrize("change", [{"tau": 0.2}, {"variants": ("text",)}, {"references": {"count": 2}}])
def test_what_needs_another_scoring_is_refused(
    scored: tuple[Path, Path], tmp_path: Path, change: dict[str, object]
) -> None:
    settings = ScoreSettings.model_validate(PAPER.model_dump() | change)
    with pytest.raises(ValueError, match="more than the lambdas"):
        fuse_category(scored[0], settings, tmp_path / "fused")


def test_a_folder_without_scores_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        fuse_category(tmp_path, PAPER, tmp_path / "fused")


def test_every_weight_is_known() -> None:
    assert set(LAMBDAS) == {f"lambda_{name}" for name in ("1", "2", "3", "4", "5", "text")}
    assert with_default_weights(OTHER) == with_default_weights(PAPER) == PAPER
