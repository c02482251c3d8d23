"""Tests of the report of a run, from scored sets with known figures: texts, private data, and selected images."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medad.base.errors import CaseFailure, InputError
from medad.base.text import PLACEHOLDER
from medad.reporting.seed_statistics import Stat, mean_and_sd
from tests.page import WrittenReport
from tests.zsad.scored_sets import (
    BACKGROUND,
    ExampleImage,
    defect_patches,
    usual,
    without_labels,
    write_category,
    write_json,
    zsad_settings,
)
from zsad.config.run import EncoderSettings, EvaluationSettings, ImagesSettings, ScoreSettings
from zsad.config.settings import ZsadSettings
from zsad.evaluation.metric_rows import METRICS
from zsad.reports import charts
from zsad.reports.charts import category_chart
from zsad.reports.published import CATEGORIES, TEST_IMAGES
from zsad.reports.run.figures import pick_images
from zsad.reports.run.report import SCALE_QUANTILES, write_report
from zsad.steps.evaluate import CategoryEvaluation
from zsad.steps.results import CategoryResult

HOSTILE = "<script>alert('x')<!--& \"quoted\""
AUROC_OF_USUAL = (5 + 6 + 6 + 6) / 24
"""AUROC of `usual()` by its class scores: the share of pairs in which the anomalous image scores higher."""


Category = Callable[..., CategoryResult[Path]]
Report = Callable[..., WrittenReport]


def write(
    out: Path,
    categories: Sequence[CategoryResult[Path]] = (),
    failures: Sequence[CaseFailure] = (),
    settings: ZsadSettings | None = None,
    **changes: Any,
) -> WrittenReport:
    """Write a report into a new folder."""
    out.mkdir()
    arguments: dict[str, Any] = {"versions": {"adflows": "0.2.0"}, "notes": []} | changes
    write_report(out, settings=settings or zsad_settings(), categories=categories, failures=failures, **arguments)
    return WrittenReport(out)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Write the report of these categories, or return an earlier report of equal ones. Equal charts are shared too."""
    written: dict[str, WrittenReport] = {}
    chart_cache: dict[bytes, str] = {}

    def chart(*parts: Any) -> str:
        key = pickle.dumps(parts)
        if key not in chart_cache:
            chart_cache[key] = category_chart(*parts)
        return chart_cache[key]

    def write_cached(*results: Any, **settings: Any) -> WrittenReport:
        key = repr((results, settings))
        if key not in written:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(charts, "category_chart", chart)
                written[key] = write(tmp_path_factory.mktemp("report") / "out", *results, **settings)
        return written[key]

    return write_cached


@pytest.fixture(scope="session")
def report_of(report: Report, category: Category) -> Report:
    """Write the report of categories, given as name=images."""

    def of(settings: ZsadSettings | None = None, **images: Sequence[ExampleImage]) -> WrittenReport:
        return report([category(name, drawn, settings) for name, drawn in images.items()], settings=settings)

    return of


def of_variant(document: Any, category: int, variant: str) -> Any:
    return next(one for one in document["categories"][category]["variants"] if one["variant"] == variant)


# ---------------------------------------------------------------- figures


def test_known_figures_reach_page_json_and_csv(report_of: Report) -> None:
    done = report_of(screw=usual())
    text = of_variant(done.json, 0, "text")
    stat = text["metrics"]["image_auroc"]
    assert stat["mean"] == pytest.approx(AUROC_OF_USUAL, abs=1e-12)
    assert (stat["sd"], stat["n"]) == (0.0, 2)
    assert f"{100 * AUROC_OF_USUAL:.1f} ± 0.0" in done.page.words
    row = next(row for row in done.table("results.csv") if row["variant"] == "text" and row["seed"] == "1")
    assert float(row["image_auroc"]) == pytest.approx(AUROC_OF_USUAL, abs=1e-12)
    assert (row["normal"], row["anomalous"]) == ("6", "4")


def test_everything_is_what_the_evaluation_measured(report: Report, category: Category) -> None:
    settings = zsad_settings(seeds=(3, 1, 2))
    # scores differ between seeds, so a mix-up would be seen
    results = [
        category(name, usual(6, n), settings, shift=lambda seed: seed / 8) for name, n in [("tile10", 4), ("tile2", 5)]
    ]
    done = report(results[::-1], settings=settings)
    assert [one["name"] for one in done.json["categories"]] == ["tile2", "tile10"]
    assert done.json["seeds"] == [1, 2, 3]
    for result, shown in zip(results[::-1], done.json["categories"], strict=True):
        for figures in shown["variants"]:
            for seed, folder in result.evaluated.items():
                measured = CategoryEvaluation.load(folder).variants[figures["variant"]]
                here = figures["seeds"][str(seed)]
                for group, values in (("image", measured.image), ("pixel", measured.pixel)):
                    assert values is not None
                    for key in ("auroc", "ap", "f1max", "aupro", "pro_200"):
                        if f"{group}_{key}" in METRICS:
                            assert here["metrics"][f"{group}_{key}"] == getattr(values, key)
                assert measured.threshold is not None
                assert here["deployable_threshold"] == measured.threshold.value
                assert (here["flagged"], here["found"]) == (measured.threshold.flagged, measured.threshold.found)
                row = next(
                    row
                    for row in done.table("results.csv")
                    if (row["category"], row["variant"], row["seed"]) == (shown["name"], figures["variant"], str(seed))
                )
                for key in METRICS:
                    assert float(row[key]) == here["metrics"][key]
            thresholds = [figures["seeds"][str(seed)]["deployable_threshold"] for seed in (1, 2, 3)]
            assert figures["deployable_threshold"]["mean"] == pytest.approx(np.mean(thresholds), rel=1e-12)
            assert figures["deployable_threshold"]["sd"] == pytest.approx(np.std(thresholds, ddof=1), rel=1e-9)


def test_macro_mean_is_of_categories_and_leaves_out_what_is_undefined(report_of: Report) -> None:
    perfect = [ExampleImage("good/0", False, 0.1), ExampleImage("hole/0", True, 0.9, defect=(0, 32, 0, 32))]
    done = report_of(a=usual(), b=perfect, c=usual(5, 0))
    text = done.json["macro"][0]
    # two categories of very different sizes have the same weight, because they are not pooled
    assert text["metrics"]["image_auroc"]["mean"] == pytest.approx((AUROC_OF_USUAL + 1) / 2, abs=1e-12)
    assert text["categories"]["image_auroc"] == 2
    assert of_variant(done.json, 2, "text")["metrics"]["image_auroc"] is None
    assert "Only normal images: AUROC, AP and F1max are undefined." in done.page.words
    assert "mean of 2 categories" in done.page.words


def test_means_over_categories_and_who_made_them_are_in_the_table(report: Report, category: Category) -> None:
    perfect = [ExampleImage("good/0", False, 0.1), ExampleImage("hole/0", True, 0.9, defect=(0, 32, 0, 32))]
    sets = [("a", usual(), 0.1), ("b", perfect, 0.0)]
    done = report([category(n, d, shift=lambda seed, s=s: s * seed) for n, d, s in sets])
    rows = done.table("results.csv")
    means = {(row["variant"], row["seed"]): row for row in rows if row["category"] == "mean over categories"}
    assert list(means) == [(variant, part) for variant in ("text", "joint") for part in ("mean", "sd")]
    assert rows[-4:] == list(means.values())
    assert float(means["text", "mean"]["image_auroc"]) == pytest.approx((AUROC_OF_USUAL + 1) / 2, abs=1e-12)
    assert float(means["text", "sd"]["image_auroc"]) == 0.0
    for macro in done.json["macro"]:
        for key in METRICS:
            for part in ("mean", "sd"):
                assert float(means[macro["variant"], part][key]) == macro["metrics"][key][part]
        assert float(means[macro["variant"], "mean"]["deployable_f1"]) == macro["deployable_f1"]["mean"]
    for name in ("results.csv", "scores.csv", "curves.csv"):
        assert {row["encoder"] for row in done.table(name)} == {"open_clip ViT-B-16-plus-240"}


def test_one_seed_has_no_sd_in_the_table_and_no_labels_have_no_means(report_of: Report) -> None:
    settings = zsad_settings(seeds=(4,))
    one = report_of(settings, a=usual())
    assert [row["seed"] for row in one.table("results.csv")] == ["4", "4", "mean", "mean"]
    none = report_of(settings, a=without_labels(usual()))
    assert [row["seed"] for row in none.table("results.csv")] == ["4", "4"]
    assert none.table("curves.csv") == []


def test_curves_are_in_json_and_table_point_by_point(report: Report, category: Category) -> None:
    """The area under the points is the metric, because curves of so few images are not thinned."""
    done = report([category(name, usual(), zsad_settings(seeds=(3, 2))) for name in "ab"])
    table = done.table("curves.csv")
    for shown in done.json["categories"]:
        curves = shown["curves"]
        assert curves["variant"] == "joint"
        metrics = of_variant(done.json, 0, "joint")["seeds"]["2"]["metrics"]
        for of in ("image", "pixel"):
            for kind, columns in (("roc", ("false_positive_rate", "recall")), ("pr", ("recall", "precision"))):
                own = [row for row in table if (row["category"], row["of"], row["curve"]) == (shown["name"], of, kind)]
                assert {(row["variant"], row["seed"]) for row in own} == {("joint", "2")}
                for column, axis in zip(columns, "xy", strict=True):
                    assert [float(row[column]) for row in own] == curves[of][kind][axis]
                [empty] = {"false_positive_rate", "recall", "precision"} - set(columns)
                assert {row[empty] for row in own} == {""}
            roc = curves[of]["roc"]
            assert np.trapezoid(roc["y"], roc["x"]) == pytest.approx(metrics[f"{of}_auroc"], abs=1e-12)


def test_sd_is_over_seeds_of_the_macro_mean(report: Report, category: Category) -> None:
    settings = zsad_settings(evaluation=EvaluationSettings(threshold=0.605))
    # at 0.605, seed 0 flags .61 .71 .81, and seed 1, with its shift, all from .51: it finds 3 and 4 of 4
    results = [category(name, usual(5, 4), settings, shift=lambda seed: seed / 10) for name in "ab"]
    done = report(results, settings=settings)
    f1 = [2 * 3 / (3 + 4), 2 * 4 / (4 + 4)]
    assert done.json["macro"][0]["deployable_f1"]["mean"] == pytest.approx(np.mean(f1), rel=1e-12)
    assert done.json["macro"][0]["deployable_f1"]["sd"] == pytest.approx(np.std(f1, ddof=1), rel=1e-12)
    assert "The settings give the threshold: 0.605." in done.page.words


def test_one_seed_has_no_deviation(report_of: Report) -> None:
    settings = zsad_settings(seeds=(4,))
    done = report_of(settings, screw=usual())
    assert of_variant(done.json, 0, "text")["metrics"]["image_auroc"]["sd"] is None
    assert re.search(r"\d ± \d", done.page.words) is None
    assert "one seed has no deviation" in done.page.words
    assert "with seed 4" in done.page.words


def test_a_seed_that_one_category_lacks_is_in_no_mean_over_categories(report: Report, category: Category) -> None:
    whole, part = (category(name, usual()) for name in "ab")
    part = dataclasses.replace(part, evaluated={1: part.evaluated[1]}, scores={1: part.scores[1]})
    done = report([whole, part])
    assert done.json["macro"][0]["metrics"]["image_auroc"]["n"] == 1
    assert [one["shown_seed"] for one in done.json["categories"]] == [0, 1]
    assert "This category is shown with seed 1." in done.page.words


@given(st.lists(st.floats(-1e6, 1e6), max_size=8))
def test_statistic_is_mean_and_sample_deviation(values: list[float]) -> None:
    stat = mean_and_sd(values)
    if not values:
        assert stat is None
        return
    assert stat is not None
    assert stat.mean == pytest.approx(np.mean(values), abs=1e-9, rel=1e-9)
    assert (stat.sd is None) == (len(values) == 1)
    if stat.sd is not None:
        assert stat.sd == pytest.approx(np.std(values, ddof=1), abs=1e-6, rel=1e-6)
    assert mean_and_sd([*values, None]) is None


def test_equal_values_have_no_deviation_at_all() -> None:
    assert mean_and_sd([0.1] * 6) == Stat(mean=0.1, sd=0.0, n=6)


# ---------------------------------------------------------------- the papers' figures, oracle thresholds, notices


def test_published_rows_stand_beside_ours_and_say_whose_they_are(
    report: Report, category: Category, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = zsad_settings(published="mvtec", seeds=tuple(range(6)))
    monkeypatch.setitem(TEST_IMAGES, "mvtec", 15 * 4)
    results = [category(name, usual(2, 2), settings) for name in CATEGORIES["mvtec"]]
    done = report(results, settings=settings)
    words = done.page.words
    for figure in ("91.6 ± 0.0", "71.8 ± 0.4", "93.1 ± 0.6", "97.8"):
        assert figure in words
    assert words.count("table 3 (6 seeds); not our result") == 2 + 2 + 2  # text and joint twice, two others once
    assert done.json["published"]["comparable"] is True
    assert not done.json["notices"]
    # the papers compute PRO from 200 thresholds, so it is in our column of that name, the last one
    row = re.search(r"<tr class=\"paper\"><td>published: text<br>.*?</tr>", done.html, re.DOTALL)
    assert row is not None
    cells = re.findall(r"<td>([^<]*)</td>", row.group(0))
    assert cells[:8] == ["91.6 ± 0.0", "96.4 ± 0.0", "92.9 ± 0.1", "85.3 ± 0.0", "–", "29.1 ± 0.1", "–", "71.8 ± 0.4"]


def test_without_the_loop_their_pro_stands_under_aupro(report_of: Report) -> None:
    settings = zsad_settings(published="visa", evaluation=EvaluationSettings(pro_200=False))
    done = report_of(settings, candle=usual())
    row = re.search(r"<tr class=\"paper\"><td>published: Dual-image<.*?</tr>", done.html, re.DOTALL)
    assert row is not None
    assert re.findall(r"<td>([^<]*)</td>", row.group(0))[:7] == ["82.6", "84.2", "81.0", "94.8", "–", "23.5", "78.6"]
    assert "200 thresholds" not in " ".join(done.page.labels[:30])


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (EncoderSettings(model="embedded"), "this run uses another encoder"),
        (EncoderSettings(seed=3), "the encoder has random weights"),
        (EncoderSettings(tag="laion400m_e31"), "this run uses laion400m_e31"),
        (EncoderSettings(tag="laion400m_e32"), "the 15 categories of MVTec AD, this run has 1 of them"),
        (EncoderSettings(tag="laion400m_e32"), "means over 6 seeds, this run has 2"),
    ],
)
def test_a_run_that_does_not_compare_says_so(report_of: Report, encoder: EncoderSettings, reason: str) -> None:
    settings = zsad_settings(published="mvtec", encoder=encoder)
    done = report_of(settings, screw=usual())
    assert done.json["published"]["comparable"] is False
    assert reason in done.page.words
    assert done.page.words.index(reason) < done.page.words.index("image AUROC")


def test_a_preview_of_random_weights_is_tagged_and_one_that_does_not_compare_is_not(
    category: Category, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zsad.reports import pictures

    shown: list[tuple[list[str], list[str]]] = []
    stack = pictures.stack_rows

    def noted(rows: Any, heads: Any, scale: Any, columns: int = 1) -> Any:
        shown.append(([caption for caption, _ in rows], heads))
        return stack(rows, heads, scale, columns)

    monkeypatch.setattr(pictures, "stack_rows", noted)
    for name, drawn, encoder in (
        ("clip", usual(), EncoderSettings(tag="laion400m_e32")),
        ("random", without_labels(usual()), EncoderSettings(seed=0)),
        ("unmasked", [dataclasses.replace(one, has_mask=False) for one in usual()], EncoderSettings(seed=0)),
    ):
        settings = zsad_settings(published="mvtec", encoder=encoder)
        write(tmp_path / name, [category("screw", drawn, settings)], settings=settings)
    captions, heads = zip(*shown, strict=True)
    assert ["(" in caption for (caption,) in captions] == [False, True, True]
    assert captions[1][0].endswith("(random weights)")
    assert list(heads) == [
        ["image; blue: true mask", "reference", "heat map"],
        *[["image", "reference", "heat map"]] * 2,
    ]


def test_nothing_published_where_nothing_was_asked_for(report_of: Report) -> None:
    done = report_of(screw=usual())
    assert "published" not in done.page.words.split("Settings")[0]
    assert done.json["published"] is None


@pytest.mark.parametrize("images", ["labelled", "unlabelled"])
def test_random_weights_and_the_embedded_model_are_told_at_the_top(
    report: Report, category: Category, images: str
) -> None:
    drawn = usual() if images == "labelled" else without_labels(usual())
    for name, encoder, text in (
        ("seeded", EncoderSettings(seed=0), "Random weights. The encoder was never trained"),
        ("own", EncoderSettings(model="embedded"), "Embedded model."),
    ):
        settings = zsad_settings(encoder=encoder)
        result = category("screw", drawn, settings, random_weights=name == "seeded")
        done = report([result], settings=settings)
        assert done.page.words.index(text) < done.page.words.index("Deployable threshold")
        assert done.page.words.index(text) < done.page.words.index("was used for training")
        # even without any result
        assert text in report([], [CaseFailure("screw", "text", "no room")], settings=settings).page.words


def test_f1max_is_never_shown_without_the_word_oracle(report_of: Report) -> None:
    settings = zsad_settings(published="mvtec")
    done = report_of(settings, screw=usual())
    found = [match.start() for match in re.finditer("F1max", done.page.words)]
    assert len(found) > 5
    for place in found:
        # the sentence about missing classes shows no figure
        near = done.page.words[max(0, place - 30) : place + 60]
        assert "oracle" in near or "undefined" in near
    assert sum("F1max" in label for label in done.page.labels) == sum(
        "F1max" in label and "oracle" in label for label in done.page.labels
    )
    assert {key for key in done.json["metrics"] if "f1max" in key} == {"image_f1max", "pixel_f1max"}
    assert all("oracle" in title for key, title in done.json["metrics"].items() if "f1max" in key)


def test_deployable_threshold_and_what_it_finds(report_of: Report) -> None:
    settings = zsad_settings(seeds=(0,), score=ScoreSettings(variants=("text",)))
    done = report_of(settings, screw=usual())
    # the linear 0.9 quantile of ten scores is a tenth of the way from the ninth to the tenth
    (category,) = done.json["categories"]
    figures = category["variants"][0]["seeds"]["0"]
    assert figures["deployable_threshold"] == pytest.approx(0.71 + 0.1 * 0.1, abs=1e-6)
    assert (figures["flagged"], figures["found"], figures["false_alarms"]) == (1, 1, 0)
    assert figures["deployable_f1"] == pytest.approx(2 / 5)
    assert "0.72 1 1 of 4 0 of 6 40.0" in done.page.words
    assert "The threshold is the 90 % quantile" in done.page.words


# ---------------------------------------------------------------- less than everything


def test_without_labels_nothing_is_claimed(report_of: Report) -> None:
    done = report_of(new=without_labels(usual(20, 10)))
    assert "cannot show how good the scores are" in done.page.words
    assert done.json["macro"] == []
    (category,) = done.json["categories"]
    assert (category["normal"], category["anomalous"], category["unlabelled"]) == (0, 0, 30)
    assert [one["rank"] for one in category["shown"]] == ["highest"] * 4 + ["median", "lowest"]
    assert not any("AUROC" in label for label in done.page.labels[: done.page.labels.index(" category") + 6])
    listed = re.findall(r"<tr><td>((?:good|scratch)/\d+)</td><td>([\d.]+)</td>", done.html)
    assert len(listed) == 20
    scores = [float(score) for _, score in listed]
    assert scores == sorted(scores, reverse=True)
    assert "20 of 30; all are in scores.csv" in done.page.words


def test_labels_without_masks(report_of: Report) -> None:
    drawn = [dataclasses.replace(one, has_mask=False) for one in usual()]
    done = report_of(screw=drawn)
    text = of_variant(done.json, 0, "text")["metrics"]
    assert text["image_auroc"]["mean"] == pytest.approx(AUROC_OF_USUAL)
    assert [text[key] for key in METRICS if key.startswith("pixel")] == [None] * 5
    assert "no mask" in done.page.words
    assert not any(shown["masked"] for shown in done.json["categories"][0]["shown"])


def test_only_anomalous_images(report_of: Report) -> None:
    done = report_of(screw=usual(0, 4))
    assert of_variant(done.json, 0, "text")["metrics"]["image_auroc"] is None
    assert "Only anomalous images" in done.page.words


def test_one_image(report_of: Report, tmp_path: Path) -> None:
    settings = zsad_settings(score=ScoreSettings(variants=("text",)))
    (tmp_path / "a").mkdir()
    done = report_of(settings, x=[ExampleImage("good/0", False, 0.5)])
    assert "too few images" in done.page.words
    assert [one["rank"] for one in done.json["categories"][0]["shown"]] == ["highest normal"]
    assert done.json["categories"][0]["shown"][0]["flagged"] is None


def test_nothing_succeeded(report: Report) -> None:
    failed = [
        CaseFailure("screw/bad/3", "encode", "the image is broken", "3.png", "screw"),
        CaseFailure("nut", "text", "no"),
    ]
    done = report([], failed)
    assert "No image was scored." in done.page.words
    assert "screw bad/3 encode 3.png the image is broken" in done.page.words
    assert "nut the whole category text" in done.page.words
    assert (done.json["macro"], done.json["categories"], done.json["colour_scale"]) == ([], [], None)
    assert not (done.folder / "preview.png").exists()
    assert done.table("scores.csv") == []
    assert "No image was scored." in report().page.words


def test_a_mask_that_cannot_be_used_is_named_and_not_drawn(report: Report, tmp_path: Path) -> None:
    settings = zsad_settings()
    result = write_category(tmp_path, "screw", usual(), settings)
    broken = next(image for image in result.images if image.id == "scratch/0")
    assert broken.mask is not None
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(broken.mask)
    from zsad.steps.evaluate import evaluate_category

    for seed in settings.seeds:
        evaluate_category(
            result.images,
            result.features,
            result.scores[seed],
            settings.method.variant_names,
            settings.evaluation,
            result.evaluated[seed],
        )
    done = report([result])
    assert "scratch/0 is left out of the pixel figures" in done.page.words
    (category,) = done.json["categories"]
    assert [one["id"] for one in category["mask_problems"]] == ["scratch/0"]
    assert {one["id"]: one["masked"] for one in category["shown"]}["scratch/0"] is False


def test_images_without_scores_are_passed_over(report: Report, category: Category) -> None:
    result = category("screw", usual())
    extra = dataclasses.replace(result.images[0], id="good/broken", sha256="0" * 64)
    done = report([dataclasses.replace(result, images=(extra, *result.images))])
    assert len(done.json["categories"][0]["images"]) == 10


def test_equal_files_under_two_names_are_two_images(report: Report, category: Category) -> None:
    result = category("screw", usual())
    twin = dataclasses.replace(result.images[0], id="good/copy")
    done = report([dataclasses.replace(result, images=(*result.images, twin))])
    assert len(done.json["categories"][0]["images"]) == 11
    assert {row["id"] for row in done.table("scores.csv")} >= {"good/copy", "good/0"}


# ---------------------------------------------------------------- pictures


def test_one_scale_for_all_categories_from_all_patches(report_of: Report) -> None:
    dim, bright = (
        usual(3, 1),
        [ExampleImage("good/0", False, 0.2), ExampleImage("hole/0", True, 0.9, peak=4.0, defect=(0, 64, 0, 64))],
    )
    done = report_of(a=dim, b=bright)
    # joint is lambda_1 A_V + lambda_text A_L, and both terms are equal here
    patches = np.concatenate([2 * defect_patches(drawn).ravel() for drawn in [*dim, *bright]])
    low, high = np.quantile(patches, SCALE_QUANTILES)
    scale = done.json["colour_scale"]
    assert (scale["low"], scale["high"]) == (pytest.approx(low), pytest.approx(high))
    assert scale["low"] == 2 * BACKGROUND
    assert (scale["variant"], scale["seed"]) == ("joint", 0)
    assert "all heat maps of this report have the same scale" in done.page.words


def test_picked_images_are_the_known_ones_and_show_their_reference(report_of: Report) -> None:
    settings = zsad_settings(seeds=(0,), score=ScoreSettings(variants=("joint", "text")))
    done = report_of(settings, screw=usual(5, 5))
    (category,) = done.json["categories"]
    assert [(one["rank"], one["id"]) for one in category["shown"]] == [
        ("highest anomalous", "scratch/4"),
        ("median anomalous", "scratch/2"),
        ("lowest anomalous", "scratch/0"),
        ("lowest anomalous", "scratch/1"),
        ("highest normal", "good/4"),
        ("highest normal", "good/3"),
        ("median normal", "good/2"),
    ]
    # the variant text does not use a reference
    assert {one["reference"] for one in category["shown"]} == {None}
    joint = zsad_settings(seeds=(0,), score=ScoreSettings(variants=("text", "joint")))
    (category,) = report_of(joint, screw=usual(5, 5)).json["categories"]
    order = [drawn.id for drawn in usual(5, 5)]
    for one in category["shown"]:
        assert one["reference"] == order[(order.index(one["id"]) + 1) % len(order)]


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([True, False, None])), max_size=12),
    st.integers(1, 3),
)
def test_picked_images_are_extremes_and_each_is_picked_once(
    images: list[tuple[float, bool | None]], misses: int
) -> None:
    ids = [f"i/{i}" for i in range(len(images))]
    scores, labels = [score for score, _ in images], [label for _, label in images]
    picked = pick_images(ids, scores, labels, misses)
    indices = [index for _, index in picked]
    assert len(set(indices)) == len(indices) <= 3 + 2 * misses
    assert bool(picked) == bool(images)
    bad = [score for score, label in images if label]
    good = [score for score, label in images if label is False]
    got = {rank: scores[index] for rank, index in reversed(picked)}
    if bad:
        assert got["highest anomalous"] == max(bad)
        # no image that was not picked is a worse error
        rest = [scores[i] for i, label in enumerate(labels) if label and i not in indices]
        assert all(scores[i] <= min(rest) for rank, i in picked if rank == "lowest anomalous" and rest)
    if good:
        assert max(scores[i] for i in indices if labels[i] is False) == max(good)
    if bad or good:
        assert all(labels[i] is not None for i in indices)


def test_the_page_of_2000_images_has_them_all_in_its_gallery(report_of: Report) -> None:
    settings = zsad_settings(seeds=(0,), score=ScoreSettings(variants=("text",)))
    few = report_of(settings, a=without_labels(usual(15, 5)))
    rng = np.random.default_rng(0)
    drawn = [ExampleImage(f"x{i}", None, float(rng.random()), size_hw=(32, 32)) for i in range(2000)]
    many = report_of(settings, a=drawn)
    assert len(many.page.images) == len(few.page.images) == 1 + 6
    assert len(many.html) < 40_000_000
    [gallery] = json.loads(many.page.data[0])
    assert len(gallery["images"]) == 2000
    assert all(image["picture"].startswith("data:image/jpeg") for image in gallery["images"])
    assert len(many.table("scores.csv")) == len(many.json["categories"][0]["images"]) == 2000


# ---------------------------------------------------------------- self-contained, safe, private, repeatable


def test_page_needs_nothing_from_outside(report: Report, category: Category) -> None:
    settings = zsad_settings(published="mvtec")
    done = report(
        [category(name, usual(), settings) for name in "ab"],
        [CaseFailure("a/x", "encode", "bad", category="a")],
        settings=settings,
    )
    done.page.assert_self_contained()


def test_text_from_outside_stays_text(report: Report, category: Category) -> None:
    settings = zsad_settings(data=ImagesSettings(root="samples:x", category=HOSTILE))
    drawn = [ExampleImage(HOSTILE, True, 0.5), ExampleImage("good/0", False, 0.4)]
    result = category(HOSTILE, drawn, settings, model=HOSTILE)
    done = report(
        [result],
        [CaseFailure(f"{HOSTILE}/{HOSTILE}", HOSTILE, HOSTILE, "x.png", HOSTILE)],
        settings=settings,
        notes=[HOSTILE],
        versions={HOSTILE: HOSTILE},
    )
    assert len(done.page.scripts) == 2, "the kit's and the gallery's"
    assert done.page.words.count("alert('x')") >= 10


def test_no_path_goes_in(report: Report, category: Category, tmp_path: Path) -> None:
    settings = zsad_settings(
        data=ImagesSettings(root="/srv/SECRET/line", masks="SECRET/masks"),
        encoder=EncoderSettings(weights="/srv/SECRET/vit.safetensors"),
        adapt={"textures": "/srv/SECRET/dtd"},
    )
    done = report(
        [category("a", usual(), settings)],
        [CaseFailure("a/x", "encode", "cannot read /srv/SECRET/x.png (bad)", "/srv/SECRET/x.png", "a")],
        settings=settings,
        notes=["from ~/SECRET/x"],
    )
    tables = "".join((done.folder / name).read_text(encoding="utf-8") for name in ("results.csv", "scores.csv"))
    both = done.html + json.dumps(done.json) + tables
    assert both.count("SECRET") == 0
    assert str(tmp_path) not in both
    assert done.json["failures"][0]["rule"] == f"cannot read {PLACEHOLDER} (bad)"
    assert done.json["failures"][0]["file"] == "x.png"
    assert done.json["settings"]["encoders"]["main"]["weights"] == f"{PLACEHOLDER}/vit.safetensors"


def test_opaque_ids_hide_file_names_too(report: Report) -> None:
    settings = zsad_settings(data=ImagesSettings(root="x", pseudonyms=True))
    done = report([], [CaseFailure("a/image-3fa9", "encode", "truncated", "Order-4711.png", "a")], settings=settings)
    assert "Order" not in done.html
    assert done.json["failures"][0]["file"] == ""


def test_names_that_are_no_text_are_written_all_the_same(report: Report, category: Category) -> None:
    # a file name with bytes that are not UTF-8, as the file system returns it
    result = category("a", [ExampleImage("one", None, 0.5), ExampleImage("two", None, 0.6)])
    odd = dataclasses.replace(result.images[0], id="caf\udce9")
    done = report(
        [dataclasses.replace(result, images=(odd, result.images[1]))], [CaseFailure("a/\udcff", "x", "y", category="a")]
    )
    assert done.json["categories"][0]["images"][0]["id"] == "caf\\udce9"
    assert "caf\\udce9" in done.page.words


def test_equal_inputs_give_equal_bytes_in_any_order_and_place(tmp_path: Path) -> None:
    def run(root: Path, step: int) -> list[bytes]:
        results = [write_category(root, f"tile-{n}", usual(), zsad_settings()) for n in (1, 2, 11)]
        results = [dataclasses.replace(one, images=one.images[::step]) for one in results]
        failures = [CaseFailure(f"tile-1/x/{n}", "encode", "bad", category="tile-1") for n in (7, 8)]
        done = write(root / "out", results[::step], failures[::step])
        names = ("report.html", "report.json", "preview.png", "results.csv", "scores.csv")
        return [(done.folder / name).read_bytes() for name in names]

    assert run(tmp_path / "here", 1) == run(tmp_path / "elsewhere", -1)


@pytest.mark.parametrize(
    "damaged",
    [
        "features/index.json",
        "text/text.json",
        "scores-0/scores.json",
        "scores-0/scores.safetensors",
        "evaluated-1/metrics.json",
        "evaluated-0/curves.json",
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"[]"])
def test_damaged_results_are_named_and_leave_nothing(tmp_path: Path, damaged: str, content: bytes | None) -> None:
    result = write_category(tmp_path, "a", usual(2, 2), zsad_settings())
    path = tmp_path / "a" / damaged
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=path.name):
        write(tmp_path / "out", [result])
    assert not list((tmp_path / "out").iterdir())


def test_an_evaluation_of_other_variants_is_refused(report: Report, category: Category) -> None:
    result = category("a", usual(2, 2), zsad_settings(score=ScoreSettings(variants=("text",))))
    with pytest.raises(InputError, match="no variant joint"):
        report([result])


def test_scores_csv_holds_every_image_variant_and_seed(report_of: Report) -> None:
    done = report_of(a=usual())
    rows = done.table("scores.csv")
    assert len(rows) == 10 * 2 * 2
    found = {(row["id"], row["variant"], int(row["seed"])): row for row in rows}
    for image in done.json["categories"][0]["images"]:
        for variant, seeds in image["scores"].items():
            for seed, score in seeds.items():
                row = found[image["id"], variant, int(seed)]
                assert float(row["score"]) == score
                assert row["anomalous"] == str(int(image["anomalous"]))
                assert row["flagged"] == str(int(score >= float(row["threshold"])))


def test_preview_is_a_picture_of_the_first_categories(report: Report, category: Category) -> None:
    done = report([category(f"c{n}", usual(2, 2)) for n in range(6)])
    with Image.open(done.folder / "preview.png") as picture:
        assert picture.width == 3 * 256 + 8
        assert picture.height > 4 * 256
        assert picture.height < 5 * 256 + 200


def test_text_json_without_prompts_is_no_obstacle(report: Report, tmp_path: Path) -> None:
    result = write_category(tmp_path, "a", usual(2, 2), zsad_settings())
    assert result.text is not None
    write_json(result.text / "text.json", {"category": "a"})
    assert report([result]).json["categories"][0]["prompts"] is None
