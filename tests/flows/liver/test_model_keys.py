"""The keys of the steps that make a model: its members, its lesion copies, its textures, its calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.liver import training_steps
from flows.liver.training_steps import TrainingCase
from flows.store.references import Ref
from medad.base.errors import InputError
from medad.config.liver import parse
from medad.steps.results import LeftOut
from medad.steps.trained import Part
from tests.flows.liver_calls import BASE, HEALTHY, MODEL, key, ref

IN_HU: dict[str, Any] = BASE | {
    "preprocess": {"equalise": False, "standardise": "median"},
    "synthesis": {"kind": "solid_lesions"},
    "classifier": {},
    "train": {"members": 2, "restoration": {"epochs": 3, "steps": 5}},
}


def model_keys(values: dict[str, Any], copies: str = "c", samples: str = "s") -> dict[str, str]:
    """Return the keys of all steps that make a member and the calibration, from settings of slices in HU."""
    settings = parse(values, source="test")
    cases = (TrainingCase(ref("prepare"), ref("lesion-copies", copies), ref("voxel-samples", samples)),)
    left_out = [LeftOut(MODEL.members[0], (ref("prepare", "b"),), (ref("lesion-copies", copies),))]
    calls = [
        training_steps.lesion_copies(ref("prepare"), settings.synthesis.solid, settings.seed),
        training_steps.train("restoration", cases, settings),
        training_steps.train("segmentation", cases, settings, ref("restoration")),
        training_steps.calibration(left_out, settings),
    ]
    if settings.classifier is not None:
        calls.append(training_steps.voxel_samples(ref("prepare"), ref("lesion-copies", copies), settings))
        calls.append(training_steps.classifier(cases, settings))
    return {call.step.name: key(call) for call in calls}


NETS_KEYS = {"restoration", "segmentation"}
MEMBER_TABLE: list[tuple[str, dict[str, Any], set[str]]] = [
    ("classifier", {"trees": 3}, {"classifier"}),
    ("classifier", {"voxels": 500}, {"voxel-samples", "classifier"}),
    ("train", {"augmentation": {}}, {"voxel-samples", *NETS_KEYS}),
    ("synthesis", {"solid": {"most": 2}}, {"lesion-copies", *NETS_KEYS}),
    ("synthesis", {"lesions": {"most": 2}}, set()),
    ("train", {"members": 3}, set()),
    ("train", {"restoration": {"epochs": 4, "steps": 5}}, set()),
    ("train", {"restoration": {"epochs": 3, "steps": 6}}, {"restoration"}),
    ("postprocess", {"threshold": 0.3}, set()),
    ("postprocess", {"threshold": "calibrated"}, set()),
    ("postprocess", {"false_positive_ml": 2.0}, {"calibration"}),
    ("inference", {"batch_size": 3}, set()),
    ("inference", {"flips": True}, {"calibration"}),
]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("group", "values", "steps"), MEMBER_TABLE)
def test_a_setting_changes_the_parts_of_a_model_that_use_it(
    group: str, values: dict[str, Any], steps: set[str]
) -> None:
    base, other = model_keys(IN_HU), model_keys(IN_HU | {group: IN_HU.get(group, {}) | values})
    assert {name for name in base if base[name] != other[name]} == steps


@pytest.mark.usefixtures("cache")
def test_the_seed_changes_all_that_is_drawn() -> None:
    base, other = model_keys(IN_HU), model_keys(IN_HU | {"seed": 1})
    assert {name for name in base if base[name] != other[name]} == set(base) - {"calibration"}


@pytest.mark.usefixtures("cache")
def test_networks_without_solid_lesions_do_not_depend_on_copies() -> None:
    """Only samples and calibration read the copies if the networks learn from other anomalies."""
    values = IN_HU | {"synthesis": {"kind": "lesions"}}
    base, other = model_keys(values), model_keys(values, copies="d")
    assert {name for name in base if base[name] != other[name]} == {"voxel-samples", "calibration"}
    solid, changed_copies = model_keys(IN_HU), model_keys(IN_HU, copies="d")
    readers = {*NETS_KEYS, "voxel-samples", "calibration"}
    assert {name for name in solid if solid[name] != changed_copies[name]} == readers
    other_samples = model_keys(IN_HU, samples="t")
    assert {name for name in solid if solid[name] != other_samples[name]} == {"classifier"}
    without = model_keys({name: value for name, value in IN_HU.items() if name != "classifier"})
    assert {name: solid[name] for name in without} == without


@pytest.mark.usefixtures("cache")
def test_the_network_to_start_from_matters() -> None:
    settings = parse(IN_HU, source="test")
    cases = (TrainingCase(ref("prepare"), ref("lesion-copies")),)
    nets: tuple[training_steps.Training, ...] = ("restoration", "segmentation")
    for net in nets:
        starts = (None, ref("model"), ref("model", "b"))
        keys = {key(training_steps.train(net, cases, settings, ref("restoration"), start)) for start in starts}
        assert len(keys) == 3
    assert len({key(training_steps.classifier(cases, settings, start)) for start in (None, ref("model"))}) == 2


@pytest.mark.usefixtures("cache")
def test_copies_follow_their_cases_in_the_order_of_content() -> None:
    cases = [
        TrainingCase(ref("prepare", one), ref("lesion-copies", two), ref("voxel-samples", three))
        for one, two, three in ("adf", "bce")
    ]
    settings = parse(IN_HU, source="test")
    net = training_steps.train("restoration", reversed(cases), settings)
    assert [each.digest[0] for each in net.arguments["prepared"]] == ["a", "b"]
    assert [each.digest[0] for each in net.arguments["copies"]] == ["d", "c"]
    trees = training_steps.classifier(reversed(cases), settings)
    assert [each.digest[0] for each in trees.arguments["samples"]] == ["f", "e"]


def _textured(**texture: object) -> dict[str, str]:
    """Return the keys of the trainings with DRAEM's pseudo anomalies."""
    values = BASE | {"synthesis": {"kind": "perlin_texture", "texture": texture}}
    settings = parse(values, source="test")
    calls = (
        training_steps.train("restoration", HEALTHY, settings),
        training_steps.train("segmentation", HEALTHY, settings, ref("restoration")),
        training_steps.train("joint", HEALTHY, settings),
    )
    return {call.step.name: key(call) for call in calls}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("change", [{"opacity": [0.5, 0.9]}, {"clean_share": 0.0}, {"scale_exponents": [0, 3]}])
def test_textures_settings_matter_where_textures_are_used(change: dict[str, object]) -> None:
    base, other = _textured(), _textured(**change)
    assert all(base[name] != other[name] for name in base)


@pytest.mark.usefixtures("cache")
def test_a_folder_of_textures_counts_by_its_pictures_and_not_by_where_it_is(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "same", "other", "more")]
    for folder, contents in zip(folders, (b"ab", b"ab", b"ax", b"abc"), strict=True):
        folder.mkdir()
        for number, content in enumerate(contents):
            (folder / f"{folder.name}{number}.png").write_bytes(bytes([content]))
    one, same, other, more = (_textured(folder=str(folder)) for folder in folders)
    assert one == same
    for name in one:
        assert len({keys[name] for keys in (_textured(), one, other, more)}) == 4
    (folders[1] / "same0.png").write_bytes(b"x")
    assert _textured(folder=str(folders[1])) != one
    textured = {"kind": "perlin_texture", "texture": {"folder": str(folders[0])}}
    call = training_steps.train("joint", (), parse(BASE | {"synthesis": textured}, source="test"))
    assert str(tmp_path) not in str(call.parts())
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        _textured(folder=str(tmp_path / "nowhere"))


@pytest.mark.usefixtures("cache")
def test_a_network_of_a_joint_training_is_known_by_its_weights(tmp_path: Path, cache: Path) -> None:
    """A network from a joint training gives the same artifact as one from a run folder."""
    joint = ref("joint")
    for net in ("restoration", "segmentation"):
        for folder in (cache / joint.path / net, tmp_path / net):
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(net.encode())
    one, other = (training_steps.adopt(Part(net, joint.folder() / net)) for net in ("restoration", "segmentation"))
    assert key(one) != key(other)
    assert key(one) == key(training_steps.adopt(Part("restoration", tmp_path / "restoration")))


@pytest.mark.usefixtures("cache")
def test_the_order_of_training_cases_does_not_matter_and_each_case_does() -> None:
    settings = parse(BASE, source="test")
    one, two, three = (ref("prepare", letter) for letter in "abc")

    def trained(*prepared: Ref) -> str:
        return key(training_steps.train("restoration", [TrainingCase(each) for each in prepared], settings))

    assert trained(one, two) == trained(two, one)
    assert len({trained(one), trained(one, two), trained(one, three), trained(one, one)}) == 4
