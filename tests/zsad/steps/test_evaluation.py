"""Tests of evaluating a category: figures against scikit-learn, thresholds and errors known by construction.

Crops of 16 px on a grid of 16 patches need no interpolation, so a map equals its patches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file
from sklearn.metrics import average_precision_score, roc_auc_score

from medad.base.errors import InputError
from zsad.clip.feature_store import FeatureIndex, ImageRows
from zsad.config.run import EvaluationSettings, ScoreSettings, Variant
from zsad.data.images import plan_crops
from zsad.data.labelled import LabelledImage
from zsad.scorers.dual.scores_file import ScoredImage, ScoresIndex
from zsad.steps.evaluate import (
    CategoryCurves,
    CategoryEvaluation,
    deployable_threshold,
    evaluate_category,
    evaluate_scores,
)

Array = NDArray[Any]
S = 16


def labelled_image(sha256: str, anomalous: bool | None, defect: str = "", mask: Path | None = None) -> LabelledImage:
    """Return an image; its file is never read."""
    return LabelledImage(sha256[:8], sha256, Path("-"), anomalous, defect, mask)


@dataclass(frozen=True)
class Made:
    """Scores in memory. The score of an image is the maximum of its map; each variant adds its shift to both."""

    maps: Sequence[Array]
    shift: float = 0.0
    align_corners: bool = False

    def image_score(self, variant: str) -> Array:
        return np.array([m.max() for m in self.maps], dtype=np.float64) + (self.shift if variant == "joint" else 0)

    def patch_map(self, i: int, variant: str) -> Array:
        return self.maps[i] + np.float32(self.shift if variant == "joint" else 0)


def mask_file(folder: Path, number: int, mask: Array) -> Path:
    path = folder / f"{number}.png"
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


@dataclass(frozen=True)
class Case:
    """Eight images, four with a defect. Maps are noise with higher values at the defects."""

    items: list[LabelledImage]
    maps: list[Array]
    masks: list[Array]

    def evaluate(self, items: Sequence[LabelledImage] | None = None, **options: Any) -> Any:
        return self.both(items, **options)[0]

    def both(
        self, items: Sequence[LabelledImage] | None = None, variants: Sequence[Variant] = ("text",), **options: Any
    ) -> tuple[Any, Any]:
        return evaluate_scores(
            self.items if items is None else items,
            seed=3,
            crops={item.sha256: (plan_crops(S, S, S, 9), (S, S)) for item in self.items},
            digests=[item.sha256 for item in self.items],
            scores=Made(self.maps, shift=1.0),
            variants=variants,
            settings=EvaluationSettings(**options),
        )


@pytest.fixture
def case(tmp_path: Path) -> Case:
    rng = np.random.default_rng(5)
    items, maps, masks = [], [], []
    for n in range(8):
        mask = np.zeros((S, S), dtype=bool)
        if n % 2:
            mask[2 + n : 5 + n, 3:9] = True
        maps.append((rng.random((1, S, S)) + 0.4 * mask).astype(np.float32))
        masks.append(mask)
        path = mask_file(tmp_path, n, mask) if n % 2 else None
        items.append(labelled_image(f"{n:064x}", bool(n % 2), "scratch" if n % 2 else "good", path))
    return Case(items, maps, masks)


def test_figures_are_scikit_learns(case: Case) -> None:
    found = case.evaluate()
    scores, labels = np.concatenate([m.ravel() for m in case.maps]), np.concatenate([k.ravel() for k in case.masks])
    text = found.variants["text"]
    assert text.pixel.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert text.pixel.ap == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    tops = [m.max() for m in case.maps]
    assert text.image.auroc == pytest.approx(roc_auc_score([n % 2 for n in range(8)], tops), abs=1e-12)
    assert (text.pixel.n_images, text.pixel.n_regions, found.size_px, found.seed) == (8, 4, S, 3)
    assert [image.scores["text"] for image in found.images] == [float(top) for top in tops]
    assert not found.problems


def test_the_order_of_images_changes_no_figure(case: Case) -> None:
    turned = case.evaluate(case.items[::-1])
    assert turned.variants == case.evaluate().variants
    assert [image.sha256 for image in turned.images] == [item.sha256 for item in case.items[::-1]]


def test_variants_are_judged_each_and_the_last_one_drawn(case: Case) -> None:
    found, curves = case.both(variants=("text", "joint"))
    text, joint = found.variants["text"], found.variants["joint"]
    # maps of joint are those of text plus 1: the ranks are equal, the threshold is higher by 1
    assert joint.pixel.auroc == text.pixel.auroc
    assert joint.pixel.f1max_threshold == pytest.approx(text.pixel.f1max_threshold + 1, abs=1e-6)
    assert curves.variant == "joint"
    assert (curves.pixel.roc.x[0], curves.pixel.roc.y[-1]) == (0.0, 1.0)


def test_images_without_labels_get_a_threshold_and_no_figures(case: Case) -> None:
    items = [labelled_image(item.sha256, None) for item in case.items]
    found, curves = case.both(items, threshold_quantile=0.75)
    text = found.variants["text"]
    assert (text.image, text.pixel, curves.image, curves.pixel) == (None, None, None, None)
    assert (text.threshold.flagged, text.threshold.found, text.threshold.f1) == (2, None, None)


def test_labels_without_masks_give_image_figures_alone(case: Case) -> None:
    found = case.evaluate([replace(item, mask=None) for item in case.items])
    text = found.variants["text"]
    assert text.pixel is None
    assert text.image == case.evaluate().variants["text"].image


def test_normal_images_alone(case: Case) -> None:
    text = case.evaluate(case.items[::2]).variants["text"]
    assert (text.image.auroc, text.image.ap, text.pixel.auroc, text.pixel.aupro) == (None, None, None, None)
    assert (text.image.n_normal, text.pixel.n_normal_px) == (4, 4 * S * S)


def test_a_mask_that_cannot_be_used_is_named_and_its_label_still_counts(case: Case, tmp_path: Path) -> None:
    broken, small, black = case.items[1], case.items[3], case.items[5]
    assert broken.mask is not None
    broken.mask.write_bytes(b"broken")
    mask_file(tmp_path, 3, np.ones((4, 4), dtype=bool))
    mask_file(tmp_path, 5, np.zeros((S, S), dtype=bool))
    found = case.evaluate()
    assert {p.sha256 for p in found.problems} == {broken.sha256, small.sha256, black.sha256}
    text = found.variants["text"]
    assert (text.image.n_anomalous, text.pixel.n_images, text.pixel.n_regions) == (4, 5, 1)


def test_images_without_scores_are_passed_over(case: Case) -> None:
    extra = labelled_image("f" * 64, True, "scratch")
    assert case.evaluate([*case.items, extra]) == case.evaluate()
    with pytest.raises(InputError, match="none of them has scores"):
        case.evaluate([extra])


def test_a_mask_is_resized_before_anything_is_counted(tmp_path: Path) -> None:
    """Pixels of a mask at 4 times the size have the value 1. They must not be averaged away or compared with 1/2."""
    truth = np.zeros((S, S), dtype=bool)
    truth[3:7, 2:10] = True
    path = tmp_path / "m.png"
    Image.fromarray(truth.repeat(4, 0).repeat(4, 1).astype(np.uint8)).save(path)
    found, _ = evaluate_scores(
        [labelled_image("a", True, "x", path)],
        seed=0,
        crops={"a": (plan_crops(4 * S, 4 * S, S, 9), (4 * S, 4 * S))},
        digests=["a"],
        scores=Made([truth[None].astype(np.float32)]),
        variants=["text"],
        settings=EvaluationSettings(),
    )
    pixel: Any = found.variants["text"].pixel
    assert (pixel.auroc, pixel.f1max, pixel.n_anomalous_px) == (1.0, 1.0, 32)


def test_the_evaluation_size_and_long_images(tmp_path: Path) -> None:
    wide = np.zeros((40, 60), dtype=bool)
    wide[10:30, 40:55] = True
    crops = plan_crops(40, 60, S, 9)
    tiles = np.zeros((len(crops.offsets), S, S), dtype=np.float32)
    tiles[-1, 4:12, 8:14] = (
        1.0  # canvas 16 x 24, last crop from column 8: columns 16..22 of 24 correspond to 40..55 of 60
    )
    found, _ = evaluate_scores(
        [labelled_image("a", True, "x", mask_file(tmp_path, 0, wide))],
        seed=0,
        crops={"a": (crops, (40, 60))},
        digests=["a"],
        scores=Made([tiles]),
        variants=["text"],
        settings=EvaluationSettings(size_px=32),
    )
    pixel: Any = found.variants["text"].pixel
    assert (found.size_px, pixel.n_normal_px + pixel.n_anomalous_px) == (32, 32 * 48)
    assert pixel.auroc > 0.98


@pytest.mark.parametrize(
    ("own", "given_setting", "aligned"),
    [(True, None, True), (False, True, True), (False, None, False), (True, False, False)],
)
def test_corners_are_aligned_as_the_evaluation_or_else_the_system_says(
    tmp_path: Path, own: bool, given_setting: bool | None, aligned: bool
) -> None:
    place = np.arange(S) / (S - 1)
    falling = np.outer(1 - place, 1 - place)  # the aligned map of the patches below: a corner alone is highest
    found, _ = evaluate_scores(
        [labelled_image("a", True, "x", mask_file(tmp_path, 0, falling > 0.9))],
        seed=0,
        crops={"a": (plan_crops(S, S, S, 9), (S, S))},
        digests=["a"],
        scores=Made([np.array([[[1, 0], [0, 0]]], dtype=np.float32)], align_corners=own),
        variants=["text"],
        settings=EvaluationSettings(align_corners=given_setting),
    )
    pixel: Any = found.variants["text"].pixel
    # without alignment a quarter patch in the corner is flat, so that more pixels than the mask's are highest
    assert (pixel.auroc == 1.0) == aligned


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_the_quantile_flags_its_share_of_distinct_scores(values: list[float], quantile: float) -> None:
    scores = np.unique(np.array(values))
    found = deployable_threshold(scores, None, EvaluationSettings(threshold_quantile=quantile))
    if scores.size * (1 - quantile) < 1 - 1e-9:
        assert found is None
    else:
        assert found is not None
        assert abs(found.flagged - scores.size * (1 - quantile)) <= 1


def test_a_given_threshold_is_taken_as_it_is() -> None:
    scores, truth = np.array([0.1, 0.5, 0.5, 0.9]), np.array([False, True, False, True])
    found = deployable_threshold(scores, truth, EvaluationSettings(threshold=0.5))
    assert found is not None
    # three scores are 0.5 or more; two of these images are anomalous
    assert (found.value, found.source, found.quantile) == (0.5, "given", None)
    assert (found.flagged, found.found, found.false_alarms) == (3, 2, 1)
    assert found.f1 == pytest.approx(0.8)


def write(folder: Path, case: Case) -> tuple[Path, Path]:
    """Write features and scores to disk, as the encoder and the scorer do."""
    features, scores = folder / "features", folder / "scores"
    features.mkdir()
    scores.mkdir()
    count = len(case.items)
    np.save(features / "class_tokens.npy", np.zeros((count, 2), dtype=np.float32))
    rows = tuple(
        ImageRows(sha256=item.sha256, height=S, width=S, canvas=(S, S), offsets=((0, 0),), first_row=n, rows=1)
        for n, item in enumerate(case.items)
    )
    index = FeatureIndex(
        size_px=S, grid=S, dim=2, model="none", random_weights=True, identity={}, images=rows, problems=(), outputs={}
    )
    (features / "index.json").write_text(index.model_dump_json(by_alias=True), encoding="utf-8")
    parts = {
        "class": np.zeros(count, dtype=np.float32),
        "a_l": np.stack([m.reshape(S * S) for m in case.maps]).astype(np.float32),
    }
    save_file(parts, scores / "scores.safetensors")
    listed = ScoresIndex(
        seed=3,
        tau=1.0,
        settings=ScoreSettings(variants=("text",)),
        images=tuple(
            ScoredImage(
                sha256=item.sha256, first_row=n, rows=1, references=(), image_score={"text": float(case.maps[n].max())}
            )
            for n, item in enumerate(case.items)
        ),
    )
    (scores / "scores.json").write_text(listed.model_dump_json(by_alias=True), encoding="utf-8")
    return features, scores


def test_from_files_to_files(case: Case, tmp_path: Path) -> None:
    features, scores = write(tmp_path, case)
    out = tmp_path / "out"
    out.mkdir()
    evaluate_category(case.items, features, scores, ["text"], EvaluationSettings(), out)
    expected, curves = case.both()
    assert CategoryEvaluation.load(out) == expected
    assert CategoryCurves.load(out) == curves
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["schema"] == "adflows zsad evaluation 1"
    first = (out / "metrics.json").read_bytes(), (out / "curves.json").read_bytes()
    evaluate_category(case.items, features, scores, ["text"], EvaluationSettings(), out)
    assert ((out / "metrics.json").read_bytes(), (out / "curves.json").read_bytes()) == first


def test_a_damaged_result_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"schema": "another"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"metrics\.json: is not a file of this step") as caught:
        CategoryEvaluation.load(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        CategoryCurves.load(tmp_path)
