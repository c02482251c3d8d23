"""Thresholds, lesions and tables against loops and known answers, and the step with artificial segmenters."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from medad.anomalies.insert import InsertedLesion
from medad.base.errors import CaseFailure, ConfigError, InputError
from medad.base.storage import read_record
from medad.cohort.datasets import LabelledScan
from medad.cohort.phantom import write_lits_phantoms
from medad.config.liver import InferenceSettings, PostprocessSettings, PreprocessSettings
from medad.config.sensitivity import (
    ContrastSettings,
    InsertionSettings,
    MeasureSettings,
    SensitivitySettings,
    parse_sensitivity,
)
from medad.evaluation.metrics import auroc
from medad.evaluation.sensitivity import (
    VolumeRecord,
    find_bin,
    measure_lesions,
    operating_point,
    sensitivity_table,
    summarise_lesions,
    wilson_interval,
)
from medad.reports.sensitivity.report import REPORT_FILES, write_sensitivity_report
from medad.steps.cases import PROBABILITY
from medad.steps.inserted import RECORD, measure_inserted
from medad.steps.results import Member, Model, Segmenter, VolumeResult

MEASURE = MeasureSettings(false_positive_ml=0.5, overlap=0.1, surroundings_mm=5.0)
SEGMENTER = Segmenter(
    PreprocessSettings(slice_px=64),
    Model((Member(Path("r"), Path("s")),)),
    InferenceSettings(batch_size=3, exclude=("vessels",)),
    PostprocessSettings(),
)
SHAPE = (60, 56, 30)
MM = (1.0, 1.2, 2.0)


@settings(max_examples=100)
@given(
    values=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0]), min_size=1, max_size=40),
    allowed=st.integers(0, 45),
    voxel=st.sampled_from([0.5, 1.0, 2.4]),
)
def test_the_threshold_is_the_lowest_that_marks_no_more_than_allowed(
    values: list[float], allowed: int, voxel: float
) -> None:
    """Compare with a loop that tries every occurring probability as threshold."""
    probability = np.array(values, np.float32)
    wanted_ml = allowed * voxel / 1000
    found = operating_point(probability, voxel, wanted_ml or 1e-12)
    counts = {float(t): sum(float(p) >= float(t) for p in probability) for t in probability}
    good = [t for t, count in counts.items() if count <= allowed]
    marked = int(np.count_nonzero(probability >= found.threshold))
    assert found.marked_ml == pytest.approx(marked * voxel / 1000)
    if good:
        assert found.threshold == min(good)
    else:
        assert marked == 0
        assert found.threshold > max(values)


def test_a_map_of_one_value_marks_nothing_and_nan_is_refused() -> None:
    one = operating_point(np.ones(10, np.float32), 1.0, 0.005)
    assert one.marked_ml == 0
    assert not (np.ones(3, np.float32) >= one.threshold).any()
    with pytest.raises(ValueError, match="NaN"):
        operating_point(np.array([np.nan], np.float32), 1.0, 1.0)


def test_lesions_are_measured_as_loops_would() -> None:
    rng = np.random.default_rng(0)
    liver = np.zeros((24, 22, 14), dtype=np.bool_)
    liver[2:-2, 2:-2, 1:-1] = True
    number = np.zeros(liver.shape, np.int16)
    number[4:8, 4:8, 4:7] = 1
    number[9:12, 4:9, 4:6] = 2
    lesions = [
        InsertedLesion((5, 5, 5), 9.0, (9.0, 8.0, 8.0), -40.0, 1.0),
        InsertedLesion((10, 6, 4), 7.0, (7.0,) * 3, 30.0, 1.0),
    ]
    before = rng.random(liver.shape, dtype=np.float32)
    after = np.clip(before * 0.8 + 0.3 * (number == 1), 0, 1).astype(np.float32)
    measure = MeasureSettings(false_positive_ml=0.4, overlap=0.3, surroundings_mm=2.5)
    point, outside_ml, records = measure_lesions(after, before, liver, number, lesions, MM, measure)
    threshold = operating_point(before[liver], float(np.prod(MM)), 0.4).threshold
    assert point.threshold == threshold
    outside = [v for v in np.ndindex(*liver.shape) if liver[v] and number[v] == 0]
    assert outside_ml == pytest.approx(sum(after[v] >= threshold for v in outside) * np.prod(MM) / 1000)
    for count, (lesion, record) in enumerate(zip(lesions, records, strict=True), start=1):
        own = [v for v in np.ndindex(*liver.shape) if number[v] == count]
        hit = sum(after[v] >= threshold for v in own)
        assert record.voxels == len(own)
        assert record.contrast_hu == lesion.contrast_hu
        assert record.marked_share == pytest.approx(hit / len(own))
        assert record.found == (hit >= 0.3 * len(own))
        assert record.by_chance == (sum(before[v] >= threshold for v in own) >= 0.3 * len(own))
        wins = sum((after[a] > after[b]) + 0.5 * (after[a] == after[b]) for a in own for b in outside)
        assert record.voxel_auroc == pytest.approx(wins / (len(own) * len(outside)))
        near = [
            v
            for v in outside
            if min(sum(((i - j) * s) ** 2 for i, j, s in zip(v, w, MM, strict=True)) for w in own) <= 2.5**2
        ]
        wrong = sum(after[v] >= threshold for v in near)
        assert record.dice == pytest.approx(2 * hit / (hit + wrong + len(own)))


@pytest.mark.parametrize(("found", "inserted"), [(0, 1), (0, 12), (7, 12), (12, 12), (1, 200)])
def test_wilson_interval_is_its_formula(found: int, inserted: int) -> None:
    z, p, n = 1.959963984540054, found / inserted, inserted
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson_interval(found, inserted) == pytest.approx((middle - half, middle + half), abs=1e-9)


class Scan:
    """A liver in a volume of noise, with segmenters that know it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.affine = np.diag([-MM[0], -MM[1], MM[2], 1.0])
        rng = np.random.default_rng(5)
        self.liver = np.zeros(SHAPE, dtype=np.bool_)
        self.liver[6:-6, 5:-5, 2:-2] = True
        self.hu = np.rint(np.where(self.liver, 100, -60) + 10 * rng.standard_normal(SHAPE)).astype(np.float32)
        self.case = LabelledScan(folder / "scan.nii", folder / "label.nii", (1,), None)
        nibabel.Nifti1Image(self.hu, self.affine).to_filename(self.case.scan)
        nibabel.Nifti1Image(self.liver.astype(np.uint8), self.affine).to_filename(self.case.label)
        self.seen: list[NDArray[np.float32]] = []

    def write(self, folder: Path, probability: NDArray[Any]) -> Path:
        folder.mkdir(exist_ok=True)
        nibabel.Nifti1Image(probability.astype(np.float32), self.affine).to_filename(folder / PROBABILITY)
        return folder

    def profile(self, case: LabelledScan, work: Path) -> None:
        """Write the inserted contrast as probability: 100 HU give 1."""
        inserted = np.asarray(nibabel.load(case.scan).dataobj)
        labels = np.asarray(nibabel.load(case.label).dataobj)
        assert not list(work.iterdir())
        np.testing.assert_array_equal(labels > 0, self.liver)
        self.seen.append(inserted - self.hu)
        self.write(work, np.abs(inserted - self.hu) / 100)


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    return Scan(tmp_path / "data")


def insertion(**values: Any) -> InsertionSettings:
    base: dict[str, Any] = {
        "seed": 0, "repeat": 0, "group": 0, "bins_mm": [(5, 8), (12, 20)], "contrast": [-60, -40], "place": "inside",
        "edge_mm": 1.0,
    }  # fmt: skip
    return InsertionSettings.model_validate(base | values)


@contextmanager
def segmented_by(segment: Callable[[LabelledScan, Path], object]) -> Iterator[None]:
    """Replace preparation and networks by `segment`, which gets the inserted scan and an empty folder."""
    inserted: list[LabelledScan] = []

    def prepare(
        case: LabelledScan, settings: PreprocessSettings, out: Path, *, training: bool, exclude: tuple[str, ...]
    ) -> None:
        assert (settings, training) == (SEGMENTER.preprocess, False)
        assert exclude == SEGMENTER.inference.exclude
        inserted.append(case)

    def run(
        prepared: Path, model: Model[Path], settings: InferenceSettings, post: PostprocessSettings,
        device: str, out: Path, *, largest_batch: int | None,
    ) -> None:  # fmt: skip
        assert model == SEGMENTER.model
        assert (settings, post) == (SEGMENTER.inference, SEGMENTER.postprocess)
        assert (device, largest_batch) == ("cpu", 2)
        segment(inserted.pop(), out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medad.steps.inserted.prepare_case", prepare)
        patch.setattr("medad.steps.inserted.segment_case", run)
        yield


def measured(
    scan: Scan, out: Path, healthy: Path, segment: Callable[[LabelledScan, Path], object], **values: Any
) -> VolumeRecord:
    out.mkdir()
    with segmented_by(segment):
        measure_inserted(
            scan.case, insertion(**values), MEASURE, healthy, SEGMENTER, out, device="cpu", largest_batch=2
        )
    assert [path.name for path in out.iterdir()] == [RECORD], "the inserted scan is removed"
    return read_record(VolumeRecord, out / RECORD)


@pytest.mark.parametrize("place", ["inside", "rim"])
@pytest.mark.parametrize("contrast", [{"hu": [-60, -40]}, {"hu": [20, 40]}, {"hu": [-60, -40], "kind": "mixed"}])
def test_a_segmenter_that_sees_what_was_inserted_finds_all(
    scan: Scan, tmp_path: Path, place: str, contrast: dict[str, Any]
) -> None:
    nothing = scan.write(tmp_path / "healthy", np.zeros(SHAPE))
    record = measured(scan, tmp_path / "out", nothing, scan.profile, place=place, contrast=contrast)
    assert len(record.lesions) == 2
    assert all(lesion.found and not lesion.by_chance for lesion in record.lesions)
    assert record.healthy_false_positive_ml == 0
    for lesion in record.lesions:
        assert lesion.voxel_auroc is not None
        assert lesion.voxel_auroc > 0.9  # the soft edge lies outside, and a mixed lesion is 0 between core and rim
        assert contrast["hu"][0] <= lesion.contrast_hu <= contrast["hu"][1]
    assert not scan.seen[0][~scan.liver].any()


def test_a_segmenter_that_says_one_thing_everywhere_finds_none(scan: Scan, tmp_path: Path) -> None:
    constant = scan.write(tmp_path / "healthy", np.full(SHAPE, 0.7))
    record = measured(scan, tmp_path / "out", constant, lambda _, work: scan.write(work, np.full(SHAPE, 0.7)))
    assert not any(lesion.found or lesion.by_chance for lesion in record.lesions)
    assert [lesion.voxel_auroc for lesion in record.lesions] == [0.5, 0.5]


def test_a_segmenter_blind_to_lesions_finds_as_many_as_by_chance(scan: Scan, tmp_path: Path) -> None:
    """Use the same map of noise with and without lesions."""
    noise = ndimage.gaussian_filter(np.random.default_rng(1).random(SHAPE), 2)
    healthy = scan.write(tmp_path / "healthy", noise)
    for seed in range(4):
        record = measured(scan, tmp_path / f"out{seed}", healthy, lambda _, work: scan.write(work, noise), seed=seed)
        assert all(lesion.found == lesion.by_chance for lesion in record.lesions)
        assert 0.5 - np.prod(MM) / 1000 < record.healthy_false_positive_ml <= 0.5


def test_contrasts_are_compared_on_the_same_lesions_and_repeats_on_others(scan: Scan, tmp_path: Path) -> None:
    nothing = scan.write(tmp_path / "healthy", np.zeros(SHAPE))
    rows: list[dict[str, Any]] = [
        {"contrast": [-60, -40]},
        {"contrast": [20, 40]},
        {"contrast": [-60, -40]},
        {"repeat": 1},
        {"group": 1},
    ]
    records = [measured(scan, tmp_path / f"o{n}", nothing, scan.profile, **row) for n, row in enumerate(rows)]
    sizes = [[(lesion.diameter_mm, lesion.voxels) for lesion in record.lesions] for record in records]
    assert sizes[0] == sizes[1] == sizes[2]
    assert records[0] == records[2]
    assert sizes[0] != sizes[3]
    assert sizes[3] != sizes[4]
    for record in records:
        assert [find_bin(lesion.diameter_mm, record.bins_mm) for lesion in record.lesions] == [(12, 20), (5, 8)]


def test_what_finds_no_room_is_left_out_and_counted(scan: Scan, tmp_path: Path) -> None:
    nothing = scan.write(tmp_path / "healthy", np.zeros(SHAPE))
    record = measured(scan, tmp_path / "out", nothing, scan.profile, bins_mm=[(5, 8), (70, 90)])
    rows = sensitivity_table([record], [(5.0, 8.0), (70.0, 90.0)], [record.contrast.label], ["inside"], ("size",))
    assert [(row.figures.planned, row.figures.inserted) for row in rows] == [(1, 1), (1, 0)]

    def never(_: LabelledScan, work: Path) -> None:
        raise AssertionError(work)

    alone = measured(scan, tmp_path / "alone", nothing, never, bins_mm=[(70, 90)])
    assert alone.lesions == ()


def test_scans_that_are_not_healthy_or_too_small_are_refused(tmp_path: Path, scan: Scan) -> None:
    (tmp_path / "lits").mkdir()
    (path,) = write_lits_phantoms(tmp_path / "lits", 1)
    ill = LabelledScan(path, path.with_name("segmentation-0.nii.gz"), (1, 2), 2)
    with pytest.raises(InputError, match=r"this label contains tumour \(2\)"):
        measure_inserted(ill, insertion(), MEASURE, path, SEGMENTER, tmp_path)
    large = MEASURE.model_copy(update={"false_positive_ml": 1000.0})
    with pytest.raises(InputError, match="must be smaller than this liver"):
        measure_inserted(scan.case, insertion(), large, path, SEGMENTER, tmp_path)


def volume(place: str, hu: tuple[float, float], found: list[bool], **values: Any) -> VolumeRecord:
    """Return a record with lesions of 6 and 10 mm, as many as `found` has entries."""
    lesions = [
        {
            "diameter_mm": size, "contrast_hu": hu[0], "volume_mm3": 9.0, "voxels": 9, "found": one, "by_chance": False,
            "marked_share": float(one), "voxel_auroc": 0.5 + one / 2, "dice": one / 2,
        }
        for size, one in zip((6.0, 10.0), found, strict=False)
    ]  # fmt: skip
    base: dict[str, Any] = {
        "contrast": hu, "place": place, "repeat": 0, "bins_mm": [(5, 8), (8, 12)], "threshold": 0.5,
        "healthy_false_positive_ml": 5.0, "inserted_false_positive_ml": 4.0, "lesions": lesions,
    }  # fmt: skip
    return VolumeRecord.model_validate(base | values)


DARK, BRIGHT = (-50.0, -30.0), (15.0, 30.0)
VOLUMES = [
    volume("inside", DARK, [True, True]),
    volume("inside", DARK, [False, True], repeat=1),
    volume("rim", DARK, [False]),
    volume("inside", BRIGHT, [False, False]),
]
STUDY: dict[str, Any] = {
    "healthy": {"root": "/share/doe_jane", "layout": "btcv"},
    "diameters_mm": [5, 8, 12],
    "contrasts_hu": [list(DARK), list(BRIGHT)],
}


def test_tables_pool_over_what_they_do_not_show() -> None:
    bins: list[Any] = [(5.0, 8.0), (8.0, 12.0)]
    labels = [ContrastSettings(hu=DARK).label, ContrastSettings(hu=BRIGHT).label]

    def counts(*by: Any) -> list[tuple[int, int, int]]:
        rows = sensitivity_table(VOLUMES, bins, labels, ["inside", "rim"], by)
        return [(row.figures.planned, row.figures.inserted, row.figures.found) for row in rows]

    assert counts() == [(8, 7, 3)]
    assert counts("size") == [(4, 4, 1), (4, 3, 2)]
    assert counts("contrast") == [(6, 5, 3), (2, 2, 0)]
    assert counts("place") == [(6, 6, 3), (2, 1, 0)]
    assert counts("size", "place") == [(3, 3, 1), (1, 1, 0), (3, 3, 2), (1, 0, 0)]
    (everything,) = sensitivity_table(VOLUMES, bins, labels, ["inside", "rim"], ())
    assert everything.figures.sensitivity == 3 / 7
    assert everything.figures.dice == pytest.approx(3 * 0.5 / 7)
    assert everything.figures.voxel_auroc == pytest.approx((3 * 1 + 4 * 0.5) / 7)
    assert (everything.figures.low, everything.figures.high) == wilson_interval(3, 7)
    assert summarise_lesions([]).sensitivity is None


def test_the_volumes_of_a_study_hold_every_lesion_once() -> None:
    study = parse_sensitivity({"healthy": STUDY["healthy"], "repeats": 2}, source="test")
    assert study.bins == [(5, 8), (8, 12), (12, 20), (20, 30), (30, 45), (45, 60)]
    assert [one.kind for one in study.contrasts_hu].count("mixed") == 1
    asked = [(v.place, v.contrast.label, v.repeat, size) for v in study.volumes() for size in v.bins_mm]
    assert len(set(asked)) == len(asked) == 2 * 7 * 2 * 6
    assert all(len(v.bins_mm) <= 3 for v in study.volumes())


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"diameters_mm": [8, 5]}, "must be in ascending order"),
        ({"contrasts_hu": [[-20, 20]]}, "both below 0 or both above 0"),
        ({"contrasts_hu": [[-20, -10], {"hu": [-20, -10]}]}, "must not contain an entry twice"),
        ({"settings": {"test_data.root": "/x"}}, "those of `healthy`"),
        ({"healthy": {"root": "x", "layout": "btcv", "insert": {}}}, "inserts its own lesions"),
        ({"overlap": 0}, "overlap"),
    ],
)
def test_wrong_settings_are_one_line(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        parse_sensitivity(STUDY | values, source="study")
    assert "\n" not in str(caught.value)


def report_of(tmp_path: Path, **options: Any) -> Path:
    out = tmp_path / f"report{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    results = []
    for number, one in enumerate(VOLUMES):
        folder = out.with_name(f"{out.name}-{number}")
        folder.mkdir()
        (folder / RECORD).write_text(one.model_dump_json(), encoding="utf-8")
        results.append(VolumeResult(f"case-{number % 2}", folder))
    settings_ = parse_sensitivity(STUDY, source="test")
    write_sensitivity_report(out, settings=settings_, results=results, versions={"numpy": "2"}, **options)
    return out


def test_the_report_says_what_was_found_and_no_path(tmp_path: Path) -> None:
    out = report_of(tmp_path, failures=[CaseFailure("case-9", "prepare", "is /share/doe_jane/x bad", "x.nii")])
    assert sorted(path.name for path in out.iterdir()) == sorted(REPORT_FILES)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["summary"]["found"], report["summary"]["inserted"], report["summary"]["planned"]) == (3, 7, 8)
    assert report["warnings"] == []
    assert any("1 of 8 planned lesions did not fit" in note for note in report["notes"])
    text = "".join((out / name).read_text(encoding="utf-8") for name in REPORT_FILES if not name.endswith(".png"))
    assert "doe_jane" not in text
    with (out / "lesions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["found"]) for row in rows].count(1) == 3
    assert len(rows) == 7
    cells = list(csv.DictReader(io.StringIO((out / "sensitivity.csv").read_text(encoding="utf-8"))))
    whole = [row for row in cells if row["size_from_mm"] and row["contrast"] and row["place"]]
    assert sum(int(row["inserted"]) for row in whole) == 7
    assert (out / "preview.png").read_bytes()[:4] == b"\x89PNG"
    again = report_of(tmp_path, failures=[CaseFailure("case-9", "prepare", "is /share/doe_jane/x bad", "x.nii")])
    for name in REPORT_FILES:
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_scans_of_training_are_told_at_the_head(tmp_path: Path) -> None:
    for trained_on, said in ((frozenset({"case-1"}), "was trained on some"), (None, "is not known")):
        out = report_of(tmp_path, trained_on=trained_on)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert said in report["warnings"][0]
        html = (out / "report.html").read_text(encoding="utf-8")
        assert said in html.partition("</header>")[0]
        assert [scan["trained_on"] for scan in report["scans"]] == [False, trained_on is not None]


def test_a_study_without_results_has_a_report_too(tmp_path: Path) -> None:
    settings_ = SensitivitySettings.model_validate(STUDY)
    failures = [CaseFailure("case-1", "find", "no such file", "")]
    write_sensitivity_report(
        tmp_path, settings=settings_, results=[], failures=failures, versions={}, show_file_names=False
    )
    assert "No lesion was measured" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "preview.png").exists()


def test_auroc_of_a_lesion_is_that_of_the_metrics() -> None:
    scores = np.array([0.2, 0.8, 0.8, 0.1], np.float32)
    assert auroc(scores, np.array([False, True, False, False])) == pytest.approx(2.5 / 3)
