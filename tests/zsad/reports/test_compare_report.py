"""Tests of the comparison report, with evaluations written by hand: means, ranks, tables, and private data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medad.base.errors import CaseFailure, InputError
from medad.base.text import PLACEHOLDER
from medad.reporting.seed_statistics import Stat
from tests.browser import assert_sound, needs_browser, opened
from tests.page import WrittenReport
from tests.zsad.compared_sets import CLIP, SECRET, compare_settings, seeds_of, write_evaluation, write_system
from zsad.clip.models import EncoderInfo
from zsad.config.settings import Ablation, ZsadSettings, ablation_systems
from zsad.evaluation.metric_rows import METRICS
from zsad.reports.compare.charts import Panel, line_chart
from zsad.reports.compare.report import write_compare_report
from zsad.steps.evaluate import METRICS_FILE
from zsad.steps.results import AblationResult, AblationRow, Cost, SystemResult

HOSTILE = "<script>alert('x')<!--& \"quoted\""
MANY = [f"tile_{number}" for number in range(1, 8)]
TRIO: list[dict[str, Any]] = [{"system": "clip"}, {"system": "anovl"}, {"system": "dual"}]


class Compared(WrittenReport):
    """A written report of a comparison."""

    def tex(self, of: str) -> str:
        return (self.folder / f"table_{of}.tex").read_text(encoding="utf-8")

    def mean(self, number: int, key: str = "image_auroc") -> Any:
        return self.json["systems"][number]["mean"]["metrics"][key]

    def rank(self, number: int, key: str = "image_auroc") -> Any:
        return self.json["systems"][number]["mean"]["ranks"][key]


Report = Callable[..., Compared]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    def write(settings: ZsadSettings, systems: Sequence[SystemResult[Path]] = (), **changes: Any) -> Compared:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        out.mkdir()
        arguments: dict[str, Any] = {"versions": {"adflows": "0.2.0"}}
        write_compare_report(out, settings=settings, systems=systems, **(arguments | changes))
        return Compared(out)

    return write


def trio(
    root: Path, *, categories: Sequence[str] = ("a_1", "b_2"), **changes: Any
) -> tuple[Any, list[SystemResult[Path]]]:
    """Write three systems with these image AUROCs on two categories.

    CLIP has 0.6 and 0.8. AnoCLIP has 0.9 and 0.9 with the first seed, 0.9 and 1.0 with the second.
    Dual-image has 0.7 and 0.8 with the first seed, 0.9 and 0.8 with the second.
    """
    settings = compare_settings(*TRIO, **changes)
    clip, anovl, dual = settings.systems
    one, two, *_ = categories
    return settings, [
        write_system(root, clip, {one: seeds_of(0.6), two: seeds_of(0.8)}),
        write_system(root, anovl, {one: seeds_of(0.9, 0.9), two: seeds_of(0.9, 1.0)}),
        write_system(root, dual, {one: seeds_of(0.7, 0.9), two: seeds_of(0.8, 0.8)}),
    ]


# ---------------------------------------------------------------- means and ranks


def test_means_are_over_categories_and_then_seeds(report: Report, tmp_path: Path) -> None:
    done = report(*trio(tmp_path))
    clip, anovl, dual = (done.mean(number) for number in range(3))
    assert clip == {"mean": pytest.approx(0.7), "sd": None, "n": 1}
    # the means per seed are 0.9 and 0.95; the sd of two values is their distance divided by the root of 2
    assert anovl == {"mean": pytest.approx(0.925), "sd": pytest.approx(0.05 / 2**0.5), "n": 2}
    assert dual == {"mean": pytest.approx(0.8), "sd": pytest.approx(0.1 / 2**0.5), "n": 2}
    assert [done.rank(number) for number in range(3)] == [3, 1, 2]
    assert "<strong>92.5 ± 3.5</strong>" in done.html
    assert "<u>80.0 ± 7.1</u>" in done.html
    assert "does not depend on the seed, so it has one value and no deviation" in done.page.words
    assert done.page.words.count("does not depend on the seed, so it has one value") == 1


def test_what_prints_alike_ranks_alike(report: Report, tmp_path: Path) -> None:
    settings = compare_settings(*TRIO, seeds=(0,))
    aurocs = (0.80004, 0.79996, 0.7)
    systems = [
        write_system(tmp_path, one, {"a": seeds_of(auroc)}) for one, auroc in zip(settings.systems, aurocs, strict=True)
    ]
    done = report(settings, systems)
    assert [done.rank(number) for number in range(3)] == [1, 1, 3]
    # all other figures are equal
    assert [done.rank(number, "pixel_auroc") for number in range(3)] == [1, 1, 1]


def test_a_seed_more_of_a_system_that_has_none_changes_nothing(report: Report, tmp_path: Path) -> None:
    settings = compare_settings({"system": "clip"})
    done = report(settings, [write_system(tmp_path, settings.systems[0], {"a": seeds_of(0.6, 0.9)})])
    assert done.mean(0) == {"mean": 0.6, "sd": None, "n": 1}
    assert [row["seed"] for row in done.table("systems.csv")] == ["0"]


def test_failed_category_is_marked_and_out_of_ranks(report: Report, tmp_path: Path) -> None:
    settings, systems = trio(tmp_path)
    best = systems[1]
    systems[1] = dataclasses.replace(best, categories={"a_1": best.categories["a_1"]})
    failures = [
        CaseFailure("b_2/good/7", "encode", "not an image", "7.png", "b_2"),
        CaseFailure("b_2", "score", f"no room in {SECRET}/x", "maps.npy", group="AnoCLIP"),
    ]
    done = report(settings, systems, failures=failures)
    assert done.mean(1)["mean"] == pytest.approx(0.9)
    assert [done.rank(number) for number in range(3)] == [2, None, 1]
    assert done.json["systems"][1]["mean"]["categories"]["image_auroc"] == 1
    assert done.page.words.count("mean of only 1") == len(METRICS)
    assert "failed on b_2" in done.page.words
    assert r"$90.0^{\dag}" in done.tex("image")
    assert [(one["system"], one["category"], one["rule"]) for one in done.json["failures"]] == [
        ("", "b_2", "not an image"),
        ("AnoCLIP", "b_2", f"no room in {PLACEHOLDER}"),
    ]
    assert "7.png" in done.page.words
    assert "2 failed" in done.page.words


def test_what_is_undefined_for_all_leaves_no_one_incomplete(report: Report, tmp_path: Path) -> None:
    """A category with only normal images has no AUROC for any system."""
    settings = compare_settings(*TRIO[:2], seeds=(0,))
    nothing = {0: {"image": (None, None, None), "pixel": None, "anomalous": ()}}
    systems = [write_system(tmp_path, one, {"a": seeds_of(0.6), "b": nothing}) for one in settings.systems]
    done = report(settings, systems)
    assert [done.rank(number) for number in range(2)] == [1, 1]
    assert done.json["systems"][0]["mean"]["complete"]["image_auroc"] is True
    assert "mean of only 1" not in done.page.words


def test_fewer_seeds_are_said(report: Report, tmp_path: Path) -> None:
    settings, systems = trio(tmp_path, seeds=(0, 1, 2))
    assert "mean over 2 of 3 seeds" in report(settings, systems).page.words


# ---------------------------------------------------------------- tables


def test_csv_reads_back_as_the_numbers_written(report: Report, tmp_path: Path) -> None:
    settings = compare_settings(*TRIO[:2])
    figures = {
        system.display_name: {
            category: {
                seed: {
                    "image": tuple(0.1 + 0.01 * (number + 10 * seed + 3 * c + 7 * s) for number in range(3)),
                    "pixel": tuple(0.2 + 0.01 * (number + 10 * seed + 3 * c + 7 * s) for number in range(5)),
                }
                for seed in ((0, 1) if system.seeded else (0,))
            }
            for c, category in enumerate(("a", "b"))
        }
        for s, system in enumerate(settings.systems)
    }
    cost = Cost(1.5, 8.0, 4, 2048)
    done = report(
        settings, [write_system(tmp_path, one, figures[one.display_name], cost=cost) for one in settings.systems]
    )
    rows = done.table("systems.csv")
    assert len(rows) == 2 + 4
    for row in rows:
        written = figures[row["system"]][row["category"]][int(row["seed"])]
        auroc, ap, f1max = written["image"]
        assert [float(row[f"image_{key}"]) for key in ("auroc", "ap", "f1max")] == [auroc, ap, f1max]
        here = [float(row[f"pixel_{key}"]) for key in ("auroc", "ap", "f1max", "aupro", "pro_200")]
        assert tuple(here) == written["pixel"]
        assert (row["normal"], row["anomalous"], row["unlabelled"]) == ("2", "2", "0")
        assert (row["scoring_s"], row["encoding_s_shared"], row["peak_memory_bytes"]) == ("1.5", "8.0", "2048")
    for row, one in zip(done.table("summary.csv"), done.json["systems"], strict=True):
        for key in METRICS:
            stat = one["mean"]["metrics"][key]
            assert float(row[f"{key}_mean"]) == stat["mean"]
            assert row[f"{key}_sd"] == ("" if stat["sd"] is None else repr(stat["sd"]))
            assert row[f"{key}_categories"] == "2"


def latex_rows(text: str) -> list[list[str]]:
    body = text.split(r"\toprule")[1].split(r"\bottomrule", maxsplit=1)[0]
    lines = [line for line in body.strip().splitlines() if line != r"\midrule"]
    assert all(line.endswith(r" \\") for line in lines)
    return [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines]


def test_latex_tables_have_four_columns_and_escape_what_is_special(report: Report, tmp_path: Path) -> None:
    systems = [{"system": "clip", "label": "one_shot"}, *TRIO[1:]]
    settings = compare_settings(*systems, name="run_1", published="mvtec")
    results = [
        write_system(tmp_path, one, {"bottle": seeds_of(*([auroc] * (2 if one.seeded else 1)))})
        for one, auroc in zip(settings.systems, (0.6, 0.9, 0.7), strict=True)
    ]
    done = report(settings, results)
    for of in ("image", "pixel"):
        text = done.tex(of)
        rows = latex_rows(text)
        assert {len(row) for row in rows} == {4}
        assert text.count("{") == text.count("}")
        assert text.count("$") % 2 == 0
        assert not re.search(r"(?<!\\)_", text)
        assert r"one\_shot$^{\ddag}$" in text
        assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"\begin{tabular}{lccc}" in done.tex("image")
    head, *rows = latex_rows(done.tex("image"))
    assert [cell.strip() for cell in head] == ["System", "AUROC", "F1max", "AP"]
    assert [row[1].strip() for row in rows[:3]] == ["$60.0$", r"$\mathbf{90.0} \pm 0.0$", r"$\underline{70.0} \pm 0.0$"]
    # image AP was written 0.8 and F1max 0.7
    assert [cell.strip() for cell in rows[2][2:]] == [r"$\mathbf{70.0} \pm 0.0$", r"$\mathbf{80.0} \pm 0.0$"]
    assert [cell.strip() for cell in latex_rows(done.tex("pixel"))[2][1:]] == [
        r"$\mathbf{60.0} \pm 0.0$",
        r"$\mathbf{40.0} \pm 0.0$",
        # PRO from 200 thresholds, as in the papers
        r"$\mathbf{20.0} \pm 0.0$",
    ]
    published = done.tex("image").split(r"\midrule")[2]
    assert r"\textit{CLIP} (Zhang et al., Dual-Image Enhanced CLIP, table 1) & $74.0$ & $88.5$ & $89.1$" in published
    assert r"93.1 \pm 0.6" in published
    assert "mathbf" not in published
    assert "underline" not in published


# ---------------------------------------------------------------- published rows


def test_published_rows_are_labelled_and_ranked_with_none(report: Report, tmp_path: Path) -> None:
    settings, systems = trio(tmp_path, published="visa", categories=("candle", "pcb1"))
    done = report(settings, systems)
    # some published figures are far above ours: MuSc's 92.8 would be second
    assert [done.rank(number) for number in range(3)] == [3, 1, 2]
    by_system = {one["name"]: [row["system"] for row in one["published"]] for one in done.json["systems"]}
    assert by_system == {"CLIP": ["CLIP", "CLIP"], "AnoCLIP": ["AnoCLIP"], "Dual-image": ["Dual-image"]}
    others = {row["system"] for row in done.json["published"]["rows"]}
    assert others >= {"WinCLIP", "AnomalyCLIP", "MuSc (whole test set)", "VAND", "CoOp", "CLIP-AC", "APRIL-GAN"}
    for row in re.findall(r'<tr class="paper">.*?</tr>', done.html, flags=re.DOTALL):
        assert "not our result" in row
        assert "table" in row or "main results" in row
        assert "<strong>" not in row
        assert "<u>" not in row
    assert "this run has 2 of them" in done.page.words
    # the segmentation-model paper's figures of candle and of pcb1
    assert {"82.1", "20.2", "74.3", "29.5"} <= set(done.page.words.split())


def test_variants_that_no_paper_printed_stand_beside_no_row(report: Report, tmp_path: Path) -> None:
    dual = {"system": "dual", "references": {"count": 3}}
    settings = compare_settings(dual, {"system": "winclip", "shots": 1}, published="mvtec", seeds=(0,))
    done = report(settings, [write_system(tmp_path, one, {"bottle": seeds_of(0.9)}) for one in settings.systems])
    assert [one["published"] for one in done.json["systems"]] == [[], []]
    assert {row["system"] for row in done.json["published"]["rows"]} >= {"Dual-image", "WinCLIP"}


def test_without_a_benchmark_nothing_is_quoted(report: Report, tmp_path: Path) -> None:
    done = report(*trio(tmp_path))
    assert done.json["published"] is None
    assert 'class="paper"' not in done.html


# ---------------------------------------------------------------- tests between systems


def test_pairs_are_tested_on_the_same_images_and_categories(report: Report, tmp_path: Path) -> None:
    settings = compare_settings(*TRIO, seeds=(0,))
    right = {"normal": [n / 100 for n in range(12)], "anomalous": [1 + n / 100 for n in range(12)]}
    # scores of normal and anomalous images alternate: nearly chance
    wrong = {"normal": [n / 10 for n in range(12)], "anomalous": [n / 10 + 0.05 for n in range(12)]}
    aurocs = {"CLIP": 0.5, "AnoCLIP": 0.9, "Dual-image": 0.9}
    systems = [
        write_system(
            tmp_path,
            one,
            {
                name: seeds_of(
                    aurocs[one.display_name] + number / 100, **(wrong if one.display_name == "CLIP" else right)
                )
                for number, name in enumerate(MANY)
            },
        )
        for one in settings.systems
    ]
    done = report(settings, systems)
    rows = {(row["test"], row["metric"], row["a"], row["b"]): row for row in done.table("paired.csv")}
    assert len(rows) == 6 * 3
    equal = rows["DeLong", "image_auroc", "AnoCLIP", "Dual-image"]
    assert (float(equal["difference"]), float(equal["p"]), float(equal["p_holm"])) == (0.0, 1.0, 1.0)
    apart = rows["DeLong", "image_auroc", "CLIP", "AnoCLIP"]
    assert (apart["categories"], apart["images"]) == ("7", str(7 * 24))
    # the anomalous image is higher in 78 of 144 pairs: 12 + 11 + ... + 1
    assert float(apart["difference"]) == pytest.approx(78 / 144 - 1)
    assert float(apart["p_holm"]) < 1e-3
    signed = rows["Wilcoxon", "image_auroc", "CLIP", "AnoCLIP"]
    assert float(signed["difference"]) == pytest.approx(-0.4)
    assert float(signed["p"]) == pytest.approx(2 / 2**7)
    # the two smallest p of the three pairs are equal: both are multiplied by three
    assert float(signed["p_holm"]) == pytest.approx(6 / 2**7)
    assert float(rows["Wilcoxon", "pixel_auroc", "CLIP", "AnoCLIP"]["p"]) == 1.0
    words = done.page.words
    assert "−45.8 p < 0.001" in words
    assert "+45.8 p < 0.001" in words
    assert "+0.0 p 1.000" in words


def test_too_few_categories_and_images_are_said_plainly(report: Report, tmp_path: Path) -> None:
    done = report(*trio(tmp_path))
    assert all(row["p"] == "" for row in done.table("paired.csv"))
    assert "No pair could be tested: 4 anomalous and 4 normal images; the test needs 10 of each" in done.page.words
    assert "No pair could be tested: only 2 of the 6 categories that the test needs" in done.page.words


# ---------------------------------------------------------------- cost


def test_encoding_is_counted_once_for_the_systems_that_share_it(report: Report, tmp_path: Path) -> None:
    other = {"system": "clip", "label": "CLIP-L", "encoder": "large"}
    encoders = {"main": {"tag": "laion400m_e32"}, "large": {"model": "ViT-L-14-336", "tag": "openai"}}
    settings = compare_settings(*TRIO, other, encoders=encoders)
    costs = [Cost(2.0, 8.0, 4, 4096), Cost(1.0, 8.0, 4, 8192), Cost(0.5, 8.0, 4, None), Cost(3.0, 40.0, 4, None)]
    systems = [
        write_system(tmp_path, one, {name: seeds_of(*([0.9] * (2 if one.seeded else 1))) for name in "ab"}, cost=cost)
        for one, cost in zip(settings.systems, costs, strict=True)
    ]
    done = report(settings, systems)
    main, large = done.json["encoders"]
    assert (main["encoding_s"], main["images"], main["encoding_s_an_image"]) == (16.0, 8, 2.0)
    assert main["shared_by"] == ["CLIP", "AnoCLIP", "Dual-image"]
    assert (large["encoding_s"], large["shared_by"]) == (80.0, ["CLIP-L"])
    found = [one["cost"] for one in done.json["systems"]]
    assert [one["scoring_s_an_image"] for one in found] == [0.5, 0.25, 0.125, 0.75]
    assert [one["images"] for one in found] == [8, 16, 16, 8]
    assert [one["peak_memory_bytes"] for one in found] == [4096, 8192, None, None]
    assert found[1]["memory_bytes_an_image"] == 2048.0
    # times below a second are in milliseconds; the encoder's 16 s are 2 s per image
    assert "125 ms – –" in done.page.words
    assert "250 ms 8 KiB 2 KiB" in done.page.words
    assert "8 16 s 2 s CLIP, AnoCLIP, Dual-image" in done.page.words


def test_unmeasured_cost_leaves_no_section(report: Report, tmp_path: Path) -> None:
    done = report(*trio(tmp_path))
    assert "Cost" not in done.page.headings
    assert done.json["encoders"] == []


# ---------------------------------------------------------------- ablations


def ablation(root: Path, name: Ablation, values: Sequence[Sequence[float]]) -> AblationResult[Path]:
    """Write an ablation from the image AUROC of each row and seed. The pixel PRO is 0.1 lower."""
    rows = []
    for (label, system), aurocs in zip(ablation_systems(name, "main"), values, strict=False):
        folders = {
            seed: write_evaluation(
                root / name / label / str(seed),
                system.variant_names[-1],
                seed=seed,
                image=(auroc, 0.5, 0.5),
                pixel=(0.5, 0.5, 0.5, auroc - 0.1, auroc - 0.1),
            )
            for seed, auroc in enumerate(aurocs)
        }
        rows.append(AblationRow(label, {"bottle": folders}))
    return AblationResult(name, rows)


def test_ablations_have_their_rows_beside_the_papers(report: Report, tmp_path: Path) -> None:
    settings, systems = trio(tmp_path, ablations=("references", "map_weights"), published="mvtec")
    done = report(
        settings,
        systems,
        ablations=[
            ablation(tmp_path, "references", [(0.7, 0.8), (0.8, 0.8), (0.9, 0.9)]),
            ablation(tmp_path, "map_weights", [(0.6, 0.8), (0.7, 0.7), (0.9, 0.8)]),
        ],
    )
    references, weights = done.json["ablations"]
    assert [row["label"] for row in references["rows"]] == ["0", "1", "2"]
    assert [row["mean"]["metrics"]["image_auroc"]["mean"] for row in references["rows"]] == pytest.approx(
        [0.75, 0.8, 0.9]
    )
    assert [row["mean"]["ranks"]["image_auroc"] for row in references["rows"]] == [3, 2, 1]
    assert [[one["system"] for one in row["published"]] for row in references["rows"]] == [["0"], ["1"], []]
    # our row "2, 2" failed; the paper's row is still shown
    assert [one["system"] for one in weights["published"]] == ["2, 2"]
    assert "84.1 ± 0.3" in done.page.words
    charts = [
        image for image in done.page.images if "references" in str(image["alt"]) or "Reference" in str(image["alt"])
    ]
    assert len(charts) == 1
    assert "image AUROC in percent: 75.0 at 0; 80.0 at 1; 90.0 at 2" in str(charts[0]["alt"])
    rows = done.table("ablations.csv")
    assert [(row["ablation"], row["value"]) for row in rows][-1] == ("map_weights", "1, 1.5")
    assert float(rows[0]["image_auroc_mean"]) == pytest.approx(0.75)
    assert float(rows[0]["image_auroc_sd"]) == pytest.approx(0.1 / 2**0.5)


def test_line_charts_do_not_depend_on_the_run() -> None:
    panel = Panel("image AUROC", [0.0, 1.0], [Stat(mean=0.5, sd=0.1, n=2), None], [None, None])
    assert line_chart([panel], "steps") == line_chart([panel], "steps")


# ---------------------------------------------------------------- the page


def test_page_is_whole_and_loads_nothing(report: Report, tmp_path: Path) -> None:
    settings, systems = trio(tmp_path, ablations=("steps",), published="mvtec")
    done = report(settings, systems, ablations=[ablation(tmp_path, "steps", [(0.7, 0.8), (0.8, 0.8)])])
    done.page.assert_self_contained()
    assert "prefers-color-scheme: dark" in done.page.styles
    for category in ("a_1", "b_2"):
        assert done.page.headings.count(category) == 1
    for number, name in enumerate(("CLIP", "AnoCLIP", "Dual-image"), start=1):
        assert re.findall(rf'id="system-{number}">.*?>([^<]*)</a>', done.html) == [name]
    assert done.html.count('scope="row" id="system-') == 3
    with Image.open(done.folder / "preview.png") as picture:
        assert picture.format == "PNG"


def test_equal_inputs_give_equal_bytes(report: Report, tmp_path: Path) -> None:
    settings, systems = trio(tmp_path, ablations=("steps",))
    extra = {"ablations": [ablation(tmp_path, "steps", [(0.7, 0.8), (0.8, 0.8)])]}
    first, second = report(settings, systems, **extra), report(settings, systems, **extra)
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == [
        *("ablations.csv", "paired.csv", "preview.png", "report.html", "report.json", "scores.csv"),
        *("summary.csv", "systems.csv", "table_image.tex", "table_pixel.tex"),
    ]
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_no_path_and_no_file_name_of_opaque_images_goes_in(report: Report, tmp_path: Path) -> None:
    settings, systems = trio(
        tmp_path,
        data={"root": SECRET, "masks": f"{SECRET}/masks", "pseudonyms": True},
        auxiliary={"root": f"{SECRET}/aux"},
        encoders={"main": {"weights": f"{SECRET}/models/vit.pt"}},
    )
    segmentation = compare_settings(
        {"system": "segmentation", "sam": f"{SECRET}/sam", "salient": f"{SECRET}/s.pt", "trust_salient": True}
    )
    settings = settings.model_copy(update={"systems": (*settings.systems, *segmentation.systems)})
    failed = [CaseFailure("a_1/0a1b", "encode", f"no image at {SECRET}/patient.png", f"{SECRET}/patient.png", "a_1")]
    done = report(settings, systems, failures=failed, notes=[f"{HOSTILE} {SECRET}/notes"])
    for path in done.folder.iterdir():
        content = path.read_bytes()
        for word in (b"factory", b"patient", str(tmp_path).encode()):
            assert word not in content, path.name
    assert done.json["settings"]["encoders"]["main"]["weights"] == f"{PLACEHOLDER}/vit.pt"
    assert done.json["settings"]["data"]["root"] == PLACEHOLDER
    assert done.json["settings"]["systems"][-1]["sam"] == f"{PLACEHOLDER}/sam"
    assert done.html.count("<script") == 1, "the kit's"


@pytest.mark.parametrize(
    ("encoder", "settings", "words"),
    [
        (
            EncoderInfo(description="x", random_weights=True, embedded=False),
            {"tag": "laion400m_e32"},
            "Random weights.",
        ),
        (
            EncoderInfo(description="x", random_weights=False, embedded=True),
            {"tag": "laion400m_e32"},
            "Embedded model.",
        ),
        (CLIP, {"model": "embedded"}, "Embedded model."),
        (CLIP, {"seed": 1}, "Random weights."),
    ],
)
def test_whose_weights_are_no_clips_is_said_everywhere(
    report: Report, tmp_path: Path, encoder: EncoderInfo, settings: dict[str, Any], words: str
) -> None:
    chosen = compare_settings(*TRIO[:1], encoders={"main": settings}, published="mvtec")
    done = report(chosen, [write_system(tmp_path, chosen.systems[0], {"a": seeds_of(0.9)}, encoder=encoder)])
    assert words in done.page.words
    assert "not all encoders here are CLIP" in done.page.words
    assert words in done.tex("image")
    # also without any result
    if encoder is CLIP:
        assert words in report(chosen).page.words


def test_notice_names_the_systems_it_concerns(report: Report, tmp_path: Path) -> None:
    encoders = {"main": {"tag": "laion400m_e32"}, "small": {"model": "embedded"}}
    settings = compare_settings({"system": "clip"}, {"system": "dual", "encoder": "small"}, encoders=encoders)
    done = report(settings, [write_system(tmp_path, settings.systems[0], {"a": seeds_of(0.9)})])
    assert "This concerns only Dual-image." in done.page.words


def test_nothing_evaluated_is_said(report: Report) -> None:
    done = report(compare_settings(), failures=[CaseFailure("a", "encode", "no image")])
    assert "No system was evaluated." in done.page.words
    assert not (done.folder / "preview.png").exists()
    assert latex_rows(done.tex("image")) == [["System ", " AUROC ", " F1max ", " AP"]]


def test_damaged_or_foreign_evaluations_are_errors_of_one_line(report: Report, tmp_path: Path) -> None:
    settings, systems = trio(tmp_path)
    other = write_evaluation(tmp_path / "other", "text")
    with pytest.raises(InputError, match="contains no variant system"):
        report(
            settings,
            [
                dataclasses.replace(
                    systems[0], categories={"a": {0: dataclasses.replace(_first(systems[0]), folder=other)}}
                )
            ],
        )
    (_first(systems[0]).folder / METRICS_FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="is not a file of this step"):
        report(settings, systems)


def _first(system: SystemResult[Path]) -> Any:
    return system.categories["a_1"][0]


@needs_browser
def test_the_page_is_sound_in_a_narrow_window(report: Report, tmp_path: Path) -> None:
    settings, systems = trio(tmp_path)
    done = report(settings, systems)
    with opened(done.folder / "report.html", tmp_path, width=360) as page:
        assert_sound(page)
