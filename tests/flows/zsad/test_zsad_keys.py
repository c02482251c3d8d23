"""The settings that each step of the flow zsad depends on, as a table of settings and steps."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.store import code as sources
from flows.store.references import Ref
from flows.store.step import Call, content_key
from flows.zsad import report_steps
from flows.zsad import steps as zsad_steps
from medad.base.errors import CaseFailure
from medad.base.settings import ANY_MACHINE, MACHINE_FIELDS
from zsad.config.settings import ZsadSettings, parse
from zsad.data.labelled import LabelledImage
from zsad.scorers.dual.settings import DualImage
from zsad.steps.results import CategoryResult

pytestmark = pytest.mark.usefixtures("cache")

BASE: dict[str, Any] = {
    "name": "base",
    "data": {"root": "/data/mvtec"},
    "encoder": {"model": "ViT-B-32", "seed": 1},
    "method": {"system": "dual", "tau": 1, "variants": ["joint", "joint_tta"]},
}


def ref(step: str, content: str = "a") -> Ref:
    return Ref(step=step, key=content * 64, digest=content * 64, path=f"{step}/{content * 64}")


@pytest.fixture
def images(tmp_path: Path) -> tuple[LabelledImage, ...]:
    found = []
    for number, anomalous in enumerate((False, True, True)):
        path, mask = tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"
        path.write_bytes(b"image %d" % number)
        mask.write_bytes(b"mask %d" % number)
        kind = "stain" if anomalous else "good"
        found.append(
            LabelledImage(f"{kind}/{number}", f"{number}" * 64, path, anomalous, kind, mask if anomalous else None)
        )
    return tuple(found)


def category_of(images: tuple[LabelledImage, ...], seed: int = 0) -> CategoryResult[Ref]:
    text, features = ref("zsad-text"), ref("zsad-encode")
    return CategoryResult("nut", images, text, features, {seed: ref("zsad-score")}, {seed: ref("zsad-evaluate")})


def report_of(settings: ZsadSettings, *found: CategoryResult[Ref], failures: tuple[CaseFailure, ...] = ()) -> Call:
    return report_steps.report(settings, found, failures, {"python": "3"}, ())


def fuse_of(scores: Ref, settings: ZsadSettings) -> Call:
    """Return the fuse step's call, even if the lambdas are the paper's and it is not needed."""
    score = dual_of(settings).score
    needed = zsad_steps.fuse(scores, score)
    return needed or zsad_steps.FUSE(scores=scores, settings=zsad_steps.with_used_lambdas(score))


def dual_of(settings: ZsadSettings) -> DualImage:
    system = settings.method
    assert isinstance(system, DualImage)
    return system


def calls_of(settings: ZsadSettings, images: tuple[LabelledImage, ...], seed: int = 0) -> dict[str, Call]:
    """Return the calls of all steps of the flow, with fixed artifacts as inputs."""
    features, text, scores = ref("zsad-encode"), ref("zsad-text"), ref("zsad-score")
    encoder, system, machine = settings.encoder, dual_of(settings), settings.machine
    category = category_of(images, seed)
    return {
        "text": zsad_steps.text("nut", encoder, settings.prompts, machine),
        "encode": zsad_steps.encode(images, encoder, machine),
        "score": zsad_steps.score_system(system, "nut", images, features, text, None, None, encoder, seed, machine),
        "fuse": fuse_of(scores, settings),
        "evaluate": zsad_steps.evaluate(images, features, scores, system.variant_names, settings.evaluation),
        "report": report_of(settings, category),
        "maps": report_steps.score_outputs(settings, category, (), {"python": "3"}, (), ("png",)),
    }


def key(call: Call) -> str:
    return content_key(call.parts())


def changed_in(call: Call, **arguments: Any) -> Call:
    """Return the call with other arguments."""
    return replace(call, arguments={**call.arguments, **arguments})


REPORTS = {"report", "maps"}


def keys_of(settings: ZsadSettings, images: tuple[LabelledImage, ...], seed: int = 0) -> dict[str, str]:
    return {name: key(call) for name, call in calls_of(settings, images, seed).items()}


def settings_with(**changes: object) -> ZsadSettings:
    """Return BASE with changed values; dots in keys are written as double underscores."""
    values = copy.deepcopy(BASE)
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return parse(values, source="test")


# the reports show every setting, so their keys are not in the table: they always change
TABLE: list[tuple[str, object, set[str]]] = [
    ("name", "other", set()),
    ("seeds", [3], set()),
    ("gpus", "cpu", set()),
    ("engine", "ray", set()),
    ("engine_workers", 3, set()),
    ("limits__encoding_hours", 1.0, set()),
    ("published", "visa", set()),
    ("data__root", "samples:elsewhere", set()),
    ("data__layout", "visa", set()),
    ("data__categories", ["nut"], set()),
    ("data__pseudonyms", True, set()),
    ("data__visa_split", "2cls_fewshot", set()),
    ("encoder__batch_size", 3, set()),
    ("encoder__precision", "bf16", {"encode", "score"}),
    ("encoder__quick_gelu", True, {"text", "encode", "score"}),
    ("encoder__positions", "bilinear", {"encode", "score"}),
    ("encoder__interpolation", "bicubic", {"encode", "score"}),
    ("encoder__fit", "squash", {"encode", "score"}),
    ("encoder__preset", "anomalyclip", {"text", "encode", "score"}),  # random weights: text depends on size_px too
    ("encoder__model", "ViT-B-16", {"text", "encode", "score"}),
    ("encoder__seed", 2, {"text", "encode", "score"}),
    ("encoder__vv_blocks", 3, {"encode", "score"}),
    ("encoder__vv_feed_forward", True, {"encode", "score"}),
    ("encoder__vv_temperature", 0.5, {"encode", "score"}),
    ("encoder__class_ln_post", False, {"encode", "score"}),
    ("encoder__max_crops", 5, {"encode", "score"}),
    ("encoder__min_side_px", 9, {"encode", "score"}),
    ("prompts__domains", ["medical"], {"text"}),
    ("prompts__names", {"nut": "walnut"}, {"text"}),
    ("prompts__names", {"bottle": "flask"}, set()),
    ("prompts__surface_categories", ["nut"], {"text"}),
    ("prompts__surface_categories", ["bottle"], set()),
    ("method__tau", 0.07, {"score", "fuse"}),
    ("method__variants", ["joint_tta", "joint"], {"evaluate"}),  # other curves, but the same scores
    ("method__variants", ["joint"], {"score", "fuse", "evaluate"}),
    ("method__references", {"count": 2}, {"score", "fuse"}),
    ("method__references", {"aggregate": "mean"}, {"score", "fuse"}),
    *((f"method__lambda_{name}", 0.3, {"fuse"}) for name in ("1", "2", "3", "4", "5", "text")),
    ("method__adapt__steps", 3, {"score"}),
    ("method__adapt__learning_rate", 0.1, {"score"}),
    ("method__adapt__opacity", [0.1, 0.2], {"score"}),
    ("evaluation__size_px", 64, {"evaluate"}),
    ("evaluation__threshold_quantile", 0.8, {"evaluate"}),
]


@pytest.mark.parametrize(("key", "value", "steps"), TABLE, ids=[row[0] for row in TABLE])
def test_a_setting_changes_the_steps_that_use_it_and_no_other(
    images: tuple[LabelledImage, ...], key: str, value: object, steps: set[str]
) -> None:
    base, other = keys_of(settings_with(), images), keys_of(settings_with(**{key: value}), images)
    assert {name for name in base if base[name] != other[name]} - REPORTS == steps
    assert (base["report"] != other["report"]) == (key.partition("__")[0] not in MACHINE_FIELDS)


def test_a_moved_folder_changes_no_key(images: tuple[LabelledImage, ...]) -> None:
    assert keys_of(settings_with(data__root="/elsewhere"), images) == keys_of(settings_with(), images)


def test_settings_of_what_is_not_scored_do_not_matter(images: tuple[LabelledImage, ...]) -> None:
    def keys(seed: int = 0, variants: str = "text", **changes: object) -> set[str]:
        settings = settings_with(method__variants=[variants], **changes)
        own = keys_of(settings, images, seed)
        return {own["score"], own["fuse"]}

    plain = keys()
    assert keys(seed=5) == plain, "the text variant has no random choices"
    assert keys(method__adapt__steps=7) == keys(method__lambda_5=0.1) == keys(method__references={"count": 3}) == plain
    assert keys(encoder__vv_blocks=2) == plain, "it is part of the features"
    assert keys(seed=5, variants="visual") != keys(variants="visual")
    assert keys(seed=5, variants="text_tta") != keys(variants="text_tta")
    assert keys(variants="joint", method__adapt__steps=7) == keys(variants="joint")


@pytest.mark.parametrize(
    ("variants", "lambdas", "needed"),
    [
        (["text", "visual"], {"method__lambda_1": 9.0}, False),
        (["joint"], {"method__lambda_2": 9.0}, False),
        (["joint"], {"method__lambda_text": 0.5}, True),
        (["joint_tta"], {"method__lambda_text": 0.5}, False),
        (["joint_tta"], {"method__lambda_2": 9.0}, True),
        (["joint_tta"], {}, False),
    ],
)
def test_scores_are_fused_again_only_where_a_lambda_decides(
    variants: list[str], lambdas: dict[str, object], needed: bool
) -> None:
    call = zsad_steps.fuse(ref("zsad-score"), dual_of(settings_with(method__variants=variants, **lambdas)).score)
    assert (call is not None) == needed


def test_a_threshold_belongs_to_all_that_its_scores_depend_on(tmp_path: Path) -> None:
    def judge(*normal: str, category: str = "nut", **changes: object) -> str:
        return zsad_steps.judge_of(settings_with(**changes), normal, category).digest

    visual: dict[str, Any] = {"method__variants": ["visual"]}
    assert judge("b", "a") == judge("a", "b")
    assert judge("a") != judge("a", "b")
    assert judge("a", category="bolt") != judge("a"), "it is in the prompts"
    assert judge("a", **visual, category="bolt") == judge("a", **visual), "this variant has no prompts"
    assert judge("a", method__lambda_4=2) != judge("a")
    assert judge("a", **visual, method__lambda_4=2) == judge("a", **visual), "this variant has no weights"
    assert judge("a", seeds=[1]) != judge("a"), "the seed draws the pseudo anomalies of the adaptation"
    assert judge("a", **visual, seeds=[1]) == judge("a", **visual), "the normal images are already chosen"
    learned: dict[str, Any] = {"method": {"system": "april_gan", "checkpoint": str(tmp_path / "weights")}}
    (tmp_path / "weights").write_bytes(b"first")
    first = judge("a", **learned)
    (tmp_path / "weights").write_bytes(b"second")
    assert judge("a", **learned) != first


def test_what_is_asked_of_an_encoder_is_part_of_its_key(images: tuple[LabelledImage, ...]) -> None:
    encoder = settings_with().encoder
    asked: list[tuple[str, ...]] = [("patches",), (), ("plain",), ("patches", "plain"), ("window-2", "window-3")]
    keys = [key(zsad_steps.encode(images, encoder, ANY_MACHINE, outputs)) for outputs in asked]
    assert len(set(keys)) == len(asked)
    assert keys[0] == key(zsad_steps.encode(images, encoder, ANY_MACHINE)), (
        "the outputs that the dual-image scorer reads, in both flows"
    )
    alone = zsad_steps.encode(images, encoder, ANY_MACHINE, ("patches",), class_tokens=False)
    assert key(alone) not in keys
    backwards = zsad_steps.encode(images, encoder, ANY_MACHINE, ("window-3", "window-2", "window-3"))
    assert key(backwards) == keys[-1]


def test_names_places_and_order_of_images_do_not_matter(images: tuple[LabelledImage, ...], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    others = tuple(
        replace(
            image,
            id=f"{image.defect}/x{number}",
            path=Path(shutil.copy(image.path, moved / f"x{number}.png")),
            mask=image.mask and Path(shutil.copy(image.mask, moved / f"m{number}.png")),
        )
        for number, image in enumerate(reversed(images))
    )
    base, other = keys_of(settings_with(), images), keys_of(settings_with(), others)
    assert {name for name in base if base[name] != other[name]} == REPORTS


def test_one_content_under_two_names_is_encoded_once_and_judged_twice(images: tuple[LabelledImage, ...]) -> None:
    twice = (*images, replace(images[0], id="good/copy"))
    base, other = keys_of(settings_with(), images), keys_of(settings_with(), twice)
    assert {name for name in base if base[name] != other[name]} - REPORTS == {"evaluate"}


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({"sha256": "f" * 64}, {"encode", "evaluate"}),  # the features determine the scored images
        ({"anomalous": False}, {"evaluate"}),
        ({"defect": "crack"}, {"evaluate"}),
        ({"mask": None}, {"evaluate"}),
    ],
)
def test_what_an_image_is_does_matter(
    images: tuple[LabelledImage, ...], change: dict[str, Any], steps: set[str]
) -> None:
    others = (*images[:2], replace(images[2], **change))
    base, other = keys_of(settings_with(), images), keys_of(settings_with(), others)
    assert {name for name in base if base[name] != other[name]} - REPORTS == steps


@pytest.mark.parametrize(
    ("job", "fields"),
    [("score", ("features", "text")), ("fuse", ("scores",)), ("evaluate", ("features", "scores"))],
)
def test_every_artifact_that_goes_in_matters(
    images: tuple[LabelledImage, ...], job: str, fields: tuple[str, ...]
) -> None:
    original = calls_of(settings_with(), images)[job]
    keys = {key(original)} | {key(changed_in(original, **{name: ref("x", "f")})) for name in fields}
    assert len(keys) == len(fields) + 1


def test_local_weights_and_textures_are_known_by_content(images: tuple[LabelledImage, ...], tmp_path: Path) -> None:
    def keys(weights: Path, textures: Path) -> dict[str, str]:
        encoder = {"model": "ViT-B-32", "weights": str(weights)}
        return keys_of(settings_with(encoder=encoder, method__adapt__textures=str(textures)), images)

    for name, content in (("a", b"1"), ("moved", b"1"), ("other", b"2")):
        folder = tmp_path / name
        (folder / "textures").mkdir(parents=True)
        (folder / "weights.pt").write_bytes(content)
        (folder / "textures" / "t.png").write_bytes(content)
    base = keys(tmp_path / "a" / "weights.pt", tmp_path / "a" / "textures")
    assert keys(tmp_path / "moved" / "weights.pt", tmp_path / "moved" / "textures")["score"] == base["score"]
    weights = keys(tmp_path / "other" / "weights.pt", tmp_path / "a" / "textures")
    assert {name for name in base if base[name] != weights[name]} - REPORTS == {"text", "encode", "score"}
    textures = keys(tmp_path / "a" / "weights.pt", tmp_path / "other" / "textures")
    assert {name for name in base if base[name] != textures[name]} - REPORTS == {"score"}


def test_a_models_folder_is_known_by_its_files(images: tuple[LabelledImage, ...], tmp_path: Path) -> None:
    def keys() -> dict[str, str]:
        return keys_of(settings_with(encoder={"model": f"local-dir:{tmp_path}"}), images)

    config, weights = tmp_path / "open_clip_config.json", tmp_path / "open_clip_model.safetensors"
    config.write_text("{}", encoding="utf-8")
    weights.write_bytes(b"1")
    seen = [keys()["encode"]]
    for file in (config, weights):
        file.write_text("another", encoding="utf-8")
        seen.append(keys()["encode"])
    assert len(set(seen)) == 3


def test_every_call_has_a_key_of_its_own(images: tuple[LabelledImage, ...]) -> None:
    names = [f"{call.step.name}-{key(call)}" for call in calls_of(settings_with(), images).values()]
    assert all(re.fullmatch(r"[a-z-]+-[0-9a-f]{64}", name) for name in names)
    assert len(set(names)) == len(names)


def test_no_part_of_a_key_holds_a_path_or_a_name(images: tuple[LabelledImage, ...], tmp_path: Path) -> None:
    for name, call in calls_of(settings_with(), images).items():
        text = str(call.parts())
        assert str(tmp_path) not in text
        assert name in REPORTS or images[0].id not in text


def test_the_reports_depend_on_all_that_they_show(images: tuple[LabelledImage, ...]) -> None:
    settings, category = settings_with(), category_of(images)
    call = report_of(settings, category)
    failed = CaseFailure("nut/good/9", "zsad-encode", "is broken", category="nut")
    renamed = replace(category, images=(*images[1:], replace(images[0], id="good/other")))
    variants = [
        call,
        report_of(settings),
        report_of(settings, renamed),
        report_of(settings, replace(category, name="bolt")),
        report_of(settings, replace(category, scores={7: ref("zsad-score")})),
        report_of(settings, category, failures=(failed,)),
        report_of(settings, category, failures=(replace(failed, rule="is gone"),)),
        changed_in(call, versions={"python": "4"}),
        changed_in(call, notes=("a note",)),
    ]
    assert len(set(map(key, variants))) == len(variants)


STEPS = [
    zsad_steps.TEXT,
    zsad_steps.ENCODE,
    zsad_steps.SYSTEM,
    zsad_steps.FUSE,
    zsad_steps.EVALUATE,
    report_steps.REPORT,
    report_steps.MAPS,
]


def test_a_step_reaches_what_it_calls_and_not_what_others_call() -> None:
    reached = {step.name: set(sources.closure(step.function)) for step in STEPS}
    reached["zsad-system"] |= set(sources.closure(DualImage().scorer))  # part of the key, see `score_system`
    modules = {step: {name.partition(":")[0] for name in names} for step, names in reached.items()}
    assert {"zsad.clip.attention_paths", "zsad.data.images", "zsad.clip.weights"} <= modules["zsad-encode"]
    assert {
        "zsad.scorers.dual.adapt",
        "zsad.scorers.dual.scorer",
        "medad.base.noise",
        "zsad.clip.attention_paths",
    } <= modules["zsad-system"]
    assert "zsad.clip.prompts" in modules["zsad-text"]
    # an edit of the report or of a metric must not encode or adapt again
    for step in ("zsad-text", "zsad-encode", "zsad-system"):
        assert not modules[step] & {
            "zsad.reports.run.report",
            "zsad.reports.pictures",
            "zsad.evaluation.metrics",
            "zsad.evaluation.curves",
            "zsad.steps.evaluate",
        }
    for step in ("zsad-text", "zsad-encode"):
        assert not modules[step] & {"zsad.scorers.dual.adapt", "zsad.scorers.dual.scorer"}
    assert "zsad.reports.run.report" not in modules["zsad-evaluate"]
