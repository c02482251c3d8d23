"""The settings that each step's key depends on, as a table of settings and steps."""

from __future__ import annotations

from typing import Any

import pytest

from flows.liver import training_steps
from flows.store.step import content_key
from medad.cohort.datasets import Case
from medad.config.liver import parse
from tests.flows.liver_calls import BASE, HEALTHY, changed, keys_of

# the report shows every setting, so its key is not in the table: it always changes
TABLE: list[tuple[str, object, set[str]]] = [
    ("name", "other", set()),
    ("gpus", "cpu", set()),
    ("engine", "dask", set()),
    ("engine_address", "tcp://gpu-server:8786", set()),
    ("engine_workers", 3, set()),
    ("limits.training_hours", 1.0, set()),
    ("limits.encoding_hours", 1.0, set()),
    ("limits.inference_hours", 1.0, set()),
    ("limits.waiting_hours", 1.0, set()),
    ("inference.batch_size", 3, set()),
    ("train.checkpoint_minutes", 1.0, set()),
    ("train_data.root", "/elsewhere", set()),
    ("test_data.root", "/elsewhere", set()),
    ("test_data.cases", ["lits-1"], set()),
    ("test_data.pseudonyms", True, set()),
    ("folds", {"count": 2, "index": 1}, set()),  # the digests of the training cases are in the key
    ("seed", 1, {"restoration", "segmentation"}),
    ("preprocess.window_hu", [-100.0, 200.0], {"prepare"}),
    ("preprocess.slice_px", 128, {"prepare"}),
    ("preprocess.equalise", False, {"prepare"}),
    ("preprocess.lift_dark", False, {"prepare"}),
    ("preprocess.min_liver_px", 9, {"prepare"}),
    ("preprocess.standardise", "median", {"prepare"}),
    ("preprocess.resolution_mm", 2.0, {"prepare"}),
    ("preprocess.frame_mm", 200.0, {"prepare"}),
    ("synthesis.blur_sigma_px", 9.0, {"restoration", "segmentation"}),
    ("synthesis.threshold_grey", 190.0, {"restoration", "segmentation"}),
    ("synthesis.ellipse_px", 5, {"restoration", "segmentation"}),
    ("synthesis.shift_grey", [50.0, 90.0], {"restoration", "segmentation"}),
    ("synthesis.shift_distribution", "normal", {"restoration", "segmentation"}),
    ("synthesis.kind", "perlin_texture", {"restoration", "segmentation"}),
    ("synthesis.texture.threshold", 0.3, set()),
    ("synthesis.lesions.most", 2, set()),
    ("synthesis.solid.most", 2, set()),
    ("train.flip", True, {"restoration", "segmentation"}),
    ("inference.exclude", ["vessels"], {"prepare", "segment"}),
    ("inference.flips", True, {"segment"}),
    ("inference.smooth_mm", 2.0, {"segment"}),
    ("inference.combine", {"segmentation": 0.5, "residual": 0.5}, {"segment"}),
    ("postprocess.auto_range", [0.3, 0.5], {"segment"}),
    ("restoration.architecture", "autoencoder", {"restoration", "segmentation"}),
    ("restoration.widths", [8, 16, 32], {"restoration", "segmentation"}),
    ("restoration.groups", 4, {"restoration", "segmentation"}),
    ("segmentation.widths", [8, 16, 32], {"segmentation"}),
    ("segmentation.groups", 4, {"segmentation"}),
    ("train.restoration.epochs", 3, {"restoration"}),
    ("train.segmentation.epochs", 3, {"segmentation"}),
    ("train.restoration", {"epochs": 200, "steps": 3}, {"restoration"}),
    ("train.segmentation", {"epochs": 1, "steps": 3}, {"segmentation"}),
    ("train.final_factor", 2, set()),  # the steps of the final member are in its keys
    ("train.members", 3, set()),  # the seeds and cases of members are in the keys
    ("train.focal.gamma", 1.0, {"segmentation"}),
    ("train.schedule", "joint", set()),
    ("train.restoration_loss", "l2_ssim", {"restoration"}),
    ("train.snapshot_epochs", 5, {"segmentation"}),
    ("train.mixed_precision", False, {"restoration", "segmentation"}),
    ("postprocess.threshold", 0.4, {"segment"}),
    ("postprocess.min_lesion_mm3", 9.0, {"segment"}),
    ("postprocess.outline_share", 0.5, {"segment"}),
    ("postprocess.false_positive_ml", 2.0, {"segment"}),
    ("evaluation.lesion_overlap", 0.5, {"evaluate"}),
    ("viewer", False, set()),  # then the flow does not write pages at all
    ("test_data.insert.seed", 1, {"insert"}),
    ("test_data.insert.contrast_hu", [-50.0, -30.0], {"insert"}),
    ("test_data.affine_mismatch", "warn", {"insert", "prepare", "evaluate", "case-page"}),
    ("test_data.affine_from", "sform", {"insert", "prepare", "evaluate", "case-page"}),
]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("key", "value", "steps"), TABLE, ids=[row[0] for row in TABLE])
def test_a_setting_changes_the_steps_that_use_it_and_no_other(
    case: Case, key: str, value: object, steps: set[str]
) -> None:
    base, other = keys_of(parse(BASE, source="test"), case), keys_of(changed(key, value), case)
    assert {name for name in base if base[name] != other[name]} - {"report"} == steps


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("key", "value", "steps"), TABLE, ids=[row[0] for row in TABLE])
def test_joint_training_depends_on_what_either_phase_does_but_phase_twos_own(
    key: str, value: object, steps: set[str]
) -> None:
    base, other = (
        content_key(training_steps.train("joint", HEALTHY, settings).parts())
        for settings in (parse(BASE, source="test"), changed(key, value))
    )
    of_phase_two = key.startswith(("train.segmentation", "train.snapshot_epochs"))
    assert (base != other) == (bool(steps & {"restoration", "segmentation"}) and not of_phase_two)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("group", "values", "steps"),
    [
        ("preprocess", {"background": "median"}, {"prepare"}),
        ("synthesis", {"lesions": {"most": 2}}, {"restoration", "segmentation"}),
        ("train", {"augmentation": {"vessels": 2}}, {"restoration", "segmentation"}),
    ],
)
def test_settings_of_slices_in_hu_change_the_steps_that_use_them(
    case: Case, group: str, values: dict[str, object], steps: set[str]
) -> None:
    in_hu: dict[str, Any] = BASE | {
        "preprocess": {"equalise": False, "standardise": "median"},
        "synthesis": {"kind": "lesions"},
        "train": BASE.get("train", {}) | {"augmentation": {}},
    }
    base = keys_of(parse(in_hu, source="test"), case)
    other = keys_of(parse(in_hu | {group: in_hu[group] | values}, source="test"), case)
    assert {name for name in base if base[name] != other[name]} - {"report"} == steps


@pytest.mark.usefixtures("cache")
def test_the_table_knows_every_setting(case: Case) -> None:
    """Every setting is in the table. A new setting must be added there."""

    def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for name, value in values.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
        return found

    known = {row[0] for row in TABLE}
    # Not in the table: settings of the data sets, which are the same for both or only say where files are. Also not:
    # settings of groups that have another one in the table, since whole groups enter a key.
    groups = (
        *("train_data.", "test_data.", "train.restoration.", "train.segmentation.", "train.focal."),
        *("synthesis.texture.", "synthesis.lesions.", "synthesis.solid.", "inference.combine."),
        *("preprocess.background", "train.augmentation", "classifier"),  # these need slices in HU, see the tests
    )
    known.add("segmentation.architecture")  # it has only one value
    missing = leaves(parse(BASE, source="test").model_dump()) - known
    assert not {name for name in missing if not name.startswith(groups)}
