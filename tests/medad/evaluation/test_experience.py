"""Facts about scans, and sentences about a scan that is unlike all training scans."""

from __future__ import annotations

import numpy as np
import pytest

from medad.classifier.features import LiverStack
from medad.evaluation.experience import ScanFacts, outside_experience, scan_facts

TRAINED = (
    ScanFacts(liver_hu=95, vessel_hu=20, noise_hu=5, plane_mm=2.5),
    ScanFacts(liver_hu=115, vessel_hu=40, noise_hu=8, plane_mm=5.0),
)


def _scan(**changes: float) -> ScanFacts:
    return ScanFacts.model_validate({"liver_hu": 100, "vessel_hu": 30, "noise_hu": 6, "plane_mm": 3} | changes)


def test_a_scan_like_the_training_scans_gives_no_sentence() -> None:
    assert outside_experience(_scan(), TRAINED) == []
    for each in TRAINED:
        assert outside_experience(each, TRAINED) == []


@pytest.mark.parametrize(
    ("field", "inside", "outside", "words"),
    [
        ("liver_hu", 80.0, 79.0, "median of the liver 79 HU; training scans: 95 to 115 HU"),
        ("liver_hu", 130.0, 131.0, "median of the liver 131 HU; training scans: 95 to 115 HU"),
        ("vessel_hu", 12.0, 11.5, "contrast of vessels 11.5 HU; training scans: 20 to 40 HU"),
        ("noise_hu", 10.0, 10.1, "noise 10.1 HU; training scans: 5 to 8 HU"),
        ("plane_mm", 5.5, 6.0, "distance between planes 6 mm; training scans: 2.5 to 5 mm"),
    ],
)
def test_each_fact_has_its_own_distance(field: str, inside: float, outside: float, words: str) -> None:
    assert outside_experience(_scan(**{field: inside}), TRAINED) == []
    assert outside_experience(_scan(**{field: outside}), TRAINED) == [f"outside the model's experience: {words}"]


def test_several_facts_give_several_sentences_and_unknown_training_scans_none() -> None:
    assert len(outside_experience(_scan(liver_hu=20, vessel_hu=0, noise_hu=30, plane_mm=10), TRAINED)) == 4
    assert outside_experience(_scan(), ()) == []


def test_facts_measure_noise_and_vessels() -> None:
    """Compare white noise with its standard deviation, and a liver with bright tubes with their contrast."""
    organ = np.ones((12, 48, 48), bool)
    rng = np.random.default_rng(0)
    spacing_mm = (3.0, 2.0, 2.0)
    hu = rng.normal(0, 7, organ.shape).astype(np.float32)
    plain = scan_facts(LiverStack(hu, organ, spacing_mm), 104.26, 2.996)
    assert (plain.liver_hu, plain.plane_mm) == (104.3, 3.0)
    assert plain.noise_hu == pytest.approx(7, rel=0.15)
    tubes = np.zeros(organ.shape, bool)
    tubes[:, 8::16, 8::16] = tubes[:, 9::16, 8::16] = tubes[:, 8::16, 9::16] = tubes[:, 9::16, 9::16] = True
    bright = scan_facts(LiverStack(hu + np.float32(80) * tubes, organ, spacing_mm), 104.0, 3.0)
    assert bright.vessel_hu > plain.vessel_hu + 10
    assert bright.noise_hu == pytest.approx(plain.noise_hu, rel=0.1)
