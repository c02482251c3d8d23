"""What each step of the flow zsad depends on: a table of settings against steps."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.runs.runner import cache_key
from flows.store import code as sources
from flows.store.artifacts import Ref, content_key
from flows.store.step import FailedStep, Job
from flows.zsad.report_steps import ScoredCategory, ScoreOutputs, ZsadReport
from flows.zsad.steps import Encode, EvaluateCategory, Fuse, Image, Score, Text
from medad.base.settings import MACHINE_FIELDS
from zsad.config.run import ZsadSettings, parse

pytestmark = pytest.mark.usefixtures("cache")

BASE: dict[str, Any] = {
    "name": "base",
    "data": {"root": "/data/mvtec"},
    "encoder": {"model": "ViT-B-32", "seed": 1},
    "score": {"variants": ["joint", "joint_tta"]},
}


def ref(step: str, content: str = "a") -> Ref:
    return Ref(step=step, key=content * 64, digest=content * 64, path=f"{step}/{content * 64}")


@pytest.fixture
def images(tmp_path: Path) -> tuple[Image, ...]:
    found = []
    for number, anomalous in enumerate((False, True, True)):
        path, mask = tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"
        path.write_bytes(b"image %d" % number)
        mask.write_bytes(b"mask %d" % number)
        kind = "stain" if anomalous else "good"
        found.append(Image(f"{number}" * 64, f"{kind}/{number}", path, anomalous, kind, mask if anomalous else None))
    return tuple(found)


def jobs_of(settings: ZsadSettings, images: tuple[Image, ...], seed: int = 0) -> dict[str, Job]:
    """All steps of the flow, with equal artefacts from the step before."""
    features, text, scores = ref("zsad-encode"), ref("zsad-text"), ref("zsad-score")
    encoder, score, machine = settings.encoder, settings.score, settings.machine
    category = ScoredCategory("nut", images, text, features, ((seed, scores),), ((seed, ref("zsad-evaluate")),))
    versions = (("python", "3"),)
    return {
        "text": Text("nut", encoder, settings.prompts, machine),
        "encode": Encode(images, encoder, machine),
        "score": Score(images, features, text, encoder, score, settings.adapt, seed, machine),
        "fuse": Fuse(scores, score),
        "evaluate": EvaluateCategory(images, features, scores, score.variants, settings.evaluation),
        "report": ZsadReport(settings, (category,), (), versions),
        "maps": ScoreOutputs(settings, category, (), versions, (), ("png",)),
    }


REPORTS = {"report", "maps"}


def keys_of(settings: ZsadSettings, images: tuple[Image, ...], seed: int = 0) -> dict[str, str]:
    return {name: content_key(job.parts()) for name, job in jobs_of(settings, images, seed).items()}


def settings_with(**changes: object) -> ZsadSettings:
    """BASE with values by key, dots written as double underscores."""
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
    ("data__opaque_ids", True, set()),
    ("data__visa_split", "2cls_fewshot", set()),
    ("encoder__batch_size", 3, set()),
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
    ("score__batch_size", 3, set()),
    ("score__tau", 0.07, {"score", "fuse"}),
    ("score__variants", ["joint_tta", "joint"], {"evaluate"}),  # whose curves are drawn; the scores are the same
    ("score__variants", ["joint"], {"score", "fuse", "evaluate"}),
    ("score__references", {"count": 2}, {"score", "fuse"}),
    ("score__references", {"aggregate": "mean"}, {"score", "fuse"}),
    *((f"score__lambda_{name}", 0.3, {"fuse"}) for name in ("1", "2", "3", "4", "5", "text")),
    ("adapt__steps", 3, {"score"}),
    ("adapt__learning_rate", 0.1, {"score"}),
    ("adapt__opacity", [0.1, 0.2], {"score"}),
    ("evaluation__size_px", 64, {"evaluate"}),
    ("evaluation__threshold_quantile", 0.8, {"evaluate"}),
]


@pytest.mark.parametrize(("key", "value", "steps"), TABLE, ids=[row[0] for row in TABLE])
def test_a_setting_changes_the_steps_that_use_it_and_no_other(
    images: tuple[Image, ...], key: str, value: object, steps: set[str]
) -> None:
    base, other = keys_of(settings_with(), images), keys_of(settings_with(**{key: value}), images)
    assert {name for name in base if base[name] != other[name]} - REPORTS == steps
    assert (base["report"] != other["report"]) == (key.partition("__")[0] not in MACHINE_FIELDS)


def test_a_moved_folder_changes_no_key(images: tuple[Image, ...]) -> None:
    assert keys_of(settings_with(data__root="/elsewhere"), images) == keys_of(settings_with(), images)


def test_settings_of_what_is_not_scored_do_not_matter(images: tuple[Image, ...]) -> None:
    def keys(seed: int = 0, variants: str = "text", **changes: object) -> set[str]:
        settings = settings_with(score__variants=[variants], **changes)
        own = keys_of(settings, images, seed)
        return {own["score"], own["fuse"]}

    plain = keys()
    assert keys(seed=5) == plain, "nothing is drawn for the text alone"
    assert keys(adapt__steps=7) == keys(score__lambda_5=0.1) == keys(score__references={"count": 3}) == plain
    assert keys(encoder__vv_blocks=2) == plain, "it is in the features"
    assert keys(seed=5, variants="visual") != keys(variants="visual")
    assert keys(seed=5, variants="text_tta") != keys(variants="text_tta")
    assert keys(variants="joint", adapt__steps=7) == keys(variants="joint")


@pytest.mark.parametrize(
    ("variants", "lambdas", "needed"),
    [
        (["text", "visual"], {"score__lambda_1": 9.0}, False),
        (["joint"], {"score__lambda_2": 9.0}, False),
        (["joint"], {"score__lambda_text": 0.5}, True),
        (["joint_tta"], {"score__lambda_text": 0.5}, False),
        (["joint_tta"], {"score__lambda_2": 9.0}, True),
        (["joint_tta"], {}, False),
    ],
)
def test_scores_are_fused_again_only_where_a_lambda_decides(
    variants: list[str], lambdas: dict[str, object], needed: bool
) -> None:
    assert Fuse(ref("zsad-score"), settings_with(score__variants=variants, **lambdas).score).needed == needed


def test_what_is_asked_of_an_encoder_is_part_of_its_key(images: tuple[Image, ...]) -> None:
    encoder = settings_with().encoder
    asked: list[tuple[str, ...]] = [("patches",), (), ("plain",), ("patches", "plain"), ("window-2", "window-3")]
    keys = [content_key(Encode(images, encoder, views=views).parts()) for views in asked]
    assert len(set(keys)) == len(asked)
    assert keys[0] == content_key(Encode(images, encoder).parts()), "what the dual-image scorer reads, in either flow"
    backwards = Encode(images, encoder, views=("window-3", "window-2", "window-3"))
    assert content_key(backwards.parts()) == keys[-1]


def test_names_places_and_order_of_images_do_not_matter(images: tuple[Image, ...], tmp_path: Path) -> None:
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


def test_one_content_under_two_names_is_encoded_once_and_judged_twice(images: tuple[Image, ...]) -> None:
    twice = (*images, replace(images[0], id="good/copy"))
    base, other = keys_of(settings_with(), images), keys_of(settings_with(), twice)
    assert {name for name in base if base[name] != other[name]} - REPORTS == {"evaluate"}


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({"sha256": "f" * 64}, {"encode", "evaluate"}),  # what is scored depends on the features
        ({"anomalous": False}, {"evaluate"}),
        ({"defect": "crack"}, {"evaluate"}),
        ({"mask": None}, {"evaluate"}),
    ],
)
def test_what_an_image_is_does_matter(images: tuple[Image, ...], change: dict[str, Any], steps: set[str]) -> None:
    others = (*images[:2], replace(images[2], **change))
    base, other = keys_of(settings_with(), images), keys_of(settings_with(), others)
    assert {name for name in base if base[name] != other[name]} - REPORTS == steps


@pytest.mark.parametrize(
    ("job", "fields"),
    [("score", ("features", "text")), ("fuse", ("scores",)), ("evaluate", ("features", "scores"))],
)
def test_every_artefact_that_goes_in_matters(images: tuple[Image, ...], job: str, fields: tuple[str, ...]) -> None:
    original: Any = jobs_of(settings_with(), images)[job]
    keys = {content_key(original.parts())}
    keys |= {content_key(replace(original, **{name: ref("x", "f")}).parts()) for name in fields}
    assert len(keys) == len(fields) + 1


def test_local_weights_and_textures_are_known_by_content(images: tuple[Image, ...], tmp_path: Path) -> None:
    def keys(weights: Path, textures: Path) -> dict[str, str]:
        encoder = {"model": "ViT-B-32", "weights": str(weights)}
        return keys_of(settings_with(encoder=encoder, adapt__textures=str(textures)), images)

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


def test_a_models_folder_is_known_by_its_files(images: tuple[Image, ...], tmp_path: Path) -> None:
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


def test_the_key_function_gives_a_file_name_for_every_job(images: tuple[Image, ...]) -> None:
    """Where it raises, Prefect runs uncached with only a log line."""
    context: Any = None
    names = [cache_key(context, {"job": job}) for job in jobs_of(settings_with(), images).values()]
    assert all(name is not None and re.fullmatch(r"[a-z-]+-[0-9a-f]{64}", name) for name in names)
    assert len(set(names)) == len(names)


def test_no_part_of_a_key_holds_a_path_or_a_name(images: tuple[Image, ...], tmp_path: Path) -> None:
    for name, job in jobs_of(settings_with(), images).items():
        text = str(job.parts())
        assert str(tmp_path) not in text
        assert name in REPORTS or images[0].id not in text


def test_the_reports_depend_on_all_that_they_show(images: tuple[Image, ...]) -> None:
    job = jobs_of(settings_with(), images)["report"]
    assert isinstance(job, ZsadReport)
    [category] = job.categories
    failed = FailedStep("nut/good/9", "zsad-encode", "is broken", category="nut")
    renamed = replace(category, images=(*images[1:], replace(images[0], id="good/other")))
    variants = [
        job,
        replace(job, categories=()),
        replace(job, categories=(renamed,)),
        replace(job, categories=(replace(category, name="bolt"),)),
        replace(job, categories=(replace(category, scores=((7, category.scores[0][1]),)),)),
        replace(job, failures=(failed,)),
        replace(job, failures=(replace(failed, rule="is gone"),)),
        replace(job, versions=(("python", "4"),)),
        replace(job, notes=("a note",)),
    ]
    assert len({content_key(each.parts()) for each in variants}) == len(variants)


STEPS = [job.step for job in (Text, Encode, Score, Fuse, EvaluateCategory, ZsadReport, ScoreOutputs)]


def test_a_step_reaches_what_it_calls_and_not_what_others_call() -> None:
    reached = {step.name: {name for function in step.functions for name in sources.closure(function)} for step in STEPS}
    modules = {step: {name.partition(":")[0] for name in names} for step, names in reached.items()}
    assert {"zsad.clip.paths", "zsad.data.images", "zsad.clip.weights"} <= modules["zsad-encode"]
    assert {"zsad.scorers.dual.adapt", "zsad.scorers.dual.scorer", "medad.base.noise", "zsad.clip.paths"} <= modules[
        "zsad-score"
    ]
    assert "zsad.clip.prompts" in modules["zsad-text"]
    # an edit of the report or of a metric must not encode or adapt again
    for step in ("zsad-text", "zsad-encode", "zsad-score"):
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
