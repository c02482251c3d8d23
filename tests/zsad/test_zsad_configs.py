"""Every file in configs/zsad loads and is what it says."""

from __future__ import annotations

from pathlib import Path

from zsad.config import ImagesSettings, ZsadSettings, load

FOLDER = Path(__file__).parents[2] / "configs" / "zsad"


def test_every_configuration_loads() -> None:
    files = sorted(FOLDER.glob("*.yaml"))
    assert {path.stem for path in files} >= {"dual_clip", "demo"}
    for path in files:
        assert load(path).name == path.stem


def test_the_papers_configuration_is_the_defaults() -> None:
    paper = load(FOLDER / "dual_clip.yaml")
    assert paper.encoder.model == "ViT-B-16-plus-240"
    assert paper.encoder.tag == "laion400m_e32"
    score = paper.score.model_copy(update={"variants": ("joint_tta",)})
    plain = ZsadSettings(name="dual_clip", data=ImagesSettings(root="data/mvtec"), encoder=paper.encoder)
    assert paper.model_copy(update={"score": score, "published": None}) == plain


def test_local_weights_take_the_place_of_the_tag() -> None:
    """As the comment in the file says."""
    settings = load(FOLDER / "dual_clip.yaml", {"encoder.weights": "/somewhere/file.pt", "encoder.tag": None})
    assert settings.encoder.weights == "/somewhere/file.pt"


def test_the_demo_needs_no_download() -> None:
    demo = load(FOLDER / "demo.yaml")
    assert demo.encoder.model == "embedded"
    assert demo.data.root == "samples:materials"
    assert demo.score.variants == ("text", "visual", "joint", "joint_tta")
