"""Thresholds from the scores of normal images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from medad.base.errors import ConfigError, InputError
from zsad.steps.threshold import SavedThreshold, conformal_threshold, read_threshold, require_same_judge

SAVED = SavedThreshold(
    threshold=0.5, source="normal", images=3, rate=0.05, method="MuSc", encoder="e", judged_by="a" * 64
)


@pytest.mark.parametrize(
    ("count", "rate", "flagged_above"),
    [
        (19, 0.05, 19),  # k = 20 x 0.95 = 19: above all
        (39, 0.05, 38),  # k = 40 x 0.95 = 38: one of 39 is above
        (99, 0.1, 90),
        (3, 0.05, 3),  # too few for the rate: above all
        (1, 0.5, 1),
    ],
)
def test_the_threshold_is_just_above_the_kth_score(count: int, rate: float, flagged_above: int) -> None:
    scores = np.random.default_rng(count).permutation(np.arange(1.0, count + 1))
    found = conformal_threshold(scores, rate)
    assert found == math.nextafter(flagged_above, math.inf)
    assert np.count_nonzero(scores >= found) == count - flagged_above


def test_new_normal_images_are_flagged_at_the_rate() -> None:
    """Check the rate: a new one of exchangeable scores reaches the threshold with probability 1 - k / 40 = 2 / 40."""
    rng = np.random.default_rng(0)
    flagged = [rng.random() >= conformal_threshold(rng.random(39), 0.05) for _ in range(20_000)]
    assert abs(np.mean(flagged) - 0.05) < 0.005


def test_a_saved_threshold_is_read_and_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "threshold.json"
    path.write_text(SAVED.model_dump_json(by_alias=True), encoding="utf-8")
    saved = read_threshold(path)
    assert saved == SAVED
    require_same_judge(saved, path, "MuSc", "e", "a" * 64)
    for method, encoder, digest in (("CLIP", "e", "a" * 64), ("MuSc", "f", "a" * 64), ("MuSc", "e", "b" * 64)):
        with pytest.raises(ConfigError, match=r"threshold.json"):
            require_same_judge(saved, path, method, encoder, digest)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_threshold(tmp_path / "none.json")
    other = tmp_path / "other.json"
    other.write_text('{"threshold": 1}', encoding="utf-8")
    with pytest.raises(InputError, match="not a saved threshold"):
        read_threshold(other)
