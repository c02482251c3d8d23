"""Configuration of an ablation: variants checked by hand, and one-line errors before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medad.base.errors import ConfigError
from medad.config.ablation import CURVE, ROWS, AblationSettings, flatten_changes, load
from medad.config.liver import load as load_liver

CONFIGS = Path(__file__).parents[3] / "configs" / "liver"
BASE: dict[str, Any] = {
    "name": "base",
    "gpus": "cpu",
    "train_data": {"root": "x", "layout": "btcv"},
    "test_data": {"root": "y", "layout": "lits"},
    "synthesis": {"ellipse_px": 5},
}
ROW_A: dict[str, Any] = {"name": "a", "label": "A"}
ROW_B: dict[str, Any] = {
    "name": "b",
    "label": "B",
    "set": {"synthesis": {"threshold_grey": 180}, "train.focal.gamma": 1},
}
GOOD: dict[str, Any] = {"name": "mine", "base": BASE, "rows": [ROW_A, ROW_B]}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes), encoding="utf-8")
    return path


def test_each_row_is_the_base_with_its_own_values(tmp_path: Path) -> None:
    settings = load(write(tmp_path, set={"synthesis.threshold_grey": 190, "train.restoration.epochs": 3}))
    first, second = settings.variants()
    assert (first.id, second.id) == ("a", "b")
    assert (first.settings.synthesis.threshold_grey, second.settings.synthesis.threshold_grey) == (190, 180)
    assert (first.settings.train.focal.gamma, second.settings.train.focal.gamma) == (2, 1)
    for one in (first, second):
        assert one.settings.train.restoration.epochs == 3, "for all rows"
        assert one.settings.synthesis.ellipse_px == 5, "the base's"
        assert one.settings.gpus == "cpu", "the base's machine, where the ablation names none"


def test_a_sweep_varies_its_row(tmp_path: Path) -> None:
    sweep = {"name": "th", "label": "T", "key": "synthesis.threshold_grey", "values": [150, 160], "row": "b"}
    settings = load(write(tmp_path, sweeps=[sweep]))
    found = [one for one in settings.variants() if one.group == "th"]
    assert [one.settings.synthesis.threshold_grey for one in found] == [150, 160]
    assert {one.settings.train.focal.gamma for one in found} == {1}
    assert [one.id for one in found] == ["th 150", "th 160"]


@pytest.mark.parametrize("how", ["beside", "name beside", "found by name"])
def test_the_base_may_be_a_file(tmp_path: Path, how: str) -> None:
    folder = tmp_path / ("elsewhere" if how == "found by name" else "here")
    folder.mkdir()
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
    here = tmp_path / "here"
    here.mkdir(exist_ok=True)
    path = write(here, base="base.yaml" if how == "beside" else "base")
    settings = load(path, find=lambda name: folder / f"{name}.yaml")
    assert settings.base.synthesis.ellipse_px == 5


def test_overrides_go_to_the_ablation_or_to_all_rows(tmp_path: Path) -> None:
    values = {"seeds": [7], "gpus": [1], "train.restoration.epochs": 9, "train_data.root": "/data"}
    settings = load(write(tmp_path, set={"train.restoration.epochs": 3}), values)
    assert (settings.seeds, settings.gpus) == ((7,), (1,))
    for one in settings.variants():
        assert (one.settings.train.restoration.epochs, one.settings.train_data.root) == (9, "/data")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"rows": [ROW_A | {"set": {"train.restoraton.epochs": 1}}]}, "rows.a: train.restoraton: Extra inputs"),
        ({"rows": [ROW_A | {"set": {"synthesis.ellipse_px": 4}}]}, "rows.a: synthesis: ellipse_px must be odd"),
        ({"rows": [ROW_A | {"set": {"seed.of": 4}}]}, "rows.a: seed.of: seed is not a group of settings"),
        ({"rows": [ROW_A, ROW_A]}, "the name 'a' is used twice or is reserved"),
        ({"rows": []}, "nothing to train"),
        ({"reference": "c"}, "reference: no row 'c'; rows has a, b"),
        ({"seeds": [1, 1]}, "must not contain a seed twice"),
        ({"sweeps": [{"name": "s", "label": "S", "key": "synthesis.ellipse_px", "values": [4]}]}, "sweeps.s=4: synth"),
        ({"sweeps": [{"name": "s", "label": "S", "key": "test_data.root", "values": ["z"]}]}, "cannot be swept"),
        ({"sweeps": [{"name": "s", "label": "S", "key": "seed", "values": [4], "row": "q"}]}, "no row 'q'"),
        (
            {"sweeps": [{"name": "s", "label": "S", "key": "seed", "values": [4], "published": [None, None]}]},
            "2 entries for 1 values",
        ),
        ({"base": "nowhere"}, "base: no file nowhere in the same folder"),
        ({"base": {"name": "x"}}, "base.train_data: Field required"),
        ({"speed": 3}, "speed: Extra inputs"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert rule in message
    assert "\n" not in message


def test_parts_are_chosen_by_name(tmp_path: Path) -> None:
    sweep = {"name": "th", "label": "T", "key": "synthesis.threshold_grey", "values": [150], "row": "b"}
    settings = load(write(tmp_path, sweeps=[sweep], reference="b"))
    assert {one.id for one in settings.select_parts("a").variants()} == {"a"}
    assert {one.id for one in settings.select_parts("th,a").variants()} == {"a", "th 150"}, (
        "a sweep needs no chosen row"
    )
    assert settings.main_row == "b"
    assert settings.select_parts("a").main_row == "a"
    assert not settings.select_parts("a").is_selected("baseline")
    with pytest.raises(ConfigError, match="z: no such row; the configuration has a, b, th, baseline"):
        settings.select_parts("a,z")


def test_dotted_keys_are_leaves() -> None:
    assert dict(flatten_changes({"a": {"b": 1, "c": {}}, "d.e": [2]})) == {"a.b": 1, "a.c": {}, "d.e": [2]}


@pytest.mark.parametrize("name", ["ablation", "ablation_small"])
def test_committed_ablations_are_table_3_2(name: str) -> None:
    """Compare rows and figures with those of the thesis."""
    settings = load(CONFIGS / f"{name}.yaml")
    rows = {one.name: one.settings for one in settings.variants() if one.group == ROWS}
    method = rows["tp_pa_unet"]
    base: AblationSettings = settings
    assert method == base.base_settings(), "the last row is the method itself"
    printed = [row.published.dice_percent for row in settings.rows if row.published is not None]
    assert printed == [14.75, 21.31, 30.17, 40.06, 53.03]
    parts = {
        key: (
            one.train.schedule == "two_phase",
            one.synthesis.kind == "blobs",
            one.restoration.architecture == "unet",
        )
        for key, one in rows.items()
    }
    table = {
        "draem": (False, False, False),
        "tp": (True, False, False),
        "tp_pa": (True, True, False),
        "pa_unet": (False, True, True),
        "tp_pa_unet": (True, True, True),
    }
    assert {key: parts[key] for key in table} == table
    curve = next(one for one in settings.variants() if one.group == CURVE)
    assert settings.curve is not None
    assert curve.settings.train.segmentation.epochs == settings.curve.epochs
    assert curve.settings.train.snapshot_epochs == settings.curve.every


def test_the_small_ablations_row_in_hu_is_hu_small() -> None:
    """Check that the row repeats hu_small.yaml, because all rows of an ablation change one base."""
    rows = {one.name: one.settings for one in load(CONFIGS / "ablation_small.yaml").variants() if one.group == ROWS}
    hu_small = load_liver(CONFIGS / "hu_small.yaml")
    without_blobs: Any = {"name": True, "synthesis": set(hu_small.synthesis.model_dump()) - {"kind", "lesions"}}
    assert rows["hu"].model_dump(exclude=without_blobs) == hu_small.model_dump(exclude=without_blobs)
    assert hu_small.synthesis.kind == "lesions", "which uses none of the blobs' settings left out here"
