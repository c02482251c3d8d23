"""The settings that each step's key depends on, as a table of settings and steps."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.liver import steps as liver_steps
from flows.liver import training_steps
from flows.liver.training_steps import TrainingCase
from flows.store.references import Ref
from flows.store.step import Call, content_key
from medad.base.errors import CaseFailure, InputError
from medad.cohort.datasets import Case, LabelledScan
from medad.config.liver import InsertSettings, LiverSettings, parse
from medad.steps.results import CaseResult, LeftOut, Member, Model
from medad.steps.trained import Part

BASE: dict[str, Any] = {
    "name": "base",
    "train_data": {"root": "/data/btcv", "layout": "btcv"},
    "test_data": {"root": "/data/lits", "layout": "lits", "insert": {"count": 2}},
}


def ref(step: str, content: str = "a") -> Ref:
    return Ref(step=step, key=content * 64, digest=content * 64, path=f"{step}/{content * 64}")


MODEL = Model((Member(ref("restoration"), ref("segmentation")),))
HEALTHY = (TrainingCase(ref("prepare")),)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    scan, label = tmp_path / "volume-1.nii.gz", tmp_path / "segmentation-1.nii.gz"
    scan.write_bytes(b"scan")
    label.write_bytes(b"label")
    return Case("lits-1", scan, label, (1, 2), 2)


def report_of(settings: LiverSettings, *results: CaseResult[Ref], failures: tuple[CaseFailure, ...] = ()) -> Call:
    return liver_steps.report(settings, results, failures, MODEL, {"python": "3"}, ())


def result_of(case: Case) -> CaseResult[Ref]:
    return CaseResult(case.id, ref("prepare"), ref("segment"), ref("evaluate"))


def calls_of(settings: LiverSettings, case: Case) -> dict[str, Call]:
    """Return the calls of all steps of the flow, with fixed artifacts as inputs."""
    data = settings.test_data
    scan = LabelledScan.of(case, data)
    prepared, restoration = ref("prepare"), ref("restoration")
    return {
        "insert": liver_steps.insert(scan, data.insert or InsertSettings()),
        "prepare": liver_steps.prepare(scan, settings.preprocess, training=False),
        "restoration": training_steps.train("restoration", HEALTHY, settings),
        "segmentation": training_steps.train("segmentation", HEALTHY, settings, restoration),
        "segment": liver_steps.segment(prepared, MODEL, settings.inference, settings.postprocess, settings.machine),
        "evaluate": liver_steps.evaluate(scan, prepared, ref("segment"), settings.evaluation),
        "report": report_of(settings, result_of(case)),
    }


def key(call: Call) -> str:
    return content_key(call.parts())


def changed_in(call: Call, **arguments: Any) -> Call:
    """Return the call with other arguments."""
    return replace(call, arguments={**call.arguments, **arguments})


def keys_of(settings: LiverSettings, case: Case) -> dict[str, str]:
    return {name: key(call) for name, call in calls_of(settings, case).items()}


def changed(key: str, value: object) -> LiverSettings:
    values = copy.deepcopy(BASE)
    *parents, leaf = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
    place[leaf] = value
    return parse(values, source="test")


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
    ("preprocess.fat_hu", -30.0, {"prepare"}),
    ("preprocess.fat_margin_mm", 2.0, {"prepare"}),
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
    ("test_data.insert.seed", 1, {"insert"}),
    ("test_data.insert.contrast_hu", [-50.0, -30.0], {"insert"}),
    ("test_data.affine_mismatch", "warn", {"insert", "prepare", "evaluate"}),
    ("test_data.affine_from", "sform", {"insert", "prepare", "evaluate"}),
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


@pytest.mark.usefixtures("cache")
def test_where_a_case_lies_and_what_it_is_called_do_not_matter(case: Case, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert case.label is not None
    other = Case(
        "another-name",
        Path(shutil.copy(case.scan, moved / "a.nii.gz")),
        Path(shutil.copy(case.label, moved / "b.nii.gz")),
        (2, 1),
        2,
    )
    settings = parse(BASE, source="test")
    base, renamed = keys_of(settings, case), keys_of(settings, other)
    assert {name for name in base if base[name] != renamed[name]} == {"report"}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("what", ["scan", "label", "liver_labels", "tumour_label"])
def test_what_a_case_is_does_matter(case: Case, tmp_path: Path, what: str) -> None:
    new = tmp_path / "new.nii.gz"
    new.write_bytes(b"other content")
    values: dict[str, Any] = {"scan": new, "label": new, "liver_labels": (1,), "tumour_label": None}
    settings = parse(BASE, source="test")
    base, other = keys_of(settings, case), keys_of(settings, replace(case, **{what: values[what]}))
    assert {name for name in base if base[name] != other[name]} == {"insert", "prepare", "evaluate"}


@pytest.mark.usefixtures("cache")
def test_the_order_of_training_cases_does_not_matter_and_each_case_does() -> None:
    settings = parse(BASE, source="test")
    one, two, three = (ref("prepare", letter) for letter in "abc")

    def trained(*prepared: Ref) -> str:
        return key(training_steps.train("restoration", [TrainingCase(each) for each in prepared], settings))

    assert trained(one, two) == trained(two, one)
    assert len({trained(one), trained(one, two), trained(one, three), trained(one, one)}) == 4


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("job", "fields"),
    [("segment", ("prepared", "model")), ("evaluate", ("prepared", "segmented"))],
)
def test_every_artifact_that_goes_in_matters(case: Case, job: str, fields: tuple[str, ...]) -> None:
    original = calls_of(parse(BASE, source="test"), case)[job]
    keys = {key(original)} | {key(changed_in(original, **{name: ref("x", "f")})) for name in fields}
    assert len(keys) == len(fields) + 1


def every_call(case: Case, folder: Path) -> list[Call]:
    """Return one call of each step."""
    settings = parse(BASE, source="test")
    more: list[Call] = [
        training_steps.adopt(Part("restoration", folder)),
        *(liver_steps.hand_step(name, case.scan, case.label, (1,), settings.preprocess) for name in ("window", "roi")),
        *(liver_steps.hand_step(name, case.scan, None, (1,), settings.preprocess) for name in ("slice", "equalise")),
    ]
    return [*calls_of(settings, case).values(), *more]


@pytest.mark.usefixtures("cache")
def test_every_call_has_a_key_of_its_own(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    names = [f"{call.step.name}-{key(call)}" for call in every_call(case, tmp_path)]
    assert all(re.fullmatch(r"[a-z-]+-[0-9a-f]{64}", name) for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.usefixtures("cache")
def test_a_file_that_is_gone_is_one_line(case: Case, tmp_path: Path) -> None:
    calls = [call for call in every_call(case, tmp_path) if "case" in call.arguments]
    case.scan.unlink()
    for call in calls:
        with pytest.raises(InputError, match="no such file"):
            call.parts()


@pytest.mark.usefixtures("cache")
def test_no_part_of_a_key_holds_a_path_or_a_name(case: Case, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for call in every_call(case, tmp_path):
        text = str(call.parts())
        assert str(tmp_path) not in text
        assert call.step is liver_steps.REPORT or case.id not in text


@pytest.mark.usefixtures("cache")
def test_the_report_depends_on_all_that_it_shows(case: Case) -> None:
    settings, result = parse(BASE, source="test"), result_of(case)
    call = report_of(settings, result)
    failed = CaseFailure("lits-2", "prepare", "is 4-D")
    variants = [
        call,
        report_of(settings),
        report_of(settings, result, failures=(failed,)),
        report_of(settings, result, failures=(replace(failed, rule="is 5-D"),)),
        changed_in(call, restoration=None),
        changed_in(call, versions={"python": "4"}),
        changed_in(call, notes=("a note",)),
        report_of(settings, replace(result, case_id="other")),
        report_of(settings, replace(result, evaluated=None)),
    ]
    assert len(set(map(key, variants))) == len(variants)
